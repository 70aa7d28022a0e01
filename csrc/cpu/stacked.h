// Small images, many of them: convolution with the images of a batch side by side, and the filters where they are stored.
//
//   sums[m, n] of a place = sum_k filter[m, k] stack[k, n]        k = (channel, tap) that meets a pixel from there, n = an image
//
//             images, NR at a time       In 2 x 2 pixels a filter of 3 x 3 taps meets 4 of them: the border of zeros is never multiplied.
//            +----+----+                 Nor are filters packed, so that each is fetched once, for all places of all images: where there
//   filters  |tile|                      are 512 channels, that takes as long as the products.
//            +----+
#pragma once
#include "slide.h"

// Rows of A where they lie: the numbers for k where a list says, rows at equal distances.
template <class E> struct ListedRows {
    const E* p;
    const int64_t* offset;
    int64_t step;
    const E* operator[](int k) const { return p + offset[k]; }
    E of(const E* column, int i) const { return column[i * step]; }
};

// The places of one dimension, sorted by which taps meet a pixel from there.
struct Kinds {
    std::vector<std::vector<int64_t>> taps;  // of a kind
    std::vector<int64_t> of;                 // the kind of a place

    explicit Kinds(const Axis& axis) {
        for (int64_t i = 0; i < axis.places; i++) {
            std::vector<int64_t> met;
            for (int64_t t = 0; t < axis.taps(); t++)
                if (i >= axis.first[t] && i < axis.last[t]) met.push_back(t);
            auto found = std::find(taps.begin(), taps.end(), met);
            of.push_back(found - taps.begin());
            if (found == taps.end()) taps.push_back(met);
        }
    }
};

