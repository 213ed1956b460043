//! What is exported, metric by metric, and what `/stats` says. Runs on the control thread, at a scrape; reads atomics and takes
//! no lock.
//!
//! Always true
//! - Only what happened, or can happen with the labels fixed at the start, is a time series: a combination of model
//!   and code appears with its first count.
//!
//! Elsewhere: what each metric says (the table in mod.rs), what a metric is (family.rs).

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::family::{Families, Family, Kind, Value, sum_of};
use super::waterfall::{self, PARTS};
use super::{
    Alarm, BISECTED, Books, CAPTURE_ENDS, DEVICE_WAITS, OTHER, Operation, PADDINGS, RELOADED, SHADOW_FIGURES,
    SHADOW_OUTCOMES, ShardMetrics, Telemetry, Turn, TurnedAway, log,
};
use crate::vocab::{Code, SealReason};
use crate::{clock, live};

impl Collector for Telemetry {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        self.families().iter().try_for_each(|family| family.encode(&mut encoder))
    }
}

impl Telemetry {
    /// All metrics as they stand, in the order of the page.
    pub fn families(&self) -> Vec<Family> {
        let mut list = Families::default();
        self.list_process(&mut list);
        self.list_shards(&mut list);
        self.list_requests(&mut list);
        self.list_operations(&mut list);
        self.list_batches(&mut list);
        self.list_tenants(&mut list);
        self.list_decisions(&mut list);
        self.list_shadow(&mut list);
        self.list_executors(&mut list);
        self.list_live(&mut list);
        list.0
    }

    fn list_process(&self, list: &mut Families) {
        list.open("ferry_build_info", "Always 1", Kind::Gauge, |family| {
            family.add([("version", env!("CARGO_PKG_VERSION"))], 1u64);
        });
        list.open("ferry_model_info", "Always 1", Kind::Gauge, |family| {
            let precisions = &self.installation().precisions;
            for (place, model) in self.labels.iter().enumerate() {
                let precision = precisions.get(place).map_or("", String::as_str);
                family.add([("model", &model.name), ("version", &model.version), ("precision", precision)], 1u64);
            }
        });
        list.open("ferry_executor_info", "Always 1", Kind::Gauge, |family| {
            for (number, device) in self.installation().devices.iter().enumerate() {
                family.add([("executor", &number.to_string()), ("device", device)], 1u64);
            }
        });
        let uptime = clock::now().since(self.started_at).as_secs_f64();
        list.gauge("ferry_uptime_seconds", "Time since the telemetry was made", uptime);
        let limits = self.limits.get().map_or(&[][..], Vec::as_slice);
        list.open("ferry_limit", "A bound of the configuration, by its key", Kind::Gauge, |family| {
            limits.iter().for_each(|(key, value)| family.add([("key", key)], *value));
        });
        list.open("ferry_audits", "Books were recomputed", Kind::Counter, |family| {
            for (books, counts) in Books::ALL.iter().zip(&self.audits) {
                for (outcome, count) in ["ok", "drift"].iter().zip(counts) {
                    family.add([("books", books.name()), ("outcome", outcome)], count.get());
                }
            }
        });
        list.open("ferry_alarms", "Things that cannot be", Kind::Counter, |family| {
            for (alarm, count) in Alarm::ALL.iter().zip(&self.alarms) {
                family.add([("what", alarm.name())], count.get());
            }
        });
        list.open("ferry_captures", "Captures that ended, by how", Kind::Counter, |family| {
            for (end, count) in CAPTURE_ENDS.iter().zip(&self.captures) {
                family.add([("end", end)], count.get());
            }
        });
        list.open("ferry_log_lines_dropped", "Lines that are missing in the log", Kind::Counter, |family| {
            log::dropped().iter().for_each(|(why, count)| family.add([("why", why)], *count));
        });
        self.list_otel(list);
        let process = Process::read();
        list.gauge("ferry_process_resident_bytes", "Memory of the process", process.resident_bytes as f64);
        list.gauge("ferry_process_open_fds", "Open files of the process", process.open_fds as f64);
        list.gauge("ferry_process_threads", "Threads of the process", process.threads as f64);
    }

