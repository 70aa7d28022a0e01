// dweight[o, k] = sum_j dz[o, j] x[k, j] of a convolution, over all places j of all images.
//
//   patches      filters of one pixel, and machines with AMX: a product of gathered patches
//   by_images    few places in all: a tile of dweight after the other, over all of them
//   by_squares   Winograd's, where it is asked for
//   by_taps      channels that fill vectors: what neighbouring channels meet lies side by side
//   gathered     others: all that a place meets is written side by side first
#pragma once
#include "conv2d.h"
#include "slide_back.h"

// Sums over all places, in parts whose number depends on the sizes alone: a thread computes whole parts, which are added in order.
template <class T, Memory MEMORY> struct WeightGradient {
    using S = compute_t<T>;
    static constexpr int64_t LEAST = 4096, MOST = 64, NUMBERS = 1 << 19;  // places in a part; parts; sums in all parts
    static constexpr int64_t DEEP = 1024;                                 // places packed at a time
    const Geometry& s;
    Images<T, MEMORY> x, dz;
    int64_t taps = s.R * s.S;

    void run(T* dweight) const {
        if (s.N * s.P * s.Q == 0) return void(std::fill_n(dweight, s.O * s.C1 * taps, T{}));
        if constexpr (IN_STACKS<T>)
            if (MEMORY == Memory::COLUMNS && has_few_places<T>(s)) return by_images(dweight);
        if (ON_TILES<T> || Patches<T, MEMORY>{x, s.axis(0), s.axis(1)}.is_matrix()) patches(dweight);
        else if (!fills_tiles<T>(s.C1)) gathered(dweight);
        else if (!by_squares(dweight) && !by_taps<direct_micro<T>>(dweight)) by_taps<Fma<S>>(dweight);
    }

  private:
    static int64_t parts_of(int64_t work, int64_t size) {
        return std::clamp<int64_t>(std::min(work, NUMBERS / std::max<int64_t>(size, 1)), 1, MOST);
    }

    void patches(T* dweight) const {
        using E = element_of<T>;
        int64_t J = s.N * s.P * s.Q, K = s.C1 * taps, size = s.O1 * K, parts = parts_of(J / LEAST, size), length = ceil_div(J, parts);
        Tensor memory = empty(scalar_type<S>(), {s.groups, parts, size});
        each_group(s.groups, [&](int64_t g, int64_t threads) {
            Patches<T, MEMORY> met{x.group(g), s.axis(0), s.axis(1)}, gradients{dz.group(g), {s.P, s.P, 1, {0}}, {s.Q, s.Q, 1, {0}}};
            S* sums = data<S>(memory) + g * parts * size;
            auto part = [&](int64_t i, int64_t threads) {
                int64_t j = i * length;
                auto from = [j](const auto& patches) {
                    return [&patches, j](int64_t r0, int rows, int64_t k0, int kc) {
                        return patches.template read_transposed<E>(r0, rows, j + k0, kc);
                    };
                };
                auto A = from(gradients), B = from(met);
                S* to = sums + i * size;
                auto keep = [&](const auto& t) { store_tile(t, to, K); };
                multiply<T>(s.O1, K, std::clamp<int64_t>(J - j, 0, length), A, B, to, keep, threads, DEEP);
            };
            if (parts == 1) part(0, threads);
            else parallel(parts, [&](int64_t i, int64_t end) { for (; i < end; i++) part(i, 1); }, threads == 1);
            int64_t inner = met.order();  // k = (c / inner, tap, c % inner)
            add(g, sums, parts, size, K, K, inner == 1 ? 1 : inner, inner == 1 ? taps : 1, dweight);
        });
    }

    // body(g, part, share, n, i0, height, first) for parts of the bands of all images, in order within a part.
    template <class Prepare> void each_band(int64_t parts, int64_t shares, int64_t rows, double work, const Prepare& prepare) const {
        int64_t bands = ceil_div(s.P, rows), items = s.N * bands;
        parallel(s.groups * parts * shares, [&](int64_t i, int64_t end) {
            auto body = prepare();
            for (; i < end; i++) {
                int64_t g = i / (parts * shares), part = i / shares % parts, first = items * part / parts;
                for (int64_t item = first; item < items * (part + 1) / parts; item++) {
                    int64_t i0 = item % bands * rows;
                    body(g, part, i % shares, item / bands, i0, std::min(s.P - i0, rows), item == first);
                }
            }
        }, work < SERIAL);
    }

    // Channels fill vectors: sums[tap][o][c]. Few parts of many filters are shared out by filters. Where a place has no partner for a pair,
    // 0 stands in for its gradient; false where that may have spoiled a sum, which is not finite.
    template <class Micro> bool by_taps(T* dweight) const {
        constexpr bool PAIRS = !std::is_same_v<Micro, Fma<S>>;
        Axis ah = s.axis(0), aw = s.axis(1);
        Span h = span(ah), w = span(aw);
        int64_t width = round_up(s.C1, Micro::NR), size = taps * s.O1 * width, panels = ceil_div(s.O1, Micro::MR);
        int64_t rows = rows_that_fit(h.step * w.pixels(s.Q) * width * int64_t(sizeof(S)), (h.high - h.low) / h.step, s.P);
        int64_t parts = parts_of(s.N * ceil_div(s.P, rows), size), shares = std::min(ceil_div(threads(), parts * s.groups), panels);
        Pixels<T, MEMORY, S> pixels{x, h, w, rows, s.Q, width};
        std::vector<int64_t> offset, place;
        for (int64_t at_h : ah.at) for (int64_t at_w : aw.at) offset.push_back(pixels.lane(at_h, at_w, 0));
        for (int64_t i = 0; i < rows; i++)
            for (int64_t l = 0; l < s.Q; l += PAIRS ? 2 : 1) place.push_back(pixels.place(i, l));
        Tensor memory = empty(scalar_type<S>(), {s.groups, parts, size});
        each_band(parts, shares, rows, double(s.N) * s.P * s.Q * size, [&] {
            return [&, mine = pixels](int64_t g, int64_t part, int64_t share, int64_t n, int64_t i0, int64_t height, bool first) mutable {
                int64_t m0 = panels * share / shares * Micro::MR, m1 = std::min(s.O1, panels * (share + 1) / shares * Micro::MR);
                mine.from = x.group(g), mine.fill(n, i0);
                auto slide = [&](const auto* met) {
                    slide_back<Micro>(met, offset, place.data(), height, s.Q, width, dz.group(g), m0, m1, n, i0,
                                      data<S>(memory) + (g * parts + part) * size, !first);
                };
                if constexpr (PAIRS) slide(mine.in_pairs());
                else slide(mine.p);
            };
        });
        for (int64_t g = 0; g < s.groups; g++) {
            S* sums = data<S>(memory) + g * parts * size;
            add_parts(sums, parts, size, width);
            if (PAIRS && s.Q % 2) {
                NotFinite<S> found;
                for (int64_t at = 0; at < size; at += VL<S>) found.see(load(sums + at));
                if (found.any()) return false;
            }
            write(g, sums, size, width, s.O1 * width, 1, dweight);
        }
        return true;
    }

    // Images are small: a tap meets all of them at a few places, whose sums are taken at once and go to dweight from the L1 cache.
    void by_images(T* dweight) const {
        using Micro = Fma<S>;
        constexpr int MR = Micro::MR, NR = Micro::NR;
        Axis h = s.axis(0), w = s.axis(1);
        std::vector<std::vector<int64_t>> of_dz(taps), of_x(taps);
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t n = 0; n < s.N; n++)
                for (int64_t t = tap / s.S, i = h.first[t]; i < h.last[t]; i++)
                    for (int64_t u = tap % s.S, l = w.first[u]; l < w.last[u]; l++) {
                        of_dz[tap].push_back(n * dz.image() + (i * s.Q + l) * dz.pixel());
                        of_x[tap].push_back(n * x.image() + ((i * h.step + h.at[t]) * s.W + l * w.step + w.at[u]) * x.pixel());
                    }
        int64_t panels = ceil_div(s.O1, MR);
        parallel(s.groups * panels, [&](int64_t p, int64_t end) {
            S* sums = scratch<S, 2>(taps * MR * NR);
            for (; p < end; p++) {
                int64_t g = p / panels, m = p % panels * MR, rows = std::min<int64_t>(MR, s.O1 - m);
                for (int64_t block = 0; block < s.C1; block += NR) {
                    int64_t c = std::min(block, s.C1 - NR);  // the last block overlaps the one before
                    for (int64_t t = 0; t < taps; t++)
                        Micro::tile_at(int(rows), int(of_x[t].size()), Listed<S>{dz.group(g).p + m, of_dz[t].data()},
                                       Listed<S>{x.group(g).p + c, of_x[t].data()}, sums + t * MR * NR, NR, false, sums);
                    for (int64_t o = 0; o < rows; o++)
                        write_filter(sums + o * NR, MR * NR, 1, NR, dweight + (g * s.O1 + m + o) * s.C1 * taps + c * s.to_channel);
                }
            }
        }, double(s.N) * s.P * s.Q * taps * s.O * s.C1 < SERIAL);
    }

    // Taps are 3 x 3: sums[e][o][c] over squares, transformed back at the end. Bands are gathered until there are squares enough.
    // False where that is not allowed, or a sum not finite.
    bool by_squares(T* dweight) const {
        if (!IN_SQUARES<T> || !s.winograd || !is_3x3(s.axis(0), s.axis(1))) return false;
        using Micro = Fma<S>;
        constexpr int64_t MANY = 112, MR = Micro::MR, NR = Micro::NR;
        Span h = span(s.axis(0)), w = span(s.axis(1)), here{1, 0, 0};
        Squares image{ceil_div(s.P, 2), ceil_div(s.Q, 2)};
        int64_t width = round_up(s.C1, NR), lines = round_up(s.O1, VL<S>), size = 16 * s.O1 * width, panels = ceil_div(s.O1, MR);
        int64_t rows = std::clamp<int64_t>(MANY / image.columns, 1, image.rows), most = std::max(MANY, rows * image.columns);
        int64_t bands = ceil_div(image.rows, rows), items = s.N * bands, parts = parts_of(items, size);
        int64_t shares = std::min(ceil_div(threads(), parts * s.groups), panels);
        Pixels<T, MEMORY, S> met_in{x, h, w, 2 * rows, 2 * image.columns, width};
        Pixels<T, MEMORY, S> slopes_in{dz, here, here, 2 * rows, 2 * image.columns, lines};
        Tensor memory = empty(scalar_type<S>(), {s.groups, parts, size});
        parallel(s.groups * parts * shares, [&](int64_t i, int64_t end) {
            auto pixels = met_in, places = slopes_in;
            S *met = scratch<S, MET>(16 * most * width), *slopes = scratch<S, SLOPES>(16 * most * lines);
            for (; i < end; i++) {
                int64_t g = i / (parts * shares), part = i / shares % parts, share = i % shares;
                int64_t first = items * part / parts, last = items * (part + 1) / parts, held = 0;
                int64_t m0 = panels * share / shares * MR, m1 = std::min(s.O1, panels * (share + 1) / shares * MR);
                S* sums = data<S>(memory) + (g * parts + part) * size;
                pixels.from = x.group(g), places.from = dz.group(g);
                bool add = false;
                for (int64_t item = first; item < last; item++) {
                    int64_t n = item / bands, i0 = item % bands * rows;
                    Squares band{std::min(rows, image.rows - i0), image.columns};
                    pixels.fill(n, 2 * i0), band.met<4>(pixel_line, pixels, 0, band.in_image(), met + held * width, most, width);
                    places.fill(n, 2 * i0), band.met<2>(place_line_back, places, 0, band.in_image(), slopes + held * lines, most, lines);
                    held += band.in_image();
                    if (item + 1 < last && held + rows * image.columns <= most) continue;
                    for (int64_t e = 0; e < 16; e++)
                        for (int64_t c = 0; c < width; c += NR)
                            for (int64_t m = m0; m < m1; m += MR) {
                                Spaced<S> slope{slopes + e * most * lines + m, lines}, pixel{met + e * most * width + c, width};
                                Micro::tile_at(int(std::min(MR, m1 - m)), int(held), slope, pixel, sums + (e * s.O1 + m) * width + c, width,
                                               add, slope.p);
                            }
                    held = 0, add = true;
                }
            }
        }, double(s.N) * s.P * s.Q * size < SERIAL);
        for (int64_t g = 0; g < s.groups; g++) {
            S* sums = data<S>(memory) + g * parts * size;
            add_parts(sums, parts, size, width);
            NotFinite<S> found;
            for (int64_t at = 0; at < s.O1 * width; at += VL<S>)
                transform<4, 3, vec<S>>(
                    tap_line_back, [&](int i, int j) INLINE { return load(sums + (i * 4 + j) * s.O1 * width + at); },
                    [&](int i, int j, vec<S> v) INLINE { store(sums + (i * 3 + j) * s.O1 * width + at, found.see(v)); });
            if (found.any()) return false;
            write(g, sums, size, width, s.O1 * width, 1, dweight);
        }
        return true;
    }

    // Channels do not: all k of a place are gathered. sums[o][k] or, where that leaves fewer lanes idle, sums[k][o].
    void gathered(T* dweight) const {
        using Micro = Fma<S>;
        constexpr int NR = Micro::NR;
        constexpr bool COLUMNS = MEMORY == Memory::COLUMNS;  // k = (tap, c), else (c, tap)
        Axis ah = s.axis(0), aw = s.axis(1);
        Span h = span(ah), w = span(aw);
        int64_t K = s.C1 * taps, kt = COLUMNS ? s.C1 : 1, kc = COLUMNS ? 1 : taps;
        bool by_k = K * round_up(s.O1, NR) <= s.O1 * round_up(K, NR);
        int64_t width = round_up(K, by_k ? VL<S> : NR), run = by_k ? round_up(s.O1, NR) : width, size = (by_k ? K : s.O1) * run;
        int64_t rows = rows_that_fit(s.Q * width * int64_t(sizeof(S)), 0, s.P), parts = parts_of(s.N * ceil_div(s.P, rows), size);
        std::conditional_t<COLUMNS, Pixels<T, MEMORY, S>, Planes<T, MEMORY, S>> grid{x, h, w, rows, s.Q};
        std::vector<int64_t> offset(K), place;
        for (int64_t k = 0; k < K; k++) {
            int64_t tap = k / kt % taps, at_h = ah.at[tap / s.S], at_w = aw.at[tap % s.S];
            grid.use(at_h, at_w), offset[k] = grid.lane(at_h, at_w, k / kc % s.C1);
        }
        for (int64_t j = 0; j < rows * s.Q; j++) place.push_back(j * width);
        Tensor memory = empty(scalar_type<S>(), {s.groups, parts, size});
        each_band(parts, 1, rows, double(s.N) * s.P * s.Q * size, [&] {
            return [&, mine = grid](int64_t g, int64_t part, int64_t, int64_t n, int64_t i0, int64_t height, bool first) mutable {
                S *sums = data<S>(memory) + (g * parts + part) * size, *met = scratch<S, GATHERED>(height * s.Q * width + VL<S>);
                mine.from = x.group(g), mine.fill(n, i0), mine.gather(offset, height, s.Q, width, met);
                if (by_k) slide_back_by_k<Micro>(met, width, K, height * s.Q, dz.group(g), n, i0, sums, !first);
                else slide_back<Micro>(met, {0}, place.data(), height, s.Q, width, dz.group(g), 0, s.O1, n, i0, sums, !first);
            };
        });
        for (int64_t g = 0; g < s.groups; g++)
            add(g, data<S>(memory) + g * parts * size, parts, size, run, by_k ? 1 : run, by_k ? kt * run : kt, by_k ? kc * run : kc,
                dweight);
    }

    void add(int64_t g, S* sums, int64_t parts, int64_t size, int64_t run, int64_t so, int64_t st, int64_t sc, T* dweight) const {
        add_parts(sums, parts, size, run);
        write(g, sums, size, so, st, sc, dweight);
    }
    // The first of the parts becomes the sum of all; vectors run over what lies side by side.
    void add_parts(S* sums, int64_t parts, int64_t size, int64_t run) const {
        int64_t runs = size / run;
        parallel(runs, [&](int64_t r, int64_t end) {
            for (; r < end; r++)
                for (int64_t k = 0; k < run; k += VL<S>) {
                    int lanes = int(std::min<int64_t>(VL<S>, run - k));
                    S* at = sums + r * run + k;
                    auto total = load(at, lanes);
                    for (int64_t i = 1; i < parts; i++) total += load(at + i * size, lanes);
                    store(at, total, lanes);
                }
        }, parts == 1 || size <= SERIAL_NUMBERS);
    }
    // dweight of a group: tap t and channel c of filter o stand at sums[o * so + t * st + c * sc].
    void write(int64_t g, const S* sums, int64_t size, int64_t so, int64_t st, int64_t sc, T* dweight) const {
        parallel(s.O1, [&](int64_t o, int64_t end) {
            for (; o < end; o++) write_filter(sums + o * so, st, sc, s.C1, dweight + (g * s.O1 + o) * s.C1 * taps);
        }, size <= SERIAL_NUMBERS);
    }
    // Tap t and channel c of `channels` from from[t * st + c * sc] to their places in a filter.
    void write_filter(const S* from, int64_t st, int64_t sc, int64_t channels, T* to) const {
        constexpr int V = VL<S>;
        bool taps_last = s.to_tap == 1;  // in the memory of dweight
        int64_t outer = taps_last ? channels : taps, inner = taps_last ? taps : channels, apart = taps_last ? taps : s.C1;
        int64_t sa = taps_last ? sc : st, sb = taps_last ? st : sc;
        if (sa != 1) {
            for (int64_t a = 0; a < outer; a++)
                if (sb == 1) {
                    for (int64_t b = 0; b < inner; b += V) {
                        int lanes = int(std::min<int64_t>(V, inner - b));
                        store(to + a * apart + b, load(from + a * sa + b, lanes), lanes);
                    }
                } else for (int64_t b = 0; b < inner; b++) put_one(to + a * apart + b, from[a * sa + b * sb]);
            return;
        }
        for (int64_t a = 0; a < outer; a += V)
            for (int64_t b = 0; b < inner; b += V) {
                int rows = int(std::min<int64_t>(V, outer - a));
                vec<S> square[V];
#pragma GCC unroll 16
                for (int i = 0; i < V; i++) square[i] = b + i < inner ? load(from + (b + i) * sb + a, rows) : vec<S>{};
                transpose(square);
                for (int i = 0; i < rows; i++) store(to + (a + i) * apart + b, square[i], int(std::min<int64_t>(V, inner - b)));
            }
    }
};

template <class T, Memory MEMORY> void weight_gradient(const Geometry& s, const T* dz, const T* x, T* dweight) {
    WeightGradient<T, MEMORY>{s, {x, s.N, s.C1, s.C, s.H, s.W}, {dz, s.N, s.O1, s.O, s.P, s.Q}}.run(dweight);
}
