// Micro-kernels whose multiplier takes pairs of bf16 and adds in float: vdpbf16ps, and the tiles of AMX.
//
// AMX multiplies bf16 sixteen times as fast as the vector units multiply float. That pays even for float operands: a float is the exact
// sum of three bf16 (8 + 8 + 8 bits of its 24), x = x0 + x1 + x2, so
//
//   x w = x0 w0 + (x0 w1 + x1 w0) + (x0 w2 + x1 w1 + x2 w0) + terms below 2^-24 |x w|
//
// and six bf16 products give a float product to float's own rounding. Two parts hold a half-precision number (11 bits) exactly.
// Parts of an Inf or of a number near the underflow threshold would not add up: a panel that holds one is refused, and the rectangle is
// computed with the vector units instead.
#pragma once
#include "gemm_micro.h"

// Where columns are contiguous: VL rows of one k from row r on, a 32-bit lane each. Zero outside rows x kc.
inline pairs one_k(Block<bf16> x, int rows, int kc, int r, int k) {
    const bf16* p = x.p + k * x.ks + r;
    prefetch_l2(p + ROWS_AHEAD * x.ks);
    halves h = k >= kc || r >= rows ? halves{} : rows - r >= VL<float> ? load_raw<halves>(p) : load_raw<halves>(p, rows - r);
    return __builtin_convertvector(h, pairs);
}

// One square of VL rows x VL pairs: out[r] holds the pairs of row r (BY_ROW), or out[j] holds pair j of every row. Zero outside rows x kc.
template <bool BY_ROW> void load_square(Block<bf16> x, int rows, int kc, pairs (&out)[VL<float>]) {
    constexpr int L = VL<float>;
    auto at = [&](int r, int k) { return reinterpret_cast<const uint16_t*>(x.p + r * x.rs + k * x.ks); };
    if (x.ks == 1) {
#pragma GCC unroll 16
        for (int r = 0; r < L; r++) {
            prefetch_l2(at(r, AHEAD / 2));
            out[r] = r >= rows ? pairs{} : kc >= 2 * L ? load_raw<pairs>(at(r, 0)) : load_raw<pairs>(at(r, 0), kc);
        }
        if (!BY_ROW) transpose(out);
        return;
    }
#pragma GCC unroll 16
    for (int j = 0; j < L; j++) out[j] = one_k(x, rows, kc, 0, 2 * j) | one_k(x, rows, kc, 0, 2 * j + 1) << 16;
    if (BY_ROW) transpose(out);
}

// Two rows as pairs. What is too small to be a normal number may become 0.
inline pairs pair_up(vec<float> low, vec<float> high) {
    return lengthen(narrow(low, bf16{}, true)) | lengthen(narrow(high, bf16{}, true)) << 16;
}

// ---- vdpbf16ps: the same tile as Fma, two k at a time ----------------------------------------------------------------------------------

template <class E, int NV = ::NV> struct PairDot {
    using Element = bf16;
    using Sum = float;
    using Lane = uint32_t;  // what a row of B is made of: pairs
    static constexpr int MR = ::MR, NR = NV * VL<float>;
    static constexpr int KC = 512, MC = 8 * MR, NC = 16 * VL<float>;

    struct Session {};
    static int64_t panel(int64_t width, int64_t kc) { return width * round_up(kc, 2); }
    template <int W> static bool pack_pairs(Block<bf16> block, int rows, int kc, bf16* panel) {
        constexpr int L = VL<float>;
        auto* out = reinterpret_cast<uint32_t*>(panel);
        if (block.rs == 1) {  // along whole lines: the halves of one would not meet in L1, where rows a power of two apart share few ways
            for (int k = 0; k < kc; k += 2, out += W)
                for (int r = 0; r < W; r += L) {
                    pairs both = one_k(block, rows, kc, r, k) | one_k(block, rows, kc, r, k + 1) << 16;
                    if (W - r >= L) store_raw(out + r, both);
                    else store_raw(out + r, both, W - r);
                }
            return true;
        }
        for (int k = 0; k < kc; k += 2 * L)
            for (int r = 0; r < W; r += L) {
                pairs square[L];
                load_square<false>({block.p + r * block.rs + k * block.ks, block.rs, block.ks}, std::max(rows - r, 0), kc - k, square);
                for (int j = 0; j < std::min(L, (kc - k + 1) / 2); j++) {
                    uint32_t* to = out + (k / 2 + j) * W + r;
                    if (W - r >= L) store_raw(to, square[j]);
                    else store_raw(to, square[j], W - r);
                }
            }
        return true;
    }
    static bool pack_a(Block<bf16> block, int rows, int kc, bf16* panel) { return pack_pairs<MR>(block, rows, kc, panel); }
    static bool pack_b(Block<bf16> block, int columns, int kc, bf16* panel) { return pack_pairs<NR>(block, columns, kc, panel); }
    static constexpr bool writes_exactly(int) { return true; }
    static INLINE vec<float> multiply_add(vec<float> sum, Lane a, const Lane* row) {
        return dot_pairs(sum, pairs{} + a, load_raw<pairs>(row));
    }

    template <int R, class A, class B>
    static void tile_of(int kc, A a, B b, float* c, int64_t ldc, bool add, const bf16* next) {
        vec<float> acc[R][NV] = {};
        for (int k = 0; k < kc; k += 2, next += 2 * VL<float>) {
            prefetch_l2(next);
            const uint32_t *column = a[k / 2], *row = b[k / 2];
#pragma GCC unroll 16
            for (int i = 0; i < R; i++)
#pragma GCC unroll 8
                for (int j = 0; j < NV; j++) acc[i][j] = multiply_add(acc[i][j], a.of(column, i), row + j * VL<float>);
        }
        put(acc, c, ldc, add);
    }
    template <class A, class B> static void tile_at(int rows, int kc, A a, B b, float* c, int64_t ldc, bool add, const bf16* next) {
        tile_for<PairDot, A, B>(rows, std::make_integer_sequence<int, MR>{})(kc, a, b, c, ldc, add, next);
    }
    static void tile(int rows, int, int kc, const bf16* a, const bf16* b, float* c, int64_t ldc, bool add, const bf16* next) {
        auto lanes = [](const bf16* panel, int64_t width) { return Spaced<uint32_t>{reinterpret_cast<const uint32_t*>(panel), width}; };
        tile_at(rows, kc, lanes(a, MR), lanes(b, NR), c, ldc, add, next);
    }
};

