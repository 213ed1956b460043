// Rows that lie end to end, to a padded batch: padded[row][place] = ragged[start of row + place], and `pad` beyond its length.
//
// Shapes: ragged [tokens][per_place], padded [rows][padded_len][per_place] of elements of 1, 2, 4 or 8 bytes; mask
// [rows][padded_len] of f32, 1 on real places and 0 elsewhere, or null; positions [rows][padded_len], the place, or null.
// Reference: reference::unpack, to the bit.
// Bound by bytes: each real element is read once and each place written once.
// Blocks share a row along x and step over rows along y. Rows whose two ends lie on 16 bytes move 16 at a time.
#include "ferry.cuh"

namespace ferry {

template <class E>
__device__ void unpack(const Table table, const E* ragged, E* padded, float* mask, unsigned* positions, int padded_len,
    int per_place, unsigned long long pad) {
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int step = gridDim.x * blockDim.x;
    const int rows = table.rows();
    const size_t of_row = static_cast<size_t>(padded_len) * per_place;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const int len = min(table.len(row), padded_len);
        const E* const from = ragged + static_cast<size_t>(table.start(row)) * per_place;
        E* const to = padded + row * of_row;
        const int real = copy(from, to, len * per_place, first, step);
        for (int i = real + first; i < len * per_place; i += step) {
            to[i] = from[i];
        }
        for (int i = len * per_place + first; i < padded_len * per_place; i += step) {
            to[i] = static_cast<E>(pad);
        }
        const size_t places = static_cast<size_t>(row) * padded_len;
        if (mask) {
            for (int place = first; place < padded_len; place += step) {
                mask[places + place] = place < len ? 1.0f : 0.0f;
            }
        }
        if (positions) {
            for (int place = first; place < padded_len; place += step) {
                positions[places + place] = place;
            }
        }
    }
}

}  // namespace ferry

#define UNPACK(name, E)                                                                                                \
    extern "C" __global__ void __launch_bounds__(128) unpack_##name(                                                   \
        const int* __restrict__ table, const E* __restrict__ ragged, E* __restrict__ padded,                           \
        float* __restrict__ mask, unsigned* __restrict__ positions, int padded_len, int per_place,                     \
        unsigned long long pad) {                                                                                      \
        ferry::unpack(ferry::Table{table}, ragged, padded, mask, positions, padded_len, per_place, pad);               \
    }
FERRY_ELEMENTS(UNPACK)
