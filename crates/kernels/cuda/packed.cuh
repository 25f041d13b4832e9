// What do packed pages look like, and how is a packed vector met without unpacking it to memory?
//
// A page (`src/packed.rs`) has room for 512 tokens of one segment: the block keys' elements and bitmaps, then each token block's, which are one
// run of whole 16 bytes. Only a segment's last page is not full, and what lies behind its last block may be anything.
//
// Sixteen vectors at a time are copied to shared memory as they are. Products are those of tensor cores on dense vectors, and each lane makes
// its part of their fragments by itself: it has a run of channels of a vector, whose bits it walks over, taking the next element
// where one is set. Which channel is which column of a product is free as long as both sides agree; so a lane's run is in one piece, of keys a quarter
// of a vector for each of two, of values an eighth for each of four. Where the first element of a run is follows from the bits of the other lanes'.
//
// Queries are split into two halves, of which the second has what the first rounds away: scores are as good as those of f32.
#pragma once

#include "exact.cuh"

constexpr int PACKED_PAGE_TOKENS = 512;
// Segments and slices of a head at most.
constexpr int MOST_SEGMENTS = 256;
constexpr int MOST_SLICES = 512;
// Keys of blocks, by which they are chosen, have two digits.
constexpr int DIGIT_BITS = 11;
constexpr int DIGITS = 1 << DIGIT_BITS;

// How a segment's vectors are packed.
struct PackedStrategy {
    uint16_t kept;       // elements of a vector
    uint8_t group_bits;  // logarithm of how many channels are kept together
    uint8_t block_bits;  // logarithm of a block's tokens
};

// A run of a head's tokens that are packed alike, C = 3 / 4 D channels of each vector.
struct PackedSegment {
    const uint16_t* query_rotation;   // [D, C], f16
    const uint16_t* output_rotation;  // [C, D]
    uint32_t first_page, first_block; // among the head's
    uint32_t blocks;
    PackedStrategy strategy;
};

// A run of a segment's pages, whose block keys are scored by one block of threads.
struct PackedSlice {
    uint32_t segment;
    uint32_t first_page, first_block;  // among the head's
    uint32_t blocks;
};

struct PackedHead {
    uint32_t segments, slices, blocks, tokens;
};

// What a step reads of a segment: entries of the list, and the parts into which they are cut.
struct PackedRun {
    uint32_t first, count;
    uint32_t first_part, parts;
};

// What a step reads of a head.
struct PackedPlan {
    uint32_t parts;
    uint32_t part_tokens;
};

// Which keys are chosen: those over the first digit `digit`, which hold `over` tokens, and some of those with it.
struct PackedCut {
    uint32_t digit, over;
};

// A step over packed heads. What is not said to be `const` it writes itself.
struct PackedParameters {
    const PackedHead* heads;          // [B * G]
    const PackedSegment* segments;    // [B * G, segment_stride]
    const PackedSlice* slices;        // [B * G, slice_stride]
    const uint64_t* pages;            // [B * G, page_stride], addresses
    const uint16_t* queries;          // [B, G, R, D], f16
    States exact;                     // of tokens that are attended to without pages; `slots` is 0 if there are none
    const uint32_t* exact_lengths;    // [B]
    uint16_t* turned;                 // [B * G, segment_stride, C / 16, 32, 8]: queries in the segments' channels, as fragments
    float* scores;                    // [B * G, block_stride, rows_stored]
    float* sums;                      // [B * G, slice_stride, 8, 2]: of a slice's weights maximum and sum
    uint32_t* keys;                   // [B * G, block_stride]
    uint32_t* histogram;              // [B * G, DIGITS]: tokens of blocks whose keys have a first digit; zeros before and after a step
    uint32_t* candidates;             // [B * G, block_stride]: slice and last digit of the keys at the cut, in no order
    uint32_t* candidate_counts;       // [B * G]; zeros before and after a step
    uint32_t* over;                   // [B * G, slice_stride]: blocks over the cut
    PackedCut* cuts;                  // [B * G]
    uint32_t* list;                   // [B * G, list_stride]: blocks to read, among the head's
    PackedRun* runs;                  // [B * G, segment_stride]
    PackedPlan* plans;                // [B * G]
    States states;                    // of parts, C channels
    States left;                      // of segments, D channels
    float* out;                       // [B, G, R, D]
    float scale;                      // of scores, log2(e) included
    float selected;                   // share of tokens that are read; from 1 on: all, without a list
    int32_t sequences, kv_heads, rows, rows_stored;
    int32_t segment_stride, slice_stride, page_stride, block_stride, list_stride;
    int32_t score_slot, attend_slot;  // bytes of sixteen block keys, and of sixteen tokens' blocks, and 16 more, multiples of 16
    int32_t least_part;               // tokens, a multiple of 16
    int32_t exact_least_part;         // tokens
    int32_t selecting;                // blocks of threads that choose among a head's blocks
};

