// The products of qkv_projection.cpp: queries, keys and values from one, queries and keys turned by the angles of their positions.
//
//   forward   C[m,n] = sum_k x[m,k] W[n,k], the rows of the three weights one below the other; its epilogue adds the bias, turns, stores
//   dz        the gradients of q and k turned back and that of v, side by side in one matrix, and their column sums: one pass
//   dx        C[m,k] = sum_n dz[m,n] W[n,k]
//   dweight   C[n,k] = sum_m dz[m,n] x[m,k]
//
// A pair must meet in a tile to be turned there, and the halves of a head do not. So the columns of the product are not in the order of the
// weights' rows: the reader hands out p and p + P as 2p and 2p + 1, neighbours, which no tile of even width parts; the epilogue sorts
// them into two vectors. An odd head gets a column more, of zeros. Where there are few rows (a token that is being written) columns stay
// in their order, and the rows are turned when they are whole: copying weights into another order would take longer.
#pragma once
#include <array>

#include "product.h"
#include "rotation.h"
#include "rows.h"

constexpr int PARTS = 3;  // q, k, v

// ---- the three matrices as one ----------------------------------------------------------------------------------------------------

// Matrices of K columns, their rows contiguous, one below the other.
template <class T> struct Stack {
    std::array<Matrix<T>, PARTS> part{};
    std::array<int64_t, PARTS + 1> begin{};  // of the rows of each

    int part_of(int64_t n) const { return n < begin[1] ? 0 : n < begin[2] ? 1 : 2; }
    const T* row(int64_t n) const {
        int i = part_of(n);
        return part[i].p + (n - begin[i]) * part[i].rs;
    }
    // Rows n0 to n0 + rows as they lie, columns k0 to k0 + kc; only if they are of one part.
    bool within(int64_t n0, int64_t rows) const { return n0 + rows <= begin[part_of(n0) + 1]; }
    Matrix<T> from(int64_t n0) const { return {const_cast<T*>(row(n0)), part[part_of(n0)].rs, 1}; }
};

// Numbers k0 to k0 + kc of some rows, copied into scratch: row(i) says where the i-th of them begins, null for one of zeros.
template <class E, class Row> Block<E> gather(int rows, int64_t k0, int kc, const Row& row) {
    constexpr int L = VL<E>, NEXT = 128;
    int64_t ld = round_up(kc, L) + L;  // rows a power of two apart would compete for the same lines of the cache
    E* out = scratch<E, READ>(rows * ld);
    for (int i = 0; i < rows; i++) {
        const auto* from = row(i);
        E* to = out + i * ld;
        if (!from) {
            memset(to, 0, kc * sizeof(E));
            continue;
        }
        from += k0;
        for (int j = 0; j < kc; j += L) {
            prefetch_l2(from + NEXT + j);  // what is read after these
            if constexpr (!std::is_same_v<decltype(from), const E*>) store(to + j, load(from + j, kc - j));
            else if (kc - j >= L) memcpy(to + j, from + j, L * sizeof(E));
            else memcpy(to + j, from + j, (kc - j) * sizeof(E));
        }
    }
    return {out, ld, 1};
}

// ---- forward ----------------------------------------------------------------------------------------------------------------------

