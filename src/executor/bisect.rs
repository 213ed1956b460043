//! Which members of a failed batch run again, together with whom, until the one that made it fail stands alone.
//!
//! Members are run again in halves, halves of halves, and so on: a round is one halving. Whoever is in a half that runs has its
//! answer; whoever fails alone is the culprit.
//!
//! Always true
//! - Nobody is blamed who was not run alone. What an answered half says about the other is used only to skip a run that would fail.
//! - There are at most ⌈log2 members⌉ rounds beside the batch itself. One culprit costs at most twice the batch's work again;
//!   many cost at most [`LEVELS_MAX`] times it and [`RUNS_MAX`] runs. Members beyond that are given up: nobody says whose fault it was.
//!
//! Elsewhere: running them (worker.rs).

use std::collections::VecDeque;
use std::ops::Range;

/// Work that may be done again, in multiples of the batch's. Enough for any batch of up to 64 members, whoever of them fails.
pub const LEVELS_MAX: u64 = 6;

/// Runs at most, however small they are.
pub const RUNS_MAX: u32 = 256;

/// How members fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failing {
    /// Somebody among them makes the model fail.
    Model,
    /// They do not fit together; each may fit alone.
    Memory,
}

/// What is known of some members after their run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// They have their answers.
    Saved(Range<usize>),
    /// They will be run again in halves.
    Halved,
    /// It failed alone.
    Culprit(usize),
}

#[derive(Clone, Debug)]
struct Span {
    members: Range<usize>,
    round: u32,
    /// The first half of a pair; the second follows it in the queue.
    first: bool,
    /// Somebody in it must make the model fail: all the others of a failed run are answered.
    guilty: bool,
    /// How the run failed of which this is a half.
    of: Failing,
}

/// One failed batch's. Its memory is used again for the next.
#[derive(Debug, Default)]
pub struct Bisection {
    queue: VecDeque<Span>,
    running: Option<Span>,
    /// Work of all members before each, and of all of them.
    sums: Vec<u64>,
    work: u64,
    runs: u32,
    rounds: u32,
    /// As much work at once has been too much for the memory.
    too_large: Option<u64>,
}

impl Bisection {
    /// A batch failed. `work`: of each member, in any unit.
    pub fn start(&mut self, failing: Failing, work: impl Iterator<Item = u64>) {
        self.queue.clear();
        self.running = None;
        self.sums.clear();
        self.sums.push(0);
        let mut sum = 0u64;
        for work in work {
            sum += work.max(1);
            self.sums.push(sum);
        }
        (self.work, self.runs, self.rounds, self.too_large) = (0, 0, 0, None);
        let members = 0..self.sums.len() - 1;
        if members.len() > 1 {
            if failing == Failing::Memory {
                self.too_large = Some(sum);
            }
            self.halve(Span { members, round: 0, first: false, guilty: true, of: failing }, failing);
        }
    }

    /// The next members to run, together. None: all that will be known is known; see [`Bisection::given_up`].
    pub fn poll_next(&mut self) -> Option<Range<usize>> {
        debug_assert!(self.running.is_none(), "a run is reported before the next");
        loop {
            let span = self.queue.pop_front()?;
            let work = self.work_of(&span.members);
            let certain = span.guilty || self.too_large.is_some_and(|too_large| work >= too_large);
            if certain && span.members.len() > 1 {
                let how = if span.guilty { Failing::Model } else { Failing::Memory };
                self.halve(span, how);
                continue;
            }
            let all = *self.sums.last().expect("starts with 0");
            if self.runs == RUNS_MAX || self.work + work > LEVELS_MAX * all {
                self.queue.push_front(span);
                return None;
            }
            self.runs += 1;
            self.work += work;
            self.rounds = self.rounds.max(span.round);
            let members = span.members.clone();
            self.running = Some(span);
            return Some(members);
        }
    }

    /// How the members ran that were next.
    pub fn report(&mut self, ran: Result<(), Failing>) -> Step {
        let span = self.running.take().expect("they were next");
        let Err(failing) = ran else {
            // What made the model fail is not here, so it is in the other half. Memory may have been short for both together only.
            if span.first && span.of == Failing::Model {
                let other = self.queue.front_mut().expect("the second half follows the first");
                other.guilty = true;
            }
            return Step::Saved(span.members);
        };
        if failing == Failing::Memory {
            let work = self.work_of(&span.members);
            self.too_large = Some(self.too_large.map_or(work, |too_large| too_large.min(work)));
        }
        if span.members.len() == 1 {
            return Step::Culprit(span.members.start);
        }
        self.halve(span, failing);
        Step::Halved
    }

