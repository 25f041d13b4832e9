// How much would each tile of 16 tokens be attended to, as far as the first four groups of its keys tell?
//
// A warp copies pages ahead to shared memory of its own, where lane (g, t), g = lane / 4, t = lane % 4, finds group t of tokens g and g + 8
// of each tile in units of 16 bytes. 16 tokens by 32 channels by 8 queries are a product (`Wide`); up to 4 queries leave half of its columns
// empty, and there two tiles share one, 16 channels of each at a time, so that two pages take as many sums as one does
// otherwise (`Narrow`). A tile's weight is the sum of its tokens' 2^score; kept is its logarithm, as a byte in steps of a
// quarter octave, and how many tiles have which. Counts are integers: the pages can be shared out evenly among blocks without a change of the result.
#pragma once

#include "exact.cuh"
#include "levels.cuh"

constexpr int SKETCH_WARPS = 4;
constexpr int SKETCH_THREADS = SKETCH_WARPS * WARP;
// Of what lies apart of a page.
constexpr int RUN = 128;
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
    uint32_t ends[MOST_HEADS];
    uint4 tables;
    // [rows_stored, BINS], then for each warp what it asks for ahead: [sketch_stages, pages of a round, page_runs, RUN].
    alignas(128) uint32_t histogram[1];
};

// How wide the groups of a round's pages are. But for `Any` no token is missing.
enum class Widths { Fours, FoursOrEights, Any };
// What the highest byte of a page's word says, of pages in which no token is missing; how many runs there are is below.
constexpr uint32_t ONLY_FOURS = 1u << 31, FOURS_OR_EIGHTS = 1u << 30;
DEVICE uint32_t widths_of_page(uint32_t page) {
    if ((page >> 16 & 0xff) != PAGE_TOKENS) return 0;
    bool fours = (page & 0xffff) == ALL_FOUR, either = (page & 0x9999) == 0 && ((page ^ page >> 1) & ALL_FOUR) == ALL_FOUR;
    return (fours ? ONLY_FOURS : 0) | (either ? FOURS_OR_EIGHTS : 0);
}

// Up to 8 rows: columns of a product are rows, four products are a page's tiles.
struct Wide {
    static constexpr int PAGES = 1;
};
DEVICE int row_of(Wide, int column) { return column; }
// Of column `column` of sum `sum`: the tile, of those of a round.
DEVICE int tile_of(Wide, int sum, int) { return sum; }

// Up to 4: columns 4 to 7 are the same rows and another tile, four products are two pages' tiles.
struct Narrow {
    static constexpr int PAGES = 2;
};
DEVICE int row_of(Narrow, int column) { return column % 4; }
DEVICE int tile_of(Narrow, int sum, int column) { return 2 * sum + column / 4; }

// Four sums of a round: 16 tokens and 8 columns each.
constexpr int SUMS = 4;

// The queries of one head as a lane needs them.
struct SketchQueries {
    uint32_t in_turn[2];  // channels 0, 4, 1, 5 and 2, 6, 3, 7 of group t
    float scale[2], offset[2];  // of columns 2t, 2t + 1
};

template <int D, class Way>
DEVICE SketchQueries sketch_queries(const LayeredParameters& p, int head) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    SketchQueries out;
    // Rows that do not exist have bytes of 0.
    const uint32_t* bytes = p.bytes + ((int64_t)head * ROWS + row_of(Way(), g)) * (D / 4) + 2 * t;
    out.in_turn[0] = first_in_turn(bytes[0], bytes[1]);
    out.in_turn[1] = last_in_turn(bytes[0], bytes[1]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = row_of(Way(), 2 * t + i);
        out.scale[i] = 0;
        out.offset[i] = 0;
        if (row < p.rows) {
            const float* step = p.steps + ((int64_t)head * ROWS + row) * STEP;
            out.scale[i] = step[0];
            out.offset[i] = step[1] - step[2] - MAGIC * step[0];
        }
    }
    return out;
}

// Fragments of two of a page's tiles: rows g and g + 8 by the group's channels, as two summands.
struct TwoTiles {
    uint32_t low[2][2], high[2][2];
    uint32_t more_low[2][2], more_high[2][2];
};

