// Which tiles does a step attend to? Those without which a query would miss more than it may.
//
// From how many tiles have which code follows for each query the code below which tiles may be missed; a tile is wanted as much as by
// the query that wants it most (`layered_want`). If too few or too many are wanted, the cut moves; of the tiles at the cut the first
// ones are taken. Written is a list in order, so that neighbours in memory are read together (`layered_list`). Both take slices of a head,
// each of which counts how much its tiles are wanted, and knows from the others' counts where its part of the list begins.
//
// Against `choose.rs` weights are known to a quarter of an octave: sums of many are right to some percent.
#pragma once

#include "sketch.cuh"

constexpr int SELECT_THREADS = 256;
constexpr int SELECT_WARPS = SELECT_THREADS / WARP;
// Pages of a slice, and of a thread.
constexpr int SLICE_PAGES = 1024;
constexpr int THREAD_PAGES = SLICE_PAGES / SELECT_THREADS;
// A tile that is just wanted.
constexpr int WANTED = 128;

struct SelectShared {
    int thresholds[ROWS];
    uint32_t totals[SELECT_WARPS];
    uint32_t counts[BINS];
    uint32_t at_least[BINS + 1];
    uint32_t before[BINS];
    uint32_t cut, take;
};

DEVICE float weight_of_code(int code) { return exp2_fast((code - CODE_OF_ONE + 0.5f) / CODES_PER_OCTAVE); }

// The least code that row `row` needs, by one warp.
DEVICE int threshold_of(const LayeredParameters& p, int head, int row) {
    constexpr int OF_LANE = BINS / WARP;
    int lane = thread_index() % WARP;
    const uint4* four_bins = reinterpret_cast<const uint4*>(p.histogram + ((int64_t)head * ROWS + row) * BINS + lane * OF_LANE);
    uint4 first = four_bins[0], last = four_bins[1];
    uint32_t bins[OF_LANE] = {first.x, first.y, first.z, first.w, last.x, last.y, last.z, last.w};
    float weights[OF_LANE], mine = 0;
    int top = 0;
#pragma unroll
    for (int i = 0; i < OF_LANE; i++) {
        uint32_t count = bins[i];
        int code = lane * OF_LANE + i;
        weights[i] = count > 0 && code > 0 ? count * weight_of_code(code) : 0;
        if (count > 0) top = code;
        mine += weights[i];
    }
    if (p.selection.missed < 0) {
#pragma unroll
        for (int mask = 1; mask < WARP; mask *= 2) top = max_of(top, shuffle_xor(top, mask));
        return max_of(1, top + round_to_int(p.selection.relative * CODES_PER_OCTAVE));
    }
    // What is known weighs 1.
    float all = warp_sum<1>(mine), may_miss = p.selection.missed * (1 + all), before = warp_sum_upto(mine) - mine;
    int least = 0;
#pragma unroll
    for (int i = 0; i < OF_LANE; i++) {
        // All below this bin may be missed.
        if (before <= may_miss) least = lane * OF_LANE + i;
        before += weights[i];
    }
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2) least = max_of(least, shuffle_xor(least, mask));
    // If even all of them may: what is in the last bin too.
    if (all <= may_miss) least = BINS;
    return max_of(1, least);
}

// How much the tile is wanted whose codes are in these words.
DEVICE uint32_t wanted_of(const int (&thresholds)[ROWS], uint32_t first, uint32_t second, bool both) {
    int most = -WANTED;
#pragma unroll
    for (int row = 0; row < 4; row++) most = max_of(most, int(first >> (8 * row) & 0xff) - thresholds[row]);
    if (both) {
#pragma unroll
        for (int row = 0; row < 4; row++) most = max_of(most, int(second >> (8 * row) & 0xff) - thresholds[4 + row]);
    }
    return min_of(most + WANTED, 255);
}

