// The steps of a recurrent layer: h = cell(W_hh h', ...) token after token, forward and backward.
//
// Sequences do not depend on one another, so every thread takes some of them, in one direction, through all of time: nobody waits, but where
// there are more threads than sequences. W_hh is packed once and read by all. A step computes NR units at a time:
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

// How far apart rows of `numbers` lie that a product reads side by side: were they a multiple of 4096 bytes apart, their numbers would drive
// one another out of the L1 cache.
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

template <class T, class Cell> struct Forward {
    using C = compute_t<T>;
    using V = vec<C>;
    using State = Carried<T, Cell>;
    const Tokens& tokens;
    const Arrays<T>& to;
    State& carried;
    const C* b_hn[2];  // of a GRU
    StepWeights<step_micro<T>> w = {};
    const C* bias[2] = {};  // of a direction, b_ih and b_hh as one: [GATES H]
    // Where W_ih x of many tokens is one product before the steps: it and the biases, of the tokens from `first` on: [tokens][GATES H].
    const C* input[2] = {};
    int64_t first[2] = {};
    // Where it is part of every step: x, [N][I].
    const T* x = nullptr;
    int64_t I = 0;

    static constexpr int G = Cell::GATES, KEPT = Cell::KEPT;

    // Rows that begin at the p-th step of a share take h0 and c0.
    void begin(const Share& s, int64_t p, int64_t from, int64_t until) const {
        for (int64_t j = from; j < until; j++) {
            int64_t sequence = s.d * tokens.B + s.sequence(j);
            auto copy = [](const T* from, int64_t count, auto* to) {
                for (int64_t u = 0; u < count; u += VL<C>) {
                    int lanes = std::min<int64_t>(VL<C>, count - u);
                    store(to + u, load(from + u, lanes), lanes);
                }
            };
            copy(to.h0 + sequence * to.P, to.P, carried.row(s, p, j));
            if constexpr (Cell::HAS_STATE) copy((Cell::HAS_CELL ? to.c0 : to.h0) + sequence * to.H, to.H, carried.state_of(s, j));
        }
    }
    // Where h of row j goes at step t, the p-th: to y, to where the next step reads it, and to hn at the end of its sequence.
    struct Output {
        T *y, *hn;
        typename State::E* next;
        INLINE void put(int64_t u, V h, int lanes) const {
            if (y) store(y + u, h, lanes);
            store(next + u, h, lanes);
            if (hn) store(hn + u, h, lanes);
        }
    };
    Output output(const Share& s, int64_t t, int64_t p, int64_t j, bool last) const {
        int64_t b = s.sequence(j), n = tokens.offset[t] + b;
        return {to.y + (n * to.D + s.d) * to.P, last ? to.hn + (s.d * tokens.B + b) * to.P : nullptr, carried.row(s, p + 1, j)};
    }
    // Units [u0, u1) of rows [j0, j1) at step t, the p-th.
    void units(const Share& s, int64_t t, int64_t p, int64_t j0, int64_t j1, int64_t u0, int64_t u1, const Sums<C>& sums) const {
        const int64_t D = to.D, H = to.H, d = s.d;
        for (int64_t j = j0; j < j1; j++) {
            int64_t b = s.sequence(j), n = tokens.offset[t] + b, place = (n * D + d) * H, end = (d * tokens.B + b) * H;
            bool last = tokens.beside(t, b, d == 0) < 0;
            const C* a_n = input[d] ? input[d] + (n - first[d]) * G * H : bias[d];
            Output out = carried.W ? Output{nullptr, nullptr, carried.inner_row(s, j)} : output(s, t, p, j, last);
            // Two vectors at a time: while the last formulas of one wait for those before them, there is the other to compute.
            auto vectors = [&](int64_t u, int lanes, auto count) INLINE {
                constexpr int MANY = count;
                V kept[MANY][KEPT + 1], state[MANY] = {};
#pragma GCC unroll 2
                for (int v = 0; v < MANY; v++) {
                    int64_t at = u + v * VL<C>;
                    V a[G], s_[G];
                    for (int g = 0; g < G; g++) a[g] = load(a_n + g * H + at, lanes), s_[g] = sums.at(j, g, at - u0, lanes);
                    if (Cell::SPLIT && !input[d]) a[G - 1] += sums.at(j, G, at - u0, lanes);
                    if constexpr (Cell::HAS_STATE) state[v] = load(carried.state_of(s, j) + at);
                    Cell::forward(a, s_, Cell::SPLIT && b_hn[d] ? load(b_hn[d] + at, lanes) : V{}, state[v], kept[v]);
                }
#pragma GCC unroll 2
                for (int v = 0; v < MANY; v++) {
                    int64_t at = u + v * VL<C>;
                    out.put(at, Cell::output(kept[v], state[v]), lanes);
                    if constexpr (Cell::HAS_STATE) store(carried.state_of(s, j) + at, state[v]);
                    if (to.gates)
                        for (int g = 0; g < KEPT; g++) store(to.gates + place * KEPT + g * H + at, kept[v][g], lanes);
                    if (to.cells) store(to.cells + place + at, state[v], lanes);
                    if constexpr (Cell::HAS_CELL)
                        if (last) store(to.cn + end + at, state[v], lanes);
                }
            };
            int64_t u = u0;
            for (; u + 2 * VL<C> <= u1; u += 2 * VL<C>) vectors(u, VL<C>, std::integral_constant<int, 2>{});
            for (; u < u1; u += VL<C>) vectors(u, int(std::min<int64_t>(VL<C>, u1 - u)), std::integral_constant<int, 1>{});
        }
    }
    // With a projection: h from u0 to u1 of the first rows, which `sums` are.
    void outputs(const Share& s, int64_t t, int64_t p, int64_t rows, int64_t u0, int64_t u1, const Sums<C>& sums) const {
        for (int64_t j = 0; j < rows; j++) {
            Output out = output(s, t, p, j, tokens.beside(t, s.sequence(j), s.d == 0) < 0);
            for (int64_t u = u0; u < u1; u += VL<C>) {
                int lanes = std::min<int64_t>(VL<C>, u1 - u);
                out.put(u, sums.at(j, 0, u - u0, lanes), lanes);
            }
        }
    }
    void fetch_units(const Share& s, int64_t t, int64_t n, int64_t u, int64_t units) const {
        for (int64_t j = 0; j < n; j++) {
            int64_t token = tokens.offset[t] + s.sequence(j), place = (token * to.D + s.d) * to.H;
            if (input[s.d]) fetch(input[s.d] + (token - first[s.d]) * G * to.H + u, G, to.H, units);
            if (!carried.W) fetch<true>(to.y + place + u, 1, 0, units);
            if (to.gates) fetch<true>(to.gates + place * KEPT + u, KEPT, to.H, units);
            if (to.cells) fetch<true>(to.cells + place + u, 1, 0, units);
        }
    }
    // The sums of a block of units for n rows: of x, if W_ih is part of the step, and of h. Those of a GRU's last gate stay apart.
    void multiply(const Share& s, int64_t p, int64_t n, int64_t b, const typename State::E* rows_of_x, int64_t ldx, C* sums) const {
        constexpr int64_t NR = State::Micro::NR, WIDE = (G + Cell::SPLIT) * NR, ADDED = Cell::SPLIT ? G - 1 : G;
        const auto &hh = w.hh[s.d], &ih = w.ih[s.d];
        if (rows_of_x) {
            ih.multiply(n, rows_of_x, ldx, b, 0, ADDED, sums, WIDE);
            ih.multiply(n, rows_of_x, ldx, b, ADDED, G, sums + G * NR, WIDE);
        }
        hh.multiply(n, carried.row(s, p), carried.K, b, 0, ADDED, sums, WIDE, rows_of_x);
        hh.multiply(n, carried.row(s, p), carried.K, b, ADDED, G, sums + ADDED * NR, WIDE);
    }
    // x of the first n rows at step t, where they stay in the cache.
    void copy_x(const Share& s, int64_t t, int64_t n, typename State::E* to, int64_t ld) const {
        for (int64_t j = 0; j < n; j++) {
            const T* from = x + (tokens.offset[t] + s.sequence(j)) * I;
            for (int64_t i = 0; i < ld; i += VL<C>) store(to + j * ld + i, load(from + i, int(std::clamp<int64_t>(I - i, 0, VL<C>))));
        }
    }
    // Rows of a share that have a token at its p-th step.
    int64_t running(const Share& s, int64_t p) const { return s.running(tokens.size[tokens.step(s.d == 0, p)]); }
    // Steps [p0, p1) of a share, in its own order, by one of its team.
    void steps(const Share& s, int64_t p0, int64_t p1, Team& team, int64_t member) const {
        constexpr int64_t NR = State::Micro::NR, WIDE = (G + Cell::SPLIT) * NR;
        const int64_t blocks = w.hh[s.d].blocks(), members = team.members(), ldx = row_length<typename State::E>(I, NR);
        C* sums = scratch<C, 0>(s.count * WIDE);
        auto rows_of_x = x ? scratch<typename State::E, 1>(s.count * ldx) : nullptr;
        if (p0 == 0) team.go(member, 0, [&](int64_t piece) { if (piece == 0) begin(s, 0, 0, running(s, 0)); });
        for (int64_t p = p0; p < p1; p++) {
            int64_t t = tokens.step(s.d == 0, p), n = running(s, p);
            if (x) copy_x(s, t, n, rows_of_x, ldx);
            team.go(member, p - p0 + (p0 == 0), [&](int64_t piece) {
                for (int64_t b = blocks * piece / members; b < blocks * (piece + 1) / members; b++) {
                    fetch_units(s, t, n, b * NR, std::min<int64_t>(NR, to.H - b * NR));
                    multiply(s, p, n, b, rows_of_x, ldx, sums);
                    units(s, t, p, 0, n, b * NR, std::min(to.H, (b + 1) * NR), {sums, WIDE, NR});
                }
                for (int64_t b = 0; b < w.hr[s.d].blocks(); b++) {  // of all units at once: a team of one
                    w.hr[s.d].multiply(n, carried.inner_row(s), carried.W, b, 0, 1, sums, NR);
                    outputs(s, t, p, n, b * NR, std::min(to.P, (b + 1) * NR), {sums, NR, NR});
                }
                if (piece == 0 && p + 1 < tokens.T) begin(s, p + 1, n, running(s, p + 1));
            });
        }
    }
};

