//! Trials of policies on the control port.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/models/{model}/trial` | the trial that is on, or how the last one ended; `{"trial": null}` before the first |
//! | `PUT` or `POST` there, `{"set": {…}, "seconds": N, …}` | 202 and the trial, which has begun |
//! | `DELETE` there | how it ended; 404 when there was none |
//!
//! Beside `set` and `seconds`: `slo_ms` (a request is late after it; the model's own by default), `on_time_min` (0.99), `keep_if` (`p99`;
//! also `p50`, `on_time`, `fill`, `waste`, `unbroken`, `never`), `margin` (0.02), `share` (0.5; 1: no baseline, only the guard).
//!
//! Always true
//! - Refused: 400 for what is wrong, 403 for a page of elsewhere (origin.rs), 404 for a model, 409 while another trial is on.
//!
//! Elsewhere: what a trial does (trial), who makes the changes (batcher/trial.rs).

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::admin::{Shared, Unanswered};
use super::policy::{cut, read_knobs, refused};
use crate::clock;
use crate::mail::{PlanOf, Question, StartTrial, ToBatcher};
use crate::mailbox::reply;
use crate::trial::{Keep, Measured, Report, SECONDS};

pub fn routes() -> Router<Arc<Shared>> {
    Router::new().route("/v1/models/{model}/trial", get(show).put(start).post(start).delete(end))
}

async fn show(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let report = shared.ask(|reply| Question::Trial { model, reply }).await?;
    Ok(Json(json!({ "model": name, "trial": report.as_ref().map(json_of) })).into_response())
}

async fn start(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let (set, time, plan) = read_body(&body).map_err(|message| Unanswered::new(StatusCode::BAD_REQUEST, message))?;
    let (reply, awaited) = reply();
    shared.mail(ToBatcher::Trial(StartTrial { model, set, time, plan, reply }))?;
    match shared.patiently(awaited).await? {
        Ok(report) => {
            let body = json!({ "model": name, "trial": json_of(&report) });
            Ok((StatusCode::ACCEPTED, Json(body)).into_response())
        }
        Err(error) => refused(error),
    }
}

async fn end(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let (reply, awaited) = reply();
    shared.mail(ToBatcher::EndTrial { model, reply })?;
    match shared.patiently(awaited).await? {
        Some(report) => Ok(Json(json!({ "model": name, "trial": json_of(&report) })).into_response()),
        None => Err(Unanswered::new(StatusCode::NOT_FOUND, "there was no trial of this model")),
    }
}

type Asked = (Vec<(String, String)>, Duration, PlanOf);

fn read_body(body: &[u8]) -> Result<Asked, String> {
    let expected = |got: &str| {
        format!(
            "expected {{\"set\": {{\"knob\": \"value\", …}}, \"seconds\": {} to {}, …}}, got {got}",
            SECONDS.start(),
            SECONDS.end()
        )
    };
    let value: Value = serde_json::from_slice(body).map_err(|error| expected(&format!("no JSON: {error}")))?;
    let Some(object) = value.as_object() else { return Err(expected(&cut(&value))) };
    let (mut set, mut seconds, mut plan) = (None, None, PlanOf::default());
    for (key, value) in object {
        let number = || value.as_f64().ok_or_else(|| format!("{key}: expected a number, got {}", cut(value)));
        match key.as_str() {
            "set" => {
                let knobs = value.as_object().ok_or_else(|| expected(&cut(value)))?;
                set = Some(read_knobs(knobs)?);
            }
            "seconds" => seconds = Some(number()?),
            "slo_ms" => plan.slo = Some(duration(key, number()? / 1e3)?),
            "share" => plan.share = Some(number()?),
            "on_time_min" => plan.on_time_min = Some(number()?),
            "margin" => plan.margin = Some(number()?),
            "keep_if" => {
                let keep = value.as_str().and_then(Keep::from_name);
                let names: Vec<&str> = Keep::ALL.iter().map(|keep| keep.name()).collect();
                let wrong = || format!("keep_if: expected one of {}, got {}", names.join(", "), cut(value));
                plan.keep = Some(keep.ok_or_else(wrong)?);
            }
            other => return Err(expected(&format!("the key {other:?}"))),
        }
    }
    match (set, seconds) {
        (Some(set), Some(seconds)) => Ok((set, duration("seconds", seconds)?, plan)),
        _ => Err(expected(&cut(&value))),
    }
}

