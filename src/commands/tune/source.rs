//! What a search replays: a trace, or a load that is described, with what its batches take: as a running server learned it, or as it
//! is measured here by running the model for a while.

use std::fs::File;
use std::io::BufReader;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ferry::capture::{ModelHeader, TraceReader};
use ferry::clock;
use ferry::config::{Config, Machine};
use ferry::executor::cpu::CpuExecutor;
use ferry::executor::worker::{Answers, Worker};
use ferry::load::arrivals::Schedule;
use ferry::load::{Lengths, Mode, Trace};
use ferry::models::manifest::{Manifest, Placement};
use ferry::models::repository::{self, LoadOptions, Loaded, ModelEntry};
use ferry::replay::described::Described;
use ferry::replay::services::Measured;
use ferry::replay::whatif::Recording;
use ferry::scheduler::cost::{self, Work};
use ferry::scheduler::{Group, Policy, QueueLimits};
use ferry::server::policy_of;
use ferry::telemetry::{ModelLabels, Telemetry};
use ferry::vocab::ModelHandle;
use serde_json::Value;

use super::{Args, Failure};
use crate::commands::http;
use crate::commands::load::resolve;

/// What is replayed, and what is known of it.
pub struct Source {
    pub recording: Recording,
    pub model: ModelHandle,
    pub present: Policy,
    /// The manifest leaves the budget of cells to the warm-up.
    pub cells_auto: bool,
    /// For people.
    pub text: String,
    /// The same load for a live server.
    pub live: Load,
    pub notes: Vec<String>,
}

pub struct Load {
    pub mode: Mode,
    pub lengths: Lengths,
    pub deadline: Option<Duration>,
}

pub fn read(args: &Args) -> Result<Source, Failure> {
    match (&args.trace, args.rate) {
        (Some(trace), _) => of_trace(args, trace),
        (None, Some(rate)) => described(args, rate),
        (None, None) => Err(Failure::Use("one of TRACE and --rate is needed".into())),
    }
}

fn of_trace(args: &Args, trace: &std::path::Path) -> Result<Source, Failure> {
    let name = trace.display();
    let file = File::open(trace).map_err(|error| format!("{name}: {error}"))?;
    let reader = TraceReader::open(BufReader::new(file)).map_err(|error| format!("{name}: {error}"))?;
    let recording = Recording::read(reader, args.seed).map_err(|error| format!("{name}: {error}"))?;
    let header = recording.header();
    let Some(model) = header.model(&args.model) else {
        let known: Vec<&str> = header.models.iter().map(|model| model.name.as_str()).collect();
        return Err(Failure::Use(format!("{name} has no model `{}`; it has {}", args.model, known.join(", "))));
    };
    let present = recording.policy(model).map_err(|error| format!("{name}: {error}"))?;
    let mut arrivals = Vec::new();
    for (at, rows, len) in recording.calls_of(model) {
        arrivals.extend(std::iter::repeat_n((at, len), rows as usize));
    }
    if arrivals.is_empty() {
        return Err(Failure::Work(format!("{name} has no request for {}", args.model)));
    }
    let mut notes = Vec::new();
    if let Err(error) = &recording.recorded {
        notes.push(format!("this version does not decide as the one that recorded the trace: {error}"));
    }
    if recording.has_policy_changes() {
        notes.push(
            "policies were changed while it was recorded: the present setting is that at its start, and then theirs"
                .into(),
        );
    }
    if arrivals.len() > recording.calls_of(model).count() {
        notes.push("requests of several rows are measured live as so many requests of one row".into());
    }
    let cells_auto = manifest(args).is_some_and(|manifest| manifest.batching.cells_auto);
    let live =
        Load { mode: Mode::Trace(Trace { arrivals: Arc::new(arrivals) }), lengths: Lengths::Fixed(1), deadline: None };
    Ok(Source { model, present, cells_auto, text: format!("trace {name}"), live, notes, recording })
}

fn manifest(args: &Args) -> Option<Manifest> {
    repository::read_manifest(&args.models, &args.model).ok()
}

