// The real places of a padded batch, end to end: ragged[start of row + place] = padded[row][place].
//
// Shapes: padded [rows][padded_len][per_place], ragged [tokens][per_place] of elements of 1, 2, 4 or 8 bytes.
// Reference: reference::gather, to the bit.
// Bound by bytes: each real element is read and written once; padding is not read.
// Blocks share a row along x and step over rows along y. Rows whose two ends lie on 16 bytes move 16 at a time.
#include "ferry.cuh"

namespace ferry {

template <class E>
__device__ void gather(const Table table, const E* padded, E* ragged, int padded_len, int per_place) {
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int step = gridDim.x * blockDim.x;
    const int rows = table.rows();
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const int count = min(table.len(row), padded_len) * per_place;
        const E* const from = padded + static_cast<size_t>(row) * padded_len * per_place;
        E* const to = ragged + static_cast<size_t>(table.start(row)) * per_place;
        const int done = copy(from, to, count, first, step);
        for (int i = done + first; i < count; i += step) {
            to[i] = from[i];
        }
    }
}

}  // namespace ferry

#define GATHER(name, E)                                                                                                \
    extern "C" __global__ void __launch_bounds__(128) gather_##name(                                                   \
        const int* __restrict__ table, const E* __restrict__ padded, E* __restrict__ ragged, int padded_len,           \
        int per_place) {                                                                                               \
        ferry::gather(ferry::Table{table}, padded, ragged, padded_len, per_place);                                     \
    }
FERRY_ELEMENTS(GATHER)
