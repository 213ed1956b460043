//! What came of a load: who was answered when, in which batches, and who was not.
//!
//! A request's time is from its arrival at the batcher to the moment when the batcher heard that its batch was done: queue
//! and run, without the way to the server and back.
//!
//! Always true
//! - Every arrival ends in one of: answered, refused, expired, cancelled, unfinished.
//! - Where the executors' time went adds up to the run's, but for a batch that still runs at its end.
//! - On time is: answered by its deadline; without one, within the model's `slo_ms` as it was recorded. Judged are all but
//!   the cancelled and those whose time was not over when the trace ended.

//!
//! What a replay knows of the executors' time is when batches were sealed, how long they took, and when the batcher heard of
//! them: a batch begins when it is sealed or when the one before it ends, and whatever else lies between its seal and its being
//! heard of (packing, copies, scatter, messages) is `idle_mailbox`. It cannot know a device's rounding, nor what waited before it
//! reached the batcher.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::regret::{self, Account, Regret};
use crate::scheduler::{Arrival, Group, Scheduler, SealedBatch, TicketId};
use crate::telemetry::waterfall::{Cells, Parts, Waterfall};
use crate::vocab::{Code, ModelHandle, Moment, Run, SealReason};

/// One model's part.
#[derive(Clone, Debug)]
pub struct ModelReport {
    pub name: String,
    pub offered: u64,
    pub answered: u64,
    /// By code.
    pub refused: BTreeMap<Code, u64>,
    /// Their time was over while they waited, or could not be met any more.
    pub expired: u64,
    pub cancelled: u64,
    pub unfinished: u64,
    pub on_time: u64,
    pub judged: u64,
    /// By tenant: judged, and on time.
    pub tenants: BTreeMap<u16, (u64, u64)>,
    /// Ran behind a later one of the same tenant, class and length, whose deadline was not sooner.
    pub overtaken: u64,
    pub batches: u64,
    pub rows: u64,
    pub rows_possible: u64,
    pub cells_real: u64,
    pub cells_padded: u64,
    /// In the order of [`SealReason::ALL`].
    pub reasons: [u64; SealReason::ALL.len()],
    /// Queue and run of the answered, in ns.
    pub latency: Histogram<u64>,
}

impl ModelReport {
    pub(crate) fn new(name: String) -> ModelReport {
        ModelReport {
            name,
            offered: 0,
            answered: 0,
            refused: BTreeMap::new(),
            expired: 0,
            cancelled: 0,
            unfinished: 0,
            on_time: 0,
            judged: 0,
            tenants: BTreeMap::new(),
            overtaken: 0,
            batches: 0,
            rows: 0,
            rows_possible: 0,
            cells_real: 0,
            cells_padded: 0,
            reasons: [0; SealReason::ALL.len()],
            latency: Histogram::new(3).expect("3 digits are possible"),
        }
    }

    fn judge(&mut self, tenant: u16, on_time: bool) {
        self.judged += 1;
        self.on_time += u64::from(on_time);
        let (judged, in_time) = self.tenants.entry(tenant).or_default();
        *judged += 1;
        *in_time += u64::from(on_time);
    }

    /// Adds what came of another time.
    pub fn merge(&mut self, other: &ModelReport) {
        for (code, refused) in &other.refused {
            *self.refused.entry(*code).or_default() += refused;
        }
        for (tenant, (judged, on_time)) in &other.tenants {
            let sums = self.tenants.entry(*tenant).or_default();
            *sums = (sums.0 + judged, sums.1 + on_time);
        }
        for (sum, part) in [
            (&mut self.offered, other.offered),
            (&mut self.answered, other.answered),
            (&mut self.expired, other.expired),
            (&mut self.cancelled, other.cancelled),
            (&mut self.unfinished, other.unfinished),
            (&mut self.on_time, other.on_time),
            (&mut self.judged, other.judged),
            (&mut self.overtaken, other.overtaken),
            (&mut self.batches, other.batches),
            (&mut self.rows, other.rows),
            (&mut self.rows_possible, other.rows_possible),
            (&mut self.cells_real, other.cells_real),
            (&mut self.cells_padded, other.cells_padded),
        ] {
            *sum += part;
        }
        self.reasons.iter_mut().zip(other.reasons).for_each(|(sum, part)| *sum += part);
        self.latency.add(&other.latency).expect("it grows with what it holds");
    }

    pub fn refused_total(&self) -> u64 {
        self.refused.values().sum()
    }

