//! What the server counts about itself, and how it is read: metrics, statistics, the log.
//!
//! | metric | type | labels | says |
//! | --- | --- | --- | --- |
//! | `ferry_build_info` | gauge | version | always 1 |
//! | `ferry_uptime_seconds` | gauge | | time since the telemetry was made |
//! | `ferry_model_info` | gauge | model, version, precision | always 1 |
//! | `ferry_limit` | gauge | key | a bound of the configuration, by its key |
//! | `ferry_connections_opened_total` | counter | shard | connections taken |
//! | `ferry_connections_closed_total` | counter | shard | connections ended; open are opened minus closed |
//! | `ferry_read_bytes_total` | counter | shard | bytes received on the data port |
//! | `ferry_written_bytes_total` | counter | shard | bytes sent on the data port |
//! | `ferry_accept_errors_total` | counter | shard | connections that could not be taken |
//! | `ferry_turned_away_total` | counter | why | connections that were closed before they said hello: too many that have not (`strangers`), one of those that made room for another (`displaced`), an address that failed too often (`banned`), too many handshakes at once (`handshakes`) |
//! | `ferry_tls_handshakes_total` | counter | outcome | TLS handshakes that ended: `done`, or `failed` |
//! | `ferry_authentications_total` | counter | outcome | hellos whose credentials were looked at: `ok`, or `failed` |
//! | `ferry_reloads_total` | counter | what, outcome | times that certificates (`tls`) or `tenants` were read again: `ok`, or `failed`, and the old ones stay |
//! | `ferry_slow_readers_total` | counter | shard | connections closed because their answers were not read |
//! | `ferry_throttled_requests_total` | counter | shard | requests refused because their connection asks again and again, whatever it is told |
//! | `ferry_wasted_points_total` | counter | shard | points for acts of peers that made work of no use: pings, cancels, wrong requests |
//! | `ferry_banned_connections_total` | counter | shard | connections that were not taken, of addresses that were sent away |
//! | `ferry_window_changes_total` | counter | shard | credit frames: windows lowered near the budget of payloads, and raised again |
//! | `ferry_accept_pauses_total` | counter | shard | moments in which no connection was taken, near the budget of payloads |
//! | `ferry_shard_stalls_total` | counter | shard | a shard with work did not turn until it was nudged |
//! | `ferry_shard_turn_seconds` | histogram | task | how long a task had its shard to itself before it let others run: `connection`, `mailbox` (answers of batches), `accept`, `housekeeping`; what the system ran in between is in it |
//! | `ferry_late_answers_total` | counter | shard | results dropped because the request had already ended |
//! | `ferry_goaways_total` | counter | code | goodbyes sent, by reason |
//! | `ferry_requests_accepted_total` | counter | model | requests that are owed an outcome |
//! | `ferry_requests_finished_total` | counter | model, code | outcomes of accepted requests |
//! | `ferry_requests_refused_total` | counter | model, code | requests that were never accepted |
//! | `ferry_requests_in_flight` | gauge | model | accepted minus finished |
//! | `ferry_request_latency_seconds` | histogram | model | received to answered, of requests with a result |
//! | `ferry_intended_latency_seconds` | histogram | model | meant to be sent to answered, but for the way there; of requests that say how late they were sent |
//! | `ferry_send_lag_seconds` | histogram | model | meant to be sent to sent, of the same requests: what their sender added itself |
//! | `ferry_operations_total` | counter | operation, model, code | answers to what is asked on the data port beside infer: describe, list, stats; the model is `other` where none is meant that is served |
//! | `ferry_operation_duration_seconds` | histogram | operation | read to answered, of the same |
//! | `ferry_batches_total` | counter | model, reason | sealed batches, by the reason of the seal |
//! | `ferry_batch_rows` | histogram | model | rows of a sealed batch |
//! | `ferry_batch_rows_possible_total` | counter | model | rows that sealed batches had place for |
//! | `ferry_batch_cells` | histogram | model | cells launched by a batch, padding included |
//! | `ferry_batch_cells_real_total` | counter | model | cells that callers sent |
//! | `ferry_batch_cells_padding_total` | counter | model, cause | cells that are padding, to the batch's longest row or from there to its bucket; with those that callers sent, all that was launched |
//! | `ferry_batch_padding_ratio` | histogram | model | padding cells ÷ all cells of a batch |
//! | `ferry_tenant_cells_total` | counter | model, tenant, kind | cells that a tenant sent (real), and the padding of the places that its rows took; over all tenants, those of the model |
//! | `ferry_tenant_executor_seconds_total` | counter | tenant | executor time by whose rows it ran; over all tenants, the executors' time without its idle parts |
//! | `ferry_batch_fill_ratio` | histogram | model | rows of a batch ÷ rows possible |
//! | `ferry_batch_length` | histogram | model | length that rows of a batch were padded to: its bucket; of the longest where they lie end to end |
//! | `ferry_queue_delay_seconds` | histogram | model | admitted to sealed, per request |
//! | `ferry_service_time_seconds` | histogram | model | submitted to read back, per batch |
//! | `ferry_queue_rows` | gauge | model | rows waiting for a batch |
//! | `ferry_queue_cells` | gauge | model | cells waiting for a batch |
//! | `ferry_queue_bytes` | gauge | model | payload bytes waiting for a batch |
//! | `ferry_canary_rows_total` | counter | model, outcome | answered rows that were run once more, alone: `equal`, or `apart`, which is an alarm |
//! | `ferry_decisions_total` | counter | model, verdict | times rows were held, requests given up (shed) or refused by the scheduler |
//! | `ferry_cost_model_error_ratio` | gauge | model | mean relative error of predicted batch times |
//! | `ferry_batch_overrun_ratio` | gauge | model | time from sealing to the end that nine of ten batches keep ÷ what was promised; from 1 to 8 |
//! | `ferry_policy_generation` | gauge | model | raised with each change of the policy |
//! | `ferry_alarms_total` | counter | what | things that cannot be: wrong_output, a model gave outputs of another count or shape than its contract's, and its batch was answered internal; foreign_result, a batch came back twice or to nobody, and was dropped |
//! | `ferry_captures_total` | counter | end | captures of the scheduler's inputs that ended, by how |
//! | `ferry_shadow_stretches_total` | counter | outcome | stretches of time given to shadow schedulers: used; lost, for its trace found no room; mixed, for a model whose policy changed meanwhile; differs, for it could not be replayed |
//! | `ferry_shadow_covered_seconds_total` | counter | | time that used stretches cover |
//! | `ferry_shadow_cpu_seconds_total` | counter | | CPU time of the shadow thread |
//! | `ferry_shadow_error_ratio` | gauge | model, what | how far the last prediction of a policy that was then put in force was off: of p50, p99 and fill as a share, of waste the difference |
//! | `ferry_executor_info` | gauge | executor, device | always 1: where it runs its batches |
//! | `ferry_executor_busy_seconds_total` | counter | executor | time spent on batches |
//! | `ferry_executor_time_seconds_total` | counter | executor, part | where its time went: the parts (waterfall.rs) add up to all of it, up to now or to where its running batch began |
//! | `ferry_executor_failures_total` | counter | executor | batches that ended with an error of the model |
//! | `ferry_executor_panics_total` | counter | executor | batches that ended with a panic of the model |
//! | `ferry_executor_rebuilds_total` | counter | executor | models that were built again after a panic |
//! | `ferry_quarantined_total` | counter | model | requests that were refused because the same bytes had made the model fail before |
//! | `ferry_quarantine_requests` | gauge | | requests that are remembered for that |
//! | `ferry_executor_hangs_total` | counter | executor | batches that did not come back within executor.hang_timeout_ms: their requests were answered executor_failed, and another thread took the executor's seat |
//! | `ferry_executor_late_results_total` | counter | executor | results of such batches that came all the same, and were dropped |
//! | `ferry_bisections_total` | counter | executor | failed batches whose requests ran again in parts, to find whose fault it was |
//! | `ferry_bisected_rows_total` | counter | executor, outcome | rows of such batches: saved, answered all the same; culprit, failed alone; given_up, not run alone because too many failed |
//! | `ferry_bisection_runs_total` | counter | executor | parts of such batches that ran |
//! | `ferry_device_waits_total` | counter | executor, for | times that an executor of a device waited for a slot, or for readback memory |
//! | `ferry_device_pieces_total` | counter | executor | parts of batches that memory was not made for |
//! | `ferry_device_bytes` | gauge | executor | device memory of an executor: activations and slots |
//! | `ferry_pinned_bytes` | gauge | executor | host memory that an executor's device copies |
//! | `ferry_device_graphs` | gauge | executor | captured graphs |
//! | `ferry_live_objects` | gauge | kind | what exists now and could leak: connections, tickets, staging sets, outputs, buffers, streams and events of devices |
//! | `ferry_live_bytes` | gauge | kind | bytes held now: unfinished frames, unsent answers, device and pinned buffers |
//! | `ferry_log_lines_dropped_total` | counter | why | lines that are missing in the log, where another line says how many: nobody read it for so long that there was no room (`full`), or they could not be written (`failed`) |
//! | `ferry_otel_exports_total` | counter | signal, outcome | messages to the receiver of OpenTelemetry: taken (`ok`), or not (`failed`; spans are tried again) |
//! | `ferry_otel_dropped_total` | counter | what | lost on the way there: `records` of requests that found the queue full, `spans` that nobody took for long or that were turned down |
//! | `ferry_audits_total` | counter | books, outcome | times that books were recomputed, the scheduler's or a shard's: ok, or drift, which is an alarm |
//! | `ferry_process_resident_bytes` | gauge | | memory of the process, read at the scrape |
//! | `ferry_process_open_fds` | gauge | | open files of the process, read at the scrape |
//! | `ferry_process_threads` | gauge | | threads of the process, read at the scrape |
//!
//! Always true
//! - This table and what is exported are the same list; a test compares them.
//! - `accepted = Σ finished + in flight`, shard by shard and model by model; [`Telemetry::audit`] checks it.
//! - The parts of an executor's time add up to it; [`Telemetry::audit`] checks that too.
//! - Labels come from sets that are closed at the start (models, codes, reasons, numbers of threads), so no caller
//!   can make a new time series. The exception are tenants: the first [`TENANTS_LABELLED_MAX`] that say hello have theirs.
//! - What tenants are charged adds up to what was run: cells model by model, time over all.
//!
//! The unit is in the name: seconds, bytes, ratio; the others are counts. Histograms add `_bucket`, `_sum` and `_count`.
//!
//! Elsewhere: counting (counters.rs, histogram.rs), executors' time by part (waterfall.rs, times.rs), what is exported (export.rs,
//! family.rs), the log (log/).

