//! The load generator against the bare server, which can be told to misbehave: what it reports must be what happened.

#[path = "../benches/support/bare_server.rs"]
mod bare_server;

use std::time::Duration;

use bare_server::BareOptions;
use ferry::load::{Arrival, Lengths, LoadOptions, Mode, Report, Trace, run};

fn options(server: BareOptions, mode: Mode) -> LoadOptions {
    LoadOptions {
        lengths: Lengths::Uniform(1, 100),
        duration: Duration::from_millis(200),
        warmup: Duration::from_millis(20),
        connections: 2,
        inputs_max: 64,
        drain_max: Duration::from_secs(30),
        ..LoadOptions::new(bare_server::spawn(server), "echo", mode)
    }
}

fn report(options: &LoadOptions) -> Report {
    run(options, |_| ()).expect("the bare server serves")
}

#[test]
fn every_open_loop_arrival_is_sent_and_answered() {
    for arrival in [Arrival::Poisson, Arrival::Constant, Arrival::Burst] {
        let report = report(&options(BareOptions::default(), Mode::Open { rate: 2000.0, arrival }));
        assert!(report.sent > 0, "{arrival:?}");
        assert_eq!((report.ok, report.lost, report.unsent), (report.sent, 0, 0), "{arrival:?}");
        assert!(report.errors.is_empty() && !report.failed(), "{arrival:?}: {report:?}");
        assert_eq!(report.histogram.len(), report.ok);
    }
}

#[test]
fn equal_seeds_offer_equal_load() {
    let constant = Mode::Open { rate: 3000.0, arrival: Arrival::Poisson };
    let options = options(BareOptions::default(), constant);
    let (first, second) = (report(&options), report(&options));
    assert_eq!(first.sent, second.sent, "arrivals in the measured time follow from the seed alone");
    assert_ne!(first.sent, report(&LoadOptions { seed: 99, ..options }).sent);
}

#[test]
fn a_closed_loop_keeps_its_callers_busy_within_the_credit() {
    let server = BareOptions { credit_requests: 4, ..BareOptions::default() };
    let report = report(&options(server, Mode::Closed { callers: 32 }));
    assert_eq!((report.ok, report.lost, report.unsent), (report.sent, 0, 0));
    assert!(report.ok > 32, "each caller goes on when it was answered, got {}", report.ok);
    assert_eq!(report.concurrency, Some(32));
}

#[test]
fn callers_who_are_refused_come_back_when_they_were_told_to_and_impatient_ones_at_once() {
    let server = || BareOptions { refuse_for_ms: Some(50), ..BareOptions::default() };
    let patient = report(&options(server(), Mode::Closed { callers: 4 }));
    // 220 ms with the warm-up: at most five rounds of four, however late each is.
    assert!((1..=20).contains(&patient.errors["overloaded"]), "{:?}", patient.errors);
    assert_eq!((patient.ok, patient.lost), (0, 0));
    let impatient = LoadOptions { impatient: true, ..options(server(), Mode::Closed { callers: 4 }) };
    assert!(report(&impatient).errors["overloaded"] > 20);
}

#[test]
fn verification_passes_an_honest_echo() {
    let options = options(BareOptions::default(), Mode::Closed { callers: 16 });
    let report = report(&LoadOptions { verify: Some(1.0), ..options });
    assert!(report.verified >= report.ok, "warm-up answers are verified too");
    assert_eq!(report.mismatches, 0);
}

#[test]
fn verification_finds_a_planted_wrong_byte() {
    let server = BareOptions { corrupt_every: Some(10), ..BareOptions::default() };
    let options = options(server, Mode::Closed { callers: 16 });
    let report = report(&LoadOptions { verify: Some(1.0), ..options });
    // The server counts requests as the client does: of n verified answers every tenth is wrong.
    assert_eq!(report.mismatches, report.verified / 10);
    assert!(report.failed());
    assert!(report.mismatch_examples[0].contains("element 0"), "{:?}", report.mismatch_examples);
}

#[test]
fn a_model_that_computes_is_verified_against_what_each_input_gives_alone() {
    // The first 64 answers are the references, one per input; every hundredth answer is wrong.
    let server = BareOptions { architecture: "other", corrupt_every: Some(100), ..BareOptions::default() };
    let options = options(server, Mode::Closed { callers: 16 });
    let report = report(&LoadOptions { verify: Some(1.0), ..options });
    assert_eq!(report.inputs_distinct, 64);
    assert!(report.verified > 100, "{}", report.verified);
    assert_eq!(report.mismatches, (64 + report.verified) / 100);
}

#[test]
fn after_a_goaway_what_was_not_taken_is_an_error_and_the_run_ends() {
    let server = BareOptions { goaway_at: Some(500), ..BareOptions::default() };
    let options = options(server, Mode::Closed { callers: 16 });
    let options = LoadOptions { connections: 1, warmup: Duration::ZERO, ..options };
    let report = report(&LoadOptions { duration: Duration::from_secs(600), ..options });
    assert_eq!((report.ok, report.lost, report.connections_lost), (500, 0, 0));
    assert_eq!(report.errors.keys().collect::<Vec<_>>(), ["draining"]);
    assert_eq!(report.errors["draining"] + report.ok, report.sent);
    assert!(report.connection_errors[0].contains("goaway"), "{:?}", report.connection_errors);
}

