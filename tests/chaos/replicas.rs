//! Two replicas and a pool: one is killed, cut off, stopped, drained, started again (F72, F92, F93, T7, T17).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry::client::{ClientError, ClientOptions, Pool, PoolOptions, ReplicaState, Request};
use ferry::clock;
use ferry::vocab::Executed;
use nix::sys::signal::Signal;

use crate::caller::{Ledger, Manner, call_pool, log_of, models, percentile, rounds};
use crate::common::process::Child;
use crate::common::{Numbers, wait_until};
use crate::history::{Entry, Rules};
use crate::proxy::{Mix, Proxy};

/// A server that comes back at the same address.
struct Replica {
    child: Child,
    proxy: Proxy,
    /// Of servers that were here before: what they executed stays known.
    before: Vec<Child>,
}

impl Replica {
    fn start() -> Replica {
        Replica::behind(Proxy::plain)
    }

    fn behind(proxy: impl FnOnce(SocketAddr) -> Proxy) -> Replica {
        let child = Child::start_in(models(), &[]);
        Replica { proxy: proxy(child.data), child, before: Vec::new() }
    }

    fn restart(&mut self) {
        let next = Child::start_in(models(), &[]);
        self.proxy.set_target(next.data);
        self.before.push(std::mem::replace(&mut self.child, next));
    }

    fn logs(&self) -> Vec<std::path::PathBuf> {
        self.before.iter().chain([&self.child]).map(|child| log_of(child.models())).collect()
    }
}

fn pool_of(replicas: &[Replica; 2], options: PoolOptions) -> Pool {
    let pool = Pool::new(&[replicas[0].proxy.addr, replicas[1].proxy.addr], options).expect("two replicas");
    wait_until_up(&pool);
    pool
}

fn wait_until_up(pool: &Pool) {
    wait_until("both replicas are connected", || {
        pool.stats().replicas.iter().all(|replica| replica.state == ReplicaState::Up)
    });
}

/// Calls go on while it is looked at.
fn wait_for_ends(ledger: &Ledger, more: usize) {
    let before = ledger.ends();
    wait_until("calls end", || ledger.ends() >= before + more);
}

/// What a pool retries where its caller allows that a model runs twice, since it has no state.
fn pure() -> PoolOptions {
    PoolOptions {
        retry_maybe_executed: true,
        retry_reserve: 10_000,
        backoff_min: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        client: ClientOptions { connect_timeout: Duration::from_secs(2), ..ClientOptions::default() },
        ..PoolOptions::default()
    }
}

#[test]
fn a_replica_that_is_killed_again_and_again_costs_its_callers_no_call_and_doubles_none() {
    let kills = rounds(4, 100);
    let mut replicas = [Replica::start(), Replica::start()];
    let pool = pool_of(&replicas, pure());
    let (ledger, stop) = (Ledger::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let manner = Manner { depth: 16, micros: 2000, allowed: None, seed: caller };
            let (pool, ledger, stop) = (&pool, &ledger, &stop);
            scope.spawn(move || call_pool(pool, ledger, manner, stop));
        }
        for kill in 0..kills {
            let victim = (kill % 2) as usize;
            wait_for_ends(&ledger, 200);
            let from = ledger.now_us();
            replicas[victim].child.signal(Signal::SIGKILL);
            assert_eq!(replicas[victim].child.status(), None, "a signal ended it");
            wait_for_ends(&ledger, 200);
            replicas[victim].restart();
            wait_until_up(&pool);
            ledger.window(from, "killed");
        }
        wait_for_ends(&ledger, 200);
        stop.store(true, Ordering::Relaxed);
    });
    let logs: Vec<_> = replicas.iter().flat_map(Replica::logs).collect();
    // The pool may run a call on both; it tells its caller once, and always something.
    let summary = ledger.check(&logs, &Rules { executions_max: None, ..Rules::default() });
    assert_eq!((summary.ok, summary.unknown), (summary.calls, 0), "lost none: {:?}", summary.failed);
    let stats = pool.stats();
    assert_eq!((stats.responses, stats.requests), (summary.calls, summary.calls));
    assert!(stats.connections_lost >= kills, "{stats:?}");
    let (calm, disturbed) = split(&ledger.history(&[]));
    let extra = percentile(&disturbed, 0.99).saturating_sub(percentile(&calm, 0.99));
    println!(
        "{kills} kills: {} calls, 0 lost, 0 doubled, {} retried; p99 {} µs in calm, {} µs around kills ({} calls), max {} µs",
        summary.calls,
        stats.retries,
        percentile(&calm, 0.99),
        percentile(&disturbed, 0.99),
        disturbed.len(),
        summary.latencies_us.last().copied().unwrap_or_default(),
    );
    if kills >= 100 {
        assert!(extra < 1_000_000, "p99 grew by {extra} µs");
    }
}

