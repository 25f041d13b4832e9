// How do queries enter the channels of layered pages, and outputs leave them?
//
// One block for each query head, with matrices [D, D] of f16 as `rotate.rs` has them: a vector becomes the weighted sum of the rows.
#pragma once

#include "layered.cuh"

constexpr int TURN_THREADS = 512;

struct TurnShared {
    float vector[256];
    float parts[TURN_THREADS];
    float tops[WARP];
    float sums[WARP];
};

// Element `c` of the rotated vector in `shared.vector`, for all threads with `c = thread % D`.
template <int D, class Shared>
DEVICE float rotated(Shared& shared, float* parts, const uint16_t* matrix) {
    constexpr int SLICES = TURN_THREADS / D, ROWS_OF_SLICE = D / SLICES;
    int c = thread_index() % D, slice = thread_index() / D;
    float x = 0;
#pragma unroll 8
    for (int i = 0; i < ROWS_OF_SLICE; i++) {
        int n = slice * ROWS_OF_SLICE + i;
        x += shared[n] * half_to_float(matrix[n * D + c]);
    }
    sync_block();
    parts[thread_index()] = x;
    sync_block();
    x = 0;
#pragma unroll
    for (int i = 0; i < SLICES; i++) x += parts[i * D + c];
    return x;
}

// Over the first D threads; all threads get it.
template <int D>
DEVICE void sum_and_top(TurnShared& shared, float x, float y, float& sum, float& top) {
    sum = warp_sum<1>(x);
    top = warp_max<1>(y);
    sync_block();
    if (thread_index() % WARP == 0) {
        shared.sums[thread_index() / WARP] = sum;
        shared.tops[thread_index() / WARP] = top;
    }
    sync_block();
    sum = 0;
    top = 0;
    for (int i = 0; i < D / WARP; i++) {
        sum += shared.sums[i];
        top = max_of(top, shared.tops[i]);
    }
}

// Queries, times the scale, in the pages' channels and times their spreads: as numbers, and as bytes in steps of one scale a row.
template <int D>
DEVICE void layered_turn_of(const LayeredParameters& p) {
    auto& shared = *reinterpret_cast<TurnShared*>(shared_memory());
    int head_index = block_index() / ROWS, row = block_index() % ROWS, c = thread_index();
    const Head& head = p.heads[head_index];
    int64_t at = (int64_t)head_index * ROWS + row;
    if (row >= p.rows) {
        if (c < D) p.turned[at * D + c] = 0;
        if (c < D / 4) p.bytes[at * (D / 4) + c] = 0;
        if (c < 2) p.steps[at * 2 + c] = 0;
        return;
    }
    const uint16_t* query = p.queries + ((int64_t)head_index * p.rows + row) * D;
    if (c < D) shared.vector[c] = half_to_float(query[c]) * p.scale;
    sync_block();
    float x = rotated<D>(shared.vector, shared.parts, head.query_rotation);
    int channel = c % D;
    float offset, top, of_mean = x * half_to_float(head.key_mean[channel]);
    x *= half_to_float(head.key_spread[channel]);
    sum_and_top<D>(shared, of_mean, x < 0 ? -x : x, offset, top);
    float step = top / 127;
    float by = step > 1e-38f ? 1 / step : 0;
    if (c < D) {
        p.turned[at * D + c] = x;
        reinterpret_cast<int8_t*>(p.bytes)[at * D + c] = (int8_t)round_to_int(x * by);
    }
    if (c == 0) {
        p.steps[at * 2] = step * LEVEL_UNIT;
        p.steps[at * 2 + 1] = offset;
    }
}

struct LayeredFinishShared {
    FinishShared merged;
    float vector[256];
    float parts[TURN_THREADS];
};

// The output of a query: states of pages, turned back, and of the tokens that are attended to without pages.
template <int D>
DEVICE void layered_finish_of(const LayeredParameters& p) {
    auto& shared = *reinterpret_cast<LayeredFinishShared*>(shared_memory());
    int index = block_index() / p.rows, row = block_index() % p.rows, c = thread_index() % D;
    const Head& head = p.heads[index];
    int count = p.counts[index] & ~ALL_TILES, parts = parts_of(count, p.states.slots, p.least_part, 8);
    float max, sum;
    float x = merge_row<D>(p.states, shared.merged, (int64_t)index * p.states.slots, parts, p.rows, row, max, sum);
    sync_block();
    if (thread_index() < D) shared.vector[c] = x * half_to_float(head.value_spread[c]) + sum * half_to_float(head.value_mean[c]);
    sync_block();
    x = rotated<D>(shared.vector, shared.parts, head.output_rotation);
    if (p.exact.slots > 0) {
        int of_exact = parts_of(p.exact_lengths[index / p.kv_heads], p.exact.slots, p.exact_least_part, PAGE_TOKENS);
        float other_max, other_sum;
        float other =
            merge_row<D>(p.exact, shared.merged, (int64_t)index * p.exact.slots, of_exact, p.rows, row, other_max, other_sum);
        float top = max_of(max, other_max);
        float mine = max == NONE ? 0 : exp2_fast(max - top), its = other_max == NONE ? 0 : exp2_fast(other_max - top);
        x = x * mine + other * its;
        sum = sum * mine + other_sum * its;
    }
    if (thread_index() < D) p.out[(int64_t)block_index() * D + c] = sum > 0 ? x / sum : 0;
}

KERNEL(layered_turn_64, LayeredParameters, TURN_THREADS, 2) {
    follow();
    layered_turn_of<64>(p);
}
KERNEL(layered_turn_128, LayeredParameters, TURN_THREADS, 2) {
    follow();
    layered_turn_of<128>(p);
}
KERNEL(layered_finish_64, LayeredParameters, TURN_THREADS, 2) {
    follow();
    layered_finish_of<64>(p);
}
KERNEL(layered_finish_128, LayeredParameters, TURN_THREADS, 2) {
    follow();
    layered_finish_of<128>(p);
}
