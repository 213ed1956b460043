//! Measures the best settings on a running server: sets each over the control port, offers the load, reads what came of it.
//!
//! Always true
//! - Whatever was set is put back: at the end, on an error, on a panic, on SIGINT and on SIGTERM. Where that fails, or where somebody
//!   else has set a knob meanwhile, it is said, with the command that does it by hand.
//! - Rounds go through all settings one behind the other, every second one backwards, so that what drifts on the machine meets all of
//!   them. What is reported are medians.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry::load::{self, LoadOptions, Mode};
use ferry::tune::front;
use ferry::tune::page::Found;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::source::{Load, ask};
use super::{Args, Failure};
use crate::commands::http;
use crate::commands::load::resolve;

/// Connections of the load, and its warm-up where it has one.
const CONNECTIONS: usize = 4;
const WARMUP: Duration = Duration::from_secs(1);
/// Times that putting back is tried.
const TRIES: u32 = 3;

type Knobs = BTreeMap<String, String>;

/// A model's policy on a server, with what it was.
struct Held {
    control: SocketAddr,
    path: String,
    model: String,
    old: Knobs,
    /// What this process has set since, as the server shows it. None: nothing that is not put back.
    ours: Mutex<Option<Knobs>>,
}

impl Held {
    fn take(control: SocketAddr, model: &str) -> Result<Held, Failure> {
        let path = format!("/v1/models/{}/policy", http::segment(model));
        let old = knobs_of(&ask(control, &path)?);
        Ok(Held { control, path, model: model.to_owned(), old, ours: Mutex::new(None) })
    }

    /// Sets these knobs, and all others that were set before to what they were. `Err(sentence)`: the server refused.
    fn set(&self, knobs: &Knobs) -> Result<Result<(), String>, Failure> {
        let mut ours = self.lock();
        let mut wanted: Knobs = knobs.clone();
        for key in ours.iter().flat_map(|ours| ours.keys()) {
            if let Some(old) = self.old.get(key) {
                wanted.entry(key.clone()).or_insert_with(|| old.clone());
            }
        }
        if wanted.is_empty() {
            return Ok(Ok(()));
        }
        // From here on something may have been set, whatever comes back.
        ours.get_or_insert_with(Knobs::new).extend(wanted.clone());
        let (status, answer) = http::request(self.control, "PATCH", &self.path, Some(&json!({ "set": wanted })))?;
        let why = answer["error"].as_str().unwrap_or("no reason was given").to_owned();
        match status {
            200 => {
                let shown = knobs_of(&ask(self.control, &self.path)?);
                let keys: Vec<String> = wanted.into_keys().collect();
                let as_shown = keys.into_iter().filter_map(|key| Some((key.clone(), shown.get(&key)?.clone())));
                *ours = Some(as_shown.collect());
                Ok(Ok(()))
            }
            // A change is made whole or not at all: what was there before it still is.
            400 | 409 => {
                let shown = knobs_of(&ask(self.control, &self.path)?);
                let mine = ours.take().unwrap_or_default().into_keys();
                *ours = Some(mine.filter_map(|key| Some((key.clone(), shown.get(&key)?.clone()))).collect());
                Ok(Err(why))
            }
            _ => Err(Failure::Work(format!("the server at {} did not take a policy: {why} ({status})", self.control))),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Knobs>> {
        self.ours.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Puts back what was set and is still as it was set.
    fn put_back(&self) -> Result<(), String> {
        let mut ours = self.lock();
        let Some(set) = ours.clone() else { return Ok(()) };
        let mut last = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 {
                // The control port answers so many requests a second.
                std::thread::sleep(Duration::from_millis(300));
            }
            match self.try_to_put_back(&set) {
                Ok(others) => {
                    *ours = None;
                    return match others.is_empty() {
                        true => Ok(()),
                        false => Err(format!("somebody else has set {} meanwhile: left as it is", others.join(", "))),
                    };
                }
                Err(error) => last = error,
            }
        }
        let by_hand: Vec<String> = set.keys().filter_map(|key| Some(format!("{key}={}", self.old.get(key)?))).collect();
        Err(format!(
            "the old policy of {} could not be put back: {last}\n  by hand: ferry set {} {} --control {}",
            self.model,
            self.model,
            by_hand.join(" "),
            self.control
        ))
    }

    /// Knobs that are no longer as they were set here.
    fn try_to_put_back(&self, set: &Knobs) -> Result<Vec<String>, String> {
        let (status, shown) = http::request(self.control, "GET", &self.path, None)?;
        if status != 200 {
            return Err(format!("{} ({status})", shown["error"].as_str().unwrap_or("no reason")));
        }
        let shown = knobs_of(&shown);
        let is = |key: &str, value: Option<&String>| shown.get(key) == value;
        // What is as it was needs nothing.
        let touched = set.iter().filter(|(key, _)| !is(key, self.old.get(*key)));
        let (mine, others): (Vec<_>, Vec<_>) = touched.partition(|(key, value)| is(key, Some(value)));
        let back: Knobs =
            mine.iter().filter_map(|(key, _)| Some(((*key).clone(), self.old.get(*key)?.clone()))).collect();
        if !back.is_empty() {
            let (status, answer) = http::request(self.control, "PATCH", &self.path, Some(&json!({ "set": back })))?;
            if status != 200 {
                return Err(format!("{} ({status})", answer["error"].as_str().unwrap_or("no reason")));
            }
        }
        Ok(others.into_iter().map(|(key, _)| key.clone()).collect())
    }
}

fn knobs_of(shown: &Value) -> Knobs {
    let knobs = shown["knobs"].as_array().into_iter().flatten();
    knobs.filter_map(|knob| Some((knob["name"].as_str()?.to_owned(), knob["value"].as_str()?.to_owned()))).collect()
}

/// Puts back when it goes out of scope, also while a panic unwinds.
struct Guard(Arc<Held>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(message) = self.0.put_back() {
            eprintln!("ferry: {message}");
        }
    }
}

/// Ends the process when it is told to, behind putting back. The lock is kept: nothing is set any more.
///
/// The flag says that a signal has come, from the moment on that it interrupts anything.
fn put_back_on_signals(held: &Arc<Held>) -> Result<(signal_hook::iterator::Handle, Arc<AtomicBool>), Failure> {
    let told = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&told))
            .map_err(|error| format!("signals cannot be awaited: {error}"))?;
    }
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| format!("signals cannot be awaited: {error}"))?;
    let (handle, held) = (signals.handle(), Arc::clone(held));
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let outcome = held.put_back();
            let _last = held.lock();
            match outcome {
                Ok(()) => eprintln!("ferry: stopped; the policy is as it was"),
                Err(message) => eprintln!("ferry: {message}"),
            }
            std::process::exit(128 + signal);
        }
    });
    Ok((handle, told))
}

