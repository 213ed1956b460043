//! Bytes that are no frames, frames that are cut, too long, damaged or out of order (F01 to F15).

use ferry::vocab::{Code, DType, Executed, ModelHandle, Retry};
use ferry::wire::encoder::{Head, append_frame};
use ferry::wire::message::{Infer, encode_into};
use ferry::wire::{HEADER_LEN, Header, Kind, PROTOCOL_MAJOR};

use crate::common::{
    Ask, Event, Numbers, Raw, Server, bare_frame, describe_frame, floats_of, header, hello, hello_frame, wait_until,
};

/// Rewrites a frame's head checksum after a test changed a header field.
fn reseal(frame: &mut [u8]) {
    let head: &[u8; HEADER_LEN] = frame.first_chunk().expect("a whole header");
    let metadata_len = u32::from_le_bytes([head[16], head[17], head[18], head[19]]) as usize;
    let metadata_len = metadata_len.min(frame.len() - HEADER_LEN);
    let crc = Header::expected_head_crc(head, &frame[HEADER_LEN..HEADER_LEN + metadata_len]);
    frame[28..32].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn random_bytes_are_answered_with_a_goaway_and_the_end() {
    let server = Server::shared();
    let mut bystander = server.connect();
    for seed in 0..50 {
        let mut numbers = Numbers(seed);
        let noise: Vec<u8> = (0..1 + numbers.below(3000)).map(|_| numbers.next() as u8).collect();
        let mut raw = Raw::connect(server.data);
        raw.send(&noise);
        let goaway = raw.recv().expect_goaway(Code::ProtocolError);
        assert_eq!(goaway.last_accepted_id, 0, "seed {seed}");
        assert!(matches!(raw.recv(), Event::End), "seed {seed}");
        bystander.ping();
    }
}

#[test]
fn noise_that_goes_on_after_the_goaway_does_not_hide_it() {
    let server = Server::shared();
    let mut raw = Raw::connect(server.data);
    // More than one read's worth: the server says goaway while most of it is still under way.
    let noise = vec![0xA5; 1 << 20];
    let mut writer = raw.stream.try_clone().expect("a second handle");
    let writing = std::thread::spawn(move || {
        use std::io::Write;
        let _ = writer.write_all(&noise);
    });
    raw.recv().expect_goaway(Code::ProtocolError);
    assert!(matches!(raw.recv(), Event::End));
    writing.join().expect("the writer ends when the server does");
}

#[test]
fn a_stream_that_goes_wrong_is_still_owed_the_answers_of_what_was_accepted_before() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let sleep = raw.handle("sleep");
    let id = raw.take_id();
    let mut bytes = Ask::word(sleep, 50_000).frame(id);
    bytes.extend_from_slice(&[0xEE; 200_000]); // several reads
    raw.send(&bytes);
    let events = raw.recv_all();
    let [first, second] = &events[..] else { panic!("expected a goaway and a result, got {events:?}") };
    assert!(matches!(first, Event::Goaway { code: Code::ProtocolError, goaway } if goaway.last_accepted_id == id));
    assert!(matches!(second, Event::Result { id: got, .. } if *got == id), "{second:?}");
    server.wait_until_at_rest();
}

#[test]
fn another_version_in_the_header_is_refused_with_the_versions_that_are_spoken() {
    let server = Server::shared();
    for version in (0..=255).filter(|version| *version != PROTOCOL_MAJOR) {
        let mut frame = hello_frame();
        frame[3] = version;
        reseal(&mut frame);
        let mut raw = Raw::connect(server.data);
        raw.send(&frame);
        let goaway = raw.recv().expect_goaway(Code::ProtocolError);
        assert_eq!((goaway.version_min, goaway.version_max), (PROTOCOL_MAJOR, PROTOCOL_MAJOR));
        assert!(matches!(raw.recv(), Event::End));
    }
}