DEVICE void unpack_fours(const Tables& tables, TwoTiles& out, const uint4& unit) {
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

// Where unit `g` of run `run` of a page is. Units change places within a run, so that lanes that read together use all banks.
DEVICE int unit_at(int run, int g) { return run * RUN + (g ^ (run & 6)) * 16; }

// Two tiles of a lane's group from `run` on, which has 8 bits or 4, without a branch.
DEVICE void unpack_either(const Tables& tables, TwoTiles& out, const uint8_t* bytes, int run, bool eight, int half) {
    int g = thread_index() % WARP / 4, first = run + (eight ? 2 * half : half), second = eight ? first + 1 : first;
    uint4 units[2] = {*reinterpret_cast<const uint4*>(bytes + unit_at(first, g)), *reinterpret_cast<const uint4*>(bytes + unit_at(second, g))};
    unpack_fours(tables, out, uint4{units[0].x, units[0].y, units[1].z, units[1].w});
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t words[4] = {units[i].x, units[i].y, units[i].z, units[i].w};
#pragma unroll
        for (int row = 0; row < 2; row++) {
            out.low[i][row] = eight ? words[row] ^ FLIP : out.low[i][row];
            out.high[i][row] = eight ? words[2 + row] ^ FLIP : out.high[i][row];
            out.more_low[i][row] = eight ? 0 : out.more_low[i][row];
            out.more_high[i][row] = eight ? 0 : out.more_high[i][row];
        }
    }
}

// The first two tiles or, `half` 1, the last two; the lane's group has `runs` from `run` on.
DEVICE void unpack_tiles(const Tables& tables, TwoTiles& out, const uint8_t* bytes, int run, uint32_t runs, int half) {
    int g = thread_index() % WARP / 4;
    auto unit_of = [&](int more) { return *reinterpret_cast<const uint4*>(bytes + unit_at(run + more, g)); };
    if (runs == 2) {
        unpack_fours(tables, out, unit_of(half));
        return;
    }
    uint4 eights[2] = {};
    if (runs == 4) {
        eights[0] = unit_of(half * 2);
        eights[1] = unit_of(half * 2 + 1);
    } else if (runs == 1) {
        uint4 unit = unit_of(0);
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

// Of a lane's weights of four sums and two columns, summed over tokens: one sum and column. Lane (g, t) gets sum g / 2, column 2t + g % 2.
DEVICE float sum_rows(const float (&weights)[SUMS][2]) {
    int lane = thread_index() % WARP;
    bool last_sums = lane & 16, odd_sum = lane & 8, odd_column = lane & 4;
    float halved[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int column = 0; column < 2; column++) {
            float kept = last_sums ? weights[2 + i][column] : weights[i][column];
            float given = last_sums ? weights[i][column] : weights[2 + i][column];
            halved[i][column] = kept + shuffle_xor(given, 16);
        }
    }
    float quartered[2];
#pragma unroll
    for (int column = 0; column < 2; column++) {
        float kept = odd_sum ? halved[1][column] : halved[0][column];
        float given = odd_sum ? halved[0][column] : halved[1][column];
        quartered[column] = kept + shuffle_xor(given, 8);
    }
    float kept = odd_column ? quartered[1] : quartered[0];
    float given = odd_column ? quartered[0] : quartered[1];
    return kept + shuffle_xor(given, 4);
}

// Of a page's runs: those of the lane's group, of the groups before it, and all.
DEVICE uint32_t runs_of_lane(uint32_t page) { return page >> (thread_index() % 4 * 4) & 15; }
DEVICE uint32_t runs_before_lane(uint32_t page) {
    // A sum of at most three numbers of four bits, in the highest of a product.
    return (page & ((1u << (thread_index() % 4 * 4)) - 1)) * 0x1111 >> 12 & 15;
}
DEVICE uint32_t runs_of_page(uint32_t page) { return (page & 15) + (page >> 4 & 15) + (page >> 8 & 15) + (page >> 12 & 15); }

// Asks for `runs` runs from `from` on, which is a lane's own; `to` is the page's place.
DEVICE void ask_for_page(const uint8_t* from, SharedAddress to, int runs) {
    int lane = thread_index() % WARP, run = lane / 8;
    SharedAddress even = to + unit_at(run, lane % 8), odd = to + unit_at(run + 4, lane % 8) - 4 * RUN;
    if (run < runs) copy_later<0, 0>(even, from);
    if (run + 4 < runs) copy_later<4 * RUN, 4 * RUN>(odd, from);
    if (runs <= 8) return;
    if (run + 8 < runs) copy_later<8 * RUN, 8 * RUN>(even, from);
    if (run + 12 < runs) copy_later<12 * RUN, 12 * RUN>(odd, from);
}

// Adds up the weights of a sum's rows `token` and `token + 8`, of which the page has the first `tokens`, or all.
template <bool ALL>
DEVICE void weigh_scores(const SketchQueries& q, const int (&scores)[4], int token, int tokens, float (&out)[2]) {
    float of[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        of[i] = exp2_fast(bits_to_float(scores[i]) * q.scale[i % 2] + q.offset[i % 2]);
        if (!ALL && token + i / 2 * 8 >= tokens) of[i] = 0;
    }
    out[0] = of[0] + of[2];
    out[1] = of[1] + of[3];
}

// Scores of two tiles: two sums.
DEVICE void score_tiles(Wide, const TwoTiles& of, bool fours, uint32_t b0, uint32_t b1, int (&scores)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        multiply_bytes_from(scores[i], MAGIC_BITS, of.low[i][0], of.low[i][1], of.high[i][0], of.high[i][1], b0, b1);
        if (fours) multiply_bytes(scores[i], of.more_low[i][0], of.more_low[i][1], of.more_high[i][0], of.more_high[i][1], b0, b1);
    }
}

