//! The flight recorder: what became of the last batches, on one clock, and what is made of it.
//!
//! ```text
//! received ▸ admitted ▸ sealed ▸ packed ▸ started ▸ finished ▸ answered      (host)
//!                                asked ▸ uploaded ▸ … ▸ computed             (device, where there is one)
//! ```
//!
//! Always true
//! - A record has a fixed size and its place is its batch's number modulo the ring's: writing one allocates nothing and
//!   searches for nothing. The ring is made at start; its bytes are [`Ring::bytes`].
//! - Moments of one record never run backwards, whatever threads' clocks say: each stage begins where the one before ended.
//!
//! Elsewhere: who writes (batcher), as sentences (story.rs), for a trace viewer (trace.rs), when it is kept (breach.rs), in
//! files (files.rs).

pub mod breach;
pub mod files;
pub mod story;
pub mod trace;

use std::time::Duration;

use crate::vocab::{Layout, ModelHandle, Moment, SealReason};

/// Lengths of members kept of each batch.
pub const LENS_KEPT: usize = 32;

/// What a request waited for between admission and seal, apart from what the policy held it for: in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// Every executor that could run it ran something else.
    pub behind: u64,
    /// Its model had its share of the executors, or its composition was not complete.
    pub other: u64,
}

/// When a device did what, on the server's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceTimes {
    /// It was asked for all of it.
    pub asked_at: Moment,
    /// The rows had been copied to it.
    pub uploaded_at: Moment,
    /// The answers were there, and the copy back began.
    pub computed_at: Moment,
}

/// How a batch ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    #[default]
    Ok,
    Failed,
    /// With a panic of the model.
    Panicked,
    /// It failed, and its requests ran again in parts: most have their answers.
    Bisected {
        /// It was a panic.
        panicked: bool,
    },
    /// It ran for so long that it was given up.
    Hung,
}

impl Outcome {
    pub fn is_panic(self) -> bool {
        matches!(self, Outcome::Panicked | Outcome::Bisected { panicked: true })
    }

    pub fn name(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Failed => "failed",
            Outcome::Panicked => "panicked",
            Outcome::Hung => "hung",
            Outcome::Bisected { panicked: false } => "bisected",
            Outcome::Bisected { panicked: true } => "bisected after a panic",
        }
    }
}

/// When a batch ran, and what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ran {
    pub started_at: Moment,
    pub finished_at: Moment,
    /// Where it ran on a device, and as one.
    pub device: Option<DeviceTimes>,
    /// Time of the executor: of a device, what it computed.
    pub service: Duration,
    pub outcome: Outcome,
    /// Members that had been here for longer than the model's objective when it finished.
    pub late: u32,
}

impl Ran {
    pub fn new(started_at: Moment, finished_at: Moment, device: Option<DeviceTimes>, service: Duration) -> Ran {
        Ran { started_at, finished_at, device, service, outcome: Outcome::Ok, late: 0 }
    }
}

/// The member of a batch that had been here longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oldest {
    /// Its place among the members.
    pub at: u32,
    pub rows: u32,
    pub len: u32,
    pub received_at: Moment,
    pub admitted_at: Moment,
    pub waited: Waited,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchRecord {
    pub id: u64,
    pub model: ModelHandle,
    pub executor: u16,
    /// Of the policy that decided it.
    pub generation: u32,
    pub reason: SealReason,
    pub layout: Layout,
    pub rows: u32,
    pub rows_possible: u32,
    pub padded_len: u32,
    pub cells_real: u64,
    pub cells_padded: u64,
    /// How long it was expected to take, in ns; 0 where nothing was known.
    pub predicted: u64,
    /// Requests in it.
    pub members: u32,
    /// Lengths of the first of them.
    pub lens: [u32; LENS_KEPT],
    pub oldest: Oldest,
    pub sealed_at: Moment,
    pub packed_at: Moment,
    /// None while it waits for its executor or runs.
    pub ran: Option<Ran>,
    /// The last of its answers was written; None while that is not known.
    pub answered_at: Option<Moment>,
}

impl BatchRecord {
    /// Lengths of the members that were kept.
    pub fn lens(&self) -> &[u32] {
        &self.lens[..(self.members as usize).min(LENS_KEPT)]
    }

    /// The last moment that is known of it.
    pub fn last_at(&self) -> Moment {
        let finished_at = self.ran.map_or(self.packed_at, |ran| ran.finished_at);
        self.answered_at.map_or(finished_at, |answered_at| answered_at.max(finished_at))
    }
}

/// The last batches.
#[derive(Debug, Default)]
pub struct Ring {
    /// By number modulo the capacity.
    records: Vec<Option<BatchRecord>>,
    last: u64,
}

impl Ring {
    /// Room for so many batches; 0: nothing is kept.
    pub fn new(capacity: usize) -> Ring {
        Ring { records: vec![None; capacity], last: 0 }
    }

    pub fn is_on(&self) -> bool {
        !self.records.is_empty()
    }

    /// Memory of a ring of so many batches.
    pub fn bytes(capacity: usize) -> u64 {
        (capacity * size_of::<Option<BatchRecord>>()) as u64
    }

    fn place(&self, id: u64) -> usize {
        (id % self.records.len() as u64) as usize
    }

    /// A batch was packed. Numbers rise.
    ///
    /// Hot: once per batch.
    pub fn push(&mut self, record: BatchRecord) {
        let place = self.place(record.id);
        self.last = record.id;
        self.records[place] = Some(record);
    }