    /// Of an exporter that there is.
    fn list_otel(&self, list: &mut Families) {
        let otel = &self.otel;
        let on = otel.on.load(std::sync::atomic::Ordering::Relaxed);
        let help = "Messages to the receiver of OpenTelemetry";
        list.open("ferry_otel_exports", help, Kind::Counter, |family| {
            for (signal, counts) in ["metrics", "traces"].iter().zip(&otel.exports).filter(|_| on) {
                for (outcome, count) in ["ok", "failed"].iter().zip(counts) {
                    family.add([("signal", signal), ("outcome", outcome)], count.get());
                }
            }
        });
        list.open("ferry_otel_dropped", "Lost on the way there", Kind::Counter, |family| {
            let counts = [("records", &otel.dropped_records), ("spans", &otel.dropped_spans)];
            for (what, count) in counts.iter().filter(|_| on) {
                family.add([("what", what)], count.get());
            }
        });
    }

    fn list_shards(&self, list: &mut Families) {
        list.by_shard(self, "ferry_connections_opened", "Connections taken", |s| &s.connections_opened);
        list.by_shard(self, "ferry_connections_closed", "Connections ended", |s| &s.connections_closed);
        list.by_shard(self, "ferry_read_bytes", "Bytes received on the data port", |s| &s.bytes_read);
        list.by_shard(self, "ferry_written_bytes", "Bytes sent on the data port", |s| &s.bytes_written);
        list.by_shard(self, "ferry_accept_errors", "Connections that could not be taken", |s| &s.accept_errors);
        let of_shards = |of: &dyn Fn(&ShardMetrics) -> u64| self.shards.iter().map(of).sum::<u64>();
        list.open("ferry_turned_away", "Connections that were closed before their hello", Kind::Counter, |family| {
            for why in TurnedAway::ALL {
                family.add([("why", why.name())], of_shards(&|shard| shard.turned_away[why as usize].get()));
            }
        });
        list.open("ferry_tls_handshakes", "TLS handshakes that ended", Kind::Counter, |family| {
            for (at, outcome) in ["failed", "done"].iter().enumerate() {
                family.add([("outcome", outcome)], of_shards(&|shard| shard.handshakes[at].get()));
            }
        });
        list.open("ferry_authentications", "Hellos whose credentials were looked at", Kind::Counter, |family| {
            for (at, outcome) in ["failed", "ok"].iter().enumerate() {
                family.add([("outcome", outcome)], of_shards(&|shard| shard.authentications[at].get()));
            }
        });
        list.open("ferry_reloads", "Times that files were read again", Kind::Counter, |family| {
            for (what, counts) in RELOADED.iter().zip(&self.reloads) {
                for (outcome, count) in ["failed", "ok"].iter().zip(counts) {
                    family.add([("what", what), ("outcome", outcome)], count.get());
                }
            }
        });
        let help = "Connections closed because answers were not read";
        list.by_shard(self, "ferry_slow_readers", help, |s| &s.slow_readers);
        let help = "Requests of connections that ask again and again, whatever they are told";
        list.by_shard(self, "ferry_throttled_requests", help, |s| &s.throttled);
        let help = "Points for acts that made work of no use: pings, cancels, wrong requests";
        list.by_shard(self, "ferry_wasted_points", help, |s| &s.wasted);
        let help = "Connections that were not taken, of addresses that were sent away";
        list.by_shard(self, "ferry_banned_connections", help, |s| &s.banned);
        let help = "Credit frames: windows lowered near the budget of payloads, and raised again";
        list.by_shard(self, "ferry_window_changes", help, |s| &s.windows_changed);
        let help = "Moments in which no connection was taken, near the budget of payloads";
        list.by_shard(self, "ferry_accept_pauses", help, |s| &s.accept_pauses);
        list.by_shard(self, "ferry_shard_stalls", "A shard with work did not turn until nudged", |s| &s.stalls);
        list.by_shard(self, "ferry_late_answers", "Results whose request had already ended", |s| &s.late_answers);
        list.open("ferry_goaways", "Goodbyes sent, by reason", Kind::Counter, |family| {
            for code in Code::ALL {
                let value: u64 = self.shards.iter().map(|shard| shard.goaways.of(*code).get()).sum();
                if value > 0 {
                    family.add([("code", code.name())], value);
                }
            }
        });
    }

