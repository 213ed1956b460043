//! How much load no scheduler can carry: what goodput is measured against.
//!
//! Both bounds hold for a scheduler that knows the future. Neither charges the variance of queueing, so the whole of
//! either is out of reach.

use super::Hardware;
use crate::load::Rng;
use crate::load::lengths::Lengths;

const SAMPLE: usize = 100_000;

/// The smaller of both bounds, in requests per second.
pub fn bound(hardware: &Hardware, lengths: &Lengths) -> f64 {
    by_share(hardware, lengths).min(by_blocks(hardware, lengths))
}

/// An on-time request of length L is in a batch of at most `min(rows_max, 1 + slack/w(L))` rows, so it costs at least its
/// share of the fixed part and its own work.
///
/// Holds for rows that lie end to end too, of which the whole bound asks too much.
pub fn by_share(hardware: &Hardware, lengths: &Lengths) -> f64 {
    let times = &hardware.times;
    let slack = hardware.slack.as_nanos() as f64;
    let (mut cost, mut work) = (0.0, 0.0);
    for len in lengths.sampler(1).take(SAMPLE) {
        let row = times.row(len);
        let most = (1.0 + slack / row).floor().min(f64::from(hardware.rows_max));
        cost += times.batch / most + row;
        work += row;
    }
    let by_cost = hardware.executors as f64 * SAMPLE as f64 / cost * 1e9;
    if hardware.shared { by_cost.min(SAMPLE as f64 / work * 1e9) } else { by_cost }
}

/// Members of an on-time batch arrived within one slack of each other. Cut time into blocks of that length: a batch
/// touches two at most, so charging half of the fixed part to each never exceeds its cost. The cheapest way to serve a
/// block, by exact dynamic programming, must not take longer than the block, in the mean.
fn by_blocks(hardware: &Hardware, lengths: &Lengths) -> f64 {
    let slack = hardware.slack.as_secs_f64();
    let (mut low, mut high) = (0.0, 2.0 * by_share(hardware, lengths));
    for _ in 0..18 {
        let rate = (low + high) / 2.0;
        let mut rng = Rng::new(5, 21);
        let mut lens = lengths.sampler(5);
        let blocks = 60;
        let (mut executors, mut device) = (0.0, 0.0);
        for _ in 0..blocks {
            let mut block: Vec<u32> = Vec::new();
            let mut at = 0.0;
            loop {
                at += -(1.0 - rng.unit()).ln() / rate;
                if at > slack {
                    break;
                }
                block.extend(lens.next());
            }
            let work: f64 = block.iter().map(|len| hardware.times.row(*len)).sum();
            executors += cheapest(hardware, &mut block) / hardware.executors as f64;
            device += if hardware.shared { work } else { 0.0 };
        }
        let fits = f64::max(executors, device) <= f64::from(blocks) * slack * 1e9;
        if fits { low = rate } else { high = rate }
    }
    low
}

/// Least time to serve these rows at half the fixed part a batch, in ns.
fn cheapest(hardware: &Hardware, lens: &mut [u32]) -> f64 {
    lens.sort_unstable();
    let mut best = vec![0.0; lens.len() + 1];
    for end in 1..=lens.len() {
        let row = hardware.times.row(lens[end - 1]);
        let most = end.min(hardware.rows_max as usize);
        best[end] = (1..=most)
            .map(|rows| best[end - rows] + hardware.times.batch / 2.0 + rows as f64 * row)
            .fold(f64::INFINITY, f64::min);
    }
    best[lens.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_are_those_of_the_study() {
        // The published study of these policies gives 489, 367 and 360 requests per second for its CPU.
        for (text, published) in [
            ("lognormal:40,0.9,512", 489.0),
            ("bimodal:16,256,0.15", 367.0),
            ("fixed:64", 360.0),
            ("uniform:8..128", 296.0),
        ] {
            let lengths = Lengths::parse(text).expect("well formed");
            let found = bound(&Hardware::cpu(), &lengths);
            assert!((found / published - 1.0).abs() < 0.05, "{text}: {found:.0}, published {published}");
        }
    }
}
