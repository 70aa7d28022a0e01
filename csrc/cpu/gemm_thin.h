// The product for a few rows of A (a small batch), where B is read about as often as it is used: packing it would double the work, so
// these kernels take B as it lies.
//
//   dot    B's k is contiguous (y = x W^T): vectors run along k; DM x DN running sums, added across their lanes at the end
//   tiles  the same on AMX: 32 rows of w are the tiles' rows, straight from memory, and the few rows of x their packed columns
//   turned rows enough to fill vectors: the dense micro-kernel computes C transposed
//   sweep  B's columns are contiguous (dx = dz W): a few rows of B at a time sweep over C, which stays in the cache
#pragma once
#include "gemm.h"
#include "gemm_bf16.h"

// Lane l is the sum of the lanes of row[l], for as many rows as lanes: each pass halves them.
template <int S = 1, class V, int n> inline V lane_sums(V (&row)[n]) {
    if constexpr (S == n) return row[0];
    else {
#pragma GCC unroll 32
        for (int i = 0; i < n; i += 2 * S) {
            swap_blocks<S>(row[i], row[i + S], std::make_integer_sequence<int, n>{});
            row[i] += row[i + S];
        }
        return lane_sums<2 * S>(row);
    }
}

template <class T, int ROWS = DOT_ROWS> struct Dot {
    using S = compute_t<T>;
    static constexpr bool PAIRS = HAS_PAIR_DOT && std::is_same_v<T, bf16>;  // two k to a lane, as they lie in memory
    static constexpr int L = VL<S>, STEP = PAIRS ? 2 * L : L, STRIP = 32;
    static constexpr int DM = ROWS, DN = ROWS == 1 ? L : 4, SUMS = DM * DN;

    template <class... Lanes> static auto read(const T* p, Lanes... lanes) {
        if constexpr (PAIRS) return load_raw<pairs>(p, lanes...);
        else return load(p, lanes...);
    }
    template <class V> static vec<S> multiply_add(vec<S> acc, V x, V w) {
        if constexpr (PAIRS) return dot_pairs(acc, x, w);
        else return acc + x * w;
    }

    // sums[i * ld + j] = sum_k x[i][k] w[j][k], for i < rows <= DM and j < DN (rows of w past `columns` repeat the last one).
    // Meanwhile `ahead` rows from `next` on, ldn apart and as long, are fetched into L2.
    static void tile(int rows, int columns, int64_t K, const T* x, int64_t ldx, const T* w, int64_t ldw, S* sums, int64_t ld,
                     const T* next, int64_t ldn, int ahead) {
        vec<S> acc[SUMS] = {};
        const T *xs[DM], *ws[DN], *ns[DN];
        for (int i = 0; i < DM; i++) xs[i] = x + std::min(i, rows - 1) * ldx;
        for (int j = 0; j < DN; j++) ws[j] = w + std::min(j, columns - 1) * ldw;
        for (int j = 0; j < DN; j++) ns[j] = j < ahead ? next + j * ldn : xs[0];
        auto step = [&](int64_t k, auto... lanes) {
            decltype(read(w)) wk[DN];
#pragma GCC unroll 16
            for (int j = 0; j < DN; j++) prefetch_l2(ns[j] + k);
#pragma GCC unroll 16
            for (int j = 0; j < DN; j++) wk[j] = read(ws[j] + k, lanes...);
#pragma GCC unroll 16
            for (int i = 0; i < DM; i++) {
                auto xk = read(xs[i] + k, lanes...);
#pragma GCC unroll 16
                for (int j = 0; j < DN; j++) acc[i * DN + j] = multiply_add(acc[i * DN + j], xk, wk[j]);
            }
        };
        int64_t k = 0;
        for (; k + STEP <= K; k += STEP) step(k);
        if (k < K) step(k, int(K - k));
        alignas(64) S total[SUMS];
        for (int s = 0; s < SUMS; s += L) {
            vec<S> square[L];
            for (int i = 0; i < L; i++) square[i] = acc[s + i];
            store(total + s, lane_sums(square));
        }
        for (int i = 0; i < rows; i++) {
            if constexpr (DN == L) store(sums + i * ld, load(total + i * DN), columns);
            else
                for (int j = 0; j < std::min(columns, DN); j++) sums[i * ld + j] = total[i * DN + j];
        }
    }

    // Columns [n0, n0 + columns) of C. A strip of w is read from memory once and from L2 for all further rows of x; so that the memory does
    // not rest meanwhile, the tiles fetch the next strip, a share each.
    template <class Epilogue>
    static void strip(int64_t M, int64_t N, int64_t n0, int columns, int64_t K, const T* x, int64_t ldx, const T* w, int64_t ldw,
                      const Epilogue& epilogue) {
        int64_t tiles = (M + DM - 1) / DM * (STRIP / DN), number = 0;
        for (int64_t m = 0; m < M; m += DM) {
            alignas(64) S sums[DM * STRIP];
            int rows = std::min<int64_t>(DM, M - m);
            for (int j = 0; j < columns; j += DN, number++) {
                int64_t next = std::min(N, n0 + STRIP + number * STRIP / tiles);
                int64_t end = std::min(N, n0 + STRIP + (number + 1) * STRIP / tiles);
                tile(rows, std::min(DN, columns - j), K, x + m * ldx, ldx, w + (n0 + j) * ldw, ldw, sums + j, STRIP,
                     w + next * ldw, ldw, end - next);
            }
            epilogue(Tile<S>{sums, STRIP, m, n0, rows, columns});
        }
    }
};

