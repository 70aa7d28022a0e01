// The forward of attention: a block of queries meets all keys that it sees, a tile of them at a time.
//
//   z = keys x queries       tile by tile in registers; z, KEYS x QUERIES numbers, stays in the L2 cache
//   top = largest score      of every query, so far; what was summed under an older one is scaled down
//   w = 2^(z log2(e) - top)  in place, or as pairs of bf16; their sums are added up
//   y += w^T values
//
// Keys and values are read where they lie, or packed once per head and thread.
#pragma once
#include "attention_score.h"

template <class T> struct Attention {  // the arguments of a call
    Options o;
    std::vector<Sequence> sequences;
    int64_t H, G, D, E;
    Heads<T> query, key, value, y;
    compute_t<T>* lse;
    int64_t lse_batch, lse_head;
};

// y and lse of a query, from its weighted sum of the values, whose weights have the sum `total` and are powers of 2 under `top`.
template <class T, class C> void finish_row(const Attention<T>& a, const Sequence& q, int64_t h, int64_t l, C top, C total, const C* sums) {
    T* y = a.y.at(q.b, h, q.l + l).p;
    C inverse = total == 0 ? C(0) : 1 / total;
    for (int64_t e = 0; e < a.E; e += VL<C>) store(y + e, load(sums + e) * inverse, int(std::min<int64_t>(VL<C>, a.E - e)));
    a.lse[q.b * a.lse_batch + h * a.lse_head + q.l + l] = total == 0 ? -INF<C> : C(top * LN2) + std::log(total);
}

template <class T> struct ForwardHead {  // keys and values of one head of a sequence, as the products want them
    using C = compute_t<T>;
    using Micro = Multiplier<T>;
    using Lane = typename Micro::Lane;
    static constexpr int64_t LD = Scores<T>::LD, PAIR = sizeof(Lane) / sizeof(typename Micro::Element);
    const Attention<T>& a;
    Sequence q;
    int64_t g;
    Operand<T> keys, values;
    Rows<T> value_rows;

    ForwardHead(const Attention<T>& a, const Sequence& q, int64_t g)
        : a(a), q(q), g(g), keys(operand<T, KEY_LINES, KEY_PANELS>(a.key.at(q.b, g, q.s), q.S, a.D, true, false, false)),
          values(operand<T, VALUE_LINES, VALUE_PANELS>(a.value.at(q.b, g, q.s), q.S, a.E, false, true, a.o.hides())),
          value_rows(a.value.at(q.b, g, q.s)) {}

    // Queries l .. l + rows of head h.
    void block(int64_t h, int64_t l, int64_t rows) const {
        const Scores<T> scores{a.o, q, h};
        auto queries = transposed<T, QUERY_PANELS>(a.query.at(q.b, h, q.l + l), rows, a.D);
        int64_t ld = round_up(std::max<int64_t>(a.E, 1), Micro::NR);
        C *z = scratch<C, SCORES>(KEYS * LD), *sums = scratch<C, SUMS>(QUERIES * ld);
        auto weights = PAIR == 1 ? reinterpret_cast<Lane*>(z) : scratch<Lane, WEIGHTS>(KEYS / 2 * LD);
        alignas(64) C top[QUERIES], total[QUERIES] = {}, shrink[QUERIES];
        std::fill_n(top, QUERIES, -INF<C>), std::fill_n(sums, rows * ld, C(0));
        auto [first, last] = scores.keys(l, rows);
        int64_t tiles = ceil_div(last - first, KEYS), step = tiles ? round_up(ceil_div(last - first, tiles), 2) : 1;
        for (int64_t s = first; s < last; s += step) {
            int64_t n = std::min(step, last - s);
            multiply<Micro>(n, rows, a.D, from_line(keys.lines, s), queries, z, LD, false);
            const bool plain = scores.plain(l, rows, s, n);
            if (!plain) scores.apply(z, nullptr, l, rows, s, n);
            const C scale = C(plain ? a.o.scale * LOG2E : LOG2E);
            const C* factors = a.o.dropout ? scores.dropped(l, s, n) : nullptr;
            for (int64_t j = 0; j < rows; j += Micro::NR)
                weigh(z + j, weights + j, factors ? factors + j : nullptr, n, scale, top + j, total + j, shrink + j);
            for (int64_t r = 0; r < rows; r++)
                if (shrink[r] != 1)
                    for (int64_t e = 0; e < ld; e += VL<C>) store(sums + r * ld + e, load(sums + r * ld + e) * shrink[r]);
            Panels<Lane> panels{values.panels.p + s / PAIR * values.panels.step, values.panels.step, values.panels.tile};
            multiply<Micro>(rows, a.E, n, from_column(weights, LD), panels, sums, ld, true);
            for (int64_t r : values.spoiled)
                if (r >= s && r < s + n) add_spoiled(scores, weights, sums, ld, l, rows, s, r);
        }
        finish(h, l, rows, top, total, sums, ld);
    }

  private:
    // NR queries: scores become weights under the largest score so far; `shrink` is what the sums under the one before are worth.
    static void weigh(C* z, Lane* weights, const C* factors, int64_t n, C scale, C* top, C* total, C* shrink) {
        vec<C> under[NV], sum[NV];
        for (int j = 0; j < NV; j++) sum[j] = vec<C>{}, under[j] = set(-INF<C>);
        for (int64_t i = 0; i < n; i++)
            for (int j = 0; j < NV; j++) under[j] = max(under[j], load(z + i * LD + j * VL<C>) * scale);
        for (int j = 0; j < NV; j++) {
            vec<C> before = load(top + j * VL<C>), after = max(before, under[j]);
            under[j] = after == -INF<C> ? vec<C>{} : after;  // a query that has seen no key yet
            store(top + j * VL<C>, after), store(shrink + j * VL<C>, exp2_or_zero<C>(before - under[j]));
        }
        auto weight = [&](int64_t i, int j) INLINE {
            int64_t at = i * LD + j * VL<C>;
            vec<C> w = exp2_or_zero<C>(load(z + at) * scale - under[j]);
            sum[j] += w;
            return factors ? w * load(factors + at) : w;
        };
        if constexpr (PAIR == 1)
            for (int64_t i = 0; i < n; i++)
                for (int j = 0; j < NV; j++) store(z + i * LD + j * VL<C>, weight(i, j));
        else
            for (int64_t i = 0; i < n; i += 2, weights += LD)
                for (int j = 0; j < NV; j++) {
                    vec<C> low = weight(i, j), high = i + 1 < n ? weight(i + 1, j) : vec<C>{};
                    store_raw(weights + j * VL<C>, pair_up(low, high));
                }
        for (int j = 0; j < NV; j++) store(total + j * VL<C>, load(total + j * VL<C>) * load(shrink + j * VL<C>) + sum[j]);
    }

    // A value that is not finite reaches those queries that see it.
    void add_spoiled(const Scores<T>& scores, const Lane* weights, C* sums, int64_t ld, int64_t l, int64_t rows, int64_t s,
                     int64_t r) const {
        for (int64_t i = 0; i < rows; i++) {
            if (!scores.visible(l + i, r)) continue;
            C weight = number(weights[(r - s) / PAIR * LD + i], (r - s) % PAIR);
            for (int64_t e = 0; e < a.E; e++) sums[i * ld + e] += weight * load(value_rows[r] + e, 1)[0];
        }
    }

    void finish(int64_t h, int64_t l, int64_t rows, const C* top, const C* total, const C* sums, int64_t ld) const {
        for (int64_t r = 0; r < rows; r++) finish_row(a, q, h, l + r, top[r], total[r], sums + r * ld);
    }
};

