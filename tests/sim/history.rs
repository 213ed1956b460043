//! What clients saw and what executors were given, and whether the two agree.
//!
//! Knows nothing of how the server works: only its promises. The first broken one is kept, with what led to it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use ferry::executor::slot::FilledSlot;
use ferry::scheduler::{Compose, Policy};
use ferry::vocab::{Code, Executed, Moment, Refusal, SealReason, Stage, TicketKey};
use ferry::wire::decoder::Step;
use ferry::wire::message::{ErrorMessage, InferResult, decode_exact};
use ferry::wire::{Decoder, Kind, Limits};

/// How late an end may come after its deadline: the simulated wake-ups of batcher and shard, and a turn's inline batches.
pub const EPSILON: Duration = Duration::from_millis(2);

#[derive(Debug)]
pub struct Entry {
    pub payload: Bytes,
    pub deadline: Option<Moment>,
    pub compose: Option<Compose>,
    /// Its result holds a NaN.
    pub poisoned: bool,
    /// It makes its model fail, in the way of this place in `executor::sim::POISONED`.
    pub fails: Option<usize>,
    /// Its batch failed for nobody's fault, and it alone was in it; or it hung.
    excused: bool,
    rows: u32,
    end: Option<(Code, Executed)>,
    /// Rows that were given to executors.
    submitted: u32,
    started: bool,
    /// The batcher was told of its cancel while it had not been submitted.
    cancel_taken: bool,
}

#[derive(Debug, Default)]
pub struct History {
    entries: Vec<Entry>,
    by_key: BTreeMap<TicketKey, usize>,
    /// Deadlines of requests that have not ended.
    due: BTreeSet<(Moment, usize)>,
    open: usize,
    /// How often each kind of thing happened, so that a test can say that nothing was missed.
    pub seen: BTreeMap<&'static str, u64>,
    pub trace: u64,
    pub violation: Option<String>,
}

