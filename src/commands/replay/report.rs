//! Runs side by side, as text and as JSON.

use ferry::replay::ledger::{ModelReport, Report};
use ferry::replay::regret::Regret;
use ferry::replay::tail::Tail;
use ferry::telemetry::waterfall::{self, PARTS, Parts};
use ferry::vocab::SealReason;
use serde_json::json;

/// Percentiles that are shown.
const SHARES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

type Show = fn(&ModelReport) -> String;

fn millis(model: &ModelReport, share: f64) -> f64 {
    model.percentile(share).as_secs_f64() * 1e3
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

/// What is shown of a model, one line each.
const LINES: [(&str, Show); 12] = [
    ("requests", |m| m.offered.to_string()),
    ("  answered", |m| m.answered.to_string()),
    ("  refused", |m| m.refused_total().to_string()),
    ("  expired in the queue", |m| m.expired.to_string()),
    ("  cancelled", |m| m.cancelled.to_string()),
    ("  unfinished at the end", |m| m.unfinished.to_string()),
    ("on time", |m| percent(m.on_time_share())),
    ("batches", |m| m.batches.to_string()),
    ("  rows, mean", |m| format!("{:.2}", m.batch_rows())),
    ("  fill", |m| percent(m.fill())),
    ("  padding waste", |m| percent(m.waste())),
    ("  largest time, ms", |m| format!("{:.3}", m.latency.max() as f64 / 1e6)),
];

pub fn text(runs: &[(&str, &Report)]) -> String {
    let mut out = String::new();
    let mut line = |label: &str, cells: Vec<String>| {
        out += &format!("{label:<26}");
        cells.iter().for_each(|cell| out += &format!(" {cell:>14}"));
        out.truncate(out.trim_end().len());
        out.push('\n');
    };
    line("", runs.iter().map(|(name, _)| (*name).to_owned()).collect());
    for (at, model) in runs[0].1.models.iter().enumerate() {
        if runs.iter().all(|(_, report)| report.models[at].offered == 0) {
            continue;
        }
        let mut show = |label: &str, of: &dyn Fn(&ModelReport) -> String| {
            line(label, runs.iter().map(|(_, report)| of(&report.models[at])).collect());
        };
        show(&model.name, &|_| String::new());
        for (label, of) in LINES {
            show(&format!("  {label}"), &of);
        }
        for (name, share) in SHARES {
            show(&format!("  queue and run {name}, ms"), &|model| format!("{:.3}", millis(model, share)));
        }
        let tail = |report: &Report| report.regret.tails.get(at).copied().flatten();
        if runs.iter().any(|(_, report)| tail(report).is_some()) {
            let least = |tail: Tail| format!("{:.3}", tail.least.as_secs_f64() * 1e3);
            let cells = runs.iter().map(|(_, report)| tail(report).map_or("-".to_owned(), least)).collect();
            line("    p99 at least, ms", cells);
        }
        let mut show = |label: &str, of: &dyn Fn(&ModelReport) -> String| {
            line(label, runs.iter().map(|(_, report)| of(&report.models[at])).collect());
        };
        for (reason, name) in SealReason::ALL.iter().map(|reason| reason.name()).enumerate() {
            if runs.iter().any(|(_, report)| report.models[at].reasons[reason] > 0) {
                show(&format!("  closed: {name}"), &|model| model.reasons[reason].to_string());
            }
        }
        let codes = runs.iter().flat_map(|(_, report)| report.models[at].refused.keys());
        for code in codes.collect::<std::collections::BTreeSet<_>>() {
            show(&format!("  refused: {code}"), &|m| m.refused.get(code).copied().unwrap_or(0).to_string());
        }
    }
    for executor in 0..runs[0].1.busy.len() {
        let busy = |report: &Report| report.busy[executor].as_secs_f64() / report.span.as_secs_f64().max(1e-9);
        line(&format!("executor {executor} busy"), runs.iter().map(|(_, report)| percent(busy(report))).collect());
    }
    waterfall_lines(runs, &mut line);
    let of_time =
        |time: &dyn Fn(&Regret) -> f64| runs.iter().map(|(_, report)| format!("{:.1}", time(&report.regret))).collect();
    line("executor time used, ms", of_time(&|regret| regret.total.used.as_secs_f64() * 1e3));
    line("  cheapest batches, ms", of_time(&|regret| regret.total.least.as_secs_f64() * 1e3));
    line("  lost", runs.iter().map(|(_, report)| percent(report.regret.lost_share())).collect());
    line("batches of a guessed time", runs.iter().map(|(_, report)| report.guessed.to_string()).collect());
    out
}

/// Where the time of executors went, those on the batcher's own thread beside the others; of each run, what is 100 % of it.
fn waterfall_lines(runs: &[(&str, &Report)], line: &mut impl FnMut(&str, Vec<String>)) {
    for (name, inline) in [("time of executors", false), ("time of inline batches", true)] {
        let sum = |report: &Report| {
            let mut sum = Parts::default();
            let mine = report.waterfall.iter().filter(|(is_inline, _)| *is_inline == inline);
            mine.for_each(|(_, parts)| sum.add(parts));
            sum
        };
        let sums: Vec<Parts> = runs.iter().map(|(_, report)| sum(report)).collect();
        if sums.iter().all(|sum| sum.total() == 0) {
            continue;
        }
        line(name, sums.iter().map(|sum| format!("{:.3} s", sum.total() as f64 / 1e9)).collect());
        for (at, part) in PARTS.into_iter().enumerate() {
            if sums.iter().any(|sum| sum.0[at] > 0) {
                let share = |sum: &Parts| percent(sum.0[at] as f64 / (sum.total() as f64).max(1.0));
                line(&format!("  {part}"), sums.iter().map(share).collect());
            }
        }
    }
}

pub fn json(report: &Report) -> serde_json::Value {
    let models: serde_json::Map<String, serde_json::Value> =
        report.models.iter().map(|model| (model.name.clone(), json_of(model))).collect();
    let busy: Vec<f64> = report.busy.iter().map(|busy| busy.as_secs_f64()).collect();
    json!({
        "seconds": report.span.as_secs_f64(),
        "decisions": report.decisions,
        "batches_of_a_guessed_time": report.guessed,
        "executors_busy_seconds": busy,
        "models": models,
        "regret": regret_json(&report.regret, &report.models),
        "waterfall": waterfall::json(report.waterfall.iter().copied()),
    })
}

/// What the batches took beside the cheapest of the same rows, and each model's p99 beside the least.
pub fn regret_json(regret: &Regret, models: &[ModelReport]) -> serde_json::Value {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let tail = |tail: Tail| json!({ "p99_ms": ms(tail.p99), "least_ms": ms(tail.least), "lost_ms": ms(tail.lost()) });
    let tails: serde_json::Map<String, serde_json::Value> = models
        .iter()
        .zip(&regret.tails)
        .filter_map(|(model, known)| Some((model.name.clone(), tail((*known)?))))
        .collect();
    json!({
        "device_ms_used": ms(regret.total.used),
        "device_ms_least": ms(regret.total.least),
        "lost_share": regret.lost_share(),
        "worst_interval": regret.worst.map(|worst| json!({
            "at_s": worst.at.as_secs_f64(),
            "device_ms_used": ms(worst.used),
            "device_ms_least": ms(worst.least),
        })),
        "queue_and_run_p99": tails,
    })
}

pub fn regret_text(regret: &Regret, models: &[ModelReport]) -> String {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let (total, share) = (&regret.total, percent(regret.lost_share()));
    let worst = regret.worst.map_or(String::new(), |worst| {
        format!(
            "; the most in the interval at {:.0} s: {:.1} of {:.1} ms",
            worst.at.as_secs_f64(),
            ms(worst.lost()),
            ms(worst.used)
        )
    });
    let (used, least) = (ms(total.used), ms(total.least));
    let mut text = format!(
        "executors used {used:.1} ms; the cheapest batches of the same rows take {least:.1} ms ({share} lost{worst})"
    );
    for (model, tail) in models.iter().zip(&regret.tails).filter_map(|(model, tail)| Some((model, (*tail)?))) {
        let (p99, least) = (ms(tail.p99), ms(tail.least));
        text += &format!(
            "\n{}: queue and run p99 {p99:.3} ms; no scheduler could have had less than {least:.3} ms",
            model.name
        );
    }
    text
}

fn json_of(model: &ModelReport) -> serde_json::Value {
    let times: serde_json::Map<String, serde_json::Value> =
        SHARES.iter().map(|(name, share)| ((*name).to_owned(), json!(millis(model, *share)))).collect();
    let reasons: serde_json::Map<String, serde_json::Value> = SealReason::ALL
        .iter()
        .zip(model.reasons)
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| (reason.name().to_owned(), json!(count)))
        .collect();
    let refused: serde_json::Map<String, serde_json::Value> =
        model.refused.iter().map(|(code, count)| (code.name().to_owned(), json!(count))).collect();
    json!({
        "requests": model.offered,
        "answered": model.answered,
        "refused": refused,
        "expired": model.expired,
        "cancelled": model.cancelled,
        "unfinished": model.unfinished,
        "on_time_share": model.on_time_share(),
        "batches": model.batches,
        "batch_rows_mean": model.batch_rows(),
        "fill_ratio": model.fill(),
        "padding_waste": model.waste(),
        "queue_and_run_ms": times,
        "close_reasons": reasons,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ferry::replay::regret::Times;

    use super::*;

    #[test]
    fn regret_is_told_as_a_sentence_and_as_numbers() {
        let times = |at: u64, used: u64, least: u64| Times {
            at: Duration::from_secs(at),
            used: Duration::from_millis(used),
            least: Duration::from_millis(least),
        };
        let regret = Regret { total: times(0, 400, 300), worst: Some(times(7, 40, 10)), tails: Vec::new() };
        assert_eq!(
            regret_text(&regret, &[]),
            "executors used 400.0 ms; the cheapest batches of the same rows take 300.0 ms (25.00 % lost; the most in the \
             interval at 7 s: 30.0 of 40.0 ms)"
        );
        let value = regret_json(&regret, &[]);
        assert_eq!((&value["device_ms_used"], &value["lost_share"]), (&json!(400.0), &json!(0.25)));
        assert_eq!(value["worst_interval"], json!({ "at_s": 7.0, "device_ms_used": 40.0, "device_ms_least": 10.0 }));
        let nothing = Regret::default();
        assert_eq!(regret_json(&nothing, &[])["worst_interval"], json!(null));
        assert!(regret_text(&nothing, &[]).ends_with("(0.00 % lost)"));
    }
}
