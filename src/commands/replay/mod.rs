//! `ferry replay`: the scheduler in virtual time. Of a trace: whether it decides again what it decided, and what it would
//! have decided with other settings. Without one: how policies compare.

mod compare;
mod gate;
mod report;

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ferry::capture::{CaptureEnd, TraceReader};
use ferry::replay::exact::{self, ReplayError, Verified};
use ferry::replay::whatif::{Recording, Setting};
use ferry::scheduler::knobs::KNOBS;
use serde_json::json;

use super::EXIT_FAILED;
use super::load::{failed, wrong_use};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// A trace that `ferry capture` made.
    #[arg(value_name = "TRACE", required_unless_present_any = ["compare", "knobs", "gate"])]
    trace: Option<PathBuf>,
    /// What if: sets a knob of a model for the replay, such as minilm.rows_max=16; `*` names all models; can be repeated.
    #[arg(long = "set", value_name = "MODEL.KEY=VALUE", conflicts_with = "compare")]
    sets: Vec<String>,
    /// What if nothing were set: shows how close the simulation comes to what was recorded.
    #[arg(long, conflicts_with = "compare")]
    what_if: bool,
    /// Lists the knobs that --set takes.
    #[arg(long, exclusive = true)]
    knobs: bool,
    /// Compare the policies: how much load each carries with 99 % of the requests on time, as a share of what no scheduler
    /// can exceed. Baselines are tuned for each row; `cost` has one default.
    #[arg(long, conflicts_with = "trace")]
    compare: bool,
    /// Fewer calls and coarser steps: minutes become seconds.
    #[arg(long, requires = "compare")]
    quick: bool,
    /// Only rows whose name contains this, e.g. "gpu lognormal poisson".
    #[arg(long, value_name = "TEXT", default_value = "", requires = "compare")]
    rows: String,
    /// Replay a library of traces and compare with the figures that FILE keeps of them: fails where p99, time on executors, padding,
    /// fairness or order got worse.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["trace", "compare"])]
    gate: Option<PathBuf>,
    /// Write this build's figures into the gate's file.
    #[arg(long, requires = "gate")]
    write: bool,
    /// Compare with what another build of this program makes of the traces, and show the first decision that differs.
    #[arg(long, value_name = "BINARY", requires = "gate", conflicts_with = "write")]
    against: Option<PathBuf>,
    /// Print the trace's figures and each decision as the gate sees them.
    #[arg(long, conflicts_with_all = ["compare", "what_if", "sets", "gate"])]
    decisions: bool,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> ExitCode {
    if args.knobs {
        for knob in KNOBS {
            let unit = if knob.unit.is_empty() { String::new() } else { format!(" ({})", knob.unit) };
            println!("{}{unit}: {}\n    {}", knob.name, knob.meaning, knob.range);
        }
        return ExitCode::SUCCESS;
    }
    if let Some(file) = &args.gate {
        return gate::run(file, args.write, args.against.as_ref(), args.seed, args.json);
    }
    let Some(trace) = &args.trace else { return compare::run(args.quick, &args.rows, args.seed, args.json) };
    if args.decisions {
        return gate::decisions(trace, args.seed);
    }
    let sets: Result<Vec<Setting>, String> = args.sets.iter().map(|set| Setting::parse(set)).collect();
    match sets {
        Err(message) => wrong_use(&message),
        Ok(sets) if args.what_if || !sets.is_empty() => what_if(trace, &sets, args.seed, args.json),
        Ok(_) => verify(trace, args.json),
    }
}

fn open(trace: &Path) -> Result<TraceReader<BufReader<File>>, String> {
    let name = trace.display();
    let file = File::open(trace).map_err(|error| format!("{name}: {error}"))?;
    TraceReader::open(BufReader::new(file)).map_err(|error| format!("{name}: {error}"))
}

fn end_of(end: CaptureEnd) -> &'static str {
    match end {
        CaptureEnd::Complete => "complete",
        _ => "cut short",
    }
}

