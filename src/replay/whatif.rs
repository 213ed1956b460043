//! A trace's requests in virtual time, with other settings: the production scheduler, and executors that take as long as the
//! recorded ones took.
//!
//! What comes from the trace: the scheduler's state at its start, arrivals, cancels, drains and changes of policies. What is
//! simulated: how long batches take (services.rs), how long after that the batcher hears of it, and that a batch on the
//! batcher's own thread holds up everything else. What is not: the shards, callers who would react to other answers, and that
//! the parts of a request of more rows than fit a batch belong together.
//!
//! Always true
//! - Equal recordings, settings and seeds give equal reports. Nothing here reads a clock.
//! - Both runs of a comparison end at the same moment, and requests are on time by the same measure.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::io::Read;
use std::time::Duration;

use super::exact::{self, ReplayError, Verified, Watch, ledger_of, policy_of, sealed_before};
use super::ledger::{Ledger, Report};
use super::services::{Observer, Services, shared_devices};
use crate::capture::{Cancelled, Done, Event, Header, PolicyChange, TraceReader};
use crate::load::Rng;
use crate::scheduler::{Arrival, Class, Compose, Group, Policy, Scheduler, SealedBatch, TenantId, TicketId};
use crate::vocab::{ModelHandle, Moment};

/// Requests of a what-if replay, at most: some forty bytes of memory each.
pub const CALLS_MAX: usize = 1 << 24;

/// A request to come, without what few of them have.
#[derive(Clone, Copy, Debug)]
struct Call {
    at: Moment,
    /// [`Moment::FAR`]: none.
    deadline: Moment,
    bytes: u32,
    rows: u32,
    len: u32,
    model: u16,
    tenant: u16,
    class: u8,
    composed: bool,
}

/// Another input to come, behind so many arrivals.
#[derive(Clone, Debug)]
enum Other {
    Cancel(u64),
    CancelTicket(TicketId),
    Policy(Box<PolicyChange>),
    Drain,
}

/// A trace in memory.
#[derive(Debug)]
pub struct Recording {
    header: Header,
    state: Vec<u8>,
    calls: Vec<Call>,
    composed: BTreeMap<usize, Compose>,
    others: Vec<(Moment, usize, Other)>,
    /// Batches that executors held when the trace began.
    before: Vec<(Moment, Done)>,
    end: Moment,
    services: Services,
    /// The recorded run, where this version decides as the one that recorded it; otherwise why not.
    pub recorded: Result<Verified, ReplayError>,
}

/// One setting: the model's name, or `*` for all; the knob; its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub model: String,
    pub key: String,
    pub value: String,
}

impl Setting {
    /// `model.key=value`.
    pub fn parse(text: &str) -> Result<Setting, String> {
        let parts = text.split_once('=').and_then(|(left, value)| Some((left.rsplit_once('.')?, value)));
        match parts {
            Some(((model, key), value)) if !model.is_empty() => {
                Ok(Setting { model: model.into(), key: key.into(), value: value.into() })
            }
            _ => Err(format!("expected model.key=value, such as minilm.rows_max=16, got `{text}`")),
        }
    }
}

/// Collects what a what-if replay needs, on the way through a trace.
struct Collector {
    calls: Vec<Call>,
    composed: BTreeMap<usize, Compose>,
    others: Vec<(Moment, usize, Other)>,
    before: Vec<(Moment, Done)>,
    batches: u64,
    now: Moment,
    too_long: bool,
    observer: Observer,
}