// Or one, with half of the channels first.
DEVICE void score_tiles(Narrow, const TwoTiles& of, bool fours, uint32_t b0, uint32_t b1, int (&scores)[1][4]) {
    bool first = thread_index() % WARP < WARP / 2;
    uint32_t low[2] = {first ? b0 : 0, first ? 0 : b0}, high[2] = {first ? b1 : 0, first ? 0 : b1};
    multiply_bytes_from(scores[0], MAGIC_BITS, of.low[0][0], of.low[0][1], of.low[1][0], of.low[1][1], low[0], low[1]);
    multiply_bytes(scores[0], of.high[0][0], of.high[0][1], of.high[1][0], of.high[1][1], high[0], high[1]);
    if (!fours) return;
    multiply_bytes(scores[0], of.more_low[0][0], of.more_low[0][1], of.more_low[1][0], of.more_low[1][1], low[0], low[1]);
    multiply_bytes(scores[0], of.more_high[0][0], of.more_high[0][1], of.more_high[1][0], of.more_high[1][1], high[0], high[1]);
}

// The weight of one of a round's tiles for one row, as `sum_rows` leaves them.
template <class Way, Widths WIDTHS>
DEVICE float weigh_round(const Tables& tables, const SketchQueries& q, const uint8_t* bytes, int page_bytes,
                         const uint32_t (&pages)[Way::PAGES]) {
    constexpr int OF_HALF = SUMS / Way::PAGES / 2;
    int g = thread_index() % WARP / 4, t = thread_index() % 4;
    float weights[SUMS][2];
#pragma unroll
    for (int i = 0; i < Way::PAGES; i++) {
        uint32_t page = pages[i], runs = runs_of_lane(page);
        int before = runs_before_lane(page), tokens = page >> 16 & 0xff;
        bool in_turn = WIDTHS == Widths::Fours || runs == 2, fours = WIDTHS != Widths::Any || (page & ALL_FOUR) != 0;
        // Elsewhere channels 0 to 3 and 4 to 7.
        uint32_t b0 = in_turn ? q.in_turn[0] : pick_bytes(q.in_turn[0], q.in_turn[1], 0x6420);
        uint32_t b1 = in_turn ? q.in_turn[1] : pick_bytes(q.in_turn[0], q.in_turn[1], 0x7531);
        const uint8_t* of_page = bytes + i * page_bytes;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            TwoTiles of;
            if (WIDTHS == Widths::Fours) {
                unpack_fours(tables, of, *reinterpret_cast<const uint4*>(of_page + unit_at(2 * t, g) + half * RUN));
            } else if (WIDTHS == Widths::FoursOrEights) {
                unpack_either(tables, of, of_page, before, runs == 4, half);
            } else {
                unpack_tiles(tables, of, of_page, before, runs, half);
            }
            int scores[OF_HALF][4];
            score_tiles(Way(), of, fours, b0, b1, scores);
#pragma unroll
            for (int j = 0; j < OF_HALF; j++) {
                int sum = (i * 2 + half) * OF_HALF + j;
                int token = (tile_of(Way(), sum, 2 * t) - i * TILES) * TILE_TOKENS + g;
                weigh_scores<WIDTHS != Widths::Any>(q, scores[j], token, tokens, weights[sum]);
            }
        }
    }
    return sum_rows(weights);
}

