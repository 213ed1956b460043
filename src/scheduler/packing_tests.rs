//! The promises of the policy `cost`, and its shortcuts against the plain way.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::scheduler::cost::{self, Coefficients, CostModel};
use crate::scheduler::decision::{Decision, Verdict};
use crate::scheduler::{
    Arrival, Buckets, Expired, Group, PadTo, QueueLimits, Scheduler, SealedBatch, SeatSpec, TenantId,
};
use crate::scheduler::{PolicyKind, seats::Running};
use crate::vocab::{Code, ModelHandle, Stage};

#[path = "doubt_tests.rs"]
mod doubt;

const MODEL: ModelHandle = ModelHandle(0);
const MS: Duration = Duration::from_millis(1);
const TIMES: Coefficients = Coefficients { batch: 1_000_000.0, cell: 10_000.0, square: 0.0 };

fn policy() -> Policy {
    Policy { pad_to: PadTo::Longest, slo: MS * 50, ..Policy::new(16, 2048, Buckets::geometric(256)) }
}

/// A scheduler that has learned [`TIMES`], and its executors in virtual time.
struct Rig {
    scheduler: Scheduler,
    now: Moment,
    members: Vec<TicketId>,
}

impl Rig {
    fn new(policies: Vec<Policy>, executors: usize) -> Rig {
        let models = policies.len();
        let seats = SeatSpec::separate(Group::Executors, executors, 1);
        let mut scheduler = Scheduler::new(QueueLimits::NONE, policies, &seats);
        for model in 0..models {
            for (rows, len) in [(1, 16), (1, 256), (16, 16), (8, 256), (4, 64)].into_iter().cycle().take(60) {
                scheduler.prime(ModelHandle(model as u16), rows, len, time(rows, len));
            }
        }
        Rig { scheduler, now: Moment(1_000_000), members: Vec::new() }
    }

    fn arrive(&mut self, len: u32, slack: Duration) -> TicketId {
        self.arrive_as(Arrival { deadline: Some(self.now + slack), ..request(len) })
    }

    fn arrive_as(&mut self, arrival: Arrival) -> TicketId {
        self.scheduler.handle_arrival(self.now, arrival).expect("it is admitted")
    }

    fn poll(&mut self) -> Option<SealedBatch> {
        self.scheduler.poll_batch(self.now, &mut self.members)
    }

    fn finish(&mut self, batch: &SealedBatch) {
        let took = Duration::from_nanos(TIMES.work_time(batch.work()) as u64);
        self.now = self.now + took;
        self.scheduler.handle_finished(self.now, batch, took);
    }

    fn expired(&mut self) -> Vec<Expired> {
        std::iter::from_fn(|| self.scheduler.poll_expired(self.now)).collect()
    }
}

fn request(len: u32) -> Arrival {
    Arrival {
        model: MODEL,
        rows: 1,
        len,
        bytes: 4,
        deadline: None,
        compose: None,
        class: Class::default(),
        tenant: TenantId::default(),
    }
}

fn time(rows: u32, len: u32) -> Duration {
    Duration::from_nanos(TIMES.batch_time(rows, len) as u64)
}

/// A batch of this model ran, as the scheduler is told of it.
fn ran(scheduler: &mut Scheduler, now: Moment, model: ModelHandle, rows: u32, service: Duration) {
    let batch = SealedBatch {
        id: u64::MAX,
        model,
        executor: 0,
        rows,
        rows_possible: rows,
        layout: Layout::Padded,
        squares_real: 0,
        padded_len: 16,
        cells_real: 16,
        reason: SealReason::Full,
        sealed_at: now,
        generation: 1,
        predicted: 0,
        objective: Duration::ZERO,
    };
    let running =
        Running { batch: batch.id, model, sealed_at: now, started: now, predicted: 0.0, until: now, promised: now };
    scheduler.seats.seats[0].running.push(running);
    scheduler.handle_finished(now, &batch, service);
}

/// How long a failure took is charged to its model, and predicts nothing.
#[test]
fn a_batch_that_failed_teaches_nothing_about_batch_times() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), ..policy() }], 1);
    let before = (rig.scheduler.cost(MODEL).observations(), rig.scheduler.cost(MODEL).predicted(4, 16));
    let (used, mean) = (rig.scheduler.models[0].used, rig.scheduler.models[0].service.mean());
    rig.arrive(16, MS * 100_000);
    let batch = rig.poll().expect("an idle executor takes it");
    rig.now = rig.now + MS * 500;
    rig.scheduler.handle_finished(rig.now, &batch, Duration::ZERO);
    let after = (rig.scheduler.cost(MODEL).observations(), rig.scheduler.cost(MODEL).predicted(4, 16));
    assert_eq!(after, before);
    assert_eq!(rig.scheduler.models[0].service.mean(), mean);
    let charged = (rig.scheduler.models[0].used - used) * rig.scheduler.policy(MODEL).weight;
    assert!((charged - 500e6).abs() < 1.0, "half a second of an executor, charged {charged} ns");
    assert_eq!(rig.scheduler.running(), 0);
}

#[test]
fn rows_of_one_length_share_a_batch_and_others_are_looked_past() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), ..policy() }], 1);
    let long = rig.arrive(250, MS * 1000);
    let short: Vec<_> = (0..10).map(|_| rig.arrive(16, MS * 1000)).collect();
    let first = rig.poll().expect("rows wait");
    let taken = rig.members.clone();
    rig.finish(&first);
    let second = rig.poll().expect("rows wait");
    let mut batches = [(first.padded_len, taken), (second.padded_len, rig.members.clone())];
    batches.sort();
    assert_eq!(batches[0], (16, short));
    assert_eq!(batches[1], (250, vec![long]));
}

#[test]
fn an_explicit_window_holds_exactly_so_long_and_a_full_batch_not_at_all() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 3), ..policy() }], 1);
    rig.arrive(16, MS * 1000);
    rig.now = rig.now + MS;
    rig.arrive(200, MS * 1000);
    assert_eq!(rig.poll(), None);
    let due = rig.scheduler.poll_timeout(rig.now).expect("the window ends");
    assert_eq!(due, Moment(1_000_000) + MS * 3, "from the oldest row");
    rig.now = due - Duration::from_nanos(1);
    assert_eq!(rig.poll(), None);
    rig.now = due;
    assert_eq!(rig.poll().expect("its window is over").reason, SealReason::QueueDelay);

    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 3), ..policy() }], 1);
    for _ in 0..16 {
        rig.arrive(16, MS * 1000);
    }
    assert_eq!(rig.poll().expect("sixteen rows").reason, SealReason::Full);
}

#[test]
fn a_window_ends_early_for_a_deadline_even_behind_older_rows() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(MS * 100), ..policy() }], 1);
    rig.arrive(16, MS * 1000);
    let pressed = rig.arrive(16, MS * 20);
    assert_eq!(rig.poll(), None);
    let due = rig.scheduler.poll_timeout(rig.now).expect("a deadline");
    assert!(due + time(2, 16) <= rig.now + MS * 20 && due > rig.now + MS * 10, "{due:?}");
    rig.now = due;
    rig.poll().expect("the deadline presses");
    assert!(rig.members.contains(&pressed));
}

#[test]
fn without_a_window_rows_are_held_only_while_more_are_expected_soon() {
    let mut rig = Rig::new(vec![policy()], 1);
    // One every 100 µs: a batch's fixed millisecond pays for a few of them.
    for _ in 0..3 {
        rig.arrive(16, MS * 1000);
        rig.now = rig.now + Duration::from_micros(100);
    }
    assert_eq!(rig.poll(), None);
    let until = rig.scheduler.poll_timeout(rig.now).expect("it is held for a while");
    assert!(until < rig.now + MS, "{until:?}");
    rig.now = until;
    assert_eq!(rig.poll().expect("nobody came").reason, SealReason::Economic);
}

/// Until a batch with one more row would be too late by what may be wrong with the prediction, and by what a wake-up takes.
#[test]
fn a_window_ends_when_one_more_row_would_make_the_soonest_late() {
    for layout in [Layout::Padded, Layout::Packed] {
        let policy = Policy { queue_delay_max: Some(MS * 100), layout, can_pack: true, ..policy() };
        let mut rig = Rig::new(vec![policy], 1);
        rig.arrive(16, MS * 20);
        rig.arrive(16, MS * 30);
        assert_eq!(rig.poll(), None);
        let until = rig.scheduler.poll_timeout(rig.now).expect("a deadline");
        let grown = rig.scheduler.cost(MODEL).predict(3, 16) * (1.0 + rig.scheduler.cost(MODEL).margin());
        let expected = rig.now + MS * 20 - Duration::from_nanos(grown as u64) - WAKE_MARGIN;
        let apart = until.since(expected).max(expected.since(until));
        // A bucket's longest row stands for all of it where they lie end to end.
        assert!(apart < Duration::from_micros(20), "{layout:?}: {until:?}, expected {expected:?}");
    }
}

