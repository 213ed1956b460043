//! Simulated lives of a server, each from a seed: random requests, deadlines, cancels, disconnects, failing, slow,
//! stuck and hung executors, requests that make their model fail, batches that come back twice, and a drain at the end. The batcher, scheduler, packing, device worker, scatter, in-flight table and
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

use ferry::capture::{Cancelled, Ended};
use ferry::capture::{CaptureEnd, Event, TraceReader, Writer, end_chunk};
use ferry::replay::exact::{self, ReplayError, Verified};
use world::{Defect, live, live_captured};

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
    "out_of_memory",
    "culprits",
    "requests in quarantine",
    "hung executors",
    "late results",
    "batches that came back twice",
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
    "draining",
    "composed",
    "urgent",
    "economic",
    "requests in parts",
    "policies changed",
    "policies refused",
    "policies that would strand somebody",
    "trials begun",
    "trials reverted",
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

#[test]
fn a_request_that_pays_for_its_mate_is_noticed() {
    let said = found(Defect::BlameAnother);
    assert!(said.contains("for another's fault") || said.contains("NaN of another"), "{said}");
}

#[test]
fn a_schedule_that_deadlocks_is_noticed() {
    assert!(found(Defect::LoseWakeup).contains("answered"));
}

fn replay(trace: &[u8]) -> Result<Verified, ReplayError> {
    let mut reader = TraceReader::open(trace)?;
    let verified = exact::replay(&mut reader, &mut ())?;
    assert_eq!(reader.bytes(), trace.len() as u64);
    Ok(verified)
}

#[test]
fn a_captured_life_is_replayed_decision_for_decision() {
    let seeds = match env("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..env("SIM_SEEDS").unwrap_or(200),
    };
    let all = seeds.end - seeds.start >= 200;
    let (mut arrivals, mut cancels, mut batches, mut from_the_middle, mut bytes) = (0, 0, 0, 0, 0);
    for seed in seeds {
        let (life, captured) = live_captured(seed);
        assert_eq!(life.broken_promise, None, "SIM_SEED={seed}");
        let verified = replay(&captured.trace).unwrap_or_else(|error| panic!("{error}\nrepeat with: SIM_SEED={seed}"));
        assert_eq!((verified.decisions, verified.hash), (captured.decisions, captured.hash), "SIM_SEED={seed}");
        assert_eq!(verified.end, CaptureEnd::Complete, "SIM_SEED={seed}");
        for model in &verified.report.models {
            let ends = model.answered + model.refused_total() + model.expired + model.cancelled + model.unfinished;
            assert_eq!(model.offered, ends, "SIM_SEED={seed}: {model:?}");
        }
        let reader = TraceReader::open(&captured.trace[..]).expect("it was read before");
        from_the_middle += u64::from(reader.header().decisions > 0);
        arrivals += verified.arrivals;
        cancels += verified.cancels;
        batches += verified.batches;
        bytes += captured.trace.len() - reader.state().len();
    }
    println!(
        "{arrivals} arrivals, {cancels} cancels, {batches} batches, {from_the_middle} from the middle; {:.1} bytes an arrival",
        bytes as f64 / arrivals as f64
    );
    if all {
        assert!(arrivals > 10_000 && cancels > 500 && batches > 5_000 && from_the_middle > 100);
    }
}

/// Writes a trace again with its events changed.
fn rewritten(trace: &[u8], change: impl FnOnce(&mut Vec<Event>)) -> Vec<u8> {
    let mut reader = TraceReader::open(trace).expect("a trace");
    let mut events = Vec::new();
    while let Some(event) = reader.next_event().expect("a trace") {
        events.push(event);
    }
    let Some(Event::Checkpoint { decisions, hash }) = events.pop() else { panic!("a trace ends with a checkpoint") };
    change(&mut events);
    let (mut writer, mut bytes) = Writer::start(reader.header(), reader.state());
    events.iter().for_each(|event| writer.event(event));
    bytes.extend(writer.close(decisions, hash));
    bytes.extend(end_chunk(Ended { end: CaptureEnd::Complete, chunks: writer.chunks() }));
    bytes
}

#[test]
fn an_input_that_is_changed_lost_or_moved_is_noticed() {
    // A capture in which much was decided.
    let batches = |seed: &u64| replay(&live_captured(*seed).1.trace).expect("it is equal").batches;
    let seed = (0..10).max_by_key(batches).expect("there are seeds");
    let (_, captured) = live_captured(seed);
    assert!(replay(&rewritten(&captured.trace, |_| ())).is_ok());
    let noticed = |change: &dyn Fn(&mut Vec<Event>)| {
        matches!(replay(&rewritten(&captured.trace, change)), Err(ReplayError::Differs(_)))
    };
    let mut events = Vec::new();
    rewritten(&captured.trace, |all| events = all.clone());
    let (mut longer, mut lost, mut late, mut tried) = (0, 0, 0, 0);
    for (at, event) in events.iter().enumerate() {
        match event {
            Event::Arrival { .. } => {
                tried += 1;
                longer += u64::from(noticed(&|events| {
                    if let Event::Arrival { arrival, .. } = &mut events[at] {
                        arrival.len = 1 + arrival.len % 16;
                    }
                }));
                // Cancels count arrivals: none may be lost in front of them.
                let mut behind = events[at..].iter();
                if !behind
                    .any(|event| matches!(event, Event::Cancel { of: Cancelled::Waiting(_) | Cancelled::Left(_), .. }))
                {
                    lost += u64::from(!noticed(&|events| drop(events.remove(at))));
                }
            }
            Event::Finished { .. } => {
                // Behind the last ones nothing was decided any more.
                let unnoticed = !noticed(&|events| drop(events.remove(at)));
                assert!(!unnoticed || at > events.len() / 2, "event {at} was lost unnoticed: {event:?}");
                late += u64::from(noticed(&|events| {
                    if let Event::Finished { batch, .. } = &mut events[at] {
                        batch.service += std::time::Duration::from_micros(50);
                    }
                }));
            }
            _ => {}
        }
    }
    println!(
        "{tried} arrivals: {longer} noticed with another length, {lost} lost unnoticed; {late} batches that took longer noticed"
    );
    // What was refused, cancelled or expired takes no part in a decision.
    assert!(2 * longer > tried && lost < tried / 2 && late > 0, "{longer} and {lost} of {tried}, {late}");
}
