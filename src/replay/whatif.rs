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
use super::regret;
use super::services::{Observer, Services, shared_devices};
use crate::capture::{Cancelled, Done, Event, Header, ModelHeader, PolicyChange, SeatHeader, TraceReader, knobs_of};
use crate::load::Rng;
use crate::scheduler::decision::{Decision, DecisionLog};
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
    /// Of a load that was described and not recorded: its policies, for there is no state to begin with.
    described: Option<Vec<Policy>>,
    /// The recorded run, where this version decides as the one that recorded it; otherwise why not.
    pub recorded: Result<Verified, ReplayError>,
}

/// Under which other conditions a what-if runs. The default: those of the trace.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions {
    /// So many executors instead of the recorded ones, each as fast as those were. The scheduler then begins empty.
    pub executors: Option<usize>,
    /// Requests of this model are on time only if they are answered within this, whatever their deadline.
    pub objective: Option<(ModelHandle, Duration)>,
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

/// Called at every step: whoever may not work for long without a rest takes it there.
type Step<'a> = &'a mut dyn FnMut();

/// Collects what a what-if replay needs, on the way through a trace.
struct Collector<'a> {
    step: Step<'a>,
    wants_regret: bool,
    calls: Vec<Call>,
    composed: BTreeMap<usize, Compose>,
    others: Vec<(Moment, usize, Other)>,
    before: Vec<(Moment, Done)>,
    batches: u64,
    now: Moment,
    too_long: bool,
    observer: Observer,
}

impl Watch for Collector<'_> {
    fn event(&mut self, event: &Event) {
        (self.step)();
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

    fn wants_regret(&self) -> bool {
        self.wants_regret
    }
}

impl Recording {
    /// Reads a trace whole, and replays it on the way as it was recorded.
    pub fn read<R: Read>(reader: TraceReader<R>, seed: u64) -> Result<Recording, ReplayError> {
        Recording::read_by(reader, seed, true, &mut || {})
    }

    /// The same with a call at every event, and without the regret of the recorded run.
    pub fn read_paced<R: Read>(reader: TraceReader<R>, seed: u64, step: Step<'_>) -> Result<Recording, ReplayError> {
        Recording::read_by(reader, seed, false, step)
    }

    fn read_by<R: Read>(
        mut reader: TraceReader<R>,
        seed: u64,
        wants_regret: bool,
        step: Step<'_>,
    ) -> Result<Recording, ReplayError> {
        let header = reader.header().clone();
        // Batches that ran when it began have numbers up to this.
        let batches = exact::restore(&reader).map_or(0, |scheduler| scheduler.batches());
        let mut collector = Collector {
            step,
            wants_regret,
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
        Ok(Recording { header, state, calls, composed, others, before, end: now, services, described: None, recorded })
    }

    /// A load that nobody recorded: one-row requests of one model, the only one of `header`, whose executors hold nothing.
    pub(super) fn described(
        header: Header,
        policy: Policy,
        calls: impl Iterator<Item = (Moment, Option<Moment>, u32)>,
        span: Duration,
        services: Services,
    ) -> Recording {
        let calls = calls.take(CALLS_MAX).map(|(at, deadline, len)| Call {
            at,
            deadline: deadline.unwrap_or(Moment::FAR),
            bytes: len.saturating_mul(4),
            rows: 1,
            len,
            model: 0,
            tenant: 0,
            class: 0,
            composed: false,
        });
        Recording {
            calls: calls.collect(),
            end: header.at + span,
            state: Vec::new(),
            composed: BTreeMap::new(),
            others: Vec::new(),
            before: Vec::new(),
            services,
            described: Some(vec![policy]),
            recorded: Err(ReplayError::Setting("the load was described, not recorded".into())),
            header,
        }
    }

    /// Requests of a model, in their order: ns since the trace began, rows, and their length.
    pub fn calls_of(&self, model: ModelHandle) -> impl Iterator<Item = (u64, u32, u32)> + '_ {
        let mine = self.calls.iter().filter(move |call| call.model == model.0);
        mine.map(|call| (call.at.nanos().saturating_sub(self.header.at.nanos()), call.rows, call.len))
    }

    /// Requests of all models.
    pub fn calls(&self) -> usize {
        self.calls.len()
    }

    /// Whether a policy was changed while it was recorded, so that no one setting is the present one.
    pub fn has_policy_changes(&self) -> bool {
        self.others.iter().any(|(_, _, other)| matches!(other, Other::Policy(_)))
    }

    /// Executors of the trace that are not the batcher's own thread.
    pub fn executors(&self) -> usize {
        self.header.seats.iter().filter(|seat| seat.group == Group::Executors).count()
    }