fn duration(key: &str, seconds: f64) -> Result<Duration, String> {
    Duration::try_from_secs_f64(seconds).map_err(|error| format!("{key}: {error}"))
}

fn json_of(report: &Report) -> Value {
    let unix_ms = |at| u64::try_from(clock::unix_time(at).as_millis()).unwrap_or(u64::MAX);
    let plan = &report.plan;
    let set: serde_json::Map<String, Value> =
        report.set.iter().map(|(knob, value)| (knob.clone(), value.as_str().into())).collect();
    let slice = |slice: &crate::trial::Slice| json!({ "policy": slice.arm.name(), "at_unix_ms": unix_ms(slice.at), "generation": slice.generation });
    json!({
        "set": set,
        "seconds": plan.time.as_secs_f64(),
        "share": plan.share,
        "slo_ms": plan.slo.as_secs_f64() * 1e3,
        "on_time_min": plan.on_time_min,
        "keep_if": plan.keep.name(),
        "margin": plan.margin,
        "started_at_unix_ms": unix_ms(report.started_at),
        "in_force": report.slices.last().filter(|_| report.ended.is_none()).map(|slice| slice.arm.name()),
        "turns": report.slices.iter().map(slice).collect::<Vec<_>>(),
        "baseline": measured(&report.baseline),
        "changed": measured(&report.changed),
        "requests_not_followed": report.unfollowed,
        "ended": report.ended.as_ref().map(|ended| json!({
            "at_unix_ms": unix_ms(ended.at),
            "outcome": ended.outcome.word(),
            "reason": ended.outcome.why.code(),
            "message": ended.outcome.message,
            "generation": ended.generation,
            "changed_in_force_ms": report.exposed().map(|exposed| exposed.as_secs_f64() * 1e3),
        })),
    })
}

fn measured(measured: &Measured) -> Value {
    let us = |share: f64| (measured.answered > 0).then(|| measured.percentile(share).as_nanos() as f64 / 1e3);
    json!({
        "offered": measured.offered,
        "answered": measured.answered,
        "refused": measured.refused,
        "expired": measured.expired,
        "cancelled": measured.cancelled,
        "judged": measured.judged,
        "late": measured.late,
        "on_time": (measured.judged > 0).then(|| measured.on_time()),
        "batches": measured.batches,
        "fill": (measured.rows_possible > 0).then(|| measured.fill()),
        "waste": (measured.cells_padded > 0).then(|| measured.waste()),
        "queue_and_run_us": { "p50": us(0.5), "p99": us(0.99) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_says_what_is_tried_for_how_long_and_by_what_it_is_judged() {
        let body = br#"{"set": {"rows_max": 8}, "seconds": 30, "slo_ms": 50, "keep_if": "fill", "share": 0.2}"#;
        let (set, time, plan) = read_body(body).expect("a good body");
        assert_eq!((set, time), (vec![("rows_max".to_owned(), "8".to_owned())], Duration::from_secs(30)));
        let expected = PlanOf {
            slo: Some(Duration::from_millis(50)),
            keep: Some(Keep::Fill),
            share: Some(0.2),
            ..PlanOf::default()
        };
        assert_eq!(plan, expected);
    }

    #[test]
    fn a_body_of_another_form_is_told_what_was_expected() {
        for body in [
            "",
            "[]",
            "{}",
            r#"{"set": {"a": "b"}}"#,
            r#"{"seconds": 3}"#,
            r#"{"set": {}, "seconds": 3}"#,
            r#"{"set": {"a": "b"}, "seconds": "long"}"#,
            r#"{"set": {"a": "b"}, "seconds": -1}"#,
            r#"{"set": {"a": "b"}, "seconds": 3, "keep_if": "nice"}"#,
            r#"{"set": {"a": "b"}, "seconds": 3, "slo": 5}"#,
        ] {
            let error = read_body(body.as_bytes()).expect_err(body);
            let told = ["expected", "knobs; 1 to", "seconds: "].iter().any(|part| error.contains(part));
            assert!(told, "{body}: {error}");
        }
    }
}
