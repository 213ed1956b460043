//! Decides which requests share a batch, when that batch is sealed, and which executor gets it.
//!
//! Pure: each input carries the moment it happened, so equal inputs give equal batches, in a unit test, in the
//! simulation, or replayed from a recorded trace. No clock, I/O, thread or lock.
//!
//! Always true
//! - A ticket is in one place: a lane, a composition, given up, or gone. It leaves exactly once: sealed, expired or
//!   cancelled.
//! - A batch has at most `rows_max` rows and `cells_max` padded cells, and no row is longer than its padded length.
//! - Rows, cells and bytes waiting never exceed the bounds of [`QueueLimits`]; what does not fit is refused, never queued.
//! - An idle executor faces a non-empty queue only inside a window that [`Scheduler::poll_timeout`] ends.
//! - Nothing is allocated in steady state, and 64 bytes at most are held for a waiting request.
//!
//! Elsewhere: copying bytes (executor/pack.rs), who executes (batcher), choosing limits (config/limits.rs). The policies
//! are packing.rs (`cost`), lengths.rs (`buckets`) and fifo.rs (`window`, `greedy_tokens`).

mod admission;
mod backlog;
mod bucket;
mod compose;
pub mod cost;
pub mod decision;
mod due;
pub mod edges;
mod fifo;
pub mod knobs;
mod lane;
mod lengths;
pub mod lint;
mod overrun;
pub mod pace;
mod packing;
mod policy;
mod seats;
pub mod state;
mod tenants;
mod ticket;
pub mod waiting;

use std::time::Duration;

pub use admission::QueueLimits;
pub use bucket::Buckets;
pub use policy::{Class, Edges, Group, PadTo, Policy, PolicyKind, Tuning};
pub use seats::{Running, Seat, SeatSpec};

use crate::vocab::{Code, Layout, ModelHandle, Moment, Refusal, SealReason, Stage};
use admission::Totals;
use backlog::{Backlog, Rank};
use compose::Compositions;
use cost::{CostModel, Work};
use decision::{Decision, DecisionLog, Verdict, VerdictCounts};
use due::Due;
use edges::LengthHistogram;
use lane::Lanes;
use overrun::Overrun;
use packing::{Outcome, Outlook, Packer, Plan};
use seats::Seats;
use tenants::Tenants;
use ticket::{Place, Ticket, Tickets};

/// An admitted request, as the scheduler knows it. Its number is reused after it left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, bincode::Decode, bincode::Encode)]
pub struct TicketId(pub u32);

impl TicketId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// On whose behalf a request came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, bincode::Decode, bincode::Encode)]
pub struct TenantId(pub u16);

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
    pub class: Class,
    pub tenant: TenantId,
}

/// A batch whose rows are final. Its members were written to the list given to [`Scheduler::poll_batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedBatch {
    /// Counted from 1 since the scheduler was made.
    pub id: u64,
    pub model: ModelHandle,
    /// Place of its executor in the list given to [`Scheduler::new`].
    pub executor: u16,
    pub rows: u32,
    /// Rows that would have fitted at this padded length.
    pub rows_possible: u32,
    pub layout: Layout,
    /// What its rows are padded to, or the longest of them.
    pub padded_len: u32,
    /// Cells that carry data: the sum of the rows' lengths.
    pub cells_real: u64,
    /// Sum of the squares of the rows' lengths.
    pub squares_real: u64,
    pub reason: SealReason,
    pub sealed_at: Moment,
    /// Generation of the policy that decided it.
    pub generation: u32,
    /// How long it is expected to take, in ns; 0 where nothing is known.
    pub predicted: u64,
    /// How long its requests should be here at most: the model's objective when it was sealed.
    pub objective: Duration,
}

impl SealedBatch {
    /// The first batch of the first model, full, of rows of these lengths.
    #[cfg(test)]
    pub fn plain(layout: Layout, lens: &[u32], padded_len: u32) -> SealedBatch {
        SealedBatch {
            id: 1,
            model: ModelHandle(0),
            executor: 0,
            rows: lens.len() as u32,
            rows_possible: lens.len() as u32,
            layout,
            padded_len,
            cells_real: lens.iter().map(|len| u64::from(*len)).sum(),
            squares_real: lens.iter().map(|len| u64::from(*len).pow(2)).sum(),
            reason: SealReason::Full,
            sealed_at: Moment(2),
            generation: 1,
            predicted: 0,
            objective: Duration::ZERO,
        }
    }

    /// Cells that are computed, padding included.
    pub fn cells_padded(&self) -> u64 {
        self.work().cells
    }

    /// What its executor has to compute.
    pub fn work(&self) -> Work {
        match self.layout {
            Layout::Padded => Work::padded(self.rows, self.padded_len),
            Layout::Packed => Work { rows: self.rows, cells: self.cells_real, squares: self.squares_real },
        }
    }
}

/// A waiting ticket whose time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// Its deadline came.
    Due(TicketId),
    /// It could not be done by its deadline any more, even alone and at once.
    Hopeless(TicketId),
}

impl Expired {
    pub fn id(self) -> TicketId {
        match self {
            Expired::Due(id) | Expired::Hopeless(id) => id,
        }
    }
}

/// Buckets that the scheduler chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgesChange {
    pub model: ModelHandle,
    pub from: Buckets,
    pub to: Buckets,
    pub generation: u32,
}

