//! Policies that change while the server serves, and what it tells about its decisions.

use std::sync::atomic::{AtomicBool, Ordering};

use ferry::server::{Ending, TestHooks};
use serde_json::{Value, json};

use crate::common::{Ask, Event, Numbers, Server, control, floats_of, models_directory, wait_until};

pub fn get(server: &Server, path: &str) -> Value {
    let (status, value) = patiently(|| control(server.control, "GET", path, "", ""));
    assert_eq!(status, 200, "{path}: {value}");
    value
}

pub fn set(server: &Server, model: &str, knobs: Value) -> (u16, Value) {
    let body = json!({ "set": knobs }).to_string();
    control(server.control, "PATCH", &format!("/v1/models/{model}/policy"), "", &body)
}

pub fn knob(policy: &Value, name: &str) -> String {
    let knobs = policy["knobs"].as_array().expect("a list");
    let knob = knobs.iter().find(|knob| knob["name"] == name).unwrap_or_else(|| panic!("no knob {name}"));
    knob["value"].as_str().expect("a text").to_owned()
}

#[test]
fn a_policy_is_shown_changed_and_remembered() {
    let server = Server::start(&[]);
    let policy = get(&server, "/v1/models/queued/policy");
    assert_eq!((policy["generation"].as_u64(), knob(&policy, "rows_max").as_str()), (Some(1), "64"));
    for knob in policy["knobs"].as_array().expect("a list") {
        assert!(["name", "value", "unit", "range", "meaning"].iter().all(|key| knob[key].is_string()), "{knob}");
    }
    let (status, changed) = set(&server, "queued", json!({ "rows_max": 16, "policy": "buckets" }));
    assert_eq!((status, changed["generation"].as_u64()), (200, Some(2)), "{changed}");
    let expected = json!([
        { "knob": "policy", "from": "cost", "to": "buckets" },
        { "knob": "rows_max", "from": "64", "to": "16" },
    ]);
    assert_eq!(changed["changes"], expected);
    let policy = get(&server, "/v1/models/queued/policy");
    assert_eq!((knob(&policy, "rows_max"), knob(&policy, "policy")), ("16".into(), "buckets".into()));
    // Nothing else, and no other model.
    assert_eq!(knob(&policy, "cells_max"), "16384");
    assert_eq!(get(&server, "/v1/models/echo/policy")["generation"], 1);
    // What changes nothing is no change.
    let (status, same) = set(&server, "queued", json!({ "rows_max": "16" }));
    assert_eq!((status, &same["generation"], &same["changes"]), (200, &json!(2), &json!([])));
    let history = get(&server, "/v1/models/queued/policy/history");
    let changes = history["changes"].as_array().expect("a list");
    assert_eq!(changes.len(), 1, "{history}");
    assert_eq!((&changes[0]["by"], &changes[0]["changes"]), (&json!("operator"), &expected));
    assert!(changes[0]["at_unix_ms"].as_u64().expect("a time") > 1_600_000_000_000);
    // Said once a turn, which may come after the answers.
    wait_until("the generation is on the metrics page", || {
        server.metric("ferry_policy_generation", &["model=\"queued\""]) == 2.0
    });
}

#[test]
fn a_change_that_is_wrong_changes_nothing_and_says_what_was_expected() {
    let server = Server::start(&[]);
    for (knobs, said) in [
        (json!({ "row_max": 8 }), "unknown knob `row_max`"),
        (json!({ "rows_max": 8, "hold": -1 }), "hold: expected 0 to 1000, got `-1`"),
        (json!({ "rows_max": 0 }), "rows_max: expected 1 to 65536"),
        (json!({ "rows_max": 65 }), "rows_max: expected at most 64, what the server was started with"),
        (json!({ "cells_max": 16385 }), "cells_max: expected at most 16384"),
        (json!({ "buckets": [8, 512] }), "buckets: expected ascending lengths"),
        (json!({}), "expected {\"set\""),
    ] {
        let (status, answer) = set(&server, "queued", knobs.clone());
        assert_eq!(status, 400, "{knobs}: {answer}");
        assert!(answer["error"].as_str().expect("a sentence").contains(said), "{knobs}: {answer}");
    }
    let (status, answer) = set(&server, "nobody", json!({ "rows_max": 8 }));
    assert_eq!(status, 404);
    assert!(answer["error"].as_str().expect("a sentence").contains("queued"), "{answer}");
    let path = "/v1/models/queued/policy";
    let body = json!({ "set": { "rows_max": "8" } }).to_string();
    let (status, _) = control(server.control, "PUT", path, "Origin: http://elsewhere.example\r\n", &body);
    assert_eq!(status, 403);
    let policy = get(&server, path);
    assert_eq!((&policy["generation"], knob(&policy, "rows_max").as_str()), (&json!(1), "64"));
    assert_eq!(get(&server, "/v1/models/queued/policy/history")["changes"], json!([]));
}

