//! Bucket edges from the lengths that come: a live histogram, the edges that pad least, and when they are worth a change.
//!
//! Padding each row to the smallest edge above it costs `edge × rows` cells for every stretch between two edges. The best
//! `n` edges are found by dynamic programming over the histogram's bins; what a stretch costs obeys the quadrangle
//! inequality, so each of the `n` rounds is done by divide and conquer: O(bins · log bins · n) instead of O(bins² · n).
//!
//! Always true
//! - A histogram has at most [`BINS_MAX`] bins and allocates when it is made and never again.
//! - The last edge is the histogram's longest length: every row that is admitted keeps a bucket.
//! - More edges never forecast more waste.
//!
//! Elsewhere: applying edges to what waits ([`super::Scheduler::set_policy`]), edges given by hand (bucket.rs).

use std::time::Duration;

use super::Buckets;
use crate::vocab::Moment;

/// Bins of a histogram, at most.
pub const BINS_MAX: usize = 512;
/// Edges that may be asked for, at most.
pub const SHAPES_MAX: u16 = 64;
/// Edges where nobody says how many.
pub const SHAPES: u16 = 8;

/// After this time a row counts half.
const HALF_LIFE: Duration = Duration::from_secs(300);
/// How often the past fades, and how often edges are looked at.
const PERIOD: Duration = Duration::from_secs(30);
/// Rows, faded, before a histogram is believed.
const ROWS_MIN: f64 = 1000.0;
/// Share of lengths that were not seen in what edges are chosen for.
const PRIOR_SHARE: f64 = 1e-3;
/// Share of all padded cells that new edges must save.
const GAIN_MIN: f64 = 0.02;

/// Rows of a range of lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Bin {
    /// Faded.
    pub rows: f64,
    /// Sum of the rows' lengths, faded alike.
    pub cells: f64,
}

/// How long the admitted rows were, the recent ones first.
#[derive(Clone, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct LengthHistogram {
    longest: u32,
    /// Lengths in one bin.
    width: u32,
    bins: Vec<Bin>,
    rows: f64,
    faded_at: Moment,
}

impl LengthHistogram {
    /// For lengths up to `longest`: a bin for each, or as few lengths to a bin as [`BINS_MAX`] allows.
    pub fn new(longest: u32) -> LengthHistogram {
        let longest = longest.max(1);
        let width = longest.div_ceil(BINS_MAX as u32);
        let bins = vec![Bin::default(); longest.div_ceil(width) as usize];
        LengthHistogram { longest, width, bins, rows: 0.0, faded_at: Moment::ZERO }
    }

    /// A bin for every length.
    pub fn is_whole(&self) -> bool {
        self.longest > 0 && self.width > 0 && self.bins.len() == self.longest.div_ceil(self.width) as usize
    }

    /// What is assumed before any row was seen: a length and its double are equally likely.
    fn prior(longest: u32) -> LengthHistogram {
        let mut prior = LengthHistogram::new(longest);
        for at in 0..prior.bins.len() {
            let (low, high) = (prior.edge(at) - (prior.width_of(at) - 1), prior.edge(at));
            let rows = ((f64::from(high) + 1.0) / f64::from(low)).ln();
            prior.bins[at] = Bin { rows, cells: rows * (f64::from(low) + f64::from(high)) / 2.0 };
            prior.rows += rows;
        }
        prior
    }

    /// Counts the rows of an admitted request.
    ///
    /// Hot: once per request. Guarded by benches/scheduler.rs.
    pub fn observe(&mut self, now: Moment, len: u32, rows: u32) {
        let since = now.since(self.faded_at);
        if since >= PERIOD {
            self.fade(0.5f64.powf(since.as_secs_f64() / HALF_LIFE.as_secs_f64()));
            self.faded_at = now;
        }
        let at = ((len.clamp(1, self.longest) - 1) / self.width) as usize;
        let rows = f64::from(rows);
        self.bins[at].rows += rows;
        self.bins[at].cells += rows * f64::from(len);
        self.rows += rows;
    }

    fn fade(&mut self, keep: f64) {
        self.rows *= keep;
        for bin in &mut self.bins {
            bin.rows *= keep;
            bin.cells *= keep;
        }
    }

    /// Rows seen, faded.
    pub fn rows(&self) -> f64 {
        self.rows
    }

    pub fn longest(&self) -> u32 {
        self.longest
    }

    pub fn bins(&self) -> &[Bin] {
        &self.bins
    }

