//! What each thread counts. Every handle is made at the start, so recording is an atomic addition and never a look-up.
//!
//! Always true
//! - A shard, a model's batcher and an executor each write only their own block, on cache lines of its own; the batcher writes an
//!   executor's times besides.
//! - An event that did not happen is not recorded: `accepted(_, 0)` and an empty batch leave no trace.
//! - A handle that names no model counts for the last place, "other".
//!
//! Elsewhere: names, labels and text (export.rs).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::histogram::Histogram;
use super::times::TimeCell;
use super::waterfall::Cells;
use crate::vocab::{Code, ModelHandle, SealReason};

/// A counter or, where it is set, a gauge.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    pub(super) fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

pub(super) const CODES: usize = Code::ALL.len();

/// One count for each outcome. Codes are numbered without gaps, so a code's number is its place.
#[derive(Debug, Default)]
pub(super) struct ByCode([Count; CODES]);

impl ByCode {
    pub(super) fn of(&self, code: Code) -> &Count {
        &self.0[code as usize]
    }

    pub(super) fn sum(&self) -> u64 {
        self.0.iter().map(Count::get).sum()
    }
}

/// What a shard counts for one model.
#[derive(Debug, Default)]
pub(super) struct ShardModel {
    pub(super) accepted: Count,
    pub(super) finished: ByCode,
    pub(super) refused: ByCode,
    pub(super) described: ByCode,
    /// Made with the first answer: a directory of many models on many shards would fill megabytes with zeros.
    latencies: OnceLock<Box<Latencies>>,
}

impl ShardModel {
    pub(super) fn latencies(&self) -> Option<&Latencies> {
        self.latencies.get().map(|latencies| &**latencies)
    }
}

/// How long answered requests took.
#[derive(Debug)]
pub(super) struct Latencies {
    /// Received to answered.
    pub(super) request: Histogram,
    /// Meant to be sent to sent, of requests that say it.
    pub(super) send_lag: Histogram,
    /// Their sum: meant to be sent to answered, but for the way there.
    pub(super) intended: Histogram,
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies { request: Histogram::times(), send_lag: Histogram::times(), intended: Histogram::times() }
    }
}

/// What a caller may ask on the data port beside infer, which has metrics of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A model's contract.
    Describe,
    /// Which models there are.
    List,
    Stats,
}

impl Operation {
    pub const ALL: [Operation; 3] = [Operation::Describe, Operation::List, Operation::Stats];

    pub fn name(self) -> &'static str {
        match self {
            Operation::Describe => "describe",
            Operation::List => "list",
            Operation::Stats => "stats",
        }
    }
}

/// Who had a shard to itself for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A connection: what it read was taken and answered, and what was to be sent was written.
    Connection,
    /// New connections.
    Accept,
    /// Deadlines, timeouts, budgets.
    Housekeeping,
    /// Answers of batches, shutdown.
    Mailbox,
}

impl Turn {
    pub const ALL: [Turn; 4] = [Turn::Connection, Turn::Accept, Turn::Housekeeping, Turn::Mailbox];

    pub fn name(self) -> &'static str {
        match self {
            Turn::Connection => "connection",
            Turn::Accept => "accept",
            Turn::Housekeeping => "housekeeping",
            Turn::Mailbox => "mailbox",
        }
    }
}

