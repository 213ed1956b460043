//! Where the executors' time goes, with its causes staged one by one; and who is charged for it.

use std::time::Duration;

use ferry::client::{Client, ClientOptions, Request};
use ferry::load::{self, LoadOptions, Mode};
use ferry::telemetry::waterfall::{PARTS, Part, Parts};
use ferry::vocab::DType;
use ferry::{clock, kernels};
use serde_json::{Value, json};

use crate::common::{Ask, Numbers, Raw, Server, control, wait_until};

/// With one executor thread, which is number 0; number 1 is the batcher's own, for echo.
const THREAD: usize = 0;
const INLINE: usize = 1;

fn parts(server: &Server, executor: usize) -> Parts {
    let view = server.telemetry.executor(executor).times().read(clock::now());
    assert_eq!(view.parts.total(), view.elapsed(), "executor {executor}");
    view.parts
}

/// The batcher has heard of every batch, and accounted for it.
fn wait_until_idle(server: &Server, executors: usize) {
    server.wait_until_at_rest();
    let idle = |executor| server.telemetry.executor(executor).times().read(clock::now()).state.is_some();
    wait_until("the batcher has heard of every batch", || (0..executors).all(idle));
}

/// What was added meanwhile.
fn since(server: &Server, executor: usize, before: &Parts) -> Parts {
    let now = parts(server, executor);
    Parts(std::array::from_fn(|part| now.0[part] - before.0[part]))
}

fn set(server: &Server, model: &str, knobs: Value) {
    let body = json!({ "set": knobs }).to_string();
    let (status, answer) = control(server.control, "PATCH", &format!("/v1/models/{model}/policy"), "", &body);
    assert_eq!(status, 200, "{answer}");
}

/// The largest part, whatever was idle for want of work.
fn largest_but_empty(parts: &Parts) -> Part {
    let of_some_cause = Part::ALL.into_iter().filter(|part| *part != Part::IdleEmpty);
    of_some_cause.max_by_key(|part| parts.get(*part)).expect("there are parts")
}

#[test]
fn where_nothing_is_asked_all_time_is_an_empty_queue() {
    let server = Server::start(&[]);
    for executor in [THREAD, INLINE] {
        wait_until("its time has begun", || parts(&server, executor).total() > 0);
        let parts = parts(&server, executor);
        assert_eq!(parts.get(Part::IdleEmpty), parts.total(), "executor {executor}: {parts:?}");
    }
}

#[test]
fn sparse_requests_under_a_long_window_are_a_hold() {
    let server = Server::start(&[]);
    set(&server, "queued", json!({ "policy": "window", "queue_delay_max_us": 50_000 }));
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    let before = parts(&server, THREAD);
    for _ in 0..5 {
        raw.round(&Ask::floats(queued, &[1.0; 8])).expect_result();
    }
    wait_until_idle(&server, 2);
    let parts = since(&server, THREAD, &before);
    // Each waits its window to the end, and nobody looks before that.
    assert!(parts.get(Part::IdleHold) >= 5 * 49_000_000, "{parts:?}");
    assert_eq!(largest_but_empty(&parts), Part::IdleHold, "{parts:?}");
    // The batcher's thread has an executor too, for which nothing waited.
    let inline = self::parts(&server, INLINE);
    assert_eq!(inline.get(Part::IdleEmpty), inline.total(), "{inline:?}");
}

/// What a batch took is split as its cells are, but for a nanosecond: compares two parts of 8 batches with their cells.
fn assert_ratio(parts: &Parts, [(one, its_cells), (other, other_cells)]: [(Part, u64); 2]) {
    let nanos = [one, other].map(|part| parts.get(part));
    let off = (nanos[0] * other_cells).abs_diff(nanos[1] * its_cells);
    assert!(
        nanos[1] > 0 && off <= 8 * (its_cells + other_cells),
        "{nanos:?} ns for {its_cells} and {other_cells} cells"
    );
}

#[test]
fn one_long_row_among_short_ones_is_padding_to_the_longest_row() {
    let server = Server::start(&[]);
    set(&server, "queued", json!({ "layout": "padded", "pad_to": "longest" }));
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    let before = parts(&server, THREAD);
    for tag in 1..=8 {
        for len in [8, 8, 8, 1000] {
            raw.ask(&Ask::floats(queued, &vec![1.0; len]).compose(tag, 4));
        }
        (0..4).for_each(|_| drop(raw.recv().expect_result()));
    }
    wait_until_idle(&server, 2);
    let parts = since(&server, THREAD, &before);
    let of_batches = Part::ALL.into_iter().filter(|part| part.is_of_a_batch());
    let largest = of_batches.max_by_key(|part| parts.get(*part)).expect("there are parts");
    assert_eq!(largest, Part::PaddingLongestRow, "{parts:?}");
    assert_ratio(&parts, [(Part::PaddingLongestRow, 3 * 992), (Part::Useful, 1024)]);
    assert_eq!(parts.get(Part::PaddingBucket), 0, "{parts:?}");
}

