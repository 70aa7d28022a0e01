// max_pool2d, regular or adaptive: y[p,q] = the largest x[h,w] of a window, and where in the window it is; dx gathers dy from those places.
//
//   which      the first largest, in the order of rows, or the last NaN: v replaces the largest so far where v > it or v is NaN
//   argmax     place (r, s) of the window as the number r KW + s, in a byte where windows have at most 256 places, else in 4
//   backward   a number of dx asks the windows that see it whether they took it, so nothing is cleared first and every sum has its order
//
//   channels last   vectors over channels, 4 at a time in registers; a window is a run over pixels
//   planes          vectors over the windows of a row, which see neighbours in the strands of windows.h; where windows are wide or lie
//                   irregularly, vectors over the columns of one window, whose lanes are compared at the end
#include "windows.h"

namespace {
using namespace windows;

constexpr const char *FORWARD = "max_pool2d_forward", *BACKWARD = "max_pool2d_backward";

template <class C> constexpr C LOWEST = -std::numeric_limits<C>::infinity();

// The largest number seen so far in every lane, and its number in the window.
template <class C> struct Largest {
    vec<C> value;
    vec<ints<C>> code;
    INLINE void see(vec<C> v, vec<ints<C>> here) {
        code = v > value ? here : v != v ? here : code;
        value = v > value ? v : v != v ? v : value;
    }
};

template <class C> inline vec<ints<C>> all(int64_t code) { return vec<ints<C>>{} + ints<C>(code); }

template <class V, class T> inline V load_some(const T* p, int n) { return n >= LANES<V> ? load_raw<V>(p) : load_raw<V>(p, n); }
template <class V, class T> inline void store_some(T* p, V v, int n) { n >= LANES<V> ? store_raw(p, v) : store_raw(p, v, n); }

// The first n codes as bytes or int32, and back.
template <class K> inline void store_codes(K* to, vec<int32_t> code, int n) {
    if constexpr (sizeof(K) == 4) return store_some(to, code, n);
    else store_some(to, __builtin_convertvector(shorten(bits_as<vec<uint32_t>>(code)), bytes), n);
}
template <class K> inline void store_codes(K* to, vec<int64_t> code, int n) {
    for (int i = 0; i < n; i++) to[i] = code[i];
}
template <class C, class K> inline vec<ints<C>> load_codes(const K* from, int n) {
    if constexpr (sizeof(C) == 8) {
        int64_t code[VL<C>] = {};
        if (n >= VL<C>)
            for (int i = 0; i < VL<C>; i++) code[i] = from[i];
        else
            for (int i = 0; i < n; i++) code[i] = from[i];
        return load_raw<vec<int64_t>>(code);
    } else if constexpr (sizeof(K) == 4) return load_some<vec<int32_t>>(from, n);
    else return bits_as<vec<int32_t>>(lengthen(load_some<bytes>(from, n)));
}

// ---- channels last -----------------------------------------------------------------------------------------------------------------

template <class T, class K> void forward_pixels(const Windows& k, const T* x, T* y, K* argmax) {
    using C = compute_t<T>;
    constexpr int L = VL<C>;
    const std::vector<Window> columns = k.w.all();
    const int64_t KW = k.w.widest(), row = k.w.in * k.C, down = k.h.dilation * row, right = k.w.dilation * k.C;
    each_row_of_pixels<GROUP * L>(k, k.N * k.h.out, [&](int64_t i, int64_t begin, int64_t end) {
        const Window h = k.h.window(i % k.h.out);
        const T* image = x + i / k.h.out * k.h.in * row + h.start * row;
        for (int64_t q = 0; q < k.w.out; q++) {
            const Window w = columns[q];
            int64_t at = (i * k.w.out + q) * k.C;
            each_group<L>(begin, end, [&](auto n, int64_t c, int lanes) INLINE {
                constexpr int M = decltype(n)::value;
                Largest<C> best[M];
                for (auto& b : best) b = {set(LOWEST<C>), all<C>(h.first * KW + w.first)};
                for (int64_t r = h.first; r < h.last; r++)
                    for (int64_t s = w.first; s < w.last; s++) {
                        const T* pixel = image + r * down + w.start * k.C + s * right + c;
                        unrolled<M>([&](int j) INLINE {
                            fetch(pixel + PIXELS_AHEAD * k.C + j * L);
                            best[j].see(load(pixel + j * L, lanes), all<C>(r * KW + s));
                        });
                    }
                unrolled<M>([&](int j) INLINE {
                    store(y + at + c + j * L, best[j].value, lanes);
                    if (argmax) store_codes(argmax + at + c + j * L, best[j].code, lanes);
                });
            });
        }
    });
}

template <class T, class K> void backward_pixels(const Windows& k, const T* dy, const K* argmax, T* dx) {
    using C = compute_t<T>;
    constexpr int L = VL<C>;
    const int64_t KW = k.w.widest();
    const std::vector<Range> columns = k.w.coverings();
    each_row_of_pixels<GROUP * L>(k, k.N * k.h.in, [&](int64_t i, int64_t begin, int64_t end) {
        const int64_t h = i % k.h.in, image = i / k.h.in * k.h.out * k.w.out;
        const Range rows = k.h.covering(h);
        for (int64_t w = 0; w < k.w.in; w++)
            each_group<L>(begin, end, [&](auto n, int64_t c, int lanes) INLINE {
                constexpr int M = decltype(n)::value;
                vec<C> acc[M] = {};
                k.h.each_covering(rows, h, [&](int64_t p, int64_t r) INLINE {
                    k.w.each_covering(columns[w], w, [&](int64_t q, int64_t s) INLINE {
                        int64_t at = (image + p * k.w.out + q) * k.C + c;
                        unrolled<M>([&](int j) INLINE {
                            fetch(dy + at + PIXELS_AHEAD * k.C + j * L);
                            vec<C> slope = load(dy + at + j * L, lanes);
                            acc[j] += load_codes<C>(argmax + at + j * L, lanes) == all<C>(r * KW + s) ? slope : vec<C>{};
                        });
                    });
                });
                T* to = dx + (i * k.w.in + w) * k.C + c;
                unrolled<M>([&](int j) INLINE { fetch<1>(to + PIXELS_AHEAD * k.C + j * L), store(to + j * L, acc[j], lanes); });
            });
    });
}

// ---- planes, vectors over windows --------------------------------------------------------------------------------------------------

template <class T, class K> void forward_strands(const Windows& k, const T* x, T* y, K* argmax) {
    using C = compute_t<T>;
    using I = ints<C>;
    constexpr int L = VL<C>;
    const Strands<C> strands(k.w, LOWEST<C>);
    const int64_t P = k.h.out, Q = k.w.out, W = k.w.in, KW = k.w.widest(), padded = ceil_div(Q, L) * L;
    std::vector<I> first(padded);  // offset of the first column that a window sees
    for (int64_t q = 0; q < Q; q++) first[q] = k.w.window(q).first;
    parallel(k.N * k.C * P, [&](int64_t i, int64_t end) {
        std::vector<C> row = strands.filled(), value(padded);
        std::vector<I> code(padded);
        for (Row at(i, P); i < end; i++, at++) {
            const Window h = k.h.window(at.row);
            fill(value.data(), Q, LOWEST<C>);
            for (int64_t q = 0; q < Q; q += L) store_raw(&code[q], load_raw<vec<I>>(&first[q]) + all<C>(h.first * KW));
            for (int64_t r = h.first; r < h.last; r++) {
                strands.split(x + (at.plane * k.h.in + h.start + r * k.h.dilation) * W, row.data());
                for (int64_t q = 0; q < Q; q += L) {
                    Largest<C> best = {load(&value[q]), load_raw<vec<I>>(&code[q])};
                    for (int64_t s = 0; s < KW; s++) best.see(load(&row[strands.at[s] + q]), all<C>(r * KW + s));
                    store(&value[q], best.value), store_raw(&code[q], best.code);
                }
            }
            for (int64_t q = 0; q < Q; q += L) {
                int lanes = std::min<int64_t>(L, Q - q);
                store(y + i * Q + q, load(&value[q]), lanes);
                if (argmax) store_codes(argmax + i * Q + q, load_raw<vec<I>>(&code[q]), lanes);
            }
        }
    }, k.serial());
}

template <class T, class K> void backward_strands(const Windows& k, const T* dy, const K* argmax, T* dx) {
    using C = compute_t<T>;
    using I = ints<C>;
    constexpr int L = VL<C>;
    const Strands<C> strands(k.w);
    const std::vector<Range> rows = k.h.coverings();
    const int64_t H = k.h.in, Q = k.w.out, KW = k.w.widest(), front = strands.shift, padded = front + strands.length + L;
    parallel(k.N * k.C * H, [&](int64_t i, int64_t end) {
        std::vector<C> row = strands.filled(), slope;  // slope and code of the rows of windows that see row h; zeros before and behind
        std::vector<I> code;
        std::vector<int64_t> number;  // in the window, of row h's first column
        for (Row at(i, H); i < end; i++, at++) {
            number.clear();
            k.h.each_covering(rows[at.row], at.row, [&](int64_t p, int64_t r) {
                int64_t from = (at.plane * k.h.out + p) * Q, to = int64_t(number.size()) * padded + front;
                number.push_back(r * KW);
                if (int64_t(slope.size()) < to + padded) slope.resize(to + padded), code.resize(to + padded);
                for (int64_t q = 0; q < Q; q += L) {
                    int lanes = std::min<int64_t>(L, Q - q);
                    store(&slope[to + q], load(dy + from + q, lanes)), store_raw(&code[to + q], load_codes<C>(argmax + from + q, lanes));
                }
            });
            for (int64_t f = 0; f < strands.stride; f++)
                for (int64_t j = 0; j < strands.used; j += L) {
                    vec<C> acc{};
                    for (size_t n = 0; n < number.size(); n++)
                        for (int64_t s : strands.offsets[f]) {
                            int64_t from = n * padded + front + j - strands.place(s);
                            acc += load_raw<vec<I>>(&code[from]) == all<C>(number[n] + s) ? load(&slope[from]) : vec<C>{};
                        }
                    store(&row[f * strands.length + j], acc);
                }
            strands.join(row.data(), dx + i * k.w.in);
        }
    }, k.serial());
}

// ---- planes, vectors over the columns of a window ----------------------------------------------------------------------------------

template <class T, class K> void forward_wide(const Windows& k, const T* x, T* y, K* argmax) {
    using C = compute_t<T>;
    using I = ints<C>;
    constexpr int L = VL<C>;
    const std::vector<Window> columns = k.w.all();
    const int64_t P = k.h.out, Q = k.w.out, W = k.w.in, KW = k.w.widest(), step = k.w.dilation;
    parallel(k.N * k.C * P, [&](int64_t i, int64_t end) {
        for (Row at(i, P); i < end; i++, at++) {
            const Window h = k.h.window(at.row);
            const T* plane = x + at.plane * k.h.in * W;
            for (int64_t q = 0; q < Q; q++) {
                const Window w = columns[q];
                Largest<C> best = {set(LOWEST<C>), all<C>(h.first * KW + w.first)};
                for (int64_t r = h.first; r < h.last; r++)
                    for (int64_t s = w.first; s < w.last; s += L) {
                        const T* from = plane + (h.start + r * k.h.dilation) * W + w.start + s * step;
                        int lanes = std::min<int64_t>(L, w.last - s);
                        vec<C> v = set(LOWEST<C>);
                        if (step == 1) v = lane_numbers<C>() < I(lanes) ? load(from, lanes) : v;
                        else for (int j = 0; j < lanes; j++) v[j] = load(from + j * step, 1)[0];
                        best.see(v, all<C>(r * KW + s) + lane_numbers<C>());
                    }
                I last_nan = largest(best.value != best.value ? best.code : vec<I>{} - 1);
                C top = last_nan < 0 ? largest(best.value) : std::numeric_limits<C>::quiet_NaN();
                I first = -largest(best.value == top ? -best.code : all<C>(std::numeric_limits<int32_t>::min()));
                store(y + i * Q + q, set(top), 1);
                if (argmax) argmax[i * Q + q] = last_nan < 0 ? first : last_nan;
            }
        }
    }, k.serial());
}

template <class T, class K> void backward_wide(const Windows& k, const T* dy, const K* argmax, T* dx) {
    using C = compute_t<T>;
    constexpr int L = VL<C>;
    const std::vector<Window> columns = k.w.all();
    const std::vector<Range> rows = k.h.coverings();
    const int64_t H = k.h.in, W = k.w.in, Q = k.w.out, KW = k.w.widest();
    parallel(k.N * k.C * H, [&](int64_t i, int64_t end) {
        std::vector<C> row(ceil_div(W, L) * L);
        for (Row at(i, H); i < end; i++, at++) {
            fill(row.data(), W, C(0));
            k.h.each_covering(rows[at.row], at.row, [&](int64_t p, int64_t r) {
                int64_t from = (at.plane * k.h.out + p) * Q;
                for (int64_t q = 0; q < Q; q++) {
                    int64_t s = argmax[from + q] - r * KW;
                    if (s >= columns[q].first && s < columns[q].last) row[columns[q].start + s * k.w.dilation] += load(dy + from + q, 1)[0];
                }
            });
            for (int64_t w = 0; w < W; w += L) store(dx + i * W + w, load(&row[w]), int(std::min<int64_t>(L, W - w)));
        }
    }, k.serial());
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

// f(K) with a value of the type that holds argmax.
template <class F> void with_codes(const Windows& k, const F& f) {
    k.h.widest() * k.w.widest() <= 256 ? f(uint8_t{}) : f(int32_t{});
}
ScalarType code_type(const Windows& k) { return k.h.widest() * k.w.widest() <= 256 ? ScalarType::Byte : ScalarType::Int; }

std::tuple<Tensor, Tensor> max_pool2d_forward(Tensor x, int64_t P, int64_t Q, Ints kernel, Ints stride, Ints padding, Ints dilation,
                                              bool need_argmax) {
    checked_like(FORWARD, "x", ranked(FORWARD, "x", x, 4), x);
    Format format = format_of(FORWARD, x);
    Windows k = checked_windows(FORWARD, format, x.size(0), x.size(1), {x.size(2), x.size(3)}, {P, Q}, {kernel, stride, padding, dilation});
    with_type(FORWARD, x.scalar_type(), [](auto) {});
    Tensor y = result(FORWARD, x.scalar_type(), k.channels_last(), k.N, k.C, P, Q), argmax;
    if (need_argmax) argmax = result(FORWARD, code_type(k), k.channels_last(), k.N, k.C, P, Q);
    if (y.numel() == 0) return {y, argmax};
    Tensor xs = in_format(x, format);
    with_type(FORWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        with_codes(k, [&](auto code) {
            auto run = k.channels_last() ? forward_pixels<T, decltype(code)>
                : k.in_strands(VL<compute_t<T>>) ? forward_strands<T, decltype(code)> : forward_wide<T, decltype(code)>;
            run(k, static_cast<const T*>(xs.data_ptr()), static_cast<T*>(y.data_ptr()),
                need_argmax ? static_cast<decltype(code)*>(argmax.data_ptr()) : nullptr);
        });
    });
    return {y, argmax};
}

Tensor max_pool2d_backward(Tensor dy, Tensor argmax, int64_t H, int64_t W, Ints kernel, Ints stride, Ints padding, Ints dilation,
                           bool channels_last) {
    checked_like(BACKWARD, "dy", ranked(BACKWARD, "dy", dy, 4), dy);
    int64_t N = dy.size(0), C = dy.size(1), P = dy.size(2), Q = dy.size(3);
    Windows k = checked_windows(BACKWARD, format_with(channels_last, C, P, Q), N, C, {H, W}, {P, Q}, {kernel, stride, padding, dilation});
    checked(BACKWARD, "argmax", argmax, code_type(k), {N, C, P, Q});
    with_type(BACKWARD, dy.scalar_type(), [](auto) {});
    Tensor dx = result(BACKWARD, dy.scalar_type(), channels_last, N, C, H, W);
    if (dx.numel() == 0) return dx;
    Tensor slopes = in_format(dy, k.format), codes = in_format(argmax, k.format);
    with_type(BACKWARD, dy.scalar_type(), [&](auto type) {
        using T = decltype(type);
        with_codes(k, [&](auto code) {
            auto run = channels_last ? backward_pixels<T, decltype(code)>
                : k.in_strands(VL<compute_t<T>>) ? backward_strands<T, decltype(code)> : backward_wide<T, decltype(code)>;
            run(k, static_cast<const T*>(slopes.data_ptr()), static_cast<const decltype(code)*>(codes.data_ptr()),
                static_cast<T*>(dx.data_ptr()));
        });
    });
    return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("max_pool2d_forward", TORCH_BOX(&max_pool2d_forward));
    m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
}
