//! What came of the requests of each arm of a trial, and which of them are late already.
//!
//! Always true
//! - A request counts for the arm in force when it came, a batch for the arm in force when it was sealed.
//! - A request is judged once: on time when its batch is back within its time; late when it is refused, given up, or its time
//!   is over, also while it waits. Nobody waits for an answer to know that it is late.
//! - At most [`OPEN_MAX`] requests are followed at once. Others count nowhere, and are counted as such.
//!
//! Elsewhere: what follows from it (mod.rs).

use std::collections::VecDeque;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::Arm;
use crate::scheduler::{SealedBatch, TicketId};
use crate::vocab::Moment;

/// Requests that are followed at once, at most: 40 bytes each.
pub const OPEN_MAX: usize = 1 << 16;

/// What came of one arm's requests and batches.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    pub offered: u64,
    pub answered: u64,
    pub refused: u64,
    /// Given up while they waited: their time was over, or could not be met any more.
    pub expired: u64,
    pub cancelled: u64,
    pub judged: u64,
    /// Of the judged: not within their time.
    pub late: u64,
    pub batches: u64,
    pub rows: u64,
    pub rows_possible: u64,
    pub cells_real: u64,
    pub cells_padded: u64,
    /// Queue and run of the answered, in ns.
    pub latency: Histogram<u64>,
}

impl Measured {
    fn new() -> Measured {
        Measured {
            offered: 0,
            answered: 0,
            refused: 0,
            expired: 0,
            cancelled: 0,
            judged: 0,
            late: 0,
            batches: 0,
            rows: 0,
            rows_possible: 0,
            cells_real: 0,
            cells_padded: 0,
            latency: Histogram::new(3).expect("3 digits are possible"),
        }
    }

    /// Share of the judged.
    pub fn on_time(&self) -> f64 {
        1.0 - share(self.late, self.judged)
    }

    /// Rows used ÷ rows possible.
    pub fn fill(&self) -> f64 {
        share(self.rows, self.rows_possible)
    }

    /// Padding ÷ all cells.
    pub fn waste(&self) -> f64 {
        share(self.cells_padded - self.cells_real.min(self.cells_padded), self.cells_padded)
    }