    fn list_requests(&self, list: &mut Families) {
        let accepted = |place: usize| -> u64 { self.shards.iter().map(|s| s.models[place].accepted.get()).sum() };
        let finished = |place: usize| -> u64 { self.shards.iter().map(|s| s.models[place].finished.sum()).sum() };
        let help = "Requests that are owed an outcome";
        list.by_model(self, "ferry_requests_accepted", help, Kind::Counter, |place, _| accepted(place));
        list.by_model_and_code(self, "ferry_requests_finished", "Outcomes of accepted requests", |m| &m.finished);
        list.by_model_and_code(self, "ferry_requests_refused", "Requests that were never accepted", |m| &m.refused);
        let (name, help) = ("ferry_quarantined", "Requests refused because they had made the model fail before");
        list.by_model(self, name, help, Kind::Counter, |_, m| m.quarantined.get());
        let (name, help) = ("ferry_quarantine_requests", "Requests remembered for having made their model fail");
        list.open(name, help, Kind::Gauge, |family| family.add([], self.remembered.get()));
        list.by_model(self, "ferry_requests_in_flight", "Accepted minus finished", Kind::Gauge, |place, _| {
            let finished = finished(place); // first, see ShardMetrics::in_flight
            accepted(place).saturating_sub(finished)
        });
        let name = "ferry_request_latency_seconds";
        list.latency(self, name, "Received to answered, of requests with a result", |l| &l.request);
        let name = "ferry_intended_latency_seconds";
        list.latency(self, name, "Meant to be sent to answered, of requests that say when", |l| &l.intended);
        let name = "ferry_send_lag_seconds";
        list.latency(self, name, "Meant to be sent to sent, of requests that say when", |l| &l.send_lag);
    }

    fn list_operations(&self, list: &mut Families) {
        let help = "Answers to what is asked on the data port beside infer";
        list.open("ferry_operations", help, Kind::Counter, |family| {
            for place in 0..self.models.len() {
                for code in Code::ALL {
                    let described = |shard: &ShardMetrics| shard.models[place].described.of(*code).get();
                    let value: u64 = self.shards.iter().map(described).sum();
                    if value > 0 {
                        let (model, operation) = (self.model_name(place), Operation::Describe.name());
                        family.add([("operation", operation), ("model", model), ("code", code.name())], value);
                    }
                }
            }
            for operation in [Operation::List, Operation::Stats] {
                let value: u64 = self.shards.iter().map(|shard| shard.operations[operation as usize].get()).sum();
                if value > 0 {
                    let labels = [("operation", operation.name()), ("model", OTHER), ("code", Code::Ok.name())];
                    family.add(labels, value);
                }
            }
        });
        list.open("ferry_operation_duration_seconds", "Read to answered, of the same", Kind::Histogram, |family| {
            for operation in Operation::ALL {
                let times = self.shards.iter().map(|shard| &shard.operation_times[operation as usize]);
                if let Some(sum) = sum_of(times).filter(|sum| sum.count > 0) {
                    family.add([("operation", operation.name())], Value::Histogram(sum));
                }
            }
        });
        list.open("ferry_shard_turn_seconds", "Time that a task had its shard to itself", Kind::Histogram, |family| {
            for turn in Turn::ALL {
                let times = self.shards.iter().map(|shard| &shard.turn_times[turn as usize]);
                if let Some(sum) = sum_of(times).filter(|sum| sum.count > 0) {
                    family.add([("task", turn.name())], Value::Histogram(sum));
                }
            }
        });
    }

    /// What could leak: a soak shows these flat.
    fn list_live(&self, list: &mut Families) {
        let of_shards = |of: fn(&ShardMetrics) -> u64| -> u64 { self.shards.iter().map(of).sum() };
        list.open("ferry_live_objects", "What exists now and could leak", Kind::Gauge, |family| {
            family.add([("kind", "connection")], self.connections());
            family.add([("kind", "ticket")], of_shards(|shard| shard.table_entries.get().saturating_sub(1)));
            live::Kind::ALL.iter().for_each(|kind| family.add([("kind", kind.name())], live::count(*kind)));
        });
        list.open("ferry_live_bytes", "Bytes held now", Kind::Gauge, |family| {
            family.add([("kind", "receiving")], of_shards(|shard| shard.receiving_bytes.get()));
            family.add([("kind", "unsent")], of_shards(|shard| shard.unsent_bytes.get()));
            for kind in [live::Kind::DeviceBuffer, live::Kind::PinnedBuffer] {
                family.add([("kind", kind.name())], live::bytes(kind));
            }
        });
    }

