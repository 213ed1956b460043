//! Any bytes as a connection's stream, in any pieces.
//!
//! Fails on a panic, on a frame whose bytes are not all there, on frames that depend on how the bytes arrived, and on
//! metadata that decodes but does not encode to the same bytes. Checksums are mended on request of the input, because
//! no random input has the right ones: otherwise nothing behind the header would ever be reached.
#![no_main]

use ferry::wire::decoder::Step;
use ferry::wire::message::{
    Credit, Describe, Description, ErrorMessage, Goaway, Hello, HelloAck, Infer, InferResult, decode_exact, encode_into,
};
use ferry::wire::{Decoder, HEADER_LEN, Header, Kind, Limits};
use libfuzzer_sys::fuzz_target;

const DECODER_LIMITS: Limits = Limits { metadata_bytes: Limits::METADATA_CEILING, payload_bytes: 1 << 16 };

fuzz_target!(|input: &[u8]| {
    // The last byte chooses: bit 0 mends checksums, the rest is the length of the pieces.
    let Some((choice, stream)) = input.split_last() else { return };
    let mut stream = stream.to_vec();
    if choice & 1 == 1 {
        mend_checksums(&mut stream);
    }
    let whole = run(&stream, usize::MAX);
    let pieces = run(&stream, usize::from(choice >> 1) + 1);
    assert_eq!(whole, pieces, "what a stream says does not depend on how it arrived");
});

/// Reads the stream in pieces: the places of its frames, and whether it ended in an error.
fn run(stream: &[u8], piece_len: usize) -> (Vec<(usize, usize)>, bool) {
    let decoder = Decoder::new(DECODER_LIMITS);
    let (mut start, mut arrived, mut frames) = (0, 0, Vec::new());
    loop {
        let buffer = &stream[start..arrived];
        match decoder.next(buffer) {
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return (frames, true);
            }
            Ok(Step::Skip { len }) => start += len,
            Ok(Step::Frame(frame)) => {
                assert!(frame.len <= buffer.len());
                assert!(frame.payload(buffer).len() <= DECODER_LIMITS.payload_bytes as usize);
                let _ = frame.payload_is_intact(buffer);
                decode_metadata(frame.kind, frame.metadata(buffer));
                frames.push((start, frame.len));
                start += frame.len;
            }
            Ok(Step::Incomplete { needed }) => {
                assert!(needed > buffer.len());
                if arrived == stream.len() {
                    return (frames, false);
                }
                arrived = arrived.saturating_add(piece_len).min(stream.len());
            }
        }
    }
}

fn decode_metadata(kind: Kind, bytes: &[u8]) {
    macro_rules! round_trip {
        ($message:ty) => {
            if let Ok(message) = decode_exact::<$message>(bytes) {
                let mut again = Vec::new();
                encode_into(&message, &mut again).expect("it came from as many bytes");
                assert_eq!(again, bytes, "one encoding per value");
            }
        };
    }
    match kind {
        Kind::Hello => round_trip!(Hello),
        Kind::HelloAck => round_trip!(HelloAck),
        Kind::Describe => round_trip!(Describe),
        Kind::Description => round_trip!(Description),
        Kind::Infer => round_trip!(Infer),
        Kind::Result => round_trip!(InferResult),
        Kind::Error => {
            round_trip!(ErrorMessage);
            let _ = decode_exact::<ErrorMessage>(bytes).map(|message| message.to_refusal());
        }
        Kind::Credit => round_trip!(Credit),
        Kind::Goaway => round_trip!(Goaway),
        Kind::Cancel | Kind::Ping | Kind::Pong | Kind::Stats | Kind::StatsReply | Kind::Item => round_trip!(()),
    }
}

/// Follows the lengths from frame to frame and writes the checksums that belong there.
fn mend_checksums(stream: &mut [u8]) {
    let mut at = 0;
    while let Some(head) = stream[at..].first_chunk::<HEADER_LEN>() {
        let Ok(header) = Header::decode(head) else { return };
        let metadata_end = (at + HEADER_LEN).saturating_add(header.metadata_len as usize);
        let end = metadata_end.saturating_add(header.payload_len as usize);
        if end > stream.len() {
            return;
        }
        let payload_crc = crc32c::crc32c(&stream[metadata_end..end]);
        stream[at + 24..at + 28].copy_from_slice(&payload_crc.to_le_bytes());
        let head_crc = crc32c::crc32c_append(crc32c::crc32c(&stream[at..at + 28]), &stream[at + 32..metadata_end]);
        stream[at + 28..at + 32].copy_from_slice(&head_crc.to_le_bytes());
        at = end;
    }
}
