//! Functions of one vector, and sums over a block: the same code for every instruction set.
//!
//! Always true
//! - Each function says how far it is from the exact value, and a test holds it to that on every instruction set of the machine.
//! - NaN in, NaN out where a result is returned to a caller; `exp` is the exception, and says so.
//!
//! Everything here is `inline(always)`: a function that is not inlined into the dispatched one is compiled without its
//! instruction set.

use pulp::Simd;

/// Vectors of one block, side by side: enough independent sums that a multiply-add never waits for the one before it.
pub const VECTORS: usize = 2;

/// Tokens of a block.
pub const fn width<S: Simd>() -> usize {
    VECTORS * S::F32_LANES
}

/// c₀ + t·(c₁ + t·(c₂ + …)).
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(simd: S, t: S::f32s, coefficients: [f32; N]) -> S::f32s {
    let mut sum = simd.splat_f32s(coefficients[N - 1]);
    for c in coefficients[..N - 1].iter().rev() {
        sum = simd.mul_add_e_f32s(sum, t, simd.splat_f32s(*c));
    }
    sum
}

/// e^x for x up to 88, within 3e-7 of it (relative); 0 from -87 down, and for NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r by its series, 2^n by adding n to the exponent.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 · 2^23 rounds to a whole number and leaves it in the lowest bits.
    let round = simd.splat_f32s(12_582_912.0);
    let lowest = simd.splat_f32s(-87.0);
    let normal = simd.greater_than_f32s(x, lowest);
    let x = simd.select_f32s(normal, x, lowest);
    let shifted = simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), round);
    let n = simd.sub_f32s(shifted, round);
    // ln 2 in two parts: the first has few bits, so that n times it is exact.
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-0.693_359_4), x);
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(2.121_944_4e-4), r);
    let series = polynomial(simd, r, [1.0, 1.0, 0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0]);
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let scaled = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(series), exponent));
    simd.select_f32s(normal, scaled, simd.splat_f32s(0.0))
}

/// x·Φ(x) with the normal distribution function Φ, that is GELU with erf, within 3e-7 · max(1, |x|).
///
/// Φ(x) = 1/2 + x·P(x²)/Q(x²) on [-5.5, 5.5] (beyond, it is 0 or 1 to that precision). P and Q are a minimax fit of degree 5
/// each, made for this file by iterated weighted least squares against erf in double precision.
#[inline(always)]
pub fn gelu_erf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let limit = simd.splat_f32s(5.5);
    let c = simd.max_f32s(simd.min_f32s(x, limit), simd.neg_f32s(limit));
    let t = simd.mul_f32s(c, c);
    let p =
        polynomial(simd, t, [0.398_942, 0.035_125_263, 0.004_760_484, 1.826_648_5e-4, 6.527_524e-6, 2.221_876_4e-8]);
    let q = polynomial(simd, t, [1.0, 0.254_709_63, 0.029_388_668, 0.001_961_386, 7.853_727e-5, 1.195_234_2e-6]);
    let phi = simd.mul_add_e_f32s(simd.div_f32s(p, q), c, simd.splat_f32s(0.5));
    simd.mul_f32s(x, phi)
}

/// tanh within 3e-7: 1 − 2 / (e^2x + 1), which keeps the absolute error, not the relative one, near 0.
#[inline(always)]
pub fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let limit = simd.splat_f32s(10.0);
    let c = simd.max_f32s(simd.min_f32s(x, limit), simd.neg_f32s(limit));
    let one = simd.splat_f32s(1.0);
    let e = exp(simd, simd.add_f32s(c, c));
    let y = simd.sub_f32s(one, simd.div_f32s(simd.splat_f32s(2.0), simd.add_f32s(e, one)));
    // The limits lose a NaN.
    simd.select_f32s(simd.equal_f32s(x, x), y, x)
}

/// GELU by its tanh formula (Hendrycks and Gimpel, arXiv:1606.08415), which differs from the one with erf by up to 5e-4.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let cubic = simd.mul_f32s(simd.mul_f32s(x, x), x);
    let inner = simd.mul_add_e_f32s(cubic, simd.splat_f32s(0.044_715), x);
    let t = tanh(simd, simd.mul_f32s(inner, simd.splat_f32s(0.797_884_6)));
    let half = simd.mul_f32s(x, simd.splat_f32s(0.5));
    simd.mul_add_e_f32s(half, t, half)
}

/// max(x, 0).
#[inline(always)]
pub fn relu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Not a maximum, which may lose a NaN.
    let zero = simd.splat_f32s(0.0);
    simd.select_f32s(simd.less_than_f32s(x, zero), zero, x)
}
