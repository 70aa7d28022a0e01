// The product for a few rows of A (a small batch), where B is read about as often as it is used: packing it would double the work, so
// both kernels take B as it lies.
//
//   dot    B's k is contiguous (y = x W^T): vectors run along k; DM x DN running sums, added across their lanes at the end
//   sweep  B's columns are contiguous (dx = dz W): a few rows of B at a time sweep over C, which stays in the cache
#pragma once
#include "gemm.h"

template <class T> struct Dot {
    using S = compute_t<T>;
    static constexpr int DM = DOT_ROWS, DN = 4, SUMS = DM * DN, L = VL<S>, STRIP = 32;

    // sums[i * ld + j] = sum_k x[i][k] w[j][k], for i < rows <= DM and j < DN (rows of w past `columns` repeat the last one)
    static void tile(int rows, int columns, int64_t K, const T* x, int64_t ldx, const T* w, int64_t ldw, S* sums, int64_t ld) {
        vec<S> acc[SUMS] = {};
        const T *xs[DM], *ws[DN];
        for (int i = 0; i < DM; i++) xs[i] = x + std::min(i, rows - 1) * ldx;
        for (int j = 0; j < DN; j++) ws[j] = w + std::min(j, columns - 1) * ldw;
        auto step = [&](int64_t k, auto... lanes) {
            vec<S> wk[DN];
#pragma GCC unroll 4
            for (int j = 0; j < DN; j++) wk[j] = load(ws[j] + k, lanes...);
#pragma GCC unroll 4
            for (int i = 0; i < DM; i++) {
                vec<S> xk = load(xs[i] + k, lanes...);
#pragma GCC unroll 4
                for (int j = 0; j < DN; j++) acc[i * DN + j] += xk * wk[j];
            }
        };
        int64_t k = 0;
        for (; k + L <= K; k += L) step(k);
        if (k < K) step(k, int(K - k));
        alignas(64) S total[SUMS];
        for (int s = 0; s < SUMS; s += L) {  // lane l of the sum of the transposed rows is the sum over the lanes of acc[s + l]
            vec<S> square[L], sum{};
            for (int i = 0; i < L; i++) square[i] = acc[s + i];
            transpose(square);
            for (int i = 0; i < L; i++) sum += square[i];
            store(total + s, sum);
        }
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) sums[i * ld + j] = total[i * DN + j];
    }

    template <class Epilogue>
    static void strip(int64_t M, int64_t n0, int columns, int64_t K, const T* x, int64_t ldx, const T* w, int64_t ldw, const Epilogue& epilogue) {
        for (int64_t m = 0; m < M; m += DM) {
            alignas(64) S sums[DM * STRIP];
            int rows = std::min<int64_t>(DM, M - m);
            for (int j = 0; j < columns; j += DN)
                tile(rows, std::min(DN, columns - j), K, x + m * ldx, ldx, w + (n0 + j) * ldw, ldw, sums + j, STRIP);
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
            Dot<T>::strip(M, n, std::min<int64_t>(STRIP, N - n), K, x, ldx, w, ldw, epilogue);
    });
}

// C[M, N] = epilogue(A B) where the columns of B are contiguous.
template <class E, class Epilogue, class Parallel>
void sweep_product(int64_t M, int64_t N, int64_t K, Reader<E> A, Reader<E> B, const Epilogue& epilogue, const Parallel& parallel) {
    using Micro = Fma<E>;
    constexpr int MR = Micro::MR, NR = Micro::NR, STRIP = 16 * NR, ROWS = 16;
    int64_t padded = round_up(M, MR);
    E* a = scratch<E, 0>(padded * K + MR);
    for (int64_t m = 0; m < M; m += MR)
        for (int64_t k = 0; k < K; k += Micro::KC) {
            int rows = std::min<int64_t>(MR, M - m), kc = std::min<int64_t>(Micro::KC, K - k);
            Micro::pack_a(A(m, rows, k, kc), rows, kc, a + m * K + k * MR);
        }
    parallel((N + STRIP - 1) / STRIP, [&](int64_t begin, int64_t end) {
        E *c = scratch<E, 2>(padded * STRIP), *edge = scratch<E, 1>(ROWS * NR);
        for (int64_t n = begin * STRIP; n < std::min(N, end * STRIP); n += STRIP) {
            int columns = std::min<int64_t>(STRIP, N - n);
            for (int64_t k = 0; k == 0 || k < K; k += ROWS) {
                int kc = std::min<int64_t>(ROWS, K - k);
                Block<E> b = B(n, columns, k, kc);
                for (int j = 0; j < columns; j += NR) {
                    const E* from = b.p + j;
                    int64_t ldb = b.ks;
                    if (columns - j < NR) Micro::pack_b({from, 1, ldb}, columns - j, kc, edge), from = edge, ldb = NR;
                    for (int64_t m = 0; m < M; m += MR)
                        Micro::tile(std::min<int64_t>(MR, M - m), kc, a + m * K + k * MR, from, ldb, c + m * STRIP + j, STRIP, k > 0);
                }
            }
            epilogue(Tile<E>{c, STRIP, 0, n, int(M), columns});
        }
    });
}
