//! A finished batch to one response per ticket.
//!
//! Always true
//! - Each member is answered from its own rows, by the shard that asked; a shard gets one message per batch.
//! - Row bytes are copied once: from the batch's output into the connection's, at one go or in parts ([`LongAnswer`]). Those of
//!   a request that was run in parts are copied once more, where they wait for the others.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::contract::TensorSpec;
use crate::mail::{FinishedBatch, Member, ToShard};
use crate::mailbox::Sender;
use crate::vocab::{Layout, ModelHandle, Moment, Refusal};
use crate::wire::encoder::{Head, LongFrame, align8, append_frame_with, pad_to_8};
use crate::wire::frame::Kind;
use crate::wire::message::{ErrorMessage, InferResult, Item, List, RESULT_TRUNCATED, Receipt, TensorMeta, Timings};

/// What a caller wants to know beside the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Its timeline.
    pub timings: bool,
    /// What came of it, and why; with the timeline.
    pub receipt: bool,
    /// How much later than intended it was sent, in microseconds; 0: not stated.
    pub late_us: u32,
}

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
    details: Details,
    now: Moment,
) {
    let (head, result) = whole_result(finished, member, request_id, details, || timings_of(finished, member, now));
    append(out, finished, head, &result, rows_of(finished, member));
}

/// Of a request that has all its rows.
fn whole_result(
    finished: &FinishedBatch,
    member: &Member,
    request_id: u64,
    details: Details,
    timings: impl FnOnce() -> Timings,
) -> (Head, InferResult) {
    let mut result = result_of(finished, member, member.part.of_rows);
    describe(&mut result, finished, member, details, timings);
    (Head { kind: Kind::Result, model: finished.batch.model, request_id }, result)
}

/// Appends the item frame of one member that has not failed: its rows, whether all of the request's or not.
pub fn append_item(out: &mut Vec<u8>, finished: &FinishedBatch, member: &Member, request_id: u64) {
    let (head, item) = item(finished, member, request_id);
    append(out, finished, head, &item, rows_of(finished, member));
}

fn item(finished: &FinishedBatch, member: &Member, request_id: u64) -> (Head, Item) {
    let head = Head { kind: Kind::Item, model: finished.batch.model, request_id };
    (head, Item { at_row: member.part.at_row, result: result_of(finished, member, member.rows) })
}

/// Appends the result frame of a request whose rows have all been answered by items.
pub fn append_end(
    out: &mut Vec<u8>,
    finished: &FinishedBatch,
    member: &Member,
    request_id: u64,
    details: Details,
    now: Moment,
) {
    let mut result = InferResult { outputs: List::new(), ..result_of(finished, member, 0) };
    describe(&mut result, finished, member, details, || timings_of(finished, member, now));
    let head = Head { kind: Kind::Result, model: finished.batch.model, request_id };
    append_frame_with(out, head, &result, |_| {}).expect("less than a result with rows");
}

/// Writes a member's rows of an output.
fn rows_of(finished: &FinishedBatch, member: &Member) -> impl Fn(&mut Vec<u8>, usize, &TensorSpec) {
    move |out, index, spec| {
        for row in member.first_row..member.first_row + member.rows {
            out.extend_from_slice(finished.output.row_bytes(spec, index, row, member.len));
        }
    }
}