#[test]
fn a_change_that_would_strand_a_waiting_request_is_a_conflict() {
    let server = Server::start(&[]);
    let (status, _) = set(&server, "queued", json!({ "policy": "buckets", "queue_delay_max_us": 60_000_000 }));
    assert_eq!(status, 200);
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    let values = [1.0f32; 12 * 8];
    let waiting = raw.ask(&Ask::new(queued, ferry::vocab::DType::F32, &[12, 8], bytemuck::cast_slice(&values)));
    wait_until("it waits", || server.metric("ferry_queue_rows", &["model=\"queued\""]) == 12.0);
    let (status, answer) = set(&server, "queued", json!({ "rows_max": 11 }));
    assert_eq!(status, 409, "{answer}");
    assert!(answer["error"].as_str().expect("a sentence").contains("12 rows of length 8"), "{answer}");
    // Finer buckets move it, a shorter window lets it go.
    assert_eq!(set(&server, "queued", json!({ "buckets": [8, 1024], "rows_max": 12 })).0, 200);
    let event = raw.recv();
    assert_eq!(event.ends(), Some(waiting), "12 of 12 rows are a full batch");
    assert_eq!(floats_of(&event.expect_result().1), values);
    assert_eq!(set(&server, "queued", json!({ "rows_max": 11 })).0, 200);
    server.wait_until_at_rest();
}

#[test]
fn the_last_sixty_four_changes_are_remembered() {
    let server = Server::start(&[]);
    for change in 0..70u32 {
        let (status, answer) = patiently(|| set(&server, "queued", json!({ "slo_ms": 50 + change })));
        assert_eq!((status, &answer["generation"]), (200, &json!(2 + change)));
    }
    let history = get(&server, "/v1/models/queued/policy/history");
    let changes = history["changes"].as_array().expect("a list");
    assert_eq!(changes.len(), 64);
    assert_eq!((&changes[0]["generation"], &changes[63]["generation"]), (&json!(8), &json!(71)));
}

/// Asks again while the control port says that it is asked too often.
pub fn patiently(ask: impl Fn() -> (u16, Value)) -> (u16, Value) {
    let mut answer = ask();
    wait_until("the control port answers", || {
        if answer.0 == 429 {
            answer = ask();
        }
        answer.0 != 429
    });
    answer
}

