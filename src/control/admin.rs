//! The control port: health, readiness, models, metrics, statistics, configuration, drain. HTTP/1 on one thread.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /healthz` | 200 while the process lives |
//! | `GET /readyz` | 200 when requests would be served, else 503 with the reason |
//! | `GET /v1/models` | contracts, each with `ready` |
//! | `GET /metrics` | OpenMetrics text |
//! | `GET /stats` | cumulative counts as JSON |
//! | `GET /config` | the effective configuration as TOML |
//! | `GET /v1/capture?seconds=N` | a trace of the scheduler's inputs, as it is made (capture.rs) |
//! | `GET /v1/batches`, `/v1/requests`, `/v1/timeline` | what became of the last batches (recorder.rs) |
//! | `GET /`, `/assets/{name}`, `/v1/live` | the dashboard (dashboard/) |
//! | `POST /drain` | 202; the server begins to drain |
//! | `/v1/models/{model}/policy` … | policy.rs |
//! | `/v1/models/{model}/trial` | trial.rs |
//! | `/v1/models/{model}/shadow` | shadow.rs |
//! | `/v1/models/{model}/lengths`, `/cost`, `/findings`, `/v1/decisions` | insight.rs |
//!
//! Always true
//! - Connections, bytes of a request, time of a request and requests per second are bounded: a caller that hammers,
//!   dawdles or floods costs this thread a bounded share of a core, and the data path nothing.
//! - Health and readiness are answered beyond the request rate, so that a busy scraper cannot make a supervisor
//!   think that the server is dead.
//! - Where tokens are wanted (auth.rs) nobody without one gets more than health and readiness.
//! - A page in a browser can use this port only if this port served it (origin.rs), and cannot drain the server at all.
//!
//! Elsewhere: its connections (listener.rs).

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::auth::{self, Gate, Peer};
use super::capture::capture;
use super::dashboard::{self, Live};
use super::lifecycle::{self, Lifecycle};
use super::listener::Bounded;
use super::{insight, origin, policy, recorder, shadow, trial};
use crate::clock;
use crate::mail::{Question, ToBatcher};
use crate::mailbox::{Awaited, Reply, SendError, Sender, reply};
use crate::shadow::Board;
use crate::telemetry::Telemetry;
use crate::vocab::{ModelHandle, Moment};

/// Connections at once; the next wait in the kernel's queue until one ends.
pub const CONNECTIONS_MAX: usize = 64;
/// Bytes of one request, its head and body together.
pub const REQUEST_BYTES_MAX: usize = 16 * 1024;
/// From connecting, or from the last byte of the answer before, to the first byte of the answer; and for any pause
/// while an answer is taken.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests per second in the long run, and at once after a pause.
pub const RATE: u32 = 100;

/// Questions to the batcher per second in the long run, and at once after a pause.
pub const ASK_RATE: u32 = 20;
/// How long the batcher may take to answer. It answers between two batches, and an inline batch is short.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// What the control port serves.
pub struct ControlOptions {
    pub addr: SocketAddr,
    pub telemetry: Arc<Telemetry>,
    pub lifecycle: Arc<Lifecycle>,
    /// Contracts, in the order of their handles.
    pub models: Vec<serde_json::Value>,
    pub config_toml: String,
    /// Begins the drain. Called once for each `POST /drain`, on the control thread: it must not wait.
    pub on_drain: Arc<dyn Fn() + Send + Sync>,
    /// Asked about policies and decisions, once the server serves.
    pub batcher: Sender<ToBatcher>,
    /// What is asked of the shadow schedulers, and what they have found.
    pub shadow: Arc<Board>,
    /// Who may ask; None: everybody who can reach the port.
    pub gate: Option<Arc<Gate>>,
}

/// Work for the control thread beside the port. It is to end when the channel that it is given does.
pub type Beside = Box<dyn FnOnce(oneshot::Receiver<()>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// How long work beside the port may take to end after it was told to.
const BESIDE_END_MAX: Duration = Duration::from_secs(3);

/// The running control port. Dropping it ends the thread.
#[derive(Debug)]
pub struct ControlHandle {
    pub addr: SocketAddr,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ControlHandle {
    /// Ends the thread and waits for it. Requests that are being answered are cut.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; there is nothing left to lose with it.
            let _ = thread.join();
        }
    }
}

impl Drop for ControlHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// Binds the port and starts its thread.
pub fn spawn(options: ControlOptions) -> io::Result<ControlHandle> {
    spawn_with(options, None)
}

