//! Policies in virtual time: what each carries is a promise, so a change that loses goodput fails here. Nothing depends on
//! the machine: equal seeds give equal outcomes.

use ferry::load::lengths::Lengths;
use ferry::replay::compare::{Effort, ON_TIME, Row, goodput, on_time_rate};
use ferry::replay::world::{Outcome, Pattern, calls};
use ferry::replay::{Hardware, bound, simulate};
use ferry::scheduler::{Class, Policy, PolicyKind, TenantId};
use ferry::vocab::Layout;

const EFFORT: Effort = Effort { calls: (40_000, 6_000), steps: 5, seed: 7, tune: false };

fn row(hardware: Hardware, lengths: &str) -> Row {
    Row {
        hardware,
        lengths_name: "",
        lengths: Lengths::parse(lengths).expect("well formed"),
        pattern: Pattern::Poisson,
    }
}

#[test]
fn equal_seeds_give_equal_outcomes() {
    let hardware = Hardware::gpu();
    let lengths = Lengths::parse("lognormal:40,0.9,512").expect("well formed");
    let load = calls(&hardware, &lengths, Pattern::Bursty, 30_000.0, 20_000, 3);
    let policy = hardware.policy(PolicyKind::Cost, 512);
    let run = |seed| {
        let outcome = simulate(&policy, &hardware, &load, seed, u64::MAX);
        (outcome.on_time, outcome.batches, outcome.cells_padded, outcome.span, outcome.decisions)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2), "batch times are drawn from the seed");
}

#[test]
fn every_call_is_answered_given_up_or_refused() {
    let hardware = Hardware::cpu();
    let lengths = Lengths::parse("bimodal:16,256,0.15").expect("well formed");
    for kind in PolicyKind::ALL {
        let load = calls(&hardware, &lengths, Pattern::Bursty, 400.0, 5_000, 3);
        let outcome = simulate(&hardware.policy(kind, 512), &hardware, &load, 1, u64::MAX);
        assert_eq!(outcome.on_time + outcome.late + outcome.expired + outcome.refused, 5_000, "{kind}");
        assert!(
            outcome.refused + outcome.expired > 0 && outcome.on_time > 0,
            "{kind} was offered more than it carries"
        );
    }
}

/// The least shares of the bound on these shorter runs; benches/record has the long ones.
#[test]
fn the_policy_cost_carries_what_it_is_known_to_carry() {
    for (hardware, lengths, least) in [
        (Hardware::gpu(), "lognormal:40,0.9,512", 0.80),
        (Hardware::gpu(), "fixed:64", 0.95),
        (Hardware::cpu(), "lognormal:40,0.9,512", 0.68),
        (Hardware::cpu(), "bimodal:16,256,0.15", 0.58),
    ] {
        let name = format!("{} {lengths}", hardware.name);
        let row = row(hardware, lengths);
        let limit = bound::bound(&row.hardware, &row.lengths);
        let found = goodput(&row, PolicyKind::Cost, limit, &EFFORT, |_| {});
        assert!(found.share >= least, "{name}: {:.3} of the bound, {least} expected", found.share);
        assert!(found.share <= 1.0, "{name}: nothing exceeds the bound");
    }
}

#[test]
fn overload_costs_the_policy_cost_little_and_a_fixed_window_everything() {
    let row = row(Hardware::gpu(), "lognormal:40,0.9,512");
    let limit = bound::bound(&row.hardware, &row.lengths);
    let kept = |kind| {
        let found = goodput(&row, kind, limit, &EFFORT, |_| {});
        assert!(found.rate > 0.0, "{kind}");
        on_time_rate(&row, &found.policy, 1.5 * limit, &EFFORT) / found.rate
    };
    let (cost, window) = (kept(PolicyKind::Cost), kept(PolicyKind::Window));
    assert!(cost >= 0.9, "{cost:.2} of its goodput is left at 1.5 times the bound");
    assert!(window < 0.5, "the baseline of this comparison does not collapse ({window:.2}): is it still that policy?");
}

/// Where other work shares the cores a batch takes what it takes. Whoever stakes every row on the mean of that computes all of
/// them too late: a seventh of the bound was left, before experience was asked.
#[test]
fn three_times_the_load_leaves_most_of_the_goodput_where_no_batch_can_be_foreseen() {
    for (layout, lengths, least) in [
        (Layout::Padded, "fixed:64", 0.75),
        (Layout::Padded, "bimodal:16,256,0.15", 1.0),
        (Layout::Packed, "fixed:64", 0.75),
        (Layout::Packed, "lognormal:40,0.9,512", 0.9),
    ] {
        let (hardware, parsed) = (Hardware::crowded(), Lengths::parse(lengths).expect("well formed"));
        let limit = bound::bound(&hardware, &parsed);
        let policy = Policy { layout, can_pack: true, ..hardware.policy(PolicyKind::Cost, 512) };
        let load = calls(&hardware, &parsed, Pattern::Poisson, 3.0 * limit, 8_000, 5);
        let outcome = simulate(&policy, &hardware, &load, 1, u64::MAX);
        let kept = outcome.on_time as f64 / outcome.span.as_secs_f64() / limit;
        assert!(kept >= least, "{} {lengths}: {kept:.3} of the bound, {least} expected", layout.name());
        // Of what is computed nine of ten are on time, as the factor says, or nearly.
        assert!(outcome.late * 4 < outcome.on_time, "{} late, {} on time", outcome.late, outcome.on_time);
    }
}