/// Goal: no change of a policy loses, repeats or mixes up a request, and generations only rise.
/// Method: four connections keep requests of unequal lengths and rows in flight; meanwhile every knob that moves rows is
/// changed 200 times, for a model on executors and one inline.
#[test]
fn two_hundred_changes_under_load_lose_no_request() {
    const CHANGES: u64 = 200;
    let server = Server::start(&["threads.executors=2"]);
    let changed = AtomicBool::new(false);
    let answered: u64 = std::thread::scope(|scope| {
        let (server, changed) = (&server, &changed);
        let ends = SetOnDrop(changed);
        let clients: Vec<_> = (0..4).map(|seed| scope.spawn(move || converse(server, seed, 4, changed))).collect();
        let mut generations = [1, 1];
        let mut numbers = Numbers(7);
        let (mut made, mut conflicts) = (0, 0);
        while made < CHANGES {
            let at = (numbers.next() % 2) as usize;
            let one_of = |values: &[&str], numbers: &mut Numbers| {
                values[(numbers.next() % values.len() as u64) as usize].to_owned()
            };
            let knobs = json!({
                "policy": one_of(&["window", "greedy_tokens", "buckets", "cost"], &mut numbers),
                "rows_max": one_of(&["4", "9", "33", "64"], &mut numbers),
                "buckets": one_of(&["auto", "geometric", "1024", "8,64,1024", "3,5,9,17,100,1024"], &mut numbers),
                "pad_to": one_of(&["bucket", "longest"], &mut numbers),
                "queue_delay_max_us": one_of(&["auto", "0", "500", "3000"], &mut numbers),
            });
            let (status, answer) = patiently(|| set(server, ["queued", "echo"][at], knobs.clone()));
            match status {
                200 => {
                    let generation = answer["generation"].as_u64().expect("a number");
                    // Equal where a choice happened to be the one in force.
                    let named = answer["changes"].as_array().expect("a list").len();
                    assert_eq!(generation, generations[at] + u64::from(named > 0), "{answer}");
                    generations[at] = generation;
                    made += u64::from(named > 0);
                }
                409 => conflicts += 1,
                _ => panic!("{status}: {answer}"),
            }
        }
        assert_eq!(generations[0] + generations[1], CHANGES + 2);
        assert!(conflicts < 10 * CHANGES, "a conflict passes with the request that waits");
        drop(ends);
        clients.into_iter().map(|client| client.join().expect("every answer is right")).sum()
    });
    assert!(answered > CHANGES, "{answered} requests were answered meanwhile");
    server.wait_until_at_rest();
    // The batches know by which policy they were decided.
    let decisions = get(&server, "/v1/decisions?last=1000");
    let decisions = decisions["decisions"].as_array().expect("a list");
    for model in ["queued", "echo"] {
        let of_model: Vec<u64> = (decisions.iter().filter(|decision| decision["model"] == model))
            .map(|decision| decision["generation"].as_u64().expect("a number"))
            .collect();
        assert!(of_model.is_sorted() && of_model.last() > Some(&1), "{of_model:?}");
    }
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
}

/// Set when it goes, also with a panic: whoever runs until then would otherwise hold up the test that failed, and its message, for ever.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Keeps 24 requests in flight, each of at most `rows_max` rows with values of its own, until told; returns how many were
/// answered, each exactly once with its values.
pub fn converse(server: &Server, seed: u64, rows_max: u64, stop: &AtomicBool) -> u64 {
    let mut raw = server.connect();
    let models = [raw.handle("queued"), raw.handle("echo")];
    let mut numbers = Numbers(seed);
    let mut waiting = std::collections::HashMap::new();
    let mut answered = 0;
    loop {
        while waiting.len() < 24 && !stop.load(Ordering::Acquire) {
            let (rows, len) = (1 + numbers.next() % rows_max, 1 + numbers.next() % 40);
            let mark = (numbers.next() % 1_000_000) as f32;
            let values: Vec<f32> = (0..rows * len).map(|at| mark + at as f32).collect();
            let model = models[(numbers.next() % 2) as usize];
            let dims = [rows as u32, len as u32];
            let ask = Ask::new(model, ferry::vocab::DType::F32, &dims, bytemuck::cast_slice(&values));
            waiting.insert(raw.ask(&ask), values);
        }
        if waiting.is_empty() {
            return answered;
        }
        match raw.recv() {
            Event::Result { id, payload, .. } => {
                let expected = waiting.remove(&id).expect("each is answered once");
                assert_eq!(floats_of(&payload), expected, "request {id} has another's values");
                answered += 1;
            }
            other => panic!("expected a result, got {other:?}"),
        }
    }
}

