//! Histograms with fixed buckets and exact counts, recorded with two atomic additions, or two plain ones by a thread alone.
//!
//! Always true
//! - The count is the sum of the buckets, so a scrape never shows a count that its buckets do not add up to.
//! - Buckets are the same in every process, so histograms of replicas can be added.
//!
//! Elsewhere: names and labels (export.rs). `prometheus_client`'s own histogram takes a lock for each observation,
//! so only its text encoder is used here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of time buckets in nanoseconds: 1-2-3-5 steps from 1 µs to 100 s. Batches take from tens of
/// microseconds to seconds; a floor of a millisecond would hide all of the former.
pub const TIME_BOUNDS: [u64; 33] = {
    let steps = [1, 2, 3, 5];
    let mut bounds = [0; 33];
    let mut decade = 1_000;
    let mut at = 0;
    while at < 33 {
        bounds[at] = decade * steps[at % 4];
        if at % 4 == 3 {
            decade *= 10;
        }
        at += 1;
    }
    bounds
};

/// Upper bounds of counts (rows, cells): powers of two from 1 to 1 Mi.
pub const COUNT_BOUNDS: [u64; 21] = {
    let mut bounds = [0; 21];
    let mut at = 0;
    while at < 21 {
        bounds[at] = 1 << at;
        at += 1;
    }
    bounds
};

/// Upper bounds of shares in thousandths: steps of 5 %.
pub const SHARE_BOUNDS: [u64; 21] = {
    let mut bounds = [0; 21];
    let mut at = 0;
    while at < 21 {
        bounds[at] = 50 * at as u64;
        at += 1;
    }
    bounds
};

/// Counts of values up to each bound, and of those above the last one.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [u64],
    /// One more than bounds: the last counts what is above all of them.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
    /// What an observation is divided by when it is shown: nanoseconds are kept, seconds are shown.
    scale: f64,
}

/// A histogram's content at one instant, as the text encoder takes it: buckets not cumulative, the last +Inf.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub sum: f64,
    pub count: u64,
    pub buckets: Vec<(f64, u64)>,
}

impl Snapshot {
    /// Adds the content of a histogram with the same bounds.
    pub fn add(&mut self, other: &Snapshot) {
        self.sum += other.sum;
        self.count += other.count;
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            assert_eq!(mine.0, theirs.0, "histograms of one metric have the same bounds");
            mine.1 += theirs.1;
        }
    }
}

impl Histogram {
    pub fn times() -> Histogram {
        Histogram::new(&TIME_BOUNDS, 1e9)
    }

    pub fn counts() -> Histogram {
        Histogram::new(&COUNT_BOUNDS, 1.0)
    }

    pub fn shares() -> Histogram {
        Histogram::new(&SHARE_BOUNDS, 1000.0)
    }

    fn new(bounds: &'static [u64], scale: f64) -> Histogram {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Histogram { bounds, buckets, sum: AtomicU64::new(0), scale }
    }

    /// From any thread: two atomic additions after a binary search in one or two cache lines.
    pub fn observe(&self, value: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    pub fn observe_time(&self, time: Duration) {
        self.observe(nanos(time));
    }

    /// From the one thread that observes this histogram: loads and stores without a lock. Two threads would lose counts.
    ///
    /// Hot: twice per request (queue delay, latency).
    pub fn observe_alone(&self, value: u64) {
        let add = |to: &AtomicU64, n: u64| to.store(to.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        add(&self.buckets[bucket], 1);
        add(&self.sum, value);
    }

    pub fn observe_time_alone(&self, time: Duration) {
        self.observe_alone(nanos(time));
    }

    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    pub fn snapshot(&self) -> Snapshot {
        let bounds = self.bounds.iter().map(|bound| *bound as f64 / self.scale).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> =
            bounds.zip(&self.buckets).map(|(bound, count)| (bound, count.load(Ordering::Relaxed))).collect();
        Snapshot {
            sum: self.sum.load(Ordering::Relaxed) as f64 / self.scale,
            count: buckets.iter().map(|(_, count)| count).sum(),
            buckets,
        }
    }
}

/// Without the 128 bits of `as_nanos`.
fn nanos(time: Duration) -> u64 {
    time.as_secs().saturating_mul(1_000_000_000).saturating_add(time.subsec_nanos().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_bounds_ascend_from_a_microsecond_to_a_hundred_seconds() {
        assert!(TIME_BOUNDS.is_sorted_by(|a, b| a < b));
        assert_eq!(TIME_BOUNDS[0], 1_000);
        assert_eq!(TIME_BOUNDS[32], 100_000_000_000);
    }

    #[test]
    fn a_value_on_a_bound_belongs_to_the_bucket_of_that_bound() {
        let histogram = Histogram::counts();
        histogram.observe(4);
        histogram.observe(5);
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.buckets[2], (4.0, 1));
        assert_eq!(snapshot.buckets[3], (8.0, 1));
        assert_eq!((snapshot.count, snapshot.sum), (2, 9.0));
    }

    #[test]
    fn one_thread_alone_counts_as_any_would() {
        let (any, alone) = (Histogram::times(), Histogram::times());
        for nanos in (0..60).map(|power| 3u64.pow(power % 40)) {
            any.observe_time(Duration::from_nanos(nanos));
            alone.observe_time_alone(Duration::from_nanos(nanos));
        }
        assert_eq!(any.snapshot(), alone.snapshot());
        assert_eq!(nanos(Duration::MAX), u64::MAX);
    }

    #[test]
    fn what_is_above_all_bounds_is_still_counted() {
        let histogram = Histogram::times();
        histogram.observe_time(Duration::from_secs(1000));
        let snapshot = histogram.snapshot();
        assert_eq!(*snapshot.buckets.last().expect("+Inf is always there"), (f64::INFINITY, 1));
        assert_eq!((snapshot.count, snapshot.sum), (1, 1000.0));
    }
}
