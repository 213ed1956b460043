//! One server's life in virtual time: clients, shards, the real batcher, executors on the simulated device.
//!
//! Everything random comes from the seed, everything that happens is an event with a moment: equal seeds, equal lives.
//! Each seed turns a random subset of faults on.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ferry::batcher::Batcher;
use ferry::capture::{self, Source};
use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use ferry::executor::sim::POISONED;
use ferry::executor::slot::VacantSlot;
use ferry::executor::worker::Answers;
use ferry::frontend::inflight::{InFlight, Owned, Waiting};
use ferry::mail::{
    Burst, Finished, FinishedBatch, Member, Part, PlanOf, PolicyChange, Question, Request, SetPolicy, SetPolicyError,
    StartTrial, ToBatcher, ToShard,
};
use ferry::mailbox::{Awaited, Receiver, mailbox, reply};
use ferry::scatter::{Assemblies, Details, append_error, append_result, failure_of};
use ferry::scheduler::{
    Buckets, Class, Compose, Group, PadTo, Policy, PolicyKind, QueueLimits, Scheduler, SeatSpec, TenantId,
};
use ferry::telemetry::{Alarm, ModelLabels, Telemetry};
use ferry::vocab::{Code, DType, Layout, ModelHandle, Moment, Refusal, Run, TicketKey};
use ferry::wire::encoder::align8;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::history::History;
use super::outlet::{Running, SimExecutor, SimOutlet};

/// A planted mistake, to show that the simulation would notice it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    None,
    DropAnswer,
    AnswerTwice,
    SwapRows,
    IgnoreDeadline,
    ServeRefused,
    /// The first of a batch pays for another of it.
    BlameAnother,
    /// The batcher is not woken, and believes that it will be: nobody goes on.
    LoseWakeup,
}

/// Marks a batch that comes back a second time, for this file: the batcher looks at no such thing.
const TWICE: u64 = u64::MAX;

/// What came of a life.
pub struct Life {
    pub trace: u64,
    pub seen: std::collections::BTreeMap<&'static str, u64>,
    pub broken_promise: Option<String>,
}

/// What a capture of a life was, and what the scheduler had decided when it ended.
pub struct Captured {
    pub trace: Vec<u8>,
    pub decisions: u64,
    pub hash: u64,
}

/// A capture that is on.
struct Capturing {
    source: Source,
    captured: Captured,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive { shard: usize },
    Cancel { shard: usize },
    Disconnect { shard: usize },
    Turn,
    Start { executor: usize },
    Done { executor: usize, number: u64 },
    ShardMail { shard: usize },
    SetPolicy,
    Capture,
    Drain,
    HandBack,
}

struct Shard {
    in_flight: InFlight,
    assemblies: Assemblies,
    connections: Vec<Owned>,
    inbox: Receiver<ToShard>,
    mail_scheduled: bool,
}

struct World {
    now: Moment,
    rng: StdRng,
    events: BinaryHeap<Reverse<(Moment, u64, Event)>>,
    sequence: u64,
    contracts: Vec<Arc<Contract>>,
    policies: Vec<Policy>,
    batcher: Batcher<SimOutlet>,
    telemetry: Arc<Telemetry>,
    to_batcher: VecDeque<ToBatcher>,
    /// Changes of policies that were asked for.
    changes: Vec<Awaited<Result<PolicyChange, SetPolicyError>>>,
    trials: Vec<Awaited<Result<ferry::trial::Report, SetPolicyError>>>,
    /// The batcher's next turn. Events that say otherwise are old: a wake-up that it forgot must not be hidden by them.
    turn_at: Option<Moment>,
    shards: Vec<Shard>,
    history: Rc<RefCell<History>>,
    draining: bool,
    arrivals_left: u32,
    gap: Duration,
    service: Duration,
    /// This executor takes ten seconds for one batch.
    stuck: Option<usize>,
    /// Share of requests that make their model fail.
    poison: f64,
    /// Those that did so far, to be sent again.
    poisons: Vec<(ModelHandle, u32, u32, Bytes, usize)>,
    /// Share of batches that come back twice.
    duplicates: f64,
    duplicated: u64,
    /// Batches that executors began.
    runs: u64,
    compose: bool,
    defect: Defect,
    answers: u64,
    /// For the planted defect that executes what was refused.
    requests: Vec<Request>,
    capturing: Option<Capturing>,
    captured: Option<Captured>,
}

pub fn live(seed: u64, defect: Defect) -> Life {
    let mut world = World::new(seed, defect);
    world.run();
    let history = world.history.borrow();
    Life { trace: history.trace, seen: history.seen.clone(), broken_promise: history.violation.clone() }
}

