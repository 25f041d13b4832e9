// What do kernels ask of the machine? Each instruction that plain C++ lacks, once for the GPU and (emulation.h) once for the host.
//
// Everything else in this folder is C++ that both compile, so that tests on a CPU run the arithmetic that the GPU runs.
#pragma once

#ifndef __CUDACC__
#include "emulation.h"
#else

#include <cstdint>

#define DEVICE __device__ __forceinline__

// A kernel takes one structure by value. `blocks` is how many should fit on a multiprocessor: it bounds the registers.
#define KERNEL(name, Parameters, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Parameters p)

// The block's shared memory, whose size the launch says.
DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(256) unsigned char bytes[];
    return bytes;
}

// Waits until the launch before this one has ended and its writes can be seen. Without overlapping launches it does nothing, nor does what follows.
DEVICE void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the launch after this one begin where there is room, when all blocks have come here.
DEVICE void let_in_later() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Both, so that of launches that overlap there are two (three where `layered_turn` lets in the sketch before it waits itself): a later one may read, before it
// follows, whatever the earlier ones do not write, and write nothing that they read.
DEVICE void follow() {
    wait_for_earlier();
    let_in_later();
}

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int grid_blocks() { return gridDim.x; }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

template <class T>
DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
}
template <class T>
DEVICE T shuffle(T x, int lane) {
    return __shfl_sync(~0u, x, lane);
}
template <class T>
DEVICE T shuffle_up(T x, int by) {
    return __shfl_up_sync(~0u, x, by);
}
DEVICE bool any_lane(bool x) { return __any_sync(~0u, x); }
// A bit for each lane.
DEVICE uint32_t lanes_with(bool x) { return __ballot_sync(~0u, x); }

// Bytes of `a` (0 to 3) and `b` (4 to 7), each chosen by four bits of `selector`, of which the highest asks for the byte's sign
// eight times instead.
DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// A product by itself, not as a part of a multiply-add.
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
// `a * b + c`, rounded once.
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
// 32 of 64 bits, from bit `by % 32` on.
DEVICE uint32_t shift_right(uint32_t low, uint32_t high, uint32_t by) { return __funnelshift_r(low, high, by); }
DEVICE int round_to_int(float x) { return __float2int_rn(x); }
DEVICE int floor_to_int(float x) { return __float2int_rd(x); }
DEVICE int count_ones(uint32_t x) { return __popc(x); }

DEVICE float half_to_float(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
DEVICE uint16_t float_to_half(float x) {
    uint16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// Two numbers as f16, the first in the low half.
DEVICE uint32_t halves(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// Two numbers as bf16, the first in the low half.
DEVICE uint32_t bfloats(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE float square_root(float x) { return __fsqrt_rn(x); }

// 16 bytes that are read once: past the first cache.
DEVICE uint4 load_once(const void* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// 16 bytes of shared memory, loaded here and now: the compiler would keep what does not change in registers, which are scarcer.
DEVICE uint4 load_shared_here(const uint4* from) {
    uint4 x;
    uint32_t at = (uint32_t)__cvta_generic_to_shared(from);
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
    return x;
}

// Where something is in shared memory, as copies want it.
using SharedAddress = uint32_t;
DEVICE SharedAddress shared_address(const void* at) { return (uint32_t)__cvta_generic_to_shared(at); }
DEVICE SharedAddress flip_address(SharedAddress x, uint32_t bits) { return x ^ bits; }

// If `wanted` is not 0, the 16 bits at `at` in shared memory, and `at` moves on; otherwise 0.
DEVICE uint32_t take_half(SharedAddress& at, uint32_t wanted) {
    uint32_t x;
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.shared.u16 %0, [%1]; @p add.u32 %1, %1, 2; }"
        : "=&r"(x), "+r"(at)
        : "r"(wanted));
    return x;
}

// 16 bytes to shared memory, while the thread goes on: from `FROM` bytes after `from` to `TO` after `to`.
template <int TO, int FROM>
DEVICE void copy_later(SharedAddress to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(TO), "n"(FROM) : "memory");
}
DEVICE void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `PENDING` groups of this thread's copies are under way.
template <int PENDING>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE void add_shared(uint32_t* to, uint32_t x) { atomicAdd(to, x); }
DEVICE void add_global(uint32_t* to, uint32_t x) { atomicAdd(to, x); }
// What was there before.
DEVICE uint32_t take_global(uint32_t* from, uint32_t x) { return atomicAdd(from, x); }

// Products of 16x16 halves `a` and 16x8 halves `b` added to `c`. Lane `l` has, with g = l / 4 and t = l % 4, of `a` the rows g and g + 8
// at columns 2t, 2t + 1 (a[0], a[1]) and 2t + 8, 2t + 9 (a[2], a[3]); of `b` the column g at rows 2t, 2t + 1 and 2t + 8, 2t + 9;
// of `c` the rows g (c[0], c[1]) and g + 8 at columns 2t, 2t + 1.
DEVICE void multiply_halves(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same of 16x32 signed bytes and 32x8 signed ones: four columns of `a` from 4t (a[0], a[1]) and from 16 + 4t (a[2], a[3]).
DEVICE void multiply_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same added to one number, as which all of `c` begins.
DEVICE void multiply_bytes_from(int (&c)[4], int start, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(start));
}

// The same with `b` unsigned.
DEVICE void multiply_weights(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same added to nothing.
DEVICE void multiply_weights_only(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}

// Four 8x8 matrices of 16-bit elements out of shared memory: lane l says where row l % 8 of matrix l / 8 is, 16 bytes, and gets of each matrix
// row g, columns 2t and 2t + 1.
DEVICE void load_matrices(uint32_t (&to)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
// The same of the matrices transposed: rows 2t and 2t + 1, column g.
DEVICE void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// An 8x8 matrix of 16-bit elements, transposed: a lane gives those of row g at columns 2t, 2t + 1.
DEVICE uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

#endif

// What both share.

constexpr int WARP = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NONE = -__builtin_huge_valf();

DEVICE float bfloat_to_float(uint32_t x) { return bits_to_float(x << 16); }
DEVICE float max_of(float a, float b) { return a > b ? a : b; }
DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE int max_of(int a, int b) { return a > b ? a : b; }

// The largest of those lanes' numbers that differ in the bits `FROM` and above.
template <int FROM>
DEVICE float warp_max(float x) {
#pragma unroll
    for (int mask = FROM; mask < WARP; mask *= 2) x = max_of(x, shuffle_xor(x, mask));
    return x;
}
// Their sum.
template <int FROM, class T>
DEVICE T warp_sum(T x) {
#pragma unroll
    for (int mask = FROM; mask < WARP; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}
// The sum over the lanes up to this one.
template <class T>
DEVICE T warp_sum_upto(T x) {
#pragma unroll
    for (int by = 1; by < WARP; by *= 2) {
        T other = shuffle_up(x, by);
        if (thread_index() % WARP >= by) x += other;
    }
    return x;
}