    /// Longest length of a bin.
    pub fn edge(&self, bin: usize) -> u32 {
        ((bin as u32 + 1).saturating_mul(self.width)).min(self.longest)
    }

    /// Lengths in this bin: the last may have fewer.
    fn width_of(&self, bin: usize) -> u32 {
        self.edge(bin) - bin as u32 * self.width
    }

    /// Share of padding when each row is padded to its own bucket: 1 − cells ÷ padded cells. Exact where a bin is one
    /// length, or no bucket ends inside a bin; else a bin goes where its mean length does.
    pub fn waste(&self, buckets: &Buckets) -> f64 {
        let (mut cells, mut padded) = (0.0, 0.0);
        for bin in self.bins.iter().filter(|bin| bin.rows > 0.0) {
            let mean = (bin.cells / bin.rows).round() as u32;
            let bucket = buckets.of(mean).map_or(buckets.longest(), |bucket| buckets.len_at(bucket));
            cells += bin.cells;
            padded += bin.rows * f64::from(bucket);
        }
        share_of_padding(cells, padded)
    }
}

fn share_of_padding(cells: f64, padded: f64) -> f64 {
    if padded > 0.0 { (1.0 - cells / padded).max(0.0) } else { 0.0 }
}

/// Edges, and the share of padding that they would have had over the histogram.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    pub edges: Vec<u32>,
    pub waste: f64,
}

/// The edges that pad least, at most `shapes_max` of them, ascending; the last is the longest length.
pub fn optimal_edges(histogram: &LengthHistogram, shapes_max: u16) -> Forecast {
    best_edges(histogram, shapes_max).pop().expect("there is a forecast for one edge")
}

/// The edges to use: those that pad least, with the prior mixed in by [`PRIOR_SHARE`]. Edges that the lengths seen do not
/// need are spread over the others, so that a length that hardly ever comes is not padded to the longest. The forecast is
/// over what was seen alone.
pub fn chosen_edges(histogram: &LengthHistogram, shapes_max: u16) -> (Buckets, f64) {
    let prior = LengthHistogram::prior(histogram.longest);
    let share = if histogram.rows > 0.0 { PRIOR_SHARE * histogram.rows / prior.rows } else { 1.0 };
    let mut mixed = histogram.clone();
    for (bin, prior) in mixed.bins.iter_mut().zip(&prior.bins) {
        bin.rows += share * prior.rows;
        bin.cells += share * prior.cells;
    }
    let buckets = Buckets::new(&optimal_edges(&mixed, shapes_max).edges).expect("edges ascend");
    let waste = histogram.waste(&buckets);
    (buckets, waste)
}

/// The best edges for each number from 1 to `shapes_max`; fewer where the lengths do not need so many.
pub fn best_edges(histogram: &LengthHistogram, shapes_max: u16) -> Vec<Forecast> {
    let stretches = Stretches::new(histogram);
    let last = stretches.edges.len() - 1;
    let rounds = usize::from(shapes_max.clamp(1, SHAPES_MAX)).min(last + 1);
    // By round and stretch: the least padded cells of all stretches up to it, and where the one before ends.
    let mut least: Vec<f64> = (0..=last).map(|end| stretches.padded(0, end)).collect();
    let mut ends: Vec<Vec<usize>> = vec![vec![0; last + 1]];
    let mut forecasts =
        vec![Forecast { edges: vec![histogram.longest], waste: share_of_padding(stretches.all_cells, least[last]) }];
    for round in 1..rounds {
        let mut next = Round { before: &least, least: vec![f64::INFINITY; last + 1], ends: vec![0; last + 1] };
        next.solve(&stretches, (round, last), (round - 1, last - 1));
        let Round { least: found, ends: found_ends, .. } = next;
        least = found;
        ends.push(found_ends);
        let mut edges = vec![histogram.longest];
        let mut at = last;
        for ends in ends.iter().skip(1).rev() {
            at = ends[at];
            edges.push(stretches.edges[at]);
        }
        edges.reverse();
        forecasts.push(Forecast { edges, waste: share_of_padding(stretches.all_cells, least[last]) });
    }
    forecasts
}

/// The bins that hold rows, and the last one: an edge anywhere else pads more than one of these.
struct Stretches {
    edges: Vec<u32>,
    /// Rows of all stretches before this one; one more than edges.
    rows_before: Vec<f64>,
    all_cells: f64,
}

