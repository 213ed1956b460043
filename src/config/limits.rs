//! Every bound of the server: its key, what it trades, the values it takes, and the memory that all of them imply.
//!
//! Always true
//! - [`SETTINGS`] has each key of the configuration exactly once; there is no other way to write a [`Config`] field
//!   from a file.
//! - A number in the file has its unit in its key (`_ms`, `_us`, `bytes`).
//!
//! Elsewhere: defaults (mod.rs), limits of the wire that no configuration can raise (wire/frame.rs).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::file::Value;
use super::{Config, LogFormat, OtelProtocol, Place};
use crate::timeline::Ring;
use crate::timeline::breach::BreachRule;
use crate::tls::ClientAuth;
use crate::wire::Limits as WireLimits;

/// How a value is written, which values are allowed, and the field it goes to.
#[derive(Clone, Copy)]
pub enum Access {
    U32 {
        min: u32,
        max: u32,
        at: fn(&mut Config) -> &mut u32,
    },
    U64 {
        min: u64,
        max: u64,
        at: fn(&mut Config) -> &mut u64,
    },
    Count {
        min: usize,
        max: usize,
        at: fn(&mut Config) -> &mut usize,
    },
    Millis {
        min: u64,
        max: u64,
        at: fn(&mut Config) -> &mut Duration,
    },
    Micros {
        min: u64,
        max: u64,
        at: fn(&mut Config) -> &mut Duration,
    },
    Bool(fn(&mut Config) -> &mut bool),
    Addr(fn(&mut Config) -> &mut SocketAddr),
    Path(fn(&mut Config) -> &mut PathBuf),
    /// Empty: none.
    PathOrNone(fn(&mut Config) -> &mut Option<PathBuf>),
    Place(fn(&mut Config) -> &mut Place),
    Breach(fn(&mut Config) -> &mut BreachRule),
    /// From 0 to 1.
    Share(fn(&mut Config) -> &mut f64),
    /// `http://HOST:PORT`; empty: none.
    EndpointOrNone(fn(&mut Config) -> &mut Option<String>),
    Otlp(fn(&mut Config) -> &mut OtelProtocol),
    ClientAuth(fn(&mut Config) -> &mut ClientAuth),
    /// At most 128 bytes, not empty.
    Name(fn(&mut Config) -> &mut String),
    Format(fn(&mut Config) -> &mut LogFormat),
    Level(fn(&mut Config) -> &mut String),
}

/// One key.
pub struct Setting {
    /// Dotted path in the file.
    pub key: &'static str,
    /// What it bounds, what it trades, when to raise or lower it.
    pub about: &'static str,
    pub access: Access,
}

/// Most a timeout may be: longer is a mistake in the unit.
const TIMEOUT_MAX_MS: u64 = 24 * 3600 * 1000;

