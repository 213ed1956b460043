//! Which settings to try next: the present one, the grid, then what lies around the best so far, in ever smaller steps.
//!
//! Always true
//! - No setting is tried twice, and never more than `points_max` of them in `rounds_max` rounds.
//! - Equal predictions give an equal search, in whatever order they come within a round.

use std::collections::HashSet;

use super::Predicted;
use super::front::{front, objectives, ranked};
use super::space::{Point, Space};

/// What a search may cost.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub points_max: usize,
    pub rounds_max: usize,
}

/// A setting and what it is predicted to give.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    pub point: Point,
    pub predicted: Predicted,
}

/// Steps of numbers, by which they are multiplied and divided.
const FACTORS: [f64; 3] = [2.0, std::f64::consts::SQRT_2, 1.19];
/// Settings whose neighbours are looked at in a round.
const LEADERS: usize = 8;
/// Share of the points that the grid may take.
const GRID_SHARE: f64 = 0.6;

/// A search in rounds: [`Search::next_round`], then [`Search::take`] for what was tried of it.
#[derive(Debug)]
pub struct Search {
    space: Space,
    bounds: Bounds,
    slo_ms: f64,
    seen: HashSet<Point>,
    given: usize,
    rounds: usize,
    step: usize,
    /// Chosen after the round before.
    leader: Option<Point>,
    expanded: HashSet<(Point, usize)>,
    tried: Vec<Tried>,
}

impl Search {
    pub fn new(space: Space, bounds: Bounds, slo_ms: f64) -> Search {
        Search {
            space,
            bounds,
            slo_ms,
            seen: HashSet::new(),
            given: 0,
            rounds: 0,
            step: 0,
            leader: None,
            expanded: HashSet::new(),
            tried: Vec::new(),
        }
    }

    pub fn space(&self) -> &Space {
        &self.space
    }

    /// What was tried so far; the present setting first, if it was.
    pub fn tried(&self) -> &[Tried] {
        &self.tried
    }

    /// Settings that were given out.
    pub fn given(&self) -> usize {
        self.given
    }

    /// The next settings to try, none of them depending on another. Empty: the search is over.
    pub fn next_round(&mut self) -> Vec<Point> {
        if self.rounds == self.bounds.rounds_max || self.given == self.bounds.points_max {
            return Vec::new();
        }
        let left = self.bounds.points_max - self.given;
        let fresh = match self.rounds {
            0 => vec![self.space.present().clone()],
            1 => thinned(self.space.grid(), ((self.bounds.points_max as f64 * GRID_SHARE) as usize).min(left)),
            _ => self.around_the_best(),
        };
        self.rounds += 1;
        let mut round: Vec<Point> = Vec::new();
        for point in fresh {
            if round.len() < left && self.seen.insert(point.clone()) {
                round.push(point);
            }
        }
        self.given += round.len();
        round
    }

    /// Not yet tried neighbours of the best ones; in smaller steps where these have none or the best one stayed.
    fn around_the_best(&mut self) -> Vec<Point> {
        let leaders = self.leaders();
        let first = leaders.first().cloned();
        let mut fresh = Vec::new();
        if self.rounds > 2 && first == self.leader && self.step + 1 < FACTORS.len() {
            self.step += 1;
        }
        self.leader = first;
        while fresh.is_empty() && self.step < FACTORS.len() {
            for leader in &leaders {
                if !self.expanded.insert((leader.clone(), self.step)) {
                    continue;
                }
                let around = self.space.neighbours(leader, FACTORS[self.step]);
                fresh.extend(around.into_iter().filter(|point| !self.seen.contains(point)));
            }
            if fresh.is_empty() {
                self.step += 1;
            }
        }
        fresh
    }

    /// The first of the ranking, and some of the front, all of different behaviour.
    fn leaders(&self) -> Vec<Point> {
        let predicted: Vec<Predicted> = self.tried.iter().map(|tried| tried.predicted).collect();
        let all: Vec<_> = predicted.iter().map(objectives).collect();
        let front = front(&all);
        let stride = front.len().div_ceil(LEADERS).max(1);
        let distances: Vec<usize> = self.tried.iter().map(|tried| self.space.distance(&tried.point)).collect();
        let best = ranked(&predicted, self.slo_ms, &distances).into_iter();
        let mut leaders: Vec<usize> = Vec::new();
        let mut add = |at: usize, most: usize| {
            if leaders.len() < most && !leaders.iter().any(|other| all[*other] == all[at]) {
                leaders.push(at);
            }
        };
        best.for_each(|at| add(at, LEADERS / 2));
        front.into_iter().step_by(stride).for_each(|at| add(at, LEADERS));
        leaders.into_iter().map(|at| self.tried[at].point.clone()).collect()
    }