impl Stretches {
    fn new(histogram: &LengthHistogram) -> Stretches {
        let mut stretches = Stretches { edges: Vec::new(), rows_before: vec![0.0], all_cells: 0.0 };
        let mut rows = 0.0;
        for (at, bin) in histogram.bins.iter().enumerate() {
            if bin.rows > 0.0 || at + 1 == histogram.bins.len() {
                rows += bin.rows;
                stretches.edges.push(histogram.edge(at));
                stretches.rows_before.push(rows);
                stretches.all_cells += bin.cells;
            }
        }
        stretches
    }

    /// Padded cells of the stretches `first..=end` under one edge, that of the last.
    fn padded(&self, first: usize, end: usize) -> f64 {
        f64::from(self.edges[end]) * (self.rows_before[end + 1] - self.rows_before[first])
    }
}

/// One more edge.
struct Round<'a> {
    before: &'a [f64],
    least: Vec<f64>,
    ends: Vec<usize>,
}

impl Round<'_> {
    /// Solves `from..=to`; the stretch before ends within `low..=high`: the best place never moves back as the end moves on.
    fn solve(&mut self, stretches: &Stretches, (from, to): (usize, usize), (low, high): (usize, usize)) {
        let end = from + (to - from) / 2;
        for before in low..=high.min(end - 1) {
            let padded = self.before[before] + stretches.padded(before + 1, end);
            if padded < self.least[end] {
                self.least[end] = padded;
                self.ends[end] = before;
            }
        }
        let at = self.ends[end];
        if end > from {
            self.solve(stretches, (from, end - 1), (low, at));
        }
        if end < to {
            self.solve(stretches, (end + 1, to), (at, high));
        }
    }
}

/// Edges to begin with: from what was seen, or from the prior while that is too little.
pub fn first_edges(histogram: &LengthHistogram, shapes_max: u16) -> Buckets {
    match histogram.rows >= ROWS_MIN {
        true => chosen_edges(histogram, shapes_max).0,
        false => prior_edges(histogram.longest, shapes_max),
    }
}

/// Edges before any row was seen.
pub fn prior_edges(longest: u32, shapes_max: u16) -> Buckets {
    chosen_edges(&LengthHistogram::new(longest), shapes_max).0
}

/// Whether new edges are worth a change: enough was seen, the last look is long enough ago, and they save enough padding.
pub fn pays(rows: f64, since_last: Duration, waste: f64, waste_best: f64) -> bool {
    rows >= ROWS_MIN && since_last >= PERIOD && waste - waste_best >= GAIN_MIN
}

