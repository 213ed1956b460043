//! `tests/faults.toml` says which test is whose case. It cannot rot: every case is there, and every test that it names exists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

/// What is done about a case. At least one of these.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    what: String,
    /// Tests by name, which run on every change.
    #[serde(default)]
    tests: Vec<String>,
    /// Scripts and benches beside them, by path.
    #[serde(default)]
    scripts: Vec<String>,
    /// Why there is no test yet, or what is missing from those there are.
    #[serde(default)]
    pending: Option<String>,
    /// Why there is none by design.
    #[serde(default)]
    instead: Option<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn map() -> BTreeMap<String, Case> {
    let text = std::fs::read_to_string(root().join("tests/faults.toml")).expect("tests/faults.toml is there");
    toml::from_str(&text).unwrap_or_else(|error| panic!("tests/faults.toml: {error}"))
}

/// Names of all tests in the sources.
fn tests_of_the_sources() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut folders = vec![root().join("src"), root().join("tests")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a readable folder") {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("sources are text");
                names.extend(tests_in(&text));
            }
        }
    }
    names
}

/// Functions that `#[test]` stands before, with other attributes or comments between.
fn tests_in(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim_start) {
        if line.starts_with("#[test]") {
            is_test = true;
        } else if let Some(rest) = line.strip_prefix("fn ") {
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            names.extend(is_test.then_some(name));
            is_test = false;
        }
    }
    names
}

/// What is wrong with a map.
fn wrong_with(map: &BTreeMap<String, Case>, tests: &BTreeSet<String>) -> Vec<String> {
    let expected: Vec<String> =
        (1..=95).map(|n| format!("F{n:02}")).chain((1..=15).map(|n| format!("C{n:02}"))).collect();
    let mut wrong = Vec::new();
    wrong.extend(expected.iter().filter(|id| !map.contains_key(*id)).map(|id| format!("{id} is missing")));
    wrong.extend(map.keys().filter(|id| !expected.contains(id)).map(|id| format!("{id} is no case")));
    for (id, case) in map {
        if case.tests.is_empty() && case.scripts.is_empty() && case.pending.is_none() && case.instead.is_none() {
            wrong.push(format!("{id} says neither a test nor why there is none"));
        }
        if case.what.is_empty() {
            wrong.push(format!("{id} does not say what it is"));
        }
        wrong.extend(
            case.tests.iter().filter(|name| !tests.contains(*name)).map(|name| format!("{id}: no test {name}")),
        );
        let is_missing = |script: &&String| !root().join(script).exists();
        wrong.extend(case.scripts.iter().filter(is_missing).map(|script| format!("{id}: no file {script}")));
    }
    wrong
}

#[test]
fn every_case_has_its_tests_and_every_test_that_is_named_exists() {
    assert_eq!(wrong_with(&map(), &tests_of_the_sources()), [] as [String; 0]);
}

#[test]
fn a_map_that_has_rotted_is_found() {
    let tests = tests_of_the_sources();
    let wrong = |change: &dyn Fn(&mut BTreeMap<String, Case>)| {
        let mut map = map();
        change(&mut map);
        wrong_with(&map, &tests)
    };
    assert_eq!(wrong(&|map| drop(map.remove("F15"))), ["F15 is missing"]);
    assert_eq!(
        wrong(&|map| drop(
            map.insert("F96".into(), Case { what: "new".into(), pending: Some("now".into()), ..Case::default() })
        )),
        ["F96 is no case"]
    );
    assert_eq!(
        wrong(&|map| map.get_mut("F15").expect("it is there").tests.push("a_test_that_was_renamed".into())),
        ["F15: no test a_test_that_was_renamed"]
    );
    let empty = || Case { what: "nothing".into(), ..Case::default() };
    assert_eq!(
        wrong(&|map| drop(map.insert("F15".into(), empty()))),
        ["F15 says neither a test nor why there is none"]
    );
}

#[test]
fn the_first_twenty_five_have_tests_or_say_what_they_wait_for() {
    const FIRST: [u32; 25] =
        [5, 7, 8, 9, 15, 18, 21, 22, 24, 25, 31, 32, 35, 36, 41, 43, 50, 52, 55, 56, 57, 70, 78, 84, 89];
    let map = map();
    for id in FIRST.map(|n| format!("F{n:02}")) {
        let case = &map[&id];
        assert!(!case.tests.is_empty() || case.pending.is_some(), "{id}");
    }
}
