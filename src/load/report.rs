//! What came of a run: one document for programs, one page for people, and the whole distribution as text.
//!
//! Always true
//! - `sent`, `ok`, `errors`, `lost`, `unsent`, `late_sends` and latencies are of requests meant to be sent in the
//!   measured time. They add up: every such request is in `sent` or in `unsent` or expired before it was sent, and
//!   every sent one is in `ok`, `errors` or `lost`.
//! - Rates are of answers that arrived in the measured time, so that a drain at the end can not flatter them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::client::ServerStats;
use crate::telemetry::waterfall::{PARTS, Part, bars};

#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub model: String,
    /// `open poisson`, `open constant`, `open burst`, `trace` or `closed`.
    pub mode: String,
    pub connections: usize,
    /// Callers of a closed loop.
    pub concurrency: Option<u32>,
    pub seed: u64,
    /// Measured time.
    pub duration_s: f64,
    /// Arrivals per second, whether or not they could be sent.
    pub offered_rps: f64,
    pub sent: u64,
    pub ok: u64,
    pub errors: BTreeMap<String, u64>,
    /// Sent but never answered.
    pub lost: u64,
    /// Never sent: the client's backlog was full, or still held them at the end.
    pub unsent: u64,
    /// Of `errors`, those whose deadline passed while they waited in the client for credit. Not in `sent`.
    pub expired_before_send: u64,
    /// Sent more than 1 ms after the intended moment.
    pub late_sends: u64,
    pub goodput_rps: f64,
    pub throughput_rps: f64,
    pub tokens_per_s: f64,
    pub latency_us: LatencyReport,
    /// Sent to answered, of those answered `overloaded` or `quota_exceeded`: what saying no takes.
    pub refusal_us: LatencyReport,
    pub slo_ms: Option<f64>,
    /// `null` when the server did not say.
    pub server: Option<ServerReport>,
    pub verified: u64,
    pub mismatches: u64,
    pub mismatch_examples: Vec<String>,
    pub inputs_distinct: usize,
    pub lengths_clipped: u64,
    pub connections_lost: usize,
    /// Why connections ended before the run did; the first few.
    pub connection_errors: Vec<String>,
    /// Share of one core that the load generator itself used. Near 1, it is what was measured.
    pub client_busy: f64,
    #[serde(skip)]
    pub histogram: Histogram<u64>,
}

/// Of answered requests, from the intended moment, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LatencyReport {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl LatencyReport {
    /// `histogram` is in nanoseconds.
    pub fn of(histogram: &Histogram<u64>) -> LatencyReport {
        let micros = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        if histogram.is_empty() {
            return LatencyReport::default();
        }
        LatencyReport {
            mean: histogram.mean() / 1000.0,
            p50: micros(0.5),
            p90: micros(0.9),
            p99: micros(0.99),
            p999: micros(0.999),
            max: histogram.max() as f64 / 1000.0,
        }
    }
}

/// The server's side of the measured time: the difference of its counters at both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ServerReport {
    pub fill_ratio: f64,
    pub padding_waste: f64,
    pub executor_busy: f64,
    pub batches: u64,
    pub batch_rows_mean: f64,
    /// Of the executors that are threads of their own: the share of each part of their time. `null` where the server did not
    /// say.
    pub waterfall: Option<Shares>,
    /// Of the batches that ran on the batcher's own thread. `null` where no model runs there.
    pub waterfall_inline: Option<Shares>,
}

/// Shares of a time, in the order of [`PARTS`]. They add up to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shares(pub [f64; PARTS.len()]);

impl Serialize for Shares {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(PARTS.len()))?;
        PARTS.iter().zip(self.0).try_for_each(|(name, share)| map.serialize_entry(name, &share))?;
        map.end()
    }
}

impl Shares {
    /// Of the time between two snapshots, summed over the executors that run on the batcher's thread, or over the others.
    fn between(before: &ServerStats, after: &ServerStats, inline: bool) -> Option<Shares> {
        let sum = |stats: &ServerStats, part: &str| -> f64 {
            let mine = stats.waterfall.executors.iter().filter(|executor| executor.inline == inline);
            mine.filter_map(|executor| executor.seconds.get(part)).sum()
        };
        let seconds = PARTS.map(|part| (sum(after, part) - sum(before, part)).max(0.0));
        let all: f64 = seconds.iter().sum();
        (all > 0.0).then(|| Shares(seconds.map(|part| part / all)))
    }

    /// Share that batches took.
    fn of_batches(&self) -> f64 {
        Part::ALL.into_iter().filter(|part| part.is_of_a_batch()).map(|part| self.0[part as usize]).sum()
    }
}

