//! An encoder's arithmetic on a CPU: everything between token ids and embeddings, over tokens that lie end to end.
//!
//! Activations are blocks of `[features][width]`, with the tokens of a block side by side in two vectors (linear.rs). All
//! operations keep to that layout, so products read what products wrote, and sums over features run down, never across.
//!
//! Always true
//! - The instruction set is chosen at run time (AVX-512, AVX2 with FMA, NEON, or none), and the same source is compiled for
//!   each: what is right on one is right on all but for the last bits.
//! - No allocation and no first touch of a page in a batch no larger than what was reserved.
//! - There is no unsafe code here: pulp is where vectors are loaded, and the one instruction that it lacks is in the room device.
//!
//! Elsewhere: where parameters come from (models/bert), which rows share a batch (scheduler).

pub mod attention;
pub mod buffer;
pub mod encoder;
pub mod int8;
pub mod linear;
pub mod math;
pub mod product;
pub mod rows;

use pulp::{Arch, Simd, WithSimd};

/// The best instruction set of this processor. Cheap: it is looked up once.
pub fn arch() -> Arch {
    Arch::new()
}

/// Every instruction set that this processor has, the best first: for tests and comparisons.
pub fn archs() -> Vec<Arch> {
    let mut archs = vec![Arch::new()];
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let (Arch::V4(_), Some(v3)) = (Arch::new(), pulp::x86::V3::try_new()) {
        archs.push(Arch::V3(v3));
    }
    if !matches!(archs[0], Arch::Scalar) {
        archs.push(Arch::Scalar);
    }
    archs
}

/// Places that are computed for so many tokens: they come in whole vectors.
pub fn places(arch: Arch, tokens: usize) -> usize {
    struct Lanes;

    impl WithSimd for Lanes {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    tokens.next_multiple_of(arch.dispatch(Lanes))
}

#[cfg(test)]
mod tests;
