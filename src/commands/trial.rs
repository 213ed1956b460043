//! `ferry trial`: tries knobs for a while beside the policy that serves, and tells what came of it.

use std::process::ExitCode;
use std::time::Duration;

use ferry::trial::Keep;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::load::{failed, resolve, wrong_use};
use super::{EXIT_FAILED, http};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    model: String,
    /// Knobs to try, as `ferry set` takes them; can be repeated. Without any, the model's trial is shown: the one that is on, or
    /// how the last one ended.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "seconds")]
    sets: Vec<String>,
    /// Length of the trial. Both policies take turns, the old one first.
    #[arg(long, value_name = "N", requires = "sets")]
    seconds: Option<f64>,
    /// A request is late after so long in queue and run, or at its own deadline. Default: the model's `slo_ms`.
    #[arg(long, value_name = "MS", requires = "sets")]
    slo_ms: Option<f64>,
    /// Least share of requests on time: below it (or twice as many late as before), the trial reverts at once. Default 0.99.
    #[arg(long, value_name = "SHARE", requires = "sets")]
    on_time_min: Option<f64>,
    /// What has to be better for the knobs to stay: p99 (the default), p50, on_time, fill, waste; unbroken: nothing; never: it only
    /// measures.
    #[arg(long, value_name = "WHAT", requires = "sets", value_parser = keep)]
    keep_if: Option<Keep>,
    /// By how much, as a share. Default 0.02.
    #[arg(long, value_name = "SHARE", requires = "sets")]
    margin: Option<f64>,
    /// Share of the time that the knobs are in force. Default 0.5.
    #[arg(long, value_name = "SHARE", requires = "sets")]
    share: Option<f64>,
    /// Return when it has begun.
    #[arg(long, requires = "sets")]
    no_wait: bool,
    /// End the trial that is on, and go back to the policy before it.
    #[arg(long, conflicts_with = "sets")]
    abort: bool,
    /// The server's control address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601")]
    control: String,
    /// Prints one JSON document.
    #[arg(long)]
    json: bool,
}

fn keep(text: &str) -> Result<Keep, String> {
    let names: Vec<&str> = Keep::ALL.iter().map(|keep| keep.name()).collect();
    Keep::from_name(text).ok_or_else(|| format!("expected one of {}", names.join(", ")))
}

/// How often a trial that is on is looked at.
const LOOK: Duration = Duration::from_millis(500);

pub fn run(args: &Args) -> ExitCode {
    let addr = match resolve(&args.control) {
        Ok(addr) => addr,
        Err(message) => return wrong_use(&message.replace("--addr", "--control")),
    };
    let path = format!("/v1/models/{}/trial", http::segment(&args.model));
    let answer = if args.abort {
        http::request(addr, "DELETE", &path, None)
    } else if args.sets.is_empty() {
        http::request(addr, "GET", &path, None)
    } else {
        match body_of(args) {
            Ok(body) => http::request(addr, "PUT", &path, Some(&body)),
            Err(message) => return wrong_use(&message),
        }
    };
    let mut trial = match answer {
        Ok((200 | 202, answer)) => answer["trial"].clone(),
        Ok((status @ (400 | 404), answer)) => return wrong_use(&format!("{} ({status})", text(&answer["error"]))),
        Ok((status, answer)) => return failed(&format!("{} ({status})", text(&answer["error"]))),
        Err(message) => return failed(&message),
    };
    let waits = !args.sets.is_empty() && !args.no_wait;
    if waits {
        let bar = ProgressBar::new((args.seconds.unwrap_or(0.0) * 2.0).ceil() as u64);
        bar.set_style(ProgressStyle::with_template("trial {bar:40} {msg}").expect("a template"));
        while trial["ended"].is_null() {
            std::thread::sleep(LOOK);
            match http::request(addr, "GET", &path, None) {
                Ok((200, answer)) => trial = answer["trial"].clone(),
                // Asked too often, or too busy to answer: later.
                Ok((429 | 503, _)) => {}
                Ok((status, answer)) => return failed(&format!("{} ({status})", text(&answer["error"]))),
                Err(message) => return failed(&message),
            }
            bar.set_message(text(&trial["in_force"]).to_owned());
            bar.inc(1);
        }
        bar.finish_and_clear();
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&trial).expect("plain data"));
    } else {
        print!("{}", table(&args.model, &trial));
    }
    let ended = &trial["ended"];
    match waits && ended["outcome"] == "reverted" && ended["reason"] != "measured" {
        true => ExitCode::from(EXIT_FAILED),
        false => ExitCode::SUCCESS,
    }
}

