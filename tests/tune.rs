//! `ferry tune` over a real server: of its trace, of its learned costs, measured on it, and stopped while it measures.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{Ask, Numbers, Raw, Server, get, models_directory, wait_until};
use ferry::tune::page::document_of;
use ferry::vocab::DType;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn ferry(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferry")).args(arguments).output().expect("the binary runs")
}

fn text_of(path: &Path) -> &str {
    path.to_str().expect("a path of ASCII")
}

fn json_of(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("one JSON document: {error}: {output:?}"))
}

/// Single rows of different lengths for tiny_bert, some at a time, until told to stop.
fn offer(mut raw: Raw, seed: u64, stop: &AtomicBool, ended: &AtomicU64) {
    let mut numbers = Numbers(seed);
    let model = raw.handle("tiny_bert");
    while !stop.load(Ordering::Relaxed) {
        let open = 1 + numbers.below(8);
        for _ in 0..open {
            let len = 1 + numbers.below(60) as u32;
            let ids: Vec<u32> = (0..len).map(|at| at % 90).collect();
            raw.ask(&Ask::new(model, DType::U32, &[1, len], bytemuck::cast_slice(&ids)));
        }
        for _ in 0..open {
            raw.recv().expect_result();
            ended.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Sets it when it goes, so that no thread outlives a failed assertion.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Captures a server under load into a trace with some hundred requests.
fn capture(server: &Server, trace: &Path) {
    let (stop, ended) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for seed in 0..3 {
            let raw = server.connect();
            let (stop, ended) = (&stop, &ended);
            scope.spawn(move || offer(raw, seed, stop, ended));
        }
        wait_until("requests are answered", || ended.load(Ordering::Relaxed) > 100);
        let enough = [1, 5, 25].into_iter().any(|seconds| {
            let before = ended.load(Ordering::Relaxed);
            let (control, seconds) = (server.control.to_string(), seconds.to_string());
            let output = ferry(&["capture", "--control", &control, "--seconds", &seconds, "-o", text_of(trace)]);
            assert!(output.status.success(), "{output:?}");
            ended.load(Ordering::Relaxed) - before > 200
        });
        assert!(enough, "a capture has some hundred requests");
    });
}

fn number(value: &Value) -> f64 {
    // There is no infinity in JSON.
    value.as_f64().unwrap_or(f64::INFINITY)
}

/// p99, minus goodput, executor time: all to be small.
fn objectives(point: &Value) -> [f64; 3] {
    let of = |key: &str| number(&point["predicted"][key]);
    [of("p99_ms"), -of("goodput_rps"), of("device_us_per_request")]
}

/// What must hold of every document.
fn check(document: &Value, points_max: usize) {
    let points = document["points"].as_array().expect("points");
    assert!(points.len() <= points_max && points.len() > 1, "{} points", points.len());
    for (at, point) in points.iter().enumerate() {
        assert_eq!(point["id"], at);
        let dominated = points.iter().any(|other| {
            let pairs = || objectives(other).into_iter().zip(objectives(point));
            pairs().all(|(a, b)| a <= b) && pairs().any(|(a, b)| a < b)
        });
        assert_eq!(point["front"], !dominated, "{point}");
        for share in [&point["regret_share"], &point["predicted"]["regret_share_within_its_budgets"]] {
            assert!((0.0..=1.0).contains(&number(share)), "{point}");
        }
    }
    let present = &points[0];
    let chosen = &points[document["chosen"].as_u64().expect("one is chosen") as usize];
    let holds = |point: &Value| point["holds_slo"].as_bool().expect("it is said");
    assert!(holds(chosen) >= holds(present), "{chosen} {present}");
    if holds(chosen) == holds(present) {
        let goodput = |point: &Value| number(&point["predicted"]["goodput_rps"]);
        assert!(goodput(chosen) >= 0.99 * goodput(present), "{chosen} {present}");
    }
    assert_eq!(present["set"], "", "the present setting sets nothing");
    assert!(document["block"].as_str().expect("a block").starts_with("[batching]\n"));
}

#[test]
fn a_captured_trace_is_tuned_and_its_page_has_every_setting() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (trace, page) = (directory.path().join("trace"), directory.path().join("tune.html"));
    // One row at a time: there is much to try.
    let server = Server::start(&[]);
    let control = server.control.to_string();
    let bad = ["set", "tiny_bert", "policy=window", "rows_max=1", "queue_delay_max_us=0", "--control", &control];
    assert!(ferry(&bad).status.success());
    capture(&server, &trace);
    let models = models_directory();
    let arguments =
        ["tune", text_of(&trace), "--model", "tiny_bert", "--models", text_of(models.path()), "--points", "80"];
    let more = ["--budget", "120s", "--slo", "50ms", "--json", "-o", text_of(&page)];
    let document = json_of(&ferry(&[&arguments[..], &more[..]].concat()));
    check(&document, 80);
    assert!(document["source"]["requests"].as_u64().expect("a count") > 200);
    let html = std::fs::read_to_string(&page).expect("the page was written");
    assert!(document_of(&html).as_ref() == Some(&document), "the page holds the same document");

    // For people: the front, and the difference.
    let shown = ferry(&[&arguments[..], &["--budget", "120s", "--slo", "50ms"]].concat());
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    println!("{shown}");
    assert!(shown.contains("Pareto front"), "{shown}");
    // Equal seeds and settings, equal choice. Which it is depends on what batches took.
    let chosen = &document["points"][document["chosen"].as_u64().expect("one is chosen") as usize];
    let mark = format!("\n>{:>4} ", chosen["id"].as_u64().expect("a number"));
    assert!(shown.contains(&mark), "the chosen one has its line: {shown}");
    if chosen["id"] == 0 {
        assert!(shown.contains("The present setting stays."), "{shown}");
    } else {
        for line in chosen["diff"].as_array().expect("lines") {
            let line = format!("{} {}\n", line[0].as_str().expect("a sign"), line[1].as_str().expect("a line"));
            assert!(shown.contains(&line), "{line}: {shown}");
        }
        assert!(shown.contains("ferry set tiny_bert") || shown.contains("needs a restart"), "{shown}");
    }

    // Without time for it, the present setting is all that was tried; wrong use is told.
    let hurried = json_of(&ferry(&[&arguments[..], &["--budget", "0s", "--json"]].concat()));
    assert_eq!(hurried["points"].as_array().map(Vec::len), Some(1), "{}", hurried["search"]);
    assert_eq!(hurried["search"]["ended"], "--budget was over");
    for (wrong, status) in [
        (vec!["tune", text_of(&trace), "--model", "nobody"], 2),
        (vec!["tune", "--model", "tiny_bert"], 2),
        (vec!["tune", "--model", "digits", "--rate", "0", "--addr", &control], 2),
        (vec!["tune", text_of(&page), "--model", "tiny_bert"], 1),
    ] {
        assert_eq!(ferry(&wrong).status.code(), Some(status), "{wrong:?}");
    }
}