mod counters;
mod export;
pub mod family;
pub mod histogram;
mod live;
pub mod log;
pub mod spans;
mod stamps;
mod times;
pub mod waterfall;

pub use counters::{
    BISECTED, DEVICE_WAITS, ExecutorMetrics, ModelMetrics, Operation, OtelMetrics, PADDINGS, SHADOW_FIGURES,
    SHADOW_OUTCOMES, ShadowMetrics, ShadowOutcome, ShardMetrics, Signal, TENANTS_LABELLED_MAX, Turn, TurnedAway,
};
pub use live::bounds_json;
pub use times::TimeCell;

use std::sync::{Arc, OnceLock};

use prometheus_client::registry::Registry;

use crate::clock;
use crate::vocab::{Code, ModelHandle, Moment};

/// Models with a label of their own. The rest is counted together as "other": a directory of thousands of models
/// must not make a scrape of a hundred thousand lines.
pub const MODELS_LABELLED_MAX: usize = 256;

/// The label of what belongs to no known model.
pub const OTHER: &str = "other";

/// A model as it is labelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLabels {
    pub name: String,
    pub version: String,
}

/// What the server found out while it started, to be shown beside what is counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installation {
    /// Of each model's arithmetic, in the order of their handles: `f32`, `int8`…
    pub precisions: Vec<String>,
    /// Where each executor runs its batches: `cpu`, `cuda:0`, `inline`…
    pub devices: Vec<String>,
}

