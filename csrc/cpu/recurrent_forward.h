// The steps of recurrent.h from the first token to the last, or for the other direction from the last to the first.
#pragma once
#include "recurrent.h"

namespace recurrent {

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

}  // namespace recurrent
