//! Which settings nothing beats, and which of all is chosen.
//!
//! Always true
//! - A setting is in the front exactly if no other is at least as good in p99, goodput and executor time and better in one.
//! - The chosen one is by its rule at least as good as the present one, up to what counts as equal.

use std::cmp::Ordering;

use super::Predicted;

/// What is compared, all to be small: p99, minus goodput, executor time a request.
pub type Objectives = [f64; 3];

pub fn objectives(predicted: &Predicted) -> Objectives {
    [predicted.p99_ms, -predicted.goodput_rps, predicted.device_us]
}

/// At least as good in everything, and better in something.
pub fn dominates(a: &Objectives, b: &Objectives) -> bool {
    a.iter().zip(b).all(|(a, b)| a <= b) && a.iter().zip(b).any(|(a, b)| a < b)
}

/// Places of those that no other dominates, in the order of their p99.
pub fn front(all: &[Objectives]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..all.len()).collect();
    let by_each = |a: &usize, b: &usize| {
        let each = all[*a].iter().zip(&all[*b]).map(|(a, b)| a.total_cmp(b));
        each.fold(Ordering::Equal, Ordering::then).then(a.cmp(b))
    };
    order.sort_by(by_each);
    // Whoever dominates stands before, and is dominated by nobody of the front himself.
    let mut front: Vec<usize> = Vec::new();
    for at in order {
        if !front.iter().any(|other| dominates(&all[*other], &all[at])) {
            front.push(at);
        }
    }
    front
}

/// Requests that a setting must answer in time to hold the objective.
pub const ON_TIME: f64 = 0.99;
/// A setting holds it only with so much of it to spare, for a prediction is not a promise.
pub const SPARE: f64 = 0.1;
/// What is within these shares of the best counts as equal: a replay is not more exact, and a knob that is moved for nothing has to be
/// explained for ever.
const GOODPUT_EQUAL: f64 = 0.01;
const DEVICE_EQUAL: f64 = 0.02;
const P99_EQUAL: f64 = 0.05;
/// Executors that are idle for more than this share of the time have time to give for a lower latency.
const BUSY: f64 = 0.5;

/// How the choice is made, for people.
pub const RULE: &str = "Of the settings that answer 99 % of the requests in time, with a p99 of at most 90 % of the SLO, those \
                        within 1 % of the best goodput; of these, if executors are busy for half of the time or more with \
                        any of them, those within 2 % of the least executor time a request; of these those within 5 % of the \
                        lowest p99; of these the one that changes the fewest knobs. If none holds the SLO: the same of all, but \
                        for the executor time.";

/// The chosen one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub at: usize,
    pub holds: bool,
}

pub fn holds(predicted: &Predicted, slo_ms: f64) -> bool {
    predicted.on_time_share >= ON_TIME && predicted.p99_ms <= (1.0 - SPARE) * slo_ms
}

/// By [`RULE`]. `changes`: by setting, how many knobs are not as they are. None of no settings.
pub fn choose(all: &[Predicted], slo_ms: f64, changes: &[usize]) -> Option<Choice> {
    ranked(all, slo_ms, changes).into_iter().next().map(|at| Choice { at, holds: holds(&all[at], slo_ms) })
}

