//! y = W·x + b with weights and activations of 8 bits: four times the arithmetic of an instruction, for a small error.
//!
//! Weights have a scale per output, symmetric: w ≈ scale · q, q from -127 to 127. Activations are quantised when they arrive,
//! each token by its own range: x ≈ low + step · q, q from 0 to 255, with `low` its least value and `step` 1/255 of its range.
//! So W·x ≈ scale · (step · Σ q_w·q_x + low · Σ q_w): whole numbers in the loop, and the rest once for each output.
//!
//! Layout: as linear.rs, but that a word of 32 bits holds several inputs of a token: four bytes `[inputs / 4][width][4]` where
//! the processor multiplies bytes (AVX-512 VNNI), two of 16 bits elsewhere, `[2][inputs / 4][width][2]`. AVX2 does multiply
//! bytes, but adds the products in 16 bits, where two of them do not fit. Values of 7 bits would fit, and take the worst cosine
//! of minilm from 0.993 to 0.983 (weights) or 0.975 (activations): the halves are slower, and their answers those of the others.
//!
//! Method: dynamic quantisation with a scale per channel, as in Wu et al., "Integer Quantization for Deep Learning Inference"
//! (arXiv:2004.09602, 2020).
//!
//! Always true
//! - The sums are exact, so equal inputs have the same result on every instruction set, but for the last bits of the scaling.
//!   (Without fused multiply-add, a value halfway between two steps may go to the other one.)
//! - A token's result depends on nothing but its own inputs.
//! - A token with an input that is not finite has no finite result.
//!
//! Elsewhere: the one instruction that pulp does not have (device/vnni.rs).

use pulp::{NullaryFnOnce, Simd};

use super::buffer::Floats;
use super::linear::{PANEL, Then, apply};
use super::math::{self, VECTORS};
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
use crate::device::vnni::Vnni;

/// Inputs that are packed together.
const QUAD: usize = 4;

/// Largest quantised weight; -128 is left out, so that the range is symmetric.
const WEIGHT_MAX: f32 = 127.0;

/// Largest quantised activation.
const STEPS: f32 = 255.0;

/// Most inputs of a product: the sum of more could pass 2^31.
pub const INPUTS_MAX: usize = (i32::MAX as usize) / (127 * 255);

/// Weights of a product, packed as `[outputs / PANEL][inputs / 4][PANEL]` words of four bytes, filled up with zeros.
#[derive(Debug)]
pub struct Packed {
    inputs: usize,
    outputs: usize,
    panels: Vec<i32>,
    /// One for each output.
    scales: Vec<f32>,
    /// scale · Σ q_w: what a token's `low` is multiplied with.
    sums: Vec<f32>,
    bias: Vec<f32>,
}

impl Packed {
    /// Quantises and packs a `[outputs, inputs]` matrix, as checkpoints have them, and a bias of `outputs` values.
    ///
    /// Panics where the sizes do not fit, or there are more than [`INPUTS_MAX`] inputs: they were checked when the file was read.
    pub fn new(weights: &[f32], bias: &[f32], inputs: usize) -> Packed {
        let outputs = bias.len();
        assert_eq!(weights.len(), inputs * outputs, "a weight for each input and output");
        assert!(inputs <= INPUTS_MAX, "sums stay below 2^31");
        let quads = inputs.div_ceil(QUAD);
        let places = outputs.next_multiple_of(PANEL);
        let mut packed = Packed {
            inputs,
            outputs,
            panels: vec![0; quads * places],
            scales: vec![0.0; places],
            sums: vec![0.0; places],
            bias: bias.to_vec(),
        };
        packed.bias.resize(places, 0.0);
        for (output, row) in weights.chunks_exact(inputs.max(1)).enumerate() {
            let largest = row.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
            // Comparisons lose NaN, and a weight that is not finite must not become one that is.
            let scale = if row.iter().all(|weight| weight.is_finite()) { largest / WEIGHT_MAX } else { f32::NAN };
            // A row of zeros stays one.
            let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
            let panel = &mut packed.panels[output / PANEL * quads * PANEL..][..quads * PANEL];
            let mut sum = 0;
            for (place, quad) in panel.chunks_exact_mut(PANEL).zip(row.chunks(QUAD)) {
                let mut bytes = [0i8; QUAD];
                for (byte, weight) in bytes.iter_mut().zip(quad) {
                    *byte = (weight * inverse).round().clamp(-WEIGHT_MAX, WEIGHT_MAX) as i8;
                    sum += i32::from(*byte);
                }
                place[output % PANEL] = i32::from_le_bytes(bytes.map(|byte| byte as u8));
            }
            packed.scales[output] = scale;
            packed.sums[output] = scale * sum as f32;
        }
        packed
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&self.panels[..]) + (self.scales.len() + self.sums.len() + self.bias.len()) * size_of::<f32>()
    }
}

