//! Simulated executors around the scheduler.

use std::time::Duration;

use crate::load::Rng;
use crate::load::lengths::Lengths;
use crate::scheduler::cost::Coefficients;
use crate::scheduler::{
    Arrival, Buckets, Class, Group, PadTo, Policy, PolicyKind, QueueLimits, Scheduler, SealedBatch, SeatSpec, TenantId,
};
use crate::vocab::{ModelHandle, Moment};

/// Executors with a known batch time.
#[derive(Clone, Debug)]
pub struct Hardware {
    pub name: &'static str,
    pub times: Coefficients,
    pub executors: usize,
    /// They are streams of one device: a batch's fixed part overlaps with the others' runs, the runs themselves do not.
    pub shared: bool,
    /// Deviation of batch times.
    pub noise: f64,
    pub rows_max: u32,
    pub cells_max: u64,
    /// Deadline of a request beyond the time that it takes alone.
    pub slack: Duration,
}

impl Hardware {
    /// One CPU core with a sentence encoder.
    pub fn cpu() -> Hardware {
        Hardware {
            name: "cpu",
            times: Coefficients { batch: 1_500_000.0, cell: 40_000.0, square: 35.0 },
            executors: 1,
            shared: false,
            noise: 0.03,
            rows_max: 32,
            cells_max: 4096,
            slack: Duration::from_millis(50),
        }
    }

    /// The same core, which other work shares: a batch takes what it takes, and nobody foresees it.
    pub fn crowded() -> Hardware {
        Hardware { name: "crowded", noise: 0.6, ..Hardware::cpu() }
    }

    /// A GPU with two streams.
    pub fn gpu() -> Hardware {
        Hardware {
            name: "gpu",
            times: Coefficients { batch: 250_000.0, cell: 250.0, square: 0.08 },
            executors: 2,
            shared: true,
            noise: 0.03,
            rows_max: 256,
            cells_max: 32_768,
            slack: Duration::from_millis(5),
        }
    }

    pub fn deadline(&self, at: Moment, len: u32) -> Moment {
        at + self.slack + Duration::from_nanos(self.times.batch_time(1, len) as u64)
    }

    /// A policy for it with all knobs at their defaults.
    pub fn policy(&self, kind: PolicyKind, len_max: u32) -> Policy {
        Policy {
            kind,
            pad_to: PadTo::Longest,
            slo: self.slack,
            ..Policy::new(self.rows_max, self.cells_max, Buckets::geometric(len_max))
        }
    }

    pub fn seats(&self) -> Vec<SeatSpec> {
        let device = |at: usize| if self.shared { 0 } else { at as u16 };
        (0..self.executors).map(|at| SeatSpec { group: Group::Executors, slots: 1, device: device(at) }).collect()
    }
}

/// A request to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub at: Moment,
    pub len: u32,
    pub deadline: Option<Moment>,
    pub class: Class,
    pub tenant: TenantId,
}

/// How a load arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Independent callers.
    Poisson,
    /// Poisson, at three times the mean rate for a fifth of the time and at half of it otherwise: a Markov-modulated
    /// process whose phases last 40 and 160 slacks in the mean.
    Bursty,
}

impl Pattern {
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Poisson => "poisson",
            Pattern::Bursty => "bursty",
        }
    }
}

/// A load of `count` calls at a mean rate per second.
pub fn calls(
    hardware: &Hardware,
    lengths: &Lengths,
    pattern: Pattern,
    rate: f64,
    count: usize,
    seed: u64,
) -> Vec<Call> {
    let mut rng = Rng::new(seed, 11);
    let mut exponential = |mean: f64| -(1.0 - rng.unit()).ln() * mean;
    let slack = hardware.slack.as_secs_f64();
    let mut at = 0.0;
    let (mut burst, mut phase_ends) = (false, exponential(160.0 * slack));
    lengths
        .sampler(seed)
        .take(count)
        .map(|len| {
            match pattern {
                Pattern::Poisson => at += exponential(1.0 / rate),
                Pattern::Bursty => loop {
                    let next = at + exponential(1.0 / (rate * if burst { 3.0 } else { 0.5 }));
                    if next <= phase_ends {
                        at = next;
                        break;
                    }
                    // Memoryless: what is left of the gap is drawn anew at the other rate.
                    at = phase_ends;
                    burst = !burst;
                    phase_ends += exponential(slack * if burst { 40.0 } else { 160.0 });
                },
            }
            let at = Moment((at * 1e9) as u64 + 1_000_000);
            let deadline = Some(hardware.deadline(at, len));
            Call { at, len, deadline, class: Class::default(), tenant: TenantId::default() }
        })
        .collect()
}

/// What came of a load.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub offered: u64,
    pub on_time: u64,
    /// Answered, after the deadline.
    pub late: u64,
    /// Given up while waiting.
    pub expired: u64,
    pub refused: u64,
    pub batches: u64,
    pub cells_real: u64,
    pub cells_padded: u64,
    pub busy: Duration,
    pub span: Duration,
    /// From arrival to the end of its batch, of those that were answered.
    pub latencies: Vec<Duration>,
    /// By tenant: offered, on time.
    pub by_tenant: Vec<(u64, u64)>,
    pub decisions: u64,
}

