//! How fast each executor is beside the others: one factor for each on the batch times of cost.rs, which are those of their mean.
//!
//! The curve is shared and the factor is not, because executors of one server are nearly always alike: a curve for each would
//! be learned from a fraction of the batches, and forget the shapes that it has not had lately. Two GPUs of different make, or a
//! core that a front-end shard shares, differ by a factor.
//!
//! Always true
//! - The factors of those that were observed have a geometric mean of 1, or are all exactly 1: there the curve alone says what
//!   batches take. They are exactly 1 while no executor is further from the mean than noise may be.
//! - Each is finite, and between 1/[`MOST`] and [`MOST`]. Memory is fixed once the number of executors is known.

/// A factor beyond this, or its inverse, is no difference between executors.
const MOST: f64 = 16.0;
/// Share of a new observation in an executor's mean: a memory of some fifty batches.
const SHARE: f64 = 0.02;
/// Observations before an executor's factor is believed.
const SETTLED: u32 = 20;
/// Executors that differ by less are taken to be alike.
const ALIKE: f64 = 0.1;

/// One executor.
#[derive(Clone, Copy, Debug, Default, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Pace {
    /// Mean of ln(time here ÷ what the curve says).
    log: f64,
    count: u32,
}

/// All executors that a model can run on.
#[derive(Clone, Debug, Default, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Paces {
    paces: Vec<Pace>,
    /// As told to who asks: computed with each observation.
    factors: Vec<f64>,
}

impl Paces {
    /// Makes room for so many executors. Those that were known stay.
    pub fn set_executors(&mut self, executors: usize) {
        self.paces.resize(executors, Pace::default());
        self.factors.resize(executors, 1.0);
        self.settle();
    }

    /// From (logarithm, observations) of each, as [`Paces::learned`] gave them. `None`: nobody can have learned this.
    pub fn resume(learned: &[(f64, u32)]) -> Option<Paces> {
        let good = |(log, count): &(f64, u32)| log.is_finite() && log.abs() <= MOST.ln() && (*count > 0 || *log == 0.0);
        if !learned.iter().all(good) {
            return None;
        }
        let mut paces = Paces {
            paces: learned.iter().map(|(log, count)| Pace { log: *log, count: *count }).collect(),
            factors: vec![1.0; learned.len()],
        };
        paces.settle();
        Some(paces)
    }

    pub fn learned(&self) -> Vec<(f64, u32)> {
        self.paces.iter().map(|pace| (pace.log, pace.count)).collect()
    }

    /// A batch on this executor took so many times as long as the curve says.
    pub fn observe(&mut self, executor: usize, ratio: f64) {
        let Some(pace) = self.paces.get_mut(executor) else { return };
        if !(ratio.is_finite() && ratio > 0.0) {
            return;
        }
        let log = ratio.ln().clamp(-MOST.ln(), MOST.ln());
        pace.count = pace.count.saturating_add(1);
        // The mean of the first ones, then of the recent ones.
        let share = (1.0 / f64::from(pace.count)).max(SHARE);
        pace.log += share * (log - pace.log);
        self.settle();
    }

    /// Time here ÷ time in the mean of all.
    pub fn factor(&self, executor: usize) -> f64 {
        self.factors.get(executor).copied().unwrap_or(1.0)
    }

    /// The factor of the fastest.
    pub fn fastest(&self) -> f64 {
        self.factors.iter().copied().fold(1.0, f64::min)
    }

    /// Some executor is faster than another.
    pub fn differ(&self) -> bool {
        self.factors.iter().any(|factor| *factor != 1.0)
    }

    /// How many there is room for.
    pub fn executors(&self) -> usize {
        self.paces.len()
    }

    /// Batches observed on an executor.
    pub fn observations(&self, executor: usize) -> u32 {
        self.paces.get(executor).map_or(0, |pace| pace.count)
    }

    /// As many factors as executors.
    pub fn is_whole(&self, executors: usize) -> bool {
        self.paces.len() == executors && self.factors.len() == executors
    }

    fn settle(&mut self) {
        let settled = |pace: &Pace| pace.count >= SETTLED;
        let known = self.paces.iter().filter(|pace| settled(pace)).count();
        let mean =
            self.paces.iter().filter(|pace| settled(pace)).map(|pace| pace.log).sum::<f64>() / known.max(1) as f64;
        let differ = self.paces.iter().any(|pace| settled(pace) && (pace.log - mean).abs() > ALIKE);
        for (pace, factor) in self.paces.iter().zip(&mut self.factors) {
            let off = if differ && settled(pace) { (pace.log - mean).exp() } else { 1.0 };
            *factor = off.clamp(1.0 / MOST, MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(ratios: &[f64], batches: u32) -> Paces {
        let mut paces = Paces::default();
        paces.set_executors(ratios.len());
        for _ in 0..batches {
            ratios.iter().enumerate().for_each(|(at, ratio)| paces.observe(at, *ratio));
        }
        paces
    }

    #[test]
    fn executors_that_are_alike_have_no_factor() {
        let paces = observed(&[1.05, 0.97, 1.0], 100);
        assert_eq!([0, 1, 2].map(|at| paces.factor(at)), [1.0; 3]);
        assert_eq!(paces.fastest(), 1.0);
    }

    #[test]
    fn a_slow_one_is_known_after_some_batches_and_the_mean_stays() {
        assert_eq!(observed(&[1.0, 4.0], SETTLED - 1).factor(1), 1.0);
        let paces = observed(&[1.0, 4.0], SETTLED);
        assert!((paces.factor(1) / paces.factor(0) - 4.0).abs() < 1e-9);
        assert!((paces.factor(1) * paces.factor(0) - 1.0).abs() < 1e-9);
        assert_eq!(paces.fastest(), paces.factor(0));
    }

    #[test]
    fn a_curve_that_is_wrong_for_all_is_nobodys_factor() {
        let paces = observed(&[3.0, 3.0], 100);
        assert_eq!((paces.factor(0), paces.factor(1)), (1.0, 1.0));
    }

    #[test]
    fn one_that_nobody_has_used_has_none() {
        let mut paces = Paces::default();
        paces.set_executors(3);
        for _ in 0..100 {
            paces.observe(0, 1.0);
            paces.observe(1, 2.0);
        }
        assert_eq!(paces.factor(2), 1.0);
        assert_eq!(paces.factor(7), 1.0, "nor one that does not exist");
    }

    #[test]
    fn odd_observations_leave_it_finite_and_within_its_bounds() {
        let mut paces = observed(&[1.0, 1.0], 50);
        for ratio in [f64::NAN, f64::INFINITY, 0.0, -1.0, 1e300, 1e-300].into_iter().cycle().take(600) {
            paces.observe(1, ratio);
        }
        assert!((1.0 / MOST..=MOST).contains(&paces.factor(1)), "{}", paces.factor(1));
    }

    #[test]
    fn what_was_learned_goes_on_where_it_was() {
        let paces = observed(&[1.0, 2.0], 30);
        assert_eq!(Paces::resume(&paces.learned()), Some(paces));
        assert_eq!(Paces::resume(&[(f64::NAN, 3)]), None);
        assert_eq!(Paces::resume(&[(0.5, 0)]), None);
    }
}
