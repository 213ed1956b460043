//! What stands between the matmuls of an encoder, each in one pass over memory, in place, on the calling thread.
//!
//! candle's own operations are the reference. On a CPU they hand softmax and layer norm to the one thread pool of the process:
//! two sleeps and wake-ups for each, and executors that should run side by side wait for one another there. They also take a
//! pass and a fresh allocation for each bias, residual and mask, and compute erf one number at a time.
//!
//! Always true
//! - Each operation equals candle's to about 1e-6; tests here and in bert.rs compare.
//! - Loops are written over fixed lanes, so that the compiler vectorises them for whatever the target has.
//!
//! Elsewhere: the same operations on a GPU (bert.rs takes candle's there, kernels/ has ours).

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result};

/// Adds a bias to every row.
pub struct AddBias<'a>(pub &'a [f32]);

/// Adds a bias to every row, then GELU with erf.
pub struct BiasGelu<'a>(pub &'a [f32]);

/// Adds a bias and the residual to every row, then normalises it.
pub struct AddNorm<'a> {
    pub bias: &'a [f32],
    pub weight: &'a [f32],
    pub shift: &'a [f32],
    pub eps: f32,
}

/// Softmax over the real tokens of each row; padding's share is 0. A row without real tokens gets no share at all.
pub struct MaskedSoftmax<'a> {
    pub len: usize,
    /// Score rows, of `len` each, that belong to one row of the batch: heads × len.
    pub scores_per_row: usize,
    pub lengths: &'a [u32],
}

impl InplaceOp1 for AddBias<'_> {
    fn name(&self) -> &'static str {
        "add-bias"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        add_bias(floats_mut(storage, layout)?, self.0);
        Ok(())
    }
}

impl InplaceOp1 for BiasGelu<'_> {
    fn name(&self) -> &'static str {
        "bias-gelu"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        bias_gelu(floats_mut(storage, layout)?, self.0);
        Ok(())
    }
}

impl InplaceOp2 for AddNorm<'_> {
    fn name(&self) -> &'static str {
        "add-norm"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, layout: &Layout, residual: &CpuStorage, beside: &Layout) -> Result<()> {
        add_norm(floats_mut(out, layout)?, floats(residual, beside)?, self);
        Ok(())
    }
}

impl InplaceOp1 for MaskedSoftmax<'_> {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let scores = floats_mut(storage, layout)?;
        for (rows, real) in scores.chunks_exact_mut(self.scores_per_row * self.len).zip(self.lengths) {
            for row in rows.chunks_exact_mut(self.len) {
                let (tokens, padding) = row.split_at_mut(*real as usize);
                softmax(tokens);
                padding.fill(0.0);
            }
        }
        Ok(())
    }
}

fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => candle_core::bail!("expected a contiguous f32 tensor"),
    }
}

fn floats_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("expected a contiguous f32 tensor"),
    }
}

fn add_bias(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (value, bias) in row.iter_mut().zip(bias) {
            *value += bias;
        }
    }
}

fn bias_gelu(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (value, bias) in row.iter_mut().zip(bias) {
            *value = gelu(*value + bias);
        }
    }
}

fn add_norm(x: &mut [f32], residual: &[f32], norm: &AddNorm<'_>) {
    let width = norm.bias.len();
    let count = width as f32;
    for (row, residual) in x.chunks_exact_mut(width).zip(residual.chunks_exact(width)) {
        for ((value, bias), residual) in row.iter_mut().zip(norm.bias).zip(residual) {
            *value += bias + residual;
        }
        let mean = lane_sum(row, |value| value) / count;
        let variance = lane_sum(row, |value| (value - mean) * (value - mean)) / count;
        let scale = 1.0 / (variance + norm.eps).sqrt();
        for ((value, weight), shift) in row.iter_mut().zip(norm.weight).zip(norm.shift) {
            *value = (*value - mean) * scale * weight + shift;
        }
    }
}

fn softmax(scores: &mut [f32]) {
    let largest = lane_max(scores);
    for score in scores.iter_mut() {
        *score = exp(*score - largest);
    }
    let scale = 1.0 / lane_sum(scores, |value| value);
    for score in scores.iter_mut() {
        *score *= scale;
    }
}

/// One running sum would be a chain of additions; eight are independent.
const LANES: usize = 8;

fn lane_sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|value| term(*value)).sum();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += term(*value);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

fn lane_max(values: &[f32]) -> f32 {
    // `f32::max` has rules for NaN that have no single instruction; scores are finite, or the output check finds it.
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::MIN; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(f32::MIN, |a, b| larger(a, *b));
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *value);
        }
    }
    lanes.iter().fold(rest, |a, b| larger(a, *b))
}

/// e^x for x up to 88, within 2 units in the last place; 0 from about -87 down, as good as that in a sum with 1 in it.
///
/// x = n·ln 2 + r with r within ±ln 2 / 2; e^r by its series, 2^n by adding n to the exponent.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2^23 rounds to a whole number and leaves it in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: the first has few bits, so that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut series = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + factor;
    }
    let scaled = f32::from_bits(series.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x > -87.0 { scaled } else { 0.0 }
}

/// x · Φ(x), with Φ through erf (Abramowitz and Stegun 7.1.26, off by at most 1.5e-7).
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let z = x * std::f32::consts::FRAC_1_SQRT_2;
    let z = z.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let mut series = 1.061_405_4;
    for factor in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        series = series * t + factor;
    }
    // 1 - erf(z): the smaller side, which keeps its digits where erf is nearly 1.
    let tail = 0.5 * series * t * exp(-z * z);
    x * if x > 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_the_last_digits() {
        for step in 0..20_000 {
            let x = -88.0 + step as f32 * (176.0 / 20_000.0);
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            let allowed = if x > -87.0 { want * 3e-7 } else { 2e-38 };
            assert!((got - want).abs() <= allowed, "exp({x}) is {want:e}, got {got:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::MIN), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn gelu_equals_candles() {
        let xs: Vec<f32> = (0..4001).map(|step| (step - 2000) as f32 * 0.01).collect();
        let want = candle_core::Tensor::new(xs.as_slice(), &candle_core::Device::Cpu).and_then(|x| x.gelu_erf());
        let want: Vec<f32> = want.and_then(|want| want.to_vec1()).expect("computes");
        for (x, want) in xs.iter().zip(want) {
            assert!((gelu(*x) - want).abs() <= 1e-6 * x.abs().max(1.0), "gelu({x}) is {want}, got {}", gelu(*x));
        }
        assert_eq!(gelu(0.0), 0.0);
        // A NaN must not be lost on the way: the output check has to see it.
        assert!(gelu(f32::NAN).is_nan());
    }

    #[test]
    fn softmax_shares_add_up_for_every_length() {
        softmax(&mut []);
        for len in 1..40 {
            let mut shares: Vec<f32> = (0..len).map(|n| (n * 7 % 13) as f32 - 20.0).collect();
            let want: Vec<f64> = shares.iter().map(|score| f64::from(*score).exp()).collect();
            let total: f64 = want.iter().sum();
            softmax(&mut shares);
            for (got, want) in shares.iter().zip(want) {
                assert!((f64::from(*got) - want / total).abs() < 1e-6);
            }
        }
    }
}