/// Memory of one thread: quantised activations, and a panel of weights in halves. Grows to the largest product and stays.
#[derive(Debug, Default)]
pub struct Scratch {
    // Words, kept in a buffer of floats for where that begins.
    words: Floats,
    /// `[blocks][2][VECTORS]`: the steps and the lowest values of a block's tokens.
    ranges: Floats,
    panel: Vec<i32>,
}

impl Scratch {
    /// Makes room for products of up to `tokens` places with up to `inputs` inputs.
    pub fn reserve(&mut self, tokens: usize, inputs: usize) {
        let places = tokens.next_multiple_of(32);
        let words = inputs.next_multiple_of(QUAD) / 2;
        self.words.reserve(places * words);
        self.ranges.reserve(places * 2);
        if self.panel.len() < words * PANEL {
            self.panel.resize(words * PANEL, 0);
        }
    }
}

/// How an instruction set multiplies small whole numbers.
trait Dot<S: Simd>: Copy {
    /// Words that four inputs take: 1 of four bytes, or 2 of two halves.
    const WORDS: usize;

    /// In each lane, `sum` and the products of what a word of `x` (unsigned) and `w` (signed) hold.
    fn dot(self, sum: S::i32s, x: S::u32s, w: i32) -> S::i32s;

    fn floats(self, sum: S::i32s) -> S::f32s;
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
mod x86 {
    use pulp::x86::{V3, V4};
    use pulp::{Simd, cast, f32x8, f32x16, i32x8, i32x16, u32x8, u32x16};

    use super::Dot;
    use crate::device::vnni::Vnni;

    impl Dot<V4> for (Vnni, V4) {
        const WORDS: usize = 1;

        #[inline(always)]
        fn dot(self, sum: i32x16, x: u32x16, w: i32) -> i32x16 {
            cast(self.0.dot(cast(sum), cast(x), cast(self.1.splat_i32s(w))))
        }

        #[inline(always)]
        fn floats(self, sum: i32x16) -> f32x16 {
            cast(self.1.avx512f._mm512_cvtepi32_ps(cast(sum)))
        }
    }

    impl Dot<V4> for V4 {
        const WORDS: usize = 2;

        #[inline(always)]
        fn dot(self, sum: i32x16, x: u32x16, w: i32) -> i32x16 {
            let products = self.avx512bw._mm512_madd_epi16(cast(x), cast(self.splat_i32s(w)));
            self.add_i32s(sum, cast(products))
        }

        #[inline(always)]
        fn floats(self, sum: i32x16) -> f32x16 {
            cast(self.avx512f._mm512_cvtepi32_ps(cast(sum)))
        }
    }

    impl Dot<V3> for V3 {
        const WORDS: usize = 2;

        #[inline(always)]
        fn dot(self, sum: i32x8, x: u32x8, w: i32) -> i32x8 {
            let products = self.avx2._mm256_madd_epi16(cast(x), cast(self.splat_i32s(w)));
            self.add_i32s(sum, cast(products))
        }

        #[inline(always)]
        fn floats(self, sum: i32x8) -> f32x8 {
            cast(self.avx._mm256_cvtepi32_ps(cast(sum)))
        }
    }
}

/// Lane by lane, for whatever processor: right, and as fast as the compiler makes it.
#[derive(Clone, Copy)]
struct Lanes;

impl<S: Simd> Dot<S> for Lanes {
    const WORDS: usize = 2;

