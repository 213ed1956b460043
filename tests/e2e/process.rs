//! The real binary as its supervisor sees it: signals, limits, descriptors, memory, threads (F47, F70 to F84).

use std::collections::HashMap;
use std::io::Write;
use std::process::Output;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;

use ferry::vocab::{Code, DType, Executed, ModelHandle, Retry};
use ferry::wire::Kind;

use crate::common::process::{Child, Denied, run_denied, run_under};
use crate::common::{Ask, Event, Numbers, Raw, bare_frame, header, hello_frame, metric, models_directory, wait_until};

#[test]
fn a_sigterm_under_load_loses_nothing_and_ends_with_status_0() {
    for round in 0..10u64 {
        let mut child = Child::start(&["threads.shards=2"]);
        let mut probe = child.connect();
        let (echo, sleep) = (probe.handle("echo"), probe.handle("sleep"));
        drop(probe);
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let mut raw = child.connect();
                std::thread::spawn(move || {
                    let mut numbers = Numbers(round * 100 + client);
                    let (mut open, mut sent) = (0u64, 0u64);
                    let mut ended = Vec::new();
                    let mut last_accepted = None;
                    loop {
                        if last_accepted.is_none() && open < 32 {
                            let ask = match numbers.below(20) {
                                0 => Ask::word(sleep, 2000),
                                _ => Ask::floats(echo, &vec![1.0; 1 + numbers.below(200) as usize]),
                            };
                            sent += 1;
                            open += 1;
                            // After the goaway the server may be gone: what it did not accept need not arrive.
                            let _ = raw.stream.write_all(&ask.frame(sent));
                            continue;
                        }
                        match raw.recv() {
                            Event::Goaway { code, goaway } => {
                                assert_eq!(code, Code::Draining);
                                assert!(last_accepted.replace(goaway.last_accepted_id).is_none(), "one goaway");
                            }
                            Event::End => break,
                            event => {
                                open -= 1;
                                ended.push(event.ends().expect("an end"));
                                event.expect_result();
                            }
                        }
                    }
                    ended.sort_unstable();
                    let last_accepted = last_accepted.expect("a goaway came before the end");
                    assert!(last_accepted <= sent);
                    assert_eq!(ended, (1..=last_accepted).collect::<Vec<u64>>(), "accepted is answered, once");
                    ended.len()
                })
            })
            .collect();
        wait_until("load is on", || child.metric("ferry_requests_accepted_total", &[]) > 50.0 * (round + 1) as f64);
        child.signal(Signal::SIGTERM);
        let answered: usize = clients.into_iter().map(|client| client.join().expect("no assertion failed")).sum();
        assert!(answered > 50);
        assert_eq!(child.status(), Some(0));
    }
}

#[test]
fn a_second_sigterm_with_a_stuck_model_answers_everybody_and_ends() {
    let mut child = Child::start(&[]);
    let mut raw = child.connect();
    let faulty = raw.handle("faulty");
    let running = raw.ask(&Ask::word(faulty, 60_000));
    wait_until("the model is stuck", || child.metric("ferry_batches_total", &["model=\"faulty\""]) == 1.0);
    let mut ids = vec![running];
    ids.extend((0..20).map(|_| raw.ask(&Ask::word(faulty, 0))));
    wait_until("all are accepted", || child.metric("ferry_requests_in_flight", &[]) == 21.0);
    child.signal(Signal::SIGTERM);
    raw.recv().expect_goaway(Code::Draining);
    child.signal(Signal::SIGTERM);
    let mut ended: Vec<u64> = ids
        .iter()
        .map(|_| {
            let event = raw.recv();
            let id = event.ends().expect("an end");
            event.expect_error(Code::ExecutorFailed);
            id
        })
        .collect();
    ended.sort_unstable();
    assert_eq!(ended, ids);
    assert!(matches!(raw.recv(), Event::End));
    // `status` waits for less than the model sleeps.
    assert_eq!(child.status(), Some(1));
}

