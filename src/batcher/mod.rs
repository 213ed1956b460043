//! The thread around the scheduler: mailboxes, clock, executors, one turn at a time. Acts and never decides.
//!
//! Always true
//! - Each request that came in a burst is held here until its batch is packed, or its end was mailed to its shard.
//! - It sleeps until the next needed moment (a window's end, a deadline) or a message; nothing is polled at a period.
//!
//! Elsewhere: what to do (scheduler), who answers (scatter.rs, frontend).

mod accounts;
mod flights;
mod hang;
mod keeping;
mod live;
mod quarantine;
mod recorder;
mod rotation;
mod times;
mod trial;
mod waits;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::capture::{CaptureEnd, Done, Sink};
use crate::clock;
use crate::contract::Contract;
use crate::executor::fence::{Fence, Pass};
use crate::executor::pack::{Pads, Row, pack};
use crate::executor::slot::{FilledSlot, VacantSlot};
use crate::executor::worker::{Worker, view_of};
use crate::mail::{Burst, Finished, Part, Request, ToBatcher, ToShard, Waited};
use crate::mailbox::{Received, Receiver, Sender};
use crate::scheduler::{Arrival, Expired, Group, Scheduler, SealedBatch, TicketId};
use crate::telemetry::{Alarm, Books, Telemetry};
use crate::timeline::{self, Ran};
use crate::trial::Outcome;
use crate::vocab::{Code, Layout, ModelHandle, Moment, Refusal, Run, SealReason, Stage, TicketKey};
use accounts::Accounts;
use flights::Flights;
use hang::Watchdog;
use keeping::Kept;
pub use live::HISTORY;
use live::Live;
use quarantine::Quarantine;
use recorder::{Recorder, Tap};
use rotation::Recorders;
use times::Times;
use waits::Waits;

/// How packed batches leave and ended requests are told. The real one is threads; a test's is a list.
pub trait Outlet {
    /// Runs the batch. `Some` when it ran at once, on this thread.
    fn submit(&mut self, executor: usize, slot: FilledSlot) -> Option<Finished>;

    /// Mails the ends of requests to their shard.
    fn end(&mut self, shard: u16, ended: Vec<(TicketKey, Refusal)>);

    /// A batch has run for longer than any should: puts another executor in this seat, if it really runs. What the one before may
    /// still do reaches nobody.
    fn replace(&mut self, _executor: usize, _batch: u64) -> Replaced {
        Replaced::Dead
    }
}

/// What came of replacing a hung executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replaced {
    /// It does not run the batch: not yet, or no longer, and then the result is on its way.
    NotRunning,
    /// The next one takes what waits for the seat.
    Yes,
    /// No other takes the seat.
    Dead,
}

/// One model's facts that packing needs.
#[derive(Debug)]
struct Form {
    contract: Arc<Contract>,
    pads: Pads,
}

/// A request that the scheduler holds.
#[derive(Debug)]
struct Held {
    request: Request,
    /// What its model's account said when it was admitted.
    waits: Waited,
}

/// A request of more rows than fit a batch.
#[derive(Debug, Default)]
struct Parts {
    waiting: Vec<TicketId>,
    /// Parts in all.
    count: usize,
}

/// What joins scheduler and executors. Generic over the way out, so that a simulation runs the same turns.
pub struct Batcher<O> {
    scheduler: Scheduler,
    outlet: O,
    forms: Vec<Form>,
    /// By executor: the slots that can be filled. The scheduler knows how many there are.
    vacant: Vec<Vec<VacantSlot>>,
    /// Requests by ticket: those the scheduler holds, and no others.
    held: Vec<Option<Held>>,
    waits: Waits,
    /// Ticket by shard and slot; checked against the request's key, so a stale entry does no harm.
    tickets: Vec<Vec<TicketId>>,
    /// Requests that are run in parts, as long as one of them waits.
    parts: BTreeMap<TicketKey, Parts>,
    flights: Flights,
    watchdog: Watchdog,
    quarantine: Quarantine,
    /// Ends collected during a turn, by shard.
    ended: Vec<Vec<(TicketKey, Refusal)>>,
    members: Vec<TicketId>,
    live: Live,
    /// What became of the last batches.
    kept: Kept,
    recorders: Recorders,
    times: Times,
    accounts: Accounts,
    telemetry: Arc<Telemetry>,
    /// When the scheduler's books are recomputed next.
    audit_at: Moment,
    /// What waits was handed back, and so is what still comes.
    hands_back: bool,
}

