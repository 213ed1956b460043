//! The configuration, checked: what the server may assume about every number it is given.
//!
//! Always true
//! - A [`Config`] that came from [`Config::load`] has every key inside its bounds and no two keys that contradict
//!   each other. All mistakes are reported together, each with where it was written.
//! - Each key is declared once, in limits.rs, with its bounds and what it trades. Its default is in
//!   [`Config::default`] and nowhere else; the dump and the documentation are made from the same table.
//! - Nothing here starts, binds or allocates by what it read: that the machine can carry it is asked in
//!   frontend/preflight.rs.
//!
//! Elsewhere: what defaults follow from (machine.rs), keys as written, with their lines (file.rs); per-model settings (models/, in each manifest).

pub mod file;
pub mod limits;
mod machine;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use file::Origin;
use limits::SETTINGS;
pub use machine::Machine;

use crate::timeline::breach::BreachRule;
use crate::tls::{ClientAuth, ServerFiles};

/// Everything that can be configured, as the rooms' options are built from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Data port.
    pub listen: SocketAddr,
    /// Control port: health, metrics, drain.
    pub control: SocketAddr,
    /// Directory of `<name>/model.toml`.
    pub models: PathBuf,
    /// Directory where what was learned is kept; none: nowhere.
    pub state: Option<PathBuf>,
    /// Lets either port listen beyond this machine although there is no authentication.
    pub allow_unauthenticated: bool,
    /// How long accepted requests may take to finish once a drain began.
    pub drain_timeout: Duration,
    /// For how long of it what waits is served, instead of handed back.
    pub drain_queue: Duration,
    pub threads: Threads,
    pub frontend: Frontend,
    pub abuse: Abuse,
    pub quota: Quota,
    pub queue: Queue,
    pub executor: Executor,
    pub recorder: Recorder,
    pub otel: Otel,
    pub tls: Tls,
    /// File of tenants; none: nobody has to prove anything.
    pub tenants: Option<PathBuf>,
    /// The control port wants a token, too.
    pub control_auth: bool,
    pub log: Log,
}

/// How connections are encrypted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tls {
    /// None: not at all.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub client_ca: Option<PathBuf>,
    pub client_auth: ClientAuth,
}

impl Config {
    /// The files that connections are encrypted by, if they are.
    pub fn tls_files(&self) -> Option<ServerFiles> {
        let Tls { certificate, key, client_ca, client_auth } = self.tls.clone();
        Some(ServerFiles { certificate: certificate?, key: key?, client_ca, client_auth })
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Threads {
    pub shards: usize,
    pub executors: usize,
    pub tokenizers: usize,
    pub pin: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Frontend {
    pub connections_max: u32,
    pub credit_requests: u32,
    pub credit_bytes: u64,
    pub payload_bytes_max: u32,
    pub output_bytes_max: u32,
    pub output_bytes_total_max: u64,
    pub hello_timeout: Duration,
    pub frame_timeout: Duration,
    pub stall_timeout: Duration,
    pub idle_timeout: Duration,
    pub spin: Duration,
}

/// What waste costs a connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Abuse {
    pub points: u32,
    pub points_per_second: u32,
    pub ban: Duration,
    pub ban_loopback: bool,
}

/// What a tenant without figures of its own may use; 0: as much as it likes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quota {
    pub requests_per_second: u64,
    pub rows_per_second: u64,
    pub cells_per_second: u64,
    pub bytes_per_second: u64,
    pub in_flight_max: u32,
    pub connections_max: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Queue {
    pub rows_max: u32,
    pub cells_max: u64,
    pub bytes_max: u64,
}

/// Where batches run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Place {
    #[default]
    Cpu,
    /// GPUs by their numbers, in turn to the executors.
    Cuda(Vec<u16>),
    /// The simulated device, for tests of everything around one.
    Sim {
        seed: u64,
        /// After so many operations it is lost, as a GPU is that fails.
        lost_after: Option<u64>,
    },
}

impl Place {
    /// From `cpu`, `cuda`, `cuda:0,1`, `sim:7` or `sim:7:5000`.
    pub fn parse(text: &str) -> Option<Place> {
        match text.split_once(':') {
            None if text == "cpu" => Some(Place::Cpu),
            None if text == "cuda" => Some(Place::Cuda(vec![0])),
            Some(("cuda", numbers)) => {
                let numbers: Vec<u16> = numbers.split(',').map(|number| number.parse().ok()).collect::<Option<_>>()?;
                let twice = (1..numbers.len()).any(|at| numbers[..at].contains(&numbers[at]));
                (!twice).then_some(Place::Cuda(numbers))
            }
            Some(("sim", numbers)) => {
                let (seed, lost_after) = match numbers.split_once(':') {
                    Some((seed, operations)) => (seed, Some(operations.parse().ok()?)),
                    None => (numbers, None),
                };
                Some(Place::Sim { seed: seed.parse().ok()?, lost_after })
            }
            _ => None,
        }
    }