    /// Queue and run that this share of the answered did not exceed.
    pub fn percentile(&self, share: f64) -> Duration {
        Duration::from_nanos(self.latency.value_at_quantile(share))
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[derive(Clone, Copy, Debug)]
struct Call {
    number: u64,
    arm: Arm,
    at: Moment,
    due: Moment,
}

/// A request that may still be judged late by the clock.
#[derive(Clone, Copy, Debug)]
struct Open {
    overdue: Moment,
    arm: Arm,
    judged: bool,
}

/// Follows the requests of one model.
#[derive(Debug)]
pub struct Meter {
    slo: Duration,
    /// By ticket.
    waiting: Vec<Option<Call>>,
    /// By batch; as many as executors hold.
    running: Vec<(u64, Vec<Call>)>,
    spare: Vec<Vec<Call>>,
    /// In the order in which they came; the first has this number.
    open: VecDeque<Open>,
    first: u64,
    arms: [Measured; 2],
    /// Judged and late of the changed arm since its slice began.
    slice: (u64, u64),
    pub unfollowed: u64,
}

impl Meter {
    /// A request is late after `slo`, or at its own deadline where that is sooner.
    pub fn new(slo: Duration) -> Meter {
        Meter {
            slo,
            waiting: Vec::new(),
            running: Vec::new(),
            spare: Vec::new(),
            open: VecDeque::new(),
            first: 0,
            arms: [Measured::new(), Measured::new()],
            slice: (0, 0),
            unfollowed: 0,
        }
    }

    pub fn arm(&self, arm: Arm) -> &Measured {
        &self.arms[arm as usize]
    }

    /// Judged and late of the changed arm since its slice began.
    pub fn slice(&self) -> (u64, u64) {
        self.slice
    }

    pub fn begin_slice(&mut self) {
        self.slice = (0, 0);
    }

    /// Requests that are followed and not judged yet.
    pub fn open(&self) -> usize {
        self.open.iter().filter(|open| !open.judged).count()
    }

    fn judge(&mut self, arm: Arm, late: bool) {
        let measured = &mut self.arms[arm as usize];
        measured.judged += 1;
        measured.late += u64::from(late);
        if arm == Arm::Changed {
            self.slice.0 += 1;
            self.slice.1 += u64::from(late);
        }
    }

    /// Closes the book on a request. False: it was closed before.
    fn close(&mut self, number: u64) -> bool {
        let place = number.checked_sub(self.first).map(|place| place as usize);
        match place.and_then(|place| self.open.get_mut(place)) {
            Some(open) => !std::mem::replace(&mut open.judged, true),
            None => false,
        }
    }

    /// A request came and was admitted as this ticket, or refused.
    pub fn arrived(&mut self, now: Moment, arm: Arm, deadline: Option<Moment>, admitted: Option<TicketId>) {
        let Some(id) = admitted else {
            self.arms[arm as usize].offered += 1;
            self.arms[arm as usize].refused += 1;
            self.judge(arm, true);
            return;
        };
        if self.open.len() >= OPEN_MAX {
            self.unfollowed += 1;
            return;
        }
        self.arms[arm as usize].offered += 1;
        let number = self.first + self.open.len() as u64;
        let overdue = now + self.slo;
        self.open.push_back(Open { overdue, arm, judged: false });
        if self.waiting.len() <= id.index() {
            self.waiting.resize(id.index() + 1, None);
        }
        let due = deadline.map_or(overdue, |deadline| deadline.min(overdue));
        self.waiting[id.index()] = Some(Call { number, arm, at: now, due });
    }

    fn leave(&mut self, id: TicketId) -> Option<Call> {
        self.waiting.get_mut(id.index())?.take()
    }

    /// Its caller no longer wants it: nobody judges it, unless it was late before.
    pub fn cancelled(&mut self, id: TicketId) {
        if let Some(call) = self.leave(id)
            && self.close(call.number)
        {
            self.arms[call.arm as usize].cancelled += 1;
        }
    }

    pub fn expired(&mut self, id: TicketId) {
        let Some(call) = self.leave(id) else { return };
        self.arms[call.arm as usize].expired += 1;
        if self.close(call.number) {
            self.judge(call.arm, true);
        }
    }

    /// `arm` is the one in force.
    pub fn sealed(&mut self, arm: Arm, batch: &SealedBatch, members: &[TicketId]) {
        let measured = &mut self.arms[arm as usize];
        measured.batches += 1;
        measured.rows += u64::from(batch.rows);
        measured.rows_possible += u64::from(batch.rows_possible);
        measured.cells_real += batch.cells_real;
        measured.cells_padded += batch.cells_padded();
        let mut calls = self.spare.pop().unwrap_or_default();
        for id in members {
            calls.extend(self.leave(*id));
        }
        self.running.push((batch.id, calls));
    }

    pub fn finished(&mut self, now: Moment, batch: u64) {
        let Some(at) = self.running.iter().position(|(id, _)| *id == batch) else { return };
        let (_, mut calls) = self.running.swap_remove(at);
        for call in calls.drain(..) {
            let measured = &mut self.arms[call.arm as usize];
            measured.answered += 1;
            let nanos = u64::try_from(now.since(call.at).as_nanos()).unwrap_or(u64::MAX);
            measured.latency.record(nanos).expect("it grows with what it holds");
            if self.close(call.number) {
                self.judge(call.arm, now > call.due);
            }
        }
        self.spare.push(calls);
    }

    /// Judges late whoever is overdue at `now`.
    pub fn look(&mut self, now: Moment) {
        while let Some(open) = self.open.front().copied().filter(|open| open.judged || open.overdue < now) {
            self.open.pop_front();
            self.first += 1;
            if !open.judged {
                self.judge(open.arm, true);
            }
        }
    }

    /// When to look again: nobody becomes overdue before.
    pub fn next(&self) -> Option<Moment> {
        Some(self.open.front()?.overdue + Duration::from_nanos(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::{Layout, ModelHandle, SealReason};

    const MS: u64 = 1_000_000;

    fn batch(id: u64, rows: u32) -> SealedBatch {
        SealedBatch {
            id,
            model: ModelHandle(0),
            executor: 0,
            rows,
            rows_possible: 8,
            layout: Layout::Padded,
            squares_real: 0,
            padded_len: 10,
            cells_real: 8 * u64::from(rows),
            reason: SealReason::Idle,
            sealed_at: Moment(0),
            generation: 1,
            predicted: 0,
            objective: Duration::ZERO,
        }
    }

    #[test]
    fn a_request_that_waits_too_long_is_late_before_it_is_answered_and_only_once() {
        let mut meter = Meter::new(Duration::from_millis(10));
        meter.arrived(Moment(0), Arm::Changed, None, Some(TicketId(0)));
        meter.arrived(Moment(5 * MS), Arm::Changed, None, Some(TicketId(1)));
        assert_eq!(meter.next(), Some(Moment(10 * MS + 1)));
        meter.look(Moment(10 * MS));
        assert_eq!(meter.slice(), (0, 0), "it may come back at its last moment");
        meter.look(Moment(10 * MS + 1));
        assert_eq!((meter.slice(), meter.open()), ((1, 1), 1));
        meter.sealed(Arm::Changed, &batch(1, 2), &[TicketId(0), TicketId(1)]);
        meter.finished(Moment(12 * MS), 1);
        let changed = meter.arm(Arm::Changed);
        assert_eq!((changed.answered, changed.judged, changed.late), (2, 2, 1));
        assert_eq!(changed.percentile(1.0).as_millis(), 12);
        meter.look(Moment(99 * MS));
        assert_eq!((meter.slice(), meter.open(), meter.next()), ((2, 1), 0, None));
    }

    #[test]
    fn requests_count_for_the_arm_they_came_under_and_batches_for_the_one_that_sealed_them() {
        let mut meter = Meter::new(Duration::from_millis(10));
        meter.arrived(Moment(0), Arm::Baseline, None, Some(TicketId(3)));
        meter.arrived(Moment(0), Arm::Changed, Some(Moment(4 * MS)), Some(TicketId(4)));
        meter.sealed(Arm::Changed, &batch(7, 2), &[TicketId(3), TicketId(4)]);
        meter.finished(Moment(5 * MS), 7);
        let (baseline, changed) = (meter.arm(Arm::Baseline), meter.arm(Arm::Changed));
        assert_eq!((baseline.answered, baseline.late, baseline.batches), (1, 0, 0));
        assert_eq!((changed.answered, changed.late, changed.batches), (1, 1, 1), "late by its own deadline");
        assert!((changed.fill() - 0.25).abs() < 1e-9 && (changed.waste() - 0.2).abs() < 1e-9);
    }

    #[test]
    fn refused_and_given_up_are_late_and_cancelled_are_not_judged() {
        let mut meter = Meter::new(Duration::from_millis(10));
        meter.arrived(Moment(0), Arm::Changed, None, None);
        for id in 0..3 {
            meter.arrived(Moment(0), Arm::Changed, None, Some(TicketId(id)));
        }
        meter.expired(TicketId(0));
        meter.cancelled(TicketId(1));
        meter.cancelled(TicketId(1));
        // Of nobody that is followed.
        meter.expired(TicketId(9));
        meter.finished(Moment(1), 42);
        let changed = meter.arm(Arm::Changed);
        assert_eq!((changed.offered, changed.refused, changed.expired, changed.cancelled), (4, 1, 1, 1));
        assert_eq!((changed.judged, changed.late, meter.open()), (2, 2, 1));
        assert!((changed.on_time() - 0.0).abs() < 1e-9);
    }

    #[test]
    fn beyond_the_bound_requests_are_not_followed_and_counted_so() {
        let mut meter = Meter::new(Duration::from_secs(1));
        for id in 0..OPEN_MAX as u32 + 5 {
            meter.arrived(Moment(0), Arm::Baseline, None, Some(TicketId(id)));
        }
        assert_eq!((meter.open(), meter.unfollowed), (OPEN_MAX, 5));
        meter.look(Moment(2_000_000_000));
        meter.arrived(Moment(2_000_000_001), Arm::Baseline, None, Some(TicketId(0)));
        assert_eq!((meter.open(), meter.unfollowed), (1, 5), "there is room again");
    }
}
