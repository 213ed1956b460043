//! Builds every room, joins them with mailboxes, owns the order of start and of drain.
//!
//! Always true
//! - Threads are fixed at start: shards, one batcher, executors, tokenizers, control, and the caller's, which watches.
//! - Drain: shards stop accepting, what was accepted is answered, connections end, shards end, then the batcher, then
//!   executors. A thread that ends before its turn is a fault: the rest drains and the process exits non-zero.

mod executors;

use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use glommio::ExecutorJoinHandle;
use nix::sys::pthread::{Pthread, pthread_kill};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

use crate::access::{AccessFiles, OpenAccess};
use crate::batcher::{self, Batcher, ThreadOutlet};
use crate::clock;
use crate::config::limits::{self, memory_total};
use crate::config::{Config, Machine, OtelProtocol, Place};
use crate::contract::Contract;
use crate::control::admin::{self, Beside, ControlHandle, ControlOptions};
use crate::control::auth::{Gate, Stranger};
use crate::control::lifecycle::Lifecycle;
use crate::device::sim::SimDevice;
use crate::executor::fence::Pass;
use crate::executor::worker::Left;
use crate::frontend::access::{Proof, SharedAccess};
use crate::frontend::traces::Tracing;
use crate::frontend::watchdog::Watch;
use crate::frontend::{self, Catalog, abuse, preflight, shard};
use crate::learned::{self, Identity, Keeper};
use crate::mail::{Request, ToBatcher, ToShard};
use crate::mailbox::{Receiver, SendError, Sender, mailbox};
use crate::models::manifest::{Manifest, Placement, Precision};
use crate::models::repository::{self, LoadOptions, ModelEntry, Repository};
use crate::otel;
use crate::quota::{QuotaSpec, Quotas};
use crate::scheduler::{Buckets, Group, Policy, QueueLimits, Scheduler};
use crate::shadow::{self, Board, Worker as ShadowWorker};
use crate::telemetry::spans::RequestRecord;
use crate::telemetry::{Installation, ModelLabels, Telemetry};
use crate::timeline::breach::BreachWatch;
use crate::timeline::files::{Dump, DumpFiles};
use crate::tls;
use crate::tokenizers::Tokenizing;
use crate::vocab::{Layout, ModelHandle, Moment, Refusal};

use executors::{Started, Warmed, measured_budget, start_executors};

/// Why the server did not start.
#[derive(Debug)]
pub enum StartError {
    /// The machine does not allow it: each with what was found, what is needed and how to fix it. Exit status 78.
    Preflight(Vec<preflight::PreflightError>),
    /// A model cannot be served.
    Models(repository::RepositoryError),
    /// The models directory has nothing to serve.
    NoModels(String),
    /// A model failed while it was warmed.
    WarmUp {
        model: String,
        refusal: Refusal,
    },
    Thread(String),
    /// Certificates or tenants cannot be used. Exit status 78.
    Access(String),
    /// The device that batches should run on is not there, or has not enough memory. Exit status 78.
    Device(String),
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StartError::Preflight(errors) => {
                let lines: Vec<String> = errors.iter().map(|error| error.to_string()).collect();
                f.write_str(&lines.join("\n"))
            }
            StartError::Models(error) => error.fmt(f),
            StartError::NoModels(directory) => write!(f, "{directory} holds no model that can be served"),
            StartError::WarmUp { model, refusal } => write!(f, "model {model} failed its warm-up: {refusal}"),
            StartError::Thread(message) | StartError::Device(message) | StartError::Access(message) => {
                f.write_str(message)
            }
        }
    }
}

impl std::error::Error for StartError {}

/// How a server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All that was accepted was answered.
    Drained,
    /// The drain was cut short: what was left was answered `executor_failed`.
    Aborted,
    /// A thread ended that should not have.
    Fault(String),
    /// A device does nothing any more for this process: what was left was answered `executor_failed`, and another process may do
    /// better. Exit status 75.
    DeviceLost(String),
}

/// What the watching thread is told.
#[derive(Debug)]
enum Event {
    Drain,
    Abort,
    /// Read certificates and tenants again, though they look as before.
    Reload,
    /// A thread ended: its name, and whether by a panic.
    Exit {
        thread: String,
        panicked: bool,
    },
    DeviceLost(String),
    /// An executor hangs and nobody takes its seat.
    Hung(String),
}

/// Stops a running server, from any thread.
#[derive(Clone, Debug)]
pub struct Stopper(flume::Sender<Event>);

impl Stopper {
    /// Accept nothing more, finish what was accepted, end.
    pub fn drain(&self) {
        let _ = self.0.send(Event::Drain);
    }

    /// Read certificates and tenants again now.
    pub fn reload(&self) {
        let _ = self.0.send(Event::Reload);
    }

    /// End now: answer what is unanswered with `executor_failed`.
    pub fn abort(&self) {
        let _ = self.0.send(Event::Abort);
    }
}

