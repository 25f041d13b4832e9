// Runs kernels on the host: one block after the other, each thread a fiber.
//
// Memory ends where its pages do: an access beyond an allocation, or beyond the shared memory that a launch asks for, is a fault. Barriers and whatever lanes do together switch fibers; lanes must do the same thing together, or the program ends with a message.
// Shared memory holds garbage when a block begins; asynchronous copies land when they are waited for, not before. Fragment layouts of
// the tensor cores are those of the PTX manual, element by element.
//
// What this cannot catch: races between threads (they run one at a time, in a fixed order between barriers), the order of memory
// accesses, `approx` instructions' last bits, launch limits, and speed.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#define DEVICE static inline
#define KERNEL(name, Parameters, threads, blocks) static void name(const Parameters& p)

struct uint2 {
    uint32_t x, y;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint4 {
    uint32_t x, y, z, w;
};

namespace emulation {

constexpr int LANES = 32;
constexpr size_t STACK = 96 << 10;

enum class Together { None, Sync, Shuffle, ShuffleXor, ShuffleUp, Any, Ballot, Transpose, Halves, Bytes, Weights, Matrices };

// Bytes, a multiple of 16, before a page that can't be touched.
inline size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }
inline unsigned char* guarded_alloc(size_t bytes) {
    size_t whole = whole_pages(bytes);
    void* at = mmap(nullptr, whole + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect((char*)at + whole, 4096, PROT_NONE) != 0) return nullptr;
    return (unsigned char*)at + whole - bytes;
}
inline void guarded_free(unsigned char* at, size_t bytes) {
    munmap(at + bytes - whole_pages(bytes), whole_pages(bytes) + 4096);
}

struct Copy {
    void* to;
    unsigned char bytes[16];
    int group;
};

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
    std::vector<Copy> copies;
    int groups = 0;
};

// What the lanes of a warp give each other.
struct Warp {
    int arrived = 0;
    long round = 0;
    Together what = Together::None;
    uint32_t given[LANES][8];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline unsigned char* shared;
inline jmp_buf scheduler;
inline ucontext_t home;
inline int current, threads, block, blocks;
inline int arrived;
inline long rounds, moved;
inline void (*body)(const void*);
inline const void* parameters;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel, block %d thread %d: %s\n", block, current, what);
    std::abort();
}

inline void yield() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
    body(parameters);
    fibers[current].done = true;
    moved++;
    _longjmp(scheduler, 1);
}

inline void sync_block() {
    long round = rounds;
    moved++;
    if (++arrived == threads) {
        arrived = 0;
        rounds++;
    }
    while (rounds == round) yield();
}

// Waits until all lanes have come to do the same.
inline void meet(Together what) {
    Warp& warp = warps[current / LANES];
    long round = warp.round;
    if (warp.arrived == 0) warp.what = what;
    if (warp.what != what) fail("lanes of a warp do different things together");
    moved++;
    if (++warp.arrived == LANES) {
        warp.arrived = 0;
        warp.round++;
    }
    while (warp.round == round) yield();
}

// Gives `count` words to the warp, has `look` read what all lanes gave, and leaves when all have.
template <class F>
inline void together(Together what, const uint32_t* words, int count, F look) {
    Warp& warp = warps[current / LANES];
    std::memcpy(warp.given[current % LANES], words, 4 * count);
    meet(what);
    look(warp.given);
    meet(what);
}