/// The scheduler's books are recomputed this often. With 65,536 requests waiting it takes a millisecond or two.
const AUDIT_EVERY: Duration = Duration::from_secs(10);

fn handed_back() -> Refusal {
    Refusal::new(Code::Draining, "the server is shutting down and does not get to this any more")
}

impl<O: Outlet> Batcher<O> {
    pub fn new(
        scheduler: Scheduler,
        outlet: O,
        contracts: &[Arc<Contract>],
        shards: usize,
        telemetry: Arc<Telemetry>,
    ) -> Batcher<O> {
        let forms: Vec<Form> = contracts
            .iter()
            .map(|contract| Form { contract: Arc::clone(contract), pads: Pads::of(contract) })
            .collect();
        let slots = |slots: u32| (0..slots).map(|_| VacantSlot::default()).collect();
        let vacant: Vec<_> = scheduler.seats().iter().map(|seat| slots(seat.slots)).collect();
        let seats = vacant.len();
        let batcher = Batcher {
            live: Live::new(&scheduler, forms.len()),
            times: Times::new(&scheduler, Arc::clone(&telemetry)),
            accounts: Accounts::new(Arc::clone(&telemetry)),
            scheduler,
            outlet,
            forms,
            vacant,
            held: Vec::new(),
            waits: Waits::new(contracts.len()),
            tickets: vec![Vec::new(); shards],
            parts: BTreeMap::new(),
            flights: Flights::default(),
            watchdog: Watchdog::new(seats),
            quarantine: Quarantine::new(0, Duration::ZERO),
            ended: vec![Vec::new(); shards],
            members: Vec::new(),
            kept: Kept::default(),
            recorders: Recorders::default(),
            telemetry,
            audit_at: Moment::ZERO,
            hands_back: false,
        };
        batcher.publish();
        batcher
    }

    /// Fills these slots of an executor instead of empty ones: they lie where its device reads them.
    pub fn set_slots(&mut self, executor: usize, slots: Vec<VacantSlot>) {
        assert_eq!(slots.len(), self.vacant[executor].len(), "the scheduler counts on as many");
        self.vacant[executor] = slots;
    }

    /// A batch that an executor has run for longer is given up, and the executor with it. Zero: never.
    pub fn give_up_after(&mut self, timeout: Duration) {
        self.watchdog.set_timeout(timeout);
    }

    /// Requests that made their model fail alone are remembered, so many for so long, and not run again meanwhile.
    pub fn quarantine(&mut self, max: usize, time: Duration) {
        self.quarantine = Quarantine::new(max, time);
    }

    /// Takes one message in. Decides nothing yet: [`Batcher::turn`] does, once for all that arrived together.
    pub fn take(&mut self, now: Moment, message: ToBatcher) {
        match message {
            ToBatcher::Burst(burst) => self.take_burst(now, burst),
            ToBatcher::Finished(finished) => self.take_finished(now, finished, false),
            ToBatcher::Drain => {
                for recorder in self.recorders.each() {
                    recorder.drain(self.scheduler.log());
                }
                self.scheduler.drain();
                self.end_trial(now, None, Outcome::draining());
            }
            ToBatcher::HandBack => self.hand_back(now),
            ToBatcher::SetPolicy(wish) => self.set_policy(now, wish),
            ToBatcher::Trial(wish) => self.start_trial(now, wish),
            ToBatcher::EndTrial { model, reply } => {
                self.end_trial(now, Some(model), Outcome::aborted());
                reply.give(self.trial_of(model));
            }
            ToBatcher::Ask(question) => self.answer(now, question),
            ToBatcher::Capture { time, sink } => self.start_recorder(now, time, (Tap::Capture, sink)),
            ToBatcher::Shadow { time, sink } => self.start_recorder(now, time, (Tap::Shadow, sink)),
            ToBatcher::Judged { model, generation, prediction } => self.judge(model, generation, prediction),
            ToBatcher::Stop => self.end_recorders(CaptureEnd::Stopped),
        }
    }

