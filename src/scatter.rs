//! A finished batch to one response per ticket.
//!
//! Always true
//! - Each member is answered from its own rows, by the shard that asked; a shard gets one message per batch.
//! - Row bytes are copied once: from the batch's output into the connection's.

use std::sync::Arc;

use crate::mail::{FinishedBatch, Member, ToShard};
use crate::mailbox::Sender;
use crate::vocab::{ModelHandle, Moment, Refusal};
use crate::wire::encoder::{Head, append_frame_with, pad_to_8};
use crate::wire::frame::Kind;
use crate::wire::message::{ErrorMessage, InferResult, List, RESULT_TRUNCATED, TensorMeta, Timings};

/// Mails the batch to every shard that has a member in it.
pub fn send(finished: &Arc<FinishedBatch>, shards: &[Sender<ToShard>]) {
    for (index, shard) in shards.iter().enumerate() {
        if finished.members.iter().any(|member| usize::from(member.key.shard) == index) {
            // A shard that has ended answered what it owed.
            let _ = shard.send_or_wait(ToShard::Batch(Arc::clone(finished)));
        }
    }
}

/// The member's own error, if the batch or one of its rows failed.
pub fn failure_of(finished: &FinishedBatch, member: &Member) -> Option<Refusal> {
    if let Some(failure) = &finished.failure {
        return Some(failure.clone());
    }
    let rows = member.first_row..member.first_row + member.rows;
    let error = finished.output.row_errors.iter().find(|error| rows.contains(&error.row))?;
    Some(Refusal::new(error.code, error.message.clone()))
}

/// Appends the result frame of one member that has not failed.
///
/// Hot: once per answer. Guarded by benches/scatter.rs.
pub fn append_result(
    out: &mut Vec<u8>,
    finished: &FinishedBatch,
    member: &Member,
    request_id: u64,
    timings: bool,
    now: Moment,
) {
    let batch = &finished.batch;
    let contract = &finished.contract;
    let mut result = InferResult {
        batch: batch.id,
        batch_rows: batch.rows,
        padded_len: batch.padded_len,
        seal_reason: batch.reason as u8,
        flags: if member.truncated { RESULT_TRUNCATED } else { 0 },
        outputs: List::new(),
        timings: timings.then(|| timings_of(finished, member, now)),
    };
    for (index, spec) in contract.outputs.iter().enumerate() {
        let mut dims = List::new();
        dims.push(member.rows).expect("rank was checked with the contract");
        for dim in &spec.shape {
            let size = match dim {
                crate::contract::Dim::Fixed(size) => *size,
                crate::contract::Dim::Named(_) => member.len,
            };
            dims.push(size).expect("rank was checked with the contract");
        }
        let tensor = TensorMeta { index: index as u8, dtype: spec.dtype as u8, dims };
        result.outputs.push(tensor).expect("the number of outputs was checked with the contract");
    }
    let head = Head { kind: Kind::Result, model: batch.model, request_id };
    append_frame_with(out, head, &result, |out| {
        let payload_at = out.len();
        for (index, spec) in contract.outputs.iter().enumerate() {
            pad_to_8(out, payload_at);
            for row in member.first_row..member.first_row + member.rows {
                out.extend_from_slice(finished.output.row_bytes(spec, index, row, member.len));
            }
        }
    })
    .expect("8 tensors of rank 8 are within the metadata limit");
}

fn timings_of(finished: &FinishedBatch, member: &Member, now: Moment) -> Timings {
    let nanos = |from: Moment, to: Moment| to.since(from).as_nanos() as u64;
    // Each stage starts where the one before ended, so the parts add up to the total.
    let sealed_at = finished.batch.sealed_at;
    Timings {
        admit_ns: nanos(member.received_at, member.admitted_at),
        queue_ns: nanos(member.admitted_at, sealed_at),
        pack_ns: nanos(sealed_at, finished.packed_at),
        wait_ns: nanos(finished.packed_at, finished.started_at),
        run_ns: nanos(finished.started_at, finished.finished_at),
        scatter_ns: nanos(finished.finished_at, now),
    }
}

/// Appends the error frame of a request that ended without a result.
pub fn append_error(out: &mut Vec<u8>, model: ModelHandle, request_id: u64, refusal: &Refusal) {
    let message = ErrorMessage::from_refusal(refusal);
    append_frame_with(out, Head { kind: Kind::Error, model, request_id }, &message, |_| {})
        .expect("an error's sentence is cut to fit");
}
