// Scaled dot-product attention of rows that lie end to end, without padding: context = softmax(q · kᵀ * scale) · v, per head.
//
// Shapes: qkv [tokens][3 * heads * D] of T, of each token the queries of all heads, then the keys, then the values; context
// [tokens][heads * D] of T. D is 32, 64 or 128. Grid: tiles of queries of the longest row, heads, rows.
// Reference: reference::attention, within 1e-5 of the largest value in f32, for scores of up to 10 (a power's relative error
// is its exponent's absolute one: 7e-5 for scores of 250). In f16 and bf16 shares are rounded before they meet the values:
// within 2^-9 of the largest value in f16, 2^-6 in bf16.
// Bound by: for rows of up to a few hundred tokens bytes, 4 * D * sizeof(T) per token and head, as keys and values of a row
// are read once per 64 queries, from the L2 cache but for the first; beyond, operations, 4 * D per pair of tokens. In f16 and
// bf16 those are on tensor cores and it is shared memory that bounds: scores pass through it once as f32, shares once as T.
// In f32 they are plain FMAs, of which a thread does 8 (4 where D is 128) per 16 bytes from shared memory.
// Why f32 is not on tensor cores: TF32 keeps 10 bits, and this is the type that answers are compared in.
#include "ferry.cuh"

namespace ferry {

constexpr float LOG2_E = 1.44269504088896341f;

// Of a row's part of qkv some tokens' D values, on their way through registers to shared memory: `count` real tokens, then
// zeros. Split in two, so that all loads of a tile are under way before the first is waited for.
template <int D, int TOKENS, int THREADS, class T> struct Tile {
    static constexpr int EACH = 16 / sizeof(T);
    static constexpr int WORDS = D / EACH;
    static constexpr int COUNT = TOKENS * WORDS / THREADS;
    static_assert(TOKENS * WORDS % THREADS == 0, "every thread takes as many words");
    uint4 held[COUNT];

    __device__ inline void fetch(const T* from, size_t width, int count, int thread) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const int i = n * THREADS + thread, token = i / WORDS;
            held[n] = {0, 0, 0, 0};
            if (token < count) {
                held[n] = *reinterpret_cast<const uint4*>(from + token * width + i % WORDS * EACH);
            }
        }
    }

    __device__ inline void put(T* to, int stride, int thread) const {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const int i = n * THREADS + thread;
            *reinterpret_cast<uint4*>(to + i / WORDS * stride + i % WORDS * EACH) = held[n];
        }
    }
};

// Threads of a block. As ops.rs has it.
constexpr int THREADS = 128;

// Calls `tile(tokens of the row, queries left, q, k, v, context)` for each of the block's tiles; every thread makes the same
// calls. Pointers are those of the head: q and context at the tile's first query, k and v at the row's first token.
template <int D, int QUERIES, class T, class F>
__device__ inline void for_tiles(const Table table, const T* qkv, T* context, int heads, F tile) {
    const size_t out_width = static_cast<size_t>(heads) * D;
    const size_t width = 3 * out_width;
    const int rows = table.rows();
    for (int row = blockIdx.z; row < rows; row += gridDim.z) {
        const int start = table.start(row), len = table.len(row);
        for (int head = blockIdx.y; head < heads; head += gridDim.y) {
            const T* const q = qkv + start * width + head * D;
            T* const to = context + start * out_width + head * D;
            for (int first = blockIdx.x * QUERIES; first < len; first += gridDim.x * QUERIES) {
                tile(len, len - first, q + first * width, q + out_width, q + 2 * out_width, to + first * out_width);
            }
        }
    }
}

