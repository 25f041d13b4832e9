// Attention to layered pages, whole or chosen tiles of them, and the steps into and out of their channels.
//
// A warp takes two tiles at a time, whose bytes it has copied to shared memory meanwhile. Of keys, rows of the product are tokens: lane
// (g, t), g = lane / 4, t = lane % 4, unpacks group 4s + t of each set s of 32 channels. Weights become integers of 16 bits relative
// to the largest of the two tiles, in two bytes each, and a transposition puts them where the values' product wants them: rows
// are channels there, and lane (g, t) unpacks channel g of each group for half a tile. Which token is which row of the first product is
// chosen such that no weight has to move further. What two tiles add goes to f32 sums in shared memory.
//
// Tiles may be of any profiles: levels of all widths have one unit. Where two have the same, which is the rule since pages of a profile
// follow each other, their values are unpacked without a look at each group's width.
#pragma once

#include "select.cuh"

// Escapes of a tile that are loaded ahead; others when they are met.
constexpr int AHEAD = WARP;
constexpr int PAIR_TOKENS = 2 * TILE_TOKENS;
// What weights are multiplied by to become integers.
constexpr float WEIGHT = 65535;
// What levels are multiplied by: `UNIT`.
constexpr float LEVEL_UNIT = 4.8f / 127.0f;

// What a warp works with, besides the room for tiles.
template <int D>
struct LayeredWarp {
    // What escapes add to scores, then weights.
    float tokens[PAIR_TOKENS][ROWS];
    // Weighted values: of each group what lane (g, t) sums up, channel g of rows 2t and 2t + 1.
    float sums[D / 8][WARP][2];
};

// Where row `row` of channel `c` is among the sums of a warp.
template <int D>
DEVICE float& sum_of(LayeredWarp<D>& own, int row, int c) {
    return own.sums[c / 8][c % 8 * 4 + row / 2][row % 2];
}

template <int D>
struct LayeredShared {
    uint32_t ends[MOST_HEADS];
    float queries[ROWS][D];
    // Of lane l in set s of groups: in turn channels 0, 4, 1, 5 and 2, 6, 3, 7 of its group.
    uint32_t bytes[D / 32][WARP][2];
    LayeredWarp<D> warps[EXACT_WARPS];
    float max[EXACT_WARPS][ROWS];
    float sum[EXACT_WARPS][ROWS];
    uint4 tables;
    // [EXACT_WARPS, 2 pairs, 2 tiles, slot_bytes]
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
DEVICE int groups_of(const Counts& counts) { return counts.eight + counts.four + counts.two; }
DEVICE int tokens_of(const Tile& tile) { return tile.profiles[1] >> 16 & 0xff; }
DEVICE int index_of(const Tile& tile) { return tile.profiles[1] >> 24; }
DEVICE int key_escapes_of(const Tile& tile) { return tile.escapes & 0xffff; }
DEVICE int value_escapes_of(const Tile& tile) { return tile.escapes >> 16; }

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

// One of two, without an array that is indexed by lanes.
DEVICE Tile either(const Tile (&tiles)[2], bool second) {
    Tile out = {};
    out.profiles[0] = second ? tiles[1].profiles[0] : tiles[0].profiles[0];
    out.profiles[1] = second ? tiles[1].profiles[1] : tiles[0].profiles[1];
    return out;
}

// What a lane (g, t) remembers of its warp's tiles, for columns 2t and 2t + 1.
struct LayeredFold {
    float max[2];
    float sum[2];  // of this lane's tokens
};

// Asks for the bytes of a tile: the runs of its page's first groups that have it, then its lines.
DEVICE void ask_for_tile(const Head& head, const Tile& tile, unsigned char* slot) {
    int lane = thread_index() % WARP;
    Counts keys = keys_of(tile), within = keys_within(tile), values = values_of(tile);
    Place place = apart_of(lane / 8, keys.eight, keys.four, keys.two);
    if (place.width > 0) {
        int run = place.width == 8 ? index_of(tile) : place.width == 4 ? index_of(tile) / 2 : 0;
        const uint8_t* from = head.leading + ((int64_t)tile.leading + place.line) * 64 + run * 128 + lane % 8 * 16;
        copy_later<0, 0>(shared_address(slot + lane * 16), from);
    }
    int lines = lines_of(within.eight, within.four, within.two) + lines_of(values.eight, values.four, values.two);
    const uint8_t* from = head.lines + (int64_t)tile.lines * 64;
    for (int at = lane; at < lines * 4; at += WARP) copy_later<SKETCH * 128, 0>(shared_address(slot + at * 16), from + at * 16);
}

// Levels of a token's key, group `group` below SKETCH, out of a slot. `token` is below 8 and stands for itself and the one 8 further.
DEVICE void apart_levels(const Tables& tables, const unsigned char* slot, const Tile& tile, int group, int token, Levels (&out)[2]) {
    Counts keys = keys_of(tile);
    Place place = apart_of(group, keys.eight, keys.four, keys.two);
    out[0] = out[1] = no_levels();
    if (place.width == 0) return;
    uint4 unit = *reinterpret_cast<const uint4*>(slot + group * 128 + token * 16);
    if (place.width == 8) {
        out[0].low = first_in_turn(unit.x, unit.z) ^ FLIP;
        out[0].high = last_in_turn(unit.x, unit.z) ^ FLIP;
        out[1].low = first_in_turn(unit.y, unit.w) ^ FLIP;
        out[1].high = last_in_turn(unit.y, unit.w) ^ FLIP;
        return;
    }
    bool second = place.width == 4 ? index_of(tile) % 2 : index_of(tile) / 2;
    uint32_t words[2] = {second ? unit.z : unit.x, second ? unit.w : unit.y};
    if (place.width == 4) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            four_bits(tables, words[i], out[i].low, out[i].more_low);
            four_bits(tables, words[i] >> 16, out[i].high, out[i].more_high);
        }
        return;
    }
    int shift = index_of(tile) % 2 * 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t a = two_bits(words[i] >> shift), b = two_bits(words[i] >> (shift + 2));
        out[i].low = first_in_turn(a, b);
        out[i].high = last_in_turn(a, b);
    }
}

