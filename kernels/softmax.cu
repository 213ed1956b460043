// Shares of attention scores, in place: softmax(scores * scale) over the real columns of a query, 0 elsewhere.
//
// Shapes: scores [rows][heads][padded_len][padded_len] of T, queries by keys. Columns beyond a row's length get 0, and so does
// every column of a query beyond it: nothing is NaN, whatever padding held.
// Reference: reference::masked_softmax, within 1e-6 of it in f32; one rounding to T more otherwise (2^-10, 2^-7).
// Bound by bytes: 2 * sizeof(T) per score, against an exponential each.
// A warp takes a query and keeps it in registers up to 1,024 columns.
#include "ferry.cuh"

namespace ferry {

template <int V, class T> __device__ void softmax(T* scores, int len, int padded_len, float scale) {
    const int lane = threadIdx.x % WARP;
    // Columns from the row's length on are padding: -inf has no share, and a query has one real column at least.
    const auto read = [&](int i, float(&values)[V]) {
        if (i < len) {
            load<V>(scores + i, values);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
            values[v] = i + v < len ? values[v] * scale : -INFINITY;
        }
    };
    if (padded_len <= WARP * HELD) {
        constexpr int STEPS = HELD / V;
        float held[STEPS][V];
        float most = -INFINITY;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int i = (step * WARP + lane) * V;
            read(i, held[step]);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                most = fmaxf(most, held[step][v]);
            }
        }
        most = warp_max(most);
        float sum = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                held[step][v] = __expf(held[step][v] - most);
                sum += held[step][v];
            }
        }
        const float share = 1.0f / warp_sum(sum);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int i = (step * WARP + lane) * V;
            if (i < padded_len) {
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    held[step][v] *= share;
                }
                store<V>(scores + i, held[step]);
            }
        }
    } else {
        float values[V];
        float most = -INFINITY;
        for (int i = lane * V; i < len; i += WARP * V) {
            read(i, values);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                most = fmaxf(most, values[v]);
            }
        }
        most = warp_max(most);
        float sum = 0.0f;
        for (int i = lane * V; i < len; i += WARP * V) {
            read(i, values);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                sum += __expf(values[v] - most);
            }
        }
        const float share = 1.0f / warp_sum(sum);
        for (int i = lane * V; i < padded_len; i += WARP * V) {
            read(i, values);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                values[v] = __expf(values[v] - most) * share;
            }
            store<V>(scores + i, values);
        }
    }
}

template <int V, class T>
__device__ void masked_softmax(const Table table, T* scores, int heads, int padded_len, float scale) {
    const int warps = blockDim.x / WARP;
    const int lines_of_row = heads * padded_len;
    const int lines = table.rows() * lines_of_row;
    for (int line = blockIdx.x * warps + threadIdx.x / WARP; line < lines; line += gridDim.x * warps) {
        const int len = min(table.len(line / lines_of_row), padded_len);
        T* const at = scores + static_cast<size_t>(line) * padded_len;
        if (line % padded_len < len) {
            softmax<V>(at, len, padded_len, scale);
        } else {
            const float zeros[V] = {};
            for (int i = threadIdx.x % WARP * V; i < padded_len; i += WARP * V) {
                store<V>(at + i, zeros);
            }
        }
    }
}

}  // namespace ferry

#define MASKED_SOFTMAX(name, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128, 5) masked_softmax_##name(                                        \
        const int* __restrict__ table, T* __restrict__ scores, int heads, int padded_len, float scale) {               \
        if (padded_len % 8 == 0) {                                                                                     \
            ferry::masked_softmax<8>(ferry::Table{table}, scores, heads, padded_len, scale);                           \
        } else {                                                                                                       \
            ferry::masked_softmax<1>(ferry::Table{table}, scores, heads, padded_len, scale);                           \
        }                                                                                                              \
    }
FERRY_FLOATS(MASKED_SOFTMAX)
