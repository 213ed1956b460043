// What the kernels share: types, the table of rows, loads and stores, sums over a warp, one row's layer norm, activations.
//
// Always true
// - Counts come from the table and never from the grid: a launch with a larger grid than its batch needs does the same.
// - Sums and statistics are f32, whatever the activations are kept in.
// - A warp stays whole around every shuffle: the loops around one depend on values that all its lanes share.
//
// nvcc compiles these files for a device. g++ compiles the same text through emulation/cuda.h, so that tests run without one.
#pragma once

#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
// Dynamic shared memory of the block. One name for all: an extern array has one type.
#define FERRY_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "emulation/cuda.h"
#define FERRY_SHARED(name) unsigned char* name = emulation::shared()
#endif

// An exported kernel for each type that activations are kept in.
#define FERRY_FLOATS(instance) instance(f32, float) instance(f16, __half) instance(bf16, __nv_bfloat16)

// An exported kernel for each size of an element.
#define FERRY_ELEMENTS(instance)                                                                                       \
    instance(u8, unsigned char) instance(u16, unsigned short) instance(u32, unsigned) instance(u64, unsigned long long)

namespace ferry {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The table that says how rows lie end to end: [rows, tokens, longest, 0], the starts, the end of the last row.
struct Table {
    const int* at;

    __device__ int rows() const { return at[0]; }
    __device__ int tokens() const { return at[1]; }
    __device__ int start(int row) const { return at[4 + row]; }
    __device__ int len(int row) const { return start(row + 1) - start(row); }

    // The row that a token belongs to: the last one that starts at it or before. Rows without tokens start where the next
    // one does, so the last is the right one.
    __device__ int row_of(int token) const {
        int low = 0, high = rows();
        while (high - low > 1) {
            const int middle = low + (high - low) / 2;
            if (start(middle) <= token) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// To the nearest, ties to even.
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// As many bytes as V values of T take, up to 16 at once. V is 8 or 4, with p on V * sizeof(T) or 16 bytes, or 1.
template <int V, class T> struct Words {
    static_assert(V == 8 || V == 4, "whole words");
    using Word = typename std::conditional<V * sizeof(T) == 8, uint2, uint4>::type;
    static constexpr int COUNT = V * sizeof(T) / sizeof(Word);
};

// V values from p on, as f32.
template <int V, class T> __device__ inline void load(const T* p, float (&out)[V]) {
    if constexpr (V == 1) {
        out[0] = to_float(*p);
    } else {
        using Word = typename Words<V, T>::Word;
        alignas(16) T values[V];
#pragma unroll
        for (int w = 0; w < Words<V, T>::COUNT; ++w) {
            reinterpret_cast<Word*>(values)[w] = reinterpret_cast<const Word*>(p)[w];
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
            out[v] = to_float(values[v]);
        }
    }
}

// The way back, rounding.
template <int V, class T> __device__ inline void store(T* p, const float (&in)[V]) {
    if constexpr (V == 1) {
        *p = from_float<T>(in[0]);
    } else {
        using Word = typename Words<V, T>::Word;
        alignas(16) T values[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            values[v] = from_float<T>(in[v]);
        }
#pragma unroll
        for (int w = 0; w < Words<V, T>::COUNT; ++w) {
            reinterpret_cast<Word*>(p)[w] = reinterpret_cast<const Word*>(values)[w];
        }
    }
}

// Adds V values from p on.
template <int V, class T> __device__ inline void add(const T* p, float (&to)[V]) {
    float more[V];
    load<V>(p, more);
#pragma unroll
    for (int v = 0; v < V; ++v) {
        to[v] += more[v];
    }
}

// Copies as many of `count` elements as go 16 bytes at a time, every `step`-th word from `first` on, and returns how many
// elements those are for all threads together: none when either end is not on 16 bytes. The rest is the caller's.
template <class E> __device__ inline int copy(const E* from, E* to, int count, int first, int step) {
    constexpr int EACH = 16 / sizeof(E);
    if (((reinterpret_cast<size_t>(from) | reinterpret_cast<size_t>(to)) & 15) != 0) {
        return 0;
    }
    const int words = count / EACH;
    for (int i = first; i < words; i += step) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
    return words * EACH;
}

// The sum over a warp, in every lane.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, step);
    }
    return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    }
    return x;
}

// Values that a lane keeps in registers: rows of up to 32 * HELD are read once, longer ones once per pass.
constexpr int HELD = 32;

// Layer norm of one row by one warp. `read(i, values)` gives V values from place i on, `write(i, values)` takes the results;
// each place is written by the lane that reads it, so the two may be the same memory.
template <int V, class Read, class Write>
__device__ inline void norm_by_warp(
    int hidden, float eps, const float* weight, const float* shift, Read read, Write write) {
    const int lane = threadIdx.x % WARP;
    const float share = 1.0f / hidden;
    const auto scaled = [&](int i, const float(&values)[V], float mean, float factor) {
        float w[V], s[V], out[V];
        load<V>(weight + i, w);
        load<V>(shift + i, s);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            out[v] = (values[v] - mean) * factor * w[v] + s[v];
        }
        write(i, out);
    };

    if (hidden <= WARP * HELD) {
        constexpr int STEPS = HELD / V;
        float held[STEPS][V];
        float sum = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int i = (step * WARP + lane) * V;
            if (i < hidden) {
                read(i, held[step]);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    sum += held[step][v];
                }
            }
        }
        const float mean = warp_sum(sum) * share;
        float squares = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if ((step * WARP + lane) * V < hidden) {
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    squares += (held[step][v] - mean) * (held[step][v] - mean);
                }
            }
        }
        const float factor = rsqrtf(warp_sum(squares) * share + eps);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int i = (step * WARP + lane) * V;
            if (i < hidden) {
                scaled(i, held[step], mean, factor);
            }
        }
    } else {
        float values[V];
        float sum = 0.0f;
        for (int i = lane * V; i < hidden; i += WARP * V) {
            read(i, values);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                sum += values[v];
            }
        }
        const float mean = warp_sum(sum) * share;
        float squares = 0.0f;
        for (int i = lane * V; i < hidden; i += WARP * V) {
            read(i, values);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                squares += (values[v] - mean) * (values[v] - mean);
            }
        }
        const float factor = rsqrtf(warp_sum(squares) * share + eps);
        for (int i = lane * V; i < hidden; i += WARP * V) {
            read(i, values);
            scaled(i, values, mean, factor);
        }
    }
}

// As they are numbered in arguments. reference.rs has the same list.
enum Activation { NONE = 0, GELU_ERF = 1, GELU_TANH = 2, RELU = 3, TANH = 4 };

__device__ inline float activate(float x, int activation) {
    switch (activation) {
        case GELU_ERF: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case RELU: return fmaxf(x, 0.0f);
        case TANH: return tanhf(x);
        default: return x;
    }
}

}  // namespace ferry
