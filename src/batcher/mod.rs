//! The thread around the scheduler: mailboxes, clock, executors, one turn at a time. Acts and never decides.
//!
//! Always true
//! - Each request that came in a burst is held here until its batch is packed, or its end was mailed to its shard.
//! - It sleeps until the next needed moment (a window's end, a deadline) or a message; nothing is polled at a period.
//!
//! Elsewhere: what to do (scheduler), who answers (scatter.rs, frontend).

mod flights;

use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::contract::Contract;
use crate::executor::pack::{Pads, Row, pack};
use crate::executor::slot::{FilledSlot, VacantSlot};
use crate::executor::worker::Worker;
use crate::mail::{Burst, Finished, Request, ToBatcher, ToShard};
use crate::mailbox::{Received, Receiver, Sender};
use crate::scheduler::{Arrival, Group, Scheduler, TicketId, Vacancy};
use crate::telemetry::Telemetry;
use crate::vocab::{Code, ModelHandle, Moment, Refusal, Stage, TicketKey};
use flights::Flights;

/// How packed batches leave and ended requests are told. The real one is threads; a test's is a list.
pub trait Outlet {
    /// Runs the batch. `Some` when it ran at once, on this thread.
    fn submit(&mut self, executor: usize, slot: FilledSlot) -> Option<Finished>;

    /// Mails the ends of requests to their shard.
    fn end(&mut self, shard: u16, ended: Vec<(TicketKey, Refusal)>);
}

/// An executor as the batcher sees it: which slots it may fill.
#[derive(Debug)]
struct Seat {
    group: Group,
    vacant: Vec<VacantSlot>,
    running: u32,
}

/// One model's facts that packing needs.
#[derive(Debug)]
struct Form {
    contract: Arc<Contract>,
    pads: Pads,
}

/// What joins scheduler and executors. Generic over the way out, so that a simulation runs the same turns.
pub struct Batcher<O> {
    scheduler: Scheduler,
    outlet: O,
    forms: Vec<Form>,
    seats: Vec<Seat>,
    /// Requests by ticket: those the scheduler holds, and no others.
    held: Vec<Option<Request>>,
    /// Ticket by shard and slot; checked against the request's key, so a stale entry does no harm.
    tickets: Vec<Vec<TicketId>>,
    flights: Flights,
    /// Ends collected during a turn, by shard.
    ended: Vec<Vec<(TicketKey, Refusal)>>,
    members: Vec<TicketId>,
    telemetry: Arc<Telemetry>,
}

/// What a seat is made of.
pub struct SeatOptions {
    pub group: Group,
    pub slots: u32,
}

impl<O: Outlet> Batcher<O> {
    pub fn new(
        scheduler: Scheduler,
        outlet: O,
        contracts: &[Arc<Contract>],
        seats: &[SeatOptions],
        shards: usize,
        telemetry: Arc<Telemetry>,
    ) -> Batcher<O> {
        let forms = contracts
            .iter()
            .map(|contract| Form { contract: Arc::clone(contract), pads: Pads::of(contract) })
            .collect();
        let seats = seats
            .iter()
            .map(|seat| Seat {
                group: seat.group,
                vacant: (0..seat.slots).map(|_| VacantSlot::default()).collect(),
                running: 0,
            })
            .collect();
        Batcher {
            scheduler,
            outlet,
            forms,
            seats,
            held: Vec::new(),
            tickets: vec![Vec::new(); shards],
            flights: Flights::default(),
            ended: vec![Vec::new(); shards],
            members: Vec::new(),
            telemetry,
        }
    }

    /// Takes one message in. Decides nothing yet: [`Batcher::turn`] does, once for all that arrived together.
    pub fn take(&mut self, now: Moment, message: ToBatcher) {
        match message {
            ToBatcher::Burst(burst) => self.take_burst(now, burst),
            ToBatcher::Finished(finished) => self.take_finished(finished),
            ToBatcher::Drain => self.scheduler.drain(),
            ToBatcher::SetQueueDelay { model, delay } => self.scheduler.set_queue_delay_max(model, delay),
            ToBatcher::Stop => {}
        }
    }