/// What is said about `rows` rows of a member.
fn result_of(finished: &FinishedBatch, member: &Member, rows: u32) -> InferResult {
    let batch = &finished.batch;
    let mut result = InferResult {
        batch: batch.id,
        batch_rows: batch.rows,
        padded_len: batch.padded_len,
        seal_reason: batch.reason as u8,
        flags: if member.truncated { RESULT_TRUNCATED } else { 0 },
        generation: batch.generation,
        outputs: List::new(),
        timings: None,
        receipt: None,
    };
    for (index, spec) in finished.contract.outputs.iter().enumerate() {
        let mut dims = List::new();
        dims.push(rows).expect("rank was checked with the contract");
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
    result
}

/// Adds what the caller asked to be told.
fn describe(
    result: &mut InferResult,
    finished: &FinishedBatch,
    member: &Member,
    details: Details,
    timings: impl FnOnce() -> Timings,
) {
    if details.timings || details.receipt {
        result.timings = Some(timings());
    }
    if details.receipt {
        result.receipt = Some(Box::new(Receipt { late_us: details.late_us.into(), ..receipt_of(finished, member) }));
    }
}

/// What came of a member, and why. Its caller knows more: when it meant to send it.
pub fn receipt_of(finished: &FinishedBatch, member: &Member) -> Receipt {
    let batch = &finished.batch;
    let nanos = |from: Moment, to: Moment| to.since(from).as_nanos() as u64;
    let queue = nanos(member.admitted_at, batch.sealed_at);
    let behind = member.waited.behind.min(queue);
    let other = member.waited.other.min(queue - behind);
    let padding = match batch.layout {
        Layout::Padded => u64::from(member.rows) * u64::from(batch.padded_len.saturating_sub(member.len)),
        Layout::Packed => 0,
    };
    let mut co_lens = List::new();
    for mate in finished.members.iter().filter(|mate| mate.first_row != member.first_row) {
        if co_lens.push(mate.len).is_err() {
            break;
        }
    }
    Receipt {
        executor: batch.executor,
        layout: batch.layout as u8,
        rows: member.rows,
        len: member.len,
        rows_possible: batch.rows_possible,
        cells_real: batch.cells_real,
        cells_padded: batch.cells_padded(),
        cells_own_padding: padding,
        held_ns: queue - behind - other,
        behind_ns: behind,
        other_ns: other,
        upload_ns: finished.device.map_or(0, |device| nanos(device.asked_at, device.uploaded_at)),
        readback_ns: finished.device.map_or(0, |device| nanos(device.computed_at, finished.finished_at)),
        predicted_ns: batch.predicted,
        late_us: 0,
        co_members: finished.members.len() as u32 - 1,
        co_lens,
    }
}

fn append<M: bincode::Encode>(
    out: &mut Vec<u8>,
    finished: &FinishedBatch,
    head: Head,
    message: &M,
    rows: impl Fn(&mut Vec<u8>, usize, &TensorSpec),
) {
    append_frame_with(out, head, message, |out| {
        let payload_at = out.len();
        for (index, spec) in finished.contract.outputs.iter().enumerate() {
            pad_to_8(out, payload_at);
            rows(out, index, spec);
        }
    })
    .expect(METADATA_FITS);
}

const METADATA_FITS: &str = "8 tensors of rank 8 are within the metadata limit";

/// An answer whose rows take too long to be copied at one go: [`append_result`] and [`append_item`] in parts.
#[derive(Debug)]
pub struct LongAnswer {
    frame: LongFrame,
    /// Rows of each output, where they were gathered from more than one batch.
    assembled: Option<Vec<Vec<u8>>>,
    /// The output that is being written, and how many of its bytes are.
    at: (usize, usize),
}

impl LongAnswer {
    /// What [`append_result`] appends. `memory` is for the frame.
    pub fn result(
        finished: &FinishedBatch,
        member: &Member,
        request_id: u64,
        details: Details,
        now: Moment,
        memory: Vec<u8>,
    ) -> LongAnswer {
        let (head, result) = whole_result(finished, member, request_id, details, || timings_of(finished, member, now));
        LongAnswer::begin(finished, head, &result, finished.answer_bytes(member), None, memory)
    }

    /// What [`append_item`] appends.
    pub fn item(finished: &FinishedBatch, member: &Member, request_id: u64, memory: Vec<u8>) -> LongAnswer {
        let (head, item) = item(finished, member, request_id);
        LongAnswer::begin(finished, head, &item, finished.answer_bytes(member), None, memory)
    }

    fn begin<M: bincode::Encode>(
        finished: &FinishedBatch,
        head: Head,
        message: &M,
        bytes: usize,
        assembled: Option<Vec<Vec<u8>>>,
        memory: Vec<u8>,
    ) -> LongAnswer {
        // Each output begins at a multiple of 8.
        let room = bytes + 8 * finished.contract.outputs.len();
        let frame = LongFrame::begin(head, message, room, memory).expect(METADATA_FITS);
        LongAnswer { frame, assembled, at: (0, 0) }
    }

    /// Writes at most `most` bytes more of rows, of the same member of the same batch. True when all are written.
    pub fn write(&mut self, finished: &FinishedBatch, member: &Member, most: usize) -> bool {
        let end = self.frame.payload_len() + most;
        while let Some(spec) = finished.contract.outputs.get(self.at.0) {
            if self.at.1 == 0 {
                let written = self.frame.payload_len();
                self.frame.extend(&[0; 8][..align8(written) - written]);
            }
            let written = self.frame.payload_len();
            let rest = match &self.assembled {
                Some(outputs) => &outputs[self.at.0][self.at.1..],
                None => rest_of_row(finished, member, spec, self.at),
            };
            if rest.is_empty() {
                self.at = (self.at.0 + 1, 0);
                continue;
            }
            if written >= end {
                return false;
            }
            let part = &rest[..rest.len().min(end - written)];
            self.at.1 += part.len();
            self.frame.extend(part);
        }
        true
    }

    /// Bytes of its payload so far.
    pub fn written(&self) -> usize {
        self.frame.payload_len()
    }

    /// Its frame, when all is written.
    pub fn end(self) -> Vec<u8> {
        self.frame.end()
    }
}

/// What follows, within a row, the first bytes of a member's rows of an output; empty when there is no more.
fn rest_of_row<'a>(
    finished: &'a FinishedBatch,
    member: &Member,
    spec: &TensorSpec,
    (index, done): (usize, usize),
) -> &'a [u8] {
    let row_bytes = spec.row_bytes(member.len);
    match done.checked_div(row_bytes) {
        Some(row) if row < member.rows as usize => {
            let row = member.first_row + row as u32;
            &finished.output.row_bytes(spec, index, row, member.len)[done % row_bytes..]
        }
        _ => &[],
    }
}

