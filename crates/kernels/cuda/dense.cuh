// What lies between a pass's products of matrices: embeddings, norms, heads, gates. Residuals are f32, what is multiplied is bf16.
//
// All of it is bound by memory: a row is read once or twice in 16-byte loads, and nothing is kept.
#pragma once

#include "device.cuh"
#include "parameters.cuh"

constexpr int DENSE_THREADS = 256;
constexpr int HEADS_WARPS = 4;

// Four numbers as bf16, in one store.
DEVICE void store_bfloats(uint16_t* to, const float4& x) {
    *reinterpret_cast<uint2*>(to) = uint2{bfloats(x.x, x.y), bfloats(x.z, x.w)};
}

// A row of the table for each token, a block each.
KERNEL(dense_embed, EmbedParameters, DENSE_THREADS, 4) {
    follow();
    int64_t token = p.tokens[block_index()];
    const uint16_t* from = p.table + (token < p.vocab ? token : p.vocab - 1) * p.hidden;
    float* out = p.out + (int64_t)block_index() * p.hidden;
    for (int i = thread_index() * 4; i < p.hidden; i += DENSE_THREADS * 4) {
        uint2 four = *reinterpret_cast<const uint2*>(from + i);
        *reinterpret_cast<float4*>(out + i) = float4{p.scale * bfloat_to_float(four.x & 0xffff), p.scale * bfloat_to_float(four.x >> 16),
                                                     p.scale * bfloat_to_float(four.y & 0xffff), p.scale * bfloat_to_float(four.y >> 16)};
    }
}

// A row by one block: where it begins, and what its numbers are multiplied by before their weights.
DEVICE const float* norm_row(const NormParameters& p, float& inverse) {
    auto* sums = reinterpret_cast<float*>(shared_memory());
    int64_t row = p.picked ? p.picked[block_index()] : block_index();
    const float* x = p.x + (row < p.rows ? row : p.rows - 1) * p.columns;
    float sum = 0;
    for (int i = thread_index() * 4; i < p.columns; i += DENSE_THREADS * 4) {
        float4 four = *reinterpret_cast<const float4*>(x + i);
        sum += four.x * four.x + four.y * four.y + four.z * four.z + four.w * four.w;
    }
    sum = warp_sum<1>(sum);
    if (thread_index() % WARP == 0) sums[thread_index() / WARP] = sum;
    sync_block();
    sum = 0;
#pragma unroll
    for (int warp = 0; warp < DENSE_THREADS / WARP; warp++) sum += sums[warp];
    inverse = 1 / square_root(sum / p.columns + p.eps);
    return x;
}

DEVICE float4 normed(const NormParameters& p, const float* x, float inverse, int i) {
    float4 four = *reinterpret_cast<const float4*>(x + i), w = *reinterpret_cast<const float4*>(p.weight + i);
    return float4{four.x * inverse * w.x, four.y * inverse * w.y, four.z * inverse * w.z, four.w * inverse * w.w};
}

// Rows as bf16.
KERNEL(dense_norm, NormParameters, DENSE_THREADS, 4) {
    follow();
    float inverse;
    const float* x = norm_row(p, inverse);
    uint16_t* out = static_cast<uint16_t*>(p.out) + (int64_t)block_index() * p.columns;
    for (int i = thread_index() * 4; i < p.columns; i += DENSE_THREADS * 4) store_bfloats(out + i, normed(p, x, inverse, i));
}

// Added to the residual.
KERNEL(dense_norm_add, NormParameters, DENSE_THREADS, 4) {
    follow();
    float inverse;
    const float* x = norm_row(p, inverse);
    float* out = static_cast<float*>(p.out) + (int64_t)block_index() * p.columns;
    for (int i = thread_index() * 4; i < p.columns; i += DENSE_THREADS * 4) {
        float4 more = normed(p, x, inverse, i), &to = *reinterpret_cast<float4*>(out + i);
        to = float4{to.x + more.x, to.y + more.y, to.z + more.z, to.w + more.w};
    }
}

// Numbers of a head that a lane has, side by side.
template <int D>
struct OfHead {
    float x[D / WARP];
};

template <int D>
DEVICE OfHead<D> load_head(const float* from) {
    OfHead<D> out;
    int first = thread_index() % WARP * (D / WARP);
#pragma unroll
    for (int i = 0; i < D / WARP; i += 2) {
        float2 two = *reinterpret_cast<const float2*>(from + first + i);
        out.x[i] = two.x;
        out.x[i + 1] = two.y;
    }
    return out;
}

template <int D>
DEVICE void store_head(uint16_t* to, const OfHead<D>& head) {
    int first = thread_index() % WARP * (D / WARP);
#pragma unroll
    for (int i = 0; i < D / WARP; i += 2) *reinterpret_cast<uint32_t*>(to + first + i) = halves(head.x[i], head.x[i + 1]);
}