/// Requests of a described load, at most.
const ARRIVALS_MAX: usize = 1 << 22;

fn described(args: &Args, rate: f64) -> Result<Source, Failure> {
    let Batches { policy, cells_auto, executors, slots, limits, measured, error, mut notes } = match &args.addr {
        Some(_) => of_server(args)?,
        None => measured_here(args)?,
    };
    let end = u64::try_from(args.duration.as_nanos()).unwrap_or(u64::MAX);
    let moments = Schedule::new(args.arrival, rate, args.seed).take_while(|at| *at <= end).take(ARRIVALS_MAX);
    let arrivals: Vec<(u64, u32)> = moments.zip(args.lengths.sampler(args.seed)).collect();
    if arrivals.is_empty() {
        return Err(Failure::Use(format!("{rate} requests a second for {:?} are none", args.duration)));
    }
    if arrivals.len() == ARRIVALS_MAX {
        notes.push(format!("only the first {ARRIVALS_MAX} requests are replayed"));
    }
    let longest = policy.buckets.longest();
    let clipped = arrivals.iter().filter(|(_, len)| *len > longest).count();
    // A model whose rows have no length counts each as one.
    if clipped > 0 && longest > 1 {
        notes.push(format!("{clipped} requests were longer than the model takes, and were clipped to {longest}"));
    }
    let described = Described {
        model: args.model.clone(),
        policy: policy.clone(),
        executors,
        slots,
        limits,
        arrivals,
        deadline: args.deadline,
        span: args.duration,
        measured,
        error,
        seed: args.seed,
    };
    let text = format!("{} load of {rate} requests a second", args.arrival.name());
    let live = Load {
        mode: Mode::Open { rate, arrival: args.arrival },
        lengths: args.lengths.clone(),
        deadline: args.deadline,
    };
    let (recording, model) = (described.recording(), ModelHandle(0));
    Ok(Source { recording, model, present: policy, cells_auto, text, live, notes })
}

/// How a model is set, who runs it, and what its batches take.
struct Batches {
    policy: Policy,
    cells_auto: bool,
    executors: usize,
    slots: u32,
    limits: QueueLimits,
    measured: Vec<Measured>,
    error: f64,
    notes: Vec<String>,
}

/// From a server's control port.
fn of_server(args: &Args) -> Result<Batches, Failure> {
    let control = resolve(&args.control).map_err(|message| Failure::Use(message.replace("--addr", "--control")))?;
    let ask = |what: &str| ask(control, &format!("/v1/models/{}/{what}", http::segment(&args.model)));
    let (shown, cost) = (ask("policy")?, ask("cost")?);
    let config: toml::Table = toml::from_str(&http::text(control, "/config")?)
        .map_err(|error| format!("control port {control}: /config: {error}"))?;
    let number = |part: &str, key: &str| {
        let value = config.get(part).and_then(|part| part.get(key)).and_then(toml::Value::as_integer);
        value.and_then(|value| u64::try_from(value).ok())
    };
    let numbers = |value: &Value| -> Vec<u32> {
        value.as_array().into_iter().flatten().filter_map(|len| u32::try_from(len.as_u64()?).ok()).collect()
    };
    let manifest = manifest(args);
    let inline = manifest.as_ref().is_some_and(|manifest| manifest.placement == Placement::Inline);
    let knobs = shown["knobs"].as_array().into_iter().flatten();
    let header = ModelHeader {
        name: args.model.clone(),
        group: if inline { Group::Inline } else { Group::Executors },
        buckets: numbers(&shown["buckets"]),
        knobs: knobs.filter_map(|k| Some((k["name"].as_str()?.into(), k["value"].as_str()?.into()))).collect(),
        cost: [0.0; 3],
        error: 0.0,
        observations: 0,
    };
    let (policy, unknown) = header.policy().map_err(|error| format!("the policy of {}: {error}", args.model))?;
    let mut notes = Vec::new();
    if !unknown.is_empty() {
        notes.push(format!("the server has knobs that this version does not know: {}", unknown.join(", ")));
    }
    if manifest.is_none() {
        notes.push(format!(
            "{} has no manifest of {}: that it runs on executors, and in which layouts it can, is taken from its policy",
            args.models.display(),
            args.model
        ));
    }
    let can_pack = policy.can_pack || manifest.is_some_and(|manifest| manifest.bert.is_some());
    let known = cost["known"].as_bool().unwrap_or(false);
    let shapes = cost["predicted"].as_array().into_iter().flatten();
    let measured: Vec<Measured> = shapes
        .filter_map(|shape| {
            let count = |key: &str| u32::try_from(shape[key].as_u64()?).ok();
            let took = Duration::try_from_secs_f64(shape["predicted_us"].as_f64()? / 1e6).ok()?;
            Some(Measured { work: Work::padded(count("rows")?, count("padded_len")?), took })
        })
        .collect();
    if !known || measured.is_empty() {
        return Err(Failure::Work(format!("the server has not learned yet what batches of {} take", args.model)));
    }
    let bound = |key: &str| number("queue", key).unwrap_or(u64::MAX);
    Ok(Batches {
        policy: Policy { can_pack, ..policy },
        cells_auto: false,
        executors: number("threads", "executors").unwrap_or(1) as usize,
        slots: number("executor", "slots").map_or(2, |slots| slots as u32),
        limits: QueueLimits {
            rows_max: bound("rows_max"),
            cells_max: bound("cells_max"),
            bytes_max: bound("bytes_max"),
        },
        measured,
        error: cost["error_ratio"].as_f64().unwrap_or(0.0),
        notes,
    })
}