    /// The executors' time is accounted for from now on. At the first turn at the latest.
    pub fn begin(&mut self, now: Moment) {
        self.times.begin(now);
    }

    /// One turn: all it does, in the order it does it. Returns when to wake next.
    pub fn turn(&mut self, now: Moment) -> Option<Moment> {
        self.begin(now);
        // As if they had come back: before the turn.
        self.replace_hung(now);
        self.conduct_trial(now);
        for recorder in self.recorders.each() {
            recorder.turn(now, self.scheduler.log());
        }
        self.choose_edges(now);
        self.expire(now);
        let now = self.fill(now);
        // Also who was given up meanwhile.
        self.expire(now);
        self.mail_ends();
        self.publish();
        self.dump(now);
        self.rotate(now);
        self.audit(now);
        let asked_again = self.scheduler.poll_timeout(now);
        self.times.turned(now, self.scheduler.waits(), asked_again);
        let trial = self.live.trial.as_ref().map(|running| running.trial.next(now));
        let wakes = [asked_again, self.flights.next(), self.watchdog.next(), self.settle_recorders(now), trial];
        wakes.into_iter().flatten().min()
    }

    /// Begins to record. Whoever recorded for the same reader ends: that one has gone, or there would be no other.
    fn start_recorder(&mut self, now: Moment, time: Duration, (by, sink): (Tap, Sink)) {
        if let Some(at) = self.recorders.read.iter().position(|recorder| recorder.by == by) {
            self.end_recorder(at, CaptureEnd::ReaderGone);
        }
        let names = self.names();
        match Recorder::start(&self.scheduler, &names, self.tickets.len(), now, time, (by, sink)) {
            Ok(recorder) => self.recorders.read.push(recorder),
            Err(end) if by == Tap::Capture => self.telemetry.capture_ended(end as usize),
            Err(_) => {}
        }
    }

    /// Of all models, by their handles.
    fn names(&self) -> Vec<String> {
        self.forms.iter().map(|form| form.contract.name.clone()).collect()
    }

    /// When a recorder wants the next turn.
    fn settle_recorders(&mut self, now: Moment) -> Option<Moment> {
        let mut next: Option<Moment> = None;
        let mut at = 0;
        while let Some(recorder) = self.recorders.read.get_mut(at) {
            match recorder.settle(now, self.scheduler.log()) {
                Ok(again) => {
                    next = Some(next.map_or(again, |next| next.min(again)));
                    at += 1;
                }
                Err(end) => self.end_recorder(at, end),
            }
        }
        next
    }

    fn end_recorders(&mut self, end: CaptureEnd) {
        while !self.recorders.read.is_empty() {
            self.end_recorder(0, end);
        }
    }

    fn end_recorder(&mut self, at: usize, end: CaptureEnd) {
        let recorder = self.recorders.read.swap_remove(at);
        let by = recorder.by;
        let end = recorder.end(end, self.scheduler.log());
        // Of stretches for the shadow schedulers, their thread says what became of them.
        if by == Tap::Capture {
            self.telemetry.capture_ended(end as usize);
        }
    }

