// softmax and log_softmax along any dimension: every number is read from memory once and written once.
//
//   classes side by side (D = 1)   a row at a time: maximum, exponentials and their sum, scale; the row stays in the L1 or L2 cache
//   classes D numbers apart        a strip of four vectors of neighbouring rows at a time: the same three passes down the strip, no
//                                  transposed copy
//
// The exponentials wait in y itself, those of a half type as floats in scratch. While one row is in work the next comes into L2.
#include "softmax.h"

namespace {

constexpr const char* FORWARD = "softmax_forward";
constexpr const char* BACKWARD = "softmax_backward";

template <class T> compute_t<T>* workspace(T* y, int64_t count) {
    if constexpr (std::is_same_v<T, compute_t<T>>) return y;
    else return scratch<compute_t<T>, 0>(count);
}

// y[n] = e^(x[n] - top) / sum
template <class T> void softmax_row(const T* x, T* y, int64_t N) {
    using C = compute_t<T>;
    const vec<C> top = set(largest_in(x, N));
    C* e = workspace(y, N);
    vec<C> total{};
    each_vector<C>(N, [&](int64_t n, auto lanes) {
        prefetch_l2(x + N + n);
        vec<C> v = exp_nonpositive<C>(load(x + n, lanes) - top);
        store(e + n, v, lanes);
        total += first<C>(v, lanes, C(0));
    });
    const vec<C> scale = set(1 / sum(total));
    each_vector<C>(N, [&](int64_t n, auto lanes) { store(y + n, load(e + n, lanes) * scale, lanes); });
}

// y[n] = x[n] - top - log(sum)
template <class T> void log_softmax_row(const T* x, T* y, int64_t N) {
    using C = compute_t<T>;
    auto [top, total] = normaliser(x, N);
    const vec<C> from = set(top), logsum = set(log_of(total));
    each_vector<C>(N, [&](int64_t n, auto lanes) { store(y + n, load(x + n, lanes) - from - logsum, lanes); });
}

template <int U, class T, class Lanes> void softmax_strip(const T* x, T* y, int64_t N, int64_t D, Lanes lanes, bool log) {
    using C = compute_t<T>;
    constexpr bool IN_PLACE = std::is_same_v<T, C>;
    C* e = log ? nullptr : workspace(y, N * U * VL<C>);
    const int64_t pitch = IN_PLACE ? D : U * VL<C>;
    vec<C> top[U], total[U] = {};
    strip_top<U>(x, N, D, lanes, top);
    each_of_strip<U>(N, [&](int64_t n, int u) {
        prefetch_l2(x + n * D + (U + u) * VL<C>);
        vec<C> v = exp_nonpositive<C>(load(x + n * D + u * VL<C>, lanes) - top[u]);
        total[u] += v;
        if (e) store(e + n * pitch + u * VL<C>, v, lanes);
    });
    for (auto& t : total) t = log ? ::log<C>(t) : 1 / t;
    each_of_strip<U>(N, [&](int64_t n, int u) {
        int64_t at = n * D + u * VL<C>;
        store(y + at, log ? load(x + at, lanes) - top[u] - total[u] : load(e + n * pitch + u * VL<C>, lanes) * total[u], lanes);
    });
}

// dx = y (dy - sum dy y), of the logarithm dy - e^y sum dy: the term that is summed, and the gradient given the sum.
template <class C> inline vec<C> term(vec<C> dy, vec<C> y, bool log) { return log ? dy : dy * y; }
template <class C> inline vec<C> gradient(vec<C> dy, vec<C> y, vec<C> total, bool log) {
    return log ? dy - exp_nonpositive<C>(y) * total : y * (dy - total);
}

template <class T> void backward_row(const T* dy, const T* y, T* dx, int64_t N, bool log) {
    using C = compute_t<T>;
    vec<C> terms{};
    each_vector<C>(N, [&](int64_t n, auto lanes) { terms += term<C>(load(dy + n, lanes), load(y + n, lanes), log); });
    const vec<C> total = set(sum(terms));
    each_vector<C>(N, [&](int64_t n, auto lanes) {
        prefetch_l2(dy + N + n), prefetch_l2(y + N + n);
        store(dx + n, gradient<C>(load(dy + n, lanes), load(y + n, lanes), total, log), lanes);
    });
}

template <int U, class T, class Lanes> void backward_strip(const T* dy, const T* y, T* dx, int64_t N, int64_t D, Lanes lanes, bool log) {
    using C = compute_t<T>;
    vec<C> total[U] = {};
    each_of_strip<U>(N, [&](int64_t n, int u) {
        int64_t at = n * D + u * VL<C>;
        total[u] += term<C>(load(dy + at, lanes), load(y + at, lanes), log);
    });
    each_of_strip<U>(N, [&](int64_t n, int u) {
        int64_t at = n * D + u * VL<C>, next = at + U * VL<C>;
        prefetch_l2(dy + next), prefetch_l2(y + next);
        store(dx + at, gradient<C>(load(dy + at, lanes), load(y + at, lanes), total[u], log), lanes);
    });
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

Classes checked_classes(const char* op, const char* name, const Tensor& x, int64_t dim) {
    checked_like(op, name, x, x);
    if (dim < 0 || dim >= std::max<int64_t>(x.dim(), 1)) fail(op, ": dim is ", dim, ", needs 0 to ", std::max<int64_t>(x.dim(), 1) - 1);
    return {x, dim};
}

Tensor softmax_forward(Tensor x, int64_t dim, bool log) {
    auto [M, N, D] = checked_classes(FORWARD, "x", x, dim);
    Tensor xs = dense(x), y = empty(x);
    if (M * N * D == 0) return y;
    with_type(FORWARD, x.scalar_type(), [&, M = M, N = N, D = D](auto type) {
        using T = decltype(type);
        auto from = static_cast<const T*>(xs.data_ptr());
        auto to = static_cast<T*>(y.data_ptr());
        if (D == 1) return each_row(M, N, [=](int64_t m) { (log ? log_softmax_row<T> : softmax_row<T>)(from + m * N, to + m * N, N); });
        each_strip<compute_t<T>>(M, N, D, [=](int64_t m, int64_t d, auto width, auto lanes) {
            softmax_strip<width()>(from + m * N * D + d, to + m * N * D + d, N, D, lanes, log);
        });
    });
    return y;
}

Tensor softmax_backward(Tensor dy, Tensor y, int64_t dim, bool log) {
    auto [M, N, D] = checked_classes(BACKWARD, "y", y, dim);
    checked_like(BACKWARD, "dy", dy, y);
    Tensor dys = dense(dy), ys = dense(y), dx = empty(y);
    if (M * N * D == 0) return dx;
    with_type(BACKWARD, y.scalar_type(), [&, M = M, N = N, D = D](auto type) {
        using T = decltype(type);
        auto slope = static_cast<const T*>(dys.data_ptr()), kept = static_cast<const T*>(ys.data_ptr());
        auto to = static_cast<T*>(dx.data_ptr());
        if (D == 1) return each_row(M, N, [=](int64_t m) { backward_row(slope + m * N, kept + m * N, to + m * N, N, log); });
        each_strip<compute_t<T>>(M, N, D, [=](int64_t m, int64_t d, auto width, auto lanes) {
            int64_t at = m * N * D + d;
            backward_strip<width()>(slope + at, kept + at, to + at, N, D, lanes, log);
        });
    });
    return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("softmax_forward", TORCH_BOX(&softmax_forward));
    m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
}