fn body_of(args: &Args) -> Result<Value, String> {
    let mut set = serde_json::Map::new();
    for pair in &args.sets {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(format!("expected key=value, such as queue_delay_max_us=500, got {pair:?}"));
        };
        if set.insert(key.trim().to_owned(), value.trim().into()).is_some() {
            return Err(format!("{} is set twice", key.trim()));
        }
    }
    let mut body = json!({ "set": set, "seconds": args.seconds });
    let numbers =
        [("slo_ms", args.slo_ms), ("on_time_min", args.on_time_min), ("margin", args.margin), ("share", args.share)];
    for (key, value) in numbers.iter().filter_map(|(key, value)| Some((*key, (*value)?))) {
        body[key] = value.into();
    }
    if let Some(keep) = args.keep_if {
        body["keep_if"] = keep.name().into();
    }
    Ok(body)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

/// Both policies side by side, and how it ended.
fn table(model: &str, trial: &Value) -> String {
    if trial.is_null() {
        return format!("{model}: there was no trial\n");
    }
    let knobs = trial["set"].as_object().into_iter().flatten().map(|(knob, value)| format!("{knob}={}", text(value)));
    let set = knobs.collect::<Vec<_>>().join(" ");
    let mut lines = format!("{model}: {set}, for {} s, slo {} ms\n", trial["seconds"], trial["slo_ms"]);
    lines += &format!("  {:<14}{:>12}{:>12}\n", "", "baseline", "changed");
    let number = |value: &Value, scale: f64, digits: usize| {
        value.as_f64().map_or("-".to_owned(), |value| format!("{:.digits$}", value * scale))
    };
    let mut row = |name: &str, of: &dyn Fn(&Value) -> String| {
        lines += &format!("  {name:<14}{:>12}{:>12}\n", of(&trial["baseline"]), of(&trial["changed"]));
    };
    row("answered", &|arm| number(&arm["answered"], 1.0, 0));
    row("p50 ms", &|arm| number(&arm["queue_and_run_us"]["p50"], 1e-3, 3));
    row("p99 ms", &|arm| number(&arm["queue_and_run_us"]["p99"], 1e-3, 3));
    row("on time %", &|arm| number(&arm["on_time"], 100.0, 2));
    row("fill %", &|arm| number(&arm["fill"], 100.0, 1));
    row("waste %", &|arm| number(&arm["waste"], 100.0, 1));
    row("refused", &|arm| number(&arm["refused"], 1.0, 0));
    row("expired", &|arm| number(&arm["expired"], 1.0, 0));
    let ended = &trial["ended"];
    lines += &match ended.is_null() {
        true => format!("  on; in force: {}\n", text(&trial["in_force"])),
        false => format!(
            "{} ({}): {}\ngeneration {}\n",
            text(&ended["outcome"]),
            text(&ended["reason"]),
            text(&ended["message"]),
            ended["generation"]
        ),
    };
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_is_told_side_by_side_with_its_end() {
        let arm = |p99: f64| {
            json!({ "answered": 400, "queue_and_run_us": { "p50": 1000.0, "p99": p99 }, "on_time": 0.99, "fill": 0.5,
                    "waste": null, "refused": 0, "expired": 0 })
        };
        let mut trial = json!({
            "set": { "rows_max": "4" }, "seconds": 8.0, "slo_ms": 50.0, "baseline": arm(2000.0), "changed": arm(3000.0),
            "in_force": "changed", "ended": null,
        });
        let on = table("m", &trial);
        assert!(on.starts_with("m: rows_max=4, for 8.0 s, slo 50.0 ms\n"), "{on}");
        assert!(
            on.contains("p99 ms               2.000       3.000\n") && on.contains("on; in force: changed"),
            "{on}"
        );
        assert!(on.contains("waste %                  -           -\n"), "{on}");
        trial["ended"] = json!({ "outcome": "reverted", "reason": "not_better", "message": "it is", "generation": 5 });
        assert!(table("m", &trial).ends_with("reverted (not_better): it is\ngeneration 5\n"));
        assert_eq!(table("m", &Value::Null), "m: there was no trial\n");
    }
}
