// softmax and log_softmax along any dimension: every number is read from memory once and written once.
//
// A tile (softmax.h) of one to four rows, or a strip of rows, goes through three passes: maximum, exponentials and their sum, result. It
// stays in the L1 or L2 cache meanwhile. The exponentials wait in y itself, those of a half type as floats in scratch.
#include "softmax.h"

namespace {

constexpr const char* FORWARD = "softmax_forward";
constexpr const char* BACKWARD = "softmax_backward";

// y = e^(x - top) / sum
template <class T, class Tile> void softmax_tile(const Tile& tile, const T* x, T* y) {
    using V = typename Tile::V;
    using C = compute_t<T>;
    constexpr bool IN_PLACE = std::is_same_v<T, C>;
    V top[Tile::U], total[Tile::U];
    if constexpr (IN_PLACE) {
        normalise(tile, x, top, total, [&](int64_t at, int, auto lanes, V e) { store(y + at, e, lanes); });
        for (auto& t : total) t = 1 / t;
        tile.each([&](int64_t at, int64_t, int u, auto lanes) { store(y + at, load(y + at, lanes) * total[u], lanes); });
    } else {
        C *e = scratch<C, 0>(tile.N * Tile::U * VL<C> + VL<C>), *next = e;
        normalise(tile, x, top, total, [&](int64_t, int, auto, V v) { store(next, v), next += VL<C>; });
        for (auto& t : total) t = 1 / t;
        next = e;
        tile.each([&](int64_t at, int64_t, int u, auto lanes) { store(y + at, load(next) * total[u], lanes), next += VL<C>; });
    }
}

// y = x - top - log(sum)
template <class T, class Tile> void log_softmax_tile(const Tile& tile, const T* x, T* y) {
    using V = typename Tile::V;
    V top[Tile::U], total[Tile::U];
    normalise(tile, x, top, total, [](int64_t, int, auto, V) {});
    for (auto& t : total) t = log<compute_t<T>>(t);
    tile.each([&](int64_t at, int64_t, int u, auto lanes) { store(y + at, load(x + at, lanes) - top[u] - total[u], lanes); });
}

// dx = y (dy - sum dy y), and of the logarithm dy - e^y sum dy
template <bool LOG, class T, class Tile> void backward_tile(const Tile& tile, const T* dy, const T* y, T* dx) {
    using V = typename Tile::V;
    V total[Tile::U] = {};
    tile.each([&](int64_t at, int64_t, int u, auto lanes) {
        V slope = load(dy + at, lanes);
        total[u] += tile.only(LOG ? slope : slope * load(y + at, lanes), lanes, 0);
    });
    for (auto& t : total) t = tile.sum(t);
    tile.each([&](int64_t at, int64_t, int u, auto lanes) {
        prefetch_l2(dy + at + tile.numbers()), prefetch_l2(y + at + tile.numbers());
        V slope = load(dy + at, lanes), v = load(y + at, lanes);
        store(dx + at, LOG ? slope - exp_nonpositive<T>(v) * total[u] : v * (slope - total[u]), lanes);
    });
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

Classes checked_classes(const char* op, const char* name, const Tensor& x, int64_t dim) {
    checked_like(op, name, x, x);
    if (dim < 0 || dim >= std::max<int64_t>(x.dim(), 1)) fail(op, ": dim is ", dim, ", needs 0 to ", std::max<int64_t>(x.dim(), 1) - 1);
    return {x, dim};
}

Tensor softmax_forward(Tensor x, int64_t dim, bool log) {
    Classes size = checked_classes(FORWARD, "x", x, dim);
    Tensor xs = dense(x), y = empty(x);
    if (x.numel() == 0) return y;
    with_type(FORWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto from = static_cast<const T*>(xs.data_ptr());
        auto to = static_cast<T*>(y.data_ptr());
        if (log) each_tile<compute_t<T>>(size, [=](auto tile, int64_t at, int64_t) { log_softmax_tile(tile, from + at, to + at); });
        else each_tile<compute_t<T>>(size, [=](auto tile, int64_t at, int64_t) { softmax_tile(tile, from + at, to + at); });
    });
    return y;
}

Tensor softmax_backward(Tensor dy, Tensor y, int64_t dim, bool log) {
    Classes size = checked_classes(BACKWARD, "y", y, dim);
    checked_like(BACKWARD, "dy", dy, y);
    Tensor dys = dense(dy), ys = dense(y), dx = empty(y);
    if (y.numel() == 0) return dx;
    with_type(BACKWARD, y.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto slope = static_cast<const T*>(dys.data_ptr()), kept = static_cast<const T*>(ys.data_ptr());
        auto to = static_cast<T*>(dx.data_ptr());
        auto run = [&](auto with_log) {
            each_tile<compute_t<T>>(size, [=](auto tile, int64_t at, int64_t) {
                backward_tile<with_log()>(tile, slope + at, kept + at, to + at);
            });
        };
        if (log) run(std::true_type{});
        else run(std::false_type{});
    });
    return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("softmax_forward", TORCH_BOX(&softmax_forward));
    m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
}