/// Tells the watching thread when the thread that holds it ends.
pub struct ExitNotice {
    thread: String,
    events: flume::Sender<Event>,
    /// Known already: a shard's thread is told so when its panic is over.
    panicked: bool,
    /// Another thread has its place: nobody cares.
    replaced: bool,
}

impl ExitNotice {
    fn new(thread: String, events: &flume::Sender<Event>) -> ExitNotice {
        ExitNotice { thread, events: events.clone(), panicked: false, replaced: false }
    }

    fn end(mut self, in_turn: bool) {
        self.panicked = !in_turn;
    }
}

impl Drop for ExitNotice {
    fn drop(&mut self) {
        let panicked = self.panicked || std::thread::panicking();
        if self.replaced {
            tracing::info!(thread = self.thread, "a thread that hung has ended");
            return;
        }
        let _ = self.events.send(Event::Exit { thread: self.thread.clone(), panicked });
    }
}

struct ShardHandle {
    thread: ExecutorJoinHandle<()>,
    mail: Sender<ToShard>,
    watch: Watch,
    pthread: Pthread,
}

/// The thread of the shadow schedulers. It ends when its board is told to stop.
#[derive(Debug)]
struct ShadowHandle {
    board: Arc<Board>,
    thread: JoinHandle<()>,
}

/// The thread that keeps what is learned. It ends when `stop` is dropped.
struct KeeperHandle {
    stop: flume::Sender<()>,
    thread: JoinHandle<()>,
}

/// Threads of executors on the processor, those that were replaced left out when they are. The batcher adds to them.
type ExecutorThreads = Arc<Mutex<Vec<(JoinHandle<()>, Pass)>>>;

/// A running server.
pub struct ServerHandle {
    pub data_addr: SocketAddr,
    pub control_addr: SocketAddr,
    pub models: Vec<String>,
    /// Described but not delivered, with the reason and what to do.
    pub skipped: Vec<repository::Skipped>,
    pub telemetry: Arc<Telemetry>,
    events: flume::Receiver<Event>,
    stopper: Stopper,
    shards: Vec<ShardHandle>,
    batcher_mail: Sender<ToBatcher>,
    batcher: JoinHandle<()>,
    others: Vec<JoinHandle<()>>,
    executors: ExecutorThreads,
    keeper: Option<KeeperHandle>,
    shadow: ShadowHandle,
    lifecycle: Arc<Lifecycle>,
    control: ControlHandle,
    drain_timeout: Duration,
    /// Of it, when the time of what waits is over.
    drain_queue: Duration,
    access: Option<OpenAccess>,
}

/// Hooks that only tests use.
#[derive(Clone, Debug, Default)]
pub struct TestHooks {
    /// A request with this id panics in its connection's task.
    pub panic_on_request_id: Option<u64>,
    /// A request with this id ends its whole shard with a panic.
    pub panic_shard_on_request_id: Option<u64>,
    /// Instead of a simulated device of the server's own, where it runs on one.
    pub sim: Option<SimDevice>,
    /// Shorter stretches for shadow schedulers.
    pub shadow_stretch: Option<Duration>,
}

/// Loads the models, starts every thread, and returns when all are warm and the ports are open.
pub fn start(config: &Config) -> Result<ServerHandle, StartError> {
    start_with(config, TestHooks::default())
}

pub fn start_with(config: &Config, hooks: TestHooks) -> Result<ServerHandle, StartError> {
    preflight::run(&preflight_options(config)).map_err(StartError::Preflight)?;
    let access = AccessFiles::of(config).map(AccessFiles::open).transpose().map_err(StartError::Access)?;
    let repository = {
        let threads = config.executor.threads as usize;
        let for_device = config.executor.device != Place::Cpu;
        let options = LoadOptions { threads, for_device, ..LoadOptions::default() };
        repository::load_all(&config.models, &options).map_err(StartError::Models)?
    };
    if repository.models.is_empty() {
        return Err(StartError::NoModels(config.models.display().to_string()));
    }
    let (held, memory) = (memory_total(&limits::memory(config, 0, 0)), Machine::here().memory);
    if held > memory {
        // The system would end the process without a word, and with all that it has accepted.
        tracing::warn!(
            "the limits let {} MiB be held beside models and batches, and this machine, or its container, has {} MiB: \
             lower queue.bytes_max or frontend.output_bytes_total_max",
            held >> 20,
            memory >> 20
        );
    }
    install_nudge_handler()?;
    build(config, &hooks, repository, access)
}

fn preflight_options(config: &Config) -> preflight::PreflightOptions {
    preflight::PreflightOptions {
        listen: config.listen,
        control: config.control,
        shards: config.threads.shards,
        connections_max: config.frontend.connections_max,
    }
}