template <class Micro> struct one_vector;  // the same with tiles of one vector, for what is left at the end of a row
template <class E> struct one_vector<Fma<E>> { using type = Fma<E, 1>; };
template <class E> struct one_vector<PairDot<E>> { using type = PairDot<E, 1>; };

// ---- AMX: 32 x 32 of C in four tiles; PARTS bf16 per operand element ------------------------------------------------------------------
// panel: for every 32 k, for every part, two tiles of 16 rows (A: [row][32 k]) or 16 columns (B: [pair of k][16 columns][2]).

template <class E, int PARTS> struct Tiles {
    using Element = E;
    using Sum = float;
    static constexpr int MR = 32, NR = 32, STEP = 32, SQUARE = 16 * STEP;
    static constexpr int KC = PARTS == 1 ? 256 : 128, MC = PARTS == 1 ? 128 : 256, NC = PARTS == 1 ? 256 : 512;

    using Session = TileSession;
    static int64_t panel(int64_t width, int64_t kc) {
        return width * round_up(kc, STEP) * PARTS * int64_t(sizeof(bf16)) / int64_t(sizeof(E));
    }

    // Split 16 rows x 32 k of float into parts, each truncated to its upper half; the rest is exact. False where the parts do not add up.
    static bool split(Block<float> x, int rows, int kc, bf16 (&out)[PARTS][SQUARE]) {
        bool along_k = x.ks == 1;
        int outer = along_k ? rows : kc, inner = along_k ? kc : rows, ld = along_k ? STEP : 16;
        int64_t stride = along_k ? x.rs : x.ks;
        vec<int32_t> largest{};
        for (int i = 0; i < outer; i++)
            for (int j = 0; j < inner; j += 16) {
                vec<float> rest = load(x.p + i * stride + j, inner - j);
                largest = max(largest, bits_as<vec<int32_t>>(rest) & 0x7fffffff);
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++) {
                    pairs upper = bits_as<pairs>(rest) & 0xffff0000u;
                    store_raw(reinterpret_cast<uint16_t*>(out[p]) + i * ld + j, __builtin_convertvector(upper >> 16, halves));
                    rest -= bits_as<vec<float>>(upper);
                }
            }
        // AMX takes subnormal numbers for 0, and a part of a number below TINY = 2^-90 could be one.
        constexpr int32_t INFINITE = 0x7f800000, TINY = (127 - 90) << 23;
        vec<int32_t> bad = (largest >= INFINITE) | ((largest < TINY) & (largest > 0) & (max_of(largest) < TINY));
        return !any(bad);
    }
    static bool any(vec<int32_t> mask) {
        int32_t found = 0;
        for (int i = 0; i < VL<float>; i++) found |= mask[i];
        return found;
    }
    static int32_t max_of(vec<int32_t> v) {
        int32_t m = v[0];
        for (int i = 1; i < VL<float>; i++) m = std::max(m, v[i]);
        return m;
    }

    template <bool BY_ROW> static bool pack_tiles(Block<E> block, int rows, int kc, E* panel) {
        auto* out = reinterpret_cast<bf16*>(panel);
        bool good = true;
        for (int k = 0; k < kc; k += STEP)
            for (int half = 0; half < 2; half++) {
                Block<E> x = {block.p + 16 * half * block.rs + k * block.ks, block.rs, block.ks};
                int r = std::clamp(rows - 16 * half, 0, 16), n = std::min(STEP, kc - k);
                auto put = [&](int part, Block<bf16> from) {
                    pairs square[VL<float>];
                    load_square<BY_ROW>(from, r, n, square);
                    bf16* to = out + k / STEP * (PARTS * 2 * SQUARE) + (part * 2 + half) * SQUARE;
                    for (int i = 0; i < 16; i++) store_raw(to + i * STEP, square[i]);
                };
                if constexpr (PARTS == 1) put(0, x);
                else {
                    alignas(64) bf16 parts[PARTS][SQUARE];
                    good &= split(x, r, n, parts);
                    for (int p = 0; p < PARTS; p++) put(p, x.ks == 1 ? Block<bf16>{parts[p], STEP, 1} : Block<bf16>{parts[p], 1, 16});
                }
            }
        return good;
    }
    static bool pack_a(Block<E> block, int rows, int kc, E* panel) { return pack_tiles<true>(block, rows, kc, panel); }
    static bool pack_b(Block<E> block, int columns, int kc, E* panel) { return pack_tiles<false>(block, columns, kc, panel); }
    static constexpr bool writes_exactly(int rows) { return rows == MR; }

    struct Rows {  // where the tiles of A are: a packed panel, or 32 rows of a matrix as it lies
        const bf16* p;
        int64_t row_bytes = 64, half = SQUARE, part = 2 * SQUARE, step = PARTS * 2 * SQUARE;
    };
    // Tiles 0..3 hold C, 4 and 5 a part of A, 6 and 7 a part of B; RT and CT say how many of the two row and column tiles are in use.
    template <int RT> static void load_a(const Rows& a, int part) {
        tile_load<4>(a.p + part * a.part, a.row_bytes);
        if (RT == 2) tile_load<5>(a.p + part * a.part + a.half, a.row_bytes);
    }
    template <int CT> static void load_b(const bf16* b, int part) {
        tile_load<6>(b + (2 * part) * SQUARE, 64);
        if (CT == 2) tile_load<7>(b + (2 * part + 1) * SQUARE, 64);
    }
    template <int RT, int CT> static void dot() {
        tile_dot<0, 4, 6>();
        if (CT == 2) tile_dot<1, 4, 7>();
        if (RT == 2) tile_dot<2, 5, 6>();
        if (RT == 2 && CT == 2) tile_dot<3, 5, 7>();
    }
    template <int RT, int CT> static void tile_of(int kc, Rows a, const bf16* b, float* c, int64_t ldc, bool add) {
        int64_t bytes = ldc * sizeof(float);
        if (add) {
            tile_load<0>(c, bytes), tile_load<1>(c + 16, bytes);
            tile_load<2>(c + 16 * ldc, bytes), tile_load<3>(c + 16 * ldc + 16, bytes);
        } else {
            tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        }
        for (int k = 0; k < kc; k += STEP, a.p += a.step, b += PARTS * 2 * SQUARE) {
            if constexpr (PARTS == 3) {  // small terms first, and each step changes one operand
                load_a<RT>(a, 2), load_b<CT>(b, 0), dot<RT, CT>();
                load_a<RT>(a, 1), dot<RT, CT>();
                load_b<CT>(b, 1), dot<RT, CT>();
                load_a<RT>(a, 0), dot<RT, CT>();
                load_b<CT>(b, 2), dot<RT, CT>();
                load_b<CT>(b, 0), dot<RT, CT>();
            } else if constexpr (PARTS == 2) {
                load_a<RT>(a, 1), load_b<CT>(b, 1), dot<RT, CT>();
                load_b<CT>(b, 0), dot<RT, CT>();
                load_a<RT>(a, 0), dot<RT, CT>();
                load_b<CT>(b, 1), dot<RT, CT>();
            } else {
                load_a<RT>(a, 0), load_b<CT>(b, 0), dot<RT, CT>();
            }
        }
        tile_store<0>(c, bytes), tile_store<1>(c + 16, bytes);
        tile_store<2>(c + 16 * ldc, bytes), tile_store<3>(c + 16 * ldc + 16, bytes);
    }
    static void tile(int rows, int columns, int kc, const E* a, const E* b, float* c, int64_t ldc, bool add, const E*) {
        tile(rows, columns, kc, Rows{reinterpret_cast<const bf16*>(a)}, reinterpret_cast<const bf16*>(b), c, ldc, add);
    }
    static void tile(int rows, int columns, int kc, const Rows& a, const bf16* b, float* c, int64_t ldc, bool add) {
        bool tall = rows > 16, wide = columns > 16;
        (tall ? wide ? tile_of<2, 2> : tile_of<2, 1> : wide ? tile_of<1, 2> : tile_of<1, 1>)(kc, a, b, c, ldc, add);
    }
};

// The micro-kernel for each stored type, when there is enough work to pay for packing parts (LARGE) and when not.
// Half types that no multiplier takes are widened to float while they are read.
template <class T, bool LARGE> struct micro_for { using type = Fma<compute_t<T>>; };
template <> struct micro_for<float, true> { using type = std::conditional_t<HAS_TILES, Tiles<float, 3>, Fma<float>>; };
template <> struct micro_for<f16, true> { using type = std::conditional_t<HAS_TILES, Tiles<float, 2>, Fma<float>>; };
template <bool LARGE> struct micro_for<bf16, LARGE> {
    using type = std::conditional_t<HAS_TILES, Tiles<bf16, 1>, std::conditional_t<HAS_PAIR_DOT, PairDot<bf16>, Fma<float>>>;
};