    #[inline(always)]
    fn dot(self, mut sum: S::i32s, x: S::u32s, w: i32) -> S::i32s {
        let (low, high) = (i32::from(w as i16), w >> 16);
        let lanes: &mut [i32] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut sum));
        for (sum, x) in lanes.iter_mut().zip(bytemuck::cast_slice::<_, u32>(&[x])) {
            // Only of a token that is not finite can this be too large; what becomes of it is no matter.
            let products = ((x & 0xFFFF) as i32).wrapping_mul(low).wrapping_add(((x >> 16) as i32).wrapping_mul(high));
            *sum = sum.wrapping_add(products);
        }
        sum
    }

    #[inline(always)]
    fn floats(self, sum: S::i32s) -> S::f32s {
        let mut floats: S::f32s = bytemuck::Zeroable::zeroed();
        let lanes: &mut [f32] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut floats));
        for (float, sum) in lanes.iter_mut().zip(bytemuck::cast_slice::<_, i32>(&[sum])) {
            *float = *sum as f32;
        }
        floats
    }
}

/// Computes `tokens` tokens: `x` is `[blocks][inputs][VECTORS]`, `y` is `[blocks][outputs][VECTORS]`.
///
/// Blocks beyond the first `tokens` are left alone; lanes beyond them in the last block hold arbitrary values. Allocates only
/// where `scratch` has no room reserved.
#[inline(always)]
pub fn linear<S: Simd>(
    simd: S,
    w: &Packed,
    scratch: &mut Scratch,
    x: &[S::f32s],
    y: &mut [S::f32s],
    tokens: usize,
    then: Then,
) {
    scratch.reserve(tokens, w.inputs);
    // Which type S is, is known when this is compiled: all but one of these are left out then.
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    {
        let simd: &dyn std::any::Any = &simd;
        if let Some(v4) = simd.downcast_ref::<pulp::x86::V4>() {
            let (x, y) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(y));
            return match Vnni::try_new() {
                Some(vnni) => vnni.vectorize(Linear { simd: *v4, dot: (vnni, *v4), w, scratch, x, y, tokens, then }),
                None => v4.vectorize(Linear { simd: *v4, dot: *v4, w, scratch, x, y, tokens, then }),
            };
        }
        if let Some(v3) = simd.downcast_ref::<pulp::x86::V3>() {
            let (x, y) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(y));
            return v3.vectorize(Linear { simd: *v3, dot: *v3, w, scratch, x, y, tokens, then });
        }
    }
    Linear { simd, dot: Lanes, w, scratch, x, y, tokens, then }.call()
}

struct Linear<'a, S: Simd, D> {
    simd: S,
    dot: D,
    w: &'a Packed,
    scratch: &'a mut Scratch,
    x: &'a [S::f32s],
    y: &'a mut [S::f32s],
    tokens: usize,
    then: Then,
}

impl<S: Simd, D: Dot<S>> NullaryFnOnce for Linear<'_, S, D> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Linear { simd, dot, w, scratch, x, y, tokens, then } = self;
        let (k, n) = (w.inputs, w.outputs);
        let quads = k.div_ceil(QUAD);
        let rows = quads * D::WORDS;
        let blocks = tokens.div_ceil(math::width::<S>());
        let one_vector = |block: usize| tokens - block * math::width::<S>() <= S::F32_LANES;
        let (words, _) = S::as_mut_simd_u32s(bytemuck::cast_slice_mut(scratch.words.as_mut_slice()));
        let (words, _) = words.as_chunks_mut::<VECTORS>();
        let (ranges, _) = S::as_mut_simd_f32s(scratch.ranges.as_mut_slice());
        let (ranges, _) = ranges.as_chunks_mut::<VECTORS>();
        let (ranges, _) = ranges.as_chunks_mut::<2>();
        let (x, _) = x.as_chunks::<VECTORS>();
        for block in 0..blocks {
            let (x, words) = (&x[block * k..][..k], &mut words[block * rows..][..rows]);
            ranges[block] = match one_vector(block) {
                true => quantise::<S, D, 1>(simd, x, words),
                false => quantise::<S, D, 2>(simd, x, words),
            };
        }
        for p in 0..n.div_ceil(PANEL) {
            let panel = &w.panels[p * quads * PANEL..][..quads * PANEL];
            let panel = match D::WORDS {
                1 => panel,
                _ => {
                    let halves = &mut scratch.panel[..rows * PANEL];
                    widen(panel, halves);
                    halves
                }
            };
            let part = Part {
                panel,
                scales: &w.scales[p * PANEL..][..PANEL],
                sums: &w.sums[p * PANEL..][..PANEL],
                bias: &w.bias[p * PANEL..][..PANEL],
            };
            let count = PANEL.min(n - p * PANEL);
            for block in 0..blocks {
                let x = &words[block * rows..][..rows];
                let y = &mut y[(block * n + p * PANEL) * VECTORS..][..count * VECTORS];
                let ranges = &ranges[block];
                match (S::REGISTER_COUNT >= 32, one_vector(block)) {
                    (true, false) => outputs::<S, D, 12, 2>(simd, dot, part, x, ranges, y, then),
                    (true, true) => outputs::<S, D, 12, 1>(simd, dot, part, x, ranges, y, then),
                    (false, false) => outputs::<S, D, 6, 2>(simd, dot, part, x, ranges, y, then),
                    (false, true) => outputs::<S, D, 12, 1>(simd, dot, part, x, ranges, y, then),
                }
            }
        }
    }
}

