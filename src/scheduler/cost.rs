//! How long a batch takes, learned from the batches that ran: `a + b·w(L)` for b rows padded to L cells, `a + Σ w(Lᵢ)` for rows
//! that lie end to end, where `w(L) = c1·L + c2·L²`.
//!
//! The fit is least squares over relative errors with exponential forgetting, solved anew for each observation from
//! decayed normal equations (three unknowns), with a weak pull towards the prior. The textbook recursive form (RLS)
//! winds up to NaN when its input stops varying; this one can not. What no such curve follows (tile sizes, caches, a
//! roofline) is kept as a factor for each octave of rows and of length. Executors that are not alike have a factor each (pace.rs).
//!
//! Always true
//! - Coefficients are finite and not negative, whatever was observed. Memory is fixed.
//! - Observations of equal order give equal coefficients: a replay learns what the live run learned.

use std::time::Duration;

use super::pace::Paces;

/// Coefficients of the batch time, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Coefficients {
    /// Of a batch, whatever is in it.
    pub batch: f64,
    /// Of a cell.
    pub cell: f64,
    /// Of a row, for each square of its length: attention.
    pub square: f64,
}

impl Coefficients {
    /// A guess that the first observations replace.
    pub const PRIOR: Coefficients = Coefficients { batch: 100_000.0, cell: 1_000.0, square: 0.0 };

    /// w(L): what a row of this padded length adds to a batch, in ns.
    pub fn row(&self, len: u32) -> f64 {
        let len = f64::from(len);
        self.cell * len + self.square * len * len
    }

    /// T(b, L), in ns.
    pub fn batch_time(&self, rows: u32, len: u32) -> f64 {
        self.batch + f64::from(rows) * self.row(len)
    }

    /// The same of rows of different lengths.
    pub fn work_time(&self, work: Work) -> f64 {
        self.batch + self.cell * work.cells as f64 + self.square * work.squares as f64
    }

    fn get(&self, term: usize) -> f64 {
        [self.batch, self.cell, self.square][term]
    }
}

/// What a batch makes an executor compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub struct Work {
    pub rows: u32,
    /// Sum of the rows' lengths, padding included where there is any.
    pub cells: u64,
    /// Sum of the squares of these lengths.
    pub squares: u64,
}

impl Work {
    /// Rows padded to one length.
    pub fn padded(rows: u32, len: u32) -> Work {
        let mut work = Work::default();
        work.add(rows, len);
        work
    }

    /// More rows of one length.
    pub fn add(&mut self, rows: u32, len: u32) {
        let (n, len) = (u64::from(rows), u64::from(len));
        self.rows += rows;
        self.cells += n * len;
        self.squares += n * len * len;
    }

    /// Mean length of its rows, rounded down.
    pub fn mean_len(&self) -> u32 {
        (self.cells / u64::from(self.rows.max(1))) as u32
    }
}

const TERMS: usize = 3;
/// Share of the past that each observation leaves: a memory of a thousand batches.
const KEEP: f64 = 0.999;
/// Pull towards the prior, in observations. Decides only what the observations leave open.
const RIDGE: f64 = 1e-3;
/// An observation that is off by this many mean errors counts a tenth.
const OUTLIER: f64 = 6.0;
const OUTLIER_WEIGHT: f64 = 0.1;
/// Observations before any is called an outlier.
const SETTLED: u64 = 20;
const OCTAVES: usize = 16;
/// Mean relative error from which on predictions decide about no request and no slot.
const TRUSTED: f64 = 0.25;

/// The model of one model's batches.
#[derive(Clone, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct CostModel {
    prior: Coefficients,
    fit: Coefficients,
    /// Upper triangle of Σ x·xᵀ/y², and Σ x/y; decayed.
    normal: [[f64; TERMS]; TERMS],
    moment: [f64; TERMS],
    weight: f64,
    /// Correction by octave of rows and of length: a factor near 1, and how often it was observed.
    corrections: Vec<(f32, u16)>,
    observations: u64,
    /// Mean of |predicted/observed − 1|.
    error: f64,
    paces: Paces,
}