template <class T, class Cell> struct Backward {
    using C = compute_t<T>;
    using V = vec<C>;
    const Tokens& tokens;
    const Arrays<T>& of;
    Carried<T, Cell>& carried;
    StepWeights<step_micro<T>> w = {};

    static constexpr int G = Cell::GATES, KEPT = Cell::KEPT;

    static V optional(const T* p, int64_t at, int lanes) { return p ? load(p + at, lanes) : V{}; }

    // dh of sequence b from unit u on: what comes `back` from the step after, and dy of token n. Without a token it is the gradient of h0.
    INLINE V arrived(const Share& s, int64_t b, int64_t n, int64_t u, int lanes, V back) const {
        if (n >= 0) return back + optional(of.dy, (n * of.D + s.d) * of.P + u, lanes);
        store(of.dh0 + (s.d * tokens.B + b) * of.P + u, back, lanes);
        return V{};
    }
    // Units [u0, u1) of rows [j0, j1) at step t, the p-th from the end. Rows below `known` have W_hh^T da of the step that came after in
    // `sums`; rows from `running` on have no token at this step. With a projection `sums` are W_hr^T dh, see `outputs`.
    void units(const Share& s, int64_t t, int64_t p, int64_t j0, int64_t j1, int64_t known, int64_t running, int64_t u0, int64_t u1,
               const Sums<C>& sums) const {
        const int64_t D = of.D, H = of.H, d = s.d;
        for (int64_t j = j0; j < j1; j++) {
            int64_t b = s.sequence(j), n = j < running ? tokens.offset[t] + b : -1, place = (n * D + d) * H, end = (d * tokens.B + b) * H;
            int64_t previous = j < running ? tokens.beside(t, b, d == 1) : -1;
            auto* row = carried.row(s, p, j);
            for (int64_t u = u0; u < u1; u += VL<C>) {
                int lanes = std::min<int64_t>(VL<C>, u1 - u);
                V carry{}, kept[KEPT + 1], da[G], ds{}, before{}, after{};
                V dh{};
                if (j < (carried.W ? running : known)) dh = sums.at(j, 0, u - u0, lanes);
                else if (!carried.W) dh = optional(of.dhn, end + u, lanes);
                if constexpr (Cell::HAS_STATE) carry = j < known ? load(carried.state_of(s, j) + u) : optional(of.dcn, end + u, lanes);
                if constexpr (Cell::HAS_STATE && !Cell::HAS_CELL) dh += carry;
                if (!carried.W) dh = arrived(s, b, n, u, lanes, dh);
                if (n < 0) {
                    if constexpr (Cell::HAS_CELL) store(of.dc0 + end + u, carry, lanes);
                    continue;
                }
                for (int g = 0; g < KEPT; g++) kept[g] = load(of.gates + place * KEPT + g * H + u, lanes);
                int64_t earlier = (previous * D + d) * H + u;
                if constexpr (Cell::HAS_CELL) {
                    after = load(of.cells + place + u, lanes);
                    before = previous >= 0 ? load(of.cells + earlier, lanes) : load(of.c0 + end + u, lanes);
                } else if constexpr (Cell::HAS_STATE) {
                    before = previous >= 0 ? load(of.y + earlier, lanes) : load(of.h0 + end + u, lanes);
                } else {
                    after = load(of.y + place + u, lanes);
                }
                Cell::backward(kept, before, after, dh, carry, da, ds);
                for (int g = 0; g < G; g++) {
                    store(of.da + place * G + g * H + u, da[g], lanes);
                    store(row + g * H + u, Cell::SPLIT && g == G - 1 ? ds : da[g], lanes);
                }
                if constexpr (Cell::SPLIT) store(of.ds + place + u, ds, lanes);
                if constexpr (Cell::HAS_STATE) store(carried.state_of(s, j) + u, carry);
            }
        }
    }
    // With a projection: dh from u0 to u1 of the first rows, for the product with W_hr^T and for the gradient of W_hr.
    void outputs(const Share& s, int64_t t, int64_t rows, int64_t known, int64_t running, int64_t u0, int64_t u1,
                 const Sums<C>& sums) const {
        for (int64_t j = 0; j < rows; j++) {
            int64_t b = s.sequence(j), n = j < running ? tokens.offset[t] + b : -1;
            for (int64_t u = u0; u < u1; u += VL<C>) {
                int lanes = std::min<int64_t>(VL<C>, u1 - u);
                V back = j < known ? sums.at(j, 0, u - u0, lanes) : optional(of.dhn, (s.d * tokens.B + b) * of.P + u, lanes);
                V dh = arrived(s, b, n, u, lanes, back);
                if (n < 0) continue;
                store(carried.inner_row(s, j) + u, dh, lanes);
                store(of.dh + (n * of.D + s.d) * of.P + u, dh, lanes);
            }
        }
    }
    void fetch_units(const Share& s, int64_t t, int64_t n, int64_t u, int64_t units) const {
        for (int64_t j = 0; j < n; j++) {
            int64_t place = ((tokens.offset[t] + s.sequence(j)) * of.D + s.d) * of.H;
            if (of.dy && !carried.W) fetch(of.dy + place + u, 1, 0, units);
            if (KEPT) fetch(of.gates + place * KEPT + u, KEPT, of.H, units);
            if (Cell::HAS_CELL) fetch(of.cells + place + u, 1, 0, units);
            else fetch(of.y + place + u, 1, 0, units);
            fetch<true>(of.da + place * G + u, G, of.H, units);
        }
    }
    // All steps of a share, from the last to the first, and one more for h0, by one of its team.
    void steps(const Share& s, Team& team, int64_t member) const {
        using Weights = Panels<step_micro<T>>;
        constexpr int NR = Weights::NR;
        const int64_t blocks = w.hh[s.d].blocks(), members = team.members();
        const int64_t wide = s.count < Weights::FEW ? std::min<int64_t>(Weights::TOGETHER, ceil_div(blocks, members)) : 1;
        C* sums = scratch<C, 0>(s.count * wide * NR);
        for (int64_t p = 0, known = 0; p <= tokens.T; p++) {
            int64_t t = p < tokens.T ? tokens.step(s.d == 1, p) : 0, running = p < tokens.T ? s.running(tokens.size[t]) : 0;
            int64_t rows = std::max(known, running);
            team.go(member, p, [&](int64_t piece) {
                for (int64_t b = blocks * piece / members, end = blocks * (piece + 1) / members; b < end; b += wide) {
                    int64_t count = std::min(wide, end - b), u = b * NR;
                    Sums<C> found{sums, count * NR, NR};
                    if (running && !carried.W) fetch_units(s, t, running, u, std::min(count * NR, of.H - u));
                    if (known) w.hh[s.d].multiply(known, carried.row(s, p - 1), carried.K, b, 0, count, sums, count * NR);
                    if (carried.W) outputs(s, t, rows, known, running, u, std::min(of.P, u + count * NR), found);
                    else units(s, t, p, 0, rows, known, running, u, std::min(of.H, u + count * NR), found);
                }
                for (int64_t b = 0, u = 0; b < w.hr[s.d].blocks(); b++, u += NR) {  // of all units at once: a team of one
                    if (running) fetch_units(s, t, running, u, std::min<int64_t>(NR, of.H - u));
                    w.hr[s.d].multiply(running, carried.inner_row(s), carried.W, b, 0, 1, sums, NR);
                    units(s, t, p, 0, rows, known, running, u, std::min(of.H, u + NR), {sums, NR, NR});
                }
            });
            known = running;
        }
    }
};

}  // namespace recurrent
