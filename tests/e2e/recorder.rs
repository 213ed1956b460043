//! The flight recorder: what became of the last batches, asked for, kept by itself, and told by `ferry explain` and `ferry timeline`.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use ferry::vocab::{Code, DType};
use ferry::wire::message::INFER_RECEIPT;

use crate::common::{Ask, Event, Server, control, models_directory, wait_until};

fn get(server: &Server, path: &str) -> Value {
    let (status, value) = control(server.control, "GET", path, "", "");
    assert_eq!(status, 200, "{path}: {value}");
    value
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("no {key} in {value}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Runs the binary: status, standard output.
fn ferry(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_ferry")).args(arguments).output().expect("the binary runs");
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("text"));
    (output.status.code(), text[if text[0].is_empty() { 1 } else { 0 }].clone())
}

/// Three batches of `sleep`, the second the slowest, with a batch of echo between.
fn traffic(server: &Server) {
    let mut raw = server.connect();
    let (sleep, echo) = (raw.handle("sleep"), raw.handle("echo"));
    for micros in [1_000, 40_000, 2_000] {
        raw.round(&Ask::word(sleep, micros)).expect_result();
        raw.round(&Ask::floats(echo, &[1.0, 2.0])).expect_result();
    }
    // A shard says that it has answered after it has.
    wait_until("all answers are known", || {
        list(&get(server, "/v1/batches"), "batches").iter().all(|batch| batch["answered_at_us"].is_number())
    });
}

fn parts_of(story: &Value) -> f64 {
    let times = &story["times_us"];
    ["admit", "queue", "pack", "wait", "run", "scatter"].iter().map(|part| number(&times[*part])).sum()
}

#[test]
fn the_last_batches_and_the_slowest_requests_can_be_asked_for() {
    let server = Server::start(&[]);
    traffic(&server);
    let answer = get(&server, "/v1/batches?last=5");
    let batches = list(&answer, "batches");
    assert_eq!(
        batches.iter().map(|batch| batch["batch"].as_u64()).collect::<Vec<_>>(),
        (2..=6).map(Some).collect::<Vec<_>>()
    );
    for batch in batches {
        let stages = ["sealed_at_us", "packed_at_us", "started_at_us", "finished_at_us", "answered_at_us"];
        let stages: Vec<f64> = stages.iter().map(|stage| number(&batch[*stage])).collect();
        assert!(stages.is_sorted(), "{batch}");
        let story = &batch["oldest"];
        assert!((parts_of(story) - number(&story["times_us"]["total"])).abs() < 0.01, "{story}");
    }
    let answer = get(&server, "/v1/requests?slowest=2");
    assert_eq!(answer["among_batches"], 6);
    let slowest = list(&answer, "requests");
    assert_eq!(slowest.len(), 2);
    assert_eq!((&slowest[0]["model"], &slowest[0]["batch"]), (&json!("sleep"), &json!(3)));
    assert!(number(&slowest[0]["times_us"]["run"]) >= 40_000.0, "{}", slowest[0]);
    assert!(number(&slowest[0]["times_us"]["total"]) >= number(&slowest[1]["times_us"]["total"]));
    assert_eq!(list(&get(&server, "/v1/requests?slowest=9&last=1"), "requests").len(), 1);
    for wrong in ["/v1/batches?last=1001", "/v1/requests?slowest=101", "/v1/timeline?seconds=0"] {
        assert_eq!(control(server.control, "GET", wrong, "", "").0, 400, "{wrong}");
    }
}

#[test]
fn the_timeline_has_a_track_for_each_executor_and_all_batches() {
    let server = Server::start(&[]);
    traffic(&server);
    let timeline = get(&server, "/v1/timeline");
    let events = list(&timeline, "traceEvents");
    let named: Vec<&Value> =
        events.iter().filter(|event| event["ph"] == "M").map(|event| &event["args"]["name"]).collect();
    // One thread runs sleep, the batcher's own runs echo.
    for track in ["ferry", "batcher", "executor 0", "executor 1", "requests 1"] {
        assert!(named.contains(&&json!(track)), "no {track} among {named:?}");
    }
    let runs: Vec<&Value> = events.iter().filter(|event| event["cat"] == "batch").collect();
    assert_eq!(runs.len(), 6);
    assert_eq!(events.iter().filter(|event| event["cat"] == "request").count(), 6);
    assert!(runs.iter().all(|run| run["args"]["outcome"] == "ok"));
    assert_eq!(list(&get(&server, "/v1/timeline?seconds=600"), "traceEvents").len(), events.len());
}

#[test]
fn a_recorder_that_is_off_keeps_nothing() {
    let server = Server::start(&["recorder.batches=0"]);
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    raw.round(&Ask::floats(echo, &[1.0])).expect_result();
    assert!(list(&get(&server, "/v1/batches"), "batches").is_empty());
    assert!(list(&get(&server, "/v1/requests"), "requests").is_empty());
    assert_eq!(get(&server, "/v1/timeline")["otherData"]["batches"], 0);
}

/// Why the timelines in a directory were kept; only whole ones have this name.
fn kept(directory: &Path) -> Vec<Value> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.map(|entry| entry.expect("lists").path());
    let json = paths.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    // The oldest goes when there are too many: perhaps between our look and our read.
    json.filter_map(|path| std::fs::read(path).ok()).map(|text| serde_json::from_slice(&text).expect("JSON")).collect()
}

