// How much would each tile of 16 tokens be attended to, as far as the first four groups of its keys tell?
//
// A warp takes a page at a time: 64 tokens by 32 channels by 8 queries are four products. Lane (g, t), g = lane / 4, t = lane % 4, has group
// t of tokens g and g + 8 of each tile, in units of 16 bytes that it copies four pages ahead to shared memory of its own. A tile's weight
// is the sum of its tokens' 2^score; kept is its logarithm, as a byte in steps of a quarter octave, and how many tiles have which.
// Counts are integers: the pages can be shared out evenly among blocks without a change of the result.
#pragma once

#include "exact.cuh"
#include "levels.cuh"

constexpr int SKETCH_WARPS = 8;
constexpr int SKETCH_THREADS = SKETCH_WARPS * WARP;
constexpr int STAGES = 4;
constexpr int BINS = 256;
// Steps an octave, and the code of a weight of 1: from 2^-36 to 2^28.
constexpr float CODES_PER_OCTAVE = 4;
constexpr int CODE_OF_ONE = 144;
// Runs of a page whose four groups have 4 bits.
constexpr uint32_t ALL_FOUR = 0x2222;
// Added to integers below 2^22 it makes floats of the same value and this.
constexpr uint32_t MAGIC_BITS = 0x4b400000;
constexpr float MAGIC = 12582912.0f;

struct SketchShared {
    uint4 ring[SKETCH_WARPS][STAGES][4][WARP];
    uint32_t ends[MOST_HEADS];
    uint32_t histogram[ROWS][BINS];
    uint4 tables;
};

// The queries of one head as a lane needs them.
struct SketchQueries {
    uint32_t natural[2];  // channels 0 to 3 and 4 to 7 of group t
    uint32_t in_turn[2];  // 0, 4, 1, 5 and 2, 6, 3, 7
    float scale[2], offset[2];  // of columns 2t, 2t + 1
    Tables tables;
};

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

template <int D>
DEVICE SketchQueries sketch_queries(const LayeredParameters& p, int head) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    SketchQueries out;
    // Rows that do not exist have bytes of 0.
    const uint32_t* bytes = p.bytes + ((int64_t)head * ROWS + g) * (D / 4) + 2 * t;
    out.natural[0] = bytes[0];
    out.natural[1] = bytes[1];
    out.in_turn[0] = first_in_turn(bytes[0], bytes[1]);
    out.in_turn[1] = last_in_turn(bytes[0], bytes[1]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = 2 * t + i;
        out.scale[i] = 0;
        out.offset[i] = 0;
        if (row < p.rows) {
            const float* step = p.steps + ((int64_t)head * ROWS + row) * 2;
            out.scale[i] = step[0];
            out.offset[i] = step[1] - known_weight(p, head, row) - MAGIC * step[0];
        }
    }
    return out;
}

// Fragments of two of a page's tiles: rows g and g + 8 by the group's channels, as two summands.
struct TwoTiles {
    uint32_t low[2][2], high[2][2];
    uint32_t more_low[2][2], more_high[2][2];
};

DEVICE void unpack_fours(const Tables& tables, TwoTiles& out, const uint4* units, int half) {
    uint4 unit = units[half * WARP];
    uint32_t words[2][2] = {{unit.x, unit.y}, {unit.z, unit.w}};
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            four_bits(tables, words[i][row], out.low[i][row], out.more_low[i][row]);
            four_bits(tables, words[i][row] >> 16, out.high[i][row], out.more_high[i][row]);
        }
    }
}

// The first two tiles or, `half` 1, the last two; `runs` are those of the lane's group.
DEVICE void unpack_tiles(const Tables& tables, TwoTiles& out, const uint4* units, uint32_t runs, int half) {
    if (runs == 2) {
        unpack_fours(tables, out, units, half);
        return;
    }
    uint4 eights[2] = {};
    if (runs == 4) {
        eights[0] = units[half * 2 * WARP];
        eights[1] = units[(half * 2 + 1) * WARP];
    } else if (runs == 1) {
        uint4 unit = units[0];
        uint32_t words[2] = {half ? unit.z : unit.x, half ? unit.w : unit.y};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            eights[i] = uint4{two_bits(words[0] >> (i * 4)) ^ FLIP, two_bits(words[1] >> (i * 4)) ^ FLIP,
                              two_bits(words[0] >> (i * 4 + 2)) ^ FLIP, two_bits(words[1] >> (i * 4 + 2)) ^ FLIP};
        }
    } else {
        eights[0] = eights[1] = uint4{FLIP, FLIP, FLIP, FLIP};
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        out.low[i][0] = eights[i].x ^ FLIP;
        out.low[i][1] = eights[i].y ^ FLIP;
        out.high[i][0] = eights[i].z ^ FLIP;
        out.high[i][1] = eights[i].w ^ FLIP;
        out.more_low[i][0] = out.more_low[i][1] = out.more_high[i][0] = out.more_high[i][1] = 0;
    }
}