    fn list_batches(&self, list: &mut Families) {
        list.open("ferry_batches", "Sealed batches, by the reason", Kind::Counter, |family| {
            for (place, model) in self.models.iter().enumerate() {
                for (reason, count) in SealReason::ALL.iter().zip(&model.batches) {
                    if count.get() > 0 {
                        family.add([("model", self.model_name(place)), ("reason", reason.name())], count.get());
                    }
                }
            }
        });
        list.histogram(self, "ferry_batch_rows", "Rows of a sealed batch", |m| &m.batch_rows);
        let name = "ferry_batch_rows_possible";
        list.by_model(self, name, "Rows that batches had place for", Kind::Counter, |_, m| m.rows_possible.get());
        list.histogram(self, "ferry_batch_cells", "Cells launched by a batch, padding included", |m| &m.batch_cells);
        let name = "ferry_batch_cells_real";
        list.by_model(self, name, "Cells that callers sent", Kind::Counter, |_, m| m.cells_real.get());
        let help = "Cells that are padding, by cause";
        list.open("ferry_batch_cells_padding", help, Kind::Counter, |family| {
            for (place, model) in self.models.iter().enumerate() {
                for (cause, cells) in PADDINGS.iter().zip(&model.padding) {
                    // Of "other" only where there is something.
                    if place < self.labels.len() || cells.get() > 0 {
                        family.add([("model", self.model_name(place)), ("cause", cause)], cells.get());
                    }
                }
            }
        });
        list.histogram(self, "ferry_batch_padding_ratio", "Padding cells per cell of a batch", |m| &m.batch_padding);
        list.histogram(self, "ferry_batch_fill_ratio", "Rows of a batch per row possible", |m| &m.batch_fill);
        list.histogram(self, "ferry_batch_length", "Length that rows of a batch were padded to", |m| &m.batch_length);
        list.histogram(self, "ferry_queue_delay_seconds", "Admitted to sealed, per request", |m| &m.queue_delay);
        list.histogram(self, "ferry_service_time_seconds", "Submitted to read back, per batch", |m| &m.service_time);
        list.by_model(self, "ferry_queue_rows", "Rows waiting", Kind::Gauge, |_, m| m.queue_rows.get());
        list.by_model(self, "ferry_queue_cells", "Cells waiting", Kind::Gauge, |_, m| m.queue_cells.get());
        list.by_model(self, "ferry_queue_bytes", "Payload bytes waiting", Kind::Gauge, |_, m| m.queue_bytes.get());
    }

    fn list_tenants(&self, list: &mut Families) {
        let help = "Cells of batches by who sent them, and the padding of their places";
        list.open("ferry_tenant_cells", help, Kind::Counter, |family| {
            for (place, model) in self.models.iter().enumerate() {
                for (tenant, cells) in model.tenants.iter().enumerate() {
                    for (kind, count) in [("real", &cells.real), ("padding", &cells.padding)] {
                        if count.get() > 0 {
                            let (model, tenant) = (self.model_name(place), self.tenant_name(tenant));
                            family.add([("model", model), ("tenant", tenant), ("kind", kind)], count.get());
                        }
                    }
                }
            }
        });
        let help = "Time of executors by whose rows they ran it for";
        list.open("ferry_tenant_executor_seconds", help, Kind::Counter, |family| {
            for (place, tenant) in self.tenants.iter().enumerate() {
                let seconds = tenant.executor_nanos.get() as f64 / 1e9;
                if seconds > 0.0 {
                    family.add([("tenant", self.tenant_name(place))], seconds);
                }
            }
        });
    }

