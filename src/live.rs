//! How many of the things that could leak exist in this process: each is counted where it is made, and where it is dropped.
//!
//! Always true
//! - A thing is counted by a [`Live`] that it holds, so that no path can forget to count its end.
//!
//! Elsewhere: connections and tickets (each shard's own counts), names and labels (telemetry).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A set of buffers that a batch is packed into.
    Staging,
    /// Buffers of a batch's answers, while anybody may read them.
    Output,
    /// Memory of a device, in one piece.
    DeviceBuffer,
    /// Host memory that a device copies.
    PinnedBuffer,
    DeviceStream,
    DeviceEvent,
}

impl Kind {
    pub const ALL: [Kind; 6] =
        [Kind::Staging, Kind::Output, Kind::DeviceBuffer, Kind::PinnedBuffer, Kind::DeviceStream, Kind::DeviceEvent];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Staging => "staging",
            Kind::Output => "output",
            Kind::DeviceBuffer => "device_buffer",
            Kind::PinnedBuffer => "pinned_buffer",
            Kind::DeviceStream => "device_stream",
            Kind::DeviceEvent => "device_event",
        }
    }
}

struct Tally {
    count: AtomicU64,
    bytes: AtomicU64,
}

static TALLIES: [Tally; Kind::ALL.len()] =
    [const { Tally { count: AtomicU64::new(0), bytes: AtomicU64::new(0) } }; Kind::ALL.len()];

/// How many of a kind exist now.
pub fn count(kind: Kind) -> u64 {
    TALLIES[kind as usize].count.load(Relaxed)
}

/// Bytes that those of a kind hold which have a size of their own: device and pinned buffers.
pub fn bytes(kind: Kind) -> u64 {
    TALLIES[kind as usize].bytes.load(Relaxed)
}

/// Held by the thing that it counts.
#[derive(Debug)]
pub struct Live {
    kind: Kind,
    bytes: u64,
}

impl Live {
    pub fn new(kind: Kind) -> Live {
        Live::of_bytes(kind, 0)
    }

    pub fn of_bytes(kind: Kind, bytes: usize) -> Live {
        let bytes = bytes as u64;
        TALLIES[kind as usize].count.fetch_add(1, Relaxed);
        TALLIES[kind as usize].bytes.fetch_add(bytes, Relaxed);
        Live { kind, bytes }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        TALLIES[self.kind as usize].count.fetch_sub(1, Relaxed);
        TALLIES[self.kind as usize].bytes.fetch_sub(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_no_longer_counted() {
        // Of a kind that no other unit test of this binary makes: they run side by side.
        let kind = Kind::DeviceStream;
        let before = (count(kind), bytes(kind));
        let (first, second) = (Live::of_bytes(kind, 100), Live::of_bytes(kind, 7));
        assert!(count(kind) >= before.0 + 2 && bytes(kind) >= before.1 + 107);
        drop((first, second));
        assert!(bytes(kind) < before.1 + 107);
    }

    #[test]
    fn kinds_are_numbered_as_they_are_listed() {
        for (place, kind) in Kind::ALL.iter().enumerate() {
            assert_eq!(place, *kind as usize, "{}", kind.name());
        }
    }
}