/// A life of which a random part is captured.
pub fn live_captured(seed: u64) -> (Life, Captured) {
    let mut world = World::new(seed, Defect::None);
    let after = world.gap.mul_f64(80.0 * world.rng.random::<f64>());
    world.after(after, Event::Capture);
    world.run();
    let captured = world.captured.take().expect("the capture ended before the life did");
    let history = world.history.borrow();
    let life = Life { trace: history.trace, seen: history.seen.clone(), broken_promise: history.violation.clone() };
    (life, captured)
}

fn tensor(name: &str, dtype: DType, shape: Vec<Dim>, pad: f64, nonfinite: NonFinite) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape, pad, range: None, nonfinite }
}

/// Three models whose outputs are their inputs: one of one tensor, one without a length, one of two tensors.
fn contracts() -> Vec<Arc<Contract>> {
    let tokens = || Dim::Named("tokens".into());
    let make = |name: &str, specs: Vec<TensorSpec>, length: Option<Length>| {
        let outputs =
            specs.iter().map(|spec| TensorSpec { pad: 0.0, nonfinite: NonFinite::Refuse, ..spec.clone() }).collect();
        let contract = Contract {
            name: name.into(),
            version: "1".into(),
            architecture: "sim".into(),
            inputs: specs,
            outputs,
            length,
            text: None,
            rows_max: 4,
        };
        Arc::new(contract.checked().expect("a contract"))
    };
    let length = || Some(Length { name: "tokens".into(), min: 1, max: 16 });
    vec![
        make("ids", vec![tensor("ids", DType::U32, vec![tokens()], 7.0, NonFinite::Allow)], length()),
        make("vector", vec![tensor("x", DType::F32, vec![Dim::Fixed(3)], 0.0, NonFinite::Allow)], None),
        make(
            "pair",
            vec![
                tensor("bytes", DType::U8, vec![tokens()], 9.0, NonFinite::Allow),
                tensor("pairs", DType::U32, vec![tokens(), Dim::Fixed(2)], 3.0, NonFinite::Allow),
            ],
            length(),
        ),
    ]
}

fn random_policy(rng: &mut StdRng, contract: &Contract) -> Policy {
    let lens: &[u32] = match (contract.length.is_some(), rng.random_range(0..3)) {
        (false, _) => &[1],
        (true, 0) => &[16],
        (true, 1) => &[4, 8, 16],
        (true, _) => &[2, 3, 4, 6, 8, 12, 16],
    };
    let window = if rng.random_bool(0.3) { 0 } else { rng.random_range(1..2000) };
    let queue = if rng.random_bool(0.3) {
        QueueLimits { rows_max: rng.random_range(2..30), cells_max: 300, bytes_max: 2000 }
    } else {
        QueueLimits::NONE
    };
    let buckets = Buckets::new(lens).expect("ascending");
    Policy {
        kind: PolicyKind::ALL[rng.random_range(0..4)],
        queue_delay_max: rng.random_bool(0.8).then_some(Duration::from_micros(window)),
        pad_to: if rng.random_bool(0.5) { PadTo::Bucket } else { PadTo::Longest },
        layout: if rng.random_bool(0.3) { Layout::Packed } else { Layout::Padded },
        can_pack: true,
        fill_waste_max: rng.random_range(0.0..1.0),
        group: if rng.random_bool(0.25) { Group::Inline } else { Group::Executors },
        queue,
        weight: rng.random_range(0.1..4.0),
        ..Policy::new(rng.random_range(1..10), rng.random_range(16..120), buckets)
    }
}

/// Bytes that no other request has: who gets them back by mistake is found out.
fn payload(rng: &mut StdRng, contract: &Contract, rows: u32, len: u32, id: u64, poisoned: bool) -> Bytes {
    let mut bytes = Vec::new();
    for spec in &contract.inputs {
        bytes.resize(align8(bytes.len()), 0);
        for element in 0..rows as u64 * spec.row_elements(len) as u64 {
            let mark = id.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(element).rotate_left(17) >> 8;
            match spec.dtype {
                DType::F32 => bytes.extend_from_slice(&((mark & 0xff_ffff) as f32).to_le_bytes()),
                DType::U32 => bytes.extend_from_slice(&(mark as u32).to_le_bytes()),
                _ => bytes.push(mark as u8),
            }
        }
    }
    if poisoned {
        let at = rng.random_range(0..bytes.len() / 4) * 4;
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    }
    bytes.into()
}