/// Goal: a drain ends by itself behind a stuck model, and before that who only waits hears that another replica may be asked.
/// Method: one batch that hangs, and three full ones behind it, of which its executor may have one.
#[test]
fn a_drain_that_takes_too_long_hands_back_what_waits_and_ends_by_itself() {
    const ROWS_MAX: usize = 8;
    for drain_queue in ["drain_queue_ms=0", "drain_queue_ms=30000"] {
        let mut child = Child::start(&["drain_timeout_ms=400", drain_queue]);
        let mut raw = child.connect();
        let faulty = raw.handle("faulty");
        let stuck = raw.ask(&Ask::word(faulty, 60_000));
        wait_until("the model is stuck", || child.metric("ferry_batches_total", &["model=\"faulty\""]) == 1.0);
        let behind: Vec<u64> = (0..3 * ROWS_MAX).map(|_| raw.ask(&Ask::word(faulty, 0))).collect();
        wait_until("all are accepted", || child.metric("ferry_requests_in_flight", &[]) == (1 + behind.len()) as f64);
        child.signal(Signal::SIGINT);
        raw.recv().expect_goaway(Code::Draining);
        let mut ended = Vec::new();
        let mut handed_back = 0;
        for _ in 0..=behind.len() {
            let event = raw.recv();
            ended.push(event.ends().expect("an end"));
            if ended.last() == Some(&stuck) {
                event.expect_error(Code::ExecutorFailed);
                continue;
            }
            match event {
                Event::Error { refusal, .. } if refusal.code == Code::Draining => {
                    assert_eq!((refusal.executed, refusal.retry), (Executed::Never, Retry::Elsewhere));
                    assert!(!ended.contains(&stuck), "before it ends");
                    handed_back += 1;
                }
                // Bound to the executor that hangs.
                event => drop(event.expect_error(Code::ExecutorFailed)),
            }
        }
        assert!(handed_back >= 2 * ROWS_MAX, "a batch may be bound: {handed_back} of {} came back", behind.len());
        ended.sort_unstable();
        assert!(ended.iter().copied().eq(stuck..=stuck + behind.len() as u64), "{ended:?}");
        assert!(matches!(raw.recv(), Event::End));
        assert_eq!(child.status(), Some(1));
    }
}

#[test]
fn a_server_that_was_stopped_answers_what_expired_meanwhile_as_expired() {
    // A frame may take less time than the stop does: peers do not pay for our pauses.
    let mut child = Child::start(&["frontend.frame_timeout_ms=1000"]);
    let mut raw = child.connect();
    let faulty = raw.handle("faulty");
    let running = raw.ask(&Ask::word(faulty, 100));
    wait_until("the model is busy", || child.metric("ferry_batches_total", &["model=\"faulty\""]) == 1.0);
    let waiting = raw.ask(&Ask::word(faulty, 0).deadline_us(300_000));
    let half = raw.take_id();
    let frame = Ask::word(faulty, 7).frame(half);
    raw.send(&frame[..20]);
    wait_until("both are accepted", || child.metric("ferry_requests_accepted_total", &[]) == 2.0);
    child.signal(Signal::SIGSTOP);
    raw.send(&frame[20..]);
    // Real time has to pass here: this is what a stop is.
    std::thread::sleep(Duration::from_secs(2));
    child.signal(Signal::SIGCONT);
    let mut ends = HashMap::new();
    for _ in 0..3 {
        let event = raw.recv();
        let id = event.ends().expect("an end");
        ends.insert(
            id,
            match event {
                Event::Error { refusal, .. } => refusal.code,
                _ => Code::Ok,
            },
        );
    }
    assert_eq!(ends, HashMap::from([(running, Code::Ok), (waiting, Code::DeadlineExceeded), (half, Code::Ok)]));
    child.signal(Signal::SIGTERM);
    drop(raw);
    assert_eq!(child.status(), Some(0));
}

/// What was said on standard error, which must be one line.
#[track_caller]
fn only_line(output: &Output) -> &str {
    let text = str::from_utf8(&output.stderr).expect("text");
    let lines: Vec<&str> = text.lines().collect();
    let [line] = lines[..] else { panic!("expected one line, got {lines:?}") };
    line
}

