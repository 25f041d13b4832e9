// Who does what? Parts of heads of any lengths, shared out among a fixed number of blocks.
//
// How a head is cut follows from its own length alone, so that what a sequence gets does not depend on who runs beside it.
#pragma once

#include "parameters.cuh"

DEVICE int parts_unit(int length, int slots, int least, int unit) {
    int even = (length + slots - 1) / slots;
    return max_of(least, (even + unit - 1) / unit * unit);
}

// Parts that a head of `length` is cut into, at most `slots`, of at least `least` but for the last, whole `unit`s.
DEVICE int parts_of(int length, int slots, int least, int unit) {
    int part = parts_unit(length, slots, least, unit);
    return (length + part - 1) / part;
}

// What threads before this one have, and `all` together; by one whole block of WARPS warps, each of which has one of `totals`.
template <int WARPS>
DEVICE uint32_t block_before(uint32_t (&totals)[WARPS], uint32_t x, uint32_t& all) {
    uint32_t upto = warp_sum_upto(x);
    sync_block();
    if (thread_index() % WARP == WARP - 1) totals[thread_index() / WARP] = upto;
    sync_block();
    uint32_t before = 0;
    all = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        if (warp < thread_index() / WARP) before += totals[warp];
        all += totals[warp];
    }
    return before + upto - x;
}

// Where heads' parts end when all are counted: `ends[i]` of the first `i + 1` heads. By one whole block; `count` at most
// MOST_HEADS.
template <class F>
DEVICE void count_parts(uint32_t* ends, int count, F parts) {
    if (thread_index() < WARP) {
        uint32_t before = 0;
#pragma unroll 1
        for (int first = 0; first < count; first += WARP) {
            int i = first + thread_index();
            uint32_t sum = before + warp_sum_upto<uint32_t>(i < count ? parts(i) : 0);
            if (i < count) ends[i] = sum;
            before = shuffle(sum, WARP - 1);
        }
    }
    sync_block();
}

// The head that has part `item` of all.
DEVICE int head_of(const uint32_t* ends, int count, uint32_t item) {
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (item < ends[middle]) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}