/// Everything that rooms share while the server is being built.
struct Plan<'a> {
    config: &'a Config,
    models: &'a [ModelEntry],
    groups: Vec<Group>,
    contracts: Vec<Arc<Contract>>,
    telemetry: Arc<Telemetry>,
    shards: Vec<Sender<ToShard>>,
    batcher: Sender<ToBatcher>,
    events: flume::Sender<Event>,
    sim: Option<SimDevice>,
}

fn build(
    config: &Config,
    hooks: &TestHooks,
    repository: Repository,
    mut access: Option<OpenAccess>,
) -> Result<ServerHandle, StartError> {
    let models = &repository.models;
    let contracts: Vec<Arc<Contract>> = models.iter().map(|model| Arc::new(model.model.contract().clone())).collect();
    let groups: Vec<Group> = models.iter().map(|model| group_of(&model.manifest)).collect();
    let seats = config.threads.executors + usize::from(groups.contains(&Group::Inline));
    let telemetry = Telemetry::new(&labels_of(&contracts), config.threads.shards, seats);
    if config.recorder.batches > 0 {
        telemetry.keep_answered(config.recorder.batches as usize);
    }
    let lifecycle = Arc::new(Lifecycle::new());
    let (reserved, data_addr) = reserve_port(config.listen).map_err(StartError::Thread)?;
    let (events_sender, events) = flume::unbounded();
    let stopper = Stopper(events_sender.clone());

    // A shard's mailbox holds what its in-flight table can cause; the batcher's a burst per busy connection and more.
    let in_flight_max = config.queue.rows_max.saturating_mul(2).max(1024);
    let (shard_mail, shard_mailboxes): (Vec<_>, Vec<_>) =
        (0..config.threads.shards).map(|_| mailbox::<ToShard>(2 * in_flight_max as usize + 64)).unzip();
    let (batcher_mail, batcher_mailbox) = mailbox(4096 * config.threads.shards + 1024);
    let plan = Plan {
        config,
        models,
        groups,
        contracts,
        telemetry: Arc::clone(&telemetry),
        shards: shard_mail,
        batcher: batcher_mail,
        events: events_sender,
        sim: hooks.sim.clone(),
    };

    // The control port first: whoever waits for readiness sees "starting" and why.
    let catalog = Arc::new(Catalog::new(&plan.contracts));
    let (words_sender, words) = flume::bounded(4);
    let board = Arc::new(Board::new(plan.contracts.len(), words_sender));
    let (tracing, records) = tracing_of(config);
    let shared = access.as_ref().map(|access| Arc::clone(&access.shared));
    let control = start_control(&plan, &lifecycle, &catalog, &stopper, &board, records, shared.as_ref())?;

    let mut others = Vec::new();
    let executors = ExecutorThreads::default();
    let started = start_executors(&plan, &lifecycle, &executors, &mut others)?;
    plan.contracts.iter().for_each(|contract| lifecycle.set_warm(&contract.name));
    let texts = start_tokenizers(&plan, &mut others)?;
    let dumps = start_dumps(&plan, &mut others)?;
    let batcher = start_batcher(&plan, started, dumps, batcher_mailbox)?;
    let options = frontend::Options { tracing, access: shared, ..shard_options(config, hooks, in_flight_max) };
    if let Some(access) = &mut access {
        access.govern(Arc::clone(&options.quotas));
    }
    let shards = start_shards(&plan, data_addr, &options, &catalog, texts.as_ref(), shard_mailboxes)?;
    // Shards hold the port now.
    drop(reserved);
    let keeper = start_keeper(&plan)?;
    let shadow = ShadowWorker {
        names: plan.contracts.iter().map(|contract| contract.name.clone()).collect(),
        batcher: plan.batcher.clone(),
        board: Arc::clone(&board),
        telemetry: Arc::clone(&telemetry),
        words,
        stretch: hooks.shadow_stretch.unwrap_or(shadow::STRETCH),
    };
    let shadow = ShadowHandle { board, thread: spawn_thread("ferry-shadow".into(), &plan.events, || shadow.run())? };
    lifecycle.set_serving();
    Ok(ServerHandle {
        data_addr,
        control_addr: control.addr,
        models: plan.contracts.iter().map(|contract| contract.name.clone()).collect(),
        telemetry,
        events,
        stopper,
        shards,
        batcher_mail: plan.batcher,
        batcher,
        others,
        executors,
        keeper,
        shadow,
        lifecycle,
        control,
        drain_timeout: config.drain_timeout,
        drain_queue: config.drain_queue.min(config.drain_timeout * 3 / 4),
        access,
        skipped: repository.skipped,
    })
}

/// Whom the control port lets in.
fn gate(access: &Arc<SharedAccess>) -> Arc<Gate> {
    let (who, how) = (Arc::clone(access), Arc::clone(access));
    Arc::new(Gate {
        prove: Box::new(move |token, addr, now| match who.prove(token, addr, now) {
            Proof::Of(identity) => Ok(identity.roles),
            Proof::Nothing => Err(Stranger::Unknown),
            Proof::Banned => Err(Stranger::Banned),
        }),
        tls: Box::new(move || how.current().tls.as_deref().map(tls::control_config)),
    })
}