/// All keys, root keys first, then table by table.
pub const SETTINGS: &[Setting] = &[
    Setting {
        key: "listen",
        about: "Address of the data port; port 0 picks a free one.",
        access: Access::Addr(|c| &mut c.listen),
    },
    Setting {
        key: "control",
        about: "Address of the control port: health, metrics, drain. Anyone who reaches it can drain the server.",
        access: Access::Addr(|c| &mut c.control),
    },
    Setting {
        key: "models",
        about: "Directory with one <name>/model.toml for each model.",
        access: Access::Path(|c| &mut c.models),
    },
    Setting {
        key: "state",
        about: "Directory where what was learned about batch times is kept, each minute and on drain, so that a restart
                predicts well from its first batch. Empty: nothing is kept.",
        access: Access::PathOrNone(|c| &mut c.state),
    },
    Setting {
        key: "allow_unauthenticated",
        about: "Lets ports listen beyond this machine although nobody has to prove anything there: everyone who can reach
                them can use them. The data port does not need it with auth.tenants, nor does the control port with auth.control.",
        access: Access::Bool(|c| &mut c.allow_unauthenticated),
    },
    Setting {
        key: "drain_timeout_ms",
        about: "How long a drain may take; whoever has no answer then gets `executor_failed`.
                Raise it when one batch can run longer, lower it when the supervisor kills sooner.",
        access: Access::Millis { min: 1, max: TIMEOUT_MAX_MS, at: |c| &mut c.drain_timeout },
    },
    Setting {
        key: "drain_queue_ms",
        about: "How long a drain goes on serving what waits; what waits after that, or after three quarters of drain_timeout_ms, is
                handed back as `draining`: not executed, so its caller may ask another replica. 0: only batches that are with
                executors are finished. Lower it where there are other replicas, raise it where there is none.",
        access: Access::Millis { min: 0, max: TIMEOUT_MAX_MS, at: |c| &mut c.drain_queue },
    },
    Setting {
        key: "threads.shards",
        about: "Front-end threads, each with its own listener. Default: a quarter of the cores, at least 1.
                Raise it when shards are busy and executors are not.",
        access: Access::Count { min: 1, max: 1024, at: |c| &mut c.threads.shards },
    },
    Setting {
        key: "threads.executors",
        about: "Threads that run batches. Default: one for each physical core (or GPU); shards need little of theirs.
                More than the free cores makes each batch slower and no batch sooner.",
        access: Access::Count { min: 1, max: 1024, at: |c| &mut c.threads.executors },
    },
    Setting {
        key: "threads.tokenizers",
        about: "Threads that turn text into token ids. Only models that take text use them.",
        access: Access::Count { min: 1, max: 256, at: |c| &mut c.threads.tokenizers },
    },
    Setting {
        key: "threads.pin",
        about: "Keeps each shard on one core. Turn it off where other programs share the cores.",
        access: Access::Bool(|c| &mut c.threads.pin),
    },
    Setting {
        key: "frontend.connections_max",
        about: "Open connections, all shards together. Default: 10000, but at most 80 % of the open files allowed.
                Above it a new connection is closed at once.",
        access: Access::U32 { min: 1, max: 1_000_000, at: |c| &mut c.frontend.connections_max },
    },
    Setting {
        key: "frontend.credit_requests",
        about: "Requests one connection may have in flight. A batch cannot be fuller than its callers' credit allows:
                raise it where few connections must fill large batches, lower it to bound what one caller can hold.",
        access: Access::U32 { min: 1, max: 1 << 20, at: |c| &mut c.frontend.credit_requests },
    },
    Setting {
        key: "frontend.credit_bytes",
        about: "Payload bytes one connection may have in flight. At least one payload of the largest size.",
        access: Access::U64 { min: 4096, max: 1 << 40, at: |c| &mut c.frontend.credit_bytes },
    },
    Setting {
        key: "frontend.payload_bytes_max",
        about: "Largest payload of one request. Checked on the header, before anything is allocated.",
        access: Access::U32 { min: 4096, max: WireLimits::PAYLOAD_CEILING, at: |c| &mut c.frontend.payload_bytes_max },
    },
    Setting {
        key: "frontend.output_bytes_max",
        about: "Unsent answers of one connection, above which it is no longer read: a slow reader slows only itself.
                Lower it when many slow readers are expected, raise it when single answers are larger.",
        access: Access::U32 { min: 4096, max: 1 << 30, at: |c| &mut c.frontend.output_bytes_max },
    },
    Setting {
        key: "frontend.output_bytes_total_max",
        about: "Unsent answers of all connections, an equal share for each shard. Above its share a shard closes the
                connection with the most unsent bytes. Lower it to bound what readers that stall can hold together,
                raise it where many callers take large answers over slow links.
                Default: 1 GiB, but at most a quarter of what the machine or its container has.",
        access: Access::U64 { min: 4096, max: 1 << 44, at: |c| &mut c.frontend.output_bytes_total_max },
    },
    Setting {
        key: "frontend.hello_timeout_ms",
        about: "From connecting to a complete hello; then the connection is closed.",
        access: Access::Millis { min: 1, max: TIMEOUT_MAX_MS, at: |c| &mut c.frontend.hello_timeout },
    },
    Setting {
        key: "frontend.frame_timeout_ms",
        about: "From the first byte of a frame to its last. Raise it where large payloads come over slow links.",
        access: Access::Millis { min: 1, max: TIMEOUT_MAX_MS, at: |c| &mut c.frontend.frame_timeout },
    },
    Setting {
        key: "frontend.stall_timeout_ms",
        about: "How long a caller may leave its answers unread without any progress; then its connection is closed.",
        access: Access::Millis { min: 1, max: TIMEOUT_MAX_MS, at: |c| &mut c.frontend.stall_timeout },
    },
    Setting {
        key: "frontend.idle_timeout_ms",
        about: "How long a connection may be silent with nothing in flight.",
        access: Access::Millis { min: 1, max: TIMEOUT_MAX_MS, at: |c| &mut c.frontend.idle_timeout },
    },
    Setting {
        key: "frontend.spin_us",
        about: "How long an idle shard looks for work before it sleeps. Buys a faster first answer with a busy core;
                leave it at 0 unless shards have cores of their own.",
        access: Access::Micros { min: 0, max: 100_000, at: |c| &mut c.frontend.spin },
    },
    Setting {
        key: "abuse.points",
        about: "What a connection may waste at once. A request that cannot be decoded or has a wrong checksum costs 100, one
                beyond the credit 10, one that its model's contract refuses, a describe or a stats 2, a ping, a cancel or a frame
                of an unknown kind 1; an answered request earns 2. Without points left it is sent away. 0: nothing is counted.",
        access: Access::U32 { min: 0, max: 1 << 30, at: |c| &mut c.abuse.points },
    },
    Setting {
        key: "abuse.points_per_second",
        about: "What it gets back, and so the pings or cancels a second that are always free. Raise it for callers that mean well and ask much beside infer.",
        access: Access::U32 { min: 0, max: 1 << 30, at: |c| &mut c.abuse.points_per_second },
    },
    Setting {
        key: "abuse.ban_ms",
        about: "How long nobody from its address is listened to then, or after more than ten streams that cannot be followed
                (IPv6: its /64). 0 behind a proxy or a NAT, where one address is many callers.",
        access: Access::Millis { min: 0, max: TIMEOUT_MAX_MS, at: |c| &mut c.abuse.ban },
    },
    Setting {
        key: "abuse.ban_loopback",
        about: "Bans addresses of this machine too. For tests.",
        access: Access::Bool(|c| &mut c.abuse.ban_loopback),
    },
    Setting {
        key: "quota.requests_per_second",
        about: "Requests that each tenant may send a second, a second's worth at once, all its connections and all shards
                together; more is answered `quota_exceeded` with the time to come back. 0: as many as it likes. The same for what follows.",
        access: Access::U64 { min: 0, max: 1_000_000_000, at: |c| &mut c.quota.requests_per_second },
    },
    Setting {
        key: "quota.rows_per_second",
        about: "Rows of each tenant. A request with more than a second's worth is taken when nothing was used for a second.",
        access: Access::U64 { min: 0, max: 1_000_000_000, at: |c| &mut c.quota.rows_per_second },
    },
    Setting {
        key: "quota.cells_per_second",
        about: "Cells (rows times length) of each tenant: what work is where lengths differ. Of text a cell is a byte.",
        access: Access::U64 { min: 0, max: 1_000_000_000, at: |c| &mut c.quota.cells_per_second },
    },
    Setting {
        key: "quota.bytes_per_second",
        about: "Payload bytes of each tenant.",
        access: Access::U64 { min: 0, max: 1_000_000_000, at: |c| &mut c.quota.bytes_per_second },
    },
    Setting {
        key: "quota.in_flight_max",
        about: "Requests of each tenant that may be accepted and not answered.",
        access: Access::U32 { min: 0, max: 1 << 30, at: |c| &mut c.quota.in_flight_max },
    },
    Setting {
        key: "quota.connections_max",
        about: "Connections of each tenant. One more is sent away after its hello.",
        access: Access::U32 { min: 0, max: 1_000_000, at: |c| &mut c.quota.connections_max },
    },
    Setting {
        key: "queue.rows_max",
        about: "Rows waiting for a batch, all models together. Above it requests are answered `overloaded`.
                Longer queues turn overload into latency: keep it near what can be served within a deadline.",
        access: Access::U32 { min: 1, max: 1 << 30, at: |c| &mut c.queue.rows_max },
    },
    Setting {
        key: "queue.cells_max",
        about: "Cells (rows times padded length) waiting for a batch. Bounds work where row counts say little.",
        access: Access::U64 { min: 1, max: 1 << 40, at: |c| &mut c.queue.cells_max },
    },
    Setting {
        key: "queue.bytes_max",
        about: "Payload bytes of all accepted requests. The largest part of the server's memory under load.
                Default: 1 GiB, but at most a quarter of what the machine or its container has.",
        access: Access::U64 { min: 4096, max: 1 << 44, at: |c| &mut c.queue.bytes_max },
    },
    Setting {
        key: "executor.device",
        about: "Where batches run: cpu; cuda or cuda:0,1 with a binary that was built with the feature cuda;
                sim:SEED for tests (sim:SEED:N is lost after N operations). Models without a program for a device run on the CPU all the same.",
        access: Access::Place(|c| &mut c.executor.device),
    },
    Setting {
        key: "executor.graph_bytes_max",
        about:
            "Device memory of each executor for captured CUDA graphs, one per slot and size of batch. They save the host
                a launch per kernel; 0 turns them off.",
        access: Access::U64 { min: 0, max: 1 << 40, at: |c| &mut c.executor.graph_bytes_max },
    },
    Setting {
        key: "executor.slots",
        about: "Staging sets of each executor. With 2, the next batch is packed while one runs; 1 saves memory.
                Default on a GPU: 3, so that one is uploaded, one computed and one read back.",
        access: Access::U32 { min: 1, max: 16, at: |c| &mut c.executor.slots },
    },
    Setting {
        key: "executor.threads",
        about:
            "Threads that share each batch of an encoder, its rows divided among them. With more than 1 a batch of many
                rows is done sooner, and fewer batches in all: set threads.executors so that the product is the cores.",
        access: Access::U32 { min: 1, max: 64, at: |c| &mut c.executor.threads },
    },
    Setting {
        key: "executor.canary_every",
        about: "One answered row in so many is run once more, alone, and compared (ferry_canary_rows_total); 0: none.
                It costs that share of the executors' time, and finds answers that depend on a row's company.",
        access: Access::U32 { min: 0, max: 1_000_000_000, at: |c| &mut c.executor.canary_every },
    },
    Setting {
        key: "executor.hang_timeout_ms",
        about: "A batch that runs for longer has hung: its requests are answered executor_failed, its thread is left to itself,
                and another thread takes the executor's seat (ferry_executor_hangs_total). On a device the process ends
                instead, with status 75. Longer than any batch of yours takes; 0: never. A model that runs inline is not
                watched: its thread is the batcher's.",
        access: Access::Millis { min: 0, max: TIMEOUT_MAX_MS, at: |c| &mut c.executor.hang_timeout },
    },
    Setting {
        key: "executor.replacements_max",
        about: "Threads that take the seats of hung ones, in all: each hung one keeps its memory and, where it computes, its
                core. When one more would be needed, the server drains and ends with status 1.",
        access: Access::U32 { min: 0, max: 1024, at: |c| &mut c.executor.replacements_max },
    },
    Setting {
        key: "executor.quarantine_max",
        about: "Requests that are remembered for having made their model fail or panic, in company and alone, or alone twice:
                the same bytes are then answered executor_failed without being run (ferry_quarantined_total). 0: none.",
        access: Access::U32 { min: 0, max: 1 << 20, at: |c| &mut c.executor.quarantine_max },
    },
    Setting {
        key: "executor.quarantine_ms",
        about: "How long such a request is remembered after it failed last.",
        access: Access::Millis { min: 1, max: TIMEOUT_MAX_MS, at: |c| &mut c.executor.quarantine },
    },
    Setting {
        key: "auth.tenants",
        about: "File of those who may ask: tenants with tokens, certificates and roles (README, Who may ask). Read again when it
                changes. Empty: nobody has to prove anything.",
        access: Access::PathOrNone(|c| &mut c.tenants),
    },
    Setting {
        key: "auth.control",
        about: "The control port wants a tenant's token (Authorization: Bearer, or Basic with the token as password): observe to
                look, admin to change anything. /healthz and /readyz answer everybody. Where tls.certificate is set it speaks
                TLS, and may then listen beyond this machine.",
        access: Access::Bool(|c| &mut c.control_auth),
    },
    Setting {
        key: "tls.certificate",
        about: "The data port's certificate and those between it and an authority, PEM: then it speaks TLS 1.3 and nothing else.
                Read again when it changes. Empty: nothing is encrypted.",
        access: Access::PathOrNone(|c| &mut c.tls.certificate),
    },
    Setting {
        key: "tls.key",
        about: "The private key of tls.certificate, PEM. Nobody but the server's user should be able to read it.",
        access: Access::PathOrNone(|c| &mut c.tls.key),
    },
    Setting {
        key: "tls.client_ca",
        about: "Authorities of clients' certificates, PEM: another authority than that of the server's own.",
        access: Access::PathOrNone(|c| &mut c.tls.client_ca),
    },
    Setting {
        key: "tls.client_auth",
        about: "Whether clients show a certificate: none, optional (or a token), required.",
        access: Access::ClientAuth(|c| &mut c.tls.client_auth),
    },
    Setting {
        key: "recorder.batches",
        about: "The flight recorder: what became of the last so many batches, for ferry explain, ferry timeline and the
                files below. Some 350 bytes each; 0 keeps nothing.",
        access: Access::U32 { min: 0, max: 1 << 20, at: |c| &mut c.recorder.batches },
    },
    Setting {
        key: "recorder.directory",
        about: "Directory where the flight recorder is kept by itself, as a file that ui.perfetto.dev opens, when requests
                missed their model's slo_ms or a model panicked. Empty: timelines/ in `state`, or nowhere without one.",
        access: Access::PathOrNone(|c| &mut c.recorder.directory),
    },
    Setting {
        key: "recorder.breach",
        about: "What counts as missing slo_ms: p99 (more than one request in a hundred of 5 s), request (a single one), or
                off. A panic of a model counts in any case.",
        access: Access::Breach(|c| &mut c.recorder.breach),
    },
    Setting {
        key: "recorder.interval_ms",
        about: "Least time between two such files, so that an overload is not spent on writing about it.",
        access: Access::Millis { min: 0, max: TIMEOUT_MAX_MS, at: |c| &mut c.recorder.interval },
    },
    Setting {
        key: "recorder.files_max",
        about: "Such files that are kept; the oldest goes first. One has some 3 KiB for each batch.",
        access: Access::U32 { min: 1, max: 100_000, at: |c| &mut c.recorder.files_max },
    },
    Setting {
        key: "recorder.trace_bytes_max",
        about: "Memory in which the scheduler's last inputs are kept, 11 to 28 bytes a request, so that ferry replay decides again
                what led to such a file. Costs the batcher some 45 ns a request: 0, the default, records none.",
        access: Access::U64 { min: 0, max: 1 << 32, at: |c| &mut c.recorder.trace_bytes_max },
    },
    Setting {
        key: "otel.endpoint",
        about: "Where metrics and traces are sent by OTLP: http://HOST:PORT of a receiver, such as a collector beside the
                server, which adds TLS and credentials. Empty: nowhere, and nothing is recorded.",
        access: Access::EndpointOrNone(|c| &mut c.otel.endpoint),
    },
    Setting {
        key: "otel.protocol",
        about: "http/protobuf (a collector's port 4318) or grpc (4317).",
        access: Access::Otlp(|c| &mut c.otel.protocol),
    },
    Setting {
        key: "otel.sample_ratio",
        about: "Share of requests that are recorded where the caller names no trace; 0 to 1. Where it names one, the caller
                decides. Recorded requests cost a few microseconds of the control thread each, the others a branch.",
        access: Access::Share(|c| &mut c.otel.sample_ratio),
    },
    Setting {
        key: "otel.interval_ms",
        about: "Between two exports of metrics. Spans go at least each second.",
        access: Access::Millis { min: 100, max: 3_600_000, at: |c| &mut c.otel.interval },
    },
    Setting {
        key: "otel.service_name",
        about: "The name under which this server is found in what shows traces.",
        access: Access::Name(|c| &mut c.otel.service_name),
    },
    Setting {
        key: "log.format",
        about: "text or json, on standard error.",
        access: Access::Format(|c| &mut c.log.format),
    },
    Setting {
        key: "log.level",
        about: "error, warn, info, debug or trace; or directives such as info,ferry::batcher=debug.",
        access: Access::Level(|c| &mut c.log.level),
    },
];

