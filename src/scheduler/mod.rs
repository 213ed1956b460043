//! Decides which requests share a batch, and when that batch is sealed.
//!
//! Pure: each input carries the moment it happened, so equal inputs give equal batches, in a unit test, in the
//! simulation, or replayed from a recorded trace. No clock, I/O, thread or lock.
//!
//! Always true
//! - A ticket is in one place: a lane, a composition, or gone. It leaves exactly once: sealed, expired or cancelled.
//! - A batch has at most `rows_max` rows and `cells_max` padded cells, and no row is longer than its padded length.
//! - Rows, cells and bytes waiting never exceed the bounds of [`QueueLimits`]; what does not fit is refused, never queued.
//! - An idle executor faces a non-empty queue only inside a window that [`Scheduler::poll_timeout`] ends.
//!
//! Elsewhere: copying bytes (executor/pack.rs), who executes (batcher), choosing limits (config/limits.rs). The policy,
//! that is when to seal and what to take, is seal.rs alone.

mod admission;
mod bucket;
mod compose;
mod expiry;
mod lane;
mod seal;

use std::time::Duration;

pub use admission::QueueLimits;
pub use bucket::Buckets;
pub use seal::Policy;

use crate::vocab::{Code, ModelHandle, Moment, Refusal, SealReason, Stage};
use admission::Totals;
use compose::Compositions;
use expiry::Expiry;
use lane::{Lanes, Place, Tickets};

/// An admitted request, as the scheduler knows it. Its number is reused after it left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TicketId(pub u32);

impl TicketId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A test's wish: requests with this tag form exactly one batch of `rows` rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compose {
    pub tag: u64,
    pub rows: u32,
}

/// What the scheduler needs to know of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    pub model: ModelHandle,
    pub rows: u32,
    /// Length of its rows; at most the largest bucket.
    pub len: u32,
    /// Payload bytes held while it waits.
    pub bytes: u64,
    pub deadline: Option<Moment>,
    pub compose: Option<Compose>,
}

/// A batch whose rows are final. Its members were written to the list given to [`Scheduler::poll_batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedBatch {
    /// Counted from 1 since the scheduler was made.
    pub id: u64,
    pub model: ModelHandle,
    pub rows: u32,
    /// Rows that would have fitted at this padded length.
    pub rows_possible: u32,
    pub padded_len: u32,
    /// Cells that carry data: the sum of the rows' lengths.
    pub cells_real: u64,
    pub reason: SealReason,
    pub sealed_at: Moment,
}

impl SealedBatch {
    pub fn cells_padded(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.padded_len)
    }
}

/// Which executors run a model. Models of one group compete for its executors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Group {
    /// The executor threads.
    #[default]
    Executors,
    /// The batcher's own thread, for models whose whole batch costs less than handing it to another thread.
    Inline,
}

/// How the executor that asks for a batch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vacancy {
    /// It has nothing to do.
    Idle,
    /// It is running a batch and has a spare slot. Only a full batch is worth binding now: another row might still
    /// join any other. And only as long as nobody is overtaken for longer than a batch takes.
    Spare,
}

/// The waiting rows of one model.
#[derive(Debug)]
struct ModelQueue {
    policy: Policy,
    lanes: Lanes,
    totals: Totals,
}

/// The scheduler: `handle_*` takes what happened, `poll_*` says what to do.
#[derive(Debug)]
pub struct Scheduler {
    limits: QueueLimits,
    tickets: Tickets,
    models: Vec<ModelQueue>,
    totals: Totals,
    expiry: Expiry,
    compositions: Compositions,
    batches: u64,
    draining: bool,
    drain_rate: admission::DrainRate,
}

impl Scheduler {
    pub fn new(limits: QueueLimits, policies: Vec<Policy>) -> Scheduler {
        let models = policies
            .into_iter()
            .map(|policy| ModelQueue { lanes: Lanes::new(policy.buckets.len()), policy, totals: Totals::default() })
            .collect();
        Scheduler {
            limits,
            tickets: Tickets::new(limits.rows_max),
            models,
            totals: Totals::default(),
            expiry: Expiry::new(limits.rows_max),
            compositions: Compositions::default(),
            batches: 0,
            draining: false,
            drain_rate: admission::DrainRate::default(),
        }
    }

