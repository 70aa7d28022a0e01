// Winograd's F(2x2, 3x3): filters of 3 x 3 taps and step 1, by 16 multiplications for a square of 2 x 2 places in the place of 36.
//
//   forward, dx   y  = A^T [ sum_channels (G g G^T) . (B^T d B) ] A       d: 4x4 pixels   g: 3x3 taps   y: 2x2 places   . number by number
//   dweight       dg = G^T [ sum_squares  (A dy A^T) . (B^T d B) ] G      the derivative of the same form with respect to g
//
//   B^T = 1  0 -1  0      G =  1    0    0       A^T = 1  1  1  0
//         0  1  1  0          1/2  1/2  1/2            0  1 -1 -1
//         0 -1  1  0          1/2 -1/2  1/2
//         0  1  0 -1           0    0    1
//
// For a strip of squares, each of the 16 numbers is a product of its own: met[e] [squares][channels] times filters[e] [channels][NR]. The
// sums are those of a direct convolution but for rounding, which is that of the largest number in the square. Where a sum is not finite,
// what spoiled it may belong to another place of the square: the attempt is given up, and the direct kernel decides.
// After A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
#pragma once
#include "slide.h"

enum { MET = 0, SUMS = 2, SQUARES = 4, TAPS = 4, SLOPES = 5 };  // scratch slots

// One dimension of the transforms.
constexpr auto pixel_line = [](const auto (&d)[4], auto (&to)[4]) INLINE {  // B^T
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
};
constexpr auto tap_line = [](const auto (&g)[3], auto (&to)[4]) INLINE {  // G
    auto ends = (g[0] + g[2]) / 2, middle = g[1] / 2;
    to[0] = g[0], to[1] = ends + middle, to[2] = ends - middle, to[3] = g[2];
};
constexpr auto tap_line_back = [](const auto (&u)[4], auto (&to)[3]) INLINE {  // G^T
    auto both = (u[1] + u[2]) / 2;
    to[0] = u[0] + both, to[1] = (u[1] - u[2]) / 2, to[2] = both + u[3];
};
constexpr auto place_line = [](const auto (&m)[4], auto (&to)[2]) INLINE {  // A^T
    to[0] = m[0] + m[1] + m[2], to[1] = m[1] - m[2] - m[3];
};
constexpr auto place_line_back = [](const auto (&y)[2], auto (&to)[4]) INLINE {  // A
    to[0] = y[0], to[1] = y[0] + y[1], to[2] = y[0] - y[1], to[3] = -y[1];
};
// out = line in line^T for N x N vectors: number (i, j) of vector v from at(i, j), to put(i, j, v).
template <int N, int M, class V, class Line, class At, class Put>
INLINE inline void transform(const Line& line, const At& at, const Put& put) {
    V half[M][N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
        V in[N], out[M];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) in[i] = at(i, j);
        line(in, out);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) half[i][j] = out[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
        V out[M];
        line(half[i], out);
#pragma GCC unroll 4
        for (int j = 0; j < M; j++) put(i, j, out[j]);
    }
}

template <class S> struct NotFinite {
    vec<S> zeros{};
    INLINE vec<S> see(vec<S> v) {
        zeros += v * 0;
        return v;
    }
    bool any() const {
        for (int i = 0; i < VL<S>; i++)
            if (zeros[i] != 0) return true;
        return false;
    }
};

// The squares of a band of rows of places, numbered along its rows and images.
struct Squares {
    int64_t rows, columns;  // of an image in the band
    int64_t in_image() const { return rows * columns; }
    Place at(int64_t t) const { return {t / in_image(), t / columns % rows, t % columns}; }

    // out[e][t][c]: squares [begin, begin + count) of N x N pixels of the grid, transformed; `apart` numbers to a t, `all` of them to an e.
    template <int N, class Line, class Grid, class S>
    void met(const Line& line, const Grid& grid, int64_t begin, int64_t count, S* out, int64_t all, int64_t apart) const {
        for (int64_t t = 0; t < count; t++) {
            Place square = at(begin + t);
            const S* pixel = grid.p + square.n * grid.size() + grid.place(2 * square.i, 2 * square.l);
            for (int64_t c = 0; c < grid.width; c += VL<S>)
                transform<N, 4, vec<S>>(line, [&](int i, int j) INLINE { return load(pixel + (i * grid.columns + j) * grid.width + c); },
                                        [&](int i, int j, vec<S> v) INLINE { store(out + ((i * 4 + j) * all + t) * apart + c, v); });
        }
    }
};

inline bool is_3x3(const Axis& h, const Axis& w) {
    auto three = [](const Axis& axis) { return axis.taps() == 3 && axis.step == 1 && axis.at[1] == axis.at[0] + 1; };
    return three(h) && three(w);
}