/// Requests that are run in parts, and the rows of theirs that are done.
///
/// Always true: an entry lives from a request's first part to its last, or to [`Assemblies::drop_entry`], which whoever
/// ends a request calls; each holds no more than its answer.
#[derive(Debug, Default)]
pub struct Assemblies {
    /// By slot of the request's ticket.
    entries: BTreeMap<u32, Assembly>,
}

#[derive(Debug)]
struct Assembly {
    generation: u32,
    rows_left: u32,
    /// Rows of each output, in the request's order.
    outputs: Vec<Vec<u8>>,
    /// Of the part that came last.
    timings: Timings,
}

impl Assemblies {
    /// Keeps some of a part's rows; each is to be taken once. True when the request is complete, and
    /// [`Assemblies::append_result`] can be called.
    pub fn take_rows(&mut self, finished: &FinishedBatch, member: &Member, rows: Range<u32>, now: Moment) -> bool {
        let outputs = || {
            let bytes = |spec: &TensorSpec| vec![0; member.part.of_rows as usize * spec.row_bytes(member.len)];
            finished.contract.outputs.iter().map(bytes).collect()
        };
        let fresh = || Assembly {
            generation: member.key.generation,
            rows_left: member.part.of_rows,
            outputs: outputs(),
            timings: Timings::default(),
        };
        let entry = self.entries.entry(member.key.slot).or_insert_with(fresh);
        if entry.generation != member.key.generation {
            *entry = fresh();
        }
        for (index, spec) in finished.contract.outputs.iter().enumerate() {
            let row_bytes = spec.row_bytes(member.len);
            for row in rows.clone() {
                let at = (member.part.at_row + row) as usize * row_bytes;
                let bytes = finished.output.row_bytes(spec, index, member.first_row + row, member.len);
                entry.outputs[index][at..at + row_bytes].copy_from_slice(bytes);
            }
        }
        entry.timings = timings_of(finished, member, now);
        entry.rows_left -= rows.len() as u32;
        entry.rows_left == 0
    }

