//! `ferry shadow`: what other settings would have made of the requests that come, beside what the present ones make of them.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::http;
use super::load::{failed, resolve, wrong_use};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    model: String,
    /// A setting to look at: knobs as `ferry set` takes them, such as --set policy=window,queue_delay_max_us=20000. Each --set is
    /// a setting of its own; they take the place of those before. Without any, what has been found is shown.
    #[arg(long = "set", value_name = "KEY=VALUE[,KEY=VALUE]…", conflicts_with = "clear")]
    sets: Vec<String>,
    /// Look at no setting any more.
    #[arg(long)]
    clear: bool,
    /// Show what is found, again and again, until interrupted.
    #[arg(long, conflicts_with = "clear")]
    watch: bool,
    /// The server's control address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601")]
    control: String,
    /// Prints one JSON document.
    #[arg(long, conflicts_with = "watch")]
    json: bool,
}

/// Between two looks of --watch.
const LOOK: Duration = Duration::from_secs(2);

pub fn run(args: &Args) -> ExitCode {
    let addr = match resolve(&args.control) {
        Ok(addr) => addr,
        Err(message) => return wrong_use(&message.replace("--addr", "--control")),
    };
    let path = format!("/v1/models/{}/shadow", http::segment(&args.model));
    let settings: Result<Vec<Value>, String> = args.sets.iter().map(|set| knobs_of(set)).collect();
    let mut answer = match settings {
        Err(message) => return wrong_use(&message),
        Ok(settings) if settings.is_empty() && !args.clear => http::request(addr, "GET", &path, None),
        Ok(settings) => http::request(addr, "PUT", &path, Some(&json!({ "settings": settings }))),
    };
    loop {
        match answer {
            Ok((200, answer)) if args.json => {
                println!("{}", serde_json::to_string_pretty(&answer).expect("plain data"));
            }
            Ok((200, answer)) => {
                if args.watch && std::io::stdout().is_terminal() {
                    // Clears the screen.
                    print!("\x1b[2J\x1b[H");
                }
                print!("{}", table(&answer));
            }
            Ok((status @ (400 | 404), answer)) => {
                return wrong_use(&format!("{} ({status})", text(&answer["error"])));
            }
            // Asked too often, by others too: later.
            Ok((429, _)) if args.watch => {}
            Ok((status, answer)) => return failed(&format!("{} ({status})", text(&answer["error"]))),
            Err(message) => return failed(&message),
        }
        if !args.watch {
            return ExitCode::SUCCESS;
        }
        std::thread::sleep(LOOK);
        answer = http::request(addr, "GET", &path, None);
    }
}

/// `a=1,b=2`. A piece without `=` goes on with the value before: buckets=16,32,hold=1 are two knobs.
fn knobs_of(text: &str) -> Result<Value, String> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for piece in text.split(',') {
        match (piece.split_once('='), pairs.last_mut()) {
            (Some((key, value)), _) => pairs.push((key.trim().to_owned(), value.trim().to_owned())),
            (None, Some((_, value))) => {
                value.push(',');
                value.push_str(piece.trim());
            }
            (None, None) => return Err(format!("expected key=value[,key=value]…, such as hold=0, got {text:?}")),
        }
    }
    let mut set = serde_json::Map::new();
    for (key, value) in pairs {
        if set.insert(key.clone(), value.into()).is_some() {
            return Err(format!("{key} is set twice in {text:?}"));
        }
    }
    Ok(set.into())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

fn name_of(set: &Value) -> String {
    let pairs = set.as_object().into_iter().flatten().map(|(knob, value)| format!("{knob}={}", text(value)));
    pairs.collect::<Vec<_>>().join(",")
}

const HEADS: [&str; 7] = ["p50 ms", "p99 ms", "fill %", "waste %", "on time %", "rows/batch", "answered"];

fn row(name: &str, width: usize, figures: &Value) -> String {
    let number = |value: &Value, scale: f64, digits: usize| {
        value.as_f64().map_or("-".to_owned(), |value| format!("{:.digits$}", value * scale))
    };
    let cells = [
        number(&figures["queue_and_run_us"]["p50"], 1e-3, 3),
        number(&figures["queue_and_run_us"]["p99"], 1e-3, 3),
        number(&figures["fill"], 100.0, 1),
        number(&figures["waste"], 100.0, 1),
        number(&figures["on_time"], 100.0, 2),
        number(&figures["batch_rows"], 1.0, 2),
        number(&figures["answered"], 1.0, 0),
    ];
    let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:>11}")).collect();
    format!("  {name:<width$}{}\n", cells.concat())
}