    /// What came of a round; those of it that were not tried are left out.
    pub fn take(&mut self, round: &[Point], mut results: Vec<(usize, Predicted)>) {
        results.sort_by_key(|(at, _)| *at);
        self.tried.extend(results.into_iter().map(|(at, predicted)| Tried { point: round[at].clone(), predicted }));
    }
}

/// So many of them, evenly spread.
fn thinned(points: Vec<Point>, most: usize) -> Vec<Point> {
    let count = points.len();
    if count <= most {
        return points;
    }
    points
        .into_iter()
        .enumerate()
        .filter(|(at, _)| at * most / count != (at + 1) * most / count)
        .map(|(_, p)| p)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::scheduler::PolicyKind;
    use crate::tune::space::tests::{policy, space};

    /// A world with one best setting: window, of 40 cells times 16 rows, held 3 ms.
    fn world(point: &Point) -> Predicted {
        let off = |value: f64, best: f64| (value.max(1.0) / best).ln().abs();
        let far = off(point.rows_max.into(), 16.0)
            + off(point.cells_max as f64, 640.0)
            + point.delay.map_or(4.0, |nanos| 0.5 * off(nanos as f64, 3e6))
            + if point.kind == PolicyKind::Window { 0.0 } else { 1.0 };
        Predicted {
            throughput_rps: 100.0,
            goodput_rps: 100.0,
            on_time_share: 1.0,
            p50_ms: 1.0,
            p99_ms: 10.0 + far,
            device_us: 1000.0 + 100.0 * far,
            utilization: 0.1,
            batches: 1,
            batch_rows: 1.0,
            fill: 1.0,
            waste: 0.0,
            refused: 0,
            expired: 0,
            regret: 0.0,
            device_least_us: 1000.0,
            guessed: 0.0,
        }
    }

    fn run(bounds: Bounds, answered: impl Fn(usize) -> bool) -> (Search, usize) {
        let mut search = Search::new(space(policy()), bounds, 100.0);
        let (mut rounds, mut given) = (0, 0);
        loop {
            let round = search.next_round();
            if round.is_empty() {
                return (search, given);
            }
            rounds += 1;
            given += round.len();
            assert!(rounds <= bounds.rounds_max && given <= bounds.points_max, "{rounds} rounds, {given} points");
            // As threads bring them: in any order.
            let results = round.iter().enumerate().rev().filter(|(at, _)| answered(*at));
            search.take(&round, results.map(|(at, point)| (at, world(point))).collect());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_search_never_exceeds_its_bounds_and_tries_nothing_twice(
            points_max in 1usize..400,
            rounds_max in 1usize..12,
            lost in 2usize..9,
        ) {
            let (search, given) = run(Bounds { points_max, rounds_max }, |at| at % lost != 1);
            let distinct: HashSet<&Point> = search.tried().iter().map(|tried| &tried.point).collect();
            prop_assert_eq!(distinct.len(), search.tried().len());
            prop_assert_eq!(search.given(), given);
            prop_assert_eq!(&search.tried()[0].point, search.space().present());
        }
    }

    #[test]
    fn the_steps_around_the_best_find_what_the_grid_misses() {
        let bounds = Bounds { points_max: 1000, rounds_max: 20 };
        let (search, _) = run(bounds, |_| true);
        let predicted: Vec<Predicted> = search.tried().iter().map(|tried| tried.predicted).collect();
        let least = |tried: &[Predicted]| tried.iter().map(|p| p.device_us).fold(f64::INFINITY, f64::min);
        let grid = 1 + space(policy()).grid().len();
        let (coarse, fine) = (least(&predicted[..grid.min(predicted.len())]), least(&predicted));
        assert!(fine < 1030.0 && fine < coarse - 20.0, "{coarse} of the grid, {fine} in the end");
        let (again, _) = run(bounds, |_| true);
        assert_eq!(search.tried(), again.tried(), "equal predictions, equal search");
    }

    #[test]
    fn thinning_keeps_as_many_as_it_may_and_in_order() {
        let grid = space(policy()).grid();
        let thin = thinned(grid.clone(), 10);
        assert_eq!(thin.len(), 10);
        let places: Vec<usize> = thin.iter().filter_map(|p| grid.iter().position(|other| other == p)).collect();
        assert!(places.is_sorted() && places.len() == 10);
        assert_eq!(thinned(grid.clone(), grid.len()), grid);
    }
}
