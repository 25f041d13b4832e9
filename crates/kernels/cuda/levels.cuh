// What do codes of 2, 4 and 8 bits stand for? Signed bytes for tensor cores, unpacked in registers.
//
// The levels are those of `Width` in src/layered.rs, in units of 4.8 / 127. Four bits take two tables of eight entries: a byte permutation whose
// selector is the codes themselves gives the level of codes below 8 and -1 for others (the sign of any entry, repeated), and with the codes'
// highest bits flipped the level of the others, plus 1, and 0 for those below. Their sum is the level; rather than add bytes, a
// product takes both, one after the other.
#pragma once

#include "parameters.cuh"

// Of one lane: bytes for a product's two halves of the shared dimension, in two summands.
struct Levels {
    uint32_t low, high;
    uint32_t more_low, more_high;
};

// Levels of codes below 8: -72, -55, -43, -33, -25, -17, -10, -3.
constexpr uint32_t BELOW_FIRST = 0xdfd5c9b8, BELOW_LAST = 0xfdf6efe7;
// Of the others, plus 1: 4, 11, 18, 26, 34, 44, 56, 73.
constexpr uint32_t ABOVE_FIRST = 0x1a120b04, ABOVE_LAST = 0x49382c22;
constexpr uint32_t FLIP = 0x80808080;

// Both tables. In shared memory first: what the compiler knows it copies before each use.
struct Tables {
    uint32_t below[2], above[2];
};

// By one thread, into 16 bytes of shared memory.
DEVICE void write_tables(uint4& to) { to = uint4{BELOW_FIRST, BELOW_LAST, ABOVE_FIRST, ABOVE_LAST}; }
DEVICE Tables read_tables(const uint4& from) {
    uint4 x = load_shared_here(&from);
    return Tables{{x.x, x.y}, {x.z, x.w}};
}

// Four codes of 4 bits: those in the low 16 bits.
DEVICE void four_bits(const Tables& tables, uint32_t codes, uint32_t& level, uint32_t& more) {
    level = pick_bytes(tables.below[0], tables.below[1], codes);
    more = pick_bytes(tables.above[0], tables.above[1], codes ^ 0x8888);
}

// Four codes of 2 bits, those in the lowest bits of each byte. Their levels -40, -12, 12, 40 are 26 times the code, and 2 for odd ones,
// less 40.
DEVICE uint32_t two_bits(uint32_t codes) {
    uint32_t biased = (codes & 0x03030303) * 26 + 0x58585858 + (codes & 0x01010101) * 2;
    return biased ^ FLIP;
}

// Bytes of `a` and `b` in turn: the first two of each, and the last two.
DEVICE uint32_t first_in_turn(uint32_t a, uint32_t b) { return pick_bytes(a, b, 0x5140); }
DEVICE uint32_t last_in_turn(uint32_t a, uint32_t b) { return pick_bytes(a, b, 0x7362); }

// Levels of 2 bits, as above.
constexpr uint32_t TWO_BITS = 0x280cf4d8;
// Of each byte the codes at bits `shift` and `shift + 2`, in turn: of the first two bytes, and of the last two. A byte permutation looks four up, whose
// selector has a code in each four bits.
DEVICE void two_bits_in_turn(uint32_t codes, int shift, uint32_t& low, uint32_t& high) {
    uint32_t x = codes >> shift, selector = (x & 0x03030303) | (x << 2 & 0x30303030);
    low = pick_bytes(TWO_BITS, TWO_BITS, selector);
    high = pick_bytes(TWO_BITS, TWO_BITS, selector >> 16);
}

DEVICE Levels no_levels() { return Levels{0, 0, 0, 0}; }

// A word of each of a tile's two blocks of a group, as tile lines have them: eight codes, in turn one of the first block and one of
// the second. `word` is where it is in the group's first line; 2-bit codes begin at bit `shift`.
DEVICE Levels levels_of(const Tables& tables, const uint8_t* line, int word, int width, int shift) {
    Levels out = no_levels();
    if (width == 0) return out;
    uint32_t first = reinterpret_cast<const uint32_t*>(line)[word];
    if (width == 4) {
        four_bits(tables, first, out.low, out.more_low);
        four_bits(tables, first >> 16, out.high, out.more_high);
    } else if (width == 8) {
        uint32_t second = reinterpret_cast<const uint32_t*>(line)[word + 16];
        out.low = first_in_turn(first, second) ^ FLIP;
        out.high = last_in_turn(first, second) ^ FLIP;
    } else {
        two_bits_in_turn(first, shift, out.low, out.high);
    }
    return out;
}

// Where a group is among a tile's lines.
struct Place {
    int line;   // the first
    int width;  // 0: nowhere
    int shift;
};

// Group `group` of a part whose groups are `widths` of 8, 4 and 2 bits, those of 2 bits two to a line.
DEVICE Place place_of(int group, int eight, int four, int two) {
    if (group < eight) return Place{2 * group, 8, 0};
    group -= eight;
    if (group < four) return Place{2 * eight + group, 4, 0};
    group -= four;
    if (group < two) return Place{2 * eight + four + group / 2, 2, group % 2 * 4};
    return Place{0, 0, 0};
}

DEVICE int lines_of(int eight, int four, int two) { return 2 * eight + four + two / 2; }

// Groups of keys that lie apart.
constexpr int SKETCH = 4;

// Among the groups that lie apart: the line where one begins in its page, and its width. What lies apart is in the GPU's
// order: units of 16 bytes, 8 for each run of 128 bytes, unit g for tokens g and g + 8.
//
// 8 bits, a run for each tile: the first block's two tokens, then the second's. 4 bits, a run for two tiles: the first's two
// tokens, then the second's. 2 bits, one run: the first two tiles' line, then the last two's.
DEVICE Place apart_of(int group, int eight, int four, int two) {
    if (group < eight) return Place{8 * group, 8, 0};
    group -= eight;
    if (group < four) return Place{8 * eight + 4 * group, 4, 0};
    group -= four;
    if (group < two) return Place{8 * eight + 4 * four + 2 * group, 2, 0};
    return Place{0, 0, 0};
}
