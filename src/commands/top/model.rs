//! From two readings of a server to what is shown. Pure.
//!
//! Always true
//! - Rates and quantiles are of the time between the readings, by the server's own clock; of its whole life where there is one
//!   reading only, or it was started again in between.
//! - What a server does not have is left out: one without a waterfall shows busy and idle.

use std::collections::BTreeMap;

use serde_json::Value;

use super::openmetrics::{Histogram, Metrics};

/// One reading.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    pub metrics: Metrics,
    /// `/stats`.
    pub stats: Value,
    /// `/v1/models/{model}/policy` of each model.
    pub policies: BTreeMap<String, Value>,
    /// `/v1/decisions`, oldest first.
    pub decisions: Vec<Value>,
    /// `/v1/models/{model}/findings` of the chosen model.
    pub findings: Option<(String, Value)>,
}

impl Reading {
    pub fn uptime(&self) -> f64 {
        self.metrics.sum("ferry_uptime_seconds", &[])
    }

    /// Names of the models, in the server's order.
    pub fn models(&self) -> Vec<&str> {
        self.metrics.values("ferry_model_info", "model")
    }
}

/// What a part of an executor's time is, and how it is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub name: &'static str,
    /// As the waterfall of the server calls what is in it.
    pub of: &'static [&'static str],
    pub mark: char,
    pub kind: PartKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    Work,
    Waste,
    /// Idle while work waited.
    Held,
    Idle,
}

/// In the order of the bar.
pub const PARTS: &[Part] = &[
    Part { name: "useful", of: &["useful"], mark: '#', kind: PartKind::Work },
    Part {
        name: "padding",
        of: &["padding_longest_row", "padding_bucket", "padding_rounding"],
        mark: 'x',
        kind: PartKind::Waste,
    },
    Part { name: "overhead", of: &["overhead_launch", "overhead_copy"], mark: 'o', kind: PartKind::Waste },
    Part { name: "held", of: &["idle_hold"], mark: 'h', kind: PartKind::Held },
    Part { name: "packing", of: &["idle_packing"], mark: 'p', kind: PartKind::Held },
    Part { name: "mailbox", of: &["idle_mailbox"], mark: 'm', kind: PartKind::Held },
    Part { name: "copy", of: &["idle_copy"], mark: 'c', kind: PartKind::Held },
    Part { name: "scatter", of: &["idle_scatter"], mark: 's', kind: PartKind::Held },
    Part { name: "empty", of: &["idle_empty"], mark: '.', kind: PartKind::Idle },
];

/// Of a part that this program does not know.
const OTHER: Part = Part { name: "other", of: &[], mark: '?', kind: PartKind::Held };
const BUSY: Part = Part { name: "busy", of: &[], mark: '=', kind: PartKind::Work };
const IDLE: Part = Part { name: "idle", of: &[], mark: '.', kind: PartKind::Idle };

/// One executor's time, by parts that add up to 1; empty where nothing passed.
#[derive(Clone, Debug, PartialEq)]
pub struct Executor {
    pub number: u64,
    /// It is the batcher's own thread.
    pub inline: bool,
    pub shares: Vec<(Part, f64)>,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    pub name: String,
    /// Outcomes, good and bad.
    pub requests_per_s: f64,
    /// Of them, answered with an error, or refused at the door.
    pub errors_per_s: f64,
    pub rows_per_s: f64,
    pub in_flight: f64,
    pub queue_rows: f64,
    /// Rows of those that batches had place for. None: no batch.
    pub fill: Option<f64>,
    /// Share of all cells.
    pub padding: Option<f64>,
    /// Seconds: p50 and p99.
    pub queue: [Option<f64>; 2],
    pub service: [Option<f64>; 2],
    /// Shares of batches by the reason of their seal, the largest first.
    pub closed: Vec<(String, f64)>,
    /// Outcomes per second that are not `ok`, the most first.
    pub errors: Vec<(String, f64)>,
    pub generation: u64,
    pub policy: String,
    /// Knobs that people turn: name and value.
    pub knobs: Vec<(String, String)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    pub uptime: f64,
    /// How long was looked at, in seconds.
    pub span: f64,
    pub requests_per_s: f64,
    pub in_flight: f64,
    pub connections: f64,
    pub resident_bytes: f64,
    pub executors: Vec<Executor>,
    /// The server says where time goes.
    pub waterfall: bool,
    pub models: Vec<Model>,
    pub decisions: Vec<Decision>,
    /// Sentences with the knob, of the model they are about.
    pub findings: Option<(String, Vec<String>)>,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub model: String,
    pub age_s: f64,
    pub what: String,
}

