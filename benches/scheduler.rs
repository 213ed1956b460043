//! What one request costs in the scheduler: admitted, chosen for a batch, its batch finished. The queue is as long as the
//! name says all the time; lengths are uneven, as those of texts are.

use std::time::Duration;

use criterion::measurement::{Measurement, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ferry::scheduler::{Arrival, Buckets, Group, Policy, QueueLimits, Scheduler, Vacancy};
use ferry::vocab::{ModelHandle, Moment};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::LogNormal;

const MODEL: ModelHandle = ModelHandle(0);
const LEN_MAX: u32 = 512;

fn policy() -> Policy {
    Policy {
        rows_max: 32,
        cells_max: 8192,
        queue_delay_max: Duration::from_millis(1),
        buckets: Buckets::geometric(LEN_MAX),
        fill_waste_max: 0.25,
        group: Group::Executors,
        queue: QueueLimits::NONE,
        service: Default::default(),
    }
}

fn admit_to_finish(c: &mut Criterion) {
    let mut rng = StdRng::seed_from_u64(1);
    let lens = LogNormal::new(3.7, 0.8).expect("finite parameters");
    let lens: Vec<u32> = (0..4096).map(|_| (rng.sample::<f64, _>(lens) as u32).clamp(1, LEN_MAX)).collect();
    let mut group = c.benchmark_group("scheduler");
    group.throughput(Throughput::Elements(1));
    for waiting in [100u64, 10_000, 100_000] {
        let mut scheduler = Scheduler::new(QueueLimits::NONE, vec![policy()]);
        let mut members = Vec::new();
        let mut sent = 0;
        let mut now = Moment(0);
        let mut admit = |scheduler: &mut Scheduler, now: Moment| {
            let len = lens[sent % lens.len()];
            sent += 1;
            let deadline = Some(now + Duration::from_secs(10));
            let arrival = Arrival { model: MODEL, rows: 1, len, bytes: 4 * u64::from(len), deadline, compose: None };
            scheduler.handle_arrival(now, arrival).expect("no bounds");
        };
        for _ in 0..waiting {
            now = now + Duration::from_micros(1);
            admit(&mut scheduler, now);
        }
        now = now + Duration::from_secs(1);
        group.bench_function(BenchmarkId::new("admit_to_finish", waiting), |b| {
            b.iter_custom(|requests| {
                let start = WallTime.start();
                let mut done = 0;
                while done < requests {
                    now = now + Duration::from_micros(1000);
                    let batch = scheduler
                        .poll_batch(now, Group::Executors, Vacancy::Idle, &mut members)
                        .expect("somebody has waited for longer than the window");
                    scheduler.handle_finished(MODEL, batch.cells_padded(), Duration::from_micros(900));
                    for _ in 0..batch.rows {
                        admit(&mut scheduler, now);
                    }
                    scheduler.poll_timeout(|_| false);
                    done += u64::from(batch.rows);
                }
                // The last batch may have had more rows than were asked for.
                WallTime.end(start).mul_f64(requests as f64 / done as f64)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, admit_to_finish);
criterion_main!(benches);