#[test]
fn a_panic_and_a_missed_objective_keep_the_recorder_by_themselves() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = format!("recorder.directory={}", toml::Value::String(directory.path().display().to_string()));
    let server = Server::start(&[&at, "recorder.breach=request", "recorder.interval_ms=0", "recorder.files_max=2"]);
    let mut raw = server.connect();
    let (faulty, sleep) = (raw.handle("faulty"), raw.handle("sleep"));
    raw.round(&Ask::word(faulty, 0)).expect_result();
    assert!(kept(directory.path()).is_empty(), "nothing is wrong");
    raw.round(&Ask::word(faulty, 1)).expect_error(Code::ExecutorFailed);
    wait_until("the panic is kept", || kept(directory.path()).len() == 1);
    let timeline = &kept(directory.path())[0];
    assert_eq!(timeline["otherData"]["why"], "panic: faulty");
    let outcomes = list(timeline, "traceEvents").iter().filter(|event| event["cat"] == "batch");
    let outcomes: Vec<&Value> = outcomes.map(|event| &event["args"]["outcome"]).collect();
    assert_eq!(outcomes, ["ok", "panicked"]);
    let (status, _) =
        control(server.control, "PATCH", "/v1/models/sleep/policy", "", &json!({ "set": { "slo_ms": 5 } }).to_string());
    assert_eq!(status, 200);
    raw.round(&Ask::word(sleep, 30_000)).expect_result();
    let is_kept = |why: &str| kept(directory.path()).iter().any(|timeline| timeline["otherData"]["why"] == why);
    wait_until("the missed objective is kept", || is_kept("slo: sleep"));
    // No more than two, the oldest first.
    raw.round(&Ask::word(sleep, 30_000)).expect_result();
    wait_until("the oldest has gone", || !is_kept("panic: faulty"));
    assert!(kept(directory.path()).len() <= 2);
    server.wait_until_at_rest();
}

/// The newest file with this ending.
fn newest(directory: &Path, ending: &str) -> Option<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).ok()?;
    let paths = entries.map(|entry| entry.expect("lists").path());
    paths.filter(|path| path.to_string_lossy().ends_with(ending)).max()
}

/// Goal: what led to an incident can be decided again. Method: traffic of several models, more than a small trace holds, so that
/// traces follow one another; then a panic; both traces of its dump are replayed.
#[test]
fn what_led_to_a_dump_is_replayed_decision_for_decision() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = format!("recorder.directory={}", toml::Value::String(directory.path().display().to_string()));
    let server = Server::start(&[&at, "recorder.breach=off", "recorder.trace_bytes_max=20000"]);
    let mut raw = server.connect();
    let (faulty, echo, queued) = (raw.handle("faulty"), raw.handle("echo"), raw.handle("queued"));
    for round in 0..250u32 {
        let mut ids = Vec::new();
        for at in 0..60 {
            let len = 1 + (round * 7 + at * 13) % 900;
            let values = vec![0.5; len as usize];
            ids.push(raw.ask(&Ask::floats(if at % 3 == 0 { queued } else { echo }, &values)));
        }
        ids.iter().for_each(|_| drop(raw.recv().expect_result()));
    }
    raw.round(&Ask::word(faulty, 1)).expect_error(Code::ExecutorFailed);
    wait_until("the panic is kept", || kept(directory.path()).len() == 1);
    // How much is in each is chance: the newer begins where the older was full, which may have been a moment ago.
    let mut requests = 0.0;
    for ending in ["panic.ferrytrc", "panic-before.ferrytrc"] {
        let trace = newest(directory.path(), ending).unwrap_or_else(|| panic!("no {ending}"));
        let bytes = std::fs::metadata(&trace).expect("it is there").len();
        assert!(bytes < 250_000, "{ending} has {bytes} bytes: half of the memory, a chunk and the scheduler's state");
        let (status, told) = ferry(&["replay", &trace.display().to_string(), "--json"]);
        assert_eq!(status, Some(0), "{ending}: {told}");
        let told: Value = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
        assert_eq!(told["equal"], true, "{ending}: {told}");
        requests += number(&told["replay"]["requests"]);
    }
    assert!(requests > 100.0, "{requests}");
}