impl ServerReport {
    pub fn between(before: &ServerStats, after: &ServerStats, model: &str) -> ServerReport {
        let first = before.models.get(model).copied().unwrap_or_default();
        let last = after.models.get(model).copied().unwrap_or_default();
        let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let rows = last.rows.saturating_sub(first.rows);
        let batches = last.batches.saturating_sub(first.batches);
        let padded = last.cells_padded.saturating_sub(first.cells_padded);
        // Inline batches take the batcher's time, not an executor's; counted in, they would halve the busy share.
        let busy = |stats: &ServerStats| {
            stats.executors.iter().filter(|executor| !executor.inline).map(|executor| executor.busy_us).sum::<u64>()
        };
        let executors = after.executors.iter().filter(|executor| !executor.inline).count() as u64;
        let elapsed = after.uptime_us.saturating_sub(before.uptime_us);
        ServerReport {
            fill_ratio: ratio(rows, last.rows_possible.saturating_sub(first.rows_possible)),
            padding_waste: match padded {
                0 => 0.0,
                padded => 1.0 - ratio(last.cells_real.saturating_sub(first.cells_real), padded),
            },
            executor_busy: ratio(busy(after).saturating_sub(busy(before)), elapsed * executors),
            batches,
            batch_rows_mean: ratio(rows, batches),
            waterfall: Shares::between(before, after, false),
            waterfall_inline: Shares::between(before, after, true),
        }
    }
}

impl Report {
    /// Whether the run showed the server to be wrong, or could not be carried out to its end.
    pub fn failed(&self) -> bool {
        self.mismatches > 0 || self.lost > 0 || self.connections_lost > 0 || (self.ok == 0 && self.sent > 0)
    }

    /// The page for people.
    pub fn human(&self) -> String {
        let mut page = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string does not fail.
            let _ = writeln!(page, "{name:<14} {value}");
        };
        let callers = self.concurrency.map_or(String::new(), |callers| format!(", {callers} callers"));
        line(
            "load",
            format!(
                "{} · {}{callers} · {} connection(s) · {:.1} s measured",
                self.model, self.mode, self.connections, self.duration_s
            ),
        );
        line("offered", format!("{:.1}/s", self.offered_rps));
        line("throughput", format!("{:.1}/s, {:.0} tokens/s", self.throughput_rps, self.tokens_per_s));
        let slo = self.slo_ms.map_or("in time for their deadline".into(), |slo| format!("within {slo} ms"));
        line("goodput", format!("{:.1}/s {slo}", self.goodput_rps));
        line("answers", format!("{} sent, {} ok", self.sent, self.ok));
        if !self.errors.is_empty() {
            let errors: Vec<String> = self.errors.iter().map(|(name, count)| format!("{name} {count}")).collect();
            line("errors", errors.join(", "));
        }
        let unhappy: Vec<String> = [("lost", self.lost), ("unsent", self.unsent), ("sent late", self.late_sends)]
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        if !unhappy.is_empty() {
            line("missing", unhappy.join(", "));
        }
        let latency = &self.latency_us;
        line(
            "latency",
            format!(
                "p50 {} · p90 {} · p99 {} · p99.9 {} · max {}",
                duration_text(latency.p50),
                duration_text(latency.p90),
                duration_text(latency.p99),
                duration_text(latency.p999),
                duration_text(latency.max)
            ),
        );
        let refusal = &self.refusal_us;
        if refusal.max > 0.0 {
            let [p50, p99, max] = [refusal.p50, refusal.p99, refusal.max].map(duration_text);
            line("refusals", format!("p50 {p50} · p99 {p99} · max {max}"));
        }
        if let Some(server) = &self.server {
            line(
                "server",
                format!(
                    "{} batches of {:.1} rows · fill {:.1} % · padding {:.1} % · executors busy {:.1} %",
                    server.batches,
                    server.batch_rows_mean,
                    server.fill_ratio * 100.0,
                    server.padding_waste * 100.0,
                    server.executor_busy * 100.0
                ),
            );
            let (threads, inline) = (server.waterfall, server.waterfall_inline);
            let ran = |shares: &Option<Shares>| shares.is_some_and(|shares| shares.of_batches() > 0.0);
            // Where something ran; where nothing did, at least why.
            let shown = [
                ("executors", threads.filter(|_| ran(&threads) || !ran(&inline))),
                ("inline", inline.filter(|_| ran(&inline))),
            ];
            for (name, shares) in shown.into_iter().filter_map(|(name, shares)| Some((name, shares?))) {
                for (at, bar) in bars(&shares.0).into_iter().enumerate() {
                    line(if at == 0 { name } else { "" }, bar);
                }
            }
        }
        if self.verified > 0 {
            line("verified", format!("{} answers, {} wrong", self.verified, self.mismatches));
        }
        for example in &self.mismatch_examples {
            line("  wrong", example.clone());
        }
        for error in &self.connection_errors {
            line("connection", error.clone());
        }
        if self.lengths_clipped > 0 {
            line(
                "note",
                format!("{} of the drawn lengths were outside the contract and clipped", self.lengths_clipped),
            );
        }
        if self.client_busy > 0.9 {
            line(
                "note",
                format!("the load generator used {:.0} % of a core: it may be the limit", self.client_busy * 100.0),
            );
        }
        page
    }

    /// The distribution in HdrHistogram's percentile text, values in microseconds.
    pub fn hgrm(&self) -> String {
        let mut text = String::from("       Value     Percentile TotalCount 1/(1-Percentile)\n\n");
        let mut seen = 0;
        let histogram = &self.histogram;
        if !histogram.is_empty() {
            for step in histogram.iter_quantiles(5) {
                seen += step.count_since_last_iteration();
                let value = step.value_iterated_to() as f64 / 1000.0;
                let quantile = step.quantile_iterated_to();
                let _ = match quantile < 1.0 {
                    true => writeln!(text, "{value:12.3} {quantile:.12} {seen:10} {:14.2}", 1.0 / (1.0 - quantile)),
                    false => writeln!(text, "{value:12.3} {quantile:.12} {seen:10}            inf"),
                };
            }
        }
        let _ = writeln!(
            text,
            "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n#[Max     = {:12.3}, Total count    = {:12}]",
            histogram.mean() / 1000.0,
            histogram.stdev() / 1000.0,
            histogram.max() as f64 / 1000.0,
            histogram.len()
        );
        text
    }
}

