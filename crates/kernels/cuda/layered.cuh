// Attention to layered pages, whole or chosen tiles of them, and the steps into and out of their channels.
//
// A warp takes two tiles at a time, whose bytes it has copied to shared memory meanwhile. Of keys, rows of the product are tokens: lane
// (g, t), g = lane / 4, t = lane % 4, unpacks group 4s + t of each set s of 32 channels. Weights become integers of 16 bits relative
// to the largest of the two tiles, in two bytes each, and a transposition puts them where the values' product wants them: rows
// are channels there, and lane (g, t) unpacks channel g of each group for half a tile. Which token is which row of the first product is
// chosen such that no weight has to move further. What two tiles add goes to f32 sums in shared memory.
//
// Up to four queries leave half of a product's columns empty. There columns 4 to 7 are the same queries again, weights' high bytes go to the first four and
// low ones to the others, and one product takes both (NARROW).
//
// Tiles may be of any profiles: levels of all widths have one unit. Where two have the same, which is the rule since pages of a profile
// follow each other, their values are unpacked without a look at each group's width.
#pragma once

#include "select.cuh"

constexpr int PAIR_TOKENS = 2 * TILE_TOKENS;
// Tiles that a warp describes at a time.
constexpr int DESCRIBED = 8;
// Octaves that scores may be over what sums are relative to before these are brought in line.
constexpr float SLACK = 16;
// What weights are multiplied by to become integers.
constexpr float WEIGHT = 65535;
// What levels are multiplied by: `UNIT`.
constexpr float LEVEL_UNIT = 4.8f / 127.0f;

// What attention needs to know of a tile, found by one lane for its warp. All zero: no tile.
struct Described {
    uint32_t leading, lines, key_escapes, value_escapes;  // as in `Tile`
    uint32_t within;   // bytes: groups of 8, 4 and 2 bits of the keys that lie with it, and the lines of these
    uint32_t values;   // bytes: groups of 8, 4 and 2 bits, tokens
    uint32_t apart;    // 16 bits: the runs of the first four groups as `SketchPage` has them; bytes: which of its page's four it is, all its lines
    uint32_t escapes;  // as in `Tile`
};

// What a warp works with, besides the room for tiles.
template <int D>
struct LayeredWarp {
    Described described[2][DESCRIBED];
    // What escapes add to scores, then weights.
    alignas(16) float tokens[PAIR_TOKENS][ROWS];
    // Weighted values: of each group what lane (g, t) sums up, channel g of rows 2t and 2t + 1.
    alignas(16) float sums[D / 8][WARP][2];
};

// Where row `row` of channel `c` is among the sums of a warp.
template <int D>
DEVICE float& sum_of(LayeredWarp<D>& own, int row, int c) {
    return own.sums[c / 8][c % 8 * 4 + row / 2][row % 2];
}

template <int D>
struct LayeredShared {
    uint32_t ends[MOST_HEADS];
    // By channels.
    alignas(16) float queries[D][ROWS];
    // Of lane l in set s of groups: in turn channels 0, 4, 1, 5 and 2, 6, 3, 7 of its group.
    uint32_t bytes[D / 32][WARP][2];
    LayeredWarp<D> warps[EXACT_WARPS];
    float max[EXACT_WARPS][ROWS];
    float sum[EXACT_WARPS][ROWS];
    uint4 tables;
    // [EXACT_WARPS, room_bytes]
    alignas(128) unsigned char slots[1];
};

// How many groups of a part have 8, 4 and 2 bits.
struct Counts {
    int eight, four, two;
};

DEVICE Counts keys_of(const Tile& tile) {
    uint32_t x = tile.profiles[0];
    return Counts{int(x & 0xff), int(x >> 8 & 0xff), int(x >> 16 & 0xff)};
}
DEVICE Counts values_of(const Tile& tile) {
    uint32_t x = tile.profiles[0], y = tile.profiles[1];
    return Counts{int(x >> 24), int(y & 0xff), int(y >> 8 & 0xff)};
}
DEVICE Counts counts_of(uint32_t bytes) { return Counts{int(bytes & 0xff), int(bytes >> 8 & 0xff), int(bytes >> 16 & 0xff)}; }
DEVICE int groups_of(const Counts& counts) { return counts.eight + counts.four + counts.two; }
DEVICE int tokens_of(const Described& tile) { return tile.values >> 24; }
DEVICE int index_of(const Described& tile) { return tile.apart >> 16 & 3; }
DEVICE int lines_of(const Described& tile) { return tile.apart >> 24; }
// Bytes that are copied of it.
DEVICE int bytes_of(const Described& tile) { return tokens_of(tile) > 0 ? SKETCH * 128 + lines_of(tile) * 64 : 0; }
DEVICE int key_lines_of(const Described& tile) { return tile.within >> 24; }

