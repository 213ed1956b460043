//! A trace fed to the scheduler as it was recorded, with the times that batches took: it decides what it decided.
//!
//! Always true
//! - Either every checkpoint of the trace is met, or the first difference is told.
//! - Nothing that a trace can hold makes the scheduler panic on the way: what it would assert is checked before.

use std::io::Read;
use std::time::Duration;

use super::ledger::{Ledger, Report};
use super::regret;
use crate::capture::{Cancelled, CaptureEnd, Done, Event, Header, PolicyChange, TraceError, TraceReader};
use crate::scheduler::state::{StateError, restore_policy};
use crate::scheduler::{Group, Policy, Scheduler, SealedBatch, TicketId};
use crate::vocab::{Layout, ModelHandle, Moment};

/// Arrivals of a trace, at most: four bytes of memory each.
pub const ARRIVALS_MAX: u64 = 1 << 26;

/// Why a trace was not replayed to its end.
#[derive(Clone, Debug, PartialEq)]
pub enum ReplayError {
    Trace(TraceError),
    /// The scheduler cannot be put where the trace begins.
    State(StateError),
    /// More than a replay keeps in memory.
    TooLong {
        arrivals_max: u64,
    },
    Differs(Difference),
    /// The trace names a model or executor that its header does not have, or a setting does not fit.
    Setting(String),
}

impl std::fmt::Display for ReplayError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ReplayError::Trace(error) => error.fmt(f),
            ReplayError::State(error) => error.fmt(f),
            ReplayError::TooLong { arrivals_max } => write!(f, "the trace has more than {arrivals_max} requests"),
            ReplayError::Differs(difference) => difference.fmt(f),
            ReplayError::Setting(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for ReplayError {}

impl From<TraceError> for ReplayError {
    fn from(error: TraceError) -> ReplayError {
        ReplayError::Trace(error)
    }
}

/// Where a replay first decided otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Decisions up to which both are known to be equal, and decisions of the replay when it was noticed. Counted since
    /// the server's start.
    pub equal: u64,
    pub noticed: u64,
    pub what: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Difference { equal, noticed, what } = self;
        write!(f, "the decisions differ, first between number {equal} and {noticed}: {what}")
    }
}

/// A replay that was equal.
#[derive(Clone, Debug)]
pub struct Verified {
    pub arrivals: u64,
    pub cancels: u64,
    pub batches: u64,
    pub turns: u64,
    pub checkpoints: u64,
    pub decisions: u64,
    pub hash: u64,
    pub end: CaptureEnd,
    pub span: Duration,
    pub report: Report,
}

/// Who looks on: at every event of the trace, and at every batch that the executor began at once.
pub trait Watch {
    fn event(&mut self, event: &Event);

    /// A batch came back `late` after its seal and service, from an executor that had been idle.
    fn handed_over(&mut self, group: Group, late: Duration);

    /// Whether the report should say how far the batches were from the cheapest ones.
    fn wants_regret(&self) -> bool {
        true
    }
}

/// Nobody.
impl Watch for () {
    fn event(&mut self, _: &Event) {}

    fn handed_over(&mut self, _: Group, _: Duration) {}
}

/// The scheduler as it stood when the trace begins.
pub fn restore<R: Read>(reader: &TraceReader<R>) -> Result<Scheduler, ReplayError> {
    let scheduler = Scheduler::restore(reader.header().layout, reader.state()).map_err(ReplayError::State)?;
    let header = reader.header();
    if scheduler.seats().len() != header.seats.len() || scheduler.models() != header.models.len() {
        return Err(ReplayError::State(StateError::Unsound("the header has other models or executors")));
    }
    Ok(scheduler)
}

/// An empty ledger for what a trace was recorded of.
pub fn ledger_of(header: &Header, slo: impl Fn(ModelHandle) -> Duration) -> Ledger {
    let models = header.models.iter().enumerate().map(|(at, model)| (model.name.clone(), slo(ModelHandle(at as u16))));
    let executors: Vec<Group> = header.seats.iter().map(|seat| seat.group).collect();
    Ledger::new(models, &executors, header.at)
}

/// The policy that a change in a trace says.
pub fn policy_of(layout: u32, change: &PolicyChange, before: &Policy) -> Result<Policy, ReplayError> {
    restore_policy(layout, &change.exact).or_else(|_| {
        before
            .with(change.knobs.iter().map(|(key, value)| (key.as_str(), value.as_str())))
            .map_err(|error| ReplayError::Setting(format!("a policy in the trace: {error}")))
    })
}

