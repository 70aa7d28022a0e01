// What a recurrent cell does with one vector of units, forward and backward: the formulas of dlkernels/ops/recurrent.py.
//
//   forward    a = W_ih x + biases, s = W_hh h' of every gate; state is what goes from step to step beside h: c of an LSTM, h itself of a
//              GRU, whose b_hn is given apart. Makes the new state and what the backward needs; output makes h of them.
//   backward   dh is the gradient of h, carry what flows along the state beside W_hh: dc of an LSTM, dh z of a GRU. Makes da, the gradient
//              of a, and the new carry; ds is that of s for the last gate, which alone differs from da, in a GRU.
#pragma once
#include "math.h"

namespace recurrent {

// 1 / (1 + e^-x) and tanh as in math.h, but with a reciprocal: a step spends a fifth of its time here. Beyond the limit a gate is shut, so that
// nothing comes through, not even a part of infinity; min and max return their second argument for NaN.
template <class C> inline vec<C> gate(vec<C> x) {
    constexpr C limit = sizeof(C) == 8 ? 708 : 87;
    vec<C> open = reciprocal<C>(1 + exp_normal<C>(min(set(limit), max(set(-limit), -x))));
    return x < -limit ? vec<C>{} : open;
}
template <class C> inline vec<C> squash(vec<C> x) {
    vec<C> m = expm1_negative<C>(-2 * magnitude<C>(x));
    return with_sign_of<C>(x, magnitude<C>(m) * reciprocal<C>(m + 2));
}

template <class C> struct Lstm {
    using V = vec<C>;
    static constexpr int GATES = 4, KEPT = 4;
    static constexpr bool HAS_CELL = true, HAS_STATE = true, SPLIT = false;  // SPLIT: the last gate's s is not simply added to its a

    static INLINE void forward(const V* a, const V* s, V, V& c, V* kept) {
        V i = gate<C>(a[0] + s[0]), f = gate<C>(a[1] + s[1]), g = squash<C>(a[2] + s[2]), o = gate<C>(a[3] + s[3]);
        kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o;
        c = f * c + i * g;
    }
    static INLINE V output(const V* kept, V c) { return kept[3] * squash<C>(c); }
    // before and after: c' and c
    static INLINE void backward(const V* kept, V before, V after, V dh, V& dc, V* da, V&) {
        V i = kept[0], f = kept[1], g = kept[2], o = kept[3], y = squash<C>(after);
        V d = dc + dh * o * (1 - y * y);
        da[0] = d * g * i * (1 - i);
        da[1] = d * before * f * (1 - f);
        da[2] = d * i * (1 - g * g);
        da[3] = dh * y * o * (1 - o);
        dc = d * f;
    }
};

template <class C> struct Gru {
    using V = vec<C>;
    static constexpr int GATES = 3, KEPT = 4;
    static constexpr bool HAS_CELL = false, HAS_STATE = true, SPLIT = true;

    static INLINE void forward(const V* a, const V* s, V b_hn, V& h, V* kept) {
        V r = gate<C>(a[0] + s[0]), z = gate<C>(a[1] + s[1]), sn = s[2] + b_hn, n = squash<C>(a[2] + r * sn);
        kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = sn;
        h = n + z * (h - n);
    }
    static INLINE V output(const V*, V h) { return h; }
    // before: h'
    static INLINE void backward(const V* kept, V before, V, V dh, V& carry, V* da, V& ds) {
        V r = kept[0], z = kept[1], n = kept[2], sn = kept[3];
        da[1] = dh * (before - n) * z * (1 - z);
        da[2] = dh * (1 - z) * (1 - n * n);
        da[0] = da[2] * sn * r * (1 - r);
        ds = da[2] * r;
        carry = dh * z;
    }
};

template <class C, bool RELU> struct Rnn {
    using V = vec<C>;
    static constexpr int GATES = 1, KEPT = 0;
    static constexpr bool HAS_CELL = false, HAS_STATE = false, SPLIT = false;

    static INLINE void forward(const V* a, const V* s, V, V& h, V*) {
        V v = a[0] + s[0];
        if constexpr (RELU) h = v <= 0 ? V{} : v;  // a NaN stays one
        else h = squash<C>(v);
    }
    static INLINE V output(const V*, V h) { return h; }
    // after: h
    static INLINE void backward(const V*, V, V after, V dh, V&, V* da, V&) {
        if constexpr (RELU) da[0] = after <= 0 ? V{} : dh;
        else da[0] = dh * (1 - after * after);
    }
};

}  // namespace recurrent