// Of a lane's weights of four tiles and two columns, summed over rows: one tile and column. Lane (g, t) gets tile g / 2, column 2t + g % 2.
DEVICE float sum_rows(const float (&weights)[TILES][2]) {
    int lane = thread_index() % WARP;
    bool last_tiles = lane & 16, odd_tile = lane & 8, odd_column = lane & 4;
    float halved[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int column = 0; column < 2; column++) {
            float kept = last_tiles ? weights[2 + i][column] : weights[i][column];
            float given = last_tiles ? weights[i][column] : weights[2 + i][column];
            halved[i][column] = kept + shuffle_xor(given, 16);
        }
    }
    float quartered[2];
#pragma unroll
    for (int column = 0; column < 2; column++) {
        float kept = odd_tile ? halved[1][column] : halved[0][column];
        float given = odd_tile ? halved[0][column] : halved[1][column];
        quartered[column] = kept + shuffle_xor(given, 8);
    }
    float kept = odd_column ? quartered[1] : quartered[0];
    float given = odd_column ? quartered[0] : quartered[1];
    return kept + shuffle_xor(given, 4);
}

// The runs of the lane's group, of those of a page.
DEVICE uint32_t runs_of_lane(uint32_t page) { return page >> (thread_index() % 4 * 4) & 15; }

// Asks for a page's units of the lane's group; `to` is the lane's place in the stage.
DEVICE void ask_for_page(const uint8_t* from, SharedAddress to, uint32_t leading, uint32_t page) {
    uint32_t runs = runs_of_lane(page);
    // Of the groups before it: a sum of at most three numbers of four bits, in the highest of a product.
    uint32_t before = (page & ((1u << (thread_index() % 4 * 4)) - 1)) * 0x1111 >> 12 & 15;
    from += (int64_t)leading * 64 + before * 128;
    if (runs > 0) copy_later<0, 0>(to, from);
    if (runs > 1) copy_later<WARP * 16, 128>(to, from);
    if (runs > 2) {
        copy_later<2 * WARP * 16, 256>(to, from);
        copy_later<3 * WARP * 16, 384>(to, from);
    }
}

// Adds up a tile's weights of rows `token` and `token + 8`, of which the page has the first `tokens`.
template <bool PLAIN>
DEVICE void weigh_scores(const SketchQueries& q, const int (&scores)[4], int token, int tokens, float (&out)[2]) {
    float of[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        of[i] = exp2_fast(bits_to_float(scores[i]) * q.scale[i % 2] + q.offset[i % 2]);
        if (!PLAIN && token + i / 2 * 8 >= tokens) of[i] = 0;
    }
    out[0] = of[0] + of[2];
    out[1] = of[1] + of[3];
}

// The weight of one of a page's tiles for one column, as `sum_rows` leaves them. PLAIN: all groups have 4 bits, and no token is missing.
template <bool PLAIN>
DEVICE float weigh_page(const SketchQueries& q, const uint4* units, uint32_t page) {
    int g = thread_index() % WARP / 4, tokens = page >> 16;
    uint32_t runs = runs_of_lane(page);
    bool in_turn = PLAIN || runs == 2, fours = PLAIN || (page & ALL_FOUR) != 0;
    uint32_t b0 = in_turn ? q.in_turn[0] : q.natural[0], b1 = in_turn ? q.in_turn[1] : q.natural[1];
    float weights[TILES][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        TwoTiles of;
        if (PLAIN) {
            unpack_fours(q.tables, of, units, half);
        } else {
            unpack_tiles(q.tables, of, units, runs, half);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int scores[4];
            multiply_bytes_from(scores, MAGIC_BITS, of.low[i][0], of.low[i][1], of.high[i][0], of.high[i][1], b0, b1);
            if (fours) multiply_bytes(scores, of.more_low[i][0], of.more_low[i][1], of.more_high[i][0], of.more_high[i][1], b0, b1);
            weigh_scores<PLAIN>(q, scores, (half * 2 + i) * TILE_TOKENS + g, tokens, weights[half * 2 + i]);
        }
    }
    return sum_rows(weights);
}

