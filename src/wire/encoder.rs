//! Messages to bytes, appended to an output buffer so that many frames leave in one write.
//!
//! Always true
//! - A frame is appended whole or not at all.

use bincode::Encode;

use super::frame::{HEADER_LEN, Header, Kind};
use super::message::{MetadataError, encode_into};
use crate::vocab::ModelHandle;

/// What a frame's header says besides what follows from its content.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub kind: Kind,
    pub model: ModelHandle,
    pub request_id: u64,
}

impl Head {
    /// A frame about the connection itself.
    pub fn control(kind: Kind) -> Head {
        Head { kind, model: ModelHandle(0), request_id: 0 }
    }
}

/// Appends a frame whose payload is `payload`.
pub fn append_frame<M: Encode>(
    out: &mut Vec<u8>,
    head: Head,
    metadata: &M,
    payload: &[u8],
) -> Result<(), MetadataError> {
    append_frame_with(out, head, metadata, |out| out.extend_from_slice(payload))
}

/// Appends a frame whose payload is written in place by `write_payload`, so that row bytes are copied once, from the
/// batch's output into the connection's.
///
/// Hot: once per answer. Guarded by benches/scatter.rs.
pub fn append_frame_with<M: Encode>(
    out: &mut Vec<u8>,
    head: Head,
    metadata: &M,
    write_payload: impl FnOnce(&mut Vec<u8>),
) -> Result<(), MetadataError> {
    let start = out.len();
    let payload_at = begin(out, metadata)?;
    write_payload(out);
    let crc = crc32c::crc32c(&out[payload_at..]);
    end(&mut out[start..], head, payload_at - start, crc);
    Ok(())
}

/// Leaves room for a header and appends the metadata. Returns where the payload begins.
fn begin<M: Encode>(out: &mut Vec<u8>, metadata: &M) -> Result<usize, MetadataError> {
    let start = out.len();
    out.resize(start + HEADER_LEN, 0);
    if let Err(error) = encode_into(metadata, out) {
        out.truncate(start);
        return Err(error);
    }
    Ok(out.len())
}

/// Writes the header of a frame that is there but for it.
fn end(frame: &mut [u8], head: Head, payload_at: usize, payload_crc: u32) {
    let header = Header {
        kind: head.kind as u8,
        flags: 0,
        model: head.model,
        request_id: head.request_id,
        metadata_len: (payload_at - HEADER_LEN) as u32,
        payload_len: u32::try_from(frame.len() - payload_at).expect("payloads are limited far below 4 GiB"),
        payload_crc,
        head_crc: 0,
    };
    let bytes = header.encode(&frame[HEADER_LEN..payload_at]);
    frame[..HEADER_LEN].copy_from_slice(&bytes);
}

/// A frame that is too long to be written at one go: its payload and the checksum of that grow in parts.
#[derive(Debug)]
pub struct LongFrame {
    head: Head,
    bytes: Vec<u8>,
    payload_at: usize,
    crc: u32,
}

impl LongFrame {
    /// With nothing in its payload, which will have `payload_len` bytes. It lies in `memory`, whatever that held before.
    pub fn begin<M: Encode>(
        head: Head,
        metadata: &M,
        payload_len: usize,
        mut memory: Vec<u8>,
    ) -> Result<LongFrame, MetadataError> {
        memory.clear();
        let payload_at = begin(&mut memory, metadata)?;
        memory.reserve_exact(payload_len);
        Ok(LongFrame { head, bytes: memory, payload_at, crc: crc32c::crc32c(&[]) })
    }

    /// Bytes of payload so far.
    pub fn payload_len(&self) -> usize {
        self.bytes.len() - self.payload_at
    }

    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.crc = crc32c::crc32c_append(self.crc, bytes);
    }

    /// The whole frame.
    pub fn end(mut self) -> Vec<u8> {
        end(&mut self.bytes, self.head, self.payload_at, self.crc);
        self.bytes
    }
}

/// Appends a frame that has neither metadata nor payload (cancel, ping, pong, stats).
pub fn append_bare(out: &mut Vec<u8>, head: Head) {
    append_frame(out, head, &(), &[]).expect("no metadata is within every limit");
}

/// The next multiple of 8: where the next tensor of a payload starts.
pub fn align8(len: usize) -> usize {
    (len + 7) & !7
}

/// Appends zeros until the payload that began at `payload_at` is a multiple of 8 long.
pub fn pad_to_8(out: &mut Vec<u8>, payload_at: usize) {
    let len = out.len() - payload_at;
    out.resize(payload_at + align8(len), 0);
}
