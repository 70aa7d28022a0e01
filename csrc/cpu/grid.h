// Convolution without a matrix of patches: the tile reads each row of B where it lies, in a copy of the image that makes that possible.
//
// The copy (a Grid) holds a band of rows with the border of zeros, its rows and columns sorted by their remainders modulo the strides: then
// what tap (c, r, s) meets at places that lie side by side also lies side by side, at a fixed offset from the place. Rows of places are
// multiplied as one long row; the numbers behind the end of each are computed and left out.
//
//   planes   [c][remainders][row][column]   rows of B are taps, vectors hold neighbouring places:   y and dx
//   pixels   [remainders][row][column][c]   rows of B are places, vectors hold neighbouring channels:   dweight
//
// Both formats of images go through the same copy; in bf16 a lane of a plane holds a pair of channels.
#pragma once
#include <set>

#include "patches.h"

constexpr int GRID = 6, GATHERED = 7;  // scratch slots

struct Span {  // one dimension: tap t is met at place i by pixel i * step + at, low <= at <= high
    int64_t step, low, high;
    int64_t remainder(int64_t at) const { return (at - low) % step; }
    int64_t whole(int64_t at) const { return (at - low) / step; }
    int64_t length(int64_t places) const { return places + (high - low) / step; }  // numbers of one remainder that `places` meet
};

