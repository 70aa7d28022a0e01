// Where the windows of a pooling lie: for max_pool2d and avg_pool2d, at equal distances or (adaptive) as equal parts of the input.
//
//   Axis       the windows along one dimension: which places window p sees, and which windows see place h
//   Windows    both axes, the batch and the memory format: contiguous (planes of H x W) or channels last (pixels of C numbers)
//   Strands    a padded row cut so that what neighbouring windows see lies side by side: vectors over the windows of a row
//
// A padded row, padding 1, stride 2:    . x0 x1 x2 x3 x4 .        window q sees offset s in strand (s d) % stride at q + (s d) / stride:
//   strand 0                            .    x1    x3    .        s = 0 and, one place further, s = 2
//   strand 1                              x0    x2    x4          s = 1
#pragma once
#include <algorithm>
#include <vector>

#include "channels.h"
#include "op.h"
#include "rows.h"

namespace windows {  // of pooling, whose axes and geometry are not the convolution's

constexpr int64_t LIMIT = int64_t(1) << 31;  // sizes below it: no product of two overflows

// Offset r, first <= r < last, is at place start + r dilation of the input; the others are in the padding. `padded` counts those too.
struct Window {
    int64_t start, first, last, padded;
};

struct Range {
    int64_t begin, end;
};

struct Axis {
    int64_t in, out, kernel, stride, padding, dilation;  // kernel 0: adaptive

    bool regular() const { return kernel > 0; }
    // At least the offsets of any window: place (r, s) of a window is number r w.widest() + s of it.
    int64_t widest() const { return regular() ? kernel : in / out + (in % out ? 2 : 0); }
    int64_t start(int64_t p) const { return regular() ? p * stride - padding : p * in / out; }