/// What one shard counts. Aligned so that no two threads write the same cache line (128: lines are fetched in pairs).
#[derive(Debug)]
#[repr(align(128))]
pub struct ShardMetrics {
    pub(super) models: Vec<ShardModel>,
    pub(super) connections_opened: Count,
    pub(super) connections_closed: Count,
    pub(super) bytes_read: Count,
    pub(super) bytes_written: Count,
    pub(super) goaways: ByCode,
    pub(super) late_answers: Count,
    pub(super) slow_readers: Count,
    pub(super) throttled: Count,
    pub(super) wasted: Count,
    pub(super) banned: Count,
    pub(super) windows_changed: Count,
    pub(super) accept_pauses: Count,
    pub(super) stalls: Count,
    pub(super) accept_errors: Count,
    /// Failed and done.
    pub(super) handshakes: [Count; 2],
    pub(super) authentications: [Count; 2],
    /// By [`TurnedAway`].
    pub(super) turned_away: [Count; TurnedAway::ALL.len()],
    /// Entries of the shard's in-flight table plus one; 0 until the shard first says it.
    pub(super) table_entries: Count,
    pub(super) receiving_bytes: Count,
    pub(super) admitted_bytes: Count,
    pub(super) unsent_bytes: Count,
    /// Answered, of those that mean no model. By [`Operation`].
    pub(super) operations: [Count; Operation::ALL.len()],
    pub(super) operation_times: [Histogram; Operation::ALL.len()],
    /// By [`Turn`].
    pub(super) turn_times: [Histogram; Turn::ALL.len()],
}

impl ShardMetrics {
    pub(super) fn new(models: usize) -> ShardMetrics {
        ShardMetrics {
            models: (0..=models).map(|_| ShardModel::default()).collect(),
            connections_opened: Count::default(),
            connections_closed: Count::default(),
            bytes_read: Count::default(),
            bytes_written: Count::default(),
            goaways: ByCode::default(),
            late_answers: Count::default(),
            slow_readers: Count::default(),
            throttled: Count::default(),
            wasted: Count::default(),
            banned: Count::default(),
            windows_changed: Count::default(),
            accept_pauses: Count::default(),
            stalls: Count::default(),
            accept_errors: Count::default(),
            handshakes: Default::default(),
            authentications: Default::default(),
            turned_away: Default::default(),
            table_entries: Count::default(),
            receiving_bytes: Count::default(),
            admitted_bytes: Count::default(),
            unsent_bytes: Count::default(),
            operations: Default::default(),
            operation_times: Operation::ALL.map(|_| Histogram::times()),
            turn_times: Turn::ALL.map(|_| Histogram::times()),
        }
    }

    fn model(&self, model: Option<ModelHandle>) -> &ShardModel {
        let other = self.models.len() - 1;
        &self.models[model.map_or(other, |model| model.index().min(other))]
    }

    pub fn connection_opened(&self) {
        self.connections_opened.add(1);
    }

    pub fn connection_closed(&self) {
        self.connections_closed.add(1);
    }

    /// `n` requests were accepted: each is owed exactly one [`ShardMetrics::finished`].
    pub fn accepted(&self, model: ModelHandle, n: u64) {
        self.model(Some(model)).accepted.add(n);
    }

    /// `n` accepted requests ended with `code`.
    pub fn finished(&self, model: ModelHandle, code: Code, n: u64) {
        self.model(Some(model)).finished.of(code).add(n);
    }

    /// A request was answered with a result so long after it was received. `send_lag`: how much later than it meant to its
    /// sender sent it, where it says so.
    ///
    /// Hot: once per answer. Guarded by benches/echo_path.rs.
    pub fn answered(&self, model: ModelHandle, latency: Duration, send_lag: Option<Duration>) {
        let latencies = self.model(Some(model)).latencies.get_or_init(Box::default);
        latencies.request.observe_time_alone(latency);
        if let Some(lag) = send_lag {
            latencies.send_lag.observe_time_alone(lag);
            latencies.intended.observe_time_alone(latency + lag);
        }
    }

    /// A request was refused before it was accepted; `None` where no model could be told from it.
    pub fn refused(&self, model: Option<ModelHandle>, code: Code) {
        self.model(model).refused.of(code).add(1);
    }

    /// Something other than an infer was answered so long after it was read; `model` where one was meant that is served.
    pub fn operated(&self, operation: Operation, model: Option<ModelHandle>, code: Code, took: Duration) {
        self.operation_times[operation as usize].observe_time_alone(took);
        match operation {
            Operation::Describe => self.model(model).described.of(code).add(1),
            Operation::List | Operation::Stats => self.operations[operation as usize].add(1),
        }
    }