#[test]
fn a_hello_is_accepted_when_its_range_of_versions_has_ours_and_refused_otherwise() {
    let server = Server::shared();
    for (min, max, spoken) in [(1, 1, true), (0, 255, true), (1, 9, true), (2, 9, false), (0, 0, false), (9, 1, false)]
    {
        let mut frame = Vec::new();
        let hello = ferry::wire::message::Hello { version_min: min, version_max: max, ..hello() };
        append_frame(&mut frame, Head::control(Kind::Hello), &hello, &[]).expect("small");
        let mut raw = Raw::connect(server.data);
        raw.send(&frame);
        match raw.recv() {
            Event::HelloAck(ack) => assert!(spoken && ack.version == PROTOCOL_MAJOR, "{min} to {max}"),
            other => {
                let goaway = other.expect_goaway(Code::ProtocolError);
                assert!(!spoken, "{min} to {max}: {goaway:?}");
                assert_eq!(goaway.version_max, PROTOCOL_MAJOR);
            }
        }
    }
}

#[test]
fn a_header_cut_at_any_byte_is_never_accepted_whether_the_peer_leaves_or_falls_silent() {
    let server = Server::start(&["frontend.hello_timeout_ms=100", "frontend.frame_timeout_ms=100"]);
    let mut probe = server.connect();
    let echo = probe.handle("echo");
    drop(probe);
    let frame = Ask::floats(echo, &[1.0, 2.0]).frame(7);
    let greeting = hello_frame();
    let mut silent = Vec::new();
    for cut in 0..HEADER_LEN {
        // Gone in the middle of the hello's header, and in the middle of a request's.
        let mut leaves = Raw::connect(server.data);
        leaves.send(&greeting[..cut]);
        drop(leaves);
        let mut leaves = server.connect();
        leaves.send(&frame[..cut]);
        leaves.stream.shutdown(std::net::Shutdown::Write).expect("half close");
        assert!(matches!(leaves.recv(), Event::End), "cut at {cut}");
        // Silent: many at a time, because each takes its timeout.
        let mut quiet = Raw::connect(server.data);
        quiet.send(&greeting[..cut]);
        silent.push((cut, quiet));
        if cut > 0 {
            let mut quiet = server.connect();
            quiet.send(&frame[..cut]);
            silent.push((cut, quiet));
        }
    }
    for (cut, mut quiet) in silent {
        let goaway = quiet.recv().expect_goaway(Code::ProtocolError);
        assert_eq!(goaway.last_accepted_id, 0, "cut at {cut}");
        assert!(matches!(quiet.recv(), Event::End), "cut at {cut}");
    }
    assert_eq!(server.telemetry.accepted_total(), 0);
}

#[test]
fn a_frame_that_drips_in_byte_by_byte_has_no_more_time_than_one_that_stops() {
    let server = Server::start(&["frontend.frame_timeout_ms=200"]);
    let mut raw = server.connect();
    let frame = Ask::floats(ModelHandle(1), &[0.0; 512]).frame(1);
    let mut stream = raw.stream.try_clone().expect("a second handle");
    let dripping = std::thread::spawn(move || {
        use std::io::Write;
        // At this pace the frame would take minutes.
        frame
            .iter()
            .take_while(|byte| {
                std::thread::sleep(std::time::Duration::from_millis(50));
                stream.write_all(std::slice::from_ref(byte)).is_ok()
            })
            .count()
    });
    raw.recv().expect_goaway(Code::ProtocolError);
    assert!(matches!(raw.recv(), Event::End));
    drop(raw);
    assert!(dripping.join().expect("the writer ends") < 1000, "it was cut off, not waited for");
    assert_eq!(server.telemetry.accepted_total(), 0);
}

