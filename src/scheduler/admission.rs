//! Admits or refuses.
//!
//! Always true
//! - A request is measured against every batch budget before it is queued, so none waits for a batch that cannot be.

use std::time::Duration;

use super::backlog::Rank;
use super::{Arrival, Class, Policy, Scheduler, nanos_of, urgency_of};
use crate::vocab::{Code, Layout, Moment, Refusal, Stage};

/// What waits: rows, padded cells (rows × bucket length) and payload bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub struct Totals {
    pub rows: u64,
    pub cells: u64,
    pub bytes: u64,
}

impl Totals {
    pub fn of(arrival: &Arrival, bucket_len: u32) -> Totals {
        Totals {
            rows: u64::from(arrival.rows),
            cells: u64::from(arrival.rows) * u64::from(bucket_len),
            bytes: arrival.bytes,
        }
    }

    pub fn add(&mut self, other: &Totals) {
        self.rows += other.rows;
        self.cells += other.cells;
        self.bytes += other.bytes;
    }

    pub fn subtract(&mut self, other: &Totals) {
        self.rows -= other.rows;
        self.cells -= other.cells;
        self.bytes -= other.bytes;
    }
}

/// Percent of every bound on what waits that a class leaves free, the highest class first: near overload there is room for what
/// matters most. Rounded down, so that a bound of a few rows is one for all.
const KEPT_FREE: [u64; Class::COUNT] = [0, 5, 15];

/// Rounded down, and without the 128 bits of the plain product: asked for each request, six times.
fn percent_of(whole: u64, percent: u64) -> u64 {
    whole / 100 * percent + whole % 100 * percent / 100
}

/// Bounds on what may wait, of the whole server or of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub struct QueueLimits {
    pub rows_max: u64,
    pub cells_max: u64,
    pub bytes_max: u64,
}

impl QueueLimits {
    /// No bound of its own: the server's applies.
    pub const NONE: QueueLimits = QueueLimits { rows_max: u64::MAX, cells_max: u64::MAX, bytes_max: u64::MAX };

    /// Whether `asked` fits beside what is `waiting`. Lower classes leave the last of it to higher ones: [`KEPT_FREE`].
    pub fn check(
        &self,
        waiting: &Totals,
        asked: &Totals,
        class: Class,
        whose: &str,
        wait: impl Fn() -> Duration,
    ) -> Result<(), Refusal> {
        for (what, waiting, asked, max) in [
            ("rows", waiting.rows, asked.rows, self.rows_max),
            ("padded cells", waiting.cells, asked.cells, self.cells_max),
            ("payload bytes", waiting.bytes, asked.bytes, self.bytes_max),
        ] {
            if asked > max {
                return Err(Refusal::too_large(format!(
                    "expected at most {max} {what}, the {whose}'s queue limit; got {asked}"
                )));
            }
            let open = max - percent_of(max, KEPT_FREE[class.index()]);
            if open < waiting + asked && waiting + asked <= max && waiting > 0 {
                let message = format!(
                    "the {whose}'s queue holds {waiting} of {max} {what}, and above {open} takes no requests of class {}",
                    class.index()
                );
                return Err(Refusal::overloaded(message, wait()));
            }
            if waiting + asked > max {
                let message = format!("the {whose}'s queue holds {waiting} of {max} {what}, {asked} more do not fit");
                return Err(Refusal::overloaded(message, wait()));
            }
        }
        Ok(())
    }
}

/// The bucket of a request that fits at least a batch of its own.
pub fn fits_any_batch(policy: &Policy, arrival: &Arrival) -> Result<u16, Refusal> {
    let bucket = policy.buckets.of(arrival.len).ok_or_else(|| {
        Refusal::too_large(format!("expected a length of at most {}, got {}", policy.buckets.longest(), arrival.len))
    })?;
    if arrival.rows == 0 {
        // It would be queued and never counted.
        return Err(Refusal::invalid("expected at least 1 row, got 0"));
    }
    let len = policy.buckets.len_at(bucket);
    if !policy.holds(arrival.rows, len) {
        return Err(Refusal::too_large(format!(
            "expected at most {} rows of length {} in one batch, got {}",
            policy.rows_at(len),
            arrival.len,
            arrival.rows
        )));
    }
    Ok(bucket)
}

/// Refuses for now what would wait for `wait`: to come back after `rest`. In ns.
fn overloaded_for(message: String, wait: f64, rest: f64) -> (Refusal, u64) {
    let retry_after = Duration::from_nanos(rest as u64).max(Duration::from_millis(1));
    (Refusal::overloaded(message, retry_after), wait as u64)
}

