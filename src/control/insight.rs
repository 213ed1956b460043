//! What the scheduler knows, on the control port: lengths seen, batch times learned, decisions made.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/models/{model}/lengths` | histogram of admitted lengths, padding forecast for the buckets in force and for the best 1 to 16 |
//! | `GET /v1/models/{model}/cost` | coefficients of the batch time, how well they predict, and predictions for some shapes |
//! | `GET /v1/models/{model}/findings` | what batches can reach with what comes, and knobs that contradict it or each other |
//! | `GET /v1/decisions?last=N` | the last N decisions about all models, oldest first; N at most 1000 |
//!
//! Always true
//! - The batcher is asked for copies of bounded size, a bounded number of times per second; what is computed from them is
//!   computed here.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::admin::{Shared, Unanswered};
use crate::clock;
use crate::mail::Question;
use crate::scheduler::cost::CostModel;
use crate::scheduler::decision::{Decision, Verdict};
use crate::scheduler::edges::best_edges;
use crate::scheduler::lint::{Facts, Finding, Lint, lint};
use crate::scheduler::{Edges, Policy};
use crate::telemetry::Telemetry;
use crate::vocab::{ModelHandle, SealReason};

pub fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/models/{model}/lengths", get(lengths))
        .route("/v1/models/{model}/cost", get(cost))
        .route("/v1/models/{model}/findings", get(findings))
        .route("/v1/decisions", get(decisions))
}

/// Numbers of buckets that are forecast.
const FORECASTS: u16 = 16;

async fn lengths(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let (policy, generation) = shared.ask(|reply| Question::Policy { model, reply }).await?;
    let histogram = shared.ask(|reply| Question::Lengths { model, reply }).await?;
    let bins = histogram.bins().iter().enumerate().filter(|(_, bin)| bin.rows > 0.0);
    let bins: Vec<Value> = bins
        .map(|(at, bin)| json!({ "len_max": histogram.edge(at), "rows": bin.rows, "len_mean": bin.cells / bin.rows }))
        .collect();
    let best: Vec<Value> = best_edges(&histogram, FORECASTS)
        .into_iter()
        .map(|forecast| json!({ "buckets": forecast.edges, "padding_ratio": forecast.waste }))
        .collect();
    let body = json!({
        "model": name,
        "generation": generation,
        "rows": histogram.rows(),
        "bins": bins,
        "now": {
            "buckets": policy.buckets.lens(),
            "auto": policy.edges == Edges::Auto,
            "padding_ratio": histogram.waste(&policy.buckets),
        },
        "best": best,
    });
    Ok(Json(body).into_response())
}

async fn cost(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let (policy, generation) = shared.ask(|reply| Question::Policy { model, reply }).await?;
    let learned = shared.ask(|reply| Question::Cost { model, reply }).await?;
    let fit = learned.coefficients();
    let us = |nanos: f64| nanos / 1e3;
    let paces = learned.paces();
    let used = (0..paces.executors()).filter(|at| paces.observations(*at) > 0);
    let executors: Vec<Value> = used
        .map(|at| json!({ "executor": at, "pace": paces.factor(at), "observations": paces.observations(at) }))
        .collect();
    let body = json!({
        "model": name,
        "generation": generation,
        "known": learned.is_known(),
        "coefficients": {
            "batch_us": us(fit.batch),
            "cell_us": us(fit.cell),
            "row_square_us": us(fit.square),
        },
        "formula": "batch_us + rows × (cell_us × len + row_square_us × len²), times the shape's correction, times the executor's pace",
        "observations": learned.observations(),
        "error_ratio": learned.error(),
        "margin_ratio": learned.margin(),
        "executors": executors,
        "predicted": grid(&learned, &policy),
    });
    Ok(Json(body).into_response())
}

/// Predictions for up to 5 numbers of rows and 6 lengths, within the policy's batches.
fn grid(learned: &CostModel, policy: &Policy) -> Vec<Value> {
    let longest = policy.buckets.longest();
    let mut lens: Vec<u32> = (0..6).map(|step| (longest >> step).max(1)).collect();
    lens.reverse();
    lens.dedup();
    let mut shapes = Vec::new();
    for len in lens {
        let most = policy.rows_at(len).max(1);
        let mut rows: Vec<u32> = [1, most / 8, most / 4, most / 2, most].into_iter().filter(|rows| *rows > 0).collect();
        rows.dedup();
        for rows in rows {
            let predicted_us = learned.predict(rows, len) / 1e3;
            shapes.push(json!({ "rows": rows, "padded_len": len, "predicted_us": predicted_us }));
        }
    }
    shapes
}

