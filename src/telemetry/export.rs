//! Counters as text and as JSON. Runs on the control thread, at a scrape; reads atomics and takes no lock.
//!
//! Always true
//! - Only what happened, or can happen with the labels fixed at the start, is a time series: a combination of model
//!   and code appears with its first count.
//!
//! Elsewhere: what each metric says (the table in mod.rs).

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;

use super::counters::Count;
use super::histogram::Histogram;
use super::waterfall::{self, PARTS};
use super::{
    CAPTURE_ENDS, DEVICE_WAITS, ExecutorMetrics, ModelMetrics, PADDINGS, SHADOW_FIGURES, SHADOW_OUTCOMES, ShardMetrics,
    Telemetry,
};
use crate::clock;
use crate::vocab::{Code, SealReason};

/// Writes one metric after the other; the names here are those of the table in mod.rs.
struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Page<'_> {
    fn open(&mut self, name: &str, help: &str, kind: MetricType, fill: Fill<'_>) -> fmt::Result {
        let metric = self.encoder.encode_descriptor(name, help, None, kind)?;
        fill(metric)
    }

    /// A counter for each shard.
    fn by_shard(
        &mut self,
        telemetry: &Telemetry,
        name: &str,
        help: &str,
        of: impl Fn(&ShardMetrics) -> &Count,
    ) -> fmt::Result {
        self.open(name, help, MetricType::Counter, &mut |mut metric| {
            for (number, shard) in telemetry.shards.iter().enumerate() {
                let labels = [("shard", number.to_string())];
                metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&of(shard).get(), None)?;
            }
            Ok(())
        })
    }

    /// A counter or gauge for each model that has something to show.
    fn by_model(
        &mut self,
        telemetry: &Telemetry,
        name: &str,
        help: &str,
        kind: MetricType,
        of: impl Fn(usize, &ModelMetrics) -> u64,
    ) -> fmt::Result {
        let counter = matches!(kind, MetricType::Counter);
        self.open(name, help, kind, &mut |mut metric| {
            for (place, model) in telemetry.models.iter().enumerate() {
                let value = of(place, model);
                if place == telemetry.labels.len() && value == 0 {
                    continue; // nothing was ever folded into "other"
                }
                let labels = [("model", telemetry.model_name(place))];
                let mut family = metric.encode_family(&labels)?;
                if counter {
                    family.encode_counter::<NoLabels, _, u64>(&value, None)?;
                } else {
                    family.encode_gauge(&value)?;
                }
            }
            Ok(())
        })
    }

    /// A counter for each model and code that was ever counted.
    fn by_model_and_code(
        &mut self,
        telemetry: &Telemetry,
        name: &str,
        help: &str,
        of: impl Fn(&super::counters::ShardModel) -> &super::counters::ByCode,
    ) -> fmt::Result {
        self.open(name, help, MetricType::Counter, &mut |mut metric| {
            for place in 0..telemetry.models.len() {
                for code in Code::ALL {
                    let value: u64 =
                        telemetry.shards.iter().map(|shard| of(&shard.models[place]).of(*code).get()).sum();
                    if value > 0 {
                        let labels = [("model", telemetry.model_name(place)), ("code", code.name())];
                        metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&value, None)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// A histogram for each model; empty ones of "other" are left out.
    fn histogram(
        &mut self,
        telemetry: &Telemetry,
        name: &str,
        help: &str,
        of: impl Fn(&ModelMetrics) -> &Histogram,
    ) -> fmt::Result {
        self.open(name, help, MetricType::Histogram, &mut |mut metric| {
            for (place, model) in telemetry.models.iter().enumerate() {
                let snapshot = of(model).snapshot();
                if place == telemetry.labels.len() && snapshot.count == 0 {
                    continue;
                }
                let labels = [("model", telemetry.model_name(place))];
                metric.encode_family(&labels)?.encode_histogram::<NoLabels>(
                    snapshot.sum,
                    snapshot.count,
                    &snapshot.buckets,
                    None,
                )?;
            }
            Ok(())
        })
    }

    /// A counter for each executor, shown after `show`.
    fn by_executor(
        &mut self,
        telemetry: &Telemetry,
        name: &str,
        help: &str,
        show: impl Fn(&super::ExecutorMetrics) -> f64,
    ) -> fmt::Result {
        self.open(name, help, MetricType::Counter, &mut |mut metric| {
            for (number, executor) in telemetry.executors.iter().enumerate() {
                let labels = [("executor", number.to_string())];
                metric.encode_family(&labels)?.encode_counter::<NoLabels, _, f64>(&show(executor), None)?;
            }
            Ok(())
        })
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.open(name, help, MetricType::Gauge, &mut |mut metric| metric.encode_gauge(&value))
    }
}

type Fill<'a> = &'a mut dyn FnMut(MetricEncoder<'_>) -> fmt::Result;
type NoLabels = prometheus_client::encoding::NoLabelSet;

impl Collector for Telemetry {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut page = Page { encoder };
        self.encode_process(&mut page)?;
        self.encode_shards(&mut page)?;
        self.encode_requests(&mut page)?;
        self.encode_batches(&mut page)?;
        self.encode_tenants(&mut page)?;
        self.encode_decisions(&mut page)?;
        self.encode_shadow(&mut page)?;
        page.open("ferry_captures", "Captures that ended, by how", MetricType::Counter, &mut |mut metric| {
            for (end, count) in CAPTURE_ENDS.iter().zip(&self.captures) {
                metric.encode_family(&[("end", *end)])?.encode_counter::<NoLabels, _, u64>(&count.get(), None)?;
            }
            Ok(())
        })?;
        self.encode_executors(&mut page)
    }
}

impl Telemetry {
    fn encode_process(&self, page: &mut Page<'_>) -> fmt::Result {
        let one = |name: &str, help: &str, labels: &[Vec<(&str, &str)>], page: &mut Page<'_>| {
            page.open(name, help, MetricType::Gauge, &mut |mut metric| {
                for labels in labels {
                    metric.encode_family(&labels.as_slice())?.encode_gauge(&1u64)?;
                }
                Ok(())
            })
        };
        one("ferry_build_info", "Always 1", &[vec![("version", env!("CARGO_PKG_VERSION"))]], page)?;
        let models: Vec<Vec<(&str, &str)>> =
            self.labels.iter().map(|l| vec![("model", l.name.as_str()), ("version", l.version.as_str())]).collect();
        one("ferry_model_info", "Always 1", &models, page)?;
        let uptime = clock::now().since(self.started_at).as_secs_f64();
        page.gauge("ferry_uptime_seconds", "Time since the telemetry was made", uptime)?;
        let limits = self.limits.get().map_or(&[][..], Vec::as_slice);
        page.open("ferry_limit", "A bound of the configuration, by its key", MetricType::Gauge, &mut |mut metric| {
            for (key, value) in limits {
                metric.encode_family(&[("key", key.as_str())])?.encode_gauge(value)?;
            }
            Ok(())
        })?;
        page.open("ferry_audits", "The scheduler's books were recomputed", MetricType::Counter, &mut |mut metric| {
            for (outcome, count) in ["ok", "drift"].iter().zip(&self.audits) {
                metric
                    .encode_family(&[("outcome", *outcome)])?
                    .encode_counter::<NoLabels, _, u64>(&count.get(), None)?;
            }
            Ok(())
        })?;
        let process = Process::read();
        page.gauge("ferry_process_resident_bytes", "Memory of the process", process.resident_bytes as f64)?;
        page.gauge("ferry_process_open_fds", "Open files of the process", process.open_fds as f64)?;
        page.gauge("ferry_process_threads", "Threads of the process", process.threads as f64)
    }

    fn encode_shards(&self, page: &mut Page<'_>) -> fmt::Result {
        page.by_shard(self, "ferry_connections_opened", "Connections taken", |s| &s.connections_opened)?;
        page.by_shard(self, "ferry_connections_closed", "Connections ended", |s| &s.connections_closed)?;
        page.by_shard(self, "ferry_read_bytes", "Bytes received on the data port", |s| &s.bytes_read)?;
        page.by_shard(self, "ferry_written_bytes", "Bytes sent on the data port", |s| &s.bytes_written)?;
        page.by_shard(self, "ferry_accept_errors", "Connections that could not be taken", |s| &s.accept_errors)?;
        page.by_shard(self, "ferry_slow_readers", "Connections closed because answers were not read", |s| {
            &s.slow_readers
        })?;
        page.by_shard(self, "ferry_shard_stalls", "A shard with work did not turn until nudged", |s| &s.stalls)?;
        page.by_shard(self, "ferry_late_answers", "Results whose request had already ended", |s| &s.late_answers)?;
        page.open("ferry_goaways", "Goodbyes sent, by reason", MetricType::Counter, &mut |mut metric| {
            for code in Code::ALL {
                let value: u64 = self.shards.iter().map(|shard| shard.goaways.of(*code).get()).sum();
                if value > 0 {
                    let labels = [("code", code.name())];
                    metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&value, None)?;
                }
            }
            Ok(())
        })
    }

    fn encode_requests(&self, page: &mut Page<'_>) -> fmt::Result {
        let accepted = |place: usize| -> u64 { self.shards.iter().map(|s| s.models[place].accepted.get()).sum() };
        let finished = |place: usize| -> u64 { self.shards.iter().map(|s| s.models[place].finished.sum()).sum() };
        page.by_model(
            self,
            "ferry_requests_accepted",
            "Requests that are owed an outcome",
            MetricType::Counter,
            |place, _| accepted(place),
        )?;
        page.by_model_and_code(self, "ferry_requests_finished", "Outcomes of accepted requests", |m| &m.finished)?;
        page.by_model_and_code(self, "ferry_requests_refused", "Requests that were never accepted", |m| &m.refused)?;
        page.by_model(self, "ferry_requests_in_flight", "Accepted minus finished", MetricType::Gauge, |place, _| {
            let finished = finished(place); // first, see ShardMetrics::in_flight
            accepted(place).saturating_sub(finished)
        })
    }

    fn encode_batches(&self, page: &mut Page<'_>) -> fmt::Result {
        page.open("ferry_batches", "Sealed batches, by the reason", MetricType::Counter, &mut |mut metric| {
            for (place, model) in self.models.iter().enumerate() {
                for (reason, count) in SealReason::ALL.iter().zip(&model.batches) {
                    if count.get() > 0 {
                        let labels = [("model", self.model_name(place)), ("reason", reason.name())];
                        metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&count.get(), None)?;
                    }
                }
            }
            Ok(())
        })?;
        page.histogram(self, "ferry_batch_rows", "Rows of a sealed batch", |m| &m.batch_rows)?;
        let (counter, gauge) = (|| MetricType::Counter, || MetricType::Gauge);
        let name = "ferry_batch_rows_possible";
        page.by_model(self, name, "Rows that batches had place for", counter(), |_, m| m.rows_possible.get())?;
        page.histogram(self, "ferry_batch_cells", "Cells launched by a batch, padding included", |m| &m.batch_cells)?;
        let name = "ferry_batch_cells_real";
        page.by_model(self, name, "Cells that callers sent", counter(), |_, m| m.cells_real.get())?;
        let help = "Cells that are padding, by cause";
        page.open("ferry_batch_cells_padding", help, MetricType::Counter, &mut |mut metric| {
            for (place, model) in self.models.iter().enumerate() {
                for (cause, cells) in PADDINGS.iter().zip(&model.padding) {
                    // Of "other" only where there is something.
                    if place < self.labels.len() || cells.get() > 0 {
                        let labels = [("model", self.model_name(place)), ("cause", *cause)];
                        metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&cells.get(), None)?;
                    }
                }
            }
            Ok(())
        })?;
        page.histogram(self, "ferry_batch_padding_ratio", "Padding cells per cell of a batch", |m| &m.batch_padding)?;
        page.histogram(self, "ferry_queue_delay_seconds", "Admitted to sealed, per request", |m| &m.queue_delay)?;
        page.histogram(self, "ferry_service_time_seconds", "Submitted to read back, per batch", |m| &m.service_time)?;
        page.by_model(self, "ferry_queue_rows", "Rows waiting", gauge(), |_, m| m.queue_rows.get())?;
        page.by_model(self, "ferry_queue_cells", "Cells waiting", gauge(), |_, m| m.queue_cells.get())?;
        page.by_model(self, "ferry_queue_bytes", "Payload bytes waiting", gauge(), |_, m| m.queue_bytes.get())
    }

    fn encode_tenants(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "Cells of batches by who sent them, and the padding of their places";
        page.open("ferry_tenant_cells", help, MetricType::Counter, &mut |mut metric| {
            for (place, model) in self.models.iter().enumerate() {
                for (tenant, cells) in model.tenants.iter().enumerate() {
                    for (kind, count) in [("real", &cells.real), ("padding", &cells.padding)] {
                        if count.get() > 0 {
                            let name = self.tenant_name(tenant);
                            let labels = [("model", self.model_name(place)), ("tenant", name), ("kind", kind)];
                            metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&count.get(), None)?;
                        }
                    }
                }
            }
            Ok(())
        })?;
        let help = "Time of executors by whose rows they ran it for";
        page.open("ferry_tenant_executor_seconds", help, MetricType::Counter, &mut |mut metric| {
            for (place, tenant) in self.tenants.iter().enumerate() {
                let seconds = tenant.executor_nanos.get() as f64 / 1e9;
                if seconds > 0.0 {
                    let labels = [("tenant", self.tenant_name(place))];
                    metric.encode_family(&labels)?.encode_counter::<NoLabels, _, f64>(&seconds, None)?;
                }
            }
            Ok(())
        })
    }

    fn encode_decisions(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "Rows held, requests given up or refused";
        page.open("ferry_decisions", help, MetricType::Counter, &mut |mut metric| {
            for (place, model) in self.models.iter().enumerate() {
                for (verdict, count) in [("held", &model.held), ("shed", &model.shed), ("refused", &model.refused)] {
                    if count.get() > 0 {
                        let labels = [("model", self.model_name(place)), ("verdict", verdict)];
                        metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&count.get(), None)?;
                    }
                }
            }
            Ok(())
        })?;
        let help = "Answered rows that were run once more, alone";
        page.open("ferry_canary_rows", help, MetricType::Counter, &mut |mut metric| {
            for (place, model) in self.models.iter().enumerate() {
                for (outcome, count) in [("equal", &model.looks_equal), ("apart", &model.looks_apart)] {
                    if count.get() > 0 {
                        let labels = [("model", self.model_name(place)), ("outcome", outcome)];
                        metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&count.get(), None)?;
                    }
                }
            }
            Ok(())
        })?;
        let help = "Mean relative error of predicted batch times";
        page.open("ferry_cost_model_error_ratio", help, MetricType::Gauge, &mut |mut metric| {
            // Models without a label of their own have no error in common.
            for (place, model) in self.models.iter().enumerate().take(self.labels.len()) {
                let labels = [("model", self.model_name(place))];
                metric.encode_family(&labels)?.encode_gauge(&f64::from_bits(model.cost_error.get()))?;
            }
            Ok(())
        })?;
        let (name, help) = ("ferry_policy_generation", "Raised with each change of the policy");
        page.by_model(self, name, help, MetricType::Gauge, |place, m| match place < self.labels.len() {
            true => m.policy_generation.get(),
            false => 0,
        })
    }

    fn encode_shadow(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "Stretches of time given to shadow schedulers";
        page.open("ferry_shadow_stretches", help, MetricType::Counter, &mut |mut metric| {
            for (outcome, count) in SHADOW_OUTCOMES.iter().zip(&self.shadow.stretches) {
                let labels = [("outcome", *outcome)];
                metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&count.get(), None)?;
            }
            Ok(())
        })?;
        for (name, help, count) in [
            ("ferry_shadow_covered_seconds", "Time that used stretches cover", &self.shadow.covered_nanos),
            ("ferry_shadow_cpu_seconds", "CPU time of the shadow thread", &self.shadow.cpu_nanos),
        ] {
            page.open(name, help, MetricType::Counter, &mut |mut metric| {
                metric.encode_counter::<NoLabels, _, u64>(&(count.get() as f64 / 1e9), None)
            })?;
        }
        let help = "How far the last prediction of a policy that was then put in force was off";
        page.open("ferry_shadow_error_ratio", help, MetricType::Gauge, &mut |mut metric| {
            for (place, model) in self.models.iter().enumerate().take(self.labels.len()) {
                for (what, error) in SHADOW_FIGURES.iter().zip(&model.shadow_errors).filter(|(_, bits)| bits.get() > 0)
                {
                    let labels = [("model", self.model_name(place)), ("what", *what)];
                    metric.encode_family(&labels)?.encode_gauge(&f64::from_bits(error.get()))?;
                }
            }
            Ok(())
        })
    }

    fn encode_executors(&self, page: &mut Page<'_>) -> fmt::Result {
        let busy = "ferry_executor_busy_seconds";
        page.by_executor(self, busy, "Time spent on batches", |e| e.busy_nanos.get() as f64 / 1e9)?;
        let help = "Time of an executor, by what it went into";
        let now = clock::now();
        page.open("ferry_executor_time_seconds", help, MetricType::Counter, &mut |mut metric| {
            for (number, executor) in self.executors.iter().enumerate() {
                let parts = executor.times.read(now).parts;
                for (part, nanos) in PARTS.iter().zip(parts.0) {
                    let labels = [("executor", number.to_string()), ("part", (*part).to_owned())];
                    let seconds = nanos as f64 / 1e9;
                    metric.encode_family(&labels)?.encode_counter::<NoLabels, _, f64>(&seconds, None)?;
                }
            }
            Ok(())
        })?;
        let failures = "ferry_executor_failures";
        page.by_executor(self, failures, "Batches that ended with an error", |e| e.failures.get() as f64)?;
        let panics = "ferry_executor_panics";
        page.by_executor(self, panics, "Batches that ended with a panic", |e| e.panics.get() as f64)?;
        let help = "Times that an executor of a device waited for a slot, or for readback memory";
        page.open("ferry_device_waits", help, MetricType::Counter, &mut |mut metric| {
            for (number, executor) in self.executors.iter().enumerate() {
                for (what, count) in DEVICE_WAITS.iter().zip(&executor.device_waits) {
                    let labels = [("executor", number.to_string()), ("for", (*what).to_owned())];
                    metric.encode_family(&labels)?.encode_counter::<NoLabels, _, u64>(&count.get(), None)?;
                }
            }
            Ok(())
        })?;
        let pieces = "ferry_device_pieces";
        page.by_executor(self, pieces, "Parts of batches that memory was not made for", |e| e.pieces.get() as f64)?;
        let mut gauge = |name: &str, help: &str, of: fn(&ExecutorMetrics) -> u64| {
            page.open(name, help, MetricType::Gauge, &mut |mut metric| {
                for (number, executor) in self.executors.iter().enumerate() {
                    let labels = [("executor", number.to_string())];
                    metric.encode_family(&labels)?.encode_gauge(&(of(executor) as f64))?;
                }
                Ok(())
            })
        };
        gauge("ferry_device_bytes", "Device memory of an executor", |e| e.device_bytes.get())?;
        gauge("ferry_pinned_bytes", "Host memory that an executor's device copies", |e| e.pinned_bytes.get())?;
        gauge("ferry_device_graphs", "Captured graphs", |e| e.graphs.get())
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
        let inline = |executor: &ExecutorMetrics| executor.inline.load(std::sync::atomic::Ordering::Relaxed);
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
