// Which token blocks does a step attend to? The best, as many as it takes to hold the share of tokens that is read (`top_tokens` in
// `src/select.rs`), those of all of a head's segments together.
//
// A block is as important as it is to the query that wants it most: the largest logarithm of its key's share among all of the head's
// (`packed_want`). That becomes an integer of 22 bits, in steps of 2^-16 octaves down to -64; blocks whose integers are the same are taken in order.
// Its first digit finds most of them: of the blocks whose first digit is that of the last one taken there are few, which are put apart
// (`packed_narrow`). From these follow the cut and how many of them each slice has, so that each slice knows where its part of the list begins
// (`packed_list`). Counts are integers: whoever comes first, the list is the same.
#pragma once

#include "packed.cuh"

constexpr int PACKED_SELECT_THREADS = 256;
constexpr int PACKED_SELECT_WARPS = PACKED_SELECT_THREADS / WARP;
constexpr int KEY_OCTAVES = 64;
constexpr float KEYS_PER_OCTAVE = 1 << 16;
constexpr int SLICES_OF_THREAD = MOST_SLICES / PACKED_SELECT_THREADS;

struct PackedSelectShared {
    uint32_t totals[PACKED_SELECT_WARPS];
    float log_sums[ROWS];
    // Tokens that have a digit.
    uint32_t digits[DIGITS];
    // Of each slice: blocks over the cut, and at it.
    uint32_t above[MOST_SLICES];
    uint32_t at_cut[MOST_SLICES];
    // Of each slice: blocks that are taken, in it and before it; how many of those at the cut are.
    uint32_t taken[MOST_SLICES];
    uint32_t before[MOST_SLICES];
    uint32_t ties[MOST_SLICES];
    uint32_t counts[MOST_SEGMENTS];
    PackedCut cut;
    uint32_t base;
};

// The slices of a head that this block of threads has: what all of a head's need is worked out once for some.
struct SliceRange {
    int index;
    int first, end;
};

DEVICE SliceRange range_of(const PackedParameters& p) {
    int index = block_index() / p.selecting, number = block_index() % p.selecting, slices = chooses(p) ? p.heads[index].slices : 0;
    return SliceRange{index, slices * number / p.selecting, slices * (number + 1) / p.selecting};
}

DEVICE const PackedSlice& slice_at(const PackedParameters& p, int index, int number) {
    return p.slices[(int64_t)index * p.slice_stride + number];
}

DEVICE int block_bits_of(const PackedParameters& p, int index, int number) {
    return p.segments[(int64_t)index * p.segment_stride + slice_at(p, index, number).segment].strategy.block_bits;
}

// Finds the highest digit that leaves at least `wanted` tokens, `counts` being those of each; and how many those over it hold.
DEVICE PackedCut find_digit(PackedSelectShared& shared, const uint32_t* counts, uint32_t wanted) {
    constexpr int OF_THREAD = DIGITS / PACKED_SELECT_THREADS;
    uint32_t mine[OF_THREAD], sum = 0;
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
        mine[i] = counts[thread_index() * OF_THREAD + i];
        sum += mine[i];
    }
    uint32_t all, below = block_before(shared.totals, sum, all), at_least = all - below;
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
        uint32_t over = at_least - mine[i];
        if (at_least >= wanted && over < wanted) shared.cut = PackedCut{uint32_t(thread_index() * OF_THREAD + i), over};
        at_least = over;
    }
    sync_block();
    return shared.cut;
}

// The logarithms of the sums of all slices' weights, of each row by a warp.
DEVICE void sum_slices(const PackedParameters& p, PackedSelectShared& shared, int index) {
    int warp = thread_index() / WARP, lane = thread_index() % WARP, slices = p.heads[index].slices;
    const float* sums = p.sums + (int64_t)index * p.slice_stride * ROWS * 2 + warp * 2;
    float top = NONE, total = 0;
    for (int i = lane; i < slices; i += WARP) top = max_of(top, sums[i * ROWS * 2]);
    top = warp_max<1>(top);
    for (int i = lane; i < slices; i += WARP) total += sums[i * ROWS * 2 + 1] * exp2_fast(sums[i * ROWS * 2] - top);
    total = warp_sum<1>(total);
    if (lane == 0) shared.log_sums[warp] = top + log2_fast(total);
}

