//! Each operation against a plain one in double precision, on every instruction set of this machine.

use proptest::prelude::*;
use pulp::{Arch, Simd, WithSimd};

use super::attention::{self, Attend, Sequence};
use super::linear::{Packed, Then};
use super::rows::{AddNorm, Norm};
use super::{archs, math};

/// Numbers that look random, the same each time.
fn numbers(seed: u64, count: usize, size: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 2.0 * size
        })
        .collect()
}

#[derive(Clone, Copy, Debug)]
enum Function {
    Exp,
    GeluErf,
    GeluTanh,
    Tanh,
    Relu,
}

struct Each(Function, Vec<f32>);

impl WithSimd for Each {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Each(function, mut values) = self;
        values.resize(values.len().next_multiple_of(S::F32_LANES), 0.0);
        let (vectors, _) = S::as_mut_simd_f32s(&mut values);
        for x in vectors {
            *x = match function {
                Function::Exp => math::exp(simd, *x),
                Function::GeluErf => math::gelu_erf(simd, *x),
                Function::GeluTanh => math::gelu_tanh(simd, *x),
                Function::Tanh => math::tanh(simd, *x),
                Function::Relu => math::relu(simd, *x),
            };
        }
        values
    }
}

/// erf by its series where that converges fast, by its continued fraction elsewhere (Abramowitz and Stegun 7.1.6, 7.1.14).
fn erf(x: f64) -> f64 {
    if x < 0.0 {
        return -erf(-x);
    }
    if x < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= 2.0 * x * x / (2 * n + 1) as f64;
            sum += term;
        }
        return sum * (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let fraction = (1..200).rev().fold(x, |below, n| x + f64::from(n) / 2.0 / below);
    1.0 - (-x * x).exp() / fraction / std::f64::consts::PI.sqrt()
}

