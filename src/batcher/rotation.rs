//! Recorders of the scheduler's inputs: captures that somebody reads, and the last seconds, kept in memory for a dump.
//!
//! What is kept is two traces, each whole: the one being written, and the one before it, which ended where it began. So a dump
//! has the last [`ROTATE_EVERY`] at least, or what fits the memory.
//!
//! Always true
//! - Inputs of both traces together have at most the bytes given, and a chunk; a trace that would need more is ended early, and
//!   another begins. The scheduler's state is beside that, once in each.
//! - A trace begins and ends between two turns, where the scheduler's state can be saved.
//!
//! Elsewhere: how inputs are written (recorder.rs), when a dump is made (keeping.rs), files (timeline/files.rs).

use std::time::Duration;

use super::recorder::{Recorder, Tap};
use super::{Batcher, Outlet};
use crate::capture::Sink;
use crate::scheduler::decision::DecisionLog;
use crate::vocab::Moment;

/// A trace in memory is ended after so long, and another begins.
pub const ROTATE_EVERY: Duration = Duration::from_secs(10);

/// All that records.
#[derive(Default)]
pub struct Recorders {
    /// Those that somebody reads: a capture, the shadow schedulers, both or, mostly, nobody.
    pub read: Vec<Recorder>,
    kept: Option<Kept>,
}

struct Kept {
    /// None before the first turn, and when the scheduler's state is too large for a trace.
    current: Option<Box<Recorder>>,
    since: Moment,
    /// Bytes of the current trace before its first input.
    start_bytes: usize,
    before: Option<Vec<u8>>,
    bytes_max: usize,
}

impl Recorders {
    /// Those that are on.
    pub fn each(&mut self) -> impl Iterator<Item = &mut Recorder> {
        let kept = self.kept.as_mut().and_then(|kept| kept.current.as_deref_mut());
        self.read.iter_mut().chain(kept)
    }

    /// What is kept, as whole traces, the newest first.
    pub fn whole(&mut self, log: &DecisionLog) -> Vec<Vec<u8>> {
        let Some(kept) = &mut self.kept else { return Vec::new() };
        let current = kept.current.as_mut().map(|recorder| recorder.whole(log));
        current.into_iter().chain(kept.before.clone()).collect()
    }
}

impl<O: Outlet> Batcher<O> {
    /// From now on the last inputs are kept in so much memory; 0: none are.
    pub fn keep_trace(&mut self, bytes_max: usize) {
        let kept = Kept { current: None, since: Moment::ZERO, start_bytes: 0, before: None, bytes_max };
        self.recorders.kept = (bytes_max > 0).then_some(kept);
    }

    /// The turn is over: begins another trace, if it is time.
    ///
    /// Hot: once per turn.
    pub(super) fn rotate(&mut self, now: Moment) {
        let Some(kept) = &mut self.recorders.kept else { return };
        let first = kept.current.is_none() && kept.since == Moment::ZERO;
        let is_full = kept
            .current
            .as_ref()
            .is_some_and(|recorder| recorder.kept_bytes() - kept.start_bytes >= kept.bytes_max / 2);
        if !first && !is_full && now < kept.since + ROTATE_EVERY {
            return;
        }
        kept.since = now;
        if let Some(mut recorder) = kept.current.take() {
            kept.before = Some(recorder.whole(self.scheduler.log()));
        }
        let (names, shards) = (self.names(), self.tickets.len());
        let sink = Sink::Memory(Vec::new());
        let begun = Recorder::start(&self.scheduler, &names, shards, now, Duration::MAX, (Tap::Dump, sink));
        if let Some(kept) = &mut self.recorders.kept {
            kept.current = begun.ok().map(Box::new);
            kept.start_bytes = kept.current.as_ref().map_or(0, |recorder| recorder.kept_bytes());
        }
    }
}