/// With the fixed millisecond shared by those who wait: so long may the next row be on its way.
#[test]
fn holding_ends_when_the_next_row_is_worth_less_than_the_wait() {
    let held = |hold: &str| {
        let mut rig = Rig::new(vec![policy().with([("hold", hold)]).expect("a knob")], 1);
        for _ in 0..3 {
            rig.arrive(16, MS * 1000);
            rig.now = rig.now + Duration::from_micros(100);
        }
        let last = rig.now - Duration::from_micros(100);
        match rig.poll() {
            None => Some(rig.scheduler.poll_timeout(rig.now).expect("it is held for a while").since(last)),
            Some(_) => None,
        }
    };
    let fixed = Rig::new(vec![policy()], 1).scheduler.cost(MODEL).coefficients().batch;
    for (hold, share) in [("1", 1.0), ("2", 2.0)] {
        let wait = held(hold).expect("more are expected within it").as_nanos() as f64;
        assert!(near(wait, share * fixed / 4.0), "hold {hold}: {wait} ns");
    }
    assert_eq!(
        held("0.3"),
        None,
        "four rows a hundred microseconds apart cost more than three tenths of a millisecond"
    );
    assert_eq!(held("0"), None);
}

#[test]
fn what_cannot_be_done_in_time_is_said_at_the_door_and_later_given_up() {
    let mut rig = Rig::new(vec![policy()], 1);
    rig.arrive(16, MS * 1000);
    let refusal = rig
        .scheduler
        .handle_arrival(rig.now, Arrival { deadline: Some(rig.now + MS * 2), ..request(256) })
        .expect_err("3.6 ms of work");
    assert_eq!((refusal.code, refusal.stage), (Code::DeadlineExceeded, Stage::Arrival));
    assert!(refusal.message.contains("2.0 ms are left") && refusal.message.contains("3.6 ms"), "{}", refusal.message);

    let lost = rig.arrive(256, MS * 5);
    rig.now = rig.now + MS * 2;
    rig.poll().expect("the other one");
    assert_eq!(rig.expired(), [Expired::Hopeless(lost)]);
}

#[test]
fn nobody_is_given_up_for_predictions_that_are_mostly_wrong() {
    let seats = SeatSpec::separate(Group::Executors, 1, 1);
    let mut scheduler = Scheduler::new(QueueLimits::NONE, vec![policy()], &seats);
    for took in [MS, MS * 800].into_iter().cycle().take(100) {
        scheduler.prime(MODEL, 1, 16, took);
    }
    let mut rig = Rig { scheduler, now: Moment(1), members: Vec::new() };
    let first = rig.arrive(16, MS * 20);
    let second = rig.arrive(16, MS * 20);
    let batch = rig.poll().expect("rows wait");
    let mut taken = rig.members.clone();
    if batch.rows == 1 {
        rig.finish(&batch);
        rig.poll().expect("the other");
        taken.extend(&rig.members);
    }
    assert_eq!(rig.expired(), []);
    assert!(taken.contains(&first) && taken.contains(&second));
}

#[test]
fn a_prediction_that_is_wrong_cannot_starve_a_model() {
    // Everything once took a hundred times as long.
    let seats = SeatSpec::separate(Group::Executors, 1, 1);
    let mut scheduler = Scheduler::new(QueueLimits::NONE, vec![policy()], &seats);
    for _ in 0..100 {
        scheduler.prime(MODEL, 1, 16, time(1, 16) * 100);
    }
    let mut rig = Rig { scheduler, now: Moment(1), members: Vec::new() };
    let mut served = 0;
    for _ in 0..300 {
        let deadline = Some(rig.now + MS * 20);
        let _ = rig.scheduler.handle_arrival(rig.now, Arrival { deadline, ..request(16) });
        if let Some(batch) = rig.poll() {
            rig.finish(&batch);
            served += 1;
        }
        rig.expired();
        rig.now = rig.now + MS * 5;
    }
    assert!(served > 200, "{served} of 300 were tried");
}

#[test]
fn the_highest_class_goes_first_and_the_lowest_is_not_starved() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), ..policy() }], 1);
    let low = rig.arrive_as(Arrival { class: Class::from_priority(9), ..request(16) });
    let mut rounds = 0;
    loop {
        // More of the highest class than a batch holds, all the time.
        for _ in 0..20 {
            rig.arrive_as(request(16));
        }
        let batch = rig.poll().expect("rows wait");
        if rig.members.contains(&low) {
            break;
        }
        rig.finish(&batch);
        rounds += 1;
        assert!(rounds < 1000, "the lowest class waits for ever");
    }
    assert!(rounds >= 1, "twenty of the highest class were before it");
    let waited = rig.now.since(Moment(1_000_000));
    // Ten slacks, and then the next batch.
    assert!(waited <= MS * 50 * 10 + MS * 20, "{waited:?}");
}

#[test]
fn tenants_share_by_padded_cells_whatever_they_send() {
    let mut rig = Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), ..policy() }], 1);
    let mut cells = [0u64; 2];
    let mut tenant_of = std::collections::BTreeMap::new();
    let mut batches = 0;
    // The first sends ten times as much; both always have something waiting.
    for _ in 0..300 {
        for (tenant, rows) in [(0u16, 40), (1, 4)] {
            for _ in 0..rows {
                let waiting = rig.scheduler.models[0].tenants.waiting(TenantId(tenant));
                if waiting < 16 * 200 {
                    let id = rig.arrive_as(Arrival { tenant: TenantId(tenant), ..request(16) });
                    tenant_of.insert(id, tenant);
                }
            }
        }
        while rig.scheduler.models[0].tenants.active() == 2
            && let Some(batch) = rig.poll()
        {
            batches += 1;
            for id in &rig.members {
                cells[usize::from(tenant_of[id])] += u64::from(batch.padded_len);
            }
            rig.finish(&batch);
            if batches % 2 == 0 {
                break;
            }
        }
    }
    let share = cells[1] as f64 / (cells[0] + cells[1]) as f64;
    // The second sends four rows for every two batches of sixteen: it gets all of them at once.
    assert!(share > 0.12, "the small tenant got {share} of the cells");
}

#[test]
fn the_tenant_that_fills_the_queue_is_refused_first() {
    let mut rig = Rig::new(vec![policy()], 1);
    ran(&mut rig.scheduler, rig.now, MODEL, 16, time(16, 16));
    for _ in 0..5000 {
        let _ = rig.scheduler.handle_arrival(
            rig.now,
            Arrival { tenant: TenantId(7), deadline: Some(rig.now + MS * 100), ..request(16) },
        );
    }
    let one = |tenant: u16| Arrival { tenant: TenantId(tenant), deadline: Some(rig.now + MS * 100), ..request(16) };
    let (small, big) = (one(3), one(7));
    assert!(rig.scheduler.handle_arrival(rig.now, small).is_ok());
    let refusal = rig.scheduler.handle_arrival(rig.now, big).expect_err("it has all of the queue");
    // A request of the small one that is larger than anything else does not make it the one that fills the queue.
    let long = Arrival { rows: 8, len: 256, ..small };
    assert!(rig.scheduler.handle_arrival(rig.now, long).is_ok());
    assert_eq!(refusal.code, Code::Overloaded);
    assert!(refusal.retry_after_ms > 0);
}

#[test]
fn a_batch_that_takes_longer_than_any_slack_is_not_made_small_for_it() {
    for slack in [None, Some(MS * 900)] {
        let slow = Policy { queue_delay_max: Some(Duration::ZERO), slo: MS * 100, ..policy() };
        let seats = SeatSpec::separate(Group::Executors, 1, 1);
        let mut scheduler = Scheduler::new(QueueLimits::NONE, vec![slow], &seats);
        for rows in (1..=16).cycle().take(64) {
            scheduler.prime(MODEL, rows, 16, MS * 800 + MS / 100 * rows);
        }
        let mut rig = Rig { scheduler, now: Moment(1), members: Vec::new() };
        for _ in 0..10 {
            rig.arrive_as(Arrival { deadline: slack.map(|slack| rig.now + slack), ..request(16) });
        }
        assert_eq!(rig.poll().expect("rows wait").rows, 10, "{slack:?}");
    }
}