// On tensor cores. Four warps take 16 queries each; keys and values go by in tiles through shared memory.
//
// A fragment's spread over lanes is the device's affair: whatever is done to single scores is done in shared memory, where
// a row of 16 belongs to two lanes. Sums of values stay in fragments. They are relative to the largest score when they were
// last scaled, and are scaled again only when a score exceeds that by 2^8: rarely, and shares up to 2^8 are as exact.
template <class T, int D>
__device__ void attention_tensor(
    const Table table, const T* qkv, T* context, int heads, float scale, unsigned char* shared) {
    namespace wmma = nvcuda::wmma;
    constexpr int KEYS = D == 128 ? 32 : 64;
    constexpr int QUERIES = 64;
    constexpr int STRIDE = D + 8;
    // As f32 for scores. Shares take their place, each row within its scores' row.
    constexpr int SCORES = KEYS + 8;
    constexpr int SHARES = SCORES * 4 / sizeof(T);
    constexpr float SLACK = 8.0f;
    // Queries pass through the place of the warp's scores, as many columns at once as it has room for.
    constexpr int CHUNK = D < 64 ? D : 64;
    constexpr int CHUNK_STRIDE = CHUNK + 8;
    static_assert(CHUNK_STRIDE * sizeof(T) <= SCORES * sizeof(float), "a chunk of queries fits");

    T* const keys = reinterpret_cast<T*>(shared);
    T* const values = keys + KEYS * STRIDE;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float* const scores = reinterpret_cast<float*>(values + KEYS * STRIDE) + warp * 16 * SCORES;
    T* const shares = reinterpret_cast<T*>(scores);
    const int mine = lane / 2, half = lane % 2;
    const float scale2 = scale * LOG2_E;
    const size_t width = static_cast<size_t>(heads) * D;

    for_tiles<D, QUERIES>(table, qkv, context, heads, [&](int len, int left, const T* q, const T* k, const T* v, T* to) {
        Tile<CHUNK, 16, WARP, T> own[D / CHUNK];
#pragma unroll
        for (int c = 0; c < D / CHUNK; ++c) {
            own[c].fetch(q + warp * 16 * 3 * width + c * CHUNK, 3 * width, left - warp * 16, lane);
        }
        Tile<D, KEYS, THREADS, T> next[2];
        const auto fetch = [&](int first) {
            next[0].fetch(k + first * 3 * width, 3 * width, len - first, threadIdx.x);
            next[1].fetch(v + first * 3 * width, 3 * width, len - first, threadIdx.x);
        };
        fetch(0);
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> queries[D / 16];
#pragma unroll
        for (int c = 0; c < D / CHUNK; ++c) {
            own[c].put(shares, CHUNK_STRIDE, lane);
            __syncwarp();
#pragma unroll
            for (int d = 0; d < CHUNK / 16; ++d) {
                wmma::load_matrix_sync(queries[c * (CHUNK / 16) + d], shares + d * 16, CHUNK_STRIDE);
            }
            __syncwarp();
        }
        wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[D / 16];
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            wmma::fill_fragment(sums[d], 0.0f);
        }
        // Of the query that this lane shares with its neighbour; `whole` is this lane's part.
        float most = -INFINITY, whole = 0.0f;
        const bool idle = warp * 16 >= left;

        for (int first = 0; first < len; first += KEYS) {
            const int count = min(len - first, KEYS);
            // The last keys and values have been read by all.
            __syncthreads();
            next[0].put(keys, STRIDE, threadIdx.x);
            next[1].put(values, STRIDE, threadIdx.x);
            __syncthreads();
            if (idle) {
                fetch(first + KEYS);
                continue;
            }
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                if (n * 16 < count) {
                    wmma::fragment<wmma::accumulator, 16, 16, 16, float> product;
                    wmma::fill_fragment(product, 0.0f);
#pragma unroll
                    for (int d = 0; d < D / 16; ++d) {
                        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> part;
                        wmma::load_matrix_sync(part, keys + n * 16 * STRIDE + d * 16, STRIDE);
                        wmma::mma_sync(product, queries[d], part, product);
                    }
                    wmma::store_matrix_sync(scores + n * 16, product, SCORES, wmma::mem_row_major);
                }
            }
            __syncwarp();

            // Four columns of each eight, so that the lanes of a load meet no bank twice.
            float held[KEYS / 8][4];
            float peak = -INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                const int column = n * 8 + half * 4;
                load<4>(scores + mine * SCORES + column, held[n]);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    held[n][i] = column + i < count ? held[n][i] * scale2 : -INFINITY;
                    peak = fmaxf(peak, held[n][i]);
                }
            }
            peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, 1));
            float factor = 1.0f;
            if (peak > most + SLACK) {
                factor = exp2f(most - peak);
                most = peak;
                whole *= factor;
            }
            __syncwarp();
            // The first tile has nothing to scale.
            if (first > 0 && __any_sync(ALL_LANES, factor != 1.0f)) {
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    wmma::store_matrix_sync(scores, sums[d], SCORES, wmma::mem_row_major);
                    __syncwarp();
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        scores[mine * SCORES + half * 8 + i] *= factor;
                    }
                    __syncwarp();
                    wmma::load_matrix_sync(sums[d], scores, SCORES, wmma::mem_row_major);
                    __syncwarp();
                }
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    held[n][i] = exp2f(held[n][i] - most);
                    whole += held[n][i];
                }
                store<4>(shares + mine * SHARES + n * 8 + half * 4, held[n]);
            }
            __syncwarp();
            // Under way while values are summed; scores have just left the registers that it takes.
            fetch(first + KEYS);
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                if (n * 16 < count) {
                    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> share;
                    wmma::load_matrix_sync(share, shares + n * 16, SHARES);
#pragma unroll
                    for (int d = 0; d < D / 16; ++d) {
                        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> part;
                        wmma::load_matrix_sync(part, values + n * 16 * STRIDE + d * 16, STRIDE);
                        wmma::mma_sync(sums[d], share, part, sums[d]);
                    }
                }
            }
            // Shares have been read before scores are written over them.
            __syncwarp();
        }
        if (idle) {
            return;
        }
        const float factor = 1.0f / (whole + __shfl_xor_sync(ALL_LANES, whole, 1));
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            wmma::store_matrix_sync(scores, sums[d], SCORES, wmma::mem_row_major);
            __syncwarp();
            float out[8];
            load<8>(scores + mine * SCORES + half * 8, out);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                out[i] *= factor;
            }
            if (warp * 16 + mine < left) {
                store<8>(to + (warp * 16 + mine) * width + d * 16 + half * 8, out);
            }
            __syncwarp();
        }
    });
}