/// All that a cost model has learned, as plain numbers: to be kept while the process does not run.
#[derive(Clone, Debug, PartialEq)]
pub struct Learned {
    /// ns of a batch, a cell, a squared cell.
    pub fit: [f64; TERMS],
    pub normal: [[f64; TERMS]; TERMS],
    pub moment: [f64; TERMS],
    pub weight: f64,
    pub observations: u64,
    pub error: f64,
    /// Octave of rows, octave of length, factor, how often it was observed. Only those that were.
    pub corrections: Vec<(u8, u8, f32, u16)>,
    /// By executor: logarithm of its time beside the mean, how often it was observed.
    pub paces: Vec<(f64, u32)>,
}

/// A cost model as it is for one executor.
#[derive(Clone, Copy, Debug)]
pub struct OnExecutor<'a> {
    cost: &'a CostModel,
    pace: f64,
}

impl OnExecutor<'_> {
    pub fn coefficients(&self) -> Coefficients {
        let Coefficients { batch, cell, square } = self.cost.fit;
        Coefficients { batch: self.pace * batch, cell: self.pace * cell, square: self.pace * square }
    }

    /// T(b, L) here, in ns. Zero while nothing is known.
    pub fn predict(&self, rows: u32, len: u32) -> f64 {
        self.pace * self.cost.predict(rows, len)
    }

    /// T of rows of different lengths here, in ns.
    pub fn predict_work(&self, work: Work) -> f64 {
        self.pace * self.cost.predict_work(work)
    }

    /// T of one row alone on the fastest executor, in ns: who cannot be done within it cannot be done.
    pub fn alone_at_best(&self, len: u32) -> f64 {
        self.cost.alone_at_best(1, len)
    }

    /// Time on the fastest executor ÷ time on this one: at most 1.
    pub fn best_share(&self) -> f64 {
        (self.cost.paces.fastest() / self.pace).min(1.0)
    }

    pub fn is_known(&self) -> bool {
        self.cost.is_known()
    }

    pub fn is_trusted(&self) -> bool {
        self.cost.is_trusted()
    }

    pub fn margin(&self) -> f64 {
        self.cost.margin()
    }

    /// Differs wherever predictions may.
    pub fn version(&self) -> (u64, u64) {
        (self.cost.observations, self.pace.to_bits())
    }
}

impl Default for CostModel {
    fn default() -> CostModel {
        CostModel::new(Coefficients::PRIOR)
    }
}

impl CostModel {
    pub fn new(prior: Coefficients) -> CostModel {
        CostModel {
            prior,
            fit: prior,
            normal: [[0.0; TERMS]; TERMS],
            moment: [0.0; TERMS],
            weight: 0.0,
            corrections: vec![(1.0, 0); OCTAVES * OCTAVES],
            observations: 0,
            error: 0.0,
            paces: Paces::default(),
        }
    }

    /// Makes room for the executors of a server. What is known of them stays.
    pub fn set_executors(&mut self, executors: usize) {
        self.paces.set_executors(executors);
    }

