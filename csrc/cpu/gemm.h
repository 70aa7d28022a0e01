// The one matrix product: C[m,n] = epilogue(sum_k A[m,k] B[k,n]).
//
// Three function objects make it linear, a gradient, a convolution or a gate:
//   A, B      hand out a Block: a strided view of some rows (A) or columns (B) and some k, from memory as it lies or from a scratch
//             copy they filled (a widened half type, an activation's derivative, an image patch);
//   epilogue  gets each finished tile while it is in the L1 cache, and writes the result.
//
//            N                       panel of A: [kc][MR], stays in L1 while every panel of B in the block passes over it
//        +-------+---+               panel of B: [kc][NR], a block of NC/NR of them stays in L2
//      M |       |MR |               tile:       MR x NR sums in registers; each k costs MR broadcasts, NV loads, MR*NV multiply-adds
//        +-------+NR-+
//
// Both operands are packed once, by all threads together; then each thread computes its own rectangle of C. Panels are padded with zeros,
// so the edges of the matrix run the same code as its middle. The order of every sum depends on the sizes alone: results repeat bit for
// bit, whatever the number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "simd.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

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
    int64_t size = count * int64_t(sizeof(E));
    if (size > buffer.size) {
        int64_t page = size < (1 << 20) ? 4096 : 2 << 20;
        size = (size + page - 1) / page * page;
        free(buffer.memory);
        buffer.size = 0;
        if (!(buffer.memory = aligned_alloc(page, size))) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (page > 4096) madvise(buffer.memory, size, MADV_HUGEPAGE);  // a walk over megabytes of panels would miss the TLB at every step
#endif
        buffer.size = size;
    }
    return static_cast<E*>(buffer.memory);
}
constexpr double SERIAL = 1 << 19;  // below this many multiply-adds, waking a thread costs more than it saves
inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// ---- readers and panels ----------------------------------------------------------------------------------------------------------

// Element (r, k) of an operand is p[r * rs + k * ks]; r is a row of A or a column of B, and rs or ks is 1.
template <class E> struct Block {
    const E* p;
    int64_t rs, ks;
};
template <class E> using Reader = function_ref<Block<E>(int64_t r0, int rows, int64_t k0, int kc)>;

// While one line of an operand is packed, the line AHEAD bytes further on is on its way to L2: a panel's rows lie far apart, so the
// hardware does not see them coming. (L1 would be the wrong place: rows a power of two apart share its few ways.)
constexpr int AHEAD = 256;
template <class T> inline void prefetch_l2(const T* p) { __builtin_prefetch(p, 0, 2); }

// panel[k * W + r] = block(r, k), zero for r in [rows, W).
template <int W, class E> bool pack(Block<E> block, int rows, int kc, E* panel) {
    constexpr int L = VL<E>;
    if (block.rs == 1) {
        for (int k = 0; k < kc; k++)
            for (int r = 0; r < W; r += L) {
                prefetch_l2(block.p + (k + 8) * block.ks + r);
                store(panel + k * W + r, load(block.p + k * block.ks + r, std::max(rows - r, 0)), W - r);
            }
        return true;
    }
    for (int k = 0; k < kc; k += L)
        for (int r = 0; r < W; r += L) {
            vec<E> square[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) {
                const E* p = block.p + (r + i) * block.rs + k;
                prefetch_l2(p + AHEAD / sizeof(E));
                square[i] = r + i < rows ? load(p, kc - k) : vec<E>{};
            }
            transpose(square);
            for (int i = 0; i < std::min(L, kc - k); i++) store(panel + (k + i) * W + r, square[i], W - r);
        }
    return true;
}

// ---- the micro-kernel: an MR x NR tile from one panel of A and one of B --------------------------------------------------------------

