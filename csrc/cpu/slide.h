// A bank of filters slid over an image: the products of convolution, band by band, without gathering what a filter meets.
//
//   sums[place, m] = sum_k met[offset[k] + place] filter[m, k]          k = (tap, channel), in either order
//
//           filters, NR at a time
//          +----+----+--            Where filters fill vectors a tile is any MR places x NR filters, else MR filters x NR places side by
//   places |tile|                   side. The filters are packed once; a panel of them stays in the L1 cache while a strip of places
//          +----+                   passes over it. A band's copy stays in L2.
#pragma once
#include "grid.h"

constexpr int64_t GRID_BYTES = 256 << 10;  // what a band may take of the L2 cache

// As many of I rows of places as fit, beside `more` rows of pixels that they meet.
inline int64_t rows_that_fit(int64_t bytes_in_row, int64_t more, int64_t I) {
    return std::clamp<int64_t>(GRID_BYTES / std::max<int64_t>(bytes_in_row, 1) - more, 1, std::max<int64_t>(I, 1));
}
// Rows of places in a band: those that fit, in bands of even height, enough bands for every thread.
inline int64_t rows_in_band(const Span& h, int64_t bytes_in_row, int64_t I, int64_t others) {
    int64_t most = rows_that_fit(bytes_in_row, (h.high - h.low) / h.step, I);
    int64_t bands = std::max(ceil_div(I, most), std::min(I, ceil_div(2 * threads(), std::max<int64_t>(others, 1))));
    return ceil_div(I, std::max<int64_t>(bands, 1));
}

// Small images are taken several at a time, so that a panel of filters meets enough places to be worth fetching.
inline int64_t images_together(int64_t places, int64_t bytes, int64_t images) {
    constexpr int64_t ENOUGH = 128;
    int64_t most = std::min(2 * GRID_BYTES / std::max<int64_t>(bytes, 1), ceil_div(images, threads()));
    return std::clamp<int64_t>(ceil_div(ENOUGH, std::max<int64_t>(places, 1)), 1, std::max<int64_t>(most, 1));
}

// Whether so many channels leave few lanes of a tile idle.
template <class T> bool fills_tiles(int64_t channels) { return 4 * channels >= 3 * round_up(channels, Fma<compute_t<T>>::NR); }

inline Span span(const Axis& axis) { return {axis.step, axis.at.front(), axis.at.back()}; }
template <class T, Memory MEMORY> std::pair<Span, Span> spans(const std::vector<Bank<T, MEMORY>>& banks) {
    auto span = [&](auto axis) {
        Span s{axis(banks[0]).step, 0, 0};
        bool any = false;
        for (const auto& bank : banks)
            for (int64_t at : axis(bank).at)
                s.low = any ? std::min(s.low, at) : at, s.high = any ? std::max(s.high, at) : at, any = true;
        return s;
    };
    return {span([](const auto& bank) -> const Axis& { return bank.h; }), span([](const auto& bank) -> const Axis& { return bank.w; })};
}