// How much the block is wanted whose scores these are.
DEVICE uint32_t key_of(const PackedParameters& p, const PackedSelectShared& shared, const float4* scores) {
    float best = NONE;
    for (int row = 0; row < p.rows; row += 4) {
        float4 four = scores[row / 4];
        best = max_of(best, four.x - shared.log_sums[row]);
        if (row + 1 < p.rows) best = max_of(best, four.y - shared.log_sums[row + 1]);
        if (row + 2 < p.rows) best = max_of(best, four.z - shared.log_sums[row + 2]);
        if (row + 3 < p.rows) best = max_of(best, four.w - shared.log_sums[row + 3]);
    }
    int key = floor_to_int((best + KEY_OCTAVES) * KEYS_PER_OCTAVE);
    return min_of(max_of(key, 0), DIGITS * DIGITS - 1);
}

DEVICE void packed_want_of(const PackedParameters& p) {
    auto& shared = *reinterpret_cast<PackedSelectShared*>(shared_memory());
    SliceRange range = range_of(p);
    if (range.first >= range.end) return;
    for (int i = thread_index(); i < DIGITS; i += PACKED_SELECT_THREADS) shared.digits[i] = 0;
    sum_slices(p, shared, range.index);
    sync_block();
    for (int number = range.first; number < range.end; number++) {
        PackedSlice slice = slice_at(p, range.index, number);
        uint32_t tokens = 1u << block_bits_of(p, range.index, number);
        int64_t first = (int64_t)range.index * p.block_stride + slice.first_block;
        for (int i = thread_index(); i < (int)slice.blocks; i += PACKED_SELECT_THREADS) {
            uint32_t key = key_of(p, shared, reinterpret_cast<const float4*>(p.scores + (first + i) * p.rows_stored));
            p.keys[first + i] = key;
            add_shared(&shared.digits[key >> DIGIT_BITS], tokens);
        }
    }
    sync_block();
    for (int i = thread_index(); i < DIGITS; i += PACKED_SELECT_THREADS) {
        if (shared.digits[i] > 0) add_global(&p.histogram[(int64_t)range.index * DIGITS + i], shared.digits[i]);
    }
}

// Counts a slice's blocks over the cut, and puts those apart that have its first digit.
DEVICE void narrow_slice(const PackedParameters& p, PackedSelectShared& shared, int index, int number, uint32_t digit) {
    const PackedSlice& slice = slice_at(p, index, number);
    const uint32_t* keys = p.keys + (int64_t)index * p.block_stride + slice.first_block;
    uint32_t* candidates = p.candidates + (int64_t)index * p.block_stride;
    uint32_t over = 0;
    for (int start = 0; start < (int)slice.blocks; start += PACKED_SELECT_THREADS) {
        int i = start + thread_index();
        bool exists = i < (int)slice.blocks;
        uint32_t key = exists ? keys[i] : 0;
        bool is_over = exists && key >> DIGIT_BITS > digit, is_at = exists && key >> DIGIT_BITS == digit;
        uint32_t all, before = block_before(shared.totals, (uint32_t)is_at | (uint32_t)is_over << 16, all);
        over += all >> 16;
        if (thread_index() == 0 && (all & 0xffff) > 0) shared.base = take_global(&p.candidate_counts[index], all & 0xffff);
        sync_block();
        uint32_t to = shared.base + (before & 0xffff);
        if (is_at && to < (uint32_t)p.block_stride) candidates[to] = (uint32_t)number << DIGIT_BITS | (key & (DIGITS - 1));
    }
    if (thread_index() == 0) p.over[(int64_t)index * p.slice_stride + number] = over;
}

