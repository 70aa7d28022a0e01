// The steps of a recurrent layer: h = cell(W_hh h', ...) token after token, forward and backward.
//
// Sequences do not depend on one another, so every thread takes some of them, in one direction, through all of time: nobody waits, but
// where there are more threads than sequences. W_hh is packed once and read by all. A step computes NR units at a time:
//
//              units u .. u + NR                       for every gate a tile of sums for all rows of h', which stay in the L1 cache;
//           +----+----+----+----+                      then cells.h makes of them, of what W_ih x gave, and of the state, the new h,
//      h'   | i  | f  | g  | o  |   rows of sums       which goes to y, and to where the next step reads it
//           +----+----+----+----+
//
// Backward is the same with dh = W_hh^T da: da of all gates are the rows, and there is one tile.
//
// Where an LSTM projects its h, what the step has made are the rows of one more product, with W_hr; backward W_hr^T dh comes first.
#pragma once
#include "cells.h"
#include "sequences.h"

namespace recurrent {

// How far apart rows of `numbers` lie that a product reads side by side: were they a multiple of 4096 bytes apart, their numbers would
// drive one another out of the L1 cache.
template <class E> int64_t row_length(int64_t numbers, int64_t step) {
    int64_t length = round_up(numbers, step);
    return length * sizeof(E) % 4096 ? length : length + step;
}

// What goes from step to step, for every row of a direction; twice, as a step reads what the one before wrote.
template <class T, class Cell> struct Carried {
    using C = compute_t<T>;
    using Micro = step_micro<T>;
    using E = typename Micro::Element;
    int64_t B, K, H, W;
    std::vector<E> rows;   // [D][2][B][K]: h, or da of all gates; zero beyond the last number
    std::vector<C> state;  // [D][B][H]
    std::vector<E> inner;  // [D][B][W]: what goes into the product with W_hr, o tanh(c) or dh; it does not outlive a step
    Carried(int64_t D, int64_t B, int64_t numbers, int64_t units, int64_t projected)
        : B(B), K(row_length<E>(numbers, Micro::NR)), H(round_up(units, Micro::NR)),
          W(projected ? row_length<E>(projected, Micro::NR) : 0), rows(D * 2 * B * K),
          state(Cell::HAS_STATE ? D * B * H : 0), inner(D * B * W) {}
    E* inner_row(const Share& s, int64_t j = 0) { return inner.data() + (s.d * B + s.base + j) * W; }
    E* row(const Share& s, int64_t p, int64_t j = 0) { return rows.data() + ((s.d * 2 + (p & 1)) * B + s.base + j) * K; }
    C* state_of(const Share& s, int64_t j) { return Cell::HAS_STATE ? state.data() + (s.d * B + s.base + j) * H : nullptr; }
};

// One layer: sizes, and the arrays that both ways share. Null where there is none.
template <class T> struct Arrays {
    using C = compute_t<T>;
    int64_t D, H, P;     // P: the width of h, y and their gradients, H but for a projection
    T *y, *h0, *c0;      // [N][D][P]; [D][B][P], [D][B][H]
    C *gates, *cells;    // [N][D][KEPT][H], [N][D][H]
    T *hn, *cn;          // forward, as h0 and c0
    T *dy, *dhn, *dcn;   // backward
    T *dh0, *dc0;
    T *da, *ds, *dh;     // backward: [N][D][GATES][H]; in a GRU, [N][D][H]; with a projection, [N][D][P]
};

// Fetch what a block of units of one row will need, while its sums are being computed: `count` arrays, `step` numbers apart, of memory that
// the hardware does not see coming.
template <bool WRITE = false, class E> inline void fetch(const E* p, int64_t count, int64_t step, int64_t units) {
    constexpr int64_t LINE = 64 / sizeof(E);
    for (int64_t i = 0; p && i < count; i++)
        for (int64_t u = 0; u < units; u += LINE) __builtin_prefetch(p + i * step + u, WRITE, 2);
}

// Sums of one block of units: where those of a row and of a gate begin.
template <class C> struct Sums {
    const C* p;
    int64_t row, gate;
    vec<C> at(int64_t j, int g, int64_t u, int lanes) const { return load(p + j * row + g * gate + u, lanes); }
};

}  // namespace recurrent