#[test]
fn what_was_learned_and_decided_is_shown() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    for len in 1..=60 {
        raw.round(&Ask::floats(queued, &vec![0.5; len])).expect_result();
    }
    let decisions = get(&server, "/v1/decisions?last=5");
    let decisions = decisions["decisions"].as_array().expect("a list");
    assert_eq!(decisions.len(), 5);
    assert_eq!((&decisions[4]["verdict"], &decisions[4]["model"]), (&json!("sealed"), &json!("queued")));
    assert_eq!((&decisions[4]["rows"], &decisions[4]["generation"]), (&json!(1), &json!(1)));
    assert!(decisions.is_sorted_by(|a, b| a["at_us"].as_u64() <= b["at_us"].as_u64()));
    assert_eq!(control(server.control, "GET", "/v1/decisions?last=1001", "", "").0, 400);

    let cost = get(&server, "/v1/models/queued/cost");
    assert!(cost["observations"].as_u64().expect("a number") >= 60, "{cost}");
    assert_eq!(cost["known"], true);
    assert!(cost["coefficients"]["batch_us"].as_f64().expect("a number") >= 0.0);
    let executors = cost["executors"].as_array().expect("a list");
    let batches: u64 = executors.iter().map(|one| one["observations"].as_u64().expect("a number")).sum();
    assert!((20..=60).contains(&batches), "those behind the first twenty: {executors:?}");
    assert!(executors.iter().all(|one| one["pace"].as_f64().expect("a factor") > 0.0), "{executors:?}");
    let grid = cost["predicted"].as_array().expect("a list");
    assert!((10..=30).contains(&grid.len()), "{} shapes", grid.len());
    assert!(grid.iter().all(|shape| shape["predicted_us"].as_f64().expect("a number") > 0.0), "{grid:?}");

    let lengths = get(&server, "/v1/models/queued/lengths");
    assert_eq!(lengths["rows"], 60.0);
    let best = lengths["best"].as_array().expect("a list");
    assert_eq!(best.len(), 16);
    let ratios: Vec<f64> = best.iter().map(|best| best["padding_ratio"].as_f64().expect("a share")).collect();
    assert!(ratios.is_sorted_by(|a, b| a >= b), "{ratios:?}");
    assert!(lengths["now"]["padding_ratio"].as_f64().expect("a share") > ratios[7], "eight powers of two");
    assert_eq!(server.metric("ferry_decisions_total", &[]), 0.0);
    assert!(server.metric("ferry_cost_model_error_ratio", &["model=\"queued\""]) > 0.0);
    server.wait_until_at_rest();
}

/// Goal: who sets knobs is told what comes of them. Method: a window that one caller, who waits for each answer, cannot fill, and
/// that is longer than a request may take.
#[test]
fn what_a_policy_can_reach_and_what_contradicts_it_is_told() {
    let server = Server::start(&["frontend.credit_requests=20"]);
    let path = "/v1/models/queued/findings";
    let codes = |value: &Value| -> Vec<String> {
        let findings = value["findings"].as_array().expect("a list");
        findings.iter().map(|finding| finding["code"].as_str().expect("a code").to_owned()).collect()
    };
    let before = get(&server, path);
    assert_eq!((codes(&before), &before["attainable"]), (Vec::new(), &Value::Null), "nobody has asked for anything");
    let knobs = json!({ "policy": "window", "queue_delay_max_us": 2000, "slo_ms": 1 });
    assert_eq!(set(&server, "queued", knobs).0, 200);
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    for _ in 0..25 {
        raw.round(&Ask::floats(queued, &[0.5; 10])).expect_result();
    }
    let found = get(&server, path);
    let observed = &found["observed"];
    assert_eq!((&found["model"], &found["generation"]), (&json!("queued"), &json!(2)));
    assert_eq!((&observed["batches"], &observed["close_reasons"]), (&json!(25), &json!({ "queue_delay": 25 })));
    assert_eq!(observed["in_flight_rows_max"], 20);
    assert_eq!(found["closed_mostly"], json!({ "reason": "queue_delay", "share": 1.0 }));
    assert_eq!(found["attainable"]["rows_possible"], 64.0);
    assert_eq!(codes(&found), ["window_never_fills", "rows_max_above_in_flight", "delay_above_slo"]);

    let addr = server.control.to_string();
    let (status, out, _) = ferry(&["set", "queued", "--control", &addr]);
    assert!(status == Some(0) && out.contains("of the 64.0 rows that fit"), "{out}");
    assert!(out.contains("rows_max is 64, but callers can have at most 20 rows in flight [change rows_max]"), "{out}");
    let (_, out, _) = ferry(&["set", "queued", "--json", "--control", &addr]);
    let shown: Value = serde_json::from_str(&out).expect("one JSON document");
    assert_eq!((codes(&shown), &shown["generation"]), (codes(&found), &json!(2)));
}

#[test]
fn buckets_that_are_left_to_the_server_are_chosen_and_shown() {
    let server = Server::start(&[]);
    let (status, answer) = set(&server, "queued", json!({ "buckets": "auto", "shapes_max": 5 }));
    assert_eq!(status, 200, "{answer}");
    let policy = get(&server, "/v1/models/queued/policy");
    assert_eq!(knob(&policy, "buckets"), "auto");
    let buckets = policy["buckets"].as_array().expect("a list");
    assert_eq!((buckets.len(), &buckets[4]), (5, &json!(1024)));
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    raw.round(&Ask::floats(queued, &[1.0; 1024])).expect_result();
    let (status, answer) = set(&server, "queued", json!({ "buckets": "16,1024" }));
    assert_eq!((status, &answer["changes"][0]["from"]), (200, &json!("auto")));
}

