// What attention multiplies, and how a product becomes a score: shared by its forward and backward.
//
//              l: queries, along the lanes       A tile of scores holds the keys in rows and the queries in lanes, so that
//            +--------------------------+        what belongs to a query (largest score, sum, lse) is a lane of a vector and
//   s: keys  | z[s][l] = k_s . q_l      |        the softmax runs down the rows without ever combining lanes; and so that
//            +--------------------------+        the tile is, as it lies, an operand of every product that follows.
//
//   Lines    rows of a matrix whose numbers are multiplied one by one: they lie as in memory, no panel is made
//   Panels   the other operand: k, then NR columns. Rows of a matrix serve where they lie, if their width is a multiple of NR
//
// bf16 where the machine multiplies pairs of it: a lane of either operand is two numbers of k. Other half types are widened.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "gemm_bf16.h"
#include "math.h"
#include "op.h"
#include "philox.h"

constexpr int64_t QUERIES = 64, KEYS = 160;  // of a tile, at most; QUERIES is a multiple of NR
constexpr int64_t WIDEST = 256;              // numbers of a head
constexpr double SERIAL_WORK = 1 << 18;      // multiply-adds up to which waking a thread costs more than it saves

enum {  // scratch slots
    QUERY_PANELS, QUERY_ROWS, DY_PANELS, DY_ROWS, KEY_LINES, KEY_PANELS, VALUE_LINES, VALUE_PANELS, WIDE, CLEAN,  // operands
    SCORES, DP, BIAS, BEND, FACTORS, WEIGHTS,                                                                     // tiles
    SUMS, DQUERY, DKEY, DVALUE, MASK_SUMS                                                                         // results
};

template <class T> using Multiplier = std::conditional_t<std::is_same_v<T, bf16> && HAS_PAIR_DOT, PairDot<bf16>, Fma<compute_t<T>>>;

template <class T> struct Rows {  // of one head
    T* p;
    int64_t step;
    T* operator[](int64_t r) const { return p + r * step; }
};
template <class T> struct Heads {  // [B, heads, rows, width], the width contiguous
    T* p;
    int64_t batch, head, row;
    Heads() : p(nullptr), batch(0), head(0), row(0) {}
    explicit Heads(const Tensor& t)
        : p(t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr), batch(p ? t.stride(0) : 0), head(p ? t.stride(1) : 0),
          row(p ? t.stride(2) : 0) {}
    Rows<T> at(int64_t b, int64_t h, int64_t r) const { return {p + b * batch + h * head + r * row, row}; }
};

template <class Lane> struct Lines {
    const Lane* p;
    int64_t step;
};
template <class Lane> struct Panels {  // column tile j of k: p + j * tile + k * step
    const Lane* p;
    int64_t step, tile;
};

template <class T> struct Operand {
    using Micro = Multiplier<T>;
    using Lane = typename Micro::Lane;
    Lines<Lane> lines;
    Panels<Lane> panels;
    std::vector<int64_t> spoiled;  // rows with a NaN or an infinity, which are zero in the panels
};

// ---- operands ------------------------------------------------------------------------------------------------------------------

template <class T> bool finite(const T* p, int64_t width) {
    using C = compute_t<T>;
    vec<C> zero{};
    for (int64_t j = 0; j < width; j += VL<C>) zero += load(p + j, int(std::min<int64_t>(VL<C>, width - j))) * 0;
    return sum(zero) == 0;
}

// to[count][step] = from, widened, with zeros behind `width`
template <class T, class To> void copy_rows(Rows<T> from, int64_t count, int64_t width, To* to, int64_t step) {
    using C = compute_t<T>;
    for (int64_t r = 0; r < count; r++, to += step)
        for (int64_t j = 0; j < step; j += VL<C>) {
            int left = int(std::clamp<int64_t>(width - j, 0, VL<C>));
            store(to + j, left ? load(from[r] + j, left) : vec<C>{}, int(std::min<int64_t>(VL<C>, step - j)));
        }
}