#[test]
fn a_payload_cut_in_the_middle_is_never_accepted() {
    let server = Server::start(&[]);
    let mut bystander = server.connect();
    let echo = bystander.handle("echo");
    let mut numbers = Numbers(4);
    for round in 0..200 {
        let values = vec![1.5f32; 1 + numbers.below(1024) as usize];
        let frame = Ask::floats(echo, &values).frame(1);
        let cut = 1 + numbers.below(frame.len() as u64 - 1) as usize;
        let mut raw = server.connect();
        raw.send(&frame[..cut]);
        match round % 2 {
            0 => {
                raw.stream.shutdown(std::net::Shutdown::Write).expect("half close");
                assert!(matches!(raw.recv(), Event::End));
            }
            _ => {
                // A reset instead of an end.
                let socket = socket2::SockRef::from(&raw.stream);
                socket.set_linger(Some(std::time::Duration::ZERO)).expect("a socket option");
                drop(raw);
            }
        }
    }
    bystander.ping();
    assert_eq!(server.telemetry.accepted_total(), 0);
    server.wait_until_at_rest();
    wait_until("only the bystander is connected", || {
        server.metric("ferry_connections_opened_total", &[]) - server.metric("ferry_connections_closed_total", &[])
            == 1.0
    });
}

#[test]
fn a_long_payload_cut_in_the_middle_is_never_accepted() {
    // Beyond the shared read buffer, frames get a buffer of their own.
    let server = Server::start(&[]);
    let mut bystander = server.connect();
    let echo = bystander.handle("echo");
    let rows = 64;
    let values = vec![1.5f32; rows * 256];
    let frame = Ask::new(echo, DType::F32, &[rows as u32, 256], bytemuck::cast_slice(&values)).frame(1);
    assert!(frame.len() > 64 << 10);
    for cut in [33 << 10, 40_000, 65_535, 65_536, frame.len() - 1] {
        let mut raw = server.connect();
        raw.send(&frame[..cut]);
        raw.stream.shutdown(std::net::Shutdown::Write).expect("half close");
        assert!(matches!(raw.recv(), Event::End), "cut at {cut}");
    }
    assert_eq!(server.telemetry.accepted_total(), 0);
    let mut whole = server.connect();
    whole.send(&frame);
    let (result, payload) = whole.recv().expect_result();
    assert_eq!(result.batch_rows as usize, rows);
    assert_eq!(payload, bytemuck::cast_slice::<f32, u8>(&values));
}

#[test]
fn the_largest_payload_is_read_and_one_byte_more_is_refused_on_its_header() {
    const MAX: u32 = 64 << 10;
    let server = Server::start(&["frontend.payload_bytes_max=65536"]);
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    // The largest: read whole, and then refused for its meaning alone.
    let largest = Ask::new(echo, DType::F32, &[1, 8], &vec![0; MAX as usize]);
    raw.round(&largest).expect_error(Code::InvalidArgument);
    raw.ping();
    for len in [MAX + 1, u32::MAX] {
        let mut raw = server.connect();
        let mut head = header(Kind::Infer as u8, 0, 0, len);
        reseal(&mut head);
        raw.send(&head);
        let goaway = raw.recv().expect_goaway(Code::TooLarge);
        assert!(goaway.message.contains(&len.to_string()), "{}", goaway.message);
        assert!(matches!(raw.recv(), Event::End));
    }
    for len in [4097, u32::MAX] {
        let mut raw = server.connect();
        raw.send(&header(Kind::Infer as u8, 0, len, 0));
        raw.recv().expect_goaway(Code::TooLarge);
        assert!(matches!(raw.recv(), Event::End));
    }
    raw.ping();
}

#[test]
fn before_the_hello_no_payload_and_no_more_than_a_kibibyte_is_read() {
    let server = Server::shared();
    for (metadata_len, payload_len) in [(1025, 0), (0, 1), (0, 16 << 20)] {
        let mut raw = Raw::connect(server.data);
        raw.send(&header(Kind::Hello as u8, 0, metadata_len, payload_len));
        raw.recv().expect_goaway(Code::TooLarge);
        assert!(matches!(raw.recv(), Event::End));
    }
}