/// When edges are looked at next.
pub fn next_look(now: Moment) -> Moment {
    now + PERIOD
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn of(longest: u32, lens: &[u32]) -> LengthHistogram {
        let mut histogram = LengthHistogram::new(longest);
        lens.iter().for_each(|len| histogram.observe(Moment::ZERO, *len, 1));
        histogram
    }

    /// Padding of these rows, counted row by row.
    fn counted(lens: &[u32], edges: &[u32]) -> f64 {
        let padded: u64 =
            lens.iter().map(|len| u64::from(*edges.iter().find(|edge| *edge >= len).expect("fits"))).sum();
        let cells: u64 = lens.iter().map(|len| u64::from(*len)).sum();
        1.0 - cells as f64 / padded as f64
    }

    /// The least padding of all choices of at most `shapes` edges.
    fn brute_force(longest: u32, lens: &[u32], shapes: usize) -> f64 {
        let mut best = f64::INFINITY;
        for choice in 0..1u32 << (longest - 1) {
            if choice.count_ones() as usize + 1 > shapes {
                continue;
            }
            let mut edges: Vec<u32> = (1..longest).filter(|edge| choice & (1 << (edge - 1)) != 0).collect();
            edges.push(longest);
            best = best.min(counted(lens, &edges));
        }
        best
    }

    #[test]
    fn the_edges_are_as_good_as_the_best_of_all_choices() {
        for seed in 0..300 {
            let mut rng = StdRng::seed_from_u64(seed);
            let longest = rng.random_range(1..12);
            let lens: Vec<u32> = (0..rng.random_range(1..30))
                .map(|_| if rng.random_bool(0.5) { rng.random_range(1..=longest) } else { 1 + longest / 3 })
                .collect();
            let histogram = of(longest, &lens);
            for shapes in 1..=6u16 {
                let found = optimal_edges(&histogram, shapes);
                let best = brute_force(longest, &lens, shapes.into());
                assert!((found.waste - best).abs() < 1e-9, "seed {seed}: {shapes} of {lens:?}: {found:?}, not {best}");
                assert!(found.edges.len() <= shapes.into() && found.edges.last() == Some(&longest));
            }
        }
    }

    #[test]
    fn the_forecast_is_what_the_rows_are_padded_by() {
        for seed in 0..100 {
            let mut rng = StdRng::seed_from_u64(seed);
            let longest = rng.random_range(1..5000);
            let lens: Vec<u32> =
                (0..500).map(|_| 1 + (rng.random::<f64>().powi(3) * f64::from(longest - 1)) as u32).collect();
            let histogram = of(longest, &lens);
            let mut before = f64::INFINITY;
            for forecast in best_edges(&histogram, 16) {
                let direct = counted(&lens, &forecast.edges);
                assert!((forecast.waste - direct).abs() < 1e-9, "seed {seed}: {forecast:?}, counted {direct}");
                let buckets = Buckets::new(&forecast.edges).expect("edges ascend");
                assert!((histogram.waste(&buckets) - direct).abs() < 1e-9, "edges end where bins end");
                assert!(forecast.waste <= before, "more edges, more waste");
                before = forecast.waste;
            }
        }
    }

    #[test]
    fn a_histogram_of_any_length_has_a_bounded_number_of_bins_and_ends_at_the_longest() {
        for longest in [1, 2, 511, 512, 513, 1024, 1025, 100_000, u32::MAX] {
            let mut histogram = LengthHistogram::new(longest);
            assert!(histogram.bins().len() <= BINS_MAX);
            assert_eq!(histogram.edge(histogram.bins().len() - 1), longest);
            for len in [1, longest / 2 + 1, longest] {
                histogram.observe(Moment::ZERO, len, 3);
            }
            assert_eq!(histogram.rows(), 9.0);
            assert_eq!(optimal_edges(&histogram, 8).edges.last(), Some(&longest));
            assert_eq!(first_edges(&histogram, 8).longest(), longest);
        }
    }

    #[test]
    fn the_past_fades_by_half_in_its_half_life() {
        let mut histogram = LengthHistogram::new(16);
        histogram.observe(Moment::ZERO, 4, 1024);
        histogram.observe(Moment::ZERO + HALF_LIFE, 8, 1);
        assert_eq!(histogram.bins()[3], Bin { rows: 512.0, cells: 2048.0 });
        assert_eq!(histogram.rows(), 513.0);
    }

    #[test]
    fn without_rows_the_edges_are_spread_over_the_octaves() {
        let first = first_edges(&LengthHistogram::new(512), 8);
        assert_eq!(first.len(), 8);
        assert_eq!(first.longest(), 512);
        let ratios: Vec<f64> = first.lens().windows(2).map(|pair| f64::from(pair[1]) / f64::from(pair[0])).collect();
        assert!(ratios.iter().all(|ratio| (1.1..4.0).contains(ratio)), "{first:?}");
    }

    #[test]
    fn edges_that_are_not_needed_serve_the_lengths_that_hardly_ever_come() {
        let histogram = of(1024, &[64; 2000]);
        let (buckets, waste) = chosen_edges(&histogram, 4);
        assert_eq!((buckets.len(), buckets.longest(), waste), (4, 1024, 0.0));
        assert!(buckets.lens().contains(&64), "{buckets:?}");
        let padded = buckets.len_at(buckets.of(65).expect("it fits"));
        assert!(padded < 512, "{buckets:?}");
    }

    #[test]
    fn what_is_chosen_is_hardly_worse_than_the_best() {
        for seed in 0..50 {
            let mut rng = StdRng::seed_from_u64(seed);
            let lens: Vec<u32> = (0..2000).map(|_| 1 + (rng.random::<f64>().powi(4) * 511.0) as u32).collect();
            let histogram = of(512, &lens);
            let (_, waste) = chosen_edges(&histogram, 6);
            let best = optimal_edges(&histogram, 6).waste;
            assert!(best <= waste && waste < best + 0.005, "seed {seed}: {waste}, best {best}");
        }
    }

    #[test]
    fn edges_change_for_a_gain_on_enough_rows_after_enough_time_only() {
        assert!(pays(1000.0, PERIOD, 0.31, 0.28));
        assert!(!pays(999.0, PERIOD, 0.30, 0.10));
        assert!(!pays(1000.0, PERIOD - Duration::from_nanos(1), 0.30, 0.10));
        assert!(!pays(1e6, PERIOD, 0.30, 0.281));
    }
}
