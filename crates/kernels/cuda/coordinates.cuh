// How do exact keys and values enter the channels of layered pages? To the bit as `coordinates` in the cache's `layered.rs` has them: each
// element a sum in the order of the channels, of multiply-adds, less a mean and times the inverse of a spread.
//
// One block for 64 tokens' keys or values.
#pragma once

#include "encode.cuh"

constexpr int COORDINATES_THREADS = 256;

struct CoordinatesParameters {
    const uint16_t* pool;      // [pages, G, 2, 64, D]
    const uint32_t* table;     // the sequence's pages
    const uint32_t* order;     // [T]: which of the sequence's tokens come, `first` added
    const uint16_t* matrices;  // [2, D, D]: keys', values'
    const float* scales;       // [2, 2, D]: of keys and of values means, and 1 over spreads
    float* out;                // [2, T, D]
    int32_t tokens, first;
    uint16_t kv_heads, head;
    uint32_t unused;
};

template <int D>
struct CoordinatesShared {
    float vectors[D][PAGE_TOKENS];
    uint2 matrix[D][D / 4];  // f16
};

template <int D>
DEVICE void coordinates_of(const CoordinatesParameters& p) {
    // Of each thread four channels of some tokens.
    constexpr int LANES = D / 4, TOKENS = PAGE_TOKENS * LANES / COORDINATES_THREADS;
    auto& shared = *reinterpret_cast<CoordinatesShared<D>*>(shared_memory());
    int blocks = (p.tokens + PAGE_TOKENS - 1) / PAGE_TOKENS, half = block_index() / blocks;
    int first = block_index() % blocks * PAGE_TOKENS, thread = thread_index();
    const uint2* matrix = reinterpret_cast<const uint2*>(p.matrices + half * D * D);
    for (int at = thread; at < D * D / 4; at += COORDINATES_THREADS) shared.matrix[at / LANES][at % LANES] = matrix[at];
    for (int at = thread; at < PAGE_TOKENS * D / 8; at += COORDINATES_THREADS) {
        int token = at % PAGE_TOKENS, channel = at / PAGE_TOKENS * 8;
        uint4 eight = {0, 0, 0, 0};
        if (first + token < p.tokens) {
            uint32_t place = p.order[first + token] + p.first;
            int64_t row = (((int64_t)p.table[place / PAGE_TOKENS] * p.kv_heads + p.head) * 2 + half) * PAGE_TOKENS + place % PAGE_TOKENS;
            eight = *reinterpret_cast<const uint4*>(p.pool + row * D + channel);
        }
        uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 8; i++) shared.vectors[channel + i][token] = half_to_float(words[i / 2] >> (i % 2 * 16) & 0xffff);
    }
    sync_block();
    int channel = thread % LANES * 4, from = thread / LANES * TOKENS;
    float sums[TOKENS][4] = {};
#pragma unroll 4
    for (int i = 0; i < D; i++) {
        uint2 of_row = shared.matrix[i][channel / 4];
        float row[4] = {half_to_float(of_row.x & 0xffff), half_to_float(of_row.x >> 16), half_to_float(of_row.y & 0xffff),
                        half_to_float(of_row.y >> 16)};
#pragma unroll
        for (int t = 0; t < TOKENS; t += 4) {
            float4 four = *reinterpret_cast<const float4*>(&shared.vectors[i][from + t]);
            float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 16; j++) sums[t + j / 4][j % 4] = multiply_add(x[j / 4], row[j % 4], sums[t + j / 4][j % 4]);
        }
    }
    const float *means = p.scales + half * 2 * D + channel, *inverses = means + D;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        if (first + from + t >= p.tokens) break;
        float x[4];
#pragma unroll
        for (int c = 0; c < 4; c++) x[c] = product(sums[t][c] - means[c], inverses[c]);
        float* to = p.out + ((int64_t)half * p.tokens + first + from + t) * D + channel;
        *reinterpret_cast<float4*>(to) = float4{x[0], x[1], x[2], x[3]};
    }
}

KERNEL(layered_coordinates_64, CoordinatesParameters, COORDINATES_THREADS, 4) {
    follow();
    coordinates_of<64>(p);
}
KERNEL(layered_coordinates_128, CoordinatesParameters, COORDINATES_THREADS, 3) {
    follow();
    coordinates_of<128>(p);
}