// The groups of a tile's keys that lie with it.
DEVICE Counts keys_within(const Tile& tile) {
    Counts all = keys_of(tile);
    int left = SKETCH, eight = min_of(left, all.eight);
    left -= eight;
    int four = min_of(left, all.four);
    left -= four;
    int two = min_of(left, all.two);
    return Counts{all.eight - eight, all.four - four, all.two - two};
}

DEVICE Described describe(const Tile& tile) {
    // A page's last tiles may have no tokens.
    if ((tile.profiles[1] >> 16 & 0xff) == 0) return Described{};
    Counts keys = keys_of(tile), within = keys_within(tile), values = values_of(tile);
    uint32_t runs = 0;
#pragma unroll
    for (int group = 0; group < SKETCH; group++) {
        runs |= uint32_t(apart_of(group, keys.eight, keys.four, keys.two).width / 2) << (4 * group);
    }
    uint32_t of_keys = lines_of(within.eight, within.four, within.two), all = of_keys + lines_of(values.eight, values.four, values.two);
    uint32_t tokens = tile.profiles[1] >> 16 & 0xff, index = tile.profiles[1] >> 24;
    return Described{tile.leading,
                     tile.lines,
                     tile.key_escapes,
                     tile.value_escapes,
                     uint32_t(within.eight | within.four << 8 | within.two << 16) | of_keys << 24,
                     uint32_t(values.eight | values.four << 8 | values.two << 16) | tokens << 24,
                     runs | index << 16 | all << 24,
                     tile.escapes};
}

// What a lane (g, t) remembers of its warp's tiles, for columns 2t and 2t + 1.
struct LayeredFold {
    float max[2];
    float sum[2];  // of this lane's tokens
};

// Where a head's tiles are.
struct Sources {
    const uint8_t* leading;
    const uint8_t* lines;
    const Escape* escapes;
};

// Asks for the bytes of two tiles, half a warp for each: the runs of its page's first groups that have it, then its lines. Units of 16 bytes
// change places within a run, so that lanes that read together use all banks.
DEVICE void ask_for_tiles(const Sources& head, const Described* pair, unsigned char* slots) {
    constexpr int HALF = WARP / 2, TO = SKETCH * 128, STRIDE = HALF * 16;
    int lane = thread_index() % HALF, second = thread_index() % WARP / HALF;
    const Described& tile = pair[second];
    if (tokens_of(tile) == 0) return;
    unsigned char* slot = slots + (second ? bytes_of(pair[0]) : 0);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int group = 2 * i + lane / 8, unit = lane % 8;
        uint32_t runs = tile.apart >> (4 * group) & 15, before = (tile.apart & ((1u << (4 * group)) - 1)) * 0x1111 >> 12 & 15;
        int run = before + (runs == 4 ? index_of(tile) : runs == 2 ? index_of(tile) / 2 : 0);
        const uint8_t* from = head.leading + (int64_t)tile.leading * 64 + run * 128 + unit * 16;
        if (runs > 0) copy_later<0, 0>(shared_address(slot + group * 128 + (unit ^ (2 * group)) * 16), from);
    }
    const uint8_t* from = head.lines + (int64_t)tile.lines * 64 + lane * 16;
    SharedAddress to = shared_address(slot + lane * 16);
    // Most tiles have no more than six units for each lane.
    int units = lines_of(tile) * 4 - lane;
    if (units > 0) copy_later<TO, 0>(to, from);
    if (units > HALF) copy_later<TO + STRIDE, STRIDE>(to, from);
    if (units > 2 * HALF) copy_later<TO + 2 * STRIDE, 2 * STRIDE>(to, from);
    if (units > 3 * HALF) copy_later<TO + 3 * STRIDE, 3 * STRIDE>(to, from);
    if (units > 4 * HALF) copy_later<TO + 4 * STRIDE, 4 * STRIDE>(to, from);
    if (units > 5 * HALF) copy_later<TO + 5 * STRIDE, 5 * STRIDE>(to, from);
#pragma unroll 1
    for (int i = 6; units > i * HALF; i++) copy_later<TO, 0>(to + i * STRIDE, from + i * STRIDE);
}

// Levels of a group of keys of four tokens: [u][i] is `token` + 2u + 8i.
using Rows = Levels[2][2];

DEVICE void no_rows(Rows& out) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int i = 0; i < 2; i++) out[u][i] = no_levels();
    }
}

