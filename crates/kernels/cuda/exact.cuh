// Attention to keys and values kept as f16, the format that every other one is measured against.
//
// Split-KV decode (Flash-Decoding, Dao et al. 2023): parts of a head's tokens give attention states, which `exact_finish` merges. The query
// heads of a KV head are columns of one product on tensor cores, so that each key and value is loaded once for all of them. A warp
// takes 16 tokens at a time straight from global memory into the fragments' order: which channel or token is which row or
// column of a product is free as long as both sides agree, and is chosen such that every load is 16 bytes. No shared memory, and no
// barrier before the part's end.
//
// Weights are rounded to f16: an output is off by up to 2^-11 of the largest value.
#pragma once

#include "work.cuh"

constexpr int EXACT_WARPS = 4;
constexpr int EXACT_THREADS = EXACT_WARPS * WARP;

template <int D>
struct ExactShared {
    uint32_t ends[MOST_HEADS];
    // Of lane l: row g, 16 bytes of each 64 as keys are loaded. In registers there is no room.
    uint4 queries[D / 32][WARP];
    float max[EXACT_WARPS][ROWS];
    float sum[EXACT_WARPS][ROWS];
    float accumulated[EXACT_WARPS][ROWS][D];
};

// What a warp remembers of its tokens. Lane (g, t), g = lane / 4, t = lane % 4, has columns 2t and 2t + 1: rows of queries.
template <int D>
struct ExactFold {
    float max[2];
    float sum[2];  // of this lane's tokens
    // Of channels 2 * i and 2 * i + 1 of the lane's: those from 8g on, and in the second half of D from D / 2 + 8g on.
    float accumulated[D / 16][4];
};

// Sixteen tokens' keys or values as a lane loads them.
template <int D>
struct Sixteen {
    uint4 words[D / 16];
};

// Keys: rows g and g + 8, of which lane t has 16 bytes of each 64.
template <int D>
DEVICE void load_keys(Sixteen<D>& to, const uint16_t* keys) {
    int g = thread_index() % WARP / 4, t = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        to.words[2 * i] = load_once(keys + g * D + i * 32 + t * 8);
        to.words[2 * i + 1] = load_once(keys + (g + 8) * D + i * 32 + t * 8);
    }
}

// Values: tokens 2t, 2t + 1, 2t + 8, 2t + 9, of which lane g has 16 bytes of each 128.
template <int D>
DEVICE void load_values(Sixteen<D>& to, const uint16_t* values) {
    int g = thread_index() % WARP / 4, t = thread_index() % 4;
#pragma unroll
    for (int half = 0; half < D / 64; half++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = 2 * t + i % 2 + i / 2 * 8;
            to.words[half * 4 + i] = load_once(values + token * D + half * 64 + g * 8);
        }
    }
}

// Makes zeros of tokens that do not exist: what is there may be no number.
template <int D>
DEVICE void mask_values(Sixteen<D>& values, int held) {
    int t = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        if (2 * t + i % 2 + i / 2 % 2 * 8 >= held) values.words[i] = uint4{0, 0, 0, 0};
    }
}

// Scores of 16 tokens: rows g and g + 8.
template <int D>
DEVICE void score_keys(const Sixteen<D>& keys, const uint4 (&queries)[D / 32][WARP], float (&scores)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) scores[i] = 0;
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        const uint4 &first = keys.words[2 * i], &second = keys.words[2 * i + 1], q = load_shared_here(&queries[i][thread_index() % WARP]);
        multiply_halves(scores, first.x, second.x, first.y, second.y, q.x, q.y);
        multiply_halves(scores, first.z, second.z, first.w, second.w, q.z, q.w);
    }
}