// A strategy in bytes.
struct PackedLayout {
    int group_bits, block_bits;
    int row_bytes;     // elements of a vector
    int bitmap_bytes;  // of a vector
    int block_bytes;   // of a block's keys and values
    int key_bytes;     // of a page's block keys
};

template <int C>
DEVICE PackedLayout layout_of(const PackedStrategy& of) {
    PackedLayout out;
    out.group_bits = of.group_bits;
    out.block_bits = of.block_bits;
    out.row_bytes = 2 * of.kept;
    out.bitmap_bytes = ((C >> of.group_bits) + 7) / 8;
    int of_vector = out.row_bytes + out.bitmap_bytes;
    out.block_bytes = ((2 * of_vector << of.block_bits) + 15) / 16 * 16;
    out.key_bytes = of_vector * (PACKED_PAGE_TOKENS >> of.block_bits);
    return out;
}

// Blocks of a page, as a logarithm.
DEVICE int page_bits(const PackedLayout& layout) { return 9 - layout.block_bits; }

// A packed vector in a slot of shared memory: its elements, and the first bit of its bitmap, counted from the slot's start. Vectors that do not
// exist are zeros.
struct PackedRow {
    SharedAddress elements;
    int bit;
    bool exists;
};

DEVICE PackedRow row_at(const unsigned char* slot, int elements, int bitmap, bool exists) {
    return PackedRow{shared_address(slot + elements), bitmap * 8, exists};
}

// Each of the lowest bits 1, 2 or 4 times: 32 bits in all.
DEVICE uint32_t spread(uint32_t bits, int group_bits) {
    if (group_bits == 0) return bits;
    if (group_bits == 1) {
        bits &= 0xffff;
        bits = (bits | bits << 8) & 0x00ff00ff;
        bits = (bits | bits << 4) & 0x0f0f0f0f;
        bits = (bits | bits << 2) & 0x33333333;
        bits = (bits | bits << 1) & 0x55555555;
        return bits * 3;
    }
    bits &= 0xff;
    bits = (bits | bits << 12) & 0x000f000f;
    bits = (bits | bits << 6) & 0x03030303;
    bits = (bits | bits << 3) & 0x11111111;
    return bits * 15;
}

// Which of a vector's channels `first` to `first + COUNT` are kept.
template <int COUNT>
DEVICE uint32_t kept_of(const unsigned char* slot, const PackedRow& row, int first, int group_bits) {
    if (!row.exists) return 0;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(slot);
    int bit = row.bit + (first >> group_bits);
    uint32_t bits = spread(shift_right(words[bit / 32], words[bit / 32 + 1], bit), group_bits);
    return bits >> (first & ((1 << group_bits) - 1)) & ((1u << COUNT) - 1);
}

// What the lanes have that come before this one among those that differ in the bits from `FROM` to below `TO`.
template <int FROM, int TO>
DEVICE uint32_t sum_before(uint32_t x) {
    uint32_t before = 0;
#pragma unroll
    for (int mask = FROM; mask < TO; mask *= 2) {
        uint32_t other = shuffle_xor(x, mask);
        if (thread_index() & mask) before += other;
        x += other;
    }
    return before;
}

// Queries in a segment's channels as the products' second matrix: of lane (g, t) row g, four channels of each 16 of its quarter; x and y are the
// numbers as f16, z and w what that rounds away.
template <int C>
struct PackedQueries {
    uint4 of[C / 16];
};

template <int C>
DEVICE PackedQueries<C> queries_of(const PackedParameters& p, int head, int segment) {
    const uint4* turned = reinterpret_cast<const uint4*>(p.turned) + ((int64_t)head * p.segment_stride + segment) * (C / 16 * WARP);
    PackedQueries<C> out;
#pragma unroll
    for (int i = 0; i < C / 16; i++) out.of[i] = turned[i * WARP + thread_index() % WARP];
    return out;
}