impl World {
    fn new(seed: u64, defect: Defect) -> World {
        let mut rng = StdRng::seed_from_u64(seed);
        let contracts = contracts();
        let policies: Vec<Policy> = contracts.iter().map(|contract| random_policy(&mut rng, contract)).collect();
        let shard_count = rng.random_range(1..4);
        let history = Rc::new(RefCell::new(History::default()));
        let labels: Vec<ModelLabels> = contracts
            .iter()
            .map(|contract| ModelLabels { name: contract.name.clone(), version: contract.version.clone() })
            .collect();
        let slots = rng.random_range(1..4);
        let mut groups = vec![Group::Executors; rng.random_range(1..4)];
        groups.push(Group::Inline);
        let telemetry = Telemetry::new(&labels, shard_count, groups.len());
        let (senders, inboxes): (Vec<_>, Vec<_>) = (0..shard_count).map(|_| mailbox(100_000)).unzip();
        let executors = (0..)
            .zip(&groups)
            .map(|(index, group)| {
                let (contracts, shards) = (contracts.clone(), senders.clone());
                let answers = Answers { index, contracts, shards, telemetry: Arc::clone(&telemetry) };
                SimExecutor::new(answers, *group == Group::Inline)
            })
            .collect();
        let outlet = SimOutlet {
            executors,
            shards: senders,
            policies: policies.clone(),
            history: Rc::clone(&history),
            given: vec![0; groups.len()],
            slots,
            rng: StdRng::seed_from_u64(seed ^ 0x5eed),
            failures: if rng.random_bool(0.5) { 0.1 } else { 0.0 },
            inline_time: Duration::ZERO,
            refused: Vec::new(),
            ghosts: Vec::new(),
        };
        let limits = QueueLimits { rows_max: rng.random_range(10..200), cells_max: 2000, bytes_max: 20_000 };
        let shared = rng.random_bool(0.2);
        let seat = |(at, group): (usize, &Group)| SeatSpec {
            group: *group,
            slots: if *group == Group::Inline { 1 } else { slots },
            // Some believe that they share a device, and wait for each other.
            device: if shared { 0 } else { at as u16 },
        };
        let seats: Vec<SeatSpec> = groups.iter().enumerate().map(seat).collect();
        let scheduler = Scheduler::new(limits, policies.clone(), &seats);
        let mut batcher = Batcher::new(scheduler, outlet, &contracts, shard_count, Arc::clone(&telemetry));
        let service = Duration::from_micros(rng.random_range(20..2000));
        // Sometimes shorter than a batch that is only slow.
        let hang_timeout =
            if rng.random_bool(0.3) { service.mul_f64(rng.random_range(1.0..30.0)) } else { Duration::ZERO };
        batcher.give_up_after(hang_timeout);
        if rng.random_bool(0.5) {
            batcher.quarantine(rng.random_range(1..8), service * 100);
        }
        let connections = rng.random_range(1..5);
        let shards = (0..)
            .zip(inboxes)
            .map(|(index, inbox)| Shard {
                assemblies: Assemblies::default(),
                in_flight: InFlight::new(index, rng.random_range(20..200)),
                connections: (0..connections).map(|_| Owned::default()).collect(),
                inbox,
                mail_scheduled: false,
            })
            .collect();
        let stuck = rng.random_bool(0.2).then(|| rng.random_range(0..groups.len() - 1));
        World {
            now: Moment(1_000_000),
            events: BinaryHeap::new(),
            sequence: 0,
            contracts,
            policies,
            batcher,
            telemetry,
            to_batcher: VecDeque::new(),
            changes: Vec::new(),
            trials: Vec::new(),
            turn_at: None,
            shards,
            history,
            draining: false,
            arrivals_left: rng.random_range(50..300),
            gap: Duration::from_micros(rng.random_range(2..400)),
            service,
            stuck,
            poison: if rng.random_bool(0.3) { rng.random_range(0.01..0.3) } else { 0.0 },
            poisons: Vec::new(),
            duplicates: if rng.random_bool(0.2) { 0.05 } else { 0.0 },
            duplicated: 0,
            runs: 0,
            compose: rng.random_bool(0.3),
            defect,
            answers: 0,
            requests: Vec::new(),
            capturing: None,
            captured: None,
            rng,
        }
    }

