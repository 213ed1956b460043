//! What was found, for a terminal.

use std::fmt::Write as _;

use ferry::tune::front::{self, RULE};
use ferry::tune::page::Found;
use ferry::tune::space::Point;
use serde_json::Value;

/// Lines of the front, at most.
const FRONT_LINES: usize = 12;

pub fn report(found: &Found<'_>, document: &Value) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "{}: {} settings in {:.1} s, until {}; {}, {} requests in {:.1} s",
        found.model,
        found.tried.len(),
        found.took_s,
        found.ended,
        found.source,
        found.requests,
        found.seconds
    );
    for note in &found.notes {
        let _ = writeln!(out, "note: {note}");
    }
    if let Some(bound) = found.bound_rps {
        let _ = writeln!(
            out,
            "no scheduler with these executors can answer more than {bound:.1} of these requests a second within the SLO"
        );
    }
    let chosen = found.choice().expect("the present setting was tried");
    let front = found.front();
    let shown = spread(&distinct(found, &front), chosen.at);
    let _ =
        writeln!(out, "\nPareto front, {} of {} settings on it (SLO {} ms):", shown.len(), front.len(), found.slo_ms);
    let _ = writeln!(
        out,
        "{:>5} {:>10} {:>10} {:>9} {:>11} {:>7} {:>6}  setting",
        "", "p99 ms", "goodput/s", "on time", "executor µs", "regret", "busy"
    );
    let mut lines = shown;
    // Neither need be on it: of settings that count as equal, the one with the fewest changes is chosen.
    for at in [chosen.at, 0] {
        if !lines.contains(&at) {
            lines.push(at);
        }
    }
    for at in lines {
        let (point, p) = (&found.tried[at].point, &found.tried[at].predicted);
        let mark = match at {
            at if at == chosen.at => ">",
            0 => "=",
            _ => " ",
        };
        let _ = writeln!(
            out,
            "{mark}{at:>4} {:>10.2} {:>10.2} {:>7.2} % {:>11.0} {:>5.1} % {:>4.0} %  {}",
            p.p99_ms,
            p.goodput_rps,
            100.0 * p.on_time_share,
            p.device_us,
            100.0 * found.regret(p),
            100.0 * p.utilization,
            words(found, point)
        );
    }
    let _ = writeln!(out, "> chosen, = present. {RULE}");
    let _ = writeln!(
        out,
        "Regret is executor time beyond the hindsight bound of {:.0} µs a request: the cheapest batches of the same rows.",
        found.device_least_us()
    );
    let p = &found.tried[chosen.at].predicted;
    let point = &found.tried[chosen.at].point;
    if !chosen.holds {
        let _ = writeln!(out, "\nNo setting holds the SLO of {} ms.", found.slo_ms);
    }
    if chosen.at == 0 {
        let _ = writeln!(out, "\nThe present setting stays.");
        if found.tried.len() == 1 {
            let _ = writeln!(out, "No other was tried.");
        }
    } else {
        let _ = writeln!(out, "\nThe chosen setting, beside the present one:\n");
        for line in found.diff(point).into_iter().chain(found.server_diff(point)) {
            let _ = writeln!(out, "{} {}", line.sign(), line.text());
        }
        let set: Vec<String> = found.space.changes(point).iter().map(|(key, value)| format!("{key}={value}")).collect();
        if found.space.needs_restart(point) {
            let _ = writeln!(
                out,
                "\nIt needs a restart: larger batches than the server has memory for, or other executors."
            );
        } else {
            let _ = writeln!(out, "\nwhile it serves: ferry set {} {}", found.model, set.join(" "));
        }
    }
    if p.guessed > 0.05 {
        let share = 100.0 * p.guessed;
        let _ = writeln!(out, "{share:.0} % of its batches are unlike all that were measured: their time is a guess.");
    }
    live(&mut out, found, &document["live"]);
    out
}

/// Those that differ in what is predicted of them: of equals the first.
fn distinct(found: &Found<'_>, front: &[usize]) -> Vec<usize> {
    let mut kept: Vec<usize> = Vec::new();
    for at in front {
        let of = |at: usize| front::objectives(&found.tried[at].predicted);
        if kept.last().is_none_or(|last| of(*last) != of(*at)) {
            kept.push(*at);
        }
    }
    kept
}

/// As many as fit, evenly spread, with this one among them.
fn spread(all: &[usize], with: usize) -> Vec<usize> {
    let stride = all.len().div_ceil(FRONT_LINES).max(1);
    all.iter().enumerate().filter(|(at, place)| at % stride == 0 || **place == with).map(|(_, place)| *place).collect()
}

fn words(found: &Found<'_>, point: &Point) -> String {
    let policy = found.space.policy(point).expect("it was tried");
    let knob = |key: &str| policy.get(key).expect("a knob");
    let window = match policy.queue_delay_max {
        None => "window auto".to_owned(),
        Some(delay) => format!("window {} ms", delay.as_nanos() as f64 / 1e6),
    };
    let mut words = format!(
        "{}, {window}, {} rows, {} cells, {}",
        knob("policy"),
        knob("rows_max"),
        knob("cells_max"),
        knob("layout")
    );
    if point.executors != found.space.present().executors {
        let _ = write!(words, ", {} executors", point.executors);
    }
    words
}

fn live(out: &mut String, found: &Found<'_>, live: &Value) {
    let Some(settings) = live["settings"].as_array() else { return };
    let _ = writeln!(out, "\nPredicted against measured, {} rounds of {} s:", live["rounds"], live["seconds_each"]);
    let _ = writeln!(
        out,
        "{:>5} {:>11} {:>11} {:>13} {:>13} {:>11} {:>11}",
        "", "p99 pred.", "p99 meas.", "ratio pred.", "ratio meas.", "good pred.", "good meas."
    );
    let number = |value: &Value| value.as_f64().map_or("none".to_owned(), |number| format!("{number:.2}"));
    for one in settings {
        let at = one["id"].as_u64().unwrap_or(0) as usize;
        if let Some(why) = one["refused"].as_str() {
            let _ = writeln!(out, "{at:>5} not measured: {why}");
            continue;
        }
        let (p, m) = (&found.tried[at].predicted, &one["measured"]);
        let _ = writeln!(
            out,
            "{at:>5} {:>11.2} {:>11} {:>13} {:>13} {:>11.2} {:>11}",
            p.p99_ms,
            number(&m["p99_ms"]),
            number(&one["p99_ratio_predicted"]),
            number(&one["p99_ratio_measured"]),
            p.goodput_rps,
            number(&m["goodput_rps"])
        );
    }
    let _ = writeln!(out, "Ratios are to the present setting's. {}", live["note"].as_str().unwrap_or(""));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_front_is_thinned_and_keeps_the_chosen_one() {
        let all: Vec<usize> = (100..200).collect();
        let shown = spread(&all, 141);
        assert!(shown.len() <= FRONT_LINES + 1 && shown.contains(&100) && shown.contains(&141), "{shown:?}");
        assert_eq!(spread(&all[..5], 1), &all[..5]);
    }
}