/// Words of four signed bytes, to words of two halves: `[2][inputs / 4][PANEL]`, first those of each word's first two bytes.
/// Once for each panel and group of tokens: kept, the halves would take twice the memory.
#[inline(always)]
fn widen(panel: &[i32], halves: &mut [i32]) {
    let (low, high) = halves.split_at_mut(panel.len());
    for ((word, low), high) in panel.iter().zip(low).zip(high) {
        *low = (word << 24 >> 24) & 0xFFFF | (word << 16 >> 24 << 16);
        *high = (word << 8 >> 24) & 0xFFFF | (word >> 24 << 16);
    }
}

/// The whole number in the lowest bits of a float, after 2^23 was added to it.
const ROUND: f32 = 8_388_608.0;

/// Quantises the first V vectors of a block, `[inputs][VECTORS]`, to `[WORDS][inputs / 4][VECTORS]`. Returns the steps and the
/// lowest values of its tokens; these are NaN for a token with a value that is not finite.
#[inline(always)]
fn quantise<S: Simd, D: Dot<S>, const V: usize>(
    simd: S,
    x: &[[S::f32s; VECTORS]],
    words: &mut [[S::u32s; VECTORS]],
) -> [[S::f32s; VECTORS]; 2] {
    let zero = simd.splat_f32s(0.0);
    let first = x.first().copied().unwrap_or([zero; VECTORS]);
    let (mut low, mut high, mut sum) = (first, first, [zero; VECTORS]);
    let (quads, rest) = x.as_chunks::<QUAD>();
    for [a, b, c, d] in quads {
        for v in 0..V {
            let least = simd.min_f32s(simd.min_f32s(a[v], b[v]), simd.min_f32s(c[v], d[v]));
            let most = simd.max_f32s(simd.max_f32s(a[v], b[v]), simd.max_f32s(c[v], d[v]));
            low[v] = simd.min_f32s(low[v], least);
            high[v] = simd.max_f32s(high[v], most);
            sum[v] = simd.add_f32s(sum[v], simd.add_f32s(simd.add_f32s(a[v], b[v]), simd.add_f32s(c[v], d[v])));
        }
    }
    for row in rest {
        for v in 0..V {
            low[v] = simd.min_f32s(low[v], row[v]);
            high[v] = simd.max_f32s(high[v], row[v]);
            sum[v] = simd.add_f32s(sum[v], row[v]);
        }
    }
    let mut inverse = [zero; VECTORS];
    let mut step = [zero; VECTORS];
    for v in 0..V {
        // Equal values have no range: any step will do for them, but none that is 0 or has no inverse.
        let range = simd.max_f32s(simd.sub_f32s(high[v], low[v]), simd.splat_f32s(1e-30));
        step[v] = simd.mul_f32s(range, simd.splat_f32s(1.0 / STEPS));
        inverse[v] = simd.div_f32s(simd.splat_f32s(STEPS), range);
    }
    // Inputs that are not there have weights of zero: any value will do.
    let mut last = [low; QUAD];
    last[..rest.len()].copy_from_slice(rest);
    let (words, seconds) = words.split_at_mut(words.len() / D::WORDS);
    for (at, word) in words.iter_mut().enumerate() {
        let quad = quads.get(at).unwrap_or(&last);
        for v in 0..V {
            let mut bits = [simd.splat_u32s(0); QUAD];
            for q in 0..QUAD {
                let above = simd.sub_f32s(quad[q][v], low[v]);
                bits[q] = simd.transmute_u32s_f32s(simd.mul_add_e_f32s(above, inverse[v], simd.splat_f32s(ROUND)));
            }
            // The exponent of ROUND stays on only in a word's first value, the others' is shifted out.
            let exponent = simd.splat_u32s(ROUND.to_bits());
            let first = simd.sub_u32s(bits[0], exponent);
            if D::WORDS == 1 {
                let low = simd.add_u32s(first, shifted(simd, bits[1], 8));
                let high = simd.add_u32s(shifted(simd, bits[2], 16), shifted(simd, bits[3], 24));
                word[v] = simd.add_u32s(low, high);
            } else {
                word[v] = simd.add_u32s(first, shifted(simd, bits[1], 16));
                seconds[at][v] = simd.add_u32s(simd.sub_u32s(bits[2], exponent), shifted(simd, bits[3], 16));
            }
        }
    }
    for v in 0..V {
        // NaN where the sum is not finite, else 0: comparisons lose NaN, and an infinite range quantises to anything.
        let finite = simd.mul_f32s(sum[v], zero);
        low[v] = simd.add_f32s(low[v], finite);
    }
    [step, low]
}