// With plain FMAs. A thread takes Q queries, 16 apart, and K keys, 8 apart; eight neighbours share their queries' scores, then
// split the columns of their sums. All queries of a score's row are in one warp, so shares need no barrier of the block.
template <int D, int Q, int K>
__device__ void attention_plain(
    const Table table, const float* qkv, float* context, int heads, float scale, unsigned char* shared) {
    constexpr int QUERIES = 16 * Q, KEYS = 8 * K;
    constexpr int STRIDE = D + 4, SHARES = KEYS + 4;
    float* const queries = reinterpret_cast<float*>(shared);
    float* const keys = queries + QUERIES * STRIDE;
    float* const values = keys + KEYS * STRIDE;
    float* const shares = values + KEYS * STRIDE;
    const int key = threadIdx.x % 8, query = threadIdx.x / 8;
    const float scale2 = scale * LOG2_E;
    const size_t width = static_cast<size_t>(heads) * D;

    for_tiles<D, QUERIES>(
        table, qkv, context, heads, [&](int len, int left, const float* q, const float* k, const float* v, float* to) {
            Tile<D, QUERIES, THREADS, float> own;
            own.fetch(q, 3 * width, left, threadIdx.x);
            // The last tile's queries have been read by all.
            __syncthreads();
            own.put(queries, STRIDE, threadIdx.x);
            float sums[Q][D / 32][4] = {};
            float most[Q], whole[Q];
#pragma unroll
            for (int i = 0; i < Q; ++i) {
                most[i] = -INFINITY;
                whole[i] = 0.0f;
            }
            for (int first = 0; first < len; first += KEYS) {
                const int count = min(len - first, KEYS);
                Tile<D, KEYS, THREADS, float> next[2];
                next[0].fetch(k + first * 3 * width, 3 * width, count, threadIdx.x);
                next[1].fetch(v + first * 3 * width, 3 * width, count, threadIdx.x);
                // The last keys and values have been read by all.
                __syncthreads();
                next[0].put(keys, STRIDE, threadIdx.x);
                next[1].put(values, STRIDE, threadIdx.x);
                __syncthreads();
                float scores[Q][K] = {};
#pragma unroll 4
                for (int d = 0; d < D; d += 4) {
                    float a[Q][4], b[K][4];
#pragma unroll
                    for (int i = 0; i < Q; ++i) {
                        load<4>(queries + (i * 16 + query) * STRIDE + d, a[i]);
                    }
#pragma unroll
                    for (int j = 0; j < K; ++j) {
                        load<4>(keys + (j * 8 + key) * STRIDE + d, b[j]);
                    }
#pragma unroll
                    for (int i = 0; i < Q; ++i) {
#pragma unroll
                        for (int j = 0; j < K; ++j) {
#pragma unroll
                            for (int c = 0; c < 4; ++c) {
                                scores[i][j] += a[i][c] * b[j][c];
                            }
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < Q; ++i) {
                    float peak = -INFINITY;
#pragma unroll
                    for (int j = 0; j < K; ++j) {
                        scores[i][j] = j * 8 + key < count ? scores[i][j] * scale2 : -INFINITY;
                        peak = fmaxf(peak, scores[i][j]);
                    }
#pragma unroll
                    for (int step = 4; step > 0; step /= 2) {
                        peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, step));
                    }
                    peak = fmaxf(peak, most[i]);
                    const float factor = exp2f(most[i] - peak);
                    most[i] = peak;
                    whole[i] *= factor;
#pragma unroll
                    for (int j = 0; j < K; ++j) {
                        const float share = exp2f(scores[i][j] - peak);
                        whole[i] += share;
                        shares[(i * 16 + query) * SHARES + j * 8 + key] = share;
                    }
#pragma unroll
                    for (int c = 0; c < D / 32; ++c) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            sums[i][c][e] *= factor;
                        }
                    }
                }
                __syncwarp();
#pragma unroll 2
                for (int n = 0; n < KEYS; n += 4) {
                    float share[Q][4];
#pragma unroll
                    for (int i = 0; i < Q; ++i) {
                        load<4>(shares + (i * 16 + query) * SHARES + n, share[i]);
                    }
#pragma unroll
                    for (int u = 0; u < 4; ++u) {
#pragma unroll
                        for (int c = 0; c < D / 32; ++c) {
                            float value[4];
                            load<4>(values + (n + u) * STRIDE + c * 32 + key * 4, value);
#pragma unroll
                            for (int i = 0; i < Q; ++i) {
#pragma unroll
                                for (int e = 0; e < 4; ++e) {
                                    sums[i][c][e] += share[i][u] * value[e];
                                }
                            }
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < Q; ++i) {
#pragma unroll
                for (int step = 4; step > 0; step /= 2) {
                    whole[i] += __shfl_xor_sync(ALL_LANES, whole[i], step);
                }
                const float factor = 1.0f / whole[i];
                if (i * 16 + query < left) {
#pragma unroll
                    for (int c = 0; c < D / 32; ++c) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            sums[i][c][e] *= factor;
                        }
                        store<4>(to + (i * 16 + query) * width + c * 32 + key * 4, sums[i][c]);
                    }
                }
            }
        });
}

}  // namespace ferry

