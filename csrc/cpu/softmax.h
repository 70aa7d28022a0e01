// What softmax, log_softmax and cross_entropy share: e^x for x <= 0, tiles of rows, and the two numbers that normalise a row,
//
//     top = max_n x[n]        sum = sum_n e^(x[n] - top)        so that   log sum_n e^x[n] = top + log(sum)
//
// kept apart because log sum e^x, rounded, has lost what log(sum) knows when the logits are in the thousands.
//
//   Rows     D = 1, the classes of a row side by side: vectors run along them, and a tile is one row, or four short ones, whose chains of
//            dependent instructions then overlap
//   Strip    classes D numbers apart: vectors run across neighbouring rows, every lane is a row of its own, no transposed copy is made
//
// Both hand out the same things, so a kernel is written once: U vectors, each with what belongs to one row (in all its lanes) or to VL rows.
#pragma once
#include <limits>

#include "gemm_micro.h"
#include "math.h"
#include "rows.h"

// (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2 as in math.h, but only as good as the difference x - top that it is used for: for float the
// relative error of e^r is 2^-23.2, and 2^-17.5 where the numbers come from a half type.
template <class T> struct short_exp : coefficients<double> {};
template <> struct short_exp<float> { static constexpr float exp[] = {0.499992266f, 0.166671193f, 0.0418909134f, 0.00831232566f}; };
template <> struct short_exp<bf16> { static constexpr float exp[] = {0.500051571f, 0.167538572f, 0.0412761542f}; };
template <> struct short_exp<f16> : short_exp<bf16> {};

// e^x for x <= 0 and the accuracy of numbers stored as T. Far out, where the result would be subnormal, it is 0. NaN falls through.
// One ln 2 without its low part will do: its error, |x| 2^-28, is below the rounding of the difference x.
template <class T> inline vec<compute_t<T>> exp_nonpositive(vec<compute_t<T>> x) {
    using C = compute_t<T>;
    constexpr C LOW = sizeof(C) == 8 ? -708 : -87, ln2 = C(0.69314718055994530942), log2e = C(1.44269504088896340736);
    constexpr C round = C(3LL << (coefficients<C>::mantissa - 1)) + coefficients<C>::bias;  // its sum has the exponent field of 2^n below
    vec<C> shifted = x * log2e + round, n = shifted - round, r = x - n * ln2;
    vec<C> y = (1 + (r + r * r * polynomial(short_exp<T>::exp, r))) * exponent<C>(bits_as<bits<C>>(shifted));
    return x < LOW ? vec<C>{} : y;
}
template <class T> inline compute_t<T> number(const T* p) {
    if constexpr (sizeof(T) == 2) return load(p, 1)[0];
    else return *p;
}

template <class C> using full = std::integral_constant<int, VL<C>>;  // as a type: the loop without a tail is compiled without one

// body(n, lanes) for every vector of [0, N); lanes < VL only for the last.
template <class C, class Body> inline void each_vector(int64_t N, const Body& body) {
    int64_t n = 0;
    for (; n + VL<C> <= N; n += VL<C>) body(n, full<C>{});
    if (n < N) body(n, int(N - n));
}

template <class C, int U_> struct Rows {
    static constexpr int U = U_;
    using V = vec<C>;
    int64_t N;
    int64_t numbers() const { return U * N; }                             // that the tile covers: how far the next tile is away
    int64_t place(int64_t row, int64_t n) const { return row * N + n; }   // where class n of the tile's row lies
    template <class F> void each(const F& f) const {                      // f(place, n, u, lanes) for every vector, in memory's order
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) each_vector<C>(N, [&](int64_t n, auto lanes) { f(u * N + n, n, u, lanes); });
    }
    static V largest(V v) { return set(::largest(v)); }  // of a row
    static V sum(V v) { return set(::sum(v)); }
    template <class Lanes> static V only(V v, Lanes lanes, C other) {  // `other` in lanes behind the last class
        return int(lanes) >= VL<C> ? v : lane_numbers<C>() < ints<C>(int(lanes)) ? v : set(other);
    }
    static vec<ints<C>> class_numbers(int64_t n) { return lane_numbers<C>() + ints<C>(n); }
    template <class T, class Lanes> static V of_class(const T* p, int64_t n, Lanes lanes) { return load(p + n, lanes); }
    template <class F> void each_row(const F& f) const {  // f(row of the tile, u, lane that holds it)
        for (int u = 0; u < U; u++) f(u, u, 0);
    }
    static void put(C* p, int u, V v) { p[u] = v[0]; }  // one number per row
    template <class T> static V get(const T* p, int u) { return set(number(p + u)); }
    template <class W> static W spread(W v) { return v[0] - W{}; }  // from the lane that each_row named to all that need it
};