    /// Appends the result frame of a complete request. Batch, length and timeline are those of its last part.
    pub fn append_result(
        &mut self,
        out: &mut Vec<u8>,
        finished: &FinishedBatch,
        member: &Member,
        request_id: u64,
        details: Details,
    ) {
        let entry = self.take_complete(member);
        let (head, result) = whole_result(finished, member, request_id, details, || entry.timings);
        append(out, finished, head, &result, |out, index, _| out.extend_from_slice(&entry.outputs[index]));
    }

    /// The same in parts. `memory` is for the frame.
    pub fn long_result(
        &mut self,
        finished: &FinishedBatch,
        member: &Member,
        request_id: u64,
        details: Details,
        memory: Vec<u8>,
    ) -> LongAnswer {
        let entry = self.take_complete(member);
        let (head, result) = whole_result(finished, member, request_id, details, || entry.timings);
        let bytes = entry.outputs.iter().map(Vec::len).sum();
        LongAnswer::begin(finished, head, &result, bytes, Some(entry.outputs), memory)
    }

    fn take_complete(&mut self, member: &Member) -> Assembly {
        self.entries.remove(&member.key.slot).expect("its last part was taken")
    }

    /// Counts a part whose rows are kept nowhere, because they have been answered. True when it was the last; its entry then
    /// goes with the request.
    pub fn count_part(&mut self, member: &Member) -> bool {
        let fresh = || Assembly {
            generation: member.key.generation,
            rows_left: member.part.of_rows,
            outputs: Vec::new(),
            timings: Timings::default(),
        };
        let entry = self.entries.entry(member.key.slot).or_insert_with(fresh);
        if entry.generation != member.key.generation {
            *entry = fresh();
        }
        entry.rows_left -= member.rows;
        entry.rows_left == 0
    }