/// Everything about one model.
#[derive(Debug, bincode::Decode, bincode::Encode)]
struct ModelQueue {
    policy: Policy,
    /// Raised with each change of the policy.
    generation: u32,
    lanes: Lanes,
    /// Deadlines of those in lanes, and of those in compositions.
    due: Due,
    due_composed: Due,
    totals: Totals,
    backlog: Backlog,
    tenants: Tenants,
    packer: Packer,
    cost: CostModel,
    overrun: Overrun,
    service: lengths::ServiceTime,
    /// Executor time used, by weight: the model of a group that is furthest behind goes first.
    used: f64,
    last_arrival: Option<Moment>,
    /// When to ask it again, as the last decisions said.
    hold: Option<Moment>,
    /// It has been holding rows back since its last batch.
    holding: bool,
    verdicts: VerdictCounts,
    /// How long the admitted rows were.
    seen: LengthHistogram,
    /// When automatic buckets were last looked at.
    edges_seen_at: Moment,
}

impl ModelQueue {
    fn view<'a>(&'a self, tickets: &'a Tickets) -> lengths::View<'a> {
        lengths::View { lanes: &self.lanes, tickets, due: &self.due, policy: &self.policy, service: self.service }
    }

    fn hold_until(&mut self, moment: Moment) {
        self.hold = Some(self.hold.map_or(moment, |hold| hold.min(moment)));
    }

    /// What a ticket counts as.
    fn held(&self, ticket: &Ticket) -> Totals {
        Totals {
            rows: u64::from(ticket.rows),
            cells: u64::from(ticket.rows) * u64::from(self.policy.buckets.len_at(ticket.bucket)),
            bytes: u64::from(ticket.bytes),
        }
    }

    /// Expected time of the batch that it would most likely give, in ns.
    fn typical_batch(&self) -> f64 {
        self.service.mean().as_nanos() as f64
    }
}

/// How an executor that can take a batch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vacancy {
    /// It has nothing to do.
    Idle,
    /// It is running a batch and has a spare slot.
    Spare,
}

/// What a model would do with a vacancy.
enum Proposal {
    Prefix(lengths::Choice),
    Bucket(lengths::Choice),
    Packed(Plan),
}

/// The scheduler: `handle_*` takes what happened, `poll_*` says what to do.
#[derive(Debug, bincode::Decode, bincode::Encode)]
pub struct Scheduler {
    limits: QueueLimits,
    tickets: Tickets,
    models: Vec<ModelQueue>,
    seats: Seats,
    totals: Totals,
    compositions: Compositions,
    /// Given up, and to be told.
    shed: Vec<TicketId>,
    batches: u64,
    draining: bool,
    drain_rate: admission::DrainRate,
    /// Executor time by weight at which the last batch of each group was given.
    used: [f64; 2],
    log: DecisionLog,
    /// When automatic buckets are to be looked at.
    edges_at: Moment,
}

/// A model counts as active for this long after its last request, so that a slow one leaves it an executor.
const ACTIVE: Duration = Duration::from_secs(2);
/// A model whose batches take this many times longer than another's is slow beside it.
const SLOW: f64 = 4.0;
/// Slack of a request without a deadline, in units of what it takes alone, where that is longer than the model's objective.
const PATIENCE: f64 = 8.0;
/// Batches are bound to a busy executor at most so long before it is expected to be free.
const LEAD_MAX: f64 = 500_000.0;

/// Without the 128 bits of `as_nanos`.
fn nanos_of(time: Duration) -> f64 {
    time.as_secs() as f64 * 1e9 + f64::from(time.subsec_nanos())
}

/// How fast a request becomes urgent that has `slack` ns, in 1/ns.
fn urgency_of(slack: f64) -> f32 {
    (1.0 / slack.max(1.0)) as f32
}

