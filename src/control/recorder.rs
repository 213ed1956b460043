//! The flight recorder on the control port.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/batches?last=N` | the last N batches, oldest first, each with its oldest request's story; N at most 1000, 100 by default |
//! | `GET /v1/requests?slowest=K&last=N` | stories of the K slowest among the oldest requests of the last N batches, slowest first; all that are kept by default; K at most 100, 1 by default |
//! | `GET /v1/timeline?seconds=S` | the batches sealed in the last S seconds as a trace-event file, for ui.perfetto.dev; all that are kept by default |
//!
//! Always true
//! - The batcher is asked for a copy of what is kept, a bounded number of times per second; the rest is done here.
//! - A batch's oldest request is its slowest: all of a batch are answered together.
//!
//! Elsewhere: what is kept (timeline), stories and trace events (timeline/story.rs, timeline/trace.rs).

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;

use super::admin::{Shared, Unanswered};
use crate::clock;
use crate::mail::Question;
use crate::timeline::story::Story;
use crate::timeline::{BatchRecord, trace};
use crate::vocab::Moment;

pub fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/batches", get(batches))
        .route("/v1/requests", get(requests))
        .route("/v1/timeline", get(timeline))
}

const BATCHES: usize = 100;
const BATCHES_MAX: usize = 1000;
const SLOWEST_MAX: usize = 100;

#[derive(Deserialize)]
struct Asked {
    last: Option<usize>,
    slowest: Option<usize>,
    seconds: Option<u64>,
}

fn wrong(message: String) -> Unanswered {
    Unanswered::new(StatusCode::BAD_REQUEST, message)
}

async fn records(shared: &Shared, last: usize, since: Moment) -> Result<Vec<BatchRecord>, Unanswered> {
    shared.ask(|reply| Question::Batches { last, since, reply }).await
}

fn stories(shared: &Shared, records: &[BatchRecord]) -> Vec<Story> {
    records.iter().filter_map(|record| Story::of(record, shared.name(record.model))).collect()
}

async fn batches(State(shared): State<Arc<Shared>>, Query(asked): Query<Asked>) -> Result<Response, Unanswered> {
    let last = asked.last.unwrap_or(BATCHES);
    if last > BATCHES_MAX {
        return Err(wrong(format!("last: expected at most {BATCHES_MAX}, got {last}")));
    }
    let records = records(&shared, last, Moment::ZERO).await?;
    let micros = |moment: Moment| moment.nanos() as f64 / 1e3;
    let now = clock::now();
    let batches: Vec<serde_json::Value> = records
        .iter()
        .map(|record| {
            json!({
                "batch": record.id,
                "model": shared.name(record.model),
                "executor": record.executor,
                "generation": record.generation,
                "reason": record.reason.name(),
                "layout": record.layout.name(),
                "rows": record.rows,
                "rows_possible": record.rows_possible,
                "padded_len": record.padded_len,
                "cells_real": record.cells_real,
                "cells_padded": record.cells_padded,
                "requests": record.members,
                "lens": record.lens(),
                "predicted_us": record.predicted as f64 / 1e3,
                "age_us": now.since(record.sealed_at).as_nanos() as f64 / 1e3,
                "sealed_at_us": micros(record.sealed_at),
                "packed_at_us": micros(record.packed_at),
                "started_at_us": record.ran.map(|ran| micros(ran.started_at)),
                "finished_at_us": record.ran.map(|ran| micros(ran.finished_at)),
                "answered_at_us": record.answered_at.map(micros),
                "oldest": Story::of(record, shared.name(record.model)),
            })
        })
        .collect();
    Ok(Json(json!({ "batches": batches })).into_response())
}

async fn requests(State(shared): State<Arc<Shared>>, Query(asked): Query<Asked>) -> Result<Response, Unanswered> {
    let slowest = asked.slowest.unwrap_or(1);
    if slowest > SLOWEST_MAX {
        return Err(wrong(format!("slowest: expected at most {SLOWEST_MAX}, got {slowest}")));
    }
    let records = records(&shared, asked.last.unwrap_or(usize::MAX), Moment::ZERO).await?;
    let mut stories = stories(&shared, &records);
    let among = stories.len();
    stories.sort_by(|a, b| b.times_us.total.total_cmp(&a.times_us.total));
    stories.truncate(slowest);
    Ok(Json(json!({ "among_batches": among, "requests": stories })).into_response())
}

async fn timeline(State(shared): State<Arc<Shared>>, Query(asked): Query<Asked>) -> Result<Response, Unanswered> {
    let since = match asked.seconds {
        None => Moment::ZERO,
        Some(0) => return Err(wrong("seconds: expected at least 1, got 0".into())),
        Some(seconds) => clock::now() - Duration::from_secs(seconds),
    };
    let records = records(&shared, usize::MAX, since).await?;
    let json = trace::to_json(&records, &shared.names(), "asked for");
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}