    /// The request of this slot has ended.
    pub fn drop_entry(&mut self, slot: u32) {
        if !self.entries.is_empty() {
            self.entries.remove(&slot);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// Where a member's time went, up to `now`.
pub fn timings_of(finished: &FinishedBatch, member: &Member, now: Moment) -> Timings {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::contract::{Contract, Dim, Length, NonFinite};
    use crate::executor::batch::BatchOutput;
    use crate::mail::Part;
    use crate::scheduler::SealedBatch;
    use crate::vocab::{DType, TicketKey};

    /// Outputs of which none ends at a multiple of 8 by itself.
    fn contract() -> Arc<Contract> {
        let tensor = |name: &str, dtype, shape| TensorSpec {
            name: name.into(),
            dtype,
            shape,
            pad: 0.0,
            range: None,
            nonfinite: NonFinite::Refuse,
        };
        let outputs = vec![
            tensor("bytes", DType::U8, vec![Dim::Named("n".into())]),
            tensor("floats", DType::F32, vec![Dim::Fixed(3)]),
            tensor("five", DType::U8, vec![Dim::Fixed(5)]),
        ];
        Arc::new(Contract {
            name: "m".into(),
            version: "1".into(),
            architecture: "m".into(),
            inputs: vec![outputs[0].clone()],
            outputs,
            length: Some(Length { name: "n".into(), min: 1, max: 100 }),
            text: None,
            rows_max: 8,
        })
    }

    /// A batch of one member for each length, of 3 rows; every byte of its outputs is another than its neighbours.
    fn finished(layout: Layout, lens: &[u32], of_rows: u32) -> FinishedBatch {
        let contract = contract();
        let rows: Vec<u32> = lens.iter().flat_map(|len| [*len; 3]).collect();
        let mut output = BatchOutput::default();
        output.prepare(&contract, layout, &rows, 100);
        for (index, output) in output.outputs.iter_mut().enumerate() {
            (0..).zip(output.bytes_mut()).for_each(|(at, byte): (usize, _)| *byte = (at * 7 + at / 251 + index) as u8);
        }
        let member = |(at, len): (u32, &u32)| Member {
            key: TicketKey { shard: 0, slot: 5, generation: 1 },
            first_row: 3 * at,
            rows: 3,
            len: *len,
            part: Part { at_row: 3 * at, of_rows },
            received_at: Moment(0),
            admitted_at: Moment(1),
            waited: Default::default(),
            truncated: false,
        };
        let batch = SealedBatch::plain(layout, &rows, 100);
        FinishedBatch {
            contract,
            batch,
            members: (0..).zip(lens).map(member).collect(),
            output,
            failure: None,
            packed_at: Moment(3),
            started_at: Moment(4),
            finished_at: Moment(5),
            device: None,
        }
    }

    /// All of an answer, and how many bytes of rows each of its parts had.
    fn in_parts(mut long: LongAnswer, finished: &FinishedBatch, member: &Member, most: usize) -> (Vec<u8>, Vec<usize>) {
        let mut parts = Vec::new();
        loop {
            let before = long.written();
            let whole = long.write(finished, member, most);
            parts.push(long.written() - before);
            if whole {
                return (long.end(), parts);
            }
        }
    }

    proptest! {
        /// The plain functions are the reference.
        #[test]
        fn an_answer_in_parts_is_the_same_bytes(
            packed: bool,
            lens in prop::collection::vec(1..100u32, 1..4),
            most in 1..700usize,
            receipt: bool,
        ) {
            let layout = if packed { Layout::Packed } else { Layout::Padded };
            let of_rows = 3 * lens.len() as u32;
            let details = Details { timings: true, receipt, late_us: 3 };
            let bound = |parts: &[usize]| parts.iter().all(|part| *part <= most + 3 * 7);

            // Each member by itself, as a request of its own.
            let batch = finished(layout, &lens, 3);
            for member in &batch.members {
                let (mut result, mut item) = (Vec::new(), Vec::new());
                append_result(&mut result, &batch, member, 9, details, Moment(8));
                let long = LongAnswer::result(&batch, member, 9, details, Moment(8), vec![1; 33]);
                let (written, parts) = in_parts(long, &batch, member, most);
                prop_assert_eq!(written, result);
                prop_assert!(bound(&parts), "{:?}", parts);
                append_item(&mut item, &batch, member, 9);
                let long = LongAnswer::item(&batch, member, 9, Vec::new());
                prop_assert_eq!(in_parts(long, &batch, member, most).0, item);
            }

            // All as parts of one request, whose rows have one length.
            let batch = finished(layout, &vec![lens[0]; lens.len()], of_rows);
            let [mut plain, mut long] = [Assemblies::default(), Assemblies::default()];
            for (at, member) in batch.members.iter().enumerate() {
                let last = at + 1 == lens.len();
                prop_assert_eq!(plain.take_rows(&batch, member, 0..3, Moment(8)), last);
                prop_assert!(!long.take_rows(&batch, member, 0..2, Moment(7)));
                prop_assert_eq!(long.take_rows(&batch, member, 2..3, Moment(8)), last);
            }
            let (last, mut result) = (batch.members.last().expect("one at least"), Vec::new());
            plain.append_result(&mut result, &batch, last, 9, details);
            let long_result = long.long_result(&batch, last, 9, details, Vec::new());
            prop_assert_eq!(in_parts(long_result, &batch, last, most).0, result);
            prop_assert!(plain.is_empty() && long.is_empty());
        }
    }
}