#[test]
fn questions_beyond_the_rate_are_refused_and_changes_are_not() {
    let server = Server::start(&[]);
    let statuses: Vec<u16> = (0..60).map(|_| control(server.control, "GET", "/v1/decisions", "", "").0).collect();
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert!(statuses[..20].iter().all(|status| *status == 200));
    assert_eq!(set(&server, "queued", json!({ "slo_ms": 77 })).0, 200);
}

/// What `ferry` says, and its exit status.
pub fn ferry(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ferry")).args(arguments).output().expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn ferry_set_shows_and_changes_knobs() {
    let server = Server::start(&[]);
    let addr = server.control.to_string();
    let (status, out, _) = ferry(&["set", "queued", "--control", &addr]);
    assert_eq!(status, Some(0));
    assert!(out.starts_with("queued, generation 1\n") && out.contains("queue_delay_max_us"), "{out}");
    let set = ["set", "queued", "rows_max=16", "queue_delay_max_us=250", "--control", &addr];
    let (status, out, _) = ferry(&set);
    assert_eq!((status, out.as_str()), (Some(0), "rows_max: 64 -> 16\nqueue_delay_max_us: 0 -> 250\ngeneration 2\n"));
    let (status, _, err) = ferry(&["set", "queued", "rows_max=0", "--control", &addr]);
    assert_eq!(status, Some(2));
    assert!(err.contains("rows_max: expected 1 to 65536, got `0`"), "{err}");
    assert_eq!(ferry(&["set", "nobody", "--control", &addr]).0, Some(2));
    assert_eq!(ferry(&["set", "queued", "rows_max", "--control", &addr]).0, Some(2));
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
    assert_eq!(ferry(&["set", "queued", "--control", &addr]).0, Some(1), "nobody listens any more");
}

/// Goal: a restart goes on with what was learned, and a bad file costs a line in the log and nothing else.
/// Method: serve, drain, serve again from the same directory; then with a damaged file.
#[test]
fn what_was_learned_outlives_the_server() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let state = format!("state={}", toml::Value::String(directory.path().display().to_string()));
    let observations = |server: &Server| {
        let cost = get(server, "/v1/models/digits/cost");
        cost["observations"].as_u64().expect("a number")
    };
    let server = Server::start(&[&state]);
    assert!(observations(&server) >= 1, "from the warm-up");
    let mut raw = server.connect();
    let digits = raw.handle("digits");
    let image = Ask::new(digits, ferry::vocab::DType::F32, &[1, 8, 8], bytemuck::cast_slice(&[1.0f32; 64]));
    // Some more than are asked for below: an answer is there before its batch is learned from, and the drain may be, too.
    for _ in 0..60 {
        raw.round(&image).expect_result();
    }
    drop(raw);
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
    let file = directory.path().join("digits/1/cost.toml");
    let text = std::fs::read_to_string(&file).expect("it was kept");
    assert!(text.contains("format = 2\nmodel = \"digits\"\nversion = \"1\"\nweights_sha256 = \"9275"), "{text}");
    for (text, resumed) in [(text.clone(), true), (text.replace("format = 2", "form = 2"), false)] {
        std::fs::write(&file, text).expect("writes");
        // Without a warm-up: on a machine that is busy with other tests its times may well contradict what was learned, and then
        // the server rightly learns anew (`learned::agrees` has tests of its own).
        let models = models_directory();
        let manifest = models.path().join("digits/model.toml");
        let text = std::fs::read_to_string(&manifest).expect("reads");
        std::fs::write(&manifest, text.replace("rows = [1, 32]", "rows = []")).expect("writes");
        let server = Server::start_in(models, &[&state], TestHooks::default());
        let observed = observations(&server);
        assert!(if resumed { observed > 50 } else { observed == 0 }, "{observed} observations");
        server.drain();
        assert_eq!(server.ending(), Ending::Drained);
    }
}
