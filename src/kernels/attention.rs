//! Scaled dot-product attention over sequences that lie end to end, one sequence and head at a time.
//!
//! A sequence may begin anywhere in a block, so its head is gathered first: queries and keys as `[head size][tokens]`, values
//! as `[tokens][head size]`. Then, for two vectors of queries at a time: scores as `[keys][queries]`, softmax down the
//! columns, and the weighted sum of values. Every vector holds queries side by side, so no sum runs across a vector.
//!
//! Always true
//! - Real tokens attend to real tokens of their own sequence only. Padding gets no share; a query of padding gets an answer
//!   that nobody reads.
//! - A sequence without real tokens has a context of zeros.

use pulp::{Simd, WithSimd};

use super::linear::{PANEL, tile};
use super::math::{self, VECTORS};

/// What one head of one sequence needs.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Features of a head.
    pub size: usize,
    pub heads: usize,
    /// Longest sequence.
    pub longest: usize,
}

impl Shape {
    /// Floats of scratch for vectors of up to 16 lanes.
    pub fn scratch(&self) -> usize {
        let (queries, keys) = (self.longest.next_multiple_of(32), self.longest.next_multiple_of(PANEL));
        // Queries, keys, values, the scores of two vectors of queries, and their context.
        self.size * queries + self.size * keys + keys * self.size.next_multiple_of(4) + keys * 32 + self.size * 32
    }
}

/// A sequence's place in the batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    pub start: usize,
    /// Tokens, padding included.
    pub span: usize,
    /// Tokens that are real, the first of them.
    pub real: usize,
}

/// Computes the context of one sequence, all heads.
pub struct Attend<'a> {
    pub shape: Shape,
    pub sequence: Sequence,
    /// `[blocks][3 · heads · size][width]`, the queries scaled already.
    pub qkv: &'a [f32],
    /// `[blocks][heads · size][width]`
    pub context: &'a mut [f32],
    /// [`Shape::scratch`] floats, of any content.
    pub scratch: &'a mut [f32],
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        attend(simd, self);
    }
}

#[inline(always)]
fn attend<S: Simd>(simd: S, Attend { shape, sequence, qkv, context, scratch }: Attend<'_>) {
    let width = math::width::<S>();
    let Shape { size, heads, .. } = shape;
    let Sequence { start, span, real } = sequence;
    let hidden = heads * size;
    if real == 0 {
        for Run { block, column, len, .. } in runs(width, start, span) {
            for row in context[block * hidden * width..].chunks_exact_mut(width).take(hidden) {
                row[column..column + len].fill(0.0);
            }
        }
        return;
    }
    let queries = span.next_multiple_of(S::F32_LANES);
    let keys = real.next_multiple_of(PANEL);
    let (q, rest) = scratch.split_at_mut(size * queries);
    let (k, rest) = rest.split_at_mut(size * keys);
    let (v, rest) = rest.split_at_mut(keys * size);
    let (scores, rest) = rest.split_at_mut(keys * width);
    let out = &mut rest[..size * width];
    for head in 0..heads {
        let feature = head * size;
        gather::<S>(qkv, 3 * hidden, feature, start, span, q, queries);
        gather::<S>(qkv, 3 * hidden, hidden + feature, start, real, k, keys);
        gather_transposed::<S>(qkv, 3 * hidden, 2 * hidden + feature, start, real, v, size);
        let mut first = 0;
        while first < span {
            let vectors = if queries - first > S::F32_LANES { 2 } else { 1 };
            let (q, _) = S::as_simd_f32s(q);
            let (scores, _) = S::as_mut_simd_f32s(scores);
            let (out, _) = S::as_mut_simd_f32s(out);
            let q = (&q[first / S::F32_LANES..], queries / S::F32_LANES);
            match vectors {
                2 => head_of::<S, 2>(simd, (size, keys, real), q, k, v, scores, out),
                _ => head_of::<S, 1>(simd, (size, keys, real), q, k, v, scores, out),
            }
            let tokens = (vectors * S::F32_LANES).min(span - first);
            scatter::<S>(bytemuck::cast_slice(out), context, hidden, feature, start + first, tokens, size);
            first += vectors * S::F32_LANES;
        }
    }
}

/// V vectors of queries against all keys of one head.
#[inline(always)]
fn head_of<S: Simd, const V: usize>(
    simd: S,
    (size, keys, real): (usize, usize, usize),
    q: (&[S::f32s], usize),
    k: &[f32],
    v: &[f32],
    scores: &mut [S::f32s],
    out: &mut [S::f32s],
) {
    let (scores, _) = scores.as_chunks_mut::<VECTORS>();
    let (out, _) = out.as_chunks_mut::<VECTORS>();
    for (at, place) in scores[..keys].as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
        if S::REGISTER_COUNT >= 32 || V == 1 {
            store::<S, PANEL, V>(tile::<S, PANEL, V>(simd, size, (&k[at * PANEL..], keys), q), place);
        } else {
            let (low, high) = place.split_at_mut(6);
            store::<S, 6, V>(tile::<S, 6, V>(simd, size, (&k[at * PANEL..], keys), q), low);
            store::<S, 6, V>(tile::<S, 6, V>(simd, size, (&k[at * PANEL + 6..], keys), q), high);
        }
    }
    let scores = &mut scores[..real];
    let scale = softmax::<S, V>(simd, scores);
    let mut d = 0;
    while d < size {
        let scores = scores.as_flattened();
        let values = (&v[d..], size);
        // 32 = 12 + 12 + 8, 64 = 5 · 12 + 4; the smallest tiles are for sizes that no published model has.
        d += match size - d {
            12.. if S::REGISTER_COUNT >= 32 || V == 1 => {
                scaled::<S, 12, V>(simd, tile::<S, 12, V>(simd, real, values, (scores, VECTORS)), scale, &mut out[d..])
            }
            8.. if S::REGISTER_COUNT >= 32 || V == 1 => {
                scaled::<S, 8, V>(simd, tile::<S, 8, V>(simd, real, values, (scores, VECTORS)), scale, &mut out[d..])
            }
            6.. => {
                scaled::<S, 6, V>(simd, tile::<S, 6, V>(simd, real, values, (scores, VECTORS)), scale, &mut out[d..])
            }
            4.. => {
                scaled::<S, 4, V>(simd, tile::<S, 4, V>(simd, real, values, (scores, VECTORS)), scale, &mut out[d..])
            }
            2.. => {
                scaled::<S, 2, V>(simd, tile::<S, 2, V>(simd, real, values, (scores, VECTORS)), scale, &mut out[d..])
            }
            _ => scaled::<S, 1, V>(simd, tile::<S, 1, V>(simd, real, values, (scores, VECTORS)), scale, &mut out[d..]),
        };
    }
}

