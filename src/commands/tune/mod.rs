//! `ferry tune`: tries settings of a model in virtual time, measures the best of them where a server is named, and says which to take.
//!
//! Always true
//! - Bounded in settings, in time and in requests replayed. A search that ran out of time says so.
//! - A server's policy is put back after measuring, however that ends (live.rs).
//!
//! Elsewhere: which settings, and which of them is chosen (tune), what they give (replay/whatif.rs), what is replayed (source.rs),
//! what is printed (text.rs).

mod live;
mod source;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ferry::clock;
use ferry::load::{Arrival, Lengths};
use ferry::replay::whatif::{Conditions, Recording, Setting};
use ferry::replay::{Hardware, bound};
use ferry::scheduler::cost::Coefficients;
use ferry::scheduler::edges::LengthHistogram;
use ferry::tune::page::{self, Found};
use ferry::tune::search::{Bounds, Search};
use ferry::tune::space::{Point, Space};
use ferry::tune::{Predicted, front};
use ferry::vocab::{ModelHandle, Moment};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::load::{duration, failed, wrong_use};
use super::{EXIT_FAILED, run_each_model_on_one_thread};
use source::Source;

#[derive(clap::Args, Clone, Debug)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["trace", "rate"])))]
pub struct Args {
    /// A trace that `ferry capture` made.
    #[arg(value_name = "TRACE")]
    trace: Option<PathBuf>,
    #[arg(long, value_name = "NAME")]
    model: String,
    /// A described load instead of a trace: requests per second.
    #[arg(long, value_name = "R")]
    rate: Option<f64>,
    /// Of a described load: poisson, constant or burst.
    #[arg(long, default_value = "poisson", requires = "rate")]
    arrival: Arrival,
    /// Lengths of a described load: fixed:64, uniform:8..128, lognormal:MEAN,SIGMA,MAX or file:F.
    #[arg(long, default_value = "fixed:64", value_parser = Lengths::parse, requires = "rate")]
    lengths: Lengths,
    /// Length of a described load.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration, requires = "rate")]
    duration: Duration,
    /// Of a described load: time that each request has.
    #[arg(long, value_name = "D", value_parser = duration, requires = "rate")]
    deadline: Option<Duration>,
    /// What 99 % of the requests have to be answered within. Without it: the model's slo_ms.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    slo: Option<Duration>,
    /// Directory of <name>/model.toml.
    #[arg(long, value_name = "DIR", default_value = "models")]
    models: PathBuf,
    /// Numbers of executors to try beside the present one, such as 1,2,4. They are taken not to slow each other down.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    executors: Vec<u16>,
    /// Settings to try, at most.
    #[arg(long, value_name = "N", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=5000))]
    points: u32,
    /// Time for the search, at most. A setting that is being tried then is finished.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    budget: Duration,
    /// Replays of each setting, with batch times drawn anew; their mean is what is predicted.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    replays: u8,
    /// Of a described load without a server: time for which the model is run here, to learn what batches take.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    warmup: Duration,
    /// Data address of a running server. Of a described load it says what batches take and how the model is set; the best
    /// settings are measured on it.
    #[arg(long, value_name = "ADDR")]
    addr: Option<String>,
    /// The server's control address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601", requires = "addr")]
    control: String,
    /// Settings to measure on the server beside the present one; 0: none.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(0..=16), requires = "addr")]
    confirm: u8,
    /// Measured time of each setting in each round.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration, requires = "addr")]
    confirm_time: Duration,
    /// Rounds of measuring, each with all settings one behind the other; medians are reported.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=99), requires = "addr")]
    confirm_rounds: u8,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    /// Write everything as one HTML file that needs no network.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Why there is no result.
enum Failure {
    Use(String),
    Work(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Failure {
        Failure::Work(message)
    }
}

pub fn run(args: &Args) -> ExitCode {
    // Before anything is said, or it would be said twice.
    if args.rate.is_some()
        && args.addr.is_none()
        && let Err(error) = run_each_model_on_one_thread()
    {
        eprintln!("cannot start again with RAYON_NUM_THREADS=1: {error}");
        return ExitCode::from(EXIT_FAILED);
    }
    match tune(args) {
        Ok(code) => code,
        Err(Failure::Use(message)) => wrong_use(&message),
        Err(Failure::Work(message)) => failed(&message),
    }
}

fn tune(args: &Args) -> Result<ExitCode, Failure> {
    if args.rate.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
        return Err(Failure::Use("--rate: expected a number above 0".into()));
    }
    let source = source::read(args)?;
    let slo = args.slo.unwrap_or(source.present.slo);
    let mut notes = source.notes.clone();
    if source.recording.calls_of(source.model).count() < CALLS_ENOUGH {
        notes.push(format!("of fewer than {CALLS_ENOUGH} requests the p99 is that of a few: capture for longer"));
    }
    if args.slo.is_none() {
        notes.push(format!("no --slo was given: it is the model's slo_ms, {} ms", millis(slo)));
    }
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let Source { mut recording, model, present, cells_auto, text, live: load, .. } = source;
    let space = space(&recording, model, present, slo, &args.executors, &mut notes);
    let started = clock::now();
    fit_into(&mut recording, model, slo, args, threads, &mut notes)?;
    let bounds = Bounds { points_max: args.points as usize, rounds_max: ROUNDS_MAX };
    let mut search = Search::new(space, bounds, millis(slo));
    let replays = Replays { recording: &recording, model, slo, seeds: args.seed..args.seed + u64::from(args.replays) };
    let ended = try_all(&mut search, &replays, args, threads);
    let took_s = clock::now().since(started).as_secs_f64();
    if search.tried().is_empty() {
        return Err(Failure::Work("not even the present setting could be replayed within --budget".into()));
    }
    let found = Found {
        model: &args.model,
        space: search.space(),
        tried: search.tried(),
        slo_ms: millis(slo),
        cells_auto,
        source: text,
        requests: recording.calls(),
        seconds: recording.span().as_secs_f64(),
        bound_rps: bound_of(&recording, model, slo, search.tried().iter().map(|tried| &tried.point)),
        took_s,
        ended,
        notes,
    };
    let live = match (&args.addr, args.confirm) {
        (Some(addr), 1..) => live::confirm(args, addr, &found, &load, slo)?,
        _ => Value::Null,
    };
    let document = found.document(live);
    if let Some(path) = &args.output {
        let page = page::html(&document);
        std::fs::write(path, page).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    if args.json {
        println!("{document}");
    } else {
        print!("{}", text::report(&found, &document));
    }
    Ok(ExitCode::SUCCESS)
}

const ROUNDS_MAX: usize = 64;
/// A search that cannot try so many settings in its time replays fewer requests.
const POINTS_LEAST: f64 = 100.0;
/// From here on more than ten are beyond the p99.
const CALLS_ENOUGH: usize = 1000;
/// Fewer requests than this say nothing of a p99.
const CALLS_LEAST: usize = 500;

fn millis(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e6
}

fn space(
    recording: &Recording,
    model: ModelHandle,
    present: ferry::scheduler::Policy,
    slo: Duration,
    executors: &[u16],
    notes: &mut Vec<String>,
) -> Space {
    let mut lens = LengthHistogram::new(present.buckets.longest());
    let mut least = (1, 1);
    for (_, rows, len) in recording.calls_of(model) {
        lens.observe(Moment::ZERO, len, rows);
        let padded = present.buckets.of(len).map_or(len, |bucket| present.buckets.len_at(bucket));
        least = (least.0.max(rows), least.1.max(u64::from(rows) * u64::from(padded)));
    }
    let mut counts = vec![recording.executors()];
    for count in executors.iter().map(|count| usize::from(*count)) {
        if !counts.contains(&count) && counts[0] > 0 {
            counts.push(count);
        }
    }
    if counts.len() > 1 {
        notes.push("executors are taken not to slow each other down: true while each has a core of its own".into());
    }
    Space::new(present, &lens, slo, least, counts)
}

/// Shortens what is replayed until enough settings can be tried in the time there is.
fn fit_into(
    recording: &mut Recording,
    model: ModelHandle,
    slo: Duration,
    args: &Args,
    threads: usize,
    notes: &mut Vec<String>,
) -> Result<(), Failure> {
    let before = clock::now();
    let conditions = Conditions { executors: None, objective: Some((model, slo)) };
    recording.what_if_under(&conditions, &[], args.seed).map_err(|error| error.to_string())?;
    let one = (clock::now().since(before).as_secs_f64() * f64::from(args.replays)).max(1e-6);
    let wanted = POINTS_LEAST.min(f64::from(args.points));
    let possible = args.budget.as_secs_f64() * threads as f64 / one;
    let all = recording.calls();
    let calls = ((all as f64 * possible / wanted) as usize).max(CALLS_LEAST);
    if calls < all {
        recording.shorten(calls);
        notes.push(format!(
            "only the first {} of {all} requests are replayed, so that {wanted:.0} settings fit into --budget",
            recording.calls()
        ));
    }
    Ok(())
}

/// What a setting is replayed with.
struct Replays<'a> {
    recording: &'a Recording,
    model: ModelHandle,
    slo: Duration,
    seeds: std::ops::Range<u64>,
}

impl Replays<'_> {
    /// None of a setting that cannot be.
    fn predict(&self, name: &str, space: &Space, point: &Point) -> Option<Predicted> {
        let setting = |(key, value): (&str, String)| Setting { model: name.into(), key: key.into(), value };
        let settings: Vec<Setting> = space.settings(point).into_iter().map(setting).collect();
        let executors = (point.executors != space.present().executors).then_some(point.executors);
        let conditions = Conditions { executors, objective: Some((self.model, self.slo)) };
        let predicted: Option<Vec<Predicted>> = (self.seeds.clone())
            .map(|seed| self.recording.what_if_under(&conditions, &settings, seed).ok())
            .map(|report| report.map(|report| Predicted::of(&report, self.model)))
            .collect();
        Predicted::mean(&predicted?)
    }
}