// Of group `group` below SKETCH, which has `runs`, out of a slot.
DEVICE void apart_rows(const Tables& tables, const unsigned char* slot, uint32_t runs, int index, int group, int token, Rows& out) {
    no_rows(out);
    if (runs == 0) return;
    uint4 units[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
        units[u] = *reinterpret_cast<const uint4*>(slot + group * 128 + ((token + 2 * u) ^ (2 * group)) * 16);
    }
    if (runs == 4) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            out[u][0].low = first_in_turn(units[u].x, units[u].z) ^ FLIP;
            out[u][0].high = last_in_turn(units[u].x, units[u].z) ^ FLIP;
            out[u][1].low = first_in_turn(units[u].y, units[u].w) ^ FLIP;
            out[u][1].high = last_in_turn(units[u].y, units[u].w) ^ FLIP;
        }
        return;
    }
    bool second = runs == 2 ? index % 2 : index / 2;
    int shift = index % 2 * 4;
#pragma unroll
    for (int u = 0; u < 2; u++) {
        uint32_t words[2] = {second ? units[u].z : units[u].x, second ? units[u].w : units[u].y};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (runs == 2) {
                four_bits(tables, words[i], out[u][i].low, out[u][i].more_low);
                four_bits(tables, words[i] >> 16, out[u][i].high, out[u][i].more_high);
            } else {
                two_bits_in_turn(words[i], shift, out[u][i].low, out[u][i].high);
            }
        }
    }
}

// Of a group among a tile's lines, from `line` on; that of 2 bits begins at bit `shift`.
template <int WIDTH>
DEVICE void line_rows(const Tables& tables, const uint8_t* line, int token, int shift, Rows& out) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(line) + token;
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t word = words[2 * u + 8 * i];
            if (WIDTH == 4) {
                four_bits(tables, word, out[u][i].low, out[u][i].more_low);
                four_bits(tables, word >> 16, out[u][i].high, out[u][i].more_high);
            } else if (WIDTH == 2) {
                two_bits_in_turn(word, shift, out[u][i].low, out[u][i].high);
            } else {
                uint32_t other = words[2 * u + 8 * i + 16];
                out[u][i].low = first_in_turn(word, other) ^ FLIP;
                out[u][i].high = last_in_turn(word, other) ^ FLIP;
            }
        }
    }
}

DEVICE void multiply_rows(int (&scores)[2][4], const Rows& rows, const uint2& bytes, bool fours) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const Levels &x = rows[u][0], &y = rows[u][1];
        multiply_bytes(scores[u], x.low, y.low, x.high, y.high, bytes.x, bytes.y);
        if (fours) multiply_bytes(scores[u], x.more_low, y.more_low, x.more_high, y.more_high, bytes.x, bytes.y);
    }
}

// The queries' bytes of a group, or nothing of it.
template <int D>
DEVICE uint2 bytes_of_group(const LayeredShared<D>& shared, int group, bool exists) {
    const uint32_t* bytes = shared.bytes[group / 4][thread_index() % WARP / 4 * 4 + group % 4];
    return exists ? uint2{bytes[0], bytes[1]} : uint2{0, 0};
}

// Adds the scores of the groups that lie with tiles, in sets of four of one width; all lanes' tiles have these `counts`.
template <int D>
DEVICE void score_lines(const LayeredShared<D>& shared, const Tables& tables, const uint8_t* lines, const Counts& counts, int token,
                        int (&scores)[2][4]) {
    int t = thread_index() % 4, group = SKETCH;
#pragma unroll 1
    for (int first = 0; first < counts.eight; first += 4) {
        bool exists = first + t < counts.eight;
        int at = exists ? first + t : first;
        Rows rows;
        line_rows<8>(tables, lines + at * 128, token, 0, rows);
        multiply_rows(scores, rows, bytes_of_group<D>(shared, group + at, exists), false);
    }
    lines += counts.eight * 128;
    group += counts.eight;
#pragma unroll 1
    for (int first = 0; first < counts.four; first += 4) {
        bool exists = first + t < counts.four;
        int at = exists ? first + t : first;
        Rows rows;
        line_rows<4>(tables, lines + at * 64, token, 0, rows);
        multiply_rows(scores, rows, bytes_of_group<D>(shared, group + at, exists), true);
    }
    lines += counts.four * 64;
    group += counts.four;
#pragma unroll 1
    for (int first = 0; first < counts.two; first += 4) {
        bool exists = first + t < counts.two;
        int at = exists ? first + t : first;
        Rows rows;
        line_rows<2>(tables, lines + at / 2 * 64, token, at % 2 * 4, rows);
        multiply_rows(scores, rows, bytes_of_group<D>(shared, group + at, exists), false);
    }
}

