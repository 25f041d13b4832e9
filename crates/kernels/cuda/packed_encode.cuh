// Which elements are kept? Packed pages out of vectors, to the bit what `PackedPage::encode` in `src/packed/encode.rs` makes of them; and the rotation
// before it, which adds in another order than the CPU does.
#pragma once

#include "packed_turn.cuh"

// Vectors into a segment's channels.
struct PackedRotateParameters {
    const float* vectors;    // [T, D]
    const uint16_t* matrix;  // [D, C], or transposed
    float* out;              // [T, C]
    int32_t tokens, transposed;
};

// Tokens that become the segment's blocks from `first` on.
struct PackedEncodeParameters {
    const float* keys;       // [T, C], rotated
    const float* values;
    const uint64_t* pages;   // the segment's, addresses
    uint32_t first, blocks;
    PackedStrategy strategy;
    uint32_t unused;
};

constexpr int PACKED_ENCODE_THREADS = 256;
constexpr int PACKED_ENCODE_WARPS = PACKED_ENCODE_THREADS / WARP;

template <int C>
struct PackedEncodeShared {
    float vectors[PACKED_ENCODE_WARPS][C];
};

template <int D>
DEVICE void packed_rotate_of(const PackedRotateParameters& p) {
    constexpr int C = D / 4 * 3;
    auto& shared = *reinterpret_cast<TurnPackedShared<D>*>(shared_memory());
    auto share = packed_share<D, D, C>(p.matrix, p.transposed != 0);
    for (int first = block_index() * ROWS; first < p.tokens; first += grid_blocks() * ROWS) {
        int count = min_of(ROWS, p.tokens - first);
        for (int i = thread_index(); i < ROWS * D; i += TURN_PACKED_THREADS<D>) {
            shared.rows[i % D][i / D] = i / D < count ? p.vectors[(int64_t)first * D + i] : 0;
        }
        float turned[ROWS];
        turn_rows<D, D, C>(shared, share, turned);
        if (thread_index() < C) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                if (row < count) p.out[(int64_t)(first + row) * C + thread_index()] = turned[row];
            }
        }
    }
}

// Groups of a vector that a lane has: `lane`, `lane + 32` and so on; of each how much it is worth, in bits that order like it.
template <int C>
struct Worth {
    static constexpr int WORDS = (C + WARP - 1) / WARP;
    uint32_t of[WORDS];
    int groups;
};

template <int C>
DEVICE bool has_group(const Worth<C>& worth, int word) {
    return word * WARP + thread_index() % WARP < worth.groups;
}
// Which groups are worth at least so much, and how many.
template <int C>
DEVICE uint32_t reaching(const Worth<C>& worth, int word, uint32_t least) {
    return lanes_with(has_group(worth, word) && worth.of[word] >= least);
}
template <int C>
DEVICE int count_reaching(const Worth<C>& worth, uint32_t least) {
    int n = 0;
#pragma unroll
    for (int i = 0; i < Worth<C>::WORDS; i++) n += count_ones(reaching(worth, i, least));
    return n;
}

template <int C>
DEVICE Worth<C> worth_of(const float* vector, int group_bits) {
    Worth<C> out;
    out.groups = C >> group_bits;
#pragma unroll
    for (int i = 0; i < Worth<C>::WORDS; i++) {
        int first = (i * WARP + thread_index() % WARP) << group_bits;
        out.of[i] = 0;
        if (!has_group(out, i)) continue;
        // One element is worth its magnitude: its square would lose small ones to underflow.
        float sum = vector[first];
        if (group_bits > 0) {
            sum = 0;
            for (int j = 0; j < 1 << group_bits; j++) sum += product(vector[first + j], vector[first + j]);
        }
        out.of[i] = float_to_bits(sum) & 0x7fffffff;
    }
    return out;
}

// A number that `n` groups are worth at least and fewer are worth more.
template <int C>
DEVICE uint32_t nth_largest(const Worth<C>& worth, int n) {
    uint32_t found = 0;
#pragma unroll 1
    for (int bit = 30; bit >= 0; bit--) {
        uint32_t candidate = found | 1u << bit;
        int reach = count_reaching(worth, candidate);
        if (reach == n) return candidate;
        if (reach > n) found = candidate;
    }
    return found;
}

// Bits of the lanes before this one.
DEVICE uint32_t lanes_before() { return (1u << thread_index() % WARP) - 1; }