/// All that is counted. One per server, shared by every thread.
#[derive(Debug)]
pub struct Telemetry {
    started_at: Moment,
    /// The labelled models, in the order of their handles.
    labels: Vec<ModelLabels>,
    shards: Vec<ShardMetrics>,
    /// One for each label, and the last for [`OTHER`].
    models: Vec<ModelMetrics>,
    executors: Vec<ExecutorMetrics>,
    /// By place; the last for [`OTHER`].
    tenants: Vec<counters::TenantMetrics>,
    limits: OnceLock<Vec<(String, u64)>>,
    installation: OnceLock<Installation>,
    otel: OtelMetrics,
    /// By [`Books`]: without and with drift.
    audits: [[counters::Count; 2]; Books::ALL.len()],
    /// Of certificates and of tenants: failed and done.
    reloads: [[counters::Count; 2]; RELOADED.len()],
    /// By [`Alarm`].
    alarms: [counters::Count; Alarm::ALL.len()],
    /// Requests that the quarantine remembers.
    remembered: counters::Count,
    /// By [`CAPTURE_ENDS`].
    captures: [counters::Count; CAPTURE_ENDS.len()],
    /// When batches were answered, where somebody wants to know.
    answered: OnceLock<stamps::Stamps>,
    shadow: ShadowMetrics,
}

/// Whose books are recomputed while the server runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Books {
    /// What waits, by the scheduler's tickets.
    Scheduler,
    /// What is owed to callers, by a shard's table.
    Shard,
}

