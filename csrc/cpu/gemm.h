// The one matrix product: C[m,n] = epilogue(sum_k A[m,k] B[k,n]).
//
// Three function objects make it linear, a gradient, a convolution or a gate:
//   A, B      hand out a Block: a strided view of some rows (A) or columns (B) and some k, from memory as it lies or from a scratch
//             copy they filled (a widened half type, an activation's derivative, an image patch);
//   epilogue  gets each finished tile while it is in the L1 cache, and writes the result.
//
//            N                       panel of B: [kc][NR], stays in L1 while every panel of A in the block passes over it
//        +-------+---+               panel of A: [kc][MR], a block of MC/MR of them stays in L2
//      M |       |MR |               tile:       MR x NR sums in registers; each k costs MR broadcasts, NV loads, MR*NV multiply-adds
//        +-------+NR-+
//
// Panels are padded with zeros, so the edges of the matrix run the same code as its middle. Threads split C into a grid of rectangles
// and never wait for one another; the order of every sum depends on the sizes alone, so results repeat bit for bit.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "simd.h"

// ---- small tools ---------------------------------------------------------------------------------------------------------------

template <class> class function_ref;
template <class R, class... Args> class function_ref<R(Args...)> {  // a borrowed callable: two pointers, no allocation
    const void* object;
    R (*call)(const void*, Args...);

  public:
    template <class F> function_ref(const F& f)
        : object(&f), call([](const void* o, Args... args) -> R { return (*static_cast<const F*>(o))(args...); }) {}
    R operator()(Args... args) const { return call(object, args...); }
};

// Scratch memory that lives as long as its thread; `Slot` tells buffers in use at the same time apart.
template <class E, int Slot> E* scratch(int64_t count) {
    struct Buffer {
        void* memory = nullptr;
        int64_t size = 0;
        ~Buffer() { free(memory); }
    };
    static thread_local Buffer buffer;
    int64_t size = (count * int64_t(sizeof(E)) + 4095) & ~int64_t(4095);
    if (size > buffer.size) {
        free(buffer.memory);
        buffer.size = 0;
        if (!(buffer.memory = aligned_alloc(4096, size))) throw std::bad_alloc();
        buffer.size = size;
    }
    return static_cast<E*>(buffer.memory);
}
inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// ---- readers and panels ----------------------------------------------------------------------------------------------------------

// Element (r, k) of an operand is p[r * rs + k * ks]; r is a row of A or a column of B, and rs or ks is 1.
template <class E> struct Block {
    const E* p;
    int64_t rs, ks;
};
template <class E> using Reader = function_ref<Block<E>(int64_t r0, int rows, int64_t k0, int kc)>;

// panel[k * W + r] = block(r, k), zero for r in [rows, W).
template <int W, class E> void pack(Block<E> block, int rows, int kc, E* panel) {
    constexpr int L = VL<E>;
    if (block.rs == 1) {
        for (int k = 0; k < kc; k++)
            for (int r = 0; r < W; r += L)
                store(panel + k * W + r, load(block.p + k * block.ks + r, std::max(rows - r, 0)), W - r);
        return;
    }
    for (int k = 0; k < kc; k += L)
        for (int r = 0; r < W; r += L) {
            vec<E> square[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; i++)
                square[i] = r + i < rows ? load(block.p + (r + i) * block.rs + k, kc - k) : vec<E>{};
            transpose(square);
            for (int i = 0; i < std::min(L, kc - k); i++) store(panel + (k + i) * W + r, square[i], W - r);
        }
}

// ---- the micro-kernel: an MR x NR tile from one panel of A and one of B --------------------------------------------------------------

template <class E> struct Fma {
    using Element = E;
    using Sum = E;
    static constexpr int MR = ::MR, NR = NV * VL<E>;
    static constexpr int KC = 1024 / sizeof(E), MC = 24 * MR, NC = 64 * VL<E>;

    static int64_t panel(int width, int kc) { return int64_t(width) * kc; }
    static void pack_a(Block<E> block, int rows, int kc, E* panel) { pack<MR>(block, rows, kc, panel); }
    static void pack_b(Block<E> block, int columns, int kc, E* panel) { pack<NR>(block, columns, kc, panel); }
    static constexpr bool writes_exactly(int) { return true; }  // the tile touches only the rows it was asked for

    template <int R> static void tile_of(int kc, const E* a, const E* b, E* c, int64_t ldc, bool add) {
        vec<E> acc[R][NV] = {};
        for (int i = 0; i < R; i++)
            for (int j = 0; j < NV; j++) __builtin_prefetch(c + i * ldc + j * VL<E>, 1);
        for (int k = 0; k < kc; k++, a += MR, b += NR) {
            vec<E> bk[NV];
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) bk[j] = load(b + j * VL<E>);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++)
#pragma GCC unroll 8
                for (int j = 0; j < NV; j++) acc[i][j] += set(a[i]) * bk[j];
        }
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) {
                E* at = c + i * ldc + j * VL<E>;
                store(at, add ? load(at) + acc[i][j] : acc[i][j]);
            }
    }
    template <int... R> static auto tile_for(int rows, std::integer_sequence<int, R...>) {
        static constexpr decltype(&tile_of<1>) table[] = {&tile_of<R + 1>...};
        return table[rows - 1];
    }
    // c[rows, NR] (+)= A panel * B panel
    static void tile(int rows, int kc, const E* a, const E* b, E* c, int64_t ldc, bool add) {
        tile_for(rows, std::make_integer_sequence<int, MR>{})(kc, a, b, c, ldc, add);
    }
};

