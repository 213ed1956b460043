//! Traces: everything that a scheduler was told, in order, so that a replay decides what it decided.
//!
//! A trace is a preamble and then chunks, each with its number, length and CRC32C:
//!
//! ```text
//!     "ferrytrc"  version u16  0 u16
//!     chunk: kind u8  number u32  length u32  crc32c u32  payload      (little-endian; the CRC covers all but itself)
//!
//!     1 header     what any version can read: models with their knobs and learned cost, executors, limits   (bincode)
//!     2 state      the scheduler as it stood, for versions of the same layout; one or more chunks           (bincode)
//!     3 events     inputs in order; ends with a checkpoint                                             (events.rs)
//!     4 end        why it ended: one byte; nothing follows
//! ```
//!
//! Always true
//! - What is read was checked: magic, version, numbers in order, lengths within bounds, checksums, a last chunk. Anything
//!   else is a [`TraceError`], never a panic and never unbounded memory.
//! - Writing never waits: a chunk that finds no room in the [`Sink`] ends the capture, with a reason.
//!
//! Elsewhere: who records (batcher/recorder.rs), who streams (control/admin.rs), what is done with it (replay).

mod events;
mod header;
mod reader;
mod sink;
mod writer;

pub use events::{Cancelled, Done, Event, PolicyChange};
pub use header::{Header, ModelHeader, SeatHeader, knobs_of};
pub use reader::TraceReader;
pub use sink::{Ended, Sink, Source, channel};
pub use writer::{Writer, end_chunk, next_number};

/// First bytes of a trace.
pub const MAGIC: [u8; 8] = *b"ferrytrc";
/// Raised when a reader of before would misread.
pub const VERSION: u16 = 1;

/// Longest payload of a chunk, in bytes.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// A writer closes a chunk of events that has so many bytes.
pub const CHUNK_BYTES: usize = 48 << 10;
/// Chunks that wait for a reader, at most: it may fall behind by so much.
pub const CHUNKS_MAX: usize = 64;
/// Decisions between two checkpoints, at least.
pub const CHECKPOINT_EVERY: u64 = 1000;
/// Longest capture, in seconds.
pub const SECONDS_MAX: u64 = 600;

const PREAMBLE_BYTES: usize = 12;
const CHUNK_HEAD_BYTES: usize = 13;

const HEADER: u8 = 1;
const STATE: u8 = 2;
const EVENTS: u8 = 3;
const END: u8 = 4;

/// Why a capture ended. The numbers are those of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CaptureEnd {
    /// The time that was asked for is over.
    Complete = 0,
    /// Whoever reads it fell behind by [`CHUNKS_MAX`] chunks. What was sent until then is whole.
    ReaderSlow = 1,
    /// Whoever reads it went away.
    ReaderGone = 2,
    /// The server ended.
    Stopped = 3,
    /// The scheduler's state is larger than a trace may hold.
    TooLarge = 4,
}

impl CaptureEnd {
    pub const ALL: [CaptureEnd; 5] = [
        CaptureEnd::Complete,
        CaptureEnd::ReaderSlow,
        CaptureEnd::ReaderGone,
        CaptureEnd::Stopped,
        CaptureEnd::TooLarge,
    ];

    pub fn name(self) -> &'static str {
        match self {
            CaptureEnd::Complete => "complete",
            CaptureEnd::ReaderSlow => "reader_slow",
            CaptureEnd::ReaderGone => "reader_gone",
            CaptureEnd::Stopped => "stopped",
            CaptureEnd::TooLarge => "too_large",
        }
    }

    fn from_number(number: u8) -> Option<CaptureEnd> {
        CaptureEnd::ALL.into_iter().find(|end| *end as u8 == number)
    }
}

/// Why bytes are no trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceError {
    Io(String),
    /// They begin otherwise.
    Foreign,
    Version {
        found: u16,
    },
    /// They end before the last chunk, behind so many whole ones.
    Truncated {
        chunks: u32,
    },
    /// A chunk's checksum does not match its bytes.
    Checksum {
        chunk: u32,
    },
    /// A chunk is not what has to be at its place.
    Malformed {
        chunk: u32,
        what: String,
    },
    /// Bytes behind the last chunk.
    Trailing,
}

impl std::fmt::Display for TraceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TraceError::Io(error) => write!(f, "the trace cannot be read: {error}"),
            TraceError::Foreign => write!(f, "not a trace: it does not begin with \"ferrytrc\""),
            TraceError::Version { found } => {
                write!(f, "the trace has version {found}; this program reads version {VERSION}")
            }
            TraceError::Truncated { chunks } => {
                write!(f, "the trace ends early, behind {chunks} whole chunks: its capture was cut off")
            }
            TraceError::Checksum { chunk } => write!(f, "chunk {chunk} of the trace is damaged: its checksum is wrong"),
            TraceError::Malformed { chunk, what } => write!(f, "chunk {chunk} of the trace is malformed: {what}"),
            TraceError::Trailing => write!(f, "there are bytes behind the trace's last chunk"),
        }
    }
}

impl std::error::Error for TraceError {}

/// The CRC of a chunk: of its head without the CRC, and of its payload.
fn crc_of(head: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(head), payload)
}

#[cfg(test)]
mod tests;