template <class T, Memory MEMORY> struct Stacked {
    using Micro = Fma<T>;
    static constexpr int MR = Micro::MR, NR = Micro::NR, V = VL<T>;
    int64_t groups;
    const Filters<T>& filters;
    const Images<T, MEMORY>& images;
    const std::vector<Bank<T, MEMORY>>& banks;
    int64_t N = images.images, C = images.channels, M = filters.M, pixels = images.H * images.W, apart = round_up(N, NR);
    // Filters that lie side by side are a short run for every k: such runs, a power of two apart, would compete for few lines of the caches.
    bool copied = filters.sm == 1;
    int64_t to_channel = copied ? MR : filters.sc, to_tap = copied ? C * MR : filters.st;

    struct Met {  // from places of one kind: where every k lies in the filters and, seen from the place, in the stack
        std::vector<int64_t> filter, stack;
    };
    struct Places {  // of a bank
        Kinds h, w;
        std::vector<Met> met;  // [kind of row][kind of column]
    };

    void run() const {
        Tensor memory = empty(scalar_type<T>(), {C, pixels, apart});
        std::vector<Places> places;
        for (const auto& bank : banks) places.push_back(places_of(bank));
        int64_t tiles = ceil_div(M, MR);
        for (int64_t g = 0; g < groups; g++) {
            T* stack = data<T>(memory);
            stack_up(images.group(g), stack);
            parallel(tiles, [&](int64_t i, int64_t end) {
                for (; i < end; i++) {
                    int64_t m = M * i / tiles, rows = M * (i + 1) / tiles - m;
                    const T* filter = filters.p + g * filters.sg + m * filters.sm;
                    if (copied) filter = copy_of(filter, int(rows));
                    for (size_t b = 0; b < banks.size(); b++)
                        tile(filter, m, int(rows), stack, banks[b], places[b], banks[b].result.of_group(g, M));
                }
            }, double(M) * C * filters.taps * pixels * N < SERIAL);
        }
    }

  private:
    // stack[c][pixel][image] of a group; zeros behind the last image.
    void stack_up(const Images<T, MEMORY>& from, T* stack) const {
        constexpr bool COLUMNS = MEMORY == Memory::COLUMNS;
        int64_t side_by_side = COLUMNS ? C : C * pixels, runs = COLUMNS ? pixels : 1, vectors = ceil_div(side_by_side, V);
        parallel(runs * vectors, [&](int64_t i, int64_t end) {
            for (; i < end; i++) {
                int64_t run = i / vectors, at = i % vectors * V;
                int lanes = int(std::min<int64_t>(V, side_by_side - at));
                for (int64_t n = 0; n < apart; n += V) {
                    vec<T> square[V];
                    const T* p = from.p + n * from.image() + run * from.pixel() + at;
                    for (int j = 0; j < V; j++) square[j] = n + j < N ? load(p + j * from.image(), lanes) : vec<T>{};
                    transpose(square);
                    for (int j = 0; j < lanes; j++) store(stack + (COLUMNS ? (at + j) * pixels + run : at + j) * apart + n, square[j]);
                }
            }
        }, C * pixels * apart <= SERIAL_NUMBERS);
    }

    Places places_of(const Bank<T, MEMORY>& bank) const {
        Places all{Kinds(bank.h), Kinds(bank.w), {}};
        for (const auto& rows : all.h.taps)
            for (const auto& columns : all.w.taps) {
                std::vector<std::pair<int64_t, int64_t>> taps;  // where one lies in a filter and, seen from the place, in an image
                for (int64_t t : rows)
                    for (int64_t u : columns)
                        taps.push_back({bank.taps[t * bank.w.taps() + u] * to_tap, bank.h.at[t] * images.W + bank.w.at[u]});
                std::sort(taps.begin(), taps.end());
                int64_t n = int64_t(taps.size());
                Met& met = all.met.emplace_back();
                for (int64_t k = 0; k < C * n; k++) {  // in the order in which filters lie
                    int64_t c = to_channel > to_tap ? k / n : k % C;
                    auto [in_filter, pixel] = taps[to_channel > to_tap ? k % n : k / C];
                    met.filter.push_back(c * to_channel + in_filter), met.stack.push_back((c * pixels + pixel) * apart);
                }
            }
        return all;
    }

    // `rows` filters as [tap][channel][MR].
    const T* copy_of(const T* filter, int rows) const {
        T* out = scratch<T, 3>(filters.taps * C * MR);
        for (int64_t c = 0; c < C; c++)
            for (int64_t tap = 0; tap < filters.taps; tap++) {
                const T *from = filter + c * filters.sc + tap * filters.st, *ahead = from + 3 * filters.sc;
                __builtin_prefetch(ahead), __builtin_prefetch(ahead + MR - 1);
                for (int r = 0; r < rows; r += V) store(out + (tap * C + c) * MR + r, load(from + r, rows - r), rows - r);
            }
        return out;
    }

    // A tile of filters at all places of all images.
    void tile(const T* filter, int64_t m, int rows, const T* stack, const Bank<T, MEMORY>& bank, const Places& places,
              Result<T, MEMORY> result) const {
        int64_t I = result.I, L = result.L, all = rows * I * L, ld = round_up(all, V);
        T *sums = scratch<T, 0>(all * NR), *of_image = scratch<T, 1>(NR * ld);
        result.pitch = L;
        for (int64_t n = 0; n < N; n += NR) {
            for (int64_t i = 0; i < I; i++)
                for (int64_t l = 0; l < L; l++) {
                    const Met& met = places.met[places.h.of[i] * int64_t(places.w.taps.size()) + places.w.of[l]];
                    const T* place = stack + (i * bank.h.step * images.W + l * bank.w.step) * apart + n;
                    const T* next = copied ? filter : filter + rows * filters.sm * (I * L + i * L + l) / (I * L);  // of the tile to come
                    Micro::tile_at(rows, int(met.filter.size()), ListedRows<T>{filter, met.filter.data(), filters.sm},
                                   Listed<T>{place, met.stack.data()}, sums + (i * L + l) * NR, I * L * NR, false, next);
                }
            turn(sums, NR, all, NR, of_image, ld);
            for (int64_t j = 0; j < std::min<int64_t>(NR, N - n); j++)
                result.write(Tile<T>{of_image + j * ld, I * L, m, 0, rows, int(I * L)}, Place{n + j, 0, 0});
        }
    }
};
