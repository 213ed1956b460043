//! What a trace is made of: one record for each recorded request, written by the shard that answered it, when it has ended.
//!
//! Always true
//! - A request is recorded where its caller records it, not where its caller does not, and by this server's own share where the
//!   caller names no trace.
//! - A request that is not recorded costs a branch.
//!
//! Elsewhere: spans (the room otel), who keeps recorded requests until they end (frontend/traces.rs).

use std::time::Duration;

use crate::vocab::{Code, Layout, ModelHandle, Moment, SealReason, TraceContext};

/// One request that has ended.
#[derive(Clone, Debug)]
pub struct RequestRecord {
    /// Its own span.
    pub span: TraceContext,
    /// The caller's.
    pub parent: Option<[u8; 8]>,
    pub model: ModelHandle,
    pub request_id: u64,
    pub shard: u16,
    pub rows: u32,
    pub len: u32,
    pub received_at: Moment,
    pub ended_at: Moment,
    pub code: Code,
    /// What the caller was told, where it was not answered.
    pub message: String,
    pub send_lag: Option<Duration>,
    /// The batch that carried it, or its last part.
    pub batch: Option<Passage>,
}

/// A request's way through a batch.
#[derive(Clone, Copy, Debug)]
pub struct Passage {
    pub admitted_at: Moment,
    pub batch: BatchRecord,
}

/// One batch that ran.
#[derive(Clone, Copy, Debug)]
pub struct BatchRecord {
    pub id: u64,
    pub model: ModelHandle,
    pub executor: u16,
    pub layout: Layout,
    pub rows: u32,
    pub rows_possible: u32,
    /// Length that rows were padded to: the bucket; of the longest where they lie end to end.
    pub padded_len: u32,
    pub cells_real: u64,
    pub cells_padded: u64,
    pub reason: SealReason,
    pub sealed_at: Moment,
    pub packed_at: Moment,
    pub started_at: Moment,
    pub finished_at: Moment,
    pub failed: bool,
}

/// Chooses a share of requests, evenly over time: how many to leave out is drawn when one is taken, so that leaving one out is
/// a subtraction.
#[derive(Clone, Debug)]
pub struct Share {
    ratio: f64,
    left_out: u64,
}

impl Share {
    /// `draw` gives numbers in [0, 1).
    pub fn new(ratio: f64, draw: impl FnOnce() -> f64) -> Share {
        let mut share = Share { ratio, left_out: 0 };
        share.left_out = share.next(draw);
        share
    }

    pub fn takes(&mut self, draw: impl FnOnce() -> f64) -> bool {
        if self.left_out > 0 {
            self.left_out -= 1;
            return false;
        }
        self.left_out = self.next(draw);
        true
    }

    /// Of independent requests, each taken with the same chance, the number before the next that is taken.
    fn next(&self, draw: impl FnOnce() -> f64) -> u64 {
        match self.ratio {
            ratio if ratio <= 0.0 => u64::MAX,
            ratio if ratio >= 1.0 => 0,
            ratio => ((1.0 - draw()).ln() / (1.0 - ratio).ln()) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn taken(ratio: f64, of: u32) -> u32 {
        let state = Cell::new(7u64);
        let draw = || {
            state.set(state.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
            (state.get() >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut share = Share::new(ratio, draw);
        (0..of).filter(|_| share.takes(draw)).count() as u32
    }

    #[test]
    fn a_share_of_requests_is_taken_and_none_or_all_where_that_is_asked_for() {
        assert_eq!((taken(0.0, 10_000), taken(1.0, 10_000)), (0, 10_000));
        let tenth = taken(0.1, 100_000);
        assert!((9_500..=10_500).contains(&tenth), "{tenth} of 100000");
        let few = taken(0.001, 1_000_000);
        assert!((800..=1_200).contains(&few), "{few} of 1000000");
    }
}
