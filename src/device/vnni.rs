//! AVX-512 with VNNI: the instruction that multiplies bytes four at a time, as safe as pulp's own.
//!
//! pulp 0.22 detects the feature but wraps none of its instructions, so this file has one `unsafe` block, made like pulp's:
//! whoever holds a [`Vnni`] has asked the processor.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86")]
use std::arch::x86::{__m512i, _mm512_dpbusd_epi32};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m512i, _mm512_dpbusd_epi32};

pulp::simd_type!({
    /// All that pulp's V4 asks for, so that its operations are inlined here, and VNNI.
    pub struct Vnni {
        sse: f!("sse"),
        sse2: f!("sse2"),
        fxsr: f!("fxsr"),
        sse3: f!("sse3"),
        ssse3: f!("ssse3"),
        sse4_1: f!("sse4.1"),
        sse4_2: f!("sse4.2"),
        popcnt: f!("popcnt"),
        avx: f!("avx"),
        avx2: f!("avx2"),
        bmi1: f!("bmi1"),
        bmi2: f!("bmi2"),
        fma: f!("fma"),
        lzcnt: f!("lzcnt"),
        avx512f: f!("avx512f"),
        avx512bw: f!("avx512bw"),
        avx512cd: f!("avx512cd"),
        avx512dq: f!("avx512dq"),
        avx512vl: f!("avx512vl"),
        avx512vnni: f!("avx512vnni"),
    }
});

impl Vnni {
    /// In each of 16 lanes, `sum` and the four products of an unsigned byte of `x` with a signed one of `w`; wraps.
    #[inline(always)]
    pub fn dot(self, sum: __m512i, x: __m512i, w: __m512i) -> __m512i {
        // SAFETY: the instruction needs AVX512F and AVX512VNNI. `self` exists only where `try_new` found both: its fields are
        // private, and nothing in this crate calls `new_unchecked`.
        unsafe { _mm512_dpbusd_epi32(sum, x, w) }
    }
}