    /// Nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_empty() && self.scheduler.running() == 0
    }

    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    pub fn outlet_mut(&mut self) -> &mut O {
        &mut self.outlet
    }

    fn take_burst(&mut self, now: Moment, burst: Burst) {
        if let Some(first) = burst.arrivals.first()
            && first.model.index() < self.forms.len()
        {
            self.times.came(self.scheduler.policy(first.model).group as usize, first.received_at);
        }
        for request in burst.arrivals {
            match self.hands_back {
                true => self.ended[usize::from(request.key.shard)].push((request.key, handed_back())),
                false => self.admit(now, request),
            }
        }
        for key in burst.cancelled {
            self.cancel(now, key);
        }
    }

    /// Takes out what waits of a request.
    fn cancel(&mut self, now: Moment, key: TicketKey) {
        let waits = self.ticket_of(key);
        for recorder in self.recorders.each() {
            recorder.cancel(now, key, waits, self.scheduler.log());
        }
        if let Some(id) = waits
            && self.scheduler.handle_cancel(id)
        {
            self.held[id.index()] = None;
            if let Some(running) = &mut self.live.trial {
                running.trial.meter.cancelled(id);
            }
        }
        self.cancel_parts(now, key, None);
    }

    /// The drain has no more time for what waits: its callers hear that it was not executed, and may go elsewhere. What is with
    /// an executor is finished, and so is a request of which some part has left: of it nobody could say so.
    fn hand_back(&mut self, now: Moment) {
        self.hands_back = true;
        let mut keys: Vec<TicketKey> = self.held.iter().flatten().map(|held| held.request.key).collect();
        // The parts of a request lie anywhere.
        keys.sort_unstable();
        keys.dedup();
        let has_begun = |key: &TicketKey| self.parts.get(key).is_some_and(|parts| parts.waiting.len() < parts.count);
        keys.retain(|key| !has_begun(key));
        if !keys.is_empty() {
            tracing::info!(requests = keys.len(), "handing back what waits");
        }
        for key in keys {
            self.cancel(now, key);
            self.ended[usize::from(key.shard)].push((key, handed_back()));
        }
    }

    /// Takes a part out, if it still waits, because its caller said so or `with` one that has just expired.
    fn cancel_part(&mut self, now: Moment, id: TicketId, with: Option<TicketId>) {
        if self.scheduler.handle_cancel(id) {
            self.held[id.index()] = None;
            if let Some(running) = &mut self.live.trial {
                running.trial.meter.cancelled(id);
            }
            for recorder in self.recorders.each() {
                recorder.cancel_part(now, id, with, self.scheduler.log());
            }
        }
    }

    /// Takes what waits of a request that is run in parts. Says whether some part had left before.
    fn cancel_parts(&mut self, now: Moment, key: TicketKey, with: Option<TicketId>) -> bool {
        let Some(parts) = self.parts.remove(&key) else { return false };
        parts.waiting.iter().for_each(|id| self.cancel_part(now, *id, with));
        parts.waiting.len() < parts.count
    }

    /// Admits a request of more rows than fit a batch as parts, all of them or none.
    fn admit_parts(&mut self, now: Moment, request: &Request, rows_max: u32) {
        let mut parts = Parts::default();
        let mut at_row = 0;
        while at_row < request.rows {
            let rows = rows_max.min(request.rows - at_row);
            let part = Part { at_row, of_rows: request.rows };
            match self.admit_rows(now, Request { rows, part, ..request.clone() }) {
                Ok(id) => parts.waiting.push(id),
                Err(refusal) => {
                    parts.waiting.iter().for_each(|id| self.cancel_part(now, *id, None));
                    self.ended[usize::from(request.key.shard)].push((request.key, refusal));
                    return;
                }
            }
            at_row += rows;
        }
        parts.count = parts.waiting.len();
        self.parts.insert(request.key, parts);
    }

    fn admit(&mut self, now: Moment, request: Request) {
        let rows_max = self.scheduler.rows_of_batch(request.model, request.len);
        if request.compose.is_none() && rows_max.is_some_and(|rows_max| request.rows > rows_max) {
            return self.admit_parts(now, &request, rows_max.expect("just compared"));
        }
        let key = request.key;
        match self.admit_rows(now, request) {
            Ok(id) => {
                let slots = &mut self.tickets[usize::from(key.shard)];
                if slots.len() <= key.slot as usize {
                    slots.resize(key.slot as usize + 1, TicketId(u32::MAX));
                }
                slots[key.slot as usize] = id;
            }
            Err(refusal) => self.ended[usize::from(key.shard)].push((key, refusal)),
        }
    }

    fn admit_rows(&mut self, now: Moment, request: Request) -> Result<TicketId, Refusal> {
        if let Some(form) = self.forms.get(request.model.index())
            && let Err(refusal) = self.quarantine.check(now, &form.contract, &request)
        {
            self.telemetry.quarantined(request.model);
            return Err(refusal);
        }
        let bytes = match request.part.of_rows == request.rows {
            true => request.payload.len() as u64,
            // A part holds its share of the payload.
            false => request.payload.len() as u64 * u64::from(request.rows) / u64::from(request.part.of_rows.max(1)),
        };
        let arrival = Arrival {
            model: request.model,
            rows: request.rows,
            len: request.len,
            bytes,
            deadline: request.deadline,
            compose: request.compose,
            class: request.class,
            tenant: request.tenant,
        };
        for recorder in self.recorders.each() {
            recorder.arrival(now, &arrival, request.key, self.scheduler.log());
        }
        let outcome = self.scheduler.handle_arrival(now, arrival);
        if let Some(running) = &mut self.live.trial {
            running.arrived(now, arrival.model, arrival.deadline, outcome.as_ref().ok().copied());
        }
        let id = outcome?;
        for recorder in self.recorders.each() {
            recorder.admitted(id);
        }
        if self.held.len() <= id.index() {
            self.held.resize_with(id.index() + 1, || None);
        }
        assert!(self.held[id.index()].is_none(), "a ticket's request leaves with it");
        let waits = self.waits.of(request.model, now);
        self.held[id.index()] = Some(Held { request, waits });
        Ok(id)
    }

    /// The waiting ticket of a request, if it still waits.
    fn ticket_of(&self, key: TicketKey) -> Option<TicketId> {
        let id = *self.tickets.get(usize::from(key.shard))?.get(key.slot as usize)?;
        let held = self.held.get(id.index())?.as_ref()?;
        (held.request.key == key).then_some(id)
    }

    fn take_finished(&mut self, now: Moment, finished: Finished, inline: bool) {
        let Finished { executor, slot, batch, service, ran, run, blamed } = finished;
        let given = self.watchdog.finished(now, executor, batch.id);
        if given != Some(batch) {
            tracing::error!(executor, batch = batch.id, "a batch came back twice, or that nobody had given");
            self.telemetry.alarm(Alarm::ForeignResult);
            if let Some(given) = given {
                // It says another thing of a batch that was given: that one goes on being waited for.
                self.watchdog.given(now, &given);
            }
            return;
        }
        let contract = &self.forms[batch.model.index()].contract;
        for blamed in &blamed {
            let view = view_of(slot.staging(), contract, &batch);
            self.quarantine.blame(now, batch.model, view, blamed);
        }
        self.vacant[executor].push(slot);
        self.settle(now, &batch, service, (ran, &run), inline);
    }

    /// A batch has left its executor, whatever came of it.
    fn settle(&mut self, now: Moment, batch: &SealedBatch, service: Duration, (ran, run): (Ran, &Run), inline: bool) {
        // How long a failure took says nothing about how long a batch takes.
        let service = if ran.outcome == timeline::Outcome::Ok { service } else { Duration::ZERO };
        for recorder in self.recorders.each() {
            let &SealedBatch { id, executor, model, rows, padded_len, .. } = batch;
            let packed = (batch.layout == Layout::Packed).then_some((batch.cells_real, batch.squares_real));
            let done = Done { id, executor, model, rows, padded_len, packed, service, inline };
            recorder.finished(now, done, self.scheduler.log());
        }
        self.note_ran(now, batch, ran);
        let took = self.times.finished(usize::from(batch.executor), batch.id, run);
        self.accounts.finished(batch.id, took);
        self.flights.finish(batch.id);
        if let Some(running) = &mut self.live.trial {
            running.trial.meter.finished(now, batch.id);
        }
        self.scheduler.handle_finished(now, batch, service);
    }

    /// Batches that run for too long are given up: their requests are answered, and another executor takes the seat.
    fn replace_hung(&mut self, now: Moment) {
        while let Some((executor, id)) = self.watchdog.poll(now) {
            let replaced = self.outlet.replace(executor, id);
            if replaced != Replaced::NotRunning {
                self.telemetry.executor(executor).hung();
            }
            match replaced {
                Replaced::NotRunning => self.watchdog.runs_since(now, executor),
                Replaced::Yes => {
                    tracing::error!(executor, batch = id, "a batch hung; another executor thread takes its seat");
                    let batch = self.watchdog.given_up(now, executor);
                    let late = self.answer_lost(now, batch.id);
                    self.vacant[executor].push(VacantSlot::default());
                    let began_at = batch.sealed_at.min(now);
                    let service = now.since(began_at);
                    let outcome = timeline::Outcome::Hung;
                    let ran = Ran { outcome, late, ..Ran::new(began_at, now, None, service) };
                    let at = began_at;
                    let run =
                        Run { packed_at: at, taken_at: at, asked_at: at, began_at, ended_at: now, ..Run::default() };
                    let run = Run { copied_at: now, answered_at: now, computed_in: service, ..run };
                    self.settle(now, &batch, service, (ran, &run), false);
                }
                Replaced::Dead => {
                    tracing::error!(executor, batch = id, "a batch hung, and no other executor takes its seat");
                    for batch in self.watchdog.bury(executor).collect::<Vec<u64>>() {
                        self.answer_lost(now, batch);
                    }
                }
            }
        }
    }

    /// Answers who is in a batch that will not come back. Says how many had no answer.
    fn answer_lost(&mut self, now: Moment, batch: u64) -> u32 {
        let mut lost = 0;
        let keys: Vec<TicketKey> = self.flights.lose(batch).collect();
        for key in keys {
            self.cancel_parts(now, key, None);
            let refusal = Refusal::new(Code::ExecutorFailed, "the batch did not come back from its executor in time");
            self.ended[usize::from(key.shard)].push((key, refusal));
            lost += 1;
        }
        lost
    }

    fn expire(&mut self, now: Moment) {
        while let Some(expired) = self.scheduler.poll_expired(now) {
            let id = expired.id();
            if let Some(running) = &mut self.live.trial {
                running.trial.meter.expired(id);
            }
            let Held { request, .. } = self.held[id.index()].take().expect("the scheduler's tickets are held here");
            let message = match expired {
                Expired::Due(_) => "the deadline came while waiting",
                Expired::Hopeless(_) => "the deadline could no longer be met: a batch takes longer than what is left",
            };
            // Of a request in parts, the first that expires ends it; another may have run.
            let stage = if self.cancel_parts(now, request.key, Some(id)) { Stage::Executing } else { Stage::Queue };
            let refusal = Refusal::at_stage(Code::DeadlineExceeded, stage, message);
            self.ended[usize::from(request.key.shard)].push((request.key, refusal));
        }
        while let Some(key) = self.flights.poll_expired(now) {
            let refusal =
                Refusal::at_stage(Code::DeadlineExceeded, Stage::Executing, "the deadline came while the batch ran");
            self.ended[usize::from(key.shard)].push((key, refusal));
        }
    }

    /// Gives executors what the scheduler has for them. Returns the time then: a batch that ran here took its own, and
    /// what waits behind it may have expired. The clock is not asked: a simulation runs the same turns.
    fn fill(&mut self, mut now: Moment) -> Moment {
        let mut members = std::mem::take(&mut self.members);
        while let Some(batch) = self.scheduler.poll_batch(now, &mut members) {
            if let Some(running) = &mut self.live.trial {
                running.sealed(&batch, &members);
            }
            let filled = self.pack(batch, &members);
            if self.scheduler.policy(batch.model).group == Group::Inline {
                // It takes its time here and now.
                self.waits.settle(now, &self.scheduler);
            }
            self.watchdog.given(now, &batch);
            if self.watchdog.is_dead(batch.executor) {
                // It would wait behind what never ends.
                self.answer_lost(now, batch.id);
                continue;
            }
            if let Some(finished) = self.outlet.submit(usize::from(batch.executor), filled) {
                now = now + finished.service;
                self.take_finished(now, finished, true);
                self.waits.settle(now, &self.scheduler);
                self.expire(now);
            }
        }
        self.waits.settle(now, &self.scheduler);
        self.members = members;
        now
    }

    fn pack(&mut self, batch: SealedBatch, members: &[TicketId]) -> FilledSlot {
        let vacant = self.vacant[usize::from(batch.executor)].pop();
        let mut slot = vacant.expect("the scheduler gives an executor no more batches than it has slots");
        let metrics = self.telemetry.model(batch.model);
        let lens = members.iter().filter_map(|id| self.held[id.index()].as_ref()).map(|held| held.request.len);
        let (rows, longest) = (batch.rows, lens.max().unwrap_or(0));
        let (real, padded) = (batch.cells_real, batch.cells_padded());
        let cells = metrics.batch_sealed(batch.reason, rows, batch.rows_possible, longest, real, padded);
        metrics.batch_length(batch.padded_len);
        self.times.sealed(&batch, cells, self.scheduler.cost(batch.model).fixed_share(batch.work()));
        let form = &self.forms[batch.model.index()];
        {
            let (held, scheduler, waits) = (&self.held, &self.scheduler, &self.waits);
            let rows = members.iter().map(|id| {
                let held = held[id.index()].as_ref().expect("the scheduler's tickets are held here");
                let admitted_at = scheduler.admitted_at(*id);
                let mut waited = waits.since(batch.model, batch.sealed_at, held.waits);
                if batch.reason == SealReason::Composed {
                    let queue = batch.sealed_at.since(admitted_at).as_nanos() as u64;
                    waited.other = queue.saturating_sub(waited.behind);
                }
                Row { request: &held.request, admitted_at, waited }
            });
            pack(&mut slot, &form.contract, &form.pads, &batch, rows.clone());
            let charged = rows.clone().map(|row| (row.request.tenant, row.request.rows, row.request.len));
            self.accounts.sealed(&batch, charged);
            rows.clone().for_each(|row| metrics.queue_delay(batch.sealed_at.since(row.admitted_at)));
            self.kept.sealed(&batch, rows.clone());
            let deadlines = rows.map(|row| (row.request.deadline.unwrap_or(Moment::FAR), row.request.key));
            self.flights.start(batch.id, deadlines);
        }
        for id in members {
            let Held { request, .. } = self.held[id.index()].take().expect("packed above");
            if request.rows != request.part.of_rows
                && let Some(parts) = self.parts.get_mut(&request.key)
            {
                parts.waiting.retain(|part| part != id);
                if parts.waiting.is_empty() {
                    self.parts.remove(&request.key);
                }
            }
        }
        let packed_at = clock::now();
        self.kept.packed(packed_at);
        slot.fill(batch, packed_at)
    }

    /// A count that drifted would refuse requests for ever, or none any more; nobody would know why.
    fn audit(&mut self, now: Moment) {
        if now < self.audit_at {
            return;
        }
        self.audit_at = now + AUDIT_EVERY;
        let outcome = self.scheduler.audit();
        self.telemetry.audited(Books::Scheduler, outcome.is_ok());
        if let Err(message) = outcome {
            tracing::error!(message, "the scheduler's books do not add up");
        }
    }

    /// Says how things stand, once for all that the turn changed.
    fn publish(&self) {
        self.telemetry.remembered(self.quarantine.len());
        for index in 0..self.forms.len() {
            let model = ModelHandle(index as u16);
            let (rows, cells, bytes) = self.scheduler.waiting(model);
            let metrics = self.telemetry.model(model);
            metrics.queue_depth(rows, cells, bytes);
            let counts = self.scheduler.verdicts(model);
            metrics.verdicts(counts.held, counts.shed, counts.refused);
            metrics.policy_generation(self.scheduler.generation(model));
            metrics.cost_error(self.scheduler.cost(model).error());
            metrics.overrun(self.scheduler.overrun(model));
        }
    }

    fn mail_ends(&mut self) {
        for (shard, ended) in self.ended.iter_mut().enumerate() {
            if !ended.is_empty() {
                self.outlet.end(shard as u16, std::mem::take(ended));
            }
        }
    }
}

