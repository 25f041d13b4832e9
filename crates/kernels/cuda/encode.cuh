// Which codes do elements get? Layered pages out of vectors, to the bit what `Pages::push` in src/layered.rs makes of them, in the GPU's
// order.
//
// One block for each page. Where its lines lie follows from profiles; where its escapes lie, from those of the pages before, which a launch
// of its own counts (`layered_count`).
#pragma once

#include "turn.cuh"

constexpr int ENCODE_THREADS = 256;
constexpr int ENCODE_WARPS = ENCODE_THREADS / WARP;
constexpr float UNITS = 1 / LEVEL_UNIT;

// One page: where its lines go, and which tokens it has, `first` and those after it.
struct EncodePage {
    uint32_t leading, lines, first;
    // As those of tiles; tokens are the page's.
    uint32_t profiles[2];
};

struct EncodeParameters {
    const float* keys;         // [T, D] in the pages' order, in units of their channels' spread and less their means
    const float* values;
    const EncodePage* pages;
    uint32_t* counts;          // [pages, 2, 4]: escapes of keys and of values of each tile
    uint32_t* leading;
    uint32_t* lines;
    Escape* escapes;
    SketchPage* sketch_pages;
    Tile* tiles;
    int32_t page_count, unused;
};

template <int D>
struct EncodeShared {
    unsigned char codes[D / 8][PAGE_TOKENS * 8];
    uint32_t totals[ENCODE_WARPS];
    uint32_t counts[2][TILES];
};

DEVICE int width_of(const Counts& counts, int group) {
    return group < counts.eight ? 8 : group < counts.eight + counts.four ? 4 : group < groups_of(counts) ? 2 : 0;
}

// Elements of a larger magnitude are escapes.
DEVICE float range_of(int width) { return width == 2 ? 3.01f : width == 4 ? 3.73f : 127.5f * LEVEL_UNIT; }

// The magnitudes of levels above 0, of 4 bits.
DEVICE int fours_level(int rank) {
    constexpr uint64_t LEVELS = 0x48372b2119110a03;  // 3, 10, 17, 25, 33, 43, 55, 72
    return int(LEVELS >> (8 * rank) & 0xff);
}

DEVICE int level_of(int width, int code) {
    if (width == 8) return code - 128;
    if (width == 4) return code < 8 ? -fours_level(7 - code) : fours_level(code - 8);
    return code < 2 ? (code == 0 ? -40 : -12) : code == 2 ? 12 : 40;
}

DEVICE int code_of(int width, float x) {
    x = product(x, UNITS);
    float magnitude = x < 0 ? -x : x;
    if (width == 8) {
        float bounded = x < -127 ? -127 : x > 127 ? 127 : x;
        return round_to_int(bounded) + 128;
    }
    int half = width == 4 ? 8 : 2, rank = 0;
    if (width == 4) {
#pragma unroll
        for (int i = 0; i < 7; i++) rank += magnitude > (fours_level(i) + fours_level(i + 1)) * 0.5f;
    } else {
        rank = magnitude > 26.0f;
    }
    return x < 0 ? half - 1 - rank : half + rank;
}

DEVICE Counts page_profile(const EncodePage& page, int half) {
    Tile tile = {};
    tile.profiles[0] = page.profiles[0];
    tile.profiles[1] = page.profiles[1];
    return half == 0 ? keys_of(tile) : values_of(tile);
}
DEVICE int page_tokens(const EncodePage& page) { return page.profiles[1] >> 16 & 0xff; }

// The eight elements of a group of the page's token.
template <int D>
DEVICE const float* elements_of(const EncodeParameters& p, const EncodePage& page, int half, int token, int group) {
    const float* vectors = half == 0 ? p.keys : p.values;
    return vectors + (int64_t)(page.first + token) * D + group * 8;
}

DEVICE int escapes_among(const float* elements, int width) {
    int count = 0;
#pragma unroll
    for (int c = 0; c < 8; c++) {
        float x = elements[c];
        count += (x < 0 ? -x : x) > range_of(width);
    }
    return count;
}