/// Latencies of calls that no window touches, and of those that began in one's first second or were under way then.
fn split(history: &[Entry]) -> (Vec<u64>, Vec<u64>) {
    let windows: Vec<(u64, u64)> = history
        .iter()
        .filter_map(|entry| match entry {
            Entry::Window { from_us, .. } => Some((*from_us, from_us + 1_000_000)),
            _ => None,
        })
        .collect();
    let mut invoked = std::collections::HashMap::new();
    let (mut calm, mut disturbed) = (Vec::new(), Vec::new());
    for entry in history {
        match entry {
            Entry::Invoke { id, intended_us, .. } => drop(invoked.insert(*id, *intended_us)),
            Entry::Ok { id, at_us, .. } => {
                let from = invoked[id];
                let touched = windows.iter().any(|(begin, end)| from <= *end && at_us >= begin);
                if touched { &mut disturbed } else { &mut calm }.push(at_us - from);
            }
            _ => {}
        }
    }
    calm.sort_unstable();
    disturbed.sort_unstable();
    (calm, disturbed)
}

#[test]
fn without_leave_to_run_twice_a_kill_costs_only_calls_that_may_have_run() {
    let mut replicas = [Replica::start(), Replica::start()];
    let pool = pool_of(&replicas, PoolOptions { retry_maybe_executed: false, ..pure() });
    let (ledger, stop) = (Ledger::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let manner = Manner { depth: 16, micros: 20_000, allowed: None, seed: caller };
            let (pool, ledger, stop) = (&pool, &ledger, &stop);
            scope.spawn(move || call_pool(pool, ledger, manner, stop));
        }
        for _ in 0..rounds(2, 20) {
            wait_for_ends(&ledger, 100);
            let from = ledger.now_us();
            replicas[0].child.signal(Signal::SIGKILL);
            replicas[0].child.status();
            wait_for_ends(&ledger, 100);
            replicas[0].restart();
            wait_until_up(&pool);
            ledger.window(from, "killed");
        }
        stop.store(true, Ordering::Relaxed);
    });
    let logs: Vec<_> = replicas.iter().flat_map(Replica::logs).collect();
    // Not one ran twice, and who was told that it never ran is in no log.
    let summary = ledger.check(&logs, &Rules::default());
    assert!(summary.unknown > 0, "a kill hit something: {summary:?}");
    println!("{} calls, {} unknown, {:?}", summary.calls, summary.unknown, summary.failed);
}

#[test]
fn a_client_that_is_cut_off_from_one_replica_moves_to_the_other_and_what_it_left_is_dropped() {
    // Goal: a pulled cable, which says nothing to anybody. Method: the proxy before replica 0 goes dark.
    let replicas = [Replica::start(), Replica::start()];
    let allowed = Duration::from_millis(300);
    let pool = pool_of(&replicas, pure());
    let (ledger, stop) = (Ledger::new(), AtomicBool::new(false));
    let mut answered_in_the_dark = 0;
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let manner = Manner { depth: 8, micros: 2000, allowed: Some(allowed), seed: caller };
            let (pool, ledger, stop) = (&pool, &ledger, &stop);
            scope.spawn(move || call_pool(pool, ledger, manner, stop));
        }
        for _ in 0..rounds(2, 20) {
            wait_for_ends(&ledger, 200);
            let from = ledger.now_us();
            replicas[0].proxy.set_dark(true);
            let before = pool.stats().responses;
            wait_until("the other replica answers", || pool.stats().responses >= before + 500);
            answered_in_the_dark += pool.stats().responses - before;
            replicas[0].proxy.set_dark(false);
            wait_until_up(&pool);
            wait_for_ends(&ledger, 200);
            ledger.window(from, "dark");
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(pool);
    for replica in &replicas {
        wait_until("nothing is left at either", || replica.child.metric("ferry_requests_in_flight", &[]) == 0.0);
    }
    let logs: Vec<_> = replicas.iter().flat_map(Replica::logs).collect();
    let summary = ledger.check(&logs, &Rules { executions_max: None, ..Rules::default() });
    println!(
        "{} calls, {} answered ({answered_in_the_dark} in the dark), {} unknown, {:?}",
        summary.calls, summary.ok, summary.unknown, summary.failed
    );
}