    /// How many devices that is.
    pub fn devices(&self) -> usize {
        match self {
            Place::Cpu | Place::Sim { .. } => 1,
            Place::Cuda(numbers) => numbers.len(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Cpu => f.write_str("cpu"),
            Place::Cuda(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(u16::to_string).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
            Place::Sim { seed, lost_after: None } => write!(f, "sim:{seed}"),
            Place::Sim { seed, lost_after: Some(operations) } => write!(f, "sim:{seed}:{operations}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Executor {
    pub device: Place,
    /// Device memory for captured graphs, each executor; 0: none are captured.
    pub graph_bytes_max: u64,
    pub slots: u32,
    /// Threads that share a batch.
    pub threads: u32,
    /// One row in so many is run again, alone, and compared; 0: none.
    pub canary_every: u32,
    /// A batch that runs for longer is given up. Zero: never.
    pub hang_timeout: Duration,
    /// Executor threads that are started, in all, in the place of those that hang.
    pub replacements_max: u32,
    /// Requests that are remembered for having made their model fail; 0: none.
    pub quarantine_max: u32,
    pub quarantine: Duration,
}

/// What is kept of the last batches.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorder {
    /// Batches; 0: nothing is kept.
    pub batches: u32,
    /// Where it is kept when an objective was missed; none: below `state`, or nowhere.
    pub directory: Option<PathBuf>,
    pub breach: BreachRule,
    /// Least time between two files.
    pub interval: Duration,
    pub files_max: u32,
    /// Memory for the scheduler's last inputs, kept with such a file; 0: none are recorded.
    pub trace_bytes_max: u64,
}

/// Where metrics and traces are sent by OTLP.
#[derive(Clone, Debug, PartialEq)]
pub struct Otel {
    /// None: nowhere, and nothing is recorded.
    pub endpoint: Option<String>,
    pub protocol: OtelProtocol,
    pub sample_ratio: f64,
    pub interval: Duration,
    pub service_name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtelProtocol {
    Grpc,
    HttpProtobuf,
}

impl OtelProtocol {
    pub fn name(self) -> &'static str {
        match self {
            OtelProtocol::Grpc => "grpc",
            OtelProtocol::HttpProtobuf => "http/protobuf",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    pub format: LogFormat,
    pub level: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

impl LogFormat {
    pub fn name(self) -> &'static str {
        match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }
}

impl Default for Config {
    fn default() -> Config {
        Config::default_on(Machine::here())
    }
}

impl Config {
    /// The defaults on a given machine.
    pub fn default_on(machine: Machine) -> Config {
        let shards = (machine.cores / 4).max(1);
        let payload = crate::wire::Limits::DEFAULT.payload_bytes;
        // What waits, what is on its way in and what is on its way out may each come to this; the rest is for models and batches.
        let share = (machine.memory / 4).min(1 << 30);
        Config {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7600)),
            control: SocketAddr::from((Ipv4Addr::LOCALHOST, 7601)),
            models: PathBuf::from("models"),
            state: None,
            allow_unauthenticated: false,
            drain_timeout: Duration::from_secs(30),
            drain_queue: Duration::from_secs(20),
            threads: Threads { shards, executors: machine.cores, tokenizers: 1, pin: true },
            frontend: Frontend {
                connections_max: limits::connections_default(machine.nofile),
                credit_requests: 256,
                credit_bytes: 64 << 20,
                payload_bytes_max: payload,
                output_bytes_max: 4 << 20,
                output_bytes_total_max: share.max((shards as u64) << 24),
                hello_timeout: Duration::from_secs(3),
                frame_timeout: Duration::from_secs(5),
                stall_timeout: Duration::from_secs(10),
                idle_timeout: Duration::from_secs(300),
                spin: Duration::ZERO,
            },
            abuse: Abuse { points: 1000, points_per_second: 100, ban: Duration::from_secs(10), ban_loopback: false },
            quota: Quota::default(),
            queue: Queue { rows_max: 65_536, cells_max: 1 << 24, bytes_max: share.max(payload.into()) },
            executor: Executor {
                device: Place::Cpu,
                graph_bytes_max: 256 << 20,
                slots: 2,
                threads: 1,
                canary_every: 1000,
                hang_timeout: Duration::from_secs(60),
                replacements_max: 8,
                quarantine_max: 1024,
                quarantine: Duration::from_secs(60),
            },
            recorder: Recorder {
                batches: 4096,
                directory: None,
                breach: BreachRule::P99,
                interval: Duration::from_secs(60),
                files_max: 8,
                trace_bytes_max: 0,
            },
            otel: Otel {
                endpoint: None,
                protocol: OtelProtocol::HttpProtobuf,
                sample_ratio: 0.01,
                interval: Duration::from_secs(10),
                service_name: "ferry".into(),
            },
            tls: Tls::default(),
            tenants: None,
            control_auth: false,
            log: Log { format: LogFormat::Text, level: "info".into() },
        }
    }

    /// Reads a file (none: only defaults), then applies `key=value` settings in their order, then checks all of it.
    pub fn load(path: Option<&Path>, sets: &[String]) -> Result<Config, ConfigErrors> {
        Config::load_on(Machine::here(), path, sets)
    }

    /// [`Config::load`], with the machine that defaults come from as an argument.
    pub fn load_on(machine: Machine, path: Option<&Path>, sets: &[String]) -> Result<Config, ConfigErrors> {
        let mut errors = Vec::new();
        let mut written = Vec::new();
        if let Some(path) = path {
            match std::fs::read_to_string(path) {
                Ok(text) => written.extend(file::read(&path.display().to_string(), &text, &mut errors)),
                Err(error) => {
                    let origin = Origin::File { path: path.display().to_string(), line: 0 };
                    errors.push(ConfigError::new(origin, format!("cannot read it: {error}")));
                }
            }
        }
        for set in sets {
            written.extend(file::read_set(set, &mut errors));
        }
        let mut config = Config::default_on(machine);
        let was_written = |key: &str| written.iter().any(|item| item.key == key);
        let (slots_written, executors_written) = (was_written("executor.slots"), was_written("threads.executors"));
        for item in written {
            match limits::setting(&item.key) {
                None => errors.push(ConfigError::new(item.origin, limits::unknown_key(&item.key))),
                Some(setting) => {
                    if let Err(message) = setting.write(&mut config, &item.value) {
                        errors.push(ConfigError::new(item.origin, message));
                    }
                }
            }
        }
        if config.executor.device != Place::Cpu {
            // One uploads, one computes, one reads back; and a queue of a device runs its batches without a gap by itself.
            if !slots_written {
                config.executor.slots = 3;
            }
            if !executors_written {
                config.threads.executors = config.executor.device.devices();
            }
        }
        // A contradiction is only worth reading when both numbers are the ones that were meant.
        if errors.is_empty() {
            errors.extend(
                limits::contradictions(&config).into_iter().map(|message| ConfigError { origin: None, message }),
            );
        }
        if errors.is_empty() { Ok(config) } else { Err(ConfigErrors(errors)) }
    }

    /// Where the flight recorder is kept by itself, if anywhere.
    pub fn recorder_directory(&self) -> Option<PathBuf> {
        let below = || Some(self.state.as_ref()?.join("timelines"));
        self.recorder.directory.clone().or_else(below).filter(|_| self.recorder.batches > 0)
    }

    /// Every bound that is a number, by its key: what `Telemetry::publish_limits` exports.
    pub fn limits(&self) -> Vec<(String, u64)> {
        SETTINGS.iter().filter_map(|setting| Some((setting.key.to_owned(), setting.json(self).as_u64()?))).collect()
    }

    /// The effective configuration as a file that loads to the same values, each key with what it trades.
    pub fn to_toml(&self) -> String {
        let mut text = String::from("# Effective configuration of ferry: every key, default or set.\n");
        let mut section = "";
        for setting in SETTINGS {
            let (table, key) = setting.key.rsplit_once('.').unwrap_or(("", setting.key));
            if table != section {
                text += &format!("\n[{table}]\n");
                section = table;
            }
            for line in setting.about.lines() {
                text += &format!("# {}\n", line.trim());
            }
            text += &format!("{key} = {}\n", setting.read(self));
        }
        text
    }
}

/// One mistake: where it was written, what was expected and what came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// None for a contradiction between keys, which may have been written in two places.
    pub origin: Option<Origin>,
    pub message: String,
}

impl ConfigError {
    fn new(origin: Origin, message: impl Into<String>) -> ConfigError {
        ConfigError { origin: Some(origin), message: message.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Some(origin) => write!(f, "{origin}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// All mistakes of a configuration, in the order they were met. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