template <class T, Memory MEMORY> struct Winograd {
    using S = compute_t<T>;
    using Micro = Fma<S>;
    using Grid = Pixels<T, MEMORY, S>;
    static constexpr int MR = Micro::MR, NR = Micro::NR;
    static constexpr int64_t STRIP_BYTES = 512 << 10, DEEP = 1024 / sizeof(S);
    int64_t groups;
    const Filters<T>& filters;
    const Images<T, MEMORY>& images;
    const Bank<T, MEMORY>& bank;
    int64_t C = images.channels, M = filters.M, panels = ceil_div(M, NR), apart = round_up(C, VL<S>) + (C % 256 ? 0 : VL<S>);
    int64_t most = std::clamp<int64_t>(STRIP_BYTES / (16 * apart * sizeof(S)) / MR, 2, 16) * MR;  // squares in a strip

    // False where a sum is not finite.
    bool run() const {
        Span h = span(bank.h), w = span(bank.w);
        Squares image{ceil_div(bank.result.I, 2), ceil_div(bank.result.L, 2)};
        int64_t width = round_up(C, VL<S>), bytes_in_row = 2 * w.pixels(2 * image.columns) * width * int64_t(sizeof(S));
        int64_t rows = rows_in_band(h, bytes_in_row, image.rows, groups * images.images);
        Grid grid{images, h, w, 2 * rows, 2 * image.columns, width};
        int64_t bands = ceil_div(image.rows, rows);
        if (bands == 1) grid.images = images_together(image.in_image(), grid.size() * sizeof(S), images.images);
        int64_t steps = ceil_div(images.images, grid.images);
        Tensor packed = transformed_filters();
        std::atomic<bool> good = true;
        parallel(groups * steps * bands, [&](int64_t i, int64_t end) {
            Grid mine = grid;
            for (; i < end && good; i++) {
                int64_t g = i / (steps * bands), n = i / bands % steps * grid.images, i0 = i % bands * rows;
                Squares squares{std::min(rows, image.rows - i0), image.columns};
                mine.from = images.group(g), mine.images = std::min(grid.images, images.images - n);
                mine.fill(n, 2 * i0);
                Result<T, MEMORY> result = bank.result.of_group(g, M);
                result.pitch = result.L;
                if (!band(mine, squares, data<S>(packed) + g * panels * 16 * C * NR, result, {n, 2 * i0, 0})) good = false;
            }
        }, double(M) * C * image.in_image() * images.images * groups < SERIAL);
        return good;
    }

  private:
    // [group][panel][e][c][NR]
    Tensor transformed_filters() const {
        Slide<Micro, T, MEMORY, Grid> as_taps{groups, M, true};
        Tensor packed = empty(scalar_type<S>(), {groups * panels, 16 * C * NR});
        parallel(groups * panels, [&](int64_t p, int64_t end) {
            for (; p < end; p++) {
                S *taps = scratch<S, TAPS>(9 * C * NR), *to = data<S>(packed) + p * 16 * C * NR;
                int64_t m = p % panels * NR;
                as_taps.pack_taps(filters, p / panels, m, int(std::min<int64_t>(NR, M - m)), C, bank.taps, 1, taps);
                for (int64_t c = 0; c < C; c++)
                    for (int v = 0; v < NR; v += VL<S>)
                        transform<3, 4, vec<S>>(tap_line, [&](int i, int j) INLINE { return load(taps + (c * 9 + i * 3 + j) * NR + v); },
                                                [&](int i, int j, vec<S> u) INLINE { store(to + ((i * 4 + j) * C + c) * NR + v, u); });
            }
        }, 9 * M * C <= SERIAL_NUMBERS);
        return packed;
    }

    bool band(const Grid& grid, const Squares& squares, const S* packed, const Result<T, MEMORY>& result, Place first) const {
        int64_t total = grid.images * squares.in_image(), strips = ceil_div(total, most);
        S *met = scratch<S, MET>(16 * most * apart), *sums = scratch<S, SUMS>(16 * most * NR);
        for (int64_t s = 0; s < strips; s++) {
            int64_t begin = total * s / strips, count = total * (s + 1) / strips - begin, tiles = ceil_div(count, MR);
            squares.met<4>(pixel_line, grid, begin, count, met, most, apart);
            for (int64_t p = 0; p < panels; p++) {
                for (int64_t e = 0; e < 16; e++)
                    for (int64_t k = 0; k < C; k += DEEP)
                        for (int64_t t = 0; t < tiles; t++) {
                            int64_t at = count * t / tiles, rows = count * (t + 1) / tiles - at, kc = std::min(DEEP, C - k);
                            const S* panel = packed + ((p * 16 + e) * C + k) * NR;
                            Micro::tile_at(int(rows), int(kc), Strided<S>{met + (e * most + at) * apart + k, apart}, Spaced<S>{panel, NR},
                                           sums + (e * most + at) * NR, NR, k > 0, t == 0 ? panel + kc * NR : panel);
                        }
                if (!write(squares, begin, count, sums, p * NR, result, first)) return false;
            }
        }
        return true;
    }

    // The places of the squares, row by row of squares: two rows of places each.
    bool write(const Squares& squares, int64_t begin, int64_t count, const S* sums, int64_t m, const Result<T, MEMORY>& result,
               Place first) const {
        NotFinite<S> found;
        S* places = scratch<S, SQUARES>(4 * most * NR);
        int columns = int(std::min<int64_t>(NR, M - m));
        for (int64_t t = 0, run; t < count; t += run) {
            Place square = squares.at(begin + t);
            run = std::min(count - t, squares.columns - square.l);
            for (int64_t r = 0; r < run; r++)
                for (int v = 0; v < NR; v += VL<S>)
                    transform<4, 2, vec<S>>(
                        place_line, [&](int i, int j) INLINE { return load(sums + ((i * 4 + j) * most + t + r) * NR + v); },
                        [&](int i, int j, vec<S> y) INLINE { store(places + ((i * run + r) * 2 + j) * NR + v, found.see(y)); });
            Place at{first.n + square.n, first.i + 2 * square.i, 2 * square.l};
            int there = int(std::min(2 * run, result.L - at.l));
            for (int64_t i = 0; i < 2 && at.i < result.I; i++, at.i++)
                result.write_places(Tile<S>{places + i * 2 * run * NR, NR, 0, m, there, columns}, at);
        }
        return !found.any();
    }
};