// Weighted values of 16 tokens, whose weights are `b0` (tokens 2t, 2t + 1) and `b1` (2t + 8, 2t + 9) of row g.
template <int D>
DEVICE void weigh_values(ExactFold<D>& fold, const Sixteen<D>& values, uint32_t b0, uint32_t b1) {
#pragma unroll
    for (int half = 0; half < D / 64; half++) {
        const uint4* w = &values.words[half * 4];
        uint32_t of[4][4] = {{w[0].x, w[0].y, w[0].z, w[0].w},
                             {w[1].x, w[1].y, w[1].z, w[1].w},
                             {w[2].x, w[2].y, w[2].z, w[2].w},
                             {w[3].x, w[3].y, w[3].z, w[3].w}};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t a0 = pick_bytes(of[0][i], of[1][i], 0x5410), a1 = pick_bytes(of[0][i], of[1][i], 0x7632);
            uint32_t a2 = pick_bytes(of[2][i], of[3][i], 0x5410), a3 = pick_bytes(of[2][i], of[3][i], 0x7632);
            multiply_halves(fold.accumulated[half * 4 + i], a0, a1, a2, a3, b0, b1);
        }
    }
}

// Folds the scores of 16 tokens, of which `held` exist; leaves their weights as fragments.
template <int D>
DEVICE void fold_scores(ExactFold<D>& fold, float (&scores)[4], float scale, int held, uint32_t& b0, uint32_t& b1) {
    int g = thread_index() % WARP / 4;
#pragma unroll
    for (int i = 0; i < 4; i++) scores[i] = g + i / 2 * 8 < held ? scores[i] * scale : NONE;
    float weights[4];
    bool risen = false;
    float old[2];
#pragma unroll
    for (int column = 0; column < 2; column++) {
        float top = max_of(fold.max[column], warp_max<4>(max_of(scores[column], scores[2 + column])));
        old[column] = fold.max[column] == NONE ? 0 : exp2_fast(fold.max[column] - top);
        risen |= top > fold.max[column];
        fold.max[column] = top;
        weights[column] = exp2_fast(scores[column] - top);
        weights[2 + column] = exp2_fast(scores[2 + column] - top);
        fold.sum[column] = fold.sum[column] * old[column] + weights[column] + weights[2 + column];
    }
    b0 = transpose(halves(weights[0], weights[1]));
    b1 = transpose(halves(weights[2], weights[3]));
    if (any_lane(risen)) {
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) fold.accumulated[i][j] *= old[j % 2];
        }
    }
}

// Tokens `first` to `end` of a head, by the block's warps in turn, 16 at a time; `first` is a multiple of 64.
template <int D>
DEVICE void fold_tokens(const ExactParameters& p, ExactShared<D>& shared, ExactFold<D>& fold, int sequence, int kv_head, int first,
                        int end) {
    int warp = thread_index() / WARP;
    const uint32_t* table = p.tables + (int64_t)sequence * p.table_stride;
    auto keys_at = [&](uint32_t page, int token) {
        return p.pool + ((int64_t)page * p.kv_heads + kv_head) * (2 * PAGE_TOKENS * D) + token % PAGE_TOKENS * D;
    };
    // A warp has every fourth of the part's runs of 16 tokens: one of each page, which is looked up two pages ahead.
    int token = first + warp * 16;
    if (token >= end) return;
    Sixteen<D> keys, values;
    const uint16_t* at = keys_at(table[token / PAGE_TOKENS], token);
    load_keys<D>(keys, at);
    int next = token + PAGE_TOKENS;
    uint32_t page = next < end ? table[next / PAGE_TOKENS] : 0;
    while (true) {
        load_values<D>(values, at + PAGE_TOKENS * D);
        float scores[4];
        score_keys<D>(keys, shared.queries, scores);
        if (next < end) {
            at = keys_at(page, next);
            load_keys<D>(keys, at);
            if (next + PAGE_TOKENS < end) page = table[next / PAGE_TOKENS + 1];
        }
        uint32_t b0, b1;
        fold_scores<D>(fold, scores, p.scale, end - token, b0, b1);
        if (end - token < 16) mask_values<D>(values, end - token);
        weigh_values<D>(fold, values, b0, b1);
        if (next >= end) return;
        token = next;
        next += PAGE_TOKENS;
    }
}

