// How do queries enter the channels of packed segments, outputs leave them, and vectors become packed ones' channels?
//
// One block for each segment of a head turns all of its rows, so that a matrix is read once. A thread has a column of the product and a share of
// the matrix's rows, all of which it asks for at once.
#pragma once

#include "packed_select.cuh"

// Threads of a block, for heads of D channels: whole columns of [D, C] and of [C, D].
template <int D>
constexpr int TURN_PACKED_THREADS = 3 * D;

template <int D>
struct TurnPackedShared {
    float rows[D][ROWS];  // to be turned
    float parts[ROWS][TURN_PACKED_THREADS<D>];
    float max[ROWS];
    float sum[ROWS];
};

// A thread's share of a matrix of N rows: column `thread % W`.
template <int D, int N, int W>
struct PackedShare {
    static constexpr int SHARES = TURN_PACKED_THREADS<D> / W, ROWS_OF_SHARE = N / SHARES;
    static_assert(SHARES * W == TURN_PACKED_THREADS<D> && SHARES * ROWS_OF_SHARE == N, "shares are even");
    uint16_t of[ROWS_OF_SHARE];
};

// `matrix` is [N, W], or its transpose [W, N].
template <int D, int N, int W>
DEVICE PackedShare<D, N, W> packed_share(const uint16_t* matrix, bool transposed) {
    using Of = PackedShare<D, N, W>;
    Of out;
    int column = thread_index() % W, first_row = thread_index() / W * Of::ROWS_OF_SHARE, step = transposed ? 1 : W;
    matrix += transposed ? column * N + first_row : first_row * W + column;
#pragma unroll
    for (int i = 0; i < Of::ROWS_OF_SHARE; i++) out.of[i] = matrix[i * step];
    return out;
}

// The rows times the matrix, in the column of each thread.
template <int D, int N, int W>
DEVICE void turn_rows(TurnPackedShared<D>& shared, const PackedShare<D, N, W>& share, float (&out)[ROWS]) {
    using Of = PackedShare<D, N, W>;
    int column = thread_index() % W, first_row = thread_index() / W * Of::ROWS_OF_SHARE;
    sync_block();
#pragma unroll
    for (int row = 0; row < ROWS; row++) out[row] = 0;
#pragma unroll
    for (int i = 0; i < Of::ROWS_OF_SHARE; i++) {
        float x = half_to_float(share.of[i]);
#pragma unroll
        for (int row = 0; row < ROWS; row++) out[row] += shared.rows[first_row + i][row] * x;
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) shared.parts[row][thread_index()] = out[row];
    sync_block();
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        out[row] = 0;
#pragma unroll
        for (int i = 0; i < Of::SHARES; i++) out[row] += shared.parts[row][i * W + column];
    }
}

template <int D>
DEVICE void packed_turn_of(const PackedParameters& p) {
    constexpr int C = D / 4 * 3;
    auto& shared = *reinterpret_cast<TurnPackedShared<D>*>(shared_memory());
    int index = block_index() / p.segment_stride, number = block_index() % p.segment_stride;
    if (number >= (int)p.heads[index].segments) return;
    int64_t at = (int64_t)index * p.segment_stride + number;
    auto share = packed_share<D, D, C>(p.segments[at].query_rotation, false);
    const uint16_t* queries = p.queries + (int64_t)index * p.rows * D;
    for (int i = thread_index(); i < ROWS * D; i += TURN_PACKED_THREADS<D>) {
        int row = i / D, c = i % D;
        shared.rows[c][row] = row < p.rows ? half_to_float(queries[i]) * p.scale : 0;
    }
    float turned[ROWS];
    turn_rows<D, D, C>(shared, share, turned);
    if (thread_index() >= C) return;
    // As `PackedQueries` has them: lane (g, t) channels C / 4 * t and those after it, four to a step.
    int t = thread_index() / (C / 4), step = thread_index() % (C / 4) / 4, channel = thread_index() % 4;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        uint16_t* to = p.turned + ((at * (C / 16) + step) * WARP + row * 4 + t) * 8 + channel;
        uint16_t first = float_to_half(turned[row]);
        to[0] = first;
        to[4] = float_to_half(turned[row] - half_to_float(first));
    }
}

