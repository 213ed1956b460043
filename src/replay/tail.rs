//! The least p99 that any scheduler could have had for the requests that were answered: what lost latency is measured against.
//!
//! Each request needs at least its rows' own time and their share of the fixed part of the fullest batch that could hold them,
//! and cannot be done sooner than alone in a batch. The executors are one machine of their joint speed that may cut work
//! anywhere. On it, and in a time τ from its arrival, the most requests are on time by the rule of Kise, Ibaraki and Mine ("A
//! solvable case of the one-machine scheduling problem with ready and due times", Operations Research 26, 1978), which holds where
//! due times rise with arrivals: take them in order, and whenever one would be late leave out the one whose absence ends the rest
//! soonest. The least p99 is the shortest τ for which no more than one in a hundred is left out.
//!
//! What it is not: a time that a scheduler could have had. It knows the future, cuts batches, serves nobody who was not answered,
//! and lets nothing of other models run.
//!
//! Always true
//! - It is at most what was, and rises with nothing but work.
//! - Equal calls give equal bounds. Memory: 24 bytes a call, and as much again for those that wait at once.

use std::time::Duration;

use crate::vocab::Moment;

/// Share of the answered that has to be within the time.
const SHARE: f64 = 0.99;
/// Calls of a model that are looked at, at most; of more there is no bound.
pub const CALLS_MAX: usize = 1 << 20;
/// Steps of the search: to a thousandth of what was.
const STEPS: u32 = 10;

/// A request that was answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Call {
    pub at: Moment,
    /// Least time of executors, in ns.
    pub work: u64,
    /// Time alone in a batch, in ns.
    pub alone: u64,
}

/// One model's tail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tail {
    /// Queue and run that 99 % of the answered did not exceed.
    pub p99: Duration,
    /// No scheduler could have had less, when batches take what the coefficients say.
    pub least: Duration,
}

impl Tail {
    pub fn lost(&self) -> Duration {
        self.p99.saturating_sub(self.least)
    }

    /// Of the answered with the times that they took, in ns. `None`: there are none, or too many.
    pub fn of(calls: &mut [Call], took: &mut [u64], executors: u32) -> Option<Tail> {
        assert_eq!(calls.len(), took.len(), "each call took a time");
        if calls.is_empty() || calls.len() > CALLS_MAX {
            return None;
        }
        let on_time = (SHARE * calls.len() as f64).ceil() as usize;
        let (_, p99, _) = took.select_nth_unstable(on_time - 1);
        let p99 = *p99;
        calls.sort_by_key(|call| call.at);
        let late = calls.len() - on_time;
        let (mut low, mut high) = (0, p99);
        for _ in 0..STEPS {
            let middle = low + (high - low) / 2;
            if left_out(calls, executors, middle, late) <= late { high = middle } else { low = middle }
        }
        // Within `low` it cannot be done; that is what is known.
        Some(Tail { p99: Duration::from_nanos(p99), least: Duration::from_nanos(low) })
    }
}

/// A call that is to be on time.
#[derive(Clone, Copy, Debug)]
struct Placed {
    at: u64,
    start: u64,
    time: u64,
}

/// How many of these calls, in the order of their arrival, cannot be done within `within` ns; counted up to `most` and one.
fn left_out(calls: &[Call], executors: u32, within: u64, most: usize) -> usize {
    let mut out = 0;
    // Those without a gap between them, up to now.
    let mut placed: Vec<Placed> = Vec::new();
    let mut end = 0;
    for call in calls {
        if call.alone > within {
            out += 1;
            if out > most {
                break;
            }
            continue;
        }
        let (at, time) = (call.at.nanos(), call.work / u64::from(executors.max(1)));
        if end <= at {
            placed.clear();
        }
        let start = end.max(at);
        placed.push(Placed { at, start, time });
        let before = end;
        end = start + time;
        if end > at.saturating_add(within) {
            end = leave_one_out(&mut placed, before);
            out += 1;
            if out > most {
                break;
            }
        }
    }
    out
}

