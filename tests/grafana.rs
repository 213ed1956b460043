//! The dashboard and the alert rules in tools/grafana: they are what their program writes, and ask for nothing that the server
//! does not export.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use ferry::telemetry::family::Kind;
use ferry::telemetry::{ModelLabels, Telemetry};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tools/grafana")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn dashboard_and_rules_are_what_the_table_of_metrics_gives() {
    let done = Command::new("python3").arg(folder().join("generate.py")).arg("--check").output().expect("python3 runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Every expression of the dashboard and of the rules.
fn expressions() -> Vec<String> {
    fn collect(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(members) => {
                for (key, value) in members {
                    match (key.as_str(), value) {
                        ("expr", serde_json::Value::String(expr)) => found.push(expr.clone()),
                        ("query", serde_json::Value::String(query)) if query.contains("ferry_") => {
                            found.push(query.clone())
                        }
                        _ => collect(value, found),
                    }
                }
            }
            serde_json::Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    collect(&serde_json::from_str(&read("ferry.json")).expect("a dashboard is JSON"), &mut found);
    for line in read("alerts.yml").lines() {
        if let Some(expr) = line.trim().strip_prefix("expr: ") {
            found.push(serde_json::from_str(expr).expect("a quoted string, the same in YAML and JSON"));
        }
    }
    found
}

/// Names of series in an expression.
fn names(expression: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts = expression.match_indices("ferry_").map(|(at, _)| at);
    let whole = starts.filter(|at| !expression[..*at].ends_with(is_part));
    whole.map(|at| expression[at..].split(|c| !is_part(c)).next().expect("split gives at least one")).collect()
}

/// Names of series that the server exports, and what they are.
fn exported() -> BTreeMap<String, Kind> {
    let telemetry = Telemetry::new(&[ModelLabels { name: "echo".into(), version: "1".into() }], 1, 1);
    let series = telemetry.families().into_iter().flat_map(|family| {
        let ends: &[&str] = match family.kind {
            Kind::Histogram => &["_bucket", "_sum", "_count"],
            Kind::Counter | Kind::Gauge => &[""],
        };
        ends.iter().map(|end| (format!("{}{end}", family.name()), family.kind)).collect::<Vec<_>>()
    });
    series.collect()
}

#[test]
fn every_query_asks_for_what_the_server_exports() {
    let (exported, expressions) = (exported(), expressions());
    assert!(expressions.len() > 60, "{} expressions were found", expressions.len());
    for expression in &expressions {
        let names = names(expression);
        assert!(!names.is_empty(), "{expression} names no metric");
        for name in names {
            let Some(kind) = exported.get(name) else { panic!("{name} is not exported: {expression}") };
            // What rises is of use as a rate only; what does not, has none.
            let rated =
                expression.contains(&format!("rate({name}")) || expression.contains(&format!("increase({name}"));
            assert_eq!(rated, *kind != Kind::Gauge, "{name} in {expression}");
        }
    }
}

#[test]
fn most_of_what_is_exported_is_on_the_dashboard() {
    let expressions = expressions();
    let asked: BTreeSet<&str> = expressions.iter().flat_map(|expression| names(expression)).collect();
    let families = Telemetry::new(&[], 1, 1).families();
    let of_family = |asked: &str, name: &str| {
        asked.strip_prefix(name).is_some_and(|end| matches!(end, "" | "_bucket" | "_sum" | "_count"))
    };
    let shown = families.iter().filter(|family| asked.iter().any(|asked| of_family(asked, &family.name())));
    let (shown, all) = (shown.count(), families.len());
    assert!(shown * 5 >= all * 4, "{shown} of {all}");
}

#[test]
fn names_are_found_whole_and_only_where_they_begin() {
    assert_eq!(names("rate(ferry_a_total{x=\"y\"}[1m]) / ferry_b"), BTreeSet::from(["ferry_a_total", "ferry_b"]));
    assert!(names("not_ferry_a").is_empty());
}
