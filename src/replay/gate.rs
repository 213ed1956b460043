//! The gate for changes of the scheduler: what a library of traces comes to with this build, beside what it came to with another.
//!
//! Each trace's requests are offered to a scheduler that begins with nothing but the recorded policies and what the recorded batches
//! took, in virtual time. So equal builds give equal figures, whatever the machine and whatever the layout of saved state, and a
//! difference is the scheduler's. A build that decides otherwise is not wrong for that; one whose figures are worse than the
//! tolerances allow is held up, with the first decision that differs where the other build is at hand.
//!
//! Elsewhere: replaying (whatif.rs), files and processes (commands/replay/gate.rs).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ledger::{ModelReport, Report};
use crate::scheduler::decision::{Decision, Verdict};

/// What a model's part of a trace came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    pub requests: u64,
    pub on_time_share: f64,
    /// Queue and run.
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub fill_ratio: f64,
    pub padding_waste: f64,
    /// On-time share of the tenant that has the least of it; of tenants with at least [`TENANT_MIN`] requests.
    pub fairness: f64,
    /// Share of the requests that ran behind a later one of the same tenant, class and length, without its deadline being sooner.
    pub overtaken_share: f64,
}

/// One trace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TraceFigures {
    pub decisions: u64,
    /// Of all decisions, in hexadecimal.
    pub hash: String,
    pub executor_ms: f64,
    pub models: BTreeMap<String, Figures>,
}

/// A tenant with fewer requests says nothing.
pub const TENANT_MIN: u64 = 20;

impl TraceFigures {
    pub fn of(report: &Report, hash: u64) -> TraceFigures {
        let busy: f64 = report.busy.iter().map(|busy| busy.as_secs_f64()).sum();
        let used = report.models.iter().filter(|model| model.offered > 0);
        TraceFigures {
            decisions: report.decisions,
            hash: format!("{hash:016x}"),
            executor_ms: round(busy * 1e3),
            models: used.map(|model| (model.name.clone(), Figures::of(model))).collect(),
        }
    }
}

impl Figures {
    fn of(model: &ModelReport) -> Figures {
        let ms = |share: f64| round(model.percentile(share).as_secs_f64() * 1e3);
        let tenants = model.tenants.values().filter(|(judged, _)| *judged >= TENANT_MIN);
        let least = tenants.map(|(judged, on_time)| *on_time as f64 / *judged as f64).fold(1.0, f64::min);
        Figures {
            requests: model.offered,
            on_time_share: round(model.on_time_share()),
            p50_ms: ms(0.5),
            p99_ms: ms(0.99),
            fill_ratio: round(model.fill()),
            padding_waste: round(model.waste()),
            fairness: round(least),
            overtaken_share: round(model.overtaken as f64 / model.offered.max(1) as f64),
        }
    }
}

/// To the sixth decimal: what is kept in a file is what is compared.
fn round(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// A figure that is worse than it may be.
#[derive(Clone, Debug, PartialEq)]
pub struct Regression {
    /// Empty: of the whole trace.
    pub model: String,
    pub what: &'static str,
    pub before: f64,
    pub after: f64,
    /// The worst that would pass.
    pub allowed: f64,
}

impl std::fmt::Display for Regression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Regression { model, what, before, after, allowed } = self;
        let of = if model.is_empty() { String::new() } else { format!("{model}: ") };
        write!(f, "{of}{what} was {before}, is {after}; the worst that passes is {allowed:.6}")
    }
}

/// By how much a figure may get worse: as a share of itself, and in its own unit; the larger counts.
#[derive(Clone, Copy)]
struct Tolerance {
    share: f64,
    units: f64,
    /// Less is worse.
    more_is_better: bool,
}

const fn less(share: f64, units: f64) -> Tolerance {
    Tolerance { share, units, more_is_better: false }
}

const fn more(units: f64) -> Tolerance {
    Tolerance { share: 0.0, units, more_is_better: true }
}

type Get = fn(&Figures) -> f64;

/// What is compared of a model. Fill is not: fewer, fuller batches are no aim of their own.
const COMPARED: [(&str, Get, Tolerance); 6] = [
    ("on_time_share", |f| f.on_time_share, more(0.005)),
    ("p50_ms", |f| f.p50_ms, less(0.10, 0.5)),
    ("p99_ms", |f| f.p99_ms, less(0.05, 0.5)),
    ("padding_waste", |f| f.padding_waste, less(0.0, 0.01)),
    ("fairness", |f| f.fairness, more(0.01)),
    ("overtaken_share", |f| f.overtaken_share, less(0.0, 0.005)),
];

/// Executor time for the same requests may grow by so much.
const EXECUTOR_MS: Tolerance = less(0.02, 1.0);

