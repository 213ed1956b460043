//! Which batches executors hold, and which of them has been running for too long.
//!
//! Always true
//! - A batch is on the list from when it is given until it comes back or is declared hung: what comes back and is not on it is
//!   nobody's.
//! - A batch's time runs from when it can have begun: given, and the one before it back.
//!
//! Elsewhere: what is done about it (mod.rs), that its thread can do no harm any more (executor/fence.rs).

use std::collections::VecDeque;
use std::time::Duration;

use crate::scheduler::SealedBatch;
use crate::vocab::Moment;

#[derive(Debug, Default)]
struct Seat {
    running: VecDeque<SealedBatch>,
    /// The first of them runs since then at the earliest.
    since: Moment,
    /// Its thread hangs and nobody takes its place: nothing more comes back from it that anybody waits for.
    dead: bool,
}

#[derive(Debug, Default)]
pub struct Watchdog {
    /// A batch that runs for longer is hung. Zero: none ever is.
    timeout: Duration,
    seats: Vec<Seat>,
}

impl Watchdog {
    pub fn new(seats: usize) -> Watchdog {
        Watchdog { timeout: Duration::ZERO, seats: (0..seats).map(|_| Seat::default()).collect() }
    }

    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// An executor was given a batch.
    pub fn given(&mut self, now: Moment, batch: &SealedBatch) {
        let seat = &mut self.seats[usize::from(batch.executor)];
        if seat.running.is_empty() {
            seat.since = now;
        }
        seat.running.push_back(*batch);
    }

    /// An executor says that it ran this batch. The batch that it was given, if it holds it.
    pub fn finished(&mut self, now: Moment, executor: usize, batch: u64) -> Option<SealedBatch> {
        let seat = self.seats.get_mut(executor)?;
        let at = seat.running.iter().position(|running| running.id == batch)?;
        if at == 0 {
            seat.since = now;
        }
        seat.running.remove(at)
    }

    /// A batch that runs for too long: its executor and its number. What is said of it next is whether it is
    /// [`Watchdog::given_up`], still [`Watchdog::runs_since`] now, or [`Watchdog::bury`] for its seat.
    pub fn poll(&self, now: Moment) -> Option<(usize, u64)> {
        let late = |seat: &Seat| self.due(seat).is_some_and(|due| due <= now);
        let executor = self.seats.iter().position(late)?;
        Some((executor, self.seats[executor].running[0].id))
    }

    /// When to look again.
    pub fn next(&self) -> Option<Moment> {
        self.seats.iter().filter_map(|seat| self.due(seat)).min()
    }

    fn due(&self, seat: &Seat) -> Option<Moment> {
        let watched = !self.timeout.is_zero() && !seat.dead && !seat.running.is_empty();
        watched.then(|| seat.since + self.timeout)
    }

    /// It does not run yet, or is done and its result on the way.
    pub fn runs_since(&mut self, now: Moment, executor: usize) {
        self.seats[executor].since = now;
    }

    /// Another thread has the seat; the batches behind begin now.
    pub fn given_up(&mut self, now: Moment, executor: usize) -> SealedBatch {
        let seat = &mut self.seats[executor];
        seat.since = now;
        seat.running.pop_front().expect("it was running")
    }

    /// Nobody has the seat any more. The batches that it held, which it goes on holding.
    pub fn bury(&mut self, executor: usize) -> impl Iterator<Item = u64> {
        let seat = &mut self.seats[executor];
        seat.dead = true;
        seat.running.iter().map(|batch| batch.id)
    }

    pub fn is_dead(&self, executor: u16) -> bool {
        self.seats[usize::from(executor)].dead
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::{Layout, ModelHandle, SealReason};

    fn batch(id: u64, executor: u16) -> SealedBatch {
        SealedBatch {
            id,
            model: ModelHandle(0),
            executor,
            rows: 1,
            rows_possible: 1,
            layout: Layout::Padded,
            padded_len: 1,
            cells_real: 1,
            squares_real: 1,
            reason: SealReason::Idle,
            sealed_at: Moment(0),
            generation: 1,
            predicted: 0,
            objective: Duration::ZERO,
        }
    }

    const AT: fn(u64) -> Moment = |ms| Moment(ms * 1_000_000);

    fn watchdog() -> Watchdog {
        let mut watchdog = Watchdog::new(2);
        watchdog.set_timeout(Duration::from_millis(100));
        watchdog
    }

    #[test]
    fn a_batch_is_hung_when_it_has_run_for_so_long_and_not_while_it_waits_for_another() {
        let mut watchdog = watchdog();
        assert_eq!((watchdog.next(), watchdog.poll(AT(1000))), (None, None));
        watchdog.given(AT(0), &batch(1, 0));
        watchdog.given(AT(10), &batch(2, 0));
        watchdog.given(AT(50), &batch(3, 1));
        assert_eq!(watchdog.next(), Some(AT(100)));
        assert_eq!(watchdog.poll(AT(99)), None);
        assert_eq!(watchdog.finished(AT(99), 0, 1).map(|batch| batch.id), Some(1));
        // The one behind it has only begun.
        assert_eq!(watchdog.poll(AT(149)), None);
        assert_eq!(watchdog.poll(AT(150)), Some((1, 3)));
        assert_eq!(watchdog.given_up(AT(150), 1).id, 3);
        assert_eq!(watchdog.next(), Some(AT(199)));
        assert_eq!(watchdog.poll(AT(199)), Some((0, 2)));
        // It had not begun: it has all its time again.
        watchdog.runs_since(AT(199), 0);
        assert_eq!(watchdog.poll(AT(298)), None);
        assert_eq!(watchdog.poll(AT(299)), Some((0, 2)));
    }

    #[test]
    fn what_comes_back_twice_late_or_to_nobody_is_not_on_the_list() {
        let mut watchdog = watchdog();
        watchdog.given(AT(0), &batch(1, 0));
        watchdog.given(AT(0), &batch(2, 1));
        assert_eq!(watchdog.finished(AT(1), 1, 1), None, "of another executor");
        assert_eq!(watchdog.finished(AT(1), 2, 1), None, "of none");
        assert_eq!(watchdog.finished(AT(1), 0, 7), None, "of no batch");
        assert_eq!(watchdog.finished(AT(1), 0, 1), Some(batch(1, 0)));
        assert_eq!(watchdog.finished(AT(1), 0, 1), None, "twice");
        watchdog.given_up(AT(100), 1);
        assert_eq!(watchdog.finished(AT(101), 1, 2), None, "late");
    }

    #[test]
    fn a_dead_seat_is_watched_no_more_and_keeps_what_it_holds() {
        let mut watchdog = watchdog();
        watchdog.given(AT(0), &batch(1, 0));
        watchdog.given(AT(0), &batch(2, 0));
        assert_eq!(watchdog.poll(AT(100)), Some((0, 1)));
        assert_eq!(watchdog.bury(0).collect::<Vec<_>>(), [1, 2]);
        assert!(watchdog.is_dead(0) && !watchdog.is_dead(1));
        assert_eq!((watchdog.poll(AT(10_000)), watchdog.next()), (None, None));
    }

    #[test]
    fn without_a_timeout_nothing_hangs() {
        let mut watchdog = Watchdog::new(1);
        watchdog.given(AT(0), &batch(1, 0));
        assert_eq!((watchdog.poll(Moment::FAR), watchdog.next()), (None, None));
    }
}