#[inline(always)]
fn store<S: Simd, const M: usize, const V: usize>(sums: [[S::f32s; V]; M], place: &mut [[S::f32s; VECTORS]]) {
    let place = place.first_chunk_mut::<M>().expect("room for a tile");
    for m in 0..M {
        for v in 0..V {
            place[m][v] = sums[m][v];
        }
    }
}

#[inline(always)]
fn scaled<S: Simd, const M: usize, const V: usize>(
    simd: S,
    mut sums: [[S::f32s; V]; M],
    scale: [S::f32s; V],
    place: &mut [[S::f32s; VECTORS]],
) -> usize {
    for sums in &mut sums {
        for v in 0..V {
            sums[v] = simd.mul_f32s(sums[v], scale[v]);
        }
    }
    store::<S, M, V>(sums, place);
    M
}

/// Puts e^(score − largest) in place of each score, column by column; what the columns have to be multiplied with.
#[inline(always)]
fn softmax<S: Simd, const V: usize>(simd: S, scores: &mut [[S::f32s; VECTORS]]) -> [S::f32s; V] {
    let mut largest = [simd.splat_f32s(f32::MIN); V];
    for row in scores.iter() {
        for v in 0..V {
            largest[v] = simd.max_f32s(largest[v], row[v]);
        }
    }
    let mut sum = [simd.splat_f32s(0.0); V];
    for row in scores.iter_mut() {
        for v in 0..V {
            row[v] = math::exp(simd, simd.sub_f32s(row[v], largest[v]));
            sum[v] = simd.add_f32s(sum[v], row[v]);
        }
    }
    let one = simd.splat_f32s(1.0);
    let mut scale = sum;
    for v in 0..V {
        scale[v] = simd.div_f32s(one, sum[v]);
    }
    scale
}

/// A stretch of tokens that lie in one block: how many come before it, its block, its first column, its length.
struct Run {
    at: usize,
    block: usize,
    column: usize,
    len: usize,
}

/// The stretches that `tokens` tokens from `start` on are made of.
#[inline(always)]
fn runs(width: usize, start: usize, tokens: usize) -> impl Iterator<Item = Run> {
    let first = (width - start % width).min(tokens);
    let rest = (first..tokens).step_by(width).map(move |at| (at, width.min(tokens - at)));
    let all = std::iter::once((0, first)).chain(rest);
    all.map(move |(at, len)| Run { at, block: (start + at) / width, column: (start + at) % width, len })
}

/// `out[d][token]` for the `out.len() / row` features from `feature` on; places beyond the tokens are zero.
#[inline(always)]
fn gather<S: Simd>(
    x: &[f32],
    features: usize,
    feature: usize,
    start: usize,
    tokens: usize,
    out: &mut [f32],
    row: usize,
) {
    let width = math::width::<S>();
    for Run { at, block, column, len } in runs(width, start, tokens) {
        let source = x[(block * features + feature) * width..].chunks_exact(width);
        for (place, source) in out.chunks_exact_mut(row).zip(source) {
            place[at..at + len].copy_from_slice(&source[column..column + len]);
        }
    }
    for place in out.chunks_exact_mut(row) {
        place[tokens..].fill(0.0);
    }
}

/// `out[token][d]` for `size` features from `feature` on.
#[inline(always)]
fn gather_transposed<S: Simd>(
    x: &[f32],
    features: usize,
    feature: usize,
    start: usize,
    tokens: usize,
    out: &mut [f32],
    size: usize,
) {
    let width = math::width::<S>();
    for Run { at, block, column, len } in runs(width, start, tokens) {
        let source = &x[(block * features + feature) * width..][..size * width];
        for (t, place) in out.chunks_exact_mut(size).skip(at).take(len).enumerate() {
            for (d, value) in place.iter_mut().enumerate() {
                *value = source[d * width + column + t];
            }
        }
    }
}

/// The reverse of `gather`, from rows of `width`.
#[inline(always)]
fn scatter<S: Simd>(
    from: &[f32],
    x: &mut [f32],
    features: usize,
    feature: usize,
    start: usize,
    tokens: usize,
    size: usize,
) {
    let width = math::width::<S>();
    for Run { at, block, column, len } in runs(width, start, tokens) {
        let places = x[(block * features + feature) * width..].chunks_exact_mut(width);
        for (place, from) in places.zip(from.chunks_exact(width)).take(size) {
            place[column..column + len].copy_from_slice(&from[at..at + len]);
        }
    }
}