impl History {
    pub fn note(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    /// FNV-1a of everything that was decided, in order.
    fn trace(&mut self, values: &[u64]) {
        for byte in values.iter().flat_map(|value| value.to_le_bytes()) {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub fn open(&self) -> usize {
        self.open
    }

    pub fn next_id(&self) -> u64 {
        self.entries.len() as u64
    }

    pub fn accepted(
        &mut self,
        key: TicketKey,
        payload: Bytes,
        deadline: Option<Moment>,
        compose: Option<Compose>,
        (poisoned, fails): (bool, Option<usize>),
        rows: u32,
    ) {
        let id = self.entries.len();
        self.entries.push(Entry {
            payload,
            deadline,
            compose,
            poisoned,
            fails,
            excused: false,
            rows,
            end: None,
            submitted: 0,
            started: false,
            cancel_taken: false,
        });
        self.by_key.insert(key, id);
        self.due.extend(deadline.map(|deadline| (deadline, id)));
        self.open += 1;
    }

    /// It may be answered `executor_failed` though it is no fault of its own.
    pub fn excuse(&mut self, key: TicketKey) {
        let id = self.id_of(key);
        self.entries[id].excused = true;
    }

    fn id_of(&self, key: TicketKey) -> usize {
        self.by_key[&key]
    }

    /// A frame reached the client.
    pub fn received(&mut self, now: Moment, bytes: &[u8]) {
        let frame = match Decoder::new(Limits::DEFAULT).next(bytes) {
            Ok(Step::Frame(frame)) if frame.len == bytes.len() && frame.payload_is_intact(bytes) => frame,
            other => return self.violate(format!("an answer is no frame: {other:?}")),
        };
        let id = frame.header.request_id as usize;
        match frame.kind {
            Kind::Result => {
                let result: InferResult = decode_exact(frame.metadata(bytes)).expect("a result's metadata");
                let entry = &self.entries[id];
                if frame.payload(bytes) != &entry.payload[..] {
                    self.violate(format!("request {id} got a result that is not its own in batch {}", result.batch));
                } else if entry.poisoned {
                    self.violate(format!("request {id} has a NaN and was answered"));
                } else if entry.fails.is_some() {
                    self.violate(format!("request {id} makes its model fail and was answered"));
                }
                self.trace(&[1, result.batch, u64::from(result.batch_rows), u64::from(result.padded_len)]);
                self.ended(now, id, Code::Ok, Executed::Yes, Stage::None);
            }
            Kind::Error => {
                let error: ErrorMessage = decode_exact(frame.metadata(bytes)).expect("an error's metadata");
                let refusal = error.to_refusal().expect("codes of this version");
                self.check_refusal(id, &refusal);
                self.ended(now, id, refusal.code, refusal.executed, refusal.stage);
            }
            other => self.violate(format!("request {id} was answered with a {other:?} frame")),
        }
    }

    fn check_refusal(&mut self, id: usize, refusal: &Refusal) {
        let Entry { poisoned, fails, excused, .. } = self.entries[id];
        let how = match refusal.code {
            // Whoever fails for memory may have been unlucky twice as well, and is in quarantine for that.
            Code::ExecutorFailed if refusal.executed == Executed::Never => Some(fails.is_some()),
            Code::ExecutorFailed => Some(fails == Some(0) || fails == Some(1) || excused),
            Code::OutOfMemory => Some(fails == Some(2)),
            _ => None,
        };
        if how == Some(false) {
            self.violate(format!("request {id} was answered for another's fault: {refusal:?}"));
        }
        if how == Some(true) && fails.is_some() {
            self.note("culprits");
        }
        if refusal.code == Code::ExecutorFailed && refusal.executed == Executed::Never {
            self.note("requests in quarantine");
        }
        if refusal.code == Code::NonFiniteOutput && !poisoned {
            self.violate(format!("request {id} was answered for a NaN of another row"));
        }
        if refusal.code == Code::Overloaded && refusal.retry_after_ms == 0 {
            self.violate(format!("request {id} was not told when to come back"));
        }
    }

    /// Its connection went: nobody is left to be answered.
    pub fn gone(&mut self, now: Moment, key: TicketKey) {
        let id = self.id_of(key);
        self.ended(now, id, Code::Cancelled, Executed::Maybe, Stage::None);
    }

    fn ended(&mut self, now: Moment, id: usize, code: Code, executed: Executed, stage: Stage) {
        self.trace(&[2, now.nanos(), id as u64, code as u64, stage as u64]);
        self.note(match (code, stage) {
            (Code::DeadlineExceeded, Stage::Arrival) => "deadline on arrival",
            (Code::DeadlineExceeded, Stage::Queue) => "deadline in the queue",
            (Code::DeadlineExceeded, Stage::Executing) => "deadline while executing",
            (code, _) => code.name(),
        });
        let entry = &mut self.entries[id];
        if let Some((first, _)) = entry.end {
            return self.violate(format!("request {id} ended twice: {first}, then {code}"));
        }
        entry.end = Some((code, executed));
        self.open -= 1;
        let (started, deadline) = (entry.started, entry.deadline);
        if let Some(deadline) = deadline {
            self.due.remove(&(deadline, id));
            if now > deadline + EPSILON {
                self.violate(format!("request {id} ended {:?} after its deadline", now.since(deadline)));
            }
        }
        if executed == Executed::Never && started {
            self.violate(format!("request {id} ended as {code}, never executed, but an executor had it"));
        }
    }

    /// Called after every event.
    pub fn check_due(&mut self, now: Moment) {
        if let Some((deadline, id)) = self.due.first().copied()
            && now > deadline + EPSILON
        {
            self.violate(format!("request {id} is unanswered {:?} after its deadline", now.since(deadline)));
        }
    }

    /// The batcher is being told of this cancel.
    pub fn cancel_taken(&mut self, key: TicketKey) {
        let id = self.id_of(key);
        let entry = &mut self.entries[id];
        entry.cancel_taken = entry.submitted == 0;
    }

    /// A batch leaves the batcher.
    pub fn submitted(&mut self, slot: &FilledSlot, policy: &Policy) {
        let batch = slot.batch;
        self.trace(&[3, batch.id, u64::from(batch.rows), u64::from(batch.padded_len), batch.reason as u64]);
        self.note(batch.reason.name());
        if slot.staging().members.len() > 1 {
            self.note("batches of several requests");
        }
        let rows: u32 = slot.staging().members.iter().map(|member| member.rows).sum();
        if rows != batch.rows || rows > policy.rows_max || batch.cells_padded() > policy.cells_max {
            self.violate(format!("{batch:?} is over the limits of {policy:?}"));
        }
        let mut composed = Vec::new();
        for member in &slot.staging().members {
            let id = self.id_of(member.key);
            let entry = &mut self.entries[id];
            composed.push(entry.compose);
            entry.submitted += member.rows;
            let twice = entry.submitted > entry.rows;
            let in_parts = member.is_part();
            let late = entry.deadline.is_some_and(|deadline| deadline <= batch.sealed_at);
            let cancelled = entry.cancel_taken;
            self.trace(&[4, id as u64]);
            if in_parts {
                self.note("requests in parts");
            }
            if twice {
                self.violate(format!("rows of request {id} are in two batches"));
            } else if late {
                self.violate(format!("request {id} had expired when its batch was sealed"));
            } else if cancelled {
                self.violate(format!("request {id} was cancelled before its batch was sealed"));
            } else if member.len > batch.padded_len {
                self.violate(format!("request {id} is longer than {batch:?}"));
            }
        }
        let pure = match composed[0] {
            Some(compose) => batch.reason == SealReason::Composed && rows == compose.rows,
            None => batch.reason != SealReason::Composed,
        };
        if !pure || composed.iter().any(|compose| *compose != composed[0]) {
            self.violate(format!("{batch:?} is not what its callers composed: {composed:?}"));
        }
    }

    /// An executor begins with a batch.
    pub fn started(&mut self, slot: &FilledSlot) {
        for member in &slot.staging().members {
            let id = self.id_of(member.key);
            let entry = &mut self.entries[id];
            entry.started = true;
            if let Some((code, Executed::Never)) = entry.end {
                self.violate(format!("request {id} ended as {code}, never executed, and is executed now"));
            }
        }
    }

    /// Everything is over.
    pub fn check_complete(&mut self) {
        if let Some(id) = self.entries.iter().position(|entry| entry.end.is_none()) {
            self.violate(format!("request {id} was accepted and never answered"));
        }
    }
}