/// All of them in the order in which they would be chosen, were the better ones not there.
pub fn ranked(all: &[Predicted], slo_ms: f64, changes: &[usize]) -> Vec<usize> {
    let (hold, rest): (Vec<usize>, Vec<usize>) = (0..all.len()).partition(|at| holds(&all[*at], slo_ms));
    let mut order = Vec::with_capacity(all.len());
    for (mut left, by_device) in [(hold, true), (rest, false)] {
        while !left.is_empty() {
            let mut equal = left.clone();
            let most = equal.iter().map(|at| all[*at].goodput_rps).fold(0.0, f64::max);
            equal.retain(|at| all[*at].goodput_rps >= (1.0 - GOODPUT_EQUAL) * most);
            let least = |equal: &[usize], of: fn(&Predicted) -> f64| {
                equal.iter().map(|at| of(&all[*at])).fold(f64::INFINITY, f64::min)
            };
            // Time that nobody else wants is not worth a caller's wait.
            if by_device && least(&equal, |predicted| predicted.utilization) >= BUSY {
                let least = least(&equal, |predicted| predicted.device_us);
                equal.retain(|at| all[*at].device_us <= (1.0 + DEVICE_EQUAL) * least);
            }
            let least = least(&equal, |predicted| predicted.p99_ms);
            equal.retain(|at| all[*at].p99_ms <= (1.0 + P99_EQUAL) * least);
            equal.sort_by(|a, b| {
                let p99 = all[*a].p99_ms.total_cmp(&all[*b].p99_ms);
                changes[*a].cmp(&changes[*b]).then(p99).then(a.cmp(b))
            });
            left.retain(|at| !equal.contains(at));
            order.extend(equal);
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub fn predicted(p99_ms: f64, goodput_rps: f64, device_us: f64) -> Predicted {
        Predicted {
            throughput_rps: goodput_rps,
            goodput_rps,
            on_time_share: 1.0,
            p50_ms: p99_ms / 2.0,
            p99_ms,
            device_us,
            utilization: 0.5,
            batches: 10,
            batch_rows: 1.0,
            fill: 0.5,
            waste: 0.0,
            refused: 0,
            expired: 0,
            regret: 0.1,
            device_least_us: 0.9 * device_us,
            guessed: 0.0,
        }
    }

    proptest! {
        #[test]
        fn the_front_is_what_comparing_all_with_all_leaves(
            // Few values, so that many are equal in something.
            all in prop::collection::vec(prop::array::uniform3(0u8..6), 0..40)
        ) {
            let all: Vec<Objectives> = all.into_iter().map(|point| point.map(f64::from)).collect();
            let found = front(&all);
            let mut sorted = found.clone();
            sorted.sort_unstable();
            let brute: Vec<usize> = (0..all.len()).filter(|at| !all.iter().any(|other| dominates(other, &all[*at]))).collect();
            prop_assert_eq!(sorted, brute);
            prop_assert!(found.is_sorted_by(|a, b| all[*a][0] <= all[*b][0]));
        }

        #[test]
        fn every_setting_is_ranked_once_and_those_that_hold_come_first(
            all in prop::collection::vec((1.0f64..200.0, 1.0f64..50.0, 1.0f64..1000.0, 0.9f64..1.0), 1..40),
            slo_ms in 20.0f64..250.0,
        ) {
            let all: Vec<Predicted> = all
                .into_iter()
                .map(|(p99, goodput, device, share)| Predicted { on_time_share: share, ..predicted(p99, goodput, device) })
                .collect();
            let changes: Vec<usize> = (0..all.len()).map(|at| at % 5).collect();
            let order = ranked(&all, slo_ms, &changes);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..all.len()).collect::<Vec<_>>());
            prop_assert!(order.is_sorted_by(|a, b| holds(&all[*a], slo_ms) >= holds(&all[*b], slo_ms)));
            let choice = choose(&all, slo_ms, &changes).expect("there are some");
            let (chosen, present) = (&all[choice.at], &all[0]);
            // At least as good as the present one, up to what counts as equal.
            prop_assert!(choice.holds >= holds(present, slo_ms));
            if choice.holds == holds(present, slo_ms) {
                prop_assert!(chosen.goodput_rps >= 0.99 * present.goodput_rps);
            }
        }
    }

    #[test]
    fn the_choice_follows_its_rule() {
        let of = |all: &[Predicted], changes: &[usize]| choose(all, 100.0, changes).expect("there are some");
        // Goodput first, then executor time, then p99, then few changes; what does not hold is out.
        let all = [
            predicted(40.0, 30.0, 500.0),
            predicted(61.0, 39.8, 400.0),
            predicted(60.0, 39.9, 404.0),
            predicted(80.0, 40.0, 400.0),
            predicted(20.0, 40.0, 500.0),
            predicted(95.0, 50.0, 100.0),
        ];
        assert_eq!(of(&all, &[0, 2, 1, 0, 0, 0]), Choice { at: 2, holds: true });
        assert_eq!(
            of(&all, &[0, 0, 1, 1, 1, 1]),
            Choice { at: 1, holds: true },
            "the present one stays where it is as good"
        );
        assert_eq!(
            of(&all, &[1, 2, 1, 0, 1, 1]),
            Choice { at: 2, holds: true },
            "and not where its p99 is a third longer"
        );
        // The same on executors that are idle most of the time: p99 instead of executor time.
        let idle: Vec<Predicted> = all.iter().map(|of| Predicted { utilization: 0.49, ..*of }).collect();
        assert_eq!(of(&idle, &[0, 2, 1, 0, 0, 0]), Choice { at: 4, holds: true });
        // Nothing holds: the highest goodput, whatever it takes; of equals the lowest p99.
        let all = [predicted(200.0, 10.0, 1.0), predicted(300.0, 11.0, 9.0), predicted(250.0, 10.95, 10.0)];
        assert_eq!(of(&all, &[0, 1, 1]), Choice { at: 2, holds: false });
        assert_eq!(choose(&[], 1.0, &[]), None);
    }
}
