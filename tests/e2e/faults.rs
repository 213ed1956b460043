//! Models that fail, peers that do not read, peers that reset, tasks that panic (F43, F55, F75, F76).

use std::io::Write;
use std::time::Duration;

use ferry::server::{Ending, TestHooks};
use ferry::vocab::{Code, DType, Executed};
use ferry::wire::Kind;

use crate::common::{Ask, Event, Server, bare_frame, wait_until};

#[test]
fn a_model_that_panics_fails_its_batch_and_serves_the_next_a_hundred_times() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    for round in 0..100u64 {
        // 1 panics, 2 returns an error; its mate shares the batch and its end.
        let behaviour = 1 + (round % 2) as u32;
        let ids = [
            raw.ask(&Ask::word(faulty, behaviour).compose(round + 1, 2)),
            raw.ask(&Ask::word(faulty, 9).compose(round + 1, 2)),
        ];
        for _ in ids {
            let refusal = raw.recv().expect_error(Code::ExecutorFailed);
            assert_eq!(refusal.executed, Executed::Maybe);
            assert!(!refusal.message.contains(".rs"), "no internal name leaves the server: {}", refusal.message);
        }
        let (_, payload) = raw.round(&Ask::word(faulty, 4)).expect_result();
        assert_eq!(payload, 4.0f32.to_le_bytes());
    }
    server.wait_until_at_rest();
    assert_eq!(server.metric("ferry_executor_panics_total", &[]), 50.0);
    assert_eq!(server.metric("ferry_executor_failures_total", &[]), 50.0);
}

#[test]
fn a_reader_that_never_reads_is_bounded_then_closed_and_nobody_else_notices() {
    const OUTPUT_MAX: usize = 256 << 10;
    let server = Server::start(&["frontend.stall_timeout_ms=500", "frontend.output_bytes_max=262144"]);
    let mut bystander = server.connect();
    let mut lazy = server.connect();
    let echo = lazy.handle("echo");
    socket2::SockRef::from(&lazy.stream).set_recv_buffer_size(4096).expect("a socket option");
    lazy.stream.set_write_timeout(Some(Duration::from_millis(200))).expect("a socket option");
    let ask = Ask::new(echo, DType::F32, &[16, 1024], &vec![7; 16 * 4096]);
    let mut sent = 0u64;
    // Until the server stops reading: then both sockets are full.
    while sent < 10_000 {
        let id = lazy.take_id();
        if lazy.stream.write_all(&ask.frame(id)).is_err() {
            break;
        }
        sent += 1;
        if sent.is_multiple_of(50) {
            bystander.ping();
        }
    }
    assert!(sent < 10_000, "the server stopped reading");
    wait_until("the lazy reader's connection is closed", || {
        bystander.ping();
        server.metric("ferry_connections_closed_total", &[]) == 1.0
    });
    server.wait_until_at_rest();
    // What the server wrote and held for it: what the sockets took, its output's bound, and its credit of answers.
    let accepted = server.telemetry.accepted_total() as usize;
    let answer = 16 * 4096 + 200;
    let sockets = 16 << 20;
    assert!(accepted * answer <= sockets + OUTPUT_MAX + 256 * answer, "{accepted} requests were accepted");
    bystander.round(&Ask::floats(echo, &[1.0])).expect_result();
}