    Window window(int64_t p) const {
        int64_t at = start(p), count = regular() ? kernel : ceil_div((p + 1) * in, out) - at;
        int64_t first = at < 0 ? ceil_div(-at, dilation) : 0, last = std::min(count, ceil_div(in - at, dilation));
        return {at, first, last, std::min(count, in + padding - at)};
    }
    std::vector<Window> all() const {
        std::vector<Window> windows(out);
        for (int64_t p = 0; p < out; p++) windows[p] = window(p);
        return windows;
    }
    // The windows that may see place h, and f(p, r) for those that do, with the offset r at which.
    Range covering(int64_t h) const {
        if (!regular()) return {h * out / in, std::min(out, ceil_div((h + 1) * out, in))};
        int64_t behind = h + padding, before = behind - (kernel - 1) * dilation;
        return {before > 0 ? ceil_div(before, stride) : 0, std::min(out, behind / stride + 1)};
    }
    std::vector<Range> coverings() const {
        std::vector<Range> ranges(in);
        for (int64_t h = 0; h < in; h++) ranges[h] = covering(h);
        return ranges;
    }
    template <class F> INLINE void each_covering(Range range, int64_t h, const F& f) const {
        for (int64_t p = range.begin; p < range.end; p++) {
            int64_t r = h - start(p);
            if (dilation == 1) f(p, r);
            else if (r % dilation == 0) f(p, r / dilation);
        }
    }
};

struct Windows {
    Format format;
    int64_t N, C;
    Axis h, w;
    bool channels_last() const { return format.memory == Memory::COLUMNS; }
    int64_t numbers() const { return N * C * std::max(h.in * w.in, h.out * w.out); }
    bool serial() const { return numbers() <= SERIAL_NUMBERS; }
    // Vectors over the windows of a row where that fills more lanes than a vector over the columns of a window would.
    bool in_strands(int lanes) const { return w.regular() && w.kernel <= std::min<int64_t>(w.out, lanes - 1) && w.stride < 2 * lanes; }
};

// Lanes 1, 3, 5, ... of a followed by b; and a and b lane by lane in turns, first or second half.
template <class V, int... L> inline V odd(V a, V b, std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(a, b, (2 * L + 1)...);
}
template <int HALF, class V, int... L> inline V zip(V a, V b, std::integer_sequence<int, L...>) {
    constexpr int n = sizeof...(L);
    return __builtin_shufflevector(a, b, (L / 2 + HALF * n / 2 + L % 2 * n)...);
}

template <class C> struct Strands {
    using V = vec<C>;
    static constexpr int L = VL<C>;
    static constexpr std::make_integer_sequence<int, L> lanes{};
    C outside;                                    // what stands in the padding
    int64_t in, stride, padding, kernel, shift;   // shift: places from offset 0 to the last one of a window
    int64_t used, length;                         // of a strand: what the row needs, and room for whole vectors
    std::vector<int64_t> at;                      // where window 0 sees offset s
    std::vector<std::vector<int64_t>> offsets;    // those that lie in strand f

    explicit Strands(const Axis& w, C outside = 0)
        : outside(outside), in(w.in), stride(w.out > 1 ? w.stride : 1), padding(w.padding), kernel(w.kernel),
          shift((kernel - 1) * w.dilation / stride), offsets(stride) {
        used = (in + padding) / stride + 1, length = std::max(w.out + shift, used) + 2 * L;
        for (int64_t s = 0; s < kernel; s++) {
            int64_t f = s * w.dilation % stride;
            at.push_back(f * length + s * w.dilation / stride), offsets[f].push_back(s);
        }
    }
    std::vector<C> filled() const { return std::vector<C>(stride * length, outside); }
    int64_t place(int64_t s) const { return at[s] % length; }

    // Row x[in] to the strands. Whole vectors are stored, which the next loads get before they have reached the cache.
    template <class T> void split(const T* x, C* to) const {
        if (stride == 1) {
            for (int64_t w = 0; w < in; w += L) store(to + padding + w, first(load(x + w, rest(w)), rest(w)));
        } else if (stride == 2) {
            int64_t w = padding % 2;
            if (w) to[length + padding / 2] = load(x, 1)[0];
            for (C* p = to + (w + padding) / 2; w < in; w += 2 * L, p += L) {
                V a = load(x + w, rest(w)), b = load(x + w + L, rest(w + L));
                store(p, first(evens(a, b, lanes), rest(w, 2))), store(p + length, first(odd(a, b, lanes), rest(w + 1, 2)));
            }
        } else {
            for (int64_t w = 0; w < in; w++) to[(w + padding) % stride * length + (w + padding) / stride] = load(x + w, 1)[0];
        }
    }
    // The strands to row y[in].
    template <class T> void join(const C* from, T* y) const {
        if (stride == 1) {
            for (int64_t w = 0; w < in; w += L) store(y + w, load(from + padding + w), rest(w));
        } else if (stride == 2) {
            int64_t w = padding % 2;
            if (w) store(y, set(from[length + padding / 2]), 1);
            for (const C* p = from + (w + padding) / 2; w < in; w += 2 * L, p += L) {
                V a = load(p), b = load(p + length);
                store(y + w, zip<0>(a, b, lanes), rest(w)), store(y + w + L, zip<1>(a, b, lanes), rest(w + L));
            }
        } else {
            for (int64_t w = 0; w < in; w++) store(y + w, set(from[(w + padding) % stride * length + (w + padding) / stride]), 1);
        }
    }

  private:
    V first(V v, int n) const { return n >= L ? v : lane_numbers<C>() < ints<C>(n) ? v : set(outside); }
    // How many of a vector's lanes take columns w, w + step, ... of the row.
    int rest(int64_t w, int64_t step = 1) const { return std::clamp<int64_t>(ceil_div(in - w, step), 0, L); }
};

// ---- channels last: rows of pixels, vectors over channels ----------------------------------------------------------------------------

constexpr int GROUP = 4;       // vectors of channels that are in registers together
constexpr int64_t PIXELS_AHEAD = 16;  // from the one in hand to the one that is fetched: jumps from row to row are not foreseen
template <int WRITE = 0> INLINE inline void fetch(const void* p) { __builtin_prefetch(p, WRITE, 3); }

// body(row, c, end) in parallel for rows of pixels: all their channels at once, or, where rows are few, a group of them.
template <int WIDTH, class Body> void each_row_of_pixels(const Windows& k, int64_t rows, const Body& body) {
    int64_t groups = ceil_div(k.C, WIDTH), parts = rows < 4 * threads() ? groups : 1, width = parts == 1 ? k.C : WIDTH;
    parallel(rows * parts, [&](int64_t i, int64_t end) {
        for (; i < end; i++) body(i / parts, i % parts * width, std::min(k.C, (i % parts + 1) * width));
    }, k.serial());
}

// p[0, n) and what is left of the last vector, for which there must be room.
template <class C> inline void fill(C* p, int64_t n, C with) {
    for (int64_t i = 0; i < n; i += VL<C>) store(p + i, set(with));
}

// Counts through the rows of planes.
struct Row {
    int64_t plane, row, rows;
    Row(int64_t i, int64_t rows) : plane(i / rows), row(i % rows), rows(rows) {}
    void operator++(int) { if (++row == rows) plane++, row = 0; }
};

// f(0), ..., f(M - 1), written out, so that arrays over them are registers.
template <int M, class F> INLINE inline void unrolled(const F& f) {
    [&]<int... J>(std::integer_sequence<int, J...>) INLINE { (f(J), ...); }(std::make_integer_sequence<int, M>{});
}

// f(n, c, lanes) for channels [c, end): n vectors from c on, known to the compiler; lanes < VL only for the last.
template <int L, class F> INLINE inline void each_group(int64_t c, int64_t end, const F& f) {
    for (; c + GROUP * L <= end; c += GROUP * L) f(std::integral_constant<int, GROUP>{}, c, L);
    for (; c + 2 * L <= end; c += 2 * L) f(std::integral_constant<int, 2>{}, c, L);
    for (; c < end; c += L) f(std::integral_constant<int, 1>{}, c, int(std::min<int64_t>(L, end - c)));
}

// ---- the arguments of the ops, checked ---------------------------------------------------------------------------------------------

using Ints = std::vector<int64_t>;
struct Geometry {
    Ints kernel, stride, padding, dilation;
};

inline Axis checked_axis(const char* op, const char* name, int64_t in, int64_t out, const Geometry& g, int i) {
    Axis axis = {in, out, g.kernel[i], g.stride[i], g.padding[i], g.dilation[i]};
    if (in < 1 || in >= LIMIT || out < 1 || out >= LIMIT)
        fail(op, ": ", name, " of input and output is ", in, " and ", out, ", needs at least 1 and less than 2^31 of each");
    for (int64_t n : {axis.kernel, axis.stride, axis.padding, axis.dilation})
        if (n < 0 || n >= LIMIT) fail(op, ": kernel_size, stride, padding and dilation need to be from 0 to 2^31 - 1, got ", n);
    if (!axis.regular()) {
        if (axis.stride != 1 || axis.padding != 0 || axis.dilation != 1)
            fail(op, ": kernel_size 0, for adaptive windows, needs stride 1, padding 0 and dilation 1");
        if (in % out == 0) axis.kernel = axis.stride = in / out;
        return axis;
    }
    if (axis.stride < 1 || axis.dilation < 1) fail(op, ": stride is ", axis.stride, ", dilation ", axis.dilation, ", need 1 or more");
    if (2 * axis.padding > axis.kernel) fail(op, ": padding is ", axis.padding, ", more than half of kernel_size ", axis.kernel);
    if ((out - 1) * axis.stride >= in + axis.padding) fail(op, ": the last of ", out, " windows would begin behind the ", name, " ", in);
    return axis;
}

// The windows of an input (N, C, H, W) in this format; numbers of them may be 0.
inline Windows checked_windows(const char* op, const Format& format, int64_t N, int64_t C, Ints in, Ints out, const Geometry& g) {
    for (const Ints* some : {&g.kernel, &g.stride, &g.padding, &g.dilation})
        if (some->size() != 2) fail(op, ": kernel_size, stride, padding and dilation need 2 numbers each, got ", some->size());
    Windows k = {format, N, C, checked_axis(op, "height", in[0], out[0], g, 0), checked_axis(op, "width", in[1], out[1], g, 1)};
    if ((g.kernel[0] == 0) != (g.kernel[1] == 0)) fail(op, ": kernel_size needs to be 0 for both dimensions or for none");
    if (in[0] * in[1] >= LIMIT || k.h.widest() * k.w.widest() >= LIMIT)
        fail(op, ": a plane of ", in[0], " x ", in[1], " in windows of ", k.h.widest(), " x ", k.w.widest(), ", needs less than 2^31 each");
    // A window of whole rows is a window of one long row.
    bool whole_rows = k.h.regular() && k.w.kernel == in[1] && k.w.padding == 0 && k.h.dilation == 1 && k.w.dilation == 1;
    if (whole_rows && !k.channels_last()) {
        for (int64_t* rows : {&k.h.in, &k.h.kernel, &k.h.stride, &k.h.padding}) *rows *= in[1];
        k.w = k.h, k.h = {1, 1, 1, 1, 0, 1};
    }
    return k;
}

// The strides of an (N, C, H, W) tensor in one of the two formats.
inline Format format_with(bool channels_last, int64_t C, int64_t H, int64_t W) {
    C = std::max<int64_t>(C, 1);
    if (channels_last) return {Memory::COLUMNS, 4, {C * H * W, 1, W * C, C}};
    return {Memory::ROWS, 4, {C * H * W, H * W, W, 1}};
}

inline Tensor result(const char* op, ScalarType dtype, bool channels_last, int64_t N, int64_t C, int64_t H, int64_t W) {
    int64_t sizes[] = {N, C, H, W};
    double numbers = double(N) * double(C) * double(H) * double(W);
    if (numbers >= 0x1p60) fail(op, ": a result of ", N, " x ", C, " x ", H, " x ", W, " numbers is too large");
    return empty_strided(dtype, 4, sizes, format_with(channels_last, C, H, W).strides);
}

}  // namespace windows
