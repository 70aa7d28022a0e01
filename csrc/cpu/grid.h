// Convolution without a matrix of patches: the tile reads each number where it lies, in a copy of the image that makes that possible.
//
//   Planes   [c][remainders][row][column]   what tap (c, r, s) meets at neighbouring places lies side by side
//   Pixels   [row][column][c]               what a place meets of neighbouring channels lies side by side, as it does in channels last
//
// A copy holds a band of rows with the border of zeros. Planes have their rows and columns sorted by the remainders modulo the strides, and
// their rows of places can be multiplied as one long row: the numbers behind the end of each are computed and left out. What a tap meets
// lies at a fixed offset from the place. In bf16 a lane holds a pair of channels.
#pragma once
#include <set>

#include "patches.h"

constexpr int GRID = 6, GATHERED = 7;  // scratch slots

struct Span {  // one dimension: tap t is met at place i by pixel i * step + at, low <= at <= high
    int64_t step, low, high;
    int64_t remainder(int64_t at) const { return (at - low) % step; }
    int64_t whole(int64_t at) const { return (at - low) / step; }
    int64_t length(int64_t places) const { return places + (high - low) / step; }  // numbers of one remainder that `places` meet
    int64_t pixels(int64_t places) const { return (places - 1) * step + high - low + 1; }
};