// Scores of 16 vectors, of which `rows` are those of the product's rows g and g + 8.
template <int C>
DEVICE void score_packed(const unsigned char* slot, const PackedRow (&rows)[2], int group_bits, const PackedQueries<C>& queries,
                         float (&scores)[4]) {
    constexpr int RUN = C / 4;
    int t = thread_index() % 4;
    uint32_t kept[2], counts = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        kept[i] = kept_of<RUN>(slot, rows[i], t * RUN, group_bits);
        counts |= count_ones(kept[i]) << (16 * i);
    }
    uint32_t before = sum_before<1, 4>(counts);
    SharedAddress at[2] = {rows[0].elements + 2 * (before & 0xffff), rows[1].elements + 2 * (before >> 16)};
#pragma unroll
    for (int i = 0; i < 4; i++) scores[i] = 0;
#pragma unroll
    for (int step = 0; step < C / 16; step++) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = j % 2, channel = 4 * step + j / 2 * 2;
            uint32_t low = take_half(at[row], kept[row] & 1u << channel), high = take_half(at[row], kept[row] & 2u << channel);
            a[j] = pick_bytes(low, high, 0x5410);
        }
        multiply_halves(scores, a[0], a[1], a[2], a[3], queries.of[step].x, queries.of[step].y);
        multiply_halves(scores, a[0], a[1], a[2], a[3], queries.of[step].z, queries.of[step].w);
    }
}

// Weighted values of 16 tokens, of which `rows` are those of columns 2t, 2t + 1, 2t + 8, 2t + 9; `b0` and `b1` are their weights for row g. Lane g
// has channels C / 8 * g and those after it: products' rows g and g + 8 are two neighbours.
template <int C>
DEVICE void weigh_packed(const unsigned char* slot, const PackedRow (&rows)[4], int group_bits, uint32_t b0, uint32_t b1,
                         ExactFold<C>& fold) {
    constexpr int RUN = C / 8;
    int g = thread_index() % WARP / 4;
    uint32_t kept[4], counts = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        kept[i] = kept_of<RUN>(slot, rows[i], g * RUN, group_bits);
        counts |= count_ones(kept[i]) << (8 * i);
    }
    uint32_t before = sum_before<4, WARP>(counts);
    SharedAddress at[4];
#pragma unroll
    for (int i = 0; i < 4; i++) at[i] = rows[i].elements + 2 * (before >> (8 * i) & 0xff);
#pragma unroll
    for (int i = 0; i < C / 16; i++) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = j / 2 * 2;
            uint32_t channel = 1u << (2 * i + j % 2);
            uint32_t low = take_half(at[row], kept[row] & channel), high = take_half(at[row + 1], kept[row + 1] & channel);
            a[j] = pick_bytes(low, high, 0x5410);
        }
        multiply_halves(fold.accumulated[i], a[0], a[1], a[2], a[3], b0, b1);
    }
}

// Copies whole 16 bytes to shared memory, while the warp goes on.
DEVICE void ask_for(unsigned char* to, const unsigned char* from, int bytes) {
#pragma unroll 1
    for (int at = thread_index() % WARP * 16; at < bytes; at += WARP * 16) copy_later<0, 0>(shared_address(to + at), from + at);
}

// Slots of a warp: one is worked on while the others are filled.
constexpr int SLOTS = 4;

// Calls `ask(i, slot)` for all `i` below `count`, which begins copies to the slot, and `use(i, slot)` when they have landed.
template <class Ask, class Use>
DEVICE void one_after_the_other(int count, Ask ask, Use use) {
#pragma unroll 1
    for (int i = 1 - SLOTS; i < count; i++) {
        if (i >= 0) {
            wait_for_copies<SLOTS - 2>();
            sync_warp();
        }
        int next = i + SLOTS - 1;
        if (next < count) ask(next, next % SLOTS);
        copies_end_group();
        if (i >= 0) use(i, i % SLOTS);
    }
    wait_for_copies<0>();
    sync_warp();
}

// Attention states' slots of a head.
DEVICE int64_t state_slot(const PackedParameters& p, int head, int part) { return (int64_t)head * p.states.slots + part; }

// Whether a step chooses among blocks.
DEVICE bool chooses(const PackedParameters& p) { return p.selected < 1; }