// ---- the driver ------------------------------------------------------------------------------------------------------------------

template <class Sum> struct Tile {  // finished sums of C[m : m+rows, n : n+columns]
    const Sum* p;
    int64_t ld, m, n;
    int rows, columns;
};

template <class Micro> struct Gemm {
    using E = typename Micro::Element;
    using Sum = typename Micro::Sum;
    static constexpr int MR = Micro::MR, NR = Micro::NR, KC = Micro::KC, MC = Micro::MC, NC = Micro::NC;

    int64_t M, N, K;
    Reader<E> A, B;
    function_ref<void(const Tile<Sum>&)> epilogue;
    Sum* sums = nullptr;  // where partial sums wait between blocks of K: the output itself where it has this type, [M][ld_sums]
    int64_t ld_sums = 0;

    // Run one tile: partial sums come from and go to `home`, of `width` valid columns; a tile that does not fit there runs in `spare`.
    void one_tile(const E* a, const E* b, int kc, bool first, bool last, int64_t m, int64_t n, int rows, int columns, Sum* home, int64_t ld,
                  bool fits) const {
        alignas(64) Sum spare[MR * NR];
        Sum* c = home;
        int64_t ldc = ld;
        if (!fits) {
            c = spare, ldc = NR;
            if (!first)
                for (int i = 0; i < rows; i++)
                    for (int j = 0; j < columns; j += VL<Sum>) store(c + i * NR + j, load(home + i * ld + j, columns - j));
        }
        Micro::tile(rows, kc, a, b, c, ldc, !first);
        if (last) return epilogue({c, ldc, m, n, rows, columns});
        if (!fits)
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < columns; j += VL<Sum>) store(home + i * ld + j, load(c + i * NR + j), columns - j);
    }

    // The rectangle [m0, m1) x [n0, n1) of C, on one thread.
    void rectangle(int64_t m0, int64_t m1, int64_t n0, int64_t n1) const {
        E* a_panels = scratch<E, 0>(Micro::panel(round_up(std::min<int64_t>(MC, m1 - m0), MR), KC));
        E* b_panels = scratch<E, 1>(Micro::panel(round_up(std::min<int64_t>(NC, n1 - n0), NR), KC));
        for (int64_t jc = n0; jc < n1; jc += NC) {
            int64_t nc = std::min<int64_t>(NC, n1 - jc), ld = sums ? ld_sums : round_up(nc, NR);
            Sum* partial = sums ? sums + jc : K > KC ? scratch<Sum, 2>((m1 - m0) * ld) - m0 * ld : nullptr;
            for (int64_t pc = 0; pc == 0 || pc < K; pc += KC) {
                int kc = std::min<int64_t>(KC, K - pc);
                bool first = pc == 0, last = pc + KC >= K;
                for (int64_t j = 0; j < nc; j += NR) {
                    int columns = std::min<int64_t>(NR, nc - j);
                    Micro::pack_b(B(jc + j, columns, pc, kc), columns, kc, b_panels + Micro::panel(j, kc));
                }
                for (int64_t ic = m0; ic < m1; ic += MC) {
                    int64_t mc = std::min<int64_t>(MC, m1 - ic);
                    for (int64_t i = 0; i < mc; i += MR) {
                        int rows = std::min<int64_t>(MR, mc - i);
                        Micro::pack_a(A(ic + i, rows, pc, kc), rows, kc, a_panels + Micro::panel(i, kc));
                    }
                    for (int64_t j = 0; j < nc; j += NR)
                        for (int64_t i = 0; i < mc; i += MR) {
                            int rows = std::min<int64_t>(MR, mc - i), columns = std::min<int64_t>(NR, nc - j);
                            bool fits = partial && (columns == NR || !sums) && Micro::writes_exactly(rows);
                            one_tile(a_panels + Micro::panel(i, kc), b_panels + Micro::panel(j, kc), kc, first, last, ic + i, jc + j, rows,
                                     columns, partial + (ic + i) * ld + j, ld, fits);
                        }
                }
            }
        }
    }

    // A grid of tm x tn rectangles for at most `threads` threads: the one with the least work for its slowest thread, where packing one
    // element costs as much as PACK multiply-adds.
    template <class Parallel> void run(int64_t threads, const Parallel& parallel) const {
        constexpr double PACK = 12, SERIAL = 1 << 18;  // below SERIAL multiply-adds, waking a thread costs more than it saves
        if (M == 0 || N == 0) return;
        if (double(M) * N * std::max<int64_t>(K, 1) < SERIAL) threads = 1;
        int64_t blocks_m = (M + MR - 1) / MR, blocks_n = (N + NR - 1) / NR, tm = 1, tn = 1;
        double best = 1e300;
        for (int64_t rows = 1; rows <= threads; rows++) {
            int64_t columns = threads / rows;
            double m = double((blocks_m + rows - 1) / rows) * MR, n = double((blocks_n + columns - 1) / columns) * NR;
            double work = m * n + PACK * (m + n);
            if (work < best) best = work, tm = rows, tn = columns;
        }
        int64_t step_m = (blocks_m + tm - 1) / tm * MR, step_n = (blocks_n + tn - 1) / tn * NR;
        parallel(tm * tn, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) {
                int64_t m = t / tn * step_m, n = t % tn * step_n;
                if (m < M && n < N) rectangle(m, std::min(m + step_m, M), n, std::min(n + step_n, N));
            }
        });
    }
};

// The micro-kernel for each stored type. Half types are widened while they are read.
template <class T> using Micro = Fma<compute_t<T>>;