#[test]
fn a_stream_cut_into_other_pieces_gets_the_same_answers() {
    let server = Server::shared();
    let mut probe = server.connect();
    let (echo, bert) = (probe.handle("echo"), probe.handle("tiny_bert"));
    let mut numbers = Numbers(7);
    let mut stream = hello_frame();
    let mut ids = 0;
    for id in 1..=60u64 {
        ids = id;
        match numbers.below(5) {
            0 => stream.extend(bare_frame(Kind::Ping, id)),
            1 => stream.extend(describe_frame(id, "echo", "")),
            2 => stream.extend(describe_frame(id, "nobody", "")),
            3 => {
                let tokens = vec![numbers.below(100) as u32; 1 + numbers.below(64) as usize];
                let dims = [1, tokens.len() as u32];
                stream.extend(Ask::new(bert, DType::U32, &dims, bytemuck::cast_slice(&tokens)).frame(id));
            }
            _ => {
                let values: Vec<f32> = (0..1 + numbers.below(1024)).map(|_| numbers.below(1000) as f32).collect();
                stream.extend(Ask::floats(echo, &values).frame(id));
            }
        }
    }
    // Batches differ from run to run, so the answers are compared without what tells about their batch.
    let answers = |pieces: &mut dyn FnMut(&mut Raw)| {
        let mut raw = Raw::connect(server.data);
        pieces(&mut raw);
        assert!(matches!(raw.recv(), Event::HelloAck(_)));
        let mut answers: Vec<(u64, String)> = (0..ids)
            .map(|_| match raw.recv() {
                Event::Result { id, result, payload } => (id, format!("{:?} {}", result.outputs, rounded(&payload))),
                Event::Error { id, refusal } => (id, refusal.to_string()),
                Event::Description { id, json, .. } => (id, json.to_string()),
                Event::Pong(id) => (id, "pong".into()),
                other => panic!("{other:?}"),
            })
            .collect();
        answers.sort();
        answers
    };
    let merged = answers(&mut |raw| raw.send(&stream));
    assert_eq!(merged.iter().map(|(id, _)| *id).collect::<Vec<_>>(), (1..=ids).collect::<Vec<_>>());
    let bytewise = answers(&mut |raw| stream.iter().for_each(|byte| raw.send(std::slice::from_ref(byte))));
    assert_eq!(bytewise, merged);
    for seed in 0..20 {
        let mut numbers = Numbers(seed);
        let random = answers(&mut |raw| {
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let (piece, more) = rest.split_at((1 + numbers.below(3000) as usize).min(rest.len()));
                raw.send(piece);
                rest = more;
            }
        });
        assert_eq!(random, merged, "seed {seed}");
    }
}

/// Values with the digits that do not depend on a row's batch mates.
fn rounded(payload: &[u8]) -> String {
    floats_of(payload).iter().map(|value| format!("{:.3} ", value + 0.0).replace("-0.000", "0.000")).collect()
}

/// A request frame with this metadata, its checksums right.
fn frame_with_metadata(model: ModelHandle, id: u64, metadata: &[u8]) -> Vec<u8> {
    let header = Header {
        kind: Kind::Infer as u8,
        flags: 0,
        model,
        request_id: id,
        metadata_len: metadata.len() as u32,
        payload_len: 0,
        payload_crc: 0,
        head_crc: 0,
    };
    [&header.encode(metadata)[..], metadata].concat()
}