    /// As it is for one of them.
    pub fn on(&self, executor: usize) -> OnExecutor<'_> {
        OnExecutor { cost: self, pace: self.paces.factor(executor) }
    }

    /// What is known of executors.
    pub fn paces(&self) -> &Paces {
        &self.paces
    }

    /// T of such rows alone in a batch of the fastest executor, in ns.
    pub fn alone_at_best(&self, rows: u32, len: u32) -> f64 {
        self.paces.fastest() * self.predict(rows, len)
    }

    /// What it has learned.
    pub fn learned(&self) -> Learned {
        let seen = self.corrections.iter().enumerate().filter(|(_, (_, count))| *count > 0);
        let place = |at: usize| ((at / OCTAVES) as u8, (at % OCTAVES) as u8);
        Learned {
            fit: [self.fit.batch, self.fit.cell, self.fit.square],
            normal: self.normal,
            moment: self.moment,
            weight: self.weight,
            observations: self.observations,
            error: self.error,
            corrections: seen.map(|(at, (factor, count))| (place(at).0, place(at).1, *factor, *count)).collect(),
            paces: self.paces.learned(),
        }
    }

    /// A model that goes on from there. `None`: no model could have learned this.
    pub fn resume(learned: &Learned) -> Option<CostModel> {
        let Learned { fit, normal, moment, weight, observations, error, corrections, paces } = learned;
        let sums = normal.iter().flatten().chain(moment).chain(fit).chain([weight, error]);
        let good = sums.into_iter().all(|number| number.is_finite() && *number >= 0.0);
        if !good || *observations == 0 || fit.iter().sum::<f64>() <= 0.0 || *weight <= 0.0 || *error > 1.0 {
            return None;
        }
        let mut model = CostModel {
            fit: Coefficients { batch: fit[0], cell: fit[1], square: fit[2] },
            normal: *normal,
            moment: *moment,
            weight: *weight,
            observations: *observations,
            error: *error,
            paces: Paces::resume(paces)?,
            ..CostModel::default()
        };
        for (rows, len, factor, count) in corrections {
            let (rows, len) = (usize::from(*rows), usize::from(*len));
            if rows >= OCTAVES || len >= OCTAVES || !(0.25..=4.0).contains(factor) {
                return None;
            }
            model.corrections[rows * OCTAVES + len] = (*factor, *count);
        }
        Some(model)
    }

    pub fn coefficients(&self) -> Coefficients {
        self.fit
    }

    /// A correction for every octave, a pace for every executor.
    pub fn is_whole(&self, executors: usize) -> bool {
        self.corrections.len() == OCTAVES * OCTAVES && self.paces.is_whole(executors)
    }

    pub fn observations(&self) -> u64 {
        self.observations
    }

    /// Whether there is anything behind a prediction.
    pub fn is_known(&self) -> bool {
        self.observations > 0
    }

    /// Whether a request may be given up for a prediction. Where batches of one shape take very different times, as those
    /// of a model that does what its input says, nobody knows what the next one takes.
    pub fn is_trusted(&self) -> bool {
        self.is_known() && self.error < TRUSTED
    }

    /// Mean relative error of the predictions so far, the recent ones first.
    pub fn error(&self) -> f64 {
        self.error
    }

    /// What a prediction is inflated by before a deadline is staked on it.
    pub fn margin(&self) -> f64 {
        (2.0 * self.error).clamp(0.05, 0.5)
    }

    /// T(b, L) with its shape's correction, in ns. Zero while nothing is known.
    pub fn predict(&self, rows: u32, len: u32) -> f64 {
        if !self.is_known() {
            return 0.0;
        }
        self.fit.batch_time(rows, len) * f64::from(self.corrections[octave(rows, len)].0)
    }

    /// T of rows of different lengths, with the correction of their mean.
    pub fn predict_work(&self, work: Work) -> f64 {
        if !self.is_known() {
            return 0.0;
        }
        self.fit.work_time(work) * f64::from(self.corrections[octave(work.rows, work.mean_len())].0)
    }

    /// Share of a batch's time that every batch takes, whatever is in it. 0 while nothing is known, and where predictions are
    /// not to be trusted.
    pub fn fixed_share(&self, work: Work) -> f64 {
        let whole = self.fit.work_time(work);
        if self.is_trusted() && whole > 0.0 { self.fit.batch / whole } else { 0.0 }
    }

    pub fn predicted(&self, rows: u32, len: u32) -> Duration {
        Duration::from_nanos(self.predict(rows, len) as u64)
    }

    /// A padded batch of this shape took so long, wherever it ran.
    pub fn observe(&mut self, rows: u32, len: u32, took: Duration, alone: bool) {
        self.observe_work(Work::padded(rows, len), took.as_nanos() as f64, alone);
    }

    /// A batch took so long on this executor. `alone` says that its fixed part was not hidden behind another batch's run.
    pub fn observe_on(&mut self, executor: usize, work: Work, took: Duration, alone: bool) {
        let took = took.as_nanos() as f64;
        if took <= 0.0 || work.rows == 0 {
            return;
        }
        if self.observations > SETTLED {
            let expected = self.predict_work(work) - if alone { 0.0 } else { self.fit.batch };
            self.paces.observe(executor, took / expected);
        }
        // What it would have taken in the mean of the executors: the curve is theirs.
        self.observe_work(work, took / self.paces.factor(executor), alone);
    }

    fn observe_work(&mut self, work: Work, took: f64, alone: bool) {
        if took <= 0.0 || work.rows == 0 {
            return;
        }
        let x = [if alone { 1.0 } else { 0.0 }, work.cells as f64, work.squares as f64];
        let mut weight = 1.0;
        if self.observations > 0 {
            let expected = self.predict_work(work) - if alone { 0.0 } else { self.fit.batch };
            let off = (expected / took - 1.0).abs();
            if self.observations > SETTLED && off > OUTLIER * self.error.max(0.01) {
                weight = OUTLIER_WEIGHT;
            }
            // Bounded, so that one stall does not make every prediction look worthless.
            self.error += 0.05 * (off.min(1.0) - self.error);
        }
        self.observations += 1;
        self.weight = self.weight * KEEP + weight;
        for i in 0..TERMS {
            let xi = x[i] / took;
            self.moment[i] = self.moment[i] * KEEP + weight * xi;
            for (j, xj) in x.iter().enumerate().skip(i) {
                self.normal[i][j] = self.normal[i][j] * KEEP + weight * xi * xj / took;
            }
        }
        self.fit = self.solve();
        if alone {
            self.correct(work, took);
        }
    }

    fn correct(&mut self, work: Work, took: f64) {
        let ratio = (took / self.fit.work_time(work)).clamp(0.25, 4.0);
        let (factor, count) = &mut self.corrections[octave(work.rows, work.mean_len())];
        *count = count.saturating_add(1);
        // The mean of the first ones, then of the recent ones; a factor seen once is believed a little only.
        let share = (1.0 / (f64::from(*count) + 3.0)).max(0.05);
        *factor = (f64::from(*factor) + share * (ratio - f64::from(*factor))) as f32;
    }

    /// Least squares over the terms that come out positive. In units of each term's mean share of the time, so that one
    /// ridge fits nanoseconds per batch and per squared cell alike.
    fn solve(&self) -> Coefficients {
        let share: [f64; TERMS] = std::array::from_fn(|i| self.moment[i] / self.weight);
        let mut used = share.map(|share| share.is_finite() && share > 0.0);
        // Rows of length 1 tell nothing about squares.
        if (self.normal[1][1] - self.normal[2][2]).abs() <= 1e-9 * self.normal[1][1] {
            used[2] = false;
        }
        loop {
            let mut matrix = [[0.0; TERMS]; TERMS];
            let mut right = [0.0; TERMS];
            for i in 0..TERMS {
                if !used[i] {
                    matrix[i][i] = 1.0;
                    continue;
                }
                for j in i..TERMS {
                    if used[j] {
                        matrix[i][j] = self.normal[i][j] / (share[i] * share[j]);
                        matrix[j][i] = matrix[i][j];
                    }
                }
                matrix[i][i] += RIDGE;
                let prior = (self.prior.get(i) * share[i]).clamp(0.0, 1.0);
                right[i] = self.moment[i] / share[i] + RIDGE * prior;
            }
            let Some(solution) = solve_symmetric(matrix, right) else { return self.fit };
            let negative = (0..TERMS).filter(|i| used[*i]).min_by(|a, b| solution[*a].total_cmp(&solution[*b]));
            match negative {
                Some(term) if solution[term] < 0.0 => used[term] = false,
                _ => {
                    let of = |i: usize| if used[i] { solution[i] / share[i] } else { 0.0 };
                    let fit = Coefficients { batch: of(0), cell: of(1), square: of(2) };
                    let finite = fit.batch.is_finite() && fit.cell.is_finite() && fit.square.is_finite();
                    // Without any term left a batch would take no time.
                    return if finite && fit.batch + fit.cell + fit.square > 0.0 { fit } else { self.fit };
                }
            }
        }
    }
}