/// A document of a server's control port.
pub fn ask(control: SocketAddr, path: &str) -> Result<Value, Failure> {
    match http::request(control, "GET", path, None)? {
        (200, answer) => Ok(answer),
        (404, answer) => Err(Failure::Use(answer["error"].as_str().unwrap_or("not found").to_owned())),
        (status, answer) => {
            let why = answer["error"].as_str().unwrap_or("no reason");
            Err(Failure::Work(format!("control port {control}: {path}: {why} ({status})")))
        }
    }
}

/// By loading the model and running batches of it.
fn measured_here(args: &Args) -> Result<Batches, Failure> {
    let loaded = repository::load(&args.models, &args.model, &LoadOptions::default()).map_err(|e| e.to_string())?;
    let entry = match loaded {
        Loaded::Model(entry) => entry,
        Loaded::Skipped(skipped) => return Err(Failure::Work(format!("model {}: {}", skipped.name, skipped.reason))),
    };
    let config = Config::default_on(Machine::here());
    let mut policy = policy_of(&entry.manifest, entry.model.layouts());
    let mut warm = Warm::new(&entry)?;
    let cells_auto = entry.manifest.batching.cells_auto;
    if cells_auto {
        let curve: Result<Vec<(u64, Duration)>, Failure> = entry
            .manifest
            .batching
            .curve()
            .into_iter()
            .map(|(rows, len)| Ok((u64::from(rows) * u64::from(len), warm.run(&policy, rows, len)?)))
            .collect();
        let budget = cost::budget(&curve?).unwrap_or(policy.cells_max);
        policy.cells_max = budget.clamp(policy.buckets.longest().into(), policy.cells_max);
    }
    let measured = warm.measure(args, &policy)?;
    let queue = &config.queue;
    Ok(Batches {
        cells_auto,
        executors: config.threads.executors,
        slots: config.executor.slots,
        limits: QueueLimits { rows_max: queue.rows_max.into(), cells_max: queue.cells_max, bytes_max: queue.bytes_max },
        notes: vec![format!("what batches take was measured here, alone, by {} of them", measured.len())],
        measured,
        error: 0.0,
        policy,
    })
}

/// An executor of this process.
struct Warm {
    worker: Worker,
}