// The codes of the tiles of a round's pages, of which at most `left` exist.
template <class Way>
DEVICE void sketch_round(const LayeredParameters& p, SketchShared& shared, const SketchQueries& q, const uint8_t* bytes,
                         const uint32_t (&pages)[Way::PAGES], int left, uint8_t* codes) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4, page_bytes = p.page_runs * RUN;
    uint32_t all = pages[0];
#pragma unroll
    for (int i = 1; i < Way::PAGES; i++) all &= pages[i];
    bool fours = all & ONLY_FOURS, either = all & FOURS_OR_EIGHTS;
    Tables tables = read_tables(shared.tables);
    float weight = fours    ? weigh_round<Way, Widths::Fours>(tables, q, bytes, page_bytes, pages)
                   : either ? weigh_round<Way, Widths::FoursOrEights>(tables, q, bytes, page_bytes, pages)
                            : weigh_round<Way, Widths::Any>(tables, q, bytes, page_bytes, pages);
    int column = 2 * t + g % 2, row = row_of(Way(), column), tile = tile_of(Way(), g / 2, column);
    // No weight at all has a logarithm that is not finite.
    float steps = log2_fast(weight) * CODES_PER_OCTAVE + CODE_OF_ONE;
    int code = floor_to_int(max_of(0.0f, steps < BINS - 1 ? steps : BINS - 1));
    if (row < p.rows_stored && tile < left * TILES) codes[tile * p.rows_stored + row] = row < p.rows ? code : 0;
    if (row < p.rows && code > 0) add_shared(&shared.histogram[row * BINS + code], 1);
}

// Until all but the newest `stages - 1` rounds that were asked for are there.
DEVICE void wait_for_round(int stages) {
    if (stages > 3) {
        wait_for_copies<3>();
    } else if (stages > 2) {
        wait_for_copies<2>();
    } else {
        wait_for_copies<1>();
    }
    sync_warp();
}