/// What cannot be, and was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alarm {
    /// A model gave outputs of another count or shape than its contract's.
    WrongOutput,
    /// A batch came back twice, or to nobody.
    ForeignResult,
}

impl Alarm {
    pub const ALL: [Alarm; 2] = [Alarm::WrongOutput, Alarm::ForeignResult];

    pub fn name(self) -> &'static str {
        match self {
            Alarm::WrongOutput => "wrong_output",
            Alarm::ForeignResult => "foreign_result",
        }
    }
}

impl Books {
    pub const ALL: [Books; 2] = [Books::Scheduler, Books::Shard];

    pub fn name(self) -> &'static str {
        match self {
            Books::Scheduler => "scheduler",
            Books::Shard => "shard",
        }
    }
}

/// What became of all that was accepted: `accepted = Σ finished + in flight`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    pub accepted: u64,
    /// Outcomes that came, by their numbers.
    pub finished: Vec<(Code, u64)>,
}

impl Ledger {
    /// What is still owed; negative if more ended than was accepted.
    pub fn in_flight(&self) -> i64 {
        self.finished.iter().fold(self.accepted as i64, |left, (_, count)| left - *count as i64)
    }
}

impl std::fmt::Display for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} accepted =", self.accepted)?;
        for (code, count) in &self.finished {
            write!(f, " {count} {code} +")?;
        }
        write!(f, " {} in flight", self.in_flight())
    }
}

/// What is read again while the server runs.
pub const RELOADED: [&str; 2] = ["tls", "tenants"];

/// How a capture can end, in the order of their numbers.
pub const CAPTURE_ENDS: [&str; 5] = ["complete", "reader_slow", "reader_gone", "stopped", "too_large"];

impl Telemetry {
    /// Makes every handle. `models` in the order of their [`ModelHandle`]s.
    pub fn new(models: &[ModelLabels], shards: usize, executors: usize) -> Arc<Telemetry> {
        let labels: Vec<ModelLabels> = models.iter().take(MODELS_LABELLED_MAX).cloned().collect();
        Arc::new(Telemetry {
            started_at: clock::now(),
            shards: (0..shards).map(|_| ShardMetrics::new(labels.len())).collect(),
            models: (0..=labels.len()).map(|_| ModelMetrics::new()).collect(),
            executors: (0..executors).map(|_| ExecutorMetrics::default()).collect(),
            tenants: (0..=TENANTS_LABELLED_MAX).map(|_| Default::default()).collect(),
            limits: OnceLock::new(),
            installation: OnceLock::new(),
            otel: OtelMetrics::default(),
            audits: Default::default(),
            reloads: Default::default(),
            alarms: Default::default(),
            remembered: Default::default(),
            captures: Default::default(),
            answered: OnceLock::new(),
            shadow: ShadowMetrics::default(),
            labels,
        })
    }

    pub fn shard(&self, shard: usize) -> &ShardMetrics {
        &self.shards[shard]
    }

    pub fn model(&self, model: ModelHandle) -> &ModelMetrics {
        &self.models[model.index().min(self.labels.len())]
    }

    pub fn executor(&self, executor: usize) -> &ExecutorMetrics {
        &self.executors[executor]
    }

    /// The place of a tenant in the tables, by its number. Number 0 are the nameless, and all for whom there is no number.
    pub fn tenant_place(tenant: u16) -> usize {
        usize::from(tenant).checked_sub(1).map_or(TENANTS_LABELLED_MAX, |place| place.min(TENANTS_LABELLED_MAX))
    }