/// Of the knobs: those in the line of a model.
const KNOBS: &[&str] = &["rows_max", "cells_max", "queue_delay_max_us", "slo_ms", "layout", "weight"];

/// What happened between two readings.
pub fn view(before: Option<&Reading>, after: &Reading) -> View {
    // A server that was started again counts from zero.
    let before = before.filter(|before| before.uptime() < after.uptime());
    let span = after.uptime() - before.map_or(0.0, Reading::uptime);
    let window = Window { before, after, span };
    let metrics = &after.metrics;
    let (executors, waterfall) = executors(before, after);
    View {
        uptime: after.uptime(),
        span,
        requests_per_s: window.rate("ferry_requests_finished_total", &[]),
        in_flight: metrics.sum("ferry_requests_in_flight", &[]),
        connections: metrics.sum("ferry_connections_opened_total", &[])
            - metrics.sum("ferry_connections_closed_total", &[]),
        resident_bytes: metrics.sum("ferry_process_resident_bytes", &[]),
        executors,
        waterfall,
        models: after.models().into_iter().map(|name| window.model(name)).collect(),
        decisions: after.decisions.iter().rev().map(decision).collect(),
        findings: after.findings.as_ref().map(|(model, found)| (model.clone(), sentences(found))),
    }
}

struct Window<'a> {
    before: Option<&'a Reading>,
    after: &'a Reading,
    span: f64,
}

impl Window<'_> {
    fn grown(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let before = self.before.map_or(0.0, |before| before.metrics.sum(name, labels));
        (self.after.metrics.sum(name, labels) - before).max(0.0)
    }

    fn rate(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        if self.span > 0.0 { self.grown(name, labels) / self.span } else { 0.0 }
    }

    fn quantiles(&self, name: &str, labels: &[(&str, &str)]) -> [Option<f64>; 2] {
        let before = self.before.map(|before| &before.metrics);
        let histogram = Histogram::between(name, labels, before, &self.after.metrics);
        [histogram.quantile(0.5), histogram.quantile(0.99)]
    }

    /// Growth of a counter by a label's values, the most first.
    fn by(&self, name: &str, model: &str, label: &str) -> Vec<(String, f64)> {
        let values = self.after.metrics.values(name, label);
        let mut grown: Vec<(String, f64)> = values
            .into_iter()
            .map(|value| (value.to_owned(), self.grown(name, &[("model", model), (label, value)])))
            .filter(|(_, grown)| *grown > 0.0)
            .collect();
        grown.sort_by(|a, b| b.1.total_cmp(&a.1));
        grown
    }

    fn model(&self, name: &str) -> Model {
        let labels = &[("model", name)];
        let share = |part: f64, whole: f64| (whole > 0.0).then(|| part / whole);
        let rows = self.grown("ferry_batch_rows_sum", labels);
        let real = self.grown("ferry_batch_cells_real_total", labels);
        let padding = self.grown("ferry_batch_cells_padding_total", labels);
        let mut closed = self.by("ferry_batches_total", name, "reason");
        let batches: f64 = closed.iter().map(|(_, batches)| batches).sum();
        closed.iter_mut().for_each(|(_, grown)| *grown /= batches);
        let mut errors = self.by("ferry_requests_finished_total", name, "code");
        errors.retain(|(code, _)| code != "ok");
        errors.extend(self.by("ferry_requests_refused_total", name, "code"));
        errors.sort_by(|a, b| b.1.total_cmp(&a.1));
        errors.iter_mut().for_each(|(_, grown)| *grown /= self.span.max(1e-9));
        let policy = self.after.policies.get(name).unwrap_or(&Value::Null);
        let knob = |wanted: &str| {
            let knobs = policy["knobs"].as_array().map_or(&[][..], Vec::as_slice);
            knobs.iter().find(|knob| knob["name"] == wanted).and_then(|knob| Some(knob["value"].as_str()?.to_owned()))
        };
        Model {
            name: name.to_owned(),
            requests_per_s: self.rate("ferry_requests_finished_total", labels),
            errors_per_s: errors.iter().map(|(_, rate)| rate).sum(),
            rows_per_s: if self.span > 0.0 { rows / self.span } else { 0.0 },
            in_flight: self.after.metrics.sum("ferry_requests_in_flight", labels),
            queue_rows: self.after.metrics.sum("ferry_queue_rows", labels),
            fill: share(rows, self.grown("ferry_batch_rows_possible_total", labels)),
            padding: share(padding, real + padding),
            queue: self.quantiles("ferry_queue_delay_seconds", labels),
            service: self.quantiles("ferry_service_time_seconds", labels),
            closed,
            errors,
            generation: self.after.metrics.sum("ferry_policy_generation", labels) as u64,
            policy: knob("policy").unwrap_or_default(),
            knobs: KNOBS.iter().filter_map(|name| Some(((*name).to_owned(), knob(name)?))).collect(),
        }
    }
}

