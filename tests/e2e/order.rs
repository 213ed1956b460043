//! Deadlines, cancels and vanished clients (F31 to F36). The order of events is compared, not their times.

use std::collections::HashMap;
use std::time::Duration;

use ferry::vocab::{Code, Executed, Stage};
use ferry::wire::Kind;

use crate::common::{Ask, Event, Numbers, Server, bare_frame, wait_until};

const MODEL: &str = "model=\"faulty\"";

/// Until a batch of `faulty` runs: its row has been sealed.
fn wait_for_batches(server: &Server, count: f64) {
    wait_until("the batch was sealed", || server.metric("ferry_batches_total", &[MODEL]) >= count);
}

#[test]
fn a_deadline_that_is_over_on_arrival_is_said_so_and_the_request_is_not_executed() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    // The executor is busy, so that 1 µs is over wherever the request is looked at first.
    let blocker = raw.ask(&Ask::word(faulty, 200));
    wait_for_batches(&server, 1.0);
    let late = raw.ask(&Ask::word(faulty, 0).deadline_us(1));
    let first = raw.recv();
    assert_eq!(first.ends(), Some(late), "it does not wait for the batch before it");
    let refusal = first.expect_error(Code::DeadlineExceeded);
    assert!(matches!(refusal.stage, Stage::Arrival | Stage::Queue), "{refusal:?}");
    assert_eq!(refusal.executed, Executed::Never);
    assert_eq!(raw.recv().ends(), Some(blocker));
    assert_eq!(server.metric("ferry_batches_total", &[MODEL]), 1.0);
    server.wait_until_at_rest();
}

#[test]
fn a_deadline_that_ends_behind_a_stuck_model_is_answered_while_it_is_stuck() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    let running = raw.ask(&Ask::word(faulty, 2000).deadline_us(20_000));
    wait_for_batches(&server, 1.0);
    let waiting = raw.ask(&Ask::word(faulty, 0).deadline_us(10_000));
    let patient = raw.ask(&Ask::word(faulty, 0));
    let mut stages = HashMap::new();
    for _ in 0..2 {
        let event = raw.recv();
        let id = event.ends().expect("an end");
        let refusal = event.expect_error(Code::DeadlineExceeded);
        stages.insert(id, (refusal.stage, refusal.executed));
    }
    assert_eq!(stages[&running], (Stage::Executing, Executed::Maybe));
    assert_eq!(stages[&waiting], (Stage::Queue, Executed::Never));
    // Both were told before the sleep was over: its batch is the only one, and it has not come back.
    assert_eq!(server.metric("ferry_executor_busy_seconds_total", &[]), 0.0, "the model still sleeps");
    let last = raw.recv();
    assert_eq!(last.ends(), Some(patient));
    last.expect_result();
    server.wait_until_at_rest();
    assert_eq!(server.metric("ferry_late_answers_total", &[]), 1.0, "the late result was dropped, and counted");
}

#[test]
fn no_deadline_and_the_farthest_one_are_both_no_deadline() {
    let server = Server::shared();
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    for micros in [0, u64::MAX, u64::MAX / 1000, 1 << 63, 25 * 3600 * 1_000_000, 60_000_000] {
        let (_, payload) = raw.round(&Ask::floats(echo, &[1.0]).deadline_us(micros)).expect_result();
        assert_eq!(payload, 1.0f32.to_le_bytes(), "{micros} µs");
    }
}