template <class T> struct Forward {
    using C = compute_t<T>;
    using E = element_of<T>;
    int64_t M, K;
    Matrix<T> x;
    Stack<T> weights;
    Rotation rotation;
    std::array<const T*, PARTS> bias;  // null where there is none
    std::array<T*, PARTS> out;
    const C *cos, *sin;
    int64_t places;  // rows of angles: that of row m is m % places

    int64_t D() const { return rotation.D; }
    int64_t width() const { return rotation.P ? D() + D() % 2 : D(); }  // columns of a head
    int64_t columns() const { return weights.begin[PARTS] / D() * width(); }
    bool turned(int part) const { return rotation.P && part < 2; }
    // The row of the weights that is column n of the product, or -1.
    int64_t source(int64_t n) const {
        int64_t head = n / width(), d = n % width(), first = head * D();
        if (d == D()) return -1;
        bool moved = d < 2 * rotation.P && !rotation.interleaved && turned(weights.part_of(first));
        return first + (moved ? d / 2 + d % 2 * rotation.P : d);
    }

    Block<E> read_weights(int64_t n0, int rows, int64_t k0, int kc) const {
        bool as_it_lies = width() == D() && weights.within(n0, rows) && (rotation.interleaved || !turned(weights.part_of(n0)));
        if (as_it_lies) return read<E>(weights.from(n0), 0, rows, k0, kc);
        return gather<E>(rows, k0, kc, [&](int i) {
            int64_t n = source(n0 + i);
            return n < 0 ? nullptr : weights.row(n);
        });
    }

    void run() const {
        const bool gathers = rotation.P && !rotation.interleaved;  // which takes as long as to turn K / 4 rows, or more
        if (is_thin<T>(M, K) || (gathers && M < K / 4)) return run_by_rows();
        std::vector<C> biases(bias[0] || bias[1] || bias[2] ? columns() : 0);
        for (int64_t n = 0; n < int64_t(biases.size()); n++)
            if (int64_t from = source(n), part = weights.part_of(from); from >= 0 && bias[part])
                biases[n] = load(bias[part] + from - weights.begin[part], 1)[0];
        auto B = [this](int64_t n0, int rows, int64_t k0, int kc) { return read_weights(n0, rows, k0, kc); };
        multiply<T>(M, columns(), K, reader<E>(x), B, static_cast<C*>(nullptr), [&](const auto& t) {
            for (int j = 0, n; j < t.columns; j += n) {  // a stretch of a head, of columns that are all turned or all copied
                int64_t head = (t.n + j) / width(), d = (t.n + j) % width();
                int part = weights.part_of(head * D());
                bool turn = turned(part) && d < 2 * rotation.P;
                n = int(std::min<int64_t>(t.columns - j, (turn ? 2 * rotation.P : width()) - d));
                T* to = out[part] + head * D() - weights.begin[part];
                const C* b = biases.empty() ? nullptr : biases.data() + t.n + j;
                if (turn) store_pairs(t, j, n, b, to, part, d / 2);
                else store_rest(t, j, int(std::min<int64_t>(n, D() - d)), b, to + d, part);
            }
        });
    }
    // The n columns of a tile from the j-th on are pairs p, p + 1, ... of a head whose first row is y.
    template <class Tile> void store_pairs(const Tile& t, int j, int n, const C* b, T* y, int part, int64_t p) const {
        constexpr int L = VL<C>;
        const int64_t ld = weights.begin[part + 1] - weights.begin[part];
        for (int i = 0; i < n; i += 2 * L, p += L) {
            int count = std::min(L, (n - i) / 2);
            Pairs<C> shift = b ? Pairs<C>::load_neighbours(b + i, count) : Pairs<C>{};
            int64_t place = t.m % places;
            for (int m = 0; m < t.rows; m++) {
                Pairs<C> v = Pairs<C>::load_neighbours(t.p + m * t.ld + j + i, count);
                v.a += shift.a, v.b += shift.b;
                rotation.put(v.turned(load(cos + place * rotation.P + p, count), load(sin + place * rotation.P + p, count)),
                             y + (t.m + m) * ld, p, count);
                if (++place == places) place = 0;
            }
        }
    }
    template <class Tile> void store_rest(const Tile& t, int j, int n, const C* b, T* y, int part) const {
        const int64_t ld = weights.begin[part + 1] - weights.begin[part];
        for (int i = 0; i < n; i += VL<C>) {
            vec<C> shift = b ? load(b + i, n - i) : vec<C>{};
            for (int m = 0; m < t.rows; m++) store(y + (t.m + m) * ld + i, load(t.p + m * t.ld + j + i, n - i) + shift, n - i);
        }
    }

    // A few rows: three products, whose rows are turned when they are whole, where they lie or, of half types, on their way there.
    void run_by_rows() const {
        constexpr bool IN_PLACE = std::is_same_v<T, C>;
        for (int part = 0; part < PARTS; part++) {
            const int64_t N = weights.begin[part + 1] - weights.begin[part];
            C* z;
            if constexpr (IN_PLACE) z = out[part];
            else z = scratch<C, 5>(M * N);
            auto add_bias = [=, b = bias[part]](const auto& t) {
                for (int i = 0; i < t.rows; i++)
                    for (int j = 0; j < t.columns; j += VL<C>) {
                        vec<C> v = load(t.p + i * t.ld + j);
                        store(z + (t.m + i) * N + t.n + j, b ? v + load(b + t.n + j, t.columns - j) : v, t.columns - j);
                    }
            };
            if (N) multiply_rows(M, N, K, x, weights.part[part], static_cast<C*>(nullptr), add_bias);
            if (IN_PLACE && !turned(part)) continue;
            const Rotation how{turned(part) ? rotation.P : 0, D(), rotation.interleaved};
            each_row(M, N, [=, this](int64_t m) {
                const int64_t place = m % places * how.P;
                for (int64_t n = m * N; n < (m + 1) * N; n += D()) how.row(z + n, out[part] + n, cos + place, sin + place);
            });
        }
    }
};

