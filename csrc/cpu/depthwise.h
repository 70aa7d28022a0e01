// Convolution of every channel with a filter of its own: no channels are summed, so there is no product, and memory decides.
//
//   images in rows      a channel's plane is copied once into scratch with its border of zeros, its columns sorted by their remainder
//                       modulo the stride: every tap then meets vectors of places that lie side by side
//   images in columns   a vector holds neighbouring channels of one place
//
// The gradient of the input is the same convolution of dz, with the filter turned round and the places of dz apart by the stride.
#pragma once
#include "conv2d.h"

// Place i and tap t meet number (i * step + t * dilation - before) / apart of the input, where that is whole and inside.
struct Stride {
    int64_t size, places, taps, step, dilation, before, apart;
    int64_t reach() const { return (places - 1) * step + (taps - 1) * dilation + 1; }
    int64_t met(int64_t i, int64_t t) const {  // -1: none
        int64_t at = i * step + t * dilation - before;
        return at < 0 || at % apart || at / apart >= size ? -1 : at / apart;
    }
};

template <class T, Memory MEMORY> struct Depthwise {
    using C = compute_t<T>;
    using V = vec<C>;
    static constexpr int L = VL<C>, SIDE_BY_SIDE = 4, TOGETHER = VECTOR_BYTES == 64 ? 8 : 4;
    int64_t N, channels;
    Stride h, w;

    // put(v, at, c, lanes): sums of the numbers from `at` on of the result, the first of channel c. filter[tap][channel] or, in rows, filter[channel][tap].
    template <class Put> void convolve(const T* x, const C* filter, T* y, const Put& put) const {
        if constexpr (MEMORY == Memory::ROWS)
            parallel(N * channels, [&](int64_t i, int64_t end) {
                for (Plane plane(h, w); i < end; i++) {
                    int64_t c = i % channels;
                    plane.fill(x + i * h.size * w.size);
                    convolve_plane(plane, filter + c * h.taps * w.taps, c, i * h.places * w.places, put);
                }
            }, serial());
        else {
            std::vector<int64_t> met;  // [place][tap]
            for (int64_t l = 0; l < w.places; l++)
                for (int64_t s = 0; s < w.taps; s++) met.push_back(w.met(l, s));
            parallel(N * h.places, [&](int64_t i, int64_t end) { for (; i < end; i++) convolve_row(x, filter, met.data(), i, y, put); }, serial());
        }
    }

    // dfilter, laid out like the filter: sums over all places of dz, the gradient of the result, times what each tap meets there.
    void filter_gradient(const T* x, const T* dz, C* dfilter) const {
        if constexpr (MEMORY == Memory::ROWS)
            parallel(channels, [&](int64_t c, int64_t end) {
                for (Plane plane(h, w); c < end; c++)
                    for (int64_t n = 0; n < N; n++) {
                        plane.fill(x + (n * channels + c) * h.size * w.size);
                        add_plane(plane, dz + (n * channels + c) * h.places * w.places, n > 0, dfilter + c * h.taps * w.taps);
                    }
            }, serial());
        else {  // in parts whose number depends on the sizes alone, added in order
            int64_t rows = N * h.places, parts = std::clamp<int64_t>(rows / 16, 1, 16), size = h.taps * w.taps * channels;
            std::vector<C> sums(parts * size);
            std::vector<int64_t> at;
            for (int64_t s = 0; s < w.taps; s++) at.push_back(s * w.dilation - w.before);
            Axis along(w.size, w.places, w.step, at);
            parallel(parts, [&](int64_t i, int64_t end) {
                for (; i < end; i++)
                    for (int64_t row = rows * i / parts; row < rows * (i + 1) / parts; row++) add_row(x, dz, along, row, sums.data() + i * size);
            }, serial());
            std::copy_n(sums.data(), size, dfilter);
            for (int64_t i = 1; i < parts; i++)
                for (int64_t k = 0; k < size; k++) dfilter[k] += sums[i * size + k];
        }
    }

  private:
    bool serial() const { return N * channels * h.places * w.places <= SERIAL_NUMBERS; }

    struct Plane {  // one channel with its border: [reach][remainder modulo the stride][width]
        Stride h, w;
        int64_t width, row;
        C* p;
        Plane(const Stride& h, const Stride& w)
            : h(h), w(w), width(round_up(ceil_div(w.reach(), w.step), L) + SIDE_BY_SIDE * L), row(width * w.step),
              p(scratch<C, 5>(h.reach() * row)) {
            std::fill_n(p, h.reach() * row, C(0));  // the border stays
        }
        void fill(const T* from) {
            for (int64_t i = 0; i < h.size; i++, from += w.size) {
                int64_t r = i * h.apart + h.before;
                C* to = p + r * row;
                if (r < 0 || r >= h.reach()) continue;
                if (w.apart == 1)
                    for (int64_t rest = 0; rest < w.step; rest++) {  // numbers l, l + step, ... go side by side
                        int64_t l = std::max<int64_t>(0, -w.before) , c = l + w.before;
                        l += (rest - c % w.step + w.step) % w.step, c = l + w.before;
                        int64_t stop = std::min(w.size, w.reach() - w.before);
                        if (l < stop) copy_every(w.step, to + rest * width + c / w.step, from + l, ceil_div(stop - l, w.step));
                    }
                else
                    for (int64_t l = 0, c = w.before; l < w.size; l++, c += w.apart)  // of a gradient: the step is 1
                        if (c >= 0 && c < w.reach()) to[c] = load(from + l, 1)[0];
            }
        }
        const C* at(int64_t i, int64_t r, int64_t s) const {  // what tap (r, s) meets at places (i, 0), (i, 1), ...
            int64_t c = s * w.dilation;
            return p + (i * h.step + r * h.dilation) * row + c % w.step * width + c / w.step;
        }
    };

    template <class Put> void convolve_plane(const Plane& plane, const C* filter, int64_t c, int64_t at, const Put& put) const {
        for (int64_t i = 0; i < h.places; i++, at += w.places)
            for (int64_t l = 0; l < w.places; l += SIDE_BY_SIDE * L) {
                V acc[SIDE_BY_SIDE] = {};
                for (int64_t r = 0, tap = 0; r < h.taps; r++)
                    for (int64_t s = 0; s < w.taps; s++, tap++) {
                        const C* from = plane.at(i, r, s) + l;
#pragma GCC unroll 4
                        for (int v = 0; v < SIDE_BY_SIDE; v++) acc[v] += set(filter[tap]) * load(from + v * L);
                    }
#pragma GCC unroll 4
                for (int v = 0; v < SIDE_BY_SIDE; v++)
                    if (int64_t left = w.places - l - v * L; left > 0) put(acc[v], at + l + v * L, c, int(std::min<int64_t>(L, left)));
            }
    }

    // Row `row` of all places of all images: those whose taps all meet pixels TOGETHER at a time, the last of them twice where they do not
    // divide, and those at the border.
    template <class Put> void convolve_row(const T* x, const C* filter, const int64_t* met, int64_t row, T* y, const Put& put) const {
        int64_t span = (w.taps - 1) * w.dilation, inside = w.size - 1 - span + w.before;  // the last place * step
        int64_t first = std::min(w.places, ceil_div(std::max<int64_t>(w.before, 0), w.step));
        int64_t last = inside < 0 ? 0 : std::min(w.places, inside / w.step + 1), whole = channels / L * L;
        if (w.apart > 1 || last - first < TOGETHER) first = last = w.places, whole = 0;
        int64_t below = std::min(h.size - 1, (row % h.places) * h.step - h.before + (h.taps - 1) * h.dilation);
        bool three_side_by_side = w.taps == 3 && w.step == 1 && w.dilation == 1;
        const T* bottom = x + ((row / h.places * h.size + below) * w.size - w.before + span) * channels;
        for (int64_t l = first; l < last; l += TOGETHER)
            for (int64_t c = 0; c < whole; c += L) {
                for (int v = 0; v < TOGETHER; v++) {
                    __builtin_prefetch(bottom + (l + TOGETHER + v) * w.step * channels + c, 0, 3);
                    __builtin_prefetch(y + (row * w.places + l + TOGETHER + v) * channels + c, 1, 3);
                }
                int64_t at = std::min(l, last - TOGETHER);
                if (three_side_by_side) convolve_pixels<true, 3>(x, filter, met, row, at, TOGETHER, c, put);
                else convolve_pixels<true>(x, filter, met, row, at, TOGETHER, c, put);
            }
        auto some = [&](int64_t begin, int64_t end, int64_t c0) {
            for (int64_t l = begin; l < end; l += TOGETHER)
                for (int64_t c = c0; c < channels; c += L)
                    convolve_pixels<false>(x, filter, met, row, l, int(std::min<int64_t>(TOGETHER, end - l)), c, put);
        };
        some(0, first, 0), some(first, last, whole), some(last, w.places, 0);
    }
    // `count` places of a row. WHOLE: TOGETHER, all that their taps meet lies inside the image, and there is a whole vector of channels.
    // SIDE taps, if not 0, meet pixels side by side, as neighbouring places do: each pixel is loaded once for all of them.
    template <bool WHOLE, int SIDE = 0, class Put>
    INLINE void convolve_pixels(const T* x, const C* filter, const int64_t* met, int64_t row, int64_t l, int count, int64_t c,
                                const Put& put) const {
        int64_t n = row / h.places, i = row % h.places, apart = w.step * channels;
        int lanes = WHOLE ? L : int(std::min<int64_t>(L, channels - c));
        V acc[TOGETHER] = {};
        for (int64_t r = 0; r < h.taps; r++) {
            int64_t y = h.met(i, r);
            if (y < 0) continue;
            const T* from = x + (n * h.size + y) * w.size * channels + c;
            const T* at = from + (l * w.step - w.before) * channels;
            if constexpr (SIDE > 0) {
                V weight[SIDE];
                for (int s = 0; s < SIDE; s++) weight[s] = load(filter + (r * SIDE + s) * channels + c);
#pragma GCC unroll 16
                for (int u = 0; u < TOGETHER + SIDE - 1; u++) {
                    V pixel = load(at + u * channels);
#pragma GCC unroll 4
                    for (int s = 0; s < SIDE; s++)
                        if (u >= s && u - s < TOGETHER) acc[u - s] += weight[s] * pixel;
                }
                continue;
            }
            for (int64_t s = 0; s < w.taps; s++, at += w.dilation * channels) {
                V weight = load(filter + (r * w.taps + s) * channels + c, lanes);
#pragma GCC unroll 8
                for (int v = 0; v < TOGETHER; v++) {
                    if constexpr (WHOLE) acc[v] += weight * load(at + v * apart);
                    else if (int64_t pixel = v < count ? met[(l + v) * w.taps + s] : -1; pixel >= 0)
                        acc[v] += weight * load(from + pixel * channels, lanes);
                }
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < TOGETHER; v++)
            if (WHOLE || v < count) put(acc[v], (row * w.places + l + v) * channels + c, c, lanes);
    }

    void add_plane(const Plane& plane, const T* dz, bool add, C* sums) const {
        constexpr int AT_ONCE = 9;
        for (int64_t tap = 0, taps = h.taps * w.taps; tap < taps; tap += AT_ONCE) {
            V acc[AT_ONCE] = {};
            const C* met[AT_ONCE];  // those past the end repeat the last one
            for (int t = 0; t < AT_ONCE; t++) {
                int64_t one = std::min(tap + t, taps - 1);
                met[t] = plane.at(0, one / w.taps, one % w.taps);
            }
            for (int64_t i = 0; i < h.places; i++)
                for (int64_t l = 0; l < w.places; l += L) {
                    int lanes = int(std::min<int64_t>(L, w.places - l));
                    V d = load(dz + i * w.places + l, lanes);
#pragma GCC unroll 9
                    for (int t = 0; t < AT_ONCE; t++) acc[t] += d * load(met[t] + i * h.step * plane.row + l, lanes);
                }
            for (int t = 0; t < std::min<int64_t>(AT_ONCE, taps - tap); t++) sums[tap + t] = (add ? sums[tap + t] : 0) + sum(acc[t]);
        }
    }

    // sums[tap][channel] += what row `row` of all places of all images adds.
    void add_row(const T* x, const T* dz, const Axis& along, int64_t row, C* sums) const {
        constexpr int AT_ONCE = 4;  // taps of a row of the filter, each at two places
        for (int64_t r = 0; r < h.taps; r++) {
            int64_t y = h.met(row % h.places, r);
            if (y < 0) continue;
            for (int64_t s = 0; s < w.taps; s += AT_ONCE) {
                int count = int(std::min<int64_t>(AT_ONCE, w.taps - s));
                int64_t begin = along.first[s], end = along.last[s + count - 1];  // where all of them meet pixels
                for (int64_t c = 0; c < channels; c += L) {
                    int lanes = int(std::min<int64_t>(L, channels - c));
                    const T* slope = dz + row * w.places * channels + c;
                    const T* from = x + ((row / h.places * h.size + y) * w.size - w.before + s * w.dilation) * channels + c;
                    V total[2][AT_ONCE] = {};
                    auto add = [&](int u, int t, int64_t l) INLINE {
                        total[u][t] += load(slope + l * channels, lanes) * load(from + (l * w.step + t * w.dilation) * channels, lanes);
                    };
                    int64_t l = begin;
                    auto together = [&](auto n) INLINE {
                        for (; l + 2 <= end; l += 2)
#pragma GCC unroll 4
                            for (int t = 0; t < n; t++) add(0, t, l), add(1, t, l + 1);
                    };
                    count == 4 ? together(std::integral_constant<int, 4>{}) : count == 3 ? together(std::integral_constant<int, 3>{})
                        : count == 2 ? together(std::integral_constant<int, 2>{}) : together(std::integral_constant<int, 1>{});
                    for (int t = 0; t < count; t++) {
                        for (int64_t j = along.first[s + t]; j < std::min(begin, along.last[s + t]); j++) add(0, t, j);
                        for (int64_t j = std::max(l, along.first[s + t]); j < along.last[s + t]; j++) add(0, t, j);
                        C* sum = sums + (r * w.taps + s + t) * channels + c;
                        store(sum, load(sum, lanes) + total[0][t] + total[1][t], lanes);
                    }
                }
            }
        }
    }
};

// The filters as Depthwise reads them; `turned` round, the last tap first.
template <class S, Memory MEMORY, class T> std::vector<S> own_filters(const Geometry& s, const T* weight, bool turned) {
    int64_t taps = s.R * s.S;
    std::vector<S> out(s.C * taps);
    for (int64_t c = 0; c < s.C; c++)
        for (int64_t t = 0; t < taps; t++)
            out[MEMORY == Memory::ROWS ? c * taps + t : t * s.C + c] = load(weight + c * taps + (turned ? taps - 1 - t : t), 1)[0];
    return out;
}

template <class T, Memory MEMORY> struct OwnFilters {
    using S = compute_t<T>;
    const Geometry& s;
    Depthwise<T, MEMORY> to_results() const {
        auto along = [&](int d, int64_t size, int64_t places, int64_t taps) {
            return Stride{size, places, taps, s.stride[d], s.dilation[d], s.before[d], 1};
        };
        return {s.N, s.C, along(0, s.H, s.P, s.R), along(1, s.W, s.Q, s.S)};
    }
    Depthwise<T, MEMORY> to_inputs() const {
        auto back = [&](int d, int64_t size, int64_t places, int64_t taps) {
            return Stride{size, places, taps, 1, s.dilation[d], (taps - 1) * s.dilation[d] - s.before[d], s.stride[d]};
        };
        return {s.N, s.C, back(0, s.P, s.H, s.R), back(1, s.Q, s.W, s.S)};
    }
    static vec<S> add(vec<S> v, const T* bias, int64_t c, int lanes) {
        if (bias) v += MEMORY == Memory::ROWS ? set(S(load(bias + c, 1)[0])) : load(bias + c, lanes);
        return v;
    }
    void forward(const T* x, const T* weight, const T* bias, Activation act, T* y, T* z) const {
        std::vector<S> filters = own_filters<S, MEMORY>(s, weight, false);
        act.with_few<S>([&](auto value, auto) {
            to_results().convolve(x, filters.data(), y, [=](vec<S> v, int64_t at, int64_t c, int lanes) {
                v = add(v, bias, c, lanes);
                if (z) store(z + at, v, lanes);
                store(y + at, value(v), lanes);
            });
        });
    }
    void input_gradient(const T* dz, const T* weight, const T* bias, T* dx) const {
        std::vector<S> filters = own_filters<S, MEMORY>(s, weight, true);
        to_inputs().convolve(dz, filters.data(), dx, [=](vec<S> v, int64_t at, int64_t c, int lanes) { store(dx + at, add(v, bias, c, lanes), lanes); });
    }
    void weight_gradient(const T* dz, const T* x, T* dweight) const {
        int64_t taps = s.R * s.S;
        std::vector<S> sums(s.C * taps);
        to_results().filter_gradient(x, dz, sums.data());
        for (int64_t i = 0; i < s.C * taps; i++)
            put_one(dweight + i, sums[MEMORY == Memory::ROWS ? i : i % taps * s.C + i / taps]);
    }
};