    /// Forgets what came behind the first `calls` requests. The recorded run stays that of the whole trace.
    pub fn shorten(&mut self, calls: usize) {
        let Some(last) = self.calls.get(calls.saturating_sub(1)).filter(|_| calls < self.calls.len()) else { return };
        self.end = last.at;
        self.calls.truncate(calls);
        self.others.retain(|(at, behind, _)| *at <= self.end && *behind <= calls);
    }

    /// The policy of a model when the trace begins.
    pub fn policy(&self, model: ModelHandle) -> Result<Policy, ReplayError> {
        Ok(self.scheduler(&self.header)?.policy(model).clone())
    }

    /// The header, with so many executors like the first of the trace.
    fn header_with(&self, executors: usize) -> Result<Header, ReplayError> {
        let is_thread = |seat: &&SeatHeader| seat.group == Group::Executors;
        let Some(like) = self.header.seats.iter().find(is_thread).copied() else {
            return Err(ReplayError::Setting("the trace has no executor that there could be more of".into()));
        };
        let shared = self.executors() > 1 && shared_devices(&self.header).iter().flatten().count() == self.executors();
        let mut header = self.header.clone();
        header.seats.retain(|seat| !is_thread(&seat));
        let device = |at: usize| if shared { like.device } else { like.device + at as u16 };
        header.seats.extend((0..executors.max(1)).map(|at| SeatHeader { device: device(at), ..like }));
        Ok(header)
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The model's policy was changed on the way.
    pub fn has_change_of(&self, model: ModelHandle) -> bool {
        self.others.iter().any(|(_, _, other)| matches!(other, Other::Policy(change) if change.model == model))
    }

    /// All knobs of the policy that the model would have with these settings.
    pub fn knobs_with(&self, model: ModelHandle, settings: &[Setting]) -> Result<Vec<(String, String)>, ReplayError> {
        Ok(knobs_of(&self.changed(settings, model, self.scheduler(&self.header)?.policy(model))?))
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
    fn scheduler(&self, header: &Header) -> Result<Scheduler, ReplayError> {
        let recorded = match &self.described {
            Some(_) => None,
            None => Scheduler::restore(header.layout, &self.state).ok(),
        };
        let recorded = recorded.filter(|scheduler| scheduler.models() == header.models.len());
        match (recorded, &self.described) {
            (Some(scheduler), _) if scheduler.seats().len() == header.seats.len() => Ok(scheduler),
            (Some(scheduler), _) => {
                let policy = |model: usize| scheduler.policy(ModelHandle(model as u16)).clone();
                Ok(self.fresh_scheduler(header, (0..scheduler.models()).map(policy).collect()))
            }
            (None, Some(policies)) => Ok(self.fresh_scheduler(header, policies.clone())),
            (None, None) => Ok(self.fresh_scheduler(header, Recording::recorded_policies(header)?)),
        }
    }

    fn recorded_policies(header: &Header) -> Result<Vec<Policy>, ReplayError> {
        let policy = |model: &ModelHeader| match model.policy() {
            Ok((policy, _)) => Ok(policy),
            Err(error) => Err(ReplayError::Setting(format!("model {}: {error}", model.name))),
        };
        header.models.iter().map(policy).collect()
    }

    /// An empty one with these policies, and batch times as the recorded batches took.
    fn fresh_scheduler(&self, header: &Header, policies: Vec<Policy>) -> Scheduler {
        let shapes = policies.iter().map(|policy| (policy.rows_max, policy.buckets.longest())).collect::<Vec<_>>();
        let mut scheduler = Scheduler::new(header.limits, policies, &header.seat_specs());
        for (at, (rows, len)) in shapes.into_iter().enumerate() {
            let fit = self.services.fit(at);
            for (rows, len) in [(1, 1), (rows, 1), (1, len), (rows, len), (rows.div_ceil(2), len.div_ceil(2))] {
                let took = Duration::from_nanos(fit.batch_time(rows, len) as u64);
                scheduler.prime(ModelHandle(at as u16), rows, len, took);
            }
        }
        scheduler
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
        self.what_if_by(&Conditions::default(), settings, seed, true, &mut || {})
    }

    /// The same with a call at every step of the virtual time, and without its regret.
    pub fn what_if_paced(&self, settings: &[Setting], seed: u64, step: Step<'_>) -> Result<Report, ReplayError> {
        self.what_if_by(&Conditions::default(), settings, seed, false, step)
    }

    /// The same under other conditions than the recorded ones.
    pub fn what_if_under(
        &self,
        conditions: &Conditions,
        settings: &[Setting],
        seed: u64,
    ) -> Result<Report, ReplayError> {
        self.what_if_by(conditions, settings, seed, true, &mut || {})
    }

    fn what_if_by(
        &self,
        conditions: &Conditions,
        settings: &[Setting],
        seed: u64,
        wants_regret: bool,
        step: Step<'_>,
    ) -> Result<Report, ReplayError> {
        if let Some(setting) = settings.iter().find(|s| s.model != "*" && self.header.model(&s.model).is_none()) {
            let known: Vec<&str> = self.header.models.iter().map(|model| model.name.as_str()).collect();
            return Err(ReplayError::Setting(format!(
                "the trace has no model `{}`; it has {}",
                setting.model,
                known.join(", ")
            )));
        }
        let changed_header = match conditions.executors {
            Some(executors) if executors != self.executors() => Some(self.header_with(executors)?),
            _ => None,
        };
        let header = changed_header.as_ref().unwrap_or(&self.header);
        let mut scheduler = self.scheduler(header)?;
        // By the recorded objective, whatever is set: both runs are measured alike.
        let mut ledger = ledger_of(header, |model| scheduler.policy(model).slo);
        if let Some((model, within)) = conditions.objective {
            ledger.set_objective(model, within);
        }
        let ledger = if wants_regret { ledger } else { ledger.without_regret() };
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
        let mut world = World::new(self, header, settings, scheduler, ledger, seed);
        world.resume();
        world.run(step, |_| {})?;
        let World { scheduler, ledger, .. } = world;
        Ok(ledger.close(self.end, scheduler.log().count() - before))
    }

    /// Replays the requests with a scheduler that knows nothing but policies and batch times, and executors of which the batcher hears
    /// at once: equal builds give equal outcomes, whatever layout the recorded state has. Each decision is told. Returns the
    /// hash of all of them too.
    pub fn fresh(&self, seed: u64, mut decided: impl FnMut(&Decision)) -> Result<(Report, u64), ReplayError> {
        let header = &self.header;
        let scheduler = self.fresh_scheduler(header, Recording::recorded_policies(header)?);
        let ledger = ledger_of(&self.header, |model| scheduler.policy(model).slo);
        let mut world = World::new(self, header, &[], scheduler, ledger, seed);
        world.at_once = true;
        let mut told = 0;
        world.run(&mut || {}, |log| {
            let fresh = (log.count() - told) as usize;
            log.last(fresh).for_each(&mut decided);
            told = log.count();
        })?;
        let World { scheduler, ledger, .. } = world;
        Ok((ledger.close(self.end, scheduler.log().count()), scheduler.log().hash()))
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
    /// The batcher hears of a batch as soon as it is done.
    at_once: bool,
}

const NO_TICKET: TicketId = TicketId(u32::MAX);

impl<'a> World<'a> {
    fn new(
        recording: &'a Recording,
        header: &Header,
        settings: &'a [Setting],
        scheduler: Scheduler,
        mut ledger: Ledger,
        seed: u64,
    ) -> World<'a> {
        let devices = header.seats.iter().map(|seat| usize::from(seat.device) + 1).max().unwrap_or(0);
        ledger.begin(&scheduler);
        World {
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
            at_once: false,
            recording,
            scheduler,
        }
    }

    /// What ran at the start ends as it did.
    fn resume(&mut self) {
        for (at, done) in &self.recording.before {
            let seat = self.scheduler.seats().get(usize::from(done.executor));
            if seat.is_some_and(|seat| seat.running.iter().any(|running| running.batch == done.id)) {
                self.executors[usize::from(done.executor)].free_at = *at;
                self.fly(*at, Notice { batch: sealed_before(done), service: done.service });
            }
        }
    }

    fn fly(&mut self, at: Moment, notice: Notice) {
        self.notices.push(Reverse((at, notice.batch.id)));
        self.flying.push_back((notice.batch.id, notice));
    }

    /// `turned` is told the log after each turn.
    fn run(&mut self, step: Step<'_>, mut turned: impl FnMut(&DecisionLog)) -> Result<(), ReplayError> {
        loop {
            step();
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
            turned(self.scheduler.log());
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
            let member = |id: &TicketId| {
                let (rows, len) = self.scheduler.rows_and_len(*id);
                regret::Member { rows, len, at: self.scheduler.admitted_at(*id) }
            };
            self.ledger.regret.sealed(batch.id, members.iter().map(member));
            self.submit(batch);
        }
        self.members = members;
        self.expire();
        self.ledger.turned(self.now, &self.scheduler);
    }

    fn submit(&mut self, batch: SealedBatch) {
        let seat = usize::from(batch.executor);
        let group = self.scheduler.seats()[seat].group;
        let drawn = self.recording.services.draw(
            &mut self.rng,
            self.now,
            batch.model.index(),
            usize::from(batch.executor),
            batch.work(),
        );
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
        let late = match self.at_once {
            true => Duration::ZERO,
            false => self.recording.services.handover(&mut self.rng, group as usize),
        };
        self.fly(done + late, Notice { batch, service: done.since(start) });
    }

    fn expire(&mut self) {
        while let Some(expired) = self.scheduler.poll_expired(self.now) {
            self.ledger.expired(expired.id());
        }
    }
}