DEVICE void packed_narrow_of(const PackedParameters& p) {
    auto& shared = *reinterpret_cast<PackedSelectShared*>(shared_memory());
    SliceRange range = range_of(p);
    if (range.first >= range.end) return;
    PackedCut cut = find_digit(shared, p.histogram + (int64_t)range.index * DIGITS, wanted_tokens(p, p.heads[range.index]));
    if (range.first == 0 && thread_index() == 0) p.cuts[range.index] = cut;
    for (int number = range.first; number < range.end; number++) narrow_slice(p, shared, range.index, number, cut.digit);
}

// How many blocks of each slice, and of each segment, are taken. Returns the last digit at which the cut is.
DEVICE uint32_t count_taken(const PackedParameters& p, PackedSelectShared& shared, int index, int slices) {
    for (int i = thread_index(); i < DIGITS; i += PACKED_SELECT_THREADS) shared.digits[i] = 0;
    for (int i = thread_index(); i < MOST_SLICES; i += PACKED_SELECT_THREADS) {
        shared.above[i] = i < slices ? p.over[(int64_t)index * p.slice_stride + i] : 0;
        shared.at_cut[i] = 0;
        // For now how many tokens its blocks have.
        shared.ties[i] = i < slices ? block_bits_of(p, index, i) : 0;
    }
    for (int i = thread_index(); i < MOST_SEGMENTS; i += PACKED_SELECT_THREADS) shared.counts[i] = 0;
    sync_block();
    const uint32_t* candidates = p.candidates + (int64_t)index * p.block_stride;
    int count = min_of(p.candidate_counts[index], p.block_stride);
    for (int i = thread_index(); i < count; i += PACKED_SELECT_THREADS) {
        add_shared(&shared.digits[candidates[i] & (DIGITS - 1)], 1u << shared.ties[candidates[i] >> DIGIT_BITS]);
    }
    sync_block();
    uint32_t wanted = wanted_tokens(p, p.heads[index]) - p.cuts[index].over;
    PackedCut cut = find_digit(shared, shared.digits, wanted);
    for (int i = thread_index(); i < count; i += PACKED_SELECT_THREADS) {
        uint32_t digit = candidates[i] & (DIGITS - 1), slice = candidates[i] >> DIGIT_BITS;
        if (digit > cut.digit) add_shared(&shared.above[slice], 1);
        if (digit == cut.digit) add_shared(&shared.at_cut[slice], 1);
    }
    sync_block();
    // A thread has slices that follow each other.
    int first = thread_index() * SLICES_OF_THREAD;
    uint32_t tokens = 0, all;
#pragma unroll
    for (int i = 0; i < SLICES_OF_THREAD; i++) tokens += shared.at_cut[first + i] << shared.ties[first + i];
    uint32_t held = cut.over + block_before(shared.totals, tokens, all), blocks = 0;
#pragma unroll
    for (int i = 0; i < SLICES_OF_THREAD; i++) {
        int slice = first + i, bits = shared.ties[slice];
        uint32_t at_cut = shared.at_cut[slice], room = held < wanted ? wanted - held : 0;
        // As many as it takes.
        uint32_t ties = min_of(at_cut, (room + (1u << bits) - 1) >> bits);
        held += at_cut << bits;
        shared.ties[slice] = ties;
        shared.taken[slice] = shared.above[slice] + ties;
        blocks += shared.taken[slice];
    }
    uint32_t before = block_before(shared.totals, blocks, all);
#pragma unroll
    for (int i = 0; i < SLICES_OF_THREAD; i++) {
        shared.before[first + i] = before;
        before += shared.taken[first + i];
        if (first + i < slices) {
            add_shared(&shared.counts[slice_at(p, index, first + i).segment], shared.taken[first + i]);
        }
    }
    sync_block();
    return cut.digit;
}

