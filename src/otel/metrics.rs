//! The list of metrics as OTLP: sums, gauges and histograms with explicit bounds, cumulative since the start.

use std::time::Duration;

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as NumberOf;
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics,
    ScopeMetrics, Sum,
};

use super::{About, text};
use crate::telemetry::family::{Family, Kind, Sample, Value};
use crate::telemetry::histogram::Snapshot;

/// From when the numbers count, and as of when they are, in time since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub start: Duration,
    pub now: Duration,
}

/// All metrics, as one message.
pub fn message(about: &About, families: &[Family], times: Times) -> ExportMetricsServiceRequest {
    // A family without samples says nothing here; text names it all the same.
    let metrics = families.iter().filter(|family| !family.samples.is_empty()).map(|family| metric(family, times));
    let of_scope =
        ScopeMetrics { scope: Some(about.scope.clone()), metrics: metrics.collect(), ..ScopeMetrics::default() };
    let of_resource = ResourceMetrics {
        resource: Some(about.resource.clone()),
        scope_metrics: vec![of_scope],
        ..ResourceMetrics::default()
    };
    ExportMetricsServiceRequest { resource_metrics: vec![of_resource] }
}

fn metric(family: &Family, times: Times) -> Metric {
    let numbers = || family.samples.iter().map(|sample| number_point(sample, times)).collect();
    let cumulative = AggregationTemporality::Cumulative as i32;
    let data = match family.kind {
        Kind::Counter => {
            Data::Sum(Sum { data_points: numbers(), aggregation_temporality: cumulative, is_monotonic: true })
        }
        Kind::Gauge => Data::Gauge(Gauge { data_points: numbers() }),
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: family.samples.iter().map(|sample| histogram_point(sample, times)).collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: family.name(),
        description: family.help.into(),
        unit: family.unit().into(),
        data: Some(data),
        ..Metric::default()
    }
}

fn attributes(sample: &Sample) -> Vec<KeyValue> {
    sample.labels.iter().map(|(name, value)| text(name, value.as_str())).collect()
}

fn number_point(sample: &Sample, times: Times) -> NumberDataPoint {
    let value = match &sample.value {
        Value::Whole(value) => NumberOf::AsInt(i64::try_from(*value).unwrap_or(i64::MAX)),
        Value::Real(value) => NumberOf::AsDouble(*value),
        Value::Histogram(_) => unreachable!("a histogram's samples are histograms"),
    };
    NumberDataPoint {
        attributes: attributes(sample),
        start_time_unix_nano: nanos(times.start),
        time_unix_nano: nanos(times.now),
        value: Some(value),
        ..NumberDataPoint::default()
    }
}

/// OTLP's buckets end at their bounds, as ours do, and the last has none.
fn histogram_point(sample: &Sample, times: Times) -> HistogramDataPoint {
    let Value::Histogram(Snapshot { sum, count, buckets }) = &sample.value else {
        unreachable!("a histogram's samples are histograms")
    };
    HistogramDataPoint {
        attributes: attributes(sample),
        start_time_unix_nano: nanos(times.start),
        time_unix_nano: nanos(times.now),
        count: *count,
        sum: Some(*sum),
        bucket_counts: buckets.iter().map(|(_, count)| *count).collect(),
        explicit_bounds: buckets.iter().map(|(bound, _)| *bound).filter(|bound| bound.is_finite()).collect(),
        ..HistogramDataPoint::default()
    }
}

pub(super) fn nanos(since_1970: Duration) -> u64 {
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}