fn start_control(
    plan: &Plan<'_>,
    lifecycle: &Arc<Lifecycle>,
    catalog: &Catalog,
    stopper: &Stopper,
    board: &Arc<Board>,
    records: Option<Receiver<RequestRecord>>,
    access: Option<&Arc<SharedAccess>>,
) -> Result<ControlHandle, StartError> {
    plan.contracts.iter().for_each(|contract| lifecycle.set_cold(&contract.name));
    plan.telemetry.publish_limits(plan.config.limits());
    plan.telemetry.publish_installation(installation_of(plan));
    let records = records.map(|records| export_by_otlp(plan, records));
    let drain = stopper.clone();
    let contract_json = |entry: &frontend::CatalogEntry| serde_json::to_value(&*entry.contract).expect("plain data");
    let options = ControlOptions {
        addr: plan.config.control,
        telemetry: Arc::clone(&plan.telemetry),
        lifecycle: Arc::clone(lifecycle),
        models: catalog.entries.iter().map(contract_json).collect(),
        config_toml: plan.config.to_toml(),
        on_drain: Arc::new(move || drain.drain()),
        batcher: plan.batcher.clone(),
        shadow: Arc::clone(board),
        gate: access.filter(|_| plan.config.control_auth).map(gate),
    };
    admin::spawn_with(options, records)
        .map_err(|error| StartError::Thread(format!("control port {}: {error}", plan.config.control)))
}

/// Where recorded requests go and come out; None where nobody receives them.
fn tracing_of(config: &Config) -> (Option<Tracing>, Option<Receiver<RequestRecord>>) {
    if config.otel.endpoint.is_none() {
        return (None, None);
    }
    let (records, receiver) = mailbox(otel::RECORDS_MAX);
    (Some(Tracing { records, sample_ratio: config.otel.sample_ratio }), Some(receiver))
}

/// Metrics and traces to the configured receiver, as work for the control thread.
fn export_by_otlp(plan: &Plan<'_>, records: Receiver<RequestRecord>) -> Beside {
    let config = &plan.config.otel;
    let options = otel::Options {
        endpoint: config.endpoint.clone().expect("records come only where there is an endpoint"),
        protocol: match config.protocol {
            OtelProtocol::Grpc => otel::Protocol::Grpc,
            OtelProtocol::HttpProtobuf => otel::Protocol::HttpProtobuf,
        },
        service_name: config.service_name.clone(),
        interval: config.interval,
    };
    let telemetry = Arc::clone(&plan.telemetry);
    telemetry.otel().set_on();
    Box::new(move |stop| Box::pin(otel::run(options, telemetry, records, stop)))
}

fn installation_of(plan: &Plan<'_>) -> Installation {
    let precision = |model: &ModelEntry| {
        let of_encoder = model.manifest.bert.as_ref().map(|bert| bert.precision.name());
        of_encoder.unwrap_or(Precision::F32.name()).to_owned()
    };
    let device = |executor: usize| match &plan.config.executor.device {
        Place::Cuda(numbers) => format!("cuda:{}", numbers[executor % numbers.len()]),
        place => place.to_string(),
    };
    let mut devices: Vec<String> = (0..plan.config.threads.executors).map(device).collect();
    if plan.groups.contains(&Group::Inline) {
        devices.push("inline".to_owned());
    }
    Installation { precisions: plan.models.iter().map(precision).collect(), devices }
}

fn labels_of(contracts: &[Arc<Contract>]) -> Vec<ModelLabels> {
    contracts
        .iter()
        .map(|contract| ModelLabels { name: contract.name.clone(), version: contract.version.clone() })
        .collect()
}

fn group_of(manifest: &Manifest) -> Group {
    match manifest.placement {
        Placement::Executor => Group::Executors,
        Placement::Inline => Group::Inline,
    }
}

/// How a model's manifest says it is batched.
pub fn policy_of(manifest: &Manifest, layouts: &[Layout]) -> Policy {
    let batching = &manifest.batching;
    let queue = &manifest.queue;
    let buckets = match batching.buckets.as_slice() {
        [] => Buckets::geometric(manifest.contract.len_max()),
        lens => Buckets::new(lens).expect("the manifest checked its buckets"),
    };
    Policy {
        kind: batching.policy,
        edges: batching.edges,
        shapes_max: batching.shapes_max,
        queue_delay_max: batching.queue_delay_max,
        pad_to: batching.pad_to,
        layout: layout_of(manifest, layouts),
        can_pack: layouts.contains(&Layout::Packed),
        fill_waste_max: batching.fill_waste_max.unwrap_or(FILL_WASTE_MAX),
        group: group_of(manifest),
        queue: QueueLimits {
            rows_max: queue.rows_max.unwrap_or(u64::MAX),
            cells_max: queue.cells_max.unwrap_or(u64::MAX),
            bytes_max: queue.bytes_max.unwrap_or(u64::MAX),
        },
        weight: batching.weight,
        slo: batching.slo,
        ..Policy::new(batching.rows_max, batching.padded_cells_max, buckets)
    }
}