// Writes what is taken of a slice, in order.
DEVICE void write_list(const PackedParameters& p, PackedSelectShared& shared, int index, int number, uint32_t cut) {
    const PackedSlice& slice = slice_at(p, index, number);
    const uint32_t* keys = p.keys + (int64_t)index * p.block_stride + slice.first_block;
    uint32_t* list = p.list + (int64_t)index * p.list_stride;
    uint32_t over_before = shared.before[number], at_before = 0, ties = shared.ties[number];
    for (int start = 0; start < (int)slice.blocks; start += PACKED_SELECT_THREADS) {
        int i = start + thread_index();
        bool exists = i < (int)slice.blocks;
        uint32_t key = exists ? keys[i] : 0;
        bool is_over = exists && key > cut, is_at = exists && key == cut;
        uint32_t all, before = block_before(shared.totals, (uint32_t)is_over | (uint32_t)is_at << 16, all);
        uint32_t over = over_before + (before & 0xffff), at = at_before + (before >> 16);
        uint32_t to = over + (at < ties ? at : ties);
        if ((is_over || (is_at && at < ties)) && to < (uint32_t)p.list_stride) list[to] = slice.first_block + i;
        over_before += all & 0xffff;
        at_before += all >> 16;
    }
}

// Cuts what is read of a head into parts, by one warp; `count_of` says how many blocks of a segment are read. Only their number decides.
template <class F>
DEVICE void make_plan(const PackedParameters& p, int index, F count_of) {
    int segments = p.heads[index].segments, lane = thread_index();
    const PackedSegment* of_head = p.segments + (int64_t)index * p.segment_stride;
    uint32_t tokens = 0;
    for (int i = lane; i < segments; i += WARP) tokens += count_of(i) << of_head[i].strategy.block_bits;
    int part_tokens = parts_unit(warp_sum<1>(tokens), p.states.slots - p.segment_stride, p.least_part, 16);
    uint32_t first = 0, first_part = 0;
#pragma unroll 1
    for (int start = 0; start < segments; start += WARP) {
        int i = start + lane;
        uint32_t count = i < segments ? count_of(i) : 0;
        uint32_t of_segment = i < segments ? count << of_head[i].strategy.block_bits : 0;
        uint32_t parts = (of_segment + part_tokens - 1) / part_tokens;
        uint32_t upto = warp_sum_upto(count), parts_upto = warp_sum_upto(parts);
        if (i < segments) {
            p.runs[(int64_t)index * p.segment_stride + i] = PackedRun{first + upto - count, count, first_part + parts_upto - parts, parts};
        }
        first += shuffle(upto, WARP - 1);
        first_part += shuffle(parts_upto, WARP - 1);
    }
    if (lane == 0) p.plans[index] = PackedPlan{first_part, (uint32_t)part_tokens};
}

DEVICE void packed_list_of(const PackedParameters& p) {
    auto& shared = *reinterpret_cast<PackedSelectShared*>(shared_memory());
    SliceRange range = range_of(p);
    int index = range.index, slices = chooses(p) ? p.heads[index].slices : 0;
    bool is_first = block_index() % p.selecting == 0;
    if (slices == 0) {
        // All of it, or there is nothing.
        const PackedSegment* segments = p.segments + (int64_t)index * p.segment_stride;
        if (is_first && thread_index() < WARP) make_plan(p, index, [&](int i) { return segments[i].blocks; });
        return;
    }
    if (range.first >= range.end && !is_first) return;
    uint32_t last = count_taken(p, shared, index, slices), cut = p.cuts[index].digit << DIGIT_BITS | last;
    for (int number = range.first; number < range.end; number++) write_list(p, shared, index, number, cut);
    if (!is_first) return;
    if (thread_index() < WARP) make_plan(p, index, [&](int i) { return shared.counts[i]; });
    for (int i = thread_index(); i < DIGITS; i += PACKED_SELECT_THREADS) p.histogram[(int64_t)index * DIGITS + i] = 0;
}

KERNEL(packed_want, PackedParameters, PACKED_SELECT_THREADS, 4) {
    follow();
    packed_want_of(p);
}
KERNEL(packed_narrow, PackedParameters, PACKED_SELECT_THREADS, 4) {
    follow();
    packed_narrow_of(p);
}
KERNEL(packed_list, PackedParameters, PACKED_SELECT_THREADS, 4) {
    follow();
    packed_list_of(p);
}