#[test]
fn cancels_and_completions_race_ten_thousand_times_and_each_request_ends_once() {
    const REQUESTS: u64 = 10_000;
    let server = Server::start(&["threads.shards=2"]);
    let workers: Vec<_> = (0..4)
        .map(|worker| {
            let mut raw = server.connect();
            std::thread::spawn(move || {
                let (echo, sleep) = (raw.handle("echo"), raw.handle("sleep"));
                let mut numbers = Numbers(worker);
                let mut ends: HashMap<u64, Code> = HashMap::new();
                let mut open = 0u64;
                let mut take = |raw: &mut crate::common::Raw, open: &mut u64| {
                    let event = raw.recv();
                    let id = event.ends().expect("only ends are expected here");
                    let code = match event {
                        Event::Error { refusal, .. } => refusal.code,
                        _ => Code::Ok,
                    };
                    assert!(ends.insert(id, code).is_none(), "request {id} ended twice");
                    *open -= 1;
                };
                for _ in 0..REQUESTS / 4 {
                    let ask = match numbers.below(4) {
                        0 => Ask::word(sleep, numbers.below(300) as u32),
                        _ => Ask::floats(echo, &[numbers.below(99) as f32]),
                    };
                    let id = raw.take_id();
                    let mut bytes = ask.frame(id);
                    // At once, after a while, twice, or for a request long gone: all that may race.
                    match numbers.below(5) {
                        0 => bytes.extend(bare_frame(Kind::Cancel, id)),
                        1 => bytes.extend(bare_frame(Kind::Cancel, id.saturating_sub(numbers.below(20)))),
                        2 => bytes.extend([bare_frame(Kind::Cancel, id), bare_frame(Kind::Cancel, id)].concat()),
                        3 => bytes.extend(bare_frame(Kind::Cancel, id + 1_000_000)),
                        _ => {}
                    }
                    raw.send(&bytes);
                    open += 1;
                    while open > numbers.below(64) {
                        take(&mut raw, &mut open);
                    }
                }
                while open > 0 {
                    take(&mut raw, &mut open);
                }
                raw.ping(); // nothing else was on its way
                assert!(ends.values().all(|code| matches!(code, Code::Ok | Code::Cancelled)), "{ends:?}");
                ends.values().filter(|code| **code == Code::Cancelled).count() as u64
            })
        })
        .collect();
    let cancelled: u64 = workers.into_iter().map(|worker| worker.join().expect("no assertion failed")).sum();
    assert!(cancelled > REQUESTS / 20, "the race was run by both sides: {cancelled} of {REQUESTS} were cancelled");
    server.wait_until_at_rest();
    assert_eq!(server.telemetry.accepted_total(), REQUESTS);
    let finished = |code| server.metric("ferry_requests_finished_total", &[code]);
    assert_eq!(finished("code=\"cancelled\"") as u64, cancelled);
    assert_eq!(finished("code=\"ok\"") as u64, REQUESTS - cancelled);
}

#[test]
fn a_client_that_vanishes_takes_its_waiting_requests_with_it_unexecuted() {
    let server = Server::start(&[]);
    let mut survivor = server.connect();
    let mut gone = server.connect();
    let faulty = gone.handle("faulty");
    gone.ask(&Ask::word(faulty, 300));
    wait_for_batches(&server, 1.0);
    // Fewer than fill a batch: those would be packed into the executor's spare slot already.
    for _ in 0..6 {
        gone.ask(&Ask::word(faulty, 0));
    }
    wait_until("all are accepted", || server.telemetry.in_flight() == 7);
    let kept = survivor.ask(&Ask::word(faulty, 4));
    wait_until("the survivor's is accepted too", || server.telemetry.in_flight() == 8);
    drop(gone);
    wait_until("the vanished client's are counted as cancelled", || {
        server.metric("ferry_requests_finished_total", &["code=\"cancelled\""]) == 7.0
    });
    let event = survivor.recv();
    assert_eq!(event.ends(), Some(kept));
    let (result, _) = event.expect_result();
    assert_eq!(result.batch_rows, 1, "nothing of the vanished client came along");
    server.wait_until_at_rest();
    assert_eq!(server.metric("ferry_batches_total", &[MODEL]), 2.0, "the running batch and the survivor's");
    assert_eq!(server.metric("ferry_batch_rows_sum", &[MODEL]), 2.0);
}

#[test]
fn a_client_that_is_reset_counts_like_one_that_left() {
    let server = Server::start(&[]);
    let mut gone = server.connect();
    let faulty = gone.handle("faulty");
    for _ in 0..5 {
        gone.ask(&Ask::word(faulty, 50));
    }
    wait_until("all are accepted", || server.telemetry.in_flight() > 0 && server.telemetry.accepted_total() == 5);
    socket2::SockRef::from(&gone.stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
    drop(gone);
    server.wait_until_at_rest();
    server.connect().ping();
}

#[test]
fn a_cancelled_request_is_answered_at_once_and_its_mates_are_served() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    let running = raw.ask(&Ask::word(faulty, 500));
    wait_for_batches(&server, 1.0);
    let queued = raw.ask(&Ask::word(faulty, 5));
    let mate = raw.ask(&Ask::word(faulty, 6));
    for id in [running, queued] {
        raw.send(&bare_frame(Kind::Cancel, id));
        let event = raw.recv();
        assert_eq!(event.ends(), Some(id));
        event.expect_error(Code::Cancelled);
    }
    let event = raw.recv();
    assert_eq!(event.ends(), Some(mate));
    let (result, payload) = event.expect_result();
    assert_eq!((result.batch_rows, payload), (1, 6.0f32.to_le_bytes().to_vec()));
    server.wait_until_at_rest();
}