    fn run(&mut self) {
        for shard in 0..self.shards.len() {
            self.after(Duration::ZERO, Event::Arrive { shard });
            if self.rng.random_bool(0.7) {
                self.after(self.gap, Event::Cancel { shard });
            }
            if self.rng.random_bool(0.3) {
                self.after(self.gap * 20, Event::Disconnect { shard });
            }
        }
        if self.rng.random_bool(0.3) {
            self.after(self.gap * 10, Event::SetPolicy);
        }
        for _ in 0..200_000 {
            let Some(Reverse((at, _, event))) = self.events.pop() else {
                return self.check_rest();
            };
            self.now = at;
            self.happen(event);
            self.check();
            if self.history.borrow().violation.is_some() {
                return;
            }
        }
        self.history.borrow_mut().violate("the server does not come to rest".into());
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((self.now + delay, self.sequence, event)));
    }

    fn jitter(&mut self, micros: u64) -> Duration {
        Duration::from_nanos(self.rng.random_range(0..micros * 1000))
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive { shard } => self.arrive(shard),
            Event::Cancel { shard } => self.cancel(shard),
            Event::Disconnect { shard } => self.disconnect(shard),
            Event::Turn => self.turn(),
            Event::Start { executor } => self.start(executor),
            Event::Done { executor, number } => self.done(executor, number),
            Event::ShardMail { shard } => self.take_mail(shard),
            Event::SetPolicy => self.set_policy(),
            Event::Capture => {
                let (sink, source) = capture::channel();
                let captured = Captured { trace: Vec::new(), decisions: 0, hash: 0 };
                self.capturing = Some(Capturing { source, captured });
                // Some end in the middle of the life, and some long after it.
                let time = self.gap.mul_f64(self.rng.random_range(1.0..300.0));
                self.mail(ToBatcher::Capture { time, sink });
            }
            Event::Drain => {
                self.draining = true;
                self.mail(ToBatcher::Drain);
                // Some drains are patient; among the others are those that serve nothing that waits.
                if self.rng.random_bool(0.5) {
                    let after = self.gap.mul_f64(self.rng.random_range(0.0..20.0));
                    self.after(after, Event::HandBack);
                }
            }
            Event::HandBack => self.mail(ToBatcher::HandBack),
        }
    }

    /// One or two knobs of a model get other values. What would strand somebody, or is out of bounds, is refused.
    fn set_policy(&mut self) {
        let model = ModelHandle(self.rng.random_range(0..self.contracts.len() as u16));
        let mut knob = || {
            let rng = &mut self.rng;
            let (knob, value) = match rng.random_range(0..8) {
                0 => ("policy", PolicyKind::ALL[rng.random_range(0..4)].name().to_owned()),
                1 => ("rows_max", rng.random_range(1..10).to_string()),
                2 => ("cells_max", rng.random_range(16..120).to_string()),
                3 => ("buckets", ["16", "4,8,16", "1,2,3,5,16", "auto", "1"][rng.random_range(0..5)].to_owned()),
                4 => ("pad_to", ["bucket", "longest"][rng.random_range(0..2)].to_owned()),
                6 => ("layout", ["padded", "packed"][rng.random_range(0..2)].to_owned()),
                5 => ("shapes_max", rng.random_range(1..5).to_string()),
                _ => ("queue_delay_max_us", rng.random_range(0..3000).to_string()),
            };
            (knob.to_owned(), value)
        };
        let set = vec![knob(), knob()];
        if self.rng.random_bool(0.3) {
            self.start_trial(model, set);
        } else {
            let (reply, awaited) = reply();
            self.changes.push(awaited);
            self.mail(ToBatcher::SetPolicy(SetPolicy { model, set, reply }));
        }
        if self.rng.random_bool(0.8) {
            self.after(self.gap * 10, Event::SetPolicy);
        }
    }

    /// A life is shorter than a trial: it ends by its guard, by somebody's change, or by the drain.
    fn start_trial(&mut self, model: ModelHandle, set: Vec<(String, String)>) {
        let (reply, awaited) = reply();
        self.trials.push(awaited);
        let slo = self.gap * self.rng.random_range(1..200);
        let plan = PlanOf { share: Some(1.0), slo: Some(slo), on_time_min: Some(0.5), ..PlanOf::default() };
        self.mail(ToBatcher::Trial(StartTrial { model, set, time: Duration::from_secs(1), plan, reply }));
    }

    fn mail(&mut self, message: ToBatcher) {
        self.to_batcher.push_back(message);
        let delay = self.jitter(20);
        self.turn_within(delay);
    }

    fn turn_within(&mut self, delay: Duration) {
        let at = self.now + delay;
        if self.turn_at.is_none_or(|turn_at| at < turn_at) {
            self.turn_at = Some(at);
            if self.defect == Defect::LoseWakeup && self.sequence > 100 {
                return;
            }
            self.after(delay, Event::Turn);
        }
    }

    fn arrive(&mut self, shard: usize) {
        if self.draining {
            return;
        }
        let mut burst = Burst::default();
        let connection = self.rng.random_range(0..self.shards[shard].connections.len());
        for _ in 0..self.rng.random_range(1..6) {
            if let Some(request) = self.accept(shard, connection) {
                burst.arrivals.push(request);
            }
        }
        if self.defect == Defect::ServeRefused {
            self.requests.extend(burst.arrivals.iter().cloned());
        }
        if self.defect == Defect::IgnoreDeadline {
            burst.arrivals.iter_mut().for_each(|request| request.deadline = None);
        }
        self.mail(ToBatcher::Burst(burst));
        self.arrivals_left = self.arrivals_left.saturating_sub(1);
        if self.arrivals_left > 0 {
            let gap = self.gap.mul_f64(-(1.0 - self.rng.random::<f64>()).ln());
            self.after(gap, Event::Arrive { shard });
        } else {
            self.after(self.gap, Event::Drain);
        }
    }

    /// What a shard does with a request that passed its contract.
    fn accept(&mut self, shard: usize, connection: usize) -> Option<Request> {
        let model = ModelHandle(self.rng.random_range(0..self.contracts.len() as u16));
        let contract = Arc::clone(&self.contracts[model.index()]);
        let rows = if self.rng.random_bool(0.7) { 1 } else { self.rng.random_range(1..=contract.rows_max) };
        let len = if contract.length.is_some() { self.rng.random_range(1..=16) } else { 1 };
        let id = self.history.borrow().next_id();
        let poisoned = model.index() == 1 && self.rng.random_bool(0.05);
        let mut payload = payload(&mut self.rng, &contract, rows, len, id, poisoned);
        // Not the model of single bytes: its rows may be shorter than a poison.
        let fails = (!poisoned && model.index() < 2 && self.rng.random_bool(self.poison))
            .then(|| self.rng.random_range(0..POISONED.len()));
        let again = (!poisoned && !self.poisons.is_empty() && self.rng.random_bool(self.poison))
            .then(|| self.poisons[self.rng.random_range(0..self.poisons.len())].clone());
        let (mut model, mut rows, mut len, mut fails) = (model, rows, len, fails);
        if let Some((of_model, of_rows, of_len, bytes, how)) = again {
            (model, rows, len, payload, fails) = (of_model, of_rows, of_len, bytes, Some(how));
        } else if let Some(how) = fails {
            let mut bytes = payload.to_vec();
            let at = self.rng.random_range(0..rows) as usize * contract.inputs[0].row_bytes(len);
            bytes[at..at + 4].copy_from_slice(&POISONED[how]);
            payload = bytes.into();
            self.poisons.push((model, rows, len, payload.clone(), how));
        }
        let deadline = match self.rng.random_range(0..10) {
            0..4 => None,
            // It may be over before the batcher sees it.
            4 => Some(self.now + self.jitter(20)),
            5..8 => Some(self.now + self.jitter(3_000)),
            _ => Some(self.now + self.jitter(100_000)),
        };
        let compose = (self.compose && self.rng.random_bool(0.1))
            .then(|| Compose { tag: self.rng.random_range(1..4), rows: self.rng.random_range(1..4) });
        let waiting = Waiting {
            connection: connection as u32,
            request_id: id,
            model,
            class: Class::default(),
            payload_bytes: payload.len() as u32,
            details: Details { timings: self.rng.random_bool(0.5), receipt: self.rng.random_bool(0.25), late_us: 0 },
            items: false,
            in_quota: false,
            trace: 0,
        };
        let shard = &mut self.shards[shard];
        let key = shard.in_flight.insert(waiting, &mut shard.connections[connection])?;
        self.history.borrow_mut().accepted(key, payload.clone(), deadline, compose, (poisoned, fails), rows);
        Some(Request {
            key,
            model,
            rows,
            len,
            part: Part::whole(rows),
            payload,
            received_at: self.now,
            deadline,
            compose,
            class: Class::from_priority(id as u8 % 4),
            tenant: TenantId((id % 5) as u16),
            truncated: false,
        })
    }

    fn cancel(&mut self, shard: usize) {
        if self.draining {
            return;
        }
        let connection = self.rng.random_range(0..self.shards[shard].connections.len());
        let mine = &self.shards[shard];
        if let Some(key) = mine.in_flight.first(&mine.connections[connection]) {
            self.end(shard, key, &Refusal::new(Code::Cancelled, "the caller asked"));
            self.mail(ToBatcher::Burst(Burst { arrivals: Vec::new(), cancelled: vec![key] }));
        }
        let gap = self.gap * 3 + self.jitter(200);
        self.after(gap, Event::Cancel { shard });
    }

    fn disconnect(&mut self, shard: usize) {
        if self.draining {
            return;
        }
        let connection = self.rng.random_range(0..self.shards[shard].connections.len());
        let mine = &mut self.shards[shard];
        let owner = &mut mine.connections[connection];
        let mut cancelled = Vec::new();
        while let Some(key) = mine.in_flight.first(owner) {
            mine.assemblies.drop_entry(key.slot);
            mine.in_flight.remove(key, owner).expect("it was on the list");
            self.history.borrow_mut().gone(self.now, key);
            cancelled.push(key);
        }
        self.history.borrow_mut().note("disconnects");
        self.mail(ToBatcher::Burst(Burst { arrivals: Vec::new(), cancelled }));
        let gap = self.gap * 20 + self.jitter(500);
        self.after(gap, Event::Disconnect { shard });
    }

    /// One turn of the batcher's thread, as `batcher::run_thread` does it.
    fn turn(&mut self) {
        if self.turn_at != Some(self.now) {
            return;
        }
        self.turn_at = None;
        for _ in 0..64 {
            let Some(message) = self.to_batcher.pop_front() else { break };
            if let ToBatcher::Burst(burst) = &message {
                burst.cancelled.iter().for_each(|key| self.history.borrow_mut().cancel_taken(*key));
            }
            if let ToBatcher::Finished(finished) = &message {
                let twice = finished.run.cells == TWICE;
                self.batcher.outlet_mut().given[finished.executor] -= u32::from(!twice);
            }
            self.batcher.take(self.now, message);
        }
        let wake_at = self.batcher.turn(self.now);
        self.check_scheduler(wake_at);
        if wake_at.is_some_and(|at| at <= self.now) {
            self.history.borrow_mut().violate(format!("at {:?} the batcher asks to be woken at {wake_at:?}", self.now));
        }
        self.take_capture();
        let outlet = self.batcher.outlet_mut();
        let busy = std::mem::take(&mut outlet.inline_time);
        let refused = std::mem::take(&mut outlet.refused);
        let startable: Vec<usize> = (0..outlet.executors.len())
            .filter(|at| outlet.executors[*at].running.is_none() && !outlet.executors[*at].queue.is_empty())
            .collect();
        for executor in startable {
            let delay = self.jitter(30);
            self.after(delay, Event::Start { executor });
        }
        if !self.to_batcher.is_empty() {
            self.turn_within(busy + Duration::from_nanos(1));
        } else if let Some(at) = wake_at {
            let delay = at.since(self.now).max(busy) + self.jitter(30);
            self.turn_within(delay);
        }
        self.deliver();
        if self.defect == Defect::ServeRefused {
            self.serve_refused(&refused);
        }
    }

    /// Takes what the batcher has recorded.
    fn take_capture(&mut self) {
        let Some(mut capturing) = self.capturing.take() else { return };
        let ended = capturing.source.ended();
        capturing.source.chunks.try_iter().for_each(|chunk| capturing.captured.trace.extend_from_slice(&chunk));
        match ended {
            None => self.capturing = Some(capturing),
            Some(ended) => {
                capturing.captured.trace.extend(capture::end_chunk(ended));
                let log = self.batcher.scheduler().log();
                (capturing.captured.decisions, capturing.captured.hash) = (log.count(), log.hash());
                self.captured = Some(capturing.captured);
            }
        }
    }

    fn serve_refused(&mut self, refused: &[TicketKey]) {
        let mut again = Burst::default();
        for key in refused {
            if let Some(at) = self.requests.iter().position(|request| request.key == *key) {
                again.arrivals.push(Request { deadline: None, ..self.requests.swap_remove(at) });
            }
        }
        if !again.arrivals.is_empty() {
            self.mail(ToBatcher::Burst(again));
        }
    }

    fn start(&mut self, executor: usize) {
        let took_long = self.stuck == Some(executor) && self.rng.random_bool(0.1);
        let factor = 0.2 + 2.0 * self.rng.random::<f64>();
        let seat = &mut self.batcher.outlet_mut().executors[executor];
        if seat.running.is_some() {
            return;
        }
        let Some(slot) = seat.queue.pop_front() else { return };
        self.history.borrow_mut().started(&slot);
        let service = if took_long { Duration::from_secs(10) } else { self.service.mul_f64(factor) };
        if took_long {
            self.stuck = None;
            self.history.borrow_mut().note("stuck executors");
        }
        self.runs += 1;
        let number = self.runs;
        let seat = &mut self.batcher.outlet_mut().executors[executor];
        seat.pass.begin(slot.batch.id);
        seat.running = Some(Running { slot, service, number });
        self.after(service, Event::Done { executor, number });
    }

    fn done(&mut self, executor: usize, number: u64) {
        let outlet = self.batcher.outlet_mut();
        if let Some(at) = outlet.ghosts.iter().position(|(_, running)| running.number == number) {
            let (mut worker, Running { slot, .. }) = outlet.ghosts.swap_remove(at);
            let brought = worker.try_run(slot).is_some();
            let mut history = self.history.borrow_mut();
            history.note("late results");
            if brought || self.shards.iter().any(|shard| !shard.inbox.is_empty() && !shard.mail_scheduled) {
                history.violate("a hung executor's result went beyond the fence".into());
            }
            return;
        }
        let Running { slot, service, .. } = outlet.executors[executor].running.take().expect("it was started");
        let finished = outlet.finish(executor, slot, service);
        let Finished { batch, ran, run, .. } = finished;
        self.mail(ToBatcher::Finished(finished));
        if self.rng.random_bool(self.duplicates) {
            self.duplicated += 1;
            let run = Run { cells: TWICE, ..run };
            self.mail(ToBatcher::Finished(Finished {
                executor,
                slot: VacantSlot::default(),
                batch,
                service,
                ran,
                run,
                blamed: Vec::new(),
            }));
        }
        self.after(Duration::ZERO, Event::Start { executor });
        self.deliver();
    }

    /// Rings the shards that have mail.
    fn deliver(&mut self) {
        for shard in 0..self.shards.len() {
            if !self.shards[shard].inbox.is_empty() && !self.shards[shard].mail_scheduled {
                self.shards[shard].mail_scheduled = true;
                let delay = self.jitter(50);
                self.after(delay, Event::ShardMail { shard });
            }
        }
    }

    fn take_mail(&mut self, shard: usize) {
        self.shards[shard].mail_scheduled = false;
        while let Some(message) = self.shards[shard].inbox.try_recv() {
            match message {
                ToShard::Batch(finished) => self.answer_batch(shard, &finished),
                ToShard::Ended(ended) => {
                    for (key, refusal) in ended {
                        self.end(shard, key, &refusal);
                    }
                }
                ToShard::Drain | ToShard::Abort => unreachable!("nobody sends it here"),
            }
        }
    }

    fn answer_batch(&mut self, shard: usize, finished: &FinishedBatch) {
        for member in &finished.members {
            if usize::from(member.key.shard) != shard {
                continue;
            }
            let mut failure = failure_of(finished, member);
            if self.defect == Defect::BlameAnother && member.first_row == 0 && failure.is_none() {
                failure = finished.members.iter().find_map(|mate| failure_of(finished, mate));
            }
            if let Some(refusal) = failure {
                self.end(shard, member.key, &refusal);
                if member.is_part() {
                    self.mail(ToBatcher::Burst(Burst { arrivals: Vec::new(), cancelled: vec![member.key] }));
                }
                continue;
            }
            let part = member.is_part();
            if part && self.shards[shard].in_flight.get(member.key).is_some() {
                let planted = self.maybe_another(finished, member);
                let assemblies = &mut self.shards[shard].assemblies;
                if !assemblies.take_rows(finished, &planted, 0..planted.rows, finished.finished_at) {
                    continue;
                }
            }
            // Whoever ends a request drops what was assembled of it.
            let mut assemblies = std::mem::take(&mut self.shards[shard].assemblies);
            let Some(waiting) = self.release(shard, member.key) else {
                self.shards[shard].assemblies = assemblies;
                self.history.borrow_mut().note("late answers");
                continue;
            };
            let mut out = Vec::new();
            let member = self.maybe_another(finished, member);
            if part {
                assemblies.append_result(&mut out, finished, &member, waiting.request_id, waiting.details);
            } else {
                append_result(&mut out, finished, &member, waiting.request_id, waiting.details, finished.finished_at);
            }
            self.shards[shard].assemblies = assemblies;
            self.answers += 1;
            let planted = self.answers.is_multiple_of(20);
            if !(planted && self.defect == Defect::DropAnswer) {
                self.history.borrow_mut().received(self.now, &out);
            }
            if planted && self.defect == Defect::AnswerTwice {
                self.history.borrow_mut().received(self.now, &out);
            }
        }
    }

    /// The member itself, unless the planted defect is that rows are swapped.
    fn maybe_another(&self, finished: &FinishedBatch, member: &Member) -> Member {
        let swapped = finished.members.iter().find(|other| {
            self.defect == Defect::SwapRows
                && other.first_row != member.first_row
                && (other.rows, other.len, other.part) == (member.rows, member.len, member.part)
        });
        swapped.map_or(*member, |other| Member { first_row: other.first_row, ..*member })
    }

    fn end(&mut self, shard: usize, key: TicketKey, refusal: &Refusal) {
        match self.release(shard, key) {
            None => self.history.borrow_mut().note("late answers"),
            Some(waiting) => {
                let mut out = Vec::new();
                append_error(&mut out, waiting.model, waiting.request_id, refusal);
                self.history.borrow_mut().received(self.now, &out);
            }
        }
    }

    fn release(&mut self, shard: usize, key: TicketKey) -> Option<Waiting> {
        let shard = &mut self.shards[shard];
        let connection = shard.in_flight.get(key)?.connection;
        shard.assemblies.drop_entry(key.slot);
        shard.in_flight.remove(key, &mut shard.connections[connection as usize])
    }

    /// Holds after every turn: the books add up, and nobody waits before an idle executor without a moment at which that
    /// ends.
    fn check_scheduler(&mut self, wake_at: Option<Moment>) {
        if let Err(message) = self.batcher.scheduler().audit() {
            self.history.borrow_mut().violate(format!("the books do not add up: {message}"));
        }
        // Executors' time, and what tenants are charged. Batches are run on the real clock here: moments in any order.
        if let Err(message) = self.telemetry.audit() {
            self.history.borrow_mut().violate(format!("the counters do not add up: {message}"));
        }
        let scheduler = self.batcher.scheduler();
        for (at, policy) in self.policies.iter().enumerate() {
            let waits = scheduler.waiting(ModelHandle(at as u16)).0 > 0;
            let idle = scheduler.seats().iter().any(|seat| seat.group == policy.group && seat.is_idle());
            let runs = scheduler.running() > 0;
            if waits && idle && wake_at.is_none() && !runs {
                self.history
                    .borrow_mut()
                    .violate(format!("model {at} waits before an idle executor and nothing ends it"));
            }
        }
    }

    /// Holds after every event.
    fn check(&mut self) {
        let mut history = self.history.borrow_mut();
        history.check_due(self.now);
        let in_flight: usize = self.shards.iter().map(|shard| shard.in_flight.len()).sum();
        if history.open() != in_flight {
            let open = history.open();
            history.violate(format!("{open} requests are unanswered, the tables hold {in_flight}"));
        }
    }

    /// Holds when nothing can happen any more: all is answered, nothing is left anywhere.
    fn check_rest(&mut self) {
        for awaited in std::mem::take(&mut self.changes) {
            let answer = awaited.wait(Duration::ZERO);
            self.history.borrow_mut().note(match answer {
                Some(Ok(_)) => "policies changed",
                Some(Err(SetPolicyError::Invalid(_))) => "policies refused",
                Some(Err(SetPolicyError::Stranded(_))) => "policies that would strand somebody",
                Some(Err(SetPolicyError::Busy(_))) => unreachable!("a change by hand ends a trial"),
                None => "policies unanswered",
            });
        }
        for awaited in std::mem::take(&mut self.trials) {
            let began = awaited.wait(Duration::ZERO).is_some_and(|answer| answer.is_ok());
            self.history.borrow_mut().note(if began { "trials begun" } else { "trials refused" });
        }
        let reverted = self.policies.iter().enumerate().filter(|(at, _)| {
            let (reply, awaited) = reply();
            let model = ModelHandle(*at as u16);
            self.batcher.take(self.now, ToBatcher::Ask(Question::Trial { model, reply }));
            let report = awaited.wait(Duration::ZERO).expect("answered at once");
            report.is_some_and(|report| report.slices.len() > 1 && report.ended.is_some())
        });
        let reverted = reverted.count();
        let mut history = self.history.borrow_mut();
        (0..reverted).for_each(|_| history.note("trials reverted"));
        history.check_complete();
        (0..self.duplicated).for_each(|_| history.note("batches that came back twice"));
        let alarms = self.telemetry.alarms(Alarm::ForeignResult);
        if alarms != self.duplicated || self.telemetry.alarms(Alarm::WrongOutput) > 0 {
            history.violate(format!("{} batches came back twice, and {alarms} alarms were raised", self.duplicated));
        }
        let waiting = (0..self.policies.len())
            .map(|model| self.batcher.scheduler().waiting(ModelHandle(model as u16)))
            .find(|waiting| *waiting != (0, 0, 0));
        if !self.draining || !self.batcher.is_idle() || waiting.is_some() || !self.to_batcher.is_empty() {
            history.violate(format!("the drain left something behind: {waiting:?}"));
        }
        let left =
            |shard: &Shard| !shard.inbox.is_empty() || !shard.in_flight.is_empty() || !shard.assemblies.is_empty();
        if self.shards.iter().any(left) {
            history.violate("a shard has mail or requests left".into());
        }
    }
}
