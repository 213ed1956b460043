//! Planted defects, to show that what looks for them would find them (C1 to C15). `tests/faults.toml` says where the others are.

use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

use ferry::client::request::to_f64;
use ferry::clock;
use ferry::vocab::DType;
use ferry::wire::decoder::Step;
use ferry::wire::{Decoder, Kind, Limits};
use nix::sys::signal::Signal;

use crate::caller::{Call, Ledger, log_of, models, rounds};
use crate::common::process::Child;
use crate::common::{Ask, Event, Raw, bare_frame, hello, wait_until};
use crate::history::{Rules, Violation, check};
use crate::proxy::{Place, Proxy};

/// Calls over one raw connection through a proxy that changes answers, all of which have come when this returns; the violations.
fn with_answers_changed(
    calls: u64,
    change: impl Fn(Place, Kind, &[u8], &mut Vec<Vec<u8>>) + Send + Sync + 'static,
) -> Vec<Violation> {
    const BURST: u64 = 200;
    let child = Child::start_in(models(), &[]);
    let ledger = Ledger::new();
    let proxy = Proxy::of_answers(child.data, change);
    let mut raw = Raw::open(proxy.addr);
    let witness = raw.handle("witness");
    for burst in 1..=calls / BURST {
        let sent = (burst * BURST) as f64;
        // Ids on the wire are one ahead, for the question about the model.
        let calls: Vec<Call> = (0..BURST).map(|_| ledger.call(0)).collect();
        raw.send(&calls.iter().flat_map(|call| call.ask(witness).frame(call.id + 1)).collect::<Vec<u8>>());
        wait_until("all are accepted", || {
            child.metric("ferry_requests_accepted_total", &["model=\"witness\""]) == sent
        });
        wait_until("all are answered", || child.metric("ferry_requests_in_flight", &[]) == 0.0);
        raw.send(&bare_frame(Kind::Ping, 0));
        // What came before the pong is all that comes.
        loop {
            match raw.recv() {
                Event::Pong(_) => break,
                event => ledger.told_raw(event.ends().expect("an end") - 1, &event),
            }
        }
    }
    match check(&ledger.history(&[log_of(child.models())]), &Rules::default()) {
        Ok(_) => Vec::new(),
        Err(wrong) => wrong.into_iter().collect(),
    }
}

/// The planted answer.
fn is_chosen(at: Place, kind: Kind) -> bool {
    kind == Kind::Result && at.offset == 777
}

#[test]
fn without_a_defect_nothing_is_found() {
    assert_eq!(with_answers_changed(2000, |_, _, frame, out| out.push(frame.to_vec())), []);
}

#[test]
fn c2_one_dropped_reply_is_found() {
    // One in 1e5 in the long run, one in 1e4 as a test.
    let wrong = with_answers_changed(rounds(10_000, 100_000), |at, kind, frame, out| {
        if !is_chosen(at, kind) {
            out.push(frame.to_vec());
        }
    });
    assert!(matches!(wrong[..], [Violation::Lost { .. }]), "{wrong:?}");
}

#[test]
fn c3_one_doubled_reply_is_found() {
    let wrong = with_answers_changed(2000, |at, kind, frame, out| {
        out.push(frame.to_vec());
        if is_chosen(at, kind) {
            out.push(frame.to_vec());
        }
    });
    assert!(matches!(wrong[..], [Violation::EndedTwice { .. }]), "{wrong:?}");
}

/// The frame with another request's id, its checksums right.
fn readdressed(frame: &[u8], id: u64) -> Vec<u8> {
    let decoder = Decoder::new(Limits { metadata_bytes: 4096, payload_bytes: Limits::PAYLOAD_CEILING });
    let Ok(Step::Frame(parts)) = decoder.next(frame) else { panic!("a whole frame") };
    let mut header = parts.header;
    header.request_id = id;
    [
        &header.encode(parts.metadata(frame))[..],
        &frame[frame.len() - parts.payload(frame).len() - parts.metadata(frame).len()..],
    ]
    .concat()
}

fn id_of(frame: &[u8]) -> u64 {
    u64::from_le_bytes(frame[8..16].try_into().expect("a header"))
}

#[test]
fn c4_two_swapped_rows_are_found() {
    let held: Mutex<Option<Vec<u8>>> = Mutex::new(None);
    let wrong = with_answers_changed(2000, move |at, kind, frame, out| {
        let mut held = held.lock().expect("not poisoned");
        match held.take() {
            None if is_chosen(at, kind) => *held = Some(frame.to_vec()),
            Some(first) if kind == Kind::Result => {
                out.extend([readdressed(&first, id_of(frame)), readdressed(frame, id_of(&first))]);
            }
            first => {
                *held = first;
                out.push(frame.to_vec());
            }
        }
    });
    assert!(matches!(wrong[..], [Violation::WrongResult { .. }, Violation::WrongResult { .. }]), "{wrong:?}");
}

#[test]
fn c5_a_checksum_that_nobody_looks_at_is_found() {
    // What a server that skips it would run: the damaged row, under a checksum that is made to fit.
    let child = Child::start_in(models(), &[]);
    let ledger = Ledger::new();
    let mut raw = child.connect();
    let witness = raw.handle("witness");
    for damaged_bit in [0, 100] {
        let call = ledger.call(0);
        let mut ask = call.ask(witness);
        ask.payload[damaged_bit / 8] ^= 1 << (damaged_bit % 8);
        let event = raw.round(&ask);
        ledger.told_raw(call.id, &event);
    }
    let wrong = check(&ledger.history(&[log_of(child.models())]), &Rules::default()).expect_err("it was planted");
    // A number that is another's was executed, and neither got its own answer.
    assert!(wrong.iter().filter(|wrong| matches!(wrong, Violation::WrongResult { .. })).count() == 2, "{wrong:?}");
    assert!(wrong.iter().any(|wrong| matches!(wrong, Violation::AnsweredUnexecuted { id: 1 })), "{wrong:?}");
}

