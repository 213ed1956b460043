//! What one request costs in the scheduler: admitted, chosen for a batch of about 60, its batch finished. The queue is as
//! long as the name says all the time; lengths are uneven, as those of texts are, over 56 buckets. `far` deadlines press
//! nobody; `near` ones make every decision look at the whole queue's deadlines.
//!
//! After criterion's figures: how long single decisions take. `callgrind WAITING [near]` runs one case 5,000 times and nothing
//! else, so that instructions can be counted, which a busy machine does not change:
//!
//!     cargo bench --bench scheduler --no-run
//!     valgrind --tool=callgrind --toggle-collect='*counted*' target/release/deps/scheduler-HASH callgrind 10000
//!
//! What it says it collected, divided by the requests that the bench prints, is instructions per request, from its admission
//! to the end of its batch; with `--toggle-collect='*Scheduler*poll_batch*'` those of its share of a decision.

use std::time::Duration;

use criterion::measurement::{Measurement, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput};
use ferry::clock;
use ferry::scheduler::{
    Arrival, Buckets, Class, Group, PadTo, Policy, PolicyKind, QueueLimits, Scheduler, SealedBatch, SeatSpec, TenantId,
    TicketId,
};
use ferry::vocab::{ModelHandle, Moment};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::LogNormal;

const MODEL: ModelHandle = ModelHandle(0);
const LEN_MAX: u32 = 512;

fn policy(kind: PolicyKind) -> Policy {
    Policy {
        kind,
        queue_delay_max: Some(Duration::ZERO),
        pad_to: PadTo::Longest,
        ..Policy::new(64, 32_768, Buckets::geometric(LEN_MAX))
    }
}

/// A scheduler whose queue stays as long as it is.
struct Rig {
    scheduler: Scheduler,
    lens: Vec<u32>,
    sent: usize,
    now: Moment,
    slack: Duration,
    members: Vec<TicketId>,
}

impl Rig {
    fn new(kind: PolicyKind, waiting: usize, near: bool) -> Rig {
        let mut rng = StdRng::seed_from_u64(1);
        let normal = LogNormal::new(3.7, 0.8).expect("finite parameters");
        let lens = (0..4096).map(|_| (rng.sample::<f64, _>(normal) as u32).clamp(1, LEN_MAX)).collect();
        let limits = QueueLimits { rows_max: 200_000, ..QueueLimits::NONE };
        let seats = SeatSpec::separate(Group::Executors, 1, 1);
        let scheduler = Scheduler::new(limits, vec![policy(kind)], &seats);
        // A batch of 60 takes a millisecond here, so the queue drains at 60 rows per millisecond.
        let drains = Duration::from_micros(1000 * (waiting as u64 / 60 + 4));
        let slack = if near { drains.mul_f64(1.3) } else { Duration::from_secs(1000) };
        let mut rig = Rig { scheduler, lens, sent: 0, now: Moment(1), slack, members: Vec::new() };
        for rows in (1..=64).cycle().take(200) {
            rig.scheduler.prime(MODEL, rows, 40, rig.service(rows, 40));
            rig.scheduler.prime(MODEL, rows, 300, rig.service(rows, 300));
        }
        // As if they had come one by one.
        let gap = drains / waiting as u32;
        for _ in 0..waiting {
            rig.now = rig.now + gap;
            rig.admit();
        }
        rig
    }

    fn service(&self, rows: u32, len: u32) -> Duration {
        Duration::from_nanos(250_000 + 312 * u64::from(rows) * u64::from(len))
    }

    fn admit(&mut self) {
        let len = self.lens[self.sent % self.lens.len()];
        self.sent += 1;
        let arrival = Arrival {
            model: MODEL,
            rows: 1,
            len,
            bytes: 4 * u64::from(len),
            deadline: Some(self.now + self.slack),
            compose: None,
            class: Class::default(),
            tenant: TenantId::default(),
        };
        let _ = self.scheduler.handle_arrival(self.now, arrival);
    }

    fn decide(&mut self) -> SealedBatch {
        self.scheduler.poll_batch(self.now, &mut self.members).expect("rows wait and nothing is held")
    }

    /// One batch: decided, finished, replaced. Returns its rows.
    fn round(&mut self) -> u32 {
        let batch = self.decide();
        self.finish(&batch)
    }

    fn finish(&mut self, batch: &SealedBatch) -> u32 {
        let service = self.service(batch.rows, batch.padded_len);
        self.now = self.now + service;
        self.scheduler.handle_finished(self.now, batch, service);
        let mut left = batch.rows;
        while self.scheduler.poll_expired(self.now).is_some() {
            left += 1;
        }
        (0..left).for_each(|_| self.admit());
        self.scheduler.poll_timeout(self.now);
        batch.rows
    }
}

const WAITING: [usize; 3] = [100, 10_000, 100_000];

fn admit_to_finish(c: &mut Criterion) {
    let mut group = c.benchmark_group("scheduler");
    group.throughput(Throughput::Elements(1));
    for (kind, near) in [(PolicyKind::Cost, false), (PolicyKind::Cost, true), (PolicyKind::Buckets, false)] {
        for waiting in WAITING {
            let mut rig = Rig::new(kind, waiting, near);
            let name = format!("{kind}_{}", if near { "near" } else { "far" });
            group.bench_function(BenchmarkId::new(name, waiting), |b| {
                b.iter_custom(|requests| {
                    let start = WallTime.start();
                    let mut done = 0;
                    while done < requests {
                        done += u64::from(rig.round());
                    }
                    // The last batch may have had more rows than were asked for.
                    WallTime.end(start).mul_f64(requests as f64 / done as f64)
                });
            });
        }
    }
    group.finish();
}

/// Percentiles of single decisions.
fn decisions(count: usize) {
    for near in [false, true] {
        for waiting in WAITING {
            let mut rig = Rig::new(PolicyKind::Cost, waiting, near);
            let (mut times, mut rows) = (Vec::with_capacity(count), 0u64);
            for _ in 0..count {
                let start = clock::now();
                let batch = rig.decide();
                times.push(clock::now().since(start));
                rows += u64::from(rig.finish(&batch));
            }
            times.sort_unstable();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
            println!(
                "decision, {waiting} waiting, {} deadlines: p50 {:?}, p99 {:?}, p99.9 {:?}, mean batch {:.1}",
                if near { "near" } else { "far" },
                at(0.5),
                at(0.99),
                at(0.999),
                rows as f64 / count as f64
            );
        }
    }
}

/// What callgrind counts. Rows of so many batches.
#[inline(never)]
fn counted(rig: &mut Rig, batches: u32) -> u64 {
    (0..batches).map(|_| u64::from(rig.round())).sum()
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "callgrind") {
        let waiting = arguments.get(at + 1).and_then(|count| count.parse().ok()).filter(|count| *count > 0);
        let near = arguments.get(at + 2).is_some_and(|word| word == "near");
        let mut rig = Rig::new(PolicyKind::Cost, waiting.expect("callgrind WAITING [near]"), near);
        println!("{} requests in 5000 batches", counted(&mut rig, 5000));
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    admit_to_finish(&mut criterion);
    criterion.final_summary();
    let bench = arguments.iter().any(|argument| argument == "--bench");
    decisions(if bench { 50_000 } else { 100 });
}