// Merges what parts of a segment left, all rows, into `shared.rows`, `max` and `sum`.
template <int D>
DEVICE void merge_parts(const PackedParameters& p, TurnPackedShared<D>& shared, int64_t first, int parts) {
    constexpr int C = D / 4 * 3, THREADS = TURN_PACKED_THREADS<D>, SHARES = THREADS / C;
    int lane = thread_index() % WARP, c = thread_index() % C;
    const States& states = p.states;
    for (int row = thread_index() / WARP; row < ROWS; row += THREADS / WARP) {
        float top = NONE, sum = 0;
        if (row < p.rows) {
            for (int i = lane; i < parts; i += WARP) top = max_of(top, states.max[(first + i) * p.rows + row]);
            top = warp_max<1>(top);
            // Parts are never empty.
            for (int i = lane; i < parts; i += WARP) {
                int64_t at = (first + i) * p.rows + row;
                sum += states.sum[at] * exp2_fast(states.max[at] - top);
            }
            sum = warp_sum<1>(sum);
        }
        if (lane == 0) {
            shared.max[row] = top;
            shared.sum[row] = sum;
        }
    }
    sync_block();
    float x[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; row++) x[row] = 0;
    for (int i = thread_index() / C; i < parts; i += SHARES) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            int64_t at = (first + i) * p.rows + row;
            if (row < p.rows) x[row] += states.accumulated[at * C + c] * exp2_fast(states.max[at] - shared.max[row]);
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) shared.parts[row][thread_index()] = x[row];
    sync_block();
    if (thread_index() < C) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            x[row] = 0;
#pragma unroll
            for (int i = 0; i < SHARES; i++) x[row] += shared.parts[row][i * C + c];
            shared.rows[c][row] = x[row];
        }
    }
    sync_block();
}

// What was attended to of a segment leaves its channels.
template <int D>
DEVICE void packed_leave_of(const PackedParameters& p) {
    constexpr int C = D / 4 * 3;
    auto& shared = *reinterpret_cast<TurnPackedShared<D>*>(shared_memory());
    int index = block_index() / p.segment_stride, number = block_index() % p.segment_stride;
    if (number == 0 && thread_index() == 0) p.candidate_counts[index] = 0;
    if (number >= (int)p.heads[index].segments) return;
    int64_t at = (int64_t)index * p.segment_stride + number;
    PackedRun run = p.runs[at];
    // Of no parts: nothing, which is zeros.
    auto share = packed_share<D, C, D>(p.segments[at].output_rotation, false);
    merge_parts<D>(p, shared, state_slot(p, index, run.first_part), run.parts);
    float turned[ROWS];
    turn_rows<D, C, D>(shared, share, turned);
    if (thread_index() >= D) return;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        if (row < p.rows) p.left.accumulated[(at * p.rows + row) * D + thread_index()] = turned[row];
    }
    if (thread_index() < p.rows) {
        p.left.max[at * p.rows + thread_index()] = shared.max[thread_index()];
        p.left.sum[at * p.rows + thread_index()] = shared.sum[thread_index()];
    }
}

// The output of a query: all of its head's segments, and the tokens that are attended to without pages.
template <int D>
DEVICE void packed_finish_of(const PackedParameters& p) {
    auto& shared = *reinterpret_cast<FinishShared*>(shared_memory());
    int index = block_index() / p.rows, row = block_index() % p.rows;
    float max, sum;
    float x = merge_row<D>(p.left, shared, (int64_t)index * p.segment_stride, p.heads[index].segments, p.rows, row, max, sum);
    int known = 0;
    if (p.exact.slots > 0) known = parts_of(p.exact_lengths[index / p.kv_heads], p.exact.slots, p.exact_least_part, PAGE_TOKENS);
    sync_block();
    float other_max, other_sum;
    float other = merge_row<D>(p.exact, shared, (int64_t)index * p.exact.slots, known, p.rows, row, other_max, other_sum);
    join(x, max, sum, other, other_max, other_sum);
    if (thread_index() < D) p.out[(int64_t)block_index() * D + thread_index()] = sum > 0 ? x / sum : 0;
}

KERNEL(packed_turn_64, PackedParameters, TURN_PACKED_THREADS<64>, 2) {
    follow();
    packed_turn_of<64>(p);
}
KERNEL(packed_turn_128, PackedParameters, TURN_PACKED_THREADS<128>, 2) {
    follow();
    packed_turn_of<128>(p);
}
KERNEL(packed_leave_64, PackedParameters, TURN_PACKED_THREADS<64>, 2) {
    follow();
    packed_leave_of<64>(p);
}
KERNEL(packed_leave_128, PackedParameters, TURN_PACKED_THREADS<128>, 2) {
    follow();
    packed_leave_of<128>(p);
}
KERNEL(packed_finish_64, PackedParameters, FINISH_THREADS, 2) {
    follow();
    packed_finish_of<64>(p);
}
KERNEL(packed_finish_128, PackedParameters, FINISH_THREADS, 2) {
    follow();
    packed_finish_of<128>(p);
}