impl Scheduler {
    pub fn new(limits: QueueLimits, policies: Vec<Policy>, seats: &[SeatSpec]) -> Scheduler {
        let bound = limits.rows_max.min(ticket::RESERVE_MAX) as usize;
        let reserve = if limits.rows_max == u64::MAX { 1024 } else { bound };
        let models = policies
            .into_iter()
            .map(|policy| ModelQueue {
                lanes: Lanes::new(policy.buckets.len(), policy.kind.is_fair()),
                due: Due::with_capacity(reserve),
                due_composed: Due::default(),
                totals: Totals::default(),
                backlog: Backlog::default(),
                tenants: Tenants::new(),
                packer: Packer::new(policy.buckets.len()),
                cost: {
                    let mut cost = CostModel::default();
                    cost.set_executors(seats.len());
                    cost
                },
                overrun: Overrun::default(),
                service: Default::default(),
                used: 0.0,
                last_arrival: None,
                hold: None,
                holding: false,
                generation: 1,
                verdicts: VerdictCounts::default(),
                seen: LengthHistogram::new(policy.buckets.longest()),
                edges_seen_at: Moment::ZERO,
                policy,
            })
            .collect();
        Scheduler {
            limits,
            tickets: Tickets::new(reserve as u64),
            models,
            seats: Seats::new(seats),
            totals: Totals::default(),
            compositions: Compositions::default(),
            shed: Vec::with_capacity(1024),
            batches: 0,
            draining: false,
            drain_rate: admission::DrainRate::default(),
            used: [0.0; 2],
            log: DecisionLog::default(),
            edges_at: Moment::ZERO,
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
        let executors = self.seats.count(queue.policy.group);
        self.models[arrival.model.index()].tenants.offer(now, arrival.tenant, asked.cells);
        let queue = &self.models[arrival.model.index()];
        let wait = || self.drain_rate.time_to_drain(self.totals.cells, executors);
        self.limits.check(&self.totals, &asked, arrival.class, "server", wait)?;
        queue.policy.queue.check(&queue.totals, &asked, arrival.class, "model", wait)?;
        if let Some(compose) = arrival.compose {
            self.compositions.check(&queue.policy, &arrival, compose)?;
        } else if let Err((refusal, predicted)) = self.admit_by_forecast(now, &arrival, &asked) {
            self.note(Decision {
                verdict: Verdict::Refused,
                predicted,
                ..self.decision(now, arrival.model, u64::from(arrival.len), arrival.rows)
            });
            return Err(refusal);
        }

        let deadline = match arrival.compose {
            // A composition that never completes must not wait for ever.
            Some(_) => Some(arrival.deadline.unwrap_or(Moment::FAR).min(now + compose::WAIT_MAX)),
            None => arrival.deadline,
        };
        let queue = &mut self.models[arrival.model.index()];
        let slack = match deadline {
            Some(deadline) => nanos_of(deadline.since(now)),
            // Nobody who names no deadline wants small batches for it.
            None => nanos_of(queue.policy.slo).max(PATIENCE * queue.cost.predict(arrival.rows, arrival.len)),
        };
        let urgency = urgency_of(slack);
        let tenant = queue.tenants.arrive(arrival.tenant, asked.cells);
        let id = self.tickets.insert(&arrival, bucket, tenant, urgency, now);
        self.totals.add(&asked);
        queue.totals.add(&asked);
        if arrival.compose.is_none() {
            queue.backlog.add(Rank::of(arrival.class, urgency), asked.cells);
        }
        if let Some(deadline) = deadline {
            let due = if arrival.compose.is_some() { &mut queue.due_composed } else { &mut queue.due };
            due.insert(&mut self.tickets, id, deadline);
        }
        queue.packer.arrived(now);
        queue.seen.observe(now, arrival.len, arrival.rows);
        queue.last_arrival = Some(now);
        if queue.totals.rows == asked.rows {
            // It comes back from rest: rest earns nothing.
            queue.used = queue.used.max(self.used[queue.policy.group as usize]);
        }
        match arrival.compose {
            Some(compose) => self.compositions.join(&mut self.tickets, id, arrival.model, compose),
            None => queue.lanes.push_back(&mut self.tickets, &queue.due, id),
        }
        Ok(id)
    }

    /// Most rows of this length in one batch of a model; `None` when no batch takes such a row.
    pub fn rows_of_batch(&self, model: ModelHandle, len: u32) -> Option<u32> {
        let policy = &self.models.get(model.index())?.policy;
        Some(policy.rows_at(policy.buckets.len_at(policy.buckets.of(len)?)))
    }

    /// Takes a waiting ticket out. False when it already left: sealed, expired or cancelled before.
    pub fn handle_cancel(&mut self, id: TicketId) -> bool {
        if !self.tickets.is_waiting(id) {
            return false;
        }
        self.leave(id);
        true
    }

    /// The next waiting ticket whose time is over. Call until `None`, after [`Scheduler::poll_batch`] too.
    pub fn poll_expired(&mut self, now: Moment) -> Option<Expired> {
        if let Some(id) = self.shed.pop() {
            let ticket = &self.tickets[id];
            let (model, len, rows) = (ticket.model, ticket.len, ticket.rows);
            let decision = Decision {
                verdict: Verdict::Shed,
                predicted: self.models[model.index()].cost.predict(rows, len) as u64,
                ..self.decision(now, model, u64::from(len), rows)
            };
            self.note(decision);
            self.forget(id);
            return Some(Expired::Hopeless(id));
        }
        let dues = self.models.iter().flat_map(|queue| [&queue.due, &queue.due_composed]);
        let (_, id) = dues.filter_map(Due::first).min().filter(|(deadline, _)| *deadline <= now)?;
        self.leave(id);
        Some(Expired::Due(id))
    }

    /// Seals the batch that should run next, if one should, and says which executor gets it. `members` is cleared and
    /// filled in row order. Call until `None`.
    ///
    /// Idle executors come first, all of them, before any gets a second batch: no batch waits behind another while an
    /// executor has nothing to do.
    ///
    /// Hot: once per batch. Guarded by benches/scheduler.rs.
    pub fn poll_batch(&mut self, now: Moment, members: &mut Vec<TicketId>) -> Option<SealedBatch> {
        members.clear();
        if self.totals.rows == 0 {
            return None;
        }
        self.models.iter_mut().for_each(|queue| queue.hold = None);
        for group in [Group::Inline, Group::Executors] {
            if let Some(seat) = self.idle_seat(group)
                && let Some(batch) = self.poll_seat(now, seat, Vacancy::Idle, members)
            {
                return Some(batch);
            }
        }
        let deepest = self.seats.seats.iter().map(|seat| seat.slots as usize).max().unwrap_or(0);
        for depth in 1..deepest {
            for seat in 0..self.seats.seats.len() {
                let candidate = &self.seats.seats[seat];
                if candidate.running.len() == depth
                    && candidate.has_room()
                    && self.seats.idle(candidate.group) == 0
                    && let Some(batch) = self.poll_seat(now, seat, Vacancy::Spare, members)
                {
                    return Some(batch);
                }
            }
        }
        None
    }

    /// An executor that has nothing to do: the fastest of them, where what waits knows a difference.
    fn idle_seat(&self, group: Group) -> Option<usize> {
        let first = self.seats.idle_seat(group)?;
        let differs =
            |queue: &&ModelQueue| queue.totals.rows > 0 && queue.policy.group == group && queue.cost.paces().differ();
        let Some(queue) = self.models.iter().find(differs) else { return Some(first) };
        let idle = self.seats.seats.iter().enumerate().filter(|(_, seat)| seat.group == group && seat.is_idle());
        let pace = |seat: usize| queue.cost.paces().factor(seat);
        idle.map(|(at, _)| at).min_by(|a, b| pace(*a).total_cmp(&pace(*b)))
    }

    fn poll_seat(
        &mut self,
        now: Moment,
        seat: usize,
        vacancy: Vacancy,
        members: &mut Vec<TicketId>,
    ) -> Option<SealedBatch> {
        let group = self.seats.seats[seat].group;
        let models = &self.models;
        let runs_here = |model: ModelHandle| models[model.index()].policy.group == group;
        match vacancy {
            Vacancy::Idle => {
                if let Some(model) = self.compositions.take_complete(&mut self.tickets, runs_here, members) {
                    return Some(self.seal(now, model, seat, SealReason::Composed, None, members));
                }
            }
            // They wait for an idle executor, so one has to become idle.
            Vacancy::Spare if self.compositions.has_complete(runs_here) => return None,
            Vacancy::Spare => {}
        }
        let mut best: Option<((f64, Moment), usize, Proposal)> = None;
        for index in 0..self.models.len() {
            let queue = &self.models[index];
            if queue.policy.group != group || queue.totals.rows == 0 || !self.may_use(index, vacancy, now) {
                continue;
            }
            let used = queue.used;
            if let Some((oldest, proposal)) = self.propose(now, index, seat, vacancy)
                && best.as_ref().is_none_or(|(before, ..)| (used, oldest) < *before)
            {
                best = Some(((used, oldest), index, proposal));
            }
        }
        let ((_, oldest), index, proposal) = best?;
        // A full batch may not take the slot that somebody else has waited for longer than a batch takes.
        let overtakes = |queue: &ModelQueue| {
            queue.policy.group == group
                && queue.policy.kind != PolicyKind::Cost
                && queue.totals.rows > 0
                && queue.view(&self.tickets).is_overtaken(oldest, now)
        };
        if vacancy == Vacancy::Spare && self.models.iter().any(overtakes) {
            return None;
        }
        let model = ModelHandle(index as u16);
        let queue = &mut self.models[index];
        let ModelQueue { lanes, due, policy, packer, cost, tenants, .. } = queue;
        let cost = cost.on(seat);
        let (reason, plan) = match proposal {
            Proposal::Prefix(choice) => {
                fifo::take(lanes, &mut self.tickets, policy, members);
                members.iter().for_each(|id| lanes.unlink(&mut self.tickets, due, *id));
                (choice.reason, None)
            }
            Proposal::Bucket(choice) => {
                lengths::take(lanes, &mut self.tickets, due, policy, choice.bucket, members);
                (choice.reason, None)
            }
            Proposal::Packed(plan) => {
                let tickets = &mut self.tickets;
                let shed = &mut self.shed;
                packing::Queue { packer, lanes, tickets, due, policy, cost, shed }.take(&plan, tenants, members);
                (plan.reason, Some(plan))
            }
        };
        assert!(!members.is_empty(), "a batch is chosen only when its first ticket fits");
        Some(self.seal(now, model, seat, reason, plan, members))
    }

    /// Whether a model may take an executor that the others of its group would miss: one whose batches take much longer
    /// than another active model's holds no more executors than its share, rounded up.
    fn may_use(&self, index: usize, vacancy: Vacancy, now: Moment) -> bool {
        let queue = &self.models[index];
        let group = queue.policy.group;
        let executors = self.seats.count(group);
        if executors < 2 || self.models.len() < 2 {
            return true;
        }
        let mine = queue.typical_batch();
        let (mut weights, mut hurts) = (queue.policy.weight, false);
        for (other, rival) in self.models.iter().enumerate() {
            let active = rival.last_arrival.is_some_and(|last| now.since(last) < ACTIVE);
            if other == index || rival.policy.group != group || !active {
                continue;
            }
            weights += rival.policy.weight;
            hurts |= mine > SLOW * rival.typical_batch();
        }
        if !hurts {
            return true;
        }
        let share = (executors as f64 * queue.policy.weight / weights).ceil().min(executors as f64 - 1.0);
        let held = self.seats.running_of(ModelHandle(index as u16));
        match vacancy {
            Vacancy::Idle => (held as f64) < share,
            // Behind a running batch it would hold the executor for two of them.
            Vacancy::Spare => false,
        }
    }

    /// What one model would run on this seat, and since when its oldest row waits.
    fn propose(&mut self, now: Moment, index: usize, seat: usize, vacancy: Vacancy) -> Option<(Moment, Proposal)> {
        let idle = vacancy == Vacancy::Idle;
        let queue = &mut self.models[index];
        match queue.policy.kind {
            PolicyKind::Window | PolicyKind::GreedyTokens => {
                let ModelQueue { lanes, policy, .. } = queue;
                let choice = fifo::choose(lanes, &mut self.tickets, policy, idle, self.draining, now)?;
                Some((choice.oldest, Proposal::Prefix(choice)))
            }
            PolicyKind::Buckets => {
                let choice = queue.view(&self.tickets).choose(idle, self.draining, now)?;
                Some((choice.oldest, Proposal::Bucket(choice)))
            }
            PolicyKind::Cost => self.propose_packed(now, index, seat),
        }
    }

    fn propose_packed(&mut self, now: Moment, index: usize, seat: usize) -> Option<(Moment, Proposal)> {
        let binds_at = self.binds_at(now, index, seat)?;
        let queue = &mut self.models[index];
        if now < binds_at {
            queue.hold_until(binds_at);
            return None;
        }
        let group = queue.policy.group;
        let sharing = f64::from(self.seats.executors_of(seat));
        let executors = self.seats.count(group) as f64 / sharing;
        let device_free = match self.seats.is_shared(seat) {
            true => self.seats.devices[usize::from(self.seats.seats[seat].device)].free_at,
            false => Moment::ZERO,
        };
        let others_idle = sharing <= 1.0 && self.seats.idle(group) > usize::from(self.seats.seats[seat].is_idle());
        let start = now.max(self.seats.seats[seat].free_at());
        let overrun = queue.overrun.factor();
        let draining = self.draining;
        let outlook = Outlook { now, start, device_free, executors, sharing, others_idle, overrun, draining };
        let ModelQueue { lanes, due, policy, packer, cost, .. } = queue;
        let cost = cost.on(seat);
        let (tickets, shed) = (&mut self.tickets, &mut self.shed);
        match (packing::Queue { packer, lanes, tickets, due, policy, cost, shed }).decide(&outlook) {
            Outcome::Nothing => None,
            Outcome::Hold(until) => {
                queue.hold_until(until);
                if !std::mem::replace(&mut queue.holding, true) {
                    let predicted = until.since(now).as_nanos() as u64;
                    let decision = Decision { predicted, ..self.decision(now, ModelHandle(index as u16), 0, 0) };
                    self.note(decision);
                }
                None
            }
            Outcome::Seal(plan) => Some((Moment::ZERO, Proposal::Packed(plan))),
        }
    }

    /// When a batch of this model may be bound to a seat: not much before the seat, or the device that it shares, is
    /// expected to be free. Another row might still join, until then. `None`: not before its running batch has finished.
    fn binds_at(&self, now: Moment, index: usize, seat: usize) -> Option<Moment> {
        let cost = self.models[index].cost.on(seat);
        let fixed = 1.15 * cost.coefficients().batch;
        let at = &self.seats.seats[seat];
        if self.seats.is_shared(seat) {
            let free_at = self.seats.devices[usize::from(at.device)].free_at.max(at.free_at());
            return Some(free_at - Duration::from_nanos(fixed as u64));
        }
        if at.is_idle() {
            return Some(Moment::ZERO);
        }
        // Behind a batch that takes longer than expected nobody knows how long it is: a row that is bound there can no
        // longer go elsewhere.
        let running = &self.models[at.running.last()?.model.index()].cost;
        let is_foreseeable = running.is_trusted() && now <= at.free_at();
        is_foreseeable.then(|| at.free_at() - Duration::from_nanos(fixed.min(LEAD_MAX) as u64))
    }

    /// When [`Scheduler::poll_expired`] or [`Scheduler::poll_batch`] may next have something without a new event. Ask
    /// after [`Scheduler::poll_batch`] said `None` at `now`.
    pub fn poll_timeout(&self, now: Moment) -> Option<Moment> {
        let mut next: Option<Moment> = None;
        let mut at = |moment: Moment| next = Some(next.map_or(moment, |next| next.min(moment)));
        for queue in &self.models {
            for due in [&queue.due, &queue.due_composed] {
                if let Some((deadline, _)) = due.first() {
                    at(deadline);
                }
            }
            if queue.totals.rows == 0 {
                continue;
            }
            match queue.policy.kind {
                PolicyKind::Cost => {
                    if let Some(hold) = queue.hold.filter(|hold| *hold > now) {
                        at(hold);
                    }
                }
                kind => {
                    let view = queue.view(&self.tickets);
                    let end = match kind {
                        PolicyKind::Buckets => view.next_window_end(),
                        _ => view.window_end(),
                    };
                    if let Some(end) = end.filter(|end| *end > now && self.seats.idle(queue.policy.group) > 0) {
                        at(end);
                    }
                }
            }
        }
        next
    }

    /// A batch came back after `service`, the time its executor spent on it.
    pub fn handle_finished(&mut self, now: Moment, batch: &SealedBatch, service: Duration) {
        let seat = &mut self.seats.seats[usize::from(batch.executor)];
        let at = seat.running.iter().position(|running| running.batch == batch.id);
        let running = seat.running.remove(at.expect("a batch finishes once, on the executor that it was given to"));
        let device = seat.device;
        // What is behind it starts now, whatever was expected.
        let mut free = now;
        for behind in &mut seat.running {
            behind.started = free;
            behind.until = free + Duration::from_nanos(behind.predicted as u64);
            free = behind.until;
        }
        let shared = self.seats.is_shared(usize::from(batch.executor));
        let queue = &mut self.models[batch.model.index()];
        let executor = usize::from(batch.executor);
        let took = if service.is_zero() { now.since(running.started) } else { service }.as_nanos() as f64;
        queue.used += (took - running.predicted) / queue.policy.weight;
        if service.is_zero() {
            // It failed, soon or late, once or in many parts: that says nothing about the next.
            if shared {
                self.seats.devices[usize::from(device)].last_finish = now;
                self.seats.expect_free(executor, now);
            }
            return;
        }
        queue.service.observe(service);
        queue.overrun.observe(running.promised.since(running.sealed_at), now.since(running.sealed_at));
        self.drain_rate.observe(batch.cells_padded(), service);
        if !shared {
            queue.cost.observe_on(executor, batch.work(), service, true);
            return;
        }
        // On a shared device a batch waits for the one before: what it took from the device is the time since.
        let device = &mut self.seats.devices[usize::from(device)];
        let fixed = Duration::from_nanos(queue.cost.on(executor).coefficients().batch as u64);
        let last = device.last_finish;
        if last > running.started + fixed {
            queue.cost.observe_on(executor, batch.work(), now.since(last), false);
        } else {
            queue.cost.observe_on(executor, batch.work(), service, true);
        }
        device.last_finish = now;
        self.seats.expect_free(usize::from(batch.executor), now);
    }

    /// What an earlier run learned about a model's batch times. Before any batch.
    pub fn resume_cost(&mut self, model: ModelHandle, mut cost: CostModel) {
        cost.set_executors(self.seats.seats.len());
        self.models[model.index()].cost = cost;
    }

    /// A batch of this shape was run for warming up, and took so long.
    pub fn prime(&mut self, model: ModelHandle, rows: u32, padded_len: u32, took: Duration) {
        self.models[model.index()].cost.observe(rows, padded_len, took, true);
    }

    /// From now on nothing is held back. What arrives was accepted before the drain and is still served.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    pub fn policy(&self, model: ModelHandle) -> &Policy {
        &self.models[model.index()].policy
    }

