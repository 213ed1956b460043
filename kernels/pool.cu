// One vector per row: the mean of its tokens, its first token, or the largest value of each column; to L2 length 1 if asked.
//
// Shapes: x [tokens][hidden] of T; out [rows][hidden] of f32. mode: 0 mean, 1 first token, 2 max. hidden is a multiple of 4. A
// row of no tokens gives zeros.
// Reference: reference::pool, within 1e-5 of it for every T: results are f32, and inputs are the same on both sides.
// Bound by bytes: x is read once. With few rows by latency: a block per row leaves most of a device idle, so the threads of
// a block share a row's tokens out too.
// A thread takes V columns of every n-th token, n being how often the columns fit the block; partials meet in shared memory,
// which has V floats for each thread.
#include "ferry.cuh"

namespace ferry {

enum Pool { MEAN = 0, FIRST = 1, MAX = 2 };

template <int V, class T>
__device__ void pool(const Table table, const T* x, float* out, int hidden, int mode, int normalize, float* partials) {
    const int thread = threadIdx.x, threads = blockDim.x;
    const int groups = hidden / V;
    const int rows = table.rows();
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const int start = table.start(row);
        const int len = mode == FIRST ? min(table.len(row), 1) : table.len(row);
        const float share = mode == MEAN ? 1.0f / max(len, 1) : 1.0f;
        float* const to = out + static_cast<size_t>(row) * hidden;
        float squares = 0.0f;
        // More than one turn only where columns go by fours.
        for (int first = 0; first < groups; first += threads) {
            const int across = min(groups - first, threads);
            const int slices = threads / across;
            const int group = first + thread % across, slice = thread / across;
            float values[V], next[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                values[v] = mode == MAX && len > 0 ? -INFINITY : 0.0f;
            }
            if (slice < slices) {
#pragma unroll 4
                for (int token = slice; token < len; token += slices) {
                    load<V>(x + static_cast<size_t>(start + token) * hidden + group * V, next);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        values[v] = mode == MAX ? fmaxf(values[v], next[v]) : values[v] + next[v];
                    }
                }
            }
            store<V>(partials + thread * V, values);
            __syncthreads();
            if (slice == 0) {
                for (int other = 1; other < slices; ++other) {
                    load<V>(partials + (other * across + thread) * V, next);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        values[v] = mode == MAX ? fmaxf(values[v], next[v]) : values[v] + next[v];
                    }
                }
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    values[v] *= share;
                    squares += values[v] * values[v];
                }
                store<V>(to + group * V, values);
            }
            // Partials are read before they are written again.
            __syncthreads();
        }
        if (normalize) {
            squares = warp_sum(squares);
            if (thread % WARP == 0) {
                partials[thread / WARP] = squares;
            }
            __syncthreads();
            // Up to 32 warps, and every warp sums them all: no second barrier to share the sum.
            const int lane = thread % WARP;
            const float total = warp_sum(lane < threads / WARP ? partials[lane] : 0.0f);
            const float factor = 1.0f / fmaxf(sqrtf(total), 1e-12f);
            for (int first = 0; first < groups; first += threads) {
                if (thread < groups - first) {
                    // Written above by this thread.
                    float values[V];
                    load<V>(to + (first + thread) * V, values);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        values[v] *= factor;
                    }
                    store<V>(to + (first + thread) * V, values);
                }
            }
            __syncthreads();
        }
    }
}

}  // namespace ferry

#define POOL(name, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) pool_##name(                                                     \
        const int* __restrict__ table, const T* __restrict__ x, float* __restrict__ out, int hidden, int mode,         \
        int normalize) {                                                                                               \
        FERRY_SHARED(shared);                                                                                          \
        float* const partials = reinterpret_cast<float*>(shared);                                                      \
        if (hidden % 8 == 0) {                                                                                         \
            ferry::pool<8>(ferry::Table{table}, x, out, hidden, mode, normalize, partials);                            \
        } else {                                                                                                       \
            ferry::pool<4>(ferry::Table{table}, x, out, hidden, mode, normalize, partials);                            \
        }                                                                                                              \
    }
FERRY_FLOATS(POOL)
