// avg_pool2d, regular or adaptive: y[p,q] = the sum over a window / its divisor; dx[h,w] = Σ dy / divisor over the windows that see it.
//
//   divisor    how many places a window has, with or without those in the padding, or the same given number for all: a product of one
//              number for the row of windows and one for the column
//   channels last   vectors over channels, 4 at a time in registers; a window is a run over pixels
//   planes     sums over the rows of a window first, vectors over all columns; then along that one row, vectors over the windows in the
//              strands of windows.h, or, where windows are wide or lie irregularly, over the columns of one window. Backward, the other way
//              round: what the windows above place h give to each column, then spread along the row.
#include "windows.h"

namespace {
using namespace windows;

constexpr const char *FORWARD = "avg_pool2d_forward", *BACKWARD = "avg_pool2d_backward";

// divisor(p, q) = down[p] right[q], or its reciprocal.
template <class C> struct Divisors {
    std::vector<C> down, right;
    Divisors(const Windows& k, bool with_padding, int64_t given, bool reciprocal) {
        auto number = [&](double n) { return C(reciprocal ? 1 / n : n); };
        auto places = [&](const Window& w) { return double(with_padding ? w.padded : w.last - w.first); };
        for (int64_t p = 0; p < k.h.out; p++) down.push_back(number(given ? double(given) : places(k.h.window(p))));
        for (int64_t q = 0; q < k.w.out; q++) right.push_back(number(given ? 1 : places(k.w.window(q))));
        right.resize(k.w.out + VL<C>, 1);
    }
};

template <class T> void forward_pixels(const Windows& k, const Divisors<compute_t<T>>& divisors, const T* x, T* y) {
    using C = compute_t<T>;
    constexpr int L = VL<C>;
    const std::vector<Window> columns = k.w.all();
    const int64_t row = k.w.in * k.C;
    each_row_of_pixels<GROUP * L>(k, k.N * k.h.out, [&](int64_t i, int64_t begin, int64_t end) {
        const Window h = k.h.window(i % k.h.out);
        const T* image = x + (i / k.h.out * k.h.in + h.start) * row;
        C down = divisors.down[i % k.h.out];
        for (int64_t q = 0; q < k.w.out; q++) {
            const Window w = columns[q];
            T* to = y + (i * k.w.out + q) * k.C;
            each_group<L>(begin, end, [&](auto n, int64_t c, int lanes) INLINE {
                constexpr int M = decltype(n)::value;
                vec<C> acc[M] = {};
                for (int64_t r = h.first; r < h.last; r++)
                    for (int64_t s = w.first; s < w.last; s++) {
                        const T* pixel = image + r * row + (w.start + s) * k.C + c;
                        unrolled<M>([&](int j) INLINE { fetch(pixel + PIXELS_AHEAD * k.C + j * L), acc[j] += load(pixel + j * L, lanes); });
                    }
                unrolled<M>([&](int j) INLINE { store(to + c + j * L, acc[j] / (down * divisors.right[q]), lanes); });
            });
        }
    });
}

template <class T> void backward_pixels(const Windows& k, const Divisors<compute_t<T>>& shares, const T* dy, T* dx) {
    using C = compute_t<T>;
    constexpr int L = VL<C>;
    const std::vector<Range> columns = k.w.coverings();
    each_row_of_pixels<GROUP * L>(k, k.N * k.h.in, [&](int64_t i, int64_t begin, int64_t end) {
        const int64_t h = i % k.h.in, image = i / k.h.in * k.h.out * k.w.out;
        const Range rows = k.h.covering(h);
        for (int64_t w = 0; w < k.w.in; w++)
            each_group<L>(begin, end, [&](auto n, int64_t c, int lanes) INLINE {
                constexpr int M = decltype(n)::value;
                vec<C> acc[M] = {};
                k.h.each_covering(rows, h, [&](int64_t p, int64_t) INLINE {
                    k.w.each_covering(columns[w], w, [&](int64_t q, int64_t) INLINE {
                        const T* from = dy + (image + p * k.w.out + q) * k.C + c;
                        C share = shares.down[p] * shares.right[q];
                        unrolled<M>([&](int j) INLINE { acc[j] += load(from + j * L, lanes) * share; });
                    });
                });
                T* to = dx + (i * k.w.in + w) * k.C + c;
                unrolled<M>([&](int j) INLINE { fetch<1>(to + PIXELS_AHEAD * k.C + j * L), store(to + j * L, acc[j], lanes); });
            });
    });
}

// The sum over x[begin, end).
template <class T> inline compute_t<T> sum_along(const T* x, int64_t begin, int64_t end) {
    constexpr int L = VL<compute_t<T>>;
    vec<compute_t<T>> acc{};
    for (; begin + L <= end; begin += L) acc += load(x + begin);
    if (begin < end) acc += load(x + begin, int(end - begin));
    return sum(acc);
}

template <class T> void forward_planes(const Windows& k, const Divisors<compute_t<T>>& divisors, const T* x, T* y) {
    using C = compute_t<T>;
    constexpr int L = VL<C>;
    const bool in_strands = k.in_strands(L);
    const Strands<C> strands(in_strands ? k.w : Axis{1, 1, 1, 1, 0, 1});
    const std::vector<Window> columns = k.w.all();
    const int64_t P = k.h.out, Q = k.w.out, W = k.w.in;
    parallel(k.N * k.C * P, [&](int64_t i, int64_t end) {
        std::vector<C> sums(ceil_div(W, L) * L), row = strands.filled();
        for (Row at(i, P); i < end; i++, at++) {
            const Window h = k.h.window(at.row);
            const T* from = x + (at.plane * k.h.in + h.start + h.first) * W;
            const bool one = h.last - h.first == 1;
            for (int64_t w = 0; w < W && !one; w += L) {
                int lanes = std::min<int64_t>(L, W - w);
                vec<C> acc{};
                for (int64_t r = 0; r < h.last - h.first; r++) acc += load(from + r * W + w, lanes);
                store(&sums[w], acc);
            }
            auto along = [&](const auto* sums) {
                if (in_strands) return strands.split(sums, row.data());
                for (int64_t q = 0; q < Q; q++) {
                    C sum = sum_along(sums + columns[q].start, columns[q].first, columns[q].last);
                    store(y + i * Q + q, set(sum / (divisors.down[at.row] * divisors.right[q])), 1);
                }
            };
            one ? along(from) : along(sums.data());
            for (int64_t q = 0; q < Q && in_strands; q += L) {
                vec<C> acc{};
                for (int64_t from : strands.at) acc += load(&row[from + q]);
                store(y + i * Q + q, acc / (divisors.down[at.row] * load(&divisors.right[q])), int(std::min<int64_t>(L, Q - q)));
            }
        }
    }, k.serial());
}

template <class T> void backward_planes(const Windows& k, const Divisors<compute_t<T>>& shares, const T* dy, T* dx) {
    using C = compute_t<T>;
    constexpr int L = VL<C>;
    const bool in_strands = k.in_strands(L);
    const Strands<C> strands(in_strands ? k.w : Axis{1, 1, 1, 1, 0, 1});
    const std::vector<Window> columns = k.w.all();
    const std::vector<Range> rows = k.h.coverings();
    const int64_t H = k.h.in, W = k.w.in, Q = k.w.out, front = strands.shift;
    parallel(k.N * k.C * H, [&](int64_t i, int64_t end) {
        std::vector<C> given(front + std::max(Q, strands.length) + L), row = strands.filled(), wide(W + L);
        C* slope = &given[front];  // what each window of a row gives to a place in row h; zeros stand before and behind
        for (Row at(i, H); i < end; i++, at++) {
            fill(slope, Q, C(0));
            k.h.each_covering(rows[at.row], at.row, [&](int64_t p, int64_t) {
                const T* from = dy + (at.plane * k.h.out + p) * Q;
                for (int64_t q = 0; q < Q; q += L) {
                    vec<C> share = shares.down[p] * load(&shares.right[q]);
                    store(slope + q, load(slope + q) + load(from + q, int(std::min<int64_t>(L, Q - q))) * share);
                }
            });
            if (in_strands) {
                for (int64_t f = 0; f < strands.stride; f++)
                    for (int64_t j = 0; j < strands.used; j += L) {
                        vec<C> acc{};
                        for (int64_t s : strands.offsets[f]) acc += load(slope + j - strands.place(s));
                        store(&row[f * strands.length + j], acc);
                    }
                strands.join(row.data(), dx + i * W);
            } else {
                fill(wide.data(), W, C(0));
                for (int64_t q = 0; q < Q; q++)
                    for (int64_t w = columns[q].start + columns[q].first, stop = columns[q].start + columns[q].last; w < stop; w += L)
                        store(&wide[w], load(&wide[w]) + keep(set(slope[q]), int(std::min<int64_t>(L, stop - w))));
                for (int64_t w = 0; w < W; w += L) store(dx + i * W + w, load(&wide[w]), int(std::min<int64_t>(L, W - w)));
            }
        }
    }, k.serial());
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

Tensor avg_pool2d_forward(Tensor x, int64_t P, int64_t Q, Ints kernel, Ints stride, Ints padding, bool count_include_pad, int64_t divisor) {
    checked_like(FORWARD, "x", ranked(FORWARD, "x", x, 4), x);
    Format format = format_of(FORWARD, x);
    Windows k = checked_windows(FORWARD, format, x.size(0), x.size(1), {x.size(2), x.size(3)}, {P, Q}, {kernel, stride, padding, {1, 1}});
    with_type(FORWARD, x.scalar_type(), [](auto) {});
    Tensor y = result(FORWARD, x.scalar_type(), k.channels_last(), k.N, k.C, P, Q);
    if (y.numel() == 0) return y;
    Tensor xs = in_format(x, format);
    with_type(FORWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto run = k.channels_last() ? forward_pixels<T> : forward_planes<T>;
        run(k, {k, count_include_pad, divisor, false}, static_cast<const T*>(xs.data_ptr()), static_cast<T*>(y.data_ptr()));
    });
    return y;
}

Tensor avg_pool2d_backward(Tensor dy, int64_t H, int64_t W, Ints kernel, Ints stride, Ints padding, bool count_include_pad, int64_t divisor,
                           bool channels_last) {
    checked_like(BACKWARD, "dy", ranked(BACKWARD, "dy", dy, 4), dy);
    int64_t N = dy.size(0), C = dy.size(1), P = dy.size(2), Q = dy.size(3);
    Windows k = checked_windows(BACKWARD, format_with(channels_last, C, P, Q), N, C, {H, W}, {P, Q}, {kernel, stride, padding, {1, 1}});
    with_type(BACKWARD, dy.scalar_type(), [](auto) {});
    Tensor dx = result(BACKWARD, dy.scalar_type(), channels_last, N, C, H, W);
    if (dx.numel() == 0) return dx;
    Tensor slopes = in_format(dy, k.format);
    with_type(BACKWARD, dy.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto run = channels_last ? backward_pixels<T> : backward_planes<T>;
        run(k, {k, count_include_pad, divisor, true}, static_cast<const T*>(slopes.data_ptr()), static_cast<T*>(dx.data_ptr()));
    });
    return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("avg_pool2d_forward", TORCH_BOX(&avg_pool2d_forward));
    m.impl("avg_pool2d_backward", TORCH_BOX(&avg_pool2d_backward));
}
