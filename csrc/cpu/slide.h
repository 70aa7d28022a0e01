// A bank of filters slid over a Grid: the products of convolution, band by band, without gathering what a filter meets.
//
//   slide          sums[m, place]    = sum_k filter[m, k] plane[offset[k] + place]        k = (c, tap)
//   slide_back     sums[tap, m, c]  += sum_j dz[m, j] pixel[offset[tap] + j, c]           j = the places of a band
//                  Where channels are too few to fill vectors, all k of a place are gathered: one tap, c = k.
//
//            places of a band, NR at a time
//          +----+----+--            The filters are packed once. What a tile meets (KC taps of NR places: a few rows of KC / taps channels)
//     MR   |tile|                   stays in the L1 cache while the panels of all filters pass over it; a band's grid stays in L2.
//          +----+
#pragma once
#include "grid.h"

constexpr int64_t GRID_BYTES = 256 << 10;  // what a band may take of the L2 cache

// Rows of places in a band: as many as fit, in bands of even height, enough bands for every thread.
inline int64_t rows_in_band(const Span& h, const Span& w, int64_t I, int64_t L, int64_t bytes_per_number, int64_t others) {
    int64_t row = std::max<int64_t>(1, h.step * w.step * w.length(L) * bytes_per_number);
    int64_t most = std::clamp<int64_t>(GRID_BYTES / row - (h.high - h.low) / h.step, 1, std::max<int64_t>(I, 1));
    int64_t bands = std::max(ceil_div(I, most), std::min(I, ceil_div(2 * threads(), std::max<int64_t>(others, 1))));
    return ceil_div(I, std::max<int64_t>(bands, 1));
}

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

template <class Micro, class T, Memory MEMORY> struct Slide {
    using E = typename Micro::Element;
    using Sum = typename Micro::Sum;
    using Lane = typename Micro::Lane;
    using Plane = Grid<T, MEMORY, Lane>;
    static constexpr int MR = Micro::MR, NR = Micro::NR, PAIR = Plane::PAIR;
    int64_t groups, M;
    // Tiles of places x channels where channels lie side by side, if there are enough to fill vectors: they are stored as they are.
    bool turned = MEMORY == Memory::COLUMNS && 4 * M >= 3 * round_up(M, NR);
    int width = turned ? NR : MR, across = turned ? MR : NR;  // of a tile: channels and places

    struct Packed {  // the filters of a bank for every group, and where a grid holds what each k meets
        std::vector<int64_t> offset;
        int64_t K;
        Tensor memory;
    };
    E* panel(const Packed& packed, int64_t g, int64_t m, int64_t k) const {
        return data<E>(packed.memory) + (g * ceil_div(M, width) + m / width) * Micro::panel(width, packed.K) + k * width;
    }
    static Spaced<Lane> rows_of(const E* panel, int64_t width) { return {reinterpret_cast<const Lane*>(panel), width}; }

    Packed pack(const Filters<T>& filters, const Bank<T, MEMORY>& bank, const Plane& grid) const {
        Packed out{{}, PAIR * grid.lanes() * int64_t(bank.taps.size()), {}};
        int64_t K = out.K, panels = ceil_div(M, width);
        out.memory = empty(scalar_type<E>(), {groups * panels, Micro::panel(width, K)});
        Tensor arranged = empty(scalar_type<T>(), {M, K});
        Matrix<T> weight{data<T>(arranged), K, 1};
        for (int64_t g = 0; g < groups; g++) {
            filters.arrange(g, grid.from.channels, bank.taps, PAIR, weight.p);
            parallel(panels, [&](int64_t i, int64_t end) {
                constexpr int64_t DEPTH = 128;
                for (; i < end; i++)
                    for (int64_t k = 0; k < K; k += DEPTH) {
                        int count = int(std::min<int64_t>(width, M - i * width)), kc = int(std::min(DEPTH, K - k));
                        Block<E> block = read<E>(weight, i * width, count, k, kc);
                        (turned ? Micro::pack_b : Micro::pack_a)(block, count, kc, panel(out, g, i * width, k));
                    }
            }, M * K <= SERIAL_NUMBERS);
        }
        for (int64_t c = 0; c < grid.lanes(); c++)
            for (int64_t at_h : bank.h.at)
                for (int64_t at_w : bank.w.at) out.offset.push_back(c * grid.plane() + grid.place(at_h, at_w));
        return out;
    }

    // All filters of a bank over the band of rows from i0 on.
    void band(const Plane& grid, const Bank<T, MEMORY>& bank, const Packed& packed, int64_t g, int64_t n, int64_t i0, int64_t i1) const {
        constexpr int64_t STRIP = 8 * NR, DEEP = 1024 / sizeof(Lane) * PAIR;
        if (i0 >= bank.result.I || bank.result.L == 0) return;
        Result<T, MEMORY> result = bank.result.of_group(g, M);
        int64_t J = (std::min(i1, result.I) - i0 - 1) * grid.columns + result.L, K = packed.K, strip = turned ? STRIP / MR * MR : STRIP;
        int64_t parts = K <= DEEP * 3 / 2 ? 1 : ceil_div(K, DEEP), deep = std::max<int64_t>(PAIR, round_up(ceil_div(K, parts), PAIR));
        int64_t ld = parts == 1 ? NR : turned ? round_up(M, NR) + VL<Sum> : STRIP + VL<Sum>;
        alignas(64) Sum spare[MR * NR];
        Sum* partial = parts > 1 ? scratch<Sum, 2>((turned ? STRIP : round_up(M, MR)) * ld) : nullptr;
        auto tile = [&](int64_t j, int64_t j_in_strip, int64_t m, int64_t k) {
            int places = int(std::min<int64_t>(across, J - j)), filters = int(std::min<int64_t>(width, M - m));
            int kc = int(std::min(deep, K - k));
            Sum* sums = !partial ? spare : turned ? partial + j_in_strip * ld + m : partial + m * ld + j_in_strip;
            const E *weight = panel(packed, g, m, k), *next = m + width < M ? panel(packed, g, m + width, k) : weight;
            Listed<Lane> met{grid.p + j, packed.offset.data() + k / PAIR};
            Place first{n, i0 + j / grid.columns, j % grid.columns};
            if (turned) {
                Micro::tile_at(places, kc, met, rows_of(weight, NR), sums, ld, k > 0, weight);
                if (k + deep >= K) result.write_places(Tile<Sum>{sums, ld, 0, m, places, filters}, first);
            } else {
                Micro::tile_at(filters, kc, rows_of(weight, MR), met, sums, ld, k > 0, next);
                if (k + deep >= K) result.write(Tile<Sum>{sums, ld, m, 0, filters, places}, first);
            }
        };
        for (int64_t s = 0; s < J; s += strip)
            for (int64_t k = 0; k == 0 || k < K; k += deep) {
                int64_t end = std::min(J, s + strip);
                if (turned)
                    for (int64_t m = 0; m < M; m += width) for (int64_t j = s; j < end; j += across) tile(j, j - s, m, k);
                else
                    for (int64_t j = s; j < end; j += across) for (int64_t m = 0; m < M; m += width) tile(j, j - s, m, k);
            }
    }
};