#[test]
fn a_slow_model_leaves_an_executor_to_a_fast_one() {
    let policy = || Policy { queue_delay_max: Some(Duration::ZERO), ..policy() };
    let mut rig = Rig::new(vec![policy(), policy()], 2);
    let (slow, fast) = (ModelHandle(0), ModelHandle(1));
    ran(&mut rig.scheduler, rig.now, slow, 1, MS * 800);
    ran(&mut rig.scheduler, rig.now, fast, 1, MS);
    rig.arrive_as(Arrival { model: fast, ..request(16) });
    let batch = rig.poll().expect("two executors are idle");
    assert_eq!(batch.model, fast);
    for _ in 0..4 {
        rig.arrive_as(Arrival { model: slow, rows: 16, ..request(16) });
    }
    assert_eq!(rig.poll().expect("one executor is idle").model, slow);
    rig.finish(&batch);
    // The fast one has nothing waiting, but was here a moment ago.
    assert_eq!(rig.poll(), None);
    rig.arrive_as(Arrival { model: fast, ..request(16) });
    let batch = rig.poll().expect("an executor was kept for it");
    assert_eq!(batch.model, fast);
    // Left alone, the slow one may have both.
    rig.now = rig.now + Duration::from_secs(10);
    rig.scheduler.handle_finished(rig.now, &batch, MS);
    assert_eq!(rig.poll().expect("nobody else is here").model, slow);
}

#[test]
fn a_slow_model_holds_as_many_executors_as_its_weight_says_beside_a_fast_one() {
    for (executors, weight, share) in [(4, 1.0, 2), (6, 2.0, 4), (6, 0.5, 2), (3, 9.0, 2)] {
        let policy = |weight| Policy { queue_delay_max: Some(Duration::ZERO), weight, ..policy() };
        let mut rig = Rig::new(vec![policy(weight), policy(1.0)], executors);
        let (slow, fast) = (ModelHandle(0), ModelHandle(1));
        ran(&mut rig.scheduler, rig.now, slow, 1, MS * 800);
        ran(&mut rig.scheduler, rig.now, fast, 1, MS);
        rig.arrive_as(Arrival { model: fast, ..request(16) });
        let batch = rig.poll().expect("all are idle");
        rig.finish(&batch);
        for _ in 0..2 * executors {
            rig.arrive_as(Arrival { model: slow, rows: 16, ..request(16) });
        }
        let given = std::iter::from_fn(|| rig.poll()).count();
        assert_eq!(given, share, "of {executors} executors, {weight} to 1");
    }
}

#[test]
fn policies_change_while_rows_wait_and_none_is_lost() {
    let mut rig = Rig::new(vec![policy()], 1);
    let mut waiting: Vec<TicketId> = (0..120).map(|n| rig.arrive(1 + n * 2, MS * 10_000)).collect();
    for (turn, kind) in PolicyKind::ALL.into_iter().cycle().take(7).enumerate() {
        let buckets = if turn % 2 == 0 { Buckets::new(&[64, 256]).expect("two") } else { Buckets::geometric(256) };
        let window = Some(Duration::ZERO);
        let changed = Policy { kind, buckets, queue_delay_max: window, ..policy() };
        let generation = rig.scheduler.set_policy(MODEL, changed).expect("everybody still fits");
        assert_eq!(generation, turn as u32 + 2);
        let batch = rig.poll().expect("rows wait");
        for id in rig.members.clone() {
            let at = waiting.iter().position(|waits| *waits == id).expect("it waits, and once");
            waiting.swap_remove(at);
        }
        rig.finish(&batch);
        assert_eq!(rig.scheduler.waiting(MODEL).0, waiting.len() as u64);
    }
    assert!(waiting.len() < 100, "batches went out meanwhile");
    let too_short = Policy { buckets: Buckets::geometric(8), ..policy() };
    let refusal = rig.scheduler.set_policy(MODEL, too_short).expect_err("longer rows wait");
    assert_eq!(refusal.code, Code::Overloaded);
}

/// Cells as random queues have them: ascending in cost.
fn cells() -> impl Strategy<Value = Vec<Cell>> {
    let one = (1..80u32, 0.01..1.0f64, 0.1..8.0f64, 1..40u32);
    prop::collection::vec(one, 1..9).prop_map(|list| {
        let (mut row, mut densest, mut room) = (0.0, 0.0f64, 1000.0f64);
        let mut cells = Vec::new();
        for (at, (rows, worth, step, shrink)) in list.into_iter().enumerate() {
            row += step * 50_000.0;
            room = (room / (1.0 + f64::from(shrink) / 20.0)).max(1.0).floor();
            let worth = worth * f64::from(rows) * row;
            densest = densest.max(worth / f64::from(rows));
            let rows = f64::from(rows);
            cells.push(Cell { bucket: at as u16, rows, row, credit: row, worth, densest, room, due: Moment::FAR });
        }
        cells
    })
}