// Integer scores of the pair's 32 tokens in two products, u = 0 and 1: row 2i + e of them is tile i / 2's token 4 * (i % 2) + 2u + e, and
// row 8 + 2i + e the token 8 further.
template <int D>
DEVICE void score_tiles(const LayeredShared<D>& shared, const Tables& tables, const unsigned char* slots, int slot_bytes, const Tile (&tiles)[2],
                        int (&scores)[2][4]) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    Tile tile = either(tiles, g >> 2);
    const unsigned char* slot = slots + (g >> 2) * slot_bytes;
    int token = (g >> 1 & 1) * 4 + (g & 1);
    Counts counts = keys_within(tile);
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int i = 0; i < 4; i++) scores[u][i] = 0;
    }
#pragma unroll
    for (int set = 0; set < D / 32; set++) {
        uint32_t b0 = shared.bytes[set][lane][0], b1 = shared.bytes[set][lane][1];
        Place place = place_of(4 * (set - 1) + t, counts.eight, counts.four, counts.two);
        const uint8_t* line = slot + SKETCH * 128 + place.line * 64;
        // In no tile has a group of this set bits.
        if (set > 0 && !any_lane(place.width != 0)) break;
#pragma unroll
        for (int u = 0; u < 2; u++) {
            Levels rows[2];
            if (set == 0) {
                apart_levels(tables, slot, tile, t, token + 2 * u, rows);
            } else {
                rows[0] = levels_of(tables, line, token + 2 * u, place.width, place.shift);
                rows[1] = levels_of(tables, line, token + 2 * u + 8, place.width, place.shift);
            }
            multiply_bytes(scores[u], rows[0].low, rows[1].low, rows[0].high, rows[1].high, b0, b1);
            multiply_bytes(scores[u], rows[0].more_low, rows[1].more_low, rows[0].more_high, rows[1].more_high, b0, b1);
        }
    }
}

// Calls `f(escape, slot token)` for each of a tile's escapes, which all lanes get; `ahead` has the first ones, one a lane.
template <class F>
DEVICE void each_escape(const Escape* escapes, uint32_t first, int count, uint32_t ahead, const Tile& tile, int slot, F f) {
    for (int i = 0; i < count; i++) {
        uint32_t word = i < AHEAD ? shuffle(ahead, i) : reinterpret_cast<const uint32_t*>(escapes)[first + i];
        int token = (word & 0xff) + (slot - index_of(tile)) * TILE_TOKENS, channel = word >> 8 & 0xff;
        f(token, channel, half_to_float(word >> 16));
    }
}

