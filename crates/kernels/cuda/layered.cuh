// Attention to parts of what heads read of layered pages: whole or chosen tiles of them.
#pragma once

#include "fold.cuh"
#include "select.cuh"

// Tiles of the longest list that is cut into 16 parts: as many as 16 of the parts that a long one has.
constexpr int SHORT_LIST = 512;

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

// Tiles of a part of `count`: as many as the step says, or fewer, so that of 32 heads with short lists, or of 8 with long ones, all parts run at once.
DEVICE int part_of(const LayeredParameters& p, int count) {
    int parts = count <= SHORT_LIST ? 16 : 64;
    int share = max_of(8, (count + 8 * parts - 1) / (8 * parts) * 8);
    return parts_unit(count, p.states.slots, min_of(p.least_part, share), 8);
}
DEVICE int parts_of(const LayeredParameters& p, int count) {
    int part = part_of(p, count);
    return (count + part - 1) / part;
}

template <int D, bool NARROW>
DEVICE void layered_attend_by(const LayeredParameters& p) {
    constexpr int DISTINCT = NARROW ? ROWS / 2 : ROWS;
    auto& shared = *reinterpret_cast<LayeredShared<D>*>(shared_memory());
    int warp = thread_index() / WARP, lane = thread_index() % WARP;
    int heads = p.sequences * p.kv_heads;
    auto count_of = [&](int i) { return (int)(p.counts[i] & ~ALL_TILES); };
    count_parts(shared.ends, heads, [&](int i) { return parts_of(p, count_of(i)); });
    uint32_t items = shared.ends[heads - 1];
    if (thread_index() == 0) write_tables(shared.tables);
    for (uint32_t item = block_index(); item < items; item += grid_blocks()) {
        int index = head_of(shared.ends, heads, item);
        int number = item - (index > 0 ? shared.ends[index - 1] : 0), count = count_of(index);
        int part = part_of(p, count);
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