inline void run_block(size_t shared_bytes) {
    std::memset(shared, 0xcd, shared_bytes);
    arrived = 0;
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        fiber.started = fiber.done = false;
        fiber.copies.clear();
        fiber.groups = 0;
    }
    for (auto& warp : warps) warp = Warp();
    // `volatile`: they change between `_setjmp` and its second return.
    for (volatile bool live = true; live;) {
        live = false;
        long before = moved;
        for (current = 0; current < threads; current++) {
            Fiber& fiber = fibers[current];
            if (fiber.done) continue;
            live = true;
            if (_setjmp(scheduler) == 0) {
                if (fiber.started) _longjmp(fiber.at, 1);
                fiber.started = true;
                moved++;
                getcontext(&fiber.start);
                fiber.start.uc_stack.ss_sp = fiber.stack.get();
                fiber.start.uc_stack.ss_size = STACK;
                fiber.start.uc_link = nullptr;
                makecontext(&fiber.start, entry, 0);
                setcontext(&fiber.start);
            }
        }
        if (live && moved == before) {
            current = 0;
            fail("threads wait for others that have ended or wait elsewhere");
        }
    }
}

inline void launch(void (*kernel)(const void*), int grid, int block_size, size_t shared_bytes, const void* p) {
    threads = block_size;
    blocks = grid;
    body = kernel;
    parameters = p;
    if (threads % LANES != 0) fail("a block that is not made of whole warps");
    if ((int)fibers.size() < threads) fibers.resize(threads);
    warps.resize(threads / LANES);
    shared_bytes = (shared_bytes + 15) / 16 * 16;
    shared = guarded_alloc(shared_bytes);
    if (!shared) fail("no memory");
    for (block = 0; block < grid; block++) run_block(shared_bytes);
    guarded_free(shared, shared_bytes);
}

// Byte `i` of a word.
inline int signed_byte(uint32_t word, int i) { return (int8_t)(word >> (8 * i)); }
inline int unsigned_byte(uint32_t word, int i) { return (uint8_t)(word >> (8 * i)); }

inline float half_value(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return (float)x;
}

// The product of fragments whose words hold `PER` elements along the shared dimension.
template <int PER, class C, class A, class B>
inline void multiply(Together what, C (&c)[4], const uint32_t (&words)[6], A of_a, B of_b) {
    together(what, words, 6, [&](uint32_t(&given)[LANES][8]) {
        int lane = current % LANES, g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = g + 8 * (i / 2), column = 2 * t + i % 2;
            C sum = 0;
            for (int k = 0; k < 8 * PER; k++) {
                int of_lane = k % (4 * PER) / PER, second = k / (4 * PER);
                uint32_t a = given[row % 8 * 4 + of_lane][2 * second + row / 8];
                uint32_t b = given[column * 4 + of_lane][4 + second];
                sum += of_a(a, k % PER) * of_b(b, k % PER);
            }
            c[i] += sum;
        }
    });
}

}  // namespace emulation

DEVICE unsigned char* shared_memory() { return emulation::shared; }
DEVICE void wait_for_earlier() {}
DEVICE void let_in_later() {}
DEVICE void follow() {}
DEVICE int thread_index() { return emulation::current; }
DEVICE int block_index() { return emulation::block; }
DEVICE int block_threads() { return emulation::threads; }
DEVICE int grid_blocks() { return emulation::blocks; }
DEVICE void sync_block() { emulation::sync_block(); }
DEVICE void sync_warp() { emulation::meet(emulation::Together::Sync); }

namespace emulation {
template <class T>
inline T of_lane(Together what, T x, int lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint32_t words[sizeof(T) / 4];
    T out = x;
    std::memcpy(words, &x, sizeof(T));
    together(what, words, sizeof(T) / 4, [&](uint32_t(&given)[LANES][8]) {
        if (lane >= 0 && lane < LANES) std::memcpy(&out, given[lane], sizeof(T));
    });
    return out;
}
}  // namespace emulation

