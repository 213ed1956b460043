//! OTLP messages to a receiver: gRPC, or HTTP with protobuf. Plain text only: a collector beside the server does TLS and
//! credentials, and does them for everybody.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use prost::Message;
use tonic::transport::{Channel, Endpoint};

use super::{Options, Protocol};

/// From sending a message to the receiver's answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// An answer holds a count and a sentence.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Why a message was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failed {
    /// Nobody is there, or is busy: the same may be taken later.
    Later(String),
    /// It would be turned down again.
    Never(String),
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Failed::Later(message) | Failed::Never(message)) = self;
        f.write_str(message)
    }
}

/// A way to the receiver. Connects when it is first used, and again after a failure.
pub enum Transport {
    Grpc { traces: TraceServiceClient<Channel>, metrics: MetricsServiceClient<Channel> },
    Http { client: Client<HttpConnector, Full<Bytes>>, endpoint: String },
}

impl Transport {
    /// Needs a runtime around it. `Err`: the endpoint is no address.
    pub fn new(options: &Options) -> Result<Transport, String> {
        match options.protocol {
            Protocol::Grpc => {
                let endpoint = Endpoint::from_shared(options.endpoint.clone()).map_err(|error| error.to_string())?;
                let channel = endpoint.timeout(TIMEOUT).connect_timeout(TIMEOUT).connect_lazy();
                let (traces, metrics) = (TraceServiceClient::new(channel.clone()), MetricsServiceClient::new(channel));
                Ok(Transport::Grpc { traces, metrics })
            }
            Protocol::HttpProtobuf => {
                let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
                Ok(Transport::Http { client, endpoint: options.endpoint.trim_end_matches('/').to_owned() })
            }
        }
    }

    /// Sends spans. `Ok`: how many of them were turned down.
    pub async fn traces(&mut self, message: ExportTraceServiceRequest) -> Result<u64, Failed> {
        let answer: ExportTraceServiceResponse = match self {
            Transport::Grpc { traces, .. } => traces.export(message).await.map_err(of_status)?.into_inner(),
            Transport::Http { client, endpoint } => post(client, &format!("{endpoint}/v1/traces"), &message).await?,
        };
        let rejected = answer.partial_success.map_or(0, |partial| partial.rejected_spans);
        Ok(u64::try_from(rejected).unwrap_or(0))
    }

    /// Sends metrics. Those that were turned down are said by a warning of the receiver's own.
    pub async fn metrics(&mut self, message: ExportMetricsServiceRequest) -> Result<(), Failed> {
        let answer: ExportMetricsServiceResponse = match self {
            Transport::Grpc { metrics, .. } => metrics.export(message).await.map_err(of_status)?.into_inner(),
            Transport::Http { client, endpoint } => post(client, &format!("{endpoint}/v1/metrics"), &message).await?,
        };
        match answer.partial_success.filter(|partial| partial.rejected_data_points > 0) {
            None => Ok(()),
            Some(partial) => Err(Failed::Never(format!(
                "{} data points were turned down: {}",
                partial.rejected_data_points, partial.error_message
            ))),
        }
    }
}

/// Which codes are worth another attempt is the protocol's own table.
fn of_status(status: tonic::Status) -> Failed {
    use tonic::Code;
    let message = format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss
        | Code::ResourceExhausted
        // What a connection that breaks comes to.
        | Code::Unknown => Failed::Later(message),
        _ => Failed::Never(message),
    }
}

async fn post<T: Message + Default>(
    client: &Client<HttpConnector, Full<Bytes>>,
    url: &str,
    message: &impl Message,
) -> Result<T, Failed> {
    let request = axum::http::Request::post(url)
        .header(axum::http::header::CONTENT_TYPE, "application/x-protobuf")
        .body(Full::new(Bytes::from(message.encode_to_vec())))
        .map_err(|error| Failed::Never(error.to_string()))?;
    let exchange = async {
        let answer = client.request(request).await.map_err(|error| Failed::Later(chain(&error)))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| Failed::Later(error.to_string()))?.to_bytes();
        match status.as_u16() {
            200..=299 => T::decode(body).map_err(|error| Failed::Never(format!("an answer that is none: {error}"))),
            429 | 502 | 503 | 504 => Err(Failed::Later(format!("status {status}"))),
            _ => Err(Failed::Never(format!("status {status}"))),
        }
    };
    match tokio::time::timeout(TIMEOUT, exchange).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failed::Later(format!("no answer within {TIMEOUT:?}"))),
    }
}

/// An error with what caused it: the first of them alone says only that sending failed.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