    /// Replaces a model's policy while it serves. Returns its generation. Nothing that waits is lost: a policy under which
    /// some of it would fit no batch is refused. Where the policy leaves the buckets to the scheduler and did not before,
    /// they are chosen now.
    pub fn set_policy(&mut self, model: ModelHandle, mut policy: Policy) -> Result<u32, Refusal> {
        let queue = &mut self.models[model.index()];
        let before = &queue.policy;
        let choice = |policy: &Policy| (policy.edges, policy.shapes_max);
        if policy.edges == Edges::Auto && choice(&policy) != choice(before) {
            policy.buckets = edges::first_edges(&queue.seen, policy.shapes_max);
        }
        let relane = policy.buckets != before.buckets || policy.kind.is_fair() != before.kind.is_fair();
        let budgets = |policy: &Policy| (policy.rows_max, policy.cells_max);
        if policy.buckets != before.buckets || budgets(&policy) != budgets(before) {
            self.check_what_waits(model, &policy)?;
        }
        let queue = &mut self.models[model.index()];
        if relane {
            let mut ids: Vec<TicketId> = self.tickets.of(model).collect();
            ids.sort_by(|a, b| match self.tickets[*a].came_before(&self.tickets[*b]) {
                true => std::cmp::Ordering::Less,
                false => std::cmp::Ordering::Greater,
            });
            self.totals.cells -= queue.totals.cells;
            queue.backlog.clear();
            queue.lanes = Lanes::new(policy.buckets.len(), policy.kind.is_fair());
            queue.packer.resize(policy.buckets.len());
            for id in ids {
                let ticket = &mut self.tickets[id];
                let rows = u64::from(ticket.rows);
                let before = rows * u64::from(queue.policy.buckets.len_at(ticket.bucket));
                ticket.bucket = policy.buckets.of(ticket.len).expect("misfits were refused above");
                let after = rows * u64::from(policy.buckets.len_at(ticket.bucket));
                queue.totals.cells = queue.totals.cells - before + after;
                queue.tenants.resize(ticket.tenant, before, after);
                if !ticket.is_composed() {
                    queue.backlog.add(ticket.rank(), after);
                }
                if ticket.place == Place::Lane {
                    queue.lanes.push_back(&mut self.tickets, &queue.due, id);
                }
            }
            self.totals.cells += queue.totals.cells;
        } else {
            queue.packer.resize(policy.buckets.len());
        }
        if policy.buckets.longest() != queue.seen.longest() {
            queue.seen = LengthHistogram::new(policy.buckets.longest());
        }
        queue.policy = policy;
        queue.generation += 1;
        self.edges_at = Moment::ZERO;
        Ok(queue.generation)
    }