/// What one run measured.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    p50_ms: f64,
    p99_ms: f64,
    goodput_rps: f64,
    throughput_rps: f64,
    busy: Option<f64>,
}

/// A setting, with what it takes to set it and what was measured.
struct Candidate {
    at: usize,
    knobs: Knobs,
    refused: Option<String>,
    runs: Vec<Run>,
}

/// Measures the present setting and the best others. What comes back goes into the document.
pub fn confirm(args: &Args, addr: &str, found: &Found<'_>, load: &Load, slo: Duration) -> Result<Value, Failure> {
    let addr = resolve(addr).map_err(Failure::Use)?;
    let control = resolve(&args.control).map_err(|message| Failure::Use(message.replace("--addr", "--control")))?;
    let held = Arc::new(Held::take(control, &args.model)?);
    let mut candidates = candidates(args, found);
    let present = found.space.present_policy();
    let apart: Vec<&str> = TUNED.into_iter().filter(|key| present.get(key) != held.old.get(*key).cloned()).collect();
    let note = match apart.is_empty() {
        true => "Measured at the client, from the moment a request was meant to be sent; predicted are queue and run in the server.".to_owned(),
        false => format!("The present setting was measured as the server runs it, which is not that of the trace: {}.", apart.join(", ")),
    };
    let bar = ProgressBar::new(u64::from(args.confirm_rounds) * candidates.len() as u64);
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} measured {msg}");
    bar.set_style(style.expect("the template is valid"));
    {
        let guard = Guard(Arc::clone(&held));
        let (signals, told) = put_back_on_signals(&held)?;
        let mut measure_all = || -> Result<(), Failure> {
            for round in 0..args.confirm_rounds {
                let count = candidates.len();
                for turn in 0..count {
                    let at = if round % 2 == 0 { turn } else { count - 1 - turn };
                    let candidate = &mut candidates[at];
                    bar.set_message(format!("setting {}", candidate.at));
                    bar.inc(1);
                    if candidate.refused.is_some() {
                        continue;
                    }
                    if let Err(why) = guard.0.set(&candidate.knobs)? {
                        candidate.refused = Some(why);
                        continue;
                    }
                    candidate.runs.push(measure(args, addr, load, slo)?);
                }
            }
            Ok(())
        };
        let outcome = measure_all();
        if outcome.is_err() && told.load(Ordering::SeqCst) {
            // What failed was interrupted by the signal: the thread that waits for it puts back and ends the process.
            loop {
                std::thread::park();
            }
        }
        outcome?;
        drop(guard);
        signals.close();
    }
    bar.finish_and_clear();
    Ok(json!({
        "rounds": args.confirm_rounds,
        "seconds_each": args.confirm_time.as_secs_f64(),
        "note": note,
        "settings": settings(found, &candidates),
    }))
}

