//! Rows to a batch, padded or end to end, straight from the bytes that were received: one copy.
//!
//! Always true
//! - Every byte of every staged input is written: real elements, then the contract's padding value.

use crate::contract::Contract;
use crate::mail::{Member, Request, Waited};
use crate::scheduler::SealedBatch;
use crate::vocab::{Layout, Moment};

use super::slot::VacantSlot;

/// What packing needs of one member, in row order.
pub struct Row<'a> {
    pub request: &'a Request,
    pub admitted_at: Moment,
    pub waited: Waited,
}

/// How padding is written, found once per model: most contracts pad with zeros.
#[derive(Clone, Debug)]
pub struct Pads(Vec<Vec<u8>>);

impl Pads {
    pub fn of(contract: &Contract) -> Pads {
        Pads(contract.inputs.iter().map(|spec| spec.pad_bytes()).collect())
    }
}

/// Copies each member's rows to their places and, where the batch is padded, fills the rest of each place with padding.
///
/// Hot: once per batch, every byte. Guarded by benches/pack.rs. Allocates only while the slot's buffers still grow.
pub fn pack<'a>(
    slot: &mut VacantSlot,
    contract: &Contract,
    pads: &Pads,
    batch: &SealedBatch,
    rows: impl Iterator<Item = Row<'a>> + Clone,
) {
    let staging = slot.staging_mut();
    staging.members.clear();
    staging.lens.clear();
    let mut first_row = 0;
    for Row { request, admitted_at, waited } in rows.clone() {
        staging.members.push(Member {
            key: request.key,
            first_row,
            rows: request.rows,
            len: request.len,
            part: request.part,
            received_at: request.received_at,
            admitted_at,
            waited,
            truncated: request.truncated,
        });
        staging.lens.extend(std::iter::repeat_n(request.len, request.rows as usize));
        first_row += request.rows;
    }
    assert_eq!(first_row, batch.rows, "members' rows add up to the batch's");
    if staging.inputs.len() < contract.inputs.len() {
        staging.inputs.resize_with(contract.inputs.len(), Default::default);
    }
    for (index, spec) in contract.inputs.iter().enumerate() {
        let packed = batch.layout == Layout::Packed;
        let padded_bytes = spec.row_bytes(batch.padded_len);
        let staged = &mut staging.inputs[index];
        staged.set_len(match packed {
            true => staging.lens.iter().map(|len| spec.row_bytes(*len)).sum(),
            false => batch.rows as usize * padded_bytes,
        });
        let mut places = staged.bytes_mut();
        for Row { request, .. } in rows.clone() {
            let row_bytes = spec.row_bytes(request.len);
            let stride = if packed { row_bytes } else { padded_bytes };
            let (mine, rest) = places.split_at_mut(request.rows as usize * stride);
            places = rest;
            let start = contract.input_offset(index, request.part.of_rows, request.len);
            let offset = start + request.part.at_row as usize * row_bytes;
            let bytes = &request.payload[offset..offset + request.rows as usize * row_bytes];
            pack_rows(bytes, row_bytes, stride, &pads.0[index], mine);
        }
    }
}

/// Copies rows of `row_bytes` to places of `stride` bytes and fills the rest of each place with `pad`.
pub fn pack_rows(bytes: &[u8], row_bytes: usize, stride: usize, pad: &[u8], out: &mut [u8]) {
    if row_bytes == stride {
        out.copy_from_slice(bytes);
        return;
    }
    for (row, place) in bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(stride)) {
        let (real, padding) = place.split_at_mut(row_bytes);
        real.copy_from_slice(row);
        if pad.iter().all(|byte| *byte == 0) {
            padding.fill(0);
        } else {
            padding.chunks_exact_mut(pad.len()).for_each(|element| element.copy_from_slice(pad));
        }
    }
}
