//! Admits or refuses.
//!
//! Always true
//! - A request is measured against every batch budget before it is queued, so none waits for a batch that cannot be.

use std::time::Duration;

use super::{Arrival, Class, Policy};
use crate::vocab::Refusal;

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
