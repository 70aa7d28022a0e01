// The backward of attention: weights are formed again from the scores and lse, tile by tile, and each tile is used by all five products.
//
//   z  = keys x queries       w  = exp(z - lse)             dvalue += (f w) dy       rows of a tile are lines of A, k runs over queries
//   dp = values x dy          dz = w (f dp - delta) scale   dkey   += dz queries     likewise
//                                                           dquery += dz^T keys      columns of the tile are rows of A, k runs over keys
//
// A unit of work is a part of the keys of one head: it owns their dkey and dvalue, and walks over the queries of all heads that share them.
// dquery is finished at once where the unit has all keys. Where there are few heads the keys are cut into parts, as many as the sizes alone
// say, and the parts' shares of dquery are added in order.
#pragma once
#include "attention_forward.h"

template <class T> struct Gradients {
    Heads<T> dy, dquery{}, dkey{}, dvalue{};  // null where not needed
    compute_t<T>* shares = nullptr;     // [parts][B][H][L][D] of dquery, where there are several
    int64_t parts = 1, B = 0, L = 0;
    bool dmask = false;  // dz is for the mask, and for nothing else
};

// The gradient of a mask for one block of queries: [keys or 1][QUERIES], of which the first counts where all queries have one mask.
template <class C> struct MaskSums {
    C* p;
    bool each_query, each_key;
    void add(const C* dz, int64_t ld, int64_t rows, int64_t s, int64_t n) const {
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < rows; j += VL<C>) {
                C* to = p + (each_key ? s + i : 0) * QUERIES + (each_query ? j : 0);
                if (each_query) store(to, load(to) + load(dz + i * ld + j));
                else *to += sum(load(dz + i * ld + j));
            }
    }
};