/// A queue whose cells are given: enough for the choices between ranges.
fn with_cells<T>(cells: Vec<Cell>, sharing: f64, ask: impl FnOnce(&mut Queue<'_>, &Outlook) -> T) -> T {
    let mut cost = CostModel::default();
    for (rows, len) in [(1, 16), (1, 256), (16, 16), (8, 256), (4, 64)].into_iter().cycle().take(60) {
        cost.observe(rows, len, time(rows, len), true);
    }
    let policy = policy();
    let mut packer = Packer { cells, ..Packer::new(64) };
    let (mut lanes, mut tickets) = (Lanes::new(policy.buckets.len(), true), Tickets::new(8));
    let (due, mut shed) = (Due::default(), Vec::new());
    let outlook = Outlook {
        now: Moment(1),
        start: Moment(1),
        device_free: Moment::ZERO,
        executors: 1.0,
        sharing,
        others_idle: false,
        overrun: 1.0,
        draining: false,
    };
    let mut queue = Queue {
        packer: &mut packer,
        lanes: &mut lanes,
        tickets: &mut tickets,
        due: &due,
        policy: &policy,
        cost: cost.on(0),
        shed: &mut shed,
    };
    ask(&mut queue, &outlook)
}

/// Time of all rows of a range.
fn whole_range(cells: &[Cell], fixed: f64, sharing: f64) -> f64 {
    let last = cells.last().expect("a range holds cells");
    let rows: f64 = cells.iter().map(|cell| cell.rows).sum();
    let run = rows * last.row;
    run.max((fixed * (rows / last.room).ceil() + run) / sharing)
}

proptest! {
    #[test]
    fn the_partition_is_the_cheapest_of_all(cells in cells(), shared in any::<bool>()) {
        let sharing = if shared { 2.0 } else { 1.0 };
        let fixed = with_cells(Vec::new(), sharing, |queue, _| queue.cost.coefficients().batch);
        let found: f64 = with_cells(cells.clone(), sharing, |queue, outlook| {
            queue.partition(outlook);
            queue.packer.parts.iter().map(|(_, part)| part.occupancy).sum()
        });
        // Every way to cut the list.
        let best = (0..1u32 << (cells.len() - 1))
            .map(|cuts| {
                let (mut total, mut begin) = (0.0, 0);
                for end in 1..=cells.len() {
                    if end == cells.len() || cuts & (1 << (end - 1)) != 0 {
                        total += whole_range(&cells[begin..end], fixed, sharing);
                        begin = end;
                    }
                }
                total
            })
            .fold(f64::INFINITY, f64::min);
        prop_assert!((found / best - 1.0).abs() < 1e-9, "{found} instead of {best}");
    }

    #[test]
    fn the_best_range_is_the_best_of_all(cells in cells(), shared in any::<bool>()) {
        let sharing = if shared { 2.0 } else { 1.0 };
        let fixed = with_cells(Vec::new(), sharing, |queue, _| queue.cost.coefficients().batch);
        let found = with_cells(cells.clone(), sharing, |queue, outlook| queue.best(outlook));
        let worth_per_time = |first: usize, last: usize| {
            let (mut rows, mut worth) = (0.0, 0.0);
            for cell in cells[first..=last].iter().rev() {
                let take = cell.rows.min(cells[last].room - rows);
                rows += take;
                worth += cell.worth * take / cell.rows;
            }
            let run = rows * cells[last].row;
            worth / run.max((fixed + run) / sharing)
        };
        let best = (0..cells.len())
            .flat_map(|last| (0..=last).map(move |first| (first, last)))
            .map(|(first, last)| worth_per_time(first, last))
            .fold(0.0, f64::max);
        let mine = worth_per_time(found.first, found.last);
        prop_assert!((mine / best - 1.0).abs() < 1e-9, "{mine} instead of {best}");
    }
}

fn packed(cells_max: u64) -> Policy {
    let layout = Layout::Packed;
    Policy { layout, can_pack: true, cells_max, queue_delay_max: Some(Duration::ZERO), ..policy() }
}

#[test]
fn end_to_end_rows_of_all_lengths_share_a_batch_up_to_their_own_cells() {
    let mut rig = Rig::new(vec![packed(300)], 1);
    // 250 + 16 + 16 fit 300 cells; padded they would be 750. The fourth does not.
    let mut all = Vec::new();
    for len in [250, 16, 16, 30] {
        rig.now = rig.now + MS;
        all.push(rig.arrive(len, MS * 1000));
    }
    let first = rig.poll().expect("rows wait");
    assert_eq!(rig.members, all[..3]);
    assert_eq!((first.rows, first.padded_len, first.cells_padded(), first.cells_real), (3, 250, 282, 282));
    assert_eq!(first.work(), cost::Work { rows: 3, cells: 282, squares: 250 * 250 + 2 * 16 * 16 });
    rig.finish(&first);
    rig.poll().expect("a row waits");
    assert_eq!(rig.members, all[3..]);
}

#[test]
fn end_to_end_the_soonest_deadlines_go_first_and_rows_that_do_not_fit_are_looked_past() {
    let mut rig = Rig::new(vec![packed(256)], 1);
    let late = rig.arrive(200, MS * 900);
    let soon = rig.arrive(200, MS * 300);
    let short = rig.arrive(50, MS * 950);
    rig.poll().expect("rows wait");
    assert_eq!(rig.members, [soon, short], "{late:?} fits no more beside them");
}

#[test]
fn end_to_end_rows_without_deadlines_go_in_the_order_they_came() {
    let mut rig = Rig::new(vec![packed(256)], 1);
    let mut all = Vec::new();
    for len in [60, 250, 20, 90, 8, 128, 31] {
        rig.now = rig.now + MS;
        all.push(rig.arrive_as(request(len)));
    }
    let mut order = Vec::new();
    while let Some(batch) = rig.poll() {
        order.extend_from_slice(&rig.members);
        rig.finish(&batch);
    }
    // Each is at most one batch behind its turn: a batch looks past what does not fit it.
    assert_eq!(order, [0, 2, 3, 4, 6, 1, 5].map(|at| all[at]));
}

#[test]
fn end_to_end_a_batch_is_cut_for_a_deadline_it_would_miss() {
    // 1 ms and 10 µs a cell: 1,000 cells take 11 ms, and the one with 6 ms left can share at most about 450.
    let mut rig = Rig::new(vec![Policy { rows_max: 64, ..packed(1000) }], 1);
    for _ in 0..20 {
        rig.arrive(50, MS * 1000);
    }
    let urgent = rig.arrive(50, MS * 6);
    let batch = rig.poll().expect("rows wait");
    assert!(rig.members.contains(&urgent));
    assert!((250..=500).contains(&batch.cells_real), "{batch:?}");
    assert_eq!(batch.reason, SealReason::Urgent);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Goal: all is served, in budget, and classes go before one another. Method: random rows, one executor, until empty.
    #[test]
    fn end_to_end_batches_keep_their_budgets_and_serve_everybody(
        rows in prop::collection::vec((1..256u32, 1..5u32, 0..3u8, any::<bool>()), 1..80),
        cells_max in 256..2000u64,
        rows_max in 4..40u32,
    ) {
        let mut rig = Rig::new(vec![Policy { rows_max, ..packed(cells_max.max(1024)) }], 1);
        let mut waiting = 0;
        for (len, count, priority, hurried) in rows {
            let class = Class::from_priority(priority);
            let deadline = hurried.then_some(rig.now + MS * 100_000);
            rig.arrive_as(Arrival { rows: count, class, deadline, ..request(len) });
            waiting += count;
        }
        while let Some(batch) = rig.poll() {
            prop_assert!(batch.rows <= rows_max && batch.cells_real <= cells_max.max(1024));
            prop_assert!(batch.rows <= batch.rows_possible);
            waiting -= batch.rows;
            rig.finish(&batch);
            prop_assert!(rig.scheduler.audit().is_ok());
        }
        prop_assert_eq!(waiting, 0);
    }
}

/// Of the decision log.
fn last_decision(rig: &Rig) -> Decision {
    *rig.scheduler.log().last(1).next().expect("something was decided")
}

fn about(nanos: u64, expected: Duration) -> bool {
    (nanos as f64 / expected.as_nanos() as f64 - 1.0).abs() < 0.05
}

#[test]
fn who_was_refused_or_given_up_is_written_down_with_the_time_it_would_have_taken() {
    let mut rig = Rig::new(vec![policy()], 1);
    rig.arrive(16, MS * 1000);
    let pressed = Arrival { deadline: Some(rig.now + MS * 2), ..request(256) };
    rig.scheduler.handle_arrival(rig.now, pressed).expect_err("3.6 ms of work");
    let refused = last_decision(&rig);
    assert_eq!((refused.verdict, refused.batch, refused.rows, refused.waiting), (Verdict::Refused, 256, 1, 1));
    assert!(about(refused.predicted, time(1, 256)), "{refused:?}");

    let lost = rig.arrive(256, MS * 5);
    rig.now = rig.now + MS * 2;
    rig.poll().expect("the other one");
    assert_eq!(rig.expired(), [Expired::Hopeless(lost)]);
    let shed = last_decision(&rig);
    assert_eq!((shed.verdict, shed.batch, shed.rows, shed.at), (Verdict::Shed, 256, 1, rig.now));
    assert!(about(shed.predicted, time(1, 256)), "{shed:?}");
    assert_eq!(rig.scheduler.verdicts(MODEL).shed, 1);
}

#[test]
fn rows_that_are_held_are_written_down_once_with_how_long() {
    let mut rig = Rig::new(vec![policy()], 1);
    for _ in 0..3 {
        rig.arrive(16, MS * 1000);
        rig.now = rig.now + Duration::from_micros(100);
    }
    assert_eq!(rig.poll(), None);
    let until = rig.scheduler.poll_timeout(rig.now).expect("it is held for a while");
    let held = last_decision(&rig);
    assert_eq!((held.verdict, held.waiting, held.batch, held.rows), (Verdict::Held, 3, 0, 0));
    assert_eq!(held.predicted, until.since(rig.now).as_nanos() as u64);
    assert_eq!(rig.poll(), None);
    assert_eq!(rig.scheduler.verdicts(MODEL).held, 1, "the same hold, looked at again");
}

#[test]
fn a_sealed_batch_is_written_down_with_what_it_was_expected_to_be() {
    let mut rig =
        Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), pad_to: PadTo::Bucket, ..policy() }], 2);
    for len in [61, 61, 63, 63] {
        rig.arrive(len, MS * 1000);
    }
    let first = rig.poll().expect("rows wait");
    rig.arrive(61, MS * 1000);
    let second = rig.poll().expect("rows wait");
    assert_eq!((first.executor, second.executor), (0, 1));
    let [one, two]: [Decision; 2] =
        rig.scheduler.log().last(2).copied().collect::<Vec<_>>().try_into().expect("two batches");
    for (batch, decision) in [(first, one), (second, two)] {
        assert_eq!(decision.verdict, Verdict::Sealed(batch.reason));
        assert_eq!((decision.executor, decision.batch, decision.rows), (batch.executor, batch.id, batch.rows));
        assert_eq!((decision.padded_len, decision.rows_possible), (64, 16));
        assert_eq!((decision.shortest, decision.generation), (64, 1));
        assert!(about(decision.predicted, time(batch.rows, 64)), "{decision:?}");
        assert_eq!(decision.predicted, batch.predicted);
        // Work on rows, and their half of the batch's fixed cost, over all that the batch takes.
        let (run, fixed) = (f64::from(batch.rows) * TIMES.row(64), TIMES.batch);
        let efficiency = f64::from(decision.efficiency);
        assert!(efficiency > 0.95 * run / (fixed + run), "{decision:?}");
        assert_eq!(decision.best_efficiency, decision.efficiency, "no deadline pressed");
    }
    assert!((f64::from(one.padding) - (1.0 - 248.0 / 256.0)).abs() < 1e-6, "{one:?}");
    assert_eq!((one.waiting, two.waiting), (4, 1));
}