template <int D>
DEVICE void count_of_page(const EncodeParameters& p) {
    auto& shared = *reinterpret_cast<EncodeShared<D>*>(shared_memory());
    const EncodePage& page = p.pages[block_index()];
    int thread = thread_index(), tokens = page_tokens(page);
    if (thread < 2 * TILES) (&shared.counts[0][0])[thread] = 0;
    sync_block();
    for (int half = 0; half < 2; half++) {
        Counts profile = page_profile(page, half);
        for (int at = thread; at < groups_of(profile) * tokens; at += ENCODE_THREADS) {
            int group = at / tokens, token = at % tokens;
            int count = escapes_among(elements_of<D>(p, page, half, token, group), width_of(profile, group));
            if (count > 0) add_shared(&shared.counts[half][token / TILE_TOKENS], count);
        }
    }
    sync_block();
    if (thread < 2 * TILES) p.counts[block_index() * 2 * TILES + thread] = (&shared.counts[0][0])[thread];
}

// Where channel `c` of a token is among the codes of its group.
DEVICE int place_of_code(int half, int token, int c) {
    return half == 0 ? (token / 16 * 2 + c / 4) * 64 + token % 16 * 4 + c % 4 : token / 8 * 64 + (token / 4 % 2 * 8 + c) * 4 + token % 4;
}

// Codes of all groups of a half to shared memory, and its escapes from `at` on: in order of tiles, groups, tokens and channels.
template <int D>
DEVICE void encode_half(const EncodeParameters& p, EncodeShared<D>& shared, const EncodePage& page, int half, uint32_t at) {
    constexpr int EACH = D / 8 * PAGE_TOKENS / ENCODE_THREADS;
    Counts profile = page_profile(page, half);
    int tokens = page_tokens(page);
    uint32_t mine = 0;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) {
            uint32_t all;
            at += block_before(shared.totals, mine, all);
        }
        for (int i = 0; i < EACH; i++) {
            int place = thread_index() * EACH + i, in_tile = place % TILE_TOKENS;
            int group = place / TILE_TOKENS % (D / 8), tile = place / TILE_TOKENS / (D / 8), token = tile * TILE_TOKENS + in_tile;
            int width = width_of(profile, group);
            if (width == 0) continue;
            const float* elements = token < tokens ? elements_of<D>(p, page, half, token, group) : nullptr;
            if (pass == 0) {
                mine += elements ? escapes_among(elements, width) : 0;
                continue;
            }
            for (int c = 0; c < 8; c++) {
                float x = elements ? elements[c] : 0;
                int code = code_of(width, x);
                shared.codes[group][place_of_code(half, token, c)] = code;
                if ((x < 0 ? -x : x) > range_of(width)) {
                    float rest = x - product((float)level_of(width, code), LEVEL_UNIT);
                    rest = rest < -65504.0f ? -65504.0f : rest > 65504.0f ? 65504.0f : rest;
                    p.escapes[at++] = Escape{(uint8_t)token, (uint8_t)(group * 8 + c), float_to_half(rest)};
                }
            }
        }
    }
    sync_block();
}

// Four bytes at `at` of blocks `block` and, `shift` bits higher each, those after it.
DEVICE uint32_t packed_word(const unsigned char* codes, int block, int count, int bits, int at) {
    uint32_t word = 0;
    for (int i = 0; i < count; i++) word |= *reinterpret_cast<const uint32_t*>(codes + (block + i) * 64 + at * 4) << (i * bits);
    return word;
}

// Writes the lines of the first groups of keys, in the other order.
template <int D>
DEVICE void write_apart(const EncodeParameters& p, const EncodeShared<D>& shared, const EncodePage& page) {
    Counts profile = page_profile(page, 0);
    for (int group = 0; group < min_of(SKETCH, groups_of(profile)); group++) {
        Place place = apart_of(group, profile.eight, profile.four, profile.two);
        for (int word = thread_index(); word < place.width * 16; word += ENCODE_THREADS) {
            int shared_by = 8 / place.width, line = word / 16, token = word % 16;
            int run = place.width == 2 ? 0 : line / 2, half = place.width == 2 ? line * 2 : line % 2 * 2;
            int to = (run * 8 + token % 8) * 4 + half + token / 8;
            p.leading[((int64_t)page.leading + place.line) * 16 + to] =
                packed_word(shared.codes[group], line * shared_by, shared_by, place.width, token);
        }
    }
}

