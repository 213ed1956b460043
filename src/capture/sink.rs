//! From the batcher to whoever reads a capture: a bounded row of chunks, and the word why there are no more. Or to nobody yet:
//! memory, for what is kept of the last seconds.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::{CHUNKS_MAX, CaptureEnd};

/// How a capture ended, behind how many chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pub end: CaptureEnd,
    pub chunks: u32,
}

/// Where the batcher puts chunks. Never waits.
#[derive(Debug)]
pub enum Sink {
    Row(Row),
    /// All that came so far.
    Memory(Vec<u8>),
}

/// The writing end of a row of chunks.
#[derive(Debug)]
pub struct Row {
    chunks: flume::Sender<Bytes>,
    ended: Arc<OnceLock<Ended>>,
}

/// Where they come out. When there are no more, [`Source::ended`] says why.
#[derive(Debug)]
pub struct Source {
    pub chunks: flume::Receiver<Bytes>,
    ended: Arc<OnceLock<Ended>>,
}

pub fn channel() -> (Sink, Source) {
    let (sender, receiver) = flume::bounded(CHUNKS_MAX);
    let ended = Arc::new(OnceLock::new());
    (Sink::Row(Row { chunks: sender, ended: Arc::clone(&ended) }), Source { chunks: receiver, ended })
}

impl Sink {
    /// Hands bytes over, or says why that cannot be.
    pub fn send(&mut self, bytes: Vec<u8>) -> Result<(), CaptureEnd> {
        match self {
            Sink::Memory(kept) => {
                kept.extend_from_slice(&bytes);
                Ok(())
            }
            Sink::Row(row) => row.chunks.try_send(Bytes::from(bytes)).map_err(|error| match error {
                flume::TrySendError::Full(_) => CaptureEnd::ReaderSlow,
                flume::TrySendError::Disconnected(_) => CaptureEnd::ReaderGone,
            }),
        }
    }

    /// What is in memory.
    pub fn kept(&self) -> &[u8] {
        match self {
            Sink::Memory(kept) => kept,
            Sink::Row(_) => &[],
        }
    }

    /// Nothing more comes.
    pub fn end(self, ended: Ended) {
        // Before the sender goes: whoever sees the row end finds the reason.
        if let Sink::Row(row) = self {
            let _ = row.ended.set(ended);
        }
    }
}

impl Source {
    /// `None` while chunks may still come, and when the batcher ended without a word.
    pub fn ended(&self) -> Option<Ended> {
        self.ended.get().copied()
    }
}