#[test]
fn malformed_metadata_costs_one_request_and_not_the_connection() {
    let server = Server::start(&["abuse.points=0"]);
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    let good = Ask::floats(echo, &[3.0]);
    let mut right = Vec::new();
    encode_into(&good.infer, &mut right).expect("small");
    let bomb = |count: u64| {
        let mut bytes = Vec::new();
        encode_into(&Infer::default(), &mut bytes).expect("small");
        let at = bytes.len() - 8;
        bytes[at..].copy_from_slice(&count.to_le_bytes());
        bytes
    };
    let mut cases: Vec<Vec<u8>> = vec![Vec::new(), [&right[..], &[0]].concat(), [&right[..], &right[..]].concat()];
    cases.extend((1..right.len()).map(|cut| right[..cut].to_vec()));
    cases.extend([9, 1 << 12, 1 << 45, u64::MAX].map(bomb));
    cases.push([&right[..], &vec![0; 4096 - right.len()]].concat());
    let mut numbers = Numbers(9);
    cases.extend((0..500).map(|_| {
        let len = numbers.below(200) as usize;
        (0..len).map(|_| numbers.next() as u8).collect()
    }));
    for metadata in cases {
        let id = raw.take_id();
        raw.send(&frame_with_metadata(echo, id, &metadata));
        let event = raw.recv();
        assert_eq!(event.ends(), Some(id));
        let refusal = event.expect_error(Code::InvalidArgument);
        assert_eq!((refusal.executed, refusal.retry), (Executed::Never, Retry::No), "{metadata:02x?}");
    }
    let (_, payload) = raw.round(&good).expect_result();
    assert_eq!(payload, 3.0f32.to_le_bytes());
}

#[test]
fn a_malformed_hello_or_describe_is_told_apart_from_a_good_one() {
    let server = Server::shared();
    let mut frame = hello_frame();
    frame.push(0);
    frame[16] += 1; // one byte more than the message has
    reseal(&mut frame);
    let mut raw = Raw::connect(server.data);
    raw.send(&frame);
    raw.recv().expect_goaway(Code::ProtocolError);
    assert!(matches!(raw.recv(), Event::End));

    let mut raw = server.connect();
    let mut frame = describe_frame(1, "echo", "");
    frame.push(0);
    frame[16] += 1;
    reseal(&mut frame);
    raw.send(&frame);
    raw.recv().expect_error(Code::InvalidArgument);
    raw.ping();
}

#[test]
fn a_used_id_is_refused_and_the_request_that_has_it_is_unharmed() {
    let server = Server::shared();
    let mut raw = server.connect();
    let sleep = raw.handle("sleep");
    let id = raw.ask(&Ask::word(sleep, 50_000));
    raw.send(&Ask::word(sleep, 0).frame(id));
    raw.send(&Ask::word(sleep, 0).frame(id - 1));
    let first = raw.recv();
    assert_eq!(first.ends(), Some(id));
    first.expect_error(Code::InvalidArgument);
    let second = raw.recv();
    assert_eq!(second.ends(), Some(id - 1));
    second.expect_error(Code::InvalidArgument);
    let third = raw.recv();
    assert_eq!(third.ends(), Some(id));
    assert_eq!(third.expect_result().1, 50_000u32.to_le_bytes());
}

#[test]
fn a_frame_of_an_unknown_kind_is_skipped_when_optional_and_fatal_otherwise() {
    let server = Server::shared();
    let mut raw = server.connect();
    for kind in (0..=255u8).filter(|kind| Kind::from_number(*kind).is_none()) {
        let body = [7u8; 24];
        let mut optional = header(kind, 0x80, 8, 16);
        optional[24..28].copy_from_slice(&crc32c::crc32c(&body[8..]).to_le_bytes());
        optional.extend_from_slice(&body);
        reseal(&mut optional);
        raw.send(&optional);
        if kind % 16 == 0 {
            raw.ping();
            let mut other = server.connect();
            other.send(&header(kind, 0, 0, 0));
            other.recv().expect_goaway(Code::ProtocolError);
            assert!(matches!(other.recv(), Event::End));
        }
    }
    raw.ping();
}

