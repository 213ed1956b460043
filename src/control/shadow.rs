//! Shadow schedulers on the control port.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/models/{model}/shadow` | settings, the window, and what came of it: really, simulated as it is, and under each setting |
//! | `PUT` there, `{"settings": [{"knob": "value", …}, …]}` | the same, begun anew; `[]` ends it |
//!
//! Times are queue and run, in µs. `last_switch`: a setting that was put in force, its prediction beside what then came.
//!
//! Always true
//! - Refused: 400 for a setting that cannot be, or too many; 403 for a page of elsewhere (origin.rs); 404 for a model.
//!
//! Elsewhere: how it is found out (shadow).

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::admin::{Shared, Unanswered};
use super::policy::{cut, read_knobs};
use crate::clock;
use crate::mail::Question;
use crate::replay::ledger::ModelReport;
use crate::shadow::{Judged, Knobs, Panel, SETTINGS_MAX, SETTINGS_TOTAL_MAX};

pub fn routes() -> Router<Arc<Shared>> {
    Router::new().route("/v1/models/{model}/shadow", get(show).put(change))
}

async fn show(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    Ok(Json(json_of(&name, &shared.shadow().panel(model))).into_response())
}

async fn change(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Response, Unanswered> {
    let model = shared.model(&name)?;
    let wrong = |message: String| Unanswered::new(StatusCode::BAD_REQUEST, message);
    let settings = read_settings(&body).map_err(wrong)?;
    let others = shared.shadow().others(model);
    if settings.len() + others > SETTINGS_TOTAL_MAX {
        let message = format!("settings: expected at most {SETTINGS_TOTAL_MAX} of all models; others have {others}");
        return Err(wrong(message));
    }
    if !settings.is_empty() {
        let (policy, _) = shared.ask(|reply| Question::Policy { model, reply }).await?;
        for (place, set) in settings.iter().enumerate() {
            let pairs = set.iter().map(|(knob, value)| (knob.as_str(), value.as_str()));
            policy.with(pairs).map_err(|error| wrong(format!("settings[{place}]: {error}")))?;
        }
    }
    shared.shadow().set(model, settings);
    Ok(Json(json_of(&name, &shared.shadow().panel(model))).into_response())
}

fn read_settings(body: &[u8]) -> Result<Vec<Knobs>, String> {
    let expected = |got: &str| format!("expected {{\"settings\": [{{\"knob\": \"value\", …}}, …]}}, got {got}");
    let value: Value = serde_json::from_slice(body).map_err(|error| expected(&format!("no JSON: {error}")))?;
    let Some(object) = value.as_object() else { return Err(expected(&cut(&value))) };
    if let Some(other) = object.keys().find(|key| *key != "settings") {
        return Err(expected(&format!("the key {other:?}")));
    }
    let Some(list) = object.get("settings").and_then(Value::as_array) else { return Err(expected(&cut(&value))) };
    if list.len() > SETTINGS_MAX {
        return Err(format!("settings: expected at most {SETTINGS_MAX}, got {}", list.len()));
    }
    let read = |(place, value): (usize, &Value)| {
        let knobs = value.as_object().ok_or_else(|| expected(&cut(value)))?;
        read_knobs(knobs).map_err(|error| format!("settings[{place}]: {error}"))
    };
    list.iter().enumerate().map(read).collect()
}

fn set_of(knobs: &Knobs) -> Value {
    knobs
        .iter()
        .map(|(knob, value)| (knob.clone(), Value::from(value.as_str())))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn json_of(name: &str, panel: &Panel) -> Value {
    let unix_ms = |at| u64::try_from(clock::unix_time(at).as_millis()).unwrap_or(u64::MAX);
    let view = panel.view.as_ref();
    let window = view.map(|view| {
        let span = view.end.since(view.begin).as_secs_f64();
        let covered = view.covered.as_secs_f64();
        json!({
            "begin_unix_ms": unix_ms(view.begin),
            "end_unix_ms": unix_ms(view.end),
            "seconds": span,
            "covered_seconds": covered,
            "stretches": view.stretches,
        })
    });
    let shadow = |(place, knobs): (usize, &Knobs)| {
        let mut one = json!({ "set": set_of(knobs) });
        match view.and_then(|view| view.shadows.get(place)) {
            Some(Ok(report)) => one["figures"] = figures(report),
            Some(Err(error)) => one["error"] = error.as_str().into(),
            None => one["figures"] = Value::Null,
        }
        one
    };
    json!({
        "model": name,
        "settings": panel.settings.iter().map(set_of).collect::<Vec<_>>(),
        "window": window,
        "real": view.map(|view| figures(&view.real)),
        "simulated_as_is": view.map(|view| figures(&view.as_is)),
        "shadows": panel.settings.iter().enumerate().map(shadow).collect::<Vec<_>>(),
        "guessed_batches": view.map(|view| view.guessed),
        "lost_stretches": panel.lost,
        "mixed_stretches": panel.mixed,
        "trouble": panel.trouble,
        "last_switch": panel.judged.as_ref().map(|(knobs, judged)| switch_of(knobs, judged)),
    })
}

fn switch_of(knobs: &Knobs, judged: &Judged) -> Value {
    let errors: serde_json::Map<String, Value> =
        judged.errors.iter().map(|error| (error.what.to_owned(), error.error.into())).collect();
    json!({
        "set": set_of(knobs),
        "covered_seconds": judged.span.as_secs_f64(),
        "predicted": figures(&judged.predicted),
        "happened": figures(&judged.happened),
        "errors": errors,
    })
}

fn figures(report: &ModelReport) -> Value {
    let us = |share: f64| (report.answered > 0).then(|| report.percentile(share).as_nanos() as f64 / 1e3);
    json!({
        "offered": report.offered,
        "answered": report.answered,
        "refused": report.refused_total(),
        "expired": report.expired,
        "unfinished": report.unfinished,
        "on_time": (report.judged > 0).then(|| report.on_time_share()),
        "batches": report.batches,
        "batch_rows": report.batch_rows(),
        "fill": (report.rows_possible > 0).then(|| report.fill()),
        "waste": (report.cells_padded > 0).then(|| report.waste()),
        "queue_and_run_us": { "p50": us(0.5), "p99": us(0.99) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_lists_of_knobs_and_an_empty_list_ends_it() {
        let body = br#"{"settings": [{"policy": "window", "queue_delay_max_us": "20000"}, {"rows_max": 4}]}"#;
        let settings = read_settings(body).expect("a good body");
        let pair = |knob: &str, value: &str| (knob.to_owned(), value.to_owned());
        let expected =
            [vec![pair("policy", "window"), pair("queue_delay_max_us", "20000")], vec![pair("rows_max", "4")]];
        assert_eq!(settings, expected);
        assert_eq!(read_settings(br#"{"settings": []}"#), Ok(Vec::new()));
    }

    #[test]
    fn a_body_of_another_form_is_told_what_was_expected() {
        let five = format!(r#"{{"settings": [{}]}}"#, [r#"{"hold": 1}"#; 5].join(","));
        for (body, said) in [
            ("", "expected {\"settings\""),
            ("{}", "expected {\"settings\""),
            (r#"{"set": {"a": "b"}}"#, "the key \"set\""),
            (r#"{"settings": ["a=b"]}"#, "got \"a=b\""),
            (r#"{"settings": [{}]}"#, "settings[0]: 0 knobs"),
            (five.as_str(), "settings: expected at most 4, got 5"),
        ] {
            let error = read_settings(body.as_bytes()).expect_err(body);
            assert!(error.contains(said), "{body}: {error}");
        }
    }
}