impl Outcome {
    pub fn on_time_share(&self) -> f64 {
        self.on_time as f64 / self.offered.max(1) as f64
    }

    /// Share of padded cells that are padding.
    pub fn waste(&self) -> f64 {
        1.0 - self.cells_real as f64 / self.cells_padded.max(1) as f64
    }

    pub fn percentile(&self, share: f64) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
        sorted.get(at).copied().unwrap_or_default()
    }
}

struct Busy {
    until: Moment,
    since: Moment,
    batch: SealedBatch,
    /// Places of its calls.
    members: Vec<u32>,
}

/// Runs a load. Stops early once more than `misses_max` calls have missed their deadline: the outcome then says so by
/// `offered`.
pub fn simulate(policy: &Policy, hardware: &Hardware, calls: &[Call], seed: u64, misses_max: u64) -> Outcome {
    const MODEL: ModelHandle = ModelHandle(0);
    let limits = QueueLimits { rows_max: 1 << 16, ..QueueLimits::NONE };
    let mut scheduler = Scheduler::new(limits, vec![policy.clone()], &hardware.seats());
    let mut rng = Rng::new(seed, 12);
    let mut noise = || (1.0 + hardware.noise * rng.normal()).max(0.1);
    let mut outcome = Outcome::default();
    let tenants = calls.iter().map(|call| usize::from(call.tenant.0) + 1).max().unwrap_or(1);
    outcome.by_tenant = vec![(0, 0); tenants];
    let mut places: Vec<u32> = Vec::new();
    let mut members = Vec::new();
    let mut running: Vec<Busy> = Vec::new();
    let mut spare: Vec<Vec<u32>> = Vec::new();
    let mut device_free = Moment::ZERO;
    let (mut next_call, mut wake) = (0, None::<Moment>);
    let mut now = Moment::ZERO;
    loop {
        let call_at = calls.get(next_call).map(|call| call.at);
        let done_at = running.iter().map(|busy| busy.until).min();
        now = match [call_at, done_at, wake].into_iter().flatten().min() {
            Some(moment) => moment,
            None => break,
        };
        while let Some(at) = running.iter().position(|busy| busy.until <= now) {
            let mut busy = running.swap_remove(at);
            scheduler.handle_finished(now, &busy.batch, busy.until.since(busy.since));
            outcome.busy += busy.until.since(busy.since);
            for place in busy.members.drain(..) {
                let call = &calls[place as usize];
                let on_time = call.deadline.is_none_or(|deadline| busy.until <= deadline);
                outcome.on_time += u64::from(on_time);
                outcome.late += u64::from(!on_time);
                outcome.by_tenant[usize::from(call.tenant.0)].1 += u64::from(on_time);
                outcome.latencies.push(busy.until.since(call.at));
            }
            spare.push(busy.members);
        }
        while let Some(call) = calls.get(next_call).filter(|call| call.at <= now) {
            let arrival = Arrival {
                model: MODEL,
                rows: 1,
                len: call.len,
                bytes: 4 * u64::from(call.len),
                deadline: call.deadline,
                compose: None,
                class: call.class,
                tenant: call.tenant,
            };
            outcome.offered += 1;
            outcome.by_tenant[usize::from(call.tenant.0)].0 += 1;
            match scheduler.handle_arrival(now, arrival) {
                Ok(id) => {
                    if places.len() <= id.index() {
                        places.resize(id.index() + 1, 0);
                    }
                    places[id.index()] = next_call as u32;
                }
                Err(_) => outcome.refused += 1,
            }
            next_call += 1;
        }
        while scheduler.poll_expired(now).is_some() {
            outcome.expired += 1;
        }
        while let Some(batch) = scheduler.poll_batch(now, &mut members) {
            let fixed = hardware.times.batch * noise();
            let run = (hardware.times.work_time(batch.work()) - hardware.times.batch) * noise();
            let ready = now + Duration::from_nanos(fixed as u64);
            let start = if hardware.shared { ready.max(device_free) } else { ready };
            let until = start + Duration::from_nanos(run as u64);
            device_free = until;
            let mut list = spare.pop().unwrap_or_default();
            list.extend(members.iter().map(|id| places[id.index()]));
            outcome.batches += 1;
            outcome.cells_real += batch.cells_real;
            outcome.cells_padded += batch.cells_padded();
            running.push(Busy { until, since: now, batch, members: list });
        }
        while scheduler.poll_expired(now).is_some() {
            outcome.expired += 1;
        }
        wake = scheduler.poll_timeout(now);
        if outcome.late + outcome.expired + outcome.refused > misses_max {
            break;
        }
        assert!(wake.is_none_or(|wake| wake > now), "a wake-up that has come was answered");
    }
    outcome.span = now.since(calls.first().map_or(now, |call| call.at));
    outcome.decisions = scheduler.log().count();
    outcome
}