/// The setting of a dotted key.
pub fn setting(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// Whether some key starts with this table.
pub(super) fn is_table(path: &str) -> bool {
    SETTINGS.iter().any(|setting| setting.key.rsplit_once('.').is_some_and(|(table, _)| table == path))
}

/// What is said about a key that does not exist: the known one that was probably meant.
pub(super) fn unknown_key(key: &str) -> String {
    let nearest = SETTINGS
        .iter()
        // The last part is compared too: `credit_requests` at the root means `frontend.credit_requests`.
        .map(|setting| {
            let last = setting.key.rsplit_once('.').map_or(setting.key, |(_, last)| last);
            let full = strsim::jaro_winkler(key, setting.key);
            (full.max(strsim::jaro_winkler(key, last)), setting.key)
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or("", |(_, nearest)| nearest);
    format!("unknown key {key}; the nearest known key is {nearest}")
}

impl Setting {
    /// The field's value as TOML.
    pub fn read(&self, config: &Config) -> String {
        // Fields are reached through one accessor that gives `&mut`; a dump is rare enough for a copy.
        let mut config = config.clone();
        let config = &mut config;
        match self.access {
            Access::U32 { at, .. } => at(config).to_string(),
            Access::U64 { at, .. } => at(config).to_string(),
            Access::Count { at, .. } => at(config).to_string(),
            Access::Millis { at, .. } => at(config).as_millis().to_string(),
            Access::Micros { at, .. } => at(config).as_micros().to_string(),
            Access::Bool(at) => at(config).to_string(),
            Access::Addr(at) => quoted(&at(config).to_string()),
            Access::Path(at) => quoted(&at(config).display().to_string()),
            Access::PathOrNone(at) => {
                quoted(&at(config).as_ref().map_or(String::new(), |path| path.display().to_string()))
            }
            Access::Place(at) => quoted(&at(config).to_string()),
            Access::Breach(at) => quoted(at(config).name()),
            Access::Share(at) => toml::Value::Float(*at(config)).to_string(),
            Access::EndpointOrNone(at) => quoted(at(config).as_deref().unwrap_or("")),
            Access::Otlp(at) => quoted(at(config).name()),
            Access::ClientAuth(at) => quoted(at(config).name()),
            Access::Name(at) => quoted(at(config)),
            Access::Format(at) => quoted(at(config).name()),
            Access::Level(at) => quoted(at(config)),
        }
    }

    /// The field's value as JSON.
    pub fn json(&self, config: &Config) -> serde_json::Value {
        let text = self.read(config);
        match self.access {
            Access::Addr(_)
            | Access::Path(_)
            | Access::PathOrNone(_)
            | Access::Place(_)
            | Access::Breach(_)
            | Access::EndpointOrNone(_)
            | Access::Otlp(_)
            | Access::ClientAuth(_)
            | Access::Name(_)
            | Access::Format(_)
            | Access::Level(_) => {
                let table: toml::Table = toml::from_str(&format!("value = {text}")).expect("quoted() writes TOML");
                table["value"].as_str().into()
            }
            _ => serde_json::from_str(&text).expect("numbers and booleans are the same in TOML and JSON"),
        }
    }

    /// Checks a value and stores it. The error says what was expected and what came.
    pub fn write(&self, config: &mut Config, value: &Value) -> Result<(), String> {
        let key = self.key;
        let expected = |what: &str| format!("{key}: expected {what}, got {}", value.got());
        match self.access {
            Access::U32 { min, max, at } => *at(config) = narrow(self.integer(value, min.into(), max.into())?),
            Access::U64 { min, max, at } => *at(config) = self.integer(value, min, max)?,
            Access::Count { min, max, at } => {
                *at(config) = narrow(self.integer(value, min as u64, max as u64)?);
            }
            Access::Millis { min, max, at } => *at(config) = Duration::from_millis(self.integer(value, min, max)?),
            Access::Micros { min, max, at } => *at(config) = Duration::from_micros(self.integer(value, min, max)?),
            Access::Bool(at) => match value {
                Value::Bool(value) => *at(config) = *value,
                _ => return Err(expected("true or false")),
            },
            Access::Addr(at) => {
                let what = "an address with a port, such as \"127.0.0.1:7600\"";
                match value {
                    Value::Text(text) => *at(config) = text.parse().map_err(|_| expected(what))?,
                    _ => return Err(expected(what)),
                }
            }
            Access::Path(at) => match value {
                Value::Text(text) if !text.is_empty() => *at(config) = PathBuf::from(text),
                _ => return Err(expected("a path")),
            },
            Access::PathOrNone(at) => match value {
                Value::Text(text) => *at(config) = (!text.is_empty()).then(|| PathBuf::from(text)),
                _ => return Err(expected("a path, or \"\" for none")),
            },
            Access::Place(at) => {
                let place = match value {
                    Value::Text(text) => Place::parse(text),
                    _ => None,
                };
                *at(config) = place.ok_or_else(|| expected("\"cpu\", \"cuda\", \"cuda:0,1\" or \"sim:SEED\""))?;
            }
            Access::Breach(at) => {
                let rule = match value {
                    Value::Text(text) => BreachRule::ALL.into_iter().find(|rule| rule.name() == text),
                    _ => None,
                };
                *at(config) = rule.ok_or_else(|| expected("\"p99\", \"request\" or \"off\""))?;
            }
            Access::Share(at) => {
                let share = match value {
                    Value::Real(share) => *share,
                    Value::Integer(share @ (0 | 1)) => *share as f64,
                    _ => f64::NAN,
                };
                if !(0.0..=1.0).contains(&share) {
                    return Err(expected("a number from 0 to 1"));
                }
                *at(config) = share;
            }
            Access::EndpointOrNone(at) => match value {
                Value::Text(text) if text.is_empty() => *at(config) = None,
                Value::Text(text) if is_endpoint(text) => *at(config) = Some(text.clone()),
                _ => {
                    return Err(expected(
                        "http://HOST:PORT without a path (https is a collector's work), or \"\" for none",
                    ));
                }
            },
            Access::Otlp(at) => match value {
                Value::Text(text) if text == "grpc" => *at(config) = OtelProtocol::Grpc,
                Value::Text(text) if text == "http/protobuf" => *at(config) = OtelProtocol::HttpProtobuf,
                _ => return Err(expected("\"http/protobuf\" or \"grpc\"")),
            },
            Access::ClientAuth(at) => {
                let named = |auth: &ClientAuth| matches!(value, Value::Text(text) if text == auth.name());
                let known = ClientAuth::ALL.into_iter().find(named);
                *at(config) = known.ok_or_else(|| expected("\"none\", \"optional\" or \"required\""))?;
            }
            Access::Name(at) => match value {
                Value::Text(text) if !text.is_empty() && text.len() <= 128 => *at(config) = text.clone(),
                _ => return Err(expected("a name of 1 to 128 bytes")),
            },
            Access::Format(at) => match value {
                Value::Text(text) if text == "text" => *at(config) = LogFormat::Text,
                Value::Text(text) if text == "json" => *at(config) = LogFormat::Json,
                _ => return Err(expected("\"text\" or \"json\"")),
            },
            Access::Level(at) => match value {
                Value::Text(text) if text.parse::<tracing_subscriber::filter::Targets>().is_ok() => {
                    *at(config) = text.clone();
                }
                _ => return Err(expected("a level (error, warn, info, debug, trace) or target=level,…")),
            },
        }
        Ok(())
    }

    fn integer(&self, value: &Value, min: u64, max: u64) -> Result<u64, String> {
        let found = match value {
            Value::Integer(number) => u64::try_from(*number).ok().filter(|number| (min..=max).contains(number)),
            _ => None,
        };
        found.ok_or_else(|| format!("{}: expected an integer from {min} to {max}, got {}", self.key, value.got()))
    }
}

/// `http://HOST:PORT`, with a slash behind it or none.
fn is_endpoint(text: &str) -> bool {
    let Some(authority) = text.strip_prefix("http://").map(|rest| rest.strip_suffix('/').unwrap_or(rest)) else {
        return false;
    };
    let host_is_plain = |host: &str| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        match bare {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)),
        }
    };
    authority
        .rsplit_once(':')
        .is_some_and(|(host, port)| host_is_plain(host) && port.parse::<u16>().is_ok_and(|p| p > 0))
}

