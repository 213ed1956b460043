// y = activation(x · wᵀ + bias), in f32: the small products of a head, one row per request.
//
// Shapes: x [rows][in], w [out][in], bias [out] or null, y [rows][out]. activation as in bias_act.cu.
// Reference: reference::dense, within 1e-5 of it, relative above 1, for values of about 1.
// Bound by bytes: w is read once per row, from the L2 cache after the first; with many rows or outputs a library's product is
// the better choice. A warp takes one result.
#include "ferry.cuh"

namespace ferry {

template <int V>
__device__ void dense(const Table table, const float* x, const float* w, const float* bias, float* y, int in, int out,
    int activation) {
    const int lane = threadIdx.x % WARP;
    const int warps = blockDim.x / WARP;
    const int results = table.rows() * out;
    for (int result = blockIdx.x * warps + threadIdx.x / WARP; result < results; result += gridDim.x * warps) {
        const float* const from = x + static_cast<size_t>(result / out) * in;
        const float* const weights = w + static_cast<size_t>(result % out) * in;
        float sum = 0.0f;
        for (int i = lane * V; i < in; i += WARP * V) {
            float a[V], b[V];
            load<V>(from + i, a);
            load<V>(weights + i, b);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                sum += a[v] * b[v];
            }
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            y[result] = activate(bias ? sum + bias[result % out] : sum, activation);
        }
    }
}

}  // namespace ferry

extern "C" __global__ void __launch_bounds__(128) dense_f32(
    const int* __restrict__ table, const float* __restrict__ x, const float* __restrict__ w,
    const float* __restrict__ bias, float* __restrict__ y, int in, int out, int activation) {
    if (in % 8 == 0) {
        ferry::dense<8>(ferry::Table{table}, x, w, bias, y, in, out, activation);
    } else {
        ferry::dense<1>(ferry::Table{table}, x, w, bias, y, in, out, activation);
    }
}