/// Goal: what a model did not use while it rested is not owed to it.
/// Method: one model runs alone for long; then another asks for one long batch after the other.
#[test]
fn a_model_that_comes_back_from_rest_shares_the_executor_and_does_not_take_it() {
    let at_once = || Policy { queue_delay_max: Some(Duration::ZERO), ..policy() };
    let mut rig = Rig::new(vec![at_once(), at_once()], 1);
    for _ in 0..200 {
        rig.arrive_as(Arrival { rows: 16, ..request(16) });
        let batch = rig.poll().expect("a full batch waits");
        rig.finish(&batch);
    }
    let mut times = [0.0; 2];
    let long = Arrival { rows: 8, model: ModelHandle(1), ..request(256) };
    rig.arrive_as(long);
    while times[0] + times[1] < 500e6 {
        rig.arrive_as(Arrival { rows: 16, ..request(16) });
        let batch = rig.poll().expect("full batches wait");
        times[batch.model.index()] += TIMES.work_time(batch.work());
        rig.finish(&batch);
        if batch.model == long.model {
            rig.arrive_as(long);
        }
    }
    let share = times[1] / (times[0] + times[1]);
    assert!((0.45..0.55).contains(&share), "{share}");
}

#[test]
fn the_heaviest_tenant_is_refused_from_its_share_of_the_slack_on_and_told_when_that_is_over() {
    let mut rig = Rig::new(vec![policy()], 1);
    // 3.56 ms for 256 cells: 70 of 100 ms are 5,033 cells, or 314 rows of 16.
    ran(&mut rig.scheduler, rig.now, MODEL, 16, time(16, 16));
    let deadline = Some(rig.now + MS * 100);
    rig.arrive_as(Arrival { tenant: TenantId(3), deadline, ..request(16) });
    let heavy = |rows: u32, len: u32| Arrival { tenant: TenantId(7), deadline, rows, ..request(len) };
    while rig.scheduler.handle_arrival(rig.now, heavy(1, 16)).is_ok() {}
    assert_eq!(rig.scheduler.waiting(MODEL).0, 314);
    // With 2,048 cells more it is 98.3 ms to the end.
    let refusal = rig.scheduler.handle_arrival(rig.now, heavy(8, 256)).expect_err("the heaviest");
    assert!((28..=29).contains(&refusal.retry_after_ms), "{refusal:?}");
    assert!(refusal.message.contains("98.3 ms"), "{}", refusal.message);
    assert!(about(last_decision(&rig).predicted, Duration::from_micros(98_345)));
    rig.arrive_as(Arrival { tenant: TenantId(3), ..heavy(1, 16) });
}

#[test]
fn rows_of_a_batch_are_those_of_the_bucket_that_a_length_is_padded_to() {
    let rig = Rig::new(vec![policy()], 1);
    let rows = |model: u16, len: u32| rig.scheduler.rows_of_batch(ModelHandle(model), len);
    assert_eq!([rows(0, 16), rows(0, 129), rows(0, 250), rows(0, 256)], [Some(16), Some(14), Some(8), Some(8)]);
    assert_eq!([rows(0, 257), rows(1, 16)], [None, None]);
}

/// Executors on one device, which have learned [`TIMES`].
fn on_one_device(executors: usize) -> Rig {
    let policy = Policy { queue_delay_max: Some(Duration::ZERO), ..policy() };
    let seats = vec![SeatSpec { group: Group::Executors, slots: 1, device: 0 }; executors];
    let mut scheduler = Scheduler::new(QueueLimits::NONE, vec![policy], &seats);
    for (rows, len) in [(1, 16), (1, 256), (16, 16), (8, 256), (4, 64)].into_iter().cycle().take(60) {
        scheduler.prime(MODEL, rows, len, time(rows, len));
    }
    Rig { scheduler, now: Moment(1_000_000), members: Vec::new() }
}

/// Goal: the second of two batches teaches what it took from the device, not how long it stood behind the first.
/// Method: two executors of one device; the second batch is bound before the first is done, which comes back late or not.
#[test]
fn on_a_shared_device_a_batch_is_charged_the_time_since_the_one_before_it() {
    for late in [true, false] {
        let mut rig = on_one_device(2);
        rig.arrive_as(Arrival { rows: 16, ..request(64) });
        let first = rig.poll().expect("both are idle");
        rig.arrive_as(Arrival { rows: 16, ..request(64) });
        assert_eq!(rig.poll(), None, "another row may join until the device is nearly free");
        let bound_at = rig.now + time(16, 64) - MS;
        rig.now = bound_at;
        let second = rig.poll().expect("the device is nearly free");
        assert_eq!((first.executor, second.executor), (0, 1));

        rig.now = bound_at + if late { MS * 8 } else { MS / 2 };
        let took = rig.now.since(Moment(1_000_000));
        let mut expected = rig.scheduler.cost(MODEL).clone();
        rig.scheduler.handle_finished(rig.now, &first, took);
        expected.observe_on(0, first.work(), took, true);
        assert_eq!(*rig.scheduler.cost(MODEL), expected, "nothing was before the first");

        rig.now = rig.now + MS * 10;
        let took = rig.now.since(bound_at);
        rig.scheduler.handle_finished(rig.now, &second, took);
        match late {
            // The device was the first's until 8 ms after: its fixed part was hidden behind that.
            true => expected.observe_on(1, second.work(), MS * 10, false),
            false => expected.observe_on(1, second.work(), took, true),
        }
        assert_eq!(*rig.scheduler.cost(MODEL), expected, "{late}");
    }
}

/// A row of this bucket waits among the cells.
fn waiting_in(queue: &mut Queue<'_>, bucket: u16, rows: u32) -> TicketId {
    queue.tickets.insert(&Arrival { rows, ..request(1) }, bucket, 0, 1e-9, Moment(1))
}

proptest! {
    /// As the best range, but one that a certain ticket is in, and with room for it.
    #[test]
    fn the_best_range_around_a_ticket_is_the_best_of_those_that_hold_it(
        cells in cells(),
        at in any::<prop::sample::Index>(),
        ticket_rows in 1..16u32,
        shared in any::<bool>(),
    ) {
        let sharing = if shared { 2.0 } else { 1.0 };
        let with = at.index(cells.len());
        let fixed = with_cells(Vec::new(), sharing, |queue, _| queue.cost.coefficients().batch);
        let found = with_cells(cells.clone(), sharing, |queue, outlook| {
            let id = waiting_in(queue, with as u16, ticket_rows);
            queue.best_around(outlook, id)
        });
        let of = |first: usize, last: usize| {
            let room = cells[last].room.max(f64::from(ticket_rows));
            let rows: f64 = cells[first..=last].iter().map(|cell| cell.rows).sum();
            let share = (room / rows).min(1.0);
            let worth: f64 = cells[first..=last].iter().map(|cell| cell.worth * share).sum();
            let work: f64 = cells[first..=last].iter().map(|cell| cell.rows * cell.credit * share).sum();
            let run = rows * share * cells[last].row;
            (worth, rows * share, work, run.max((fixed + run) / sharing))
        };
        // What is shorter joins until the batch is full.
        let ranges = (with..cells.len()).flat_map(|last| {
            let room = cells[last].room.max(f64::from(ticket_rows));
            let cells = &cells;
            let full = (0..=with).rev().find(|first| cells[*first..=last].iter().map(|cell| cell.rows).sum::<f64>() >= room);
            (full.unwrap_or(0)..=with).map(move |first| (first, last))
        });
        let per_time = |(first, last): (usize, usize)| { let (worth, _, _, time) = of(first, last); worth / time };
        let best = ranges.map(per_time).fold(0.0, f64::max);
        let mine = per_time((found.first, found.last));
        prop_assert!((mine / best - 1.0).abs() < 1e-9, "{mine} instead of {best}");
        let (_, rows, work, occupancy) = of(found.first, found.last);
        prop_assert!((found.rows - rows.max(f64::from(ticket_rows))).abs() < 1e-6, "{found:?}: {rows} rows");
        prop_assert!((found.work / work - 1.0).abs() < 1e-9, "{found:?}: work {work}");
        prop_assert!((found.occupancy / occupancy - 1.0).abs() < 1e-9, "{found:?}: takes {occupancy}");
        prop_assert!(found.first <= with && with <= found.last);
    }

    /// What a range says of itself is what its rows are.
    #[test]
    fn the_best_range_says_what_it_takes(cells in cells(), shared in any::<bool>()) {
        let sharing = if shared { 2.0 } else { 1.0 };
        let fixed = with_cells(Vec::new(), sharing, |queue, _| queue.cost.coefficients().batch);
        let found = with_cells(cells.clone(), sharing, |queue, outlook| queue.best(outlook));
        let (mut rows, mut work) = (0.0, 0.0);
        for cell in cells[found.first..=found.last].iter().rev() {
            let take = cell.rows.min(cells[found.last].room - rows);
            rows += take;
            work += take * cell.credit;
        }
        let run = rows * cells[found.last].row;
        prop_assert!((found.rows - rows).abs() < 1e-6 && (found.work / work - 1.0).abs() < 1e-9, "{found:?}");
        prop_assert!((found.occupancy / run.max((fixed + run) / sharing) - 1.0).abs() < 1e-9, "{found:?}");
        prop_assert!((found.efficiency() - found.work / found.occupancy).abs() < 1e-12);
    }

    /// The parts hold every cell once, and each what its cells are.
    #[test]
    fn the_parts_of_a_partition_say_what_their_rows_are(cells in cells(), dues in prop::collection::vec(1..1000u64, 9)) {
        let mut cells = cells;
        cells.iter_mut().zip(&dues).for_each(|(cell, due)| cell.due = Moment(*due));
        let mut parts = with_cells(cells.clone(), 1.0, |queue, outlook| {
            queue.partition(outlook);
            queue.packer.parts.clone()
        });
        parts.reverse();
        let mut next = 0;
        for (due, part) in parts {
            prop_assert_eq!(part.first, next);
            next = part.last + 1;
            let of = &cells[part.first..next];
            let rows: f64 = of.iter().map(|cell| cell.rows).sum();
            let work: f64 = of.iter().map(|cell| cell.rows * cell.credit).sum();
            prop_assert!((part.rows - rows).abs() < 1e-6 && (part.work / work - 1.0).abs() < 1e-9, "{part:?}");
            prop_assert_eq!(Some(due), of.iter().map(|cell| cell.due).min());
        }
        prop_assert_eq!(next, cells.len());
    }
}

