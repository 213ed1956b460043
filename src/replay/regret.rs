//! Regret: how much executor time a run's batches took beside the cheapest batches of the same rows, interval by interval; and how
//! much p99 beside the least that the executors allow (tail.rs).
//!
//! Of each interval the rows of the batches that ended in it are cut into batches anew, as cheaply as the learned coefficients
//! and the policy's budgets allow. The share that this needs of what the batches as they were are expected to take is taken of
//! the time that they really took: so a machine that was slow at that moment is no regret, and nor is a wrong coefficient.
//!
//! What it is a bound of: the executor time for these rows, by whichever scheduler with the same budgets and buckets, when batches
//! take what the coefficients say. Some cheapest partition of padded rows is contiguous in length (give the batch with the longest
//! row the longest others: no batch grows), so the least is exact. Where rows lie end to end it is the fixed cost of the fewest
//! batches that could hold so many rows and cells, and the rows' own time.
//!
//! What it is not: something that a scheduler could have had. All rows of an interval are there at once and none has a deadline,
//! a class or a tenant; the rows of a request may part; and nobody waits, so it says nothing about latency. Rows of two
//! intervals never share a batch: what waiting even longer would have saved is not in it. Nor is the overlap of batches on a device
//! that several executors share.
//!
//! Always true
//! - The least of an interval is at most what was used in it. Batches that were sealed before the trace began are in neither.
//! - Held: the lengths of the rows that run, and of those of one interval.

use std::collections::VecDeque;
use std::time::Duration;

use super::tail::{self, Tail};
use crate::scheduler::cost::{Coefficients, Work};
use crate::scheduler::{Group, Policy, SealedBatch};
use crate::vocab::{Layout, Moment};

/// Length of an interval.
pub const EVERY: Duration = Duration::from_secs(1);

/// One interval, or all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    /// From the start of the trace.
    pub at: Duration,
    /// Time of the executors.
    pub used: Duration,
    pub least: Duration,
}

impl Times {
    pub fn lost(&self) -> Duration {
        self.used.saturating_sub(self.least)
    }
}

/// The regret of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Regret {
    pub total: Times,
    /// The interval in which the most was lost. `None`: nothing was, in any.
    pub worst: Option<Times>,
    /// By model; `None` where nothing was answered, or too much to look at.
    pub tails: Vec<Option<Tail>>,
}

impl Regret {
    /// Share of the used time.
    pub fn lost_share(&self) -> f64 {
        let used = self.total.used.as_secs_f64();
        if used > 0.0 { self.total.lost().as_secs_f64() / used } else { 0.0 }
    }

    fn add(&mut self, interval: Times) {
        self.total.used += interval.used;
        self.total.least += interval.least;
        if interval.lost() > self.worst.map_or(Duration::ZERO, |worst| worst.lost()) {
            self.worst = Some(interval);
        }
    }
}

/// Rows of one model that were served in the present interval, and the batches that they were served in.
#[derive(Debug, Default)]
struct Served {
    /// The policy that they are cut by, and its generation.
    policy: Option<(u32, Policy)>,
    fit: Option<Coefficients>,
    /// By row.
    lens: Vec<u32>,
    batches: u64,
    cells: u64,
    squares: u64,
    used: Duration,
    tail: Answered,
}

/// Requests that were answered, with their least times by the coefficients of then.
#[derive(Debug, Default)]
struct Answered {
    calls: Vec<tail::Call>,
    took: Vec<u64>,
    /// What their batches took, and were expected to take.
    used: f64,
    expected: f64,
    executors: u32,
}

impl Answered {
    fn add(&mut self, now: Moment, member: &Member, policy: &Policy, fit: Coefficients) {
        // One too many says that there are too many.
        if self.calls.len() > tail::CALLS_MAX {
            return;
        }
        let len = match policy.layout {
            Layout::Padded => policy.padded_len(member.len.min(policy.buckets.longest())),
            Layout::Packed => member.len,
        };
        let (rows, most) = (f64::from(member.rows), f64::from(policy.rows_at(len).max(1)));
        let (row, share) = (rows * fit.row(len), (rows / most).min(1.0));
        let (work, alone) = ((row + share * fit.batch) as u64, (row + fit.batch) as u64);
        self.calls.push(tail::Call { at: member.at, work, alone });
        self.took.push(u64::try_from(now.since(member.at).as_nanos()).unwrap_or(u64::MAX));
    }

