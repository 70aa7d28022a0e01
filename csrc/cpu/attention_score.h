// From products to scores: scale, score function, mask, slopes, window; and which keys a query sees at all.
//
// Whatever changes a score is applied to a tile of them. Most tiles need nothing but the scale: no mask, and all in the window.
#pragma once
#include "attention.h"
#include "score_functions.h"

struct Sequence {  // queries l .. l + L and keys s .. s + S of batch b belong together
    int64_t b, l, L, s, S;
};

enum class MaskKind { NONE, BOOLEAN, LIKE_QUERY, FLOAT };
struct Mask {
    MaskKind kind = MaskKind::NONE;
    const void* p = nullptr;
    int64_t sizes[4] = {}, strides[4] = {};  // the stride is 0 where the size is 1
    int64_t offset(int64_t b, int64_t h) const { return b * strides[0] + h * strides[1]; }
};

template <class C> constexpr C INF = std::numeric_limits<C>::infinity();

// Weights are powers of 2: log2(e) goes into the scale, and costs nothing there.
constexpr double LOG2E = 1.44269504088896340736, LN2 = 0.693147180559945309417;

struct Options {  // of a call
    double p, scale;
    ScoreFunction function;
    int64_t left, right;  // of the window; below 0 there is no limit
    bool lower_right;
    int64_t H, S;  // heads, and keys of the whole tensor: a row of random numbers is (b H + h) S + s
    Mask mask;
    const void* slopes = nullptr;
    int64_t slopes_batch = 0;
    std::optional<Dropout> dropout;
    bool hides() const { return mask.kind != MaskKind::NONE || left >= 0 || right >= 0; }
};