/// One bucket of rows that take 50 µs each.
fn one_cell(rows: f64, room: f64) -> Vec<Cell> {
    let row = 50_000.0;
    vec![Cell { bucket: 3, rows, row, credit: row, worth: rows * row, densest: row, room, due: Moment::FAR }]
}

#[test]
fn a_batch_is_made_shorter_by_as_many_rows_as_it_takes_and_by_no_more_than_all() {
    for sharing in [1.0, 2.0] {
        with_cells(one_cell(10.0, 16.0), sharing, |queue, outlook| {
            let fixed = queue.cost.coefficients().batch;
            let best = queue.best(outlook);
            let takes = |rows: f64| (rows * 50_000.0).max((fixed + rows * 50_000.0) / sharing);
            for (by, rows) in [(0.0, 10.0), (120_000.0, 7.0), (400_000.0, 2.0), (425_000.0, 1.0)] {
                let shorter = queue.shortened(outlook, &best, by).expect("a row is left");
                assert_eq!((shorter.first, shorter.last, shorter.rows), (0, 0, rows), "{by}");
                assert!((shorter.work / (rows * 50_000.0) - 1.0).abs() < 1e-9, "{shorter:?}");
                assert!((shorter.occupancy / takes(rows) - 1.0).abs() < 1e-9, "{shorter:?}");
            }
            for by in [475_000.0, 1e9] {
                assert!(queue.shortened(outlook, &best, by).is_none(), "{by}");
            }
        });
    }
}

#[test]
fn the_first_batch_of_a_part_is_what_its_longest_rows_leave_room_for() {
    for (rows, room, taken) in [(30.0, 12.0, 12.0), (9.0, 12.0, 9.0)] {
        with_cells(one_cell(rows, room), 1.0, |queue, outlook| {
            let fixed = queue.cost.coefficients().batch;
            let part = Range { first: 0, last: 0, rows, work: rows * 50_000.0, occupancy: 7.0 };
            let batch = queue.part_as_batch(outlook, part);
            assert_eq!((batch.first, batch.last, batch.rows), (0, 0, taken));
            assert!((batch.work / (taken * 50_000.0) - 1.0).abs() < 1e-9, "{batch:?}");
            assert!((batch.occupancy / (fixed + taken * 50_000.0) - 1.0).abs() < 1e-9, "{batch:?}");
        });
    }
}

#[test]
fn small_numbers_are_rounded_up_and_the_larger_of_two_is_found() {
    assert_eq!([0.0, 0.25, 1.0, 1.5, 2.0, 7.000001].map(whole), [0.0, 1.0, 1.0, 2.0, 2.0, 8.0]);
    assert_eq!((larger(2.0, -3.0), larger(-3.0, 2.0), larger(2.0, 2.0)), (2.0, 2.0, 2.0));
}

