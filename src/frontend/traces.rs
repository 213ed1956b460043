//! Requests of a shard that are recorded for a trace, from their acceptance to their end.
//!
//! Always true
//! - Without a receiver of traces nothing is kept, and a request costs a branch.
//! - At most [`LIVE_MAX`] are kept; what does not fit, or finds the way to the exporter full, is counted and not recorded.
//!
//! Elsewhere: what is recorded (telemetry/spans.rs), what becomes of it (the room otel).

use slab::Slab;

use crate::mail::{FinishedBatch, Member};
use crate::mailbox::Sender;
use crate::telemetry::Telemetry;
use crate::telemetry::spans::{BatchRecord, Passage, RequestRecord, Share};
use crate::vocab::{Code, Moment, TraceContext};

use super::inflight::Waiting;

/// Recorded requests that may be in flight on a shard.
pub const LIVE_MAX: usize = 4096;

/// Where records go, and of how many requests whose callers name no trace.
#[derive(Clone, Debug)]
pub struct Tracing {
    pub records: Sender<RequestRecord>,
    pub sample_ratio: f64,
}

/// What is known when a request is accepted.
#[derive(Debug)]
struct Live {
    span: TraceContext,
    parent: Option<[u8; 8]>,
    received_at: Moment,
    rows: u32,
    len: u32,
}

#[derive(Debug, Default)]
pub struct Traces(Option<Box<Recording>>);

#[derive(Debug)]
struct Recording {
    records: Sender<RequestRecord>,
    share: Share,
    live: Slab<Live>,
}

impl Traces {
    pub fn new(tracing: Option<Tracing>) -> Traces {
        Traces(tracing.map(|Tracing { records, sample_ratio }| {
            let share = Share::new(sample_ratio, rand::random::<f64>);
            Box::new(Recording { records, share, live: Slab::new() })
        }))
    }

    /// A request is accepted. Returns what its slot keeps: 0 where it is not recorded.
    pub fn begin(
        &mut self,
        caller: Option<TraceContext>,
        [rows, len]: [u32; 2],
        received_at: Moment,
        telemetry: &Telemetry,
    ) -> u32 {
        let Some(recording) = &mut self.0 else { return 0 };
        let recorded = match caller {
            Some(caller) => caller.is_sampled(),
            None => recording.share.takes(rand::random::<f64>),
        };
        if !recorded {
            return 0;
        }
        if recording.live.len() >= LIVE_MAX {
            telemetry.otel().dropped_records(1);
            return 0;
        }
        let trace_id = caller.map_or_else(rand::random, |caller| caller.trace_id);
        let flags = caller.map_or(TraceContext::SAMPLED, |caller| caller.flags);
        let span = TraceContext { trace_id, span_id: rand::random(), flags };
        let parent = caller.map(|caller| caller.span_id);
        1 + recording.live.insert(Live { span, parent, received_at, rows, len }) as u32
    }

    /// A request has ended. Of one that was answered, or failed with its batch, the batch is named.
    pub fn end(
        &mut self,
        shard: u16,
        waiting: &Waiting,
        (code, message): (Code, &str),
        batch: Option<(&FinishedBatch, &Member)>,
        ended_at: Moment,
        telemetry: &Telemetry,
    ) {
        let Some(recording) = self.0.as_mut().filter(|_| waiting.trace != 0) else { return };
        let Live { span, parent, received_at, rows, len } = recording.live.remove(waiting.trace as usize - 1);
        let record = RequestRecord {
            span,
            parent,
            model: waiting.model,
            request_id: waiting.request_id,
            shard,
            rows,
            // Of a text, only its batch knows how many tokens it came to.
            len: batch.map_or(len, |(_, member)| member.len),
            received_at,
            ended_at,
            code,
            message: message.to_owned(),
            send_lag: waiting.send_lag(),
            batch: batch.map(|(finished, member)| passage_of(finished, member)),
        };
        if recording.records.send(record).is_err() {
            telemetry.otel().dropped_records(1);
        }
    }
}

fn passage_of(finished: &FinishedBatch, member: &Member) -> Passage {
    let batch = &finished.batch;
    let record = BatchRecord {
        id: batch.id,
        model: batch.model,
        executor: batch.executor,
        layout: batch.layout,
        rows: batch.rows,
        rows_possible: batch.rows_possible,
        padded_len: batch.padded_len,
        cells_real: batch.cells_real,
        cells_padded: batch.cells_padded(),
        reason: batch.reason,
        sealed_at: batch.sealed_at,
        packed_at: finished.packed_at,
        started_at: finished.started_at,
        finished_at: finished.finished_at,
        failed: finished.failure.is_some(),
    };
    Passage { admitted_at: member.admitted_at, batch: record }
}
