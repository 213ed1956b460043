//! A product of a layer, in the precision that the manifest asks for.

use pulp::{Simd, WithSimd};

use super::int8;
use super::linear::{self, Then};

/// Packed weights.
#[derive(Debug)]
pub enum Product {
    F32(linear::Packed),
    Int8(int8::Packed),
}

impl Product {
    pub fn outputs(&self) -> usize {
        match self {
            Product::F32(packed) => packed.outputs(),
            Product::Int8(packed) => packed.outputs(),
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Product::F32(packed) => packed.bytes(),
            Product::Int8(packed) => packed.bytes(),
        }
    }
}

/// What products need besides input and output: nothing in f32.
#[derive(Debug, Default)]
pub struct Scratch {
    int8: int8::Scratch,
}

impl Scratch {
    /// Makes room for up to `tokens` places of this product.
    pub fn reserve(&mut self, product: &Product, tokens: usize) {
        match product {
            Product::F32(_) => {}
            Product::Int8(packed) => self.int8.reserve(tokens, packed.inputs()),
        }
    }
}

/// Computes `tokens` tokens: `x` is `[blocks][inputs][width]`, `y` is `[blocks][outputs][width]`.
#[inline(always)]
pub fn product<S: Simd>(
    simd: S,
    product: &Product,
    scratch: &mut Scratch,
    x: &[f32],
    y: &mut [f32],
    tokens: usize,
    then: Then,
) {
    match product {
        Product::F32(packed) => linear::linear(simd, packed, x, y, tokens, then),
        Product::Int8(packed) => simd.vectorize(Int8 { packed, scratch: &mut scratch.int8, x, y, tokens, then }),
    }
}

struct Int8<'a> {
    packed: &'a int8::Packed,
    scratch: &'a mut int8::Scratch,
    x: &'a [f32],
    y: &'a mut [f32],
    tokens: usize,
    then: Then,
}

impl WithSimd for Int8<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (x, _) = S::as_simd_f32s(self.x);
        let (y, _) = S::as_mut_simd_f32s(self.y);
        int8::linear(simd, self.packed, self.scratch, x, y, self.tokens, self.then);
    }
}
