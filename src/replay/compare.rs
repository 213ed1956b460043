//! Policies side by side: how much load each carries while 99 % of the requests meet their deadline.

use std::time::Duration;

use super::world::{Pattern, calls, simulate};
use super::{Hardware, bound};
use crate::load::lengths::Lengths;
use crate::scheduler::{Policy, PolicyKind};

/// Goodput asks for this share of all offered requests.
pub const ON_TIME: f64 = 0.99;

/// One load to carry.
#[derive(Clone, Debug)]
pub struct Row {
    pub hardware: Hardware,
    pub lengths_name: &'static str,
    pub lengths: Lengths,
    pub pattern: Pattern,
}

pub const LENGTHS: [(&str, &str); 4] = [
    ("fixed", "fixed:64"),
    ("uniform", "uniform:8..128"),
    ("lognormal", "lognormal:40,0.9,512"),
    ("bimodal", "bimodal:16,256,0.15"),
];

const LEN_MAX: u32 = 512;

/// The rows of the table.
pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for pattern in [Pattern::Poisson, Pattern::Bursty] {
        for hardware in [Hardware::gpu(), Hardware::cpu()] {
            for (lengths_name, text) in LENGTHS {
                let lengths = Lengths::parse(text).expect("well formed");
                rows.push(Row { hardware: hardware.clone(), lengths_name, lengths, pattern });
            }
        }
    }
    rows
}

/// How precisely, and so for how long.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Calls per run on the GPU, and on the CPU.
    pub calls: (usize, usize),
    /// Steps of the search for the highest load.
    pub steps: u32,
    pub seed: u64,
    /// Tune the baselines for every row.
    pub tune: bool,
}

impl Effort {
    pub const FULL: Effort = Effort { calls: (400_000, 30_000), steps: 9, seed: 1, tune: true };
    pub const QUICK: Effort = Effort { calls: (60_000, 6_000), steps: 6, seed: 1, tune: true };

    fn calls_on(&self, hardware: &Hardware) -> usize {
        if hardware.name == "gpu" { self.calls.0 } else { self.calls.1 }
    }
}

/// A policy's result in a row.
#[derive(Clone, Debug)]
pub struct Goodput {
    pub kind: PolicyKind,
    /// Requests per second.
    pub rate: f64,
    /// Of the bound.
    pub share: f64,
    /// The setting that it was reached with.
    pub setting: String,
    /// Requests per second that are on time at 1.5 times the best policy's goodput, as a share of this policy's goodput.
    pub overload: f64,
    pub policy: Policy,
}

/// Settings that a baseline is tuned over. Ours has one.
fn settings(row: &Row, kind: PolicyKind, tune: bool) -> Vec<(String, Policy)> {
    let base = row.hardware.policy(kind, LEN_MAX);
    let slack = row.hardware.slack;
    let delays = [0.0, 0.02, 0.1, 0.25, 0.5].map(|share| slack.mul_f64(share));
    let mut found = Vec::new();
    match kind {
        PolicyKind::Cost => found.push(("default".to_owned(), base)),
        PolicyKind::Window => {
            for delay in delays {
                for divisor in [1, 2, 4, 8, 16] {
                    let rows_max = (base.rows_max / divisor).max(1);
                    let policy = Policy { queue_delay_max: Some(delay), rows_max, ..base.clone() };
                    found.push((format!("rows {rows_max}, delay {delay:?}"), policy));
                }
            }
        }
        PolicyKind::GreedyTokens => {
            for divisor in [1, 2, 4, 8, 16, 32] {
                let cells_max = (base.cells_max / divisor).max(u64::from(LEN_MAX));
                found.push((format!("{cells_max} cells"), Policy { cells_max, ..base.clone() }));
            }
        }
        PolicyKind::Buckets => {
            for delay in delays {
                for divisor in [1, 2, 4, 8] {
                    for fill_waste_max in [0.0, 0.12, 0.25, 0.5] {
                        let rows_max = (base.rows_max / divisor).max(1);
                        let policy = Policy { queue_delay_max: Some(delay), rows_max, fill_waste_max, ..base.clone() };
                        found.push((format!("rows {rows_max}, delay {delay:?}, fill {fill_waste_max}"), policy));
                    }
                }
            }
        }
    }
    if !tune {
        found.truncate(1);
    }
    found
}

/// Whether a policy holds the objective at this rate.
fn holds(row: &Row, policy: &Policy, rate: f64, effort: &Effort) -> bool {
    let count = effort.calls_on(&row.hardware);
    let load = calls(&row.hardware, &row.lengths, row.pattern, rate, count, effort.seed);
    let misses_max = (count as f64 * (1.0 - ON_TIME)) as u64;
    let outcome = simulate(policy, &row.hardware, &load, effort.seed, misses_max);
    outcome.late + outcome.expired + outcome.refused <= misses_max
}

/// The goodput of one policy in a row. `note` is told of each setting that is tried.
pub fn goodput(row: &Row, kind: PolicyKind, limit: f64, effort: &Effort, mut note: impl FnMut(&str)) -> Goodput {
    let settings = settings(row, kind, effort.tune);
    let mut best: (f64, usize) = (0.0, 0);
    for (at, (name, policy)) in settings.iter().enumerate() {
        note(name);
        // Most settings are worse than the best so far; one run tells.
        if best.0 > 0.0 && !holds(row, policy, best.0 + 0.01 * limit, effort) {
            continue;
        }
        let (mut low, mut high) = (best.0, 1.05 * limit);
        for _ in 0..effort.steps {
            let rate = (low + high) / 2.0;
            if holds(row, policy, rate, effort) { low = rate } else { high = rate }
        }
        if low > best.0 {
            best = (low, at);
        }
    }
    let (setting, policy) = settings[best.1].clone();
    Goodput { kind, rate: best.0, share: best.0 / limit, setting, overload: 0.0, policy }
}

/// Requests per second that are on time at a rate.
pub fn on_time_rate(row: &Row, policy: &Policy, rate: f64, effort: &Effort) -> f64 {
    let count = effort.calls_on(&row.hardware);
    let load = calls(&row.hardware, &row.lengths, row.pattern, rate, count, effort.seed);
    let outcome = simulate(policy, &row.hardware, &load, effort.seed, u64::MAX);
    outcome.on_time as f64 / outcome.span.max(Duration::from_nanos(1)).as_secs_f64()
}

/// All policies in one row, with the bound.
pub fn compare(row: &Row, effort: &Effort, mut note: impl FnMut(PolicyKind, &str)) -> (f64, Vec<Goodput>) {
    let limit = bound::bound(&row.hardware, &row.lengths);
    let mut found: Vec<Goodput> =
        PolicyKind::ALL.iter().map(|kind| goodput(row, *kind, limit, effort, |name| note(*kind, name))).collect();
    let best = found.iter().map(|goodput| goodput.rate).fold(0.0, f64::max);
    for goodput in &mut found {
        goodput.overload = match goodput.rate > 0.0 {
            true => on_time_rate(row, &goodput.policy, 1.5 * best, effort) / goodput.rate,
            false => 0.0,
        };
    }
    (limit, found)
}
