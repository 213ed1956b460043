//! `ferry set`: a model's knobs, shown and changed while the server runs.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::http;
use super::load::{failed, resolve, wrong_use};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    model: String,
    /// Knobs to set, all of them or none; without any, the table of knobs is printed.
    #[arg(value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The server's control address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601")]
    control: String,
    /// Prints one JSON document.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> ExitCode {
    let addr = match resolve(&args.control) {
        Ok(addr) => addr,
        Err(message) => return wrong_use(&message),
    };
    let mut set = serde_json::Map::new();
    for pair in &args.set {
        let Some((key, value)) = pair.split_once('=') else {
            return wrong_use(&format!("expected key=value, such as queue_delay_max_us=500, got {pair:?}"));
        };
        if set.insert(key.trim().to_owned(), value.trim().into()).is_some() {
            return wrong_use(&format!("{} is set twice", key.trim()));
        }
    }
    let path = format!("/v1/models/{}/policy", http::segment(&args.model));
    let shows = set.is_empty();
    let answer = match shows {
        true => http::request(addr, "GET", &path, None),
        false => http::request(addr, "PATCH", &path, Some(&json!({ "set": set }))),
    };
    match answer {
        // A server that finds nothing, or does not know how to look, has shown its knobs all the same.
        Ok((200, mut answer)) if shows => {
            let path = format!("/v1/models/{}/findings", http::segment(&args.model));
            let found = http::request(addr, "GET", &path, None);
            let found = found.ok().filter(|(status, _)| *status == 200).map_or(Value::Null, |(_, found)| found);
            if args.json {
                for key in ["observed", "attainable", "closed_mostly", "findings"] {
                    answer[key] = found[key].clone();
                }
                println!("{}", serde_json::to_string_pretty(&answer).expect("plain data"));
            } else {
                print!("{}{}", table(&answer), findings(&found));
            }
            ExitCode::SUCCESS
        }
        Ok((200, answer)) if args.json => {
            println!("{}", serde_json::to_string_pretty(&answer).expect("plain data"));
            ExitCode::SUCCESS
        }
        Ok((200, answer)) => {
            print!("{}", changes(&answer));
            ExitCode::SUCCESS
        }
        Ok((status @ (400 | 404), answer)) => wrong_use(&format!("{} ({status})", text(&answer["error"]))),
        Ok((status, answer)) => failed(&format!("{} ({status})", text(&answer["error"]))),
        Err(message) => failed(&message),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Each knob with its value, unit, range and meaning.
fn table(answer: &Value) -> String {
    let knobs = list(&answer["knobs"]);
    let width = |key: &str| knobs.iter().map(|knob| text(&knob[key]).chars().count()).max().unwrap_or(0);
    let (names, values) = (width("name"), width("value").min(24));
    let mut table = format!("{}, generation {}\n", text(&answer["model"]), answer["generation"]);
    for knob in knobs {
        let [name, value, unit, range, meaning] =
            ["name", "value", "unit", "range", "meaning"].map(|key| text(&knob[key]));
        let unit = if unit.is_empty() { String::new() } else { format!("{unit}: ") };
        table += &format!("  {name:<names$}  {value:<values$}  {meaning} [{unit}{range}]\n");
    }
    let buckets: Vec<String> = list(&answer["buckets"]).iter().map(Value::to_string).collect();
    table + &format!("  buckets in force: {}\n", buckets.join(","))
}

/// What batches can reach, what closes them, and what to look at.
fn findings(answer: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let mut lines = String::new();
    let attainable = &answer["attainable"];
    if attainable.is_object() {
        lines += &format!(
            "  at {:.1} rows a second batches can have {:.1} of the {:.1} rows that fit ({:.0} %)\n",
            number(&attainable["rows_per_second"]),
            number(&attainable["rows"]),
            number(&attainable["rows_possible"]),
            100.0 * number(&attainable["fill_ratio"])
        );
    }
    let mostly = &answer["closed_mostly"];
    if mostly.is_object() {
        let share = 100.0 * number(&mostly["share"]);
        let batches = &answer["observed"]["batches"];
        lines +=
            &format!("  {share:.0} % of the last {batches} batches were closed for: {}\n", text(&mostly["reason"]));
    }
    for finding in list(&answer["findings"]) {
        let [code, message, knob] = ["code", "message", "knob"].map(|key| text(&finding[key]));
        lines += &format!("  {code}: {message} [change {knob}]\n");
    }
    lines
}

/// Old and new values, and the generation.
fn changes(answer: &Value) -> String {
    let changes = list(&answer["changes"]);
    let mut lines = String::new();
    for change in changes {
        let [knob, from, to] = ["knob", "from", "to"].map(|key| text(&change[key]));
        lines += &format!("{knob}: {from} -> {to}\n");
    }
    if changes.is_empty() {
        lines += "nothing changed\n";
    }
    lines + &format!("generation {}\n", answer["generation"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_with_old_and_new_values() {
        let answer = json!({ "generation": 3, "changes": [{ "knob": "rows_max", "from": "8", "to": "4" }] });
        assert_eq!(changes(&answer), "rows_max: 8 -> 4\ngeneration 3\n");
        assert_eq!(changes(&json!({ "generation": 3, "changes": [] })), "nothing changed\ngeneration 3\n");
    }

    #[test]
    fn what_was_found_is_told_below_the_table() {
        assert_eq!(findings(&Value::Null), "", "of a server that does not look");
        let answer = json!({
            "observed": { "batches": 812 },
            "attainable": { "rows_per_second": 120.0, "rows": 1.24, "rows_possible": 32.0, "fill_ratio": 0.039 },
            "closed_mostly": { "reason": "queue_delay", "share": 0.97 },
            "findings": [{ "code": "delay_above_slo", "message": "it is", "knob": "slo_ms" }],
        });
        let expected = "  at 120.0 rows a second batches can have 1.2 of the 32.0 rows that fit (4 %)\n  \
                        97 % of the last 812 batches were closed for: queue_delay\n  \
                        delay_above_slo: it is [change slo_ms]\n";
        assert_eq!(findings(&answer), expected);
    }

    #[test]
    fn the_table_has_a_line_for_each_knob() {
        let knob = json!({ "name": "slo_ms", "value": "100", "unit": "ms", "range": "1 to 2", "meaning": "slack" });
        let answer = json!({ "model": "m", "generation": 1, "buckets": [8, 16], "knobs": [knob] });
        assert_eq!(table(&answer), "m, generation 1\n  slo_ms  100  slack [ms: 1 to 2]\n  buckets in force: 8,16\n");
    }
}