/// The same, with other work on that thread.
pub fn spawn_with(options: ControlOptions, beside: Option<Beside>) -> io::Result<ControlHandle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let listener = std::net::TcpListener::bind(options.addr)?;
    listener.set_nonblocking(true)?;
    let addr = listener.local_addr()?;
    let listener = {
        let _inside = runtime.enter();
        TcpListener::from_std(listener)?
    };
    let gate = options.gate.clone();
    let router = router(options).into_make_service_with_connect_info::<Peer>();
    let (end, ended) = oneshot::channel::<()>();
    let thread = std::thread::Builder::new().name("ferry-control".into()).spawn(move || {
        runtime.block_on(async {
            let (end_beside, beside_ended) = oneshot::channel();
            let beside = beside.map(|work| tokio::spawn(work(beside_ended)));
            let serve = axum::serve(Bounded::new(listener, gate), router);
            tokio::select! {
                _ = serve => {}
                _ = ended => {} // by drop, too
            }
            drop(end_beside);
            if let Some(beside) = beside {
                let _ = tokio::time::timeout(BESIDE_END_MAX, beside).await;
            }
        });
        // Connections are dropped with the runtime; no blocking task is ever started on it.
        runtime.shutdown_background();
    })?;
    Ok(ControlHandle { addr, end: Some(end), thread: Some(thread) })
}

/// What the handlers share.
pub(super) struct Shared {
    options: ControlOptions,
    rate: Mutex<Rate>,
    asks: Mutex<Rate>,
    /// A capture is on.
    pub(super) capturing: Arc<AtomicBool>,
    pub(super) live: Live,
}

/// A request that is answered with an error: `{"error": "…"}`.
#[derive(Debug)]
pub(super) struct Unanswered {
    status: StatusCode,
    message: String,
}

impl Unanswered {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Unanswered {
        Unanswered { status, message: message.into() }
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }
}

impl IntoResponse for Unanswered {
    fn into_response(self) -> Response {
        (self.status, Json(serde_json::json!({ "error": self.message }))).into_response()
    }
}

impl Shared {
    /// The handle of a model.
    pub(super) fn model(&self, name: &str) -> Result<ModelHandle, Unanswered> {
        let names = || self.options.models.iter().map(|contract| contract["name"].as_str().unwrap_or_default());
        names().position(|known| known == name).map(|at| ModelHandle(at as u16)).ok_or_else(|| {
            let known: Vec<&str> = names().take(32).collect();
            let name: String = name.chars().take(128).collect();
            Unanswered::new(StatusCode::NOT_FOUND, format!("unknown model {name:?}; known are {}", known.join(", ")))
        })
    }

    pub(super) fn telemetry(&self) -> &Telemetry {
        &self.options.telemetry
    }

    /// Of all models, in the order of their handles.
    pub(super) fn names(&self) -> Vec<String> {
        let name = |contract: &serde_json::Value| contract["name"].as_str().unwrap_or_default().to_owned();
        self.options.models.iter().map(name).collect()
    }

    pub(super) fn shadow(&self) -> &Board {
        &self.options.shadow
    }

    /// Contracts, in the order of their handles.
    pub(super) fn models(&self) -> &[serde_json::Value] {
        &self.options.models
    }

    /// What state the server is in, and why it is not ready.
    pub(super) fn state(&self) -> (&'static str, Option<String>) {
        (self.options.lifecycle.state().name(), self.options.lifecycle.ready().err())
    }

    pub(super) fn name(&self, model: ModelHandle) -> &str {
        self.options.models.get(model.index()).and_then(|contract| contract["name"].as_str()).unwrap_or_default()
    }

    /// Asks the batcher.
    pub(super) async fn ask<T>(&self, question: impl FnOnce(Reply<T>) -> Question) -> Result<T, Unanswered> {
        if !self.asks.lock().expect("nobody panics while holding the rate").take(clock::now()) {
            let message = format!("the batcher is asked at most {ASK_RATE} questions per second");
            return Err(Unanswered::new(StatusCode::TOO_MANY_REQUESTS, message));
        }
        self.ask_within(ANSWER_TIMEOUT, question).await
    }

    /// Asks the batcher beyond the rate of questions: for who paces itself.
    pub(super) async fn ask_within<T>(
        &self,
        patience: Duration,
        question: impl FnOnce(Reply<T>) -> Question,
    ) -> Result<T, Unanswered> {
        let (reply, awaited) = reply();
        self.mail(ToBatcher::Ask(question(reply)))?;
        self.within(patience, awaited).await
    }

    /// Puts a message into the batcher's mailbox, if somebody will read it.
    pub(super) fn mail(&self, message: ToBatcher) -> Result<(), Unanswered> {
        let unavailable = |why: &str| Unanswered::new(StatusCode::SERVICE_UNAVAILABLE, why);
        if self.options.lifecycle.state() == lifecycle::State::Starting {
            return Err(unavailable("starting: there is nobody to ask yet"));
        }
        self.options.batcher.send(message).map_err(|error| match error {
            SendError::Full(_) => unavailable("the batcher's mailbox is full; try again"),
            SendError::Closed(_) => unavailable("stopped: there is nobody to ask any more"),
        })
    }

    pub(super) async fn patiently<T>(&self, awaited: Awaited<T>) -> Result<T, Unanswered> {
        self.within(ANSWER_TIMEOUT, awaited).await
    }

    async fn within<T>(&self, patience: Duration, awaited: Awaited<T>) -> Result<T, Unanswered> {
        let unavailable = |why: &str| Unanswered::new(StatusCode::SERVICE_UNAVAILABLE, why);
        match tokio::time::timeout(patience, awaited.answer()).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(unavailable("stopped: there is nobody to ask any more")),
            Err(_) => Err(unavailable("the batcher did not answer in time; a change may still be made")),
        }
    }
}