/// How a model's rows lie: as its manifest says, end to end where it leaves that open and the model can.
pub fn layout_of(manifest: &Manifest, layouts: &[Layout]) -> Layout {
    let packed = layouts.contains(&Layout::Packed);
    manifest.batching.layout.unwrap_or(if packed { Layout::Packed } else { Layout::Padded })
}

/// Shorter rows fill a batch while at most this share of them is padding.
const FILL_WASTE_MAX: f64 = 0.25;

/// Tokenizer threads, only where a model takes text.
fn start_tokenizers(plan: &Plan<'_>, others: &mut Vec<JoinHandle<()>>) -> Result<Option<Sender<Request>>, StartError> {
    let tokenizers: Vec<_> = plan.models.iter().map(|model| model.tokenizer.clone()).collect();
    if tokenizers.iter().all(Option::is_none) {
        return Ok(None);
    }
    let (sender, receiver) = mailbox(TEXTS_MAX);
    let receiver = Arc::new(receiver);
    for index in 0..plan.config.threads.tokenizers {
        let tokenizing = Tokenizing {
            tokenizers: tokenizers.clone(),
            texts: Arc::clone(&receiver),
            batcher: plan.batcher.clone(),
            shards: plan.shards.clone(),
        };
        others.push(spawn_thread(format!("ferry-tok-{index}"), &plan.events, move || tokenizing.run())?);
    }
    Ok(Some(sender))
}

/// Texts that may wait for a tokenizer.
const TEXTS_MAX: usize = 4096;

fn start_batcher(
    plan: &Plan<'_>,
    executors: Started,
    dumps: Option<flume::Sender<Dump>>,
    mailbox: Receiver<ToBatcher>,
) -> Result<JoinHandle<()>, StartError> {
    let queue = &plan.config.queue;
    let limits =
        QueueLimits { rows_max: queue.rows_max.into(), cells_max: queue.cells_max, bytes_max: queue.bytes_max };
    let policies = (plan.models.iter().enumerate()).map(|(at, model)| {
        let mut policy = policy_of(&model.manifest, model.model.layouts());
        if model.manifest.batching.cells_auto {
            policy.cells_max = measured_budget(ModelHandle(at as u16), model, &executors.warmed);
        }
        policy
    });
    let policies = policies.collect();
    let mut scheduler = Scheduler::new(limits, policies, &executors.seats);
    resume_costs(plan, &mut scheduler, &executors.warmed);
    executors.warmed.iter().for_each(|batch| scheduler.prime(batch.model, batch.rows, batch.padded_len, batch.took));
    let outlet = ThreadOutlet { executors: executors.links, shards: plan.shards.clone() };
    let telemetry = Arc::clone(&plan.telemetry);
    let mut batcher = Batcher::new(scheduler, outlet, &plan.contracts, plan.shards.len(), telemetry);
    executors.slots.into_iter().for_each(|(executor, slots)| batcher.set_slots(executor, slots));
    let executor = &plan.config.executor;
    batcher.give_up_after(executor.hang_timeout);
    batcher.quarantine(executor.quarantine_max as usize, executor.quarantine);
    let recorder = &plan.config.recorder;
    batcher.keep_batches(recorder.batches as usize);
    if let Some(dumps) = dumps {
        let watch = BreachWatch::new(recorder.breach, recorder.interval, plan.contracts.len());
        batcher.keep_dumps(watch, dumps);
        batcher.keep_trace(recorder.trace_bytes_max as usize);
    }
    let spin = plan.config.frontend.spin;
    spawn_thread("ferry-batcher".into(), &plan.events, move || batcher::run_thread(batcher, mailbox, spin))
}

/// The thread that writes what the flight recorder is kept as, where a directory is given. It ends with the batcher.
fn start_dumps(plan: &Plan<'_>, others: &mut Vec<JoinHandle<()>>) -> Result<Option<flume::Sender<Dump>>, StartError> {
    let Some(directory) = plan.config.recorder_directory() else { return Ok(None) };
    let names = plan.contracts.iter().map(|contract| contract.name.clone()).collect();
    let files = DumpFiles { directory, files_max: plan.config.recorder.files_max as usize, names };
    let (sender, dumps) = flume::bounded(1);
    others.push(spawn_thread("ferry-recorder".into(), &plan.events, move || files.run(&dumps))?);
    Ok(Some(sender))
}

