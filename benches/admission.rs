//! What refusing early costs or gains in virtual time: the policy `cost` with `overload_admission` at several shares, at nine tenths of
//! what no scheduler can exceed, at that, at one and a half times and three times it. Rows padded and end to end, three kinds of hardware, three
//! mixes of lengths.
//!
//!     cargo bench --bench admission [-- WORD…]   only the rows with all these words; `cargo test --benches` runs it with few calls
//!
//! For each share: requests on time as a share of the bound, and in percent of all those that expired or were late, and those that were
//! refused. Above 1, short rows are preferred where not all can be served. Nothing depends on the machine.

use ferry::load::lengths::Lengths;
use ferry::replay::world::{Pattern, calls};
use ferry::replay::{Hardware, bound, simulate};
use ferry::scheduler::{Policy, PolicyKind};
use ferry::vocab::Layout;

const SHARES: [f64; 4] = [0.0, 0.15, 0.25, 0.6];
const LEN_MAX: u32 = 512;

fn main() {
    // As cargo says when it measures.
    let tiny = !std::env::args().any(|argument| argument == "--bench");
    println!("{:47} {}", "", SHARES.map(|share| format!("{share:<21}")).join(""));
    let only: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for layout in [Layout::Padded, Layout::Packed] {
        for hardware in [Hardware::cpu(), Hardware::gpu(), Hardware::crowded()] {
            for lengths in ["lognormal:40,0.9,512", "fixed:64", "bimodal:16,256,0.15"] {
                let name = format!("{} {} {lengths}", layout.name(), hardware.name);
                if !only.iter().all(|word| name.contains(word.as_str())) {
                    continue;
                }
                for times in [0.9, 1.0, 1.5, 3.0] {
                    row(layout, &hardware, lengths, times, tiny);
                }
            }
        }
    }
}

fn row(layout: Layout, hardware: &Hardware, lengths: &str, times: f64, tiny: bool) {
    let parsed = Lengths::parse(lengths).expect("well formed");
    let limit = bound::bound(hardware, &parsed);
    let count = if hardware.name == "gpu" { 60_000 } else { 8_000 } / if tiny { 20 } else { 1 };
    let load = calls(hardware, &parsed, Pattern::Poisson, times * limit, count, 5);
    let mut line = format!("{:6} {:7} {lengths:22} {times:3} times", layout.name(), hardware.name);
    for share in SHARES {
        let mut policy = Policy { can_pack: true, layout, ..hardware.policy(PolicyKind::Cost, LEN_MAX) };
        policy.tuning.overload_admission = Some(share);
        let outcome = simulate(&policy, hardware, &load, 1, u64::MAX);
        let on_time = outcome.on_time as f64 / outcome.span.as_secs_f64() / limit;
        let percent = |count: u64| 100 * count / outcome.offered.max(1);
        let (missed, refused) = (percent(outcome.expired + outcome.late), percent(outcome.refused));
        line += &format!("  {on_time:.3} ({missed:>2}, {refused:>2})    ");
    }
    println!("{line}");
}