#[test]
fn a_machine_that_does_not_allow_it_is_told_apart_with_status_78_and_one_line() {
    let models = models_directory();
    for (limit, sets, what) in [
        ("ulimit -l 64", &[][..], "locked memory (RLIMIT_MEMLOCK)"),
        ("ulimit -n 300", &["frontend.connections_max=1000"], "open files (RLIMIT_NOFILE)"),
    ] {
        let output = run_under(limit, models.path(), sets);
        assert_eq!(output.status.code(), Some(78), "{limit}: {output:?}");
        let line = only_line(&output);
        assert!(line.starts_with(what) && line.contains("needed") && line.contains(';'), "{line}");
        assert!(output.stdout.is_empty(), "it was never ready");
    }
}

#[test]
fn a_security_profile_without_io_uring_is_told_with_status_78_and_one_true_line() {
    let models = models_directory();
    for (call, error, found) in [
        (libc::SYS_io_uring_setup, Errno::EPERM, "refused by a security profile (EPERM"),
        (libc::SYS_io_uring_setup, Errno::ENOSYS, "or a security profile hides it (ENOSYS)"),
        (libc::SYS_io_uring_enter, Errno::EPERM, "refused by a security profile (EPERM"),
        (libc::SYS_io_uring_register, Errno::EPERM, "refused by a security profile (EPERM"),
    ] {
        let output = run_denied(&Denied::always(call, error), models.path(), &[]);
        let line = only_line(&output);
        assert_eq!(output.status.code(), Some(78), "call {call}, {error}: {output:?}");
        assert!(line.starts_with("io_uring: ") && line.contains(found), "call {call}, {error}: {line}");
        assert!(output.stdout.is_empty(), "it was never ready");
    }
}

#[test]
fn a_ring_that_fails_ends_the_shard_its_connections_and_the_server_with_status_1() {
    // Goal: not a panic of ours, which tests/e2e/faults.rs has, but one of glommio: the kernel refuses a shard its ring.
    // Method: the profile refuses submissions of 8 entries or more at once. A server that was stopped while 64 of its
    // connections sent something makes such a submission when it goes on, and no other.
    const SUBMITTED: u8 = 1;
    let denied = Denied { call: libc::SYS_io_uring_enter, from: Some((SUBMITTED, 8)), error: Errno::EPERM };
    let mut child = Child::start_denied(&denied, &[]);
    let mut all: Vec<Raw> = (0..64).map(|_| child.connect()).collect();
    let faulty = all[0].handle("faulty");
    let unanswered = all[0].ask(&Ask::word(faulty, 500));
    wait_until("it is accepted", || child.metric("ferry_requests_accepted_total", &[]) == 1.0);
    let mut is_dead = false;
    while !is_dead {
        child.signal(Signal::SIGSTOP);
        all.iter_mut().for_each(|raw| raw.send(&bare_frame(Kind::Ping, 9)));
        child.signal(Signal::SIGCONT);
        for raw in &mut all {
            while !is_dead {
                match raw.recv() {
                    Event::Pong(_) => break,
                    Event::End => is_dead = true,
                    other => assert_eq!(other.ends(), Some(unanswered), "{other:?}"),
                }
            }
        }
    }
    all.iter_mut().for_each(|raw| drop(raw.recv_all()));
    assert_eq!(child.status(), Some(1));
    let log = child.log();
    assert!(log.contains("thread ferry-shard-0 ended before its turn"), "{log}");
}

#[test]
fn a_port_that_is_taken_is_told_with_status_78() {
    let models = models_directory();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let listen = format!("listen=\"{}\"", taken.local_addr().expect("is bound"));
    let output = run_under("true", models.path(), &[&listen]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let text = String::from_utf8(output.stderr).expect("text");
    assert!(text.contains("is taken by another server"), "{text}");
}

#[test]
fn without_descriptors_accepting_pauses_and_goes_on_when_some_are_free() {
    let child = Child::start(&[]);
    let mut bystander = child.connect();
    let echo = bystander.handle("echo");
    let mut held: Vec<Raw> = (0..10).map(|_| child.connect()).collect();
    child.limit_files(child.files() as u64 + 3);
    // Some of these are taken, the rest wait in the listener's backlog.
    let mut more: Vec<Raw> = (0..12).map(|_| Raw::connect(child.data)).collect();
    more.iter_mut().for_each(|raw| raw.send(&hello_frame()));
    let ticks = child.cpu_ticks();
    // Real time has to pass: that nothing spins is seen in what a second costs.
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        bystander.round(&Ask::floats(echo, &[1.0])).expect_result();
    }
    let spent = child.cpu_ticks() - ticks;
    held.clear();
    for raw in &mut more {
        assert!(matches!(raw.recv(), Event::HelloAck(_)), "every one is taken in the end");
        raw.ping();
    }
    drop(more);
    let errors = child.metric("ferry_accept_errors_total", &[]);
    assert!((1.0..200.0).contains(&errors), "{errors} failed accepts: it noticed, and it paused");
    assert!(spent < 70, "{spent} of about 100 clock ticks were spent waiting");
}