/// Twice the time of a batch has to bring so many times the throughput: everybody waits for a batch before their own and for
/// that. Where a batch costs k cells' time beside its cells, that is a budget of 18 k at 95 % of what there is to be had.
const WORTH_DOUBLING: f64 = 1.04;

/// The budget from which on larger batches make everybody wait longer for too little, of measured (cells, time). `None`
/// where nothing was measured.
///
/// Throughput by a power of the time, as Kleinrock's "power" weighs throughput against delay (1979), with the power that
/// [`WORTH_DOUBLING`] says. A share of the best throughput will not do: where the curve is flat, whichever size was measured a
/// little too fast is the best, and the smallest within a few percent of that is a multiple of the smallest that is as good.
pub fn budget(curve: &[(u64, Duration)]) -> Option<u64> {
    let score = |(cells, took): &(u64, Duration)| {
        let took = took.as_secs_f64().max(1e-9);
        *cells as f64 / took / took.powf(WORTH_DOUBLING.log2())
    };
    curve.iter().max_by(|a, b| score(a).total_cmp(&score(b)).then(b.0.cmp(&a.0))).map(|(cells, _)| *cells)
}

fn octave(rows: u32, len: u32) -> usize {
    let of = |n: u32| (n.max(1).ilog2() as usize).min(OCTAVES - 1);
    of(rows) * OCTAVES + of(len)
}