/// What batch times of each model depend on.
fn identities_of(plan: &Plan<'_>) -> Vec<Identity> {
    let identity = |model: &ModelEntry| Identity {
        model: model.manifest.contract.name.clone(),
        version: model.manifest.contract.version.clone(),
        weights_sha256: model.manifest.weights.as_ref().and_then(|weights| weights.sha256.clone()),
        executors: plan.config.threads.executors,
    };
    plan.models.iter().map(identity).collect()
}

/// Goes on with the batch times that were learned before, where they are known and the warm-up does not contradict them.
fn resume_costs(plan: &Plan<'_>, scheduler: &mut Scheduler, warmed: &[Warmed]) {
    let Some(directory) = &plan.config.state else { return };
    for (at, identity) in identities_of(plan).iter().enumerate() {
        let model = ModelHandle(at as u16);
        match learned::load(directory, identity) {
            Ok(None) => {}
            Ok(Some(cost)) => {
                let of_model = warmed.iter().filter(|batch| batch.model == model);
                if learned::agrees(&cost, of_model.map(|batch| (batch.rows, batch.padded_len, batch.took))) {
                    scheduler.resume_cost(model, cost);
                } else {
                    tracing::warn!(
                        model = identity.model,
                        "batches take other times than was learned before; learning anew"
                    );
                }
            }
            Err(error) => tracing::warn!(model = identity.model, "what was learned before is not used: {error}"),
        }
    }
}

/// Only where a directory is given for what is learned.
fn start_keeper(plan: &Plan<'_>) -> Result<Option<KeeperHandle>, StartError> {
    let Some(directory) = &plan.config.state else { return Ok(None) };
    let keeper =
        Keeper { directory: directory.clone(), identities: identities_of(plan), batcher: plan.batcher.clone() };
    let (stop, stopped) = flume::bounded(1);
    let thread = spawn_thread("ferry-keeper".into(), &plan.events, move || keeper.run(&stopped))?;
    Ok(Some(KeeperHandle { stop, thread }))
}

/// Starts the shards, last: from here on requests come. Returns when all of them listen.
fn start_shards(
    plan: &Plan<'_>,
    listen: SocketAddr,
    options: &frontend::Options,
    catalog: &Arc<Catalog>,
    texts: Option<&Sender<Request>>,
    mailboxes: Vec<Receiver<ToShard>>,
) -> Result<Vec<ShardHandle>, StartError> {
    let cpus = available_cpus();
    let mut shards = Vec::new();
    for (index, mailbox) in mailboxes.into_iter().enumerate() {
        let turns = Arc::new(AtomicU64::new(0));
        let (ready_sender, ready) = flume::bounded(1);
        let pin = plan.config.threads.pin && cpus.len() >= plan.shards.len();
        let setup = shard::Setup {
            index: index as u16,
            listen,
            cpu: pin.then(|| cpus[index]),
            options: options.clone(),
            catalog: Arc::clone(catalog),
            telemetry: Arc::clone(&plan.telemetry),
            mailbox,
            batcher: plan.batcher.clone(),
            tokenizer: texts.cloned(),
            ready: ready_sender,
            turns: Arc::clone(&turns),
        };
        let notice = ExitNotice::new(format!("ferry-shard-{index}"), &plan.events);
        let thread = shard::start(setup, |in_turn| notice.end(in_turn)).map_err(StartError::Thread)?;
        let pthread = match ready.recv_timeout(SHARD_START_MAX) {
            Ok(Ok(pthread)) => pthread,
            Ok(Err(message)) => return Err(StartError::Thread(message)),
            Err(flume::RecvTimeoutError::Disconnected) => {
                let reason = thread.join().err().map_or("for no known reason".into(), |error| error.to_string());
                return Err(StartError::Thread(format!("shard {index} ended at its start: {reason}")));
            }
            Err(flume::RecvTimeoutError::Timeout) => {
                return Err(StartError::Thread(format!("shard {index} did not start within {SHARD_START_MAX:?}")));
            }
        };
        let mail = plan.shards[index].clone();
        shards.push(ShardHandle { thread, mail, watch: Watch::new(turns), pthread });
    }
    Ok(shards)
}

const SHARD_START_MAX: Duration = Duration::from_secs(10);

fn quota_spec(quota: &crate::config::Quota) -> QuotaSpec {
    QuotaSpec {
        requests_per_second: quota.requests_per_second,
        rows_per_second: quota.rows_per_second,
        cells_per_second: quota.cells_per_second,
        bytes_per_second: quota.bytes_per_second,
        in_flight_max: quota.in_flight_max,
        connections_max: quota.connections_max,
    }
}