/// Replays a trace from its start. On an error the reader stands where it was noticed.
pub fn replay<R: Read>(reader: &mut TraceReader<R>, watch: &mut impl Watch) -> Result<Verified, ReplayError> {
    let scheduler = restore(reader)?;
    let header = reader.header();
    let (at, before) = (header.at, header.decisions);
    let mut ledger = ledger_of(header, |model| scheduler.policy(model).slo);
    ledger.begin(&scheduler);
    let ledger = if watch.wants_regret() { ledger } else { ledger.without_regret() };
    let mut replay = Replay {
        ids: Vec::new(),
        members: Vec::new(),
        sealed: Vec::new(),
        now: at,
        cancels: 0,
        batches: 0,
        turns: 0,
        checkpoints: 0,
        equal: header.decisions,
        ledger,
        scheduler,
        pending: None,
        reader,
        watch,
    };
    if replay.is_here(replay.reader.header().decisions, replay.reader.header().hash) {
        replay.run()?;
    } else {
        return replay.differs("the state is not that of the header".into());
    }
    let (decisions, hash) = (replay.scheduler.log().count(), replay.scheduler.log().hash());
    let Replay { cancels, batches, turns, checkpoints, ledger, now, ids, .. } = replay;
    Ok(Verified {
        arrivals: ids.len() as u64,
        cancels,
        batches,
        turns,
        checkpoints,
        decisions,
        hash,
        end: reader.end().expect("it was read to its end"),
        span: now.since(at),
        report: ledger.close(now, decisions - before),
    })
}

struct Replay<'a, R, W> {
    reader: &'a mut TraceReader<R>,
    /// Read, and not yet taken.
    pending: Option<Event>,
    watch: &'a mut W,
    scheduler: Scheduler,
    ledger: Ledger,
    /// By arrival: its ticket. One that was refused has none.
    ids: Vec<TicketId>,
    members: Vec<TicketId>,
    /// What executors hold, and whether each began at once.
    sealed: Vec<(SealedBatch, bool)>,
    now: Moment,
    cancels: u64,
    batches: u64,
    turns: u64,
    checkpoints: u64,
    equal: u64,
}

const NO_TICKET: TicketId = TicketId(u32::MAX);

