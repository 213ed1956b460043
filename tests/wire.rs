//! The wire against damaged, hostile and merely unusual bytes, and the contract check against a slow twin.
//!
//! Goal: no bytes of a peer make a panic, a large allocation, or a frame that was not sent. Method: streams of every
//! kind of frame are cut, merged, flipped and lied about; `Contract::check` is compared with a reference that is too
//! simple to be wrong. Named in brackets are the cases of the fault list that a test stands for.
//!
//! Elsewhere: the exact bytes (golden.rs), hours of random input (tools/fuzz).

use bincode::{Decode, Encode};
use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec, TextSpec};
use ferry::vocab::{Code, DType, Executed, ModelHandle};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, align8, append_bare, append_frame};
use ferry::wire::frame::{FLAG_OPTIONAL, MAGIC};
use ferry::wire::message::{
    Credit, Describe, Description, ErrorMessage, Goaway, Hello, HelloAck, INFER_FLAGS_KNOWN, Infer, InferResult, Item,
    List, Receipt, TensorMeta, Timings, decode_exact, encode_into,
};
use ferry::wire::{DecodeError, Decoder, HEADER_LEN, Header, Kind, Limits, PROTOCOL_MAJOR};
use proptest::prelude::*;

// ---------------------------------------------------------------------------------------------- streams and helpers

/// One frame as its parts: what two decodings of the same stream are compared by.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Whole {
    kind: Kind,
    model: u16,
    request_id: u64,
    metadata: Vec<u8>,
    payload: Vec<u8>,
    intact: bool,
}

/// A header with right checksums, whatever else it says.
fn header_bytes(kind: u8, flags: u8, lens: (u32, u32), metadata: &[u8], payload: &[u8]) -> [u8; HEADER_LEN] {
    Header {
        kind,
        flags,
        model: ModelHandle(1),
        request_id: 5,
        metadata_len: lens.0,
        payload_len: lens.1,
        payload_crc: crc32c::crc32c(payload),
        head_crc: 0,
    }
    .encode(metadata)
}

/// A frame with right lengths and checksums around any metadata and payload.
fn frame_bytes(kind: u8, flags: u8, metadata: &[u8], payload: &[u8]) -> Vec<u8> {
    let lens = (metadata.len() as u32, payload.len() as u32);
    [&header_bytes(kind, flags, lens, metadata, payload)[..], metadata, payload].concat()
}

fn encoded<M: Encode>(message: &M) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(message, &mut bytes).expect("test messages are small");
    bytes
}

fn decoder() -> Decoder {
    Decoder::new(Limits::DEFAULT)
}

/// Everything a decoder makes of a buffer, and why it stopped there.
fn decode_all(mut buffer: &[u8]) -> (Vec<Whole>, Result<Step, DecodeError>) {
    let mut frames = Vec::new();
    loop {
        match decoder().next(buffer) {
            Ok(Step::Frame(frame)) => {
                frames.push(Whole {
                    kind: frame.kind,
                    model: frame.header.model.0,
                    request_id: frame.header.request_id,
                    metadata: frame.metadata(buffer).to_vec(),
                    payload: frame.payload(buffer).to_vec(),
                    intact: frame.payload_is_intact(buffer),
                });
                buffer = &buffer[frame.len..];
            }
            Ok(Step::Skip { len }) => buffer = &buffer[len..],
            stop => return (frames, stop),
        }
    }
}

/// As a connection does it: bytes arrive in `pieces`, whole frames are taken from the front.
fn decode_in_pieces(stream: &[u8], mut piece_len: impl FnMut() -> usize) -> Vec<Whole> {
    let (mut buffer, mut frames, mut at) = (Vec::new(), Vec::new(), 0);
    while at < stream.len() {
        let end = (at + piece_len().max(1)).min(stream.len());
        buffer.extend_from_slice(&stream[at..end]);
        at = end;
        loop {
            match decoder().next(&buffer).expect("a valid stream stays valid in pieces") {
                Step::Frame(frame) => {
                    frames.extend(decode_all(&buffer[..frame.len]).0);
                    buffer.drain(..frame.len);
                }
                Step::Skip { len } => drop(buffer.drain(..len)),
                Step::Incomplete { needed } => {
                    assert!(needed > buffer.len(), "asks for {needed} bytes and has {}", buffer.len());
                    break;
                }
            }
        }
    }
    assert!(buffer.is_empty(), "{} bytes left of a stream of whole frames", buffer.len());
    frames
}

fn tensor(index: u8, dtype: DType, dims: &[u32]) -> TensorMeta {
    TensorMeta { index, dtype: dtype as u8, dims: List::from_slice(dims).expect("at most 8 dims") }
}

fn infer_of(tensors: &[TensorMeta]) -> Infer {
    Infer { inputs: List::from_slice(tensors).expect("at most 8 tensors"), ..Infer::default() }
}

/// One of each message that has strings, lists or options: what length fields can lie about.
fn sample_metadata() -> Vec<(Kind, Vec<u8>)> {
    let infer = infer_of(&[tensor(0, DType::U32, &[2, 7]), tensor(1, DType::F32, &[2, 7, 3])]);
    let result = InferResult {
        outputs: List::from_slice(&[tensor(0, DType::F32, &[2, 384])]).expect("one"),
        timings: Some(Timings { run_ns: 7, ..Timings::default() }),
        receipt: Some(Box::new(Receipt {
            late_us: 7,
            co_members: 2,
            co_lens: List::from_slice(&[5, 6]).expect("two"),
            ..Receipt::default()
        })),
        ..InferResult::default()
    };
    let without = InferResult { timings: None, receipt: None, ..result.clone() };
    let hello = Hello {
        version_min: 1,
        version_max: 1,
        features: 0,
        client: "client".into(),
        tenant: "blue".into(),
        token: vec![1, 2, 3],
    };
    let ack = HelloAck {
        version: 1,
        features: 0,
        server: "ferry".into(),
        metadata_bytes_max: 4096,
        payload_bytes_max: 1 << 24,
        credit_requests: 256,
        credit_bytes: 1 << 26,
    };
    let error = ErrorMessage {
        code: Code::NotFound as u16,
        stage: 0,
        executed: 0,
        retry: 0,
        retry_after_ms: 0,
        message: "no model is called größe".into(),
    };
    let goaway =
        Goaway { code: 9, last_accepted_id: 3, version_min: 1, version_max: 1, message: "the server stops".into() };
    vec![
        (Kind::Hello, encoded(&hello)),
        (Kind::HelloAck, encoded(&ack)),
        (Kind::Describe, encoded(&Describe { model: "echo".into(), version: String::new() })),
        (Kind::Description, encoded(&Description { handle: 1, contract_hash: 2 })),
        (Kind::Infer, encoded(&infer)),
        (Kind::Result, encoded(&result)),
        (Kind::Result, encoded(&without)),
        (Kind::Item, encoded(&Item { at_row: 5, result: without })),
        (Kind::Error, encoded(&error)),
        (Kind::Cancel, vec![]),
        (Kind::Ping, vec![]),
        (Kind::Pong, vec![]),
        (Kind::Credit, encoded(&Credit { requests: 1, bytes: 2 })),
        (Kind::Goaway, encoded(&goaway)),
        (Kind::Stats, vec![]),
        (Kind::StatsReply, vec![]),
    ]
}