/// Gaussian elimination with pivoting of a 3×3 system. `None` when it is singular.
fn solve_symmetric(mut m: [[f64; TERMS]; TERMS], mut r: [f64; TERMS]) -> Option<[f64; TERMS]> {
    for column in 0..TERMS {
        let pivot = (column..TERMS).max_by(|a, b| m[*a][column].abs().total_cmp(&m[*b][column].abs()))?;
        if !m[pivot][column].is_finite() || m[pivot][column].abs() < 1e-12 {
            return None;
        }
        m.swap(column, pivot);
        r.swap(column, pivot);
        for row in column + 1..TERMS {
            let factor = m[row][column] / m[column][column];
            let above = m[column];
            m[row].iter_mut().zip(above).skip(column).for_each(|(value, above)| *value -= factor * above);
            r[row] -= factor * r[column];
        }
    }
    let mut solution = [0.0; TERMS];
    for row in (0..TERMS).rev() {
        let known: f64 = (row + 1..TERMS).map(|k| m[row][k] * solution[k]).sum();
        solution[row] = (r[row] - known) / m[row][row];
    }
    Some(solution)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const TRUTH: Coefficients = Coefficients { batch: 1_500_000.0, cell: 40_000.0, square: 35.0 };

    fn learned(seed: u64, batches: u32, noise: f64, prior: Coefficients, truth: Coefficients) -> CostModel {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut model = CostModel::new(prior);
        for _ in 0..batches {
            let (rows, len) = (rng.random_range(1..32), rng.random_range(8..512));
            let took = truth.batch_time(rows, len) * (1.0 + noise * (rng.random::<f64>() * 2.0 - 1.0));
            model.observe(rows, len, Duration::from_nanos(took as u64), true);
        }
        model
    }

    fn worst(model: &CostModel, truth: Coefficients) -> f64 {
        let shapes = [(1, 8), (1, 512), (8, 64), (31, 16), (31, 500)];
        let off = |(rows, len): (u32, u32)| (model.predict(rows, len) / truth.batch_time(rows, len) - 1.0).abs();
        shapes.map(off).into_iter().fold(0.0, f64::max)
    }

    #[test]
    fn it_finds_the_truth_from_a_wrong_prior() {
        for prior in [Coefficients::PRIOR, Coefficients { batch: 1e9, cell: 1e6, square: 1e3 }] {
            for seed in 0..20 {
                let model = learned(seed, 100, 0.03, prior, TRUTH);
                assert!(worst(&model, TRUTH) < 0.08, "seed {seed}: {:?}", model.coefficients());
                assert!(model.error() < 0.05, "seed {seed}: mean error {}", model.error());
            }
        }
    }

    #[test]
    fn nothing_is_known_before_the_first_batch() {
        let model = CostModel::default();
        assert!(!model.is_known());
        assert_eq!(model.predicted(8, 64), Duration::ZERO);
    }

    #[test]
    fn the_fixed_share_of_a_batch_is_what_is_left_of_an_empty_one() {
        assert_eq!(CostModel::default().fixed_share(Work::padded(4, 32)), 0.0, "nothing is known");
        let model = learned(5, 300, 0.05, Coefficients::PRIOR, TRUTH);
        for work in [Work::padded(1, 8), Work::padded(32, 128)] {
            let (share, truth) = (model.fixed_share(work), TRUTH.batch / TRUTH.work_time(work));
            assert!((share / truth - 1.0).abs() < 0.25, "{work:?}: {share} for {truth}");
        }
    }

    #[test]
    fn what_was_learned_goes_on_where_it_was() {
        let mut model = learned(5, 300, 0.05, Coefficients::PRIOR, TRUTH);
        let mut again = CostModel::resume(&model.learned()).expect("it was learned");
        assert_eq!(again, model);
        model.observe(7, 90, Duration::from_millis(3), true);
        again.observe(7, 90, Duration::from_millis(3), true);
        assert_eq!(again, model);
    }

    #[test]
    fn what_no_model_can_have_learned_is_not_taken() {
        let good = learned(6, 100, 0.05, Coefficients::PRIOR, TRUTH).learned();
        assert_eq!(CostModel::resume(&CostModel::default().learned()), None, "nothing was observed");
        for bad in [
            Learned { fit: [f64::NAN, 1.0, 1.0], ..good.clone() },
            Learned { fit: [0.0; TERMS], ..good.clone() },
            Learned { moment: [-1.0, 0.0, 0.0], ..good.clone() },
            Learned { weight: f64::INFINITY, ..good.clone() },
            Learned { error: 1.5, ..good.clone() },
            Learned { corrections: vec![(16, 0, 1.0, 1)], ..good.clone() },
            Learned { corrections: vec![(0, 0, f32::NAN, 1)], ..good.clone() },
        ] {
            assert_eq!(CostModel::resume(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn it_forgets_hardware_that_changed() {
        let mut model = learned(1, 2000, 0.03, Coefficients::PRIOR, TRUTH);
        let slower = Coefficients { batch: TRUTH.batch * 2.0, cell: TRUTH.cell * 2.0, square: TRUTH.square * 2.0 };
        let mut rng = StdRng::seed_from_u64(2);
        for _ in 0..5000 {
            let (rows, len) = (rng.random_range(1..32), rng.random_range(8..512));
            model.observe(rows, len, Duration::from_nanos(slower.batch_time(rows, len) as u64), true);
        }
        // The corner of the shapes was hardly ever seen again.
        assert!(worst(&model, slower) < 0.2, "{:?}", model.coefficients());
        let common = model.predict(16, 256) / slower.batch_time(16, 256);
        assert!((common - 1.0).abs() < 0.03, "{common}");
    }

    #[test]
    fn a_stall_now_and_then_moves_it_little() {
        let mut model = learned(3, 500, 0.03, Coefficients::PRIOR, TRUTH);
        for _ in 0..5 {
            model.observe(4, 64, Duration::from_secs(10), true);
        }
        let off = (model.coefficients().batch_time(8, 128) / TRUTH.batch_time(8, 128) - 1.0).abs();
        assert!(off < 0.1, "{:?}", model.coefficients());
    }

    #[test]
    fn one_shape_over_and_over_stays_finite_and_right_there() {
        let mut model = CostModel::default();
        for _ in 0..200_000 {
            model.observe(16, 64, Duration::from_micros(900), true);
        }
        assert!((model.predict(16, 64) / 900_000.0 - 1.0).abs() < 0.01, "{:?}", model.coefficients());
        assert_eq!(model.predicted(16, 64), Duration::from_nanos(model.predict(16, 64) as u64));
        let fit = model.coefficients();
        assert!(fit.batch >= 0.0 && fit.cell >= 0.0 && fit.square >= 0.0);
    }

    #[test]
    fn rows_without_a_length_get_a_line_over_rows() {
        let mut model = CostModel::default();
        for rows in (1..=64).cycle().take(500) {
            model.observe(rows, 1, Duration::from_nanos(200_000 + 30_000 * u64::from(rows)), true);
        }
        assert_eq!(model.coefficients().square, 0.0);
        assert!((model.predict(64, 1) / 2_120_000.0 - 1.0).abs() < 0.02, "{:?}", model.coefficients());
    }

    #[test]
    fn coefficients_stay_finite_and_positive_whatever_is_observed() {
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut model = CostModel::default();
            for _ in 0..300 {
                let scale = rng.random_range(1..60);
                let took = Duration::from_nanos(rng.random_range(0..1u64 << scale));
                let len = 1u32 << rng.random_range(0..20);
                model.observe(rng.random_range(0..1000), len, took, rng.random_bool(0.7));
                let fit = model.coefficients();
                for (name, value) in [("batch", fit.batch), ("cell", fit.cell), ("square", fit.square)] {
                    assert!(value.is_finite() && value >= 0.0, "seed {seed}: {name} = {value}");
                }
                let predicted = model.predict(7, 300);
                assert!(predicted.is_finite() && predicted >= 0.0, "seed {seed}: {predicted}");
            }
        }
    }

    #[test]
    fn a_step_that_no_curve_follows_is_corrected_for_its_shape() {
        let mut model = CostModel::default();
        let floor = |rows: u32, len: u32| 600_000.0f64.max(250_000.0 + f64::from(rows * len) * 250.0);
        let mut rng = StdRng::seed_from_u64(4);
        for _ in 0..3000 {
            let (rows, len) = (1 << rng.random_range(0..6), 1 << rng.random_range(3..9));
            model.observe(rows, len, Duration::from_nanos(floor(rows, len) as u64), true);
        }
        for (rows, len) in [(1, 8), (4, 64), (32, 256)] {
            let off = (model.predict(rows, len) / floor(rows, len) - 1.0).abs();
            assert!(off < 0.15, "{rows}×{len}: {} for {}", model.predict(rows, len), floor(rows, len));
        }
    }

    #[test]
    fn the_budget_is_where_twice_the_time_brings_too_little() {
        let ms = Duration::from_millis;
        assert_eq!(budget(&[]), None);
        assert_eq!(budget(&[(64, ms(3))]), Some(64));
        // Cells per millisecond: 50, 93, 97, 100, 98.
        let curve = [(100, ms(2)), (930, ms(10)), (1940, ms(20)), (4000, ms(40)), (7840, ms(80))];
        assert_eq!(budget(&curve), Some(1940), "4.3 % more, and then 3.1");
        assert_eq!(budget(&curve[..2]), Some(930));
        // All alike: the smallest.
        assert_eq!(budget(&[256, 384, 512, 1024].map(|cells| (cells, ms(cells)))), Some(256));
        // A few percent of noise among many of one speed do not make it four times as large.
        let noisy = [(256, 100), (384, 149), (512, 198), (768, 295), (1024, 390), (2048, 775)];
        assert_eq!(budget(&noisy.map(|(cells, took)| (cells, ms(took)))), Some(256));
        // A batch that costs as much as 100 cells: within a step of 18 times that.
        let device = |cells: u64| (cells, Duration::from_micros(100 + cells));
        assert_eq!(budget(&[100, 400, 800, 1200, 1800, 2700, 4000, 8000].map(device)), Some(1800));
        assert_eq!(budget(&[(10, Duration::ZERO), (1000, ms(1))]), Some(10), "too fast to be measured is fast");
    }

    #[test]
    fn a_batch_without_cells_behind_another_teaches_nothing() {
        let mut model = CostModel::default();
        model.observe_on(0, Work { rows: 1, cells: 0, squares: 0 }, Duration::from_millis(1), false);
        assert_eq!(model.coefficients(), Coefficients::PRIOR, "not that batches take no time");
        model.observe_on(0, Work { rows: 0, cells: 8, squares: 64 }, Duration::from_millis(1), true);
        assert_eq!(model.observations(), 1, "without rows it was no batch");
    }

    #[test]
    fn an_executor_that_is_slower_is_so_in_every_part_and_stays_it_when_the_model_goes_on() {
        let mut model = CostModel::new(TRUTH);
        model.set_executors(2);
        let mut rng = StdRng::seed_from_u64(8);
        for at in 0..400u32 {
            let (executor, work) = (at % 2, Work::padded(rng.random_range(1..32), rng.random_range(8..512)));
            let took = TRUTH.work_time(work) * f64::from(1 + 2 * executor);
            model.observe_on(executor as usize, work, Duration::from_nanos(took as u64), true);
        }
        let ratio = model.paces().factor(1) / model.paces().factor(0);
        assert!((ratio - 3.0).abs() < 0.2, "{ratio}");
        let again = CostModel::resume(&model.learned()).expect("it was learned");
        assert_eq!(again.learned(), model.learned());
        for (model, executor) in [(&model, 0), (&model, 1), (&again, 1)] {
            let (here, mean) = (model.on(executor).coefficients(), model.coefficients());
            for (here, mean) in [(here.batch, mean.batch), (here.cell, mean.cell), (here.square, mean.square)] {
                assert!(
                    mean > 0.0 && (here / mean / model.paces().factor(executor) - 1.0).abs() < 1e-9,
                    "{here} of {mean}"
                );
            }
            assert_eq!(model.on(executor).predict(3, 70), model.paces().factor(executor) * model.predict(3, 70));
        }
        assert_eq!(again.paces().factor(1), model.paces().factor(1));
        assert!(model.on(1).best_share() < 0.4 && model.on(0).best_share() == 1.0);
    }

    #[test]
    fn predictions_that_may_differ_have_another_version() {
        let mut model = CostModel::default();
        model.set_executors(2);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..50 {
            assert!(seen.insert(model.on(0).version()));
            model.observe_on(0, Work::padded(4, 32), Duration::from_millis(1), true);
            model.observe_on(1, Work::padded(4, 32), Duration::from_millis(3), true);
        }
        assert_ne!(model.on(0).version(), model.on(1).version());
    }
}
