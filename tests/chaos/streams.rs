//! Streams that are cut, flipped, cut into other pieces, throttled and mixed up on the way (F04, F07, F15, F36, F80, F91).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry::vocab::{Code, DType, Executed};
use ferry::wire::Kind;

use crate::caller::{Ledger, Manner, call_through, log_of, models, rounds};
use crate::common::process::Child;
use crate::common::{Ask, Event, Numbers, Raw, bare_frame, describe_frame, hello_frame, metric, wait_until};
use crate::history::{Entry, Rules};
use crate::proxy::{Act, Direction, Mix, Place, Proxy, Then};

fn is_quiet(page: &str, connections: f64) -> bool {
    metric(page, "ferry_connections_opened_total", &[]) - metric(page, "ferry_connections_closed_total", &[])
        == connections
        && metric(page, "ferry_requests_in_flight", &[]) == 0.0
}

#[test]
fn a_request_cut_at_any_byte_by_an_end_or_a_reset_is_never_executed_and_leaves_no_byte() {
    let child = Child::start_in(models(), &[]);
    let mut bystander = child.connect();
    let echo = bystander.handle("echo");
    let witness = bystander.handle("witness");
    let ledger = Ledger::new();
    let greeting = hello_frame().len() as u64;
    // A short one, which the shared read buffer holds, and a long one, which gets a buffer of its own.
    let long = Ask::new(echo, DType::F32, &[16, 1024], &[7; 64 << 10]).frame(1);
    let cuts = rounds(1000, 10_000);
    let short = ledger.call(0).ask(witness).frame(1);
    ledger.note(Entry::Fail {
        id: 1,
        at_us: 0,
        code: "never sent whole".into(),
        executed: crate::history::Executed::Never,
    });
    let lens = [short.len() as u64, long.len() as u64];
    let cut_at =
        move |connection: u64| greeting + Numbers(connection).below(lens[usize::from(connection.is_multiple_of(8))]);
    let proxy = Proxy::start(child.data, move |at: Place| {
        let cut = cut_at(at.connection);
        let then = match (at.direction, at.connection % 3) {
            (Direction::ToClient, _) => return Act::PASS,
            _ if at.offset < cut => Then::Forward((cut - at.offset) as usize),
            (_, 0) => Then::HalfClose,
            (_, 1) => Then::Cut,
            _ => Then::Reset,
        };
        Act::of(then)
    });
    for connection in 0..cuts {
        let mut raw = Raw::connect(proxy.addr);
        raw.send(&hello_frame());
        // The proxy may have closed already: what is then not written would not have arrived either.
        let _ = std::io::Write::write_all(&mut raw.stream, if connection % 8 == 0 { &long } else { &short });
        let events = raw.recv_all();
        assert!(events.iter().all(|event| matches!(event, Event::HelloAck(_))), "connection {connection}: {events:?}");
    }
    wait_until("only the bystander is left", || is_quiet(&child.metrics(), 1.0));
    let page = child.metrics();
    assert_eq!(metric(&page, "ferry_requests_accepted_total", &[]), 0.0);
    assert_eq!(metric(&page, "ferry_live_bytes", &["receiving"]), 0.0);
    assert_eq!(metric(&page, "ferry_live_bytes", &["unsent"]), 0.0);
    let done = proxy.done();
    let each = [&done.half_closes, &done.cuts, &done.resets].map(|count| count.load(Ordering::Relaxed));
    assert!(each.iter().all(|times| *times >= cuts / 3), "every kind of end was met: {each:?} of {cuts}");
    ledger.check(&[log_of(child.models())], &Rules::default());
    bystander.ping();
}