template <class C, int U_, class Lanes> struct Strip {
    static constexpr int U = U_;
    using V = vec<C>;
    int64_t N, D;
    Lanes lanes;
    int64_t numbers() const { return U * VL<C>; }
    int64_t place(int64_t row, int64_t n) const { return n * D + row; }
    template <class F> void each(const F& f) const {
        for (int64_t n = 0; n < N; n++)
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) f(n * D + u * VL<C>, n, u, lanes);
    }
    static V largest(V v) { return v; }
    static V sum(V v) { return v; }
    static V only(V v, Lanes, C) { return v; }
    static vec<ints<C>> class_numbers(int64_t n) { return set(ints<C>(n)); }
    template <class T> static V of_class(const T* p, int64_t n, Lanes) { return set(number(p + n)); }
    template <class F> void each_row(const F& f) const {
        for (int u = 0; u < U; u++)
            for (int lane = 0; lane < lanes; lane++) f(u * VL<C> + lane, u, lane);
    }
    void put(C* p, int u, V v) const { store(p + u * VL<C>, v, lanes); }
    template <class T> V get(const T* p, int u) const { return load(p + u * VL<C>, lanes); }
    template <class W> static W spread(W v) { return v; }
};

// How the classes of a tensor lie: M sets of N classes, D numbers apart.
struct Classes {
    int64_t M, N, D;
    Classes(const Tensor& x, int64_t dim) : M(1), N(1), D(1) {
        for (int64_t i = 0; i < x.dim(); i++) (i < dim ? M : i == dim ? N : D) *= x.size(i);
    }
};

// body(tile, place, row) for tiles that cover all M D rows; place is where the first row's first class lies.
template <class C, class Body> void each_tile(const Classes& size, const Body& body) {
    constexpr int64_t WIDE = 4, SHORT = 1024;  // vectors, or rows, side by side; from SHORT classes on a row overlaps with itself
    auto [M, N, D] = size;
    bool serial = M * N * D <= SERIAL_NUMBERS;
    if (D == 1) {
        int64_t height = N < SHORT ? WIDE : 1;
        return parallel((M + height - 1) / height, [&, M = M, N = N](int64_t begin, int64_t end) {
            int64_t m = begin * height, stop = std::min(M, end * height);
            for (; height == WIDE && m + WIDE <= stop; m += WIDE) body(Rows<C, WIDE>{N}, m * N, m);
            for (; m < stop; m++) body(Rows<C, 1>{N}, m * N, m);
        }, serial);
    }
    int64_t wide = D / (WIDE * VL<C>), rest = D - wide * WIDE * VL<C>, strips = wide + (rest + VL<C> - 1) / VL<C>;
    parallel(M * strips, [&, N = N, D = D](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            int64_t m = i / strips, strip = i % strips;
            int64_t d = std::min(strip, wide) * WIDE * VL<C> + std::max<int64_t>(strip - wide, 0) * VL<C>;
            if (strip < wide) body(Strip<C, WIDE, full<C>>{N, D, {}}, m * N * D + d, m * D + d);
            else body(Strip<C, 1, int>{N, D, int(std::min<int64_t>(VL<C>, D - d))}, m * N * D + d, m * D + d);
        }
    }, serial);
}

// top and sum of every row of a tile: two passes, the second from the cache while the next tile is on its way to it.
// visit(place, u, lanes, e) sees the exponentials.
template <class T, class Tile, class Visit, class V = typename Tile::V>
inline void normalise(const Tile& tile, const T* x, V (&top)[Tile::U], V (&sum)[Tile::U], const Visit& visit) {
    using C = compute_t<T>;
    constexpr C LOWEST = -std::numeric_limits<C>::infinity();
    for (int u = 0; u < Tile::U; u++) top[u] = set(LOWEST), sum[u] = V{};
    tile.each([&](int64_t at, int64_t, int u, auto lanes) { top[u] = max(tile.only(load(x + at, lanes), lanes, LOWEST), top[u]); });
    for (auto& t : top) t = tile.largest(t);  // NaN is passed over here, and comes back as a NaN sum
    tile.each([&](int64_t at, int64_t, int u, auto lanes) {
        prefetch_l2(x + at + tile.numbers());
        auto e = exp_nonpositive<T>(load(x + at, lanes) - top[u]);
        sum[u] += tile.only(e, lanes, C(0));
        visit(at, u, lanes, e);
    });
    for (auto& s : sum) s = tile.sum(s);
}
