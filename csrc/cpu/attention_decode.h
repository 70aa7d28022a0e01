// The forward of attention for a few queries, such as the one of a token that is being written: what it costs is the reading of all keys and
// values, so that is done once, where they lie.
//
//                 s: keys              A unit of work is a part of the keys of one head. All queries that see it are its rows: those of every
//            +---------------+         head that shares these keys. Keys run along the lanes:
//   r: rows  | z[r][s]       |
//            +---------------+         z = rows . keys              16 keys at once, products along their numbers
//                                      w = 2^(z log2(e) - top)      as in attention_forward.h, a row at a time
//                                      sums += w values             a row of values after the other, sums in registers
//
// Each unit leaves its sums, their weight and largest score; those of the parts are then added in order. Where the parts end depends on
// nothing but the place of a key, so a result depends neither on the threads nor on what else is in the call.
#pragma once
#include "attention_forward.h"
#include "gemm_thin.h"

constexpr int64_t PART = 512, SLICE = 128;  // keys of a unit, and of a tile of scores
constexpr int64_t FEW = 8;                  // queries up to which this is faster than tiles of them

template <class T> struct Decoder {
    using C = compute_t<T>;
    static constexpr int64_t STRIDE = 16, LINE = 64;  // keys between two looks ahead; bytes of a line of the cache
    struct Unit {
        int32_t sequence, g, part;
        int64_t row;  // the first of its results
    };
    const Attention<T>& a;
    int64_t group = a.G ? a.H / a.G : 0, width = round_up(std::max<int64_t>(a.E, 1), VL<C>);
    std::vector<Unit> units;
    std::vector<int64_t> starts{0};  // the units of head g of sequence i begin at starts[i G + g]
    std::vector<C> top, total, sums;

    explicit Decoder(const Attention<T>& a) : a(a) {
        int64_t row = 0;
        for (int32_t i = 0; i < int32_t(a.sequences.size()); i++)
            for (int32_t g = 0; g < a.G; g++) {
                auto [first, last] = seen(a.sequences[i]);
                for (int64_t part = first / PART; part < ceil_div(last, PART); part++, row += rows(i))
                    units.push_back({i, g, int32_t(part), row});
                starts.push_back(int64_t(units.size()));
            }
        top.resize(row), total.resize(row), sums.resize(row * width);
    }

    void run() {
        parallel(int64_t(units.size()), [&](int64_t begin, int64_t end) {
            for (int64_t u = begin; u < end; u++) {
                const Unit& unit = units[u];
                share<false>(unit);
                // A value that is not finite has spoiled the sums of queries that do not see it.
                if (a.o.hides() && !finite(&sums[unit.row * width], rows(unit.sequence) * width)) share<true>(unit);
            }
        }, work_of(a) < SERIAL_WORK);
        parallel(int64_t(starts.size()) - 1, [&](int64_t begin, int64_t end) {
            for (int64_t head = begin; head < end; head++) combine(head / a.G, head % a.G);
        }, work_of(a) < SERIAL_WORK);
    }

  private:
    int64_t rows(int64_t sequence) const { return group * a.sequences[sequence].L; }
    std::pair<int64_t, int64_t> seen(const Sequence& q) const { return Scores<T>{a.o, q, 0}.keys(0, q.L); }

    // What a part of the keys adds. CAREFUL: a key adds only to the sums of queries that see it.
    template <bool CAREFUL> void share(const Unit& unit) {
        const Sequence& q = a.sequences[unit.sequence];
        auto [first, last] = seen(q);
        int64_t begin = std::max(first, unit.part * PART), end = std::min(last, (unit.part + 1) * PART), M = rows(unit.sequence);
        Rows<T> keys = a.key.at(q.b, unit.g, q.s), values = a.value.at(q.b, unit.g, q.s);
        T* queries = scratch<T, QUERY_ROWS>(std::max<int64_t>(1, M * a.D));
        for (int64_t r = 0; r < M; r++)
            std::copy_n(a.query.at(q.b, unit.g * group + r / q.L, q.l + r % q.L).p, a.D, queries + r * a.D);
        C *z = scratch<C, SCORES>(M * SLICE), *mine = &sums[unit.row * width];
        std::fill_n(&top[unit.row], M, -INF<C>), std::fill_n(&total[unit.row], M, C(0)), std::fill_n(mine, M * width, C(0));
        for (int64_t s = begin; s < end; s += SLICE) {
            int64_t n = std::min(SLICE, end - s);
            by_rows(M, [&](auto count, int64_t r, int64_t height) {
                products<count>(height, queries + r * a.D, keys, values, s, n, z + r * SLICE);
            });
            for (int64_t r = 0; r < M; r++) {
                const Scores<T> scores{a.o, q, unit.g * group + r / q.L};
                const bool plain = scores.plain(r % q.L, 1, s, n);
                if (!plain) scores.apply_row(z + r * SLICE, r % q.L, s, n);
                weigh(z + r * SLICE, n, C(plain ? a.o.scale * LOG2E : LOG2E), top[unit.row + r], total[unit.row + r], mine + r * width);
                for (int64_t i = 0; CAREFUL && i < n; i++)
                    if (scores.visible(r % q.L, s + i)) add<1>(1, z + r * SLICE + i, values, s + i, 1, mine + r * width);
            }
            for (int64_t i = 0; !CAREFUL && i < n; i += STRIDE) {
                fetch(keys, s + n + i, std::min(s + n + i + STRIDE, q.S));
                by_rows(M, [&](auto count, int64_t r, int64_t height) {
                    add<count>(height, z + r * SLICE + i, values, s + i, std::min(STRIDE, n - i), mine + r * width);
                });
            }
        }
    }

    // Keys that come next are on their way while values are added up, and values while keys are multiplied: the memory never rests.
    void fetch(Rows<T> keys, int64_t first, int64_t last) const {
        for (int64_t s = first; s < last; s++)
            for (int64_t d = 0; d < a.D; d += LINE / int64_t(sizeof(T))) prefetch_l2(keys[s] + d);
    }

    // f(rows of a tile, first row, how many of them there are)
    template <class F> static void by_rows(int64_t M, const F& f) {
        if (M == 1) return f(std::integral_constant<int, 1>{}, 0, 1);
        for (int64_t r = 0; r < M; r += DOT_ROWS) f(std::integral_constant<int, DOT_ROWS>{}, r, std::min<int64_t>(DOT_ROWS, M - r));
    }

    template <int ROWS> void products(int64_t rows, const T* queries, Rows<T> keys, Rows<T> values, int64_t s, int64_t n, C* z) const {
        using Tile = Dot<T, ROWS>;
        for (int64_t i = 0; i < n; i += Tile::DN) {
            int columns = int(std::min<int64_t>(Tile::DN, n - i));
            Tile::tile(int(rows), columns, a.D, queries, a.D, keys[s + i], keys.step, z + i, SLICE, values[s + i], values.step, columns);
        }
    }

    // The scores of a query become weights under the largest so far; the sums are scaled to that.
    void weigh(C* z, int64_t n, C scale, C& top, C& total, C* sums) const {
        vec<C> most = set(-INF<C>), sum{};
        for (int64_t i = 0; i < n; i += VL<C>) {
            vec<C> x = load(z + i) * scale;
            if (n - i < VL<C>) x = Scores<T>::lanes() < C(n - i) ? x : set(-INF<C>);
            store(z + i, x), most = max(most, x);
        }
        C after = std::max(top, largest(most)), under = after == -INF<C> ? C(0) : after;
        C shrink = exp2_or_zero<C>(set(top - under))[0];
        for (int64_t i = 0; i < n; i += VL<C>) {
            vec<C> w = exp2_or_zero<C>(load(z + i) - under);
            store(z + i, w), sum += w;
        }
        top = after, total = total * shrink + ::sum(sum);
        for (int64_t e = 0; shrink != 1 && e < width; e += VL<C>) store(sums + e, load(sums + e) * shrink);
    }

    // sums += w values, of the n keys from s on.
    template <int ROWS> void add(int64_t rows, const C* w, Rows<T> values, int64_t s, int64_t n, C* sums) const {
        values.p += s * values.step;
        int64_t e = 0;
        auto chunk = [&](auto vectors, auto... lanes) {
            for (; a.E - e >= (sizeof...(lanes) ? 1 : vectors * VL<C>); e += vectors * VL<C>)
                add_chunk<ROWS, vectors>(int(rows), w, {values.p + e, values.step}, n, sums + e, lanes...);
        };
        const std::integral_constant<int, 4> four;
        const std::integral_constant<int, 2> two;
        const std::integral_constant<int, 1> one;
        chunk(four), chunk(two), chunk(one), chunk(one, int(a.E - e));
    }
    template <int ROWS, int V, class... Lanes>
    void add_chunk(int rows, const C* w, Rows<T> values, int64_t n, C* sums, Lanes... lanes) const {
        vec<C> acc[ROWS][V];
        const C* weights[ROWS];
        for (int i = 0; i < ROWS; i++) {
            weights[i] = w + std::min(i, rows - 1) * SLICE;
            for (int j = 0; j < V; j++) acc[i][j] = load(sums + std::min(i, rows - 1) * width + j * VL<C>);
        }
        for (int64_t s = 0; s < n; s++) {
            vec<C> v[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) v[j] = load(values[s] + j * VL<C>, lanes...);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < V; j++) acc[i][j] += weights[i][s] * v[j];
        }
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < V; j++) store(sums + i * width + j * VL<C>, acc[i][j]);
    }

    // The results of the queries that see head g of a sequence, from those of its parts.
    void combine(int64_t sequence, int64_t g) const {
        const Sequence& q = a.sequences[sequence];
        const int64_t first = starts[sequence * a.G + g], last = starts[sequence * a.G + g + 1];
        C* whole = scratch<C, SUMS>(width);
        for (int64_t r = 0; r < rows(sequence); r++) {
            C highest = -INF<C>, weight = 0;
            for (int64_t u = first; u < last; u++) highest = std::max(highest, top[units[u].row + r]);
            std::fill_n(whole, width, C(0));
            for (int64_t u = first; u < last; u++) {
                int64_t row = units[u].row + r;
                C factor = top[row] == -INF<C> ? C(0) : std::exp2(top[row] - highest);
                weight += factor * total[row];
                for (int64_t e = 0; e < width; e += VL<C>) store(whole + e, load(whole + e) + load(&sums[row * width + e]) * factor);
            }
            finish_row(a, q, g * group + r / q.L, r % q.L, highest, weight, whole);
        }
    }
};

// Whether the queries of a sequence are so few; which way one goes depends on itself alone.
template <class T> bool is_few(const Attention<T>& a, const Sequence& q) { return !a.o.dropout && q.L <= FEW; }