/// Takes that one out without which the rest ends soonest. Returns when it ends. `before`: when it ended before the last came.
fn leave_one_out(placed: &mut Vec<Placed>, before: u64) -> u64 {
    let last = placed.len() - 1;
    let end = placed[last].start + placed[last].time;
    // Without the last all is as it was.
    let (mut best, mut gain) = (last, end - before);
    let mut waited = u64::MAX;
    for at in (0..last).rev() {
        // Those behind move up by its time, but none to before it arrived.
        waited = waited.min(placed[at + 1].start - placed[at + 1].at);
        if waited <= gain {
            break;
        }
        if placed[at].time.min(waited) > gain {
            (best, gain) = (at, placed[at].time.min(waited));
        }
    }
    let mut free = placed[best].start;
    placed.remove(best);
    for call in &mut placed[best..] {
        call.start = free.max(call.at);
        free = call.start + call.time;
    }
    end - gain
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn random(rng: &mut StdRng, count: usize) -> Vec<Call> {
        let mut at = 0;
        let mut calls = Vec::new();
        for _ in 0..count {
            at += rng.random_range(0..6);
            let work = rng.random_range(1..12);
            calls.push(Call { at: Moment(at), work, alone: work + rng.random_range(0..3) });
        }
        calls
    }

    /// Tries every set: its calls one after the other, as they came.
    fn brute_force(calls: &[Call], within: u64) -> usize {
        let feasible = |set: u32| {
            let mut free = 0;
            calls.iter().enumerate().filter(|(at, _)| set & 1 << at != 0).all(|(_, call)| {
                free = free.max(call.at.nanos()) + call.work;
                free <= call.at.nanos() + within && call.alone <= within
            })
        };
        let most = (0..1u32 << calls.len()).filter(|set| feasible(*set)).map(u32::count_ones).max();
        calls.len() - most.expect("none at all is feasible") as usize
    }

    #[test]
    fn no_choice_leaves_fewer_out() {
        let mut rng = StdRng::seed_from_u64(1);
        for round in 0..3000 {
            let count = rng.random_range(1..11);
            let calls = random(&mut rng, count);
            let within = rng.random_range(1..30);
            let found = left_out(&calls, 1, within, usize::MAX - 1);
            assert_eq!(found, brute_force(&calls, within), "round {round}: {within} of {calls:?}");
        }
    }

    /// Least time within which `on_time` of the rows of these lengths are answered, by one executor whose batches take
    /// `batch + rows × longest` and hold at most `most`: all orders of all batches.
    fn best_of_all_schedules(rows: &[(u64, u64)], batch: u64, most: usize, on_time: usize) -> u64 {
        fn go(rows: &[(u64, u64)], left: u32, free: u64, times: &mut Vec<u64>, of: (u64, usize, usize)) -> u64 {
            let (batch, most, on_time) = of;
            if left == 0 {
                let mut sorted = times.clone();
                sorted.sort_unstable();
                return sorted[on_time - 1];
            }
            let mut best = u64::MAX;
            let mut set = left;
            while set > 0 {
                let members = (0..rows.len()).filter(|at| set & 1 << at != 0);
                if set.count_ones() as usize <= most {
                    let longest = members.clone().map(|at| rows[at].1).max().expect("not empty");
                    let ready = members.clone().map(|at| rows[at].0).max().expect("not empty");
                    let end = free.max(ready) + batch + u64::from(set.count_ones()) * longest;
                    let before = times.len();
                    times.extend(members.map(|at| end - rows[at].0));
                    best = best.min(go(rows, left & !set, end, times, of));
                    times.truncate(before);
                }
                set = (set - 1) & left;
            }
            best
        }
        go(rows, (1 << rows.len()) - 1, 0, &mut Vec::new(), (batch, most, on_time))
    }

    /// The least is a bound for whole batches too, which is what it stands beside.
    #[test]
    fn no_schedule_of_batches_is_below_the_bound() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut close = 0;
        for round in 0..300 {
            let (batch, most) = (rng.random_range(0..6), rng.random_range(1..4));
            let mut at = 0;
            let rows: Vec<(u64, u64)> = (0..rng.random_range(1..6))
                .map(|_| {
                    at += rng.random_range(0..8);
                    (at, rng.random_range(1..6))
                })
                .collect();
            let calls: Vec<Call> = rows
                .iter()
                .map(|(at, len)| Call { at: Moment(*at), work: len + batch / most as u64, alone: batch + len })
                .collect();
            let late = rng.random_range(0..rows.len());
            let best = best_of_all_schedules(&rows, batch, most, rows.len() - late);
            let least = (0..).find(|within| left_out(&calls, 1, *within, late) <= late).expect("long enough");
            assert!(least <= best, "round {round}: {least}, but {best} is possible, of {rows:?}");
            close += u32::from(least * 2 >= best);
        }
        assert!(close > 200, "it says something: within half of the best in {close} of 300");
    }

    #[test]
    fn the_tail_of_calls_far_apart_is_their_own_time_and_of_a_burst_the_time_that_it_takes() {
        let mut far: Vec<Call> =
            (0..200).map(|at| Call { at: Moment(at * 1_000_000), work: 500, alone: 1000 }).collect();
        let tail = Tail::of(&mut far, &mut vec![1200; 200], 1).expect("there are some");
        assert!((990..=1000).contains(&tail.least.as_nanos()), "{tail:?}");
        assert_eq!(tail.lost() + tail.least, Duration::from_nanos(1200));
        let mut burst: Vec<Call> = (0..200).map(|_| Call { at: Moment(5), work: 500, alone: 1000 }).collect();
        // 198 of them in 198 × 500 on one executor, in half of that on two.
        for (executors, expected) in [(1, 99_000), (2, 49_500)] {
            let tail = Tail::of(&mut burst, &mut vec![200_000; 200], executors).expect("there are some");
            let least = tail.least.as_nanos() as i64;
            assert!((expected - 250..=expected).contains(&least), "{least} of {expected}");
        }
    }

    #[test]
    fn it_is_never_more_than_what_was() {
        let mut calls: Vec<Call> = (0..50).map(|_| Call { at: Moment(0), work: 1000, alone: 1000 }).collect();
        let tail = Tail::of(&mut calls, &mut vec![10; 50], 1).expect("there are some");
        assert!(tail.least <= tail.p99);
        assert_eq!(Tail::of(&mut [], &mut [], 1), None);
    }
}