template <class T, Memory MEMORY, class Lane> struct Grid {
    static constexpr int PAIR = std::is_same_v<Lane, uint32_t> ? 2 : 1, L = VL<Lane>;
    Images<T, MEMORY> from;
    Span h, w;
    int64_t rows, columns;  // of one remainder
    std::set<std::pair<int64_t, int64_t>> used;  // remainders that a tap meets
    Lane* p = nullptr;

    int64_t lanes() const { return ceil_div(from.channels, PAIR); }
    int64_t area() const { return rows * columns; }
    int64_t plane() const { return h.step * w.step * area(); }
    int64_t place(int64_t at_h, int64_t at_w) const {  // of the first place's pixel
        return (h.remainder(at_h) * w.step + w.remainder(at_w)) * area() + h.whole(at_h) * columns + w.whole(at_w);
    }
    void use(int64_t at_h, int64_t at_w) { used.insert({h.remainder(at_h), w.remainder(at_w)}); }

    // [c][place]; i0 is the band's first row of places.
    void fill_planes(int64_t n, int64_t i0) {
        p = scratch<Lane, GRID>(lanes() * plane() + 4 * L);
        constexpr int AT_ONCE = MEMORY == Memory::COLUMNS ? L : 1;
        for (int64_t c = 0; c < lanes(); c += AT_ONCE)
            each_row(n, i0, [&](int64_t row, int64_t first, int64_t last, const T* pixels) {
                Lane* to = p + c * plane() + row;
                if constexpr (MEMORY == Memory::ROWS) {
                    clear_lanes(to, first);
                    for (int64_t l = first; l < last; l += L) store_lanes(to + l, along_row(pixels + l * w.step, c, last - l), L);
                    if (last < columns) clear_lanes(to + last, columns - last);
                } else {
                    for (int64_t l = 0; l < columns; l += L) {
                        vec<Lane> square[L];
                        for (int i = 0; i < L; i++)
                            square[i] = l + i < first || l + i >= last ? vec<Lane>{} : along_channels(pixel_of(pixels, l + i), c);
                        transpose(square);
                        int64_t n = std::min<int64_t>(L, lanes() - c);
                        for (int i = 0; i < n; i++) store_lanes(to + i * plane() + l, square[i], int(std::min<int64_t>(L, columns - l)));
                    }
                }
            });
    }

    // [place][c], `width` lanes to a place.
    void fill_pixels(int64_t n, int64_t i0, int64_t width) {
        p = scratch<Lane, GRID>(plane() * width + 4 * L);
        each_row(n, i0, [&](int64_t row, int64_t first, int64_t last, const T* pixels) {
            Lane* to = p + row * width;
            std::fill_n(to, first * width, Lane{}), std::fill_n(to + last * width, (columns - last) * width, Lane{});
            for (int64_t c = 0; c < width; c += L)
                if constexpr (MEMORY == Memory::COLUMNS) {
                    for (int64_t l = first; l < last; l++) store_lanes(to + l * width + c, along_channels(pixel_of(pixels, l), c), L);
                } else {
                    for (int64_t l = first; l < last; l += L) {
                        vec<Lane> square[L];
                        for (int i = 0; i < L; i++)
                            square[i] = c + i < lanes() ? along_row(pixels + l * w.step, c + i, last - l) : vec<Lane>{};
                        transpose(square);
                        for (int i = 0; i < std::min<int64_t>(L, last - l); i++) store_lanes(to + (l + i) * width + c, square[i], L);
                    }
                }
        });
    }

    // out[place][k]: what every k meets, from planes; `height` rows of `length` places, `width` numbers to a place.
    void gather(const std::vector<int64_t>& offset, int64_t height, int64_t length, int64_t width, Lane* out) const {
        int64_t K = int64_t(offset.size());
        for (int64_t i = 0; i < height; i++, out += length * width)
            for (int64_t k = 0; k < width; k += L)
                for (int64_t l = 0; l < length; l += L) {
                    vec<Lane> square[L];
                    for (int r = 0; r < L; r++)
                        square[r] = k + r < K ? load_raw<vec<Lane>>(p + offset[k + r] + i * columns + l) : vec<Lane>{};
                    transpose(square);
                    for (int r = 0; r < std::min<int64_t>(L, length - l); r++) store_lanes(out + (l + r) * width + k, square[r], L);
                }
    }

  private:
    // f(offset of the row, its first and last number inside the image, where number 0 lies or would lie)
    template <class F> void each_row(int64_t n, int64_t i0, const F& f) const {
        for (auto [a, b] : used)
            for (int64_t u = 0; u < rows; u++) {
                int64_t y = (i0 + u) * h.step + h.low + a, x = w.low + b;
                int64_t first = std::min(columns, x < 0 ? ceil_div(-x, w.step) : 0);
                int64_t last = x < from.W ? std::min(columns, ceil_div(from.W - x, w.step)) : 0;
                if (y < 0 || y >= from.H || last < first) first = last = columns;
                f((a * w.step + b) * area() + u * columns, first, last, from.p + n * from.image() + (y * from.W + x) * from.pixel());
            }
    }
    const T* pixel_of(const T* row, int64_t l) const { return row + l * w.step * from.all_channels; }
    static void store_lanes(Lane* to, vec<Lane> v, int n) {
        if (n >= L) store_raw(to, v);
        else store_raw(to, v, n);
    }
    static void clear_lanes(Lane* to, int64_t n) {
        for (int64_t i = 0; i < n; i += L) store_raw(to + i, vec<Lane>{});
    }
    // Of channel (or pair of channels) c, `left` numbers w.step apart.
    vec<Lane> along_row(const T* pixels, int64_t c, int64_t left) const {
        const T* q = pixels + PAIR * c * from.channel();
        if constexpr (PAIR == 1) return every(q, left);
        else return every(q, left) | (2 * c + 1 < from.channels ? every(q + from.channel(), left) << 16 : vec<Lane>{});
    }
    vec<Lane> every(const T* q, int64_t left) const {
        auto some = [](const T* q, int64_t n) {
            int m = int(std::clamp<int64_t>(n, 0, L));
            if constexpr (PAIR == 2) return lengthen(m == L ? load_raw<halves>(q) : load_raw<halves>(q, m));
            else return m > 0 ? load(q, m) : vec<Lane>{};
        };
        if (w.step == 1) return some(q, left);
        if (w.step == 2) return evens(some(q, 2 * left - 1), some(q + L, 2 * left - 1 - L), std::make_integer_sequence<int, L>{});
        vec<Lane> v{};
        for (int i = 0; i < std::min<int64_t>(L, left); i++) v[i] = some(q + i * w.step, 1)[0];
        return v;
    }
    // Of one pixel, the lanes from c on.
    vec<Lane> along_channels(const T* q, int64_t c) const {
        int64_t left = from.channels - PAIR * c;
        if constexpr (PAIR == 2) {
            auto from = reinterpret_cast<const uint16_t*>(q) + 2 * c;
            if (left >= 2 * L) return load_raw<vec<Lane>>(from);
            return load_raw<vec<Lane>>(from, int(std::max<int64_t>(left, 0)));
        } else return left > 0 ? load(q + c, int(std::min<int64_t>(L, left))) : vec<Lane>{};
    }
};