    pub fn bytes_read(&self, n: u64) {
        self.bytes_read.add(n);
    }

    pub fn bytes_written(&self, n: u64) {
        self.bytes_written.add(n);
    }

    pub fn goaway(&self, code: Code) {
        self.goaways.of(code).add(1);
    }

    /// A result was dropped because its request had already ended.
    pub fn late_answer(&self) {
        self.late_answers.add(1);
    }

    /// A connection was closed because its answers were not read.
    pub fn slow_reader(&self) {
        self.slow_readers.add(1);
    }

    /// A request was refused before it was looked at further, for nearly all of its connection's lately were.
    pub fn throttled(&self) {
        self.throttled.add(1);
    }

    /// A peer did something wasteful that costs so many points.
    pub fn wasted(&self, points: u32) {
        self.wasted.add(points.into());
    }

    /// A connection was told another window.
    pub fn window_changed(&self) {
        self.windows_changed.add(1);
    }

    /// No connection was taken for a moment, because accepted payloads are near their budget.
    pub fn accept_paused(&self) {
        self.accept_pauses.add(1);
    }

    /// A connection of a banned address was not taken.
    pub fn banned(&self) {
        self.banned.add(1);
    }

    /// A task of the shard ran for so long before it let others run. From the shard's thread alone.
    ///
    /// Hot: once per turn. benches/overhead.py shows what it costs an echo.
    pub fn turn(&self, whose: Turn, took: Duration) {
        self.turn_times[whose as usize].observe_time_alone(took);
    }

    /// The shard had work and did not turn until it was nudged.
    pub fn stall(&self) {
        self.stalls.add(1);
    }

    pub fn accept_error(&self) {
        self.accept_errors.add(1);
    }

    /// A TLS handshake ended.
    pub fn handshake(&self, done: bool) {
        self.handshakes[usize::from(done)].add(1);
    }

    /// Somebody proved who it is, or failed to.
    pub fn authenticated(&self, proved: bool) {
        self.authentications[usize::from(proved)].add(1);
    }

    /// A connection was closed as it came.
    pub fn turned_away(&self, why: TurnedAway) {
        self.turned_away[why as usize].add(1);
    }

    /// The number of entries in the shard's in-flight table, said after a burst. It is what [`super::Telemetry::audit`]
    /// compares the counters with: without it an answer that was never counted cannot be told from one still owed.
    pub fn table_entries(&self, entries: u64) {
        self.table_entries.set(entries + 1);
    }

    /// Bytes of unfinished frames, and of answers that could not be written yet. Said with the entries.
    pub fn held_bytes(&self, receiving: u64, unsent: u64, admitted: u64) {
        self.admitted_bytes.set(admitted);
        self.receiving_bytes.set(receiving);
        self.unsent_bytes.set(unsent);
    }

    /// Accepted and not finished of one model. Only the shard itself may believe it: others may read it in the middle of a burst.
    pub fn owed_of(&self, model: ModelHandle) -> i64 {
        let model = self.model(Some(model));
        model.accepted.get() as i64 - model.finished.sum() as i64
    }

    pub fn accepted_total(&self) -> u64 {
        self.models.iter().map(|model| model.accepted.get()).sum()
    }

    pub fn finished_total(&self) -> u64 {
        self.models.iter().map(|model| model.finished.sum()).sum()
    }

    /// Accepted and not finished. Counts of other threads may be read in the middle of a burst.
    pub fn in_flight(&self) -> u64 {
        // Finished first: what is accepted in between makes the answer too large, never negative.
        let finished = self.finished_total();
        self.accepted_total().saturating_sub(finished)
    }
}

/// Why a connection is closed before it has said hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnedAway {
    /// As many as may are there that have not said hello, and each has as good a right to be.
    Strangers,
    /// It had its chance to say hello, and made room for another.
    Displaced,
    /// Its address failed too often to prove who it is.
    Banned,
    /// Too many handshakes begin at once.
    Handshakes,
}

impl TurnedAway {
    pub const ALL: [TurnedAway; 4] =
        [TurnedAway::Strangers, TurnedAway::Displaced, TurnedAway::Banned, TurnedAway::Handshakes];