fn exactly(function: Function, x: f64) -> f64 {
    match function {
        Function::Exp => x.exp(),
        Function::GeluErf => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Function::GeluTanh => {
            0.5 * x * (1.0 + (std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Function::Tanh => x.tanh(),
        Function::Relu => x.max(0.0),
    }
}

#[test]
fn functions_are_as_exact_as_they_say() {
    let xs: Vec<f32> = (-90_000..=88_000).map(|n| n as f32 * 1e-3).chain([0.0, -0.0, 1e-30, -1e-30]).collect();
    for arch in archs() {
        for function in [Function::Exp, Function::GeluErf, Function::GeluTanh, Function::Tanh, Function::Relu] {
            let got = arch.dispatch(Each(function, xs.clone()));
            for (x, got) in xs.iter().zip(got) {
                let (x, got) = (f64::from(*x), f64::from(got));
                let want = exactly(function, x);
                let allowed = match function {
                    Function::Exp if x <= -87.0 => 2e-38,
                    Function::Exp => want * 3e-7,
                    Function::GeluErf => 3e-7 * x.abs().max(1.0),
                    Function::GeluTanh => 4e-7 * x.abs().max(1.0),
                    Function::Tanh => 3e-7,
                    Function::Relu => 0.0,
                };
                assert!((got - want).abs() <= allowed, "{arch:?} {function:?}({x}) is {want:e}, got {got:e}");
            }
        }
    }
}

/// The output check has to see a NaN that comes in.
#[test]
fn a_nan_is_not_lost_on_the_way() {
    for arch in archs() {
        for function in [Function::GeluErf, Function::GeluTanh, Function::Tanh, Function::Relu] {
            let got = arch.dispatch(Each(function, vec![f32::NAN; 16]));
            assert!(got[0].is_nan(), "{arch:?} {function:?} of NaN is {}", got[0]);
        }
        let got = arch.dispatch(Each(Function::Exp, vec![f32::NEG_INFINITY, f32::MIN, 0.0]));
        assert_eq!(got[..3], [0.0, 0.0, 1.0], "{arch:?}");
    }
}

/// Tokens of a block on this instruction set.
struct Width;

impl WithSimd for Width {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        math::width::<S>()
    }
}

/// From `[tokens][features]` to blocks. Lanes without a token hold what no answer may depend on.
fn blocks(arch: Arch, values: &[f32], features: usize) -> Vec<f32> {
    let width = arch.dispatch(Width);
    let tokens = values.len() / features;
    let mut blocks = vec![f32::NAN; tokens.next_multiple_of(width) * features];
    for (token, row) in values.chunks_exact(features).enumerate() {
        for (feature, value) in row.iter().enumerate() {
            blocks[(token / width * features + feature) * width + token % width] = *value;
        }
    }
    blocks
}

/// The reverse.
fn tokens(arch: Arch, blocks: &[f32], features: usize, count: usize) -> Vec<f32> {
    let width = arch.dispatch(Width);
    let at = |token: usize, feature: usize| (token / width * features + feature) * width + token % width;
    (0..count).flat_map(|token| (0..features).map(move |feature| at(token, feature))).map(|at| blocks[at]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_product_is_that_of_its_definition(
        seed in any::<u64>(), inputs in 1..70usize, outputs in 1..60usize, count in 1..80usize, gelu in any::<bool>(),
    ) {
        let weights = numbers(seed, inputs * outputs, 0.3);
        let bias = numbers(seed ^ 1, outputs, 1.0);
        let x = numbers(seed ^ 2, inputs * count, 2.0);
        let packed = Packed::new(&weights, &bias, inputs);
        prop_assert_eq!((packed.inputs(), packed.outputs()), (inputs, outputs));
        for arch in archs() {
            let mut y = vec![f32::NAN; count.next_multiple_of(arch.dispatch(Width)) * outputs];
            let then = if gelu { Then::GeluErf } else { Then::Nothing };
            packed.run(arch, &blocks(arch, &x, inputs), &mut y, count, then);
            let got = tokens(arch, &y, outputs, count);
            for (token, got) in got.chunks_exact(outputs).enumerate() {
                for (output, got) in got.iter().enumerate() {
                    let x = x[token * inputs..][..inputs].iter();
                    let row = weights[output * inputs..][..inputs].iter();
                    let sum: f64 = x.zip(row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() + f64::from(bias[output]);
                    let want = if gelu { exactly(Function::GeluErf, sum) } else { sum };
                    prop_assert!((f64::from(*got) - want).abs() <= 2e-5, "{arch:?} [{token}, {output}]: {want}, got {got}");
                }
            }
        }
    }

    #[test]
    fn attention_is_that_of_its_definition(
        seed in any::<u64>(),
        size in prop::sample::select(vec![1usize, 3, 4, 8, 16, 20, 32, 48, 64]),
        heads in 1..4usize,
        lens in prop::collection::vec((1..70usize, 0..10usize), 1..6),
    ) {
        let hidden = heads * size;
        let mut start = 0;
        let sequences: Vec<Sequence> = lens.iter().map(|(span, padding)| {
            let sequence = Sequence { start, span: *span, real: span.saturating_sub(*padding) };
            start += span;
            sequence
        }).collect();
        let qkv = numbers(seed, start * 3 * hidden, 1.5);
        let shape = attention::Shape { size, heads, longest: 70 };
        let part = |token: usize, part: usize, head: usize| &qkv[(token * 3 + part) * hidden + head * size..][..size];
        for arch in archs() {
            let mut context = vec![f32::NAN; start.next_multiple_of(arch.dispatch(Width)) * hidden];
            // Whatever was there before must not matter.
            let mut scratch = vec![f32::NAN; shape.scratch()];
            let blocked = blocks(arch, &qkv, 3 * hidden);
            for sequence in sequences.iter().copied() {
                arch.dispatch(Attend { shape, sequence, qkv: &blocked, context: &mut context, scratch: &mut scratch });
            }
            let got = tokens(arch, &context, hidden, start);
            for sequence in &sequences {
                let keys = sequence.start..sequence.start + sequence.real;
                for query in sequence.start..sequence.start + sequence.span {
                    for head in 0..heads {
                        let dot = |key: usize| -> f64 {
                            let pairs = part(query, 0, head).iter().zip(part(key, 1, head));
                            pairs.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
                        };
                        let scores: Vec<f64> = keys.clone().map(dot).collect();
                        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                        let shares: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                        let total: f64 = shares.iter().sum();
                        for d in 0..size {
                            let values = keys.clone().map(|key| f64::from(part(key, 2, head)[d]));
                            let sum: f64 = shares.iter().zip(values).map(|(share, value)| share * value).sum();
                            let want = if sequence.real == 0 { 0.0 } else { sum / total };
                            let got = f64::from(got[query * hidden + head * size + d]);
                            // A padded query's answer is nobody's, but finite: it goes through the products like the rest.
                            prop_assert!(got.is_finite() && (got - want).abs() <= 2e-5, "{arch:?} {sequence:?}: {want}, got {got}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_norm_is_that_of_its_definition(seed in any::<u64>(), features in 1..50usize, count in 1..70usize, far in -50.0..50.0f32) {
        let x: Vec<f32> = numbers(seed, features * count, 3.0).iter().map(|x| x + far).collect();
        let y = numbers(seed ^ 1, features * count, 3.0);
        let norm = Norm { weight: numbers(seed ^ 2, features, 1.0), shift: numbers(seed ^ 3, features, 1.0), eps: 1e-3 };
        for arch in archs() {
            let mut got = blocks(arch, &x, features);
            arch.dispatch(AddNorm { norm: &norm, x: &mut got, y: Some(&blocks(arch, &y, features)) });
            let got = tokens(arch, &got, features, count);
            for token in 0..count {
                let sums: Vec<f64> = (0..features).map(|f| f64::from(x[token * features + f]) + f64::from(y[token * features + f])).collect();
                let mean = sums.iter().sum::<f64>() / features as f64;
                let variance = sums.iter().map(|sum| (sum - mean) * (sum - mean)).sum::<f64>() / features as f64;
                for (feature, sum) in sums.iter().enumerate() {
                    let scaled = (sum - mean) / (variance + 1e-3).sqrt();
                    let want = scaled * f64::from(norm.weight[feature]) + f64::from(norm.shift[feature]);
                    let got = f64::from(got[token * features + feature]);
                    // The sum of x and y is rounded once, at the size of `far`.
                    prop_assert!((got - want).abs() <= 5e-4, "{arch:?} [{token}, {feature}]: {want}, got {got}");
                }
            }
        }
    }
}