// Tokens that a step reads of a head.
DEVICE uint32_t wanted_tokens(const PackedParameters& p, const PackedHead& head) {
    return min_of(head.tokens, -floor_to_int(-product(p.selected, (float)head.tokens)));
}

struct ScoreShared {
    uint32_t ends[MOST_HEADS];
    float max[EXACT_WARPS][ROWS];
    float sum[EXACT_WARPS][ROWS];
    // [EXACT_WARPS, SLOTS, score_slot]
    alignas(128) unsigned char slots[1];
};

// Maximum and sum of the weights that a lane has seen, for its two columns.
DEVICE void add_weights(float (&max)[2], float (&sum)[2], const float (&scores)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = max_of(max[i], max_of(scores[i], scores[2 + i]));
        if (top == NONE) continue;
        sum[i] = sum[i] * exp2_fast(max[i] - top) + exp2_fast(scores[i] - top) + exp2_fast(scores[2 + i] - top);
        max[i] = top;
    }
}

// The warps' maxima and sums of a slice become one.
DEVICE void store_sums(const PackedParameters& p, ScoreShared& shared, int64_t slice, const float (&max)[2], const float (&sum)[2]) {
    int warp = thread_index() / WARP, lane = thread_index() % WARP;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = warp_max<4>(max[i]), total = warp_sum<4>(max[i] == NONE ? 0 : sum[i] * exp2_fast(max[i] - top));
        if (lane < 4) {
            shared.max[warp][2 * lane + i] = top;
            shared.sum[warp][2 * lane + i] = total;
        }
    }
    sync_block();
    if (thread_index() < ROWS) {
        float top = NONE, total = 0;
        for (int of = 0; of < EXACT_WARPS; of++) top = max_of(top, shared.max[of][thread_index()]);
        for (int of = 0; of < EXACT_WARPS; of++) {
            float its = shared.max[of][thread_index()];
            if (its != NONE) total += shared.sum[of][thread_index()] * exp2_fast(its - top);
        }
        float* sums = p.sums + (slice * ROWS + thread_index()) * 2;
        sums[0] = top;
        sums[1] = total;
    }
    sync_block();
}

// Scores of a slice's block keys, 16 at a time, by the block's warps in turn.
template <int D>
DEVICE void score_slice(const PackedParameters& p, ScoreShared& shared, int index, int number) {
    constexpr int C = D / 4 * 3;
    int warp = thread_index() / WARP, lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    PackedSlice slice = p.slices[(int64_t)index * p.slice_stride + number];
    PackedLayout layout = layout_of<C>(p.segments[(int64_t)index * p.segment_stride + slice.segment].strategy);
    PackedQueries<C> queries = queries_of<C>(p, index, slice.segment);
    const uint64_t* pages = p.pages + (int64_t)index * p.page_stride + slice.first_page;
    float* scores_of_slice = p.scores + ((int64_t)index * p.block_stride + slice.first_block) * p.rows_stored;
    unsigned char* slots = shared.slots + warp * (SLOTS * p.score_slot);
    int count = ((int)slice.blocks + 15) / 16, bits = page_bits(layout) - 4;
    auto tile_of = [&](int i) { return i * EXACT_WARPS + warp; };
    float max[2] = {NONE, NONE}, sum[2] = {0, 0};
    one_after_the_other(
        (count - warp + EXACT_WARPS - 1) / EXACT_WARPS,
        [&](int i, int slot) {
            int tile = tile_of(i), within = (tile & ((1 << bits) - 1)) * 16;
            const unsigned char* page = reinterpret_cast<const unsigned char*>(pages[tile >> bits]);
            unsigned char* to = slots + slot * p.score_slot;
            ask_for(to, page + within * layout.row_bytes, 16 * layout.row_bytes);
            const unsigned char* bitmaps = page + (layout.row_bytes << page_bits(layout)) + within * layout.bitmap_bytes;
            ask_for(to + 16 * layout.row_bytes, bitmaps, 16 * layout.bitmap_bytes);
        },
        [&](int i, int number_of_slot) {
            const unsigned char* slot = slots + number_of_slot * p.score_slot;
            int first = tile_of(i) * 16;
            PackedRow rows[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int row = g + 8 * j;
                bool exists = first + row < (int)slice.blocks;
                rows[j] = row_at(slot, row * layout.row_bytes, 16 * layout.row_bytes + row * layout.bitmap_bytes, exists);
            }
            float scores[4];
            score_packed<C>(slot, rows, layout.group_bits, queries, scores);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (rows[j].exists && 2 * t < p.rows_stored) {
                    float2* to = reinterpret_cast<float2*>(scores_of_slice + (first + g + 8 * j) * p.rows_stored + 2 * t);
                    *to = float2{scores[2 * j], scores[2 * j + 1]};
                }
                if (!rows[j].exists) scores[2 * j] = scores[2 * j + 1] = NONE;
            }
            add_weights(max, sum, scores);
        });
    store_sums(p, shared, (int64_t)index * p.slice_stride + number, max, sum);
}