    /// Share of the judged.
    pub fn on_time_share(&self) -> f64 {
        share(self.on_time, self.judged)
    }

    pub fn batch_rows(&self) -> f64 {
        share(self.rows, self.batches)
    }

    /// Rows used ÷ rows possible.
    pub fn fill(&self) -> f64 {
        share(self.rows, self.rows_possible)
    }

    /// Padding ÷ all cells.
    pub fn waste(&self) -> f64 {
        share(self.cells_padded - self.cells_real.min(self.cells_padded), self.cells_padded)
    }

    /// Queue and run that this share of the answered did not exceed.
    pub fn percentile(&self, share: f64) -> Duration {
        Duration::from_nanos(self.latency.value_at_quantile(share))
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// One run, recorded or replayed.
#[derive(Clone, Debug)]
pub struct Report {
    pub models: Vec<ModelReport>,
    /// By executor: time spent on batches.
    pub busy: Vec<Duration>,
    pub span: Duration,
    pub decisions: u64,
    /// Of the replayed: batches whose shape was so unlike all recorded ones that their time is a guess.
    pub guessed: u64,
    pub regret: Regret,
    /// By executor: whether it is the batcher's own thread, and where its time went.
    pub waterfall: Vec<(bool, Parts)>,
}

#[derive(Clone, Copy, Debug)]
struct Call {
    number: u64,
    model: ModelHandle,
    at: Moment,
    /// Its deadline, or what stands for one.
    due: Moment,
    tenant: u16,
    class: u8,
    len: u32,
}

/// Keeps the books of a run.
#[derive(Debug)]
pub struct Ledger {
    models: Vec<ModelReport>,
    slos: Vec<Duration>,
    /// By model: whether its slo counts beside a deadline, and not only in place of one.
    strict: Vec<bool>,
    busy: Vec<Duration>,
    begin: Moment,
    /// By ticket.
    waiting: Vec<Option<Call>>,
    /// By batch; as many as executors hold. When it was sealed, and its calls.
    running: Vec<(u64, Moment, Vec<Call>)>,
    spare: Vec<Vec<Call>>,
    /// By model, tenant, class and length: number and deadline of the last that came of those that were sealed.
    sealed_last: BTreeMap<(u16, u16, u8, u32), (u64, Moment)>,
    /// By executor: its group.
    groups: Vec<usize>,
    times: Waterfall,
    pub guessed: u64,
    pub regret: Account,
}

/// The group of executors that are the batcher's own thread.
const INLINE: usize = crate::scheduler::Group::Inline as usize;

impl Ledger {
    /// `executors`: the group of each.
    pub fn new(models: impl IntoIterator<Item = (String, Duration)>, executors: &[Group], begin: Moment) -> Ledger {
        let (models, slos): (Vec<_>, Vec<_>) =
            models.into_iter().map(|(name, slo)| (ModelReport::new(name), slo)).unzip();
        let groups: Vec<usize> = executors.iter().map(|group| *group as usize).collect();
        Ledger {
            times: Waterfall::new(begin, groups.iter().copied()),
            regret: Account::new(models.len(), executors, begin, regret::EVERY),
            strict: vec![false; models.len()],
            models,
            slos,
            busy: vec![Duration::ZERO; groups.len()],
            groups,
            begin,
            waiting: Vec::new(),
            running: Vec::new(),
            spare: Vec::new(),
            sealed_last: BTreeMap::new(),
            guessed: 0,
        }
    }

    /// Keeps no account of the cheapest batches, which costs about as much as the rest.
    pub fn without_regret(mut self) -> Ledger {
        self.regret.stop();
        self
    }

    /// From now on a request of this model is on time only within this, even if its deadline is later.
    pub fn set_objective(&mut self, model: ModelHandle, within: Duration) {
        self.slos[model.index()] = within;
        self.strict[model.index()] = true;
    }

    /// Arrival number `number` came at `at` and was admitted, or refused with a code.
    pub fn arrived(&mut self, number: u64, at: Moment, arrival: &Arrival, outcome: Result<TicketId, Code>) {
        let Some(model) = self.models.get_mut(arrival.model.index()) else { return };
        model.offered += 1;
        match outcome {
            Ok(id) => {
                if self.waiting.len() <= id.index() {
                    self.waiting.resize(id.index() + 1, None);
                }
                let within = at + self.slos[arrival.model.index()];
                let due = match arrival.deadline {
                    Some(deadline) if self.strict[arrival.model.index()] => deadline.min(within),
                    Some(deadline) => deadline,
                    None => within,
                };
                self.waiting[id.index()] = Some(Call {
                    number,
                    model: arrival.model,
                    at,
                    due,
                    tenant: arrival.tenant.0,
                    class: arrival.class.index() as u8,
                    len: arrival.len,
                });
            }
            Err(code) => {
                *model.refused.entry(code).or_default() += 1;
                model.judge(arrival.tenant.0, false);
            }
        }
    }

    /// Whether this ticket is that arrival's, waiting.
    pub fn waits(&self, id: TicketId, number: u64) -> bool {
        self.waiting.get(id.index()).is_some_and(|call| call.is_some_and(|call| call.number == number))
    }

    /// Whether this ticket is an arrival's that these books know.
    pub fn holds(&self, id: TicketId) -> bool {
        self.waiting.get(id.index()).is_some_and(Option::is_some)
    }

    fn leave(&mut self, id: TicketId) -> Option<Call> {
        self.waiting.get_mut(id.index())?.take()
    }

    pub fn cancelled(&mut self, id: TicketId) {
        if let Some(call) = self.leave(id) {
            self.models[call.model.index()].cancelled += 1;
        }
    }

    /// A request was cancelled whose batch may be running: its answer goes nowhere.
    pub fn cancelled_late(&mut self, number: u64) {
        for (.., calls) in &mut self.running {
            if let Some(at) = calls.iter().position(|call| call.number == number) {
                let call = calls.swap_remove(at);
                self.models[call.model.index()].cancelled += 1;
                return;
            }
        }
    }

    pub fn expired(&mut self, id: TicketId) {
        if let Some(call) = self.leave(id) {
            let model = &mut self.models[call.model.index()];
            model.expired += 1;
            model.judge(call.tenant, false);
        }
    }

    /// The scheduler stands where a run begins: its executors may hold batches, of which nothing is known but that.
    pub fn begin(&mut self, scheduler: &Scheduler) {
        for (executor, seat) in scheduler.seats().iter().enumerate() {
            for running in &seat.running {
                self.times.sealed(self.begin, executor, running.batch, Cells::default(), 0.0);
            }
        }
    }

    /// Something came at `at` for a model of this group, and was given to the scheduler later.
    pub fn came(&mut self, at: Moment, group: usize) {
        self.times.came(group, at);
    }

    /// The scheduler was asked for all that it had, at `now`.
    pub fn turned(&mut self, now: Moment, scheduler: &Scheduler) {
        self.times.turn(now, scheduler.waits(), scheduler.poll_timeout(now));
    }

    /// The scheduler has just sealed a batch.
    pub fn sealed(&mut self, scheduler: &Scheduler, batch: &SealedBatch, members: &[TicketId]) {
        let longest = members.iter().map(|id| scheduler.rows_and_len(*id).1).max().unwrap_or(0);
        let cells = Cells::of(batch.rows, longest, batch.cells_real, batch.cells_padded());
        let fixed = scheduler.cost(batch.model).fixed_share(batch.work());
        self.times.sealed(batch.sealed_at, usize::from(batch.executor), batch.id, cells, fixed);
        let model = &mut self.models[batch.model.index()];
        model.batches += 1;
        model.rows += u64::from(batch.rows);
        model.rows_possible += u64::from(batch.rows_possible);
        model.cells_real += batch.cells_real;
        model.cells_padded += batch.cells_padded();
        let reason = SealReason::ALL.iter().position(|reason| *reason == batch.reason);
        model.reasons[reason.expect("ALL has every reason")] += 1;
        let mut calls = self.spare.pop().unwrap_or_default();
        for id in members {
            calls.extend(self.leave(*id));
        }
        let model = &mut self.models[batch.model.index()];
        let key = |call: &Call| (call.model.0, call.tenant, call.class, call.len);
        for call in &calls {
            let last = self.sealed_last.get(&key(call));
            model.overtaken += u64::from(last.is_some_and(|(number, due)| call.number < *number && call.due <= *due));
        }
        for call in &calls {
            let last = self.sealed_last.entry(key(call)).or_insert((call.number, call.due));
            *last = (*last).max((call.number, call.due));
        }
        self.running.push((batch.id, batch.sealed_at, calls));
    }

    /// A batch came back at `now`, after `service` of its executor.
    pub fn finished(&mut self, now: Moment, batch: u64, executor: usize, service: Duration) {
        self.busy[executor] += service;
        let at = self.running.iter().position(|(id, ..)| *id == batch);
        let sealed_at = at.map_or(self.begin, |at| self.running[at].1);
        let began_at = sealed_at.max(self.times.view(executor).until).min(now);
        let ended_at = (began_at + service).min(now);
        let run = Run {
            taken_at: began_at,
            asked_at: began_at,
            began_at,
            ended_at,
            computed_in: ended_at.since(began_at),
            ..Run::default()
        };
        self.times.finished(executor, batch, &run);
        let Some(at) = at else { return };
        let (.., mut calls) = self.running.swap_remove(at);
        for call in calls.drain(..) {
            let model = &mut self.models[call.model.index()];
            model.answered += 1;
            model.judge(call.tenant, now <= call.due);
            let nanos = u64::try_from(now.since(call.at).as_nanos()).unwrap_or(u64::MAX);
            model.latency.record(nanos).expect("it grows with what it holds");
        }
        self.spare.push(calls);
    }

    /// Closes the books when the trace ends.
    pub fn close(mut self, end: Moment, decisions: u64) -> Report {
        let running = self.running.drain(..).flat_map(|(.., calls)| calls);
        for call in self.waiting.drain(..).flatten().chain(running) {
            let model = &mut self.models[call.model.index()];
            model.unfinished += 1;
            if call.due <= end {
                model.judge(call.tenant, false);
            }
        }
        let span = end.since(self.begin);
        let regret = self.regret.close();
        let parts = |(at, group): (usize, &usize)| (*group == INLINE, self.times.view(at).extended(end).parts);
        let waterfall = self.groups.iter().enumerate().map(parts).collect();
        Report { models: self.models, busy: self.busy, span, decisions, guessed: self.guessed, regret, waterfall }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Buckets, Class, Group, Policy, QueueLimits, SeatSpec, TenantId};
    use crate::telemetry::waterfall::Part;
    use crate::vocab::Layout;

    fn arrival(deadline: Option<Moment>) -> Arrival {
        let (class, tenant) = (Class::default(), TenantId::default());
        Arrival { model: ModelHandle(0), rows: 1, len: 8, bytes: 32, deadline, compose: None, class, tenant }
    }

    fn batch(id: u64, rows: u32) -> SealedBatch {
        SealedBatch {
            id,
            model: ModelHandle(0),
            executor: 0,
            rows,
            rows_possible: 8,
            layout: Layout::Padded,
            squares_real: 0,
            padded_len: 10,
            cells_real: 8 * u64::from(rows),
            reason: SealReason::Idle,
            sealed_at: Moment(0),
            generation: 1,
            predicted: 0,
            objective: Duration::ZERO,
        }
    }

    const MS: u64 = 1_000_000;

    /// With tickets of length 8, as the ledger's are.
    fn scheduler() -> Scheduler {
        let policy = Policy::new(8, 80, Buckets::new(&[10]).expect("ascending"));
        let seats = SeatSpec::separate(Group::Executors, 1, 2);
        let mut scheduler = Scheduler::new(QueueLimits::NONE, vec![policy], &seats);
        for ticket in 0..7 {
            let id = scheduler.handle_arrival(Moment(0), arrival(None)).expect("there is room");
            assert_eq!(id, TicketId(ticket));
        }
        scheduler
    }

    #[test]
    fn who_runs_behind_a_later_one_of_its_kind_was_overtaken_unless_that_was_more_urgent() {
        let mut ledger = Ledger::new([("m".to_owned(), Duration::from_millis(5))], &[Group::Executors], Moment(0));
        let scheduler = scheduler();
        let ids: Vec<TicketId> = (0..5).map(TicketId).collect();
        for (number, id) in ids.iter().enumerate() {
            let arrival = match number {
                3 => Arrival { len: 9, ..arrival(None) },
                4 => arrival(Some(Moment(1))),
                _ => arrival(None),
            };
            ledger.arrived(number as u64, Moment(number as u64), &arrival, Ok(*id));
        }
        // 3 is of another length, 4 more urgent, 1 comes behind 2; 0 and 2 share a batch.
        ledger.sealed(&scheduler, &batch(1, 1), &[ids[3]]);
        ledger.sealed(&scheduler, &batch(2, 2), &[ids[2], ids[0]]);
        ledger.sealed(&scheduler, &batch(3, 1), &[ids[1]]);
        assert_eq!(ledger.models[0].overtaken, 1);
        let mut ledger = Ledger::new([("m".to_owned(), Duration::from_millis(5))], &[Group::Executors], Moment(0));
        ledger.arrived(0, Moment(0), &arrival(None), Ok(ids[0]));
        ledger.arrived(1, Moment(1), &arrival(Some(Moment(2))), Ok(ids[1]));
        ledger.sealed(&scheduler, &batch(1, 1), &[ids[1]]);
        ledger.sealed(&scheduler, &batch(2, 1), &[ids[0]]);
        assert_eq!(ledger.models[0].overtaken, 0, "the later one had less time");
    }

    #[test]
    fn everybody_ends_in_one_way_and_times_are_from_arrival_to_the_end_of_the_batch() {
        let mut ledger = Ledger::new([("m".to_owned(), Duration::from_millis(5))], &[Group::Executors], Moment(0));
        let scheduler = scheduler();
        for number in 0..7 {
            let deadline = (number == 1).then_some(Moment(20 * MS));
            ledger.arrived(number, Moment(number * MS), &arrival(deadline), Ok(TicketId(number as u32)));
        }
        ledger.arrived(7, Moment(7 * MS), &arrival(None), Err(Code::Overloaded));
        ledger.cancelled(TicketId(6));
        ledger.expired(TicketId(5));
        ledger.sealed(&scheduler, &batch(1, 3), &[TicketId(0), TicketId(1), TicketId(2)]);
        ledger.sealed(&scheduler, &batch(2, 1), &[TicketId(3)]);
        ledger.cancelled_late(2);
        ledger.finished(Moment(12 * MS), 1, 0, Duration::from_millis(4));
        // A batch that these books do not know.
        ledger.finished(Moment(12 * MS), 99, 0, Duration::from_millis(1));
        let report = ledger.close(Moment(14 * MS), 3);
        let model = &report.models[0];
        assert_eq!((model.offered, model.answered, model.refused_total(), model.expired), (8, 2, 1, 1));
        assert_eq!((model.cancelled, model.unfinished), (2, 2));
        // Of 0 (late by 7 ms), 1 (by its deadline), 3 and 4 (their 5 ms are over), 5 (expired), 7 (refused).
        assert_eq!((model.judged, model.on_time), (6, 1));
        assert_eq!((model.tenants[&0], model.overtaken), ((6, 1), 0));
        assert_eq!((model.batches, model.rows, model.rows_possible), (2, 4, 16));
        assert!((model.waste() - 0.2).abs() < 1e-9);
        let largest = model.latency.max() as f64 / (12 * MS) as f64;
        assert!((largest - 1.0).abs() < 0.002, "{largest}");
        assert_eq!(model.percentile(0.5).as_millis(), 11);
        assert_eq!((report.busy[0], report.span), (Duration::from_millis(5), Duration::from_millis(14)));
        // 4 ms of 24 cells in 30, then one of which nothing is known; batch 2 still runs, since the end of that.
        let (inline, parts) = report.waterfall[0];
        let ms = |part: Part| parts.get(part) as f64 / MS as f64;
        assert_eq!((inline, ms(Part::Useful), ms(Part::PaddingBucket)), (false, 4.2, 0.8));
        assert_eq!(parts.total(), 5 * MS);
    }

    #[test]
    fn an_objective_counts_beside_a_deadline_and_not_only_in_place_of_one() {
        let scheduler = scheduler();
        let on_time = |objective: Option<u64>| {
            let mut ledger = Ledger::new([("m".to_owned(), Duration::from_millis(5))], &[Group::Executors], Moment(0));
            if let Some(ms) = objective {
                ledger.set_objective(ModelHandle(0), Duration::from_millis(ms));
            }
            for (number, deadline) in [(0, None), (1, Some(Moment(20 * MS))), (2, Some(Moment(2 * MS)))] {
                ledger.arrived(number, Moment(0), &arrival(deadline), Ok(TicketId(number as u32)));
            }
            ledger.sealed(&scheduler, &batch(1, 3), &[TicketId(0), TicketId(1), TicketId(2)]);
            ledger.finished(Moment(4 * MS), 1, 0, Duration::from_millis(4));
            ledger.close(Moment(50 * MS), 1).models[0].on_time
        };
        assert_eq!(on_time(None), 2, "the slo of the model, and a deadline of 20 ms");
        assert_eq!(on_time(Some(3)), 0, "the later deadline is no longer enough");
        assert_eq!(on_time(Some(30)), 2, "a deadline is never put off");
    }
}