// What is copied, and the lanes it is made of.
template <class T, Memory MEMORY, class Lane> struct Copied {
    static constexpr int PAIR = std::is_same_v<Lane, uint32_t> ? 2 : 1, L = VL<Lane>;
    Images<T, MEMORY> from;
    Span h, w;
    int64_t images = 1;  // whose bands are held at a time, one behind the other
    Lane* p = nullptr;

    int64_t lanes() const { return ceil_div(from.channels, PAIR); }

    // Where part t of `parts` of the pixels that places from row i0 on meet lies in memory: `rows` rows of places, in image n.
    const T* source(int64_t n, int64_t i0, int64_t rows, int64_t t, int64_t parts) const {
        constexpr bool COLUMNS = MEMORY == Memory::COLUMNS;
        const T* first = from.p + n * from.image() + std::max<int64_t>(0, i0 * h.step + h.low) * from.W * from.pixel();
        int64_t runs = COLUMNS ? 1 : from.channels, run = t * runs / parts, numbers = rows * h.step * from.W * from.pixel();
        return first + run * from.H * from.W + (t * runs - run * parts) * numbers / parts;
    }

  protected:
    // f(first, last, where number 0 lies or would lie): of `columns` pixels, `step` apart, from (y, x) on, those inside of image n.
    template <class F> void inside(int64_t n, int64_t y, int64_t x, int64_t step, int64_t columns, const F& f) const {
        int64_t first = std::min(columns, x < 0 ? ceil_div(-x, step) : 0);
        int64_t last = x < from.W ? std::min(columns, ceil_div(from.W - x, step)) : 0;
        if (y < 0 || y >= from.H || last < first) first = last = columns;
        f(first, last, from.p + n * from.image() + (y * from.W + x) * from.pixel());
    }
    static void store_lanes(Lane* to, vec<Lane> v, int64_t n) {
        if (n >= L) store_raw(to, v);
        else store_raw(to, v, int(n));
    }
    static void clear_lanes(Lane* to, int64_t n) {
        for (int64_t i = 0; i < n; i += L) store_raw(to + i, vec<Lane>{});
    }
    // Of channel (or pair of channels) c, `left` numbers `step` apart.
    vec<Lane> along_row(const T* pixels, int64_t c, int64_t step, int64_t left) const {
        const T* q = pixels + PAIR * c * from.channel();
        if constexpr (PAIR == 1) return every(q, step, left);
        else return every(q, step, left) | (2 * c + 1 < from.channels ? every(q + from.channel(), step, left) << 16 : vec<Lane>{});
    }
    static vec<Lane> every(const T* q, int64_t step, int64_t left) {
        auto some = [](const T* q, int64_t n) {
            int m = int(std::clamp<int64_t>(n, 0, L));
            if constexpr (PAIR == 2) return lengthen(m == L ? load_raw<halves>(q) : load_raw<halves>(q, m));
            else return m > 0 ? load(q, m) : vec<Lane>{};
        };
        if (step == 1) return some(q, left);
        if (step == 2) return evens(some(q, 2 * left - 1), some(q + L, 2 * left - 1 - L), std::make_integer_sequence<int, L>{});
        vec<Lane> v{};
        for (int i = 0; i < std::min<int64_t>(L, left); i++) v[i] = some(q + i * step, 1)[0];
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

template <class T, Memory MEMORY, class Lane> struct Planes : Copied<T, MEMORY, Lane> {
    using Base = Copied<T, MEMORY, Lane>;
    using Base::from, Base::h, Base::w, Base::images, Base::p, Base::lanes, Base::L;
    static constexpr bool PIXELS = false;
    int64_t rows, columns;  // of one remainder
    std::set<std::pair<int64_t, int64_t>> used;  // remainders that a tap meets

    Planes(const Images<T, MEMORY>& from, Span h, Span w, int64_t I, int64_t L)
        : Base{from, h, w}, rows(h.length(I)), columns(w.length(L)) {}
    void use(int64_t at_h, int64_t at_w) { used.insert({h.remainder(at_h), w.remainder(at_w)}); }
    int64_t area() const { return rows * columns; }
    int64_t plane() const { return h.step * w.step * area(); }
    int64_t size() const { return lanes() * plane(); }
    int64_t place(int64_t i, int64_t l) const { return i * columns + l; }
    int64_t lane(int64_t at_h, int64_t at_w, int64_t c) const {  // of the first place
        return c * plane() + (h.remainder(at_h) * w.step + w.remainder(at_w)) * area() + h.whole(at_h) * columns + w.whole(at_w);
    }

    void fill(int64_t n, int64_t i0) {  // i0: the band's first row of places
        p = scratch<Lane, GRID>(images * size() + 4 * L);
        for (int64_t i = 0; i < images; i++) fill_one(n + i, i0, p + i * size());
    }
    // out[place][k]: what every k meets; `height` rows of `length` places, `width` numbers to a place.
    void gather(const std::vector<int64_t>& offset, int64_t height, int64_t length, int64_t width, Lane* out) const {
        int64_t K = int64_t(offset.size());
        for (int64_t i = 0; i < height; i++, out += length * width)
            for (int64_t k = 0; k < width; k += L)
                for (int64_t l = 0; l < length; l += L) {
                    vec<Lane> square[L];
                    for (int r = 0; r < L; r++)
                        square[r] = k + r < K ? load_raw<vec<Lane>>(p + offset[k + r] + i * columns + l) : vec<Lane>{};
                    transpose(square);
                    for (int r = 0; r < std::min<int64_t>(L, length - l); r++) this->store_lanes(out + (l + r) * width + k, square[r], L);
                }
    }

  private:
    void fill_one(int64_t n, int64_t i0, Lane* band) const {
        constexpr int AT_ONCE = MEMORY == Memory::COLUMNS ? L : 1;
        for (int64_t c = 0; c < lanes(); c += AT_ONCE)
            each_row(n, i0, [&](int64_t row, int64_t first, int64_t last, const T* pixels) {
                Lane* to = band + c * plane() + row;
                if constexpr (MEMORY == Memory::ROWS) {
                    this->clear_lanes(to, first);
                    for (int64_t l = first; l < last; l += L)
                        this->store_lanes(to + l, this->along_row(pixels + l * w.step, c, w.step, last - l), L);
                    if (last < columns) this->clear_lanes(to + last, columns - last);
                } else {
                    for (int64_t l = 0; l < columns; l += L) {
                        vec<Lane> square[L];
                        for (int i = 0; i < L; i++)
                            square[i] = l + i < first || l + i >= last
                                ? vec<Lane>{} : this->along_channels(pixels + (l + i) * w.step * from.pixel(), c);
                        transpose(square);
                        int64_t n = std::min<int64_t>(L, lanes() - c);
                        for (int i = 0; i < n; i++) this->store_lanes(to + i * plane() + l, square[i], columns - l);
                    }
                }
            });
    }
    // f(offset of the row, its first and last number inside the image, where number 0 lies or would lie)
    template <class F> void each_row(int64_t n, int64_t i0, const F& f) const {
        for (auto [a, b] : used)
            for (int64_t u = 0; u < rows; u++)
                this->inside(n, (i0 + u) * h.step + h.low + a, w.low + b, w.step, columns, [&](int64_t first, int64_t last, const T* q) {
                    f((a * w.step + b) * area() + u * columns, first, last, q);
                });
    }
};

// `width` lanes to a pixel, of which those behind the channels are 0. Where no tap leaves the image, it can be read where it lies.
template <class T, Memory MEMORY, class Lane> struct Pixels : Copied<T, MEMORY, Lane> {
    using Base = Copied<T, MEMORY, Lane>;
    using Base::from, Base::h, Base::w, Base::images, Base::p, Base::lanes, Base::L, Base::PAIR;
    static constexpr bool PIXELS = true;
    int64_t rows, columns, width;
    bool in_place = false;

    Pixels(const Images<T, MEMORY>& from, Span h, Span w, int64_t I, int64_t L, int64_t width = 0)
        : Base{from, h, w}, rows(h.pixels(I)), columns(w.pixels(L)), width(width ? width : lanes()) {}
    void use(int64_t, int64_t) {}
    int64_t size() const { return in_place ? from.image() / PAIR : rows * columns * width; }
    int64_t place(int64_t i, int64_t l) const { return (i * h.step * columns + l * w.step) * width; }
    int64_t lane(int64_t at_h, int64_t at_w, int64_t c) const { return ((at_h - h.low) * columns + at_w - w.low) * width + c; }

    // Whether places up to (I, L) can be met in the image itself, which then takes the place of the copy.
    bool use_image(int64_t I, int64_t L) {
        in_place = MEMORY == Memory::COLUMNS && sizeof(Lane) == PAIR * sizeof(T) && from.channels % PAIR == 0 && h.low >= 0 && w.low >= 0 &&
                   (I - 1) * h.step + h.high < from.H && (L - 1) * w.step + w.high < from.W;
        if (in_place) columns = from.W, width = from.all_channels / PAIR;
        return in_place;
    }
    void fill(int64_t n, int64_t i0) {  // i0: the band's first row of places
        const T* image = from.p + n * from.image();
        if (in_place) return void(p = (Lane*)(image + ((i0 * h.step + h.low) * from.W + w.low) * from.pixel()));
        p = scratch<Lane, GRID>(images * size() + 4 * L);
        for (int64_t u = 0; u < images * rows; u++)
            this->inside(n + u / rows, i0 * h.step + h.low + u % rows, w.low, 1, columns, [&](int64_t first, int64_t last, const T* pixels) {
                Lane* to = p + u * columns * width;
                std::fill_n(to, first * width, Lane{}), std::fill_n(to + last * width, (columns - last) * width, Lane{});
                copy_row(to, first, last, pixels);
            });
    }

    // A lane for each number: its bf16 and that of the next place's pixel, 0 behind the last.
    uint32_t* in_pairs() {
        auto* out = reinterpret_cast<uint32_t*>(p);
        for (int64_t i = 0; i < images * rows * columns; i++)
            for (int64_t c = 0; c < width; c += L) {
                pairs low = load_raw<pairs>(out + i * width + c) >> 16, high{};
                if (i % columns + w.step < columns) high = load_raw<pairs>(out + (i + w.step) * width + c) >> 16;
                store_raw(out + i * width + c, low | high << 16);
            }
        return out;
    }

    // out[place][k]: what every k meets; `height` rows of `length` places, `apart` numbers to a place. Whole vectors are written.
    void gather(const std::vector<int64_t>& offset, int64_t height, int64_t length, int64_t apart, Lane* out) const {
        int64_t K = int64_t(offset.size());
        std::vector<int64_t> starts{0};  // of runs of k that lie side by side
        for (int64_t k = 1; k < K; k++)
            if (offset[k] != offset[k - 1] + 1) starts.push_back(k);
        starts.push_back(K);
        for (int64_t i = 0; i < height; i++)
            for (int64_t l = 0; l < length; l++, out += apart)
                for (size_t r = 0; r + 1 < starts.size(); r++)
                    for (int64_t k = starts[r]; k < starts[r + 1]; k += L)
                        store_raw(out + k, load_raw<vec<Lane>>(p + place(i, l) + offset[starts[r]] + k - starts[r]));
    }

  private:
    void copy_row(Lane* to, int64_t first, int64_t last, const T* pixels) const {
        if constexpr (MEMORY == Memory::COLUMNS && PAIR == 1)
            if (width == from.all_channels) return copy(to + first * width, pixels + first * width, (last - first) * width);
        for (int64_t c = 0; c < width; c += L)
            if constexpr (MEMORY == Memory::COLUMNS) {
                for (int64_t l = first; l < last; l++)
                    this->store_lanes(to + l * width + c, this->along_channels(pixels + l * from.pixel(), c), width - c);
            } else {
                for (int64_t l = first; l < last; l += L) {
                    vec<Lane> square[L];
                    for (int i = 0; i < L; i++)
                        square[i] = c + i < lanes() ? this->along_row(pixels + l, c + i, 1, last - l) : vec<Lane>{};
                    transpose(square);
                    for (int i = 0; i < std::min<int64_t>(L, last - l); i++)
                        this->store_lanes(to + (l + i) * width + c, square[i], width - c);
                }
            }
    }
};