template <class E> struct Fma {
    using Element = E;
    using Sum = E;
    static constexpr int MR = ::MR, NR = NV * VL<E>;
    static constexpr int KC = 1536 / sizeof(E), MC = 8 * MR, NC = 16 * VL<E>;

    struct Session {};  // set up once per rectangle; AMX has something to do there
    static int64_t panel(int64_t width, int kc) { return width * kc; }  // elements in a panel
    // Packing says whether this micro-kernel can multiply what it read; the vector units take every number.
    static bool pack_a(Block<E> block, int rows, int kc, E* panel) { return pack<MR>(block, rows, kc, panel); }
    static bool pack_b(Block<E> block, int columns, int kc, E* panel) { return pack<NR>(block, columns, kc, panel); }
    static constexpr bool writes_exactly(int) { return true; }  // the tile touches only the rows it was asked for

    template <int R> static void tile_of(int kc, const E* a, const E* b, int64_t ldb, E* c, int64_t ldc, bool add, const E* next) {
        vec<E> acc[R][NV] = {};
        for (int i = 0; i < R; i++)
            for (int j = 0; j < NV; j++) __builtin_prefetch(c + i * ldc + j * VL<E>, 1);
        for (int k = 0; k < kc; k++, a += MR, b += ldb, next += VL<E>) {
            prefetch_l2(next);
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
    // c[rows, NR] (+)= A panel * B, where row k of B starts at b + k * ldb; a vector of `next` per k is fetched into L2 meanwhile
    static void tile(int rows, int kc, const E* a, const E* b, int64_t ldb, E* c, int64_t ldc, bool add, const E* next) {
        tile_for(rows, std::make_integer_sequence<int, MR>{})(kc, a, b, ldb, c, ldc, add, next);
    }
    static void tile(int rows, int, int kc, const E* a, const E* b, E* c, int64_t ldc, bool add, const E* next) {
        tile(rows, kc, a, b, NR, c, ldc, add, next);
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
    Sum* sums = nullptr;  // [M][N]: where partial sums wait when K is too deep to be packed at once; the output itself if it has this type

    struct Rectangle { int64_t m0, m1, n0, n1; };  // C[m0 : m1, n0 : n1]
    struct Part : Rectangle {                      // what is packed at a time: its rows of A and its columns of B for k in [k0, k1)
        int64_t k0, k1;
        E *a, *b;
        E* a_panel(int64_t m, int64_t k) const { return a + (m - this->m0) / MR * Micro::panel(MR, k1 - k0) + Micro::panel(MR, k - k0); }
        E* b_panel(int64_t n, int64_t k) const { return b + (n - this->n0) / NR * Micro::panel(NR, k1 - k0) + Micro::panel(NR, k - k0); }
    };

    // Run with at most `threads` threads; parallel(n, body) calls body(begin, end) over parts of [0, n).
    template <class Parallel> void run(int64_t threads, const Parallel& parallel) {
        constexpr int64_t PACKED = 8 << 20, DEEP = 8192;  // elements of one operand, and of k, that are packed at a time
        constexpr int64_t ALONE = 1 << 17;                // elements of both that a thread packs for itself
        if (M == 0 || N == 0) return;
        if (double(M) * N * K < SERIAL) threads = 1;
        auto each = [&](auto body) {
            if (threads == 1) return body(0);
            parallel(threads, [&](int64_t begin, int64_t end) { for (int64_t t = begin; t < end; t++) body(t); });
        };
        std::atomic<bool> good = true;
        int64_t deep = std::max<int64_t>(1, std::min(K, DEEP)), share = PACKED / deep;
        if (K <= deep) sums = nullptr;
        else if (!sums) sums = scratch<Sum, 4>(M * N);
        if ((M + N) * K <= ALONE) {  // each thread packs all that its rectangle reads: waiting for one another would take longer
            each([&](int64_t t) {
                Part part = packing(rectangle({0, M, 0, N}, t, threads), 0, K);
                if (pack(part, 0, 1, true)) multiply(part, part);
                else good = false;
            });
        } else {
            int64_t step_m = round_up(std::min(M, std::max<int64_t>(share, MC)), MR);
            int64_t step_n = round_up(std::min(N, std::max<int64_t>(share, NC)), NR);
            for (int64_t n = 0; n < N && good; n += step_n)
                for (int64_t k = 0; (k == 0 || k < K) && good; k += deep)
                    for (int64_t m = 0; m < M && good; m += step_m) {
                        Part part = packing({m, std::min(M, m + step_m), n, std::min(N, n + step_n)}, k, std::min(K, k + deep));
                        each([&](int64_t t) { if (!pack(part, t, threads, m == 0)) good = false; });
                        if (good) each([&](int64_t t) { multiply(part, rectangle(part, t, threads)); });
                    }
        }
        if constexpr (std::is_same_v<E, Sum>)
            if (!good) Gemm<Fma<E>>{M, N, K, A, B, epilogue, sums}.run(threads, parallel);
    }

    // Thread t's share of the panels, a few side by side at a time: a reader has longer rows to work on, and the lines that two panels
    // share are read once. False where a panel was refused.
    bool pack(const Part& part, int64_t t, int64_t threads, bool also_b) const {
        constexpr int SIDE_BY_SIDE = 8, DEPTH = 128;
        auto share = [&](int64_t begin, int64_t end, int width, const Reader<E>& read, auto pack_one, auto panel_at) {
            int64_t panels = (end - begin + width - 1) / width;
            int64_t first = begin + panels * t / threads * width, last = std::min(end, begin + panels * (t + 1) / threads * width);
            for (int64_t r = first; r < last; r += SIDE_BY_SIDE * width)
                for (int64_t k = part.k0; k < part.k1; k += DEPTH) {
                    int rows = std::min<int64_t>(SIDE_BY_SIDE * width, last - r), kc = std::min<int64_t>(DEPTH, part.k1 - k);
                    Block<E> block = read(r, rows, k, kc);
                    for (int i = 0; i < rows; i += width, block.p += width * block.rs)
                        if (!pack_one(block, std::min(width, rows - i), kc, panel_at(r + i, k))) return false;
                }
            return true;
        };
        return share(part.m0, part.m1, MR, A, Micro::pack_a, [&](int64_t m, int64_t k) { return part.a_panel(m, k); }) &&
               (!also_b || share(part.n0, part.n1, NR, B, Micro::pack_b, [&](int64_t n, int64_t k) { return part.b_panel(n, k); }));
    }

    static Part packing(Rectangle r, int64_t k0, int64_t k1) {
        auto room = [&](int64_t count, int width) {
            return round_up(std::max<int64_t>(count, 0), width) / width * Micro::panel(width, k1 - k0);
        };
        return {r, k0, k1, scratch<E, 0>(room(r.m1 - r.m0, MR)), scratch<E, 1>(room(r.n1 - r.n0, NR))};
    }

    // Thread t's share of C: the threads form the grid that gives the slowest of them the least to compute and to read.
    static Rectangle rectangle(const Rectangle& c, int64_t t, int64_t threads) {
        int64_t blocks_m = (c.m1 - c.m0 + MR - 1) / MR, blocks_n = (c.n1 - c.n0 + NR - 1) / NR, step_m = 0, step_n = 0, columns = 1;
        double best = 1e300;
        for (int64_t tm = 1; tm <= threads; tm++) {
            int64_t tn = threads / tm, m = (blocks_m + tm - 1) / tm * MR, n = (blocks_n + tn - 1) / tn * NR;
            double work = double(m) * n + 4 * (m + n);
            if (work < best) best = work, step_m = m, step_n = n, columns = tn;
        }
        int64_t m0 = c.m0 + t / columns * step_m, n0 = c.n0 + t % columns * step_n;
        return {m0, std::min(c.m1, m0 + step_m), n0, std::min(c.n1, n0 + step_n)};
    }

    // C over one rectangle of a packed part. MC x NC sums stay in the L2 cache until all of k has been added to them.
    void multiply(const Part& part, const Rectangle& r) const {
        [[maybe_unused]] typename Micro::Session session;
        for (int64_t n = r.n0; n < r.n1; n += NC)
            for (int64_t m = r.m0; m < r.m1; m += MC)
                for (int64_t k = part.k0; k == part.k0 || k < part.k1; k += KC)
                    block(part, m, std::min(r.m1, m + MC), n, std::min(r.n1, n + NC), k);
    }

    // Add the products of one block of k to C[m0 : m1, n0 : n1].
    void block(const Part& part, int64_t m0, int64_t m1, int64_t n0, int64_t n1, int64_t k) const {
        int kc = std::min<int64_t>(KC, part.k1 - k);
        bool first = k == 0, last = k + kc >= K;
        int64_t ld = sums ? N : NC + VL<Sum>;  // rows a power of two apart would compete for the same lines of the cache
        Sum* partial = sums ? sums + m0 * ld + n0 : first && last ? nullptr : scratch<Sum, 2>(MC * ld);
        for (int64_t m = m0; m < m1; m += MR)
            for (int64_t n = n0; n < n1; n += NR) {
                const E *a = part.a_panel(m, k), *next = n == n0 && m + MR < m1 ? part.a_panel(m + MR, k) : a;
                Tile<Sum> at{partial ? partial + (m - m0) * ld + n - n0 : nullptr, ld, m, n, int(std::min<int64_t>(MR, m1 - m)),
                             int(std::min<int64_t>(NR, n1 - n))};
                one_tile(a, part.b_panel(n, k), kc, first, last, at, next);
            }
    }

    // One tile, in place where the partial sums have room for all of it, else by way of `spare`.
    void one_tile(const E* a, const E* b, int kc, bool first, bool last, const Tile<Sum>& at, const E* next) const {
        alignas(64) Sum spare[MR * NR];
        Sum* home = const_cast<Sum*>(at.p);
        auto copy = [&](const Sum* from, int64_t from_ld, Sum* to, int64_t to_ld, bool pad) {
            for (int i = 0; i < at.rows; i++)
                for (int j = 0; j < at.columns; j += VL<Sum>)
                    store(to + i * to_ld + j, load(from + i * from_ld + j, at.columns - j), pad ? VL<Sum> : at.columns - j);
        };
        if (home && (at.columns == NR || !sums) && Micro::writes_exactly(at.rows)) {
            Micro::tile(at.rows, at.columns, kc, a, b, home, at.ld, !first, next);
            if (last) epilogue(at);
            return;
        }
        if (!first) copy(home, at.ld, spare, NR, true);
        Micro::tile(at.rows, at.columns, kc, a, b, spare, NR, !first, next);
        if (last) epilogue({spare, NR, at.m, at.n, at.rows, at.columns});
        else copy(spare, NR, home, at.ld, false);
    }
};
