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
// A is packed once, by all threads together; then each thread computes its own rectangle of C, and packs the columns of B strip by strip,
// so that a strip is used while it is still in the cache. Panels are padded with zeros: the edges of the matrix run the same code as its
// middle. The order of every sum depends on the sizes alone, so results repeat bit for bit, whatever the number of threads.
#pragma once
#include <algorithm>
#include <atomic>

#include "gemm_micro.h"

constexpr double SERIAL = 1 << 19;  // below this many multiply-adds, waking a thread costs more than it saves

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
    int64_t deep = 8192;  // of k that are packed at a time
    const void* out = nullptr;  // [M][N] of `out_size` bytes each: what the epilogue writes, to be fetched in time
    int64_t out_size = 0;
    Sum* sums = nullptr;  // [M][N]: where partial sums wait when K is too deep to be packed at once; the output itself if it has this type

    struct Rectangle { int64_t m0, m1, n0, n1; };  // C[m0 : m1, n0 : n1]
    struct Part : Rectangle {                      // what is packed at a time: rows of A and columns of B for k in [k0, k1)
        int64_t k0, k1;
        E *a = nullptr, *b = nullptr;
        E* a_panel(int64_t m, int64_t k) const { return a + (m - this->m0) / MR * Micro::panel(MR, k1 - k0) + Micro::panel(MR, k - k0); }
        E* b_panel(int64_t n, int64_t k) const { return b + (n - this->n0) / NR * Micro::panel(NR, k1 - k0) + Micro::panel(NR, k - k0); }
    };

    // Run with at most `threads` threads; parallel(n, body) calls body(begin, end) over parts of [0, n).
    template <class Parallel> void run(int64_t threads, const Parallel& parallel) {
        constexpr int64_t PACKED = 8 << 20;  // elements of A that are packed at a time
        constexpr int64_t ALONE = 1 << 17;                // elements of both operands up to which nobody waits for another's share of A
        if (M == 0 || N == 0) return;
        if (double(M) * N * K < SERIAL) threads = 1;
        std::atomic<bool> good = true;
        auto each = [&](auto step) {  // step(thread) says whether it went well
            auto checked = [&](int64_t t) { if (!step(t)) good = false; };
            if (threads == 1) return checked(0);
            parallel(threads, [&](int64_t begin, int64_t end) { for (int64_t t = begin; t < end; t++) checked(t); });
        };
        deep = std::max<int64_t>(1, std::min(K, deep));
        int64_t tall = round_up(std::min(M, std::max<int64_t>(PACKED / deep, MC)), MR);
        if (K <= deep) sums = nullptr;
        else if (!sums) sums = scratch<Sum, 4>(M * N);
        for (int64_t k = 0; (k == 0 || k < K) && good; k += deep)
            for (int64_t m = 0; m < M && good; m += tall) {
                Rectangle all{m, std::min(M, m + tall), 0, N};
                int64_t k1 = std::min(K, k + deep);
                if ((M + N) * K <= ALONE) {
                    each([&](int64_t t) {
                        Part part = with_room(rectangle(all, t, threads), k, k1);
                        return pack_a(part, 0, 1) && multiply(part, part);
                    });
                } else {
                    Part part = with_room(all, k, k1);
                    each([&](int64_t t) { return pack_a(part, t, threads); });
                    if (good) each([&](int64_t t) { return multiply(part, rectangle(part, t, threads)); });
                }
            }
        if constexpr (std::is_same_v<E, Sum>)
            if (!good) Gemm<Fma<E>>{M, N, K, A, B, epilogue, deep, sums}.run(threads, parallel);
    }

    // Thread t's share of the panels of one operand. False where one was refused.
    bool pack_a(const Part& part, int64_t t, int64_t threads) const {
        return pack(part, part.m0, part.m1, MR, t, threads, A, Micro::pack_a, [&](int64_t m, int64_t k) { return part.a_panel(m, k); });
    }
    bool pack_b(const Part& part, int64_t t, int64_t threads) const {
        return pack(part, part.n0, part.n1, NR, t, threads, B, Micro::pack_b, [&](int64_t n, int64_t k) { return part.b_panel(n, k); });
    }
    // A few panels side by side at a time: a reader has longer rows to work on, and the lines that two panels share are read once.
    template <class One, class At>
    static bool pack(const Part& part, int64_t begin, int64_t end, int width, int64_t t, int64_t threads, const Reader<E>& read,
                     const One& pack_one, const At& panel_at) {
        constexpr int SIDE_BY_SIDE = 8, DEPTH = 128;
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
    }

    // Elements in the panels of `count` rows or columns.
    static int64_t room(int64_t count, int width, int64_t kc) {
        return round_up(std::max<int64_t>(count, 0), width) / width * Micro::panel(width, kc);
    }
    // A part with room for its panels of A in this thread's scratch.
    static Part with_room(const Rectangle& r, int64_t k0, int64_t k1) { return {r, k0, k1, scratch<E, 0>(room(r.m1 - r.m0, MR, k1 - k0))}; }

    // Thread t's share of C: the threads form the grid that gives the slowest of them the least to compute and, of B, to pack.
    static Rectangle rectangle(const Rectangle& c, int64_t t, int64_t threads) {
        int64_t blocks_m = (c.m1 - c.m0 + MR - 1) / MR, blocks_n = (c.n1 - c.n0 + NR - 1) / NR, step_m = 0, step_n = 0, columns = 1;
        double best = 1e300;
        for (int64_t tm = 1; tm <= threads; tm++) {
            int64_t tn = threads / tm, m = (blocks_m + tm - 1) / tm * MR, n = (blocks_n + tn - 1) / tn * NR;
            double work = double(m) * n + 4 * m + 16 * n;
            if (work < best) best = work, step_m = m, step_n = n, columns = tn;
        }
        int64_t m0 = c.m0 + t / columns * step_m, n0 = c.n0 + t % columns * step_n;
        return {m0, std::min(c.m1, m0 + step_m), n0, std::min(c.n1, n0 + step_n)};
    }

    // C over rectangle r, whose rows of A are packed. A strip of B is packed and used at once, by all rows, while it is in the L2 cache.
    bool multiply(const Part& rows, const Rectangle& r) const {
        [[maybe_unused]] typename Micro::Session session;
        for (int64_t n = r.n0; n < r.n1; n += NC) {
            Part part = rows;
            part.n0 = n, part.n1 = std::min(r.n1, n + NC), part.b = scratch<E, 1>(room(NC, NR, rows.k1 - rows.k0));
            if (!pack_b(part, 0, 1)) return false;
            for (int64_t m = r.m0; m < r.m1; m += MC)
                for (int64_t k = part.k0; k == part.k0 || k < part.k1; k += KC)
                    block(part, m, std::min(r.m1, m + MC), n, part.n1, k);
        }
        return true;
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

    // The lines of the result that a tile will be written to, on their way while it is computed.
    void fetch(const Tile<Sum>& at) const {
        for (int i = 0; i < at.rows; i++) {
            const char* row = static_cast<const char*>(out) + ((at.m + i) * N + at.n) * out_size;
            for (int64_t b = 0; b < at.columns * out_size; b += 64) __builtin_prefetch(row + b, 1);
        }
    }

    // One tile, in place where the partial sums have room for all of it, else by way of `spare`.
    void one_tile(const E* a, const E* b, int kc, bool first, bool last, const Tile<Sum>& at, const E* next) const {
        alignas(64) Sum spare[MR * NR];
        Sum* home = const_cast<Sum*>(at.p);
        if (last && out) fetch(at);
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