#[test]
fn a_stream_in_other_pieces_both_ways_gets_the_same_answers() {
    let child = Child::start_in(models(), &[]);
    let mut probe = child.connect();
    let (echo, witness) = (probe.handle("echo"), probe.handle("witness"));
    let mut numbers = Numbers(7);
    let mut stream = hello_frame();
    const IDS: u64 = 120;
    for id in 1..=IDS {
        stream.extend(match numbers.below(6) {
            0 => bare_frame(Kind::Ping, id),
            1 => describe_frame(id, "witness", ""),
            2 => describe_frame(id, "nobody", ""),
            3 => Ask::floats(echo, &vec![numbers.below(1000) as f32; 1 + numbers.below(900) as usize]).frame(id),
            // Wrong on purpose: refusals have to be equal as well.
            4 => Ask::floats(witness, &[1.0]).frame(id),
            _ => crate::caller::Call::new(numbers.next() | 1, 0).ask(witness).frame(id),
        });
    }
    // What tells about batches differs from run to run and is left out.
    let answers = |addr| {
        let mut raw = Raw::connect(addr);
        raw.send(&stream);
        assert!(matches!(raw.recv(), Event::HelloAck(_)));
        let mut answers: Vec<(u64, String)> = (0..IDS)
            .map(|_| match raw.recv() {
                Event::Result { id, result, payload } => (id, format!("{:?} {payload:?}", result.outputs)),
                Event::Error { id, refusal } => (id, refusal.to_string()),
                Event::Description { id, json, .. } => (id, json.to_string()),
                Event::Pong(id) => (id, "pong".into()),
                other => panic!("{other:?}"),
            })
            .collect();
        answers.sort();
        answers
    };
    let whole = answers(child.data);
    assert_eq!(whole.iter().map(|(id, _)| *id).collect::<Vec<_>>(), (1..=IDS).collect::<Vec<_>>());
    let bytewise = Proxy::start(child.data, |_| Act::of(Then::Forward(1)));
    assert_eq!(answers(bytewise.addr), whole, "byte by byte");
    let len = stream.len();
    let merged = Proxy::start(child.data, move |at| match at.direction {
        Direction::ToServer => Act::of(Then::Gather(len)),
        Direction::ToClient => Act::of(Then::Forward(64 << 10)).after(Duration::from_millis(1)),
    });
    assert_eq!(answers(merged.addr), whole, "all at once");
    for seed in 0..rounds(20, 500) {
        let mix = Mix { seed, piece: 1 + Numbers(seed).below(3000) as usize, ..Mix::NONE };
        let random = Proxy::start(child.data, move |at| mix.act(at));
        assert_eq!(answers(random.addr), whole, "seed {seed}");
    }
}

#[test]
fn partial_writes_and_short_reads_both_ways_deliver_the_same_bytes() {
    let child = Child::start_in(models(), &["frontend.stall_timeout_ms=60000", "frontend.frame_timeout_ms=60000"]);
    for seed in 0..rounds(1, 40) {
        // Sockets of a few KiB: each side is left with most of an answer whenever it writes one.
        let mix = Mix { seed, piece: 700, ..Mix::NONE };
        let proxy = Proxy::narrow(child.data, 4096, move |at| mix.act(at));
        let mut raw = Raw::open(proxy.addr);
        let echo = raw.handle("echo");
        let mut numbers = Numbers(seed);
        let asks: Vec<Ask> = (0..6)
            .map(|_| {
                let len = 1 + numbers.below(512) as u32;
                let bytes: Vec<u8> = (0..16 * len * 4).map(|_| numbers.next() as u8 & 0x3f).collect();
                Ask::new(echo, DType::F32, &[16, len], &bytes)
            })
            .collect();
        let frames: Vec<u8> = asks.iter().flat_map(|ask| ask.frame(raw.take_id())).collect();
        let mut stream = raw.stream.try_clone().expect("a second handle");
        let writing = std::thread::spawn(move || std::io::Write::write_all(&mut stream, &frames).expect("is read"));
        let first = 2;
        for _ in &asks {
            match raw.recv() {
                Event::Result { id, payload, .. } => {
                    assert!(payload == asks[(id - first) as usize].payload, "seed {seed}: request {id}");
                }
                other => panic!("seed {seed}: {other:?}"),
            }
        }
        writing.join().expect("all was written");
        raw.ping();
    }
    wait_until("nothing is held any more", || {
        let page = child.metrics();
        is_quiet(&page, 0.0) && metric(&page, "ferry_live_bytes", &["unsent"]) == 0.0
    });
}

