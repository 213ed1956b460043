//! How long a newcomer would wait behind what is there, and whether that has been so for a while: what a standing queue is
//! refused by.
//!
//! A queue that a burst made is worth having; one that stands makes everything late and gains nothing. So what counts is not
//! how long the queue is but for how long it has been too long (CoDel: Nichols and Jacobson, "Controlling Queue Delay", 2012;
//! at the door of a server: Maurer, "Fail at Scale", 2015). Too long is a share of the newcomer's own slack, and the queue
//! is what would go before it: rows of its class or a higher one, whose slack is not longer than its own. So a flood of low
//! requests, or of patient ones, is refused before it hurts others.
//!
//! How fast the queue empties is measured where it empties: cells per time between batches that left as much behind as they
//! took. That holds whatever the number of executors is, and whatever else they run.
//!
//! Always true
//! - The cells are those that wait: the scheduler's audit recomputes them.
//! - What would wait for nothing is never refused, and neither is anything before the queue has been seen to empty.
//!
//! Elsewhere: how long the whole server's queue takes, roughly and from its first batch on, for hints and between tenants (admission.rs).

use std::time::Duration;

use super::Class;
use crate::vocab::Moment;

/// Slacks are told apart by powers of two: up to 2^20 ns (1 ms), and so on, to 2^31 (2 s) and beyond.
const OCTAVES: usize = 13;
const FIRST_OCTAVE: i32 = 20;

/// Share of its slack for which the queue has to have been too long.
const STANDS: f64 = 0.5;
/// Short is this share of too long.
const SHORT: f64 = 0.25;
/// What a batch between others counts, beside all before it.
const FADES: f64 = 0.95;
/// What a newcomer counts in the share that is refused.
const NEWCOMER: f64 = 1.0 / 64.0;
/// By so much of the share that is refused the queue is kept shorter.
const SHORTER: f64 = 0.5;

/// What waits, by who would go before whom.
#[derive(Clone, Debug, Default, bincode::Decode, bincode::Encode)]
pub struct Backlog {
    cells: [[u64; OCTAVES]; Class::COUNT],
    /// Since when it has been too long.
    stands_since: [[Option<Moment>; OCTAVES]; Class::COUNT],
    /// Since when it has been short after that.
    short_since: [[Option<Moment>; OCTAVES]; Class::COUNT],
    /// Of those who came lately, the share that was refused.
    refused: [[f64; OCTAVES]; Class::COUNT],
    /// Time between batches while more waited, in ns, and cells that they took; both fade.
    nanos: f64,
    taken: f64,
    /// When the last batch was sealed, if more than it took was left.
    left_more_at: Option<Moment>,
}

/// A request's place among others: its class, and the octave of its slack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    class: usize,
    octave: usize,
}

impl Rank {
    /// `urgency` is 1 / slack, in 1/ns.
    pub fn of(class: Class, urgency: f32) -> Rank {
        // Its exponent: the logarithm, without computing one.
        let exponent = ((urgency.to_bits() >> 23) & 0xff) as i32 - 127;
        Rank { class: class.index(), octave: (-exponent - FIRST_OCTAVE).clamp(0, OCTAVES as i32 - 1) as usize }
    }
}

impl Backlog {
    pub fn add(&mut self, rank: Rank, cells: u64) {
        self.cells[rank.class][rank.octave] += cells;
    }

    pub fn remove(&mut self, rank: Rank, cells: u64) {
        self.cells[rank.class][rank.octave] -= cells;
    }

    /// Nothing waits; what is known of how fast it empties stays.
    pub fn clear(&mut self) {
        self.cells = Default::default();
    }

    /// Whether these are the cells that wait.
    pub fn holds_the_same(&self, counted: &Backlog) -> bool {
        self.cells == counted.cells
    }