/// The real way out: executor threads, one inline worker, and the shards' mailboxes.
pub struct ThreadOutlet {
    pub executors: Vec<ExecutorLink>,
    pub shards: Vec<Sender<ToShard>>,
}

/// How the batcher reaches one executor.
pub enum ExecutorLink {
    Thread(Sender<FilledSlot>, OnHang),
    Inline(Box<Worker>),
}

/// What is done about an executor's thread that hangs.
pub enum OnHang {
    /// Starts another one with this pass, which takes what waits; false when there may be no more.
    Replace(Arc<Fence>, Box<dyn FnMut(Pass) -> bool + Send>),
    /// Its device is given up, and with it this process.
    GiveUp(Box<dyn FnMut() + Send>),
}

impl Outlet for ThreadOutlet {
    fn submit(&mut self, executor: usize, slot: FilledSlot) -> Option<Finished> {
        match &mut self.executors[executor] {
            ExecutorLink::Thread(sender, _) => {
                // Room is certain: an executor's mailbox holds as many messages as it has slots.
                let sent = sender.send_or_wait(slot);
                assert!(sent, "executor threads outlive the batcher");
                None
            }
            ExecutorLink::Inline(worker) => Some(worker.run(slot)),
        }
    }

    fn replace(&mut self, executor: usize, batch: u64) -> Replaced {
        match &mut self.executors[executor] {
            ExecutorLink::Thread(_, OnHang::Replace(fence, start)) => match fence.close(batch) {
                None => Replaced::NotRunning,
                Some(pass) => match start(pass) {
                    true => Replaced::Yes,
                    false => Replaced::Dead,
                },
            },
            ExecutorLink::Thread(_, OnHang::GiveUp(give_up)) => {
                give_up();
                Replaced::Dead
            }
            // It runs in the batcher's turns: while it hangs nobody gets here.
            ExecutorLink::Inline(_) => Replaced::NotRunning,
        }
    }