#[test]
fn c8_a_refused_call_that_is_executed_all_the_same_is_found() {
    let child = Child::start_in(models(), &[]);
    let ledger = Ledger::new();
    let mut raw = child.connect();
    let witness = raw.handle("witness");
    // A refusal is told; behind its back the same row is run.
    let call = ledger.call(0);
    let mut damaged = call.ask(witness).frame(raw.take_id());
    *damaged.last_mut().expect("a payload") ^= 1;
    raw.send(&damaged);
    let event = raw.recv();
    ledger.told_raw(call.id, &event);
    assert!(check(&ledger.history(&[log_of(child.models())]), &Rules::default()).is_ok());
    raw.round(&call.ask(witness)).expect_result();
    let wrong = check(&ledger.history(&[log_of(child.models())]), &Rules::default()).expect_err("it was planted");
    assert!(wrong.iter().any(|wrong| matches!(wrong, Violation::ExecutedThoughRefused { id: 1, .. })), "{wrong:?}");
}

#[test]
fn c12_half_floats_read_as_the_other_kind_are_found() {
    // The golden vectors of both, and each read as the other.
    let values = [1.0f32, -2.5, 0.15625, 1024.0, 6.1e-5];
    let halves: Vec<u8> = values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect();
    let brains: Vec<u8> = values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
    let is_right = |dtype, bytes: &[u8]| {
        to_f64(dtype, bytes).iter().zip(values).all(|(got, want)| (got / f64::from(want) - 1.0).abs() < 0.01)
    };
    assert!(is_right(DType::F16, &halves) && is_right(DType::BF16, &brains));
    assert!(!is_right(DType::BF16, &halves) && !is_right(DType::F16, &brains));
    let wrong = |dtype, bytes: &[u8]| {
        to_f64(dtype, bytes).iter().zip(values).filter(|(got, want)| **got != f64::from(*want)).count()
    };
    assert!(wrong(DType::BF16, &halves) == values.len() && wrong(DType::F16, &brains) == values.len());
}

/// Whether the process ends within a time.
fn ends_within(child: &mut Child, time: Duration) -> bool {
    let start = clock::now();
    while clock::now().since(start) < time {
        if child.has_ended() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

#[test]
fn c13_a_server_that_refuses_to_drain_is_found() {
    let mut child = Child::start_in(models(), &[]);
    child.signal(Signal::SIGTERM);
    assert!(ends_within(&mut child, Duration::from_secs(60)), "an idle one drains");
    // One that is stopped does not, and the same look says so.
    let mut stopped = Child::start_in(models(), &[]);
    stopped.signal(Signal::SIGSTOP);
    stopped.signal(Signal::SIGTERM);
    assert!(!ends_within(&mut stopped, Duration::from_millis(500)));
}

/// Secrets that a text shows, as they are or in hex.
fn shown<'s>(text: &str, secrets: &[&'s str]) -> Vec<&'s str> {
    let hex = |secret: &str| secret.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    let bytes = |secret: &str| format!("{:?}", secret.as_bytes()).trim_matches(['[', ']']).to_owned();
    let is_shown = |secret: &&&str| {
        [(**secret).to_owned(), hex(secret), bytes(secret)]
            .iter()
            .any(|form| text.to_lowercase().contains(&form.to_lowercase()))
    };
    secrets.iter().filter(is_shown).copied().collect()
}

#[test]
fn c15_a_token_in_a_log_line_is_found_and_none_is_there() {
    const TOKEN: &str = "7Qm2-not-for-anybody-else-zX9";
    for line in [
        format!("2026-01-01 DEBUG hello token={TOKEN}"),
        format!("hello {:?}", TOKEN.as_bytes()),
        format!("hello {}", TOKEN.bytes().map(|byte| format!("{byte:02X}")).collect::<String>()),
    ] {
        assert_eq!(shown(&line, &[TOKEN]), [TOKEN], "{line}");
    }
    let mut child = Child::start_in(models(), &["log.level=\"trace\""]);
    for break_it in [false, true] {
        let mut frame = Vec::new();
        let hello = ferry::wire::message::Hello { token: TOKEN.into(), ..hello() };
        let head = ferry::wire::encoder::Head::control(Kind::Hello);
        ferry::wire::encoder::append_frame(&mut frame, head, &hello, &[]).expect("small");
        if break_it {
            // In the middle of the token: what is wrong must not be quoted either.
            let at = frame.len() - TOKEN.len() / 2;
            frame[at] ^= 1;
        }
        let mut raw = Raw::connect(child.data);
        raw.stream.write_all(&frame).expect("the server reads");
        let _ = raw.stream.shutdown(std::net::Shutdown::Write);
        let events = raw.recv_all();
        assert!(!events.is_empty(), "the server said something to it");
        assert_eq!(shown(&format!("{events:?}"), &[TOKEN]), [] as [&str; 0]);
    }
    let page = child.metrics();
    assert_eq!(shown(&page, &[TOKEN]), [] as [&str; 0]);
    // Loud enough to have said it.
    let mut raw = child.connect();
    let echo = raw.handle("echo");
    raw.round(&Ask::floats(echo, &[1.0])).expect_result();
    child.signal(Signal::SIGTERM);
    child.status();
    let log = child.log();
    assert!(!log.is_empty());
    assert_eq!(shown(&log, &[TOKEN]), [] as [&str; 0], "{log}");
}