#[test]
fn a_described_load_is_tuned_with_what_batches_take_here() {
    let models = models_directory();
    let arguments = ["tune", "--model", "tiny_bert", "--models", text_of(models.path()), "--rate", "100"];
    let more = ["--lengths", "uniform:1..64", "--duration", "10s", "--warmup", "100ms", "--executors", "1,2"];
    let rest = ["--points", "60", "--budget", "120s", "--slo", "100ms", "--seed", "3", "--json"];
    let document = json_of(&ferry(&[&arguments[..], &more, &rest].concat()));
    check(&document, 60);
    let executors = |point: &Value| point["executors"].as_u64().expect("a count");
    let counts: std::collections::BTreeSet<u64> =
        document["points"].as_array().expect("points").iter().map(executors).collect();
    assert!(counts.len() > 1, "{counts:?}");
    let requests = document["source"]["requests"].as_u64().expect("a count");
    assert!((850..1150).contains(&requests), "{requests} of 100 a second for 10 s");
    assert!(document["bound_rps"].as_f64().expect("it is known") > 0.0);
}

fn policy(server: &Server, model: &str) -> (u64, BTreeMap<String, String>) {
    let answer = get(server.control, &format!("/v1/models/{model}/policy"));
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
    let knob =
        |knob: &Value| (knob["name"].as_str().expect("a name").into(), knob["value"].as_str().expect("a value").into());
    let knobs = body["knobs"].as_array().expect("knobs").iter().map(knob).collect();
    (body["generation"].as_u64().expect("a number"), knobs)
}

#[test]
fn the_best_settings_are_measured_on_the_server_and_its_policy_is_put_back() {
    let server = Server::start(&[]);
    let (data, control) = (server.data.to_string(), server.control.to_string());
    let models = models_directory();
    let before = policy(&server, "tiny_bert");
    let arguments = ["tune", "--model", "tiny_bert", "--models", text_of(models.path()), "--rate", "60"];
    let live =
        ["--addr", &data, "--control", &control, "--confirm", "2", "--confirm-time", "300ms", "--confirm-rounds", "2"];
    let rest = ["--lengths", "uniform:1..64", "--duration", "10s", "--points", "60", "--slo", "100ms", "--json"];
    let document = json_of(&ferry(&[&arguments[..], &live, &rest].concat()));
    check(&document, 60);
    let settings = document["live"]["settings"].as_array().expect("settings");
    assert_eq!(settings[0]["id"], 0, "the present setting is measured too");
    let measured: Vec<&Value> = settings.iter().filter(|one| one["refused"].is_null()).collect();
    assert!(measured.len() > 1, "{settings:?}");
    for one in measured {
        assert!(number(&one["measured"]["p99_ms"]) > 0.0 && number(&one["p99_ratio_measured"]).is_finite(), "{one}");
        assert_eq!(one["measured"]["p99_ms_each"].as_array().map(Vec::len), Some(2));
    }
    let after = policy(&server, "tiny_bert");
    assert!(after.0 > before.0, "it was changed");
    assert_eq!(after.1, before.1, "and put back");
}

#[test]
fn stopped_while_it_measures_it_puts_the_policy_back_first() {
    let server = Server::start(&[]);
    let (data, control) = (server.data.to_string(), server.control.to_string());
    let models = models_directory();
    let before = policy(&server, "tiny_bert");
    let arguments =
        ["tune", "--model", "tiny_bert", "--models", text_of(models.path()), "--rate", "60", "--points", "40"];
    let live =
        ["--addr", &data, "--control", &control, "--confirm", "3", "--confirm-time", "100ms", "--confirm-rounds", "99"];
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ferry"))
            .args([&arguments[..], &live, &["--duration", "5s", "--slo", "100ms"]].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        wait_until("it has set something", || {
            std::thread::sleep(Duration::from_millis(50));
            assert!(child.try_wait().expect("the process is ours").is_none(), "it measures for minutes");
            policy(&server, "tiny_bert").1 != before.1
        });
        kill(Pid::from_raw(child.id() as i32), signal).expect("the process is ours");
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(128 + signal as i32), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("the policy is as it was"), "{said}");
        assert_eq!(policy(&server, "tiny_bert").1, before.1);
    }
}
