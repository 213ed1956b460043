//! y = W·x + b over blocks of tokens, with the weights packed once when they are loaded.
//!
//! Activations lie in blocks: `[blocks][features][width]`, the tokens of a block side by side in two vectors. A tile of the
//! product takes [`PANEL`] outputs × one block; a weight is read once for each and multiplied into two vectors. So the output
//! is laid out as the next product reads its input, and nothing is packed or transposed between two of them.
//!
//! Method: the inner loop of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with the
//! roles turned round: weights are the packed, broadcast operand.
//!
//! Always true
//! - Outputs depend on nothing but their own token's inputs: a block's lanes never meet.
//! - The sum over inputs is taken in one order for every batch, so a token's result does not depend on its batch (but on the
//!   instruction set, in the last bits).

use pulp::{Arch, Simd, WithSimd};

use super::buffer::Floats;
use super::math::{self, VECTORS};

/// Outputs of a tile: 12 × 2 sums fill 24 of AVX-512's 32 registers; half of it, 12 of AVX2's 16.
pub const PANEL: usize = 12;

/// Weights of a product, packed as `[outputs / PANEL][inputs][PANEL]`, the last panel filled up with zeros.
#[derive(Debug)]
pub struct Packed {
    inputs: usize,
    outputs: usize,
    panels: Floats,
    bias: Vec<f32>,
}

impl Packed {
    /// Packs a `[outputs, inputs]` matrix, as checkpoints have them, and a bias of `outputs` values.
    ///
    /// Panics where the sizes do not fit: they were checked when the file was read.
    pub fn new(weights: &[f32], bias: &[f32], inputs: usize) -> Packed {
        let outputs = bias.len();
        assert_eq!(weights.len(), inputs * outputs, "a weight for each input and output");
        let mut panels = Floats::with_len(inputs * outputs.next_multiple_of(PANEL));
        for (panel, rows) in panels.as_mut_slice().chunks_exact_mut(inputs * PANEL).zip(weights.chunks(inputs * PANEL))
        {
            for (m, row) in rows.chunks_exact(inputs).enumerate() {
                for (place, weight) in panel.chunks_exact_mut(PANEL).zip(row) {
                    place[m] = *weight;
                }
            }
        }
        let mut bias = bias.to_vec();
        bias.resize(outputs.next_multiple_of(PANEL), 0.0);
        Packed { inputs, outputs, panels, bias }
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Computes `tokens` tokens on one instruction set: `x` is `[blocks][inputs][width]`, `y` is `[blocks][outputs][width]`, for
    /// blocks as wide as that set has them. Panics where they are too short.
    pub fn run(&self, arch: Arch, x: &[f32], y: &mut [f32], tokens: usize, then: Then) {
        arch.dispatch(Run { packed: self, x, y, tokens, then });
    }

    pub fn bytes(&self) -> usize {
        (self.panels.as_slice().len() + self.bias.len()) * size_of::<f32>()
    }
}

struct Run<'a> {
    packed: &'a Packed,
    x: &'a [f32],
    y: &'a mut [f32],
    tokens: usize,
    then: Then,
}

impl WithSimd for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (x, _) = S::as_simd_f32s(self.x);
        let (y, _) = S::as_mut_simd_f32s(self.y);
        product(simd, self.packed, x, y, self.tokens, self.then);
    }
}

/// What is done to a sum before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Nothing,
    GeluErf,
    GeluTanh,
    Relu,
    Tanh,
}

/// M rows of `a` times the first V vectors of each row of `b`, over `k` rows of both: the sums `Σ a[p][m]·b[p][v]`.
///
/// `a` has a row each `a_row` floats, `b` each `b_row` vectors. Hot: nearly all time of a forward pass is spent here.
#[inline(always)]
pub fn tile<S: Simd, const M: usize, const V: usize>(
    simd: S,
    k: usize,
    (a, a_row): (&[f32], usize),
    (b, b_row): (&[S::f32s], usize),
) -> [[S::f32s; V]; M] {
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    for (a, b) in a.chunks(a_row).zip(b.chunks(b_row)).take(k) {
        let (Some(a), Some(b)) = (a.first_chunk::<M>(), b.first_chunk::<V>()) else { break };
        for m in 0..M {
            let a = simd.splat_f32s(a[m]);
            for v in 0..V {
                sums[m][v] = simd.mul_add_e_f32s(a, b[v], sums[m][v]);
            }
        }
    }
    sums
}