#[test]
fn ten_thousand_flipped_bits_are_found_and_no_damaged_request_reaches_an_executor() {
    const EVERY: u64 = 100;
    // A damaged request costs its sender points, who is not to blame here.
    let child = Child::start_in(models(), &["abuse.points=0"]);
    let ledger = Ledger::new();
    let witness = child.connect().handle("witness");
    let requests = rounds(10_100, 1_010_000);
    let head = hello_frame().len() as u64;
    let len = crate::caller::Call::new(1, 0).ask(witness).frame(1).len() as u64;
    // One bit of the payload of all requests but one in a hundred: its place goes through all of them.
    let place_of = move |request: u64| head + request * len + (len - 16) + (request / 8) % 16;
    let proxy = Proxy::start(child.data, move |at| {
        if at.direction == Direction::ToClient || at.offset < head {
            return Act::PASS;
        }
        let request = (at.offset - head) / len;
        let flip_at = place_of(request);
        let end = head + (request + 1) * len;
        match request % EVERY {
            0 => Act::of(Then::Forward((end - at.offset) as usize)),
            _ if at.offset < flip_at => Act::of(Then::Forward((flip_at - at.offset) as usize)),
            _ if at.offset == flip_at => {
                Act { flip: Some((request % 8) as u8), ..Act::of(Then::Forward((end - at.offset) as usize)) }
            }
            _ => Act::of(Then::Forward((end - at.offset) as usize)),
        }
    });
    let mut raw = Raw::connect(proxy.addr);
    raw.send(&hello_frame());
    assert!(matches!(raw.recv(), Event::HelloAck(_)));
    for burst in 0..requests / EVERY {
        let calls: Vec<_> = (0..EVERY).map(|_| ledger.call(0)).collect();
        raw.send(&calls.iter().flat_map(|call| call.ask(witness).frame(call.id)).collect::<Vec<u8>>());
        for _ in &calls {
            let event = raw.recv();
            let id = event.ends().expect("an end");
            ledger.told_raw(id, &event);
            if (id - 1).is_multiple_of(EVERY) {
                event.expect_result();
            } else {
                assert_eq!(event.expect_error(Code::ChecksumMismatch).executed, Executed::Never, "burst {burst}");
            }
        }
    }
    let flips = proxy.done().flips.load(Ordering::Relaxed);
    assert_eq!(flips, requests - requests / EVERY);
    let summary = ledger.check(&[log_of(child.models())], &Rules::default());
    assert_eq!((summary.ok, summary.executed), (requests / EVERY, requests / EVERY));
}

#[test]
fn what_waits_when_its_client_is_reset_never_reaches_an_executor() {
    let child = Child::start_in(models(), &[]);
    let ledger = Ledger::new();
    let mut blocker = child.connect();
    let witness = blocker.handle("witness");
    let (head, len) = (hello_frame().len() as u64, crate::caller::Call::new(1, 0).ask(witness).frame(1).len() as u64);
    // Behind the hello, somewhere in its six requests.
    let proxy = Proxy::start(child.data, move |at| {
        let cut = head + Numbers(at.connection).below(6 * len);
        match at.direction {
            Direction::ToServer if at.offset < cut => Act::of(Then::Forward((cut - at.offset) as usize)),
            Direction::ToServer => Act::of(Then::Reset).after(Duration::from_millis(1)),
            Direction::ToClient => Act::PASS,
        }
    });
    let mut met = 0;
    for round in 0.. {
        // A slow machine needs more of them until enough were met while the executor was busy.
        if round >= rounds(3, 60) && (met > 3 || round >= 100) {
            break;
        }
        let running = ledger.call(1_500_000);
        let batches = child.metric("ferry_batches_total", &["model=\"witness\""]);
        let id = blocker.ask(&running.ask(witness));
        wait_until("the executor is busy", || child.metric("ferry_batches_total", &["model=\"witness\""]) > batches);
        let is_busy = || child.metric("ferry_requests_in_flight", &[]) >= 1.0;
        while is_busy() && met < 1000 {
            let from = ledger.now_us();
            let mut raw = Raw::connect(proxy.addr);
            let calls: Vec<_> = (0..6).map(|_| ledger.call(0)).collect();
            let frames = calls.iter().zip(1..).flat_map(|(call, id)| call.ask(witness).frame(id));
            raw.send(&[hello_frame(), frames.collect()].concat());
            let told: Vec<u64> = raw.recv_all().iter().filter_map(Event::ends).collect();
            ledger.window(from, "reset");
            wait_until("what it left is gone", || child.metric("ferry_requests_in_flight", &[]) <= 1.0);
            if !is_busy() {
                // The blocker ended meanwhile, so that some may have run: nobody knows.
                for call in calls {
                    ledger.note(Entry::Info { id: call.id, at_us: ledger.now_us(), why: "reset".into() });
                }
                break;
            }
            assert!(told.is_empty(), "nothing runs beside the blocker");
            for call in calls {
                let (at_us, executed) = (ledger.now_us(), crate::history::Executed::Never);
                ledger.note(Entry::Fail { id: call.id, at_us, code: "reset while it waited".into(), executed });
            }
            met += 1;
        }
        let event = blocker.recv();
        assert_eq!(event.ends(), Some(id));
        ledger.told_raw(running.id, &event);
    }
    assert!(met > 3, "{met} resets while an executor was busy");
    wait_until("nothing is in flight", || is_quiet(&child.metrics(), 1.0));
    ledger.check(&[log_of(child.models())], &Rules::default());
    let page = child.metrics();
    let cancelled = metric(&page, "ferry_requests_finished_total", &["code=\"cancelled\""]);
    assert!(cancelled > 3.0, "{cancelled} were counted as cancelled, their peer gone");
}