    /// Refuses a policy under which something that waits would fit no batch.
    fn check_what_waits(&self, model: ModelHandle, policy: &Policy) -> Result<(), Refusal> {
        let fits = |ticket: &Ticket| {
            let bucket = policy.buckets.of(ticket.len);
            bucket.is_some_and(|bucket| ticket.rows <= policy.rows_at(policy.buckets.len_at(bucket)))
        };
        let misfit = self.tickets.of(model).map(|id| &self.tickets[id]).find(|ticket| !fits(ticket));
        let what = match misfit {
            Some(ticket) => format!("a waiting request of {} rows of length {}", ticket.rows, ticket.len),
            None if self.compositions.rows_max(model) > policy.rows_at(policy.buckets.longest()) => {
                format!("a waiting composition of {} rows", self.compositions.rows_max(model))
            }
            None => return Ok(()),
        };
        let message = format!("{what} would fit no batch; try again when it is gone");
        Err(Refusal::overloaded(message, Duration::from_millis(10)))
    }

    /// Chooses the buckets of models that leave it to the scheduler, where others than the present ones pay. Call until
    /// `None`. One comparison while nothing is due.
    pub fn poll_edges(&mut self, now: Moment) -> Option<EdgesChange> {
        if now < self.edges_at {
            return None;
        }
        let mut next = Moment::FAR;
        for index in 0..self.models.len() {
            let queue = &mut self.models[index];
            if queue.policy.edges != Edges::Auto {
                continue;
            }
            let due = edges::next_look(queue.edges_seen_at);
            if now < due {
                next = next.min(due);
                continue;
            }
            let since = now.since(std::mem::replace(&mut queue.edges_seen_at, now));
            next = next.min(edges::next_look(now));
            let (to, waste) = edges::chosen_edges(&queue.seen, queue.policy.shapes_max);
            if !edges::pays(queue.seen.rows(), since, queue.seen.waste(&queue.policy.buckets), waste) {
                continue;
            }
            let model = ModelHandle(index as u16);
            let from = queue.policy.buckets.clone();
            let policy = Policy { buckets: to.clone(), ..queue.policy.clone() };
            // Refused while something waits that would not fit: there is a next look.
            if let Ok(generation) = self.set_policy(model, policy) {
                return Some(EdgesChange { model, from, to, generation });
            }
        }
        self.edges_at = next;
        None
    }

