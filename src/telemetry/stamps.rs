//! When the answers of the last batches were written, by shards for whoever asks.
//!
//! Always true
//! - Noting is one atomic maximum, for each batch and shard; a batch's place is its number modulo the capacity.
//! - A place holds the time of the last of its batches' answers: whoever reads it for a batch that ended later than that finds
//!   an earlier time, and knows that it is another's.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::vocab::Moment;

#[derive(Debug)]
pub struct Stamps(Box<[AtomicU64]>);

impl Stamps {
    /// For so many batches, at least one.
    pub fn new(capacity: usize) -> Stamps {
        Stamps((0..capacity.max(1)).map(|_| AtomicU64::new(0)).collect())
    }

    fn of(&self, batch: u64) -> &AtomicU64 {
        &self.0[(batch % self.0.len() as u64) as usize]
    }

    /// Answers of a batch have been written.
    pub fn note(&self, batch: u64, now: Moment) {
        // Nothing else is read because of it.
        self.of(batch).fetch_max(now.nanos(), Ordering::Relaxed);
    }

    /// When the last answers of a batch were written, or of one that had its place before.
    pub fn get(&self, batch: u64) -> Option<Moment> {
        match self.of(batch).load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Moment(nanos)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_shard_that_answers_counts() {
        let stamps = Stamps::new(4);
        assert_eq!(stamps.get(3), None);
        stamps.note(3, Moment(50));
        stamps.note(3, Moment(40));
        assert_eq!((stamps.get(3), stamps.get(2)), (Some(Moment(50)), None));
        assert_eq!(stamps.get(7), Some(Moment(50)), "earlier than the end of batch 7, which has not been answered");
    }
}
