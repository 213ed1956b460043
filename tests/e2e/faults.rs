//! Models that fail, peers that do not read, peers that reset, tasks that panic (F43, F55, F75, F76).

use std::io::Write;
use std::time::Duration;

use ferry::server::{Ending, TestHooks};
use ferry::vocab::{Code, DType, Executed};
use ferry::wire::Kind;

use crate::common::{Ask, Event, Server, bare_frame, wait_until};

/// Goal: F55, T8. Method: a culprit at a random place of a batch of eight, a thousand times, and what could leak is counted.
#[test]
fn a_model_that_panics_fails_who_made_it_and_answers_its_mates_a_thousand_times() {
    // Always the same two culprits: nobody remembers them here.
    let server = Server::start(&["threads.executors=1", "executor.quarantine_max=0"]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    let mut live = None;
    for round in 0..1000u64 {
        // 1 panics, 2 returns an error.
        let (behaviour, culprit) = (1 + (round % 2) as u32, (round * 7 % 8) as usize);
        let ids: Vec<u64> = (0..8)
            .map(|at| raw.ask(&Ask::word(faulty, if at == culprit { behaviour } else { 0 }).compose(round + 1, 8)))
            .collect();
        for _ in &ids {
            let event = raw.recv();
            if event.ends() == Some(ids[culprit]) {
                let refusal = event.expect_error(Code::ExecutorFailed);
                assert_eq!(refusal.executed, Executed::Maybe);
                assert!(!refusal.message.contains(".rs"), "no internal name leaves the server: {}", refusal.message);
            } else {
                assert_eq!(event.expect_result().1, 0.0f32.to_le_bytes());
            }
        }
        if round == 100 || round == 999 {
            server.wait_until_at_rest();
            let kinds = ["staging", "output", "tickets", "connections"];
            let now = kinds.map(|kind| server.metric("ferry_live_objects", &[&format!("kind=\"{kind}\"")]));
            assert_eq!(*live.get_or_insert(now), now, "{kinds:?}");
        }
    }
    assert_eq!(server.metric("ferry_executor_panics_total", &[]), 500.0);
    assert_eq!(server.metric("ferry_executor_failures_total", &[]), 500.0);
    assert_eq!(server.metric("ferry_bisections_total", &[]), 1000.0);
    let rows = |outcome: &str| server.metric("ferry_bisected_rows_total", &[&format!("outcome=\"{outcome}\"")]);
    assert_eq!([rows("saved"), rows("culprit"), rows("given_up")], [7000.0, 1000.0, 0.0]);
}

/// Goal: F56. Method: the same bytes again and again, and others of the same shape between.
#[test]
fn a_request_that_made_its_model_fail_twice_is_not_run_again_for_a_while() {
    let server = Server::start(&["executor.quarantine_ms=3600000"]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    let batches = || server.metric("ferry_batches_total", &["model=\"faulty\""]);
    let quarantined = || server.metric("ferry_quarantine_requests", &[]);
    for (round, executed) in
        [Executed::Maybe, Executed::Maybe, Executed::Never, Executed::Never].into_iter().enumerate()
    {
        let before = batches();
        let refusal = raw.round(&Ask::word(faulty, 1)).expect_error(Code::ExecutorFailed);
        assert_eq!((refusal.executed, batches() - before), (executed, f64::from(u8::from(round < 2))), "round {round}");
        raw.round(&Ask::word(faulty, 4)).expect_result();
        // Its caller may know before the batcher does.
        wait_until("it is quarantined", || round == 0 || quarantined() == 1.0);
    }
    // In company it is known at once: it failed with the others, and alone.
    let both = [raw.ask(&Ask::word(faulty, 2).compose(1, 2)), raw.ask(&Ask::word(faulty, 5).compose(1, 2))];
    for _ in both {
        let event = raw.recv();
        match event.ends() == Some(both[0]) {
            true => drop(event.expect_error(Code::ExecutorFailed)),
            false => drop(event.expect_result()),
        }
    }
    wait_until("the other is, too", || quarantined() == 2.0);
    let refusal = raw.round(&Ask::word(faulty, 2)).expect_error(Code::ExecutorFailed);
    assert_eq!(refusal.executed, Executed::Never);
    raw.round(&Ask::words(faulty, &[2, 2])).expect_error(Code::ExecutorFailed);
    server.wait_until_at_rest();
    wait_until("all three are", || server.metric("ferry_quarantined_total", &["model=\"faulty\""]) == 3.0);
    wait_until("as many are remembered", || quarantined() == 3.0);
}

/// Behaviours of the faulty model: longer than the test takes, and longer than its timeout.
const FOREVER: u32 = 60_000;
const HANG_MS: &str = "executor.hang_timeout_ms=300";

/// Goal: F57. Method: a batch that does not come back, with one bound behind it; then a drain while it still does not.
#[test]
fn a_batch_that_hangs_is_answered_and_another_thread_takes_the_executors_seat() {
    let server = Server::start(&["threads.executors=1", "executor.slots=2", HANG_MS]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    let hung = [FOREVER, 0].map(|word| raw.ask(&Ask::word(faulty, word).compose(1, 2)));
    wait_until("the executor has it", || server.metric("ferry_batches_total", &["model=\"faulty\""]) == 1.0);
    let behind = raw.ask(&Ask::word(faulty, 0));
    let mut failed = Vec::new();
    for _ in 0..3 {
        let event = raw.recv();
        if event.ends() == Some(behind) {
            assert_eq!(event.expect_result().1, 0.0f32.to_le_bytes());
        } else {
            failed.push(event.ends().expect("an end"));
            assert_eq!(event.expect_error(Code::ExecutorFailed).executed, Executed::Maybe);
        }
    }
    failed.sort_unstable();
    assert_eq!(failed, hung);
    for round in 0..20 {
        assert_eq!(raw.round(&Ask::word(faulty, 4 + round)).expect_result().1, ((4 + round) as f32).to_le_bytes());
    }
    assert_eq!(server.metric("ferry_executor_hangs_total", &[]), 1.0);
    server.wait_until_at_rest();
    server.drain();
    drop(raw);
    assert_eq!(server.ending(), Ending::Drained, "whoever hangs is left behind");
}

#[test]
fn what_a_hung_thread_still_brings_is_dropped_and_counted_and_the_thread_ends() {
    let server = Server::start(&["threads.executors=1", HANG_MS]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    raw.round(&Ask::word(faulty, 1_000)).expect_error(Code::ExecutorFailed);
    raw.round(&Ask::word(faulty, 4)).expect_result();
    let late = || server.metric("ferry_executor_late_results_total", &[]) == 1.0;
    wait_until("the late result is there", late);
    raw.round(&Ask::word(faulty, 5)).expect_result();
    // Nobody is told twice, and the thread's end is no fault.
    raw.ping();
    server.wait_until_at_rest();
    assert_eq!(server.metric("ferry_alarms_total", &[]), 0.0);
    server.drain();
    drop(raw);
    assert_eq!(server.ending(), Ending::Drained);
}

#[test]
fn a_deadline_holds_while_an_executor_hangs_and_a_drain_waits_for_nobody_who_was_answered() {
    let server = Server::start(&["threads.executors=1", "executor.hang_timeout_ms=0"]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    raw.round(&Ask::word(faulty, FOREVER).deadline_us(50_000)).expect_error(Code::DeadlineExceeded);
    server.drain();
    drop(raw);
    assert_eq!(server.ending(), Ending::Drained);
}

#[test]
fn a_hang_beyond_the_last_replacement_ends_the_server_as_a_fault_when_the_others_are_done() {
    let set = ["threads.executors=2", "executor.replacements_max=1", "executor.slots=1", HANG_MS];
    let server = Server::start(&set);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    raw.round(&Ask::word(faulty, FOREVER)).expect_error(Code::ExecutorFailed);
    assert_eq!(raw.round(&Ask::word(faulty, 7)).expect_result().1, 7.0f32.to_le_bytes());
    let hung = raw.ask(&Ask::word(faulty, FOREVER));
    let events = raw.recv_all();
    assert!(events.iter().any(|event| matches!(event, Event::Goaway { code: Code::Draining, .. })), "{events:?}");
    let end = events.into_iter().find(|event| event.ends() == Some(hung)).expect("it was answered");
    end.expect_error(Code::ExecutorFailed);
    match server.ending() {
        Ending::Fault(what) => assert!(what.contains("hangs"), "{what}"),
        other => panic!("expected a fault, got {other:?}"),
    }
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
        // Where the model has no core to run on they ask beyond their credit, and would be sent away for that.
        "abuse.points=0",
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