// The codes of a page's tiles.
DEVICE void sketch_page(const LayeredParameters& p, SketchShared& shared, const SketchQueries& q, const uint4* units, uint32_t page,
                        uint8_t* codes) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    bool plain = (page & 0xffffff) == (ALL_FOUR | PAGE_TOKENS << 16);
    float weight = plain ? weigh_page<true>(q, units, page) : weigh_page<false>(q, units, page);
    int column = 2 * t + g % 2, tile = g / 2;
    // No weight at all has a logarithm that is not finite.
    float steps = log2_fast(weight) * CODES_PER_OCTAVE + CODE_OF_ONE;
    int code = floor_to_int(max_of(0.0f, steps < BINS - 1 ? steps : BINS - 1));
    if (column < p.rows_stored) codes[tile * p.rows_stored + column] = column < p.rows ? code : 0;
    if (column < p.rows && code > 0) add_shared(&shared.histogram[column][code], 1);
}

// Pages `first` to `end` of a head, by one warp.
template <int D>
DEVICE void sketch_pages(const LayeredParameters& p, SketchShared& shared, int index, int first, int end) {
    int lane = thread_index() % WARP, warp = thread_index() / WARP;
    const Head& head = p.heads[index];
    const uint2* pages = reinterpret_cast<const uint2*>(head.pages);
    const uint8_t* from = head.leading + lane / 4 * 16;
    SharedAddress ring = shared_address(&shared.ring[warp][0][0][lane]);
    uint8_t* codes = p.codes + ((int64_t)index * p.tile_stride + (int64_t)first * TILES) * p.rows_stored;
    // Lane i has what describes page i of 32, and of the 32 after those.
    auto describe = [&](int at) { return at + lane < end ? pages[at + lane] : uint2{0, 0}; };
    uint2 now = describe(first), next = describe(first + WARP);
    auto ask = [&](int i) {
        bool later = i / WARP != 0;
        uint32_t leading = shuffle(later ? next.x : now.x, i % WARP), page = shuffle(later ? next.y : now.y, i % WARP);
        ask_for_page(from, ring + i % STAGES * int(sizeof(shared.ring[0][0])), leading, page);
        copies_end_group();
    };
    for (int i = 0; i < STAGES - 1; i++) ask(i);
    // Meanwhile.
    SketchQueries queries = sketch_queries<D>(p, index);
    queries.tables = read_tables(shared.tables);
    for (int start = first; start < end; start += WARP) {
        for (int i = 0; i < WARP && start + i < end; i++) {
            wait_for_copies<STAGES - 2>();
            sketch_page(p, shared, queries, &shared.ring[warp][i % STAGES][0][lane], shuffle(now.y, i), codes);
            codes += TILES * p.rows_stored;
            ask(i + STAGES - 1);
        }
        now = next;
        next = describe(start + 2 * WARP);
    }
    wait_for_copies<0>();
}

// Whether a head's tiles are chosen, or all read.
DEVICE bool chooses(const LayeredParameters& p, const Head& head) {
    return head.selectable > 0 && head.page_count * PAGE_TOKENS >= p.selection.from_tokens;
}

template <int D>
DEVICE void sketch_of(const LayeredParameters& p) {
    auto& shared = *reinterpret_cast<SketchShared*>(shared_memory());
    int heads = p.sequences * p.kv_heads, warp = thread_index() / WARP;
    count_parts(shared.ends, heads, [&](int i) { return chooses(p, p.heads[i]) ? p.heads[i].selectable : 0; });
    for (int at = thread_index(); at < ROWS * BINS; at += SKETCH_THREADS) (&shared.histogram[0][0])[at] = 0;
    if (thread_index() == 0) write_tables(shared.tables);
    sync_block();
    // An even share of all pages, which may be of several heads.
    int64_t all = shared.ends[heads - 1];
    uint32_t from = all * block_index() / grid_blocks(), to = all * (block_index() + 1) / grid_blocks();
    while (from < to) {
        int index = head_of(shared.ends, heads, from);
        uint32_t before = index > 0 ? shared.ends[index - 1] : 0;
        uint32_t end = shared.ends[index] < to ? shared.ends[index] : to;
        int count = end - from, first = from - before + (int64_t)count * warp / SKETCH_WARPS;
        int last = from - before + (int64_t)count * (warp + 1) / SKETCH_WARPS;
        if (first < last) sketch_pages<D>(p, shared, index, first, last);
        sync_block();
        for (int at = thread_index(); at < p.rows * BINS; at += SKETCH_THREADS) {
            uint32_t& of_bin = (&shared.histogram[0][0])[at];
            if (of_bin != 0) add_global(&p.histogram[(int64_t)index * ROWS * BINS + at], of_bin);
            of_bin = 0;
        }
        sync_block();
        from = end;
    }
}

KERNEL(layered_sketch_64, LayeredParameters, SKETCH_THREADS, 3) {
    follow();
    sketch_of<64>(p);
}
KERNEL(layered_sketch_128, LayeredParameters, SKETCH_THREADS, 3) {
    follow();
    sketch_of<128>(p);
}