    fn list_decisions(&self, list: &mut Families) {
        let help = "Rows held, requests given up or refused";
        list.open("ferry_decisions", help, Kind::Counter, |family| {
            for (place, model) in self.models.iter().enumerate() {
                for (verdict, count) in [("held", &model.held), ("shed", &model.shed), ("refused", &model.refused)] {
                    if count.get() > 0 {
                        family.add([("model", self.model_name(place)), ("verdict", verdict)], count.get());
                    }
                }
            }
        });
        let help = "Answered rows that were run once more, alone";
        list.open("ferry_canary_rows", help, Kind::Counter, |family| {
            for (place, model) in self.models.iter().enumerate() {
                for (outcome, count) in [("equal", &model.looks_equal), ("apart", &model.looks_apart)] {
                    if count.get() > 0 {
                        family.add([("model", self.model_name(place)), ("outcome", outcome)], count.get());
                    }
                }
            }
        });
        let help = "Mean relative error of predicted batch times";
        list.open("ferry_cost_model_error_ratio", help, Kind::Gauge, |family| {
            // Models without a label of their own have no error in common.
            for (place, model) in self.models.iter().enumerate().take(self.labels.len()) {
                family.add([("model", self.model_name(place))], f64::from_bits(model.cost_error.get()));
            }
        });
        let help = "Time from sealing to the end that nine of ten batches keep, beside what was promised";
        list.open("ferry_batch_overrun_ratio", help, Kind::Gauge, |family| {
            for (place, model) in self.models.iter().enumerate().take(self.labels.len()) {
                family.add([("model", self.model_name(place))], f64::from_bits(model.overrun.get()));
            }
        });
        let (name, help) = ("ferry_policy_generation", "Raised with each change of the policy");
        list.by_model(self, name, help, Kind::Gauge, |place, m| match place < self.labels.len() {
            true => m.policy_generation.get(),
            false => 0,
        });
    }

    fn list_shadow(&self, list: &mut Families) {
        let help = "Stretches of time given to shadow schedulers";
        list.open("ferry_shadow_stretches", help, Kind::Counter, |family| {
            for (outcome, count) in SHADOW_OUTCOMES.iter().zip(&self.shadow.stretches) {
                family.add([("outcome", *outcome)], count.get());
            }
        });
        for (name, help, count) in [
            ("ferry_shadow_covered_seconds", "Time that used stretches cover", &self.shadow.covered_nanos),
            ("ferry_shadow_cpu_seconds", "CPU time of the shadow thread", &self.shadow.cpu_nanos),
        ] {
            list.open(name, help, Kind::Counter, |family| family.add([], count.get() as f64 / 1e9));
        }
        let help = "How far the last prediction of a policy that was then put in force was off";
        list.open("ferry_shadow_error_ratio", help, Kind::Gauge, |family| {
            for (place, model) in self.models.iter().enumerate().take(self.labels.len()) {
                for (what, error) in SHADOW_FIGURES.iter().zip(&model.shadow_errors).filter(|(_, bits)| bits.get() > 0)
                {
                    family.add([("model", self.model_name(place)), ("what", *what)], f64::from_bits(error.get()));
                }
            }
        });
    }

    fn list_executors(&self, list: &mut Families) {
        let (counter, gauge) = (Kind::Counter, Kind::Gauge);
        let (name, help) = ("ferry_executor_busy_seconds", "Time spent on batches");
        list.by_executor(self, name, help, counter, |e| e.busy_nanos.get() as f64 / 1e9);
        let now = clock::now();
        let help = "Time of an executor, by what it went into";
        list.open("ferry_executor_time_seconds", help, counter, |family| {
            for (number, executor) in self.executors.iter().enumerate() {
                let parts = executor.times.read(now).parts;
                for (part, nanos) in PARTS.iter().zip(parts.0) {
                    family.add([("executor", number.to_string().as_str()), ("part", *part)], nanos as f64 / 1e9);
                }
            }
        });
        let (name, help) = ("ferry_executor_failures", "Batches that ended with an error");
        list.by_executor(self, name, help, counter, |e| e.failures.get());
        let (name, help) = ("ferry_executor_panics", "Batches that ended with a panic");
        list.by_executor(self, name, help, counter, |e| e.panics.get());
        let (name, help) = ("ferry_executor_rebuilds", "Models that were built again after a panic");
        list.by_executor(self, name, help, counter, |e| e.rebuilds.get());
        let (name, help) = ("ferry_executor_hangs", "Batches that were given up because they did not come back");
        list.by_executor(self, name, help, counter, |e| e.hangs.get());
        let (name, help) = ("ferry_executor_late_results", "Results of batches that had been given up, dropped");
        list.by_executor(self, name, help, counter, |e| e.late_results.get());
        let (name, help) = ("ferry_bisections", "Failed batches whose requests ran again in parts");
        list.by_executor(self, name, help, counter, |e| e.bisections.get());
        let help = "Rows of failed batches that ran again in parts, by what came of them";
        list.open("ferry_bisected_rows", help, counter, |family| {
            for (number, executor) in self.executors.iter().enumerate() {
                for (outcome, count) in BISECTED.iter().zip(&executor.bisected_rows) {
                    family.add([("executor", &number.to_string()), ("outcome", outcome)], count.get());
                }
            }
        });
        let (name, help) = ("ferry_bisection_runs", "Parts of failed batches that ran");
        list.by_executor(self, name, help, counter, |e| e.bisection_runs.get());
        let help = "Times that an executor of a device waited for a slot, or for readback memory";
        list.open("ferry_device_waits", help, counter, |family| {
            for (number, executor) in self.executors.iter().enumerate() {
                for (what, count) in DEVICE_WAITS.iter().zip(&executor.device_waits) {
                    family.add([("executor", &number.to_string()), ("for", what)], count.get());
                }
            }
        });
        let (name, help) = ("ferry_device_pieces", "Parts of batches that memory was not made for");
        list.by_executor(self, name, help, counter, |e| e.pieces.get());
        let (name, help) = ("ferry_device_bytes", "Device memory of an executor");
        list.by_executor(self, name, help, gauge, |e| e.device_bytes.get());
        let (name, help) = ("ferry_pinned_bytes", "Host memory that an executor's device copies");
        list.by_executor(self, name, help, gauge, |e| e.pinned_bytes.get());
        list.by_executor(self, "ferry_device_graphs", "Captured graphs", gauge, |e| e.graphs.get());
    }