/// [`Packed::run`] inside a dispatched operation: compiled once for each instruction set, wherever it is called.
#[inline(always)]
pub fn linear<S: Simd>(simd: S, packed: &Packed, x: &[f32], y: &mut [f32], tokens: usize, then: Then) {
    simd.vectorize(Run { packed, x, y, tokens, then });
}

/// Blocks beyond the first `tokens` are left alone; lanes beyond them in the last block hold arbitrary values.
#[inline(always)]
fn product<S: Simd>(simd: S, w: &Packed, x: &[S::f32s], y: &mut [S::f32s], tokens: usize, then: Then) {
    let (k, n) = (w.inputs, w.outputs);
    let blocks = tokens.div_ceil(math::width::<S>());
    let one_vector = |block: usize| tokens - block * math::width::<S>() <= S::F32_LANES;
    let panels = w.panels.as_slice().chunks_exact(k * PANEL).zip(w.bias.chunks_exact(PANEL));
    for (p, (panel, bias)) in panels.enumerate() {
        let rows = PANEL.min(n - p * PANEL);
        for block in 0..blocks {
            let x = &x[block * k * VECTORS..][..k * VECTORS];
            let y = &mut y[(block * n + p * PANEL) * VECTORS..][..rows * VECTORS];
            match (S::REGISTER_COUNT >= 32, one_vector(block)) {
                (true, false) => outputs::<S, 12, 2>(simd, k, panel, bias, x, y, then),
                (true, true) => outputs::<S, 12, 1>(simd, k, panel, bias, x, y, then),
                (false, false) => outputs::<S, 6, 2>(simd, k, panel, bias, x, y, then),
                (false, true) => outputs::<S, 12, 1>(simd, k, panel, bias, x, y, then),
            }
        }
    }
}

#[inline(always)]
fn outputs<S: Simd, const M: usize, const V: usize>(
    simd: S,
    k: usize,
    panel: &[f32],
    bias: &[f32],
    x: &[S::f32s],
    y: &mut [S::f32s],
    then: Then,
) {
    for (part, (bias, y)) in bias.chunks_exact(M).zip(y.chunks_mut(M * VECTORS)).enumerate() {
        let sums = tile::<S, M, V>(simd, k, (&panel[part * M..], PANEL), (x, VECTORS));
        let (y, _) = y.as_chunks_mut::<VECTORS>();
        let rows = y.len();
        let mut last = [[simd.splat_f32s(0.0); VECTORS]; M];
        // Sums are only indexed by constants, or they would not stay in registers.
        let place = match y.first_chunk_mut::<M>() {
            Some(place) => place,
            None => &mut last,
        };
        for m in 0..M {
            let bias = simd.splat_f32s(bias[m]);
            for v in 0..V {
                place[m][v] = simd.add_f32s(sums[m][v], bias);
            }
        }
        apply::<S, V>(simd, place, then);
        if rows < M {
            y.copy_from_slice(&last[..rows]);
        }
    }
}

/// On what was stored a moment ago, still in the nearest cache; inside the tile it would need its registers.
#[inline(always)]
pub fn apply<S: Simd, const V: usize>(simd: S, y: &mut [[S::f32s; VECTORS]], then: Then) {
    // No closures here or anywhere between the dispatch and an instruction: one that the compiler does not inline would be
    // compiled without the instruction set.
    if then == Then::Nothing {
        return;
    }
    for pair in y {
        for value in &mut pair[..V] {
            *value = match then {
                Then::Nothing => *value,
                Then::GeluErf => math::gelu_erf(simd, *value),
                Then::GeluTanh => math::gelu_tanh(simd, *value),
                Then::Relu => math::relu(simd, *value),
                Then::Tanh => math::tanh(simd, *value),
            };
        }
    }
}