/// The queue of the rig's model, with an executor that is free now.
fn ask<T>(rig: &mut Rig, asked: impl FnOnce(&mut Queue<'_>, &Outlook) -> T) -> T {
    ask_on(rig, 0, asked)
}

fn ask_on<T>(rig: &mut Rig, executor: usize, asked: impl FnOnce(&mut Queue<'_>, &Outlook) -> T) -> T {
    let outlook = Outlook {
        now: rig.now,
        start: rig.now,
        device_free: Moment::ZERO,
        executors: 1.0,
        sharing: 1.0,
        others_idle: false,
        overrun: 1.0,
        draining: false,
    };
    let Scheduler { tickets, shed, models, .. } = &mut rig.scheduler;
    let crate::scheduler::ModelQueue { lanes, due, policy, packer, cost, .. } = &mut models[0];
    asked(&mut Queue { packer, lanes, tickets, due, policy, cost: cost.on(executor), shed }, &outlook)
}

fn near(value: f64, expected: f64) -> bool {
    (value / expected - 1.0).abs() < 0.01
}

#[test]
fn rows_are_worth_their_work_and_a_share_of_the_batch_by_class_and_age() {
    let mut rig = Rig::new(vec![policy()], 1);
    let first = Arrival { rows: 2, deadline: Some(rig.now + MS * 10), ..request(16) };
    rig.arrive_as(first);
    rig.now = rig.now + MS;
    rig.arrive_as(Arrival { class: Class::from_priority(2), ..request(16) });
    rig.arrive_as(Arrival { rows: 3, ..request(200) });
    rig.now = rig.now + MS;
    let cells = ask(&mut rig, |queue, outlook| {
        queue.fill_cells(outlook, Class::COUNT - 1);
        queue.packer.cells.clone()
    });
    assert_eq!(cells.iter().map(|cell| cell.rows).collect::<Vec<_>>(), [3.0, 3.0]);
    let [short, long] = [cells[0], cells[1]];
    // Rows of 16 take 160 µs each, those of 208 2.08 ms; half of a batch's fixed 1 ms is worth of its rows, one so far.
    for (cell, row) in [(short, 160_000.0), (long, 2_080_000.0)] {
        assert!(near(cell.row, row) && near(cell.credit, row + 500_000.0), "{cell:?}");
    }
    // Two of the highest class have waited 2 of 10 ms, one of the lowest 1 of 50; three others 1 of 50.
    let aged = 1.0 * (0.3 * 2.0 + 2.0 * 0.2) + 0.3 * (0.3 + 0.02);
    assert!(near(short.worth, 660_000.0 * aged), "{short:?}");
    assert!(near(long.worth, 2_580_000.0 * 3.0 * (0.3 + 0.02)), "{long:?}");
    assert!(near(short.densest, short.worth / 3.0) && near(long.densest, long.worth / 3.0), "{short:?} {long:?}");
    assert_eq!((short.due, long.due), (Moment(1_000_000) + MS * 10, Moment::FAR));
    assert_eq!((short.room, long.room), (16.0, 9.0));

    // Batches as long as 0.24 of the rows' mean slack, 13.6 ms: 14 rows and the fixed part.
    rig.scheduler.models[0].policy.tuning.slack_share = 0.24;
    let room = ask(&mut rig, |queue, outlook| {
        queue.fill_cells(outlook, Class::COUNT - 1);
        queue.packer.cells[0].room
    });
    assert_eq!(room, 14.0);
    // Of the highest class only.
    let cells = ask(&mut rig, |queue, outlook| {
        queue.fill_cells(outlook, 0);
        queue.packer.cells.clone()
    });
    assert_eq!(cells.iter().map(|cell| cell.rows).collect::<Vec<_>>(), [2.0, 3.0]);
    assert!(near(cells[0].worth, 660_000.0 * (0.3 * 2.0 + 2.0 * 0.2)), "{cells:?}");
}

#[test]
fn while_a_deadline_of_the_highest_class_is_in_danger_others_wait_unless_they_are_alone() {
    let lower = Arrival { class: Class::from_priority(2), ..request(16) };
    let rig = || Rig::new(vec![Policy { queue_delay_max: Some(Duration::ZERO), ..policy() }], 1);
    let mut strict = rig();
    let low = strict.arrive_as(lower);
    let high = strict.arrive_as(request(16));
    strict.scheduler.models[0].packer.strict_until = strict.now + MS * 100;
    let batch = strict.poll().expect("rows wait");
    assert_eq!(strict.members, [high]);
    strict.finish(&batch);
    strict.poll().expect("a row waits");
    assert_eq!(strict.members, [low], "nobody else is there");

    let mut over = rig();
    over.arrive_as(lower);
    over.arrive_as(request(16));
    over.scheduler.models[0].packer.strict_until = over.now;
    assert_eq!(over.poll().expect("rows wait").rows, 2);
}

#[test]
fn heads_are_given_up_while_they_are_due_before_a_moment_and_not_at_it() {
    let mut rig = Rig::new(vec![policy()], 1);
    let ids: Vec<TicketId> = [5u32, 7, 7, 9, 20].map(|slack| rig.arrive(16, MS * slack)).to_vec();
    let bucket = rig.scheduler.tickets[ids[0]].bucket;
    let at = rig.now + MS * 7;
    let left = ask(&mut rig, |queue, _| queue.give_up_before(Class::default(), bucket, at));
    assert_eq!((left, rig.scheduler.shed.as_slice()), (at, &ids[..1]));
    // Not the last that has a deadline, whatever it is.
    let left = ask(&mut rig, |queue, _| queue.give_up_before(Class::default(), bucket, Moment::FAR));
    assert_eq!((left, rig.scheduler.shed.as_slice()), (Moment(1_000_000) + MS * 20, &ids[..4]));
}

#[test]
fn a_full_batch_is_shrunk_to_the_rows_that_its_soonest_deadline_has_time_for() {
    let mut rig = Rig::new(vec![policy()], 1);
    for _ in 0..20 {
        rig.arrive(16, MS * 1000);
    }
    // Sixteen rows take 3.56 ms, 3.74 with the margin. In 3 ms: (3 ÷ 1.05 − 1) ÷ 0.16, rounded down.
    let pressed = rig.arrive(16, MS * 3);
    let batch = rig.poll().expect("rows wait");
    assert_eq!((batch.rows, batch.reason), (11, SealReason::Urgent));
    assert!(rig.members.contains(&pressed));
    let decision = last_decision(&rig);
    let ratio = f64::from(decision.efficiency) / f64::from(decision.best_efficiency);
    assert!(near(ratio, 11.0 / 16.0 * 3.56 / 2.76), "{decision:?}");
    assert_eq!(rig.expired(), []);
}

#[test]
fn end_to_end_a_batch_is_cut_to_the_cells_that_its_soonest_deadline_has_time_for() {
    let mut rig = Rig::new(vec![Policy { rows_max: 64, ..packed(1024) }], 1);
    for _ in 0..40 {
        rig.arrive(32, MS * 1000);
    }
    let pressed = rig.arrive(32, MS * 6);
    let batch = rig.poll().expect("rows wait");
    // 6 ms ÷ 1.05 − 1 are 471 cells: fourteen rows.
    assert_eq!((batch.rows, batch.cells_real, batch.reason), (14, 448, SealReason::Urgent));
    assert!(rig.members.contains(&pressed));
    let decision = last_decision(&rig);
    assert!(near(decision.efficiency.into(), 4.714 / 5.714), "{decision:?}");
    // Of 1,024 cells, all that a batch holds: 10.24 ms, and the fixed one.
    assert!(near(decision.best_efficiency.into(), 10.24 / 11.24), "{decision:?}");
    // The whole takes 11.24 ms, and 11.8 with the margin: that is what the deadline is compared with.
    for (micros, expected) in [(11_500, (31, SealReason::Urgent)), (11_900, (32, SealReason::Full))] {
        let mut rig = Rig::new(vec![Policy { rows_max: 64, ..packed(1024) }], 1);
        (0..40).for_each(|_| _ = rig.arrive(32, MS * 1000));
        rig.arrive(32, Duration::from_micros(micros));
        let batch = rig.poll().expect("rows wait");
        assert_eq!((batch.rows, batch.reason), expected, "{micros}");
    }
}

#[test]
fn end_to_end_what_waits_is_counted_in_rows_cells_and_time() {
    let mut rig = Rig::new(vec![packed(1024)], 1);
    for (len, rows) in [(16, 3), (200, 2), (64, 4)] {
        rig.arrive_as(Arrival { rows, ..request(len) });
    }
    let (rows, cells, time) = ask(&mut rig, |queue, outlook| {
        queue.fill_cells(outlook, Class::COUNT - 1);
        queue.waiting()
    });
    assert_eq!((rows, cells), (9.0, f64::from(3 * 16 + 2 * 208 + 4 * 64)));
    assert!(near(time, 10_000.0 * cells), "{time}");
}

/// Goal: the rest goes first exactly when it would miss behind the best batch what it can make alone.
/// Method: twenty rows that are the best batch, others with one deadline, which is moved across both bounds.
#[test]
fn the_rest_is_urgent_between_what_it_takes_alone_and_what_it_takes_behind_the_best_batch() {
    for executors in [1.0, 2.0] {
        for rows in [10.0, 1.0] {
            let ask = |left: f64| {
                let of = |bucket: u16, rows: f64, row: f64, due: Moment| Cell {
                    bucket,
                    rows,
                    row,
                    credit: row,
                    worth: rows * row,
                    densest: row,
                    room: 20.0,
                    due,
                };
                let due = after(Moment(1), left);
                let cells = vec![of(3, 20.0, 50_000.0, Moment::FAR), of(9, rows, 200_000.0, due)];
                with_cells(cells, 1.0, |queue, outlook| {
                    let outlook = Outlook { executors, ..*outlook };
                    let fixed = queue.cost.coefficients().batch;
                    let best = Range { first: 0, last: 0, rows: 20.0, work: 1e6, occupancy: fixed + 1e6 };
                    (queue.urgent(&outlook, &best), fixed, 1.0 + queue.cost.margin())
                })
            };
            let (none, fixed, margin) = ask(1e12);
            assert_eq!(none.map(|range| range.rows), None);
            let alone = (fixed + rows * 200_000.0) * margin;
            let behind = ((fixed + 1e6) + (fixed + rows * 200_000.0)) / executors * margin;
            let chosen = |left: f64| ask(left).0;
            for left in [alone - 1000.0, behind + 1000.0] {
                assert!(chosen(left).is_none(), "{rows} rows, {executors} executors: {left}");
            }
            for left in [alone + 1000.0, (alone + behind) / 2.0 + 7000.0, behind - 307_000.0, behind - 1000.0] {
                if left < alone || left > behind {
                    continue;
                }
                let range = chosen(left).map(|range| (range.first, range.last, range.rows));
                // One row alone is far below the best batch's efficiency: that one is made shorter instead, but not by half.
                let shorter = ((1e6 - (behind - left) / margin * executors) / 50_000.0).floor();
                let expected = match rows == 10.0 {
                    true => Some((1, 1, 10.0)),
                    false => (shorter >= 10.0).then_some((0, 0, shorter)),
                };
                assert_eq!(range, expected, "{rows} rows, {executors} executors: {left}");
            }
        }
    }
}

#[test]
fn the_pace_of_arrivals_and_the_size_of_batches_are_means_of_the_recent_ones() {
    let mut packer = Packer::new(4);
    packer.arrived(Moment(1000));
    assert_eq!(packer.gap, 0.0, "one arrival is no pace");
    packer.arrived(Moment(3000));
    assert_eq!(packer.gap, 2000.0);
    packer.arrived(Moment(9000));
    assert!(near(packer.gap, 2000.0 + 0.05 * 4000.0));
    for (rows, mean) in [(11, 2.0), (2, 2.0), (1, 1.9)] {
        packer.sealed(rows);
        assert!(near(packer.batch_rows, mean), "{}", packer.batch_rows);
    }
}

#[test]
fn a_row_is_overdue_after_so_many_slacks_and_looked_for_every_quarter_of_the_objective() {
    let mut rig = Rig::new(vec![policy()], 1);
    let arrived = rig.now;
    let id = rig.arrive(16, MS * 10);
    let mut overdue = |since: Duration| {
        rig.now = arrived + since;
        ask(&mut rig, |queue, outlook| {
            queue.fill_cells(outlook, Class::COUNT - 1);
            queue.overdue(outlook.now)
        })
    };
    // Ten slacks are 100 ms; a quarter of the objective is 12.5.
    assert_eq!(overdue(MS * 99), None);
    assert_eq!(overdue(MS * 101), None, "looked at 2 ms ago");
    assert_eq!(overdue(MS * 99 + Duration::from_micros(12_499)), None);
    assert_eq!(overdue(MS * 99 + Duration::from_micros(12_500)), Some(id));
    assert_eq!(overdue(MS * 112), Some(id), "it stays so");
}

#[test]
fn on_a_shared_device_a_batch_is_computed_when_the_device_is_free_and_its_fixed_part_is_over() {
    for (sharing, device_free, inflate) in
        [(1.0, 9_000_000, 1.0), (2.0, 9_000_000, 1.0), (2.0, 9_000_000, 1.5), (2.0, 0, 1.5)]
    {
        with_cells(Vec::new(), sharing, |queue, outlook| {
            let outlook = Outlook { start: Moment(1_000_000), device_free: Moment(device_free), sharing, ..*outlook };
            let bucket = queue.policy.buckets.of(64).expect("it fits");
            let (fixed, whole) = (queue.cost.coefficients().batch * inflate, queue.cost.predict(4, 64) * inflate);
            let begin = if sharing > 1.0 { (1e6 + fixed).max(device_free as f64) } else { 1e6 + fixed };
            let done = queue.done_at(&outlook, 4.0, bucket, inflate).nanos() as f64;
            assert!((done - (begin + whole - fixed)).abs() < 3.0, "{sharing}, {device_free}, {inflate}: {done}");
        });
    }
}

#[test]
fn a_batch_is_bound_to_a_busy_executor_shortly_before_it_is_expected_to_be_free_and_not_after() {
    let at_once = Policy { queue_delay_max: Some(Duration::ZERO), ..policy() };
    let seats = SeatSpec::separate(Group::Executors, 1, 2);
    let mut rig = Rig::new(vec![at_once.clone()], 1);
    let learned = rig.scheduler.cost(MODEL).clone();
    rig.scheduler = Scheduler::new(QueueLimits::NONE, vec![at_once], &seats);
    rig.scheduler.resume_cost(MODEL, learned);
    assert_eq!(rig.scheduler.binds_at(rig.now, 0, 0), Some(Moment::ZERO), "it is idle");
    rig.arrive_as(Arrival { rows: 16, ..request(64) });
    let running = rig.poll().expect("rows wait");
    let until = rig.scheduler.seats.seats[0].free_at();
    assert!(about(until.since(rig.now).as_nanos() as u64, time(16, 64)));
    // The fixed part is longer than that.
    let binds_at = until - Duration::from_micros(500);
    assert_eq!(rig.scheduler.binds_at(rig.now, 0, 0), Some(binds_at));
    assert_eq!(rig.scheduler.binds_at(until, 0, 0), Some(binds_at));
    rig.arrive(16, MS * 1000);
    rig.now = binds_at - Duration::from_nanos(1);
    assert_eq!(rig.poll(), None);
    assert_eq!(rig.scheduler.poll_timeout(rig.now), Some(binds_at));
    rig.now = until + Duration::from_nanos(1);
    assert_eq!(rig.scheduler.binds_at(rig.now, 0, 0), None, "nobody knows for how long");
    assert_eq!(rig.poll(), None);
    rig.scheduler.handle_finished(rig.now, &running, MS * 12);
    assert_eq!(rig.poll().expect("it is idle").rows, 1);

    let mut shared = on_one_device(2);
    shared.arrive_as(Arrival { rows: 16, ..request(64) });
    shared.poll().expect("rows wait");
    let until = shared.scheduler.seats.devices[0].free_at;
    let binds_at = shared.scheduler.binds_at(shared.now, 0, 1).expect("the device says when");
    // Its own fixed part, and a little more.
    assert!(about(until.since(binds_at).as_nanos() as u64, MS * 115 / 100), "{binds_at:?} for {until:?}");
}

#[test]
fn models_share_the_executor_by_time_and_weight_while_more_of_each_arrives() {
    for weight in [1.0, 3.0] {
        let at_once = |weight: f64| Policy { queue_delay_max: Some(Duration::ZERO), weight, ..policy() };
        let mut rig = Rig::new(vec![at_once(weight), at_once(1.0)], 1);
        let long = Arrival { rows: 8, ..request(256) };
        let short = Arrival { rows: 16, model: ModelHandle(1), ..request(16) };
        let mut times = [0.0; 2];
        for arrival in [long, short] {
            rig.arrive_as(arrival);
        }
        for _ in 0..300 {
            for arrival in [long, short] {
                rig.arrive_as(arrival);
            }
            let batch = rig.poll().expect("both wait");
            times[batch.model.index()] += TIMES.work_time(batch.work());
            rig.finish(&batch);
        }
        let share = times[0] / (times[0] + times[1]);
        assert!((share - weight / (weight + 1.0)).abs() < 0.03, "{share} with weight {weight}");
    }
}

/// The same for a rest of many batches; and the highest class goes alone for half of the time that is left.
#[test]
fn a_long_rest_is_urgent_for_all_of_its_batches_and_the_highest_class_in_it_goes_first() {
    let ask = |left: f64| {
        let due = after(Moment(1), left);
        let short = Cell { due: Moment::FAR, ..one_cell(20.0, 20.0)[0] };
        let (row, rows) = (200_000.0, 100.0);
        let long = Cell { bucket: 9, rows, row, credit: row, worth: rows * row, densest: row, room: 10.0, due };
        with_cells(vec![short, long], 1.0, |queue, outlook| {
            let fixed = queue.cost.coefficients().batch;
            let best = Range { first: 0, last: 0, rows: 20.0, work: 1e6, occupancy: fixed + 1e6 };
            let urgent = queue.urgent(outlook, &best).map(|range| (range.first, range.last, range.rows));
            let behind = ((fixed + 1e6) + (10.0 * fixed + rows * row)) * (1.0 + queue.cost.margin());
            (urgent, behind, queue.packer.strict_until, outlook.now + due.since(outlook.now) / 2)
        })
    };
    let (none, behind, strict_until, _) = ask(1e12);
    assert_eq!((none, strict_until), (None, Moment::ZERO));
    assert_eq!(ask(behind + 1000.0).0, None);
    let (urgent, _, strict_until, half_way) = ask(behind - 1000.0);
    assert_eq!((urgent, strict_until), (Some((1, 1, 10.0)), half_way));
}

#[test]
fn the_class_at_risk_is_the_highest_with_rows_in_the_range() {
    let mut rig = Rig::new(vec![policy()], 1);
    for (class, len) in [(1, 16), (2, 16), (2, 200)] {
        rig.arrive_as(Arrival { class: Class::from_priority(class), ..request(len) });
    }
    let classes = ask(&mut rig, |queue, outlook| {
        queue.fill_cells(outlook, Class::COUNT - 1);
        [(0, 0), (1, 1), (0, 1)].map(|(first, last)| queue.class_at_risk(&Range { first, last, ..Range::default() }))
    });
    assert_eq!(classes, [1, 2, 1]);
}

/// Nothing is given up on a slow executor that the fastest could do in time.
#[test]
fn done_at_best_is_as_much_sooner_as_the_fastest_executor_is_faster() {
    let mut rig = Rig::new(vec![policy()], 2);
    let cost = &mut rig.scheduler.models[0].cost;
    cost.set_executors(2);
    for _ in 0..400 {
        let work = Work::padded(8, 64);
        cost.observe_on(0, work, MS * 10, true);
        cost.observe_on(1, work, MS * 30, true);
    }
    let mut at = |executor: usize| {
        ask_on(&mut rig, executor, |queue, outlook| {
            queue.at_best(outlook, outlook.start + MS * 90).since(outlook.start)
        })
    };
    assert_eq!(at(0), MS * 90);
    let slow = at(1).as_secs_f64() * 1e3;
    assert!((slow - 30.0).abs() < 1.5, "{slow} ms: a third");
}
