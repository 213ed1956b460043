//! Makes the bytes of a trace.

use super::events::{Event, Memory};
use super::{
    CHUNK_BYTES, CHUNK_BYTES_MAX, CHUNK_HEAD_BYTES, END, EVENTS, Ended, HEADER, Header, MAGIC, STATE, VERSION, crc_of,
};

/// Collects events and closes chunks.
#[derive(Debug)]
pub struct Writer {
    memory: Memory,
    /// The chunk that is being filled, with room for its head.
    chunk: Vec<u8>,
    chunks: u32,
}

impl Writer {
    /// The writer, and the bytes until the first event: preamble, header and state.
    pub fn start(header: &Header, state: &[u8]) -> (Writer, Vec<u8>) {
        let mut out = Vec::with_capacity(state.len() + 4096);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        let written = bincode::encode_to_vec(header, bincode::config::standard()).expect("a Vec takes everything");
        append(&mut out, HEADER, 0, &written);
        let mut chunks = 1;
        for part in state.chunks(CHUNK_BYTES_MAX) {
            append(&mut out, STATE, chunks, part);
            chunks += 1;
        }
        let mut writer = Writer { memory: Memory::new(header.at, header.decisions), chunk: Vec::new(), chunks };
        writer.begin();
        (writer, out)
    }

    fn begin(&mut self) {
        self.chunk = Vec::with_capacity(CHUNK_BYTES + 4096);
        self.chunk.extend_from_slice(&[0; CHUNK_HEAD_BYTES]);
    }

    /// Hot while a capture is on: see [`Memory::write`].
    pub fn event(&mut self, event: &Event) {
        self.memory.write(&mut self.chunk, event);
    }

    /// Arrivals so far.
    pub fn arrivals(&self) -> u64 {
        self.memory.arrivals()
    }

    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// The chunk has its size: time to close it.
    pub fn is_full(&self) -> bool {
        self.chunk.len() >= CHUNK_BYTES
    }

    /// Closes the chunk with what has been decided so far, and begins another.
    pub fn close(&mut self, decisions: u64, hash: u64) -> Vec<u8> {
        self.event(&Event::Checkpoint { decisions, hash });
        let len = self.chunk.len() - CHUNK_HEAD_BYTES;
        assert!(len <= CHUNK_BYTES_MAX, "a turn's inputs fit a chunk: {len} bytes");
        let head = head(EVENTS, self.chunks, len, &self.chunk[CHUNK_HEAD_BYTES..]);
        self.chunk[..CHUNK_HEAD_BYTES].copy_from_slice(&head);
        self.chunks += 1;
        let chunk = std::mem::take(&mut self.chunk);
        self.begin();
        chunk
    }
}

/// The number of the chunk that follows this one. `None`: these bytes are no chunk.
pub fn next_number(chunk: &[u8]) -> Option<u32> {
    let number = chunk.get(1..5)?.try_into().expect("four bytes");
    u32::from_le_bytes(number).checked_add(1)
}

/// The last chunk.
pub fn end_chunk(ended: Ended) -> Vec<u8> {
    let mut out = Vec::new();
    append(&mut out, END, ended.chunks, &[ended.end as u8]);
    out
}

fn head(kind: u8, number: u32, len: usize, payload: &[u8]) -> [u8; CHUNK_HEAD_BYTES] {
    let mut head = [0; CHUNK_HEAD_BYTES];
    head[0] = kind;
    head[1..5].copy_from_slice(&number.to_le_bytes());
    head[5..9].copy_from_slice(&(len as u32).to_le_bytes());
    let crc = crc_of(&head[..9], payload);
    head[9..].copy_from_slice(&crc.to_le_bytes());
    head
}

fn append(out: &mut Vec<u8>, kind: u8, number: u32, payload: &[u8]) {
    out.extend_from_slice(&head(kind, number, payload.len(), payload));
    out.extend_from_slice(payload);
}