// What a warp's lanes have of columns 2t and 2t + 1, for the block.
template <class Shared, class Fold>
DEVICE void share_fold(Shared& shared, const Fold& fold) {
    int warp = thread_index() / WARP, lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int column = 0; column < 2; column++) {
        float sum = warp_sum<4>(fold.sum[column]);
        if (g == 0) {
            shared.max[warp][2 * t + column] = fold.max[column];
            shared.sum[warp][2 * t + column] = sum;
        }
    }
}

// Channel `c` of four rows of a warp's sums.
template <int C>
DEVICE float4 four_rows(const float (&of)[ROWS][C], int row, int c) {
    return float4{of[row][c], of[row + 1][c], of[row + 2][c], of[row + 3][c]};
}

// Merges the warps' states into the slot of the part; `sums_at(warp, row, channel)` are their sums of four rows from `row` on.
template <int D, class Shared, class F>
DEVICE void store_state(const States& states, Shared& shared, int64_t slot, int rows, F sums_at) {
    static_assert(EXACT_WARPS * ROWS == WARP);
    sync_block();
    if (thread_index() < WARP) {
        // A lane has a row of a warp; what its sums are multiplied by takes the place of its maximum.
        int warp = thread_index() / ROWS, row = thread_index() % ROWS;
        float mine = shared.max[warp][row], top = warp_max<ROWS>(mine), factor = mine == NONE ? 0 : exp2_fast(mine - top);
        float sum = warp_sum<ROWS>(factor * shared.sum[warp][row]);
        shared.max[warp][row] = factor;
        if (warp == 0 && row < rows) {
            states.max[slot * rows + row] = top;
            states.sum[slot * rows + row] = sum;
        }
    }
    sync_block();
    for (int at = thread_index(); at < (rows + 3) / 4 * D; at += block_threads()) {
        int row = at / D * 4, c = at % D;
        float x[4] = {0, 0, 0, 0};
#pragma unroll
        for (int warp = 0; warp < EXACT_WARPS; warp++) {
            const float* factors = &shared.max[warp][row];
            float4 sums = sums_at(warp, row, c);
            x[0] += factors[0] * sums.x;
            x[1] += factors[1] * sums.y;
            x[2] += factors[2] * sums.z;
            x[3] += factors[3] * sums.w;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (row + i < rows) states.accumulated[(slot * rows + row + i) * D + c] = x[i];
        }
    }
    sync_block();
}

template <int D>
DEVICE void exact_attend_of(const ExactParameters& p) {
    auto& shared = *reinterpret_cast<ExactShared<D>*>(shared_memory());
    int warp = thread_index() / WARP, lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    auto length = [&](int i) { return (int)p.lengths[i]; };
    count_parts(shared.ends, p.sequences, [&](int i) {
        return parts_of(length(i), p.states.slots, p.least_part, PAGE_TOKENS) * p.kv_heads;
    });
    uint32_t items = shared.ends[p.sequences - 1];
    for (uint32_t item = block_index(); item < items; item += grid_blocks()) {
        int sequence = head_of(shared.ends, p.sequences, item);
        int in_sequence = item - (sequence > 0 ? shared.ends[sequence - 1] : 0);
        int part = parts_unit(length(sequence), p.states.slots, p.least_part, PAGE_TOKENS);
        int kv_head = in_sequence % p.kv_heads, index = in_sequence / p.kv_heads;
        ExactFold<D> fold;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fold.max[i] = NONE;
            fold.sum[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) fold.accumulated[i][j] = 0;
        }
        int end = min_of(length(sequence), (index + 1) * part);
        const uint16_t* queries = p.queries + (int64_t)(sequence * p.kv_heads + kv_head) * p.rows * D;
        if (warp < D / 32) {
            uint4 of_lane{0, 0, 0, 0};
            if (g < p.rows) of_lane = load_once(queries + g * D + warp * 32 + t * 8);
            shared.queries[warp][lane] = of_lane;
        }
        sync_block();
        fold_tokens<D>(p, shared, fold, sequence, kv_head, index * part, end);
        share_fold(shared, fold);
#pragma unroll
        for (int column = 0; column < 2; column++) {
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                // Rows g and g + 8 of a product are two neighbouring channels.
                int c = i / 4 * 64 + g * 8 + i % 4 * 2;
                shared.accumulated[warp][2 * t + column][c] = fold.accumulated[i][column];
                shared.accumulated[warp][2 * t + column][c + 1] = fold.accumulated[i][2 + column];
            }
        }
        int64_t slot = (int64_t)(sequence * p.kv_heads + kv_head) * p.states.slots + index;
        store_state<D>(p.states, shared, slot, p.rows,
                       [&](int of, int row, int c) { return four_rows(shared.accumulated[of], row, c); });
    }
}