    /// A batch came back: its record, if it is still there.
    ///
    /// Hot: once per batch.
    pub fn finish(&mut self, id: u64, mut ran: Ran) -> Option<&BatchRecord> {
        if !self.is_on() {
            return None;
        }
        let place = self.place(id);
        let record = self.records[place].as_mut().filter(|record| record.id == id)?;
        // Threads read the clock one after the other, and need not agree to the last nanosecond.
        ran.started_at = ran.started_at.max(record.packed_at);
        ran.finished_at = ran.finished_at.max(ran.started_at);
        if let Some(device) = &mut ran.device {
            device.asked_at = device.asked_at.max(record.packed_at).min(ran.started_at);
            device.uploaded_at = device.uploaded_at.max(device.asked_at).min(ran.started_at);
            device.computed_at = device.computed_at.max(ran.started_at).min(ran.finished_at);
        }
        record.ran = Some(ran);
        Some(record)
    }

    /// Copies of the last `count` batches that were sealed at `since` or later, oldest first; `answered` says when the answers
    /// of one were written.
    pub fn last(&self, count: usize, since: Moment, answered: impl Fn(u64) -> Option<Moment>) -> Vec<BatchRecord> {
        if !self.is_on() {
            return Vec::new();
        }
        let count = (count as u64).min(self.records.len() as u64).min(self.last);
        let ids = self.last - count + 1..=self.last;
        let known = ids.filter_map(|id| self.records[self.place(id)].filter(|record| record.id == id));
        known
            .filter(|record| record.sealed_at >= since)
            .map(|mut record| {
                // Before it ran, a time can only be of the batch that had the place before.
                let ran = record.ran.map(|ran| ran.finished_at);
                record.answered_at = ran.and_then(|finished_at| answered(record.id).filter(|at| *at >= finished_at));
                record
            })
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A batch of three requests; times in µs after `at`.
    pub(crate) fn record(id: u64, at: u64) -> BatchRecord {
        let micros = |count: u64| Moment((at + count) * 1000);
        let mut lens = [0; LENS_KEPT];
        lens[..3].copy_from_slice(&[9, 5, 3]);
        BatchRecord {
            id,
            model: ModelHandle(0),
            executor: 0,
            generation: 2,
            reason: SealReason::QueueDelay,
            layout: Layout::Padded,
            rows: 3,
            rows_possible: 8,
            padded_len: 10,
            cells_real: 17,
            cells_padded: 30,
            predicted: 400_000,
            members: 3,
            lens,
            oldest: Oldest {
                at: 1,
                rows: 1,
                len: 5,
                received_at: micros(0),
                admitted_at: micros(20),
                waited: Waited { behind: 100_000, other: 0 },
            },
            sealed_at: micros(320),
            packed_at: micros(330),
            ran: None,
            answered_at: None,
        }
    }

    pub(crate) fn ran(record: &BatchRecord) -> Ran {
        let start = record.packed_at + Duration::from_micros(5);
        Ran::new(start, start + Duration::from_micros(500), None, Duration::from_micros(500))
    }

    fn ids(records: &[BatchRecord]) -> Vec<u64> {
        records.iter().map(|record| record.id).collect()
    }

    #[test]
    fn the_last_batches_are_kept_and_older_ones_are_not() {
        let mut ring = Ring::new(4);
        for id in 1..=6 {
            ring.push(record(id, id * 1000));
        }
        assert_eq!(ids(&ring.last(100, Moment::ZERO, |_| None)), [3, 4, 5, 6]);
        assert_eq!(ids(&ring.last(2, Moment::ZERO, |_| None)), [5, 6]);
        assert_eq!(ids(&ring.last(100, record(5, 5000).sealed_at, |_| None)), [5, 6], "sealed then or later");
        assert!(ring.finish(2, ran(&record(2, 2000))).is_none(), "its place is another's");
        assert!(ring.finish(5, ran(&record(5, 5000))).is_some());
        let records = ring.last(2, Moment::ZERO, |_| Some(Moment(9_000_000_000)));
        assert_eq!(records.iter().map(|record| record.ran.is_some()).collect::<Vec<_>>(), [true, false]);
        assert_eq!(records[0].answered_at, Some(Moment(9_000_000_000)));
        assert_eq!(records[1].answered_at, None, "what has not run has no answer");
    }

    #[test]
    fn a_ring_of_no_batches_keeps_none() {
        let mut ring = Ring::new(0);
        assert!(!ring.is_on() && ring.finish(1, ran(&record(1, 0))).is_none());
        assert!(ring.last(10, Moment::ZERO, |_| None).is_empty());
        assert_eq!(Ring::bytes(0), 0);
    }

    #[test]
    fn stages_never_run_backwards() {
        let mut ring = Ring::new(1);
        let record = record(1, 0);
        ring.push(record);
        let early = Ran::new(Moment(0), Moment(0), None, Duration::ZERO);
        let device = DeviceTimes { asked_at: Moment(0), uploaded_at: Moment::FAR, computed_at: Moment(0) };
        let ran = ring.finish(1, Ran { device: Some(device), ..early }).expect("it is there").ran.expect("it ran");
        assert_eq!((ran.started_at, ran.finished_at), (record.packed_at, record.packed_at));
        let device = ran.device.expect("on a device");
        assert_eq!([device.asked_at, device.uploaded_at, device.computed_at], [record.packed_at; 3]);
        let read = ring.last(1, Moment::ZERO, |_| Some(Moment(1)))[0];
        assert_eq!(read.answered_at, None, "an answer before the end is of the batch that had the place before");
    }
}