// `blocks` of them fit a multiprocessor's registers: said, because the compiler's own guess spills some.
#define ATTENTION(name, T, blocks, ...)                                                                                \
    extern "C" __global__ void __launch_bounds__(128, blocks)                                                          \
        attention_##name(const int* table, const T* qkv, T* context, int heads, float scale) {                         \
        FERRY_SHARED(shared);                                                                                          \
        ferry::__VA_ARGS__(ferry::Table{table}, qkv, context, heads, scale, shared);                                   \
    }
ATTENTION(f32_32, float, 4, attention_plain<32, 4, 4>)
ATTENTION(f32_64, float, 3, attention_plain<64, 4, 4>)
// Fewer queries and keys: 48 KiB of shared memory are all that a block has without asking.
ATTENTION(f32_128, float, 4, attention_plain<128, 2, 2>)
ATTENTION(f16_32, __half, 4, attention_tensor<__half, 32>)
ATTENTION(f16_64, __half, 3, attention_tensor<__half, 64>)
ATTENTION(f16_128, __half, 2, attention_tensor<__half, 128>)
ATTENTION(bf16_32, __nv_bfloat16, 4, attention_tensor<__nv_bfloat16, 32>)
ATTENTION(bf16_64, __nv_bfloat16, 3, attention_tensor<__nv_bfloat16, 64>)
ATTENTION(bf16_128, __nv_bfloat16, 2, attention_tensor<__nv_bfloat16, 128>)