    /// Payload bytes of all accepted requests, as the shards last said.
    pub fn admitted_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.admitted_bytes.get()).sum()
    }

    /// A tenant with this number said hello.
    pub fn tenant_named(&self, tenant: u16, name: &str) {
        let place = Telemetry::tenant_place(tenant);
        if place < TENANTS_LABELLED_MAX {
            let _ = self.tenants[place].name.set(name.to_owned());
        }
    }

    /// The rows of the tenant of this place took so much of an executor's time, in ns.
    pub fn tenant_ran(&self, place: usize, nanos: u64) {
        self.tenants[place].executor_nanos.add(nanos);
    }

    fn tenant_name(&self, place: usize) -> &str {
        self.tenants[place].name.get().map_or(OTHER, String::as_str)
    }

    /// Books were recomputed, and added up or not.
    pub fn audited(&self, books: Books, adds_up: bool) {
        self.audits[books as usize][usize::from(!adds_up)].add(1);
    }

    /// Certificates or tenants (by their place in [`RELOADED`]) were read again.
    pub fn reloaded(&self, what: usize, done: bool) {
        self.reloads[what][usize::from(done)].add(1);
    }

    /// A request of this model was refused because it had made it fail before.
    pub fn quarantined(&self, model: ModelHandle) {
        self.model(model).quarantined.add(1);
    }

    /// So many requests are remembered for having made their model fail.
    pub fn remembered(&self, requests: usize) {
        self.remembered.set(requests as u64);
    }

    /// What cannot be, was. Whoever calls it has said more in the log.
    pub fn alarm(&self, alarm: Alarm) {
        self.alarms[alarm as usize].add(1);
    }

    pub fn alarms(&self, alarm: Alarm) -> u64 {
        self.alarms[alarm as usize].get()
    }

    /// What became of all that was accepted.
    pub fn ledger(&self) -> Ledger {
        let models = || self.shards.iter().flat_map(|shard| &shard.models);
        // Outcomes first: what is accepted in between is in flight.
        let by_code = |code: &Code| (*code, models().map(|model| model.finished.of(*code).get()).sum::<u64>());
        let finished = Code::ALL.iter().map(by_code).filter(|(_, count)| *count > 0).collect();
        Ledger { finished, accepted: models().map(|model| model.accepted.get()).sum() }
    }

    pub fn shadow(&self) -> &ShadowMetrics {
        &self.shadow
    }

    /// A prediction of a figure in [`SHADOW_FIGURES`] was so far off. Models without a label of their own have none.
    pub fn shadow_error(&self, model: ModelHandle, what: &str, error: f64) {
        let place = SHADOW_FIGURES.iter().position(|known| *known == what);
        if let (Some(metrics), Some(place)) = (self.models[..self.labels.len()].get(model.index()), place) {
            metrics.shadow_error(place, error);
        }
    }

    /// A capture ended: `end` is its place in [`CAPTURE_ENDS`].
    pub fn capture_ended(&self, end: usize) {
        self.captures[end].add(1);
    }

    /// From now on it is kept when the last so many batches were answered. The first call counts.
    pub fn keep_answered(&self, batches: usize) {
        let _ = self.answered.set(stamps::Stamps::new(batches));
    }

    /// Whether it is kept when batches were answered.
    pub fn keeps_answered(&self) -> bool {
        self.answered.get().is_some()
    }

    /// Answers of a batch were written.
    pub fn answered(&self, batch: u64, now: Moment) {
        if let Some(stamps) = self.answered.get() {
            stamps.note(batch, now);
        }
    }

    /// When the last answers of a batch were written, or of one before it: whoever asks knows when it ended.
    pub fn answered_at(&self, batch: u64) -> Option<Moment> {
        self.answered.get()?.get(batch)
    }

    /// Exports the bounds that the server runs with. The first call counts.
    pub fn publish_limits(&self, limits: Vec<(String, u64)>) {
        let _ = self.limits.set(limits);
    }

    /// Exports what models and executors are made of. The first call counts.
    pub fn publish_installation(&self, installation: Installation) {
        let _ = self.installation.set(installation);
    }

    /// Empty until the server has said it.
    pub fn installation(&self) -> &Installation {
        static NOTHING: Installation = Installation { precisions: Vec::new(), devices: Vec::new() };
        self.installation.get().unwrap_or(&NOTHING)
    }

    /// What the exporter of OpenTelemetry counts.
    pub fn otel(&self) -> &OtelMetrics {
        &self.otel
    }

    /// A bound that the server runs with, by its key.
    pub fn limit(&self, key: &str) -> Option<u64> {
        self.limits.get()?.iter().find(|(known, _)| known == key).map(|(_, value)| *value)
    }

    /// Connections that are open now.
    pub fn connections(&self) -> u64 {
        // Closed first: what is opened in between makes the answer too large, never negative.
        let closed: u64 = self.shards.iter().map(|shard| shard.connections_closed.get()).sum();
        let opened: u64 = self.shards.iter().map(|shard| shard.connections_opened.get()).sum();
        opened.saturating_sub(closed)
    }

    /// Mean rows of a request of this model; 1 before the first.
    pub fn rows_per_request(&self, model: ModelHandle) -> f64 {
        let place = model.index().min(self.labels.len());
        let requests: u64 = self.shards.iter().map(|shard| shard.models[place].accepted.get()).sum();
        (self.models[place].rows.get() as f64 / requests.max(1) as f64).max(1.0)
    }

    /// OpenMetrics text of everything.
    pub fn encode(self: &Arc<Self>) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Arc::clone(self)));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("writing to a String does not fail");
        text
    }

    /// When counting began.
    pub fn started_at(&self) -> Moment {
        self.started_at
    }

    /// Name and version of a model, by its handle's number; of one without labels of its own, [`OTHER`] and nothing.
    pub fn model_labels(&self, model: usize) -> (&str, &str) {
        self.labels.get(model).map_or((OTHER, ""), |labels| (&labels.name, &labels.version))
    }

    /// Label of a place in the per-model tables.
    fn model_name(&self, place: usize) -> &str {
        self.labels.get(place).map_or(OTHER, |labels| labels.name.as_str())
    }

    pub fn accepted_total(&self) -> u64 {
        self.shards.iter().map(ShardMetrics::accepted_total).sum()
    }

    /// Accepted and not finished, all shards together.
    pub fn in_flight(&self) -> u64 {
        self.shards.iter().map(ShardMetrics::in_flight).sum()
    }

    /// Checks that every accepted request is accounted for. Meaningful when nothing is moving: counters of a
    /// running burst are read one after the other.
    pub fn audit(&self) -> Result<(), String> {
        for (number, shard) in self.shards.iter().enumerate() {
            for (place, model) in shard.models.iter().enumerate() {
                let (accepted, finished) = (model.accepted.get(), model.finished.sum());
                if finished > accepted {
                    return Err(format!(
                        "shard {number}, model {}: {finished} outcomes were counted for {accepted} accepted requests",
                        self.model_name(place)
                    ));
                }
            }
            let (accepted, finished) = (shard.accepted_total(), shard.finished_total());
            // Only where the shard says how many entries its table has: else in flight is defined by the difference.
            if let Some(entries) = shard.table_entries.get().checked_sub(1)
                && accepted != finished + entries
            {
                return Err(format!(
                    "shard {number}: {accepted} accepted, {finished} finished and {entries} in flight do not add up"
                ));
            }
        }
        for (place, model) in self.models.iter().enumerate() {
            let (batches, counted) = (model.batches_total(), model.batch_rows.count());
            let (real, padded) = (model.cells_real.get(), model.cells_padded.get());
            let padding: u64 = model.padding.iter().map(counters::Count::get).sum();
            if batches != counted || real + padding != padded || model.rows.get() > model.rows_possible.get() {
                return Err(format!(
                    "model {}: {batches} batches ({counted} in the histogram) with {} rows of {} possible and {real} \
                     real of {padded} cells do not add up",
                    self.model_name(place),
                    model.rows.get(),
                    model.rows_possible.get()
                ));
            }
        }
        for (place, model) in self.models.iter().enumerate() {
            let sum = |of: fn(&counters::TenantCells) -> u64| model.tenants.iter().map(of).sum::<u64>();
            let (real, padding) = (sum(|tenant| tenant.real.get()), sum(|tenant| tenant.padding.get()));
            if (real, real + padding) != (model.cells_real.get(), model.cells_padded.get()) {
                return Err(format!(
                    "model {}: {real} real and {padding} padding cells of tenants are not its {} of {}",
                    self.model_name(place),
                    model.cells_real.get(),
                    model.cells_padded.get()
                ));
            }
        }
        let (now, mut ran) = (clock::now(), 0);
        for (number, executor) in self.executors.iter().enumerate() {
            let view = executor.times.read(now);
            ran += view.parts.of_batches();
            if view.parts.total() != view.elapsed() {
                let (total, elapsed) = (view.parts.total(), view.elapsed());
                return Err(format!("executor {number}: {total} ns in parts of {elapsed} ns do not add up"));
            }
        }
        let charged: u64 = self.tenants.iter().map(|tenant| tenant.executor_nanos.get()).sum();
        if charged != ran {
            return Err(format!("{charged} ns were charged to tenants of {ran} ns that executors ran"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::waterfall::{Part, Parts, View};
    use super::*;
    use crate::vocab::SealReason;

    const MODEL: ModelHandle = ModelHandle(0);

    fn telemetry() -> Arc<Telemetry> {
        Telemetry::new(&[ModelLabels { name: "echo".into(), version: "1".into() }], 2, 1)
    }

    #[test]
    fn the_ledger_says_what_became_of_all_and_what_is_owed() {
        let telemetry = telemetry();
        assert_eq!(telemetry.ledger().to_string(), "0 accepted = 0 in flight");
        telemetry.shard(0).accepted(MODEL, 3);
        telemetry.shard(1).accepted(MODEL, 2);
        telemetry.shard(0).finished(MODEL, Code::Ok, 2);
        telemetry.shard(1).finished(MODEL, Code::Cancelled, 1);
        let ledger = telemetry.ledger();
        assert_eq!(
            (ledger.to_string(), ledger.in_flight()),
            ("5 accepted = 2 ok + 1 cancelled + 2 in flight".into(), 2)
        );
        // More ended than was accepted: as wrong as less.
        telemetry.shard(1).finished(MODEL, Code::Ok, 3);
        assert_eq!(telemetry.ledger().in_flight(), -1);
    }

    #[test]
    fn the_table_on_top_of_this_file_is_what_is_exported() {
        let telemetry = telemetry();
        telemetry.publish_limits(vec![("queue.rows_max".into(), 5)]);
        let documented: BTreeSet<(String, String)> = include_str!("mod.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! | `ferry_"))
            .map(|rest| {
                let mut cells = rest.split('|').map(str::trim);
                let name = cells.next().expect("split gives at least one").trim_end_matches('`');
                (format!("ferry_{name}"), cells.next().expect("the type follows the name").to_owned())
            })
            .collect();
        let exported: BTreeSet<(String, String)> = telemetry
            .encode()
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .map(|rest| {
                let (name, kind) = rest.split_once(' ').expect("TYPE has a name and a type");
                let suffix = if kind == "counter" { "_total" } else { "" };
                (format!("{name}{suffix}"), kind.to_owned())
            })
            .collect();
        assert_eq!(documented, exported);
    }

    #[test]
    fn requests_that_ended_and_those_in_flight_add_up_to_those_accepted() {
        let telemetry = telemetry();
        let shard = telemetry.shard(0);
        shard.accepted(MODEL, 10);
        shard.finished(MODEL, Code::Ok, 6);
        shard.finished(MODEL, Code::Cancelled, 1);
        shard.refused(Some(MODEL), Code::Overloaded);
        shard.table_entries(3);
        assert_eq!(shard.in_flight(), 3);
        assert_eq!(telemetry.audit(), Ok(()));
    }

    #[test]
    fn an_outcome_too_many_is_found() {
        let telemetry = telemetry();
        telemetry.shard(1).accepted(MODEL, 1);
        telemetry.shard(1).finished(MODEL, Code::Ok, 1);
        telemetry.shard(1).finished(MODEL, Code::DeadlineExceeded, 1);
        let error = telemetry.audit().expect_err("two outcomes for one request");
        assert!(error.contains("shard 1") && error.contains("echo"), "{error}");
    }

    #[test]
    fn an_outcome_that_was_never_counted_is_found() {
        let telemetry = telemetry();
        telemetry.shard(0).accepted(MODEL, 2);
        telemetry.shard(0).finished(MODEL, Code::Ok, 1);
        telemetry.shard(0).table_entries(0);
        let error = telemetry.audit().expect_err("one request vanished");
        assert!(error.contains("2 accepted, 1 finished and 0 in flight"), "{error}");
    }

    #[test]
    fn an_outcome_counted_for_another_model_is_found() {
        let telemetry = telemetry();
        telemetry.shard(0).accepted(MODEL, 1);
        telemetry.shard(0).finished(ModelHandle(7), Code::Ok, 1);
        telemetry.shard(0).table_entries(0);
        assert!(telemetry.audit().expect_err("the sums agree, the models do not").contains(OTHER));
    }

    #[test]
    fn a_batch_with_more_real_cells_than_cells_is_found() {
        let telemetry = telemetry();
        telemetry.model(MODEL).batch_sealed(SealReason::Full, 1, 1, 10, 11, 10);
        assert!(telemetry.audit().is_err());
    }

    #[test]
    fn a_handle_that_names_no_model_counts_as_other() {
        let telemetry = telemetry();
        telemetry.shard(0).accepted(ModelHandle(999), 1);
        telemetry.shard(0).refused(None, Code::NotFound);
        telemetry.model(ModelHandle(999)).queue_delay(Duration::from_micros(3));
        let text = telemetry.encode();
        assert!(text.contains("ferry_requests_accepted_total{model=\"other\"} 1"), "{text}");
        assert!(text.contains("ferry_requests_refused_total{model=\"other\",code=\"not_found\"} 1"), "{text}");
        assert!(!text.contains("999"), "{text}");
    }

    #[test]
    fn statistics_are_the_counters() {
        let telemetry = telemetry();
        telemetry.shard(0).accepted(MODEL, 3);
        telemetry.shard(1).accepted(MODEL, 2);
        telemetry.shard(0).finished(MODEL, Code::Ok, 3);
        telemetry.model(MODEL).batch_sealed(SealReason::Full, 3, 4, 12, 30, 48);
        telemetry.executor(0).busy(Duration::from_micros(1500));
        let stats = telemetry.stats_json();
        assert_eq!(stats["accepted"], 5);
        assert_eq!(stats["in_flight"], 2);
        assert_eq!(stats["outcomes"]["ok"], 3);
        assert_eq!(
            stats["models"],
            serde_json::json!({"echo": {
                "batches": 1, "rows": 3, "rows_possible": 4, "cells_real": 30, "cells_padded": 48
            }})
        );
        assert_eq!(stats["executors"], serde_json::json!([{"busy_us": 1500, "inline": false}]));
        let keys: Vec<&String> = stats.as_object().expect("an object").keys().collect();
        assert_eq!(keys.len(), 7, "{keys:?}");
    }

    #[test]
    fn the_time_of_executors_that_are_threads_is_summed_and_the_batchers_own_is_beside() {
        let telemetry = Telemetry::new(&[], 1, 3);
        telemetry.executor(2).set_inline();
        let view = |nanos: u64| {
            let mut parts = Parts::default();
            parts.0[Part::Useful as usize] = nanos;
            View { begin: Moment(5), until: Moment(5 + nanos), parts, state: None }
        };
        for (executor, nanos) in [2_000_000_000, 500_000_000, 7_000_000_000].into_iter().enumerate() {
            telemetry.executor(executor).times().open();
            telemetry.executor(executor).times().close(&view(nanos));
        }
        telemetry.tenant_ran(TENANTS_LABELLED_MAX, 9_500_000_000);
        assert_eq!(telemetry.audit(), Ok(()));
        let waterfall = &telemetry.stats_json()["waterfall"];
        assert_eq!(waterfall["seconds"]["useful"], 2.5);
        assert_eq!(waterfall["executors"][2]["seconds"]["useful"], 7.0);
        assert_eq!(
            (&waterfall["executors"][1]["inline"], &waterfall["executors"][2]["inline"]),
            (&false.into(), &true.into())
        );
        let names: Vec<&str> =
            waterfall["seconds"].as_object().expect("an object").keys().map(String::as_str).collect();
        let expected: BTreeSet<&str> = waterfall::PARTS.into_iter().collect();
        assert_eq!(names.into_iter().collect::<BTreeSet<_>>(), expected);
        let text = telemetry.encode();
        assert!(text.contains("ferry_executor_time_seconds_total{executor=\"1\",part=\"useful\"} 0.5"), "{text}");
        // A part that was lost is found.
        telemetry.executor(0).times().open();
        telemetry.executor(0).times().close(&View { until: Moment(9_000_000_000), ..view(1) });
        assert!(telemetry.audit().expect_err("planted").contains("executor 0"));
    }

    #[test]
    fn the_first_tenants_have_labels_and_the_rest_is_other() {
        let telemetry = telemetry();
        for tenant in 0..200u16 {
            telemetry.tenant_named(tenant, &format!("team {tenant}"));
            telemetry.model(MODEL).tenant_cells(Telemetry::tenant_place(tenant), 3, 1);
            telemetry.tenant_ran(Telemetry::tenant_place(tenant), 1_000_000_000);
        }
        let text = telemetry.encode();
        let lines = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!(lines("ferry_tenant_cells_total{"), 2 * (TENANTS_LABELLED_MAX + 1));
        assert_eq!(lines("ferry_tenant_executor_seconds_total{"), TENANTS_LABELLED_MAX + 1);
        assert!(text.contains("ferry_tenant_cells_total{model=\"echo\",tenant=\"team 64\",kind=\"real\"} 3"), "{text}");
        assert!(text.contains("ferry_tenant_cells_total{model=\"echo\",tenant=\"other\",kind=\"real\"} 408"), "{text}");
        assert!(text.contains("ferry_tenant_executor_seconds_total{tenant=\"other\"} 136.0"), "{text}");
        let error = telemetry.audit().expect_err("nothing of it was sealed");
        assert!(error.contains("cells of tenants"), "{error}");
    }

    #[test]
    fn a_directory_of_many_models_makes_no_more_labels_than_allowed() {
        let models: Vec<ModelLabels> =
            (0..1000).map(|n| ModelLabels { name: format!("m{n}"), version: "1".into() }).collect();
        let telemetry = Telemetry::new(&models, 1, 1);
        telemetry.shard(0).accepted(ModelHandle(300), 1);
        telemetry.shard(0).accepted(ModelHandle(301), 1);
        let text = telemetry.encode();
        assert_eq!(text.matches("ferry_model_info{").count(), MODELS_LABELLED_MAX);
        assert!(text.contains("ferry_requests_accepted_total{model=\"other\"} 2"), "{text}");
    }
}