#[test]
fn explain_tells_one_request_and_what_the_server_remembers() {
    let server = Server::start(&[]);
    let (data, port) = (server.data.to_string(), server.control.to_string());
    assert_eq!(
        ferry(&["explain", "--control", &port, "--slowest", "3"]).1,
        "the server remembers no batch: nothing ran, or recorder.batches is 0\n"
    );
    let (status, told) = ferry(&["explain", "--addr", &data, "--model", "queued", "--len", "5"]);
    assert_eq!(status, Some(0), "{told}");
    for part in [
        "A row of length 5 for queued was in the server for",
        "Batch 1 of 1 row(s)",
        "Nobody shared the batch.",
        "Seen from here",
    ] {
        assert!(told.contains(part), "{part:?} is not in\n{told}");
    }
    let (status, told) = ferry(&["explain", "--addr", &data, "--model", "tiny_text", "--text", "w1 w2 w3", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
    assert_eq!((status, &told["request"]["model"]), (Some(0), &json!("tiny_text")));
    let (parts, total) = (parts_of(&told["request"]), number(&told["request"]["times_us"]["total"]));
    assert!((parts - total).abs() < 0.01, "{told}");
    assert!((total + number(&told["outside_us"]) - number(&told["client_us"])).abs() < 0.01, "{told}");
    traffic(&server);
    let (status, told) = ferry(&["explain", "--control", &port, "--slowest", "1"]);
    assert_eq!(status, Some(0), "{told}");
    assert!(told.contains("for sleep was in the server for") && told.contains("Most of it"), "{told}");
    let (_, told) = ferry(&["explain", "--control", &port, "--last", "2"]);
    assert!(told.contains("\n2.\n") && told.contains("for echo") && !told.contains("\n3.\n"), "{told}");
    let (_, told) = ferry(&["explain", "--control", &port, "--slowest", "2", "--last", "4", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
    assert_eq!((list(&told, "requests").len(), &told["among_batches"]), (2, &json!(4)));
    // Wrong use, and a server that refuses.
    assert_eq!(ferry(&["explain"]).0, Some(2));
    assert_eq!(ferry(&["explain", "--model", "queued", "--slowest", "1"]).0, Some(2));
    assert_eq!(ferry(&["explain", "--addr", &data, "--model", "queued", "--len", "5000"]).0, Some(2));
    assert_eq!(ferry(&["explain", "--control", &port, "--slowest", "1000"]).0, Some(1));
}

#[test]
fn timeline_writes_a_file_that_parses() {
    let server = Server::start(&[]);
    traffic(&server);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("timeline.json");
    let (port, file_text) = (server.control.to_string(), file.display().to_string());
    let (status, told) = ferry(&["timeline", "--control", &port, "-o", &file_text]);
    assert_eq!(
        (status, told),
        (Some(0), format!("{file_text}: 6 batches; open it in ui.perfetto.dev or chrome://tracing\n"))
    );
    let timeline: Value = serde_json::from_slice(&std::fs::read(&file).expect("it is there")).expect("JSON");
    assert!(list(&timeline, "traceEvents").len() > 50);
    assert_eq!(ferry(&["timeline", "--control", "127.0.0.1:1", "-o", &file_text]).0, Some(1));
}

#[test]
fn a_batch_on_a_device_shows_its_copies_in_receipt_and_timeline() {
    let models = models_directory();
    crate::device::write_small(models.path());
    let server = Server::start_in(models, &["executor.device=\"sim:1\""], Default::default());
    let mut raw = server.connect();
    let small = raw.handle("small");
    let mut ask = Ask::new(small, DType::U32, &[1, 4], bytemuck::cast_slice(&[1u32, 2, 3, 4]));
    ask.infer.flags |= INFER_RECEIPT;
    let event = raw.round(&ask);
    assert!(matches!(event, Event::Result { .. }), "{event:?}");
    let (result, _) = event.expect_result();
    let (receipt, timings) = (result.receipt.expect("asked for"), result.timings.expect("too"));
    assert!(receipt.upload_ns <= timings.wait_ns && receipt.readback_ns <= timings.run_ns, "{receipt:?}, {timings:?}");
    // Whoever asked has its answer before the batcher hears that the batch is done.
    wait_until("the batch is in the timeline with its copies", || {
        let timeline = get(&server, "/v1/timeline");
        let is_named = |track: &str| {
            let name = |event: &&Value| event["ph"] == "M" && event["args"]["name"] == json!(track);
            list(&timeline, "traceEvents").iter().any(|event| name(&event))
        };
        ["executor 0", "executor 0: upload", "executor 0: read back"].into_iter().all(is_named)
    });
}