/// A number that was already compared with its field's maximum.
fn narrow<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number).ok().expect("Setting::integer keeps to the bounds, which are values of the field's type")
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Connections that a limit of open files leaves room for: the rest is for shards, models and the control port.
pub fn connections_allowed(nofile: u64) -> u32 {
    u32::try_from(nofile / 5 * 4).unwrap_or(u32::MAX).max(1)
}

pub(super) fn connections_default(nofile: u64) -> u32 {
    connections_allowed(nofile).min(10_000)
}

/// Pairs of keys that cannot both be meant. Each says what was expected and what came.
pub(super) fn contradictions(config: &Config) -> Vec<String> {
    let mut found = Vec::new();
    let frontend = &config.frontend;
    let payload = u64::from(frontend.payload_bytes_max);
    if frontend.credit_bytes < payload {
        found.push(format!(
            "frontend.credit_bytes must be at least frontend.payload_bytes_max ({payload}), or a payload that is \
             allowed could never be sent; got {}",
            frontend.credit_bytes
        ));
    }
    if config.queue.bytes_max < payload {
        found.push(format!(
            "queue.bytes_max must be at least frontend.payload_bytes_max ({payload}), or a payload that is allowed \
             would always be refused; got {}",
            config.queue.bytes_max
        ));
    }
    if config.queue.cells_max < u64::from(config.queue.rows_max) {
        found.push(format!(
            "queue.cells_max must be at least queue.rows_max ({}), because every row has a cell; got {}",
            config.queue.rows_max, config.queue.cells_max
        ));
    }
    if u64::from(frontend.connections_max) < config.threads.shards as u64 {
        found.push(format!(
            "frontend.connections_max must be at least threads.shards ({}), or a shard could take no connection; got {}",
            config.threads.shards, frontend.connections_max
        ));
    }
    let outputs = u64::from(frontend.output_bytes_max).saturating_mul(config.threads.shards as u64);
    if frontend.output_bytes_total_max < outputs {
        found.push(format!(
            "frontend.output_bytes_total_max must be at least frontend.output_bytes_max times threads.shards \
             ({outputs}), or one connection alone could be too much for its shard; got {}",
            frontend.output_bytes_total_max
        ));
    }
    if frontend.idle_timeout < frontend.hello_timeout {
        found.push(format!(
            "frontend.idle_timeout_ms must be at least frontend.hello_timeout_ms ({}), got {}",
            frontend.hello_timeout.as_millis(),
            frontend.idle_timeout.as_millis()
        ));
    }
    if config.listen == config.control && config.listen.port() != 0 {
        found.push(format!("listen and control must differ, both are {}", config.listen));
    }
    let beyond = |addr: &SocketAddr| !addr.ip().is_loopback() && !config.allow_unauthenticated;
    let words = "allow_unauthenticated = true if everyone who can reach it may use it";
    if beyond(&config.control) && !config.control_auth {
        found.push(format!(
            "control must be a loopback address where nobody has to prove who they are, got {}; set auth.control, or {words}",
            config.control
        ));
    }
    if config.control_auth && config.tenants.is_none() {
        found.push("auth.control needs auth.tenants: the file of those whose tokens it takes".into());
    }
    if !config.control.ip().is_loopback() && config.control_auth && config.tls.certificate.is_none() {
        found.push(format!(
            "control must be a loopback address where credentials are not encrypted, got {}; set tls.certificate and tls.key",
            config.control
        ));
    }
    if beyond(&config.listen) && config.tenants.is_none() {
        found.push(format!(
            "listen must be a loopback address where nobody has to prove who they are, got {}; set auth.tenants, or {words}",
            config.listen
        ));
    }
    if !config.listen.ip().is_loopback() && config.tenants.is_some() && config.tls.certificate.is_none() {
        found.push(format!(
            "listen must be a loopback address where credentials are not encrypted, got {}; set tls.certificate and tls.key",
            config.listen
        ));
    }
    let tls = &config.tls;
    if tls.certificate.is_some() != tls.key.is_some() {
        found.push("tls.certificate and tls.key belong together: set both, or neither".into());
    }
    if (tls.client_auth != ClientAuth::None) != tls.client_ca.is_some() {
        found.push(format!(
            "tls.client_auth = {:?} {}; set both, or neither",
            tls.client_auth.name(),
            if tls.client_ca.is_some() {
                "looks at no certificate, so tls.client_ca does nothing"
            } else {
                "needs tls.client_ca"
            }
        ));
    }
    if tls.client_ca.is_some() && tls.certificate.is_none() {
        found.push("tls.client_ca needs tls.certificate: clients show certificates in a TLS handshake".into());
    }
    found
}

