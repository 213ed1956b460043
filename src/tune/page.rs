//! What a search found as one JSON document, and that document as one HTML file that needs nothing else: no network, no other file.
//!
//! Always true
//! - Both have every setting that was tried, each with its numbers and its difference from the present one.
//! - Nothing in the document can end the script element that holds it.

use serde_json::{Value, json};

use super::block::{Block, Line};
use super::front::{self, Choice, RULE, front, objectives};
use super::search::Tried;
use super::space::{Point, Space};
use super::{Predicted, block};

/// What was searched, and what was found.
#[derive(Debug)]
pub struct Found<'a> {
    pub model: &'a str,
    pub space: &'a Space,
    /// The present setting first.
    pub tried: &'a [Tried],
    pub slo_ms: f64,
    /// The manifest leaves the budget of cells to the warm-up, and the present budget is what that found.
    pub cells_auto: bool,
    /// What was replayed, for people; its requests, and its length.
    pub source: String,
    pub requests: usize,
    pub seconds: f64,
    /// Requests per second that no scheduler with the present budgets can exceed within the SLO.
    pub bound_rps: Option<f64>,
    pub took_s: f64,
    /// Why the search ended.
    pub ended: &'a str,
    /// What to know before believing it.
    pub notes: Vec<String>,
}

impl Found<'_> {
    fn all(&self) -> Vec<Predicted> {
        self.tried.iter().map(|tried| tried.predicted).collect()
    }

    /// Places in `tried` of the front, by p99.
    pub fn front(&self) -> Vec<usize> {
        front(&self.all().iter().map(objectives).collect::<Vec<_>>())
    }

    fn distances(&self) -> Vec<usize> {
        self.tried.iter().map(|tried| self.space.distance(&tried.point)).collect()
    }

    pub fn choice(&self) -> Option<Choice> {
        front::choose(&self.all(), self.slo_ms, &self.distances())
    }

    /// Places in `tried`, the first to be chosen first.
    pub fn ranked(&self) -> Vec<usize> {
        front::ranked(&self.all(), self.slo_ms, &self.distances())
    }

    /// Executor time a request, in µs, of the cheapest batches of the same rows, within the budgets of any setting that was tried and
    /// answers as many as the one that answers most: what no setting can fall below.
    pub fn device_least_us(&self) -> f64 {
        let most = self.tried.iter().map(|tried| tried.predicted.throughput_rps).fold(0.0, f64::max);
        let all = self.tried.iter().map(|tried| &tried.predicted);
        let answers = all.filter(|predicted| predicted.throughput_rps >= 0.99 * most);
        answers.map(|predicted| predicted.device_least_us).fold(f64::INFINITY, f64::min)
    }

    /// Share of a setting's executor time that is beyond that.
    pub fn regret(&self, predicted: &Predicted) -> f64 {
        (1.0 - self.device_least_us() / predicted.device_us).clamp(0.0, 1.0)
    }

    /// The difference of this setting's block from the present one's.
    pub fn diff(&self, point: &Point) -> Vec<Line> {
        let present = self.space.present_policy();
        let policy = self.space.policy(point).expect("it was tried");
        let auto = self.cells_auto && policy.cells_max == present.cells_max;
        Block::of(present, self.cells_auto).diff(&Block::of(&policy, auto))
    }

    /// What would have to change in the server's own configuration.
    pub fn server_diff(&self, point: &Point) -> Vec<Line> {
        let (now, then) = (self.space.present().executors, point.executors);
        if now == then {
            return Vec::new();
        }
        let line = |count: usize| format!("executors = {count}");
        vec![Line::Same("[threads]".to_owned()), Line::Old(line(now)), Line::New(line(then))]
    }

    /// The whole of it. `live`: what was measured, or null.
    pub fn document(&self, live: Value) -> Value {
        let front = self.front();
        let choice = self.choice();
        let points: Vec<Value> =
            self.tried.iter().enumerate().map(|(at, tried)| self.json_of(at, tried, &front)).collect();
        json!({
            "model": self.model,
            "source": { "text": self.source, "requests": self.requests, "seconds": self.seconds },
            "slo_ms": self.slo_ms,
            "rule": RULE,
            "bound_rps": self.bound_rps,
            "device_us_least": self.device_least_us(),
            "search": { "points": self.tried.len(), "seconds": self.took_s, "ended": self.ended },
            "notes": self.notes,
            "present": 0,
            "chosen": choice.map(|choice| choice.at),
            "chosen_holds_slo": choice.is_some_and(|choice| choice.holds),
            "block": choice.map(|choice| block::after(&self.diff(&self.tried[choice.at].point))),
            "front": front,
            "points": points,
            "live": live,
        })
    }

    fn json_of(&self, at: usize, tried: &Tried, front: &[usize]) -> Value {
        let Tried { point, predicted } = tried;
        let policy = self.space.policy(point).expect("it was tried");
        let knob = |key: &str| policy.get(key).expect("a knob");
        let lines = self.diff(point).into_iter().chain(self.server_diff(point));
        let diff: Vec<[String; 2]> = lines.map(|line| [line.sign().to_string(), line.text().to_owned()]).collect();
        let set: Vec<String> = self.space.changes(point).iter().map(|(key, value)| format!("{key}={value}")).collect();
        json!({
            "id": at,
            "front": front.contains(&at),
            "holds_slo": front::holds(predicted, self.slo_ms),
            "needs_restart": self.space.needs_restart(point),
            "executors": point.executors,
            "knobs": {
                "policy": knob("policy"),
                "queue_delay_max_us": knob("queue_delay_max_us"),
                "rows_max": knob("rows_max"),
                "cells_max": knob("cells_max"),
                "layout": knob("layout"),
                "pad_to": knob("pad_to"),
                "buckets": knob("buckets"),
                "fill_waste_max": knob("fill_waste_max"),
            },
            "regret_share": self.regret(predicted),
            "predicted": json_of_predicted(predicted),
            "diff": diff,
            "set": set.join(" "),
        })
    }
}

