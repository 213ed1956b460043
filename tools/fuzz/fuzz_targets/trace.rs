//! Any bytes as a trace: the whole file, with checksums mended or not, or only its events behind a sound beginning.
//!
//! Fails on a panic, also of the replay that meets such events, and on more events than bytes: what is read is bounded by what is there.
#![no_main]

use std::io::Cursor;
use std::sync::LazyLock;

use ferry::capture::{CaptureEnd, Ended, Header, TraceReader, Writer, end_chunk};
use ferry::replay::exact;
use ferry::scheduler::{Buckets, Group, Policy, QueueLimits, Scheduler, SeatSpec};
use ferry::vocab::Moment;
use libfuzzer_sys::fuzz_target;

const PREAMBLE: usize = 12;
const HEAD: usize = 13;
const EVENTS: u8 = 3;

/// The bytes until the first event of a trace of two models and two executors, and the number of the next chunk.
static START: LazyLock<(Vec<u8>, u32)> = LazyLock::new(|| {
    let policy = |lens: &[u32]| Policy::new(4, 64, Buckets::new(lens).expect("ascending"));
    let seats = SeatSpec::separate(Group::Executors, 2, 2);
    let scheduler = Scheduler::new(QueueLimits::NONE, vec![policy(&[4, 16]), policy(&[1])], &seats);
    let header = Header::of(&scheduler, &["a".into(), "b".into()], Moment(1_000));
    let (writer, start) = Writer::start(&header, &scheduler.save().expect("small"));
    (start, writer.chunks())
});

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    let file = match choice % 3 {
        0 => bytes.to_vec(),
        1 => mended(bytes),
        _ => around(bytes),
    };
    let Ok(mut reader) = TraceReader::open(Cursor::new(&file)) else { return };
    let mut events = 0;
    while let Ok(Some(event)) = reader.next_event() {
        let _ = format!("{event:?}");
        events += 1;
        assert!(events <= file.len(), "an event has bytes");
    }
    let _ = Scheduler::restore(reader.header().layout, reader.state());
    if choice % 3 == 2 {
        // From a state that a scheduler was in; from any other a replay may end as it likes.
        let mut reader = TraceReader::open(Cursor::new(&file)).expect("it was opened before");
        let _ = exact::replay(&mut reader, &mut ());
    }
});

fn chunk(kind: u8, number: u32, payload: &[u8]) -> Vec<u8> {
    let mut chunk = vec![kind];
    chunk.extend_from_slice(&number.to_le_bytes());
    chunk.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&chunk), payload);
    chunk.extend_from_slice(&crc.to_le_bytes());
    chunk.extend_from_slice(payload);
    chunk
}

/// The bytes as events of a trace that is otherwise whole.
fn around(events: &[u8]) -> Vec<u8> {
    let (start, number) = &*START;
    let last = end_chunk(Ended { end: CaptureEnd::Complete, chunks: number + 1 });
    [start.as_slice(), &chunk(EVENTS, *number, events), &last].concat()
}

/// Follows the lengths from chunk to chunk and writes the checksums that belong there.
fn mended(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut at = PREAMBLE;
    while let Some(head) = bytes.get(at..at + HEAD) {
        let len = u32::from_le_bytes(head[5..9].try_into().expect("four bytes")) as usize;
        let Some(payload) = bytes.get(at + HEAD..(at + HEAD).saturating_add(len)) else { break };
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..9]), payload);
        bytes[at + 9..at + HEAD].copy_from_slice(&crc.to_le_bytes());
        at += HEAD + len;
    }
    bytes
}
