// Rows of numbers, normalised: what layer_norm, rms_norm and their fusions with a sum share.
//
//   forward    x [M, N] -> y = (x - mean) rstd w + b       three looks at a row, of which only the first goes to memory
//   backward   dy, x -> dx, dweight, dbias                 two looks, likewise; x^ = (x - mean) rstd is formed again in both
//
// ROWS rows go together through every loop: w, b and the sums of columns are then loaded once for all of them, and the latency of one
// row's sum across lanes hides behind the others'. A row longer than BLOCK is summed block by block, and the blocks are combined in
// order; where there are few such rows the threads share blocks instead of rows. Nothing in the arithmetic of a row, and nothing in the
// order in which rows are added, depends on the number of threads.
//
// The mean is kept as high + low: rounded to float it would be off by 5 % of a standard deviation for x = 10000 +- 0.01.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "gemm_micro.h"
#include "op.h"
#include "rows.h"

#define INLINE __attribute__((always_inline))

constexpr int ROWS = 4;
constexpr int64_t BLOCK = 4096;             // numbers of a row that stay in the L1 cache between two looks
constexpr int64_t LONG = 16384;             // up to here ROWS rows of x and dy, and the sums of their columns, stay in the L2 cache
constexpr int64_t BATCH_BYTES = 8 << 20;    // of long rows that stay in the L3 cache between two looks
constexpr int64_t GROUP_ROWS = 16, GROUPS = 64;  // at least so many rows have their columns summed together, in at most so many groups
enum Slot { GROUP_SUMS = 4, COLUMN_SUMS = 5, BLOCK_SUMS = 6 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(u, n, lanes) for the vectors of columns [begin, end), U of them side by side; u, known to the compiler, numbers these.
template <class C, int U, class Body> INLINE inline void each_vector(int64_t begin, int64_t end, const Body& body) {
    constexpr int L = VL<C>;
    for (; begin + U * L <= end; begin += U * L)
#pragma GCC unroll 8
        for (int u = 0; u < U; u++) body(u, begin + u * L, L);
    for (; begin + L <= end; begin += L) body(0, begin, L);
    if (begin < end) body(0, begin, int(end - begin));
}

// The first lanes of v; 0 in the others.
template <class C> inline vec<C> first(vec<C> v, int lanes) {
    if (lanes >= VL<C>) return v;
    vec<ints<C>> lane;
    for (int i = 0; i < VL<C>; i++) lane[i] = i;
    return lane < lanes ? v : vec<C>{};
}

template <class W> INLINE inline vec<compute_t<W>> load_or(const W* p, int64_t n, int lanes, compute_t<W> otherwise) {
    return p ? load(p + n, lanes) : set(otherwise);
}

template <class C> struct Moments { C mean, low, squares; };  // the mean is mean + low; sum of the squared distances from it

// What makes x into x^ = (x - mean) rstd, for R rows.
template <class C, int R> struct Rows {
    vec<C> high[R], shift[R], rstd[R];
    Rows(const C* mean, const C* low, const C* scale) {
        for (int r = 0; r < R; r++) {
            high[r] = set(mean ? mean[r] : C(0)), rstd[r] = set(scale[r]);
            shift[r] = mean ? set(-low[r] * scale[r]) : vec<C>{};
        }
    }
    INLINE vec<C> normalised(int r, vec<C> x) const { return (x - high[r]) * rstd[r] + shift[r]; }
};

template <class T, class W> struct Norm {
    using C = compute_t<T>;
    using V = vec<C>;
    int64_t M, N;
    const T* x;
    const W *weight, *bias;  // null: 1 and 0
    C *mean, *rstd;          // mean [2, M] is high, then low; null: x is not centred, the root of the mean square takes the part of 1 / rstd
    const C* low() const { return mean ? mean + M : nullptr; }
    template <int R> Rows<C, R> rows(int64_t m) const { return {mean ? mean + m : nullptr, mean ? low() + m : nullptr, rstd + m}; }
    bool centred() const { return mean; }

    // ---- forward -----------------------------------------------------------------------------------------------------------------

    // Of columns [begin, end) of rows m, m + 1, ...: the mean, then the distances from it. The second pass also finds how far off the
    // rounded mean is.
    template <int R> void moments(int64_t m, int64_t begin, int64_t end, Moments<C> (&out)[R]) const {
        const T* p = x + m * N;
        const C count = C(end - begin);
        V sums[R][2] = {}, squares[R][2] = {}, centre[R] = {};
        if (centred()) {
            each_vector<C, 2>(begin, end, [&](int u, int64_t n, int lanes) INLINE {
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sums[r][u] += load(p + r * N + n, lanes);
            });
            for (int r = 0; r < R; r++) {
                out[r].mean = sum(sums[r][0] + sums[r][1]) / count;
                centre[r] = set(out[r].mean), sums[r][0] = sums[r][1] = V{};
            }
            each_vector<C, 2>(begin, end, [&](int u, int64_t n, int lanes) INLINE {
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    V d = first<C>(load(p + r * N + n, lanes) - centre[r], lanes);
                    sums[r][u] += d, squares[r][u] += d * d;
                }
            });
        } else {
            each_vector<C, 2>(begin, end, [&](int u, int64_t n, int lanes) INLINE {
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    V v = load(p + r * N + n, lanes);
                    squares[r][u] += v * v;
                }
            });
        }
        for (int r = 0; r < R; r++) {
            C off = sum(sums[r][0] + sums[r][1]) / count;
            out[r] = {centred() ? out[r].mean : C(0), off, sum(squares[r][0] + squares[r][1]) - count * off * off};
        }
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