/// Goal: F58. Method: the real process under a limit of its addresses, and a frame of which only the beginning fits.
#[test]
fn a_frame_for_which_there_is_no_memory_ends_its_connection_and_nothing_else() {
    let child = Child::start(&["frontend.payload_bytes_max=67108864"]);
    let mut bystander = child.connect();
    let echo = bystander.handle("echo");
    bystander.round(&Ask::floats(echo, &[1.0])).expect_result();
    child.limit_addresses(8 << 20);
    for _ in 0..3 {
        let mut raw = child.connect();
        let id = raw.take_id();
        raw.send(&Ask::floats(echo, &vec![0.0; 12 << 20]).frame(id));
        let goaway = raw.recv().expect_goaway(Code::Overloaded);
        assert!(
            goaway.message.contains("the system gives no memory for the rest of a frame of 503"),
            "{}",
            goaway.message
        );
        bystander.round(&Ask::floats(echo, &[2.0])).expect_result();
    }
    // What fits is still taken whole, in a buffer of its own.
    let many = vec![3.0; 100_000];
    let mut raw = child.connect();
    let refusal = raw.round(&Ask::floats(echo, &many)).expect_error(Code::TooLarge);
    assert!(refusal.message.contains("100000"), "{}", refusal.message);
}

#[test]
fn cancelled_requests_and_closed_connections_leave_no_memory_and_no_descriptor() {
    const CANCELS: u64 = 200_000;
    let child = Child::start(&["abuse.points=0"]);
    let mut raw = child.connect();
    let echo = raw.handle("echo");
    let mut round = |count: u64| {
        for _ in 0..count / 100 {
            let mut bytes = Vec::new();
            let first = raw.take_id();
            for at in 0..100 {
                let id = if at == 0 { first } else { raw.take_id() };
                bytes.extend(Ask::floats(echo, &[1.0]).deadline_us(3_600_000_000).frame(id));
                bytes.extend(bare_frame(Kind::Cancel, id));
            }
            raw.send(&bytes);
            for _ in 0..100 {
                raw.recv().ends().expect("an end");
            }
        }
    };
    let connections = |count: u64| {
        for at in 0..count {
            let mut raw = child.connect();
            if at % 4 == 0 {
                // Left behind with work in flight.
                raw.send(&[Ask::floats(echo, &[1.0]).frame(1), Ask::floats(echo, &[1.0]).frame(2)].concat());
            }
        }
        wait_until("they are closed", || {
            child.metric("ferry_connections_opened_total", &[]) - child.metric("ferry_connections_closed_total", &[])
                == 1.0
                && child.metric("ferry_requests_in_flight", &[]) == 0.0
        });
    };
    round(40_000);
    connections(500);
    let files = child.files();
    // Buffers grow to what the busiest moment needed and stay; a leak grows in every round. So the first quiet round of
    // each kind decides: less than a byte for each cancel, less than 100 for each connection.
    let quiet = |what: &str, bytes_max: i64, work: &mut dyn FnMut()| {
        let growth: Vec<i64> = (0..6)
            .scan(false, |done, _| {
                let before = child.resident_bytes();
                (!*done).then(&mut *work)?;
                let growth = child.resident_bytes() - before;
                *done = growth < bytes_max;
                Some(growth)
            })
            .collect();
        println!("resident bytes more after each round of {what}: {growth:?}");
        assert!(growth.iter().any(|growth| *growth < bytes_max), "{what}: {growth:?}");
    };
    quiet("200000 cancels", CANCELS as i64, &mut || round(CANCELS));
    quiet("2000 connections", 200_000, &mut || connections(2_000));
    wait_until("the descriptors are back", || child.files() <= files);
    let cancelled = child.metric("ferry_requests_finished_total", &["code=\"cancelled\""]);
    assert!(cancelled > CANCELS as f64 / 2.0, "{cancelled} were cancelled before they were served");
}