impl<R: Read, W: Watch> Replay<'_, R, W> {
    fn next(&mut self) -> Result<Option<Event>, ReplayError> {
        if let Some(event) = self.pending.take() {
            return Ok(Some(event));
        }
        let event = self.reader.next_event()?;
        if let Some(event) = &event {
            self.watch.event(event);
        }
        Ok(event)
    }

    fn differs<T>(&self, what: String) -> Result<T, ReplayError> {
        let noticed = self.scheduler.log().count();
        Err(ReplayError::Differs(Difference { equal: self.equal, noticed, what }))
    }

    fn is_here(&self, decisions: u64, hash: u64) -> bool {
        let log = self.scheduler.log();
        (log.count(), log.hash()) == (decisions, hash)
    }

    fn run(&mut self) -> Result<(), ReplayError> {
        while let Some(event) = self.next()? {
            match event {
                Event::Turn { at } => self.turn(at)?,
                Event::Arrival { at, arrival } => {
                    self.now = at;
                    let number = self.ids.len() as u64;
                    if number >= ARRIVALS_MAX {
                        return Err(ReplayError::TooLong { arrivals_max: ARRIVALS_MAX });
                    }
                    let outcome = self.scheduler.handle_arrival(at, arrival).map_err(|refusal| refusal.code);
                    self.ledger.arrived(number, at, &arrival, outcome);
                    self.ids.push(outcome.unwrap_or(NO_TICKET));
                }
                Event::Cancel { at, of } => self.cancel(at, of)?,
                Event::Finished { at, batch } if !batch.inline => self.finish(at, &batch)?,
                Event::Finished { batch, .. } => {
                    return self.differs(format!("batch {} ran in a turn that did not seal it", batch.id));
                }
                Event::Policy(change) => {
                    if change.model.index() >= self.scheduler.models() {
                        let message = format!("the trace sets a policy for model {}", change.model.0);
                        return Err(ReplayError::Setting(message));
                    }
                    let before = self.scheduler.policy(change.model);
                    let policy = policy_of(self.reader.header().layout, &change, before)?;
                    if let Err(refusal) = self.scheduler.set_policy(change.model, policy) {
                        return self.differs(format!("a policy that was taken is refused: {}", refusal.message));
                    }
                }
                Event::Drain => self.scheduler.drain(),
                Event::Checkpoint { decisions, hash } => self.check(decisions, hash)?,
            }
        }
        Ok(())
    }

    fn check(&mut self, decisions: u64, hash: u64) -> Result<(), ReplayError> {
        let log = self.scheduler.log();
        if log.count() != decisions {
            return self.differs(format!("there are {} decisions where {decisions} were recorded", log.count()));
        }
        if log.hash() != hash {
            return self.differs(format!("the hash is {:016x} where {hash:016x} was recorded", log.hash()));
        }
        self.equal = decisions;
        self.checkpoints += 1;
        Ok(())
    }

    fn cancel(&mut self, at: Moment, of: Cancelled) -> Result<(), ReplayError> {
        self.now = at;
        self.cancels += 1;
        let id = match of {
            Cancelled::Ticket(id) => id,
            Cancelled::Within { .. } => {
                return self.differs(format!("nothing expired where others expired with it: {of:?}"));
            }
            Cancelled::Waiting(arrival) => self.ids[arrival as usize],
            Cancelled::Left(arrival) => {
                self.ledger.cancelled_late(arrival);
                return Ok(());
            }
        };
        if !self.scheduler.handle_cancel(id) {
            return self.differs(format!("a request that was cancelled while it waited does not wait: {of:?}"));
        }
        self.ledger.cancelled(id);
        Ok(())
    }

    /// As the batcher does it: see `Batcher::turn`.
    fn turn(&mut self, at: Moment) -> Result<(), ReplayError> {
        self.now = at;
        self.turns += 1;
        while self.scheduler.poll_edges(at).is_some() {}
        self.expire()?;
        let mut members = std::mem::take(&mut self.members);
        while let Some(batch) = self.scheduler.poll_batch(self.now, &mut members) {
            self.batches += 1;
            self.ledger.sealed(&self.scheduler, &batch, &members);
            let member = |id: &TicketId| {
                let (rows, len) = self.scheduler.rows_and_len(*id);
                regret::Member { rows, len, at: self.scheduler.admitted_at(*id) }
            };
            self.ledger.regret.sealed(batch.id, members.iter().map(member));
            let seat = &self.scheduler.seats()[usize::from(batch.executor)];
            self.sealed.push((batch, seat.running.len() == 1));
            if seat.group == Group::Inline {
                self.finish_inline(&batch)?;
                self.expire()?;
            }
        }
        self.members = members;
        self.expire()?;
        self.ledger.turned(self.now, &self.scheduler);
        Ok(())
    }

    /// A batch that ran at once is the next in the trace, but for checkpoints.
    fn finish_inline(&mut self, sealed: &SealedBatch) -> Result<(), ReplayError> {
        loop {
            match self.next()? {
                Some(Event::Checkpoint { decisions, hash }) => self.check(decisions, hash)?,
                Some(Event::Finished { at, batch }) if batch.inline => return self.finish(at, &batch),
                other => return self.differs(format!("{sealed:?} ran at once; recorded is {other:?}")),
            }
        }
    }

    fn finish(&mut self, at: Moment, done: &Done) -> Result<(), ReplayError> {
        self.now = at;
        let before = self.scheduler.seats().get(usize::from(done.executor));
        let Some(seat) = before.filter(|seat| seat.running.iter().any(|running| running.batch == done.id)) else {
            return self.differs(format!(
                "batch {} with {} rows of {} finished on executor {}, which was given no such batch",
                done.id, done.rows, done.padded_len, done.executor
            ));
        };
        let group = seat.group;
        let shape = |model: ModelHandle, rows: u32, len: u32| format!("{rows} rows of {len} of model {}", model.0);
        let place = self.sealed.iter().position(|(batch, _)| batch.id == done.id);
        let batch = match place.map(|place| self.sealed.swap_remove(place)) {
            Some((batch, began)) => {
                if (batch.model, batch.rows, batch.padded_len) != (done.model, done.rows, done.padded_len) {
                    return self.differs(format!(
                        "batch {} has {}; recorded are {}",
                        done.id,
                        shape(batch.model, batch.rows, batch.padded_len),
                        shape(done.model, done.rows, done.padded_len)
                    ));
                }
                if began {
                    self.watch.handed_over(group, at.since(batch.sealed_at).saturating_sub(done.service));
                }
                batch
            }
            // Sealed before the trace begins.
            None if done.model.index() < self.scheduler.models() => sealed_before(done),
            None => return self.differs(format!("batch {} is of model {}", done.id, done.model.0)),
        };
        self.scheduler.handle_finished(at, &batch, done.service);
        self.ledger.finished(at, done.id, usize::from(done.executor), done.service);
        let policy = (self.scheduler.generation(batch.model), self.scheduler.policy(batch.model));
        let fit = self.scheduler.cost(batch.model).coefficients();
        self.ledger.regret.finished(at, &batch, done.service, policy, fit);
        Ok(())
    }

    fn expire(&mut self) -> Result<(), ReplayError> {
        while let Some(expired) = self.scheduler.poll_expired(self.now) {
            let expired = expired.id();
            self.ledger.expired(expired);
            // The other parts of the same request go with it.
            loop {
                match self.next()? {
                    Some(Event::Cancel { of: Cancelled::Within { id, with }, .. }) if with == expired => {
                        if !self.scheduler.handle_cancel(id) {
                            return self.differs(format!("ticket {} does not wait to expire with another", id.0));
                        }
                        self.ledger.expired(id);
                    }
                    other => {
                        self.pending = other;
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}

/// What is known of a batch that was sealed before the trace begins: enough to finish it.
pub fn sealed_before(done: &Done) -> SealedBatch {
    SealedBatch {
        id: done.id,
        model: done.model,
        executor: done.executor,
        rows: done.rows,
        rows_possible: done.rows,
        layout: if done.packed.is_some() { Layout::Packed } else { Layout::Padded },
        padded_len: done.padded_len,
        cells_real: done.work().cells,
        squares_real: done.work().squares,
        reason: crate::vocab::SealReason::Idle,
        sealed_at: Moment::ZERO,
        generation: 1,
        predicted: 0,
        objective: Duration::ZERO,
    }
}