/// A stream with every kind of frame in it, a skipped one too.
fn sample_stream() -> Vec<u8> {
    let mut stream = Vec::new();
    for (at, (kind, metadata)) in sample_metadata().into_iter().enumerate() {
        let payload: &[u8] = if kind.carries_payload() { &[1, 2, 3, 4, 5, 6, 7][..at % 8] } else { &[] };
        stream.extend(frame_bytes(kind as u8, 0, &metadata, payload));
    }
    stream.extend(frame_bytes(99, FLAG_OPTIONAL, &[1], &[2, 3]));
    append_bare(&mut stream, Head { kind: Kind::Ping, model: ModelHandle(0), request_id: 77 });
    stream
}

/// Decodes `bytes` as the metadata of this kind and encodes the value again; `None` where they do not decode.
fn reencode(kind: Kind, bytes: &[u8]) -> Option<Vec<u8>> {
    fn as_a<M: Encode + Decode<()>>(bytes: &[u8]) -> Option<Vec<u8>> {
        decode_exact::<M>(bytes).ok().map(|message| encoded(&message))
    }
    match kind {
        Kind::Hello => as_a::<Hello>(bytes),
        Kind::HelloAck => as_a::<HelloAck>(bytes),
        Kind::Describe => as_a::<Describe>(bytes),
        Kind::Description => as_a::<Description>(bytes),
        Kind::Infer => as_a::<Infer>(bytes),
        Kind::Result => as_a::<InferResult>(bytes),
        Kind::Error => as_a::<ErrorMessage>(bytes),
        Kind::Credit => as_a::<Credit>(bytes),
        Kind::Goaway => as_a::<Goaway>(bytes),
        Kind::Cancel | Kind::Ping | Kind::Pong | Kind::Stats | Kind::StatsReply => as_a::<()>(bytes),
        Kind::Item => as_a::<Item>(bytes),
    }
}

// ---------------------------------------------------------------------------------------------- pieces of a stream

#[test]
fn a_stream_read_byte_by_byte_or_at_once_gives_the_same_frames() {
    let stream = sample_stream();
    let (whole, stop) = decode_all(&stream);
    assert_eq!(stop, Ok(Step::Incomplete { needed: HEADER_LEN }));
    assert_eq!(whole.len(), sample_metadata().len() + 1, "all frames but the skipped one");
    assert!(whole.iter().all(|frame| frame.intact));
    assert_eq!(decode_in_pieces(&stream, || 1), whole, "F07: one byte at a time");
    assert_eq!(decode_in_pieces(&stream, || usize::MAX / 2), whole, "F07: all at once");
}

#[test]
fn a_frame_cut_at_any_byte_is_waited_for_and_never_shown() {
    let payload = [9; 21];
    for (kind, metadata) in sample_metadata() {
        let payload: &[u8] = if kind.carries_payload() { &payload } else { &[] };
        let bytes = frame_bytes(kind as u8, 0, &metadata, payload);
        for cut in 0..bytes.len() {
            let step = decoder().next(&bytes[..cut]);
            let needed = if cut < HEADER_LEN { HEADER_LEN } else { bytes.len() };
            assert_eq!(step, Ok(Step::Incomplete { needed }), "F03, F04: {kind:?} cut at byte {cut}");
        }
        assert!(matches!(decoder().next(&bytes), Ok(Step::Frame(_))), "{kind:?} in full");
    }
}

#[test]
fn noise_is_refused_on_its_first_wrong_byte() {
    for first in 0..=255u8 {
        let expected = if first == MAGIC[0] {
            Ok(Step::Incomplete { needed: HEADER_LEN })
        } else {
            Err(DecodeError::Magic([first, 0, 0]))
        };
        assert_eq!(decoder().next(&[first]), expected, "F01");
    }
    assert_eq!(decoder().next(b"FRX"), Err(DecodeError::Magic(*b"FRX")));
    assert_eq!(decoder().next(b"GET / HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n"), Err(DecodeError::Magic(*b"GET")));
}

proptest! {
    #[test]
    fn a_stream_cut_anywhere_gives_the_same_frames(lens in proptest::collection::vec(1usize..200, 1..50)) {
        let stream = sample_stream();
        let mut lens = lens.into_iter().cycle();
        let frames = decode_in_pieces(&stream, || lens.next().expect("a cycle has no end"));
        prop_assert_eq!(frames, decode_all(&stream).0);
    }

    #[test]
    fn random_bytes_are_no_frame(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert_eq!(decode_all(&bytes).0, vec![]);
    }

    #[test]
    fn random_bytes_behind_a_sound_start_are_no_frame(
        kind in 1u8..=15,
        rest in proptest::collection::vec(any::<u8>(), 27..200),
    ) {
        let bytes = [&MAGIC[..], &[PROTOCOL_MAJOR, kind, 0], &rest].concat();
        prop_assert_eq!(decode_all(&bytes).0, vec![]);
    }
}

// ------------------------------------------------------------------------------------------------------- bit flips

/// Method: every bit of every byte of a stream, one at a time. More than the longest metadata follows the stream, so
/// that even a flipped metadata length has its bytes and cannot hide behind "incomplete".
#[test]
fn a_flipped_bit_is_noticed_wherever_it_is() {
    let stream = sample_stream();
    let sound = decode_all(&stream).0;
    let mut padded = stream.clone();
    while padded.len() < stream.len() + 2 * Limits::METADATA_CEILING as usize {
        append_bare(&mut padded, Head::control(Kind::Ping));
    }
    // Where each frame starts, where its payload starts, where it ends.
    let mut places = Vec::new();
    let mut at = 0;
    while at < stream.len() {
        let head: &[u8; HEADER_LEN] = stream[at..].first_chunk().expect("whole frames");
        let header = Header::decode(head).expect("whole frames");
        let payload_at = at + HEADER_LEN + header.metadata_len as usize;
        places.push((at, payload_at, payload_at + header.payload_len as usize, header.kind));
        at = payload_at + header.payload_len as usize;
    }
    let mut shown = 0; // frames decoded before the one under test: all but the skipped kind
    for (start, payload_at, end, kind) in places {
        let known = Kind::from_number(kind).is_some();
        for byte in start..end {
            for bit in 0..8 {
                let mut flipped = padded.clone();
                flipped[byte] ^= 1 << bit;
                let (frames, stop) = decode_all(&flipped[..]);
                let place = format!("bit {bit} of byte {} of a frame of kind {kind}", byte - start);
                if byte < payload_at {
                    assert!(stop.is_err(), "{place}: {stop:?}");
                    assert_eq!(frames, sound[..shown], "{place}: only what was before it is shown");
                } else if known {
                    assert!(!frames[shown].intact, "F15: {place}");
                    assert_ne!(frames[shown].payload, sound[shown].payload, "{place}");
                    assert_eq!(frames[shown + 1..sound.len()], sound[shown + 1..], "{place}: the stream goes on");
                }
            }
        }
        shown += usize::from(known);
    }
    assert_eq!(shown, sound.len());
}