// Integer scores of the pair's 32 tokens in two products, u = 0 and 1: row 2i + e of them is tile i / 2's token 4 * (i % 2) + 2u + e, and
// row 8 + 2i + e the token 8 further. Where both tiles have groups of the same widths they are scored together, else one after the other.
template <int D>
DEVICE void score_tiles(const LayeredShared<D>& shared, const Tables& tables, const unsigned char* slots, int slot_bytes,
                        const Described* pair, int (&scores)[2][4]) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    int token = (g >> 1 & 1) * 4 + (g & 1);
    // What is read of a tile that is not there is not looked at.
    bool alone = tokens_of(pair[1]) == 0, alike = alone || ((pair[0].within ^ pair[1].within) & 0xffffff) == 0;
    int mine = alone ? 0 : g >> 2;
    const unsigned char* slot = slots + mine * slot_bytes;
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int i = 0; i < 4; i++) scores[u][i] = 0;
    }
    Rows rows;
    uint32_t runs = pair[mine].apart >> (4 * t) & 15;
    apart_rows(tables, slot, runs, index_of(pair[mine]), t, token, rows);
    multiply_rows(scores, rows, bytes_of_group<D>(shared, t, true), any_lane(runs == 2));
#pragma unroll 1
    for (int tile = 0; tile < (alike ? 1 : 2); tile++) {
        int of_tile[2][4] = {};
        const unsigned char* lines = (alike ? slot : slots + tile * slot_bytes) + SKETCH * 128;
        score_lines<D>(shared, tables, lines, counts_of(pair[tile].within), token, of_tile);
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[u][i] += alike || tile == mine ? of_tile[u][i] : 0;
        }
    }
}

// Where the escapes of two tiles are, of keys or of values.
struct EscapeRuns {
    uint32_t first[2];
    int counts[2];
};
DEVICE EscapeRuns key_escapes_of(const Described* pair) {
    return EscapeRuns{{pair[0].key_escapes, pair[1].key_escapes}, {int(pair[0].escapes & 0xffff), int(pair[1].escapes & 0xffff)}};
}
DEVICE EscapeRuns value_escapes_of(const Described* pair) {
    return EscapeRuns{{pair[0].value_escapes, pair[1].value_escapes}, {int(pair[0].escapes >> 16), int(pair[1].escapes >> 16)}};
}

// Number `at` of both tiles' escapes; 0 if there are not so many.
DEVICE uint32_t escape_at(const Escape* escapes, const EscapeRuns& of, int at) {
    if (at >= of.counts[0] + of.counts[1]) return 0;
    uint32_t index = at < of.counts[0] ? of.first[0] + at : of.first[1] + (at - of.counts[0]);
    return reinterpret_cast<const uint32_t*>(escapes)[index];
}

// A lane's escape out of `first` to `first + WARP` of two tiles, where it exists; `token` is the pair's.
struct LaneEscape {
    int token, channel;
    float rest;
};
DEVICE LaneEscape escape_of(const Escape* escapes, const EscapeRuns& of, int first, uint32_t ahead, const Described* pair) {
    int at = first + thread_index() % WARP, slot = at >= of.counts[0];
    uint32_t word = first == 0 ? ahead : escape_at(escapes, of, at);
    return LaneEscape{int(word & 0xff) + (slot - index_of(pair[slot])) * TILE_TOKENS, int(word >> 8 & 0xff), half_to_float(word >> 16)};
}

// Calls `add` with all escapes of two tiles, each lane with its own; `ahead` has the first ones. Those with one `key_of` are added one after the
// other, in order.
template <class K, class F>
DEVICE void each_escape(const Escape* escapes, const EscapeRuns& of, uint32_t ahead, const Described* pair, K key_of, F add) {
    int lane = thread_index() % WARP, count = of.counts[0] + of.counts[1];
#pragma unroll 1
    for (int first = 0; first < count; first += WARP) {
        LaneEscape mine = escape_of(escapes, of, first, ahead, pair);
        bool exists = first + lane < count;
        // Earlier lanes with the same key.
        int key = key_of(mine), before = 0;
#pragma unroll 1
        for (int by = 1; by < min_of(count - first, WARP); by++) {
            int other = shuffle_up(key, by);
            before += lane >= by && other == key;
        }
#pragma unroll 1
        for (int turn = 0; any_lane(exists && before >= turn); turn++) {
            if (exists && before == turn) add(mine);
            sync_warp();
        }
    }
}