    /// Tickets of a model that wait.
    pub fn waiting_tickets(&self, model: ModelHandle) -> Vec<TicketId> {
        self.tickets.of(model).filter(|id| self.tickets.is_waiting(*id)).collect()
    }

    /// How long the rows of a model were that were admitted.
    pub fn lengths(&self, model: ModelHandle) -> &LengthHistogram {
        &self.models[model.index()].seen
    }

    /// Decisions about a model other than its batches.
    pub fn verdicts(&self, model: ModelHandle) -> VerdictCounts {
        self.models[model.index()].verdicts
    }

    pub fn generation(&self, model: ModelHandle) -> u32 {
        self.models[model.index()].generation
    }

    pub fn is_empty(&self) -> bool {
        self.totals.rows == 0
    }

    /// Batches sealed so far; the number of the last.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// How many models there are.
    pub fn models(&self) -> usize {
        self.models.len()
    }

    /// Bounds on what may wait, of the whole server.
    pub fn limits(&self) -> &QueueLimits {
        &self.limits
    }

    /// The executors, in the order of their numbers.
    pub fn seats(&self) -> &[Seat] {
        &self.seats.seats
    }

    /// Batches that executors hold.
    pub fn running(&self) -> usize {
        self.seats.seats.iter().map(|seat| seat.running.len()).sum()
    }