template <class T> struct BackwardHead {
    using C = compute_t<T>;
    using Micro = Multiplier<T>;
    using Lane = typename Micro::Lane;
    static constexpr int64_t LD = Scores<T>::LD, PAIR = sizeof(Lane) / sizeof(typename Micro::Element), NR = Micro::NR;
    static constexpr int64_t HALF_LD = QUERIES + 2 * VL<C>;  // of a tile of bf16
    const Attention<T>& a;
    const Gradients<T>& d;
    Sequence q;
    int64_t g, part, first, last;  // keys
    bool need_dz = d.dquery.p || d.dkey.p || d.dmask;
    int64_t width = round_up(std::max<int64_t>(a.D, 1), NR), value_width = round_up(std::max<int64_t>(a.E, 1), NR);
    Operand<T> keys, values;
    Rows<T> key_rows;
    C *dkey, *dvalue, *dquery;

    BackwardHead(const Attention<T>& a, const Gradients<T>& d, const Sequence& q, int64_t g, int64_t part)
        : a(a), d(d), q(q), g(g), part(part), first(round_up(q.S * part / d.parts, 2)),
          last(part + 1 == d.parts ? q.S : round_up(q.S * (part + 1) / d.parts, 2)),
          keys(operand<T, KEY_LINES, KEY_PANELS>(a.key.at(q.b, g, q.s), q.S, a.D, true, d.dquery.p, a.o.hides())),
          values(operand<T, VALUE_LINES, VALUE_PANELS>(a.value.at(q.b, g, q.s), q.S, a.E, need_dz, false, false)),
          key_rows(a.key.at(q.b, g, q.s)), dkey(scratch<C, DKEY>((last - first) * width)),
          dvalue(scratch<C, DVALUE>((last - first) * value_width)), dquery(scratch<C, DQUERY>(QUERIES * width)) {}

    void run() const {
        if (d.dkey.p) std::fill_n(dkey, (last - first) * width, C(0));
        if (d.dvalue.p) std::fill_n(dvalue, (last - first) * value_width, C(0));
        for (int64_t h = g * (a.H / a.G); h < (g + 1) * (a.H / a.G); h++)
            for (int64_t l = 0; l < q.L; l += QUERIES) block(h, l, std::min(QUERIES, q.L - l));
        if (d.dkey.p) put(dkey, width, last - first, a.D, d.dkey.at(q.b, g, q.s + first));
        if (d.dvalue.p) put(dvalue, value_width, last - first, a.E, d.dvalue.at(q.b, g, q.s + first));
    }

  private:
    static void put(const C* from, int64_t ld, int64_t rows, int64_t width, Rows<T> to) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < width; j += VL<C>)
                store(to[r] + j, load(from + r * ld + j), int(std::min<int64_t>(VL<C>, width - j)));
    }
    static Panels<Lane> from_row(Panels<Lane> p, int64_t k) { return {p.p + k / PAIR * p.step, p.step, p.tile}; }

    struct Tiles {  // what the products read: f w and dz as lines (k along queries), and dz as columns (k along keys)
        C *z, *dp, *bend;
        Lane *weights, *lines, *columns;
    };

  public:
    // Queries l .. l + rows of head h, and the keys of this part that they see.
    void block(int64_t h, int64_t l, int64_t rows, const MaskSums<C>* mask = nullptr) const {
        const Scores<T> scores{a.o, q, h};
        auto [low, high] = scores.keys(l, rows);
        int64_t begin = std::max(low, first), end = std::min(high, last);
        Rows<T> query = a.query.at(q.b, h, q.l + l), dy = d.dy.at(q.b, h, q.l + l);
        if (begin < end) {
            alignas(64) C lse[QUERIES], delta[QUERIES] = {};
            statistics(h, l, rows, dy, lse, delta);
            auto queries = transposed<T, QUERY_PANELS>(query, rows, a.D);
            auto dys = need_dz ? transposed<T, DY_PANELS>(dy, rows, a.E) : Panels<Lane>{};
            auto query_rows = d.dkey.p ? operand<T, QUERY_ROWS, QUERY_ROWS>(query, rows, a.D, false, true, false) : Operand<T>{};
            auto dy_rows = d.dvalue.p ? operand<T, DY_ROWS, DY_ROWS>(dy, rows, a.E, false, true, false) : Operand<T>{};
            Tiles t = tiles();
            int64_t count = ceil_div(end - begin, KEYS), step = round_up(ceil_div(end - begin, count), 2);
            for (int64_t s = begin; s < end; s += step) {
                int64_t n = std::min(step, end - s);
                multiply<Micro>(n, rows, a.D, from_line(keys.lines, s), queries, t.z, LD, false);
                if (need_dz) multiply<Micro>(n, rows, a.E, from_line(values.lines, s), dys, t.dp, LD, false);
                bool plain = scores.plain(l, rows, s, n);
                if (!plain) scores.apply(t.z, bent() ? t.bend : nullptr, l, rows, s, n);
                const C* factors = a.o.dropout ? scores.dropped(l, s, n) : nullptr;
                for (int64_t j = 0; j < rows; j += NR) differentiate(t, j, factors, n, plain, lse, delta);
                if constexpr (PAIR > 1)
                    for (int64_t i = 0; i < n && rows % 2; i++)  // the other half of the last pair is no query, and 0 NaN no number
                        for (Lane* p : {t.weights, t.lines}) reinterpret_cast<bf16*>(p)[i * HALF_LD + rows] = bf16{};
                if (mask) add_to(*mask, t.dp, rows, s, n);
                auto lines = [&](Lane* p) { return from_line(Lines<Lane>{p, (PAIR == 1 ? LD : HALF_LD) / PAIR}, 0); };
                if (d.dvalue.p)
                    multiply<Micro>(n, a.E, rows, lines(t.weights), dy_rows.panels, dvalue + (s - first) * value_width, value_width, true);
                if (d.dkey.p) multiply<Micro>(n, a.D, rows, lines(t.lines), query_rows.panels, dkey + (s - first) * width, width, true);
                if (d.dquery.p) add_dquery(scores, t, s == begin, l, rows, s, n);
            }
        } else if (d.dquery.p) {
            std::fill_n(dquery, rows * width, C(0));
        }
        if (!d.dquery.p) return;
        if (d.parts == 1) return put(dquery, width, rows, a.D, d.dquery.at(q.b, h, q.l + l));
        C* share = d.shares + (((part * d.B + q.b) * a.H + h) * d.L + q.l + l) * a.D;
        for (int64_t r = 0; r < rows; r++) std::copy_n(dquery + r * width, a.D, share + r * a.D);
    }

  private:
    bool bent() const { return a.o.function.code != PLAIN && !d.dmask; }
    Tiles tiles() const {
        C *z = scratch<C, SCORES>(KEYS * LD), *dp = scratch<C, DP>(KEYS * LD), *bend = scratch<C, BEND>(KEYS * LD);
        if constexpr (PAIR == 1) return {z, dp, bend, z, dp, dp};
        Lane* half = scratch<Lane, WEIGHTS>(KEYS * HALF_LD + KEYS / 2 * LD);
        return {z, dp, bend, half, half + KEYS * HALF_LD / 2, half + KEYS * HALF_LD};
    }

    // lse of every query, as a power of 2, and delta. It is infinite where there is no query, so that weights are 0 there.
    void statistics(int64_t h, int64_t l, int64_t rows, Rows<T> dy, C* lse, C* delta) const {
        std::fill_n(lse, QUERIES, INF<C>);
        Rows<T> y = a.y.at(q.b, h, q.l + l);
        for (int64_t r = 0; r < rows; r++) {
            C found = a.lse[q.b * a.lse_batch + h * a.lse_head + q.l + l + r];
            lse[r] = found == -INF<C> ? INF<C> : C(found * LOG2E);
            vec<C> total{};
            for (int64_t e = 0; e < a.E; e += VL<C>) {
                int lanes = int(std::min<int64_t>(VL<C>, a.E - e));
                total += load(dy[r] + e, lanes) * load(y[r] + e, lanes);
            }
            delta[r] = sum(total);
        }
    }

    // NR queries from j on: scores to weights, and dp to dz. A weight that is hidden is 0 also where lse is NaN.
    void differentiate(const Tiles& t, int64_t j, const C* factors, int64_t n, bool plain, const C* lse, const C* delta) const {
        const C scale = C(plain ? a.o.scale * LOG2E : LOG2E), hidden = plain ? std::numeric_limits<C>::quiet_NaN() : -INF<C>;
        const bool bent = this->bent();
        const C to_product = d.dmask ? C(1) : C(a.o.scale);
        for (int64_t c = j; c < j + NR; c += VL<C>) {
            const vec<C> under = load(lse + c), mean = load(delta + c);
            vec<C> before{};
            for (int64_t i = 0; i < n; i++) {
                int64_t at = i * LD + c;
                vec<C> z = load(t.z + at), dp = load(t.dp + at);
                vec<C> w = z == hidden ? vec<C>{} : exp2_or_zero<C>(z * scale - under), kept = w;
                if (factors) kept = w * load(factors + at), dp *= load(factors + at);
                vec<C> dz = w * (dp - mean);
                if (bent) dz *= load(t.bend + at);
                dz = w == 0 ? vec<C>{} : dz * to_product;
                if constexpr (PAIR == 1) store(t.weights + at, kept), store(t.lines + at, dz);
                else {
                    store_raw(reinterpret_cast<bf16*>(t.weights) + i * HALF_LD + c, narrow(kept, bf16{}, true));
                    store_raw(reinterpret_cast<bf16*>(t.lines) + i * HALF_LD + c, narrow(dz, bf16{}, true));
                    if (i % 2) store_raw(t.columns + i / 2 * LD + c, pair_up(before, dz));
                    else if (i + 1 == n) store_raw(t.columns + i / 2 * LD + c, pair_up(dz, vec<C>{}));
                    if (d.dmask) store(t.dp + at, dz);
                    before = dz;
                }
            }
        }
    }

    // The lanes behind the last query may hold NaN.
    void add_to(const MaskSums<C>& mask, C* dz, int64_t rows, int64_t s, int64_t n) const {
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = rows; j < round_up(rows, VL<C>); j++) dz[i * LD + j] = 0;
        mask.add(dz, LD, rows, s, n);
    }

    void add_dquery(const Scores<T>& scores, const Tiles& t, bool begins, int64_t l, int64_t rows, int64_t s, int64_t n) const {
        multiply<Micro>(rows, a.D, n, from_column(t.columns, LD), from_row(keys.panels, s), dquery, width, !begins);
        for (int64_t r : keys.spoiled)  // a key that is not finite reaches those queries that see it
            for (int64_t i = 0; i < rows && r >= s && r < s + n; i++)
                if (scores.visible(l + i, r)) {
                    C dz = number(t.columns[(r - s) / PAIR * LD + i], (r - s) % PAIR);
                    for (int64_t e = 0; e < a.D; e++) dquery[i * width + e] += dz * load(key_rows[r] + e, 1)[0];
                }
    }
};

