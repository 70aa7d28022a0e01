// The backward of norm.h. With g = dy w:
//
//   dx = rstd (g - c1 - x^ c2) + dsum      c1 = mean of g over the row (0 where x is not centred),  c2 = mean of g x^
//   dweight = sum over rows of dy x^       dbias = sum over rows of dy
//
//   up to LONG columns   a group of rows is one task: each row is summed, then mapped, and the columns' sums of a group are its own until
//                        all groups are added in order
//   longer rows          batches of rows: (row, block) are summed, then each block of columns maps all rows of the batch and sums them
#pragma once
#include "norm.h"

template <class T, class W> struct NormBackward : Norm<T, W> {
    using Base = Norm<T, W>;
    using typename Base::C;
    using typename Base::V;
    using Base::M, Base::N, Base::x, Base::weight, Base::rstd;
    const T *dy, *dsum;  // dsum may be null
    T* dx;               // these three may be null
    W *dweight, *dbias;

    struct Sums { C g, gx; };  // of a row: g and g x^

    // Adds to columns [begin, end) of column sums dw and db, which lie from `begin` on; or starts them. Either may be null.
    template <int R> void sum_rows(int64_t m, int64_t begin, int64_t end, C* dw, C* db, bool start, Sums (&out)[R]) const {
        const Rows<C, R> row = this->template rows<R>(m);
        V g[R] = {}, gx[R] = {};
        each_vector<C, 1>(begin, end, [&](int, int64_t n, int lanes) INLINE {
            V w = load_or(weight, n, lanes, C(1)), column{}, column_x{};
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                V d = load(dy + (m + r) * N + n, lanes), normal = row.normalised(r, load(x + (m + r) * N + n, lanes));
                g[r] += d * w, gx[r] += d * w * normal;
                column += d, column_x += d * normal;
            }
            if (dw) store(dw + n - begin, start ? column_x : load(dw + n - begin) + column_x);
            if (db) store(db + n - begin, start ? column : load(db + n - begin) + column);
        });
        for (int r = 0; r < R; r++) out[r] = {sum(g[r]), sum(gx[r])};
    }

    // dx in columns [begin, end) of rows m, m + 1, ... from their sums; fetches the rows after them.
    template <int R> void map_rows(int64_t m, int64_t begin, int64_t end, const Sums (&sums)[R]) const {
        const Rows<C, R> row = this->template rows<R>(m);
        V c1[R], c2[R];
        for (int r = 0; r < R; r++) {
            c1[r] = set(this->centred() ? sums[r].g / C(N) * rstd[m + r] : C(0));
            c2[r] = set(sums[r].gx / C(N) * rstd[m + r]);
        }
        each_vector<C, 1>(begin, end, [&](int, int64_t n, int lanes) INLINE {
            V w = load_or(weight, n, lanes, C(1));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int64_t at = (m + r) * N + n;
                prefetch_l2(dy + at + R * N), prefetch_l2(x + at + R * N);
                V normal = row.normalised(r, load(x + at, lanes));
                V d = load(dy + at, lanes) * w * row.rstd[r] - c1[r] - normal * c2[r];
                store(dx + at, dsum ? d + load(dsum + at, lanes) : d, lanes);
            }
        });
    }

    // finish(m, begin, end) runs when these numbers of dx are there.
    template <class Finish> void run(const Finish& finish) const {
        if (M == 0) {
            for (W* sums : {dweight, dbias}) std::fill(sums, sums + (sums ? N : 0), W{});
            return;
        }
        if (N > LONG || (N > BLOCK && M < 2 * GROUP_ROWS)) return batches(finish);
        const int64_t group = std::max(GROUP_ROWS, ceil_div(ceil_div(M, GROUPS), ROWS) * ROWS), groups = ceil_div(M, group);
        const int64_t ld = round_up(N, VL<C>), kinds = (dweight != nullptr) + (dbias != nullptr);
        C* partial = kinds ? scratch<C, GROUP_SUMS>(groups * kinds * ld) : nullptr;
        const bool serial = M * N <= SERIAL_NUMBERS;
        parallel(groups, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                C* dw = dweight ? partial + i * kinds * ld : nullptr;
                C* db = dbias ? partial + (i * kinds + (kinds - 1)) * ld : nullptr;
                int64_t m = i * group, stop = std::min(M, m + group);
                for (; m + ROWS <= stop; m += ROWS) rows_of_group<ROWS>(m, dw, db, m == i * group, finish);
                for (; m < stop; m++) rows_of_group<1>(m, dw, db, m == i * group, finish);
            }
        }, serial);
        if (dweight) add_groups(partial, groups, kinds * ld, dweight, serial);
        if (dbias) add_groups(partial + (kinds - 1) * ld, groups, kinds * ld, dbias, serial);
    }

    template <int R, class Finish> void rows_of_group(int64_t m, C* dw, C* db, bool start, const Finish& finish) const {
        Sums sums[R];
        sum_rows<R>(m, 0, N, dw, db, start, sums);
        if (!dx) return;
        map_rows<R>(m, 0, N, sums);
        for (int r = 0; r < R; r++) finish(m + r, 0, N);
    }

    void add_groups(const C* partial, int64_t groups, int64_t stride, W* out, bool serial) const {
        constexpr int64_t WIDTH = 512;
        parallel(ceil_div(N, WIDTH), [&](int64_t begin, int64_t end) {
            each_vector<C, 1>(begin * WIDTH, std::min(N, end * WIDTH), [&](int, int64_t n, int lanes) INLINE {
                V total = load(partial + n);
                for (int64_t i = 1; i < groups; i++) total += load(partial + i * stride + n);
                store(out + n, total, lanes);
            });
        }, serial);
    }

    template <class Finish> void batches(const Finish& finish) const {
        const int64_t blocks = ceil_div(N, BLOCK), batch = std::max<int64_t>(1, BATCH_BYTES / (2 * N * int64_t(sizeof(T))));
        std::vector<Sums> found(std::min(M, batch) * blocks);
        C* columns = dweight || dbias ? scratch<C, COLUMN_SUMS>(2 * blocks * BLOCK) : nullptr;
        for (int64_t first = 0; first < M; first += batch) {
            const int64_t count = std::min(batch, M - first);
            auto end_of = [&](int64_t b) { return std::min(N, (b + 1) * BLOCK); };
            parallel(count * blocks, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) {
                    Sums one[1];
                    sum_rows<1>(first + i / blocks, i % blocks * BLOCK, end_of(i % blocks), nullptr, nullptr, false, one);
                    found[i] = one[0];
                }
            });
            for (int64_t i = 0; i < count; i++)
                for (int64_t b = 1; b < blocks; b++)
                    found[i * blocks].g += found[i * blocks + b].g, found[i * blocks].gx += found[i * blocks + b].gx;
            parallel(blocks, [&](int64_t begin, int64_t end) {
                for (int64_t b = begin; b < end; b++) {
                    C *dw = dweight ? columns + b * BLOCK : nullptr, *db = dbias ? columns + (blocks + b) * BLOCK : nullptr;
                    for (int64_t i = 0; i < count; i++) {
                        Sums unused[1], one[1] = {found[i * blocks]};
                        if (dw || db) sum_rows<1>(first + i, b * BLOCK, end_of(b), dw, db, first + i == 0, unused);
                        if (dx) map_rows<1>(first + i, b * BLOCK, end_of(b), one), finish(first + i, b * BLOCK, end_of(b));
                    }
                    if (first + count < M) continue;
                    each_vector<C, 1>(b * BLOCK, end_of(b), [&](int, int64_t n, int lanes) INLINE {
                        if (dweight) store(dweight + n, load(dw + n - b * BLOCK), lanes);
                        if (dbias) store(dbias + n, load(db + n - b * BLOCK), lanes);
                    });
                }
            });
        }
    }
};