/// Rows end to end: what is refused costs nothing, and who is admitted waits for a part of the slack only.
#[test]
fn three_times_the_load_costs_rows_end_to_end_no_goodput_and_nobody_waits_long() {
    let mut hardware = Hardware::cpu();
    hardware.slack = std::time::Duration::from_millis(500);
    let lengths = Lengths::parse("lognormal:40,0.6,128").expect("well formed");
    let limit = bound::bound(&hardware, &lengths);
    let run = |times: f64, knob: &str| {
        let policy = Policy { layout: Layout::Packed, can_pack: true, ..hardware.policy(PolicyKind::Cost, 512) };
        let policy = policy.with([("overload_admission", knob)]).expect("a knob");
        simulate(
            &policy,
            &hardware,
            &calls(&hardware, &lengths, Pattern::Poisson, times * limit, 20_000, 5),
            1,
            u64::MAX,
        )
    };
    let (normal, over, without) = (run(0.8, "auto"), run(3.0, "auto"), run(3.0, "0"));
    let goodput = |outcome: &Outcome| outcome.on_time as f64 / outcome.span.as_secs_f64() / limit;
    assert_eq!((normal.refused, normal.expired), (0, 0));
    assert!(
        goodput(&over) >= 0.95 && goodput(&over) >= 0.97 * goodput(&without),
        "{} {}",
        goodput(&over),
        goodput(&without)
    );
    // What came before the queue had stood long enough may expire; what comes then is told at once.
    assert!(over.expired + over.late < over.refused / 20, "{} {} {}", over.expired, over.late, over.refused);
    let (waits, waited) = (over.percentile(0.9), without.percentile(0.5));
    assert!(waits < hardware.slack / 2 && waited > hardware.slack / 2, "{waits:?} {waited:?}");
}

#[test]
fn a_tenant_that_floods_leaves_the_others_most_of_theirs() {
    let hardware = Hardware::gpu();
    let lengths = Lengths::parse("lognormal:40,0.9,512").expect("well formed");
    let limit = bound::bound(&hardware, &lengths);
    // 1.6 times what could be carried at best, four fifths of it from one tenant.
    let mut load = calls(&hardware, &lengths, Pattern::Poisson, 1.6 * limit, 80_000, 5);
    for (at, call) in load.iter_mut().enumerate() {
        call.tenant = TenantId(if at % 5 == 0 { 1 + (at / 5 % 4) as u16 } else { 0 });
        call.class = Class::default();
    }
    let outcome = simulate(&hardware.policy(PolicyKind::Cost, 512), &hardware, &load, 1, u64::MAX);
    let share = |tenants: &[(u64, u64)]| {
        let (offered, on_time) = tenants.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        on_time as f64 / offered as f64
    };
    let (flood, others) = (share(&outcome.by_tenant[..1]), share(&outcome.by_tenant[1..]));
    println!("the flood {flood:.3} on time, the others {others:.3}");
    assert!(others > 0.85, "{others:.3} of the others' calls are on time");
    assert!(flood < others, "{flood:.3}");
    const { assert!(ON_TIME == 0.99) };
}

/// A library of traces of a real server: minilm packed, minilm padded under two tenants at its limit, and buckets beside digits.
mod the_gate {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use serde_json::Value;

    const FERRY: &str = env!("CARGO_BIN_EXE_ferry");

    fn library() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces/gate.json")
    }

    fn gate(file: &Path, more: &[&str]) -> (Option<i32>, Value) {
        let output = Command::new(FERRY).args(["replay", "--json", "--gate"]).arg(file).args(more).output();
        let output = output.expect("the binary runs");
        let value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{error}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
        });
        (output.status.code(), value)
    }

    /// A change of the scheduler that makes one of these traces worse fails here. If it is meant: `ferry replay --gate
    /// tests/traces/gate.json --write`, and a line in the commit about what moved and why.
    #[test]
    fn no_trace_of_the_library_comes_to_less_than_before() {
        let (status, result) = gate(&library(), &[]);
        assert_eq!((status, &result["passed"]), (Some(0), &true.into()), "{result:#}");
        assert!(result["traces"].as_array().expect("a list").len() >= 3);
    }

    /// Figures that another build had, better than ours.
    #[test]
    fn a_figure_that_got_worse_fails_it_and_is_named() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let folder = library().parent().expect("it is in a folder").to_owned();
        let text = std::fs::read_to_string(library()).expect("it is there");
        let mut kept: Value = serde_json::from_str(&text).expect("JSON");
        for name in kept["traces"].as_object().expect("traces").keys() {
            std::fs::copy(folder.join(name), directory.path().join(name)).expect("copies");
        }
        let minilm = &mut kept["traces"]["packed.trace"]["models"]["minilm"];
        minilm["p99_ms"] = (minilm["p99_ms"].as_f64().expect("a number") * 0.8).into();
        let file = directory.path().join("gate.json");
        std::fs::write(&file, kept.to_string()).expect("writes");
        let (status, result) = gate(&file, &[]);
        assert_eq!((status, &result["passed"]), (Some(1), &false.into()));
        let worse: Vec<&str> = result["traces"]
            .as_array()
            .expect("a list")
            .iter()
            .flat_map(|trace| trace["regressions"].as_array().expect("a list"))
            .map(|text| text.as_str().expect("a text"))
            .collect();
        assert_eq!(worse.len(), 1, "{worse:?}");
        assert!(worse[0].starts_with("minilm: p99_ms was "), "{worse:?}");
        // Written anew, it passes again.
        assert_eq!(gate(&file, &["--write"]).0, Some(0));
        assert_eq!(gate(&file, &[]).0, Some(0));
    }

    #[test]
    fn another_build_that_decides_alike_differs_nowhere() {
        let (status, result) = gate(&library(), &["--against", FERRY]);
        assert_eq!(status, Some(0));
        for trace in result["traces"].as_array().expect("a list") {
            assert_eq!((&trace["decisions_equal"], &trace["first_difference"]), (&true.into(), &Value::Null));
        }
    }
}
