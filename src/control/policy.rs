//! Policies on the control port: shown, changed, and what changed before.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/models/{model}/policy` | generation, buckets in force, and every knob with value, unit, range and meaning |
//! | `PUT` or `PATCH` there, `{"set": {"knob": "value", …}}` | what changed, and the new generation |
//! | `GET /v1/models/{model}/policy/history` | the last changes, oldest first |
//!
//! Always true
//! - A change is made whole or not at all; what is not named stays. Refused: 400 for a knob or value that is wrong, 404 for
//!   a model, 409 when a waiting request would fit no batch any more, 503 when the batcher does not answer.
//! - A page in a browser changes a policy only if this port served it (origin.rs).
//!
//! Elsewhere: what a knob takes (scheduler/knobs.rs), who makes the change (batcher/live.rs).

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

use super::admin::{Shared, Unanswered};
use crate::clock;
use crate::mail::{ChangedBy, PolicyChange, Question, SetPolicy, SetPolicyError, ToBatcher};
use crate::mailbox::reply;
use crate::scheduler::knobs::KNOBS;

/// Knobs that one request may name.
const SET_MAX: usize = 64;

pub fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/models/{model}/policy", get(show).put(change).patch(change))
        .route("/v1/models/{model}/policy/history", get(history))
}

async fn show(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let (policy, generation) = shared.ask(|reply| Question::Policy { model, reply }).await?;
    let knob = |knob: &crate::scheduler::knobs::Knob| {
        json!({
            "name": knob.name,
            "value": policy.get(knob.name),
            "unit": knob.unit,
            "range": knob.range,
            "meaning": knob.meaning,
        })
    };
    let knobs: Vec<Value> = KNOBS.iter().map(knob).collect();
    let body = json!({ "model": name, "generation": generation, "buckets": policy.buckets.lens(), "knobs": knobs });
    Ok(Json(body).into_response())
}

async fn change(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let set = read_set(&body).map_err(|message| Unanswered::new(StatusCode::BAD_REQUEST, message))?;
    let (reply, awaited) = reply();
    shared.mail(ToBatcher::SetPolicy(SetPolicy { model, set, reply }))?;
    match shared.patiently(awaited).await? {
        Ok(change) => {
            let mut body = json_of(&change);
            body["model"] = name.into();
            Ok(Json(body).into_response())
        }
        Err(error) => refused(error),
    }
}

/// Why a policy stays as it was.
pub(super) fn refused(error: SetPolicyError) -> Result<Response, Unanswered> {
    match error {
        SetPolicyError::Invalid(message) => Err(Unanswered::new(StatusCode::BAD_REQUEST, message)),
        SetPolicyError::Busy(message) => Err(Unanswered::new(StatusCode::CONFLICT, message)),
        SetPolicyError::Stranded(refusal) => {
            let body = json!({ "error": refusal.message, "retry_after_ms": refusal.retry_after_ms });
            Ok((StatusCode::CONFLICT, Json(body)).into_response())
        }
    }
}

async fn history(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let changes = shared.ask(|reply| Question::History { model, reply }).await?;
    let changes: Vec<Value> = changes.iter().map(json_of).collect();
    Ok(Json(json!({ "model": name, "changes": changes })).into_response())
}

fn json_of(change: &PolicyChange) -> Value {
    let knob = |knob: &crate::mail::KnobChange| json!({ "knob": knob.knob, "from": knob.from, "to": knob.to });
    let by = match change.by {
        ChangedBy::Operator => "operator",
        ChangedBy::Auto => "auto",
        ChangedBy::Trial => "trial",
    };
    let mut value = json!({
        "at_unix_ms": u64::try_from(clock::unix_time(change.at).as_millis()).unwrap_or(u64::MAX),
        "by": by,
        "generation": change.generation,
        "changes": change.knobs.iter().map(knob).collect::<Vec<_>>(),
    });
    if let Some(note) = &change.note {
        value["note"] = note.as_str().into();
    }
    if let Some(prediction) = &change.prediction {
        let one = |error: &crate::mail::PredictionError| {
            let figure = json!({ "predicted": error.predicted, "happened": error.happened, "error": error.error });
            (error.what.to_owned(), figure)
        };
        let figures: serde_json::Map<String, Value> = prediction.errors.iter().map(one).collect();
        value["prediction"] = json!({ "covered_seconds": prediction.span.as_secs_f64(), "figures": figures });
    }
    value
}

/// The knobs of a request's body. Numbers and lists may be written as such; a knob's own grammar is text.
fn read_set(body: &[u8]) -> Result<Vec<(String, String)>, String> {
    let expected = |got: &str| format!("expected {{\"set\": {{\"knob\": \"value\", …}}}}, got {got}");
    let value: Value = serde_json::from_slice(body).map_err(|error| expected(&format!("no JSON: {error}")))?;
    let Some(object) = value.as_object() else { return Err(expected(&cut(&value))) };
    if let Some(other) = object.keys().find(|key| *key != "set") {
        return Err(expected(&format!("the key {other:?}")));
    }
    let Some(set) = object.get("set").and_then(Value::as_object) else { return Err(expected(&cut(&value))) };
    read_knobs(set).map_err(|error| match set.is_empty() || set.len() > SET_MAX {
        true => expected(&error),
        false => error,
    })
}

/// Knobs and their values.
pub(super) fn read_knobs(set: &serde_json::Map<String, Value>) -> Result<Vec<(String, String)>, String> {
    if set.is_empty() || set.len() > SET_MAX {
        return Err(format!("{} knobs; 1 to {SET_MAX} can be set at once", set.len()));
    }
    set.iter()
        .map(|(knob, value)| {
            let text = text_of(value)
                .ok_or_else(|| format!("{knob}: expected a text, a number or a list of numbers, got {}", cut(value)))?;
            Ok((knob.clone(), text))
        })
        .collect()
}

fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Array(values) => {
            let texts: Option<Vec<String>> =
                values.iter().map(|value| value.as_number().map(|number| number.to_string())).collect();
            Some(texts?.join(","))
        }
        Value::Null | Value::Bool(_) | Value::Object(_) => None,
    }
}

/// A value as it stands in an error.
pub(super) fn cut(value: &Value) -> String {
    let text = value.to_string();
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knobs_are_texts_numbers_or_lists() {
        let set = read_set(br#"{"set": {"rows_max": 8, "buckets": [16, 32], "policy": "cost", "hold": 0.5}}"#);
        let mut set = set.expect("a good body");
        set.sort();
        let expected = [("buckets", "16,32"), ("hold", "0.5"), ("policy", "cost"), ("rows_max", "8")];
        assert_eq!(set, expected.map(|(knob, value)| (knob.to_owned(), value.to_owned())));
    }

    #[test]
    fn a_body_of_another_form_is_told_what_was_expected() {
        for body in
            ["", "[]", "{}", r#"{"set": {}}"#, r#"{"set": 5}"#, r#"{"sets": {"a": "b"}}"#, r#"{"set": {"a": null}}"#]
        {
            let error = read_set(body.as_bytes()).expect_err(body);
            assert!(error.contains("expected"), "{body}: {error}");
        }
    }
}
