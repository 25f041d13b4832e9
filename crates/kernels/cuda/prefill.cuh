// Causal attention of a prompt's new tokens to f16 keys and values in pages, old and new.
//
// FlashAttention-2 (Dao 2023, arXiv 2307.08691): a block has 128 rows of one head's queries, each warp 32 of them, and goes through the
// pages, the next one being copied while this one is worked on. A page is a tile. Weights and rounding are those of `exact.cuh`.
//
// Of shared memory a warp reads 40 KB for 2 * 32 * 64 * 128 products (D = 128): with 16 rows a warp it would be 32 KB for half of them, and shared memory
// the bound.
#pragma once

#include "device.cuh"
#include "parameters.cuh"

constexpr int PREFILL_WARPS = 4;
constexpr int PREFILL_THREADS = PREFILL_WARPS * WARP;
// Blocks of 16 rows that a warp has.
constexpr int PREFILL_BLOCKS = 2;
constexpr int PREFILL_WARP_ROWS = 16 * PREFILL_BLOCKS;
constexpr int PREFILL_ROWS = PREFILL_WARPS * PREFILL_WARP_ROWS;

// Rows of 16-byte words, of which word w of row r is at w ^ (r % 8): what eight rows have in one column lies in all banks.
template <int D>
struct PrefillShared {
    uint4 queries[PREFILL_ROWS][D / 8];
    uint4 pages[2][2 * PAGE_TOKENS][D / 8];  // keys, then values
};

// Lane (g, t) has rows g and g + 8 of each block of 16.
template <int D>
struct PrefillFold {
    float max[PREFILL_BLOCKS][2];
    float sum[PREFILL_BLOCKS][2];  // of this lane's columns
    float accumulated[PREFILL_BLOCKS][D / 8][4];
};

// Tokens whose scores a warp has at a time: what fits in registers.
template <int D>
constexpr int SCORED = D == 64 ? 64 : 32;

template <int D>
struct PrefillScores {
    float of[PREFILL_BLOCKS][SCORED<D> / 8][4];
};

// Pairs of weights as f16: of row g, of row g + 8.
template <int D>
struct PrefillWeights {
    uint32_t of[PREFILL_BLOCKS][SCORED<D> / 8][2];
};

// What a block works on.
struct PrefillItem {
    int sequence, head;
    int first;   // of its rows, in the pass
    int rows;    // of its 128 that exist
    int token;   // of the first row, in the sequence
    int tokens;  // of the sequence
};

DEVICE PrefillItem prefill_item(const PrefillParameters& p) {
    int tile = block_index() / p.heads;
    PrefillItem item;
    item.head = block_index() % p.heads;
    item.sequence = p.tiles[2 * tile];
    int row = p.tiles[2 * tile + 1];
    const uint32_t* span = p.spans + 3 * item.sequence;
    int first = span[0], past = span[1], rows = span[2];
    item.first = first + row;
    item.rows = min_of(rows - row, PREFILL_ROWS);
    item.token = past + row;
    item.tokens = past + rows;
    return item;
}

// Copies the block's queries; for rows that do not exist the last one's.
template <int D>
DEVICE void copy_queries(const PrefillParameters& p, const PrefillItem& item, uint4 (*to)[D / 8]) {
    const uint16_t* from = p.queries + ((int64_t)item.first * p.heads + item.head) * D;
#pragma unroll
    for (int i = 0; i < PREFILL_ROWS * (D / 8) / PREFILL_THREADS; i++) {
        int word = i * PREFILL_THREADS + thread_index(), row = word / (D / 8), column = word % (D / 8);
        const uint16_t* of_row = from + (int64_t)min_of(row, item.rows - 1) * p.heads * D;
        copy_later<0, 0>(shared_address(&to[row][column ^ row % 8]), of_row + column * 8);
    }
}

// Copies a page of the block's KV head; it is a whole number of rows of all threads.
template <int D>
DEVICE void copy_page(const PrefillParameters& p, const PrefillItem& item, uint4 (*to)[D / 8], int page) {
    constexpr int AT_ONCE = PREFILL_THREADS / (D / 8);
    static_assert(AT_ONCE % 8 == 0, "the swizzle is the same for all rows of a thread");
    int kv_head = item.head / (p.heads / p.kv_heads), row = thread_index() / (D / 8), column = thread_index() % (D / 8);
    int64_t index = p.tables[(int64_t)item.sequence * p.table_stride + page];
    const uint16_t* from = p.pool + (index * p.kv_heads + kv_head) * (2 * PAGE_TOKENS * D) + thread_index() * 8;
    SharedAddress first = shared_address(&to[row][column ^ row % 8]);
#pragma unroll
    for (int i = 0; i < 2 * PAGE_TOKENS / AT_ONCE; i++) {
        copy_later<0, 0>(first + i * AT_ONCE * D * 2, from + i * AT_ONCE * D);
    }
    copies_end_group();
}

