//! Policies in virtual time: what each carries is a promise, so a change that loses goodput fails here. Nothing depends on
//! the machine: equal seeds give equal outcomes.

use ferry::load::lengths::Lengths;
use ferry::replay::compare::{Effort, ON_TIME, Row, goodput, on_time_rate};
use ferry::replay::world::{Pattern, calls};
use ferry::replay::{Hardware, bound, simulate};
use ferry::scheduler::{Class, PolicyKind, TenantId};

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