template <class Micro, class T, Memory MEMORY, class Grid> struct Slide {
    using E = typename Micro::Element;
    using Sum = typename Micro::Sum;
    using Lane = typename Micro::Lane;
    static constexpr int MR = Micro::MR, NR = Micro::NR, PAIR = Grid::PAIR;
    int64_t groups, M;
    bool turned;  // tiles of places x filters
    int width = turned ? NR : MR;  // filters in a tile

    struct Packed {  // the filters of a bank for every group, and where a grid holds what each k meets
        std::vector<int64_t> offset;
        int64_t K;
        Tensor memory;
    };
    E* panel(const Packed& packed, int64_t g, int64_t m, int64_t k) const {
        return data<E>(packed.memory) + (g * ceil_div(M, width) + m / width) * Micro::panel(width, packed.K) + k * width;
    }
    static Spaced<Lane> rows_of(const E* panel, int64_t width) { return {reinterpret_cast<const Lane*>(panel), width}; }

    Packed pack(const Filters<T>& filters, const Bank<T, MEMORY>& bank, const Grid& grid) const {
        int64_t lanes = grid.lanes(), K = PAIR * lanes * int64_t(bank.taps.size()), panels = ceil_div(M, width);
        int64_t inner = !Grid::PIXELS ? 1 : lanes % 16 ? lanes : 16;  // k = (c / inner, tap, c % inner)
        Packed out{{}, K, empty(scalar_type<E>(), {groups * panels, Micro::panel(width, K)})};
        Tensor memory = empty(scalar_type<T>(), {PAIR > 1 ? M : 0, K});
        for (int64_t g = 0; g < groups; g++) {
            Matrix<T> weight{};
            if constexpr (PAIR > 1) weight = filters.arranged(g, grid.from.channels, bank.taps, PAIR * inner, data<T>(memory));
            parallel(panels, [&](int64_t i, int64_t end) {
                for (; i < end; i++) {
                    int count = int(std::min<int64_t>(width, M - i * width));
                    if constexpr (PAIR > 1) pack_arranged(weight, i * width, count, K, panel(out, g, i * width, 0));
                    else pack_taps(filters, g, i * width, count, grid.from.channels, bank.taps, inner, panel(out, g, i * width, 0));
                }
            }, M * K <= SERIAL_NUMBERS);
        }
        for (int64_t c = 0; c < lanes; c += inner)
            for (int64_t at_h : bank.h.at)
                for (int64_t at_w : bank.w.at)
                    for (int64_t i = 0; i < inner; i++) out.offset.push_back(grid.lane(at_h, at_w, c + i));
        return out;
    }

    // A few channels at a time, all their taps in one of the orders in which they lie; those of the bank go to their place.
    void pack_taps(const Filters<T>& filters, int64_t g, int64_t m, int count, int64_t C, const std::vector<int64_t>& taps, int64_t inner,
                   E* panel) const {
        int64_t few = std::max<int64_t>(1, 128 / filters.taps), nt = int64_t(taps.size());
        E* some = scratch<E, 1>(few * filters.taps * width);
        auto pack_some = [&](int64_t at, int64_t step, int64_t kc, int64_t k) {
            Matrix<T> weight{const_cast<T*>(filters.p) + g * filters.sg + m * filters.sm + at, filters.sm, step};
            pack_one(read<E>(weight, 0, count, 0, int(kc)), count, int(kc), some + k * width);
        };
        for (int64_t c0 = 0; c0 < C; c0 += few) {
            int64_t n = std::min(few, C - c0), to_channel = 1, to_tap = 1;  // in `some`
            if (filters.st != 1) {
                for (int64_t t = 0; t < filters.taps; t++) pack_some(c0 * filters.sc + t * filters.st, filters.sc, n, t * n);
                to_tap = n;
            } else {
                int64_t follow = filters.sc == filters.taps ? n : 1;
                for (int64_t c = 0; c < n; c += follow) pack_some((c0 + c) * filters.sc, 1, follow * filters.taps, c * filters.taps);
                to_channel = filters.taps;
            }
            for (int64_t t = 0; t < nt; t++)
                for (int64_t i = 0; i < n; i++) {
                    int64_t c = c0 + i, block = c / inner * inner;  // the last block may be shorter
                    E* to = panel + (block * nt + t * std::min(inner, C - block) + c - block) * width;
                    std::copy_n(some + (i * to_channel + taps[t] * to_tap) * width, width, to);
                }
        }
    }

    struct Band { int64_t n, i0, i1; };  // rows of places of an image, or of as many as a grid holds

    // All filters of a bank over a band. Meanwhile the pixels of the next one are fetched.
    void band(const Grid& grid, const Bank<T, MEMORY>& bank, const Packed& packed, int64_t g, const Band& at, const Band& next) const {
        constexpr int64_t DEEP = 4096 / sizeof(Lane) * PAIR;
        if (at.i0 >= bank.result.I || bank.result.L == 0) return;
        int64_t K = packed.K, parts = K <= DEEP * 3 / 2 ? 1 : ceil_div(K, DEEP);
        int64_t deep = std::max<int64_t>(PAIR, round_up(ceil_div(K, parts), PAIR)), rows = std::min(at.i1, bank.result.I) - at.i0;
        Call call{grid, packed, bank.result.of_group(g, M), next, g, at.n, at.i0, K, deep};
        if (turned) return places_by_filters(call, rows);
        for (int64_t image = 0; image < grid.images; image++) filters_by_places(call, rows, image);
    }

  private:
    void pack_one(Block<E> block, int count, int kc, E* panel) const { (turned ? Micro::pack_b : Micro::pack_a)(block, count, kc, panel); }

    void pack_arranged(const Matrix<T>& weight, int64_t m, int count, int64_t K, E* panel) const {
        constexpr int64_t DEPTH = 128;
        for (int64_t k = 0; k < K; k += DEPTH) {
            int kc = int(std::min(DEPTH, K - k));
            pack_one(read<E>(weight, m, count, k, kc), count, kc, panel + k * width);
        }
    }
    struct Call {
        const Grid& grid;
        const Packed& packed;
        Result<T, MEMORY> result;
        Band next;
        int64_t g, n, i0, K, deep;
        int depth(int64_t k) const { return int(std::min(deep, K - k)); }
        bool last(int64_t k) const { return k + deep >= K; }
        const int64_t* offset(int64_t k) const { return packed.offset.data() + k / PAIR; }
    };

    // Tiles of any places that follow one another, over rows and images.
    void places_by_filters(const Call& a, int64_t rows) const {
        constexpr int64_t PLACES = 8 * MR;  // in a strip: those of 8 tiles of 14 end where a line of the cache does
        int64_t L = a.result.L, total = a.grid.images * rows * L, ld = a.K <= a.deep ? NR : round_up(M, NR) + VL<Sum>, where[PLACES];
        Sum* strip = scratch<Sum, 2>(PLACES * ld);
        for (int64_t s = 0; s < total; s += PLACES) {
            int64_t count = std::min(PLACES, total - s), tiles = ceil_div(count, MR), n = s / L / rows, i = s / L % rows, l = s % L;
            Place first{a.n + n, a.i0 + i, l};
            for (int64_t j = 0; j < count; j++) {
                where[j] = n * a.grid.size() + a.grid.place(i, l);
                if (++l == L) l = 0, ++i == rows ? (i = 0, n++) : 0;
            }
            for (int64_t k = 0; k == 0 || k < a.K; k += a.deep)
                for (int64_t m = 0; m < M; m += NR) {
                    const E* weight = panel(a.packed, a.g, m, k);
                    Tile<Sum> all{strip + (a.K <= a.deep ? 0 : m), ld, 0, m, int(count), int(std::min<int64_t>(NR, M - m))};
                    for (int64_t t = 0; t < tiles; t++) {
                        int64_t j = count * t / tiles, places = count * (t + 1) / tiles - j;
                        const void* ahead = weight;
                        if (m == 0 && k == 0) ahead = a.grid.source(a.next.n, a.next.i0, a.next.i1 - a.next.i0, s + j, total);
                        if (a.last(k)) a.result.fetch(t, tiles, first, all);
                        Micro::tile_at(int(places), a.depth(k), Scattered<Lane>{a.grid.p, a.offset(k), where + j}, rows_of(weight, NR),
                                       const_cast<Sum*>(all.p) + j * ld, ld, k > 0, static_cast<const E*>(ahead));
                    }
                    if (a.last(k)) a.result.write_places(all, first);
                }
        }
    }

    // The rows of places of one image as one long row, with what lies between them.
    void filters_by_places(const Call& a, int64_t rows, int64_t image) const {
        constexpr int64_t STRIP = 8 * NR;
        int64_t pitch = a.grid.columns, J = (rows - 1) * pitch + a.result.L, ld = a.K <= a.deep ? NR : STRIP + VL<Sum>;
        const Lane* met = a.grid.p + image * a.grid.size();
        alignas(64) Sum spare[MR * NR];
        Sum* partial = a.K <= a.deep ? nullptr : scratch<Sum, 2>(round_up(M, MR) * ld);
        for (int64_t s = 0; s < J; s += STRIP)
            for (int64_t k = 0; k == 0 || k < a.K; k += a.deep)
                for (int64_t j = s; j < std::min(J, s + STRIP); j += NR)
                    for (int64_t m = 0; m < M; m += MR) {
                        const E *weight = panel(a.packed, a.g, m, k), *next = m + MR < M ? panel(a.packed, a.g, m + MR, k) : weight;
                        int filters = int(std::min<int64_t>(MR, M - m)), places = int(std::min<int64_t>(NR, J - j));
                        Sum* sums = partial ? partial + m * ld + j - s : spare;
                        Listed<Lane> at{met + j, a.offset(k)};
                        Micro::tile_at(filters, a.depth(k), rows_of(weight, MR), at, sums, ld, k > 0, next);
                        Place first{a.n + image, a.i0 + j / pitch, j % pitch};
                        if (a.last(k)) a.result.write(Tile<Sum>{sums, ld, m, 0, filters, places}, first);
                    }
    }
};

