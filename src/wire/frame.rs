//! The fixed 32-byte header and the size limits.
//!
//! ```text
//! offset  size  field
//!      0     3  magic "FRY"
//!      3     1  protocol major version
//!      4     1  kind
//!      5     1  flags
//!      6     2  model handle
//!      8     8  request id
//!     16     4  metadata length in bytes
//!     20     4  payload length in bytes
//!     24     4  CRC32C of the payload
//!     28     4  CRC32C of header bytes 0..28 followed by the metadata
//! ```
//! All integers are little-endian. Behind the header come the metadata, then the payload.

use crate::vocab::ModelHandle;

pub const MAGIC: [u8; 3] = *b"FRY";
pub const PROTOCOL_MAJOR: u8 = 1;
pub const HEADER_LEN: usize = 32;

/// Flag: the receiver may ignore this frame when it does not know its kind.
pub const FLAG_OPTIONAL: u8 = 0x80;
/// Flags that have a meaning in this version; any other bit is an error.
pub const FLAGS_KNOWN: u8 = FLAG_OPTIONAL;

/// What a frame is. Numbers are wire-stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    Hello = 1,
    HelloAck = 2,
    Describe = 3,
    Description = 4,
    Infer = 5,
    Result = 6,
    /// Some rows of a request that asked for them as they are done. A result or an error still ends it.
    Item = 7,
    Error = 8,
    Cancel = 9,
    Ping = 10,
    Pong = 11,
    Credit = 12,
    Goaway = 13,
    Stats = 14,
    StatsReply = 15,
}

impl Kind {
    pub const ALL: [Kind; 15] = [
        Kind::Hello,
        Kind::HelloAck,
        Kind::Describe,
        Kind::Description,
        Kind::Infer,
        Kind::Result,
        Kind::Item,
        Kind::Error,
        Kind::Cancel,
        Kind::Ping,
        Kind::Pong,
        Kind::Credit,
        Kind::Goaway,
        Kind::Stats,
        Kind::StatsReply,
    ];

    pub fn from_number(number: u8) -> Option<Kind> {
        // Contiguous from 1, so the table is its own index.
        Kind::ALL.get(usize::from(number).wrapping_sub(1)).copied()
    }

    /// Whether frames of this kind may have metadata. The others say all in their header.
    pub fn carries_metadata(self) -> bool {
        !matches!(self, Kind::Cancel | Kind::Ping | Kind::Pong | Kind::Stats | Kind::StatsReply)
    }

    /// Whether frames of this kind may have a payload. The others are a header and little metadata, whatever the
    /// limits of the connection are: credit counts the payload of requests only, so nothing else may bring bytes.
    pub fn carries_payload(self) -> bool {
        matches!(self, Kind::Description | Kind::Infer | Kind::Result | Kind::Item | Kind::StatsReply)
    }

    /// Whether clients send this kind; the others come from servers only.
    pub fn from_client(self) -> bool {
        matches!(
            self,
            Kind::Hello | Kind::Describe | Kind::Infer | Kind::Cancel | Kind::Ping | Kind::Stats | Kind::Goaway
        )
    }
}

/// The fields of a header, checked for magic and version only; kind and lengths are checked by the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: u8,
    pub flags: u8,
    pub model: ModelHandle,
    pub request_id: u64,
    pub metadata_len: u32,
    pub payload_len: u32,
    pub payload_crc: u32,
    pub head_crc: u32,
}

/// Why 32 bytes are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    Magic([u8; 3]),
    Version(u8),
}

impl Header {
    /// Writes the header; `head_crc` is computed here over the first 28 bytes and `metadata`.
    pub fn encode(&self, metadata: &[u8]) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..3].copy_from_slice(&MAGIC);
        bytes[3] = PROTOCOL_MAJOR;
        bytes[4] = self.kind;
        bytes[5] = self.flags;
        bytes[6..8].copy_from_slice(&self.model.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.request_id.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.metadata_len.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..28]), metadata);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, HeaderError> {
        let magic = [bytes[0], bytes[1], bytes[2]];
        if magic != MAGIC {
            return Err(HeaderError::Magic(magic));
        }
        if bytes[3] != PROTOCOL_MAJOR {
            return Err(HeaderError::Version(bytes[3]));
        }
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(Header {
            kind: bytes[4],
            flags: bytes[5],
            model: ModelHandle(u16::from_le_bytes([bytes[6], bytes[7]])),
            request_id: u64::from(u32_at(8)) | (u64::from(u32_at(12)) << 32),
            metadata_len: u32_at(16),
            payload_len: u32_at(20),
            payload_crc: u32_at(24),
            head_crc: u32_at(28),
        })
    }

    /// The checksum that `head_crc` must equal.
    pub fn expected_head_crc(bytes: &[u8; HEADER_LEN], metadata: &[u8]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&bytes[..28]), metadata)
    }
}

/// What the decoder lets through. Checked on the header, before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub metadata_bytes: u32,
    pub payload_bytes: u32,
}

impl Limits {
    /// Hard ceiling of metadata in any frame, also the limit given to bincode.
    pub const METADATA_CEILING: u32 = 4096;
    /// Hard ceiling of a payload in any configuration.
    pub const PAYLOAD_CEILING: u32 = 256 << 20;

    /// Before the hello: one small frame.
    pub const BEFORE_HELLO: Limits = Limits { metadata_bytes: 1024, payload_bytes: 0 };

    /// The default of a running connection.
    pub const DEFAULT: Limits = Limits { metadata_bytes: Limits::METADATA_CEILING, payload_bytes: 16 << 20 };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_as_it_was() {
        let header = Header {
            kind: Kind::Infer as u8,
            flags: FLAG_OPTIONAL,
            model: ModelHandle(0xABCD),
            request_id: 0x0123_4567_89AB_CDEF,
            metadata_len: 7,
            payload_len: 9,
            payload_crc: 0xDEAD_BEEF,
            head_crc: 0,
        };
        let bytes = header.encode(b"1234567");
        let back = Header::decode(&bytes).expect("just encoded");
        assert_eq!(Header { head_crc: 0, ..back }, header);
        assert_eq!(back.head_crc, Header::expected_head_crc(&bytes, b"1234567"));
    }

    #[test]
    fn kinds_come_back_from_their_numbers() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_number(kind as u8), Some(kind));
        }
        assert_eq!(Kind::from_number(0), None);
        assert_eq!(Kind::from_number(16), None);
    }
}