struct Unit {  // of the work: a block of queries
    int32_t sequence, h, block;
};

// Blocks of one head follow one another, large and small ones by turns: where only earlier keys are seen, later queries have more to do.
template <class T> std::vector<Unit> units_of(const Attention<T>& a) {
    std::vector<Unit> units;
    for (int32_t i = 0; i < int32_t(a.sequences.size()); i++)
        for (int32_t h = 0; h < a.H; h++)
            for (int32_t n = int32_t(ceil_div(a.sequences[i].L, QUERIES)), k = 0; k < n; k++)
                units.push_back({i, h, k % 2 ? n - 1 - k / 2 : k / 2});
    return units;
}

template <class T> double work_of(const Attention<T>& a) {  // multiply-adds
    double work = 0;
    for (const Sequence& q : a.sequences) work += double(a.H) * q.L * q.S * (a.D + a.E);
    return work;
}

template <class T> void attention_forward(const Attention<T>& a) {
    std::vector<Unit> units = units_of(a);
    parallel(int64_t(units.size()), [&](int64_t begin, int64_t end) {
        std::optional<ForwardHead<T>> head;
        int32_t sequence = -1;
        for (int64_t u = begin; u < end; u++) {
            const Sequence& q = a.sequences[units[u].sequence];
            int64_t g = units[u].h * a.G / a.H, l = units[u].block * QUERIES;
            if (!head || sequence != units[u].sequence || head->g != g) head.emplace(a, q, g), sequence = units[u].sequence;
            head->block(units[u].h, l, std::min(QUERIES, q.L - l));
        }
    }, work_of(a) < SERIAL_WORK);
}