#[test]
fn a_row_in_a_bucket_that_is_too_large_is_padding_to_the_bucket() {
    let server = Server::start(&[]);
    set(&server, "queued", json!({ "layout": "padded", "pad_to": "bucket", "buckets": [8, 1024] }));
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    let before = parts(&server, THREAD);
    for _ in 0..8 {
        raw.round(&Ask::floats(queued, &[1.0; 100])).expect_result();
    }
    wait_until_idle(&server, 2);
    let parts = since(&server, THREAD, &before);
    assert_ratio(&parts, [(Part::PaddingBucket, 924), (Part::Useful, 100)]);
    assert_eq!(parts.get(Part::PaddingLongestRow), 0, "{parts:?}");
}

#[test]
fn what_an_encoder_computes_beyond_its_tokens_is_rounding() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let bert = raw.handle("tiny_bert");
    let before = parts(&server, THREAD);
    for _ in 0..8 {
        raw.round(&Ask::new(bert, DType::U32, &[1, 5], bytemuck::cast_slice(&[1u32, 2, 3, 4, 5]))).expect_result();
    }
    wait_until_idle(&server, 2);
    let parts = since(&server, THREAD, &before);
    let places = kernels::places(kernels::arch(), 5) as u64;
    assert!(places > 5 || places == 5 && parts.get(Part::PaddingRounding) == 0, "{parts:?}");
    if places > 5 {
        assert_ratio(&parts, [(Part::PaddingRounding, places - 5), (Part::Useful, 5)]);
    }
}

#[test]
fn a_load_report_shows_where_the_time_of_its_load_went() {
    let server = Server::start(&[]);
    for (model, inline) in [("queued", false), ("echo", true)] {
        let options = LoadOptions {
            duration: Duration::from_millis(300),
            warmup: Duration::from_millis(50),
            ..LoadOptions::new(server.data, model, Mode::Closed { callers: 4 })
        };
        let report = load::run(&options, |_| ()).expect("the server serves");
        let shown = report.server.expect("it says what it did");
        for shares in [shown.waterfall, shown.waterfall_inline] {
            let sum: f64 = shares.expect("time passed").0.iter().sum();
            assert!((sum - 1.0).abs() < 1e-9, "{sum}");
        }
        let [ran, idle] =
            if inline { [shown.waterfall_inline, shown.waterfall] } else { [shown.waterfall, shown.waterfall_inline] };
        let share = |shares: Option<load::report::Shares>, part: Part| shares.map(|shares| shares.0[part as usize]);
        assert!(share(ran, Part::Useful) > Some(0.0));
        assert_eq!(share(idle, Part::IdleEmpty), Some(1.0), "nothing was asked of the other");
        let page = report.human();
        let line = |name: &str| page.lines().find(|line| line.starts_with(name)).map(|line| line.contains('%'));
        let lines = [line("executors "), line("inline ")];
        assert_eq!(lines, if inline { [None, Some(true)] } else { [Some(true), None] }, "{page}");
        assert!(page.contains("idle_empty") || page.contains("useful"), "{page}");
    }
}

#[test]
fn work_that_comes_while_an_executor_runs_does_not_make_it_idle() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let sleep = raw.handle("sleep");
    let before = parts(&server, THREAD);
    let asked: Vec<u64> = (0..20).map(|_| raw.ask(&Ask::word(sleep, 50_000))).collect();
    asked.iter().for_each(|_| drop(raw.recv().expect_result()));
    wait_until_idle(&server, 2);
    let parts = since(&server, THREAD, &before);
    assert!(parts.of_batches() >= 50_000_000, "{parts:?}");
    assert_eq!(largest_but_empty(&parts), Part::Useful, "{parts:?}");
}

/// A load of everything at once, from tenants of two names and one without.
fn mixed_load(server: &Server) {
    let tenants = ["red", "green", ""];
    std::thread::scope(|scope| {
        for (at, tenant) in tenants.into_iter().enumerate() {
            scope.spawn(move || {
                let options = ClientOptions { tenant: tenant.to_owned(), ..ClientOptions::default() };
                let client = Client::connect(server.data, options).expect("the server listens");
                let mut numbers = Numbers(at as u64);
                for _ in 0..60 {
                    let len = 1 + numbers.below(if at == 0 { 500 } else { 40 }) as usize;
                    for model in ["echo", "queued"] {
                        let request = Request::new(model).input("values", &[1, len as u32], &vec![1.0f32; len]);
                        client.infer(&request).expect("an answer");
                    }
                }
            });
        }
        scope.spawn(move || {
            let mut raw = Raw::open(server.data);
            let (sleep, bert) = (raw.handle("sleep"), raw.handle("tiny_bert"));
            for round in 0..20u32 {
                let ids: Vec<u32> = (0..1 + round % 16).collect();
                raw.ask(&Ask::new(bert, DType::U32, &[1, ids.len() as u32], bytemuck::cast_slice(&ids)));
                raw.ask(&Ask::word(sleep, 300));
                (0..2).for_each(|_| drop(raw.recv().expect_result()));
            }
        });
    });
}