// Of pages `first` to `end` of a head, both even, those of one warp: every fourth round of them. The last page may not exist.
template <int D, class Way>
DEVICE void sketch_pages(const LayeredParameters& p, SketchShared& shared, int index, int first, int end) {
    constexpr int PAGES = Way::PAGES;
    int lane = thread_index() % WARP, warp = thread_index() / WARP;
    const Head& head = p.heads[index];
    const uint2* described = reinterpret_cast<const uint2*>(head.pages);
    int selectable = head.selectable, page_bytes = p.page_runs * RUN;
    const uint8_t* from = head.leading + lane * 16;
    const uint8_t* ring = reinterpret_cast<const uint8_t*>(shared.histogram + p.rows_stored * BINS) + warp * p.sketch_stages * PAGES * page_bytes;
    SharedAddress room = shared_address(ring);
    auto place = [&](int i) { return first + (i / PAGES * SKETCH_WARPS + warp) * PAGES + i % PAGES; };
    // Lane i has what describes the warp's page i of 32, and of the 32 after those; the highest byte gets how many runs there are and how wide.
    auto describe = [&](int at) {
        int page = place(at + lane);
        if (page >= end || page >= selectable) return uint2{0, 0};
        uint2 x = described[page];
        return uint2{x.x, (x.y & 0xffffff) | runs_of_page(x.y) << 24 | widths_of_page(x.y)};
    };
    uint2 now = describe(0), next = describe(WARP);
    // `in` is the round of those of the first 32 pages.
    auto ask = [&](int in, int stage) {
#pragma unroll
        for (int i = 0; i < PAGES; i++) {
            int at = in * PAGES + i;
            bool later = at / WARP != 0;
            uint32_t leading = shuffle(later ? next.x : now.x, at % WARP), page = shuffle(later ? next.y : now.y, at % WARP);
            ask_for_page(from + (int64_t)leading * 64, room + (stage * PAGES + i) * page_bytes, page >> 24 & 63);
        }
        copies_end_group();
    };
#pragma unroll 1
    for (int round = 0; round < p.sketch_stages; round++) ask(round, round);
    follow();
    SketchQueries queries = sketch_queries<D, Way>(p, index);
    for (int done = 0, stage = 0; place(done) < end; done += PAGES) {
        int in = done % WARP / PAGES;
        wait_for_round(p.sketch_stages);
        uint32_t pages[PAGES];
#pragma unroll
        for (int i = 0; i < PAGES; i++) pages[i] = shuffle(now.y, in * PAGES + i);
        int page = place(done);
        sketch_round<Way>(p, shared, queries, ring + stage * PAGES * page_bytes, pages, selectable - page,
                          p.codes + ((int64_t)index * p.tile_stride + page * TILES) * p.rows_stored);
        // Others may still read what is asked for anew.
        sync_warp();
        ask(in + p.sketch_stages, stage);
        stage = stage + 1 < p.sketch_stages ? stage + 1 : 0;
        if (in == WARP / PAGES - 1) {
            now = next;
            next = describe(done + PAGES + WARP);
        }
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
    int heads = p.sequences * p.kv_heads;
    count_parts(shared.ends, heads, [&](int i) { return chooses(p, p.heads[i]) ? (p.heads[i].selectable + 1) / 2 * 2 : 0; });
    for (int at = thread_index(); at < p.rows_stored * BINS; at += SKETCH_THREADS) shared.histogram[at] = 0;
    if (thread_index() == 0) write_tables(shared.tables);
    sync_block();
    // An even share of all pairs of pages, which may be of several heads.
    int64_t all = shared.ends[heads - 1] / 2;
    uint32_t from = all * block_index() / grid_blocks() * 2, to = all * (block_index() + 1) / grid_blocks() * 2;
    while (from < to) {
        int index = head_of(shared.ends, heads, from);
        uint32_t before = index > 0 ? shared.ends[index - 1] : 0;
        uint32_t end = shared.ends[index] < to ? shared.ends[index] : to;
        if (p.rows > 4) {
            sketch_pages<D, Wide>(p, shared, index, from - before, end - before);
        } else {
            sketch_pages<D, Narrow>(p, shared, index, from - before, end - before);
        }
        sync_block();
        for (int at = thread_index(); at < p.rows * BINS; at += SKETCH_THREADS) {
            uint32_t& of_bin = shared.histogram[at];
            if (of_bin != 0) add_global(&p.histogram[(int64_t)index * ROWS * BINS + at], of_bin);
            of_bin = 0;
        }
        sync_block();
        from = end;
    }
    // A block without pages waits too, so that who follows this launch follows the one before it.
    follow();
}

// As many blocks as a multiprocessor has shared memory for: more registers would do nothing for Hopper, fewer spill on Ampere.
#if __CUDA_ARCH__ >= 900
constexpr int SKETCH_BLOCKS = 5;
#else
constexpr int SKETCH_BLOCKS = 3;
#endif

KERNEL(layered_sketch_64, LayeredParameters, SKETCH_THREADS, SKETCH_BLOCKS) { sketch_of<64>(p); }
KERNEL(layered_sketch_128, LayeredParameters, SKETCH_THREADS, SKETCH_BLOCKS) { sketch_of<128>(p); }