// Every bank over every image, for every group. The banks share their images, so they share the grids.
template <class Micro, class T, Memory MEMORY, class Grid>
void slide(int64_t groups, const Filters<T>& filters, const Images<T, MEMORY>& images, std::vector<Bank<T, MEMORY>> banks, bool turned,
           Grid grid, int64_t rows) {
    int64_t I = 0, L = 0;
    for (auto& bank : banks) {
        I = std::max(I, bank.result.I), L = std::max(L, bank.result.L), bank.result.pitch = turned ? bank.result.L : grid.columns;
        for (int64_t at_h : bank.h.at)
            for (int64_t at_w : bank.w.at) grid.use(at_h, at_w);
    }
    int64_t bands = ceil_div(I, std::max<int64_t>(rows, 1));
    if (bands == 1) grid.images = images_together(I * L, grid.size() * int64_t(sizeof(typename Micro::Lane)), images.images);
    int64_t steps = ceil_div(images.images, grid.images);
    Slide<Micro, T, MEMORY, Grid> all{groups, filters.M, turned};
    std::vector<typename Slide<Micro, T, MEMORY, Grid>::Packed> packed;
    for (const auto& bank : banks) packed.push_back(all.pack(filters, bank, grid));
    parallel(groups * steps * bands, [&](int64_t i, int64_t end) {
        Grid mine = grid;
        for (; i < end; i++) {
            int64_t g = i / (steps * bands), n = i / bands % steps * grid.images, i0 = i % bands * rows;
            mine.from = images.group(g), mine.images = std::min(grid.images, images.images - n);
            mine.fill(n, i0);
            typename Slide<Micro, T, MEMORY, Grid>::Band now{n, i0, i0 + rows}, next{n, i0 + rows, i0 + 2 * rows};
            if (next.i0 >= I) next = {n + mine.images, 0, rows};
            for (size_t b = 0; b < banks.size(); b++) all.band(mine, banks[b], packed[b], g, now, next);
        }
    }, double(filters.M) * images.channels * I * L * images.images * groups < SERIAL);
}
template <class Micro, class T, Memory MEMORY>
void slide(int64_t groups, const Filters<T>& filters, const Images<T, MEMORY>& images, const std::vector<Bank<T, MEMORY>>& banks) {
    using Lane = typename Micro::Lane;
    auto [h, w] = spans(banks);
    int64_t I = 0, L = 0, lanes = ceil_div(images.channels, Copied<T, MEMORY, Lane>::PAIR), others = groups * images.images;
    for (const auto& bank : banks) I = std::max(I, bank.result.I), L = std::max(L, bank.result.L);
    bool turned = 4 * filters.M >= 3 * round_up(filters.M, Micro::NR);
    if (turned && MEMORY == Memory::COLUMNS) {
        int64_t width = lanes * sizeof(Lane) % 2048 ? lanes : lanes + VL<Lane>;  // else MR pixels would compete for few lines of the L1 cache
        int64_t rows = rows_in_band(h, h.step * w.pixels(L) * width * int64_t(sizeof(Lane)), I, others);
        Pixels<T, MEMORY, Lane> grid{images, h, w, rows, L, width};
        grid.use_image(I, L);
        slide<Micro>(groups, filters, images, banks, turned, grid, rows);
    } else {
        int64_t rows = rows_in_band(h, h.step * w.step * w.length(L) * lanes * int64_t(sizeof(Lane)), I, others);
        slide<Micro>(groups, filters, images, banks, turned, Planes<T, MEMORY, Lane>{images, h, w, rows, L}, rows);
    }
}