impl Watch for Collector {
    fn event(&mut self, event: &Event) {
        let place = self.calls.len();
        match event {
            Event::Turn { at } => self.now = *at,
            Event::Arrival { at, arrival } if place < CALLS_MAX => {
                self.now = *at;
                if let Some(compose) = arrival.compose {
                    self.composed.insert(place, compose);
                }
                self.calls.push(Call {
                    at: *at,
                    deadline: arrival.deadline.unwrap_or(Moment::FAR),
                    bytes: u32::try_from(arrival.bytes).unwrap_or(u32::MAX),
                    rows: arrival.rows,
                    len: arrival.len,
                    model: arrival.model.0,
                    tenant: arrival.tenant.0,
                    class: arrival.class.index() as u8,
                    composed: arrival.compose.is_some(),
                });
            }
            Event::Arrival { .. } => self.too_long = true,
            Event::Cancel { at, of } => {
                self.now = *at;
                match *of {
                    Cancelled::Ticket(id) => self.others.push((*at, place, Other::CancelTicket(id))),
                    Cancelled::Waiting(number) | Cancelled::Left(number) => {
                        self.others.push((*at, place, Other::Cancel(number)));
                    }
                    // Parts are requests of their own here, each with its caller's deadline.
                    Cancelled::Within { .. } => {}
                }
            }
            Event::Finished { at, batch } => {
                self.now = *at;
                self.observer.finished(*at, batch);
                if batch.id <= self.batches {
                    self.before.push((*at, *batch));
                }
            }
            Event::Policy(change) => {
                self.others.push((self.now, place, Other::Policy(Box::new(change.clone()))));
            }
            Event::Drain => self.others.push((self.now, place, Other::Drain)),
            Event::Checkpoint { .. } => {}
        }
    }

    fn handed_over(&mut self, group: Group, late: Duration) {
        self.observer.handed_over(group as usize, late);
    }
}