    /// Rows, cells and bytes of one model that wait.
    pub fn waiting(&self, model: ModelHandle) -> (u64, u64, u64) {
        let totals = &self.models[model.index()].totals;
        (totals.rows, totals.cells, totals.bytes)
    }

    /// By group of executors: whether something waits that they could run.
    pub fn waits(&self) -> [bool; 2] {
        let mut waits = [false; 2];
        self.models.iter().for_each(|queue| waits[queue.policy.group as usize] |= queue.totals.rows > 0);
        waits
    }

    /// When the ticket was admitted. Known until the next arrival, also for a ticket that was just sealed.
    pub fn admitted_at(&self, id: TicketId) -> Moment {
        self.tickets[id].admitted_at
    }

    /// Whether an executor that is idle may not be used by this model, because it has its share of them.
    pub fn is_at_its_share(&self, model: ModelHandle, now: Moment) -> bool {
        !self.may_use(model.index(), Vacancy::Idle, now)
    }

    /// Rows of a ticket and how long they are. Known until the next arrival, also of a ticket that was just sealed.
    pub fn rows_and_len(&self, id: TicketId) -> (u32, u32) {
        (self.tickets[id].rows, self.tickets[id].len)
    }

    pub fn cost(&self, model: ModelHandle) -> &CostModel {
        &self.models[model.index()].cost
    }

    /// How much longer than promised nine of ten batches of a model take until they are done: from 1 to 8.
    pub fn overrun(&self, model: ModelHandle) -> f64 {
        self.models[model.index()].overrun.factor()
    }

    pub fn log(&self) -> &DecisionLog {
        &self.log
    }

    /// Recomputes the books from the tickets, and says what does not add up. Walks everything that waits.
    pub fn audit(&self) -> Result<(), String> {
        let mut all = Totals::default();
        for (index, queue) in self.models.iter().enumerate() {
            let model = ModelHandle(index as u16);
            let (mut totals, mut in_lanes, mut with_deadline) = (Totals::default(), 0u64, 0);
            let mut backlog = Backlog::default();
            for id in self.tickets.of(model) {
                let ticket = &self.tickets[id];
                let held = queue.held(ticket);
                totals.add(&held);
                if !ticket.is_composed() {
                    backlog.add(ticket.rank(), held.cells);
                }
                in_lanes += u64::from(ticket.place == Place::Lane) * u64::from(ticket.rows);
                with_deadline += usize::from(ticket.due_at != ticket::NONE);
            }
            let lanes = queue.lanes.counted(&self.tickets)?;
            let deadlines = queue.due.len() + queue.due_composed.len();
            let tenants = queue.tenants.waiting_in_all();
            for (what, booked, counted) in [
                ("rows", queue.totals.rows, totals.rows),
                ("padded cells", queue.totals.cells, totals.cells),
                ("payload bytes", queue.totals.bytes, totals.bytes),
                ("rows in lanes", lanes, in_lanes),
                ("deadlines", deadlines as u64, with_deadline as u64),
                ("padded cells of tenants", tenants, totals.cells),
            ] {
                if booked != counted {
                    return Err(format!("model {index}: the books say {booked} {what}, counted {counted}"));
                }
            }
            if !queue.backlog.holds_the_same(&backlog) {
                return Err(format!("model {index}: the books say {:?}, counted {backlog:?}", queue.backlog));
            }
            all.add(&totals);
        }
        if all != self.totals {
            return Err(format!("the books say {:?} for the server, counted {all:?}", self.totals));
        }
        Ok(())
    }

