//! OpenTelemetry from a caller's trace to a receiver that decodes what comes, over both ways that OTLP travels.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use ferry::client::{Client, ClientOptions, Request};
use ferry::telemetry::family::{Kind, Value};
use ferry::vocab::TraceContext;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::metrics::v1::Metric;
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tonic::transport::server::TcpIncoming;

use crate::common::{Ask, Server, wait_until};

/// What came.
#[derive(Default)]
struct Heap {
    spans: Vec<Span>,
    /// Of the last message.
    metrics: Vec<Metric>,
    resources: Vec<Vec<KeyValue>>,
}

/// A receiver of OTLP on a thread of its own, for as long as the process lives.
#[derive(Clone, Default)]
struct OtlpReceiver(Arc<Mutex<Heap>>);

impl OtlpReceiver {
    fn heap(&self) -> std::sync::MutexGuard<'_, Heap> {
        self.0.lock().expect("nobody panics while holding the heap")
    }

    fn take_traces(&self, message: ExportTraceServiceRequest) {
        let mut heap = self.heap();
        for of_resource in message.resource_spans {
            heap.resources.push(of_resource.resource.expect("who speaks").attributes);
            heap.spans.extend(of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans));
        }
    }

    fn take_metrics(&self, message: ExportMetricsServiceRequest) {
        let mut heap = self.heap();
        let of_scopes = message.resource_metrics.into_iter().flat_map(|of_resource| of_resource.scope_metrics);
        heap.metrics = of_scopes.flat_map(|of_scope| of_scope.metrics).collect();
    }

    fn spans(&self, name: &str) -> Vec<Span> {
        self.heap().spans.iter().filter(|span| span.name == name).cloned().collect()
    }

    fn metric(&self, name: &str) -> Option<Metric> {
        self.heap().metrics.iter().find(|metric| metric.name == name).cloned()
    }

    /// Listens for gRPC, or for HTTP with protobuf.
    fn listen(protocol: &str) -> (OtlpReceiver, SocketAddr) {
        let receiver = OtlpReceiver::default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket option");
        let addr = listener.local_addr().expect("bound");
        let (mine, grpc) = (receiver.clone(), protocol == "grpc");
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                match grpc {
                    false => axum::serve(listener, mine.http()).await.expect("it serves"),
                    true => tonic::transport::Server::builder()
                        .add_service(TraceServiceServer::new(mine.clone()))
                        .add_service(MetricsServiceServer::new(mine))
                        .serve_with_incoming(TcpIncoming::from(listener))
                        .await
                        .expect("it serves"),
                }
            });
        });
        (receiver, addr)
    }

    fn http(self) -> axum::Router {
        fn decoded<M: Message + Default>(headers: &HeaderMap, body: Bytes) -> Result<M, StatusCode> {
            match headers.get("content-type").map(|kind| kind.as_bytes()) {
                Some(b"application/x-protobuf") => M::decode(body).map_err(|_| StatusCode::BAD_REQUEST),
                _ => Err(StatusCode::UNSUPPORTED_MEDIA_TYPE),
            }
        }
        let (for_traces, for_metrics) = (self.clone(), self);
        let traces = axum::routing::post(move |headers: HeaderMap, body: Bytes| async move {
            let message = decoded(&headers, body)?;
            for_traces.take_traces(message);
            Ok::<_, StatusCode>(ExportTraceServiceResponse::default().encode_to_vec())
        });
        let metrics = axum::routing::post(move |headers: HeaderMap, body: Bytes| async move {
            let message = decoded(&headers, body)?;
            for_metrics.take_metrics(message);
            Ok::<_, StatusCode>(ExportMetricsServiceResponse::default().encode_to_vec())
        });
        axum::Router::new().route("/v1/traces", traces).route("/v1/metrics", metrics)
    }
}

