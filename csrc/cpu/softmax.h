// What softmax, log_softmax and the losses on top of them share: e^x for x <= 0, and the two numbers that normalise a row of logits,
//
//     top = max_n x[n]        sum = sum_n e^(x[n] - top)        so that   log sum_n e^x[n] = top + log(sum)
//
// kept apart because log sum e^x, rounded, has lost what log(sum) knows when the logits are in the thousands.
//
//   rows     the classes of a row lie side by side: vectors run along them
//   strips   the classes lie D numbers apart: vectors run across neighbouring rows, and every lane is a row of its own
#pragma once
#include <limits>

#include "gemm_micro.h"
#include "math.h"
#include "rows.h"

template <class C> constexpr C LOWEST = -std::numeric_limits<C>::infinity();

// e^x for x <= 0, with one multiplication by 2^n. Far out, where the result would be subnormal, it is 0. NaN falls through.
template <class C> inline vec<C> exp_nonpositive(vec<C> x) {
    constexpr C LOW = sizeof(C) == 8 ? -708 : -87;
    auto [r, n] = reduce<C>(x);
    vec<C> y = (1 + expm1_reduced<C>(r)) * exponent<C>(n - coefficients<C>::bias);
    return x < LOW ? vec<C>{} : y;
}
template <class C> inline C exp_of(C x) { return exp_nonpositive<C>(set(x))[0]; }
template <class C> inline C log_of(C x) { return log<C>(set(x))[0]; }
template <class T> inline compute_t<T> number(const T* p) { return load(p, 1)[0]; }

// The first `lanes` lanes of v, and `other` in the rest.
template <class C> inline vec<C> first(vec<C> v, int lanes, C other) {
    if (lanes >= VL<C>) return v;
    vec<ints<C>> lane;
    for (int i = 0; i < VL<C>; i++) lane[i] = i;
    return lane < lanes ? v : set(other);
}

template <class C> using full = std::integral_constant<int, VL<C>>;  // as a type: the loop without a tail is compiled without one

// body(n, lanes) for every vector of [0, N); lanes < VL only for the last.
template <class C, class Body> inline void each_vector(int64_t N, const Body& body) {
    int64_t n = 0;
    for (; n + VL<C> <= N; n += VL<C>) body(n, full<C>{});
    if (n < N) body(n, int(N - n));
}

// The largest number; NaN is passed over (it comes back from the sum of exponentials).
template <class T> inline compute_t<T> largest_in(const T* x, int64_t N) {
    using C = compute_t<T>;
    vec<C> top = set(LOWEST<C>);
    each_vector<C>(N, [&](int64_t n, auto lanes) { top = max(first<C>(load(x + n, lanes), lanes, LOWEST<C>), top); });
    return largest(top);
}

template <class C> struct Normaliser { C top, sum; };

// One pass over a row of any length: a block at a time is read for its maximum and then, from the L1 cache, for its exponentials, while
// the next one is on its way. A larger maximum scales what has been summed. While there is none (only -inf so far), 0 stands for it.
template <class T> inline Normaliser<compute_t<T>> normaliser(const T* x, int64_t N) {
    using C = compute_t<T>;
    constexpr int64_t BLOCK = 4096;
    C top = LOWEST<C>;
    vec<C> total{};
    for (int64_t start = 0; start < N; start += BLOCK) {
        const T* block = x + start;
        int64_t count = std::min(BLOCK, N - start);
        C found = largest_in(block, count);
        if (found > top) total *= exp_of(top - found), top = found;
        vec<C> from = set(top == LOWEST<C> ? C(0) : top);
        each_vector<C>(count, [&](int64_t n, auto lanes) {
            prefetch_l2(block + BLOCK + n);
            total += first<C>(exp_nonpositive<C>(load(block + n, lanes) - from), lanes, C(0));
        });
    }
    return {top, sum(total)};
}

// body(m, d, width, lanes) for strips of `width` whole vectors or, at the end of D, of one vector with `lanes` lanes.
template <class C, class Body> void each_strip(int64_t M, int64_t N, int64_t D, const Body& body) {
    constexpr int WIDE = 4;
    int64_t wide = D / (WIDE * VL<C>), rest = D - wide * WIDE * VL<C>, strips = wide + (rest + VL<C> - 1) / VL<C>;
    auto run = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            int64_t m = i / strips, strip = i % strips, narrow = strip - wide, d = wide * WIDE * VL<C> + narrow * VL<C>;
            if (narrow < 0) body(m, strip * WIDE * VL<C>, std::integral_constant<int, WIDE>{}, full<C>{});
            else body(m, d, std::integral_constant<int, 1>{}, int(std::min<int64_t>(VL<C>, D - d)));
        }
    };
    parallel(M * strips, run, M * N * D <= SERIAL_NUMBERS);
}

// One vector, or several side by side, of every row of a strip: f(n, u) adds row n's u-th vector.
template <int U, class F> inline void each_of_strip(int64_t N, const F& f) {
    for (int64_t n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) f(n, u);
}

template <int U, class T, class Lanes> inline void strip_top(const T* x, int64_t N, int64_t D, Lanes lanes, vec<compute_t<T>> (&top)[U]) {
    using C = compute_t<T>;
    for (auto& t : top) t = set(LOWEST<C>);
    each_of_strip<U>(N, [&](int64_t n, int u) { top[u] = max(load(x + n * D + u * VL<C>, lanes), top[u]); });
}

// How the classes of a tensor lie: M times N classes, D numbers apart.
struct Classes {
    int64_t M, N, D;
    Classes(const Tensor& x, int64_t dim) : M(1), N(1), D(1) {
        for (int64_t i = 0; i < x.dim(); i++) (i < dim ? M : i == dim ? N : D) *= x.size(i);
    }
};