// Adds a column's number each, times `by`.
template <bool NARROW>
DEVICE void add_rows(float* to, const float* of_rows, float by) {
#pragma unroll
    for (int i = 0; i < (NARROW ? 1 : 2); i++) {
        float4 x = reinterpret_cast<float4*>(to)[i], y = reinterpret_cast<const float4*>(of_rows)[i];
        reinterpret_cast<float4*>(to)[i] = float4{x.x + y.x * by, x.y + y.y * by, x.z + y.z * by, x.w + y.w * by};
    }
}

// Weights of a pair's tokens as fragments: high and low bytes, of both halves of the shared dimension; and what the products are multiplied
// by. NARROW: `high` is both.
struct Weights {
    uint32_t high[2], low[2];
    float factors[2];
};

// Adds the weighted values of two groups, those of `second` only if `both`.
template <int D, bool NARROW>
DEVICE void weigh_groups(LayeredWarp<D>& own, const Weights& weights, const Levels& a, const Levels& b, int first, int second, bool both,
                         bool fours) {
    int lane = thread_index() % WARP;
    int highs[4], lows[4] = {0, 0, 0, 0};
    multiply_weights_only(highs, a.low, b.low, a.high, b.high, weights.high[0], weights.high[1]);
    if (fours) multiply_weights(highs, a.more_low, b.more_low, a.more_high, b.more_high, weights.high[0], weights.high[1]);
    if (!NARROW) {
        multiply_weights_only(lows, a.low, b.low, a.high, b.high, weights.low[0], weights.low[1]);
        if (fours) multiply_weights(lows, a.more_low, b.more_low, a.more_high, b.more_high, weights.low[0], weights.low[1]);
    }
    float of[4];
#pragma unroll
    for (int i = 0; i < 4; i++) of[i] = (float)(NARROW ? highs[i] : highs[i] * 256 + lows[i]) * weights.factors[i % 2];
    float2* sums = reinterpret_cast<float2*>(&own.sums[0][lane]);
    float2 x = sums[first * WARP];
    sums[first * WARP] = float2{x.x + of[0], x.y + of[1]};
    if (both) {
        float2 y = sums[second * WARP];
        sums[second * WARP] = float2{y.x + of[2], y.y + of[3]};
    }
}

// The values of two tiles of any profiles; `lines` are those of the lane's tile.
template <int D, bool NARROW>
DEVICE void weigh_mixed(const Tables& tables, LayeredWarp<D>& own, const Weights& weights, const uint8_t* lines, int word,
                        const Counts& values, int groups) {
#pragma unroll 1
    for (int first = 0; first < groups; first += 2) {
        Levels of[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Place place = place_of(first + i, values.eight, values.four, values.two);
            of[i] = levels_of(tables, lines + place.line * 64, word, place.width, place.shift);
        }
        weigh_groups<D, NARROW>(own, weights, of[0], of[1], first, first + 1, true, true);
    }
}

// The values of two tiles of one profile: its groups of 8, of 4 and of 2 bits.
template <int D, bool NARROW>
DEVICE void weigh_alike(const Tables& tables, LayeredWarp<D>& own, const Weights& weights, const uint8_t* lines, int word,
                        const Counts& values) {
    int group = 0;
#pragma unroll 1
    for (int i = 0; i < values.eight; i += 2) {
        bool both = i + 1 < values.eight;
        Levels a = levels_of(tables, lines, word, 8, 0), b = levels_of(tables, lines + (both ? 128 : 0), word, 8, 0);
        weigh_groups<D, NARROW>(own, weights, a, b, group, group + 1, both, false);
        lines += both ? 256 : 128;
        group += both ? 2 : 1;
    }
#pragma unroll 1
    for (int i = 0; i < values.four; i += 2) {
        bool both = i + 1 < values.four;
        Levels a = levels_of(tables, lines, word, 4, 0), b = levels_of(tables, lines + (both ? 64 : 0), word, 4, 0);
        weigh_groups<D, NARROW>(own, weights, a, b, group, group + 1, both, true);
        lines += both ? 128 : 64;
        group += both ? 2 : 1;
    }
#pragma unroll 1
    for (int i = 0; i < values.two; i += 2) {
        Levels a = levels_of(tables, lines, word, 2, 0), b = levels_of(tables, lines, word, 2, 4);
        weigh_groups<D, NARROW>(own, weights, a, b, group, group + 1, true, false);
        lines += 64;
        group += 2;
    }
}

