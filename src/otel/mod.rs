//! OpenTelemetry: what is counted and what was recorded, sent to a receiver by OTLP. Off unless an endpoint is configured.
//!
//! ```text
//!     shards ──RequestRecord──▶ Recorded ──spans──▶ Exporter ──▶ receiver
//!                       Telemetry::families ──metrics──▲    over gRPC, or HTTP with protobuf
//! ```
//!
//! Always true
//! - It runs on the control thread. Shards hand it a record for each recorded request and never wait for it: the way there is
//!   bounded by [`RECORDS_MAX`], spans that nobody takes by [`SPANS_MAX`], and what is lost is counted.
//! - Metrics are those of `/metrics`, made from the same list: names, labels, buckets and numbers agree.
//! - Each span carries the caller's trace; a batch has a trace of its own, linked with its members both ways.
//!
//! Not the SDK of OpenTelemetry: its histograms take a lock for each observation and cannot be given counts that were kept
//! elsewhere, so that every number would be counted twice; and its spans read the clock where they begin, on the shards.
//!
//! Elsewhere: which requests are recorded (frontend/traces.rs), what is counted (telemetry), the thread (control).

pub mod exporter;
mod metrics;
mod spans;
mod transport;

use std::sync::Arc;
use std::time::Duration;

use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValueOf;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;

use crate::telemetry::Telemetry;

pub use exporter::run;

/// Records of ended requests that may wait for the exporter.
pub const RECORDS_MAX: usize = 8192;
/// Spans that are kept for a receiver that does not take them; beyond it the oldest go.
pub const SPANS_MAX: usize = 16_384;
/// Spans of one message, as other exporters have it.
pub const SPANS_PER_MESSAGE: usize = 512;
/// Links of one span, the standard's own default; the rest is counted in the span.
pub const LINKS_MAX: usize = 128;

/// How OTLP travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Grpc,
    HttpProtobuf,
}

/// What the exporter is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// `http://HOST:PORT`; for HTTP the paths of the signals are added.
    pub endpoint: String,
    pub protocol: Protocol,
    pub service_name: String,
    /// Between two exports of metrics. Spans go at least each second.
    pub interval: Duration,
}

/// Who speaks, and what is known about models and executors.
#[derive(Clone, Debug)]
struct About {
    telemetry: Arc<Telemetry>,
    resource: Resource,
    scope: InstrumentationScope,
}

impl About {
    /// `instance`: of this process, at random.
    fn new(telemetry: Arc<Telemetry>, service_name: &str, instance: u64) -> About {
        let version = env!("CARGO_PKG_VERSION");
        let attributes = vec![
            text("service.name", service_name),
            text("service.version", version),
            text("service.instance.id", format!("{instance:016x}")),
        ];
        About {
            telemetry,
            resource: Resource { attributes, ..Resource::default() },
            scope: InstrumentationScope { name: "ferry".into(), version: version.into(), ..Default::default() },
        }
    }
}

fn attribute(key: &str, value: AnyValueOf) -> KeyValue {
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn text(key: &str, value: impl Into<String>) -> KeyValue {
    attribute(key, AnyValueOf::StringValue(value.into()))
}

fn number(key: &str, value: impl Into<u64>) -> KeyValue {
    attribute(key, AnyValueOf::IntValue(i64::try_from(value.into()).unwrap_or(i64::MAX)))
}

fn real(key: &str, value: f64) -> KeyValue {
    attribute(key, AnyValueOf::DoubleValue(value))
}