#[test]
fn ten_thousand_lengths_that_are_too_large_take_no_memory_and_the_largest_is_served() {
    const MAX: u32 = 64 << 10;
    let child = Child::start(&["frontend.payload_bytes_max=65536"]);
    let mut bystander = child.connect();
    let echo = bystander.handle("echo");
    let largest = Ask::new(echo, DType::F32, &[16, 1024], &[7; MAX as usize]);
    assert!(bystander.round(&largest).expect_result().1 == largest.payload);
    // Each with a hello before it and the beginning of what it announces after it, all in one write.
    let stream = |kind: Kind, metadata_len: u32, payload_len: u32| {
        [hello_frame(), header(kind as u8, 0, metadata_len, payload_len), vec![0; 1024]].concat()
    };
    let round = |count: usize, code: Code, streams: &[Vec<u8>]| {
        for stream in streams.iter().cycle().take(count) {
            let mut raw = Raw::connect(child.data);
            raw.send(stream);
            assert!(matches!(raw.recv(), Event::HelloAck(_)));
            raw.recv().expect_goaway(code);
            assert!(matches!(raw.recv(), Event::End));
        }
        wait_until("they are closed", || {
            child.metric("ferry_connections_opened_total", &[]) - child.metric("ferry_connections_closed_total", &[])
                == 1.0
        });
    };
    // The same way to the end without such a length, so that no buffer made for one counts as there before.
    round(1_000, Code::ProtocolError, &[stream(Kind::Result, 0, 0)]);
    child.forget_resident_peak();
    let (resident, address_space) = (child.resident_bytes(), child.address_space_peak_bytes());
    let too_large = [(0, MAX + 1), (0, u32::MAX), (4097, 0), (u32::MAX, u32::MAX)];
    round(10_000, Code::TooLarge, &too_large.map(|(metadata, payload)| stream(Kind::Infer, metadata, payload)));
    let resident = child.resident_peak_bytes() - resident;
    // Also what was never touched: a buffer of 4 GiB that is only announced would be seen here.
    let address_space = child.address_space_peak_bytes() - address_space;
    println!("peaks grew by {resident} bytes resident and {address_space} bytes of addresses");
    assert!(resident < 1 << 20, "the peak of resident memory grew by {resident} bytes");
    assert!(address_space < 1 << 30, "the peak of addresses grew by {address_space} bytes");
    assert_eq!(child.metric("ferry_requests_accepted_total", &[]), 1.0, "the largest and nothing else");
    bystander.round(&largest).expect_result();
}

#[test]
fn the_number_of_threads_is_the_same_under_load_as_at_rest() {
    let child = Child::start(&["threads.shards=2", "threads.executors=2"]);
    let threads = child.threads();
    let mut all: Vec<Raw> = (0..64).map(|_| child.connect()).collect();
    let (echo, faulty) = (all[0].handle("echo"), all[0].handle("faulty"));
    for raw in &mut all {
        for n in 0..20 {
            // Also panics, which must not cost a thread or leave one.
            raw.ask(&match n {
                0 => Ask::word(faulty, 1),
                1 => Ask::word(faulty, 5),
                _ => Ask::new(echo, DType::F32, &[1, 500], &[0; 2000]),
            });
        }
    }
    assert_eq!(child.threads(), threads, "while 1280 requests are under way");
    for raw in &mut all {
        (0..20).for_each(|_| assert!(raw.recv().ends().is_some()));
    }
    assert_eq!(child.threads(), threads);
}

/// Has the faulty model fail once, which is logged.
fn fail_once(raw: &mut Raw, faulty: ModelHandle) {
    raw.round(&Ask::word(faulty, 2)).expect_error(Code::ExecutorFailed);
}