    fn close(mut self) -> Option<Tail> {
        // Where batches were faster than the coefficients say, so could all have been.
        let pace = if self.expected > 0.0 { (self.used / self.expected).min(1.0) } else { 1.0 };
        for call in &mut self.calls {
            (call.work, call.alone) = ((call.work as f64 * pace) as u64, (call.alone as f64 * pace) as u64);
        }
        Tail::of(&mut self.calls, &mut self.took, self.executors)
    }
}

/// A request's rows in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub rows: u32,
    pub len: u32,
    /// It arrived.
    pub at: Moment,
}

impl Served {
    /// What was used since the last call, and the least. Nothing is left.
    fn settle(&mut self) -> (Duration, Duration) {
        let used = std::mem::take(&mut self.used);
        let (Some((_, policy)), Some(fit)) = (&self.policy, self.fit) else { return (used, used) };
        let as_it_was =
            self.batches as f64 * fit.batch + self.cells as f64 * fit.cell + self.squares as f64 * fit.square;
        let cheapest = cheapest(policy, fit, &mut self.lens);
        let share = if as_it_was > 0.0 { (cheapest / as_it_was).min(1.0) } else { 1.0 };
        self.lens.clear();
        (self.batches, self.cells, self.squares) = (0, 0, 0);
        (used, used.mul_f64(share))
    }
}

/// Keeps the account of a run.
#[derive(Debug)]
pub struct Account {
    every: Duration,
    begin: Moment,
    /// Number of the present interval.
    interval: u128,
    present: Times,
    /// By model.
    served: Vec<Served>,
    /// Members of each batch that runs; as many as executors hold.
    running: Vec<(u64, Vec<Member>)>,
    spare: Vec<Vec<Member>>,
    /// The group of each executor.
    executors: Vec<Group>,
    regret: Regret,
    is_off: bool,
}

impl Account {
    /// `executors`: the group of each.
    pub fn new(models: usize, executors: &[Group], begin: Moment, every: Duration) -> Account {
        Account {
            executors: executors.to_vec(),
            every: every.max(Duration::from_nanos(1)),
            begin,
            interval: 0,
            present: Times::default(),
            served: (0..models).map(|_| Served::default()).collect(),
            running: Vec::new(),
            spare: Vec::new(),
            regret: Regret::default(),
            is_off: false,
        }
    }

    /// Keeps none from here on.
    pub fn stop(&mut self) {
        self.is_off = true;
    }

    /// A batch was sealed, of these members.
    pub fn sealed(&mut self, batch: u64, members: impl Iterator<Item = Member>) {
        if self.is_off {
            return;
        }
        let mut list = self.spare.pop().unwrap_or_default();
        list.extend(members);
        self.running.push((batch, list));
    }

    /// A batch came back after `service` of its executor. Policy, its generation and the coefficients are its model's by now.
    pub fn finished(
        &mut self,
        now: Moment,
        batch: &SealedBatch,
        service: Duration,
        (generation, policy): (u32, &Policy),
        fit: Coefficients,
    ) {
        if self.is_off {
            return;
        }
        self.reach(now);
        let Some(at) = self.running.iter().position(|(id, _)| *id == batch.id) else { return };
        let (_, mut members) = self.running.swap_remove(at);
        let served = &mut self.served[batch.model.index()];
        if served.policy.as_ref().is_none_or(|(known, _)| *known != generation) {
            let (used, least) = served.settle();
            self.present.used += used;
            self.present.least += least;
            served.policy = Some((generation, policy.clone()));
        }
        served.fit = Some(fit);
        let Work { cells, squares, .. } = batch.work();
        served.batches += 1;
        served.cells += cells;
        served.squares += squares;
        served.used += service;
        let group = |executor: &&Group| **executor == policy.group;
        served.tail.executors = self.executors.iter().filter(group).count() as u32;
        served.tail.used += service.as_nanos() as f64;
        served.tail.expected += fit.work_time(batch.work());
        for member in members.drain(..) {
            served.lens.extend(std::iter::repeat_n(member.len, member.rows as usize));
            served.tail.add(now, &member, policy, fit);
        }
        self.spare.push(members);
    }