template <class T>
DEVICE T shuffle_xor(T x, int mask) {
    return emulation::of_lane(emulation::Together::ShuffleXor, x, emulation::current % 32 ^ mask);
}
template <class T>
DEVICE T shuffle(T x, int lane) {
    return emulation::of_lane(emulation::Together::Shuffle, x, lane & 31);
}
template <class T>
DEVICE T shuffle_up(T x, int by) {
    return emulation::of_lane(emulation::Together::ShuffleUp, x, emulation::current % 32 - by);
}
DEVICE bool any_lane(bool x) {
    uint32_t word = x, all = 0;
    emulation::together(emulation::Together::Any, &word, 1, [&](uint32_t(&given)[32][8]) {
        for (auto& of_lane : given) all |= of_lane[0];
    });
    return all != 0;
}
DEVICE uint32_t lanes_with(bool x) {
    uint32_t word = x, all = 0;
    emulation::together(emulation::Together::Ballot, &word, 1, [&](uint32_t(&given)[32][8]) {
        for (int lane = 0; lane < 32; lane++) all |= given[lane][0] << lane;
    });
    return all;
}

DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t choice = selector >> (4 * i) & 15;
        uint32_t byte = (uint32_t)(both >> (8 * (choice & 7))) & 0xff;
        if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= byte << (8 * i);
    }
    return out;
}

DEVICE float exp2_fast(float x) { return std::exp2(x); }
DEVICE float log2_fast(float x) { return std::log2(x); }
DEVICE float product(float a, float b) { return a * b; }
DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float bits_to_float(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
DEVICE uint32_t float_to_bits(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}
DEVICE uint32_t shift_right(uint32_t low, uint32_t high, uint32_t by) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (by % 32));
}
// Out of range as on the GPU: to the nearest that there is.
DEVICE int saturated(float x) {
    if (!(x > -2147483648.0f)) return x != x ? 0 : INT32_MIN;
    return x >= 2147483648.0f ? INT32_MAX : (int)x;
}
DEVICE int round_to_int(float x) { return saturated(std::nearbyint(x)); }
DEVICE int floor_to_int(float x) { return saturated(std::floor(x)); }
DEVICE int count_ones(uint32_t x) { return __builtin_popcount(x); }

DEVICE float half_to_float(uint16_t x) { return emulation::half_value(x); }
DEVICE uint16_t float_to_half(float x) {
    _Float16 y = (_Float16)x;
    uint16_t bits;
    std::memcpy(&bits, &y, 2);
    return bits;
}
DEVICE uint32_t halves(float low, float high) { return float_to_half(low) | (uint32_t)float_to_half(high) << 16; }

DEVICE uint32_t bfloats(float low, float high) {
    auto bits = [](float x) {
        uint32_t y;
        std::memcpy(&y, &x, 4);
        if (x != x) return (y >> 16) | 0x40;
        return (y + 0x7fff + (y >> 16 & 1)) >> 16;
    };
    return bits(low) | bits(high) << 16;
}
DEVICE float square_root(float x) { return std::sqrt(x); }

DEVICE void check_alignment(const void* at, size_t to) {
    if ((uintptr_t)at % to != 0) emulation::fail("an address that is not aligned");
}
DEVICE uint4 load_once(const void* from) {
    check_alignment(from, 16);
    uint4 x;
    std::memcpy(&x, from, 16);
    return x;
}

DEVICE uint4 load_shared_here(const uint4* from) { return load_once(from); }

using SharedAddress = unsigned char*;
DEVICE SharedAddress shared_address(const void* at) { return (unsigned char*)at; }
DEVICE uint32_t take_half(SharedAddress& at, uint32_t wanted) {
    if (!wanted) return 0;
    check_alignment(at, 2);
    uint16_t x;
    std::memcpy(&x, at, 2);
    at += 2;
    return x;
}
DEVICE SharedAddress flip_address(SharedAddress x, uint32_t bits) { return (SharedAddress)((uintptr_t)x ^ bits); }
template <int TO, int FROM>
DEVICE void copy_later(SharedAddress to, const void* start) {
    unsigned char *shared = to + TO, *from = (unsigned char*)start + FROM;
    check_alignment(from, 16);
    check_alignment(shared, 16);
    auto& fiber = emulation::fibers[emulation::current];
    emulation::Copy copy{shared, {}, fiber.groups};
    std::memcpy(copy.bytes, from, 16);
    fiber.copies.push_back(copy);
}
DEVICE void copies_end_group() { emulation::fibers[emulation::current].groups++; }
template <int PENDING>
DEVICE void wait_for_copies() {
    auto& fiber = emulation::fibers[emulation::current];
    size_t kept = 0;
    for (auto& copy : fiber.copies) {
        if (copy.group < fiber.groups - PENDING) {
            std::memcpy(copy.to, copy.bytes, 16);
        } else {
            fiber.copies[kept++] = copy;
        }
    }
    fiber.copies.resize(kept);
}