template <int D, bool NARROW>
DEVICE void weigh_tiles(const Tables& tables, LayeredWarp<D>& own, const unsigned char* slots, int slot_bytes, const Described* pair,
                        const Weights& weights) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    uint32_t bytes[2] = {pair[0].values, pair[1].values};
    // What is read of a tile that is not there weighs nothing.
    bool alone = bytes[1] >> 24 == 0;
    int of_keys = key_lines_of(pair[alone ? 0 : t >> 1]);
    const uint8_t* lines = slots + (alone ? 0 : t >> 1) * slot_bytes + SKETCH * 128 + of_keys * 64;
    int word = t % 2 * 8 + g;
    Counts first = counts_of(bytes[0]), second = counts_of(bytes[1]);
    if (alone || (bytes[0] & 0xffffff) == (bytes[1] & 0xffffff)) {
        weigh_alike<D, NARROW>(tables, own, weights, lines, word, first);
    } else {
        Counts values = counts_of(t >> 1 ? bytes[1] : bytes[0]);
        weigh_mixed<D, NARROW>(tables, own, weights, lines, word, values, max_of(groups_of(first), groups_of(second)));
    }
}

// Folds two tiles in, whose bytes lie in `slots`; `ahead` has their escapes, keys' and values'.
template <int D, bool NARROW>
DEVICE void fold_tiles(const LayeredShared<D>& shared, LayeredWarp<D>& own, LayeredFold& fold, const Escape* escapes,
                       const unsigned char* slots, int slot_bytes, const Described* pair, const uint32_t (&ahead)[2],
                       const float (&scale)[2], const float (&offset)[2]) {
    constexpr int DISTINCT = NARROW ? ROWS / 2 : ROWS;
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    Tables tables = read_tables(shared.tables);
    int integers[2][4];
    score_tiles<D>(shared, tables, slots, slot_bytes, pair, integers);
    EscapeRuns of_keys = key_escapes_of(pair), of_values = value_escapes_of(pair);
    bool key_escapes = of_keys.counts[0] + of_keys.counts[1] > 0;
    int held = tokens_of(pair[g >> 2]);
    if (key_escapes) {
        // A lane's own token.
#pragma unroll
        for (int row = 0; row < ROWS; row += 4) *reinterpret_cast<float4*>(&own.tokens[lane][row]) = float4{0, 0, 0, 0};
        sync_warp();
        each_escape(escapes, of_keys, ahead[0], pair, [](const LaneEscape& of) { return of.token; },
                    [&](const LaneEscape& of) { add_rows<NARROW>(own.tokens[of.token], shared.queries[of.channel], of.rest); });
    }
    float scores[2][4];
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = (g >> 1 & 1) * 4 + 2 * u + (g & 1) + i / 2 * 8;
            float score = (float)integers[u][i] * scale[i % 2] + offset[i % 2];
            if (key_escapes) score += own.tokens[(g >> 2) * TILE_TOKENS + token][(2 * t + i % 2) % DISTINCT];
            scores[u][i] = token < held ? score : NONE;
        }
    }
    bool risen = false;
    float old[2];
    Weights weights;
#pragma unroll
    for (int column = 0; column < 2; column++) {
        float top = max_of(max_of(scores[0][column], scores[0][2 + column]), max_of(scores[1][column], scores[1][2 + column]));
        top = warp_max<4>(top);
        // Sums that are still 0 need not be brought in line.
        bool rises = top > fold.max[column] + SLACK;
        float new_max = rises ? top : fold.max[column];
        old[column] = fold.max[column] == NONE ? 1 : exp2_fast(fold.max[column] - new_max);
        float factor = top == NONE ? 0 : exp2_fast(top - new_max);
        weights.factors[column] = factor * (1 / WEIGHT);
        risen |= rises && fold.max[column] != NONE;
        fold.max[column] = new_max;
        float total = 0;
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int i = column; i < 4; i += 2) {
                scores[u][i] = top == NONE ? 0 : exp2_fast(scores[u][i] - top);
                total += scores[u][i];
            }
        }
        fold.sum[column] = fold.sum[column] * old[column] + total * factor;
    }
    if (any_lane(risen)) {
        float2* sums = reinterpret_cast<float2*>(&own.sums[0][lane]);
#pragma unroll 1
        for (int group = 0; group < D / 8; group++) {
            float2 x = sums[group * WARP];
            sums[group * WARP] = float2{x.x * old[0], x.y * old[1]};
        }
    }
    if (of_values.counts[0] + of_values.counts[1] > 0) {
        sync_warp();
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int token = (g >> 1 & 1) * 4 + 2 * u + (g & 1) + i / 2 * 8;
                own.tokens[(g >> 2) * TILE_TOKENS + token][2 * t + i % 2] =
                    scores[u][i] * weights.factors[i % 2] * (WEIGHT / LEVEL_UNIT);
            }
        }
        sync_warp();
        each_escape(escapes, of_values, ahead[1], pair, [](const LaneEscape& of) { return of.channel; }, [&](const LaneEscape& of) {
            add_rows<NARROW>(&sum_of<D>(own, 0, of.channel), own.tokens[of.token], of.rest);
        });
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
        uint32_t whole[4];