    /// Closes intervals that are over.
    fn reach(&mut self, now: Moment) {
        let interval = now.since(self.begin).as_nanos() / self.every.as_nanos();
        if interval != self.interval {
            self.close_interval();
            self.interval = interval;
        }
    }

    fn close_interval(&mut self) {
        for served in &mut self.served {
            let (used, least) = served.settle();
            self.present.used += used;
            self.present.least += least;
        }
        let nanos = self.interval * self.every.as_nanos();
        let at = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.regret.add(Times { at, ..std::mem::take(&mut self.present) });
    }

    pub fn close(mut self) -> Regret {
        self.close_interval();
        self.regret.tails = self.served.into_iter().map(|served| served.tail.close()).collect();
        self.regret
    }
}

/// Least time of batches within the policy's budgets that hold these rows, in ns.
pub fn cheapest(policy: &Policy, fit: Coefficients, lens: &mut [u32]) -> f64 {
    match policy.layout {
        Layout::Padded => cheapest_padded(policy, fit, lens),
        Layout::Packed => cheapest_packed(policy, fit, lens),
    }
}

fn cheapest_packed(policy: &Policy, fit: Coefficients, lens: &[u32]) -> f64 {
    let cells: u64 = lens.iter().map(|len| u64::from(*len)).sum();
    let by_rows = (lens.len() as u64).div_ceil(policy.rows_max.into());
    let batches = by_rows.max(cells.div_ceil(policy.cells_max));
    batches as f64 * fit.batch + lens.iter().map(|len| fit.row(*len)).sum::<f64>()
}