#[inline(always)]
fn shifted<S: Simd>(simd: S, value: S::u32s, by: u32) -> S::u32s {
    simd.wrapping_dyn_shl_u32s(value, simd.splat_u32s(by))
}

/// A panel of weights and what belongs to its outputs.
#[derive(Clone, Copy)]
struct Part<'a> {
    panel: &'a [i32],
    scales: &'a [f32],
    sums: &'a [f32],
    bias: &'a [f32],
}

/// As linear.rs's: M rows of `a` times the first V vectors of each row of `b`.
///
/// `a` has a row each PANEL words. Hot: most time of a forward pass is spent here.
#[inline(always)]
fn tile<S: Simd, D: Dot<S>, const M: usize, const V: usize>(
    simd: S,
    dot: D,
    a: &[i32],
    b: &[[S::u32s; VECTORS]],
) -> [[S::i32s; V]; M] {
    let mut sums = [[simd.splat_i32s(0); V]; M];
    for (a, b) in a.chunks(PANEL).zip(b) {
        let Some(a) = a.first_chunk::<M>() else { break };
        for m in 0..M {
            for v in 0..V {
                sums[m][v] = dot.dot(sums[m][v], b[v], a[m]);
            }
        }
    }
    sums
}

#[inline(always)]
fn outputs<S: Simd, D: Dot<S>, const M: usize, const V: usize>(
    simd: S,
    dot: D,
    part: Part<'_>,
    x: &[[S::u32s; VECTORS]],
    [step, low]: &[[S::f32s; VECTORS]; 2],
    y: &mut [S::f32s],
    then: Then,
) {
    for (at, y) in y.chunks_mut(M * VECTORS).enumerate() {
        let first = at * M;
        let sums = tile::<S, D, M, V>(simd, dot, &part.panel[first..], x);
        let (y, _) = y.as_chunks_mut::<VECTORS>();
        let rows = y.len();
        let mut last = [[simd.splat_f32s(0.0); VECTORS]; M];
        // Sums are only indexed by constants, or they would not stay in registers.
        let place = match y.first_chunk_mut::<M>() {
            Some(place) => place,
            None => &mut last,
        };
        let (scales, weights, bias) = (&part.scales[first..][..M], &part.sums[first..][..M], &part.bias[first..][..M]);
        for m in 0..M {
            let (scale, weights, bias) =
                (simd.splat_f32s(scales[m]), simd.splat_f32s(weights[m]), simd.splat_f32s(bias[m]));
            for v in 0..V {
                let base = simd.mul_add_e_f32s(low[v], weights, bias);
                place[m][v] = simd.mul_add_e_f32s(simd.mul_f32s(dot.floats(sums[m][v]), step[v]), scale, base);
            }
        }
        apply::<S, V>(simd, place, then);
        if rows < M {
            y.copy_from_slice(&last[..rows]);
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, WithSimd};

    use super::*;
    use crate::kernels;

    /// Numbers between -0.5 and 0.5, the same in every run.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> f32 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        }

        fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
            (0..count).map(|_| self.next() * scale).collect()
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Way {
        /// As the encoder calls it.
        Best,
        /// As on a processor with AVX-512 but without VNNI.
        Halves,
        Lanes,
    }

    /// `x` is `[tokens][inputs]`, the answer `[tokens][outputs]`.
    struct Run<'a> {
        w: &'a Packed,
        x: &'a [f32],
        tokens: usize,
        then: Then,
        way: Way,
    }

    impl WithSimd for Run<'_> {
        type Output = Vec<f32>;

        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let Run { w, x, tokens, then, way } = self;
            let width = math::width::<S>();
            let places = tokens.next_multiple_of(width);
            let place = |features: usize, token: usize, feature: usize| {
                (token / width * features + feature) * width + token % width
            };
            // What lies beyond the tokens must not matter.
            let (mut from, mut to) = (Floats::with_len(places * w.inputs), Floats::with_len(places * w.outputs));
            from.as_mut_slice().fill(f32::NAN);
            for token in 0..tokens {
                for k in 0..w.inputs {
                    from.as_mut_slice()[place(w.inputs, token, k)] = x[token * w.inputs + k];
                }
            }
            let mut scratch = Scratch::default();
            scratch.reserve(tokens, w.inputs);
            {
                let (x, _) = S::as_simd_f32s(from.as_slice());
                let (y, _) = S::as_mut_simd_f32s(to.as_mut_slice());
                let scratch = &mut scratch;
                match way {
                    Way::Best => linear(simd, w, scratch, x, y, tokens, then),
                    Way::Halves => halves(simd, w, scratch, x, y, tokens, then),
                    Way::Lanes => Linear { simd, dot: Lanes, w, scratch, x, y, tokens, then }.call(),
                }
            }
            let answers = (0..tokens).flat_map(|token| (0..w.outputs).map(move |n| (token, n)));
            answers.map(|(token, n)| to.as_slice()[place(w.outputs, token, n)]).collect()
        }
    }

    fn halves<S: Simd>(
        simd: S,
        w: &Packed,
        scratch: &mut Scratch,
        x: &[S::f32s],
        y: &mut [S::f32s],
        tokens: usize,
        then: Then,
    ) {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        if let Some(v4) = (&simd as &dyn std::any::Any).downcast_ref::<pulp::x86::V4>() {
            let (x, y) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(y));
            return v4.vectorize(Linear { simd: *v4, dot: *v4, w, scratch, x, y, tokens, then });
        }
        linear(simd, w, scratch, x, y, tokens, then);
    }

    /// Every instruction set and way that this machine has.
    fn everywhere(w: &Packed, x: &[f32], tokens: usize, then: Then) -> Vec<(Arch, Way, Vec<f32>)> {
        let ways = |arch| [Way::Best, Way::Halves, Way::Lanes].map(|way| (arch, way));
        let all = kernels::archs().into_iter().flat_map(ways);
        all.map(|(arch, way)| (arch, way, arch.dispatch(Run { w, x, tokens, then, way }))).collect()
    }

    /// What the file's opening says, in double precision but for the choice of the steps. Also the sum of what is added up,
    /// taken positive: rounding is measured by that.
    fn reference(weights: &[f32], bias: f32, x: &[f32], fused: bool) -> (f64, f64) {
        let (low, high) = x.iter().fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
        let range = (high - low).max(1e-30);
        let (step, inverse) = (f64::from(range) / 255.0, 255.0 / range);
        let scale = weights.iter().fold(0.0f32, |largest, w| largest.max(w.abs())) / 127.0;
        let (mut sum, mut total) = (0i64, 0i64);
        for (w, x) in weights.iter().zip(x) {
            let w = if scale > 0.0 { (w * (1.0 / scale)).round() as i64 } else { 0 };
            let x = match fused {
                true => (x - low).mul_add(inverse, ROUND) - ROUND,
                false => ((x - low) * inverse + ROUND) - ROUND,
            };
            assert!((-127..=127).contains(&w) && (0.0..=255.0).contains(&x), "{w} {x}");
            sum += w * x as i64;
            total += w;
        }
        let parts = [step * sum as f64, f64::from(low) * total as f64].map(|part| part * f64::from(scale));
        (parts[0] + parts[1] + f64::from(bias), parts[0].abs() + parts[1].abs() + f64::from(bias.abs()))
    }

    #[test]
    fn a_product_equals_its_reference_on_every_instruction_set() {
        let mut random = Random(0x5EED);
        let shapes =
            [(1, 1, 1), (3, 5, 2), (4, 12, 16), (5, 13, 17), (7, 6, 31), (30, 25, 33), (64, 24, 32), (131, 37, 70)];
        for (inputs, outputs, tokens) in shapes {
            let weights = random.values(inputs * outputs, 0.3);
            let bias = random.values(outputs, 1.0);
            // Tokens of different size, none of them round zero.
            let mut x = random.values(inputs * tokens, 4.0);
            for (token, x) in x.chunks_exact_mut(inputs).enumerate() {
                x.iter_mut().for_each(|x| *x = (*x + 0.7) * (1 + token) as f32);
            }
            let w = Packed::new(&weights, &bias, inputs);
            for (arch, way, got) in everywhere(&w, &x, tokens, Then::Nothing) {
                let fused = !matches!(arch, Arch::Scalar);
                for (token, (x, got)) in x.chunks_exact(inputs).zip(got.chunks_exact(outputs)).enumerate() {
                    for (n, (weights, got)) in weights.chunks_exact(inputs).zip(got).enumerate() {
                        let (want, size) = reference(weights, bias[n], x, fused);
                        assert!(
                            (f64::from(*got) - want).abs() <= 1e-6 * size,
                            "{arch:?} {way:?} {inputs}x{outputs}: token {token} output {n}: expected {want}, got {got}"
                        );
                    }
                }
            }
        }
    }

    /// Goal: no more is lost than rounding to a step can lose. Method: half a step of each factor, added up.
    #[test]
    fn a_product_is_as_near_to_that_of_floats_as_its_steps_are_fine() {
        let (inputs, outputs, tokens) = (384, 40, 50);
        let mut random = Random(77);
        let weights = random.values(inputs * outputs, 0.2);
        let bias = random.values(outputs, 0.2);
        let x = random.values(inputs * tokens, 3.0);
        let w = Packed::new(&weights, &bias, inputs);
        for (arch, way, got) in everywhere(&w, &x, tokens, Then::Nothing) {
            let (mut squares, mut errors) = (0.0f64, 0.0f64);
            for (x, got) in x.chunks_exact(inputs).zip(got.chunks_exact(outputs)) {
                let (low, high) = x.iter().fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
                let step = f64::from(high - low) / 255.0;
                for (n, (row, got)) in weights.chunks_exact(inputs).zip(got).enumerate() {
                    let scale = f64::from(row.iter().fold(0.0f32, |largest, w| largest.max(w.abs()))) / 127.0;
                    let (mut want, mut bound) = (f64::from(bias[n]), 1e-4);
                    for (w, x) in row.iter().zip(x) {
                        let (w, x) = (f64::from(*w), f64::from(*x));
                        want += w * x;
                        bound += w.abs() * step / 2.0 + x.abs() * scale / 2.0 + step * scale / 4.0;
                    }
                    let error = (f64::from(*got) - want).abs();
                    assert!(error <= bound, "{arch:?} {way:?}: expected {want} within {bound}, got {got}");
                    squares += want * want;
                    errors += error * error;
                }
            }
            // Errors are as often up as down: in the mean far less is lost.
            let relative = (errors / squares).sqrt();
            assert!(relative <= 0.008, "{arch:?} {way:?}: relative error {relative}");
        }
    }

    #[test]
    fn the_largest_sums_neither_wrap_nor_saturate() {
        let (inputs, outputs, tokens) = (INPUTS_MAX, 2, 3);
        let mut weights = vec![1.0f32; inputs];
        weights.resize(2 * inputs, -1.0);
        let w = Packed::new(&weights, &[0.0; 2], inputs);
        let mut x = vec![1.0f32; inputs * tokens];
        x.chunks_exact_mut(inputs).for_each(|x| x[0] = 0.0);
        for (arch, way, got) in everywhere(&w, &x, tokens, Then::Nothing) {
            for got in got.chunks_exact(outputs) {
                let want = (inputs - 1) as f32;
                for (got, want) in got.iter().zip([want, -want]) {
                    assert!((got - want).abs() <= 1e-5 * want.abs(), "{arch:?} {way:?}: expected {want}, got {got}");
                }
            }
        }
    }

    #[test]
    fn a_value_that_is_not_finite_stays_so_and_in_its_token() {
        let (inputs, outputs, tokens) = (10, 13, 40);
        let mut random = Random(3);
        let weights = random.values(inputs * outputs, 1.0);
        let w = Packed::new(&weights, &vec![0.5; outputs], inputs);
        let good = random.values(inputs * tokens, 1.0);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (token, k) in [(0, 0), (5, 9), (17, 4), (39, 7)] {
                let mut x = good.clone();
                x[token * inputs + k] = bad;
                let all = everywhere(&w, &good, tokens, Then::Nothing).into_iter();
                for ((arch, way, want), (.., got)) in all.zip(everywhere(&w, &x, tokens, Then::Nothing)) {
                    for (t, (want, got)) in want.chunks_exact(outputs).zip(got.chunks_exact(outputs)).enumerate() {
                        match t == token {
                            true => assert!(got.iter().all(|got| !got.is_finite()), "{arch:?} {way:?} {bad}: {got:?}"),
                            false => assert_eq!(want, got, "{arch:?} {way:?}: token {t} beside {token}"),
                        }
                    }
                }
            }
        }
        let mut weights = weights;
        weights[3 * inputs + 1] = f32::NAN;
        let w = Packed::new(&weights, &vec![0.5; outputs], inputs);
        for (.., got) in everywhere(&w, &good, tokens, Then::Nothing) {
            let finite = |n: usize| got.chunks_exact(outputs).all(|got| got[n].is_finite());
            assert!((0..outputs).all(|n| finite(n) != (n == 3)));
        }
    }

    #[test]
    fn equal_inputs_and_weights_of_zero_are_exact() {
        let (inputs, tokens) = (9, 20);
        let mut weights = vec![0.0f32; inputs];
        weights.resize(2 * inputs, 0.25);
        let w = Packed::new(&weights, &[-3.0, 1.0], inputs);
        for value in [0.0f32, 1.5, -2.0] {
            for (arch, way, got) in everywhere(&w, &vec![value; inputs * tokens], tokens, Then::Relu) {
                for got in got.chunks_exact(2) {
                    let want = (2.25 * value + 1.0).max(0.0);
                    assert!(got[0] == 0.0 && (got[1] - want).abs() <= 1e-6, "{arch:?} {way:?} {value}: {got:?}");
                }
            }
        }
    }

    #[test]
    fn a_token_is_answered_alike_in_every_batch() {
        let (inputs, outputs, tokens) = (50, 30, 67);
        let mut random = Random(11);
        let w = Packed::new(&random.values(inputs * outputs, 0.4), &random.values(outputs, 0.1), inputs);
        let x = random.values(inputs * tokens, 2.0);
        for (arch, way, together) in everywhere(&w, &x, tokens, Then::GeluErf) {
            for (token, (x, want)) in x.chunks_exact(inputs).zip(together.chunks_exact(outputs)).enumerate() {
                let got = arch.dispatch(Run { w: &w, x, tokens: 1, then: Then::GeluErf, way });
                assert_eq!(got, want, "{arch:?} {way:?} token {token}");
            }
        }
    }

    #[test]
    fn weights_take_a_byte_each() {
        let w = Packed::new(&vec![0.5; 64 * 24], &[0.0; 24], 64);
        assert_eq!(w.bytes(), 64 * 24 + 3 * 24 * 4);
        assert_eq!((w.inputs(), w.outputs()), (64, 24));
    }
}
