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

// A thread's share of a matrix, for column `thread % D`. It is asked for first: all of it is on the way while other things are waited for.
template <int D>
struct Share {
    static constexpr int SLICES = TURN_THREADS / D, SLICE_ROWS = D / SLICES;
    uint16_t of[SLICE_ROWS];
};
template <int D>
DEVICE Share<D> share_of(const uint16_t* matrix) {
    Share<D> out;
    matrix += (thread_index() / D * Share<D>::SLICE_ROWS) * D + thread_index() % D;
#pragma unroll
    for (int i = 0; i < Share<D>::SLICE_ROWS; i++) out.of[i] = matrix[i * D];
    return out;
}

// Element `c` of the rotated vector, for all threads with `c = thread % D`.
template <int D>
DEVICE float rotated(const float* vector, float* parts, const Share<D>& share) {
    int c = thread_index() % D, slice = thread_index() / D;
    float x = 0;
#pragma unroll
    for (int i = 0; i < Share<D>::SLICE_ROWS; i++) x += vector[slice * Share<D>::SLICE_ROWS + i] * half_to_float(share.of[i]);
    sync_block();
    parts[thread_index()] = x;
    sync_block();
    x = 0;
#pragma unroll
    for (int i = 0; i < Share<D>::SLICES; i++) x += parts[i * D + c];
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

// The logarithm of a row's weight of the tokens that are attended to in any case; 0 if there are none.
DEVICE float known_weight(const LayeredParameters& p, int head, int row) {
    if (p.exact.slots == 0) return 0;
    int parts = parts_of(p.exact_lengths[head / p.kv_heads], p.exact.slots, p.exact_least_part, PAGE_TOKENS);
    float top = NONE, sum = 0;
    for (int i = 0; i < parts; i++) {
        int64_t at = ((int64_t)head * p.exact.slots + i) * p.rows + row;
        float max = p.exact.max[at];
        if (max == NONE) continue;
        float higher = max_of(top, max);
        sum = (top == NONE ? 0 : sum * exp2_fast(top - higher)) + p.exact.sum[at] * exp2_fast(max - higher);
        top = higher;
    }
    return top == NONE ? 0 : top + log2_fast(sum);
}

// Where tokens are attended to without pages, that was the launch before this one. It had waited for the queries: they are turned beside it, and the
// sketch asks for its pages beside both.
DEVICE void begin_turn(const LayeredParameters& p) {
    if (p.exact.slots > 0) {
        let_in_later();
    } else {
        follow();
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
        begin_turn(p);
        if (c < D) p.turned[at * D + c] = 0;
        if (c < D / 4) p.bytes[at * (D / 4) + c] = 0;
        if (c < STEP) p.steps[at * STEP + c] = 0;
        wait_for_earlier();
        return;
    }
    Share<D> share = share_of<D>(head.query_rotation);
    int channel = c % D;
    float mean = half_to_float(head.key_mean[channel]), spread = half_to_float(head.key_spread[channel]);
    begin_turn(p);
    const uint16_t* query = p.queries + ((int64_t)head_index * p.rows + row) * D;
    if (c < D) shared.vector[c] = half_to_float(query[c]) * p.scale;
    sync_block();
    float x = rotated<D>(shared.vector, shared.parts, share);
    float offset, top, of_mean = x * mean;
    x *= spread;
    sum_and_top<D>(shared, of_mean, x < 0 ? -x : x, offset, top);
    float step = top / 127;
    float by = step > 1e-38f ? 1 / step : 0;
    if (c < D) {
        p.turned[at * D + c] = x;
        reinterpret_cast<int8_t*>(p.bytes)[at * D + c] = (int8_t)round_to_int(x * by);
    }
    if (c == 0) {
        p.steps[at * STEP] = step * LEVEL_UNIT;
        p.steps[at * STEP + 1] = offset;
    }
    wait_for_earlier();
    if (c == 0) p.steps[at * STEP + 2] = known_weight(p, head_index, row);
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
    Share<D> share = share_of<D>(head.output_rotation);
    float mean = half_to_float(head.value_mean[c]), spread = half_to_float(head.value_spread[c]);
    int count = p.counts[index] & ~ALL_TILES, parts = parts_of(p, count);
    float other = 0, other_max = NONE, other_sum = 0;
    if (p.exact.slots > 0) {
        int of_exact = parts_of(p.exact_lengths[index / p.kv_heads], p.exact.slots, p.exact_least_part, PAGE_TOKENS);
        other = merge_row<D>(p.exact, shared.merged, (int64_t)index * p.exact.slots, of_exact, p.rows, row, other_max, other_sum);
    }
    follow();
    float max, sum;
    float x = merge_row<D>(p.states, shared.merged, (int64_t)index * p.states.slots, parts, p.rows, row, max, sum);
    sync_block();
    if (thread_index() < D) shared.vector[c] = x * spread + sum * mean;
    sync_block();
    x = rotated<D>(shared.vector, shared.parts, share);
    join(x, max, sum, other, other_max, other_sum);
    if (p.log_sums && thread_index() == 0) p.log_sums[block_index()] = max + log2_fast(sum);
    if (thread_index() < D) p.out[(int64_t)block_index() * D + c] = sum > 0 ? x / sum : 0;
}

KERNEL(layered_turn_64, LayeredParameters, TURN_THREADS, 2) {
    layered_turn_of<64>(p);
}
KERNEL(layered_turn_128, LayeredParameters, TURN_THREADS, 2) {
    layered_turn_of<128>(p);
}
KERNEL(layered_finish_64, LayeredParameters, TURN_THREADS, 2) {
    layered_finish_of<64>(p);
}
KERNEL(layered_finish_128, LayeredParameters, TURN_THREADS, 2) {
    layered_finish_of<128>(p);
}