template <int D>
DEVICE void packed_score_of(const PackedParameters& p) {
    auto& shared = *reinterpret_cast<ScoreShared*>(shared_memory());
    if (!chooses(p)) return;
    int heads = p.sequences * p.kv_heads;
    count_parts(shared.ends, heads, [&](int i) { return p.heads[i].slices; });
    uint32_t items = shared.ends[heads - 1];
    for (uint32_t item = block_index(); item < items; item += grid_blocks()) {
        int index = head_of(shared.ends, heads, item);
        score_slice<D>(p, shared, index, item - (index > 0 ? shared.ends[index - 1] : 0));
    }
}

template <int D>
struct PackedShared {
    static constexpr int C = D / 4 * 3;
    uint32_t ends[MOST_HEADS];
    float max[EXACT_WARPS][ROWS];
    float sum[EXACT_WARPS][ROWS];
    float accumulated[EXACT_WARPS][ROWS][C];
    // Likewise.
    alignas(128) unsigned char slots[1];
};

// Which of 16 tokens is row, or column, `index` of products: those that lanes read together should be in different banks.
DEVICE int token_of(int index) { return index / 8 * 8 + index % 2 * 4 + index % 8 / 2; }

// Folds `count` blocks in that lie in a slot one after the other: 16 tokens or fewer.
template <int C>
DEVICE void fold_packed(const PackedLayout& layout, const unsigned char* slot, int count, const PackedQueries<C>& queries,
                        ExactFold<C>& fold) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4, tokens = count << layout.block_bits;
    int of_keys = layout.row_bytes << layout.block_bits, of_bitmaps = layout.bitmap_bytes << layout.block_bits;
    // Side 0 has keys, side 1 values.
    auto row_of = [&](int token, int side) {
        int block = (token >> layout.block_bits) * layout.block_bytes, row = token & ((1 << layout.block_bits) - 1);
        return row_at(slot, block + side * of_keys + row * layout.row_bytes,
                      block + 2 * of_keys + side * of_bitmaps + row * layout.bitmap_bytes, token < tokens);
    };
    PackedRow keys[2] = {row_of(token_of(g), 0), row_of(token_of(g + 8), 0)};
    float scores[4];
    score_packed<C>(slot, keys, layout.group_bits, queries, scores);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (!keys[i / 2].exists) scores[i] = NONE;
    }
    uint32_t b0, b1;
    fold_scores<C>(fold, scores, 1, 16, b0, b1);
    PackedRow values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = row_of(token_of(2 * t + i % 2 + i / 2 * 8), 1);
    weigh_packed<C>(slot, values, layout.group_bits, b0, b1, fold);
}