#[test]
fn a_share_is_verified_when_a_share_is_asked_for() {
    let options = options(BareOptions::default(), Mode::Closed { callers: 16 });
    let report = report(&LoadOptions { verify: Some(0.25), ..options });
    let share = report.verified as f64 / report.ok as f64;
    assert!(share > 0.1 && share < 0.6, "{share}");
}

#[test]
fn an_answer_that_never_comes_is_lost_and_not_forgotten() {
    let server = BareOptions { drop_every: Some(100), ..BareOptions::default() };
    let options = options(server, Mode::Open { rate: 5000.0, arrival: Arrival::Constant });
    let report = report(&LoadOptions { drain_max: Duration::from_millis(100), ..options });
    assert!(report.lost > 0);
    assert_eq!(report.ok + report.lost, report.sent);
    assert!(report.failed());
}

#[test]
fn arrivals_beyond_a_full_backlog_are_counted_as_unsent() {
    // Nothing is ever answered, so after the credit is used all arrivals wait in a backlog of 10.
    let server = BareOptions { drop_every: Some(1), credit_requests: 4, ..BareOptions::default() };
    let options = options(server, Mode::Open { rate: 2000.0, arrival: Arrival::Constant });
    let options = LoadOptions { backlog_max: 10, drain_max: Duration::from_millis(50), ..options };
    let report = report(&LoadOptions { warmup: Duration::ZERO, ..options });
    assert_eq!((report.sent, report.ok, report.lost), (8, 0, 8), "two connections of 4 requests");
    assert_eq!(report.unsent + report.sent, (report.offered_rps * report.duration_s).round() as u64);
    assert!(report.unsent > 300, "{}", report.unsent);
}

#[test]
fn waiting_for_credit_counts_as_latency_and_as_late() {
    // One request at a time for a burst of 50: the last one has waited for 49 others.
    let server = BareOptions { credit_requests: 1, ..BareOptions::default() };
    let mode = Mode::Trace(Trace { arrivals: vec![(0, 8); 50].into() });
    let options = LoadOptions { connections: 1, warmup: Duration::ZERO, ..options(server, mode) };
    let report = report(&options);
    assert_eq!((report.sent, report.ok, report.unsent), (50, 50, 0));
    assert!(report.latency_us.max > report.latency_us.p50, "{:?}", report.latency_us);
}

#[test]
fn a_deadline_that_passes_in_the_backlog_is_an_error_that_was_not_sent() {
    let server = BareOptions { drop_every: Some(1), credit_requests: 1, ..BareOptions::default() };
    let options = options(server, Mode::Open { rate: 1000.0, arrival: Arrival::Constant });
    let options = LoadOptions {
        deadline: Some(Duration::from_millis(5)),
        warmup: Duration::ZERO,
        drain_max: Duration::from_millis(20),
        ..options
    };
    let report = report(&options);
    assert_eq!(report.sent, 2);
    assert!(report.expired_before_send > 100, "{}", report.expired_before_send);
    assert_eq!(report.errors["deadline_exceeded"], report.expired_before_send);
    assert_eq!(
        report.sent + report.unsent + report.expired_before_send,
        (report.offered_rps * report.duration_s).round() as u64
    );
}

#[test]
fn the_json_document_has_every_promised_field() {
    let report = report(&options(BareOptions::default(), Mode::Closed { callers: 4 }));
    let json = serde_json::to_value(&report).expect("plain data");
    for field in [
        "offered_rps",
        "sent",
        "ok",
        "errors",
        "goodput_rps",
        "throughput_rps",
        "tokens_per_s",
        "late_sends",
        "mismatches",
        "verified",
        "unsent",
        "lost",
        "duration_s",
        "mode",
        "connections",
    ] {
        assert!(!json[field].is_null(), "{field} is missing");
    }
    for field in ["p50", "p90", "p99", "p999", "max"] {
        assert!(json["latency_us"][field].as_f64().expect("a number") > 0.0, "{field}");
    }
    for field in ["fill_ratio", "padding_waste", "executor_busy", "batches", "batch_rows_mean"] {
        assert!(json["server"][field].is_number(), "{field} is missing");
    }
    let quantiles = ["p50", "p90", "p99", "p999", "max"].map(|field| json["latency_us"][field].as_f64());
    assert!(quantiles.is_sorted(), "{quantiles:?}");
    assert!(report.hgrm().contains("Total count"));
    assert!(report.human().contains("throughput"));
}

#[test]
fn contradictions_are_wrong_use() {
    let good = options(BareOptions::default(), Mode::Closed { callers: 1 });
    let bad = [
        LoadOptions { mode: Mode::Closed { callers: 0 }, ..good.clone() },
        LoadOptions { mode: Mode::Open { rate: 0.0, arrival: Arrival::Poisson }, ..good.clone() },
        LoadOptions { connections: 0, ..good.clone() },
        LoadOptions { duration: Duration::ZERO, ..good.clone() },
        LoadOptions { verify: Some(1.5), ..good.clone() },
    ];
    for options in bad {
        assert!(matches!(run(&options, |_| ()), Err(ferry::load::LoadError::Usage(_))), "{options:?}");
    }
    let unknown = LoadOptions { model: "nothing".into(), ..good };
    let error = run(&unknown, |_| ()).expect_err("there is no such model");
    assert!(error.to_string().contains("not_found"), "{error}");
}