    fn end(&mut self, shard: u16, ended: Vec<(TicketKey, Refusal)>) {
        // A shard that has ended answered what it owed.
        let _ = self.shards[usize::from(shard)].send_or_wait(ToShard::Ended(ended));
    }
}

/// Most messages taken in before a turn decides: bounds how long arrivals can hold a decision back.
const MESSAGES_PER_TURN: usize = 64;

/// Runs turns until [`ToBatcher::Stop`], or until all senders are gone.
pub fn run_thread<O: Outlet>(mut batcher: Batcher<O>, mailbox: Receiver<ToBatcher>, spin: Duration) {
    let mut wake_at = None;
    batcher.begin(clock::now());
    loop {
        let mut next = match mailbox.recv_until(wake_at, spin) {
            Received::Message(message) => Some(message),
            Received::TimedOut => None,
            Received::Closed => return batcher.end_recorders(CaptureEnd::Stopped),
        };
        let now = clock::now();
        let mut taken = 0;
        while let Some(message) = next {
            let stops = matches!(message, ToBatcher::Stop);
            batcher.take(now, message);
            if stops {
                return;
            }
            taken += 1;
            next = if taken < MESSAGES_PER_TURN { mailbox.try_recv() } else { None };
        }
        wake_at = batcher.turn(now);
    }
}
