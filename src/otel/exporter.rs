//! The loop: takes records, makes spans, sends them and the metrics, until it is told to stop; then once more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use tokio::sync::oneshot;

use super::metrics::{self, Times};
use super::spans::Recorded;
use super::transport::{Failed, Transport};
use super::{About, Options, SPANS_MAX, SPANS_PER_MESSAGE};
use crate::clock;
use crate::mailbox::Receiver;
use crate::telemetry::spans::RequestRecord;
use crate::telemetry::{Signal, Telemetry};
use crate::vocab::Moment;

/// Between two looks for records; also the longest that a span waits for company.
const SPANS_EVERY: Duration = Duration::from_secs(1);
/// A receiver that fails is complained about this often.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Exports until `stop` is sent or dropped, and then what is left.
pub async fn run(
    options: Options,
    telemetry: Arc<Telemetry>,
    records: Receiver<RequestRecord>,
    mut stop: oneshot::Receiver<()>,
) {
    let transport = match Transport::new(&options) {
        Ok(transport) => transport,
        Err(message) => return tracing::error!(endpoint = options.endpoint, message, "nothing is exported"),
    };
    tracing::info!(endpoint = options.endpoint, "metrics and traces go to a receiver of OpenTelemetry");
    let instance = rand::random();
    let mut exporter = Exporter {
        about: About::new(Arc::clone(&telemetry), &options.service_name, instance),
        started_at: telemetry.started_at(),
        recorded: Recorded::new(instance),
        unsent: VecDeque::new(),
        transport,
        records,
        warned_at: None,
    };
    let mut metrics_at = clock::now() + options.interval;
    loop {
        let wait = SPANS_EVERY.min(options.interval);
        let stopped = tokio::time::timeout(wait, &mut stop).await.is_ok();
        exporter.send_spans(stopped).await;
        if stopped || clock::now() >= metrics_at {
            metrics_at = clock::now() + options.interval;
            exporter.send_metrics().await;
        }
        if stopped {
            return;
        }
    }
}

struct Exporter {
    about: About,
    started_at: Moment,
    recorded: Recorded,
    /// Oldest first, at most [`SPANS_MAX`].
    unsent: VecDeque<Span>,
    transport: Transport,
    records: Receiver<RequestRecord>,
    warned_at: Option<Moment>,
}

impl Exporter {
    async fn send_spans(&mut self, all: bool) {
        let (now, origin) = (clock::now(), clock::unix_time(Moment::ZERO));
        let mut spans = Vec::new();
        while let Some(record) = self.records.try_recv() {
            self.recorded.take(&record, &self.about, origin, now, &mut spans);
        }
        self.recorded.settle(all, &self.about, origin, now, &mut spans);
        self.unsent.extend(spans);
        let over = self.unsent.len().saturating_sub(SPANS_MAX);
        self.unsent.drain(..over);
        self.about.telemetry.otel().dropped_spans(over as u64);
        while !self.unsent.is_empty() {
            let count = self.unsent.len().min(SPANS_PER_MESSAGE);
            let message = self.message(self.unsent.iter().take(count).cloned().collect());
            let outcome = self.transport.traces(message).await;
            let otel = self.about.telemetry.otel();
            otel.exported(Signal::Traces, outcome.is_ok());
            match outcome {
                Ok(turned_down) => otel.dropped_spans(turned_down),
                Err(Failed::Never(_)) => otel.dropped_spans(count as u64),
                Err(Failed::Later(_)) => {}
            }
            if let Err(failed) = &outcome {
                self.warn(failed);
            }
            if matches!(outcome, Err(Failed::Later(_))) {
                return;
            }
            self.unsent.drain(..count);
        }
    }

    fn message(&self, spans: Vec<Span>) -> ExportTraceServiceRequest {
        let of_scope = ScopeSpans { scope: Some(self.about.scope.clone()), spans, ..ScopeSpans::default() };
        let of_resource = ResourceSpans {
            resource: Some(self.about.resource.clone()),
            scope_spans: vec![of_scope],
            ..ResourceSpans::default()
        };
        ExportTraceServiceRequest { resource_spans: vec![of_resource] }
    }

    /// Metrics count from the start: a message that is lost is made good by the next.
    async fn send_metrics(&mut self) {
        let times = Times { start: clock::unix_time(self.started_at), now: clock::unix_time(clock::now()) };
        let message = metrics::message(&self.about, &self.about.telemetry.families(), times);
        let outcome = self.transport.metrics(message).await;
        self.about.telemetry.otel().exported(Signal::Metrics, outcome.is_ok());
        if let Err(failed) = &outcome {
            self.warn(failed);
        }
    }

    fn warn(&mut self, failed: &Failed) {
        let now = clock::now();
        if self.warned_at.is_none_or(|at| now.since(at) >= WARN_EVERY) {
            self.warned_at = Some(now);
            tracing::warn!(%failed, "the receiver of OpenTelemetry does not take what it is sent");
        }
    }
}