    pub fn name(self) -> &'static str {
        match self {
            TurnedAway::Strangers => "strangers",
            TurnedAway::Displaced => "displaced",
            TurnedAway::Banned => "banned",
            TurnedAway::Handshakes => "handshakes",
        }
    }
}

/// Tenants with a label of their own, the first that said hello. The others and the nameless are counted together.
pub const TENANTS_LABELLED_MAX: usize = 64;

/// What one tenant's rows took, of one model.
#[derive(Debug, Default)]
pub(super) struct TenantCells {
    pub(super) real: Count,
    pub(super) padding: Count,
}

/// What one tenant's rows took, of all models.
#[derive(Debug, Default)]
pub(super) struct TenantMetrics {
    pub(super) name: OnceLock<String>,
    pub(super) executor_nanos: Count,
}

/// What is counted for one model, by the batcher and by the executors that run it.
#[derive(Debug)]
#[repr(align(128))]
pub struct ModelMetrics {
    pub(super) batches: [Count; SealReason::ALL.len()],
    pub(super) rows: Count,
    pub(super) rows_possible: Count,
    pub(super) cells_real: Count,
    /// By [`PADDINGS`].
    pub(super) padding: [Count; PADDINGS.len()],
    pub(super) cells_padded: Count,
    /// By place of the tenant.
    pub(super) tenants: Vec<TenantCells>,
    pub(super) batch_rows: Histogram,
    pub(super) batch_cells: Histogram,
    pub(super) batch_padding: Histogram,
    pub(super) batch_fill: Histogram,
    pub(super) batch_length: Histogram,
    pub(super) queue_delay: Histogram,
    pub(super) service_time: Histogram,
    pub(super) queue_rows: Count,
    pub(super) queue_cells: Count,
    pub(super) queue_bytes: Count,
    pub(super) held: Count,
    pub(super) shed: Count,
    pub(super) refused: Count,
    pub(super) quarantined: Count,
    pub(super) looks_equal: Count,
    pub(super) looks_apart: Count,
    pub(super) policy_generation: Count,
    /// Bits of an f64.
    pub(super) cost_error: Count,
    pub(super) overrun: Count,
    /// By [`SHADOW_FIGURES`]: bits of an f64; 0: nothing was predicted yet.
    pub(super) shadow_errors: [Count; SHADOW_FIGURES.len()],
}

impl ModelMetrics {
    pub(super) fn new() -> ModelMetrics {
        ModelMetrics {
            batches: Default::default(),
            rows: Count::default(),
            rows_possible: Count::default(),
            cells_real: Count::default(),
            padding: Default::default(),
            cells_padded: Count::default(),
            tenants: (0..=TENANTS_LABELLED_MAX).map(|_| TenantCells::default()).collect(),
            batch_rows: Histogram::counts(),
            batch_cells: Histogram::counts(),
            batch_padding: Histogram::shares(),
            batch_fill: Histogram::shares(),
            batch_length: Histogram::counts(),
            queue_delay: Histogram::times(),
            service_time: Histogram::times(),
            queue_rows: Count::default(),
            queue_cells: Count::default(),
            queue_bytes: Count::default(),
            held: Count::default(),
            shed: Count::default(),
            refused: Count::default(),
            quarantined: Count::default(),
            looks_equal: Count::default(),
            looks_apart: Count::default(),
            policy_generation: Count::default(),
            cost_error: Count::default(),
            overrun: Count::default(),
            shadow_errors: Default::default(),
        }
    }