fn shard_options(config: &Config, hooks: &TestHooks, in_flight_max: u32) -> frontend::Options {
    let limits = &config.frontend;
    let rules = abuse::Rules {
        size: config.abuse.points,
        per_second: config.abuse.points_per_second,
        ban: config.abuse.ban,
        ban_loopback: config.abuse.ban_loopback,
    };
    frontend::Options {
        rules,
        bans: Arc::new(abuse::Bans::new(rules)),
        quotas: Arc::new(Quotas::new(quota_spec(&config.quota))),
        connections_max: limits.connections_max.div_ceil(config.threads.shards as u32),
        credit_requests: limits.credit_requests,
        credit_bytes: limits.credit_bytes,
        payload_bytes_max: limits.payload_bytes_max,
        output_bytes_max: limits.output_bytes_max,
        output_bytes_total_max: limits.output_bytes_total_max / config.threads.shards as u64,
        receiving_bytes_max: (config.queue.bytes_max / config.threads.shards as u64)
            .max(limits.payload_bytes_max.into()),
        admitted_bytes_max: config.queue.bytes_max,
        in_flight_max,
        hello_timeout: limits.hello_timeout,
        frame_timeout: limits.frame_timeout,
        stall_timeout: limits.stall_timeout,
        idle_timeout: limits.idle_timeout,
        spin: limits.spin,
        access: None,
        tracing: None,
        panic_on_request_id: hooks.panic_on_request_id,
        panic_shard_on_request_id: hooks.panic_shard_on_request_id,
    }
}

/// The cores this process may run on.
fn available_cpus() -> Vec<usize> {
    let Ok(set) = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)) else { return Vec::new() };
    (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

/// Binds the port without listening, so that port 0 becomes one number for all shards and nobody else takes it.
fn reserve_port(listen: SocketAddr) -> Result<(Socket, SocketAddr), String> {
    let reserve = || -> std::io::Result<(Socket, SocketAddr)> {
        let socket = Socket::new(Domain::for_address(listen), Type::STREAM, None)?;
        socket.set_reuse_port(true)?;
        socket.set_reuse_address(true)?;
        socket.bind(&listen.into())?;
        let addr = socket.local_addr()?.as_socket().unwrap_or(listen);
        Ok((socket, addr))
    };
    reserve().map_err(|error| format!("cannot bind {listen}: {error}"))
}

fn spawn_thread(
    name: String,
    events: &flume::Sender<Event>,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, StartError> {
    let notice = ExitNotice::new(name.clone(), events);
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || {
            let _notice = notice;
            body();
        })
        .map_err(|error| StartError::Thread(format!("cannot start thread {name}: {error}")))
}

/// The same for an executor: its end is no news if another thread has its seat.
fn spawn_replaceable(
    name: String,
    events: &flume::Sender<Event>,
    body: impl FnOnce() -> Left + Send + 'static,
) -> Result<JoinHandle<()>, StartError> {
    let notice = ExitNotice::new(name.clone(), events);
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || {
            let mut notice = notice;
            notice.replaced = body() == Left::Replaced;
        })
        .map_err(|error| StartError::Thread(format!("cannot start thread {name}: {error}")))
}

/// How long the last batches of executors are waited for when everybody has been answered.
const EXECUTOR_END_MAX: Duration = Duration::from_secs(5);

/// Waits for threads that run what nobody waits for any more. One that hangs is left to the process's end.
fn join_executors(threads: impl Iterator<Item = JoinHandle<()>>) {
    let end = clock::now() + EXECUTOR_END_MAX;
    for thread in threads {
        while !thread.is_finished() && clock::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
        } else {
            tracing::warn!(thread = thread.thread().name(), "a thread hangs; it ends with the process");
        }
    }
}

/// How often a busy server's shards are looked at.
const WATCH_BUSY: Duration = Duration::from_millis(20);
const WATCH_IDLE: Duration = Duration::from_millis(500);

impl ServerHandle {
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Accept nothing more, finish what was accepted, end. `wait` returns then.
    pub fn drain(&self) {
        self.stopper.drain();
    }

