// What does attention read of a tile, and how much is each of its tokens attended to?
//
// A warp takes two tiles at a time, whose bytes it has copied to shared memory meanwhile. Rows of a product are tokens: lane
// (g, t), g = lane / 4, t = lane % 4, unpacks group 4s + t of each set s of 32 channels. Which token is which row is chosen such that no
// weight has to move further than one transposition (`fold.cuh`).
//
// Tiles may be of any profiles: levels of all widths have one unit.
#pragma once

#include "exact.cuh"
#include "levels.cuh"

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