    // y = x^ w + b in columns [begin, end) of rows m, m + 1, ...; fetches the rows after them.
    template <int R> void write(int64_t m, int64_t begin, int64_t end, T* y) const {
        const Rows<C, R> row = rows<R>(m);
        const T* p = x + m * N;
        each_vector<C, 1>(begin, end, [&](int, int64_t n, int lanes) INLINE {
            V w = load_or(weight, n, lanes, C(1)), b = load_or(bias, n, lanes, C(0));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                prefetch_l2(p + (R + r) * N + n);
                store(y + (m + r) * N + n, row.normalised(r, load(p + r * N + n, lanes)) * w + b, lanes);
            }
        });
    }

    // prepare(m, begin, end) makes the numbers of x that it names, if they are not there yet.
    template <class Prepare> void forward(T* y, C eps, const Prepare& prepare) const {
        const int64_t blocks = ceil_div(N, BLOCK);
        if (blocks == 0) return std::fill(rstd, rstd + M, C(0)), std::fill(mean, mean + (mean ? 2 * M : 0), C(0));
        if (blocks == 1) {
            parallel(ceil_div(M, ROWS), [&](int64_t begin, int64_t end) {
                int64_t m = begin * ROWS, stop = std::min(M, end * ROWS);
                for (; m + ROWS <= stop; m += ROWS) forward_rows<ROWS>(m, y, eps, prepare);
                for (; m < stop; m++) forward_rows<1>(m, y, eps, prepare);
            }, M * N <= SERIAL_NUMBERS);
            return;
        }
        bool many = M >= 4 * threads();
        int64_t batch = many ? M : std::max<int64_t>(1, BATCH_BYTES / (N * int64_t(sizeof(T))));
        std::vector<Moments<C>> found(many ? 0 : std::min(M, batch) * blocks);
        auto one_block = [&](int64_t m, int64_t b, Moments<C>* to) {
            Moments<C> block[1];
            prepare(m, b * BLOCK, std::min(N, (b + 1) * BLOCK));
            moments<1>(m, b * BLOCK, std::min(N, (b + 1) * BLOCK), block);
            *to = block[0];
        };
        if (many)
            return parallel(M, [&](int64_t begin, int64_t end) {
                std::vector<Moments<C>> row(blocks);
                for (int64_t m = begin; m < end; m++) {
                    for (int64_t b = 0; b < blocks; b++) one_block(m, b, &row[b]);
                    combine(m, row.data(), eps);
                    write<1>(m, 0, N, y);
                }
            });
        for (int64_t m = 0; m < M; m += batch) {
            int64_t count = std::min(batch, M - m);
            parallel(count * blocks, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) one_block(m + i / blocks, i % blocks, &found[i]);
            });
            for (int64_t i = 0; i < count; i++) combine(m + i, &found[i * blocks], eps);
            parallel(count * blocks, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin, b; i < end; i++) b = i % blocks, write<1>(m + i / blocks, b * BLOCK, std::min(N, (b + 1) * BLOCK), y);
            });
        }
    }

    template <int R, class Prepare> void forward_rows(int64_t m, T* y, C eps, const Prepare& prepare) const {
        for (int r = 0; r < R; r++) prepare(m + r, 0, N);
        Moments<C> row[R];
        moments<R>(m, 0, N, row);
        for (int r = 0; r < R; r++) combine(m + r, &row[r], eps);
        write<R>(m, 0, N, y);
    }
};