    fn note(&mut self, decision: Decision) {
        self.models[decision.model.index()].verdicts.count(decision.verdict);
        self.log.push(decision);
    }

    /// What a decision about a model has in any case.
    fn decision(&self, now: Moment, model: ModelHandle, batch: u64, rows: u32) -> Decision {
        let queue = &self.models[model.index()];
        Decision {
            at: now,
            verdict: Verdict::Held,
            model,
            executor: 0,
            batch,
            rows,
            padded_len: 0,
            rows_possible: 0,
            padding: 0.0,
            shortest: 0,
            waiting: queue.totals.rows as u32,
            predicted: 0,
            efficiency: 0.0,
            best_efficiency: 0.0,
            generation: queue.generation,
        }
    }

    fn seal(
        &mut self,
        now: Moment,
        model: ModelHandle,
        seat: usize,
        reason: SealReason,
        plan: Option<Plan>,
        members: &[TicketId],
    ) -> SealedBatch {
        let queue = &self.models[model.index()];
        let longest = members.iter().map(|id| self.tickets[*id].len).max().expect("a batch has members");
        let padded_len = queue.policy.padded_len(longest);
        let mut real = Work::default();
        for id in members {
            let ticket = &self.tickets[*id];
            real.add(ticket.rows, ticket.len);
        }
        assert!(
            queue.policy.fits(real, padded_len),
            "{real:?} of at most {padded_len} in a batch of {:?}",
            queue.policy
        );
        let rows = real.rows;
        self.batches += 1;
        let mut batch = SealedBatch {
            id: self.batches,
            model,
            executor: seat as u16,
            rows,
            rows_possible: queue.policy.rows_like(real, padded_len),
            layout: queue.policy.layout,
            padded_len,
            cells_real: real.cells,
            squares_real: real.squares,
            reason,
            sealed_at: now,
            generation: queue.generation,
            predicted: 0,
            objective: queue.policy.slo,
        };
        let predicted = queue.cost.on(seat).predict_work(batch.work());
        batch.predicted = predicted as u64;
        let plan_of = |value: fn(&Plan) -> f64| plan.as_ref().map_or(0.0, value) as f32;
        self.note(Decision {
            verdict: Verdict::Sealed(reason),
            executor: batch.executor,
            padded_len,
            rows_possible: batch.rows_possible,
            padding: (1.0 - batch.cells_real as f64 / batch.cells_padded().max(1) as f64) as f32,
            shortest: plan.as_ref().map_or(0, |plan| queue.policy.buckets.len_at(plan.shortest)),
            predicted: batch.predicted,
            efficiency: plan_of(|plan| plan.efficiency),
            best_efficiency: plan_of(|plan| plan.best_efficiency),
            ..self.decision(now, model, batch.id, rows)
        });
        for id in members {
            let ticket = &self.tickets[*id];
            self.log.mix_member(ticket.sequence, ticket.len);
        }
        self.occupy(now, &batch, predicted);
        let queue = &mut self.models[model.index()];
        queue.packer.sealed(rows);
        queue.holding = false;
        let group = queue.policy.group as usize;
        self.used[group] = self.used[group].max(queue.used);
        queue.used += predicted / queue.policy.weight;
        let before = queue.totals.cells;
        for id in members {
            // The policies took them off their lists; here they leave the books.
            self.forget(*id);
        }
        let queue = &mut self.models[model.index()];
        queue.backlog.taken(now, before - queue.totals.cells, queue.totals.cells);
        batch
    }

    /// Writes a batch down on its seat.
    fn occupy(&mut self, now: Moment, batch: &SealedBatch, predicted: f64) {
        let seat = usize::from(batch.executor);
        let cost = self.models[batch.model.index()].cost.on(seat);
        let fixed = if cost.is_known() { cost.coefficients().batch.min(predicted) } else { 0.0 };
        let (started, until) = self.seats.forecast(seat, now, fixed, predicted - fixed);
        let shared = self.seats.is_shared(seat);
        let at = &mut self.seats.seats[seat];
        at.running.push(Running {
            batch: batch.id,
            model: batch.model,
            sealed_at: now,
            started,
            predicted,
            until,
            promised: until,
        });
        if shared {
            self.seats.devices[usize::from(at.device)].free_at = until;
        }
    }

    /// Takes a waiting ticket off its list and off the books.
    fn leave(&mut self, id: TicketId) {
        let queue = &mut self.models[self.tickets[id].model.index()];
        match self.tickets[id].place {
            Place::Lane => queue.lanes.unlink(&mut self.tickets, &queue.due, id),
            Place::Composition => self.compositions.unlink(&self.tickets, id),
            Place::Taken | Place::TakenComposed | Place::Shed | Place::Free => {
                unreachable!("callers checked that the ticket waits")
            }
        }
        self.forget(id);
    }

    fn forget(&mut self, id: TicketId) {
        let ticket = &self.tickets[id];
        let queue = &mut self.models[ticket.model.index()];
        let held = queue.held(ticket);
        if !ticket.is_composed() {
            queue.backlog.remove(ticket.rank(), held.cells);
        }
        queue.tenants.leave(ticket.tenant, held.cells);
        queue.totals.subtract(&held);
        self.totals.subtract(&held);
        let due = if ticket.is_composed() { &mut queue.due_composed } else { &mut queue.due };
        due.remove(&mut self.tickets, id);
        self.tickets.remove(id);
    }
}

#[cfg(test)]
mod tests;
