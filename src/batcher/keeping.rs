//! The flight recorder's side in the batcher: writes down what becomes of each batch, and hands a copy on when an objective was
//! missed or a model panicked.
//!
//! Always true
//! - Once per batch, nothing per request but a look at it while its batch is packed; nothing is allocated but for a dump.
//! - A dump that finds the one before unwritten is dropped, and said so: the batcher waits for no file.
//!
//! Elsewhere: the ring (timeline), when (timeline/breach.rs), files (timeline/files.rs).

use super::{Batcher, Outlet};
use crate::clock;
use crate::executor::pack::Row;
use crate::scheduler::SealedBatch;
use crate::timeline::breach::{BreachWatch, Why};
use crate::timeline::files::Dump;
use crate::timeline::{BatchRecord, LENS_KEPT, Oldest, Ran, Ring};
use crate::vocab::Moment;

/// What is kept of the last batches.
#[derive(Debug, Default)]
pub struct Kept {
    ring: Ring,
    /// A batch that is being packed.
    packing: Option<BatchRecord>,
    dumps: Option<(BreachWatch, flume::Sender<Dump>)>,
    /// To be dumped when the turn is over.
    due: Option<Why>,
}

impl Kept {
    /// A batch was sealed, of these members in row order.
    ///
    /// Hot: once per batch, a look at each member.
    pub fn sealed<'a>(&mut self, batch: &SealedBatch, rows: impl Iterator<Item = Row<'a>>) {
        if !self.ring.is_on() {
            return;
        }
        let mut lens = [0; LENS_KEPT];
        let (mut members, mut oldest) = (0, None::<Oldest>);
        for Row { request, admitted_at, waited } in rows {
            if let Some(len) = lens.get_mut(members as usize) {
                *len = request.len;
            }
            if oldest.is_none_or(|oldest| request.received_at < oldest.received_at) {
                let (rows, len, received_at) = (request.rows, request.len, request.received_at);
                oldest = Some(Oldest { at: members, rows, len, received_at, admitted_at, waited });
            }
            members += 1;
        }
        self.packing = Some(BatchRecord {
            id: batch.id,
            model: batch.model,
            executor: batch.executor,
            generation: batch.generation,
            reason: batch.reason,
            layout: batch.layout,
            rows: batch.rows,
            rows_possible: batch.rows_possible,
            padded_len: batch.padded_len,
            cells_real: batch.cells_real,
            cells_padded: batch.cells_padded(),
            predicted: batch.predicted,
            members,
            lens,
            oldest: oldest.expect("a batch has members"),
            sealed_at: batch.sealed_at,
            packed_at: batch.sealed_at,
            ran: None,
            answered_at: None,
        });
    }

    /// The batch that was sealed last is packed.
    pub fn packed(&mut self, packed_at: Moment) {
        if let Some(record) = self.packing.take() {
            self.ring.push(BatchRecord { packed_at: packed_at.max(record.sealed_at), ..record });
        }
    }
}

impl<O: Outlet> Batcher<O> {
    /// From now on it is kept what becomes of the last so many batches.
    pub fn keep_batches(&mut self, capacity: usize) {
        self.kept.ring = Ring::new(capacity);
    }

    /// From now on copies go to this row when `watch` says so.
    pub fn keep_dumps(&mut self, watch: BreachWatch, dumps: flume::Sender<Dump>) {
        self.kept.dumps = Some((watch, dumps));
    }

    /// The last batches that were sealed at `since` or later, oldest first.
    pub(super) fn batches(&self, last: usize, since: Moment) -> Vec<BatchRecord> {
        self.kept.ring.last(last, since, |batch| self.telemetry.answered_at(batch))
    }

    pub(super) fn note_ran(&mut self, now: Moment, batch: &SealedBatch, ran: Ran) {
        let Some(record) = self.kept.ring.finish(batch.id, ran) else { return };
        let members = record.members;
        if let Some((watch, _)) = &mut self.kept.dumps
            && let Some(why) = watch.finished(now, batch.model, members, ran.late, ran.outcome.is_panic())
        {
            self.kept.due = Some(why);
        }
    }

    /// The turn is over: hands a copy on, if one is due.
    pub(super) fn dump(&mut self, now: Moment) {
        let Some(why) = self.kept.due.take() else { return };
        let traces = self.recorders.whole(self.scheduler.log());
        let Some((_, dumps)) = &self.kept.dumps else { return };
        let unix_ms = clock::unix_time(now).as_millis() as u64;
        let dump = Dump { why, unix_ms, records: self.batches(usize::MAX, Moment::ZERO), traces };
        if dumps.try_send(dump).is_err() {
            tracing::warn!(why = why.name(), "the flight recorder was not kept: the one before is still being written");
        }
    }
}