constexpr int FINISH_THREADS = 512;

struct FinishShared {
    float tops[WARP];
    float sums[FINISH_THREADS];
    float accumulated[FINISH_THREADS];
    float row[256];
};

// One row of the states in slots `first` to `first + parts`, merged by the whole block. Thread `c` of the first D threads gets channel `c`;
// all threads get maximum and sum.
template <int D>
DEVICE float merge_row(const States& states, FinishShared& shared, int64_t first, int parts, int rows, int row, float& max,
                       float& sum) {
    int thread = thread_index(), slices = FINISH_THREADS / D, slice = thread / D, c = thread % D;
    float top = NONE;
    for (int i = thread; i < parts; i += FINISH_THREADS) top = max_of(top, states.max[(first + i) * rows + row]);
    top = warp_max<1>(top);
    sync_block();
    if (thread % WARP == 0) shared.tops[thread / WARP] = top;
    sync_block();
    top = warp_max<1>(thread % WARP < FINISH_THREADS / WARP ? shared.tops[thread % WARP] : NONE);
    float x = 0, total = 0;
#pragma unroll 8
    for (int i = slice; i < parts; i += slices) {
        int64_t at = (first + i) * rows + row;
        float of_part = states.max[at];
        float factor = of_part == NONE ? 0 : exp2_fast(of_part - top);
        total += factor * states.sum[at];
        x += factor * states.accumulated[at * D + c];
    }
    shared.sums[thread] = total;
    shared.accumulated[thread] = x;
    sync_block();
    max = top;
    sum = 0;
    x = 0;
    for (int i = 0; i < slices; i++) {
        sum += shared.sums[i * D];
        x += shared.accumulated[i * D + c];
    }
    return x;
}

// One channel of what was attended to, `x` with `max` and `sum`, and of what was attended to elsewhere become one.
DEVICE void join(float& x, float& max, float& sum, float other, float other_max, float other_sum) {
    float top = max_of(max, other_max);
    float mine = max == NONE ? 0 : exp2_fast(max - top), its = other_max == NONE ? 0 : exp2_fast(other_max - top);
    x = x * mine + other * its;
    sum = sum * mine + other_sum * its;
    max = top;
}

template <int D>
DEVICE void exact_finish_of(const FinishParameters& p) {
    auto& shared = *reinterpret_cast<FinishShared*>(shared_memory());
    int row = block_index() % p.rows, head = block_index() / p.rows, sequence = head / p.kv_heads;
    int parts = parts_of(p.lengths[sequence], p.states.slots, p.least_part, PAGE_TOKENS);
    float max, sum;
    float x = merge_row<D>(p.states, shared, (int64_t)head * p.states.slots, parts, p.rows, row, max, sum);
    if (thread_index() < D) p.out[(int64_t)block_index() * D + thread_index()] = sum > 0 ? x / sum : 0;
}

KERNEL(exact_attend_64, ExactParameters, EXACT_THREADS, 3) {
    follow();
    exact_attend_of<64>(p);
}
KERNEL(exact_attend_128, ExactParameters, EXACT_THREADS, 3) {
    follow();
    exact_attend_of<128>(p);
}
KERNEL(exact_finish_64, FinishParameters, FINISH_THREADS, 2) {
    follow();
    exact_finish_of<64>(p);
}
KERNEL(exact_finish_128, FinishParameters, FINISH_THREADS, 2) {
    follow();
    exact_finish_of<128>(p);
}