/// One part of the memory that limits allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPart {
    pub what: String,
    pub bytes: u64,
}

/// The most memory that the limits allow at once, part by part. `staging_bytes` is what the slots of all executors
/// hold for the loaded models, `weight_bytes` what their weights take; both 0 where no model was read.
pub fn memory(config: &Config, staging_bytes: u64, weight_bytes: u64) -> Vec<MemoryPart> {
    let connections = u64::from(config.frontend.connections_max);
    let part = |what: &str, bytes: u64| MemoryPart { what: what.into(), bytes };
    vec![
        part("accepted payloads (queue.bytes_max)", config.queue.bytes_max),
        part(
            "frames being received (connections_max × payload_bytes_max, at most queue.bytes_max)",
            connections.saturating_mul(config.frontend.payload_bytes_max.into()).min(config.queue.bytes_max),
        ),
        part(
            "unsent answers (connections_max × output_bytes_max, at most output_bytes_total_max)",
            connections
                .saturating_mul(config.frontend.output_bytes_max.into())
                .min(config.frontend.output_bytes_total_max),
        ),
        part("batch staging (threads.executors × executor.slots × largest batch)", staging_bytes),
        part("model weights", weight_bytes),
        part("flight recorder (recorder.batches)", recorder_bytes(config)),
    ]
}

/// Memory of the flight recorder, with the times at which batches were answered.
pub fn recorder_bytes(config: &Config) -> u64 {
    let batches = config.recorder.batches as usize;
    // While a dump is written there is a copy of both.
    let ring = Ring::bytes(batches);
    let stamps = (batches * size_of::<u64>()) as u64;
    let dumps = if config.recorder_directory().is_some() { ring } else { 0 };
    ring + dumps + stamps + 2 * config.recorder.trace_bytes_max
}

/// Sum of [`memory`]'s parts.
pub fn memory_total(parts: &[MemoryPart]) -> u64 {
    parts.iter().fold(0, |sum, part| sum.saturating_add(part.bytes))
}