// Every bank over every image, for every group. The banks share their images, so they share the grids.
template <class Micro, class T, Memory MEMORY>
void slide(int64_t groups, const Filters<T>& filters, const Images<T, MEMORY>& images, std::vector<Bank<T, MEMORY>> banks) {
    using Plane = Grid<T, MEMORY, typename Micro::Lane>;
    auto [h, w] = spans(banks);
    int64_t I = 0, L = 0;
    for (const auto& bank : banks) I = std::max(I, bank.result.I), L = std::max(L, bank.result.L);
    int64_t lane_bytes = ceil_div(images.channels, Plane::PAIR) * int64_t(sizeof(typename Micro::Lane));
    int64_t rows = rows_in_band(h, w, I, L, lane_bytes, groups * images.images), bands = ceil_div(I, std::max<int64_t>(rows, 1));
    Plane grid{images, h, w, h.length(rows), w.length(L), {}};
    for (auto& bank : banks) {
        bank.result.pitch = grid.columns;
        for (int64_t at_h : bank.h.at)
            for (int64_t at_w : bank.w.at) grid.use(at_h, at_w);
    }
    Slide<Micro, T, MEMORY> all{groups, filters.M};
    std::vector<typename Slide<Micro, T, MEMORY>::Packed> packed;
    for (const auto& bank : banks) packed.push_back(all.pack(filters, bank, grid));
    parallel(groups * images.images * bands, [&](int64_t i, int64_t end) {
        Plane mine = grid;
        for (; i < end; i++) {
            int64_t g = i / (images.images * bands), n = i / bands % images.images, i0 = i % bands * rows;
            mine.from = images.group(g);
            mine.fill_planes(n, i0);
            for (size_t b = 0; b < banks.size(); b++) all.band(mine, banks[b], packed[b], g, n, i0, i0 + rows);
        }
    }, double(filters.M) * images.channels * I * L * images.images * groups < SERIAL);
}

// sums[tap][m][c] += dz[m][j] met[offset[tap] + place[j] + c] for all places j of a band and filters [m0, m1); `width` numbers to a place.
// A list of places leaves out what lies between the rows: 0 times a number there would be NaN where the number is infinite.
template <class Micro, class T, Memory MEMORY>
void slide_back(const typename Micro::Element* met, const std::vector<int64_t>& offset, const std::vector<int64_t>& place, int64_t width,
                const Images<T, MEMORY>& dz, int64_t m0, int64_t m1, int64_t n, int64_t i0, typename Micro::Sum* sums, bool add) {
    using E = typename Micro::Element;
    constexpr int MR = Micro::MR, NR = Micro::NR;
    constexpr int64_t DEEP = 256;
    int64_t J = int64_t(place.size()), M = dz.channels;
    E* a = scratch<E, 0>(ceil_div(m1 - m0, MR) * J * MR);
    Matrix<T> band{const_cast<T*>(dz.p) + n * dz.image() + i0 * dz.W * dz.pixel(), dz.channel(), dz.pixel()};
    for (int64_t m = m0; m < m1; m += MR)
        for (int64_t j = 0; j < J; j += DEEP) {
            int rows = int(std::min<int64_t>(MR, m1 - m)), kc = int(std::min(DEEP, J - j));
            Micro::pack_a(read<E>(band, m, rows, j, kc), rows, kc, a + (m - m0) * J + j * MR);
        }
    for (int64_t j = 0; j < J; j += DEEP)
        for (int64_t c = 0; c < width; c += NR)
            for (size_t tap = 0; tap < offset.size(); tap++)
                for (int64_t m = m0; m < m1; m += MR) {
                    const E* from = a + (m - m0) * J + j * MR;
                    Micro::tile_at(int(std::min<int64_t>(MR, m1 - m)), int(std::min(DEEP, J - j)), Spaced<E>{from, MR},
                                   Listed<E>{met + offset[tap] + c, place.data() + j}, sums + (int64_t(tap) * M + m) * width + c, width,
                                   add || j > 0, from);
                }
}