// C[M, N] = epilogue(x w^T) with x[M][K] and w[N][K], k contiguous in both.
template <class T, class Epilogue, class Parallel>
void dot_product(int64_t M, int64_t N, int64_t K, const T* x, int64_t ldx, const T* w, int64_t ldw, const Epilogue& epilogue,
                 const Parallel& parallel) {
    constexpr int STRIP = Dot<T>::STRIP;
    parallel((N + STRIP - 1) / STRIP, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * STRIP; n < std::min(N, end * STRIP); n += STRIP)
            Dot<T>::strip(M, N, n, std::min<int64_t>(STRIP, N - n), K, x, ldx, w, ldw, epilogue);
    });
}

// The same for M <= 32 in bf16 on AMX: the tiles compute C transposed, w x^T.
template <class Epilogue, class Parallel>
void tile_product(int64_t M, int64_t N, int64_t K, const bf16* x, int64_t ldx, const bf16* w, int64_t ldw, const Epilogue& epilogue,
                  const Parallel& parallel) {
    using Micro = Tiles<bf16, 1>;
    constexpr int W = 32, L = 16;
    bf16* xs = scratch<bf16, 1>(Micro::panel(W, K));
    Micro::pack_b({x, ldx, 1}, M, K, xs);
    int64_t whole = K / Micro::STEP * Micro::STEP;  // the last step, where it is ragged, and the last rows of w go through a panel
    parallel((N + W - 1) / W, [&](int64_t begin, int64_t end) {
        [[maybe_unused]] Micro::Session session;
        bf16* panel = scratch<bf16, 0>(Micro::panel(W, K));
        for (int64_t n = begin * W; n < std::min(N, end * W); n += W) {
            alignas(64) float transposed[W * W], sums[W * W];
            int columns = std::min<int64_t>(W, N - n);
            int64_t direct = columns == W ? whole : 0;
            if (direct) {
                typename Micro::Rows rows{w + n * ldw, ldw * int64_t(sizeof(bf16)), 16 * ldw, 0, Micro::STEP};
                Micro::tile(W, M, direct, rows, xs, transposed, W, false);
            }
            if (direct < K) {
                Micro::pack_a({w + n * ldw + direct, ldw, 1}, columns, K - direct, panel);
                Micro::tile(W, M, K - direct, panel, xs + Micro::panel(W, direct), transposed, W, direct > 0, panel);
            }
            for (int i = 0; i < W; i += L)
                for (int j = 0; j < M; j += L) {
                    vec<float> square[VL<float>];
                    for (int r = 0; r < L; r++) square[r] = load(transposed + (i + r) * W + j);
                    transpose(square);
                    for (int r = 0; r < L; r++) store(sums + (j + r) * W + i, square[r]);
                }
            epilogue(Tile<float>{sums, W, 0, n, int(M), columns});
        }
    });
}

