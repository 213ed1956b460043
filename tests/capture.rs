//! A running server captured over its control port by `ferry capture`, and replayed by `ferry replay`.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use common::{Ask, Event, Numbers, Raw, Server, bare_frame, control, get, wait_until};
use ferry::batcher::{Batcher, ExecutorLink, ThreadOutlet};
use ferry::capture::{self, Cancelled, CaptureEnd, TraceReader};
use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use ferry::control::admin::RATE;
use ferry::executor::sim::{Faults, SimExecutor};
use ferry::executor::worker::{Answers, Worker};
use ferry::mail::{Burst, Part, Request, ToBatcher};
use ferry::mailbox::mailbox;
use ferry::replay::exact::{self, Verified};
use ferry::replay::whatif::{Recording, Setting};
use ferry::scheduler::{Buckets, Group, Policy, QueueLimits, Scheduler, SeatSpec};
use ferry::telemetry::waterfall;
use ferry::telemetry::{ModelLabels, Telemetry};
use ferry::vocab::{DType, ModelHandle, Moment, TicketKey};
use ferry::wire::Kind;

/// Requests of several models, lengths, rows, classes and deadlines, some of them cancelled, until told to stop.
fn offer(mut raw: Raw, seed: u64, stop: &AtomicBool, ended: &AtomicU64) {
    let mut numbers = Numbers(seed);
    let models = ["echo", "queued", "sleep", "faulty", "tiny_bert"].map(|name| raw.handle(name));
    while !stop.load(Ordering::Relaxed) {
        let mut open = BTreeSet::new();
        for _ in 0..1 + numbers.below(12) {
            let model = models[numbers.below(5) as usize];
            let len = 1 + numbers.below(20) as u32;
            let mut ask = if model == models[0] || model == models[1] {
                Ask::floats(model, &vec![0.5; len as usize])
            } else if model == models[2] {
                Ask::word(model, numbers.below(300) as u32)
            } else if model == models[3] {
                Ask::words(model, &vec![numbers.below(3) as u32 + 4; 1 + numbers.below(3) as usize])
            } else {
                let ids: Vec<u32> = (0..len).map(|at| at % 90).collect();
                Ask::new(model, DType::U32, &[1, len], bytemuck::cast_slice(&ids))
            };
            ask.infer.priority = numbers.below(3) as u8;
            if numbers.below(3) == 0 {
                ask = ask.deadline_us(200 + numbers.below(30_000));
            }
            open.insert(raw.ask(&ask));
        }
        if numbers.below(3) == 0 {
            let id = *open.first().expect("some were asked");
            raw.send(&bare_frame(Kind::Cancel, id));
        }
        while !open.is_empty() {
            let event = raw.recv();
            assert_ne!(std::mem::discriminant(&event), std::mem::discriminant(&Event::End), "the server closed");
            if let Some(id) = event.ends() {
                open.remove(&id);
                ended.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn ferry(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferry")).args(arguments).output().expect("the binary runs")
}

fn text_of(path: &Path) -> &str {
    path.to_str().expect("a path of ASCII")
}

/// All who ask the control port share its rate: whoever takes all of it has `ferry capture` itself refused.
const LOOKS_PER_SECOND: u32 = 20;
const _: () = assert!(2 * LOOKS_PER_SECOND <= RATE);

/// Looks at the control port until it says what is waited for.
fn wait_for_control(what: &str, mut holds: impl FnMut() -> bool) {
    wait_until(what, || {
        let held = holds();
        if !held {
            std::thread::sleep(Duration::from_secs(1) / LOOKS_PER_SECOND);
        }
        held
    });
}

/// Runs `ferry capture`, and says so where it fails: whoever waits for the capture would not hear of it.
fn capture(server: &Server, seconds: u32, trace: &Path) -> Output {
    let (control, seconds) = (server.control.to_string(), seconds.to_string());
    let output = ferry(&["capture", "--control", &control, "--seconds", &seconds, "-o", text_of(trace)]);
    if !output.status.success() {
        eprintln!("{output:?}");
    }
    output
}

/// Waits until a capture is on; false when it has ended before it was seen.
fn wait_for_capture(server: &Server, capture: &ScopedJoinHandle<'_, Output>) -> bool {
    let mut on = false;
    wait_for_control("the capture is on", || {
        let ended = capture.is_finished();
        on = get(server.control, "/v1/capture").starts_with("HTTP/1.1 409");
        on || ended
    });
    on
}

/// Tries what has to be done within the time of a capture: with longer captures, where the machine is too busy for a short one.
fn within_a_capture<T>(mut attempt: impl FnMut(u32) -> Option<T>) -> T {
    [1, 5, 25].into_iter().find_map(&mut attempt).expect("what takes a second is done in half a minute")
}

/// A server under load, captured for a second, or for longer until a hundred requests ended meanwhile.
fn captured(directory: &Path) -> PathBuf {
    within_a_capture(|times| {
        let trace = directory.join(format!("trace{times}"));
        let server = Server::start(&["threads.shards=2", "threads.executors=2", "queue.rows_max=64"]);
        let (stop, ended) = (AtomicBool::new(false), AtomicU64::new(0));
        let count = || ended.load(Ordering::Relaxed);
        let enough = std::thread::scope(|scope| {
            let _stop = Stop(&stop);
            for seed in 0..4 {
                let raw = server.connect();
                let (stop, ended) = (&stop, &ended);
                scope.spawn(move || offer(raw, seed, stop, ended));
            }
            wait_until("requests are answered", || count() > 200);
            let before = count();
            let output = capture(&server, times, &trace);
            let enough = count() - before > 100;
            assert!(output.status.success(), "{output:?}");
            assert!(String::from_utf8_lossy(&output.stdout).contains("complete"), "{output:?}");
            enough
        });
        wait_until("the capture is counted", || server.metric("ferry_captures_total", &["complete"]) == 1.0);
        assert_eq!(server.metric("ferry_captures_total", &[]), 1.0);
        assert!(!trace.with_added_extension("part").exists());
        enough.then_some(trace)
    })
}

fn open(trace: &Path) -> TraceReader<BufReader<File>> {
    TraceReader::open(BufReader::new(File::open(trace).expect("a file"))).expect("a trace")
}

#[test]
fn a_captured_server_is_replayed_decision_for_decision_and_what_if_answers() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let trace = captured(directory.path());

    let mut reader = open(&trace);
    let verified = exact::replay(&mut reader, &mut ()).unwrap_or_else(|error| panic!("{error}"));
    let Verified { arrivals, cancels, batches, checkpoints, end, .. } = verified;
    assert_eq!(end, CaptureEnd::Complete);
    assert!(arrivals > 50 && batches > 20 && cancels > 0 && checkpoints > 0, "{verified:?}");
    assert!(reader.header().decisions > 0, "it began in the middle of its life");
    let asked: Vec<&str> =
        verified.report.models.iter().filter(|model| model.offered > 0).map(|model| model.name.as_str()).collect();
    assert_eq!(asked, ["echo", "faulty", "queued", "sleep", "tiny_bert"]);

    let output = ferry(&["replay", text_of(&trace), "--json"]);
    assert!(output.status.success(), "{output:?}");
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    assert_eq!(value["equal"], true);
    assert_eq!(value["replay"]["requests"], arrivals);
    assert_eq!(value["replay"]["hash"], format!("{:016x}", verified.hash));
    let is_regret = |regret: &serde_json::Value| {
        let number = |key: &str| regret[key].as_f64().expect("a number");
        let (used, least) = (number("device_ms_used"), number("device_ms_least"));
        assert!(0.0 < least && least <= used, "{regret}");
        assert!((number("lost_share") - (1.0 - least / used)).abs() < 1e-6, "{regret}");
        // Rows of several lengths and callers came at the same time, and not all of them shared a batch.
        assert!(regret["worst_interval"]["device_ms_used"].as_f64().expect("a number") <= used, "{regret}");
    };
    is_regret(&value["regret"]);
    // The executors' time is accounted for, but for batches that still ran when the trace ended.
    let is_waterfall = |run: &serde_json::Value| {
        let sum = |parts: &serde_json::Value| -> f64 {
            parts.as_object().expect("parts").values().map(|seconds| seconds.as_f64().expect("a number")).sum()
        };
        let executors = run["waterfall"]["executors"].as_array().expect("a list");
        let (span, busy) = (run["seconds"].as_f64().expect("a number"), run["executors_busy_seconds"].as_array());
        assert_eq!(Some(executors.len()), busy.map(Vec::len));
        for executor in executors {
            let (all, useful) = (sum(&executor["seconds"]), executor["seconds"]["useful"].as_f64().expect("a number"));
            assert!(0.0 < useful && useful < all && all <= span + 1e-6, "{all} s in {span} s: {executor:#}");
        }
    };
    // Up to the last bit, which reading a number from JSON may change.
    let used: Duration = verified.report.regret.total.used;
    let said = value["regret"]["device_ms_used"].as_f64().expect("a number");
    assert!((said - used.as_secs_f64() * 1e3).abs() <= 1e-12 * said, "{said} and {used:?}");

    // What if: the same requests, whatever is set.
    let output =
        ferry(&["replay", text_of(&trace), "--json", "--set", "faulty.policy=window", "--set", "*.rows_max=2"]);
    assert!(output.status.success(), "{output:?}");
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    for run in ["recorded", "simulated", "changed"] {
        is_regret(&value["runs"][run]["regret"]);
        is_waterfall(&value["runs"][run]);
        let models = value["runs"][run]["models"].as_object().expect("models");
        let requests: u64 = models.values().map(|model| model["requests"].as_u64().expect("a count")).sum();
        assert_eq!(requests, arrivals, "{run}: {value:#}");
        for (name, model) in models {
            let count = |key: &str| model[key].as_u64().expect("a count");
            let refused: u64 = model["refused"].as_object().expect("codes").values().filter_map(|n| n.as_u64()).sum();
            let ends = count("answered") + count("expired") + count("cancelled") + count("unfinished") + refused;
            assert_eq!(count("requests"), ends, "{run}, {name}: {model:#}");
        }
    }
    let rows = value["runs"]["changed"]["models"]["tiny_bert"]["batch_rows_mean"].as_f64().expect("a number");
    assert!(rows > 0.0 && rows <= 2.0, "{rows}");
    let shown = ferry(&["replay", text_of(&trace), "--what-if"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for word in ["tiny_bert", "recorded", "p99.9", "time of executors", "time of inline batches", "idle_empty"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    println!("{shown}");

    // A cut off file, a damaged one, another one, a setting that cannot be.
    let bytes = std::fs::read(&trace).expect("the trace");
    let wrong = directory.path().join("wrong");
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 2] ^= 1;
    for (bytes, says) in [
        (&bytes[..bytes.len() - 5], "cut off"),
        (&damaged[..], "checksum"),
        (b"model,length\n".as_slice(), "not a trace"),
    ] {
        std::fs::write(&wrong, bytes).expect("writes");
        let output = ferry(&["replay", text_of(&wrong)]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(says), "{says}: {output:?}");
    }
    for set in ["faulty.rows_max=0", "nobody.rows_max=4", "rows_max=4", "faulty.row_max=4"] {
        let output = ferry(&["replay", text_of(&trace), "--set", set]);
        assert_eq!(output.status.code(), Some(2), "{set}: {output:?}");
    }
}

#[test]
fn longer_windows_make_larger_batches() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let trace = captured(directory.path());
    let recording = Recording::read(open(&trace), 1).expect("a trace");
    assert!(recording.recorded.is_ok(), "{:?}", recording.recorded);
    let rows = |delay: &str| {
        let set = |key: &str, value: &str| Setting::parse(&format!("tiny_bert.{key}={value}")).expect("a setting");
        let sets = [set("policy", "window"), set("queue_delay_max_us", delay), set("rows_max", "8")];
        let report = recording.what_if(&sets, 1).expect("it can be");
        let again = recording.what_if(&sets, 1).expect("it can be");
        let model = |report: &ferry::replay::ledger::Report| {
            report.models.iter().find(|model| model.name == "tiny_bert").expect("it was asked").clone()
        };
        let (first, second) = (model(&report), model(&again));
        assert_eq!((first.batches, first.latency), (second.batches, second.latency), "equal seeds, equal runs");
        assert_eq!(report.waterfall, again.waterfall);
        (first.rows as f64 / first.batches as f64, report.waterfall[0].1.get(waterfall::Part::IdleHold))
    };
    let (means, holds): (Vec<f64>, Vec<u64>) = ["0", "2000", "50000"].map(rows).into_iter().unzip();
    assert!(means.is_sorted() && means[2] > 1.2 * means[0], "{means:?}");
    // How much longer depends on what else waits: a composition that is not complete is held as well, whatever the window.
    assert!(holds[2] > 0, "executors are kept idle for it: {holds:?}");
}

#[test]
fn cancels_reach_the_trace_of_those_that_wait_and_of_those_that_run() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let trace = directory.path().join("trace");
    within_a_capture(|times| {
        let server = Server::start(&["executor.slots=1"]);
        let mut raw = server.connect();
        let faulty = raw.handle("faulty");
        let of_faulty = |name: &str| server.metric(name, &["model=\"faulty\""]);
        let (capture, in_time) = std::thread::scope(|scope| {
            let capture = scope.spawn(|| capture(&server, 3 * times, &trace));
            if !wait_for_capture(&server, &capture) {
                return (capture.join().expect("it does not panic"), false);
            }
            let running = raw.ask(&Ask::word(faulty, 2000 * times));
            wait_until("the executor is busy", || of_faulty("ferry_batches_total") == 1.0);
            let waiting = raw.ask(&Ask::word(faulty, 4));
            let waits = || of_faulty("ferry_queue_rows") == 1.0;
            wait_until("it waits, or it was too late to", || waits() || of_faulty("ferry_batches_total") == 2.0);
            raw.send(&[bare_frame(Kind::Cancel, waiting), bare_frame(Kind::Cancel, running)].concat());
            let cancelled = [(); 2].map(|()| matches!(raw.recv(), Event::Error { .. }));
            wait_until("the batcher knows", || of_faulty("ferry_queue_rows") == 0.0);
            let in_time = cancelled == [true; 2] && !capture.is_finished();
            (capture.join().expect("it does not panic"), in_time)
        });
        assert!(capture.status.success(), "{capture:?}");
        in_time.then_some(())
    });
    let mut reader = open(&trace);
    let mut cancels = Vec::new();
    while let Some(event) = reader.next_event().expect("a trace") {
        if let ferry::capture::Event::Cancel { of, .. } = event {
            cancels.push(of);
        }
    }
    assert_eq!(cancels, [Cancelled::Waiting(1), Cancelled::Left(0)]);
    let verified = exact::replay(&mut open(&trace), &mut ()).unwrap_or_else(|error| panic!("{error}"));
    let faulty = verified.report.models.iter().find(|model| model.name == "faulty").expect("it was asked");
    assert_eq!((faulty.offered, faulty.cancelled, faulty.answered), (2, 2, 0));
}

#[test]
fn what_is_no_capture_is_refused_and_a_drain_ends_one() {
    let server = Server::start(&[]);
    for (path, status) in [
        ("/v1/capture", "400"),
        ("/v1/capture?seconds=0", "400"),
        ("/v1/capture?seconds=601", "400"),
        ("/v1/capture?seconds=x", "400"),
    ] {
        let answer = get(server.control, path);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let trace = directory.path().join("trace");
    let output = std::thread::scope(|scope| {
        let capture = scope.spawn(|| capture(&server, 600, &trace));
        assert!(wait_for_capture(&server, &capture), "it lasts ten minutes");
        server.drain();
        capture.join().expect("it does not panic")
    });
    // Whoever ends first of batcher and control port: a whole trace that was cut short, or none.
    match open_if(&trace) {
        Some(mut reader) => {
            while reader.next_event().expect("a trace").is_some() {}
            assert_eq!(reader.end(), Some(CaptureEnd::Stopped));
            assert!(output.status.success(), "{output:?}");
        }
        None => assert_eq!(output.status.code(), Some(1), "{output:?}"),
    }
    let nobody = ferry(&["capture", "--control", "127.0.0.1:1", "--seconds", "1", "-o", text_of(&trace)]);
    assert_eq!(nobody.status.code(), Some(1), "{nobody:?}");
}

fn open_if(trace: &Path) -> Option<TraceReader<BufReader<File>>> {
    trace.exists().then(|| open(trace))
}

/// Sets knobs of a model on the control port; tried again where something waits that would fit no batch, and where the batcher
/// takes long to answer: a change that was made meanwhile is not made twice.
fn set(server: &Server, model: &str, knobs: &serde_json::Value) {
    let body = serde_json::json!({ "set": knobs }).to_string();
    let path = format!("/v1/models/{model}/policy");
    wait_for_control("the policy is taken", || {
        let (status, answer) = control(server.control, "PATCH", &path, "Content-Type: application/json\r\n", &body);
        assert!([200, 409, 429, 503].contains(&status), "{status}: {answer:#}");
        status == 200
    });
}

/// Lets threads end that wait for it, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A capture over these changes, of callers who ask for more rows than fit a batch. `None` when it ended before the last change.
fn captured_with_changes(trace: &Path, seconds: u32, changes: &[(&str, serde_json::Value)]) -> Option<()> {
    let server = Server::start(&["threads.shards=2", "threads.executors=2"]);
    for model in ["faulty", "tiny_bert"] {
        set(&server, model, &serde_json::json!({ "rows_max": "3" }));
    }
    let (stop, ended) = (AtomicBool::new(false), AtomicU64::new(0));
    let in_parts = |mut raw: Raw, seed: u64| {
        let mut numbers = Numbers(seed);
        let [faulty, tiny_bert] = ["faulty", "tiny_bert"].map(|name| raw.handle(name));
        while !stop.load(Ordering::Relaxed) {
            let mut open = BTreeSet::new();
            for _ in 0..1 + numbers.below(6) {
                let rows = 1 + numbers.below(8) as u32;
                let ask = if numbers.below(2) == 0 {
                    Ask::words(faulty, &vec![4 + numbers.below(3) as u32; rows as usize])
                } else {
                    let len = 1 + numbers.below(64) as u32;
                    let ids: Vec<u32> = (0..rows * len).map(|at| at % 90).collect();
                    Ask::new(tiny_bert, DType::U32, &[rows, len], bytemuck::cast_slice(&ids))
                };
                let hurried = numbers.below(3) == 0;
                open.insert(raw.ask(&if hurried { ask.deadline_us(300 + numbers.below(20_000)) } else { ask }));
            }
            if numbers.below(2) == 0 {
                let id = *open.last().expect("some were asked");
                raw.send(&bare_frame(Kind::Cancel, id));
            }
            while !open.is_empty() {
                let event = raw.recv();
                assert_ne!(std::mem::discriminant(&event), std::mem::discriminant(&Event::End), "the server closed");
                if let Some(id) = event.ends() {
                    open.remove(&id);
                    ended.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    };
    let (output, in_time) = std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for seed in 0..4 {
            let raw = server.connect();
            scope.spawn(move || in_parts(raw, seed));
        }
        let moved_on = |by: u64| {
            let target = ended.load(Ordering::Relaxed) + by;
            wait_until("requests are answered", || ended.load(Ordering::Relaxed) > target);
        };
        moved_on(50);
        let capture = scope.spawn(|| capture(&server, seconds, trace));
        let mut in_time = wait_for_capture(&server, &capture);
        for (model, knobs) in changes {
            moved_on(30);
            in_time = in_time && !capture.is_finished();
            if in_time {
                set(&server, model, knobs);
            }
        }
        moved_on(30);
        in_time = in_time && !capture.is_finished();
        (capture.join().expect("it does not panic"), in_time)
    });
    assert!(output.status.success(), "{output:?}");
    in_time.then_some(())
}

/// Goal: a replay is equal when policies change and requests are run in parts while the capture is on. Method: batches of at
/// most three rows, while callers ask for up to eight, cancel some and give others little time.
#[test]
fn a_capture_over_policy_changes_and_requests_in_parts_is_replayed_decision_for_decision() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let trace = directory.path().join("trace");
    // None that makes batches smaller: it would be refused for as long as there are callers.
    let changes = [
        ("tiny_bert", serde_json::json!({ "policy": "window", "queue_delay_max_us": "2000" })),
        ("tiny_bert", serde_json::json!({ "buckets": "auto", "shapes_max": "3" })),
        ("faulty", serde_json::json!({ "policy": "greedy_tokens" })),
        ("tiny_bert", serde_json::json!({ "policy": "cost", "queue_delay_max_us": "auto", "rows_max": "5" })),
    ];
    within_a_capture(|times| captured_with_changes(&trace, 3 * times, &changes));
    let verified = exact::replay(&mut open(&trace), &mut ()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(verified.end, CaptureEnd::Complete);

    let (mut policies, mut cancelled, mut parts, mut hurried) = (0, 0, 0, 0);
    let mut reader = open(&trace);
    let mut before = None;
    while let Some(event) = reader.next_event().expect("a trace") {
        match &event {
            ferry::capture::Event::Policy(_) => policies += 1,
            ferry::capture::Event::Cancel { .. } => cancelled += 1,
            // What is admitted at the same moment, as long and as hurried, with all the rows that a batch takes.
            ferry::capture::Event::Arrival { at, arrival } => {
                hurried += u64::from(arrival.deadline.is_some());
                let like = (*at, arrival.model, arrival.len, arrival.deadline);
                parts += u64::from(before.replace((like, arrival.rows)) == Some((like, 3)));
            }
            _ => {}
        }
    }
    assert!(
        policies == changes.len() && cancelled > 0 && parts > 0 && hurried > 0,
        "{policies} {cancelled} {parts} {hurried}"
    );

    // The changes of the trace come about in a what-if too, where nothing else was set.
    let recording = Recording::read(open(&trace), 1).expect("a trace");
    let report = recording.what_if(&[], 1).expect("it can be");
    let (simulated, recorded) = (&report.models, &verified.report.models);
    for (simulated, recorded) in simulated.iter().zip(recorded) {
        assert_eq!(simulated.offered, recorded.offered, "{}", recorded.name);
    }
}

/// Goal: buckets that the scheduler chose for itself are chosen again. Method: the real batcher in virtual time, 80 seconds
/// whose lengths change in the middle, captured from behind the start.
#[test]
fn buckets_that_follow_the_lengths_follow_them_in_a_replay() {
    let tokens = TensorSpec {
        name: "ids".into(),
        dtype: DType::U32,
        shape: vec![Dim::Named("tokens".into())],
        pad: 0.0,
        range: None,
        nonfinite: NonFinite::Allow,
    };
    let contract = Contract {
        name: "copy".into(),
        version: "1".into(),
        architecture: "sim".into(),
        outputs: vec![TensorSpec { name: "out".into(), ..tokens.clone() }],
        inputs: vec![tokens],
        length: Some(Length { name: "tokens".into(), min: 1, max: 64 }),
        text: None,
        rows_max: 8,
    };
    let contract = Arc::new(contract.checked().expect("a contract"));
    let labels = [ModelLabels { name: "copy".into(), version: "1".into() }];
    let telemetry = Telemetry::new(&labels, 1, 1);
    let (shard, inbox) = mailbox(64);
    let device = Box::new(SimExecutor::new(Arc::new(Faults::default())));
    let worker = Worker::new(
        Answers {
            index: 0,
            contracts: vec![Arc::clone(&contract)],
            shards: vec![shard],
            telemetry: Arc::clone(&telemetry),
        },
        device,
    );
    let outlet = ThreadOutlet { executors: vec![ExecutorLink::Inline(Box::new(worker))], shards: Vec::new() };
    let lone = Policy { group: Group::Inline, ..Policy::new(8, 512, Buckets::new(&[64]).expect("one")) };
    let policy = lone.with([("buckets", "auto"), ("shapes_max", "3"), ("pad_to", "bucket")]).expect("such knobs");
    let seats = SeatSpec::separate(Group::Inline, 1, 1);
    let scheduler = Scheduler::new(QueueLimits::NONE, vec![policy], &seats);
    let mut batcher = Batcher::new(scheduler, outlet, &[contract], 1, telemetry);

    let (sink, source) = capture::channel();
    let mut sink = Some(sink);
    let mut trace = Vec::new();
    for slot in 0..4000u32 {
        let now = Moment(1_000_000_000 + u64::from(slot) * 20_000_000);
        if slot == 100 {
            let sink = sink.take().expect("it begins once");
            batcher.take(now, ToBatcher::Capture { time: Duration::from_secs(600), sink });
        }
        let len = if slot < 2000 { 9 } else { 33 };
        let request = Request {
            key: TicketKey { shard: 0, slot: slot % 8, generation: slot / 8 },
            model: ModelHandle(0),
            rows: 1,
            len,
            part: Part::whole(1),
            payload: vec![0; 4 * len as usize].into(),
            received_at: now,
            deadline: None,
            compose: None,
            class: Default::default(),
            tenant: Default::default(),
            truncated: false,
        };
        batcher.take(now, ToBatcher::Burst(Burst { arrivals: vec![request], cancelled: Vec::new() }));
        batcher.turn(now);
        while inbox.try_recv().is_some() {}
        trace.extend(source.chunks.try_iter().flatten());
    }
    batcher.take(Moment(90_000_000_000), ToBatcher::Stop);
    trace.extend(source.chunks.try_iter().flatten());
    trace.extend(capture::end_chunk(source.ended().expect("it was stopped")));

    let generation = batcher.scheduler().generation(ModelHandle(0));
    assert!(generation >= 3, "buckets were chosen {generation} times");
    let mut reader = TraceReader::open(&trace[..]).expect("a trace");
    let verified = exact::replay(&mut reader, &mut ()).unwrap_or_else(|error| panic!("{error}"));
    let log = batcher.scheduler().log();
    assert_eq!((verified.decisions, verified.hash, verified.arrivals), (log.count(), log.hash(), 3900));
    assert_eq!(verified.end, CaptureEnd::Stopped);
}