    /// A batch took `cells` of the queue and left `left`.
    pub fn taken(&mut self, now: Moment, cells: u64, left: u64) {
        if let Some(before) = self.left_more_at {
            self.nanos = FADES * self.nanos + now.since(before).as_nanos() as f64;
            self.taken = FADES * self.taken + cells as f64;
        }
        self.left_more_at = (left >= cells).then_some(now);
    }

    /// Time until so many cells are gone, in ns; 0 where nothing is known.
    pub fn nanos(&self, cells: u64) -> f64 {
        if self.taken > 0.0 { self.nanos / self.taken * cells as f64 } else { 0.0 }
    }

    /// Cells that would go before one of this rank.
    pub fn ahead(&self, rank: Rank) -> u64 {
        self.cells[..=rank.class].iter().flat_map(|class| &class[..=rank.octave]).sum()
    }

    /// How long one of this rank may wait, where it may wait for `most` as long as hardly anybody is refused. A queue is what
    /// executors find while nobody comes: where two of three are refused it fills up in no time, and a shorter one keeps them
    /// as busy and makes everybody wait less. Near what they can do it takes all of it.
    pub fn bound(&self, rank: Rank, most: f64) -> f64 {
        most * (1.0 - SHORTER * self.refused[rank.class][rank.octave])
    }

    /// One of this rank was refused, or not.
    pub fn answered(&mut self, rank: Rank, refused: bool) {
        let share = &mut self.refused[rank.class][rank.octave];
        *share += NEWCOMER * (f64::from(u8::from(refused)) - *share);
    }