/// One life behind a proxy that does all it can; the history must be sound. Returns what was answered and unknown.
fn mixed_life(seed: u64, time: Duration) -> (u64, u64) {
    let mut child = Child::start_in(models(), &["frontend.hello_timeout_ms=1000", "frontend.frame_timeout_ms=1000"]);
    let ledger = Ledger::new();
    // Each seed turns some faults off, so that rare ones are not always hidden behind frequent ones.
    let mut numbers = Numbers(seed);
    let mut share = |most| if numbers.below(3) == 0 { 0 } else { 1 + numbers.below(most) };
    let mix = Mix {
        seed,
        block: 16 << 10,
        piece: 1 + Numbers(seed ^ 1).below(8000) as usize,
        delay: share(300),
        flip: share(200),
        stall: share(20),
        cut: share(100),
        half_close: share(50),
        reset: share(100),
    };
    let proxy = Proxy::start(child.data, move |at| mix.act(at));
    let (stop, from) = (AtomicBool::new(false), ledger.now_us());
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let manner = Manner {
                depth: 24,
                micros: 2000,
                // So that a stall ends by itself.
                allowed: Some(Duration::from_millis(400)),
                seed: seed << 8 | caller,
            };
            let (ledger, stop, addr) = (&ledger, &stop, proxy.addr);
            scope.spawn(move || call_through(addr, ledger, manner, stop));
        }
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
    });
    // Whoever asked by another road sees nothing of all that.
    child.connect().ping();
    drop(proxy);
    ledger.window(from, "the proxy's faults");
    wait_until("nothing is left", || {
        let page = child.metrics();
        is_quiet(&page, 0.0)
            && metric(&page, "ferry_live_bytes", &["receiving"]) + metric(&page, "ferry_live_bytes", &["unsent"]) == 0.0
    });
    let page = child.metrics();
    let accepted = metric(&page, "ferry_requests_accepted_total", &[]);
    assert_eq!(metric(&page, "ferry_requests_finished_total", &[]), accepted, "seed {seed}: conservation");
    child.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(child.status(), Some(0), "seed {seed}");
    let summary = ledger.check(&[log_of(child.models())], &Rules::default());
    println!(
        "seed {seed}: {} calls, {} ok, {:?}, {} unknown; {:?}",
        summary.calls, summary.ok, summary.failed, summary.unknown, mix
    );
    (summary.ok, summary.unknown)
}

#[test]
fn a_mix_of_faults_on_the_way_loses_nothing_and_every_code_is_true() {
    let only = std::env::var("CHAOS_SEED").ok().map(|seed| seed.parse::<u64>().expect("CHAOS_SEED is a number"));
    let seeds = only.map_or(0..rounds(4, 30), |seed| seed..seed + 1);
    let (mut ok, mut unknown) = (0, 0);
    for seed in seeds {
        println!("repeat with: CHAOS_SEED={seed}");
        let life = mixed_life(seed, Duration::from_secs(rounds(1, 60)));
        ok += life.0;
        unknown += life.1;
    }
    assert!(only.is_some() || (ok > 500 && unknown > 10), "{ok} answered, {unknown} unknown: both happened");
}