/// Runs the search on all cores. Says why it ended.
fn try_all(search: &mut Search, replays: &Replays<'_>, args: &Args, threads: usize) -> &'static str {
    let bar = ProgressBar::new(args.points.into());
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} settings {msg}");
    bar.set_style(style.expect("the template is valid"));
    let over = clock::now() + args.budget;
    let mut tried = 0;
    let ended = loop {
        let round = search.next_round();
        if round.is_empty() {
            let full = search.given() == args.points as usize;
            break if full { "all of --points were tried" } else { "no better neighbours were found" };
        }
        let results: Mutex<Vec<(usize, Predicted)>> = Mutex::default();
        let (next, late) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let space = search.space();
        std::thread::scope(|scope| {
            for _ in 0..threads.min(round.len()) {
                scope.spawn(|| {
                    while let Some((at, point)) =
                        Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, round.get(at)?)))
                    {
                        // The present one is tried in any case: there is no comparison without it.
                        if clock::now() > over && point != space.present() {
                            late.fetch_add(1, Ordering::Relaxed);
                            continue;
                        }
                        if let Some(predicted) = replays.predict(&args.model, space, point) {
                            results.lock().expect("nobody panics with it").push((at, predicted));
                        }
                        bar.inc(1);
                    }
                });
            }
        });
        search.take(&round, results.into_inner().expect("nobody panics with it"));
        if search.tried().len() > tried {
            tried = search.tried().len();
            let all: Vec<Predicted> = search.tried().iter().map(|tried| tried.predicted).collect();
            let distances: Vec<usize> =
                search.tried().iter().map(|tried| search.space().distance(&tried.point)).collect();
            if let Some(best) = front::choose(&all, millis(replays.slo), &distances) {
                let best = &all[best.at];
                bar.set_message(format!("best: p99 {:.1} ms, {:.1}/s in time", best.p99_ms, best.goodput_rps));
            }
        }
        if late.into_inner() > 0 {
            break "--budget was over";
        }
    };
    bar.finish_and_clear();
    ended
}