fn echo(allowed: Option<Duration>) -> Request {
    let request = Request::new("echo").input("values", &[1, 4], &[1.0f32, 2.0, 3.0, 4.0]);
    match allowed {
        Some(allowed) => request.deadline(allowed),
        None => request,
    }
}

/// Calls that end soon, until one has run out at a silent replica and the pool has drawn its conclusion.
fn call_until_suspect(pool: &Pool, silent: usize) {
    wait_until("the silent replica is suspect", || {
        let _ = pool.infer(echo(Some(Duration::from_millis(50))));
        pool.stats().replicas[silent].state != ReplicaState::Up
    });
}

/// Calls until the replica has taken one more.
fn call_until_used(pool: &Pool, replica: &Replica) {
    let accepted = || replica.child.metric("ferry_requests_accepted_total", &["model=\"echo\""]);
    let before = accepted();
    wait_until("it is used", || {
        pool.infer(echo(None)).expect("both are well");
        accepted() > before
    });
}

/// A replica goes silent and is heard again. Between the two hardly a call is given to it, and afterwards it is used as before.
fn silent_for_a_while(replicas: &[Replica; 2], go_silent: impl FnOnce(), speak_again: impl FnOnce()) {
    let pool = pool_of(replicas, PoolOptions { retry_maybe_executed: false, ..pure() });
    call_until_used(&pool, &replicas[0]);
    go_silent();
    call_until_suspect(&pool, 0);
    let patient = Duration::from_secs(5);
    let failed = (0..500).filter(|_| pool.infer(echo(Some(patient))).is_err()).count();
    // None at all, but where the other is so slow that it is doubted for a moment, too.
    assert!(
        failed <= 2,
        "{failed} of 500 calls were given to a replica that was known to be silent: {:?}",
        pool.stats()
    );
    speak_again();
    wait_until_up(&pool);
    call_until_used(&pool, &replicas[0]);
    println!("{:?}", pool.stats());
}

#[test]
fn a_replica_behind_a_dark_cable_gets_no_calls_until_it_is_heard_again() {
    let replicas = [Replica::start(), Replica::start()];
    silent_for_a_while(&replicas, || replicas[0].proxy.set_dark(true), || replicas[0].proxy.set_dark(false));
}

#[test]
fn a_replica_that_is_stopped_gets_no_calls_until_it_goes_on() {
    let replicas = [Replica::start(), Replica::start()];
    let signal = |signal| replicas[0].child.signal(signal);
    silent_for_a_while(&replicas, || signal(Signal::SIGSTOP), || signal(Signal::SIGCONT));
}

#[test]
fn a_replica_that_does_not_answer_when_asked_is_left_and_calls_without_a_deadline_are_told() {
    let replicas = [Replica::start(), Replica::start()];
    let base = pure();
    let client = ClientOptions { control_timeout: Duration::from_secs(1), ..base.client };
    let pool = pool_of(&replicas, PoolOptions { client, retry_maybe_executed: false, connections: 1, ..base });
    call_until_used(&pool, &replicas[0]);
    replicas[0].proxy.set_dark(true);
    // Nobody has a deadline that could run out.
    let mut endless = Vec::new();
    while pool.stats().replicas[0].outstanding == 0 {
        endless.push(pool.submit(echo(None)));
    }
    let told = endless.into_iter().map(|call| call.wait());
    let lost = told.filter(|outcome| match outcome {
        Ok(_) => false,
        Err(error) => {
            let ClientError::ConnectionLost { executed: Executed::Maybe, reason } = &error.last else {
                panic!("{error:?}")
            };
            assert_eq!(reason, "the server does not answer");
            true
        }
    });
    assert!(lost.count() > 0, "some were at the silent one");
    replicas[0].proxy.set_dark(false);
    wait_until_up(&pool);
}

