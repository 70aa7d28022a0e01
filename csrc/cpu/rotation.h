// Pairs of numbers turned by an angle, (a, b) -> (a c - b s, b c + a s): rows of heads in rope.cpp, tiles of a product in qkv_projection.h.
#pragma once
#include <algorithm>

#include "simd.h"

template <class V, int... L> INLINE inline V odds(V a, V b, std::integer_sequence<int, L...>) {  // lanes 1, 3, ... of a followed by b
    return __builtin_shufflevector(a, b, (2 * L + 1)...);
}
// a0 b0 a1 b1 ...: the numbers from lane `Start` of the zipped pairs on.
template <int Start, class V, int... L> INLINE inline V zipped(V a, V b, std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(a, b, ((Start + L) / 2 + (L % 2) * int(sizeof...(L)))...);
}

// A vector of first numbers and one of second numbers, of n pairs.
template <class C> struct Pairs {
    static constexpr int L = VL<C>;
    static constexpr std::make_integer_sequence<int, L> lanes{};
    vec<C> a, b;

    Pairs turned(vec<C> c, vec<C> s) const { return {a * c - b * s, b * c + a * s}; }
    // Neighbours in memory, sorted in registers, and back.
    template <class T> static Pairs load_neighbours(const T* x, int n) {
        int first = std::min(L, 2 * n), second = 2 * n - first;
        vec<C> low = load(x, first), high = second ? load(x + L, second) : vec<C>{};
        return {evens(low, high, lanes), odds(low, high, lanes)};
    }
    template <class T> void store_neighbours(T* y, int n) const {
        int first = std::min(L, 2 * n), second = 2 * n - first;
        store(y, zipped<0>(a, b, lanes), first);
        if (second) store(y + L, zipped<L>(a, b, lanes), second);
    }
};

// A row is the D numbers of one head at one position: its first 2 P are P pairs, the others are copied.
struct Rotation {
    int64_t P, D;
    bool interleaved, inverse = false;

    // Pairs p to p + n of a row, from and to where they belong.
    template <class C, class T> Pairs<C> get(const T* x, int64_t p, int n) const {
        if (interleaved) return Pairs<C>::load_neighbours(x + 2 * p, n);
        return {load(x + p, n), load(x + P + p, n)};
    }
    template <class C, class T> void put(const Pairs<C>& pairs, T* y, int64_t p, int n) const {
        if (interleaved) return pairs.store_neighbours(y + 2 * p, n);
        store(y + p, pairs.a, n);
        store(y + P + p, pairs.b, n);
    }
    // One row, which may be turned where it lies; cos and sin are of its position.
    template <class From, class To, class C> void row(const From* x, To* y, const C* cos, const C* sin) const {
        if (interleaved) turn<true>(x, y, cos, sin);
        else turn<false>(x, y, cos, sin);
        if constexpr (std::is_same_v<From, To>) {
            if (x != y) memcpy(y + 2 * P, x + 2 * P, (D - 2 * P) * sizeof(To));
        } else {
            for (int64_t d = 2 * P; d < D; d += VL<C>) {
                int n = int(std::min<int64_t>(VL<C>, D - d));
                store(y + d, load(x + d, n), n);
            }
        }
    }
    template <bool INTERLEAVED, class From, class To, class C> void turn(const From* x, To* y, const C* cos, const C* sin) const {
        const Rotation how{P, D, INTERLEAVED, inverse};
        const C sign = inverse ? -1 : 1;
        for (int64_t p = 0; p < P; p += VL<C>) {
            int n = int(std::min<int64_t>(VL<C>, P - p));
            how.put(how.template get<C>(x, p, n).turned(load(cos + p, n), load(sin + p, n) * sign), y, p, n);
        }
    }
};