// Weights of a pair's tokens as fragments: high and low bytes, of both halves of the shared dimension; and what the products are multiplied
// by.
struct Weights {
    uint32_t high[2], low[2];
    float factors[2];
};

// Adds the weighted values of two groups, those of `second` only if `both`.
template <int D>
DEVICE void weigh_groups(LayeredWarp<D>& own, const Weights& weights, const Levels& a, const Levels& b, int first, int second, bool both,
                         bool fours) {
    int lane = thread_index() % WARP;
    int highs[4], lows[4];
    multiply_weights_only(highs, a.low, b.low, a.high, b.high, weights.high[0], weights.high[1]);
    multiply_weights_only(lows, a.low, b.low, a.high, b.high, weights.low[0], weights.low[1]);
    if (fours) {
        multiply_weights(highs, a.more_low, b.more_low, a.more_high, b.more_high, weights.high[0], weights.high[1]);
        multiply_weights(lows, a.more_low, b.more_low, a.more_high, b.more_high, weights.low[0], weights.low[1]);
    }
    float of[4];
#pragma unroll
    for (int i = 0; i < 4; i++) of[i] = (float)(highs[i] * 256 + lows[i]) * weights.factors[i % 2];
    float2* sums = reinterpret_cast<float2*>(&own.sums[0][lane]);
    float2 x = sums[first * WARP];
    sums[first * WARP] = float2{x.x + of[0], x.y + of[1]};
    if (both) {
        float2 y = sums[second * WARP];
        sums[second * WARP] = float2{y.x + of[2], y.y + of[3]};
    }
}

// The values of two tiles of any profiles; `lines` are those of the lane's tile.
template <int D>
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
        weigh_groups<D>(own, weights, of[0], of[1], first, first + 1, true, true);
    }
}

// The values of two tiles of one profile: its groups of 8, of 4 and of 2 bits.
template <int D>
DEVICE void weigh_alike(const Tables& tables, LayeredWarp<D>& own, const Weights& weights, const uint8_t* lines, int word,
                        const Counts& values) {
    int group = 0;
    for (int i = 0; i < values.eight; i += 2) {
        bool both = i + 1 < values.eight;
        Levels a = levels_of(tables, lines, word, 8, 0), b = levels_of(tables, lines + (both ? 128 : 0), word, 8, 0);
        weigh_groups<D>(own, weights, a, b, group, group + 1, both, false);
        lines += both ? 256 : 128;
        group += both ? 2 : 1;
    }
#pragma unroll 2
    for (int i = 0; i < values.four; i += 2) {
        bool both = i + 1 < values.four;
        Levels a = levels_of(tables, lines, word, 4, 0), b = levels_of(tables, lines + (both ? 64 : 0), word, 4, 0);
        weigh_groups<D>(own, weights, a, b, group, group + 1, both, true);
        lines += both ? 128 : 64;
        group += both ? 2 : 1;
    }
#pragma unroll 2
    for (int i = 0; i < values.two; i += 2) {
        Levels a = levels_of(tables, lines, word, 2, 0), b = levels_of(tables, lines, word, 2, 4);
        weigh_groups<D>(own, weights, a, b, group, group + 1, true, false);
        lines += 64;
        group += 2;
    }
}

template <int D>
DEVICE void weigh_tiles(const Tables& tables, LayeredWarp<D>& own, const unsigned char* slots, int slot_bytes, const Tile (&tiles)[2],
                        const Weights& weights) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    Tile tile = either(tiles, t >> 1);
    Counts keys = keys_within(tile), values = values_of(tile);
    if (tokens_of(tiles[1]) == 0) keys = keys_within(tiles[0]);
    const uint8_t* lines = slots + (t >> 1) * slot_bytes + SKETCH * 128 + lines_of(keys.eight, keys.four, keys.two) * 64;
    int word = t % 2 * 8 + g;
    Counts first = values_of(tiles[0]), second = values_of(tiles[1]);
    // What is read of a tile that is not there weighs nothing.
    bool alike = tokens_of(tiles[1]) == 0 || (first.eight == second.eight && first.four == second.four && first.two == second.two);
    if (alike) {
        weigh_alike<D>(tables, own, weights, lines, word, first);
    } else {
        weigh_mixed<D>(tables, own, weights, lines, word, values, max_of(groups_of(first), groups_of(second)));
    }
}