/// Knobs that a search moves.
const TUNED: [&str; 8] =
    ["policy", "rows_max", "cells_max", "queue_delay_max_us", "buckets", "pad_to", "layout", "fill_waste_max"];

/// Predictions that differ by no more than this share are alike.
const ALIKE: f64 = 0.03;

/// The present setting, and the first of the ranking. Those that need a restart are named and not measured.
fn candidates(args: &Args, found: &Found<'_>) -> Vec<Candidate> {
    let candidate = |at: usize| {
        let point = &found.tried[at].point;
        let knobs = found.space.settings(point).into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let restart = "needs a restart: larger batches than the server has memory for, or other executors";
        let refused = found.space.needs_restart(point).then(|| restart.to_owned());
        Candidate { at, knobs, refused, runs: Vec::new() }
    };
    let mut candidates = vec![candidate(0)];
    let mut shown = 0;
    for at in found.ranked().into_iter().filter(|at| *at != 0) {
        let next = candidate(at);
        // What is predicted to be alike would only be measured twice.
        let of = |at: usize| front::objectives(&found.tried[at].predicted);
        let alike = |other: &Candidate| of(other.at).iter().zip(of(at)).all(|(a, b)| (a - b).abs() <= ALIKE * b.abs());
        if candidates.iter().any(alike) && Some(at) != found.choice().map(|choice| choice.at) {
            continue;
        }
        // The chosen one is named in any case.
        if next.refused.is_some() && Some(at) != found.choice().map(|choice| choice.at) {
            continue;
        }
        shown += u8::from(next.refused.is_none());
        candidates.push(next);
        if shown == args.confirm {
            break;
        }
    }
    candidates
}

fn measure(args: &Args, addr: SocketAddr, load: &Load, slo: Duration) -> Result<Run, Failure> {
    // Of a trace nothing is cut off.
    let (warmup, duration) = match &load.mode {
        Mode::Trace(trace) => {
            let last = trace.arrivals.last().map_or(0, |(at, _)| *at);
            (Duration::ZERO, args.confirm_time.min(Duration::from_nanos(last + 1)))
        }
        _ => (WARMUP, args.confirm_time),
    };
    let options = LoadOptions {
        lengths: load.lengths.clone(),
        warmup,
        duration,
        connections: CONNECTIONS,
        slo: Some(slo),
        deadline: load.deadline,
        token: crate::commands::connection::token(),
        tls: crate::commands::connection::tls(),
        seed: args.seed,
        ..LoadOptions::new(addr, args.model.as_str(), load.mode.clone())
    };
    let report = load::run(&options, |_| {}).map_err(|error| error.to_string())?;
    Ok(Run {
        p50_ms: report.latency_us.p50 / 1e3,
        p99_ms: report.latency_us.p99 / 1e3,
        goodput_rps: report.goodput_rps,
        throughput_rps: report.throughput_rps,
        busy: report.server.map(|server| server.executor_busy),
    })
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Medians, and p99 as a share of the present setting's in the same round.
fn settings(found: &Found<'_>, candidates: &[Candidate]) -> Vec<Value> {
    let present = &candidates[0];
    let of = |candidate: &Candidate| {
        let predicted = &found.tried[candidate.at].predicted;
        let of_present = found.tried[present.at].predicted.p99_ms;
        let ratios = candidate.runs.iter().zip(&present.runs).map(|(run, present)| run.p99_ms / present.p99_ms);
        let measured = median(candidate.runs.iter().map(|run| run.p99_ms)).map(|p99_ms| {
            let of = |part: fn(&Run) -> f64| median(candidate.runs.iter().map(part));
            json!({
                "p50_ms": of(|run| run.p50_ms),
                "p99_ms": p99_ms,
                "goodput_rps": of(|run| run.goodput_rps),
                "throughput_rps": of(|run| run.throughput_rps),
                "executor_busy": median(candidate.runs.iter().filter_map(|run| run.busy)),
                "p99_ms_each": candidate.runs.iter().map(|run| run.p99_ms).collect::<Vec<_>>(),
            })
        });
        json!({
            "id": candidate.at,
            "refused": candidate.refused,
            "measured": measured,
            "p99_ratio_predicted": predicted.p99_ms / of_present,
            "p99_ratio_measured": median(ratios),
        })
    };
    candidates.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_those_of_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }
}