#[test]
fn a_reserved_flag_is_fatal_on_every_kind() {
    let server = Server::shared();
    for kind in Kind::ALL {
        for bit in 0..7 {
            let mut raw = server.connect();
            raw.send(&header(kind as u8, 1 << bit, 0, 0));
            raw.recv().expect_goaway(Code::ProtocolError);
            assert!(matches!(raw.recv(), Event::End));
        }
    }
}

#[test]
fn only_a_hello_is_understood_first_and_only_once() {
    let server = Server::shared();
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Hello) {
        let mut raw = Raw::connect(server.data);
        raw.send(&bare_frame(kind, 1));
        raw.recv().expect_goaway(Code::ProtocolError);
        assert!(matches!(raw.recv(), Event::End), "{kind:?}");
    }
    let mut raw = server.connect();
    raw.send(&hello_frame());
    raw.recv().expect_goaway(Code::ProtocolError);
    assert!(matches!(raw.recv(), Event::End));
}

#[test]
fn frames_that_only_servers_send_are_fatal_from_a_client() {
    let server = Server::shared();
    for kind in Kind::ALL.into_iter().filter(|kind| !kind.from_client()) {
        let mut raw = server.connect();
        raw.send(&bare_frame(kind, 1));
        raw.recv().expect_goaway(Code::ProtocolError);
        assert!(matches!(raw.recv(), Event::End), "{kind:?}");
    }
}

#[test]
fn what_a_client_sends_after_its_own_goaway_is_not_accepted() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    let before = raw.take_id();
    let after = raw.take_id();
    let ask = Ask::floats(echo, &[1.0]);
    raw.send(&[ask.frame(before), bare_frame(Kind::Goaway, 0), ask.frame(after)].concat());
    let events = raw.recv_all();
    assert_eq!(events.iter().filter_map(Event::ends).collect::<Vec<_>>(), [before]);
    assert_eq!(server.telemetry.accepted_total(), 1);
}

#[test]
fn a_bit_flipped_in_a_payload_is_found_and_the_request_is_not_executed() {
    let server = Server::start(&["abuse.points=0"]);
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    let ask = Ask::floats(echo, &[1.0, -2.0, 3.5]);
    let clean = ask.frame(1);
    let payload_at = clean.len() - ask.payload.len();
    for bit in 0..ask.payload.len() * 8 {
        let id = raw.take_id();
        let mut frame = ask.frame(id);
        frame[payload_at + bit / 8] ^= 1 << (bit % 8);
        raw.send(&frame);
        let event = raw.recv();
        assert_eq!(event.ends(), Some(id));
        let refusal = event.expect_error(Code::ChecksumMismatch);
        assert_eq!((refusal.executed, refusal.retry), (Executed::Never, Retry::Same));
    }
    assert_eq!(server.telemetry.accepted_total(), 0);
    assert_eq!(server.metric("ferry_batches_total", &["model=\"echo\""]), 0.0);
    let (_, payload) = raw.round(&ask).expect_result();
    assert_eq!(payload, ask.payload);
}

#[test]
fn a_bit_flipped_in_a_head_costs_the_connection_and_nothing_is_executed() {
    let server = Server::start(&[]);
    let mut bystander = server.connect();
    let echo = bystander.handle("echo");
    let ask = Ask::floats(echo, &[1.0, -2.0]);
    let clean = ask.frame(1);
    for bit in 0..(clean.len() - ask.payload.len()) * 8 {
        let mut frame = clean.clone();
        frame[bit / 8] ^= 1 << (bit % 8);
        let mut raw = server.connect();
        raw.send(&frame);
        raw.stream.shutdown(std::net::Shutdown::Write).expect("half close");
        // A length that grew waits for bytes that never come; everything else is seen at once.
        match raw.recv() {
            Event::Goaway { code: Code::ProtocolError | Code::TooLarge | Code::ChecksumMismatch, .. } | Event::End => {}
            other => panic!("bit {bit}: {other:?}"),
        }
    }
    assert_eq!(server.telemetry.accepted_total(), 0);
    bystander.ping();
}