// The scores of one head and sequence.
template <class T> struct Scores {
    using C = compute_t<T>;
    static constexpr int64_t LD = QUERIES + VL<C>;  // rows a power of two apart would compete for the same lines of the cache
    const Options& o;
    Sequence q;
    int64_t h;

    static vec<C> lanes() {
        vec<C> lane;
        for (int i = 0; i < VL<C>; i++) lane[i] = C(i);
        return lane;
    }
    int64_t offset() const { return o.lower_right ? q.S - q.L : 0; }
    // The keys that one of the queries [l, l + rows) may see: [first, last), first even.
    std::pair<int64_t, int64_t> keys(int64_t l, int64_t rows) const {
        int64_t first = o.left < 0 ? 0 : std::clamp<int64_t>(l + offset() - o.left, 0, q.S);
        int64_t last = o.right < 0 ? q.S : std::clamp<int64_t>(l + rows + offset() + o.right, 0, q.S);
        return {first / 2 * 2, std::max(first / 2 * 2, last)};
    }
    // Whether the window leaves all scores of a tile.
    bool inside(int64_t l, int64_t rows, int64_t s, int64_t n) const {
        return (o.right < 0 || s + n - 1 <= l + offset() + o.right) && (o.left < 0 || s >= l + rows - 1 + offset() - o.left);
    }
    bool plain(int64_t l, int64_t rows, int64_t s, int64_t n) const {
        return inside(l, rows, s, n) && o.mask.kind == MaskKind::NONE && !o.slopes && o.function.code == PLAIN;
    }
    bool visible(int64_t l, int64_t s) const {
        int64_t behind = l + offset() - s;
        bool seen = (o.left < 0 || behind <= o.left) && (o.right < 0 || -behind <= o.right);
        if (seen) with_mask([&](auto m) { seen = m(l, s) != -INF<C>; });
        return seen;
    }

    // z, `n` rows of keys from s on, becomes scores; `bend` takes the derivative of the score function where it is wanted.
    void apply(C* z, C* bend, int64_t l, int64_t rows, int64_t s, int64_t n) const {
        C* bias = scratch<C, BIAS>(KEYS * LD);
        if (o.mask.kind != MaskKind::NONE) with_mask([&](auto m) { fill(m, bias, l, rows, s, n); });
        const vec<C> lane = lanes();
        o.function.with<C>([&](auto function) INLINE {
            const Change change(*this, function);
            for (int64_t i = 0; i < n; i++, z += LD, bias += LD) {
                C at = C(s + i - offset() - l);  // the query, counted from l, that lies at key s + i
                for (int64_t j = 0; j < QUERIES; j += VL<C>) {
                    vec<C> slope{}, b = change.masked ? load(bias + j) : vec<C>{};
                    store(z + j, change(load(z + j), b, lane + (C(j) - at), slope));
                    if (bend) store(bend + i * LD + j, slope);
                }
            }
        });
    }
    // The same for one query, l, whose products with the n keys from s on lie side by side.
    void apply_row(C* z, int64_t l, int64_t s, int64_t n) const {
        const vec<C> lane = lanes();
        o.function.with<C>([&](auto function) INLINE {
            const Change change(*this, function);
            for (int64_t i = 0; i < n; i += VL<C>) {
                vec<C> slope, b{};
                with_mask([&](auto m) { b = m.of_keys(l, s + i, int(std::min<int64_t>(VL<C>, n - i))); });
                store(z + i, change(load(z + i), b, C(l + offset() - s - i) - lane, slope));
            }
        });
    }

    // What dropout multiplies the weights of n keys from s on by, for QUERIES queries from l on: a tile.
    const C* dropped(int64_t l, int64_t s, int64_t n) const {
        constexpr int64_t BLOCK = PHILOX_BLOCK;
        C* factors = scratch<C, FACTORS>(KEYS * LD);
        int64_t column = q.l + l, first = column / BLOCK * BLOCK;
        alignas(64) C numbers[QUERIES + BLOCK];
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; first + j < column + QUERIES; j += BLOCK)
                o.dropout->factors((q.b * o.H + h) * o.S + q.s + s + i, first + j, reinterpret_cast<C(&)[BLOCK]>(numbers[j]));
            memcpy(factors + i * LD, numbers + column - first, QUERIES * sizeof(C));
        }
        return factors;
    }

  private:
    // A vector of products becomes scores: -inf where a key is hidden, and nowhere else. `behind` is how far each query lies behind its
    // key; `bend` becomes the derivative of the score function.
    template <class Function> struct Change {
        static constexpr C LARGEST = std::numeric_limits<C>::max();
        const Function& function;
        C scale, left, right, slope;
        bool masked;
        Change(const Scores& s, const Function& function)
            : function(function), scale(C(s.o.scale)), left(s.o.left < 0 ? INF<C> : C(s.o.left)), right(s.o.right < 0 ? INF<C> : C(s.o.right)),
              slope(s.o.slopes ? static_cast<const C*>(s.o.slopes)[s.q.b * s.o.slopes_batch + s.h] : C(0)),
              masked(s.o.mask.kind != MaskKind::NONE) {}
        INLINE vec<C> operator()(vec<C> x, vec<C> bias, vec<C> behind, vec<C>& bend) const {
            Bent<vec<C>> bent = function(x * scale, behind);
            x = bent.z, bend = bent.slope;
            if (masked) x += bias;
            if (slope != 0) x -= slope * abs(behind);
            x = x < -LARGEST ? set(-LARGEST) : x;
            if (masked) x = bias == -INF<C> ? bias : x;
            x = behind > left ? set(-INF<C>) : x;
            return -behind > right ? set(-INF<C>) : x;
        }
    };
    template <class M> struct Biases {  // of this head, one for every query and key
        const M* p;
        int64_t row, column;
        C operator()(int64_t l, int64_t s) const { return one(p[l * row + s * column]); }
        static C one(uint8_t seen) { return seen ? C(0) : -INF<C>; }
        template <class Stored> static C one(Stored x) { return load(&x, 1)[0]; }
        vec<C> along_keys(int64_t l, int64_t s, int n) const {
            const M* at = p + l * row + s;
            if constexpr (!std::is_same_v<M, uint8_t>) return load(at, n);
            else if constexpr (sizeof(C) == 4) {
                auto seen = lengthen(n >= VL<C> ? load_raw<bytes>(at) : load_raw<bytes>(at, n));
                return seen == 0 ? set(-INF<C>) : vec<C>{};
            } else {
                vec<C> v{};
                for (int i = 0; i < n; i++) v[i] = one(at[i]);
                return v;
            }
        }
        vec<C> of_keys(int64_t l, int64_t s, int n) const {
            if (column == 1) return along_keys(l, s, n);
            vec<C> v{};
            for (int i = 0; i < n; i++) v[i] = (*this)(l, s + i);
            return v;
        }
    };
    template <class F> void with_mask(const F& f) const {  // f(the biases), where there are any
        const Mask& m = o.mask;
        auto call = [&](auto type) {
            using M = decltype(type);
            f(Biases<M>{static_cast<const M*>(m.p) + m.offset(q.b, h), m.strides[2], m.strides[3]});
        };
        switch (m.kind) {
            case MaskKind::NONE: return;
            case MaskKind::BOOLEAN: return call(uint8_t{});
            case MaskKind::LIKE_QUERY: return call(T{});
            case MaskKind::FLOAT: if constexpr (sizeof(T) == 2) return call(float{});
        }
    }
    // bias[s][l] from a mask that lies [l][s]: by squares that are transposed, where its keys lie side by side.
    template <class M> static void fill(const Biases<M>& mask, C* bias, int64_t l, int64_t rows, int64_t s, int64_t n) {
        constexpr int V = VL<C>;
        if (mask.row == 0)
            for (int64_t i = 0; i < n; i++) {
                vec<C> same = set(mask(l, s + i));
                for (int64_t j = 0; j < QUERIES; j += V) store(bias + i * LD + j, same);
            }
        else if (mask.column == 1)
            for (int64_t j = 0; j < rows; j += V)
                for (int64_t i = 0; i < n; i += V) {
                    vec<C> square[V];
                    for (int r = 0; r < V; r++)
                        square[r] = j + r < rows ? mask.along_keys(l + j + r, s + i, int(std::min<int64_t>(V, n - i))) : vec<C>{};
                    transpose(square);
                    for (int r = 0; r < std::min<int64_t>(V, n - i); r++) store(bias + (i + r) * LD + j, square[r]);
                }
        else
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < rows; j++) bias[i * LD + j] = mask(l + j, s + i);
    }
};