proptest! {
    #[test]
    fn a_few_flipped_bits_never_make_a_frame_that_was_not_sent(
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), 0u8..8), 1..6),
    ) {
        let stream = sample_stream();
        let sound = decode_all(&stream).0;
        let mut flipped = stream.clone();
        for (index, bit) in flips {
            flipped[index.index(stream.len())] ^= 1 << bit;
        }
        for (at, frame) in decode_all(&flipped).0.into_iter().enumerate() {
            if frame.intact {
                prop_assert!(sound.contains(&frame), "frame {at} was never sent: {frame:?}");
            }
        }
    }
}

// ------------------------------------------------------------------------------------------ header fields, one by one

#[test]
fn of_all_kinds_and_flags_only_known_ones_and_optional_unknown_ones_pass() {
    for kind in 0..=255u8 {
        for flags in 0..=255u8 {
            let bytes = frame_bytes(kind, flags, &[], &[]);
            let step = decoder().next(&bytes);
            match (flags & !FLAG_OPTIONAL, (1..=15).contains(&kind), flags & FLAG_OPTIONAL) {
                (1.., _, _) => assert_eq!(step, Err(DecodeError::Flags(flags)), "F13: kind {kind}"),
                (0, true, _) => {
                    let Ok(Step::Frame(frame)) = step else { panic!("F13: kind {kind}, flags {flags:#x}: {step:?}") };
                    assert_eq!(frame.kind as u8, kind);
                }
                (0, false, 0) => assert_eq!(step, Err(DecodeError::Kind(kind)), "F13"),
                (0, false, _) => assert_eq!(step, Ok(Step::Skip { len: HEADER_LEN }), "F13: kind {kind}"),
            }
        }
    }
}

#[test]
fn of_all_versions_only_ours_passes_and_the_others_are_named() {
    for version in 0..=255u8 {
        let mut bytes = frame_bytes(Kind::Ping as u8, 0, &[], &[]);
        bytes[3] = version;
        let crc = crc32c::crc32c(&bytes[..28]);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        for bytes in [&bytes[..4], &bytes[..]] {
            match decoder().next(bytes) {
                Err(error) => {
                    assert_eq!(error, DecodeError::Version(version), "F02");
                    assert_eq!(error.code(), Code::ProtocolError);
                    assert_ne!(version, PROTOCOL_MAJOR);
                }
                Ok(_) => assert_eq!(version, PROTOCOL_MAJOR, "F02"),
            }
        }
    }
}

#[test]
fn a_length_over_its_limit_is_refused_on_the_header_alone() {
    let limits = Limits { metadata_bytes: 100, payload_bytes: 1000 };
    let next = |metadata_len, payload_len| {
        Decoder::new(limits).next(&header_bytes(Kind::Infer as u8, 0, (metadata_len, payload_len), &[], &[]))
    };
    for len in [101, 102, 4096, 1 << 31, u32::MAX - 31, u32::MAX] {
        assert_eq!(next(len, 0), Err(DecodeError::MetadataTooLong { len, max: 100 }), "F05");
        assert_eq!(next(len, u32::MAX), Err(DecodeError::MetadataTooLong { len, max: 100 }), "F05");
    }
    for len in [1001, 1002, 16 << 20, 1 << 31, u32::MAX - 31, u32::MAX] {
        let error = DecodeError::PayloadTooLong { len, max: 1000 };
        assert_eq!(next(0, len), Err(error), "F05");
        assert_eq!(next(100, len), Err(error), "F05");
        assert_eq!(error.code(), Code::TooLarge);
    }
    assert_eq!(next(100, 1000), Ok(Step::Incomplete { needed: HEADER_LEN + 1100 }), "F05: the limits themselves pass");
    let bytes = frame_bytes(Kind::Infer as u8, 0, &[7; 100], &[8; 1000]);
    assert!(matches!(Decoder::new(limits).next(&bytes), Ok(Step::Frame(frame)) if frame.payload_is_intact(&bytes)));
}

#[test]
fn an_unknown_kind_is_held_to_the_limits_even_when_it_may_be_skipped() {
    let header = header_bytes(99, FLAG_OPTIONAL, (0, u32::MAX), &[], &[]);
    assert!(matches!(decoder().next(&header), Err(DecodeError::PayloadTooLong { .. })));
    let mut bytes = frame_bytes(99, FLAG_OPTIONAL, &[1, 2], &[3]);
    bytes[HEADER_LEN] ^= 1;
    assert!(matches!(decoder().next(&bytes), Err(DecodeError::HeadChecksum { .. })), "its head is verified as any");
}

#[test]
fn a_kind_that_has_no_metadata_or_no_payload_may_not_bring_any() {
    for kind in Kind::ALL {
        let bytes = frame_bytes(kind as u8, 0, &[1], &[]);
        let expected =
            if kind.carries_metadata() { None } else { Some(DecodeError::MetadataTooLong { len: 1, max: 0 }) };
        assert_eq!(decoder().next(&bytes).err(), expected, "{kind:?}");
        let bytes = frame_bytes(kind as u8, 0, &[], &[1]);
        let expected = if kind.carries_payload() { None } else { Some(DecodeError::PayloadTooLong { len: 1, max: 0 }) };
        assert_eq!(decoder().next(&bytes).err(), expected, "{kind:?}");
        assert_eq!(decoder().next(&bytes[..HEADER_LEN]).err(), expected, "{kind:?}, on its header");
    }
}

#[test]
fn before_the_hello_a_kilobyte_is_the_most_that_is_waited_for() {
    let next = |lens| Decoder::new(Limits::BEFORE_HELLO).next(&header_bytes(Kind::Infer as u8, 0, lens, &[], &[]));
    assert_eq!(next((1024, 0)), Ok(Step::Incomplete { needed: HEADER_LEN + 1024 }));
    assert_eq!(next((1025, 0)), Err(DecodeError::MetadataTooLong { len: 1025, max: 1024 }));
    assert_eq!(next((0, 1)), Err(DecodeError::PayloadTooLong { len: 1, max: 0 }), "F50");
}

// -------------------------------------------------------------------------------------------------------- metadata

#[test]
fn metadata_with_a_byte_more_or_less_is_refused() {
    for (kind, bytes) in sample_metadata() {
        assert_eq!(reencode(kind, &bytes).as_ref(), Some(&bytes), "{kind:?}");
        for cut in 0..bytes.len() {
            assert_eq!(reencode(kind, &bytes[..cut]), None, "F06: {kind:?} cut at {cut}");
        }
        for extra in [0, 1, 255] {
            assert_eq!(reencode(kind, &[&bytes[..], &[extra]].concat()), None, "F09: {kind:?} with {extra} behind it");
        }
    }
}

/// Method: the metadata length in the header lies by a few bytes, with a right checksum over the lie, so that only
/// the metadata itself can tell.
#[test]
fn a_metadata_length_that_disagrees_with_its_content_is_refused_by_the_content() {
    let payload = [0; 8];
    for (kind, metadata) in
        sample_metadata().into_iter().filter(|(kind, _)| kind.carries_payload() && kind.carries_metadata())
    {
        let all = [&metadata[..], &payload].concat();
        for len in 0..=all.len() {
            let bytes = frame_bytes(kind as u8, 0, &all[..len], &all[len..]);
            let Ok(Step::Frame(frame)) = decoder().next(&bytes) else { panic!("the frame itself is sound") };
            let decoded = reencode(kind, frame.metadata(&bytes));
            assert_eq!(decoded.is_some(), len == metadata.len(), "F06: {kind:?} with {len} of {}", metadata.len());
        }
    }
}