/// Whether the scheduler decides again what it decided.
fn verify(trace: &Path, json: bool) -> ExitCode {
    let mut reader = match open(trace) {
        Ok(reader) => reader,
        Err(message) => return failed(&message),
    };
    let outcome = exact::replay(&mut reader, &mut ());
    match outcome {
        Ok(verified) => {
            if json {
                println!(
                    "{}",
                    json!({
                        "equal": true,
                        "replay": counts(&verified, reader.bytes()),
                        "regret": report::regret_json(&verified.report.regret, &verified.report.models),
                    })
                );
            } else {
                let Verified { arrivals, cancels, batches, turns, checkpoints, decisions, hash, .. } = verified;
                let each = reader.bytes() as f64 / arrivals.max(1) as f64;
                println!(
                    "{:.1} s, {arrivals} requests, {cancels} cancels, {batches} batches, {turns} turns; {} bytes, {each:.1} a \
                     request; {}",
                    verified.span.as_secs_f64(),
                    reader.bytes(),
                    end_of(verified.end)
                );
                println!("equal: {} decisions, {checkpoints} checkpoints, hash {hash:016x}", verified.report.decisions);
                println!("since the server's start: {decisions} decisions");
                println!("{}", report::regret_text(&verified.report.regret, &verified.report.models));
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            if json {
                println!("{}", json!({ "equal": false, "difference": difference(&error) }));
            }
            eprintln!("{}: {error}", trace.display());
            if matches!(error, ReplayError::State(_)) {
                eprintln!("its requests can still be replayed with --what-if");
            }
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn difference(error: &ReplayError) -> serde_json::Value {
    match error {
        ReplayError::Differs(difference) => json!({
            "equal_decisions": difference.equal,
            "noticed_at_decision": difference.noticed,
            "what": difference.what,
        }),
        error => json!({ "what": error.to_string() }),
    }
}

fn counts(verified: &Verified, bytes: u64) -> serde_json::Value {
    json!({
        "requests": verified.arrivals,
        "cancels": verified.cancels,
        "batches": verified.batches,
        "turns": verified.turns,
        "checkpoints": verified.checkpoints,
        "decisions": verified.report.decisions,
        "hash": format!("{:016x}", verified.hash),
        "seconds": verified.span.as_secs_f64(),
        "bytes": bytes,
        "end": verified.end.name(),
    })
}

/// What would have come of the requests with other settings.
fn what_if(trace: &Path, sets: &[Setting], seed: u64, json: bool) -> ExitCode {
    let reader = match open(trace) {
        Ok(reader) => reader,
        Err(message) => return failed(&message),
    };
    let recording = match Recording::read(reader, seed) {
        Ok(recording) => recording,
        Err(error) => return failed(&format!("{}: {error}", trace.display())),
    };
    let run = |sets: &[Setting]| recording.what_if(sets, seed);
    // Settings first: a wrong one is told before anything takes its time.
    let changed = if sets.is_empty() { Ok(None) } else { run(sets).map(Some) };
    let outcome = changed.and_then(|changed| Ok((run(&[])?, changed)));
    let (unchanged, changed) = match outcome {
        Ok(reports) => reports,
        Err(ReplayError::Setting(message)) => return wrong_use(&message),
        Err(error) => return failed(&error.to_string()),
    };
    if let Err(error) = &recording.recorded {
        eprintln!("the recorded run cannot be shown: {error}");
    }
    let mut runs = Vec::new();
    if let Ok(verified) = &recording.recorded {
        runs.push(("recorded", &verified.report));
    }
    runs.push(("simulated", &unchanged));
    if let Some(changed) = &changed {
        runs.push(("changed", changed));
    }
    if json {
        let reports: serde_json::Map<String, serde_json::Value> =
            runs.iter().map(|(name, report)| ((*name).to_owned(), report::json(report))).collect();
        let sets: Vec<String> = sets.iter().map(|set| format!("{}.{}={}", set.model, set.key, set.value)).collect();
        let seconds = recording.span().as_secs_f64();
        println!("{}", json!({ "seconds": seconds, "seed": seed, "sets": sets, "runs": reports }));
    } else {
        print!("{}", report::text(&runs));
    }
    ExitCode::SUCCESS
}