// Writes the lines of all tiles of the groups from `first` on, from line `start` of each tile's `of_tile` on.
template <int D>
DEVICE void write_tiles(const EncodeParameters& p, const EncodeShared<D>& shared, const EncodePage& page, const Counts& groups, int first,
                        int start, int of_tile) {
    int lines = lines_of(groups.eight, groups.four, groups.two);
    for (int at = thread_index(); at < TILES * lines * 16; at += ENCODE_THREADS) {
        int word = at % 16, line = at / 16 % lines, tile = at / 16 / lines;
        uint32_t out;
        if (line < 2 * groups.eight) {
            out = packed_word(shared.codes[first + line / 2], 2 * tile + line % 2, 1, 8, word);
        } else if (line < 2 * groups.eight + groups.four) {
            out = packed_word(shared.codes[first + line - groups.eight], 2 * tile, 2, 4, word);
        } else {
            int group = first + groups.eight + groups.four + 2 * (line - 2 * groups.eight - groups.four);
            out = packed_word(shared.codes[group], 2 * tile, 2, 2, word) | packed_word(shared.codes[group + 1], 2 * tile, 2, 2, word) << 4;
        }
        p.lines[((int64_t)page.lines + tile * of_tile + start + line) * 16 + word] = out;
    }
}

template <int D>
DEVICE void encode_of_page(const EncodeParameters& p) {
    auto& shared = *reinterpret_cast<EncodeShared<D>*>(shared_memory());
    int index = block_index(), thread = thread_index();
    const EncodePage& page = p.pages[index];
    uint32_t earlier = 0, escapes;
    for (int at = thread; at < index * 2 * TILES; at += ENCODE_THREADS) earlier += p.counts[at];
    block_before(shared.totals, earlier, escapes);
    uint32_t starts[2][TILES], counts[2][TILES];
    for (int half = 0; half < 2; half++) {
        for (int tile = 0; tile < TILES; tile++) {
            counts[half][tile] = p.counts[(index * 2 + half) * TILES + tile];
            starts[half][tile] = escapes;
            escapes += counts[half][tile];
        }
    }
    Tile profile = {};
    profile.profiles[0] = page.profiles[0];
    profile.profiles[1] = page.profiles[1];
    Counts keys = keys_of(profile), within = keys_within(profile), values = values_of(profile);
    int of_keys = lines_of(within.eight, within.four, within.two);
    int of_tile = of_keys + lines_of(values.eight, values.four, values.two);
    encode_half<D>(p, shared, page, 0, starts[0][0]);
    write_apart<D>(p, shared, page);
    write_tiles<D>(p, shared, page, within, min_of(SKETCH, groups_of(keys)), 0, of_tile);
    sync_block();
    encode_half<D>(p, shared, page, 1, starts[1][0]);
    write_tiles<D>(p, shared, page, values, 0, of_keys, of_tile);
    int tokens = page_tokens(page);
    if (thread == 0) {
        uint32_t runs = 0;
        for (int group = 0; group < SKETCH; group++) runs |= (uint32_t)width_of(keys, group) / 2 << (4 * group);
        p.sketch_pages[index] = SketchPage{page.leading, (uint16_t)runs, (uint8_t)tokens, 0};
    }
    if (thread < TILES) {
        Tile tile = profile;
        tile.leading = page.leading;
        tile.lines = page.lines + thread * of_tile;
        uint32_t held = max_of(0, min_of(tokens - thread * TILE_TOKENS, TILE_TOKENS));
        tile.profiles[1] = (page.profiles[1] & 0xffff) | held << 16 | (uint32_t)thread << 24;
        for (int i = 0; i < TILES; i++) {
            if (i != thread) continue;
            tile.key_escapes = starts[0][i];
            tile.value_escapes = starts[1][i];
            tile.escapes = counts[0][i] | counts[1][i] << 16;
        }
        p.tiles[index * TILES + thread] = tile;
    }
}

KERNEL(layered_count_64, EncodeParameters, ENCODE_THREADS, 4) {
    follow();
    count_of_page<64>(p);
}
KERNEL(layered_count_128, EncodeParameters, ENCODE_THREADS, 4) {
    follow();
    count_of_page<128>(p);
}
KERNEL(layered_encode_64, EncodeParameters, ENCODE_THREADS, 4) {
    follow();
    encode_of_page<64>(p);
}
KERNEL(layered_encode_128, EncodeParameters, ENCODE_THREADS, 4) {
    follow();
    encode_of_page<128>(p);
}