#pragma unroll
        for (int i = 0; i < 4; i++) whole[i] = round_to_int(scores[u][i] * WEIGHT);
        uint32_t first = transpose(whole[0] | whole[1] << 16), second = transpose(whole[2] | whole[3] << 16);
        weights.high[u] = pick_bytes(first, second, 0x7351);
        weights.low[u] = pick_bytes(first, second, 0x6240);
        if (NARROW && g >= 4) weights.high[u] = weights.low[u];
    }
#pragma unroll
    for (int column = 0; column < 2; column++) {
        if (NARROW && t < 2) weights.factors[column] *= 256;
    }
    weigh_tiles<D, NARROW>(tables, own, slots, slot_bytes, pair, weights);
    sync_warp();
}

// The tile that a head reads at `at`, if that is before `end`.
DEVICE uint32_t tile_at(const LayeredParameters& p, int index, bool listed, int at, int end) {
    if (!listed || at >= end) return at;
    return p.list[(int64_t)index * p.list_stride + at];
}

// Tiles `first` to `end` of what a head reads, by one warp; each of the first DESCRIBED lanes has its one of the first tiles, `tile`.
template <int D, bool NARROW>
DEVICE void fold_list(const LayeredParameters& p, LayeredShared<D>& shared, LayeredFold& fold, int index, bool listed, int first,
                      int end, uint32_t tile) {
    int warp = thread_index() / WARP, lane = thread_index() % WARP, t = lane % 4;
    const Tile* of_head = p.heads[index].tiles;
    Sources sources{p.heads[index].leading, p.heads[index].lines, p.heads[index].escapes};
    LayeredWarp<D>& own = shared.warps[warp];
    unsigned char* room = shared.slots + warp * p.room_bytes;
    float scale[2], offset[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = (2 * t + i) % (NARROW ? ROWS / 2 : ROWS);
        const float* step = p.steps + ((int64_t)index * ROWS + row) * STEP;
        scale[i] = step[0];
        offset[i] = step[1];
    }
    // Of DESCRIBED tiles from `start` on, a lane has one; then it looks up the one of as many tiles later.
    auto describe_from = [&](int start) {
        if (lane < DESCRIBED) {
            int at = start + lane;
            Described of = {};
            if (at < end) of = describe(of_head[tile]);
            own.described[(start - first) / DESCRIBED % 2][lane] = of;
            tile = tile_at(p, index, listed, at + DESCRIBED, end);
        }
        sync_warp();
    };
    auto pair_at = [&](int pair) { return &own.described[pair * 2 / DESCRIBED % 2][pair * 2 % DESCRIBED]; };
    // What two tiles take, and where: by turns from the room's start on and up to its end.
    auto bytes_at = [&](const Described* tiles) { return bytes_of(tiles[0]) + bytes_of(tiles[1]); };
    auto place_at = [&](int pair, const Described* tiles) { return room + (pair % 2 ? p.room_bytes - bytes_at(tiles) : 0); };
    uint32_t ahead[2], later[2] = {0, 0};
    // Past the end: tiles without tokens, of which nothing is asked for.
    auto ask = [&](int pair) {
        const Described* tiles = pair_at(pair);
        ask_for_tiles(sources, tiles, place_at(pair, tiles));
        later[0] = escape_at(sources.escapes, key_escapes_of(tiles), lane);
        later[1] = escape_at(sources.escapes, value_escapes_of(tiles), lane);
    };
    int pairs = (end - first + 1) / 2;
    // Machine code is fetched anew in each step, which takes longer than to run it once: nothing stands here twice.
#pragma unroll 1
    for (int pair = -1; pair < pairs; pair++) {
        ahead[0] = later[0];
        ahead[1] = later[1];
        int next = pair + 1;
        if (2 * next % DESCRIBED == 0) describe_from(first + 2 * next);
        const Described* tiles = pair_at(pair < 0 ? 0 : pair);
        // The next two tiles are asked for before these are folded in, or afterwards if they don't fit beside them.
        bool fits = pair < 0 || bytes_at(tiles) + bytes_at(pair_at(next)) <= p.room_bytes;
#pragma unroll 1
        for (int after = 0; after < 2; after++) {
            if (fits == (after == 0)) ask(next);
            copies_end_group();
            if (after || pair < 0) continue;
            wait_for_copies<1>();
            sync_warp();
            fold_tiles<D, NARROW>(shared, own, fold, sources.escapes, place_at(pair, tiles), bytes_of(tiles[0]), tiles, ahead, scale, offset);
        }
    }
    wait_for_copies<0>();
}