    /// Watches the threads until the server has ended, by drain, abort or fault.
    pub fn wait(mut self) -> Ending {
        let mut ending = Ending::Drained;
        let mut shards_left = self.shards.len();
        let mut give_up_at: Option<Moment> = None;
        let mut handed_back = false;
        let mut aborted = false;
        while shards_left > 0 {
            let busy = give_up_at.is_some() || self.telemetry.in_flight() > 0;
            match self.events.recv_timeout(if busy { WATCH_BUSY } else { WATCH_IDLE }) {
                Ok(Event::Drain) if give_up_at.is_none() => {
                    give_up_at = Some(self.start_drain());
                }
                // A second request to stop ends at once, after a word to everybody who waits.
                Ok(Event::Drain | Event::Abort) => {
                    give_up_at.get_or_insert_with(|| clock::now() + self.drain_timeout);
                    aborted = true;
                    ending = Ending::Aborted;
                    self.abort_shards();
                }
                Ok(Event::Reload) => {
                    if let Some(access) = &mut self.access {
                        access.reload(&self.telemetry);
                    }
                }
                Ok(Event::Exit { thread, panicked }) => {
                    let shard = thread.starts_with("ferry-shard");
                    shards_left -= usize::from(shard);
                    // Tokenizers end with the last shard, and may be heard of before it.
                    let in_turn = shard || thread.starts_with("ferry-tok");
                    if panicked || give_up_at.is_none() || !in_turn {
                        tracing::error!(thread, panicked, "a thread ended before its turn; draining the rest");
                        ending = Ending::Fault(format!("thread {thread} ended before its turn"));
                        give_up_at.get_or_insert_with(|| self.start_drain());
                        if !shard && !aborted {
                            // Nobody is left to run what waits.
                            aborted = true;
                            self.abort_shards();
                        }
                    }
                }
                Ok(Event::DeviceLost(message)) => {
                    tracing::error!(message, "ending: another process may find the device well again");
                    ending = Ending::DeviceLost(message);
                    give_up_at.get_or_insert_with(|| clock::now() + self.drain_timeout);
                    if !aborted {
                        aborted = true;
                        self.abort_shards();
                    }
                }
                Ok(Event::Hung(message)) => {
                    tracing::error!(message, "draining");
                    ending = Ending::Fault(message);
                    give_up_at.get_or_insert_with(|| self.start_drain());
                }
                Err(_) => {}
            }
            let rest = self.drain_timeout - self.drain_queue;
            if give_up_at.is_some_and(|at| clock::now() + rest >= at) && !aborted && !handed_back {
                // Never waits: a batcher that hangs must not keep the drain from its end.
                handed_back = !matches!(self.batcher_mail.send(ToBatcher::HandBack), Err(SendError::Full(_)));
            }
            if give_up_at.is_some_and(|at| clock::now() >= at) && !aborted {
                tracing::error!(timeout = ?self.drain_timeout, "the drain took too long; answering what is left with executor_failed");
                aborted = true;
                if ending == Ending::Drained {
                    ending = Ending::Aborted;
                }
                self.abort_shards();
            }
            self.nudge_stalled_shards();
            if let Some(access) = &mut self.access {
                access.look(clock::now(), &self.telemetry);
            }
        }
        let telemetry = Arc::clone(&self.telemetry);
        self.end_threads(&ending);
        // Every shard has ended, so nothing moves any more.
        let ledger = telemetry.ledger();
        tracing::info!("ledger: {ledger}");
        if ending == Ending::Drained && ledger.in_flight() != 0 {
            ending = Ending::Fault(format!("the ledger does not add up: {ledger}"));
        }
        ending
    }

    fn start_drain(&self) -> Moment {
        tracing::info!("draining");
        self.lifecycle.set_draining();
        for shard in &self.shards {
            let _ = shard.mail.send_or_wait(ToShard::Drain);
        }
        let _ = self.batcher_mail.send_or_wait(ToBatcher::Drain);
        clock::now() + self.drain_timeout
    }

    fn abort_shards(&self) {
        for shard in &self.shards {
            let _ = shard.mail.send_or_wait(ToShard::Abort);
        }
    }

    fn nudge_stalled_shards(&mut self) {
        for (index, shard) in self.shards.iter_mut().enumerate() {
            if shard.watch.look(!shard.mail.is_empty()) {
                tracing::warn!(shard = index, "a shard has mail and does not move; nudging it");
                self.telemetry.shard(index).stall();
                // The thread is not joined yet, so its id is valid.
                let _ = pthread_kill(shard.pthread, NUDGE);
            }
        }
    }

    /// Joins what is left, in the order in which each becomes idle for ever.
    fn end_threads(self, ending: &Ending) {
        for shard in self.shards {
            let _ = shard.thread.join();
        }
        if let Some(KeeperHandle { stop, thread }) = self.keeper {
            drop(stop);
            // It asks the batcher once more, which may be gone otherwise.
            if *ending == Ending::Drained {
                let _ = thread.join();
            }
        }
        self.shadow.board.stop();
        if *ending == Ending::Drained {
            let _ = self.shadow.thread.join();
        }
        let _ = self.batcher_mail.send_or_wait(ToBatcher::Stop);
        // A model that hangs must not keep the process: after an abort or a fault, executors are left to its end.
        if *ending == Ending::Drained {
            let _ = self.batcher.join();
            let threads = std::mem::take(&mut *self.executors.lock().expect("no thread is added any more"));
            // One that was replaced is not waited for.
            let mine = threads.into_iter().filter(|(_, pass)| pass.is_valid()).map(|(thread, _)| thread);
            join_executors(mine.chain(self.others));
        }
        self.lifecycle.set_stopped();
        self.control.shutdown();
    }
}

/// Interrupts a shard's wait in the kernel. Its handler does nothing; that it is handled is the point.
const NUDGE: Signal = Signal::SIGURG;

/// Makes [`NUDGE`] harmless. Once per process, before any shard starts.
fn install_nudge_handler() -> Result<(), StartError> {
    let flag = Arc::new(std::sync::atomic::AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGURG, flag)
        .map(drop)
        .map_err(|error| StartError::Thread(format!("cannot handle SIGURG: {error}")))
}