DEVICE void want_of(const LayeredParameters& p) {
    auto& shared = *reinterpret_cast<SelectShared*>(shared_memory());
    int index = block_index() / p.slices, slice = block_index() % p.slices, warp = thread_index() / WARP;
    const Head& head = p.heads[index];
    int first = slice * SLICE_PAGES, end = min_of(head.selectable, first + SLICE_PAGES);
    bool chosen = chooses(p, head);
    follow();
    if (!chosen || first >= end) return;
    // Asked for together, before anything waits. A page's four tiles are 16 bytes for four rows each.
    const uint4* codes = reinterpret_cast<const uint4*>(p.codes + (int64_t)index * p.tile_stride * p.rows_stored);
    bool both = p.rows_stored > 4;
    uint4 first_rows[THREAD_PAGES], last_rows[THREAD_PAGES];
#pragma unroll
    for (int i = 0; i < THREAD_PAGES; i++) {
        int page = min_of(first + i * SELECT_THREADS + thread_index(), end - 1);
        first_rows[i] = codes[both ? 2 * page : page];
        last_rows[i] = codes[both ? 2 * page + 1 : page];
    }
    // Rows that do not exist want nothing.
    int threshold = warp < p.rows ? threshold_of(p, index, warp) : 2 * BINS;
    if (thread_index() % WARP == 0) shared.thresholds[warp] = threshold;
    shared.counts[thread_index()] = 0;
    sync_block();
    int thresholds[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; row++) thresholds[row] = shared.thresholds[row];
    uint32_t* wanted = reinterpret_cast<uint32_t*>(p.wanted + (int64_t)index * p.tile_stride);
#pragma unroll
    for (int i = 0; i < THREAD_PAGES; i++) {
        int page = first + i * SELECT_THREADS + thread_index();
        if (page >= end) break;
        uint4 a = first_rows[i], b = last_rows[i];
        uint32_t words[TILES][2] = {{a.x, a.x}, {a.y, a.y}, {a.z, a.z}, {a.w, a.w}};
        if (both) {
            words[0][1] = a.y;
            words[1][0] = a.z;
            words[1][1] = a.w;
            words[2][0] = b.x;
            words[2][1] = b.y;
            words[3][0] = b.z;
            words[3][1] = b.w;
        }
        uint32_t of_page = 0;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint32_t of_tile = wanted_of(thresholds, words[tile][0], words[tile][1], both);
            of_page |= of_tile << (8 * tile);
            add_shared(&shared.counts[of_tile], 1);
        }
        wanted[page] = of_page;
    }
    sync_block();
    p.wanted_counts[((int64_t)index * p.slices + slice) * BINS + thread_index()] = shared.counts[thread_index()];
}

// Finds the cut, and how many tiles are taken; `counts` are those of all slices. Where tiles are counted that are wanted at least as much as
// each number, and in earlier slices, `shared` has it afterwards.
DEVICE void find_cut(const LayeredParameters& p, SelectShared& shared, const uint32_t* counts, int slices, int slice, int tiles) {
    uint32_t all_slices = 0, before_slice = 0;
#pragma unroll 8
    for (int i = 0; i < slices; i++) {
        uint32_t count = counts[i * BINS + thread_index()];
        all_slices += count;
        if (i < slice) before_slice += count;
    }
    uint32_t all, below = block_before(shared.totals, all_slices, all);
    shared.counts[thread_index()] = all_slices;
    shared.at_least[thread_index()] = all - below;
    shared.before[thread_index()] = before_slice;
    if (thread_index() == 0) shared.at_least[BINS] = 0;
    sync_block();
    uint32_t least = min_of(p.selection.least_tiles, tiles), most = min_of(least + tiles / p.selection.one_in, tiles);
    uint32_t needed = shared.at_least[WANTED], take = needed < least ? least : needed > most ? most : needed;
    // The highest cut that leaves enough tiles; where just the needed ones are taken, the one at which they are wanted.
    uint32_t bin = thread_index();
    bool is_cut = take == needed ? bin == WANTED : shared.at_least[bin] >= take && shared.at_least[bin + 1] < take;
    if (is_cut) {
        shared.cut = bin;
        shared.take = take;
    }
    sync_block();
}