fn table(answer: &Value) -> String {
    let list = |key: &str| answer[key].as_array().map_or(&[][..], Vec::as_slice);
    let model = text(&answer["model"]);
    let shadows = list("shadows");
    let mut lines = match (shadows.is_empty(), answer["window"].as_object()) {
        (true, _) => format!("{model}: no setting is looked at\n"),
        (false, None) => format!("{model}: the first stretch is not over yet\n"),
        (false, Some(window)) => {
            let seconds = |key: &str| window[key].as_f64().unwrap_or(0.0);
            format!(
                "{model}: the last {:.0} s, of which {} stretches cover {:.0}\n",
                seconds("seconds"),
                window["stretches"],
                seconds("covered_seconds")
            )
        }
    };
    let names: Vec<String> = shadows.iter().map(|shadow| name_of(&shadow["set"])).collect();
    let width = names.iter().map(String::len).max().unwrap_or(0).max("simulated as is".len());
    if !shadows.is_empty() {
        let heads: Vec<String> = HEADS.iter().map(|head| format!("{head:>11}")).collect();
        lines += &format!("  {:<width$}{}\n", "", heads.concat());
        lines += &row("real", width, &answer["real"]);
        lines += &row("simulated as is", width, &answer["simulated_as_is"]);
    }
    for (name, shadow) in names.iter().zip(shadows) {
        lines += &match shadow["error"].as_str() {
            Some(error) => format!("  {name:<width$}  {error}\n"),
            None => row(name, width, &shadow["figures"]),
        };
    }
    let count = |key: &str| answer[key].as_u64().unwrap_or(0);
    let apart = [("lost_stretches", "lost"), ("mixed_stretches", "with a change of policy")];
    for (key, what) in apart.iter().filter(|(key, _)| count(key) > 0) {
        lines += &format!("  stretches {what}: {}\n", count(key));
    }
    if let Some(trouble) = answer["trouble"].as_str() {
        lines += &format!("  {trouble}\n");
    }
    let switch = &answer["last_switch"];
    if switch.is_object() {
        let errors = switch["errors"].as_object().into_iter().flatten();
        let errors: Vec<String> =
            errors.map(|(what, error)| format!("{what} {:.1} %", 100.0 * error.as_f64().unwrap_or(0.0))).collect();
        let seconds = switch["covered_seconds"].as_f64().unwrap_or(0.0);
        let name = name_of(&switch["set"]);
        lines +=
            &format!("last switch, to {name}: over {seconds:.0} s the prediction was off by {}\n", errors.join(", "));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_knobs_with_commas_between_and_within() {
        let set = knobs_of("policy=buckets,buckets=16,32,128,hold=0.5").expect("three knobs");
        assert_eq!(set, json!({ "policy": "buckets", "buckets": "16,32,128", "hold": "0.5" }));
        assert!(knobs_of("16,a=b").is_err() && knobs_of("a=1,a=2").is_err());
    }

    #[test]
    fn runs_stand_side_by_side() {
        let figures = |p50: f64| {
            json!({ "queue_and_run_us": { "p50": p50, "p99": 9000.0 }, "fill": 0.5, "waste": null, "on_time": 1.0,
                    "batch_rows": 2.5, "answered": 700 })
        };
        let answer = json!({
            "model": "m",
            "window": { "seconds": 43.0, "covered_seconds": 40.0, "stretches": 4 },
            "real": figures(1000.0), "simulated_as_is": figures(1100.0),
            "shadows": [
                { "set": { "hold": "0", "policy": "cost" }, "figures": figures(2000.0) },
                { "set": { "rows_max": "9" }, "error": "it cannot be" },
            ],
            "lost_stretches": 1, "mixed_stretches": 0, "trouble": null,
            "last_switch": { "set": { "hold": "0" }, "covered_seconds": 40.0, "errors": { "p50": 0.081, "p99": 0.2 } },
        });
        let expected = "\
m: the last 43 s, of which 4 stretches cover 40
                       p50 ms     p99 ms     fill %    waste %  on time % rows/batch   answered
  real                  1.000      9.000       50.0          -     100.00       2.50        700
  simulated as is       1.100      9.000       50.0          -     100.00       2.50        700
  hold=0,policy=cost      2.000      9.000       50.0          -     100.00       2.50        700
  rows_max=9          it cannot be
  stretches lost: 1
last switch, to hold=0: over 40 s the prediction was off by p50 8.1 %, p99 20.0 %
";
        let shown = table(&answer);
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(squeezed(&shown), squeezed(expected));
        let widths: Vec<usize> = shown.lines().skip(1).take(4).map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "columns stand below each other: {shown}");
        assert_eq!(table(&json!({ "model": "m", "shadows": [] })), "m: no setting is looked at\n");
    }
}