    /// Admits a request or refuses it. A refused one was never queued.
    pub fn handle_arrival(&mut self, now: Moment, arrival: Arrival) -> Result<TicketId, Refusal> {
        let queue = self
            .models
            .get(arrival.model.index())
            .ok_or_else(|| Refusal::new(Code::NotFound, format!("model handle {} is unknown", arrival.model.0)))?;
        if arrival.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Refusal::at_stage(Code::DeadlineExceeded, Stage::Arrival, "the deadline was over on arrival"));
        }
        let bucket = admission::fits_any_batch(&queue.policy, &arrival)?;
        let asked = Totals::of(&arrival, queue.policy.buckets.len_at(bucket));
        let wait = || self.drain_rate.time_to_drain(self.totals.cells);
        self.limits.check(&self.totals, &asked, "server", wait)?;
        queue.policy.queue.check(&queue.totals, &asked, "model", wait)?;
        if let Some(compose) = arrival.compose {
            self.compositions.check(&queue.policy, &arrival, compose)?;
        }

        let deadline = match arrival.compose {
            // A composition that never completes must not wait for ever.
            Some(_) => Some(arrival.deadline.unwrap_or(Moment::FAR).min(now + compose::WAIT_MAX)),
            None => arrival.deadline,
        };
        let id = self.tickets.insert(&arrival, bucket, deadline, now);
        self.totals.add(&asked);
        let queue = &mut self.models[arrival.model.index()];
        queue.totals.add(&asked);
        match arrival.compose {
            Some(compose) => self.compositions.join(&mut self.tickets, id, arrival.model, compose),
            None => queue.lanes.push_back(&mut self.tickets, id),
        }
        if let Some(deadline) = deadline {
            self.expiry.push(deadline, id, self.tickets.generation(id));
        }
        Ok(id)
    }

    /// Takes a waiting ticket out. False when it already left: sealed, expired or cancelled before.
    pub fn handle_cancel(&mut self, id: TicketId) -> bool {
        if !self.tickets.is_waiting(id) {
            return false;
        }
        self.leave(id);
        true
    }

    /// The next waiting ticket whose deadline has come. Call until `None`.
    pub fn poll_expired(&mut self, now: Moment) -> Option<TicketId> {
        let id = self.expiry.pop_due(now, &self.tickets)?;
        self.leave(id);
        Some(id)
    }

    /// Seals the batch that should run next, if one should. `members` is cleared and filled in row order.
    ///
    /// Hot: once per batch. Guarded by benches/scheduler.rs.
    pub fn poll_batch(
        &mut self,
        now: Moment,
        group: Group,
        vacancy: Vacancy,
        members: &mut Vec<TicketId>,
    ) -> Option<SealedBatch> {
        members.clear();
        if self.totals.rows == 0 {
            return None;
        }
        let models = &self.models;
        let runs_here = |model: ModelHandle| models[model.index()].policy.group == group;
        match vacancy {
            Vacancy::Idle => {
                if let Some(model) = self.compositions.take_complete(&mut self.tickets, runs_here, members) {
                    return Some(self.seal(now, model, SealReason::Composed, members));
                }
            }
            // They wait for an idle executor, so one has to become idle.
            Vacancy::Spare if self.compositions.has_complete(runs_here) => return None,
            Vacancy::Spare => {}
        }
        let mut best: Option<(Moment, usize, seal::Choice)> = None;
        for (index, queue) in self.models.iter_mut().enumerate() {
            if queue.policy.group != group || queue.totals.rows == 0 {
                continue;
            }
            let choice = seal::choose(&mut queue.lanes, &self.tickets, &queue.policy, vacancy, self.draining, now);
            if let Some(choice) = choice
                && best.as_ref().is_none_or(|(oldest, ..)| choice.oldest < *oldest)
            {
                best = Some((choice.oldest, index, choice));
            }
        }
        let (oldest, index, choice) = best?;
        let overtakes = |queue: &ModelQueue| {
            queue.policy.group == group
                && queue.totals.rows > 0
                && seal::is_overtaken(&queue.lanes, &self.tickets, &queue.policy, oldest, now)
        };
        if vacancy == Vacancy::Spare && self.models.iter().any(overtakes) {
            return None;
        }
        let queue = &mut self.models[index];
        seal::take_rows(&mut queue.lanes, &mut self.tickets, &queue.policy, choice.bucket, members);
        assert!(!members.is_empty(), "a lane is chosen only when its head fits a batch");
        Some(self.seal(now, ModelHandle(index as u16), choice.reason, members))
    }

    /// When [`Scheduler::poll_expired`] or [`Scheduler::poll_batch`] may next have something without a new event.
    /// `idle` says whether an executor of a group is idle: windows of its models matter only then.
    pub fn poll_timeout(&mut self, idle: impl Fn(Group) -> bool) -> Option<Moment> {
        let deadline = self.expiry.next(&self.tickets);
        let window = self
            .models
            .iter()
            .filter(|queue| queue.totals.rows > 0 && idle(queue.policy.group))
            .filter_map(|queue| seal::next_window_end(&queue.lanes, &self.tickets, &queue.policy))
            .min();
        match (deadline, window) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// A batch came back after `service`: the queue drains at its pace, and deadlines are kept by it.
    pub fn handle_finished(&mut self, model: ModelHandle, cells_padded: u64, service: Duration) {
        self.drain_rate.observe(cells_padded, service);
        self.models[model.index()].policy.service.observe(service);
    }

    /// From now on nothing is held back. What arrives was accepted before the drain and is still served.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Replaces a model's window while it serves.
    pub fn set_queue_delay_max(&mut self, model: ModelHandle, delay: Duration) {
        self.models[model.index()].policy.queue_delay_max = delay;
    }

    pub fn is_empty(&self) -> bool {
        self.totals.rows == 0
    }

    /// Rows, cells and bytes of one model that wait.
    pub fn waiting(&self, model: ModelHandle) -> (u64, u64, u64) {
        let totals = &self.models[model.index()].totals;
        (totals.rows, totals.cells, totals.bytes)
    }

    /// When the ticket was admitted. Known until the next arrival, also for a ticket that was just sealed.
    pub fn admitted_at(&self, id: TicketId) -> Moment {
        self.tickets.admitted_at(id)
    }

    fn seal(&mut self, now: Moment, model: ModelHandle, reason: SealReason, members: &[TicketId]) -> SealedBatch {
        let policy = &self.models[model.index()].policy;
        let longest = members.iter().map(|id| self.tickets[*id].bucket).max().expect("a batch has members");
        let padded_len = policy.buckets.len_at(longest);
        let rows_possible = policy.rows_at(padded_len);
        let mut rows = 0;
        let mut cells_real = 0;
        for id in members {
            let ticket = &self.tickets[*id];
            rows += ticket.rows;
            cells_real += u64::from(ticket.rows) * u64::from(ticket.len);
        }
        assert!(rows <= rows_possible, "{rows} rows of {padded_len} in a batch of at most {rows_possible}");
        for id in members {
            // seal.rs and compose.rs took them off their lists; here they leave the books.
            self.forget(*id);
        }
        self.batches += 1;
        SealedBatch { id: self.batches, model, rows, rows_possible, padded_len, cells_real, reason, sealed_at: now }
    }

    /// Takes a waiting ticket off its list and off the books.
    fn leave(&mut self, id: TicketId) {
        match self.tickets[id].place {
            Place::Lane => self.models[self.tickets[id].model.index()].lanes.unlink(&mut self.tickets, id),
            Place::Composition(tag) => self.compositions.unlink(&self.tickets, id, tag),
            Place::Taken | Place::Free => unreachable!("callers checked that the ticket waits"),
        }
        self.forget(id);
    }

    fn forget(&mut self, id: TicketId) {
        let ticket = &self.tickets[id];
        let queue = &mut self.models[ticket.model.index()];
        let held = Totals {
            rows: u64::from(ticket.rows),
            cells: u64::from(ticket.rows) * u64::from(queue.policy.buckets.len_at(ticket.bucket)),
            bytes: ticket.bytes,
        };
        queue.totals.subtract(&held);
        self.totals.subtract(&held);
        self.tickets.remove(id);
    }
}

#[cfg(test)]
mod tests;