#[test]
fn under_a_mixed_load_every_executors_time_and_every_tenants_account_add_up() {
    let server = Server::start(&["threads.shards=2", "threads.executors=2"]);
    set(&server, "queued", json!({ "policy": "window", "queue_delay_max_us": 2_000, "layout": "padded" }));
    let loaded = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Somebody looks all the time: what was seen only grows.
        scope.spawn(|| {
            let mut before = vec![Parts::default(); 3];
            while !loaded.load(std::sync::atomic::Ordering::Relaxed) {
                for (executor, before) in before.iter_mut().enumerate() {
                    *before = {
                        since(&server, executor, before);
                        parts(&server, executor)
                    };
                }
            }
        });
        mixed_load(&server);
        loaded.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    wait_until_idle(&server, 3);

    // Nothing moves: between two looks, time passes into one part of each executor, as much of it as passed.
    let first_at = clock::now();
    let first: Vec<Parts> = (0..3).map(|executor| parts(&server, executor)).collect();
    let between = clock::now();
    let later: Vec<Parts> = (0..3).map(|executor| parts(&server, executor)).collect();
    let most = clock::now().since(first_at);
    for (executor, (first, later)) in first.iter().zip(&later).enumerate() {
        let passed = Duration::from_nanos(later.total() - first.total());
        assert!(passed <= most, "executor {executor}: {passed:?} of {most:?} since {between:?}");
        assert_eq!(later.total() - first.total(), later.get(Part::IdleEmpty) - first.get(Part::IdleEmpty));
        assert!(first.get(Part::Useful) > 0, "executor {executor} ran something: {first:?}");
        assert!(first.get(Part::IdlePacking) > 0 && first.get(Part::IdleMailbox) > 0, "{first:?}");
    }
    assert!(first[0].get(Part::IdleHold) + first[1].get(Part::IdleHold) > 0, "a window was held: {first:?}");

    // The same on both pages.
    let (status, stats) = control(server.control, "GET", "/stats", "", "");
    assert_eq!(status, 200);
    let executors = stats["waterfall"]["executors"].as_array().expect("a list");
    assert_eq!(executors.iter().map(|executor| executor["inline"] == true).collect::<Vec<_>>(), [false, false, true]);
    let page = server.telemetry.encode();
    let metric = |name: &str, labels: &[&str]| crate::common::metric(&page, name, labels);
    for (executor, shown) in executors.iter().enumerate() {
        for (part, name) in Part::ALL.into_iter().zip(PARTS).filter(|(part, _)| *part != Part::IdleEmpty) {
            let seconds = first[executor].get(part) as f64 / 1e9;
            assert_eq!(shown["seconds"][name].as_f64(), Some(seconds), "executor {executor}: {name}");
            let labels = [format!("executor=\"{executor}\""), format!("part=\"{name}\"")];
            let labels = [labels[0].as_str(), labels[1].as_str()];
            assert!((metric("ferry_executor_time_seconds_total", &labels) - seconds).abs() < 1e-9, "{labels:?}");
        }
    }

    // Every cell and every nanosecond that was run is some tenant's. The audit compares them to the last one.
    assert_eq!(server.telemetry.audit(), Ok(()));
    for model in ["echo", "queued", "sleep", "tiny_bert"] {
        let label = format!("model=\"{model}\"");
        let real = metric("ferry_tenant_cells_total", &[&label, "kind=\"real\""]);
        assert!(real > 0.0);
        assert_eq!(real, metric("ferry_batch_cells_real_total", &[&label]), "{model}");
        let padding = metric("ferry_tenant_cells_total", &[&label, "kind=\"padding\""]);
        assert_eq!(padding, metric("ferry_batch_cells_padding_total", &[&label]), "{model}");
    }
    let ran: u64 = first.iter().map(Parts::of_batches).sum();
    let charged = metric("ferry_tenant_executor_seconds_total", &[]);
    assert!((charged - ran as f64 / 1e9).abs() < 1e-6, "{charged} s of {ran} ns");
    let cells = |tenant: &str| metric("ferry_tenant_cells_total", &[&format!("tenant=\"{tenant}\""), "kind=\"real\""]);
    assert!(cells("red") > cells("green") && cells("green") > 0.0, "red sends longer rows");
    assert!(cells("other") > 0.0, "the nameless, and those of other connections");
}