template <int D, bool NARROW>
DEVICE void layered_attend_by(const LayeredParameters& p) {
    constexpr int DISTINCT = NARROW ? ROWS / 2 : ROWS;
    auto& shared = *reinterpret_cast<LayeredShared<D>*>(shared_memory());
    int warp = thread_index() / WARP, lane = thread_index() % WARP;
    int heads = p.sequences * p.kv_heads;
    auto count_of = [&](int i) { return (int)(p.counts[i] & ~ALL_TILES); };
    count_parts(shared.ends, heads, [&](int i) { return parts_of(count_of(i), p.states.slots, p.least_part, 8); });
    uint32_t items = shared.ends[heads - 1];
    if (thread_index() == 0) write_tables(shared.tables);
    for (uint32_t item = block_index(); item < items; item += grid_blocks()) {
        int index = head_of(shared.ends, heads, item);
        int number = item - (index > 0 ? shared.ends[index - 1] : 0), count = count_of(index);
        int part = parts_unit(count, p.states.slots, p.least_part, 8);
        int first = number * part, end = min_of(count, first + part);
        // A warp has a run of its own, of whole pairs.
        int pairs = (end - first + 1) / 2;
        int from = first + pairs * warp / EXACT_WARPS * 2, to = min_of(end, first + pairs * (warp + 1) / EXACT_WARPS * 2);
        bool listed = !(p.counts[index] & ALL_TILES);
        uint32_t tile = lane < DESCRIBED ? tile_at(p, index, listed, from + lane, to) : 0;
        for (int at = thread_index(); at < DISTINCT * D; at += EXACT_THREADS) {
            shared.queries[at % D][at / D] = p.turned[(int64_t)index * ROWS * D + at];
        }
        for (int at = thread_index(); at < D; at += EXACT_THREADS) {
            int set = at / WARP, l = at % WARP;
            const uint32_t* bytes = p.bytes + ((int64_t)index * ROWS + l / 4 % DISTINCT) * (D / 4) + set * 8 + l % 4 * 2;
            shared.bytes[set][l][0] = first_in_turn(bytes[0], bytes[1]);
            shared.bytes[set][l][1] = last_in_turn(bytes[0], bytes[1]);
        }
        float4* sums = reinterpret_cast<float4*>(&shared.warps[warp].sums);
        for (int at = lane; at < ROWS * D / 4; at += WARP) sums[at] = float4{0, 0, 0, 0};
        sync_block();
        LayeredFold fold;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fold.max[i] = NONE;
            fold.sum[i] = 0;
        }
        if (from < to) fold_list<D, NARROW>(p, shared, fold, index, listed, from, to, tile);
        share_fold(shared, fold);
        store_state<D>(p.states, shared, (int64_t)index * p.states.slots + number, p.rows, [&](int of, int row, int c) {
            // Four rows from `row` on.
            const float4* sums = reinterpret_cast<const float4*>(&sum_of<D>(shared.warps[of], 0, c));
            float4 x = sums[row / 4], y = NARROW ? sums[1] : float4{0, 0, 0, 0};
            return float4{(x.x + y.x) * LEVEL_UNIT, (x.y + y.y) * LEVEL_UNIT, (x.z + y.z) * LEVEL_UNIT, (x.w + y.w) * LEVEL_UNIT};
        });
    }
}

template <int D>
DEVICE void layered_attend_of(const LayeredParameters& p) {
    if (p.rows <= ROWS / 2) {
        layered_attend_by<D, true>(p);
    } else {
        layered_attend_by<D, false>(p);
    }
}

// Blocks that fit on a multiprocessor: Ampere's have less shared memory.
#if __CUDA_ARCH__ >= 900
#define ATTEND_BLOCKS 4
#else
#define ATTEND_BLOCKS 3
#endif

KERNEL(layered_attend_64, LayeredParameters, EXACT_THREADS, ATTEND_BLOCKS) {
    follow();
    layered_attend_of<64>(p);
}
KERNEL(layered_attend_128, LayeredParameters, EXACT_THREADS, ATTEND_BLOCKS) {
    follow();
    layered_attend_of<128>(p);
}
