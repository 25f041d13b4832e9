// What do kernels get, and how does it lie in memory? `src/cuda/parameters.rs` has the same structures.
//
// Shape letters: B sequences, G KV heads, R query heads of a KV head (at most 8), D channels of a head, T tokens. A *head* here is one KV
// head of one sequence; there are B * G of them, sequence by sequence. Scores are logarithms to base 2.
#pragma once

#include "device.cuh"

// Most query heads of a KV head: columns of a tensor core's product.
constexpr int ROWS = 8;
// Heads whose work one launch can share out.
constexpr int MOST_HEADS = 512;
constexpr int PAGE_TOKENS = 64;
constexpr int TILE_TOKENS = 16;
constexpr int TILES = PAGE_TOKENS / TILE_TOKENS;

// Numbers that a step keeps of a row.
constexpr int STEP = 3;

// Attention states of parts of a head's tokens: slot `head * slots + part`, R rows each.
struct States {
    float* max;          // [B * G * slots, R]
    float* sum;          // [B * G * slots, R]
    float* accumulated;  // [B * G * slots, R, D]
    int32_t slots;
    int32_t unused;
};

// Attention to f16 keys and values. A page of the pool has for each KV head keys [64, D], then values [64, D].
struct ExactParameters {
    const uint16_t* queries;   // [B, G, R, D], f16
    const uint16_t* pool;      // [pages, G, 2, 64, D], f16
    const uint32_t* lengths;   // [B], tokens
    const uint32_t* tables;    // [B, table_stride], pages of each sequence
    States states;
    float scale;               // of scores, log2(e) included
    int32_t sequences, kv_heads, rows;
    int32_t table_stride;
    int32_t least_part;        // tokens, a multiple of 64
};

// Out of the states, merged: [B, G, R, D].
struct FinishParameters {
    States states;
    const uint32_t* lengths;   // [B]
    float* out;
    int32_t sequences, kv_heads, rows;
    int32_t least_part;
};

// Of one page: where its first groups of keys are, in lines of 64 bytes, and for each of the four, the lowest first, four bits: how many
// runs of 128 bytes it takes, 4 with 8 bits, 2 with 4, 1 with 2.
struct SketchPage {
    uint32_t leading;
    uint16_t runs;
    uint8_t tokens;
    uint8_t unused;
};

// Of one tile: where its lines and escapes begin.
struct Tile {
    uint32_t leading;        // its page's, as above
    uint32_t lines;          // its other keys, then its values
    uint32_t key_escapes;
    uint32_t value_escapes;
    // Bytes, the lowest first: the keys' groups of 8, 4 and 2 bits, the values', tokens, which of its page's four it is.
    uint32_t profiles[2];
    uint32_t escapes;        // 16 bits each: of keys, of values
    uint32_t unused;
};

// An element beyond its width's range: what is added to its level. `token` is the page's.
struct Escape {
    uint8_t token;
    uint8_t channel;
    uint16_t rest;           // f16
};

// One KV head of one sequence.
struct Head {
    const uint8_t* leading;
    const uint8_t* lines;
    const Escape* escapes;
    const SketchPage* pages;
    const Tile* tiles;             // 4 for each page
    const uint16_t* key_mean;      // [D], f16, and so the others
    const uint16_t* key_spread;
    const uint16_t* value_mean;
    const uint16_t* value_spread;
    const uint16_t* query_rotation;   // [D, D]
    const uint16_t* output_rotation;  // [D, D]
    uint32_t page_count;
    uint32_t selectable;           // pages that may be left out; those after them are always read
};

// Which tiles a step reads.
struct Selection {
    float missed;              // share of attention that may be missed; negative: tiles of at least 2^`relative` of the heaviest
    float relative;
    uint32_t from_tokens;      // heads with fewer tokens in pages are read whole
    uint32_t least_tiles;      // of what is selectable, at least
    uint32_t one_in;           // at most those and one tile in so many
};

