// Random numbers that are a function of their place: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", 2011), which turns a 128-bit counter and a 64-bit key into four 32-bit words.
//
// The number of row m, column n of an array (one that has no rows is row 0), under a seed:
//
//     q = n / 64 * 16 + n % 16          counter  c0 = q, lower 32 bits     c1 = q, upper 32 bits     c2, c3 = m, lower and upper
//     lane = n % 64 / 16                key      k0 = seed, lower          k1 = seed, upper
//     number(m, n) = word `lane` of philox(c0, c1, c2, c3; k0, k1)
//
// so 16 consecutive counters give 64 consecutive numbers: word 0 of all of them, then word 1, ...; no number moves to another lane.
// dlkernels/ops/dropout.py writes the same in integer tensors, dlkernels/gpu/philox.py in Triton; the bits agree.
#pragma once
#include <algorithm>

#include "simd.h"

constexpr int64_t PHILOX_BLOCK = 64;

typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES / 2)));  // VL<double> numbers

struct Philox {
    uint64_t key[10][2];  // of every round, in memory: an xor takes it from there to all lanes at no cost

    explicit Philox(uint64_t seed) {
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (auto& k : key) k[0] = k0, k[1] = k1, k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }

    // Ten rounds. Each word lies in the lower half of a 64-bit lane, where the product of two of them fits; what is above it is ignored.
    // A round costs two products, two shifts and two xors of three for VL<uint64_t> counters.
    void rounds(vec<uint64_t> (&c)[4]) const {
        const vec<uint64_t> m0 = set<uint64_t>(0xD2511F53), m1 = set<uint64_t>(0xCD9E8D57);
#pragma GCC unroll 10
        for (auto& k : key) {
            vec<uint64_t> p0 = multiply_low(c[0], m0), p1 = multiply_low(c[2], m1);
            c[0] = (p1 >> 32) ^ c[1] ^ k[0], c[1] = p1;
            c[2] = (p0 >> 32) ^ c[3] ^ k[1], c[3] = p0;
        }
    }

    // number(m, n) for the 64 columns n from `column` on, which is a multiple of 64.
    void block(uint64_t m, uint64_t column, uint32_t (&number)[PHILOX_BLOCK]) const {
        vec<uint64_t> steps;
        for (int i = 0; i < VL<uint64_t>; i++) steps[i] = 2 * i;
#pragma GCC unroll 8
        for (int first = 0; first < 16; first += VL<uint32_t>) {  // a vector of words: even counters in lower halves, odd in upper ones
            uint64_t q = column / 4 + first;
            vec<uint64_t> even[4] = {steps + q, set(q >> 32), set(m), set(m >> 32)}, odd[4] = {steps + (q + 1), even[1], even[2], even[3]};
            rounds(even), rounds(odd);
#pragma GCC unroll 4
            for (int lane = 0; lane < 4; lane++) store_raw(number + 16 * lane + first, (even[lane] & 0xffffffff) | (odd[lane] << 32));
        }
    }
};

// Dropout: number (m, n) of an array is kept where number(m, n) >= floor(p 2^32), and then scaled by 1 / (1 - p).
struct Dropout {
    Philox philox;
    uint32_t threshold;
    double scale;

    Dropout(uint64_t seed, double p)
        : philox(seed), threshold(uint32_t(std::min(p * 0x1p32, 0x1p32 - 1))), scale(p < 1 ? 1 / (1 - p) : 0) {}

    // What the 64 columns of row m from `column` (a multiple of 64) on are multiplied by: 0 or 1 / (1 - p). T is float or double.
    template <class T> void factors(int64_t m, int64_t column, T (&factor)[PHILOX_BLOCK]) const {
        alignas(64) uint32_t number[PHILOX_BLOCK];
        philox.block(m, column, number);
        const vec<T> kept = set(T(scale));
#pragma GCC unroll 16
        for (int j = 0; j < PHILOX_BLOCK; j += VL<T>) {
            if constexpr (sizeof(T) == 4) store(factor + j, load_raw<vec<uint32_t>>(number + j) >= threshold ? kept : vec<T>{});
            else store(factor + j, __builtin_convertvector(load_raw<words>(number + j), vec<uint64_t>) >= threshold ? kept : vec<T>{});
        }
    }

    // y[n] = x[n] * factor(m, n) for n in [begin, end), with begin a multiple of 64; x and y are the row's and may be one.
    template <class T> void apply(int64_t m, const T* x, T* y, int64_t begin, int64_t end) const {
        using C = compute_t<T>;
        alignas(64) C factor[PHILOX_BLOCK];
        for (; begin + PHILOX_BLOCK <= end; begin += PHILOX_BLOCK) {
            factors(m, begin, factor);
#pragma GCC unroll 16
            for (int j = 0; j < PHILOX_BLOCK; j += VL<C>) store(y + begin + j, load(x + begin + j) * load(factor + j));
        }
        if (begin == end) return;
        factors(m, begin, factor);
        for (int j = 0, n = end - begin; j < n; j += VL<C>) store(y + begin + j, load(x + begin + j, n - j) * load(factor + j), n - j);
    }
};

// Numbers written as bf16, up or down by chance: one that lies a fraction f of the way between two bf16 goes up with probability f, so that
// what is too small to move a bf16 moves it now and then, and on the whole is not lost. Half of number(row, place) decides, and two arrays
// have a half each. What is a bf16, 0 and infinities among them, stays.
struct Chance {
    Philox philox;
    uint64_t row;
    alignas(64) uint32_t number[PHILOX_BLOCK];

    Chance(uint64_t seed, uint64_t row) : philox(seed), row(row) {}

    // Makes the numbers of the places from `place` on, if a block of them begins there.
    void at(int64_t place) {
        if (place % PHILOX_BLOCK == 0) philox.block(row, place, number);
    }
    // For the VL<float> places from `place` on, a multiple of that many; the other half for the second array.
    halves narrow(vec<float> v, int64_t place, bool second) const {
        vec<uint32_t> r = load_raw<vec<uint32_t>>(number + place % PHILOX_BLOCK);
        vec<uint32_t> u = (bits_as<vec<uint32_t>>(v) + (second ? r >> 16 : r & 0xffff)) >> 16;
        return shorten(v != v ? vec<uint32_t>{} + 0x7fc0 : u);
    }
};
