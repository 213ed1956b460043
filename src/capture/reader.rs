//! Reads a trace, one event after the other.

use std::io::{ErrorKind, Read};

use super::events::{Event, Memory};
use super::{
    CHUNK_BYTES_MAX, CHUNK_HEAD_BYTES, CaptureEnd, END, EVENTS, HEADER, Header, MAGIC, PREAMBLE_BYTES, STATE,
    TraceError, VERSION, crc_of,
};
use crate::scheduler::state::STATE_BYTES_MAX;

/// A trace whose header and state were read, and whose events are read one after the other.
#[derive(Debug)]
pub struct TraceReader<R> {
    read: R,
    header: Header,
    state: Vec<u8>,
    memory: Memory,
    /// The chunk that is being read, and how far.
    chunk: Vec<u8>,
    used: usize,
    chunks: u32,
    bytes: u64,
    end: Option<CaptureEnd>,
}

impl<R: Read> TraceReader<R> {
    pub fn open(mut read: R) -> Result<TraceReader<R>, TraceError> {
        let mut preamble = [0; PREAMBLE_BYTES];
        if !fill(&mut read, &mut preamble)? || preamble[..8] != MAGIC {
            return Err(TraceError::Foreign);
        }
        let version = u16::from_le_bytes([preamble[8], preamble[9]]);
        if version != VERSION {
            return Err(TraceError::Version { found: version });
        }
        if preamble[10..] != [0; 2] {
            return Err(TraceError::Malformed { chunk: 0, what: "a preamble with a flag that is not known".into() });
        }
        let mut reader = TraceReader {
            read,
            header: Header {
                ferry: String::new(),
                layout: 0,
                at: Default::default(),
                decisions: 0,
                hash: 0,
                limits: crate::scheduler::QueueLimits::NONE,
                seats: Vec::new(),
                models: Vec::new(),
            },
            state: Vec::new(),
            memory: Memory::default(),
            chunk: Vec::new(),
            used: 0,
            chunks: 0,
            bytes: PREAMBLE_BYTES as u64,
            end: None,
        };
        if reader.next_chunk()? != HEADER {
            return Err(reader.malformed("the first chunk is no header"));
        }
        let config = bincode::config::standard().with_limit::<{ 4 * CHUNK_BYTES_MAX }>();
        let (header, used) = bincode::decode_from_slice::<Header, _>(&reader.chunk, config)
            .map_err(|error| reader.malformed(&format!("its header: {error}")))?;
        if used != reader.chunk.len() {
            return Err(reader.malformed("there are bytes behind its header"));
        }
        reader.memory = Memory::new(header.at, header.decisions);
        reader.header = header;
        // The state's chunks, and the first of the events.
        loop {
            match reader.next_chunk()? {
                STATE if reader.state.len() + reader.chunk.len() > STATE_BYTES_MAX => {
                    return Err(reader.malformed("the state is too large"));
                }
                STATE => reader.state.extend_from_slice(&reader.chunk),
                EVENTS => break,
                END => {
                    reader.finish()?;
                    break;
                }
                _ => return Err(reader.malformed("a second header")),
            }
        }
        Ok(reader)
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The scheduler as it stood when the trace begins, in the header's layout.
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Why the capture ended. Known when there are no more events.
    pub fn end(&self) -> Option<CaptureEnd> {
        self.end
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Arrivals read so far.
    pub fn arrivals(&self) -> u64 {
        self.memory.arrivals()
    }

    /// The next event; `None` behind the last.
    pub fn next_event(&mut self) -> Result<Option<Event>, TraceError> {
        while self.end.is_none() {
            if self.used < self.chunk.len() {
                let mut rest = &self.chunk[self.used..];
                let event = self.memory.read(&mut rest);
                self.used = self.chunk.len() - rest.len();
                return event.map(Some).map_err(|what| self.malformed(what));
            }
            match self.next_chunk()? {
                EVENTS => {}
                END => self.finish()?,
                _ => return Err(self.malformed("a header or state between events")),
            }
        }
        Ok(None)
    }

    /// The chunk just read is the last.
    fn finish(&mut self) -> Result<(), TraceError> {
        let end = match self.chunk[..] {
            [number] => CaptureEnd::from_number(number),
            _ => None,
        };
        self.end = Some(end.ok_or_else(|| self.malformed("an unknown end"))?);
        match fill(&mut self.read, &mut [0]) {
            Ok(false) => Ok(()),
            Ok(true) => Err(TraceError::Trailing),
            Err(error) => Err(error),
        }
    }

    /// Reads a chunk, checks it, and says its kind.
    fn next_chunk(&mut self) -> Result<u8, TraceError> {
        let mut head = [0; CHUNK_HEAD_BYTES];
        let truncated = TraceError::Truncated { chunks: self.chunks };
        if !fill(&mut self.read, &mut head)? {
            return Err(truncated);
        }
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (kind, number, len) = (head[0], word(1), word(5) as usize);
        if len > CHUNK_BYTES_MAX {
            return Err(self.malformed(&format!("{len} bytes, more than the {CHUNK_BYTES_MAX} that a chunk has")));
        }
        self.chunk.clear();
        self.chunk.resize(len, 0);
        self.used = 0;
        if !fill(&mut self.read, &mut self.chunk)? {
            return Err(truncated);
        }
        if crc_of(&head[..9], &self.chunk) != word(9) {
            return Err(TraceError::Checksum { chunk: self.chunks });
        }
        if number != self.chunks {
            return Err(self.malformed(&format!("its number is {number}")));
        }
        if !(HEADER..=END).contains(&kind) {
            return Err(self.malformed(&format!("its kind is {kind}")));
        }
        self.chunks += 1;
        self.bytes += (CHUNK_HEAD_BYTES + len) as u64;
        Ok(kind)
    }

    fn malformed(&self, what: &str) -> TraceError {
        TraceError::Malformed { chunk: self.chunks, what: what.to_owned() }
    }
}

/// Fills the buffer; false when the input ends before.
fn fill(read: &mut impl Read, buffer: &mut [u8]) -> Result<bool, TraceError> {
    match read.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(TraceError::Io(error.to_string())),
    }
}