// `count` rows as lines and as panels. Where `clean`, rows that are not finite are left out of the panels and listed.
template <class T, int LINES, int PANELS>
Operand<T> operand(Rows<T> from, int64_t count, int64_t width, bool lines, bool panels, bool clean) {
    using Micro = Multiplier<T>;
    using Lane = typename Micro::Lane;
    using E = typename Micro::Element;
    constexpr int64_t PAIR = sizeof(Lane) / sizeof(E), NR = Micro::NR, ALIASED = 2048;
    Operand<T> made{};
    if (clean)
        for (int64_t r = 0; r < count; r++)
            if (!finite(from[r], width)) made.spoiled.push_back(r);
    bool apart = from.step * int64_t(sizeof(T)) % ALIASED != 0 || count == 1;  // else rows compete for the same lines of the cache
    bool here = std::is_same_v<T, E> && apart && width % PAIR == 0 && from.step % PAIR == 0 && uintptr_t(from.p) % sizeof(Lane) == 0;
    int64_t step = round_up(std::max<int64_t>(width, 1), NR);
    bool as_panels = PAIR == 1 && made.spoiled.empty() && panels;  // the lines are the panels
    if (lines || as_panels) {
        if (here && !(as_panels && width % NR)) {
            made.lines = {reinterpret_cast<const Lane*>(from.p), from.step / PAIR};
        } else {
            E* copy = scratch<E, LINES>(count * (step + 2 * VL<E>));
            copy_rows(from, count, width, copy, step += 2 * VL<E>);
            made.lines = {reinterpret_cast<const Lane*>(copy), step / PAIR};
        }
    }
    if (as_panels) made.panels = {made.lines.p, made.lines.step, NR};
    if (!panels || as_panels) return made;
    E* to = scratch<E, PANELS>(round_up(std::max<int64_t>(width, 1), NR) * round_up(count, 2));
    Rows<T> source = from;
    if (!made.spoiled.empty()) {
        source = {scratch<T, CLEAN>(count * width), width};
        copy_rows(from, count, width, source.p, width);
        for (int64_t r : made.spoiled) std::fill_n(source[r], width, T{});
    }
    if constexpr (PAIR == 1) {
        copy_rows(source, count, width, to, round_up(width, NR));
        made.panels = {to, round_up(width, NR), NR};
    } else {
        made.panels = {reinterpret_cast<const Lane*>(to), NR, Micro::panel(NR, count) / PAIR};
        for (int64_t j = 0; j < width; j += NR)
            Micro::pack_b({source.p + j, 1, source.step}, int(std::min(NR, width - j)), int(count), to + j / NR * Micro::panel(NR, count));
    }
    return made;
}

// Panels along the width, one column per row: what lines are multiplied with.
template <class T, int SLOT> Panels<typename Multiplier<T>::Lane> transposed(Rows<T> from, int64_t count, int64_t width) {
    using Micro = Multiplier<T>;
    using E = typename Micro::Element;
    using Lane = typename Micro::Lane;
    int64_t panel = Micro::panel(Micro::NR, width);
    E* to = scratch<E, SLOT>(std::max<int64_t>(1, panel * ceil_div(count, Micro::NR)));
    Rows<const E> source;
    if constexpr (std::is_same_v<T, E>) source = {from.p, from.step};
    else {
        E* wide = scratch<E, WIDE>(std::max<int64_t>(1, count * width));
        copy_rows(from, count, width, wide, width);
        source = {wide, width};
    }
    for (int64_t r = 0; r < count; r += Micro::NR)
        Micro::pack_b({source[r], source.step, 1}, int(std::min<int64_t>(Micro::NR, count - r)), int(width), to + r / Micro::NR * panel);
    return {reinterpret_cast<const Lane*>(to), Micro::NR, panel * int64_t(sizeof(E)) / int64_t(sizeof(Lane))};
}

// ---- products: c[m][n] (+)= sum over `depth` k; whole vectors are written --------------------------------------------------

template <class Micro, class A>
void multiply(int64_t rows, int64_t columns, int64_t depth, const A& a, Panels<typename Micro::Lane> b, typename Micro::Sum* c, int64_t ldc,
              bool add) {
    using Lane = typename Micro::Lane;
    using E = typename Micro::Element;
    int64_t tiles = ceil_div(rows, Micro::MR);  // of equal height
    for (int64_t t = 0; t < tiles; t++) {
        int64_t r = rows * t / tiles, height = rows * (t + 1) / tiles - r;
        auto lines = a(r);
        auto next = reinterpret_cast<const E*>(a(r + height).p);
        for (int64_t j = 0; j * Micro::NR < columns; j++) {
            Spaced<Lane> panel{b.p + j * b.tile, b.step};
            auto tile = [&](auto micro) {
                decltype(micro)::tile_at(int(height), int(depth), lines, panel, c + r * ldc + j * Micro::NR, ldc, add, next);
            };
            if (columns - j * Micro::NR <= Micro::NR / NV) tile(typename one_vector<Micro>::type{});
            else tile(Micro{});
        }
    }
}
// A number of a pair.
inline float number(uint32_t pair, int64_t upper) { return bits_as<float>(upper ? pair & 0xffff0000u : pair << 16); }
inline float number(float x, int64_t) { return x; }
inline double number(double x, int64_t) { return x; }

template <class Lane> auto from_line(Lines<Lane> lines, int64_t first) {  // rows of A are lines
    return [=](int64_t r) { return Strided<Lane>{lines.p + (first + r) * lines.step, lines.step}; };
}
template <class Lane> auto from_column(const Lane* p, int64_t step) {  // rows of A are columns of a tile
    return [=](int64_t r) { return Spaced<Lane>{p + r, step}; };
}
