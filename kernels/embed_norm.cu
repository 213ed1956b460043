// out[token] = layer_norm(words[id] + places[token - start of its row] + segment_rows[segment]).
//
// Shapes: ids, segments [tokens]; words [vocabulary][hidden], places [longest][hidden], segment_rows [segments][hidden], out
// [tokens][hidden] of T; weight, shift [hidden] of f32. hidden is a multiple of 4. segments and segment_rows are both null
// or neither. The caller has added segment 0 to places; segment_rows hold differences from it.
// Reference: reference::embed_norm, within 1e-5 of it in f32; one rounding to T more otherwise (2^-10 in f16, 2^-7 in bf16).
// Bound by bytes: up to 4 * hidden * sizeof(T) per token, of which the row of words is a read far away.
// A warp takes a token and keeps it in registers up to 1,024 values.
#include "ferry.cuh"

namespace ferry {

template <int V, class T>
__device__ void embed_norm(const Table table, const unsigned* ids, const unsigned* segments, const T* words,
    const T* places, const T* segment_rows, const float* weight, const float* shift, T* out, int hidden, float eps) {
    const int warps = blockDim.x / WARP;
    const int tokens = table.tokens();
    for (int token = blockIdx.x * warps + threadIdx.x / WARP; token < tokens; token += gridDim.x * warps) {
        const int place = token - table.start(table.row_of(token));
        const T* const word = words + static_cast<size_t>(ids[token]) * hidden;
        const T* const at = places + static_cast<size_t>(place) * hidden;
        const T* const segment = segments ? segment_rows + static_cast<size_t>(segments[token]) * hidden : nullptr;
        T* const to = out + static_cast<size_t>(token) * hidden;
        norm_by_warp<V>(
            hidden, eps, weight, shift,
            [&](int i, float(&values)[V]) {
                load<V>(word + i, values);
                add<V>(at + i, values);
                if (segment) {
                    add<V>(segment + i, values);
                }
            },
            [&](int i, const float(&values)[V]) { store<V>(to + i, values); });
    }
}

}  // namespace ferry

#define EMBED_NORM(name, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(128, 3) embed_norm_##name(                                            \
        const int* __restrict__ table, const unsigned* __restrict__ ids, const unsigned* __restrict__ segments,        \
        const T* __restrict__ words, const T* __restrict__ places, const T* __restrict__ segment_rows,                 \
        const float* __restrict__ weight, const float* __restrict__ shift, T* __restrict__ out, int hidden,            \
        float eps) {                                                                                                   \
        if (hidden % 8 == 0) {                                                                                         \
            ferry::embed_norm<8>(                                                                                      \
                ferry::Table{table}, ids, segments, words, places, segment_rows, weight, shift, out, hidden, eps);     \
        } else {                                                                                                       \
            ferry::embed_norm<4>(                                                                                      \
                ferry::Table{table}, ids, segments, words, places, segment_rows, weight, shift, out, hidden, eps);     \
        }                                                                                                              \
    }
FERRY_FLOATS(EMBED_NORM)