// Into how many parts the keys of a head are cut: the sizes say it, so that sums are the same on any number of threads.
inline int64_t parts_of(int64_t heads, int64_t queries, int64_t S, int64_t numbers) {
    constexpr int64_t UNITS = 8, FEWEST_KEYS = 512, MOST = 4 << 20;  // MOST: numbers of all shares of dquery
    int64_t parts = std::min(ceil_div(UNITS, std::max<int64_t>(heads, 1)), S / FEWEST_KEYS);
    return std::clamp<int64_t>(parts, 1, std::max<int64_t>(1, MOST / std::max<int64_t>(1, heads * queries * numbers)));
}

template <class T> void attention_backward(const Attention<T>& a, const Gradients<T>& d) {
    int64_t units = int64_t(a.sequences.size()) * a.G * d.parts;
    parallel(units, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; u++)
            BackwardHead<T>(a, d, a.sequences[u / d.parts / a.G], u / d.parts % a.G, u % d.parts).run();
    }, work_of(a) < SERIAL_WORK);
    if (d.parts == 1) return;
    using C = compute_t<T>;
    int64_t rows = d.B * a.H * d.L;
    parallel(rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            for (int64_t j = 0; j < a.D; j += VL<C>) {
                int lanes = int(std::min<int64_t>(VL<C>, a.D - j));
                vec<C> total{};
                for (int64_t part = 0; part < d.parts; part++) total += load(d.shares + (part * rows + r) * a.D + j, lanes);
                store(d.dquery.at(r / (a.H * d.L), r / d.L % a.H, r % d.L).p + j, total, lanes);
            }
    });
}