#[tonic::async_trait]
impl TraceService for OtlpReceiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.take_traces(request.into_inner());
        Ok(tonic::Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for OtlpReceiver {
    async fn export(
        &self,
        request: tonic::Request<ExportMetricsServiceRequest>,
    ) -> Result<tonic::Response<ExportMetricsServiceResponse>, tonic::Status> {
        self.take_metrics(request.into_inner());
        Ok(tonic::Response::new(Default::default()))
    }
}

fn server(protocol: &str, addr: SocketAddr, sets: &[&str]) -> Server {
    let (protocol, endpoint) = (format!("otel.protocol={protocol}"), format!("otel.endpoint=http://{addr}"));
    let mut all = vec![protocol.as_str(), endpoint.as_str(), "otel.interval_ms=100", "otel.service_name=ferry-test"];
    all.extend(sets);
    Server::start(&all)
}

fn attributes(of: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Any| match value {
        Any::StringValue(text) => text.clone(),
        Any::IntValue(number) => number.to_string(),
        Any::DoubleValue(number) => number.to_string(),
        other => panic!("an attribute that is none of ours: {other:?}"),
    };
    let pair = |pair: &KeyValue| {
        let value = pair.value.as_ref().and_then(|value| value.value.as_ref()).expect("a value");
        (pair.key.clone(), text(value))
    };
    of.iter().map(pair).collect()
}

fn echo(values: &[f32]) -> Request {
    Request::new("echo").input("values", &[1, values.len() as u32], values)
}

/// Goal: what a caller's own trace shows of ferry is right: parents, links, attributes, stages.
/// Method: two callers that record share a batch with one that does not and one that names no trace.
fn a_batch_is_traced_for_those_who_record(protocol: &str) {
    let (receiver, addr) = OtlpReceiver::listen(protocol);
    let server = server(protocol, addr, &["otel.sample_ratio=0.0"]);
    let client = Client::connect(server.data, ClientOptions::default()).expect("a server");
    let parents = [
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b8-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4738-00f067aa0ba902b9-00",
    ];
    let traced = |at: usize| echo(&[at as f32]).compose(1, 4).trace_parent(parents[at]).expect("a traceparent");
    let mut pending: Vec<_> = (0..3).map(|at| client.submit(&traced(at)).expect("it is sent")).collect();
    pending.push(client.submit(&echo(&[9.0]).compose(1, 4)).expect("it is sent"));
    let answers: Vec<_> = pending.into_iter().map(|pending| pending.wait().expect("an answer")).collect();
    wait_until("the batch's span has come", || !receiver.spans("ferry.batch").is_empty());

    let requests = receiver.spans("ferry.infer");
    assert_eq!(
        requests.len(),
        2,
        "{protocol}: of the third its caller does not record, and of the fourth no share is taken"
    );
    for parent in &parents[..2] {
        let parent = TraceContext::parse(parent).expect("as above");
        let of_parent = |span: &&Span| span.trace_id == parent.trace_id && span.parent_span_id == parent.span_id;
        let request = requests.iter().find(of_parent).expect("in the caller's trace, below its span");
        let said = attributes(&request.attributes);
        let expected = [
            ("ferry.model.name", "echo"),
            ("ferry.model.version", "1"),
            ("ferry.code", "ok"),
            ("ferry.batch.id", &answers[0].batch().to_string()),
        ];
        expected.iter().for_each(|(key, value)| assert_eq!(said.get(*key).map(String::as_str), Some(*value), "{key}"));
        for stage in ["admit", "queue", "pack", "wait", "run", "scatter"] {
            let of_request = |span: &Span| span.parent_span_id == request.span_id && span.trace_id == request.trace_id;
            let stages = receiver.spans(&format!("ferry.{stage}"));
            assert_eq!(stages.iter().filter(|span| of_request(span)).count(), 1, "{stage}");
        }
    }
    let batches = receiver.spans("ferry.batch");
    let [batch] = &batches[..] else { panic!("{} spans of one batch", batches.len()) };
    let ids = |of: &mut dyn Iterator<Item = (Vec<u8>, Vec<u8>)>| of.collect::<BTreeSet<_>>();
    let linked = ids(&mut batch.links.iter().map(|link| (link.trace_id.clone(), link.span_id.clone())));
    assert_eq!(linked, ids(&mut requests.iter().map(|span| (span.trace_id.clone(), span.span_id.clone()))));
    for request in &requests {
        assert_eq!((&request.links[0].trace_id, &request.links[0].span_id), (&batch.trace_id, &batch.span_id));
    }
    let said = attributes(&batch.attributes);
    let expected = [
        ("ferry.model.name", "echo"),
        ("ferry.model.version", "1"),
        ("ferry.model.precision", "f32"),
        ("ferry.batch.size", "4"),
        ("ferry.batch.bucket", &answers[0].padded_len().to_string()),
        ("ferry.batch.close_reason", answers[0].seal_reason().expect("known").name()),
        ("ferry.device", "inline"),
    ];
    expected.iter().for_each(|(key, value)| assert_eq!(said.get(*key).map(String::as_str), Some(*value), "{key}"));
    let fill: f64 = said["ferry.batch.fill_ratio"].parse().expect("a number");
    assert!(fill > 0.0 && fill <= 1.0, "{fill}");
    let resource = attributes(&receiver.heap().resources[0]);
    assert_eq!(resource["service.name"], "ferry-test");
    assert_eq!(server.metric("ferry_otel_dropped_total", &[]), 0.0);
}

#[test]
fn a_batch_is_traced_for_those_who_record_over_grpc() {
    a_batch_is_traced_for_those_who_record("grpc");
}

#[test]
fn a_batch_is_traced_for_those_who_record_over_http() {
    a_batch_is_traced_for_those_who_record("http/protobuf");
}

#[test]
fn metrics_of_the_receiver_are_those_of_the_page() {
    for protocol in ["grpc", "http/protobuf"] {
        let (receiver, addr) = OtlpReceiver::listen(protocol);
        let server = server(protocol, addr, &[]);
        let client = Client::connect(server.data, ClientOptions::default()).expect("a server");
        for value in 0..5 {
            client.infer(&echo(&[value as f32])).expect("an answer");
        }
        let rows = |metric: &Metric| match &metric.data {
            Some(Data::Histogram(histogram)) => histogram
                .data_points
                .iter()
                .find(|point| attributes(&point.attributes)["model"] == "echo")
                .map(|point| (point.count, point.sum, point.bucket_counts.clone(), point.explicit_bounds.len())),
            other => panic!("rows of batches are a histogram, got {other:?}"),
        };
        let mut expected = vec![0; 22];
        expected[0] = 5; // up to one row
        wait_until("all five are among the metrics", || {
            receiver.metric("ferry_batch_rows").and_then(|metric| rows(&metric))
                == Some((5, Some(5.0), expected.clone(), 21))
        });
        let families = || server.telemetry.families().into_iter().filter(|family| !family.samples.is_empty());
        wait_until("the receiver has as many points of each metric as the page", || {
            let shown: BTreeMap<String, usize> =
                families().map(|family| (family.name(), family.samples.len())).collect();
            let heap = receiver.heap();
            let received = heap.metrics.iter().map(|metric| (metric.name.clone(), points_of(metric).1.len()));
            received.collect::<BTreeMap<_, _>>() == shown
        });
        for family in families() {
            let metric = receiver.metric(&family.name()).expect("as many as the page has");
            assert_eq!((metric.unit.as_str(), metric.description.as_str()), (family.unit(), family.help));
            let (kind, points) = points_of(&metric);
            assert_eq!(kind, family.kind, "{}", metric.name);
            for (point, sample) in points.iter().zip(&family.samples) {
                let labels = sample.labels.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
                assert_eq!(attributes(point), labels.collect(), "{}", metric.name);
                assert_eq!(matches!(sample.value, Value::Histogram(_)), kind == Kind::Histogram);
            }
        }
    }
}

/// What a metric is, and the labels of its points.
fn points_of(metric: &Metric) -> (Kind, Vec<&[KeyValue]>) {
    match metric.data.as_ref().expect("data") {
        Data::Sum(sum) => {
            assert!(
                sum.is_monotonic && sum.aggregation_temporality == 2,
                "{}: cumulative, and it only rises",
                metric.name
            );
            (Kind::Counter, sum.data_points.iter().map(|point| &point.attributes[..]).collect())
        }
        Data::Gauge(gauge) => (Kind::Gauge, gauge.data_points.iter().map(|point| &point.attributes[..]).collect()),
        Data::Histogram(histogram) => {
            (Kind::Histogram, histogram.data_points.iter().map(|point| &point.attributes[..]).collect())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_share_of_requests_without_a_trace_is_recorded_with_traces_of_their_own_and_failures_say_why() {
    let (receiver, addr) = OtlpReceiver::listen("grpc");
    let server = server("grpc", addr, &["otel.sample_ratio=1"]);
    let mut raw = server.connect();
    let (echo, sleep) = (raw.handle("echo"), raw.handle("sleep"));
    raw.round(&Ask::floats(echo, &[1.0])).expect_result();
    raw.round(&Ask::word(sleep, 3_000_000).deadline_us(20_000)).expect_error(ferry::vocab::Code::DeadlineExceeded);
    wait_until("both have come", || receiver.spans("ferry.infer").len() == 2);
    let spans = receiver.spans("ferry.infer");
    let of = |model: &str| {
        let of_model = |span: &&Span| attributes(&span.attributes)["ferry.model.name"] == model;
        spans.iter().find(of_model).unwrap_or_else(|| panic!("no span of {model}"))
    };
    assert!(spans.iter().all(|span| span.parent_span_id.is_empty()), "they are roots");
    assert_ne!(of("echo").trace_id, of("sleep").trace_id);
    assert_eq!(of("echo").status, None);
    let status = of("sleep").status.as_ref().expect("an error");
    assert!(status.code == 2 && status.message.contains("deadline"), "{status:?}");
    assert_eq!(attributes(&of("sleep").attributes)["ferry.code"], "deadline_exceeded");
}

#[test]
fn what_is_left_goes_to_the_receiver_before_the_server_ends() {
    let (receiver, addr) = OtlpReceiver::listen("http/protobuf");
    let endpoint = format!("otel.endpoint=http://{addr}");
    let server = Server::start(&[&endpoint, "otel.sample_ratio=1", "otel.interval_ms=3600000"]);
    let client = Client::connect(server.data, ClientOptions::default()).expect("a server");
    client.infer(&echo(&[1.0])).expect("an answer");
    server.drain();
    drop(client);
    assert_eq!(server.ending(), ferry::server::Ending::Drained);
    assert_eq!(receiver.spans("ferry.batch").len(), 1, "also the batch, which had not settled");
    assert!(receiver.metric("ferry_requests_finished_total").is_some(), "and how all of it ended");
}

#[test]
fn a_receiver_that_is_away_costs_a_bounded_number_of_spans_and_no_answer() {
    // Bound and not accepted from: a port where nobody answers, that nobody else takes meanwhile.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = nobody.local_addr().expect("bound");
    drop(nobody);
    let server = server("http/protobuf", addr, &["otel.sample_ratio=1"]);
    let client = Client::connect(server.data, ClientOptions::default()).expect("a server");
    // Seven spans each and one for its batch: more than are kept.
    let requests = ferry::otel::SPANS_MAX / 8 + 1000;
    for start in (0..requests).step_by(100) {
        let pending: Vec<_> = (start..start + 100).map(|_| client.submit(&echo(&[1.0])).expect("it is sent")).collect();
        pending.into_iter().for_each(|pending| drop(pending.wait().expect("an answer")));
    }
    wait_until("the oldest had to go", || server.metric("ferry_otel_dropped_total", &["what=\"spans\""]) > 0.0);
    wait_until("nobody took them", || server.metric("ferry_otel_exports_total", &["outcome=\"failed\""]) > 0.0);
    assert_eq!(server.metric("ferry_otel_exports_total", &["outcome=\"ok\""]), 0.0);
}

#[test]
fn without_a_receiver_nothing_is_recorded_and_nothing_is_said_of_it() {
    let server = Server::shared();
    let client = Client::connect(server.data, ClientOptions::default()).expect("a server");
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    client.infer(&echo(&[1.0]).trace_parent(parent).expect("a traceparent")).expect("an answer");
    let page = server.telemetry.encode();
    assert!(
        page.contains("# TYPE ferry_otel_exports counter") && !page.contains("ferry_otel_exports_total{"),
        "{page}"
    );
}