impl Recording {
    /// Reads a trace whole, and replays it on the way as it was recorded.
    pub fn read<R: Read>(mut reader: TraceReader<R>, seed: u64) -> Result<Recording, ReplayError> {
        let header = reader.header().clone();
        // Batches that ran when it began have numbers up to this.
        let batches = exact::restore(&reader).map_or(0, |scheduler| scheduler.batches());
        let mut collector = Collector {
            calls: Vec::new(),
            composed: BTreeMap::new(),
            others: Vec::new(),
            before: Vec::new(),
            batches,
            now: header.at,
            too_long: false,
            observer: Observer::new(&header, seed),
        };
        let recorded = exact::replay(&mut reader, &mut collector);
        if let Err(error @ (ReplayError::Trace(_) | ReplayError::TooLong { .. })) = recorded {
            return Err(error);
        }
        // Where it differed, the rest is still what was offered.
        while let Some(event) = reader.next_event()? {
            collector.event(&event);
        }
        if collector.too_long {
            return Err(ReplayError::TooLong { arrivals_max: CALLS_MAX as u64 });
        }
        let known = |model: u16| usize::from(model) < header.models.len();
        let odd = |(_, _, other): &(Moment, usize, Other)| match other {
            Other::Policy(change) => !known(change.model.0),
            _ => false,
        };
        if collector.calls.iter().any(|call| !known(call.model)) || collector.others.iter().any(odd) {
            return Err(ReplayError::Setting("the trace has inputs for a model that it does not name".into()));
        }
        let Collector { calls, composed, others, before, now, observer, .. } = collector;
        let services = observer.fit(&header);
        let state = reader.state().to_vec();
        Ok(Recording { header, state, calls, composed, others, before, end: now, services, recorded })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Length of the trace.
    pub fn span(&self) -> Duration {
        self.end.since(self.header.at)
    }

    /// Learned from this trace: time of a batch, a cell and a squared cell of a model, in ns.
    pub fn fit(&self, model: ModelHandle) -> [f64; 3] {
        let fit = self.services.fit(model.index());
        [fit.batch, fit.cell, fit.square]
    }

    /// The scheduler that a what-if begins with: the recorded one, or where that cannot be read an empty one with its
    /// policies and costs.
    fn scheduler(&self) -> Result<Scheduler, ReplayError> {
        if let Ok(scheduler) = Scheduler::restore(self.header.layout, &self.state)
            && scheduler.models() == self.header.models.len()
            && scheduler.seats().len() == self.header.seats.len()
        {
            return Ok(scheduler);
        }
        let mut policies = Vec::new();
        for model in &self.header.models {
            let policy =
                model.policy().map_err(|error| ReplayError::Setting(format!("model {}: {error}", model.name)))?;
            policies.push(policy.0);
        }
        let shapes = policies.iter().map(|policy| (policy.rows_max, policy.buckets.longest())).collect::<Vec<_>>();
        let mut scheduler = Scheduler::new(self.header.limits, policies, &self.header.seat_specs());
        for (at, (rows, len)) in shapes.into_iter().enumerate() {
            let fit = self.services.fit(at);
            for (rows, len) in [(1, 1), (rows, 1), (1, len), (rows, len), (rows.div_ceil(2), len.div_ceil(2))] {
                let took = Duration::from_nanos(fit.batch_time(rows, len) as u64);
                scheduler.prime(ModelHandle(at as u16), rows, len, took);
            }
        }
        Ok(scheduler)
    }

    /// Whether these settings can be.
    fn changed(&self, settings: &[Setting], model: ModelHandle, policy: &Policy) -> Result<Policy, ReplayError> {
        let name = &self.header.models[model.index()].name;
        let mine = settings.iter().filter(|setting| setting.model == "*" || setting.model == *name);
        let changes = mine.map(|setting| (setting.key.as_str(), setting.value.as_str()));
        policy.with(changes).map_err(|error| ReplayError::Setting(format!("{name}: {error}")))
    }

    /// Replays the requests with these settings.
    pub fn what_if(&self, settings: &[Setting], seed: u64) -> Result<Report, ReplayError> {
        if let Some(setting) = settings.iter().find(|s| s.model != "*" && self.header.model(&s.model).is_none()) {
            let known: Vec<&str> = self.header.models.iter().map(|model| model.name.as_str()).collect();
            return Err(ReplayError::Setting(format!(
                "the trace has no model `{}`; it has {}",
                setting.model,
                known.join(", ")
            )));
        }
        let mut scheduler = self.scheduler()?;
        // By the recorded objective, whatever is set: both runs are measured alike.
        let ledger = ledger_of(&self.header, |model| scheduler.policy(model).slo);
        for at in 0..scheduler.models() {
            let model = ModelHandle(at as u16);
            let policy = self.changed(settings, model, scheduler.policy(model))?;
            if policy != *scheduler.policy(model) && scheduler.set_policy(model, policy.clone()).is_err() {
                // Something that waits would fit no batch. What waited at the start is in nobody's books: without it.
                for id in scheduler.waiting_tickets(model) {
                    scheduler.handle_cancel(id);
                }
                let refused = |refusal: crate::vocab::Refusal| ReplayError::Setting(refusal.message);
                scheduler.set_policy(model, policy).map_err(refused)?;
            }
        }
        let before = scheduler.log().count();
        let mut world = World::new(self, settings, scheduler, ledger, seed);
        world.run()?;
        let World { scheduler, ledger, .. } = world;
        Ok(ledger.close(self.end, scheduler.log().count() - before))
    }
}

/// An executor of the simulation.
#[derive(Debug, Default)]
struct Executor {
    free_at: Moment,
}

/// A batch of which the batcher will hear.
#[derive(Debug)]
struct Notice {
    batch: SealedBatch,
    service: Duration,
}

struct World<'a> {
    recording: &'a Recording,
    settings: &'a [Setting],
    scheduler: Scheduler,
    ledger: Ledger,
    rng: Rng,
    now: Moment,
    /// By arrival that came: its ticket.
    ids: Vec<TicketId>,
    next_other: usize,
    executors: Vec<Executor>,
    shared: Vec<Option<usize>>,
    /// By device: when it has computed all it was given.
    device_free: Vec<Moment>,
    /// Soonest first; among equals in the order of their seals.
    notices: BinaryHeap<Reverse<(Moment, u64)>>,
    flying: VecDeque<(u64, Notice)>,
    members: Vec<TicketId>,
    wake: Option<Moment>,
}

const NO_TICKET: TicketId = TicketId(u32::MAX);