// Folds two tiles in, whose bytes lie in `slots`; `ahead` has their escapes, keys' and values' of each.
template <int D>
DEVICE void fold_tiles(const LayeredShared<D>& shared, LayeredWarp<D>& own, LayeredFold& fold, const Head& head,
                       const unsigned char* slots, int slot_bytes, const Tile (&tiles)[2], const uint32_t (&ahead)[2][2],
                       const float (&scale)[2], const float (&offset)[2]) {
    int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    Tables tables = read_tables(shared.tables);
    int integers[2][4];
    score_tiles<D>(shared, tables, slots, slot_bytes, tiles, integers);
    bool escapes = key_escapes_of(tiles[0]) + key_escapes_of(tiles[1]) > 0;
    int held = tokens_of(either(tiles, g >> 2));
    if (escapes) {
        for (int at = lane; at < PAIR_TOKENS * ROWS; at += WARP) (&own.tokens[0][0])[at] = 0;
        sync_warp();
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const Tile& tile = tiles[slot];
            each_escape(head.escapes, tile.key_escapes, key_escapes_of(tile), ahead[slot][0], tile, slot,
                        [&](int token, int channel, float rest) {
                            if (lane < ROWS) own.tokens[token][lane] += shared.queries[lane][channel] * rest;
                        });
        }
        sync_warp();
    }
    float scores[2][4];
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = (g >> 1 & 1) * 4 + 2 * u + (g & 1) + i / 2 * 8;
            float score = (float)integers[u][i] * scale[i % 2] + offset[i % 2];
            if (escapes) score += own.tokens[(g >> 2) * TILE_TOKENS + token][2 * t + i % 2];
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
        float new_max = max_of(fold.max[column], top);
        old[column] = fold.max[column] == NONE ? 0 : exp2_fast(fold.max[column] - new_max);
        float factor = top == NONE ? 0 : exp2_fast(top - new_max);
        weights.factors[column] = factor * (1 / WEIGHT);
        risen |= new_max > fold.max[column];
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
#pragma unroll
        for (int group = 0; group < D / 8; group++) {
            float2 x = sums[group * WARP];
            sums[group * WARP] = float2{x.x * old[0], x.y * old[1]};
        }
    }
    if (value_escapes_of(tiles[0]) + value_escapes_of(tiles[1]) > 0) {
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
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const Tile& tile = tiles[slot];
            each_escape(head.escapes, tile.value_escapes, value_escapes_of(tile), ahead[slot][1], tile, slot,
                        [&](int token, int channel, float rest) {
                            if (lane < ROWS) sum_of<D>(own, lane, channel) += own.tokens[token][lane] * rest;
                        });
        }
        sync_warp();
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
        uint32_t whole[4];
#pragma unroll
        for (int i = 0; i < 4; i++) whole[i] = round_to_int(scores[u][i] * WEIGHT);
        uint32_t first = transpose(whole[0] | whole[1] << 16), second = transpose(whole[2] | whole[3] << 16);
        weights.high[u] = pick_bytes(first, second, 0x7351);
        weights.low[u] = pick_bytes(first, second, 0x6240);
    }
    weigh_tiles<D>(tables, own, slots, slot_bytes, tiles, weights);
    sync_warp();
}