/// Method: whatever eight bytes of a message are taken for a length, put a lie there.
#[test]
fn a_length_inside_metadata_that_lies_is_refused_or_means_what_it_says() {
    for (kind, sound) in sample_metadata() {
        for at in 0..sound.len().saturating_sub(7) {
            let before = u64::from_le_bytes(sound[at..at + 8].try_into().expect("8 bytes"));
            for lie in [
                0,
                before.wrapping_sub(1),
                before.wrapping_add(1),
                9,
                sound.len() as u64,
                4095,
                4096,
                4097,
                1 << 31,
                1 << 45,
                i64::MAX as u64,
                u64::MAX - 7,
                u64::MAX,
            ] {
                let mut bytes = sound.clone();
                bytes[at..at + 8].copy_from_slice(&lie.to_le_bytes());
                if let Some(again) = reencode(kind, &bytes) {
                    assert_eq!(again, bytes, "F06: {kind:?} with {lie} at {at}");
                }
            }
        }
    }
}

#[test]
fn an_option_is_one_byte_0_or_1_and_nothing_else() {
    let absent = encoded(&InferResult::default());
    let present = encoded(&InferResult { timings: Some(Timings::default()), ..InferResult::default() });
    assert_eq!(present.len(), absent.len() + 48);
    // The receipt's tag is behind it.
    let (timings_at, receipt_at) = (absent.len() - 2, present.len() - 1);
    for tag in 2..=255u8 {
        for at in [timings_at, receipt_at] {
            let mut bytes = present.clone();
            bytes[at] = tag;
            assert_eq!(reencode(Kind::Result, &bytes), None, "F09: tag {tag} at {at}");
        }
    }
    // The forms that a decoder of variable-width integers would take for a length of 3.
    for form in [&[3u8][..], &[251, 3, 0], &[252, 3, 0, 0, 0], &[253, 3, 0, 0, 0, 0, 0, 0, 0]] {
        let mut bytes = form.to_vec();
        bytes.extend_from_slice(b"abc");
        bytes.extend_from_slice(&0u64.to_le_bytes());
        assert_eq!(reencode(Kind::Describe, &bytes), None, "F09: {form:?}");
    }
}

#[test]
fn strings_are_utf8_or_refused() {
    for bad in [&[0xFFu8][..], &[0xC0, 0x80], &[0xED, 0xA0, 0x80], &[0xF4, 0x90, 0x80, 0x80], &[0xE2, 0x82]] {
        let mut bytes = (bad.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(bad);
        bytes.extend_from_slice(&0u64.to_le_bytes());
        assert!(decode_exact::<Describe>(&bytes).is_err(), "F11: {bad:?}");
    }
}

#[test]
fn metadata_may_be_exactly_as_long_as_its_limit() {
    let limit = Limits::METADATA_CEILING as usize;
    let describe = |len| Describe { model: "m".repeat(len), version: String::new() };
    let longest = describe(limit - 16);
    assert_eq!(encoded(&longest).len(), limit);
    assert_eq!(decode_exact::<Describe>(&encoded(&longest)), Ok(longest));
    let mut out = vec![1, 2, 3];
    assert!(encode_into(&describe(limit - 15), &mut out).is_err());
    let head = Head::control(Kind::Describe);
    assert!(append_frame(&mut out, head, &describe(limit - 15), &[]).is_err());
    assert_eq!(out, [1, 2, 3], "a message that does not fit leaves nothing behind");
    let mut over = (limit as u64 - 15).to_le_bytes().to_vec();
    over.resize(limit + 1, 0);
    assert!(decode_exact::<Describe>(&over).is_err(), "the decoder has the limit too");
}

#[test]
fn no_element_of_a_list_is_free() {
    // F10: a list of elements without bytes would loop as often as its count says.
    for element in [encoded(&TensorMeta::default()), encoded(&0u32)] {
        assert!(!element.is_empty());
    }
    let most = infer_of(&[tensor(0, DType::U8, &[1; 8]); 8]);
    assert!(encoded(&most).len() < 1024, "the largest request is far below the metadata limit");
    assert_eq!(decode_exact::<Infer>(&encoded(&most)), Ok(most));
}

/// Goal (F05, F08): a number from a peer cannot ask for memory. Method: the peak of the address space, which counts
/// also memory that was asked for and never touched, before and after thousands of bombs. All in one test, because
/// the negative control raises the peak that the others look at.
#[test]
fn length_bombs_ask_for_no_memory_and_would_without_the_limit() {
    const BOMB: u64 = 1 << 30;
    fn peak_bytes() -> Option<u64> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find(|line| line.starts_with("VmPeak:"))?;
        line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    }
    fn bombed(count: u64) -> [(Kind, Vec<u8>); 5] {
        let count = count.to_le_bytes();
        let empty = [0; 8];
        [
            (Kind::Describe, [&count[..], b"abc"].concat()),
            (Kind::Describe, [&empty[..], &count, b"abc"].concat()),
            (Kind::Hello, [&[1, 1][..], &empty, &empty, &empty, &count, b"abc"].concat()),
            (Kind::Infer, [&[0; 22][..], &count, &[0; 64]].concat()),
            (Kind::Infer, [&[0; 22][..], &1u64.to_le_bytes(), &[0, 5], &count, &[0; 64]].concat()),
        ]
    }
    let Some(before) = peak_bytes() else {
        println!("no /proc here: nothing to measure");
        return;
    };
    for _ in 0..200 {
        for count in [4096, BOMB, u64::from(u32::MAX), 1 << 45, i64::MAX as u64, u64::MAX - 7, u64::MAX] {
            for (kind, bytes) in bombed(count) {
                assert_eq!(reencode(kind, &bytes), None, "F08: {kind:?} with a count of {count}");
            }
        }
        for lens in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX), (4097, 0), (0, (16 << 20) + 1)] {
            let header = header_bytes(Kind::Infer as u8, 0, lens, &[], &[]);
            assert_eq!(decoder().next(&header).map_err(|error| error.code()), Err(Code::TooLarge), "F05");
        }
    }
    let grown = peak_bytes().expect("it was there before") - before;
    assert!(grown < BOMB / 2, "bombs were given {grown} bytes");

    // Negative control: the same bytes without the limit. The memory is asked for, and only the reader's end says no.
    let unlimited = bincode::config::standard().with_little_endian().with_fixed_int_encoding();
    for (kind, bytes) in &bombed(BOMB)[..3] {
        let refused = match kind {
            Kind::Hello => bincode::decode_from_slice::<Hello, _>(bytes, unlimited).is_err(),
            _ => bincode::decode_from_slice::<Describe, _>(bytes, unlimited).is_err(),
        };
        assert!(refused, "there are no {BOMB} bytes behind it");
    }
    let grown = peak_bytes().expect("it was there before") - before;
    // Half, because the peak before was above what was in use: threads reserve memory and give it back.
    assert!(grown >= BOMB / 2, "the control asked for only {grown} bytes: this test measures nothing");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_metadata_that_still_decodes_has_one_encoding(
        which in any::<proptest::sample::Index>(),
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let samples = sample_metadata();
        let (kind, mut bytes) = samples[which.index(samples.len())].clone();
        for (index, value) in edits {
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
        }
        if let Some(again) = reencode(kind, &bytes) {
            prop_assert_eq!(again, bytes, "F09");
        }
        // Refusals that were made from such an error are shown to people: they must not fail either.
        if let Ok(error) = decode_exact::<ErrorMessage>(&sample_metadata()[7].1) {
            prop_assert!(error.to_refusal().is_ok());
        }
    }
}