impl<'a> World<'a> {
    fn new(
        recording: &'a Recording,
        settings: &'a [Setting],
        scheduler: Scheduler,
        mut ledger: Ledger,
        seed: u64,
    ) -> World<'a> {
        let header = &recording.header;
        let devices = header.seats.iter().map(|seat| usize::from(seat.device) + 1).max().unwrap_or(0);
        ledger.begin(&scheduler);
        let mut world = World {
            settings,
            ledger,
            rng: Rng::new(seed, 31),
            now: header.at,
            ids: Vec::with_capacity(recording.calls.len()),
            next_other: 0,
            executors: header.seats.iter().map(|_| Executor::default()).collect(),
            shared: shared_devices(header),
            device_free: vec![header.at; devices],
            notices: BinaryHeap::new(),
            flying: VecDeque::new(),
            members: Vec::new(),
            wake: Some(header.at),
            recording,
            scheduler,
        };
        // What ran at the start ends as it did.
        for (at, done) in &recording.before {
            let seat = world.scheduler.seats().get(usize::from(done.executor));
            if seat.is_some_and(|seat| seat.running.iter().any(|running| running.batch == done.id)) {
                world.executors[usize::from(done.executor)].free_at = *at;
                world.fly(*at, Notice { batch: sealed_before(done), service: done.service });
            }
        }
        world
    }

    fn fly(&mut self, at: Moment, notice: Notice) {
        self.notices.push(Reverse((at, notice.batch.id)));
        self.flying.push_back((notice.batch.id, notice));
    }

    fn run(&mut self) -> Result<(), ReplayError> {
        loop {
            let call = self.recording.calls.get(self.ids.len()).map(|call| call.at);
            let other = self.recording.others.get(self.next_other).map(|(at, ..)| *at);
            let notice = self.notices.peek().map(|Reverse((at, _))| *at);
            let Some(next) = [call, other, notice, self.wake].into_iter().flatten().min() else { return Ok(()) };
            if next > self.recording.end {
                return Ok(());
            }
            // The batcher may be busy with a batch of its own until later.
            self.now = self.now.max(next);
            self.take_inputs()?;
            self.turn();
            // A wake-up that has come was answered.
            self.wake = self.scheduler.poll_timeout(self.now).map(|wake| wake.max(Moment(self.now.nanos() + 1)));
        }
    }

    /// Everything that has come by now, in its order.
    fn take_inputs(&mut self) -> Result<(), ReplayError> {
        let recording = self.recording;
        loop {
            let call = recording.calls.get(self.ids.len()).filter(|call| call.at <= self.now);
            let other = recording.others.get(self.next_other).filter(|(at, ..)| *at <= self.now);
            let notice = self.notices.peek().map(|Reverse((at, _))| *at).filter(|at| *at <= self.now);
            let input = [other.map(|(at, ..)| *at), call.map(|call| call.at)].into_iter().flatten().min();
            match (notice, input) {
                (Some(notice), input) if input.is_none_or(|input| notice <= input) => self.hear(),
                (_, None) => return Ok(()),
                _ => match (other, call) {
                    (Some((_, behind, other)), _) if *behind <= self.ids.len() => {
                        self.next_other += 1;
                        self.take_other(other)?;
                    }
                    (_, Some(call)) => self.take_call(*call),
                    // Behind arrivals that come later: cannot be in a trace that was read in order.
                    (_, None) => self.next_other += 1,
                },
            }
        }
    }

    fn take_call(&mut self, call: Call) {
        let number = self.ids.len();
        let arrival = Arrival {
            model: ModelHandle(call.model),
            rows: call.rows,
            len: call.len,
            bytes: call.bytes.into(),
            deadline: (call.deadline != Moment::FAR).then_some(call.deadline),
            compose: if call.composed { self.recording.composed.get(&number).copied() } else { None },
            class: Class::from_priority(call.class),
            tenant: TenantId(call.tenant),
        };
        self.ledger.came(call.at, self.scheduler.policy(arrival.model).group as usize);
        let outcome = self.scheduler.handle_arrival(self.now, arrival).map_err(|refusal| refusal.code);
        self.ledger.arrived(number as u64, call.at, &arrival, outcome);
        self.ids.push(outcome.unwrap_or(NO_TICKET));
    }

    fn take_other(&mut self, other: &Other) -> Result<(), ReplayError> {
        match other {
            Other::Cancel(number) => {
                let id = self.ids[*number as usize];
                if !self.ledger.waits(id, *number) {
                    self.ledger.cancelled_late(*number);
                } else if self.scheduler.handle_cancel(id) {
                    self.ledger.cancelled(id);
                }
            }
            // A ticket of the start, if its place was not given to another meanwhile.
            Other::CancelTicket(id) if !self.ledger.holds(*id) => {
                self.scheduler.handle_cancel(*id);
            }
            Other::CancelTicket(_) => {}
            Other::Policy(change) => {
                let model = change.model;
                let policy = policy_of(self.recording.header.layout, change, self.scheduler.policy(model))?;
                let policy = self.recording.changed(self.settings, model, &policy)?;
                // Refused while a request waits that would not fit: as it may be in a server.
                let _ = self.scheduler.set_policy(model, policy);
            }
            Other::Drain => self.scheduler.drain(),
        }
        Ok(())
    }

    /// The next batch came back.
    fn hear(&mut self) {
        let Some(Reverse((_, id))) = self.notices.pop() else { return };
        let at = self.flying.iter().position(|(flying, _)| *flying == id).expect("it was put there with its notice");
        let (_, Notice { batch, service }) = self.flying.remove(at).expect("just found");
        self.finish(&batch, service);
    }

    fn finish(&mut self, batch: &SealedBatch, service: Duration) {
        self.scheduler.handle_finished(self.now, batch, service);
        self.ledger.finished(self.now, batch.id, usize::from(batch.executor), service);
        let policy = (self.scheduler.generation(batch.model), self.scheduler.policy(batch.model));
        let fit = self.scheduler.cost(batch.model).coefficients();
        self.ledger.regret.finished(self.now, batch, service, policy, fit);
    }

    /// As the batcher does it: see `Batcher::turn`.
    fn turn(&mut self) {
        while self.scheduler.poll_edges(self.now).is_some() {}
        self.expire();
        let mut members = std::mem::take(&mut self.members);
        while let Some(batch) = self.scheduler.poll_batch(self.now, &mut members) {
            self.ledger.sealed(&self.scheduler, &batch, &members);
            let shape = |id: &TicketId| self.scheduler.rows_and_len(*id);
            self.ledger.regret.sealed(batch.id, members.iter().map(shape));
            self.submit(batch);
        }
        self.members = members;
        self.expire();
        self.ledger.turned(self.now, &self.scheduler);
    }

    fn submit(&mut self, batch: SealedBatch) {
        let seat = usize::from(batch.executor);
        let group = self.scheduler.seats()[seat].group;
        let drawn = self.recording.services.draw(&mut self.rng, self.now, batch.model.index(), batch.work());
        self.ledger.guessed += u64::from(drawn.guessed);
        let nanos = |nanos: f64| Duration::from_nanos(nanos.max(1.0) as u64);
        if group == Group::Inline {
            let service = nanos(drawn.fixed + drawn.rows);
            self.now = self.now + service;
            self.finish(&batch, service);
            self.expire();
            return;
        }
        let start = self.now.max(self.executors[seat].free_at);
        let done = match self.shared[seat] {
            None => start + nanos(drawn.fixed + drawn.rows),
            Some(device) => {
                let begin = (start + nanos(drawn.fixed)).max(self.device_free[device]);
                self.device_free[device] = begin + nanos(drawn.rows);
                self.device_free[device]
            }
        };
        self.executors[seat].free_at = done;
        let late = self.recording.services.handover(&mut self.rng, group as usize);
        self.fly(done + late, Notice { batch, service: done.since(start) });
    }

    fn expire(&mut self) {
        while let Some(expired) = self.scheduler.poll_expired(self.now) {
            self.ledger.expired(expired.id());
        }
    }
}