/// What got worse than it may from `before` to `after`.
pub fn compare(before: &TraceFigures, after: &TraceFigures) -> Vec<Regression> {
    let mut worse = Vec::new();
    let mut judge = |model: &str, what, [before, after]: [f64; 2], tolerance: Tolerance| {
        let room = (before.abs() * tolerance.share).max(tolerance.units);
        let allowed = if tolerance.more_is_better { before - room } else { before + room };
        let passes = if tolerance.more_is_better { after >= allowed } else { after <= allowed };
        // A figure that is no number passes nothing.
        if !passes {
            worse.push(Regression { model: model.to_owned(), what, before, after, allowed });
        }
    };
    judge("", "executor_ms", [before.executor_ms, after.executor_ms], EXECUTOR_MS);
    for (name, figures) in &before.models {
        let nothing = Figures { p99_ms: f64::NAN, ..Figures::default() };
        let now = after.models.get(name).unwrap_or(&nothing);
        for (what, get, tolerance) in COMPARED {
            judge(name, what, [get(figures), get(now)], tolerance);
        }
    }
    worse
}

/// A decision as one line: equal lines are equal decisions.
pub fn line(decision: &Decision, models: &[String]) -> String {
    let Decision { at, verdict, executor, batch, rows, padded_len, waiting, predicted, .. } = decision;
    let model = models.get(decision.model.index()).map_or("?", String::as_str);
    let (at, verdict_name) = (at.nanos(), verdict.name());
    match verdict {
        Verdict::Sealed(_) => format!(
            "{at} {model} sealed ({verdict_name}): batch {batch} of {rows} rows to {padded_len}, executor {executor}, {waiting} \
             rows waited, expected to take {predicted} ns"
        ),
        Verdict::Held => format!("{at} {model} held: {waiting} rows waited, for at most {predicted} ns"),
        Verdict::Shed | Verdict::Refused => {
            format!("{at} {model} {verdict_name}: {rows} rows of length {batch}, {waiting} rows waited, {predicted} ns")
        }
    }
}

/// The first line in which two logs differ, by its number from 1; either may end sooner.
pub fn first_difference<'a>(
    before: impl IntoIterator<Item = &'a str>,
    after: impl IntoIterator<Item = &'a str>,
) -> Option<(usize, Option<&'a str>, Option<&'a str>)> {
    let (mut before, mut after) = (before.into_iter(), after.into_iter());
    for number in 1.. {
        match (before.next(), after.next()) {
            (None, None) => return None,
            (one, other) if one != other => return Some((number, one, other)),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> TraceFigures {
        let figures = Figures {
            requests: 1000,
            on_time_share: 0.99,
            p50_ms: 10.0,
            p99_ms: 100.0,
            fill_ratio: 0.5,
            padding_waste: 0.10,
            fairness: 0.98,
            overtaken_share: 0.01,
        };
        let models = BTreeMap::from([("m".to_owned(), figures)]);
        TraceFigures { decisions: 10, hash: "0".into(), executor_ms: 500.0, models }
    }

    fn with(change: impl Fn(&mut Figures)) -> TraceFigures {
        let mut changed = figures();
        change(changed.models.get_mut("m").expect("is there"));
        changed
    }

    #[test]
    fn equal_and_better_figures_pass() {
        assert_eq!(compare(&figures(), &figures()), []);
        let better = with(|f| (f.p99_ms, f.on_time_share, f.padding_waste, f.overtaken_share) = (50.0, 1.0, 0.0, 0.0));
        assert_eq!(compare(&figures(), &better), []);
    }

    #[test]
    fn each_figure_fails_by_itself_when_it_is_worse_than_allowed_and_not_before() {
        type Change = fn(&mut Figures, f64);
        let cases: [(&str, Change, f64, f64); 6] = [
            ("on_time_share", |f, v| f.on_time_share = v, 0.985, 0.984),
            ("p50_ms", |f, v| f.p50_ms = v, 11.0, 11.1),
            ("p99_ms", |f, v| f.p99_ms = v, 105.0, 105.1),
            ("padding_waste", |f, v| f.padding_waste = v, 0.11, 0.1101),
            ("fairness", |f, v| f.fairness = v, 0.97, 0.9699),
            ("overtaken_share", |f, v| f.overtaken_share = v, 0.015, 0.0151),
        ];
        for (what, change, passes, fails) in cases {
            assert_eq!(compare(&figures(), &with(|f| change(f, passes))), [], "{what}");
            let found = compare(&figures(), &with(|f| change(f, fails)));
            assert_eq!(found.iter().map(|one| one.what).collect::<Vec<_>>(), [what]);
            assert!(found[0].to_string().starts_with(&format!("m: {what} was ")), "{}", found[0]);
        }
        let slower = TraceFigures { executor_ms: 510.1, ..figures() };
        assert_eq!(compare(&figures(), &slower)[0].what, "executor_ms");
    }

    #[test]
    fn a_model_that_is_gone_and_a_figure_that_is_no_number_fail() {
        let gone = TraceFigures { models: BTreeMap::new(), ..figures() };
        assert!(compare(&figures(), &gone).len() >= 3);
        assert_eq!(compare(&figures(), &with(|f| f.p99_ms = f64::NAN)).len(), 1);
    }

    #[test]
    fn the_first_line_that_differs_is_found_also_behind_the_end_of_one() {
        let one = ["a", "b", "c"];
        assert_eq!(first_difference(one, one), None);
        assert_eq!(first_difference(one, ["a", "x", "c"]), Some((2, Some("b"), Some("x"))));
        assert_eq!(first_difference(one, ["a", "b"]), Some((3, Some("c"), None)));
    }
}