fn json_of_predicted(predicted: &Predicted) -> Value {
    json!({
        "p50_ms": predicted.p50_ms,
        "p99_ms": predicted.p99_ms,
        "goodput_rps": predicted.goodput_rps,
        "throughput_rps": predicted.throughput_rps,
        "on_time_share": predicted.on_time_share,
        "device_us_per_request": predicted.device_us,
        "device_us_least_within_its_budgets": predicted.device_least_us,
        "regret_share_within_its_budgets": predicted.regret,
        "utilization": predicted.utilization,
        "batches": predicted.batches,
        "batch_rows_mean": predicted.batch_rows,
        "fill_ratio": predicted.fill,
        "padding_waste": predicted.waste,
        "refused": predicted.refused,
        "expired": predicted.expired,
        "guessed_share": predicted.guessed,
    })
}

const PAGE: &str = include_str!("page.html");
/// Stands where the document goes.
const PLACE: &str = "/*DOCUMENT*/";

/// The document with the page that shows it.
pub fn html(document: &Value) -> String {
    // In a string of JSON these may be escaped, and nowhere else do they occur.
    let data =
        document.to_string().replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029");
    let (before, behind) = PAGE.split_once(PLACE).expect("the page has a place for it");
    [before, &data, behind].concat()
}

/// The document that a page holds. None of what is no such page.
pub fn document_of(html: &str) -> Option<Value> {
    const BEGIN: &str = "<script type=\"application/json\" id=\"document\">";
    let (_, rest) = html.split_once(BEGIN)?;
    let (data, _) = rest.split_once("</script>")?;
    serde_json::from_str(data).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tune::space::tests::{policy, space};

    fn tried(space: &Space) -> Vec<Tried> {
        let points = std::iter::once(space.present().clone()).chain(space.grid());
        let of = |(at, point): (usize, Point)| {
            let at = at as f64;
            let predicted = Predicted {
                throughput_rps: 40.0,
                goodput_rps: 40.0 - at % 7.0,
                on_time_share: 1.0,
                p50_ms: 5.0,
                p99_ms: if at == 3.0 { f64::INFINITY } else { 10.0 + at % 11.0 },
                device_us: 1000.0 + at % 5.0,
                utilization: 0.3,
                batches: 5,
                batch_rows: 2.0,
                fill: 0.5,
                waste: 0.1,
                refused: 0,
                expired: 0,
                regret: 0.2,
                device_least_us: 800.0,
                guessed: 0.0,
            };
            Tried { point, predicted }
        };
        points.enumerate().map(of).collect()
    }

    #[test]
    fn the_page_has_every_setting_and_nothing_that_a_network_would_be_needed_for() {
        let space = space(policy());
        let tried = tried(&space);
        let found = Found {
            model: "a </script><script>alert(1)</script> model",
            space: &space,
            tried: &tried,
            slo_ms: 100.0,
            cells_auto: true,
            source: "a trace".into(),
            requests: 10,
            seconds: 1.0,
            bound_rps: Some(90.0),
            took_s: 2.0,
            ended: "no better neighbours",
            notes: vec!["a note".into()],
        };
        let document = found.document(Value::Null);
        let html = html(&document);
        // Up to the last bit of a number, which reading one may change.
        let read: Value = serde_json::from_str(&document.to_string()).expect("a document");
        assert!(document_of(&html) == Some(read), "what stands in the page is the document");
        assert_eq!(document["points"].as_array().map(Vec::len), Some(tried.len()));
        assert_eq!(document["points"][3]["predicted"]["p99_ms"], Value::Null, "there is no infinity in JSON");
        assert_eq!(document["device_us_least"], 800.0);
        let regret = document["points"][0]["regret_share"].as_f64().expect("a number");
        assert!((regret - 0.2).abs() < 1e-9, "{regret}");
        for point in document["points"].as_array().expect("points") {
            let diff = point["diff"].as_array().expect("lines");
            let changed = diff.iter().any(|line| line[0] != " ");
            assert_eq!(changed, point["id"] != 0, "{point}");
            assert!(point["set"] != "" || point["id"] == 0 || point["executors"] != 2, "{point}");
        }
        for far in ["http:", "https:", "//cdn", "@import", "src=", "href=\"h", "url(", "fetch(", "alert(1)</script"] {
            assert!(!html.contains(far), "{far}");
        }
        assert_eq!(html.matches("<script").count(), html.matches("</script>").count());
        assert_eq!(html.matches(PLACE).count(), 0);
    }
}
