//! `ferry replay --gate FILE`: a library of traces against the figures that the file keeps, or against another build.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use ferry::replay::gate::{Regression, TraceFigures, compare, first_difference, line};
use ferry::replay::whatif::Recording;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::super::EXIT_FAILED;
use super::super::load::failed;

/// Lines of decisions kept of a trace: beyond them a first difference is not looked for.
const LINES_MAX: usize = 1 << 20;

/// The file: traces beside it, by name, and what they came to.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Library {
    traces: BTreeMap<String, TraceFigures>,
}

/// What this build makes of a trace.
pub struct Outcome {
    pub figures: TraceFigures,
    pub decisions: Vec<String>,
}

/// Offers a trace's requests to a fresh scheduler.
pub fn run_trace(trace: &Path, seed: u64) -> Result<Outcome, String> {
    let named = |error: String| format!("{}: {error}", trace.display());
    let recording = Recording::read(super::open(trace)?, seed).map_err(|error| named(error.to_string()))?;
    let models: Vec<String> = recording.header().models.iter().map(|model| model.name.clone()).collect();
    let mut decisions = Vec::new();
    let (report, hash) = recording
        .fresh(seed, |decision| {
            if decisions.len() < LINES_MAX {
                decisions.push(line(decision, &models));
            }
        })
        .map_err(|error| named(error.to_string()))?;
    Ok(Outcome { figures: TraceFigures::of(&report, hash), decisions })
}

/// Prints what this build decides of a trace, for another build to compare with.
pub fn decisions(trace: &Path, seed: u64) -> ExitCode {
    match run_trace(trace, seed) {
        Ok(outcome) => {
            let figures = serde_json::to_string(&outcome.figures).expect("plain data");
            println!("{figures}");
            outcome.decisions.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(message) => failed(&message),
    }
}

pub fn run(file: &Path, write: bool, against: Option<&PathBuf>, seed: u64, json: bool) -> ExitCode {
    match gate(file, write, against, seed, json) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_FAILED),
        Err(message) => failed(&message),
    }
}

fn gate(file: &Path, write: bool, against: Option<&PathBuf>, seed: u64, json: bool) -> Result<bool, String> {
    let named = |error: String| format!("{}: {error}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| named(error.to_string()))?;
    let mut library: Library = serde_json::from_str(&text).map_err(|error| named(error.to_string()))?;
    if library.traces.is_empty() {
        return Err(named("it names no trace: expected {\"traces\": {\"NAME\": {…}}}".into()));
    }
    let folder = file.parent().unwrap_or(Path::new("."));
    let (mut passed, mut results) = (true, Vec::new());
    for (name, kept) in &mut library.traces {
        if kept.models.is_empty() && !write && against.is_none() {
            return Err(named(format!("it keeps no figures of {name}: --write them with the build to compare with")));
        }
        let trace = folder.join(name);
        let now = run_trace(&trace, seed)?;
        let (before, log) = match against {
            Some(binary) => other_build(binary, &trace, seed)?,
            None => (kept.clone(), None),
        };
        let worse = if write { Vec::new() } else { compare(&before, &now.figures) };
        let log: Option<Vec<&str>> = log.as_ref().map(|log: &Vec<String>| log.iter().map(String::as_str).collect());
        let differs = log.and_then(|log| first_difference(log, now.decisions.iter().map(String::as_str)).map(owned));
        passed &= worse.is_empty();
        if !json {
            show(name, &before, &now.figures, &worse, differs.as_ref(), against.is_some());
        }
        results.push(json!({
            "trace": name,
            "passed": worse.is_empty(),
            "decisions_equal": before.hash == now.figures.hash,
            "before": before,
            "after": now.figures,
            "regressions": worse.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "first_difference": differs.map(|(number, one, other)| json!({ "decision": number, "before": one, "after": other })),
        }));
        *kept = now.figures;
    }
    if json {
        println!("{}", json!({ "passed": passed, "traces": results }));
    }
    if write {
        let text = serde_json::to_string_pretty(&library).expect("plain data");
        std::fs::write(file, text + "\n").map_err(|error| named(error.to_string()))?;
    }
    Ok(passed)
}

type Difference = (usize, Option<String>, Option<String>);

fn owned((number, one, other): (usize, Option<&str>, Option<&str>)) -> Difference {
    (number, one.map(str::to_owned), other.map(str::to_owned))
}

fn show(
    name: &str,
    before: &TraceFigures,
    after: &TraceFigures,
    worse: &[Regression],
    differs: Option<&Difference>,
    has_other: bool,
) {
    let verdict = if worse.is_empty() { "passed" } else { "FAILED" };
    let same = if before.hash == after.hash { "the same as before" } else { "others than before" };
    println!("{name}: {verdict}; {} decisions, {same}", after.decisions);
    for (model, figures) in &after.models {
        println!(
            "  {model}: {} requests, {:.2} % on time, p50 {:.3} ms, p99 {:.3} ms, waste {:.2} %, fill {:.2} %",
            figures.requests,
            100.0 * figures.on_time_share,
            figures.p50_ms,
            figures.p99_ms,
            100.0 * figures.padding_waste,
            100.0 * figures.fill_ratio
        );
    }
    worse.iter().for_each(|one| println!("  worse: {one}"));
    match differs {
        Some((number, one, other)) => {
            let text = |line: &Option<String>| line.clone().unwrap_or_else(|| "nothing more".into());
            println!("  first difference: decision {number}\n    before: {}\n    now:    {}", text(one), text(other));
        }
        None if before.hash != after.hash && !has_other => {
            println!("  --against BINARY shows the first decision that differs");
        }
        None => {}
    }
}

/// What another build of this program makes of a trace.
fn other_build(binary: &Path, trace: &Path, seed: u64) -> Result<(TraceFigures, Option<Vec<String>>), String> {
    let named = |error: &str| format!("{}: {error}", binary.display());
    let seed = seed.to_string();
    let output = Command::new(binary)
        .args(["replay", "--decisions", "--seed", &seed])
        .arg(trace)
        .output()
        .map_err(|error| named(&error.to_string()))?;
    if !output.status.success() {
        return Err(named(String::from_utf8_lossy(&output.stderr).trim()));
    }
    let text = String::from_utf8(output.stdout).map_err(|_| named("it printed no text"))?;
    let mut lines = text.lines();
    let figures = serde_json::from_str(lines.next().unwrap_or_default()).map_err(|error| named(&error.to_string()))?;
    Ok((figures, Some(lines.map(str::to_owned).collect())))
}