/// Microseconds in the unit that leaves few digits.
pub fn duration_text(micros: f64) -> String {
    match micros {
        micros if micros < 1_000.0 => format!("{micros:.0} µs"),
        micros if micros < 1_000_000.0 => format!("{:.2} ms", micros / 1_000.0),
        micros => format!("{:.2} s", micros / 1_000_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::session::{ExecutorStats, ExecutorTime, ModelStats};

    #[test]
    fn the_servers_side_is_the_difference_of_two_snapshots() {
        let stats = |uptime_us, busy_us, model| ServerStats {
            uptime_us,
            executors: vec![
                ExecutorStats { busy_us, inline: false },
                ExecutorStats { busy_us: 0, inline: false },
                ExecutorStats { busy_us: 7 * busy_us, inline: true },
            ],
            models: [("m".to_owned(), model)].into(),
            ..ServerStats::default()
        };
        let before = stats(1_000_000, 50, ModelStats { batches: 5, rows: 5, ..ModelStats::default() });
        let after = stats(
            3_000_000,
            1_000_050,
            ModelStats { batches: 15, rows: 85, rows_possible: 160, cells_real: 75, cells_padded: 100 },
        );
        let report = ServerReport::between(&before, &after, "m");
        assert_eq!(
            report,
            ServerReport {
                fill_ratio: 0.5,
                padding_waste: 0.25,
                executor_busy: 0.25,
                batches: 10,
                batch_rows_mean: 8.0,
                waterfall: None,
                waterfall_inline: None
            }
        );
        assert_eq!(ServerReport::between(&after, &after, "m"), ServerReport::default(), "an idle server divides by 0");
    }

    #[test]
    fn the_waterfall_is_of_the_measured_time_and_of_executors_that_are_threads() {
        let stats = |useful: f64, empty: f64| {
            let executor = |inline: bool, times: f64| ExecutorTime {
                inline,
                seconds: [("useful".to_owned(), times * useful), ("idle_empty".to_owned(), empty)].into(),
            };
            let executors = vec![executor(false, 1.0), executor(false, 0.0), executor(true, 2.0)];
            ServerStats { waterfall: crate::client::session::WaterfallStats { executors }, ..ServerStats::default() }
        };
        let report = ServerReport::between(&stats(10.0, 10.0), &stats(12.0, 13.0), "m");
        let shares = report.waterfall.expect("time passed");
        assert_eq!((shares.0[0], shares.0[11]), (0.25, 0.75), "2 of 5 s, and 0 of 3");
        assert_eq!(report.waterfall_inline.map(|shares| shares.0[0]), Some(4.0 / 7.0));
        let json = serde_json::to_value(report).expect("plain data");
        assert_eq!(json["waterfall"]["idle_empty"], 0.75);
        assert_eq!(json["waterfall"].as_object().expect("an object").len(), PARTS.len());
    }

    #[test]
    fn percentiles_are_in_microseconds() {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3).expect("valid bounds");
        for micros in 1..=1000u64 {
            histogram.record(micros * 1000).expect("in bounds");
        }
        let latency = LatencyReport::of(&histogram);
        assert!((latency.p50 - 500.0).abs() < 1.0 && (latency.p99 - 990.0).abs() < 1.0, "{latency:?}");
        assert_eq!(LatencyReport::of(&Histogram::new(3).expect("valid")), LatencyReport::default());
    }
}