/// Of lines in the log that say so, how many others are missing.
fn missing_in(log: &str) -> u64 {
    let said = log.lines().filter(|line| line.contains("lines of the log are missing here"));
    said.map(|line| line.rsplit_once("lines=").expect("it says how many").1.parse::<u64>().expect("a number")).sum()
}

/// Lines that found no room in the log.
fn dropped(child: &Child) -> f64 {
    child.metric("ferry_log_lines_dropped_total", &["why=\"full\""])
}

/// Has requests fail until there is no more room in the log. Says how many.
fn fill_log(child: &Child, raw: &mut Raw, faulty: ModelHandle) -> u64 {
    let mut failed = 0;
    while dropped(child) == 0.0 {
        assert!(failed < 200_000, "more than any pipe and our own room for lines hold");
        for _ in 0..5 {
            for _ in 0..200 {
                raw.ask(&Ask::word(faulty, 2));
            }
            for _ in 0..200 {
                raw.recv().expect_error(Code::ExecutorFailed);
            }
        }
        failed += 1000;
    }
    failed
}

#[test]
fn a_server_whose_log_nobody_reads_ends_when_told_to() {
    let mut child = Child::start_unread(&["executor.quarantine_max=0"]);
    let mut raw = child.connect();
    let faulty = raw.handle("faulty");
    fill_log(&child, &mut raw, faulty);
    child.signal(Signal::SIGTERM);
    assert_eq!(child.status(), Some(0));
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody_and_says_what_is_missing_once_it_is_read() {
    let mut child = Child::start_unread(&["executor.quarantine_max=0", "threads.shards=1"]);
    let mut raw = child.connect();
    let (echo, faulty) = (raw.handle("echo"), raw.handle("faulty"));
    let failed = fill_log(&child, &mut raw, faulty);
    // A panic is said in the log as well, and costs no more: by the thread that panicked, and by who watches.
    raw.round(&Ask::word(faulty, 1)).expect_error(Code::ExecutorFailed);
    // Everybody goes on: shards, executors, the control port, newcomers, the watch.
    for _ in 0..100 {
        raw.round(&Ask::floats(echo, &[1.0])).expect_result();
        fail_once(&mut raw, faulty);
    }
    child.connect().round(&Ask::floats(echo, &[1.0])).expect_result();
    assert!(dropped(&child) > 100.0, "of {failed} that failed");
    child.read_on();
    wait_until("lines find room again", || {
        let before = dropped(&child);
        fail_once(&mut raw, faulty);
        dropped(&child) == before
    });
    let dropped = dropped(&child) as u64;
    child.signal(Signal::SIGTERM);
    assert_eq!(child.status(), Some(0));
    let log = child.log();
    assert_eq!(missing_in(&log), dropped, "each that is missing is said to be");
    assert!(log.contains("threads: 1 shard(s)") && log.contains("try it"), "what was said at the start is there");
    let last = log.lines().last().expect("there are lines");
    assert!(log.ends_with('\n') && last.contains("ledger: "), "up to the last line: {last}");
}

#[test]
fn a_log_on_a_full_disk_costs_lines_and_nothing_else() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a disk that is always full");
    let mut child = Child::start_with_stderr(full, &["executor.quarantine_max=0"]);
    let mut raw = child.connect();
    let (echo, faulty) = (raw.handle("echo"), raw.handle("faulty"));
    for _ in 0..20 {
        fail_once(&mut raw, faulty);
        raw.round(&Ask::floats(echo, &[1.0])).expect_result();
    }
    wait_until("all lines were tried", || child.metric("ferry_log_lines_dropped_total", &["why=\"failed\""]) >= 20.0);
    assert_eq!(child.metric("ferry_log_lines_dropped_total", &["why=\"full\""]), 0.0);
    child.signal(Signal::SIGTERM);
    assert_eq!(child.status(), Some(0));
}

#[test]
fn metrics_of_the_process_are_what_the_kernel_says() {
    let child = Child::start(&[]);
    let page = child.metrics();
    assert_eq!(metric(&page, "ferry_process_threads", &[]), child.threads() as f64);
    assert!(metric(&page, "ferry_process_resident_bytes", &[]) > 1e6);
    assert!(metric(&page, "ferry_process_open_fds", &[]) >= 8.0);
}
