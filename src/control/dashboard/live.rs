//! `GET /v1/live`: how things stand, once a second, as server-sent events.
//!
//! `hello`, first: version, models, the bounds of histograms, the endpoints that this server has. Then `snapshot`, as
//! [`snapshot`] makes it: cumulative counts, what waits by model and length, and the last batches. A reader subtracts two
//! snapshots to know what happened in between, so one that missed some knows as much.
//!
//! Always true
//! - A snapshot is made once for all viewers, and none while there is no viewer: then this costs nothing.
//! - At most [`VIEWERS_MAX`] streams at once. One who reads slowly skips to the newest snapshot: nothing piles up. One who does
//!   not read at all is closed as every caller is (admin.rs).
//! - The batcher is asked two questions a second at most, whatever the number of viewers. One that does not answer within
//!   [`PATIENCE`] is left out of the snapshot, which says so.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_lite::stream;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::super::admin::{ENDPOINTS, Shared, Unanswered};
use crate::clock;
use crate::mail::Question;
use crate::scheduler::decision::{Decision, Verdict};
use crate::scheduler::waiting::WaitingLane;
use crate::telemetry::bounds_json;
use crate::vocab::Moment;

/// Streams at once: a few people who look, and far fewer than the port's connections.
pub const VIEWERS_MAX: usize = 8;
pub const INTERVAL: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_millis(500);
/// Batches in a snapshot: the newest. A page draws no more.
const BATCHES_MAX: usize = 200;

/// What a batch is shown with, in this order.
const BATCH_FIELDS: [&str; 12] = [
    "age_us",
    "model",
    "executor",
    "batch",
    "rows",
    "rows_possible",
    "padded_len",
    "padding_ratio",
    "reason",
    "predicted_us",
    "waiting_rows",
    "generation",
];

/// The stream's state on the control thread.
pub struct Live {
    feed: watch::Sender<Option<Event>>,
    /// Somebody makes snapshots. Held while viewers come and while it is found that none is left.
    ticking: Mutex<bool>,
}

impl Live {
    pub fn new() -> Live {
        Live { feed: watch::channel(None).0, ticking: Mutex::new(false) }
    }

    fn viewers(&self) -> usize {
        self.feed.receiver_count()
    }

    /// Nobody looks any more: the next viewer starts anew, without an old snapshot.
    fn rests(&self) -> bool {
        let mut ticking = self.ticking.lock().expect("nobody panics while holding it");
        if self.viewers() == 0 {
            *ticking = false;
            self.feed.send_replace(None);
        }
        !*ticking
    }
}

pub async fn live(State(shared): State<Arc<Shared>>) -> Result<Response, Unanswered> {
    let live = &shared.live;
    let mut feed = {
        let mut ticking = live.ticking.lock().expect("nobody panics while holding it");
        if live.viewers() >= VIEWERS_MAX {
            let message = format!("{VIEWERS_MAX} viewers at once are served; close another page, then try again");
            return Err(Unanswered::new(StatusCode::SERVICE_UNAVAILABLE, message));
        }
        let feed = live.feed.subscribe();
        if !std::mem::replace(&mut *ticking, true) {
            tokio::spawn(tick(Arc::clone(&shared)));
        }
        feed
    };
    feed.mark_changed(); // who comes later need not wait for the next second
    let hello = event("hello", &hello(shared.models()));
    Ok(Sse::new(stream::unfold((Some(hello), feed), next)).into_response())
}

type Viewer = (Option<Event>, watch::Receiver<Option<Event>>);

/// The next event of one viewer. Ends with the control port.
async fn next((mut hello, mut feed): Viewer) -> Option<(Result<Event, Infallible>, Viewer)> {
    if let Some(hello) = hello.take() {
        return Some((Ok(hello), (None, feed)));
    }
    loop {
        feed.changed().await.ok()?;
        let snapshot = feed.borrow_and_update().clone();
        if let Some(snapshot) = snapshot {
            return Some((Ok(snapshot), (None, feed)));
        }
    }
}

/// Makes snapshots while there are viewers.
async fn tick(shared: Arc<Shared>) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if shared.live.rests() {
            return;
        }
        let snapshot = snapshot(&shared).await;
        shared.live.feed.send_replace(Some(event("snapshot", &snapshot)));
    }
}

fn event(name: &str, value: &Value) -> Event {
    Event::default().event(name).data(value.to_string())
}