// A step over layered heads.
struct LayeredParameters {
    const Head* heads;             // [B * G]
    const uint16_t* queries;       // [B, G, R, D], f16
    States exact;                  // of tokens that are attended to without pages; `slots` is 0 if there are none
    const uint32_t* exact_lengths; // [B]
    float* turned;                 // [B * G, 8, D]: queries in the pages' channels
    uint32_t* bytes;               // [B * G, 8, D / 4]: the same as bytes
    float* steps;                  // [B * G, 8, STEP]: what products of bytes are multiplied by, what is added, and what weights are relative to
    uint8_t* codes;                // [B * G, tile_stride, rows_stored]: logarithms of tiles' weights
    uint32_t* histogram;           // [B * G, 8, 256]: how many tiles have which; zeros before and after a step
    uint8_t* wanted;               // [B * G, tile_stride]: how much each tile is
    uint32_t* wanted_counts;       // [B * G, slices, 256]: how many tiles of a slice are wanted so much
    uint32_t* list;                // [B * G, list_stride]: tiles to read
    uint32_t* counts;              // [B * G]: how many; from `ALL_TILES` on: the first ones, without a list
    States states;
    float* out;                    // [B, G, R, D]
    float* log_sums;               // [B, G, R]: logarithms of what all weights sum up to, or null
    Selection selection;
    float scale;                   // of scores, log2(e) included
    int32_t sequences, kv_heads, rows, rows_stored;
    int32_t tile_stride, list_stride;
    int32_t room_bytes;            // room of a warp for what attention reads of tiles: two of them at least, a multiple of 128
    int32_t least_part;            // tiles, a multiple of 8; of short lists fewer
    int32_t exact_least_part;      // tokens
    int32_t slices;                // of 1,024 pages that a head may have
    int32_t page_runs;             // runs of 128 bytes that lie apart of a page, at most
    int32_t sketch_stages;         // rounds that a warp of the sketch asks for ahead: 2 to 4
};

// Marks a count of tiles that are not listed.
constexpr uint32_t ALL_TILES = 0x80000000u;

// Rows of a table, times a scale.
struct EmbedParameters {
    const uint16_t* table;   // [vocab, hidden], bf16
    const uint32_t* tokens;  // [T]
    float* out;              // [T, hidden]
    float scale;
    int32_t vocab, hidden;
    int32_t unused;
};

// RMSNorm of rows.
struct NormParameters {
    const float* x;          // [rows, columns]
    const float* weight;     // [columns]
    const uint32_t* picked;  // [blocks], or null: rows as they come
    void* out;               // [blocks, columns], bf16, or f32 to be added to
    float eps;
    int32_t columns, rows;
    int32_t unused;
};

// Heads out of what is projected: H of queries, G of keys, G of values in each row.
struct HeadsParameters {
    const float* projected;   // [T, H + 2 G, D]
    const float* bias;        // [H + 2 G, D], or null
    const float* query_norm;  // [D], or null
    const float* key_norm;    // [D], or null
    const float* rotations;   // [T, turned / 2, 2], cosine and sine
    const uint32_t* rows;     // [T, 2], sequence, and the token's index in its pages
    const uint32_t* tables;   // [B, table_stride], pages of each sequence
    uint16_t* queries;        // [T, H, D], f16
    uint16_t* pool;           // [pages, G, 2, 64, D], f16
    uint16_t* staged;         // [T, 2, G, D], f16, or null
    float eps;
    float query_factor;
    int32_t heads, kv_heads;
    int32_t turned;           // elements of a head that are turned, even
    int32_t interleaved;      // pairs are (0, 1), (2, 3), ..; otherwise (0, turned / 2), ..
    int32_t table_stride;
    int32_t row_count;        // T
};

// x / (1 + e^-(linear x + cubic x^3)) of gates, times ups.
struct GateParameters {
    const float* both;  // [T, 2, width]
    uint16_t* out;      // [T, width], bf16
    int64_t count;      // T * width
    int32_t width;
    float linear, cubic;
    int32_t unused;
};

// f32 as bf16.
struct NarrowParameters {
    const float* x;
    uint16_t* out;
    int64_t count;
};

// Attention of new tokens of some sequences.
struct PrefillParameters {
    const uint16_t* queries;  // [T, H, D], f16
    const uint16_t* pool;     // [pages, G, 2, 64, D], f16
    const uint32_t* tables;   // [B, table_stride], pages of each sequence
    const uint32_t* spans;    // [B, 3]: first row, tokens before it, rows
    const uint32_t* tiles;    // [tiles, 2]: sequence, first row of the tile in it
    uint16_t* out;            // [T, H, D], bf16
    float scale;              // of scores, log2(e) included
    int32_t heads, kv_heads;
    int32_t table_stride;
};

// A piece of a letter: where it goes, where in the letter it is, and how many bytes, whole words.
struct DeliverPiece {
    uint64_t to;
    uint32_t from, bytes;
};

// A letter of the host: how many pieces, where in it they are told, and what they say.
struct DeliverParameters {
    const unsigned char* letter;
};
