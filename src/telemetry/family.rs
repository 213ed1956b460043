//! What is exported, as values: each metric with its samples. Text (export.rs) and OTLP (the room otel) are written from these,
//! so that both are the same list and the same numbers.
//!
//! Always true
//! - Labels come from sets that are closed at the start; a family without samples is still named.
//! - The unit of a metric is in its name: `_seconds`, `_bytes`, `_ratio`; the others are counts.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::Telemetry;
use super::counters::{Count, Latencies, ModelMetrics, ShardMetrics};
use super::histogram::{Histogram, Snapshot};
use crate::vocab::Code;

/// What a metric's numbers mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Rises from the start of the process on.
    Counter,
    /// As things stand.
    Gauge,
    Histogram,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Whole(u64),
    Real(f64),
    Histogram(Snapshot),
}

impl From<u64> for Value {
    fn from(value: u64) -> Value {
        Value::Whole(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Value {
        Value::Real(value)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub labels: Vec<(&'static str, String)>,
    pub value: Value,
}

/// One metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// As in the table of mod.rs, but that counters lack their `_total` here.
    stem: &'static str,
    pub help: &'static str,
    pub kind: Kind,
    pub samples: Vec<Sample>,
}

impl Family {
    /// Adds a sample.
    pub fn add<const N: usize>(&mut self, labels: [(&'static str, &str); N], value: impl Into<Value>) {
        let labels = labels.map(|(name, value)| (name, value.to_owned())).into();
        self.samples.push(Sample { labels, value: value.into() });
    }

    /// As in the table of mod.rs, and on every dashboard.
    pub fn name(&self) -> String {
        match self.kind {
            Kind::Counter => format!("{}_total", self.stem),
            Kind::Gauge | Kind::Histogram => self.stem.to_owned(),
        }
    }

    /// In the Unified Code for Units of Measure, as OTLP has it.
    pub fn unit(&self) -> &'static str {
        match self.stem.rsplit_once('_').map(|(_, unit)| unit) {
            Some("seconds") => "s",
            Some("bytes") => "By",
            _ => "1",
        }
    }

    /// Writes the samples in OpenMetrics text.
    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
        };
        let mut metric = encoder.encode_descriptor(self.stem, self.help, None, kind)?;
        for Sample { labels, value } in &self.samples {
            if labels.is_empty() {
                self.encode_value(value, &mut metric)?;
                continue;
            }
            let labels: Vec<(&str, &str)> = labels.iter().map(|(name, value)| (*name, value.as_str())).collect();
            self.encode_value(value, &mut metric.encode_family(&labels.as_slice())?)?;
        }
        Ok(())
    }

    fn encode_value(&self, value: &Value, metric: &mut MetricEncoder<'_>) -> fmt::Result {
        match (self.kind, value) {
            (Kind::Counter, Value::Whole(value)) => metric.encode_counter::<NoLabelSet, _, u64>(value, None),
            (Kind::Counter, Value::Real(value)) => metric.encode_counter::<NoLabelSet, _, u64>(value, None),
            (_, Value::Whole(value)) => metric.encode_gauge(value),
            (_, Value::Real(value)) => metric.encode_gauge(value),
            (_, Value::Histogram(of)) => metric.encode_histogram::<NoLabelSet>(of.sum, of.count, &of.buckets, None),
        }
    }
}

/// Families as they are listed, one after the other.
#[derive(Debug, Default)]
pub(super) struct Families(pub Vec<Family>);

impl Families {
    /// A metric whose samples `fill` adds. Counters without their `_total`.
    pub fn open(&mut self, stem: &'static str, help: &'static str, kind: Kind, fill: impl FnOnce(&mut Family)) {
        let mut family = Family { stem, help, kind, samples: Vec::new() };
        fill(&mut family);
        self.0.push(family);
    }

    /// A gauge without labels.
    pub fn gauge(&mut self, stem: &'static str, help: &'static str, value: f64) {
        self.open(stem, help, Kind::Gauge, |family| family.add([], value));
    }

    /// A counter for each shard.
    pub fn by_shard(
        &mut self,
        telemetry: &Telemetry,
        stem: &'static str,
        help: &'static str,
        of: impl Fn(&ShardMetrics) -> &Count,
    ) {
        self.open(stem, help, Kind::Counter, |family| {
            for (number, shard) in telemetry.shards.iter().enumerate() {
                family.add([("shard", &number.to_string())], of(shard).get());
            }
        });
    }

    /// A counter or gauge for each model that has something to show.
    pub fn by_model(
        &mut self,
        telemetry: &Telemetry,
        stem: &'static str,
        help: &'static str,
        kind: Kind,
        of: impl Fn(usize, &ModelMetrics) -> u64,
    ) {
        self.open(stem, help, kind, |family| {
            for (place, model) in telemetry.models.iter().enumerate() {
                let value = of(place, model);
                // Of "other" only where something was ever folded into it.
                if place < telemetry.labels.len() || value != 0 {
                    family.add([("model", telemetry.model_name(place))], value);
                }
            }
        });
    }

    /// A counter for each model and code that was ever counted.
    pub fn by_model_and_code(
        &mut self,
        telemetry: &Telemetry,
        stem: &'static str,
        help: &'static str,
        of: impl Fn(&super::counters::ShardModel) -> &super::counters::ByCode,
    ) {
        self.open(stem, help, Kind::Counter, |family| {
            for place in 0..telemetry.models.len() {
                for code in Code::ALL {
                    let value: u64 =
                        telemetry.shards.iter().map(|shard| of(&shard.models[place]).of(*code).get()).sum();
                    if value > 0 {
                        family.add([("model", telemetry.model_name(place)), ("code", code.name())], value);
                    }
                }
            }
        });
    }

    /// A histogram for each model; empty ones of "other" are left out.
    pub fn histogram(
        &mut self,
        telemetry: &Telemetry,
        stem: &'static str,
        help: &'static str,
        of: impl Fn(&ModelMetrics) -> &Histogram,
    ) {
        self.open(stem, help, Kind::Histogram, |family| {
            for (place, model) in telemetry.models.iter().enumerate() {
                let snapshot = of(model).snapshot();
                if place < telemetry.labels.len() || snapshot.count > 0 {
                    family.add([("model", telemetry.model_name(place))], Value::Histogram(snapshot));
                }
            }
        });
    }

    /// A histogram that shards keep, for each model that was answered.
    pub fn latency(
        &mut self,
        telemetry: &Telemetry,
        stem: &'static str,
        help: &'static str,
        of: impl Fn(&Latencies) -> &Histogram,
    ) {
        self.open(stem, help, Kind::Histogram, |family| {
            for place in 0..telemetry.models.len() {
                let latencies = telemetry.shards.iter().filter_map(|shard| shard.models[place].latencies());
                if let Some(sum) = sum_of(latencies.map(&of)).filter(|sum| sum.count > 0) {
                    family.add([("model", telemetry.model_name(place))], Value::Histogram(sum));
                }
            }
        });
    }

    /// A counter or gauge for each executor.
    pub fn by_executor<V: Into<Value>>(
        &mut self,
        telemetry: &Telemetry,
        stem: &'static str,
        help: &'static str,
        kind: Kind,
        show: impl Fn(&super::ExecutorMetrics) -> V,
    ) {
        self.open(stem, help, kind, |family| {
            for (number, executor) in telemetry.executors.iter().enumerate() {
                family.add([("executor", &number.to_string())], show(executor));
            }
        });
    }
}

/// What several histograms of one metric have counted together.
pub(super) fn sum_of<'a>(histograms: impl Iterator<Item = &'a Histogram>) -> Option<Snapshot> {
    histograms.map(Histogram::snapshot).reduce(|mut sum, next| {
        sum.add(&next);
        sum
    })
}