    /// Members that nobody ran alone because too many fail. Taken out: none is left.
    pub fn given_up(&mut self) -> impl Iterator<Item = Range<usize>> {
        self.queue.drain(..).map(|span| span.members)
    }

    /// Runs so far.
    pub fn runs(&self) -> u32 {
        self.runs
    }

    /// Rounds so far.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Work done again so far.
    pub fn work(&self) -> u64 {
        self.work
    }

    fn work_of(&self, members: &Range<usize>) -> u64 {
        self.sums[members.end] - self.sums[members.start]
    }

    /// The smaller half first: if it runs, the larger one is not run to find out that it fails.
    fn halve(&mut self, Span { members, round, .. }: Span, of: Failing) {
        let middle = members.start + members.len() / 2;
        let half = |members, first| Span { members, round: round + 1, first, guilty: false, of };
        self.queue.push_back(half(members.start..middle, true));
        self.queue.push_back(half(middle..members.end, false));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Verdict {
        Saved,
        Culprit,
        GivenUp,
    }

    /// Runs a bisection of so many equal members to its end. `fails` says how a range of them fails.
    fn bisect(
        members: usize,
        first: Failing,
        fails: impl Fn(&Range<usize>) -> Option<Failing>,
    ) -> (Vec<Verdict>, Bisection) {
        let mut bisection = Bisection::default();
        let mut verdicts = vec![None; members];
        let mut set = |range: Range<usize>, verdict: Verdict| {
            for member in range {
                assert_eq!(verdicts[member].replace(verdict), None, "member {member} has one end");
            }
        };
        bisection.start(first, (0..members).map(|_| 10));
        while let Some(range) = bisection.poll_next() {
            assert!(!range.is_empty());
            match bisection.report(fails(&range).map_or(Ok(()), Err)) {
                Step::Saved(saved) => {
                    assert_eq!(saved, range);
                    set(saved, Verdict::Saved);
                }
                Step::Halved => assert!(range.len() > 1),
                Step::Culprit(member) => {
                    assert_eq!(range, member..member + 1, "blamed only when alone");
                    set(range, Verdict::Culprit);
                }
            }
        }
        bisection.given_up().for_each(|range| set(range, Verdict::GivenUp));
        assert!(bisection.work() <= LEVELS_MAX * 10 * members as u64);
        assert!(bisection.runs() <= RUNS_MAX);
        let verdicts = verdicts.into_iter().map(|verdict| verdict.expect("every member has an end")).collect();
        (verdicts, bisection)
    }

    fn rounds_of(members: usize) -> u32 {
        members.next_power_of_two().trailing_zeros()
    }

    fn poisoned(poison: &[usize]) -> impl Fn(&Range<usize>) -> Option<Failing> {
        move |range| poison.iter().any(|at| range.contains(at)).then_some(Failing::Model)
    }

    fn expect(members: usize, poison: &[usize]) -> Vec<Verdict> {
        let verdict = |at| if poison.contains(&at) { Verdict::Culprit } else { Verdict::Saved };
        (0..members).map(verdict).collect()
    }

    /// Goal: F56, T9. Method: every batch up to 130 members, the poison at every place.
    #[test]
    fn one_culprit_is_found_wherever_it_is_within_the_rounds_and_twice_the_work() {
        for members in 2..=130 {
            for poison in 0..members {
                let (verdicts, bisection) = bisect(members, Failing::Model, poisoned(&[poison]));
                assert_eq!(verdicts, expect(members, &[poison]), "{members}, {poison}");
                assert!(bisection.rounds() <= rounds_of(members), "{members}: {} rounds", bisection.rounds());
                assert!(bisection.work() <= 2 * 10 * members as u64, "{members}, {poison}: {}", bisection.work());
                assert!(bisection.runs() <= 2 * rounds_of(members), "{members}: {} runs", bisection.runs());
            }
        }
    }

    #[test]
    fn two_culprits_are_found_wherever_they_are() {
        for members in 2..=40 {
            for one in 0..members {
                for two in 0..one {
                    let (verdicts, bisection) = bisect(members, Failing::Model, poisoned(&[two, one]));
                    assert_eq!(verdicts, expect(members, &[two, one]));
                    assert!(bisection.rounds() <= rounds_of(members));
                    assert!(bisection.runs() <= 4 * rounds_of(members));
                }
            }
        }
    }

    #[test]
    fn where_all_fail_all_are_found_up_to_64_members_and_the_effort_is_bounded_beyond() {
        for members in 2..=64 {
            let all: Vec<usize> = (0..members).collect();
            let (verdicts, _) = bisect(members, Failing::Model, poisoned(&all));
            assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Culprit), "{members}");
        }
        let all: Vec<usize> = (0..1000).collect();
        let (verdicts, bisection) = bisect(1000, Failing::Model, poisoned(&all));
        assert!(verdicts.iter().all(|verdict| *verdict == Verdict::GivenUp), "in 1,000 nobody has stood alone by then");
        assert!(bisection.rounds() <= LEVELS_MAX as u32);
    }

    #[test]
    fn a_batch_that_was_too_large_runs_in_parts_that_fit_and_one_member_that_fits_nowhere_stands_alone() {
        for members in 2..=130usize {
            for room in 1..members {
                let fails = |range: &Range<usize>| (range.len() > room).then_some(Failing::Memory);
                let (verdicts, bisection) = bisect(members, Failing::Memory, fails);
                assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Saved), "{members}, {room}");
                assert!(bisection.work() <= 2 * 10 * members as u64, "{members}, {room}: {}", bisection.work());
            }
            let huge = members / 3;
            let (verdicts, _) =
                bisect(members, Failing::Memory, |range| range.contains(&huge).then_some(Failing::Memory));
            assert_eq!(verdicts, expect(members, &[huge]));
        }
    }

    #[test]
    fn a_failure_that_does_not_come_again_costs_nobody_its_answer() {
        for members in 2..=130 {
            let (verdicts, bisection) = bisect(members, Failing::Model, |_| None);
            assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Saved));
            assert_eq!(bisection.work(), 10 * members as u64, "everybody ran once more");
        }
    }

    #[test]
    fn a_batch_of_one_has_stood_alone_already() {
        let mut bisection = Bisection::default();
        bisection.start(Failing::Model, std::iter::once(1));
        assert_eq!(bisection.poll_next(), None);
        assert_eq!(bisection.given_up().count(), 0);
    }

    proptest! {
        /// Any members poisoned, any members unlucky: everybody has one end, innocents who are never unlucky are answered unless
        /// given up, and who is poisoned is never answered.
        #[test]
        fn innocents_are_saved_and_culprits_never(
            members in 2..300usize,
            poison in prop::collection::btree_set(0..300usize, 0..6),
            memory in prop::option::of(1..300usize),
        ) {
            let poison: Vec<usize> = poison.into_iter().filter(|at| *at < members).collect();
            let fails = |range: &Range<usize>| match memory {
                Some(room) if range.len() > room => Some(Failing::Memory),
                _ => poisoned(&poison)(range),
            };
            let first = fails(&(0..members)).unwrap_or(Failing::Model);
            let (verdicts, bisection) = bisect(members, first, fails);
            prop_assert!(bisection.rounds() <= rounds_of(members));
            for (at, verdict) in verdicts.iter().enumerate() {
                match poison.contains(&at) {
                    true => prop_assert_ne!(*verdict, Verdict::Saved),
                    false => prop_assert_ne!(*verdict, Verdict::Culprit),
                }
            }
            if poison.len() <= 4 && memory.is_none() {
                prop_assert!(!verdicts.contains(&Verdict::GivenUp));
            }
        }

        /// Failures of no pattern at all.
        #[test]
        fn any_failures_end_within_the_bounds(members in 1..400usize, coins in prop::collection::vec(0..4u8, 600)) {
            let at = std::cell::Cell::new(0);
            let fails = |_: &Range<usize>| {
                at.set(at.get() + 1);
                match coins[at.get() % coins.len()] {
                    0 => Some(Failing::Model),
                    1 => Some(Failing::Memory),
                    _ => None,
                }
            };
            if members > 1 {
                bisect(members, Failing::Model, fails);
            }
        }
    }
}
