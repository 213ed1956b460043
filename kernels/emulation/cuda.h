// Stands in for the CUDA headers, so that g++ compiles the kernels' own source for a CPU.
//
// Threads of a block are fibers that run one at a time until they wait; blocks run one after the other. Barriers and
// shuffles are collective as on a device: one that not every thread reaches ends the program with a sentence. Who runs on
// after one is drawn from the launch's seed, so that a missing barrier shows as a wrong result under some of them. Not seen: a
// barrier that only separates a warp's operations on fragments from each other, or one next to a shuffle, which waits too.
//
// Fragments of wmma: lane 0 holds the whole tile and the other lanes hold nothing, so a kernel that relies on how a device
// spreads a fragment over lanes fails here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
};
// Set before a fiber runs on.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulation {

// Dynamic shared memory of the block: its own allocation of exactly the launch's size, filled with NaNs before each block.
unsigned char* shared();
// Waits for all threads of the block.
void block_barrier();
// Waits for all lanes of the warp.
void warp_barrier();
// Puts the lane's value where the others see it, waits for the warp, and gives the value of lane `from`. A lane beyond the
// warp gives the own value back, as the device does.
uint32_t exchange(uint32_t value, int from);
// Counts calls that the lanes of a warp must make together; compared when the block ends.
void count_collective();
int lane();
[[noreturn]] void fail(const char* what);

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    if (mask != 0xffffffffu) emulation::fail("__syncwarp of a part of a warp is not emulated");
    emulation::warp_barrier();
}

inline float __shfl_xor_sync(unsigned mask, float x, int step) {
    if (mask != 0xffffffffu) emulation::fail("a shuffle of a part of a warp is not emulated");
    return emulation::float_of(emulation::exchange(emulation::bits_of(x), emulation::lane() ^ step));
}

inline float __shfl_down_sync(unsigned mask, float x, int step) {
    if (mask != 0xffffffffu) emulation::fail("a shuffle of a part of a warp is not emulated");
    return emulation::float_of(emulation::exchange(emulation::bits_of(x), emulation::lane() + step));
}

// True in every lane when it is so in one.
inline int __any_sync(unsigned mask, int truth) {
    if (mask != 0xffffffffu) emulation::fail("a vote of a part of a warp is not emulated");
    uint32_t any = truth != 0;
    for (int step = 16; step > 0; step /= 2) {
        any |= emulation::exchange(any, emulation::lane() ^ step);
    }
    return any;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return emulation::float_of(static_cast<uint32_t>(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = emulation::bits_of(x);
    if (std::isnan(x)) return {0x7fff};
    // Ties to even: half of the last place, less one where the last place is even already.
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
    if (exponent == 31) return emulation::float_of(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) {
        const float tiny = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -tiny : tiny;
    }
    return emulation::float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
    const uint32_t bits = emulation::bits_of(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t size = bits & 0x7fffffff;
    if (size > 0x7f800000) return {0x7fff};
    if (size >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65,520 and more round to infinity
    if (size < 0x38800000) {
        // Below the least normal number: in units of 2^-24, and nearbyint rounds ties to even.
        const float units = std::nearbyint(emulation::float_of(size) * 16777216.0f);
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(units))};
    }
    const uint32_t rounded = size + 0xfff + ((size >> 13) & 1);
    return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}

namespace emulation {
inline float value(__half x) { return __half2float(x); }
inline float value(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float value(float x) { return x; }
}  // namespace emulation

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

// A tile of 16 x 16, in lane 0.
template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "only 16 x 16 x 16 is emulated");
    float tile[16][16];

    fragment() {
        if (emulation::lane() != 0) return;
        for (auto& row : tile)
            for (float& x : row) x = NAN;
    }
};

namespace detail {
// A device wants pointers on 32 bytes and strides of 16 bytes.
template <class T> inline void check(const T* p, unsigned stride) {
    if (reinterpret_cast<uintptr_t>(p) % 32) emulation::fail("a fragment's pointer is not on 32 bytes");
    if (stride * sizeof(T) % 16) emulation::fail("a fragment's stride is not of 16 bytes");
    emulation::count_collective();
}
}  // namespace detail

template <class Use, class T, class Layout>
inline void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* p, unsigned stride) {
    detail::check(p, stride);
    if (emulation::lane() != 0) return;
    constexpr bool by_columns = __is_same(Layout, col_major);
    for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c) to.tile[r][c] = emulation::value(by_columns ? p[c * stride + r] : p[r * stride + c]);
}

inline void load_matrix_sync(
    fragment<accumulator, 16, 16, 16, float>& to, const float* p, unsigned stride, layout_t layout) {
    detail::check(p, stride);
    if (layout != mem_row_major) emulation::fail("only row-major accumulators are emulated");
    if (emulation::lane() != 0) return;
    for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c) to.tile[r][c] = p[r * stride + c];
}

inline void store_matrix_sync(
    float* p, const fragment<accumulator, 16, 16, 16, float>& from, unsigned stride, layout_t layout) {
    detail::check(p, stride);
    if (layout != mem_row_major) emulation::fail("only row-major accumulators are emulated");
    if (emulation::lane() != 0) return;
    for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c) p[r * stride + c] = from.tile[r][c];
}

template <class F> inline void fill_fragment(F& to, float x) {
    emulation::count_collective();
    if (emulation::lane() != 0) return;
    for (auto& row : to.tile)
        for (float& place : row) place = x;
}

// Its loops are within fixed bounds: no checks, they would be most of the run time.
template <class T, class LayoutA, class LayoutB>
__attribute__((no_sanitize("address", "undefined"))) inline void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
    const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a, const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
    const fragment<accumulator, 16, 16, 16, float>& c) {
    emulation::count_collective();
    if (emulation::lane() != 0) return;
    for (int r = 0; r < 16; ++r) {
        float sums[16];
        for (int n = 0; n < 16; ++n) sums[n] = c.tile[r][n];
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n) sums[n] += a.tile[r][k] * b.tile[k][n];
        for (int n = 0; n < 16; ++n) d.tile[r][n] = sums[n];
    }
}

}  // namespace nvcuda::wmma