// Where lane l finds row l % 8 of matrix l / 8 of four, two rows of eight by two columns of eight elements in the first columns of a tile, the
// second matrix below the first or beside it. Where the columns from 16 k on are, `flip_address` says: rows begin at multiples of their length.
template <int D>
DEVICE SharedAddress quad_below(const uint4 (*rows)[D / 8]) {
    int lane = thread_index() % WARP;
    return shared_address(&rows[lane % 16][lane / 16 ^ lane % 8]);
}
template <int D>
DEVICE SharedAddress quad_beside(const uint4 (*rows)[D / 8]) {
    int lane = thread_index() % WARP;
    return shared_address(&rows[lane / 16 * 8 + lane % 8][lane / 8 % 2 ^ lane % 8]);
}
template <int D>
DEVICE SharedAddress quad_at(SharedAddress first, int row, int k) {
    return flip_address(first, 32 * k) + row * (D * 2);
}

// Scores of the warp's rows and some tokens.
template <int D>
DEVICE void score_tokens(PrefillScores<D>& scores, SharedAddress queries, SharedAddress keys) {
#pragma unroll
    for (int m = 0; m < PREFILL_BLOCKS; m++) {
#pragma unroll
        for (int n = 0; n < SCORED<D> / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores.of[m][n][i] = 0;
        }
    }
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t q[PREFILL_BLOCKS][4];
#pragma unroll
        for (int m = 0; m < PREFILL_BLOCKS; m++) load_matrices(q[m], quad_at<D>(queries, 16 * m, k));
#pragma unroll
        for (int n = 0; n < SCORED<D> / 16; n++) {
            uint32_t b[4];
            load_matrices(b, quad_at<D>(keys, 16 * n, k));
#pragma unroll
            for (int m = 0; m < PREFILL_BLOCKS; m++) {
                multiply_halves(scores.of[m][2 * n], q[m][0], q[m][1], q[m][2], q[m][3], b[0], b[1]);
                multiply_halves(scores.of[m][2 * n + 1], q[m][0], q[m][1], q[m][2], q[m][3], b[2], b[3]);
            }
        }
    }
}

// Hides from each row the tokens after its own; `ahead` is how far the warp's first row is ahead of the first token.
template <int D>
DEVICE void mask_scores(PrefillScores<D>& scores, int ahead) {
    int g = thread_index() % WARP / 4, t = thread_index() % 4;
#pragma unroll
    for (int m = 0; m < PREFILL_BLOCKS; m++) {
#pragma unroll
        for (int n = 0; n < SCORED<D> / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (8 * n + 2 * t + i % 2 > ahead + 16 * m + g + i / 2 * 8) scores.of[m][n][i] = NONE;
            }
        }
    }
}

// Makes weights of scores. Each row has seen a token by now: the first page's first.
template <int D>
DEVICE void weigh_scores(PrefillFold<D>& fold, PrefillScores<D>& scores, float scale, PrefillWeights<D>& weights) {
#pragma unroll
    for (int m = 0; m < PREFILL_BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = fold.max[m][half];
#pragma unroll
            for (int n = 0; n < SCORED<D> / 8; n++) {
                top = max_of(top, max_of(scores.of[m][n][2 * half], scores.of[m][n][2 * half + 1]));
            }
            top = max_of(top, shuffle_xor(top, 1));
            top = max_of(top, shuffle_xor(top, 2));
            float old = exp2_fast((fold.max[m][half] - top) * scale), offset = top * scale, sum = 0;
#pragma unroll
            for (int n = 0; n < SCORED<D> / 8; n++) {
                float a = exp2_fast(scores.of[m][n][2 * half] * scale - offset);
                float b = exp2_fast(scores.of[m][n][2 * half + 1] * scale - offset);
                sum += a + b;
                weights.of[m][n][half] = halves(a, b);
            }
            fold.max[m][half] = top;
            fold.sum[m][half] = fold.sum[m][half] * old + sum;
            if (any_lane(old != 1)) {
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    fold.accumulated[m][n][2 * half] *= old;
                    fold.accumulated[m][n][2 * half + 1] *= old;
                }
            }
        }
    }
}

