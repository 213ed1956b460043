//! How much longer than expected it takes, by experience, until a sealed batch is done.
//!
//! What a batch takes can be foreseen only where nothing else uses the machine and a batch's shape says all. Elsewhere rows that
//! could just make it do not, and as the soonest deadline goes first, every row is then one that could just make it: all are
//! computed and all are late. So what counts is what came of the promises: the time from sealing to the end, which includes
//! the wait behind another batch, beside the same as it was expected when the batch was sealed.
//!
//! A quantile followed with steps of constant size (stochastic approximation: Robbins and Monro, 1951), in the logarithm: after a
//! batch that took longer it goes up by `SHARE` of a step, otherwise down by the rest.
//!
//! Always true
//! - The factor is between 1 and [`MOST`].

use std::time::Duration;

/// Of the batches this share is done within the factor.
const SHARE: f64 = 0.9;
/// In the logarithm.
const STEP: f64 = 0.05;
/// Whatever is observed: a machine that stood still for a minute says nothing about the next batch.
pub const MOST: f64 = 8.0;

#[derive(Clone, Copy, Debug, PartialEq, bincode::Decode, bincode::Encode)]
pub struct Overrun {
    factor: f64,
}

impl Default for Overrun {
    fn default() -> Overrun {
        Overrun { factor: 1.0 }
    }
}

impl Overrun {
    /// A batch was done `took` after it was sealed, and `promised` was expected.
    pub fn observe(&mut self, promised: Duration, took: Duration) {
        if promised.is_zero() {
            // Nothing was known of it.
            return;
        }
        let longer = took > promised.mul_f64(self.factor);
        let step = if longer { STEP * SHARE } else { -STEP * (1.0 - SHARE) };
        self.factor = (self.factor * step.exp()).clamp(1.0, MOST);
    }

    /// What an expected time is multiplied by, to be kept by nine of ten.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// What was saved is a factor.
    pub fn is_whole(&self) -> bool {
        (1.0..=MOST).contains(&self.factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn nine_of_ten_are_done_within_it() {
        let mut overrun = Overrun::default();
        let (mut within, mut sum) = (0, 0.0);
        for batch in 0..20_000 {
            // Evenly between half and two and a half times what was promised (multiples of the golden section): nine of ten within 2.3 times.
            let took = MS.mul_f64(0.5 + 2.0 * (f64::from(batch) * 0.618_033_988_749_895).fract());
            if batch >= 100 {
                within += u32::from(took <= MS.mul_f64(overrun.factor()));
                sum += overrun.factor();
            }
            overrun.observe(MS, took);
        }
        assert!((17_700..=18_100).contains(&within), "{within} of 19,900");
        assert!((2.2..=2.35).contains(&(sum / 19_900.0)), "{}", sum / 19_900.0);
    }

    #[test]
    fn promises_that_are_kept_cost_nothing_and_it_stays_within_its_bounds() {
        let mut overrun = Overrun::default();
        overrun.observe(Duration::ZERO, MS);
        (0..100).for_each(|_| overrun.observe(MS, MS / 2));
        assert_eq!(overrun.factor(), 1.0);
        // Three times as slow from now on: it is known after two dozen batches.
        (0..25).for_each(|_| overrun.observe(MS, MS * 3));
        assert!((2.9..=3.3).contains(&overrun.factor()), "{}", overrun.factor());
        (0..1000).for_each(|_| overrun.observe(MS, MS * 1000));
        assert_eq!(overrun.factor(), MOST);
        // And forgotten, slowly.
        (0..420).for_each(|_| overrun.observe(MS, MS));
        assert_eq!(overrun.factor(), 1.0);
        assert!(overrun.is_whole() && !Overrun { factor: f64::NAN }.is_whole());
    }
}