    /// One turn: all it does, in the order it does it. Returns when to wake next.
    pub fn turn(&mut self, now: Moment) -> Option<Moment> {
        self.expire(now);
        self.fill_idle(now);
        self.fill_spare(now);
        self.mail_ends();
        self.publish_depth();
        let seats = &self.seats;
        let idle = |group| seats.iter().any(|seat| seat.group == group && seat.running == 0);
        let next = self.scheduler.poll_timeout(idle);
        match (next, self.flights.next()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_empty() && self.seats.iter().all(|seat| seat.running == 0)
    }

    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    pub fn outlet_mut(&mut self) -> &mut O {
        &mut self.outlet
    }

    fn take_burst(&mut self, now: Moment, burst: Burst) {
        for request in burst.arrivals {
            self.admit(now, request);
        }
        for key in burst.cancelled {
            if let Some(id) = self.ticket_of(key)
                && self.scheduler.handle_cancel(id)
            {
                self.held[id.index()] = None;
            }
        }
    }

    fn admit(&mut self, now: Moment, request: Request) {
        let arrival = Arrival {
            model: request.model,
            rows: request.rows,
            len: request.len,
            bytes: request.payload.len() as u64,
            deadline: request.deadline,
            compose: request.compose,
        };
        let key = request.key;
        match self.scheduler.handle_arrival(now, arrival) {
            Ok(id) => {
                if self.held.len() <= id.index() {
                    self.held.resize_with(id.index() + 1, || None);
                }
                assert!(self.held[id.index()].is_none(), "a ticket's request leaves with it");
                self.held[id.index()] = Some(request);
                let slots = &mut self.tickets[usize::from(key.shard)];
                if slots.len() <= key.slot as usize {
                    slots.resize(key.slot as usize + 1, TicketId(u32::MAX));
                }
                slots[key.slot as usize] = id;
            }
            Err(refusal) => self.ended[usize::from(key.shard)].push((key, refusal)),
        }
    }

    /// The waiting ticket of a request, if it still waits.
    fn ticket_of(&self, key: TicketKey) -> Option<TicketId> {
        let id = *self.tickets.get(usize::from(key.shard))?.get(key.slot as usize)?;
        let held = self.held.get(id.index())?.as_ref()?;
        (held.key == key).then_some(id)
    }

    fn take_finished(&mut self, finished: Finished) {
        let seat = &mut self.seats[finished.executor];
        seat.running -= 1;
        seat.vacant.push(finished.slot);
        self.flights.finish(finished.batch.id);
        self.scheduler.handle_finished(finished.batch.model, finished.batch.cells_padded(), finished.service);
    }

    fn expire(&mut self, now: Moment) {
        while let Some(id) = self.scheduler.poll_expired(now) {
            let request = self.held[id.index()].take().expect("the scheduler's tickets are held here");
            let refusal = Refusal::at_stage(Code::DeadlineExceeded, Stage::Queue, "the deadline came while waiting");
            self.ended[usize::from(request.key.shard)].push((request.key, refusal));
        }
        while let Some(key) = self.flights.poll_expired(now) {
            let refusal =
                Refusal::at_stage(Code::DeadlineExceeded, Stage::Executing, "the deadline came while the batch ran");
            self.ended[usize::from(key.shard)].push((key, refusal));
        }
    }

    /// Gives each idle executor a batch. All of them, before any gets a second one: no batch waits behind another
    /// while an executor has nothing to do.
    fn fill_idle(&mut self, mut now: Moment) {
        for executor in 0..self.seats.len() {
            while self.seats[executor].running == 0 {
                let Some(ran) = self.give(now, executor, Vacancy::Idle) else { break };
                if let Some(service) = ran {
                    // It ran here and took its time; what waits behind it may have expired. The clock is not asked:
                    // a simulation runs the same turns.
                    now = now + service;
                    self.expire(now);
                }
            }
        }
    }

    /// Gives busy executors full batches for their spare slots, evenly.
    fn fill_spare(&mut self, now: Moment) {
        let slots_max = self.seats.iter().map(|seat| seat.running + seat.vacant.len() as u32).max().unwrap_or(0);
        for depth in 1..slots_max {
            for executor in 0..self.seats.len() {
                if self.seats[executor].running == depth {
                    self.give(now, executor, Vacancy::Spare);
                }
            }
        }
    }

    /// Gives an executor a batch, if it has a vacant slot and there is a batch for it. Says how long it took when it
    /// already ran.
    fn give(&mut self, now: Moment, executor: usize, vacancy: Vacancy) -> Option<Option<Duration>> {
        let seat = &mut self.seats[executor];
        let slot = seat.vacant.pop()?;
        let filled = self.next_batch(now, self.seats[executor].group, vacancy, slot, executor)?;
        self.seats[executor].running += 1;
        let finished = self.outlet.submit(executor, filled);
        let service = finished.as_ref().map(|finished| finished.service);
        if let Some(finished) = finished {
            self.take_finished(finished);
        }
        Some(service)
    }

    /// Seals and packs the next batch into `slot`, or puts the slot back.
    fn next_batch(
        &mut self,
        now: Moment,
        group: Group,
        vacancy: Vacancy,
        mut slot: VacantSlot,
        executor: usize,
    ) -> Option<FilledSlot> {
        let mut members = std::mem::take(&mut self.members);
        let sealed = self.scheduler.poll_batch(now, group, vacancy, &mut members);
        let Some(batch) = sealed else {
            self.members = members;
            self.seats[executor].vacant.push(slot);
            return None;
        };
        let metrics = self.telemetry.model(batch.model);
        metrics.batch_sealed(batch.reason, batch.rows, batch.rows_possible, batch.cells_real, batch.cells_padded());
        let form = &self.forms[batch.model.index()];
        {
            let (held, scheduler) = (&self.held, &self.scheduler);
            let rows = members.iter().map(|id| Row {
                request: held[id.index()].as_ref().expect("the scheduler's tickets are held here"),
                admitted_at: scheduler.admitted_at(*id),
            });
            pack(&mut slot, &form.contract, &form.pads, &batch, rows.clone());
            rows.clone().for_each(|row| metrics.queue_delay(batch.sealed_at.since(row.admitted_at)));
            let deadlines = rows.filter_map(|row| Some((row.request.deadline?, row.request.key)));
            self.flights.start(batch.id, deadlines);
        }
        for id in &members {
            self.held[id.index()] = None;
        }
        self.members = members;
        Some(slot.fill(batch, clock::now()))
    }

    /// Says what still waits, once for all that the turn changed.
    fn publish_depth(&self) {
        for index in 0..self.forms.len() {
            let model = ModelHandle(index as u16);
            let (rows, cells, bytes) = self.scheduler.waiting(model);
            self.telemetry.model(model).queue_depth(rows, cells, bytes);
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
    Thread(Sender<FilledSlot>),
    Inline(Box<Worker>),
}

impl Outlet for ThreadOutlet {
    fn submit(&mut self, executor: usize, slot: FilledSlot) -> Option<Finished> {
        match &mut self.executors[executor] {
            ExecutorLink::Thread(sender) => {
                // Room is certain: an executor's mailbox holds as many messages as it has slots.
                let sent = sender.send_or_wait(slot);
                assert!(sent, "executor threads outlive the batcher");
                None
            }
            ExecutorLink::Inline(worker) => Some(worker.run(slot)),
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
    loop {
        let mut next = match mailbox.recv_until(wake_at, spin) {
            Received::Message(message) => Some(message),
            Received::TimedOut => None,
            Received::Closed => return,
        };
        let now = clock::now();
        let mut taken = 0;
        while let Some(message) = next {
            if matches!(message, ToBatcher::Stop) {
                return;
            }
            batcher.take(now, message);
            taken += 1;
            next = if taken < MESSAGES_PER_TURN { mailbox.try_recv() } else { None };
        }
        wake_at = batcher.turn(now);
    }
}