    /// A batch was closed. `cells_padded` is everything that is launched (rows × padded length), `cells_real` the
    /// part of it that callers sent: padding waste is `1 - cells_real / cells_padded`. `longest`: of its longest row.
    /// Returns the cells by cause.
    pub fn batch_sealed(
        &self,
        reason: SealReason,
        rows: u32,
        rows_possible: u32,
        longest: u32,
        cells_real: u64,
        cells_padded: u64,
    ) -> Cells {
        let cells = Cells::of(rows, longest, cells_real, cells_padded);
        if rows == 0 {
            return cells; // an empty poll is no batch, and would drag every mean down
        }
        let place = SealReason::ALL.iter().position(|known| *known == reason).expect("ALL has every reason");
        self.batches[place].add(1);
        self.rows.add(rows.into());
        self.rows_possible.add(rows_possible.into());
        self.cells_real.add(cells_real);
        self.cells_padded.add(cells_padded);
        self.padding[0].add(cells.longest_row);
        self.padding[1].add(cells.bucket);
        self.batch_rows.observe_alone(rows.into());
        self.batch_cells.observe_alone(cells_padded);
        if let Some(share) = (u64::from(rows) * 1000).checked_div(rows_possible.into()) {
            self.batch_fill.observe_alone(share.min(1000));
        }
        let padding = cells_padded.saturating_sub(cells_real).saturating_mul(1000);
        if let Some(share) = padding.checked_div(cells_padded) {
            self.batch_padding.observe_alone(share);
        }
        cells
    }

    /// Cells of a batch that are a tenant's, by its place: those it sent, and the padding of the places that its rows took.
    pub fn tenant_cells(&self, place: usize, real: u64, padding: u64) {
        self.tenants[place].real.add(real);
        self.tenants[place].padding.add(padding);
    }

    /// Length that a batch's rows were padded to, or of its longest where they lie end to end.
    pub fn batch_length(&self, length: u32) {
        self.batch_length.observe_alone(length.into());
    }

    /// One request waited this long between its admission and the sealing of its batch.
    pub fn queue_delay(&self, delay: Duration) {
        self.queue_delay.observe_time_alone(delay);
    }

    /// One batch took this long from submission to its results.
    pub fn service_time(&self, time: Duration) {
        self.service_time.observe_time(time);
    }

    /// A row of a batch was run once more, alone.
    pub fn looked_again(&self, equal: bool) {
        if equal { &self.looks_equal } else { &self.looks_apart }.add(1);
    }

    /// Rows that were run once more and got the same answer, and those that got another.
    pub fn looks(&self) -> (u64, u64) {
        (self.looks_equal.get(), self.looks_apart.get())
    }

    /// What waits for a batch now.
    pub fn queue_depth(&self, rows: u64, cells: u64, bytes: u64) {
        self.queue_rows.set(rows);
        self.queue_cells.set(cells);
        self.queue_bytes.set(bytes);
    }

    /// How often the scheduler held rows back, gave requests up, and refused some for their deadline or their tenant.
    pub fn verdicts(&self, held: u64, shed: u64, refused: u64) {
        self.held.set(held);
        self.shed.set(shed);
        self.refused.set(refused);
    }

    pub fn policy_generation(&self, generation: u32) {
        self.policy_generation.set(generation.into());
    }

    /// Mean relative error of predicted batch times.
    pub fn cost_error(&self, ratio: f64) {
        self.cost_error.set(ratio.to_bits());
    }

    /// What a promised time is multiplied by to be kept by nine of ten batches.
    pub fn overrun(&self, ratio: f64) {
        self.overrun.set(ratio.to_bits());
    }

    /// How far the last prediction of a figure was off.
    pub(super) fn shadow_error(&self, figure: usize, error: f64) {
        // No error at all is told from nothing predicted.
        self.shadow_errors[figure].set(error.max(f64::MIN_POSITIVE).to_bits());
    }

    pub(super) fn batches_total(&self) -> u64 {
        self.batches.iter().map(Count::get).sum()
    }
}

/// Why cells are padding: a row is shorter than the longest of its batch, or the batch than its bucket.
pub const PADDINGS: [&str; 2] = ["longest_row", "bucket"];

/// Figures that shadow schedulers predict.
pub const SHADOW_FIGURES: [&str; 4] = ["p50", "p99", "fill", "waste"];

/// What became of a stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowOutcome {
    Used = 0,
    Lost = 1,
    Mixed = 2,
    Differs = 3,
}