// dmask, of the mask's own sizes. A unit is a block of queries, or all of them where they have one mask, for all heads that share it.
template <class T, class M> void mask_gradient(const Attention<T>& a, const Heads<T>& dy, M* dmask) {
    using C = compute_t<T>;
    const int64_t(&size)[4] = a.o.mask.sizes;
    bool each_query = size[2] > 1, each_key = size[3] > 1;
    int64_t S = a.sequences[0].S, L = a.sequences[0].L, B = int64_t(a.sequences.size()), blocks = each_query ? ceil_div(L, QUERIES) : 1;
    Gradients<T> d{dy};
    d.dmask = true;
    parallel(size[0] * size[1] * blocks, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; u++) {
            int64_t mb = u / blocks / size[1], mh = u / blocks % size[1], first = u % blocks * QUERIES;
            MaskSums<C> sums{scratch<C, MASK_SUMS>((each_key ? S : 1) * QUERIES), each_query, each_key};
            std::fill_n(sums.p, (each_key ? S : 1) * QUERIES, C(0));
            for (int64_t b = size[0] > 1 ? mb : 0; b < (size[0] > 1 ? mb + 1 : B); b++)
                for (int64_t h = size[1] > 1 ? mh : 0; h < (size[1] > 1 ? mh + 1 : a.H); h++) {
                    BackwardHead<T> head(a, d, a.sequences[b], h * a.G / a.H, 0);
                    for (int64_t l = first; l < (each_query ? std::min(L, first + 1) : L); l += QUERIES)
                        head.block(h, l, std::min(QUERIES, L - l), &sums);
                }
            M* to = dmask + (mb * size[1] + mh) * size[2] * size[3];
            for (int64_t l = each_query ? first : 0; l < (each_query ? std::min(L, first + QUERIES) : size[2]); l++)
                for (int64_t s = 0; s < size[3]; s++) store(to + l * size[3] + s, vec<C>{} + sums.p[s * QUERIES + l - first], 1);
        }
    });
}