/// What does not change while a server runs. `models` as they are told on `/v1/models`.
fn hello(models: &[Value]) -> Value {
    let models: Vec<Value> =
        models.iter().map(|contract| json!({ "name": contract["name"], "version": contract["version"] })).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "interval_ms": INTERVAL.as_millis() as u64,
        "endpoints": ENDPOINTS,
        "models": models,
        "bounds": bounds_json(),
        "batch_fields": BATCH_FIELDS,
    })
}

/// How things stand now.
async fn snapshot(shared: &Shared) -> Value {
    let (lanes, decisions) = tokio::join!(
        shared.ask_within(PATIENCE, |reply| Question::Lanes { reply }),
        shared.ask_within(PATIENCE, |reply| Question::Decisions { last: Question::DECISIONS_MAX, reply }),
    );
    let batcher = match (lanes, decisions) {
        (Ok(lanes), Ok(decisions)) => batcher(&lanes, &decisions, clock::now()),
        (Err(error), _) | (_, Err(error)) => json!({ "error": error.message() }),
    };
    let (state, not_ready) = shared.state();
    let telemetry = shared.telemetry();
    json!({
        "at_unix_ms": u64::try_from(clock::unix_time(clock::now()).as_millis()).unwrap_or(u64::MAX),
        "state": state,
        "not_ready": not_ready,
        "viewers": shared.live.viewers(),
        "connections": telemetry.connections(),
        "stats": telemetry.stats_json(),
        "models": telemetry.live_models_json(),
        "tenants": telemetry.live_tenants_json(),
        "batcher": batcher,
    })
}

/// What the batcher said: lanes as `[model, len_max, rows, tickets, oldest_us]`, batches as [`BATCH_FIELDS`], the oldest first.
/// Models by their handles.
fn batcher(lanes: &[WaitingLane], decisions: &[Decision], now: Moment) -> Value {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let lanes: Vec<Value> = lanes
        .iter()
        .map(|lane| json!([lane.model.0, lane.len_max, lane.rows, lane.tickets, micros(lane.oldest)]))
        .collect();
    let sealed = decisions.iter().filter_map(|decision| match decision.verdict {
        Verdict::Sealed(reason) => Some((decision, reason)),
        Verdict::Held | Verdict::Shed | Verdict::Refused => None,
    });
    let mut batches: Vec<Value> = sealed
        .rev()
        .take(BATCHES_MAX)
        .map(|(decision, reason)| {
            json!([
                micros(now.since(decision.at)),
                decision.model.0,
                decision.executor,
                decision.batch,
                decision.rows,
                decision.rows_possible,
                decision.padded_len,
                decision.padding,
                reason.name(),
                (decision.predicted as f64 / 100.0).round() / 10.0,
                decision.waiting,
                decision.generation,
            ])
        })
        .collect();
    batches.reverse();
    json!({ "lanes": lanes, "batches": batches })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::{ModelHandle, SealReason};

    #[test]
    fn nothing_is_made_while_nobody_looks_and_nothing_old_is_shown_to_the_next() {
        let live = Live::new();
        assert!(live.rests(), "nobody came yet");
        let viewer = live.feed.subscribe();
        *live.ticking.lock().expect("nobody panicked") = true;
        assert!(!live.rests());
        live.feed.send_replace(Some(event("snapshot", &json!({}))));
        drop(viewer);
        assert!(live.rests());
        assert!(live.feed.borrow().is_none());
    }

    #[test]
    fn batches_are_told_by_their_fields_and_holds_are_none() {
        let sealed = Decision {
            at: Moment::ZERO,
            verdict: Verdict::Sealed(SealReason::Full),
            model: ModelHandle(3),
            executor: 1,
            batch: 77,
            rows: 8,
            padded_len: 16,
            rows_possible: 10,
            padding: 0.25,
            shortest: 16,
            waiting: 9,
            predicted: 5_000,
            efficiency: 0.0,
            best_efficiency: 0.0,
            generation: 2,
        };
        let held = Decision { verdict: Verdict::Held, ..sealed };
        let many: Vec<Decision> =
            (0..1000).map(|batch| if batch % 2 == 0 { held } else { Decision { batch, ..sealed } }).collect();
        let told = batcher(&[], &many, Moment::ZERO + Duration::from_micros(40));
        let batches = told["batches"].as_array().expect("a list");
        assert_eq!(batches.len(), BATCHES_MAX);
        assert_eq!(batches[BATCHES_MAX - 1], json!([40, 3, 1, 999, 8, 10, 16, 0.25, "full", 5.0, 9, 2]));
        assert_eq!(batches[0].as_array().map(Vec::len), Some(BATCH_FIELDS.len()));
    }
}