// ------------------------------------------------------------------------------------------------ contract.check

fn spec(name: &str, dtype: DType, shape: &[Dim], range: Option<[i64; 2]>, nonfinite: NonFinite) -> TensorSpec {
    // The smallest allowed value, as a contract refuses a pad outside of its range.
    let pad = range.map_or(0.0, |[low, _]| low.max(0) as f64);
    TensorSpec { name: name.into(), dtype, shape: shape.to_vec(), pad, range, nonfinite }
}

fn contract_of(inputs: Vec<TensorSpec>, length: Option<(u32, u32)>, text: Option<u32>, rows_max: u32) -> Contract {
    Contract {
        name: "under-test".into(),
        version: "1".into(),
        architecture: "none".into(),
        inputs,
        outputs: vec![spec("out", DType::F32, &[Dim::Fixed(2)], None, NonFinite::Refuse)],
        length: length.map(|(min, max)| Length { name: "tokens".into(), min, max }),
        text: text.map(|bytes_max| TextSpec { name: "text".into(), into: 0, bytes_max }),
        rows_max,
    }
    .checked()
    .expect("a sound contract")
}

const VOCAB: i64 = 30_522;

/// Contracts that between them have every feature: text, length, several inputs, ranges of all signs, every format.
fn contracts() -> Vec<Contract> {
    let tokens = || Dim::Named("tokens".into());
    let refuse = NonFinite::Refuse;
    vec![
        contract_of(
            vec![spec("ids", DType::U32, &[tokens()], Some([0, VOCAB - 1]), refuse)],
            Some((2, 16)),
            Some(20),
            4,
        ),
        contract_of(vec![spec("image", DType::F32, &[Dim::Fixed(4), Dim::Fixed(2)], None, refuse)], None, None, 16),
        contract_of(
            vec![
                spec("ids", DType::U32, &[tokens()], Some([1, 1_000]), refuse),
                spec("mask", DType::U8, &[tokens()], Some([0, 1]), refuse),
                spec("bias", DType::I64, &[Dim::Fixed(1)], Some([-5, 1 << 40]), refuse),
                spec("features", DType::F16, &[tokens(), Dim::Fixed(3)], None, NonFinite::Allow),
                spec("scale", DType::F64, &[], None, refuse),
            ],
            Some((1, 9)),
            None,
            3,
        ),
        contract_of(
            vec![
                spec("a", DType::BF16, &[Dim::Fixed(3)], None, refuse),
                spec("b", DType::I8, &[Dim::Fixed(3)], Some([-128, 100]), refuse),
                spec("c", DType::U64, &[], Some([0, i64::MAX]), refuse),
            ],
            None,
            None,
            2,
        ),
    ]
}

/// What `Contract::check` has to say, in the plainest words: 128-bit arithmetic, one value at a time, and no shortcut.
/// `None` for a refusal, else rows, length and whether it is text.
fn reference(contract: &Contract, infer: &Infer, payload: &[u8]) -> Option<(u32, u32, bool)> {
    let payload_len = payload.len() as i128;
    let round_up = |n: i128| (n + 7) / 8 * 8;
    if infer.flags > 15 {
        return None;
    }
    if let (Some(text), [tensor]) = (&contract.text, &infer.inputs[..])
        && i128::from(tensor.index) == contract.inputs.len() as i128
    {
        if tensor.dtype != 16 || tensor.dims[..] != [1] || payload.len() < 4 {
            return None;
        }
        let len = i128::from(payload[0])
            + i128::from(payload[1]) * 256
            + i128::from(payload[2]) * 65_536
            + i128::from(payload[3]) * 16_777_216;
        if len > i128::from(text.bytes_max) || (payload_len != 4 + len && payload_len != round_up(4 + len)) {
            return None;
        }
        return String::from_utf8(payload[4..4 + len as usize].to_vec()).ok().map(|_| (1, len as u32, true));
    }
    if infer.inputs.len() != contract.inputs.len() {
        return None;
    }
    let mut rows = std::collections::BTreeSet::new();
    let mut lens = std::collections::BTreeSet::new();
    let mut at: i128 = 0; // where the next tensor starts
    let mut end: i128 = 0; // where the last one ended
    let mut values_at = Vec::new();
    for (index, (spec, tensor)) in contract.inputs.iter().zip(infer.inputs.iter()).enumerate() {
        if tensor.index as usize != index
            || tensor.dtype != spec.dtype as u8
            || tensor.dims.len() != 1 + spec.shape.len()
            || tensor.dims[0] == 0
            || tensor.dims[0] > contract.rows_max
        {
            return None;
        }
        rows.insert(tensor.dims[0]);
        for (expected, got) in spec.shape.iter().zip(&tensor.dims[1..]) {
            match expected {
                Dim::Fixed(n) if n == got => {}
                Dim::Fixed(_) => return None,
                Dim::Named(_) => {
                    let length = contract.length.as_ref()?;
                    if *got < length.min || *got > length.max {
                        return None;
                    }
                    lens.insert(*got);
                }
            }
        }
        let elements: i128 = tensor.dims.iter().map(|dim| i128::from(*dim)).product();
        at = round_up(end);
        end = at + elements * spec.dtype.size() as i128;
        values_at.push((spec, at, end));
    }
    let _ = at;
    if rows.len() != 1 || lens.len() > 1 || (payload_len != end && payload_len != round_up(end)) {
        return None;
    }
    for (spec, at, end) in values_at {
        for bytes in payload[at as usize..end as usize].chunks(spec.dtype.size()) {
            let mut wide = [0; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            let unsigned = u64::from_le_bytes(wide);
            let bits = 8 * bytes.len() as u32;
            let signed = i128::from(unsigned) - if unsigned >> (bits - 1) == 1 { 1i128 << bits } else { 0 };
            let finite = match spec.dtype {
                DType::F16 => (unsigned >> 10) & 0x1F != 0x1F,
                DType::BF16 => f32::from_bits((unsigned as u32) << 16).is_finite(),
                DType::F32 => f32::from_bits(unsigned as u32).is_finite(),
                DType::F64 => f64::from_bits(unsigned).is_finite(),
                _ => true,
            };
            if !finite && spec.nonfinite == NonFinite::Refuse {
                return None;
            }
            let value = match spec.dtype {
                DType::I8 | DType::I16 | DType::I32 | DType::I64 => signed,
                _ => i128::from(unsigned),
            };
            if let Some([low, high]) = spec.range
                && (value < i128::from(low) || value > i128::from(high))
            {
                return None;
            }
        }
    }
    Some((*rows.first()?, lens.first().copied().unwrap_or(1), false))
}

/// Compares the check with its reference; says whether they accept.
fn same_as_reference(contract: &Contract, infer: &Infer, payload: &[u8]) -> bool {
    let expected = reference(contract, infer, payload);
    match contract.check(infer, payload) {
        Ok(checked) => {
            assert_eq!(Some((checked.rows, checked.len, checked.text)), expected, "{infer:?}, {} bytes", payload.len());
            true
        }
        Err(refusal) => {
            assert_eq!(expected, None, "{infer:?}, {} bytes: {refusal}", payload.len());
            assert!(matches!(refusal.code, Code::InvalidArgument | Code::TooLarge), "{refusal}");
            assert_eq!(refusal.executed, Executed::Never);
            false
        }
    }
}

/// A request that fits `contract`, with values out of `seed`.
fn sound_request(contract: &Contract, rows: u32, len: u32, seed: u64) -> (Infer, Vec<u8>) {
    let mut state = seed;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 20
    };
    let mut infer = Infer::default();
    let mut payload = Vec::new();
    for (index, spec) in contract.inputs.iter().enumerate() {
        let mut dims = vec![rows];
        dims.extend(spec.shape.iter().map(|dim| match dim {
            Dim::Fixed(n) => *n,
            Dim::Named(_) => len,
        }));
        infer.inputs.push(tensor(index as u8, spec.dtype, &dims)).expect("at most 8 inputs");
        payload.resize(align8(payload.len()), 0);
        for _ in 0..rows as usize * spec.row_elements(len) {
            let value = match spec.range {
                Some([low, high]) => {
                    (i128::from(low) + i128::from(random()) % (i128::from(high) - i128::from(low) + 1)) as i64 as u64
                }
                None => match spec.dtype {
                    DType::F64 => (random() as f64).to_bits(),
                    _ => random() & 0x3FFF_3FFF, // no float of 16 or 32 bits is infinite with this
                },
            };
            payload.extend_from_slice(&value.to_le_bytes()[..spec.dtype.size()]);
        }
    }
    (infer, payload)
}