    /// Cumulative counts since the start. `outcomes` has every code, so that two readings can be subtracted.
    pub fn stats_json(&self) -> serde_json::Value {
        // Outcomes before accepted, as in `in_flight`: a burst in between is in flight, not negative.
        let outcomes: serde_json::Map<String, serde_json::Value> = Code::ALL
            .iter()
            .map(|code| {
                let of_shard = |shard: &ShardMetrics| -> u64 {
                    shard.models.iter().map(|model| model.finished.of(*code).get()).sum()
                };
                (code.name().to_owned(), self.shards.iter().map(of_shard).sum::<u64>().into())
            })
            .collect();
        let finished: u64 = outcomes.values().filter_map(serde_json::Value::as_u64).sum();
        let accepted = self.accepted_total();
        let models: serde_json::Map<String, serde_json::Value> = self
            .models
            .iter()
            .enumerate()
            .filter(|(place, model)| *place < self.labels.len() || model.batches_total() > 0)
            .map(|(place, model)| {
                let counts = serde_json::json!({
                    "batches": model.batches_total(),
                    "rows": model.rows.get(),
                    "rows_possible": model.rows_possible.get(),
                    "cells_real": model.cells_real.get(),
                    "cells_padded": model.cells_padded.get(),
                });
                (self.model_name(place).to_owned(), counts)
            })
            .collect();
        let executors: Vec<serde_json::Value> = self
            .executors
            .iter()
            .map(|executor| {
                let inline = executor.inline.load(std::sync::atomic::Ordering::Relaxed);
                serde_json::json!({ "busy_us": executor.busy_nanos.get() / 1000, "inline": inline })
            })
            .collect();
        let waterfall = self.waterfall_json();
        serde_json::json!({
            "uptime_us": u64::try_from(clock::now().since(self.started_at).as_micros()).unwrap_or(u64::MAX),
            "accepted": accepted,
            "in_flight": accepted.saturating_sub(finished),
            "outcomes": outcomes,
            "models": models,
            "executors": executors,
            "waterfall": waterfall,
        })
    }

    /// Where the executors' time went since they began.
    fn waterfall_json(&self) -> serde_json::Value {
        let now = clock::now();
        let inline = |executor: &super::ExecutorMetrics| executor.inline.load(std::sync::atomic::Ordering::Relaxed);
        waterfall::json(self.executors.iter().map(|executor| (inline(executor), executor.times.read(now).parts)))
    }
}

/// What the kernel says about this process; 0 where it does not say.
#[derive(Debug, Default)]
struct Process {
    resident_bytes: u64,
    open_fds: u64,
    threads: u64,
}

impl Process {
    fn read() -> Process {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| -> u64 {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .and_then(|rest| rest.split_whitespace().next())
                .and_then(|number| number.parse().ok())
                .unwrap_or(0)
        };
        Process {
            resident_bytes: field("VmRSS:") * 1024,
            // One of them is the directory that is being read.
            open_fds: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1) as u64),
            threads: field("Threads:"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_how_large_this_process_is() {
        let process = Process::read();
        assert!(process.resident_bytes > 0 && process.open_fds > 0 && process.threads > 0, "{process:?}");
    }
}