DEVICE void add_shared(uint32_t* to, uint32_t x) { *to += x; }
DEVICE void add_global(uint32_t* to, uint32_t x) { *to += x; }
DEVICE uint32_t take_global(uint32_t* from, uint32_t x) {
    uint32_t before = *from;
    *from += x;
    return before;
}

DEVICE void multiply_halves(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    auto half = [](uint32_t word, int i) { return emulation::half_value((uint16_t)(word >> (16 * i))); };
    emulation::multiply<2>(emulation::Together::Halves, c, {a0, a1, a2, a3, b0, b1}, half, half);
}
DEVICE void multiply_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    emulation::multiply<4>(emulation::Together::Bytes, c, {a0, a1, a2, a3, b0, b1}, emulation::signed_byte,
                           emulation::signed_byte);
}
DEVICE void multiply_bytes_from(int (&c)[4], int start, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    for (int& x : c) x = start;
    multiply_bytes(c, a0, a1, a2, a3, b0, b1);
}
DEVICE void multiply_weights(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    emulation::multiply<4>(emulation::Together::Weights, c, {a0, a1, a2, a3, b0, b1}, emulation::signed_byte,
                           emulation::unsigned_byte);
}
DEVICE void multiply_weights_only(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    for (int& x : c) x = 0;
    multiply_weights(c, a0, a1, a2, a3, b0, b1);
}
DEVICE uint32_t transpose(uint32_t x) {
    uint32_t out = 0;
    emulation::together(emulation::Together::Transpose, &x, 1, [&](uint32_t(&given)[32][8]) {
        int lane = emulation::current % 32, g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; i++) {
            // Row g, column 2t + i of the result is row 2t + i, column g of what was given.
            uint32_t word = given[(2 * t + i) * 4 + g / 2][0];
            out |= (word >> (16 * (g % 2)) & 0xffff) << (16 * i);
        }
    });
    return out;
}

namespace emulation {
// `at(row, column)`s of each of four matrices, elements 0 and 1 of a word.
template <class F>
inline void load_matrices(uint32_t (&to)[4], SharedAddress row, F at) {
    check_alignment(row, 16);
    uint32_t words[2];
    std::memcpy(words, &row, sizeof row);
    together(Together::Matrices, words, 2, [&](uint32_t(&given)[LANES][8]) {
        for (int i = 0; i < 4; i++) {
            to[i] = 0;
            for (int j = 0; j < 2; j++) {
                auto [of_row, column] = at(j);
                SharedAddress from;
                std::memcpy(&from, given[i * 8 + of_row], sizeof from);
                uint16_t element;
                std::memcpy(&element, from + 2 * column, 2);
                to[i] |= (uint32_t)element << (16 * j);
            }
        }
    });
}
}  // namespace emulation

DEVICE void load_matrices(uint32_t (&to)[4], SharedAddress row) {
    int g = emulation::current % 32 / 4, t = emulation::current % 4;
    emulation::load_matrices(to, row, [&](int j) { return std::pair(g, 2 * t + j); });
}
DEVICE void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) {
    int g = emulation::current % 32 / 4, t = emulation::current % 4;
    emulation::load_matrices(to, row, [&](int j) { return std::pair(2 * t + j, g); });
}