template <int D>
DEVICE void norm_head(OfHead<D>& head, const float* weight, float eps) {
    OfHead<D> w = load_head<D>(weight);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < D / WARP; i++) sum += head.x[i] * head.x[i];
    float inverse = 1 / square_root(warp_sum<1>(sum) / D + eps);
#pragma unroll
    for (int i = 0; i < D / WARP; i++) head.x[i] *= inverse * w.x[i];
}

// Turns the first elements by the row's cosines and sines. `all` is the warp's, D numbers.
template <int D>
DEVICE void turn_head(const HeadsParameters& p, OfHead<D>& head, float* all, int row) {
    int first = thread_index() % WARP * (D / WARP), pairs = p.turned / 2;
    const float2* turns = reinterpret_cast<const float2*>(p.rotations) + (int64_t)row * pairs;
#pragma unroll
    for (int i = 0; i < D / WARP; i++) all[first + i] = head.x[i];
    sync_warp();
#pragma unroll
    for (int i = 0; i < D / WARP; i++) {
        int at = first + i;
        if (at >= p.turned) continue;
        bool is_second = p.interleaved ? at % 2 : at >= pairs;
        int pair = p.interleaved ? at / 2 : at % pairs, other = p.interleaved ? at ^ 1 : (is_second ? at - pairs : at + pairs);
        float2 turn = turns[pair];
        float sine = is_second ? turn.y : -turn.y;
        head.x[i] = head.x[i] * turn.x + all[other] * sine;
    }
}

// Bias, norm, turn, and where it belongs: a warp for each head of each row.
template <int D>
DEVICE void heads_of(const HeadsParameters& p) {
    int all = p.heads + 2 * p.kv_heads, item = block_index() * HEADS_WARPS + thread_index() / WARP;
    int row = item / all, index = item % all;
    if (row >= p.row_count) return;
    OfHead<D> head = load_head<D>(p.projected + (int64_t)item * D);
    if (p.bias) {
        OfHead<D> bias = load_head<D>(p.bias + index * D);
#pragma unroll
        for (int i = 0; i < D / WARP; i++) head.x[i] += bias.x[i];
    }
    bool is_query = index < p.heads, is_value = index >= p.heads + p.kv_heads;
    if (!is_value) {
        const float* norm = is_query ? p.query_norm : p.key_norm;
        if (norm) norm_head<D>(head, norm, p.eps);
        if (p.turned > 0) turn_head<D>(p, head, reinterpret_cast<float*>(shared_memory()) + thread_index() / WARP * D, row);
    }
    if (is_query) {
#pragma unroll
        for (int i = 0; i < D / WARP; i++) head.x[i] *= p.query_factor;
        store_head<D>(p.queries + ((int64_t)row * p.heads + index) * D, head);
        return;
    }
    int kv_head = (index - p.heads) % p.kv_heads;
    if (p.staged) store_head<D>(p.staged + (((int64_t)row * 2 + is_value) * p.kv_heads + kv_head) * D, head);
    int64_t sequence = p.rows[2 * row];
    int token = p.rows[2 * row + 1];
    int64_t page = p.tables[sequence * p.table_stride + token / PAGE_TOKENS];
    store_head<D>(p.pool + (((page * p.kv_heads + kv_head) * 2 + is_value) * PAGE_TOKENS + token % PAGE_TOKENS) * D, head);
}

KERNEL(dense_heads_64, HeadsParameters, HEADS_WARPS* WARP, 8) {
    follow();
    heads_of<64>(p);
}
KERNEL(dense_heads_128, HeadsParameters, HEADS_WARPS* WARP, 8) {
    follow();
    heads_of<128>(p);
}

// x / (1 + e^-(linear x + cubic x^3)), of which no square is so large that the cube of no cubic term is no number.
DEVICE float open_gate(const GateParameters& p, float x) {
    float square = x * x, most = 1e30f;
    float exponent = -x * (p.cubic * (square < most ? square : most) + p.linear);
    return x / (1 + exp2_fast(exponent * LOG2_E));
}

// Four numbers a thread.
KERNEL(dense_gate, GateParameters, DENSE_THREADS, 4) {
    follow();
    int64_t at = ((int64_t)block_index() * DENSE_THREADS + thread_index()) * 4;
    if (at >= p.count) return;
    const float* from = p.both + at / p.width * 2 * p.width + at % p.width;
    float4 gate = *reinterpret_cast<const float4*>(from), up = *reinterpret_cast<const float4*>(from + p.width);
    store_bfloats(p.out + at, float4{open_gate(p, gate.x) * up.x, open_gate(p, gate.y) * up.y, open_gate(p, gate.z) * up.z,
                                     open_gate(p, gate.w) * up.w});
}

// The same.
KERNEL(dense_narrow, NarrowParameters, DENSE_THREADS, 4) {
    follow();
    int64_t at = ((int64_t)block_index() * DENSE_THREADS + thread_index()) * 4;
    if (at < p.count) store_bfloats(p.out + at, *reinterpret_cast<const float4*>(p.x + at));
}
