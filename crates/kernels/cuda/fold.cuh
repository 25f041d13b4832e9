// What do two tiles add to attention? Weights of their tokens, and values weighted by them.
//
// Weights become integers of 16 bits relative to the largest of the two tiles, in two bytes each, and a transposition puts them where the
// values' product wants them: rows are channels there, and lane (g, t) unpacks channel g of each group for half a tile. What two tiles add goes to
// f32 sums in shared memory.
//
// Up to four queries leave half of a product's columns empty. There columns 4 to 7 are the same queries again, weights' high bytes go to the first four and
// low ones to the others, and one product takes both (NARROW).
//
// Where two tiles have the same profile, which is the rule since pages of a profile follow each other, their values are unpacked without a look at each
// group's width.
#pragma once

#include "tiles.cuh"

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