#[test]
fn readers_that_stall_together_are_bounded_together_and_nobody_else_notices() {
    const LAZY: usize = 5;
    // A stall alone closes nobody here: only the sum does. One of them may hold 256 KiB and its credit, which is 512 KiB.
    let server = Server::start(&[
        "frontend.stall_timeout_ms=3600000",
        "frontend.frame_timeout_ms=3600000",
        "frontend.output_bytes_max=262144",
        "frontend.output_bytes_total_max=1048576",
        "frontend.credit_requests=8",
    ]);
    let mut bystander = server.connect();
    let echo = bystander.handle("echo");
    let ask = Ask::new(echo, DType::F32, &[16, 1024], &vec![7; 16 * 4096]);
    let mut lazy: Vec<_> = (0..LAZY).map(|_| (server.connect(), 0)).collect();
    for (raw, asked) in &mut lazy {
        raw.stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a socket option");
        // Until the server stops reading it, or closes it.
        while raw.stream.write_all(&ask.frame(*asked + 1)).is_ok() {
            *asked += 1;
            assert!(*asked < 10_000, "the server stopped reading");
        }
        assert!(bystander.round(&ask).expect_result().1 == ask.payload);
    }
    let closed = server.metric("ferry_slow_readers_total", &[]) as usize;
    assert!((1..LAZY).contains(&closed), "{closed} of {LAZY} were closed, one alone is within the bound");
    // Those that were left go on as if nothing had been: each request that was read whole has its end.
    let mut whole = 0;
    for (raw, asked) in &mut lazy {
        whole += usize::from((0..*asked).all(|_| match raw.recv() {
            Event::Result { payload, .. } => payload == ask.payload,
            Event::End => false,
            other => other.expect_error(Code::Overloaded).code == Code::Overloaded,
        }));
    }
    assert_eq!(whole, LAZY - closed);
    wait_until("those that were closed are gone", || {
        server.metric("ferry_connections_closed_total", &[]) as usize == closed
    });
    server.wait_until_at_rest();
    bystander.round(&ask).expect_result();
}