impl Scheduler {
    /// Refuses what cannot be done in time, the heaviest of several tenants while the queue is long, and what a standing queue
    /// would make wait for long; policies that know arrival order only refuse nothing but the last. With the forecast behind it, in ns.
    pub(super) fn admit_by_forecast(
        &mut self,
        now: Moment,
        arrival: &Arrival,
        asked: &Totals,
    ) -> Result<(), (Refusal, u64)> {
        let queue = &self.models[arrival.model.index()];
        let Some(deadline) = arrival.deadline else { return Ok(()) };
        let slack = nanos_of(deadline.since(now));
        if !queue.policy.kind.is_fair() {
            return self.admit_by_backlog(now, arrival, slack);
        }
        let alone = queue.cost.alone_at_best(arrival.rows, arrival.len);
        // With nothing else to run it runs anyway: a prediction that is wrong is corrected by that.
        if alone > slack && queue.totals.rows > 0 && queue.cost.is_trusted() {
            let message = format!(
                "the deadline cannot be met: {:.1} ms are left, and {} rows of length {} take {:.1} ms alone",
                slack / 1e6,
                arrival.rows,
                arrival.len,
                alone / 1e6
            );
            return Err((Refusal::at_stage(Code::DeadlineExceeded, Stage::Arrival, message), alone as u64));
        }
        let fair = queue.policy.tuning.fair_admission;
        let executors = self.seats.count(queue.policy.group);
        let wait = self.drain_rate.nanos(queue.totals.cells + asked.cells, executors);
        if fair > 0.0 && wait > fair * slack && queue.tenants.is_heaviest(now, arrival.tenant) {
            let message = format!(
                "the queue takes {:.1} ms to drain, and this tenant offers the most of it; others come first",
                wait / 1e6
            );
            return Err(overloaded_for(message, wait, wait - fair * slack));
        }
        self.admit_by_backlog(now, arrival, slack)
    }

    /// Refuses what would wait for more than its share of its slack behind a queue that has stood so long for a while.
    fn admit_by_backlog(&mut self, now: Moment, arrival: &Arrival, slack: f64) -> Result<(), (Refusal, u64)> {
        let executors = self.seats.count(self.models[arrival.model.index()].policy.group);
        let queue = &mut self.models[arrival.model.index()];
        let share = queue.policy.overload_admission();
        if share == 0.0 {
            return Ok(());
        }
        let rank = Rank::of(arrival.class, urgency_of(slack));
        let ahead = queue.backlog.nanos(queue.backlog.ahead(rank));
        let between = queue.typical_batch() / executors.max(1) as f64;
        // Less than two batches would leave executors idle between them, where hardly anybody is refused.
        let most = (share * slack).max(2.0 * between);
        // Padded rows of one length may wait for long, and use it: with batches of a millisecond it is pauses of whoever asks that
        // the queue has to last for.
        let bound = if queue.policy.layout == Layout::Packed { queue.backlog.bound(rank, most) } else { most };
        let stands = queue.backlog.stands(now, rank, ahead, bound, slack, between);
        // Among tenants, each waits for its own behind as many others. Whether the queue stands is asked of all of it: who has little in
        // it says nothing of that.
        let wait = if stands {
            let (own, tenants) = queue.tenants.waiting_of(arrival.tenant);
            ahead.min(queue.backlog.nanos(own) * tenants as f64)
        } else {
            0.0
        };
        queue.backlog.answered(rank, wait > bound);
        if wait <= bound {
            return Ok(());
        }
        let message = format!(
            "the queue ahead takes {:.1} ms and does not get shorter; of its {:.1} ms a request may wait {:.1} then",
            wait / 1e6,
            slack / 1e6,
            bound / 1e6
        );
        // Room comes with each batch, and not for all who are refused: whoever comes back at once is refused again.
        Err(overloaded_for(message, wait, (wait - bound).max(bound / 2.0)))
    }
}

/// How fast the queue empties, learned from finished batches, to say when to come back.
#[derive(Clone, Copy, Debug, Default, bincode::Decode, bincode::Encode)]
pub struct DrainRate {
    nanos_per_cell: f64,
}

impl DrainRate {
    pub fn observe(&mut self, cells: u64, service: Duration) {
        let sample = service.as_nanos() as f64 / cells.max(1) as f64;
        self.nanos_per_cell =
            if self.nanos_per_cell == 0.0 { sample } else { 0.9 * self.nanos_per_cell + 0.1 * sample };
    }

    /// Expected time until `cells` are gone, in ns.
    pub fn nanos(&self, cells: u64, executors: usize) -> f64 {
        self.nanos_per_cell * cells as f64 / executors.max(1) as f64
    }

    /// Time until `cells` are gone; between 1 ms and 10 s, so that a hint is neither noise nor for ever.
    pub fn time_to_drain(&self, cells: u64, executors: usize) -> Duration {
        Duration::from_nanos(self.nanos(cells, executors) as u64)
            .clamp(Duration::from_millis(1), Duration::from_secs(10))
    }
}