// Entries `first` to `end` of what is read of a segment, by one warp.
template <int D>
DEVICE void fold_entries(const PackedParameters& p, PackedShared<D>& shared, ExactFold<D / 4 * 3>& fold, int index, int number, int first,
                         int end) {
    constexpr int C = D / 4 * 3;
    int lane = thread_index() % WARP;
    const PackedSegment& segment = p.segments[(int64_t)index * p.segment_stride + number];
    PackedLayout layout = layout_of<C>(segment.strategy);
    PackedQueries<C> queries = queries_of<C>(p, index, number);
    const uint64_t* pages = p.pages + (int64_t)index * p.page_stride + segment.first_page;
    const uint32_t* list = p.list + (int64_t)index * p.list_stride;
    uint32_t first_block = segment.first_block;
    unsigned char* slots = shared.slots + thread_index() / WARP * (SLOTS * p.attend_slot);
    int bits = page_bits(layout), blocks = 16 >> layout.block_bits;
    // Lane `l` knows where the block of entry `start + l` is.
    auto place_of = [&](int start) -> uint64_t {
        if (start + lane >= end) return 0;
        uint32_t block = (chooses(p) ? list[start + lane] : start + lane) - first_block;
        return pages[block >> bits] + layout.key_bytes + (block & ((1 << bits) - 1)) * (uint64_t)layout.block_bytes;
    };
    uint64_t places = 0, next_places = place_of(first);
    auto held = [&](int i) { return min_of(blocks, end - first - i * blocks); };
    one_after_the_other(
        (end - first + blocks - 1) / blocks,
        [&](int i, int slot) {
            int entry = i * blocks;
            if (entry % WARP == 0) {
                places = next_places;
                next_places = place_of(first + entry + WARP);
            }
#pragma unroll 1
            for (int block = 0; block < held(i); block++) {
                uint64_t from = shuffle(places, (entry + block) % WARP);
                ask_for(slots + slot * p.attend_slot + block * layout.block_bytes, reinterpret_cast<const unsigned char*>(from),
                        layout.block_bytes);
            }
        },
        [&](int i, int slot) { fold_packed<C>(layout, slots + slot * p.attend_slot, held(i), queries, fold); });
}

// The segment that has a part of a head.
DEVICE int segment_of(const PackedRun* runs, int segments, uint32_t part) {
    int found = 0;
    for (int i = 1; i < segments; i++) {
        if (runs[i].first_part <= part) found = i;
    }
    return found;
}

template <int D>
DEVICE void packed_attend_of(const PackedParameters& p) {
    constexpr int C = D / 4 * 3;
    auto& shared = *reinterpret_cast<PackedShared<D>*>(shared_memory());
    int warp = thread_index() / WARP, lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    int heads = p.sequences * p.kv_heads;
    count_parts(shared.ends, heads, [&](int i) { return p.plans[i].parts; });
    uint32_t items = shared.ends[heads - 1];
    for (uint32_t item = block_index(); item < items; item += grid_blocks()) {
        int index = head_of(shared.ends, heads, item);
        int part = item - (index > 0 ? shared.ends[index - 1] : 0);
        const PackedRun* runs = p.runs + (int64_t)index * p.segment_stride;
        int number = segment_of(runs, p.heads[index].segments, part);
        PackedRun run = runs[number];
        int block_bits = p.segments[(int64_t)index * p.segment_stride + number].strategy.block_bits;
        int of_part = p.plans[index].part_tokens >> block_bits, blocks = 16 >> block_bits;
        int first = (part - run.first_part) * of_part, end = min_of(run.count, first + of_part);
        ExactFold<C> fold;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fold.max[i] = NONE;
            fold.sum[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < C / 16; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) fold.accumulated[i][j] = 0;
        }
        // A warp has a run of its own, of 16 tokens each but the last.
        int sixteens = (end - first + blocks - 1) / blocks;
        int from = first + sixteens * warp / EXACT_WARPS * blocks;
        int to = min_of(end, first + sixteens * (warp + 1) / EXACT_WARPS * blocks);
        if (from < to) fold_entries<D>(p, shared, fold, index, number, run.first + from, run.first + to);
        share_fold(shared, fold);
#pragma unroll
        for (int column = 0; column < 2; column++) {
#pragma unroll
            for (int i = 0; i < C / 16; i++) {
                int c = C / 8 * g + 2 * i;
                shared.accumulated[warp][2 * t + column][c] = fold.accumulated[i][column];
                shared.accumulated[warp][2 * t + column][c + 1] = fold.accumulated[i][2 + column];
            }
        }
        store_state<C>(p.states, shared, state_slot(p, index, part), p.rows,
                       [&](int of, int row, int c) { return four_rows(shared.accumulated[of], row, c); });
    }
}

KERNEL(packed_score_64, PackedParameters, EXACT_THREADS, 5) {
    follow();
    packed_score_of<64>(p);
}
KERNEL(packed_score_128, PackedParameters, EXACT_THREADS, 5) {
    follow();
    packed_score_of<128>(p);
}
KERNEL(packed_attend_64, PackedParameters, EXACT_THREADS, 4) {
    follow();
    packed_attend_of<64>(p);
}
KERNEL(packed_attend_128, PackedParameters, EXACT_THREADS, 4) {
    follow();
    packed_attend_of<128>(p);
}
