// x[token] = layer_norm(x[token] + y[token] + bias), in place: what follows each block of an encoder.
//
// Shapes: x, y [tokens][hidden] of T; bias [hidden] of T or null; weight, shift [hidden] of f32. hidden is a multiple of 4.
// Reference: reference::add_norm, within 1e-5 of it in f32; one rounding to T more otherwise (2^-10 in f16, 2^-7 in bf16).
// Bound by bytes: 3 * hidden * sizeof(T) per token (x and y in, x out) against about 10 operations per value.
// A warp takes a token and keeps it in registers up to 1,024 values, so that the row is read once for its three passes.
#include "ferry.cuh"

namespace ferry {

template <int V, class T>
__device__ void add_norm(const Table table, T* x, const T* y, const T* bias, const float* weight, const float* shift,
    int hidden, float eps) {
    const int warps = blockDim.x / WARP;
    const int tokens = table.tokens();
    for (int token = blockIdx.x * warps + threadIdx.x / WARP; token < tokens; token += gridDim.x * warps) {
        T* const to = x + static_cast<size_t>(token) * hidden;
        const T* const from = y + static_cast<size_t>(token) * hidden;
        norm_by_warp<V>(
            hidden, eps, weight, shift,
            [&](int i, float(&values)[V]) {
                load<V>(to + i, values);
                add<V>(from + i, values);
                if (bias) {
                    add<V>(bias + i, values);
                }
            },
            [&](int i, const float(&values)[V]) { store<V>(to + i, values); });
    }
}

}  // namespace ferry

#define ADD_NORM(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128, 3) add_norm_##name(                                              \
        const int* __restrict__ table, T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ bias,         \
        const float* __restrict__ weight, const float* __restrict__ shift, int hidden, float eps) {                    \
        if (hidden % 8 == 0) {                                                                                         \
            ferry::add_norm<8>(ferry::Table{table}, x, y, bias, weight, shift, hidden, eps);                           \
        } else {                                                                                                       \
            ferry::add_norm<4>(ferry::Table{table}, x, y, bias, weight, shift, hidden, eps);                           \
        }                                                                                                              \
    }
FERRY_FLOATS(ADD_NORM)