/// By dynamic programming over the rows in ascending order: the last batch of the first `end` rows begins behind any of those
/// that leave it room. Among rows of one padded length the best beginning is the least in a window that slides.
fn cheapest_padded(policy: &Policy, fit: Coefficients, lens: &mut [u32]) -> f64 {
    let longest = policy.buckets.longest();
    lens.iter_mut().for_each(|len| *len = policy.padded_len((*len).min(longest)));
    lens.sort_unstable();
    // Of the first rows.
    let mut best = vec![0.0; lens.len() + 1];
    // Beginnings with what they cost but for the rows behind them, which is the same for all; ascending in both.
    let mut window: VecDeque<(usize, f64)> = VecDeque::new();
    for end in 1..=lens.len() {
        let len = lens[end - 1];
        let (row, room) = (fit.row(len), policy.rows_at(len).max(1) as usize);
        let fresh = end == 1 || lens[end - 2] != len;
        let first = end.saturating_sub(room);
        if fresh {
            window.clear();
        }
        let from = if fresh { first } else { end - 1 };
        for (begin, before) in best.iter().enumerate().take(end).skip(from) {
            let cost = before - begin as f64 * row;
            while window.back().is_some_and(|(_, other)| *other >= cost) {
                window.pop_back();
            }
            window.push_back((begin, cost));
        }
        while window.front().is_some_and(|(begin, _)| *begin < first) {
            window.pop_front();
        }
        let (begin, _) = window.front().expect("the row before the last can begin a batch");
        best[end] = best[*begin] + fit.batch + (end - begin) as f64 * row;
    }
    best[lens.len()]
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::scheduler::{Buckets, PadTo};
    use crate::vocab::{ModelHandle, SealReason};

    fn work(policy: &Policy, batch: &[u32]) -> Work {
        let longest = batch.iter().copied().max().expect("a batch has rows");
        match policy.layout {
            Layout::Padded => Work::padded(batch.len() as u32, policy.padded_len(longest)),
            Layout::Packed => {
                let mut work = Work::default();
                batch.iter().for_each(|len| work.add(1, *len));
                work
            }
        }
    }

    /// The least of all partitions, each row in one of the batches there are, or in one of its own.
    fn brute_force(policy: &Policy, fit: Coefficients, lens: &[u32]) -> f64 {
        fn go(policy: &Policy, fit: Coefficients, lens: &[u32], batches: &mut Vec<Vec<u32>>) -> f64 {
            let fits = |batch: &Vec<u32>| {
                let longest = batch.iter().copied().max().expect("a batch has rows");
                policy.fits(work(policy, batch), policy.padded_len(longest))
            };
            let Some((row, rest)) = lens.split_first() else {
                let times = batches
                    .iter()
                    .map(|batch| if fits(batch) { fit.work_time(work(policy, batch)) } else { f64::INFINITY });
                return times.sum();
            };
            let mut least = f64::INFINITY;
            for at in 0..=batches.len() {
                if at == batches.len() {
                    batches.push(Vec::new());
                }
                batches[at].push(*row);
                least = least.min(go(policy, fit, rest, batches));
                batches[at].pop();
                if batches[at].is_empty() {
                    batches.pop();
                }
            }
            least
        }
        go(policy, fit, lens, &mut Vec::new())
    }

    fn random(seed: u64) -> (Policy, Coefficients, Vec<u32>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let pad_to = if rng.random() { PadTo::Bucket } else { PadTo::Longest };
        let buckets = Buckets::new(&[3, 8, 12, 20]).expect("ascending");
        let policy = Policy { pad_to, ..Policy::new(rng.random_range(1..6), rng.random_range(20..80), buckets) };
        let fit = Coefficients {
            batch: rng.random_range(0.0..100.0),
            cell: rng.random_range(0.0..5.0),
            square: rng.random_range(0.0..0.2),
        };
        let lens = (0..rng.random_range(1..8)).map(|_| rng.random_range(1..=20)).collect();
        (policy, fit, lens)
    }

    #[test]
    fn the_least_is_that_of_all_partitions() {
        for seed in 0..300 {
            let (policy, fit, mut lens) = random(seed);
            let least = brute_force(&policy, fit, &lens);
            let found = cheapest(&policy, fit, &mut lens);
            assert!((found / least - 1.0).abs() < 1e-9, "seed {seed}: {found}, not {least}, of {lens:?} by {policy:?}");
        }
    }

    #[test]
    fn end_to_end_the_least_is_exceeded_by_no_more_than_what_does_not_fit_together() {
        let mut equal = 0;
        for seed in 0..300 {
            let (policy, fit, mut lens) = random(seed);
            let policy = Policy { layout: Layout::Packed, ..policy };
            let least = brute_force(&policy, fit, &lens);
            let found = cheapest(&policy, fit, &mut lens);
            assert!(found <= least * (1.0 + 1e-9), "seed {seed}: {found}, but {least} is possible");
            equal += u32::from(found >= least * (1.0 - 1e-9));
            let mut like = vec![10; lens.len()];
            let policy = Policy { cells_max: policy.cells_max / 10 * 10, ..policy };
            let least = brute_force(&policy, fit, &like);
            let found = cheapest(&policy, fit, &mut like);
            assert!((found / least - 1.0).abs() < 1e-9, "seed {seed}: rows of one length fit without gaps");
        }
        assert!(equal > 200, "{equal}");
    }

    fn batch(id: u64, policy: &Policy, lens: &[u32]) -> SealedBatch {
        SealedBatch {
            id,
            model: ModelHandle(0),
            executor: 0,
            rows: lens.len() as u32,
            rows_possible: 8,
            layout: policy.layout,
            padded_len: policy.padded_len(lens.iter().copied().max().expect("a batch has rows")),
            cells_real: lens.iter().map(|len| u64::from(*len)).sum(),
            squares_real: 0,
            reason: SealReason::Idle,
            sealed_at: Moment::ZERO,
            generation: 1,
            predicted: 0,
            objective: Duration::ZERO,
        }
    }

    const MS: u64 = 1_000_000;
    const FIT: Coefficients = Coefficients { batch: 1e6, cell: 1e5, square: 0.0 };

    /// Batches of rows of these lengths, which end at these times and take these times, all in ms.
    fn account(batches: &[(u64, u64, &[u32])]) -> Regret {
        let policy = Policy::new(4, 1000, Buckets::new(&[10, 100]).expect("ascending"));
        let mut account = Account::new(1, &[Group::Executors], Moment(0), EVERY);
        for (id, (at, took, lens)) in batches.iter().enumerate() {
            let batch = batch(id as u64, &policy, lens);
            account.sealed(batch.id, lens.iter().map(|len| Member { rows: 1, len: *len, at: Moment(0) }));
            let service = Duration::from_millis(*took);
            account.finished(Moment(at * MS), &batch, service, (1, &policy), FIT);
        }
        account.close()
    }

    #[test]
    fn two_batches_that_could_have_been_one_lose_a_fixed_cost_at_the_pace_of_their_moment() {
        // 2 × (1 ms + 1 row × 10 cells × 0.1 ms) as it was; 1 ms + 2 × 1 ms as it could have been.
        let regret = account(&[(10, 2, &[10]), (20, 2, &[10])]);
        let ms = Duration::from_millis;
        assert_eq!(regret.total, Times { at: Duration::ZERO, used: ms(4), least: ms(3) });
        assert!((regret.lost_share() - 0.25).abs() < 1e-9);
        // Twice as slow: the same share.
        let regret = account(&[(10, 4, &[10]), (20, 4, &[10])]);
        assert_eq!((regret.total.used, regret.total.least), (ms(8), ms(6)));
        // Faster than was learned: the least is never more than what was used.
        let regret = account(&[(10, 1, &[10, 10])]);
        assert_eq!((regret.total.used, regret.total.least, regret.worst), (ms(1), ms(1), None));
    }

    #[test]
    fn what_ended_in_different_intervals_is_not_put_together_and_the_worst_is_told() {
        let regret = account(&[(10, 2, &[10]), (1010, 2, &[10])]);
        assert_eq!((regret.lost_share(), regret.worst), (0.0, None));
        // A short row padded to a long one, apart: 1 + 2 × 10 ms as it was, 2 + 10 + 1 as it could have been.
        let regret = account(&[(10, 2, &[10]), (20, 2, &[10]), (5010, 21, &[10, 100]), (7000, 2, &[1])]);
        let worst = regret.worst.expect("something was lost");
        assert_eq!((worst.at, worst.used), (Duration::from_secs(5), Duration::from_millis(21)));
        assert!((worst.least.as_secs_f64() - 0.013).abs() < 1e-6, "{worst:?}");
        assert_eq!(regret.total.used, Duration::from_millis(27));
    }

    #[test]
    fn each_policy_is_measured_by_its_own_budgets_and_a_batch_of_before_by_none() {
        let of = |rows_max| Policy::new(rows_max, 1000, Buckets::new(&[10]).expect("one"));
        let (one, two) = (of(1), of(2));
        let mut account = Account::new(1, &[Group::Executors], Moment(0), EVERY);
        let took = Duration::from_millis(2);
        for id in 0..4 {
            let (generation, policy) = if id < 2 { (1, &one) } else { (2, &two) };
            account.sealed(id, [Member { rows: 1, len: 10, at: Moment(0) }].into_iter());
            account.finished(Moment(id * MS), &batch(id, policy, &[10]), took, (generation, policy), FIT);
        }
        account.finished(Moment(9 * MS), &batch(99, &two, &[10]), took, (2, &two), FIT);
        let regret = account.close();
        assert_eq!((regret.total.used, regret.total.least), (took * 4, Duration::from_millis(7)));
    }
}