fn router(options: ControlOptions) -> Router {
    let gate = options.gate.clone();
    let guarded = |router: Router<Arc<Shared>>| match &gate {
        None => router.layer(middleware::from_fn(origin::guard)),
        Some(_) => router.layer(middleware::from_fn(origin::guard_by_any_name)),
    };
    let shared = Arc::new(Shared {
        options,
        rate: Mutex::new(Rate::new(RATE, clock::now())),
        asks: Mutex::new(Rate::new(ASK_RATE, clock::now())),
        capturing: Arc::default(),
        live: Live::new(),
    });
    let paced = Router::new()
        .route("/v1/models", get(models))
        .route("/stats", get(stats))
        .route("/config", get(config))
        .route("/v1/capture", get(capture))
        .merge(policy::routes())
        .merge(trial::routes())
        .merge(shadow::routes())
        .merge(insight::routes())
        .merge(recorder::routes())
        .merge(dashboard::routes());
    let paced = guarded(paced)
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), pace));
    // Never refused for rate: it is what ends an overload.
    let all = guarded(Router::new().route("/drain", post(drain))).merge(paced);
    let all = match gate {
        None => all,
        Some(gate) => all.layer(middleware::from_fn_with_state(gate, auth::guard)),
    };
    all
        // Of a supervisor or a scraper, who may know this machine by any name.
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .with_state(shared)
}

async fn health() -> &'static str {
    "ok\n"
}

async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    match shared.options.lifecycle.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn models(State(shared): State<Arc<Shared>>) -> Response {
    let lifecycle = &shared.options.lifecycle;
    let models: Vec<serde_json::Value> = shared
        .options
        .models
        .iter()
        .enumerate()
        .map(|(handle, contract)| {
            let name = contract["name"].as_str().unwrap_or_default();
            serde_json::json!({
                "name": name,
                "version": contract["version"],
                "handle": handle,
                "ready": lifecycle.serves(name),
                "contract": contract,
            })
        })
        .collect();
    Json(serde_json::json!({ "state": lifecycle.state().name(), "models": models })).into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], shared.options.telemetry.encode()).into_response()
}

async fn stats(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.options.telemetry.stats_json()).into_response()
}

async fn config(State(shared): State<Arc<Shared>>) -> Response {
    ([(header::CONTENT_TYPE, "application/toml")], shared.options.config_toml.clone()).into_response()
}

async fn drain(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    if request.headers().contains_key(header::ORIGIN) {
        return (StatusCode::FORBIDDEN, "a page in a browser may not drain the server\n").into_response();
    }
    (shared.options.on_drain)();
    tracing::info!("drain asked for on the control port");
    (StatusCode::ACCEPTED, Json(serde_json::json!({ "state": "draining" }))).into_response()
}

/// What is served here, beside `POST /drain`.
pub(super) const ENDPOINTS: &[&str] = &[
    "/",
    "/healthz",
    "/readyz",
    "/v1/models",
    "/v1/models/{model}/policy",
    "/v1/models/{model}/policy/history",
    "/v1/models/{model}/trial",
    "/v1/models/{model}/shadow",
    "/v1/models/{model}/lengths",
    "/v1/models/{model}/cost",
    "/v1/models/{model}/findings",
    "/v1/decisions",
    "/v1/live",
    "/v1/capture",
    "/v1/batches",
    "/v1/requests",
    "/v1/timeline",
    "/metrics",
    "/stats",
    "/config",
];

async fn unknown() -> Response {
    let known = format!("known are {} and POST /drain\n", ENDPOINTS.join(" "));
    (StatusCode::NOT_FOUND, known).into_response()
}

async fn pace(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let allowed = shared.rate.lock().expect("nobody panics while holding the rate").take(clock::now());
    if allowed {
        next.run(request).await
    } else {
        let message = format!("the control port answers {RATE} requests per second\n");
        (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "1")], message).into_response()
    }
}

/// A bucket of tokens: holds one second's worth, refills evenly.
#[derive(Debug)]
struct Rate {
    interval: Duration,
    burst: Duration,
    /// When the bucket would be full if nothing more were taken.
    full_at: Moment,
}

impl Rate {
    fn new(per_second: u32, now: Moment) -> Rate {
        Rate { interval: Duration::from_secs(1) / per_second, burst: Duration::from_secs(1), full_at: now }
    }

    fn take(&mut self, now: Moment) -> bool {
        let full_at = self.full_at.max(now) + self.interval;
        let allowed = full_at <= now + self.burst;
        if allowed {
            self.full_at = full_at;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_requests_is_allowed_at_once_and_then_one_for_each_interval() {
        let mut rate = Rate::new(100, Moment::ZERO);
        let now = Moment::ZERO + Duration::from_secs(5);
        assert_eq!((0..1000).filter(|_| rate.take(now)).count(), 100);
        assert!(!rate.take(now + Duration::from_micros(9_999)));
        assert!(rate.take(now + Duration::from_millis(10)));
        assert!(!rate.take(now + Duration::from_millis(10)));
    }
}
