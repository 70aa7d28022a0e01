// The steps of recurrent.h the other way: dh and, along the state, what flows back, become da, the gradient of what goes into the gates.
#pragma once
#include "recurrent.h"

namespace recurrent {

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