/// One thing done to a sound request.
#[derive(Clone, Copy, Debug)]
enum Edit {
    Dim(usize, usize, u32),
    Rank(usize, bool),
    DType(usize, u8),
    Index(usize, u8),
    DropInput,
    RepeatInput(usize),
    Flags(u8),
    Shorter(usize),
    Longer(usize),
    Byte(usize, u8),
    Element(usize, u32),
    ToText(usize),
}

fn edits() -> impl Strategy<Value = Edit> {
    let place = 0usize..8;
    let dim = prop_oneof![0u32..20, Just(1 << 16), Just(1 << 31), Just(u32::MAX), any::<u32>()];
    let element = prop_oneof![
        Just(u32::MAX),
        Just(VOCAB as u32),
        Just(VOCAB as u32 - 1),
        Just(1 << 31),
        Just(f32::NAN.to_bits()),
        Just(f32::INFINITY.to_bits()),
        Just(1),
        any::<u32>(),
    ];
    prop_oneof![
        4 => (place.clone(), 0usize..9, dim).prop_map(|(at, dim, value)| Edit::Dim(at, dim, value)),
        1 => (place.clone(), any::<bool>()).prop_map(|(at, longer)| Edit::Rank(at, longer)),
        1 => (place.clone(), prop_oneof![0u8..20, any::<u8>()]).prop_map(|(at, value)| Edit::DType(at, value)),
        1 => (place.clone(), 0u8..9).prop_map(|(at, value)| Edit::Index(at, value)),
        1 => Just(Edit::DropInput),
        1 => place.prop_map(Edit::RepeatInput),
        1 => any::<u8>().prop_map(Edit::Flags),
        2 => (1usize..20).prop_map(Edit::Shorter),
        2 => (1usize..20).prop_map(Edit::Longer),
        2 => (any::<usize>(), any::<u8>()).prop_map(|(at, value)| Edit::Byte(at, value)),
        4 => (any::<usize>(), element).prop_map(|(at, value)| Edit::Element(at, value)),
        2 => (0usize..30).prop_map(Edit::ToText),
    ]
}

fn apply(edit: Edit, infer: &mut Infer, payload: &mut Vec<u8>) {
    let mut inputs = infer.inputs.to_vec();
    let inputs_len = inputs.len();
    let pick = |at: usize| at % inputs_len.max(1);
    match edit {
        Edit::Dim(at, dim, value) => {
            if let Some(tensor) = inputs.get_mut(pick(at)) {
                let mut dims = tensor.dims.to_vec();
                let count = dims.len().max(1);
                if let Some(place) = dims.get_mut(dim % count) {
                    *place = value;
                }
                tensor.dims = List::from_slice(&dims).expect("as many as before");
            }
        }
        Edit::Rank(at, longer) => {
            if let Some(tensor) = inputs.get_mut(pick(at)) {
                let mut dims = tensor.dims.to_vec();
                if longer {
                    dims.push(1);
                } else {
                    dims.pop();
                }
                tensor.dims = List::from_slice(&dims).unwrap_or(tensor.dims);
            }
        }
        Edit::DType(at, value) => inputs.iter_mut().skip(pick(at)).take(1).for_each(|tensor| tensor.dtype = value),
        Edit::Index(at, value) => inputs.iter_mut().skip(pick(at)).take(1).for_each(|tensor| tensor.index = value),
        Edit::DropInput => drop(inputs.pop()),
        Edit::RepeatInput(at) => inputs.extend(inputs.get(pick(at)).copied()),
        Edit::Flags(flags) => infer.flags = flags,
        Edit::Shorter(by) => payload.truncate(payload.len().saturating_sub(by)),
        Edit::Longer(by) => payload.resize(payload.len() + by, 0),
        Edit::Byte(at, value) => {
            let len = payload.len().max(1);
            if let Some(byte) = payload.get_mut(at % len) {
                *byte = value;
            }
        }
        Edit::Element(at, value) => {
            let count = (payload.len() / 4).max(1);
            if let Some(element) = payload.chunks_exact_mut(4).nth(at % count) {
                element.copy_from_slice(&value.to_le_bytes());
            }
        }
        Edit::ToText(len) => {
            inputs = vec![tensor(1, DType::Text, &[1])];
            *payload = (len as u32).to_le_bytes().to_vec();
            payload.resize(4 + len, b'x');
        }
    }
    infer.inputs = List::from_slice(&inputs).unwrap_or(infer.inputs);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_check_accepts_what_its_slow_twin_accepts(
        which in 0usize..4,
        rows in 1u32..5,
        len in 1u32..18,
        seed in any::<u64>(),
        edits in proptest::collection::vec(edits(), 0..4),
    ) {
        let contract = &contracts()[which];
        let (mut infer, mut payload) = sound_request(contract, rows, len, seed);
        for edit in edits {
            apply(edit, &mut infer, &mut payload);
        }
        same_as_reference(contract, &infer, &payload);
    }

    #[test]
    fn the_check_of_any_request_at_all_agrees_with_its_slow_twin(
        which in 0usize..4,
        flags in 0u8..32,
        tensors in proptest::collection::vec(
            (any::<u8>(), any::<u8>(), proptest::collection::vec(any::<u32>(), 0..=8)), 0..=8),
        payload in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let inputs: Vec<TensorMeta> = tensors
            .iter()
            .map(|(index, dtype, dims)| TensorMeta {
                index: *index,
                dtype: *dtype,
                dims: List::from_slice(dims).expect("at most 8"),
            })
            .collect();
        let infer = Infer { flags, ..infer_of(&inputs) };
        same_as_reference(&contracts()[which], &infer, &payload);
    }
}