// Tiles of earlier slices over the cut.
DEVICE uint32_t before_over_cut(const SelectShared& shared) {
    uint32_t of_lane = 0;
#pragma unroll
    for (int i = 0; i < BINS / WARP; i++) {
        uint32_t bin = i * WARP + thread_index() % WARP;
        if (bin > shared.cut) of_lane += shared.before[bin];
    }
    return warp_sum<1>(of_lane);
}

DEVICE void list_of(const LayeredParameters& p) {
    auto& shared = *reinterpret_cast<SelectShared*>(shared_memory());
    int index = block_index() / p.slices, slice = block_index() % p.slices;
    const Head& head = p.heads[index];
    bool chosen = chooses(p, head);
    follow();
    if (!chosen) {
        if (slice == 0 && thread_index() == 0) p.counts[index] = ALL_TILES | head.page_count * TILES;
        return;
    }
    int slices = (head.selectable + SLICE_PAGES - 1) / SLICE_PAGES, tiles = head.selectable * TILES;
    if (slice >= slices) return;
    // Of this thread's pages, which follow each other: how much tiles are wanted, then those over the cut and at it.
    const uint32_t* wanted = reinterpret_cast<const uint32_t*>(p.wanted + (int64_t)index * p.tile_stride);
    int first = slice * SLICE_PAGES + thread_index() * THREAD_PAGES;
    uint32_t words[THREAD_PAGES], over = 0, at = 0;
#pragma unroll
    for (int i = 0; i < THREAD_PAGES; i++) words[i] = first + i < (int)head.selectable ? wanted[first + i] : 0;
    find_cut(p, shared, p.wanted_counts + (int64_t)index * p.slices * BINS, slices, slice, tiles);
    uint32_t cut = shared.cut, take = shared.take, room = take - shared.at_least[cut + 1];
#pragma unroll
    for (int i = 0; i < THREAD_PAGES; i++) {
        // What is wanted least is never over a cut, and at one only where it is.
        bool exists = first + i < (int)head.selectable;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint32_t of_tile = words[i] >> (8 * tile) & 0xff;
            over += exists && of_tile > cut;
            at += exists && of_tile == cut;
        }
    }
    // Both in one sum: a slice has 4,096 tiles.
    uint32_t all, before = block_before(shared.totals, over | at << 16, all);
    uint32_t over_before = (before & 0xffff) + before_over_cut(shared), at_before = (before >> 16) + shared.before[cut];
    uint32_t* list = p.list + (int64_t)index * p.list_stride;
#pragma unroll
    for (int i = 0; i < THREAD_PAGES; i++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint32_t of_tile = words[i] >> (8 * tile) & 0xff;
            bool exists = first + i < (int)head.selectable;
            bool is_over = exists && of_tile > cut, is_at = exists && of_tile == cut;
            uint32_t to = over_before + (at_before < room ? at_before : room);
            if ((is_over || (is_at && at_before < room)) && to < (uint32_t)p.list_stride) list[to] = (first + i) * TILES + tile;
            over_before += is_over;
            at_before += is_at;
        }
    }
    if (slice > 0) return;
    for (int i = thread_index(); i < ROWS * BINS; i += SELECT_THREADS) p.histogram[(int64_t)index * ROWS * BINS + i] = 0;
    uint32_t always = (head.page_count - head.selectable) * TILES;
    for (uint32_t i = thread_index(); i < always; i += SELECT_THREADS) {
        if (take + i < (uint32_t)p.list_stride) list[take + i] = tiles + i;
    }
    if (thread_index() == 0) p.counts[index] = min_of(take + always, p.list_stride);
}

KERNEL(layered_want, LayeredParameters, SELECT_THREADS, 4) { want_of(p); }
KERNEL(layered_list, LayeredParameters, SELECT_THREADS, 4) { list_of(p); }