/// Shares of time by parts, and whether the server has a waterfall.
fn executors(before: Option<&Reading>, after: &Reading) -> (Vec<Executor>, bool) {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let inline = |number: u64| {
        let executor = usize::try_from(number).ok().and_then(|at| after.stats["executors"].get(at));
        executor.is_some_and(|executor| executor["inline"] == true)
    };
    let waterfall = list(&after.stats["waterfall"]["executors"]);
    if !waterfall.is_empty() {
        let earlier = before.map(|before| list(&before.stats["waterfall"]["executors"])).unwrap_or_default();
        let executors = waterfall.iter().map(|now| {
            let was = earlier.iter().find(|was| was["executor"] == now["executor"]).unwrap_or(&Value::Null);
            let seconds = now["seconds"].as_object().into_iter().flatten();
            let grown = seconds.map(|(name, value)| {
                let before = was["seconds"][name].as_f64().unwrap_or(0.0);
                (name.as_str(), (value.as_f64().unwrap_or(0.0) - before).max(0.0))
            });
            let number = now["executor"].as_u64().unwrap_or(0);
            Executor { number, inline: inline(number), shares: shares(&grown.collect::<Vec<_>>()) }
        });
        return (executors.collect(), true);
    }
    let span = after.stats["uptime_us"].as_f64().unwrap_or(0.0)
        - before.map_or(0.0, |before| before.stats["uptime_us"].as_f64().unwrap_or(0.0));
    let earlier = before.map(|before| list(&before.stats["executors"])).unwrap_or_default();
    let executors = list(&after.stats["executors"]).into_iter().enumerate().map(|(number, now)| {
        let was = earlier.get(number).map_or(0.0, |was| was["busy_us"].as_f64().unwrap_or(0.0));
        let busy = (now["busy_us"].as_f64().unwrap_or(0.0) - was).max(0.0);
        // A batch that ends is counted whole, also what of it ran before.
        let busy = if span > 0.0 { (busy / span).min(1.0) } else { 0.0 };
        let number = number as u64;
        Executor { number, inline: inline(number), shares: vec![(BUSY, busy), (IDLE, 1.0 - busy)] }
    });
    (executors.collect(), false)
}

/// Parts of a waterfall, as shares of their sum.
fn shares(grown: &[(&str, f64)]) -> Vec<(Part, f64)> {
    let whole: f64 = grown.iter().map(|(_, seconds)| seconds).sum();
    if whole <= 0.0 {
        return Vec::new();
    }
    let known = |name: &str| PARTS.iter().any(|part| part.of.contains(&name));
    let sum =
        |of: &dyn Fn(&str) -> bool| grown.iter().filter(|(name, _)| of(name)).map(|(_, s)| s).sum::<f64>() / whole;
    let mut shares: Vec<(Part, f64)> = PARTS.iter().map(|part| (*part, sum(&|name| part.of.contains(&name)))).collect();
    let other = sum(&|name| !known(name));
    if other > 0.0 {
        shares.push((OTHER, other));
    }
    shares
}

fn decision(value: &Value) -> Decision {
    let text = |key: &str| value[key].as_str().unwrap_or("").to_owned();
    let verdict = text("verdict");
    let predicted = value["predicted_us"].as_f64().unwrap_or(0.0) / 1e6;
    let number = |key: &str| value[key].as_u64().unwrap_or(0);
    let what = match verdict.as_str() {
        "sealed" => format!(
            "sealed: {}, {} rows of {}, {} waited, {} on executor {}",
            text("reason"),
            number("rows"),
            number("padded_len"),
            number("waiting_rows"),
            super::draw::time(Some(predicted)),
            number("executor")
        ),
        "held" => format!("held: {} rows, for {} at most", number("waiting_rows"), super::draw::time(Some(predicted))),
        _ => format!("{verdict}: {} rows of {}", number("rows"), number("len")),
    };
    Decision { model: text("model"), age_s: value["age_us"].as_f64().unwrap_or(0.0) / 1e6, what }
}