#[test]
fn a_slow_reader_that_reads_is_never_closed_and_gets_every_answer() {
    let server = Server::start(&["frontend.stall_timeout_ms=2000", "frontend.output_bytes_max=65536"]);
    let mut slow = server.connect();
    let echo = slow.handle("echo");
    let ask = Ask::new(echo, DType::F32, &[16, 1024], &vec![7; 16 * 4096]);
    let mut stream = slow.stream.try_clone().expect("a second handle");
    let frames: Vec<Vec<u8>> = (0..300).map(|_| slow.take_id()).map(|id| ask.frame(id)).collect();
    let writing = std::thread::spawn(move || frames.iter().for_each(|frame| stream.write_all(frame).expect("is read")));
    let mut ok = 0;
    for _ in 0..300 {
        match slow.recv() {
            Event::Result { payload, .. } => {
                assert!(payload == ask.payload);
                ok += 1;
            }
            other => drop(other.expect_error(Code::Overloaded)),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    writing.join().expect("all was written");
    assert!(ok > 0);
    slow.ping();
    server.wait_until_at_rest();
}

#[test]
fn a_peer_that_resets_while_it_is_written_to_costs_its_connection_only() {
    let server = Server::start(&["threads.shards=2"]);
    let mut bystander = server.connect();
    let echo = bystander.handle("echo");
    let ask = Ask::new(echo, DType::F32, &[16, 1024], &vec![7; 16 * 4096]);
    for round in 0..30 {
        let mut raw = server.connect();
        let frames: Vec<u8> = (0..20).flat_map(|_| ask.frame(raw.take_id())).collect();
        raw.stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a socket option");
        let _ = raw.stream.write_all(&frames);
        if round % 3 == 0 {
            raw.recv(); // in the middle of the answers
        }
        socket2::SockRef::from(&raw.stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
        drop(raw);
        bystander.ping();
    }
    server.wait_until_at_rest();
    wait_until("only the bystander is connected", || {
        server.metric("ferry_connections_opened_total", &[]) - server.metric("ferry_connections_closed_total", &[])
            == 1.0
    });
    bystander.round(&ask).expect_result();
}

#[test]
fn a_panic_in_a_connections_task_closes_that_connection_and_the_shard_lives() {
    const TRIGGER: u64 = 777_777;
    let server = Server::start_with(&[], TestHooks { panic_on_request_id: Some(TRIGGER), ..TestHooks::default() });
    let mut bystander = server.connect();
    let (echo, faulty) = (bystander.handle("echo"), bystander.handle("faulty"));
    for round in 0..20 {
        let mut raw = server.connect();
        // With a request running, one in the same burst, and one of a neighbour.
        raw.ask(&Ask::word(faulty, 20));
        let neighbour = bystander.ask(&Ask::word(faulty, 5 + round));
        raw.send(&[Ask::floats(echo, &[1.0]).frame(777), Ask::floats(echo, &[1.0]).frame(TRIGGER)].concat());
        while !matches!(raw.recv(), Event::End) {}
        let event = bystander.recv();
        assert_eq!(event.ends(), Some(neighbour));
        event.expect_result();
        bystander.ping();
    }
    server.wait_until_at_rest();
    assert_eq!(
        server.metric("ferry_connections_opened_total", &[]) - server.metric("ferry_connections_closed_total", &[]),
        1.0
    );
    server.drain();
    drop(bystander);
    assert_eq!(server.ending(), Ending::Drained);
}

#[test]
fn a_flood_of_pings_from_a_peer_that_does_not_read_is_bounded_too() {
    let server = Server::start(&["frontend.stall_timeout_ms=500", "frontend.output_bytes_max=65536", "abuse.points=0"]);
    let mut bystander = server.connect();
    let mut flood = server.connect();
    flood.stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a socket option");
    let pings: Vec<u8> = (0..2048).flat_map(|_| bare_frame(Kind::Stats, 1)).collect();
    let mut blocked = false;
    for _ in 0..2000 {
        if flood.stream.write_all(&pings).is_err() {
            blocked = true;
            break;
        }
        bystander.ping();
    }
    assert!(blocked, "the server stopped reading");
    wait_until("the flood's connection is closed", || server.metric("ferry_connections_closed_total", &[]) == 1.0);
    bystander.ping();
}

#[test]
fn a_shard_that_dies_is_a_fault_and_the_other_shard_drains() {
    const TRIGGER: u64 = 777_777;
    let hooks = TestHooks { panic_shard_on_request_id: Some(TRIGGER), ..TestHooks::default() };
    let server = Server::start_with(&["threads.shards=2"], hooks);
    // The kernel spreads connections over the shards' listeners; which has which is seen in the counters.
    let mut on_shard: [Vec<crate::common::Raw>; 2] = Default::default();
    while on_shard.iter().any(Vec::is_empty) {
        let before = server.metric("ferry_connections_opened_total", &["shard=\"0\""]);
        let raw = server.connect();
        let after = server.metric("ferry_connections_opened_total", &["shard=\"0\""]);
        on_shard[usize::from(after == before)].push(raw);
    }
    let [mut dying, mut living] = on_shard;
    let mut expected = Vec::new();
    for raw in &mut living {
        let faulty = raw.handle("faulty");
        expected.push((1..4).map(|n| raw.ask(&Ask::word(faulty, 4 + n))).collect::<Vec<u64>>());
    }
    wait_until("all are accepted", || server.telemetry.accepted_total() == 3 * living.len() as u64);
    let echo = dying[0].handle("echo");
    dying[0].send(&Ask::floats(echo, &[1.0]).frame(TRIGGER));
    for raw in &mut dying {
        assert!(matches!(raw.recv(), Event::End), "a dead shard's connections are closed");
    }
    for (raw, ids) in living.iter_mut().zip(expected) {
        let events = raw.recv_all();
        let mut ended: Vec<u64> = events.iter().filter_map(Event::ends).collect();
        ended.sort_unstable();
        assert_eq!(ended, ids);
        assert!(events.iter().any(|event| matches!(event, Event::Goaway { code: Code::Draining, .. })), "{events:?}");
    }
    match server.ending() {
        Ending::Fault(what) => assert!(what.contains("ferry-shard-0"), "{what}"),
        other => panic!("expected a fault, got {other:?}"),
    }
}