/// Requests per second that nobody can exceed within the SLO, with batches as large as any that were tried. None where nothing is
/// known of batch times.
fn bound_of<'a>(
    recording: &Recording,
    model: ModelHandle,
    slo: Duration,
    tried: impl Iterator<Item = &'a Point> + Clone,
) -> Option<f64> {
    let [batch, cell, square] = recording.fit(model);
    let (mut lens, mut requests) = (Vec::new(), 0u64);
    for (_, rows, len) in recording.calls_of(model) {
        requests += 1;
        lens.extend(std::iter::repeat_n(len, rows as usize).take(LENS_MAX.saturating_sub(lens.len())));
    }
    if batch + cell + square <= 0.0 || lens.is_empty() {
        return None;
    }
    let rows: u64 = recording.calls_of(model).map(|(_, rows, _)| u64::from(rows)).sum();
    let hardware = Hardware {
        name: "tuned",
        times: Coefficients { batch, cell, square },
        executors: tried.clone().map(|point| point.executors).max()?.max(1),
        shared: false,
        noise: 0.0,
        rows_max: tried.clone().map(|point| point.rows_max).max()?,
        cells_max: tried.map(|point| point.cells_max).max()?,
        slack: slo,
    };
    Some(bound::by_share(&hardware, &Lengths::List(lens)) * requests as f64 / rows as f64)
}

/// Lengths that the bound is computed of.
const LENS_MAX: usize = 1 << 20;
