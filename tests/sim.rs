//! Simulated lives of a server, each from a seed: random requests, deadlines, cancels, disconnects, failing, slow and
//! stuck executors, and a drain at the end. The batcher, scheduler, packing, device worker, scatter, in-flight table and
//! wire are the real ones; time and threads are not.
//!
//! `SIM_SEEDS=n` runs n seeds, `SIM_SEED=s` repeats one.

#[path = "sim/history.rs"]
mod history;
#[path = "sim/outlet.rs"]
mod outlet;
#[path = "sim/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use world::{Defect, live};

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// Everything that a life can hold. If one of these stops happening, the simulation tests less than it says.
const EXPECTED: &[&str] = &[
    "ok",
    "cancelled",
    "disconnects",
    "overloaded",
    "too_large",
    "invalid_argument",
    "executor_failed",
    "non_finite_output",
    "deadline on arrival",
    "deadline in the queue",
    "deadline while executing",
    "late answers",
    "stuck executors",
    "inline batches",
    "batches bound to a spare slot",
    "batches of several requests",
    "full",
    "idle",
    "queue_delay",
    "deadline",
    "drain",
    "composed",
    "urgent",
    "economic",
    "requests in parts",
    "policies changed",
    "policies refused",
    "policies that would strand somebody",
];

#[test]
fn every_promise_holds_in_every_simulated_life() {
    let seeds = match env("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..env("SIM_SEEDS").unwrap_or(10_000),
    };
    let all = seeds.end - seeds.start >= 500;
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let run = || {
        let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return seen;
            }
            match std::panic::catch_unwind(|| live(seed, Defect::None)) {
                Ok(life) => {
                    if let Some(promise) = life.broken_promise {
                        next.store(u64::MAX / 2, Ordering::Relaxed);
                        panic!("{promise}\nrepeat with: SIM_SEED={seed}");
                    }
                    life.seen.iter().for_each(|(what, times)| *seen.entry(what).or_default() += times);
                }
                Err(panic) => {
                    eprintln!("repeat with: SIM_SEED={seed}");
                    std::panic::resume_unwind(panic);
                }
            }
        }
    };
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        for run in runs {
            match run.join() {
                Ok(of_thread) => {
                    of_thread.into_iter().for_each(|(what, times)| *seen.entry(what).or_default() += times)
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    println!("{seen:#?}");
    if all {
        let missed: Vec<_> = EXPECTED.iter().filter(|what| !seen.contains_key(**what)).collect();
        assert!(missed.is_empty(), "these never happened: {missed:?}");
    }
}

#[test]
fn equal_seeds_live_equal_lives() {
    for seed in 0..20 {
        assert_eq!(live(seed, Defect::None).trace, live(seed, Defect::None).trace, "SIM_SEED={seed}");
    }
    assert_ne!(live(0, Defect::None).trace, live(1, Defect::None).trace);
}

/// Plants the defect in some lives and says what the first one that noticed it said.
fn found(defect: Defect) -> String {
    (0..50).find_map(|seed| live(seed, defect).broken_promise).unwrap_or_else(|| panic!("{defect:?} went unnoticed"))
}

#[test]
fn an_answer_that_is_dropped_is_noticed() {
    assert!(found(Defect::DropAnswer).contains("unanswered"));
}

#[test]
fn an_answer_that_comes_twice_is_noticed() {
    assert!(found(Defect::AnswerTwice).contains("ended twice"));
}

#[test]
fn rows_that_are_swapped_are_noticed() {
    assert!(found(Defect::SwapRows).contains("not its own"));
}

#[test]
fn a_deadline_that_is_ignored_is_noticed() {
    let said = found(Defect::IgnoreDeadline);
    assert!(said.contains("deadline") || said.contains("expired"), "{said}");
}

#[test]
fn a_refused_request_that_is_executed_is_noticed() {
    let said = found(Defect::ServeRefused);
    assert!(said.contains("never executed") || said.contains("expired"), "{said}");
}