async fn findings(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let facts = shared.ask(|reply| Question::Facts { model, reply }).await?;
    let facts = Facts { in_flight_max: in_flight_max(shared.telemetry(), model), ..facts };
    let mut body = json_of_lint(&facts, &lint(&facts));
    body["model"] = name.into();
    Ok(Json(body).into_response())
}

/// Most rows of a model that the callers who are connected can have in flight, if its requests go on as they were. `None` where
/// none is connected.
fn in_flight_max(telemetry: &Telemetry, model: ModelHandle) -> Option<u64> {
    let requests = telemetry.connections().checked_mul(telemetry.limit("frontend.credit_requests")?)?;
    (requests > 0).then(|| (requests as f64 * telemetry.rows_per_request(model)).ceil() as u64)
}

fn json_of_lint(facts: &Facts, lint: &Lint) -> Value {
    let observed = &facts.observed;
    let reasons = SealReason::ALL.iter().zip(observed.closed).filter(|(_, batches)| *batches > 0);
    let reasons: serde_json::Map<String, Value> =
        reasons.map(|(reason, batches)| (reason.name().to_owned(), batches.into())).collect();
    let finding =
        |finding: &Finding| json!({ "code": finding.kind.code(), "message": finding.message, "knob": finding.knob });
    json!({
        "generation": facts.generation,
        "observed": {
            "seconds": observed.span.as_secs_f64(),
            "rows": observed.rows,
            "batches": observed.batches(),
            "close_reasons": reasons,
            "waiting_rows_peak": observed.waiting_peak,
            "in_flight_rows_max": facts.in_flight_max,
        },
        "attainable": lint.attainable.map(|attainable| json!({
            "rows_per_second": observed.rate(),
            "rows": attainable.rows,
            "rows_possible": attainable.rows_possible,
            "fill_ratio": attainable.fill(),
        })),
        "closed_mostly": observed.mostly().map(|(reason, share)| json!({ "reason": reason.name(), "share": share })),
        "findings": lint.findings.iter().map(finding).collect::<Vec<_>>(),
    })
}

#[derive(Deserialize)]
struct Last {
    last: Option<usize>,
}

/// Decisions where nobody says how many.
const LAST: usize = 100;

async fn decisions(State(shared): State<Arc<Shared>>, Query(query): Query<Last>) -> Result<Response, Unanswered> {
    let last = query.last.unwrap_or(LAST);
    if last > Question::DECISIONS_MAX {
        let message = format!("last: expected at most {}, got {last}", Question::DECISIONS_MAX);
        return Err(Unanswered::new(StatusCode::BAD_REQUEST, message));
    }
    let decisions = shared.ask(|reply| Question::Decisions { last, reply }).await?;
    let now = clock::now();
    let decisions: Vec<Value> = decisions
        .iter()
        .map(|decision| {
            let age = now.since(decision.at);
            let mut value = json_of(decision, shared.name(decision.model));
            value["age_us"] = u64::try_from(age.as_micros()).unwrap_or(u64::MAX).into();
            value
        })
        .collect();
    Ok(Json(json!({ "decisions": decisions })).into_response())
}

/// Only what the decision's kind has. `predicted_us` is the batch's time; of rows that are held: how long at most.
fn json_of(decision: &Decision, model: &str) -> Value {
    let mut value = json!({
        "at_us": decision.at.nanos() / 1000,
        "model": model,
        "generation": decision.generation,
        "waiting_rows": decision.waiting,
        "predicted_us": decision.predicted as f64 / 1e3,
    });
    let more = match decision.verdict {
        Verdict::Sealed(reason) => json!({
            "verdict": "sealed",
            "reason": reason.name(),
            "batch": decision.batch,
            "executor": decision.executor,
            "rows": decision.rows,
            "rows_possible": decision.rows_possible,
            "padded_len": decision.padded_len,
            "padding_ratio": decision.padding,
            "shortest_bucket": decision.shortest,
            "efficiency": decision.efficiency,
            "best_efficiency": decision.best_efficiency,
        }),
        verdict @ Verdict::Held => json!({ "verdict": verdict.name() }),
        verdict @ (Verdict::Shed | Verdict::Refused) => {
            json!({ "verdict": verdict.name(), "rows": decision.rows, "len": decision.batch })
        }
    };
    let (Some(value_fields), Value::Object(more)) = (value.as_object_mut(), more) else {
        unreachable!("both are written as objects above")
    };
    value_fields.extend(more);
    value
}