impl Warm {
    fn new(entry: &ModelEntry) -> Result<Warm, Failure> {
        let contract = entry.model.contract().clone();
        let label = ModelLabels { name: contract.name.clone(), version: contract.version.clone() };
        let executor = CpuExecutor::new(vec![Arc::clone(&entry.model)], &[true]).map_err(|error| error.to_string())?;
        let answers = Answers {
            index: 0,
            contracts: vec![Arc::new(contract)],
            shards: Vec::new(),
            telemetry: Telemetry::new(&[label], 0, 1),
        };
        Ok(Warm { worker: Worker::new(answers, Box::new(executor)) })
    }

    fn run(&mut self, policy: &Policy, rows: u32, len: u32) -> Result<Duration, Failure> {
        let times = self.worker.warm(ModelHandle(0), policy.layout, &[(rows, len)]);
        let times = times.map_err(|refusal| format!("a batch of {rows} rows of {len}: {}", refusal.message))?;
        Ok(times[0])
    }

    /// Batches of all sizes that may come, again and again until the time is over; the smaller ones first.
    fn measure(&mut self, args: &Args, policy: &Policy) -> Result<Vec<Measured>, Failure> {
        let shapes = shapes(policy, args.lengths.sampler(args.seed).take(1000).collect());
        let over = clock::now() + args.warmup;
        let mut measured = Vec::new();
        while measured.len() < MEASURED_MAX {
            for (rows, len) in &shapes {
                if clock::now() > over && measured.len() >= MEASURED_LEAST.min(shapes.len()) {
                    return Ok(measured);
                }
                measured.push(Measured { work: Work::padded(*rows, *len), took: self.run(policy, *rows, *len)? });
            }
        }
        Ok(measured)
    }
}

const MEASURED_MAX: usize = 1 << 14;
const MEASURED_LEAST: usize = 8;
/// Batches are measured up to so many times the present budget.
const GROWTH: u64 = 4;

/// Rows and lengths, the least cells first: lengths as they come, and batches from one row to more than the budget of today.
fn shapes(policy: &Policy, mut lens: Vec<u32>) -> Vec<(u32, u32)> {
    let longest = policy.buckets.longest();
    lens.sort_unstable();
    let quantile = |share: f64| lens[((lens.len() - 1) as f64 * share) as usize].clamp(1, longest);
    let mut picked: Vec<u32> = [0.05, 0.25, 0.5, 0.75, 0.95].map(quantile).into();
    picked.push(longest.min(lens[lens.len() - 1].max(1)));
    picked.dedup();
    let cells = policy.cells_max.min(u64::from(policy.rows_max) * u64::from(longest)) * GROWTH;
    let mut shapes = Vec::new();
    for len in picked {
        let most = (cells / u64::from(len)).clamp(1, 2 * u64::from(policy.rows_max)) as u32;
        let mut rows = 1;
        while rows < most {
            shapes.push((rows, len));
            rows *= 2;
        }
        shapes.push((most, len));
    }
    shapes.sort_unstable_by_key(|(rows, len)| (u64::from(*rows) * u64::from(*len), *len));
    shapes
}

#[cfg(test)]
mod tests {
    use ferry::scheduler::Buckets;

    use super::*;

    #[test]
    fn batches_of_all_sizes_are_measured_and_none_that_could_not_be() {
        let policy = Policy::new(64, 512, Buckets::geometric(256));
        let shapes = shapes(&policy, (1..=300).collect());
        assert!(shapes.len() > 20, "{shapes:?}");
        for (rows, len) in &shapes {
            assert!(*rows >= 1 && (1..=256).contains(len), "{rows}×{len}");
            assert!(*rows == 1 || u64::from(*rows) * u64::from(*len) <= 4 * 512);
            assert!(*rows <= 128);
        }
        assert!(shapes.contains(&(1, 256)), "the longest");
        assert!(shapes.is_sorted_by_key(|(rows, len)| u64::from(*rows) * u64::from(*len)));
        let one = self::shapes(&Policy::new(1, 1, Buckets::geometric(1)), vec![5]);
        assert_eq!(one, [(1, 1), (2, 1)]);
    }
}