#[test]
fn sound_requests_are_accepted_with_and_without_the_last_padding() {
    for contract in contracts() {
        let (min, max) = contract.length.as_ref().map_or((1, 1), |length| (length.min, length.max));
        for rows in 1..=contract.rows_max {
            for len in min..=max {
                let (infer, mut payload) = sound_request(&contract, rows, len, u64::from(rows * 31 + len));
                assert!(same_as_reference(&contract, &infer, &payload));
                payload.resize(align8(payload.len()), 0);
                assert!(same_as_reference(&contract, &infer, &payload));
            }
        }
    }
}

#[test]
fn only_the_two_right_payload_sizes_are_accepted() {
    for contract in contracts() {
        let len = contract.length.as_ref().map_or(1, |length| length.max);
        let (infer, payload) = sound_request(&contract, 1, len, 3);
        for size in 0..payload.len() + 40 {
            let mut payload = payload.clone();
            let right = size == payload.len() || size == align8(payload.len());
            payload.resize(size, 0);
            assert_eq!(same_as_reference(&contract, &infer, &payload), right, "F22: {size} bytes");
        }
    }
}

#[test]
fn a_shape_whose_product_wraps_is_refused() {
    // As u64 these products are 0, or small; as u32 they are so already for two dimensions.
    let wrapping: [&[u32]; 6] = [
        &[1 << 16, 1 << 16],
        &[1 << 31, 1 << 31, 4],
        &[1 << 31, 1 << 31, 1 << 31, 1 << 31],
        &[u32::MAX, u32::MAX],
        &[1, u32::MAX],
        &[u32::MAX; 8],
    ];
    for contract in contracts() {
        for dims in wrapping {
            for payload in [&[][..], &[0; 4], &[0; 64]] {
                for spec in &contract.inputs {
                    let infer = infer_of(&[tensor(0, spec.dtype, dims)]);
                    assert!(!same_as_reference(&contract, &infer, payload), "F21: {dims:?}");
                }
            }
        }
    }
}

#[test]
fn a_contract_whose_largest_request_wraps_is_not_made() {
    let big = |dims: &[u32], rows_max| {
        let mut contract = contracts().remove(1);
        contract.inputs[0].shape = dims.iter().map(|dim| Dim::Fixed(*dim)).collect();
        contract.rows_max = rows_max;
        contract.checked()
    };
    assert!(big(&[1 << 31, 1 << 31, 4], 1).is_err(), "F21: 2^64 elements");
    assert!(big(&[1 << 16, 1 << 16, 1 << 16, 1 << 16], 1).is_err(), "F21: 2^64 elements");
    assert!(big(&[1 << 31, 1 << 31], 1).is_err(), "F21: 2^62 elements of 4 bytes");
    assert!(big(&[u32::MAX; 7], u32::MAX).is_err());
    assert!(big(&[1 << 26], 1).is_ok(), "256 MiB are the most");
    assert!(big(&[(1 << 26) + 1], 1).is_err());
    assert!(big(&[1 << 13], 1 << 13).is_ok());
    assert!(big(&[1 << 13], (1 << 13) + 1).is_err());
    assert!(big(&[0], 1).is_err());
    assert!(big(&[1; 8], 1).is_err(), "8 dimensions and the rows");
}

#[test]
fn token_ids_end_at_the_vocabulary() {
    let contract = &contracts()[0];
    let infer = infer_of(&[tensor(0, DType::U32, &[1, 3])]);
    let payload = |ids: [u32; 3]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
    let vocab = VOCAB as u32;
    for place in 0..3 {
        for (id, fits) in [
            (0, true),
            (vocab - 1, true),
            (vocab, false),
            (vocab + 1, false),
            ((1 << 31) - 1, false),
            (1 << 31, false),
            (u32::MAX - 1, false),
            (u32::MAX, false),
        ] {
            let mut ids = [5; 3];
            ids[place] = id;
            assert_eq!(same_as_reference(contract, &infer, &payload(ids)), fits, "F24, F25: id {id} at {place}");
            if !fits {
                let refusal = contract.check(&infer, &payload(ids)).expect_err("just refused");
                assert_eq!(refusal.code, Code::InvalidArgument);
                assert!(refusal.message.contains(&format!("got {id} at element {place}")), "{refusal}");
            }
        }
    }
}

#[test]
fn a_range_outside_of_what_u32_can_be_lets_no_value_through() {
    let ids = |range| Contract {
        inputs: vec![spec("ids", DType::U32, &[Dim::Fixed(1)], Some(range), NonFinite::Refuse)],
        ..contracts().remove(1)
    };
    let infer = infer_of(&[tensor(0, DType::U32, &[1, 1])]);
    for range in [[1 << 32, 1 << 40], [-5, -1], [i64::MIN, -1], [i64::MAX, i64::MAX], [0, 0], [-1, 1 << 40], [3, 7]] {
        for id in [0, 1, 3, 7, 8, u32::MAX - 1, u32::MAX] {
            // Not through `checked`, which refuses some of these: the check itself must not depend on it.
            same_as_reference(&ids(range), &infer, &u32::to_le_bytes(id));
        }
    }
}

#[test]
fn a_pad_that_its_dtype_cannot_hold_is_refused() {
    let with = |dtype, pad: f64, range| {
        let mut contract = contracts().remove(1);
        contract.inputs[0] = TensorSpec { pad, ..spec("x", dtype, &[Dim::Fixed(1)], range, NonFinite::Allow) };
        contract.checked().is_ok()
    };
    assert!(with(DType::U8, 255.0, None));
    assert!(!with(DType::U8, 256.0, None));
    assert!(!with(DType::U8, -1.0, None));
    assert!(with(DType::I8, -128.0, None));
    assert!(!with(DType::I32, 0.5, None));
    assert!(!with(DType::U32, f64::NAN, None));
    assert!(!with(DType::F32, f64::NAN, None), "JSON has no NaN: the contract could not be described");
    assert!(!with(DType::F64, f64::INFINITY, None));
    assert!(with(DType::F64, 1e300, None));
    assert!(with(DType::U64, 9_223_372_036_854_775_808.0, None));
    assert!(!with(DType::U64, 18_446_744_073_709_551_616.0, None));
    assert!(!with(DType::I64, 9_223_372_036_854_775_808.0, Some([0, i64::MAX])), "2^63 is above the largest i64");
    assert!(with(DType::I64, 9_007_199_254_740_992.0, Some([9_007_199_254_740_992, i64::MAX])));
    assert!(!with(DType::I64, 9_007_199_254_740_992.0, Some([9_007_199_254_740_993, i64::MAX])), "as integers");
}