#[test]
fn a_rolling_restart_costs_no_call() {
    let mut replicas = [Replica::start(), Replica::start()];
    // Nothing may run twice, and nothing needs to.
    let pool = pool_of(&replicas, PoolOptions { retry_maybe_executed: false, ..pure() });
    let (ledger, stop) = (Ledger::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let manner = Manner { depth: 16, micros: 5000, allowed: None, seed: caller };
            let (pool, ledger, stop) = (&pool, &ledger, &stop);
            scope.spawn(move || call_pool(pool, ledger, manner, stop));
        }
        for round in 0..rounds(4, 50) {
            wait_for_ends(&ledger, 100);
            let leaving = &mut replicas[(round % 2) as usize];
            leaving.child.signal(Signal::SIGTERM);
            assert_eq!(leaving.child.status(), Some(0), "round {round}");
            leaving.restart();
            wait_until_up(&pool);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let logs: Vec<_> = replicas.iter().flat_map(Replica::logs).collect();
    let summary = ledger.check(&logs, &Rules::default());
    assert_eq!(summary.ok, summary.calls, "{:?}", summary.failed);
    println!("{} calls over the restarts, all answered", summary.calls);
}

#[test]
fn an_hour_of_everything_at_once_loses_nothing_and_answers_nothing_wrongly() {
    // As a test it is a few seconds; in the long run an hour.
    let time = Duration::from_secs(rounds(5, 3600));
    let seed = std::env::var("CHAOS_SEED").map_or(1, |seed| seed.parse().expect("CHAOS_SEED is a number"));
    println!("repeat with: CHAOS_SEED={seed}");
    let mix = |seed| Mix {
        seed,
        block: 128 << 10,
        piece: 8000,
        delay: 200,
        flip: 100,
        stall: 20,
        cut: 100,
        half_close: 20,
        reset: 100,
    };
    let mut replicas =
        [seed, seed + 1].map(|seed| Replica::behind(|target| Proxy::start(target, move |at| mix(seed).act(at))));
    let pool = Pool::new(&[replicas[0].proxy.addr, replicas[1].proxy.addr], pure()).expect("two replicas");
    let (ledger, stop) = (Ledger::new(), AtomicBool::new(false));
    let mut did = [0u64; 4];
    std::thread::scope(|scope| {
        for caller in 0..4 {
            // Slow enough for an hour's history to be kept in memory.
            let manner = Manner { depth: 4, micros: 10_000, allowed: Some(Duration::from_secs(2)), seed: caller };
            let (pool, ledger, stop) = (&pool, &ledger, &stop);
            scope.spawn(move || call_pool(pool, ledger, manner, stop));
        }
        let mut numbers = Numbers(seed);
        let start = clock::now();
        while clock::now().since(start) < time {
            std::thread::sleep(Duration::from_millis(200 + numbers.below(800)));
            let what = numbers.below(4) as usize;
            let replica = &mut replicas[numbers.below(2) as usize];
            did[what] += 1;
            match what {
                0 => {
                    replica.child.signal(Signal::SIGKILL);
                    replica.child.status();
                    replica.restart();
                }
                1 => {
                    replica.child.signal(Signal::SIGTERM);
                    replica.child.status();
                    replica.restart();
                }
                2 => {
                    replica.child.signal(Signal::SIGSTOP);
                    std::thread::sleep(Duration::from_millis(numbers.below(500)));
                    replica.child.signal(Signal::SIGCONT);
                }
                _ => {
                    replica.proxy.set_dark(true);
                    std::thread::sleep(Duration::from_millis(numbers.below(500)));
                    replica.proxy.set_dark(false);
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    ledger.window(0, "everything");
    let logs: Vec<_> = replicas.iter().flat_map(Replica::logs).collect();
    let summary = ledger.check(&logs, &Rules { executions_max: None, ..Rules::default() });
    let truthful = summary.ok + summary.failed.values().sum::<u64>();
    println!(
        "seed {seed}: {time:?}, kills, drains, stops, cuts: {did:?}; {} calls, {} ok, {:?}, {} unknown: {:.3} % ok or told why",
        summary.calls,
        summary.ok,
        summary.failed,
        summary.unknown,
        100.0 * truthful as f64 / summary.calls as f64,
    );
    assert!(summary.ok > 0);
}