// Adds the tokens' values, weighted.
template <int D>
DEVICE void add_values(PrefillFold<D>& fold, const PrefillWeights<D>& weights, SharedAddress values) {
#pragma unroll
    for (int k = 0; k < SCORED<D> / 16; k++) {
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            load_matrices_transposed(b, quad_at<D>(values, 16 * k, n));
#pragma unroll
            for (int m = 0; m < PREFILL_BLOCKS; m++) {
                const uint32_t(&first)[2] = weights.of[m][2 * k], (&second)[2] = weights.of[m][2 * k + 1];
                multiply_halves(fold.accumulated[m][2 * n], first[0], first[1], second[0], second[1], b[0], b[1]);
                multiply_halves(fold.accumulated[m][2 * n + 1], first[0], first[1], second[0], second[1], b[2], b[3]);
            }
        }
    }
}

template <int D>
DEVICE void store_rows(const PrefillParameters& p, const PrefillItem& item, const PrefillFold<D>& fold, int first) {
    int g = thread_index() % WARP / 4, t = thread_index() % 4;
#pragma unroll
    for (int m = 0; m < PREFILL_BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = fold.sum[m][half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            int row = first + 16 * m + 8 * half + g;
            if (row >= item.rows) continue;
            uint16_t* out = p.out + ((int64_t)(item.first + row) * p.heads + item.head) * D + 2 * t;
            float inverse = 1 / sum;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float* of = &fold.accumulated[m][n][2 * half];
                *reinterpret_cast<uint32_t*>(out + 8 * n) = bfloats(of[0] * inverse, of[1] * inverse);
            }
        }
    }
}

template <int D>
DEVICE void prefill_attend_of(const PrefillParameters& p) {
    auto& shared = *reinterpret_cast<PrefillShared<D>*>(shared_memory());
    PrefillItem item = prefill_item(p);
    copy_queries<D>(p, item, shared.queries);
    copy_page<D>(p, item, shared.pages[0], 0);
    PrefillFold<D> fold;
#pragma unroll
    for (int m = 0; m < PREFILL_BLOCKS; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fold.max[m][i] = NONE;
            fold.sum[m][i] = 0;
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) fold.accumulated[m][n][i] = 0;
        }
    }
    int row = thread_index() / WARP * PREFILL_WARP_ROWS;
    SharedAddress queries = quad_below<D>(&shared.queries[row]);
    int pages = (item.token + item.rows + PAGE_TOKENS - 1) / PAGE_TOKENS;
#pragma unroll 1
    for (int page = 0; page < pages; page++) {
        auto& tile = shared.pages[page % 2];
        wait_for_copies<0>();
        // All have it, and nobody is at work on the one before.
        sync_block();
        if (page + 1 < pages) copy_page<D>(p, item, shared.pages[(page + 1) % 2], page + 1);
        int held = item.tokens - page * PAGE_TOKENS;
        if (held < PAGE_TOKENS) {
            // What lies behind the last token may be no number, which times nothing is none either.
            for (int word = held * (D / 8) + thread_index(); word < PAGE_TOKENS * (D / 8); word += PREFILL_THREADS) {
                tile[PAGE_TOKENS + word / (D / 8)][word % (D / 8)] = uint4{0, 0, 0, 0};
            }
            sync_block();
        }
#pragma unroll 1
        for (int first = 0; first < PAGE_TOKENS; first += SCORED<D>) {
            int ahead = item.token + row - page * PAGE_TOKENS - first;
            if (ahead + PREFILL_WARP_ROWS <= 0) break;
            PrefillScores<D> scores;
            PrefillWeights<D> weights;
            score_tokens<D>(scores, queries, quad_beside<D>(&tile[first]));
            if (ahead < SCORED<D> - 1) mask_scores<D>(scores, ahead);
            weigh_scores<D>(fold, scores, p.scale, weights);
            add_values<D>(fold, weights, quad_below<D>(&tile[PAGE_TOKENS + first]));
        }
    }
    // Looked up again rather than kept in registers.
    store_rows<D>(p, prefill_item(p), fold, row);
}

KERNEL(prefill_attend_64, PrefillParameters, PREFILL_THREADS, 2) {
    follow();
    prefill_attend_of<64>(p);
}
KERNEL(prefill_attend_128, PrefillParameters, PREFILL_THREADS, 2) {
    follow();
    prefill_attend_of<128>(p);
}