    /// Whether a newcomer that would wait for `wait` is to be refused: the wait has been longer than `bound` for long enough,
    /// by its `slack`, and since then not been short for longer than it takes from one batch to the next. All in ns.
    pub fn stands(&mut self, now: Moment, rank: Rank, wait: f64, bound: f64, slack: f64, between: f64) -> bool {
        let after = |moment: Moment, nanos: f64| moment + Duration::from_nanos(nanos as u64);
        let stands_since = &mut self.stands_since[rank.class][rank.octave];
        let short_since = &mut self.short_since[rank.class][rank.octave];
        if wait > SHORT * bound {
            *short_since = None;
        } else if stands_since.is_some() && now > after(*short_since.get_or_insert(now), between) {
            // Not at once: what refusing leaves is a queue of two batches, and executors may take all of it in one go.
            (*stands_since, *short_since) = (None, None);
        }
        if wait <= bound {
            return false;
        }
        now >= after(*stands_since.get_or_insert(now), STANDS * slack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: f64 = 1e6;

    fn at(ms: u64) -> Moment {
        Moment(1_000_000_000 + ms * 1_000_000)
    }

    fn rank(class: u8, slack_ms: f64) -> Rank {
        Rank::of(Class::from_priority(class), (1.0 / (slack_ms * MS)) as f32)
    }

    #[test]
    fn slacks_are_told_apart_by_octaves_and_the_extremes_share_theirs() {
        let octave = |slack_ms: f64| rank(0, slack_ms).octave;
        assert_eq!([octave(0.0001), octave(0.9), octave(2.2), octave(5.0)], [0, 0, 2, 3]);
        assert_eq!([octave(2200.0), octave(1e6), octave(1e12)], [12, 12, 12]);
        for slack in 1..4000 {
            assert!(octave(f64::from(slack)) <= octave(f64::from(slack + 1)), "{slack} ms");
        }
        assert_eq!(Rank::of(Class::default(), f32::INFINITY).octave, 0);
        assert_eq!(Rank::of(Class::default(), 0.0).octave, OCTAVES - 1);
    }

    #[test]
    fn ahead_is_what_is_of_the_class_or_higher_and_of_no_longer_slack() {
        let mut backlog = Backlog::default();
        backlog.add(rank(1, 10.0), 100);
        backlog.add(rank(1, 1000.0), 30);
        backlog.add(rank(2, 10.0), 7);
        let ahead = |class: u8, slack: f64| backlog.ahead(rank(class, slack));
        assert_eq!(
            [ahead(0, 1e5), ahead(1, 10.0), ahead(1, 1000.0), ahead(2, 10.0), ahead(2, 1e5)],
            [0, 100, 130, 107, 137]
        );
        assert_eq!(ahead(1, 5.0), 0, "who is in a hurry goes first");
        let mut same = backlog.clone();
        same.remove(rank(2, 10.0), 7);
        assert_eq!(same.ahead(rank(2, 1e5)), 130);
        assert!(!same.holds_the_same(&backlog));
    }

    #[test]
    fn how_fast_it_empties_is_measured_only_while_more_waits() {
        let mut backlog = Backlog::default();
        assert_eq!(backlog.nanos(1000), 0.0);
        // Hours between batches that left nothing say nothing.
        backlog.taken(at(0), 100, 0);
        backlog.taken(at(9_999_000), 100, 99);
        backlog.taken(at(9_999_990), 100, 100);
        assert_eq!(backlog.nanos(1000), 0.0);
        for batch in 1..=200 {
            backlog.taken(at(9_999_990 + 10 * batch), 100, 500);
        }
        assert!((backlog.nanos(1000) - 100.0 * MS).abs() < 1.0, "{}", backlog.nanos(1000));
        // Twice as slow: it is learned within some tens of batches.
        for batch in 1..=60 {
            backlog.taken(at(10_001_990 + 20 * batch), 100, 500);
        }
        assert!((190.0..=200.0).contains(&(backlog.nanos(1000) / MS)), "{}", backlog.nanos(1000));
    }

    #[test]
    fn the_more_are_refused_the_shorter_is_the_queue_that_they_leave() {
        let (mut backlog, rank, other) = (Backlog::default(), rank(1, 100.0), rank(1, 10.0));
        assert_eq!(backlog.bound(rank, 60.0), 60.0);
        for newcomer in 0..900 {
            backlog.answered(rank, newcomer % 3 > 0);
        }
        // Two of three, give or take one newcomer.
        assert!((backlog.bound(rank, 60.0) - 40.0).abs() < 0.5, "{}", backlog.bound(rank, 60.0));
        assert_eq!(backlog.bound(other, 60.0), 60.0, "of others less may be refused");
        (0..900).for_each(|_| backlog.answered(rank, true));
        assert!((backlog.bound(rank, 60.0) - 30.0).abs() < 0.1, "never less than half");
        // Whoever comes when it is over is taken again, and in a hundred or so it is forgotten.
        (0..200).for_each(|_| backlog.answered(rank, false));
        assert!(backlog.bound(rank, 60.0) > 58.0, "{}", backlog.bound(rank, 60.0));
    }

    #[test]
    fn a_burst_is_taken_and_a_queue_that_stands_is_not() {
        let mut backlog = Backlog::default();
        let rank = rank(1, 100.0);
        let mut refuses =
            |ms: u64, wait: f64| backlog.stands(at(ms), rank, wait * MS, 25.0 * MS, 100.0 * MS, 12.0 * MS);
        // A burst that goes within half its slack.
        assert!([(0, 80.0), (20, 60.0), (49, 26.0), (50, 25.0)].into_iter().all(|(ms, wait)| !refuses(ms, wait)));
        // Somewhat below the bound it is not gone, and neither is it where it is far below for a moment.
        assert!(refuses(60, 26.0));
        assert!(!refuses(70, 7.0) && refuses(71, 30.0));
        assert!(!refuses(80, 6.0) && refuses(81, 90.0));
        assert!(
            !refuses(90, 6.25) && !refuses(100, 7.0) && !refuses(103, 6.0) && !refuses(115, 6.0) && refuses(116, 30.0)
        );
        // Far below for longer than from one batch to the next: what comes then may be a burst again.
        assert!(!refuses(120, 6.0) && !refuses(125, 0.0) && !refuses(133, 6.0));
        assert!(!refuses(134, 90.0) && !refuses(183, 90.0) && refuses(184, 26.0));
    }
}
