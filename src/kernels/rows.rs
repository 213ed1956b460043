//! What is neither a product nor attention: embeddings, layer norm, pooling.
//!
//! Blocks are `[features][width]`; a norm runs down the features, its vectors side by side.

use pulp::{Simd, WithSimd};

use super::math::{self, VECTORS};

/// A layer norm's parameters.
#[derive(Debug)]
pub struct Norm {
    pub weight: Vec<f32>,
    pub shift: Vec<f32>,
    pub eps: f32,
}

/// Normalises each token's features in place, after adding `y` to them where there is one. Two passes for the variance: the
/// short formula loses digits where the mean is large.
pub struct AddNorm<'a> {
    pub norm: &'a Norm,
    /// `[blocks][features][width]`
    pub x: &'a mut [f32],
    pub y: Option<&'a [f32]>,
}

impl WithSimd for AddNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (x, _) = S::as_mut_simd_f32s(self.x);
        match self.y {
            Some(y) => add_norm(simd, self.norm, x, Some(S::as_simd_f32s(y).0)),
            None => add_norm(simd, self.norm, x, None),
        }
    }
}

#[inline(always)]
fn add_norm<S: Simd>(simd: S, norm: &Norm, x: &mut [S::f32s], y: Option<&[S::f32s]>) {
    let features = norm.weight.len();
    let count = simd.splat_f32s(1.0 / features as f32);
    let zero = simd.splat_f32s(0.0);
    for (block, x) in x.chunks_exact_mut(features * VECTORS).enumerate() {
        let (x, _) = x.as_chunks_mut::<VECTORS>();
        let mut sum = [zero; VECTORS];
        match y {
            Some(y) => {
                let (y, _) = y[block * features * VECTORS..][..features * VECTORS].as_chunks::<VECTORS>();
                for (x, y) in x.iter_mut().zip(y) {
                    for v in 0..VECTORS {
                        x[v] = simd.add_f32s(x[v], y[v]);
                        sum[v] = simd.add_f32s(sum[v], x[v]);
                    }
                }
            }
            None => {
                for x in x.iter() {
                    for v in 0..VECTORS {
                        sum[v] = simd.add_f32s(sum[v], x[v]);
                    }
                }
            }
        }
        let mut mean = sum;
        for mean in &mut mean {
            *mean = simd.mul_f32s(*mean, count);
        }
        let mut squares = [zero; VECTORS];
        for x in x.iter() {
            for v in 0..VECTORS {
                let off = simd.sub_f32s(x[v], mean[v]);
                squares[v] = simd.mul_add_e_f32s(off, off, squares[v]);
            }
        }
        let mut scale = squares;
        for scale in &mut scale {
            let variance = simd.mul_add_e_f32s(*scale, count, simd.splat_f32s(norm.eps));
            *scale = simd.div_f32s(simd.splat_f32s(1.0), simd.sqrt_f32s(variance));
        }
        for (x, (weight, shift)) in x.iter_mut().zip(norm.weight.iter().zip(&norm.shift)) {
            let (weight, shift) = (simd.splat_f32s(*weight), simd.splat_f32s(*shift));
            for v in 0..VECTORS {
                let off = simd.mul_f32s(simd.sub_f32s(x[v], mean[v]), scale[v]);
                x[v] = simd.mul_add_e_f32s(off, weight, shift);
            }
        }
    }
}

/// Writes one token's features, given side by side, into its column.
#[inline(always)]
pub fn put_column<S: Simd>(values: &[f32], x: &mut [f32], token: usize) {
    let width = math::width::<S>();
    let block = &mut x[token / width * values.len() * width..][..values.len() * width];
    for (row, value) in block.chunks_exact_mut(width).zip(values) {
        row[token % width] = *value;
    }
}

/// Adds up `tokens` columns from `start` on, feature by feature, into `out` (which is overwritten).
#[inline(always)]
pub fn sum_columns<S: Simd>(x: &[f32], start: usize, tokens: usize, out: &mut [f32]) {
    let width = math::width::<S>();
    out.fill(0.0);
    let mut at = 0;
    while at < tokens {
        let (block, column) = ((start + at) / width, (start + at) % width);
        let run = (width - column).min(tokens - at);
        let from = block * out.len() * width;
        for (sum, row) in out.iter_mut().zip(x[from..].chunks_exact(width)) {
            *sum += row[column..column + run].iter().sum::<f32>();
        }
        at += run;
    }
}

/// The largest of `tokens` columns from `start` on, feature by feature; 0 where there are none.
#[inline(always)]
pub fn max_columns<S: Simd>(x: &[f32], start: usize, tokens: usize, out: &mut [f32]) {
    let width = math::width::<S>();
    out.fill(if tokens == 0 { 0.0 } else { f32::NEG_INFINITY });
    for token in start..start + tokens {
        let block = &x[token / width * out.len() * width..];
        for (largest, row) in out.iter_mut().zip(block.chunks_exact(width)) {
            let value = row[token % width];
            // A NaN stays one.
            if value > *largest || value.is_nan() {
                *largest = value;
            }
        }
    }
}

/// Divides by the Euclidean length; a vector of zeros stays one.
#[inline(always)]
pub fn normalize(values: &mut [f32]) {
    let squares: f32 = values.iter().map(|value| value * value).sum();
    let scale = 1.0 / squares.sqrt().max(1e-12);
    values.iter_mut().for_each(|value| *value *= scale);
}
