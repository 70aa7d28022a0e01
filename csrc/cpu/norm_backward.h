// The backward of norm.h. With g = dy w:
//
//   dx = rstd (g - c1 - x^ c2) + dsum      c1 = mean of g over the row (0 where x is not centred),  c2 = mean of g x^
//   dweight = sum over rows of dy x^       dbias = sum over rows of dy
//
// A row is looked at twice: for its sums and its part of the columns' sums, then for dx; only the first look goes to memory.
//
//   up to LONG columns   a group of rows is one task. The columns' sums of a group are its own until all groups are added in order. Where
//                        they do not fit the L1 cache beside a row, ROWS rows are summed together, so that they pass by less often
//   longer rows          batches of rows: (row, block) are summed, then each block of columns maps all rows of the batch and sums them
#pragma once
#include "norm.h"

constexpr int64_t LONG = 16384;                  // up to here ROWS rows of x and dy, and the sums of their columns, stay in the L2 cache
constexpr int64_t SHORT = 1024;                  // up to here a row and the sums of its columns stay in the L1 cache
constexpr int64_t GROUP_ROWS = 16, GROUPS = 64;  // at least so many rows are a group, and there are at most so many groups
constexpr int ROWS = 4;
enum Slot { GROUP_SUMS = 4, COLUMN_SUMS };

template <class T, class W> struct NormBackward : Norm<T, W> {
    using Base = Norm<T, W>;
    using typename Base::C;
    using typename Base::V;
    using Base::M, Base::N, Base::x, Base::weight, Base::rstd;
    const T *dy, *dsum;  // dsum may be null
    T* dx;               // these three may be null
    W *dweight, *dbias;

    struct Sums { C g, gx; };  // of a row: g and g x^

    // The sums of R rows over columns [begin, end), and the columns' own: added to dw and db, which lie from `begin` on, or their start.
    // Either may be null.
    template <int R> void sum_rows(int64_t m, int64_t begin, int64_t end, C* dw, C* db, bool start, Sums* out) const {
        Row<C> row[R];
        for (int r = 0; r < R; r++) row[r] = this->row(m + r);
        V g[R] = {}, gx[R] = {};
        each_vector<C, 1>(begin, end, [&](int, int64_t n, int lanes) INLINE {
            V w = load_or(weight, n, lanes, C(1)), column{}, column_x{};
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                V d = load(dy + (m + r) * N + n, lanes), normal = row[r].normalised(load(x + (m + r) * N + n, lanes));
                g[r] += d * w, gx[r] += d * w * normal;
                column += d, column_x += d * normal;
            }
            if (dw) store(dw + n - begin, start ? column_x : load(dw + n - begin) + column_x);
            if (db) store(db + n - begin, start ? column : load(db + n - begin) + column);
        });
        for (int r = 0; r < R; r++) out[r] = {sum(g[r]), sum(gx[r])};
    }

    // dx in columns [begin, end) of row m from its sums.
    void map_row(int64_t m, int64_t begin, int64_t end, Sums sums) const {
        const Row<C> row = this->row(m);
        const V c1 = set(this->centred() ? sums.g / C(N) * rstd[m] : C(0)), c2 = set(sums.gx / C(N) * rstd[m]);
        const Destination to(dx, M * N * sizeof(T), N * sizeof(T));
        each_vector<C, 1>(begin, end, [&](int, int64_t n, int lanes) INLINE {
            const int64_t at = m * N + n;
            V normal = row.normalised(load(x + at, lanes)), w = load_or(weight, n, lanes, C(1));
            V d = load(dy + at, lanes) * w * row.rstd - c1 - normal * c2;
            to.store(dx + at, dsum ? d + load(dsum + at, lanes) : d, lanes);
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
                for (; N > SHORT && m + ROWS <= stop; m += ROWS) rows_of_group<ROWS>(m, dw, db, m == i * group, finish);
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
        for (int r = 0; r < R; r++) map_row(m + r, 0, N, sums[r]), finish(m + r, 0, N);
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
                    int64_t b = i % blocks;
                    sum_rows<1>(first + i / blocks, b * BLOCK, end_of(b), nullptr, nullptr, false, &found[i]);
                }
            });
            for (int64_t i = 0; i < count; i++)
                for (int64_t b = 1; b < blocks; b++)
                    found[i * blocks].g += found[i * blocks + b].g, found[i * blocks].gx += found[i * blocks + b].gx;
            parallel(blocks, [&](int64_t begin, int64_t end) {
                for (int64_t b = begin; b < end; b++) {
                    C *dw = dweight ? columns + b * BLOCK : nullptr, *db = dbias ? columns + (blocks + b) * BLOCK : nullptr;
                    for (int64_t i = 0; i < count; i++) {
                        const int64_t m = first + i;
                        Sums unused;
                        if (dw || db) sum_rows<1>(m, b * BLOCK, end_of(b), dw, db, m == 0, &unused);
                        if (dx) map_row(m, b * BLOCK, end_of(b), found[i * blocks]), finish(m, b * BLOCK, end_of(b));
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