// Tiles `first` to `end` of what a head reads, by one warp.
template <int D>
DEVICE void fold_list(const LayeredParameters& p, LayeredShared<D>& shared, LayeredFold& fold, int index, bool listed, int first,
                      int end) {
    int warp = thread_index() / WARP, lane = thread_index() % WARP, t = lane % 4;
    const Head& head = p.heads[index];
    const uint32_t* list = p.list + (int64_t)index * p.list_stride;
    LayeredWarp<D>& own = shared.warps[warp];
    unsigned char* room = shared.slots + (int64_t)warp * 4 * p.slot_bytes;
    float scale[2], offset[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float* step = p.steps + ((int64_t)index * ROWS + 2 * t + i) * 2;
        scale[i] = step[0];
        offset[i] = step[1];
    }
    // Of 32 tiles, what describes one a lane; a tile's 32 bytes are two words of 16.
    static_assert(sizeof(Tile) == 32, "a tile is described by 32 bytes");
    uint4 described[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    auto describe = [&](int start) {
        int at = start + lane;
        described[0] = described[1] = uint4{0, 0, 0, 0};
        if (at < end) {
            const uint4* from = reinterpret_cast<const uint4*>(head.tiles + (listed ? list[at] : at));
            described[0] = from[0];
            described[1] = from[1];
        }
    };
    Tile now[2] = {}, next[2] = {};
    uint32_t ahead[2][2] = {{0, 0}, {0, 0}}, later[2][2] = {{0, 0}, {0, 0}};
    // Asks for two tiles, the first of which is `in` of the 32.
    auto ask = [&](int in, int pair) {
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            Tile& to = next[slot];
            to.leading = shuffle(described[0].x, in + slot);
            to.lines = shuffle(described[0].y, in + slot);
            to.key_escapes = shuffle(described[0].z, in + slot);
            to.value_escapes = shuffle(described[0].w, in + slot);
            to.profiles[0] = shuffle(described[1].x, in + slot);
            to.profiles[1] = shuffle(described[1].y, in + slot);
            to.escapes = shuffle(described[1].z, in + slot);
            ask_for_tile(head, to, room + (pair % 2 * 2 + slot) * p.slot_bytes);
            const uint32_t* escapes = reinterpret_cast<const uint32_t*>(head.escapes);
            later[slot][0] = lane < key_escapes_of(to) ? escapes[to.key_escapes + lane] : 0;
            later[slot][1] = lane < value_escapes_of(to) ? escapes[to.value_escapes + lane] : 0;
        }
        copies_end_group();
    };
    auto turn = [&]() {
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            now[slot] = next[slot];
            ahead[slot][0] = later[slot][0];
            ahead[slot][1] = later[slot][1];
        }
    };
    describe(first);
    ask(0, 0);
    int pairs = (end - first + 1) / 2;
    for (int pair = 0; pair < pairs; pair++) {
        turn();
        int after = 2 * (pair + 1);
        if (after % WARP == 0) describe(first + after);
        // Past the end: tiles without tokens, of which nothing is asked for.
        ask(after % WARP, pair + 1);
        wait_for_copies<1>();
        sync_warp();
        fold_tiles<D>(shared, own, fold, head, room + pair % 2 * 2 * p.slot_bytes, p.slot_bytes, now, ahead, scale, offset);
    }
    wait_for_copies<0>();
}

template <int D>
DEVICE void layered_attend_of(const LayeredParameters& p) {
    auto& shared = *reinterpret_cast<LayeredShared<D>*>(shared_memory());
    int warp = thread_index() / WARP, lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
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
        for (int at = thread_index(); at < ROWS * D; at += EXACT_THREADS) {
            (&shared.queries[0][0])[at] = p.turned[(int64_t)index * ROWS * D + at];
        }
        for (int at = thread_index(); at < D; at += EXACT_THREADS) {
            int set = at / WARP, l = at % WARP;
            const uint32_t* bytes = p.bytes + ((int64_t)index * ROWS + l / 4) * (D / 4) + set * 8 + l % 4 * 2;
            shared.bytes[set][l][0] = first_in_turn(bytes[0], bytes[1]);
            shared.bytes[set][l][1] = last_in_turn(bytes[0], bytes[1]);
        }
        for (int at = lane; at < ROWS * D; at += WARP) (&shared.warps[warp].sums[0][0][0])[at] = 0;
        sync_block();
        LayeredFold fold;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fold.max[i] = NONE;
            fold.sum[i] = 0;
        }
        // A warp has a run of its own, of whole pairs.
        int pairs = (end - first + 1) / 2;
        int from = first + pairs * warp / EXACT_WARPS * 2, to = min_of(end, first + pairs * (warp + 1) / EXACT_WARPS * 2);
        bool listed = !(p.counts[index] & ALL_TILES);
        if (from < to) fold_list<D>(p, shared, fold, index, listed, from, to);
#pragma unroll
        for (int column = 0; column < 2; column++) {
            float sum = warp_sum<4>(fold.sum[column]);
            if (g == 0) {
                shared.max[warp][2 * t + column] = fold.max[column];
                shared.sum[warp][2 * t + column] = sum;
            }
        }
        store_state<D>(p.states, shared, (int64_t)index * p.states.slots + number, p.rows,
                       [&](int of, int row, int c) { return sum_of<D>(shared.warps[of], row, c) * LEVEL_UNIT; });
    }
}

KERNEL(layered_attend_64, LayeredParameters, EXACT_THREADS, 3) {
    follow();
    layered_attend_of<64>(p);
}
KERNEL(layered_attend_128, LayeredParameters, EXACT_THREADS, 3) {
    follow();
    layered_attend_of<128>(p);
}
