//! Servers that are drained with thousands of calls in flight, and peers that are stopped (F70, F74, F84).

use std::process::Stdio;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ferry::client::{Client, ClientOptions};
use ferry::clock;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::caller::{Ledger, Manner, call_on, log_of, models, percentile, rounds};
use crate::common::process::{Child, ferry};
use crate::common::{Ask, metric, wait_until};
use crate::history::{Rules, Summary};
use crate::proxy::{Act, Proxy};

/// One drain under load: who was accepted is answered, nobody else was executed, the process ends by itself with status 0.
fn drained(round: u64, drain_queue: &str) -> (Summary, Duration, f64) {
    let mut child = Child::start_in(models(), &["threads.shards=2", drain_queue]);
    let ledger = Ledger::new();
    let stop = AtomicBool::new(false);
    let mut in_flight = 0.0;
    let mut took = Duration::ZERO;
    std::thread::scope(|scope| {
        for caller in 0..12 {
            let client = Client::connect(child.data, ClientOptions::default()).expect("the server listens");
            let manner = Manner { depth: 250, micros: 20_000, allowed: None, seed: round << 8 | caller };
            let (ledger, stop) = (&ledger, &stop);
            scope.spawn(move || assert!(!call_on(&client, ledger, manner, stop), "nobody tells it to stop"));
        }
        wait_until("thousands are in flight", || {
            in_flight = child.metric("ferry_requests_in_flight", &[]);
            in_flight > 2000.0
        });
        let start = clock::now();
        child.signal(Signal::SIGTERM);
        assert_eq!(child.status(), Some(0), "round {round}");
        took = clock::now().since(start);
    });
    // Without a window: nobody may be left without knowing.
    (ledger.check(&[log_of(child.models())], &Rules::default()), took, in_flight)
}

#[test]
fn a_drain_with_thousands_in_flight_loses_nothing_doubles_nothing_and_ends_with_status_0() {
    for drain_queue in ["drain_queue_ms=20000", "drain_queue_ms=0"] {
        let (mut calls, mut ok, mut unsent, mut times) = (0, 0, 0, Vec::new());
        let mut most = 0.0f64;
        for round in 0..rounds(5, 100) {
            let (summary, took, in_flight) = drained(round, drain_queue);
            assert!(summary.ok > 0, "round {round}: {summary:?}");
            // What was refused was refused for the drain, or never left the client.
            let reasons: Vec<&str> = summary.failed.keys().map(String::as_str).collect();
            assert!(
                reasons.iter().all(|code| ["draining", "unsent"].contains(code)),
                "round {round}: {:?}",
                summary.failed
            );
            calls += summary.calls;
            ok += summary.ok;
            unsent += summary.failed.values().sum::<u64>();
            most = most.max(in_flight);
            times.push(took.as_millis() as u64);
        }
        times.sort_unstable();
        println!(
            "{drain_queue}: {} drains: {calls} calls, {ok} answered, {unsent} handed back, up to {most} in flight; ms p50 {} max {}",
            times.len(),
            percentile(&times, 0.5),
            percentile(&times, 1.0),
        );
    }
}

#[test]
fn a_stopped_client_is_closed_like_any_reader_that_does_not_read_and_nobody_else_notices() {
    let child = Child::start_in(
        models(),
        &["frontend.stall_timeout_ms=500", "frontend.output_bytes_max=65536", "frontend.credit_requests=4096"],
    );
    let mut bystander = child.connect();
    let echo = bystander.handle("echo");
    // Between them sockets that hold little, so that it is the server that is left with the replies.
    let proxy = Proxy::narrow(child.data, 64 << 10, |_| Act::PASS);
    let mut load = std::process::Command::new(ferry())
        .args(["load", "--addr", &proxy.addr.to_string(), "--model", "echo", "--lengths", "fixed:1024"])
        .args(["--concurrency", "4000", "--connections", "1", "--duration", "600s", "--warmup", "0s"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary runs");
    let pid = Pid::from_raw(load.id() as i32);
    wait_until("load is on", || child.metric("ferry_requests_accepted_total", &[]) > 8000.0);
    kill(pid, Signal::SIGSTOP).expect("the process is ours");
    wait_until("it is closed, and only the bystander is left", || {
        bystander.round(&Ask::floats(echo, &[1.0])).expect_result();
        let page = child.metrics();
        metric(&page, "ferry_connections_opened_total", &[]) - metric(&page, "ferry_connections_closed_total", &[])
            == 1.0
    });
    let _ = (load.kill(), load.wait());
    wait_until("nothing is held for it", || {
        let page = child.metrics();
        metric(&page, "ferry_requests_in_flight", &[]) == 0.0 && metric(&page, "ferry_live_bytes", &["unsent"]) == 0.0
    });
    bystander.round(&Ask::floats(echo, &[1.0])).expect_result();
}
