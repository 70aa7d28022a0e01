// Rows of numbers, normalised: what layer_norm, rms_norm and their fusions with a sum share.
//
//   forward    x [M, N] -> y = x^ w + b with x^ = (x - mean) rstd       two looks at a row and one at its first eighth; one goes to memory
//   backward   norm_backward.h
//
// One row after the other: two interleaved rows halve the speed where the result goes to memory, as the loads of one then wait for pending
// stores of the other whose addresses have the same lower 12 bits. A row longer than BLOCK is summed block by block, and the blocks are
// combined in order; where there are few such rows the threads share blocks instead of rows. Nothing in the arithmetic of a row, and
// nothing in the order in which rows are added, depends on the number of threads.
//
// The mean is kept as high + low: rounded to float it would be off by 5 % of a standard deviation for x = 10000 +- 0.01.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "gemm_micro.h"
#include "op.h"
#include "rows.h"

constexpr int64_t BLOCK = 4096;           // numbers of a row that stay in the L1 cache between two looks
constexpr int64_t BATCH_BYTES = 8 << 20;  // of long rows that stay in the L3 cache between two looks

// body(u, n, lanes) for the vectors of columns [begin, end), U of them side by side; u, known to the compiler, numbers these.
template <class C, int U, class Body> INLINE inline void each_vector(int64_t begin, int64_t end, const Body& body) {
    constexpr int L = VL<C>;
    for (; begin + U * L <= end; begin += U * L)
#pragma GCC unroll 8
        for (int u = 0; u < U; u++) body(u, begin + u * L, L);
    for (; begin + L <= end; begin += L) body(0, begin, L);
    if (begin < end) body(0, begin, int(end - begin));
}

template <class W> INLINE inline vec<compute_t<W>> load_or(const W* p, int64_t n, int lanes, compute_t<W> otherwise) {
    return p ? load(p + n, lanes) : set(otherwise);
}

template <class C> struct Moments { C mean, low, squares; };  // the mean is mean + low; sum of the squared distances from it

// What makes a row x into x^ = (x - high - low) rstd.
template <class C> struct Row {
    vec<C> high, shift, rstd;
    INLINE vec<C> normalised(vec<C> x) const { return (x - high) * rstd + shift; }
};

template <class T, class W> struct Norm {
    using C = compute_t<T>;
    using V = vec<C>;
    int64_t M, N;
    const T* x;
    const W *weight, *bias;  // null: 1 and 0
    C *mean, *rstd;          // mean [2, M] is high, then low; null: x is not centred, and 1 / rstd the root of its mean square
    bool centred() const { return mean; }
    Row<C> row(int64_t m) const {
        if (!centred()) return {V{}, V{}, set(rstd[m])};
        return {set(mean[m]), set(-mean[M + m] * rstd[m]), set(rstd[m])};
    }

    // Of columns [begin, end) of row m: the mean of the first eighth, then the distances of all from it, which say how far it is from the
    // mean of all: by no more than sqrt(8) standard deviations, so that the difference below keeps all but 3 bits at the very worst.
    INLINE inline Moments<C> moments(int64_t m, int64_t begin, int64_t end) const {
        constexpr int U = 4;  // sums at once, for the latency of an addition
        const T* p = x + m * N;
        const C count = C(end - begin);
        auto total = [](const V(&sums)[U]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); };
        V sums[U] = {}, distances[U] = {}, squares[U] = {};
        if (!centred()) {
            each_vector<C, U>(begin, end, [&](int u, int64_t n, int lanes) INLINE {
                V v = load(p + n, lanes);
                squares[u] += v * v;
            });
            return {0, 0, total(squares)};
        }
        const int64_t part = ceil_div(end - begin, 8);
        each_vector<C, U>(begin, begin + part, [&](int u, int64_t n, int lanes) INLINE { sums[u] += load(p + n, lanes); });
        const C mean = total(sums) / C(part);
        const V centre = set(mean);
        each_vector<C, U>(begin, end, [&](int u, int64_t n, int lanes) INLINE {
            V d = keep(load(p + n, lanes) - centre, lanes);
            distances[u] += d, squares[u] += d * d;
        });
        const C low = total(distances) / count;
        return {mean, low, total(squares) - count * low * low};
    }

    // The mean and rstd of row m from the moments of its blocks (Chan, Golub, LeVeque 1979), as distances from the first block's mean.
    void combine(int64_t m, const Moments<C>* block, C eps) const {
        int64_t blocks = ceil_div(N, BLOCK);
        auto count = [&](int64_t b) { return C(std::min(BLOCK, N - b * BLOCK)); };
        auto distance = [&](int64_t b) { return (block[b].mean - block[0].mean) + block[b].low; };
        C centre = block[0].mean, off = 0, squares = 0;
        for (int64_t b = 0; b < blocks; b++) off += count(b) * distance(b);
        off /= C(N);
        for (int64_t b = 0; b < blocks; b++) squares += block[b].squares + count(b) * (distance(b) - off) * (distance(b) - off);
        rstd[m] = 1 / std::sqrt(squares / C(N) + eps);
        if (!centred()) return;
        mean[m] = centre + off;
        mean[M + m] = (centre - mean[m]) + off;
    }

    // y = x^ w + b in columns [begin, end) of row m.
    void write(int64_t m, int64_t begin, int64_t end, T* y) const {
        const Row<C> row = this->row(m);
        const Destination to(y, M * N * sizeof(T), N * sizeof(T));
        each_vector<C, 1>(begin, end, [&](int, int64_t n, int lanes) INLINE {
            V w = load_or(weight, n, lanes, C(1)), b = load_or(bias, n, lanes, C(0));
            to.store(y + m * N + n, row.normalised(load(x + m * N + n, lanes)) * w + b, lanes);
        });
    }

    // prepare(m, begin, end) makes the numbers of x that it names, if they are not there yet.
    template <class Prepare> void forward(T* y, C eps, const Prepare& prepare) const {
        const int64_t blocks = ceil_div(N, BLOCK);
        auto end_of = [&](int64_t b) { return std::min(N, (b + 1) * BLOCK); };
        auto look = [&](int64_t m, int64_t b) {
            prepare(m, b * BLOCK, end_of(b));
            return moments(m, b * BLOCK, end_of(b));
        };
        if (blocks == 0) return std::fill(rstd, rstd + M, C(0)), std::fill(mean, mean + (mean ? 2 * M : 0), C(0));
        if (blocks == 1 || M >= 4 * threads())
            return parallel(M, [&](int64_t begin, int64_t end) {
                std::vector<Moments<C>> found(blocks);
                for (int64_t m = begin; m < end; m++) {
                    for (int64_t b = 0; b < blocks; b++) found[b] = look(m, b);
                    combine(m, found.data(), eps);
                    write(m, 0, N, y);
                }
            }, M * N <= SERIAL_NUMBERS);
        const int64_t at_once = std::max<int64_t>(1, BATCH_BYTES / (N * int64_t(sizeof(T))));
        std::vector<Moments<C>> found(std::min(M, at_once) * blocks);
        for (int64_t m = 0; m < M; m += at_once) {
            const int64_t count = std::min(at_once, M - m);
            parallel(count * blocks, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) found[i] = look(m + i / blocks, i % blocks);
            });
            for (int64_t i = 0; i < count; i++) combine(m + i, &found[i * blocks], eps);
            parallel(count * blocks, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin, b; i < end; i++) b = i % blocks, write(m + i / blocks, b * BLOCK, end_of(b), y);
            });
        }
    }
};
