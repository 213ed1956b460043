//! Any pieces of a byte stream to whole frames.
//!
//! The caller owns the buffer: [`Decoder::next`] looks at the bytes that have arrived and says whether a whole frame
//! is there, how many more bytes would help, or why the stream is wrong. So a front-end can read straight into a
//! shared buffer and slice payloads out of it without a copy.
//!
//! Always true
//! - A frame over a limit is refused on its header, before its bytes are waited for. A kind that has no metadata
//!   or no payload has the limit 0 for it.
//! - The head checksum (header and metadata) is verified before a frame is shown. The payload's is left to the caller
//!   through [`Frame::payload_is_intact`], because only that request is lost by it, not the stream.

use super::frame::{FLAG_OPTIONAL, FLAGS_KNOWN, HEADER_LEN, Header, HeaderError, Kind, Limits};
use crate::vocab::Code;

/// One whole frame, as ranges of the buffer it was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub header: Header,
    /// Bytes of the buffer that the frame takes, from its first.
    pub len: usize,
}

impl Frame {
    pub fn metadata<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        &buffer[HEADER_LEN..HEADER_LEN + self.header.metadata_len as usize]
    }

    /// Where the payload lies in the buffer.
    pub fn payload_range(&self) -> std::ops::Range<usize> {
        HEADER_LEN + self.header.metadata_len as usize..self.len
    }

    pub fn payload<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        &buffer[self.payload_range()]
    }

    pub fn payload_is_intact(&self, buffer: &[u8]) -> bool {
        crc32c::crc32c(self.payload(buffer)) == self.header.payload_crc
    }
}

/// Why the stream cannot go on. Each ends the connection with a goaway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    Magic([u8; 3]),
    Version(u8),
    Kind(u8),
    Flags(u8),
    MetadataTooLong { len: u32, max: u32 },
    PayloadTooLong { len: u32, max: u32 },
    HeadChecksum { expected: u32, received: u32 },
}

impl DecodeError {
    pub fn code(&self) -> Code {
        match self {
            DecodeError::MetadataTooLong { .. } | DecodeError::PayloadTooLong { .. } => Code::TooLarge,
            DecodeError::HeadChecksum { .. } => Code::ChecksumMismatch,
            _ => Code::ProtocolError,
        }
    }
}

impl std::fmt::Display for DecodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DecodeError::Magic(got) => {
                write!(f, "expected the magic bytes 46 52 59, got {:02x} {:02x} {:02x}", got[0], got[1], got[2])
            }
            DecodeError::Version(got) => write!(f, "expected protocol version {}, got {got}", super::PROTOCOL_MAJOR),
            DecodeError::Kind(got) => write!(f, "frame kind {got} is unknown and not marked optional"),
            DecodeError::Flags(got) => write!(f, "frame flags {got:#04x} have bits that must be zero"),
            DecodeError::MetadataTooLong { len, max } => {
                write!(f, "metadata of {len} bytes, at most {max} are allowed")
            }
            DecodeError::PayloadTooLong { len, max } => write!(f, "payload of {len} bytes, at most {max} are allowed"),
            DecodeError::HeadChecksum { expected, received } => {
                write!(f, "checksum of header and metadata is {expected:#010x}, the frame says {received:#010x}")
            }
        }
    }
}

impl std::error::Error for DecodeError {}

/// What the bytes so far amount to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A whole frame starts at the buffer's first byte.
    Frame(Frame),
    /// A whole frame of an unknown kind that may be ignored: skip `len` bytes.
    Skip { len: usize },
    /// Nothing whole yet: the frame at the front needs `needed` bytes in all, as far as can be told.
    Incomplete { needed: usize },
}

/// Splits a byte stream into frames.
#[derive(Clone, Copy, Debug)]
pub struct Decoder {
    limits: Limits,
}

impl Decoder {
    pub fn new(limits: Limits) -> Decoder {
        Decoder { limits }
    }

    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Looks at the front of `buffer`.
    ///
    /// Hot: once per frame. Guarded by benches/decoder.rs.
    pub fn next(&self, buffer: &[u8]) -> Result<Step, DecodeError> {
        let Some(head) = buffer.first_chunk::<HEADER_LEN>() else {
            check_prefix(buffer)?;
            return Ok(Step::Incomplete { needed: HEADER_LEN });
        };
        let header = Header::decode(head).map_err(|error| match error {
            HeaderError::Magic(magic) => DecodeError::Magic(magic),
            HeaderError::Version(version) => DecodeError::Version(version),
        })?;
        if header.flags & !FLAGS_KNOWN != 0 {
            return Err(DecodeError::Flags(header.flags));
        }
        let kind = Kind::from_number(header.kind);
        if kind.is_none() && header.flags & FLAG_OPTIONAL == 0 {
            return Err(DecodeError::Kind(header.kind));
        }
        let metadata_max = match kind {
            Some(kind) if !kind.carries_metadata() => 0,
            _ => self.limits.metadata_bytes,
        };
        if header.metadata_len > metadata_max {
            return Err(DecodeError::MetadataTooLong { len: header.metadata_len, max: metadata_max });
        }
        let payload_max = match kind {
            Some(kind) if !kind.carries_payload() => 0,
            _ => self.limits.payload_bytes,
        };
        if header.payload_len > payload_max {
            return Err(DecodeError::PayloadTooLong { len: header.payload_len, max: payload_max });
        }
        // Both lengths are below 2^29 here, so the sum cannot wrap.
        let head_len = HEADER_LEN + header.metadata_len as usize;
        let len = head_len + header.payload_len as usize;
        if buffer.len() < head_len {
            return Ok(Step::Incomplete { needed: len });
        }
        let expected = Header::expected_head_crc(head, &buffer[HEADER_LEN..head_len]);
        if expected != header.head_crc {
            return Err(DecodeError::HeadChecksum { expected, received: header.head_crc });
        }
        if buffer.len() < len {
            return Ok(Step::Incomplete { needed: len });
        }
        Ok(match kind {
            Some(kind) => Step::Frame(Frame { kind, header, len }),
            None => Step::Skip { len },
        })
    }
}

/// Fewer bytes than a header can already be wrong: noise is answered at once, not after 32 bytes of it.
fn check_prefix(buffer: &[u8]) -> Result<(), DecodeError> {
    let magic_len = buffer.len().min(super::frame::MAGIC.len());
    if buffer[..magic_len] != super::frame::MAGIC[..magic_len] {
        let mut got = [0; 3];
        got[..magic_len].copy_from_slice(&buffer[..magic_len]);
        return Err(DecodeError::Magic(got));
    }
    match buffer.get(super::frame::MAGIC.len()) {
        Some(version) if *version != super::PROTOCOL_MAJOR => Err(DecodeError::Version(*version)),
        _ => Ok(()),
    }
}