#[test]
fn dtypes_of_one_size_are_told_apart_by_name() {
    let contract = &contracts()[3];
    let (infer, payload) = sound_request(contract, 1, 1, 1);
    assert!(same_as_reference(contract, &infer, &payload));
    let mut wrong = infer.inputs.to_vec();
    wrong[0].dtype = DType::F16 as u8;
    let refusal = contract.check(&infer_of(&wrong), &payload).expect_err("f16 sent as bf16");
    assert_eq!(refusal.message, "input a: expected dtype bf16, got f16", "F19");
    for number in (0..=255u8).filter(|number| *number != DType::BF16 as u8) {
        wrong[0].dtype = number;
        assert!(!same_as_reference(contract, &infer_of(&wrong), &payload), "F19: dtype {number}");
    }
}

#[test]
fn zero_dims_wrong_ranks_and_too_many_rows_are_refused_with_the_right_code() {
    let contract = &contracts()[0];
    let code = |dims: &[u32], bytes: usize| {
        let (infer, payload) = (infer_of(&[tensor(0, DType::U32, dims)]), vec![0; bytes]);
        same_as_reference(contract, &infer, &payload);
        contract.check(&infer, &payload).err().map(|refusal| refusal.code)
    };
    assert_eq!(code(&[4, 16], 256), None, "the largest");
    for (dims, bytes) in [
        (&[][..], 0),
        (&[4], 16),
        (&[4, 16, 1], 256),
        (&[0, 16], 0),
        (&[4, 0], 0),
        (&[0, 0], 0),
        (&[4, 1], 16),
        (&[4, 15], 256),
        (&[1; 8], 4),
    ] {
        assert_eq!(code(dims, bytes), Some(Code::InvalidArgument), "F20: {dims:?}");
    }
    for dims in [[5, 16], [4, 17], [u32::MAX, 16], [4, u32::MAX]] {
        assert_eq!(code(&dims, 256), Some(Code::TooLarge), "F20: {dims:?}");
    }
}

#[test]
fn nan_and_infinity_pass_only_where_the_contract_lets_them() {
    let contract = &contracts()[1];
    let (infer, sound) = sound_request(contract, 2, 1, 1);
    for (value, fits) in [
        (f32::MAX, true),
        (f32::MIN_POSITIVE / 2.0, true),
        (-0.0, true),
        (f32::NAN, false),
        (-f32::NAN, false),
        (f32::from_bits(0x7F80_0001), false),
        (f32::INFINITY, false),
        (f32::NEG_INFINITY, false),
    ] {
        for element in [0, 7, 15] {
            let mut payload = sound.clone();
            payload[4 * element..4 * element + 4].copy_from_slice(&value.to_le_bytes());
            assert_eq!(same_as_reference(contract, &infer, &payload), fits, "F23: {value} at {element}");
        }
    }
}

#[test]
fn text_is_checked_to_its_last_byte() {
    let contract = &contracts()[0];
    let text = tensor(1, DType::Text, &[1]);
    let payload = |len: u32, bytes: &[u8]| [&len.to_le_bytes()[..], bytes].concat();
    let fits = |tensor, payload: &[u8]| same_as_reference(contract, &infer_of(&[tensor]), payload);
    assert!(fits(text, &payload(3, b"abc")));
    assert!(fits(text, &payload(3, b"abc\0")), "padded to 8");
    assert!(fits(text, &payload(20, &[b'x'; 20])), "the longest");
    assert!(fits(text, &payload(0, b"")));
    for (len, bytes) in [
        (4, &b"abc"[..]),
        (2, b"abc"),
        (3, b"abc\0\0"),
        (u32::MAX, b"abc"),
        (u32::MAX - 3, b""),
        (21, &[b'x'; 21]),
        (2, &[0xC3, 0x28]),
    ] {
        assert!(!fits(text, &payload(len, bytes)), "F06, F11: a length of {len} and {} bytes", bytes.len());
    }
    for short in 0..4 {
        assert!(!fits(text, &[0; 3][..short.min(3)]));
    }
    assert!(!fits(tensor(1, DType::Text, &[2]), &payload(3, b"abc")), "one text per request");
    assert!(!fits(tensor(1, DType::U32, &[1]), &payload(3, b"abc")));
    assert!(!fits(tensor(0, DType::Text, &[1]), &payload(3, b"abc")));
    assert!(!same_as_reference(&contracts()[1], &infer_of(&[text]), &payload(3, b"abc")), "a model without text");
}

#[test]
fn request_flags_that_have_no_meaning_are_refused() {
    let contract = &contracts()[1];
    let (infer, payload) = sound_request(contract, 1, 1, 1);
    for flags in 0..=255u8 {
        let infer = Infer { flags, ..infer };
        assert_eq!(same_as_reference(contract, &infer, &payload), flags & !INFER_FLAGS_KNOWN == 0, "flags {flags}");
    }
}

#[test]
fn every_error_of_a_stream_says_what_was_expected_and_what_came() {
    for (error, code, said) in [
        (DecodeError::Magic(*b"GET"), Code::ProtocolError, "expected the magic bytes 46 52 59, got 47 45 54"),
        (DecodeError::Version(2), Code::ProtocolError, "expected protocol version 1, got 2"),
        (DecodeError::Kind(99), Code::ProtocolError, "frame kind 99 is unknown and not marked optional"),
        (DecodeError::Flags(5), Code::ProtocolError, "frame flags 0x05 have bits that must be zero"),
        (DecodeError::MetadataTooLong { len: 9, max: 8 }, Code::TooLarge, "metadata of 9 bytes, at most 8 are allowed"),
        (DecodeError::PayloadTooLong { len: 9, max: 8 }, Code::TooLarge, "payload of 9 bytes, at most 8 are allowed"),
        (
            DecodeError::HeadChecksum { expected: 0xab, received: 1 },
            Code::ChecksumMismatch,
            "checksum of header and metadata is 0x000000ab, the frame says 0x00000001",
        ),
    ] {
        assert_eq!((error.code(), error.to_string().as_str()), (code, said));
    }
}

#[test]
fn limits_that_change_hold_from_the_next_frame_on() {
    let bytes = frame_bytes(Kind::Infer as u8, 0, &[1], &[2; 9]);
    let limits = |metadata_bytes, payload_bytes| Limits { metadata_bytes, payload_bytes };
    let mut decoder = Decoder::new(limits(1, 8));
    assert_eq!(decoder.next(&bytes), Err(DecodeError::PayloadTooLong { len: 9, max: 8 }));
    decoder.set_limits(limits(1, 9));
    assert!(matches!(decoder.next(&bytes), Ok(Step::Frame(frame)) if frame.payload(&bytes) == [2; 9]));
    decoder.set_limits(limits(0, 9));
    assert_eq!(decoder.next(&bytes), Err(DecodeError::MetadataTooLong { len: 1, max: 0 }));
}

#[test]
fn a_list_reads_the_same_from_borrowed_bytes() {
    let mut list: List<u32, 4> = List::new();
    [7, 0, u32::MAX].into_iter().for_each(|item| list.push(item).expect("there is room"));
    let mut bytes = Vec::new();
    encode_into(&list, &mut bytes).expect("small");
    let config = bincode::config::standard().with_fixed_int_encoding();
    let read: (List<u32, 4>, usize) = bincode::borrow_decode_from_slice(&bytes, config).expect("what was written");
    assert_eq!(read, (list, bytes.len()));
}