/// In the order of [`ShadowOutcome`].
pub const SHADOW_OUTCOMES: [&str; 4] = ["used", "lost", "mixed", "differs"];

/// What the shadow thread counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ShadowMetrics {
    pub(super) stretches: [Count; SHADOW_OUTCOMES.len()],
    pub(super) covered_nanos: Count,
    pub(super) cpu_nanos: Count,
}

impl ShadowMetrics {
    pub fn stretch(&self, outcome: ShadowOutcome) {
        self.stretches[outcome as usize].add(1);
    }

    /// A stretch of this length was used.
    pub fn covered(&self, time: Duration) {
        self.covered_nanos.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// The thread used so much CPU time.
    pub fn worked(&self, time: Duration) {
        self.cpu_nanos.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// What came of rows of a failed batch that ran again.
pub const BISECTED: [&str; 3] = ["saved", "culprit", "given_up"];

/// What an executor of a device waits for, beside batches.
pub const DEVICE_WAITS: [&str; 2] = ["slot", "readback"];

/// What one executor counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ExecutorMetrics {
    pub(super) busy_nanos: Count,
    pub(super) times: TimeCell,
    pub(super) failures: Count,
    pub(super) panics: Count,
    pub(super) rebuilds: Count,
    pub(super) hangs: Count,
    pub(super) late_results: Count,
    pub(super) bisections: Count,
    pub(super) bisection_runs: Count,
    /// By [`BISECTED`].
    pub(super) bisected_rows: [Count; BISECTED.len()],
    /// By [`DEVICE_WAITS`].
    pub(super) device_waits: [Count; DEVICE_WAITS.len()],
    pub(super) pieces: Count,
    pub(super) device_bytes: Count,
    pub(super) pinned_bytes: Count,
    pub(super) graphs: Count,
    /// It is the batcher's own thread.
    pub(super) inline: std::sync::atomic::AtomicBool,
}

impl ExecutorMetrics {
    /// Batches run on the batcher's own thread here: its time is not that of an executor.
    pub fn set_inline(&self) {
        self.inline.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// Where its time goes. The batcher writes it.
    pub fn times(&self) -> &TimeCell {
        &self.times
    }

    /// The executor worked on a batch for this long.
    pub fn busy(&self, time: Duration) {
        self.busy_nanos.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// A batch ended with an error of the model.
    pub fn failed(&self) {
        self.failures.add(1);
    }

    /// A batch ended with a panic of the model.
    pub fn panicked(&self) {
        self.panics.add(1);
    }

    /// Models were built again after panics.
    pub fn rebuilt(&self, models: u32) {
        self.rebuilds.add(models.into());
    }

    /// A batch ran for so long that it was given up.
    pub fn hung(&self) {
        self.hangs.add(1);
    }

    /// A batch that had been given up came to its end all the same.
    pub fn came_late(&self) {
        self.late_results.add(1);
    }

    /// A failed batch ran again in so many parts. `rows`: by [`BISECTED`].
    pub fn bisected(&self, runs: u32, rows: [u32; BISECTED.len()]) {
        self.bisections.add(1);
        self.bisection_runs.add(runs.into());
        self.bisected_rows.iter().zip(rows).for_each(|(count, rows)| count.add(rows.into()));
    }

    /// Batches that ran again in parts, and their rows by [`BISECTED`].
    pub fn bisections(&self) -> (u64, [u64; BISECTED.len()]) {
        (self.bisections.get(), std::array::from_fn(|at| self.bisected_rows[at].get()))
    }

    /// Batches that ended with a panic, and models built again after one.
    pub fn panics(&self) -> (u64, u64) {
        (self.panics.get(), self.rebuilds.get())
    }

    /// All slots of the device were in flight.
    pub fn waited_for_slot(&self) {
        self.device_waits[0].add(1);
    }

    /// All memory for answers was in flight, or still read by shards.
    pub fn waited_for_readback(&self) {
        self.device_waits[1].add(1);
    }

    /// Part of a batch that no memory was made for ran by itself.
    pub fn ran_piece(&self) {
        self.pieces.add(1);
    }

    /// It runs on a device and holds so much there and on the host. Said once.
    pub fn on_device(&self, device_bytes: u64, pinned_bytes: u64, graphs: usize) {
        self.device_bytes.add(device_bytes);
        self.pinned_bytes.add(pinned_bytes);
        self.graphs.add(graphs as u64);
    }
}

/// What is sent to a receiver of OpenTelemetry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Metrics,
    Traces,
}

/// What the exporter of OpenTelemetry counts. Nothing is shown of it where there is none.
#[derive(Debug, Default)]
pub struct OtelMetrics {
    pub(super) on: AtomicBool,
    /// By signal, then taken and not.
    pub(super) exports: [[Count; 2]; 2],
    pub(super) dropped_records: Count,
    pub(super) dropped_spans: Count,
}

impl OtelMetrics {
    /// There is a receiver.
    pub fn set_on(&self) {
        self.on.store(true, Relaxed);
    }

    pub fn exported(&self, signal: Signal, taken: bool) {
        self.exports[signal as usize][usize::from(!taken)].add(1);
    }

    /// Recorded requests found the way to the exporter full.
    pub fn dropped_records(&self, n: u64) {
        self.dropped_records.add(n);
    }

    /// The receiver turned spans down, or took none for so long that older ones had to go.
    pub fn dropped_spans(&self, n: u64) {
        self.dropped_spans.add(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_numbered_without_gaps() {
        for (place, code) in Code::ALL.iter().enumerate() {
            assert_eq!(place, *code as usize, "{code} is not at the place of its number");
        }
    }

    #[test]
    fn no_two_blocks_share_a_cache_line() {
        assert_eq!(size_of::<ExecutorMetrics>() % 128, 0);
        assert_eq!(align_of::<ShardMetrics>(), 128);
        assert_eq!(align_of::<ModelMetrics>(), 128);
    }

    #[test]
    fn latency_from_intention_is_counted_only_of_requests_that_state_it() {
        let shard = ShardMetrics::new(1);
        let (model, ms) = (ModelHandle(0), Duration::from_millis);
        assert!(shard.models[0].latencies().is_none(), "nothing is made for nothing");
        shard.answered(model, ms(2), None);
        shard.answered(model, ms(3), Some(ms(40)));
        let latencies = shard.models[0].latencies().expect("made with the first answer");
        let of = |histogram: &Histogram| (histogram.count(), histogram.snapshot().sum);
        assert_eq!(of(&latencies.request), (2, 0.005));
        assert_eq!((of(&latencies.send_lag), of(&latencies.intended)), ((1, 0.04), (1, 0.043)));
    }

    #[test]
    fn an_empty_batch_is_not_recorded() {
        let metrics = ModelMetrics::new();
        metrics.batch_sealed(SealReason::Idle, 0, 8, 0, 0, 0);
        assert_eq!((metrics.batches_total(), metrics.batch_rows.count(), metrics.rows_possible.get()), (0, 0, 0));
    }

    #[test]
    fn batch_histograms_and_counters_tell_the_same() {
        let metrics = ModelMetrics::new();
        metrics.batch_sealed(SealReason::Full, 8, 8, 9, 60, 80);
        metrics.batch_sealed(SealReason::Idle, 1, 8, 5, 5, 10);
        assert_eq!(metrics.batches_total(), 2);
        assert_eq!(metrics.batch_rows.count(), 2);
        assert_eq!(metrics.batch_rows.snapshot().sum, metrics.rows.get() as f64);
        assert_eq!(metrics.batch_cells.snapshot().sum, metrics.cells_padded.get() as f64);
        assert_eq!(metrics.batch_padding.snapshot().sum, 0.25 + 0.5);
        // 72 - 60 cells to the longest row, 80 - 72 and 10 - 5 to the bucket.
        assert_eq!((metrics.padding[0].get(), metrics.padding[1].get()), (12, 13));
    }
}