fn sentences(found: &Value) -> Vec<String> {
    let list = found["findings"].as_array().map_or(&[][..], Vec::as_slice);
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    list.iter()
        .map(|finding| {
            let [code, message, knob] = ["code", "message", "knob"].map(|key| text(&finding[key]));
            format!("{code}: {message} [change {knob}]")
        })
        .collect()
}

/// How the table is ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// As the server has them.
    #[default]
    Server,
    Requests,
    Queue,
    QueueP99,
    Padding,
}

impl Sort {
    pub const ALL: [Sort; 5] = [Sort::Server, Sort::Requests, Sort::Queue, Sort::QueueP99, Sort::Padding];

    pub fn name(self) -> &'static str {
        match self {
            Sort::Server => "server's order",
            Sort::Requests => "req/s",
            Sort::Queue => "queue",
            Sort::QueueP99 => "queue p99",
            Sort::Padding => "padding",
        }
    }

    pub fn next(self) -> Sort {
        let at = Sort::ALL.iter().position(|sort| *sort == self).unwrap_or(0);
        Sort::ALL[(at + 1) % Sort::ALL.len()]
    }

    /// Orders models, the most first.
    pub fn apply(self, models: &mut [Model]) {
        let key = |model: &Model| match self {
            Sort::Server => 0.0,
            Sort::Requests => model.requests_per_s,
            Sort::Queue => model.queue_rows,
            Sort::QueueP99 => model.queue[1].unwrap_or(0.0),
            Sort::Padding => model.padding.unwrap_or(0.0),
        };
        models.sort_by(|a, b| key(b).total_cmp(&key(a)));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A server that has run for `uptime` seconds, and answered so many requests in batches of 8 of 16.
    fn reading(uptime: f64, requests: u32) -> Reading {
        let batches = requests / 4;
        let page = format!(
            "ferry_model_info{{model=\"m\",version=\"1\"}} 1\nferry_model_info{{model=\"quiet\",version=\"1\"}} 1\n\
             ferry_uptime_seconds {uptime}\nferry_requests_in_flight{{model=\"m\"}} 7\nferry_queue_rows{{model=\"m\"}} 3\n\
             ferry_requests_finished_total{{model=\"m\",code=\"ok\"}} {requests}\n\
             ferry_requests_finished_total{{model=\"m\",code=\"deadline_exceeded\"}} {batches}\n\
             ferry_requests_refused_total{{model=\"m\",code=\"overloaded\"}} {requests}\n\
             ferry_batches_total{{model=\"m\",reason=\"idle\"}} {batches}\nferry_batches_total{{model=\"m\",reason=\"full\"}} {requests}\n\
             ferry_batch_rows_sum{{model=\"m\"}} {rows}\nferry_batch_rows_possible_total{{model=\"m\"}} {possible}\n\
             ferry_batch_cells_real_total{{model=\"m\"}} {real}\n\
             ferry_batch_cells_padding_total{{model=\"m\",cause=\"bucket\"}} {requests}\n\
             ferry_queue_delay_seconds_bucket{{model=\"m\",le=\"0.001\"}} {requests}\n\
             ferry_queue_delay_seconds_bucket{{model=\"m\",le=\"+Inf\"}} {requests}\n\
             ferry_policy_generation{{model=\"m\"}} 5\nferry_connections_opened_total{{shard=\"0\"}} 9\n\
             ferry_connections_closed_total{{shard=\"0\"}} 2\n# EOF\n",
            rows = batches * 8,
            possible = batches * 16,
            real = requests * 3,
        );
        Reading { metrics: Metrics::parse(&page).expect("a page"), ..Reading::default() }
    }

    #[test]
    fn rates_are_of_the_time_between_two_readings() {
        let view = view(Some(&reading(10.0, 400)), &reading(12.0, 800));
        assert_eq!((view.span, view.requests_per_s, view.connections), (2.0, 250.0, 7.0));
        let m = &view.models[0];
        assert_eq!((m.requests_per_s, m.errors_per_s, m.rows_per_s), (250.0, 250.0, 400.0));
        assert_eq!((m.in_flight, m.queue_rows, m.generation), (7.0, 3.0, 5));
        assert_eq!((m.fill, m.padding), (Some(0.5), Some(0.25)));
        assert_eq!(m.queue, [Some(0.0005), Some(0.00099)]);
        assert_eq!(m.service, [None; 2], "nothing was observed");
        assert_eq!(m.closed, [("full".to_owned(), 0.8), ("idle".to_owned(), 0.2)]);
        assert_eq!(m.errors, [("overloaded".to_owned(), 200.0), ("deadline_exceeded".to_owned(), 50.0)]);
        let quiet = &view.models[1];
        assert_eq!((quiet.requests_per_s, quiet.fill, quiet.padding), (0.0, None, None));
    }

    #[test]
    fn a_server_that_was_started_again_is_counted_from_its_start() {
        let view = view(Some(&reading(1000.0, 4000)), &reading(4.0, 400));
        assert_eq!((view.span, view.requests_per_s), (4.0, 125.0));
    }

    #[test]
    fn time_of_executors_is_shared_by_parts_that_add_up() {
        let stats = |useful: f64, held: f64, new: f64| {
            json!({ "waterfall": { "executors": [{ "executor": 0, "seconds": {
                "useful": useful, "padding_bucket": 1.0, "idle_hold": held, "idle_empty": 2.0, "a_part_of_tomorrow": new
            } }] } })
        };
        let before = Reading { stats: stats(1.0, 0.0, 0.0), ..reading(1.0, 0) };
        let after = Reading { stats: stats(3.0, 1.0, 1.0), ..reading(2.0, 0) };
        let view = view(Some(&before), &after);
        assert!(view.waterfall);
        let shares = &view.executors[0].shares;
        assert!((shares.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-12);
        let of = |name: &str| shares.iter().find(|(part, _)| part.name == name).map(|(_, share)| *share);
        assert_eq!(
            [of("useful"), of("held"), of("other"), of("padding")],
            [Some(0.5), Some(0.25), Some(0.25), Some(0.0)]
        );
    }

    #[test]
    fn a_server_without_a_waterfall_is_busy_or_idle() {
        let stats =
            |uptime: u64, busy: u64| json!({ "uptime_us": uptime, "executors": [{ "busy_us": busy, "inline": true }] });
        let before = Reading { stats: stats(1_000_000, 100_000), ..reading(1.0, 0) };
        let after = Reading { stats: stats(3_000_000, 600_000), ..reading(3.0, 0) };
        let view = view(Some(&before), &after);
        assert!(!view.waterfall && view.executors[0].inline);
        let shares: Vec<(&str, f64)> =
            view.executors[0].shares.iter().map(|(part, share)| (part.name, *share)).collect();
        assert_eq!(shares, [("busy", 0.25), ("idle", 0.75)]);
    }

    #[test]
    fn decisions_are_told_the_newest_first_and_findings_with_their_knob() {
        let decisions = vec![
            json!({ "verdict": "held", "model": "m", "waiting_rows": 3, "predicted_us": 500.0, "age_us": 2_000_000 }),
            json!({ "verdict": "sealed", "model": "m", "reason": "full", "rows": 8, "padded_len": 64, "waiting_rows": 9,
                    "predicted_us": 1500.0, "executor": 2, "age_us": 1000 }),
        ];
        let found = json!({ "findings": [{ "code": "delay_above_slo", "message": "it is", "knob": "slo_ms" }] });
        let after = Reading { decisions, findings: Some(("m".into(), found)), ..reading(1.0, 4) };
        let view = view(None, &after);
        let told: Vec<&str> = view.decisions.iter().map(|decision| decision.what.as_str()).collect();
        let sealed = "sealed: full, 8 rows of 64, 9 waited, 1.5ms on executor 2";
        assert_eq!(told, [sealed, "held: 3 rows, for 500us at most"]);
        assert_eq!(view.decisions[0].age_s, 0.001);
        assert_eq!(view.findings, Some(("m".to_owned(), vec!["delay_above_slo: it is [change slo_ms]".to_owned()])));
    }

    #[test]
    fn the_policy_of_a_model_is_among_its_knobs() {
        let policy =
            json!({ "knobs": [{ "name": "policy", "value": "window" }, { "name": "rows_max", "value": "8" }] });
        let mut after = reading(1.0, 4);
        after.policies.insert("m".into(), policy);
        let view = view(None, &after);
        assert_eq!((view.models[0].policy.as_str(), view.models[1].policy.as_str()), ("window", ""));
        assert_eq!(view.models[0].knobs, [("rows_max".to_owned(), "8".to_owned())]);
    }

    #[test]
    fn each_order_puts_the_most_first_and_the_last_returns_to_the_servers() {
        let mut models = view(None, &reading(1.0, 4)).models;
        models.reverse();
        for sort in Sort::ALL.into_iter().skip(1) {
            let mut models = models.clone();
            sort.apply(&mut models);
            assert_eq!(models[0].name, "m", "{}", sort.name());
        }
        let mut sort = Sort::Server;
        for _ in Sort::ALL {
            sort = sort.next();
        }
        assert_eq!(sort, Sort::Server);
    }
}