// C[M, N] = epilogue(A w^T) for some dozens of rows: the dense micro-kernel computes C transposed, w A^T. Its rows are those of w, where
// they lie; its columns are A, packed once, for every thread. A strip of the result is turned while it is in the cache.
template <class Micro, class Epilogue, class Parallel>
void turned_product(int64_t M, int64_t N, int64_t K, Reader<typename Micro::Element> A, Block<typename Micro::Element> w,
                    const Epilogue& epilogue, const Parallel& parallel) {
    using E = typename Micro::Element;
    using Sum = typename Micro::Sum;
    using Lane = typename Micro::Lane;
    constexpr int L = VL<Sum>, MR = Micro::MR, NR = Micro::NR, KC = Micro::KC, STRIP = 8 * MR;
    constexpr int64_t PER = sizeof(Lane) / sizeof(E), ALONE = 1 << 16;  // numbers of A up to which nobody helps to pack them
    static_assert(STRIP % L == 0);
    const int64_t wide = round_up(M, NR), deep = Micro::panel(NR, K);
    E* panels = scratch<E, 1>(wide / NR * deep);
    auto pack = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            for (int64_t k = 0; k < K; k += KC) {
                int rows = std::min<int64_t>(NR, M - i * NR), kc = std::min<int64_t>(KC, K - k);
                Micro::pack_b(A(i * NR, rows, k, kc), rows, kc, panels + i * deep + Micro::panel(NR, k));
            }
    };
    if (M * K < ALONE) pack(0, wide / NR);
    else parallel(wide / NR, pack);
    const bool collide = w.ks == 1 && w.rs * sizeof(E) % 4096 == 0;  // numbers of different rows would drive one another out of L1
    parallel(round_up(N, L) / L, [&](int64_t begin, int64_t end) {
        Sum* turned = scratch<Sum, 0>(STRIP * wide);
        Sum* sums = scratch<Sum, 2>(round_up(M, L) * STRIP);
        E* copy = scratch<E, 4>(collide ? MR * (KC + L) : 0);
        for (int64_t n = begin * L; n < std::min(N, end * L); n += STRIP) {
            int columns = std::min<int64_t>(STRIP, std::min(N, end * L) - n);
            for (int64_t k = 0; k < K; k += KC)
                for (int i = 0; i < columns; i += MR) {
                    int rows = std::min(MR, columns - i), kc = std::min<int64_t>(KC, K - k);
                    auto tiles = [&](auto rows_of_w) {
                        for (int64_t m = 0; m < wide; m += NR) {
                            const E* panel = panels + m / NR * deep + Micro::panel(NR, k);
                            Micro::tile_at(rows, kc, rows_of_w, Spaced<Lane>{reinterpret_cast<const Lane*>(panel), NR},
                                           turned + i * wide + m, wide, k > 0, panel);
                        }
                    };
                    Block<E> some{w.p + (n + i) * w.rs + k * w.ks, w.rs, w.ks};
                    if (collide) {
                        for (int r = 0; r < rows; r++) std::copy(some.p + r * w.rs, some.p + r * w.rs + kc, copy + r * (KC + L));
                        some = {copy, KC + L, 1};
                    }
                    if (w.ks == 1) tiles(Strided<Lane>{reinterpret_cast<const Lane*>(some.p), some.rs / PER});
                    else if constexpr (PER == 1) tiles(Spaced<Lane>{some.p, some.ks});
                }
            turn(turned, wide, columns, M, sums, STRIP);
            epilogue(Tile<Sum>{sums, STRIP, 0, n, int(M), columns});
        }
    });
}

// C[M, N] = epilogue(A B) where the columns of B are contiguous. Fma reads them as they lie; PairDot needs pairs of rows, so it packs a
// panel at a time, which stays in the L1 cache.
template <class Micro, class Epilogue, class Parallel>
void sweep_product(int64_t M, int64_t N, int64_t K, Reader<typename Micro::Element> A, Reader<typename Micro::Element> B,
                   const Epilogue& epilogue, const Parallel& parallel) {
    using E = typename Micro::Element;
    using Sum = typename Micro::Sum;
    constexpr bool AS_IT_LIES = std::is_same_v<E, Sum>;
    constexpr int MR = Micro::MR, NR = Micro::NR, STRIP = 16 * NR, ROWS = AS_IT_LIES ? 16 : 32;
    auto rows_of_a = Gemm<Micro>::with_room({0, M, 0, N}, 0, K);
    Gemm<Micro>{M, N, K, A, B, epilogue}.pack_a(rows_of_a, 0, 1);
    parallel((N + STRIP - 1) / STRIP, [&](int64_t begin, int64_t end) {
        Sum* c = scratch<Sum, 2>(round_up(M, MR) * STRIP);
        E* panel = scratch<E, 1>(Micro::panel(NR, ROWS));
        for (int64_t n = begin * STRIP; n < std::min(N, end * STRIP); n += STRIP) {
            int columns = std::min<int64_t>(STRIP, N - n);
            for (int64_t k = 0; k == 0 || k < K; k += ROWS) {
                int kc = std::min<int64_t>(ROWS, K - k);
                Block<E> b = B(n, columns, k, kc);
                for (int j = 0; j < columns; j += NR) {
                    bool direct = AS_IT_LIES && columns - j >= NR;
                    for (int i = 0; direct && i < ROWS; i++)  // the rows that come next
                        for (int v = 0; v < NV; v++) prefetch_l2(b.p + j + (ROWS + i) * b.ks + v * VL<Sum>);
                    if (!direct) Micro::pack_b({b.p + j, 1, b.ks}, std::min(NR, columns - j), kc, panel);
                    for (int64_t m = 0; m < M; m += MR) {
                        int rows = std::min<int64_t>(MR, M - m);
                        const E* a = rows_of_a.a_panel(m, k);
                        Sum* at = c + m * STRIP + j;
                        if constexpr (AS_IT_LIES)
                            Micro::tile_at(rows, kc, Spaced<E>{a, MR}, Spaced<E>{direct ? b.p + j : panel, direct ? b.ks : NR}, at, STRIP, k > 0, a);
                        else
                            Micro::tile(rows, NR, kc, a, panel, at, STRIP, k > 0, a);
                    }
                }
            }
            epilogue(Tile<Sum>{c, STRIP, 0, n, int(M), columns});
        }
    });
}
