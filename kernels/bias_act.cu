// x = activation(x + bias), in place: what follows the first product of a feed-forward block.
//
// Shapes: x [tokens][width] of T; bias [width] of T or null. activation: 0 none, 1 GELU (erf), 2 GELU (tanh), 3 ReLU, 4 tanh.
// width is a multiple of 4, and tokens * width is below 2^31.
// Reference: reference::bias_act, within 2e-6 of it in f32, relative above 1; one rounding to T more otherwise (2^-10, 2^-7).
// Bound by bytes: 2 * sizeof(T) per value, against about 30 operations for erf.
#include "ferry.cuh"

namespace ferry {

template <int V, class T>
__device__ void bias_act(const Table table, T* x, const T* bias, int width, int activation) {
    const unsigned count = static_cast<unsigned>(table.tokens()) * width;
    const unsigned step = gridDim.x * blockDim.x * V;
    for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * V; i < count; i += step) {
        float values[V];
        load<V>(x + i, values);
        if (bias) {
            add<V>(bias + i % width, values);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
            values[v] = activate(values[v], activation);
        }
        store<V>(x + i, values);
    }
}

}  // namespace ferry

#define BIAS_ACT(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) bias_act_##name(                                                 \
        const int* __restrict__ table, T* __restrict__ x, const T* __restrict__ bias, int width, int activation) {     \
        if (width % 8 == 0) {                                                                                          \
            ferry::bias_act<8>(ferry::Table{table}, x, bias, width, activation);                                       \
        } else {                                                                                                       \
            ferry::bias_act<4>(ferry::Table{table}, x, bias, width, activation);                                       \
        }                                                                                                              \
    }
FERRY_FLOATS(BIAS_ACT)