// ---- backward ---------------------------------------------------------------------------------------------------------------------

template <class T> struct Backward {
    using C = compute_t<T>;
    using E = element_of<T>;
    struct Head {  // where its gradient lies, by batch and place, and where its columns of dbias go, or null
        const T* p;
        int64_t batch, place;
        bool turned;
        T* dbias;
    };
    int64_t M, K, places_of_x;  // T rows of x, and of a head, are a sequence
    Rotation rotation;
    std::vector<Head> heads;
    const C *cos, *sin;
    int64_t places;
    T* dz;  // [M, N]
    int64_t N() const { return int64_t(heads.size()) * rotation.D; }

    // Each thread owns strips of heads and goes through their rows in order.
    void form_dz() const {
        constexpr int64_t WIDEST = 64 * VL<C>;  // a row of a strip and its sums stay in the L1 cache
        const int64_t D = rotation.D, count = int64_t(heads.size());
        const int64_t strip = std::max<int64_t>(1, std::min(WIDEST / D, ceil_div(count, threads())));
        const Rotation copy{0, D, false};
        auto strips = [&](int64_t begin, int64_t end) {
            std::vector<C> sums(round_up(strip * D, VL<C>));
            for (int64_t h0 = begin * strip; h0 < std::min(count, end * strip); h0 += strip) {
                int64_t h1 = std::min(count, h0 + strip), columns = (h1 - h0) * D;
                bool summed = std::any_of(heads.begin() + h0, heads.begin() + h1, [](const Head& head) { return head.dbias; });
                std::fill(sums.begin(), sums.end(), C(0));
                for (int64_t m = 0; m < M; m++) {
                    int64_t b = m / places_of_x, t = m % places_of_x, angle = m % places * rotation.P;
                    T* to = dz + m * N() + h0 * D;
                    for (int64_t h = h0; h < h1; h++)
                        (heads[h].turned ? rotation : copy)
                            .row(heads[h].p + b * heads[h].batch + t * heads[h].place, to + (h - h0) * D, cos + angle, sin + angle);
                    for (int64_t j = 0; summed && j < columns; j += VL<C>)
                        store(&sums[j], load(&sums[j]) + load(to + j, int(std::min<int64_t>(VL<C>, columns - j))));
                }
                for (int64_t h = h0; h < h1; h++)
                    for (int64_t d = 0; heads[h].dbias && d < D; d++) store(heads[h].dbias + d, set(sums[(h - h0) * D + d]), 1);
            }
        };
        parallel(ceil_div(count, strip), strips, M * N() < 1 << 16);
    }

    void input_gradient(const Stack<T>& weights, T* dx) const {
        auto A = [this](auto element) { return reader<decltype(element)>(Matrix<T>{dz, N(), 1}); };
        auto B = [&](auto element) {
            using Element = decltype(element);
            return [&](int64_t k0, int columns, int64_t n0, int count) {
                if (weights.within(n0, count)) return read<Element>(weights.from(n0).transposed(), k0, columns, 0, count);
                auto block = gather<Element>(count, k0, columns, [&](int i) { return weights.row(n0 + i); });
                return Block<Element>{block.p, 1, block.rs};
            };
        };
        multiply_columns<T>(M, K, N(), A, B, true, dx, [=, this](const auto& t) { store_tile(t, dx, K); });
    }

    // Of the columns of dz from n0 on, a row of the weights each; `to` has a matrix for every part of them.
    void weight_gradient(Matrix<T> x, int64_t n0, int64_t rows, const Stack<T>& weights, std::array<T*, PARTS> to) const {
        Matrix<T> slopes{dz + n0, N(), 1};
        multiply<T>(rows, K, M, reader<E>(slopes.transposed()), reader<E>(x.transposed()), static_cast<C*>(nullptr), [=, this](auto t) {
            const int64_t end = t.m + t.rows;
            for (; t.m < end; t.m += t.rows, t.p += t.rows * t.ld) {  // parts may meet within a tile
                int part = weights.part_of(n0 + t.m);
                t.rows = int(std::min(end, weights.begin[part + 1] - n0) - t.m);
                T* first = to[part] + (n0 - weights.begin[part]) * K;
                store_tile(t, first, K);
                for (int64_t i = t.m, next = t.n + t.columns; i < t.m + t.rows; i++)  // lines of the tile beside, mostly the next
                    for (int64_t k = next; k < std::min(K, next + t.columns); k += 64 / int64_t(sizeof(T)))
                        __builtin_prefetch(first + i * K + k, 1);
            }
        });
    }
};