// Packs a vector, by one warp.
template <int C>
DEVICE void pack_vector(const float* vector, const PackedStrategy& strategy, unsigned char* elements, unsigned char* bitmap) {
    constexpr int WORDS = Worth<C>::WORDS;
    int lane = thread_index() % WARP, group_bits = strategy.group_bits, wanted = strategy.kept >> group_bits;
    Worth<C> worth = worth_of<C>(vector, group_bits);
    uint32_t last = nth_largest<C>(worth, wanted), bits[WORDS];
    // All that are worth more, and of those that are worth as much the first ones.
    int ties = wanted - count_reaching(worth, last + 1), before = 0;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        uint32_t more = reaching(worth, i, last + 1), same = reaching(worth, i, last) & ~more;
        bool is_first = (same >> lane & 1) && count_ones(same & lanes_before()) < ties;
        bits[i] = more | lanes_with(is_first);
        ties -= min_of(ties, count_ones(same));
    }
    uint16_t* halves = reinterpret_cast<uint16_t*>(elements);
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        int at = before + count_ones(bits[i] & lanes_before()), first = i * WARP + lane;
        if (bits[i] >> lane & 1) {
            for (int j = 0; j < 1 << group_bits; j++) {
                float x = vector[(first << group_bits) + j];
                halves[(at << group_bits) + j] = float_to_half(max_of(x < 65504.0f ? x : 65504.0f, -65504.0f));
            }
        }
        before += count_ones(bits[i]);
        int byte = lane - 4 * i;
        if (byte >= 0 && byte < 4 && lane < (worth.groups + 7) / 8) bitmap[lane] = bits[i] >> (8 * byte);
    }
}

// A token block, by one block of threads: its keys, its values, and its key.
template <int D>
DEVICE void packed_encode_of(const PackedEncodeParameters& p) {
    constexpr int C = D / 4 * 3;
    auto& shared = *reinterpret_cast<PackedEncodeShared<C>*>(shared_memory());
    int warp = thread_index() / WARP, lane = thread_index() % WARP;
    PackedLayout layout = layout_of<C>(p.strategy);
    int tokens = 1 << layout.block_bits, bits = page_bits(layout);
    uint32_t block = p.first + block_index(), in_page = block & ((1u << bits) - 1);
    unsigned char* page = reinterpret_cast<unsigned char*>(p.pages[block >> bits]);
    unsigned char* at = page + layout.key_bytes + (int64_t)in_page * layout.block_bytes;
    const float* keys = p.keys + (int64_t)block_index() * tokens * C;
    const float* values = p.values + (int64_t)block_index() * tokens * C;
    float* vector = shared.vectors[warp];
    int of_keys = layout.row_bytes * tokens, of_bitmaps = layout.bitmap_bytes * tokens;
    for (int task = warp; task <= 2 * tokens; task += PACKED_ENCODE_WARPS) {
        bool is_mean = task == 2 * tokens, is_value = task >= tokens;
        int row = task % tokens;
        for (int c = lane; c < C; c += WARP) {
            float x = 0;
            if (is_mean) {
                for (int i = 0; i < tokens; i++) x += product(keys[i * C + c], 1.0f / tokens);
            } else {
                x = (is_value ? values : keys)[row * C + c];
            }
            vector[c] = x;
        }
        sync_warp();
        unsigned char* elements = at + is_value * of_keys + row * layout.row_bytes;
        unsigned char* bitmap = at + 2 * of_keys + is_value * of_bitmaps + row * layout.bitmap_bytes;
        if (is_mean) {
            elements = page + in_page * layout.row_bytes;
            bitmap = page + (layout.row_bytes << bits) + in_page * layout.bitmap_bytes;
        }
        pack_vector<C>(vector, p.strategy, elements, bitmap);
        sync_warp();
    }
    // What fills up a block's last 16 bytes.
    for (int i = 2 * (of_keys + of_bitmaps) + thread_index(); i < layout.block_bytes; i += PACKED_ENCODE_THREADS) at[i] = 0;
}

KERNEL(packed_rotate_64, PackedRotateParameters, TURN_PACKED_THREADS<64>, 2) {
    follow();
    packed_rotate_of<64>(p);
}
KERNEL(packed_rotate_128, PackedRotateParameters, TURN_PACKED_THREADS<128>, 2) {
    follow();
    packed_rotate_of<128>(p);
}
KERNEL(packed_encode_64, PackedEncodeParameters, PACKED_ENCODE_THREADS, 4) {
    follow();
    packed_encode_of<64>(p);
}
KERNEL(packed_encode_128, PackedEncodeParameters, PACKED_ENCODE_THREADS, 4) {
    follow();
    packed_encode_of<128>(p);
}
