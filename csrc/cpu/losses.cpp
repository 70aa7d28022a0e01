// losses: the distance of x from target, element by element, and its mean or sum; every loss is a row of the table `with_loss`.
//
//   forward    reads x and target once. Stretches of fixed length are summed in registers, and their sums added in order, in double,
//              so the result does not depend on the threads. Without a reduction the same pass stores the values.
//   backward   reads x and target once and writes whichever of dx and dtarget is asked for.
//
// Memory decides, but for the two cross-entropies, whose logarithms cost more than reading their arguments from a cache.
#include "math.h"
#include "op.h"
#include "rows.h"

namespace {

constexpr const char* FORWARD = "losses_forward";
constexpr const char* BACKWARD = "losses_backward";

enum Loss { MSE, L1, SMOOTH_L1, HUBER, BCE, BCE_WITH_LOGITS, LOSSES };  // the codes of dlkernels/ops/losses.py
enum Reduction { NONE, MEAN, SUM, REDUCTIONS };

// log(1 + z) for -1 <= z <= 1: what rounding makes of u = 1 + z is undone by the factor z / (u - 1), whose difference is exact.
template <class T> vec<T> log1p(vec<T> z) {
    vec<T> u = 1 + z;
    return u == 1 ? z : log<T>(u) * (z / (u - 1));
}
// log(1 + e^-|x|), the part of log sigmoid(x) = min(x, 0) - bend(x) that is not straight.
template <class T> vec<T> bend(vec<T> x) { return log1p<T>(exp<T>(-magnitude<T>(x))); }

// f(value, dx, dtarget), each a function of x, the target t, and the weight p of positive targets.
// A distance depends on d = x - t alone, so its dtarget is -dx. Comparisons let a NaN through as torch's do.
template <class T, class F> void with_loss(int64_t loss, double parameter, bool weighs_positives, const F& f) {
    using V = vec<T>;
    const V zero{}, one = set(T(1)), c = set(T(parameter)), inverse = set(T(1 / parameter)), half = set(T(0.5));
    auto distance = [&](auto value, auto slope) {
        f([=](V x, V t, V) { return value(x - t); }, [=](V x, V t, V) { return slope(x - t); },
          [=](V x, V t, V) { return -slope(x - t); });
    };
    switch (loss) {
        case MSE: return distance([](V d) { return d * d; }, [](V d) { return d + d; });
        case L1: return distance([](V d) { return abs(d); }, [=](V d) { return d > zero ? one : d < zero ? -one : zero; });
        case SMOOTH_L1:
            return distance([=](V d) { return abs(d) < c ? half * d * d * inverse : abs(d) - half * c; },
                            [=](V d) { return d >= c ? one : d <= -c ? -one : d * inverse; });
        case HUBER:
            return distance([=](V d) { return abs(d) <= c ? half * d * d : c * (abs(d) - half * c); },
                            [=](V d) { return d >= c ? c : d <= -c ? -c : d; });
        case BCE: {  // arguments outside [0, 1] give NaN, by which they are noticed
            const V floor = set(T(-100)), tiny = set(T(1e-12)), nan = set(T(__builtin_nan("")));
            auto clamped = [=](V logarithm) { return max(logarithm, floor); };
            return f(
                [=](V x, V t, V) {
                    V v = (t - one) * clamped(log1p<T>(-x)) - t * clamped(log<T>(x));
                    return ((x >= zero) & (x <= one) & (t >= zero) & (t <= one)) ? v : nan;
                },
                [=](V x, V t, V) { return (x - t) / max((one - x) * x, tiny); }, [=](V x, V, V) { return log1p<T>(-x) - log<T>(x); });
        }
        case BCE_WITH_LOGITS:
            if (!weighs_positives)
                return f([=](V x, V t, V) { return (one - t) * x + (bend<T>(x) - min(x, zero)); },
                         [](V x, V t, V) { return sigmoid<T>(x) - t; }, [](V x, V, V) { return -x; });
            return f([=](V x, V t, V p) { return (one - t) * x + ((p - one) * t + one) * (bend<T>(x) - min(x, zero)); },
                     [=](V x, V t, V p) { return (p * t + one - t) * sigmoid<T>(x) - p * t; },
                     [=](V x, V, V p) {
                         V b = bend<T>(x);
                         return min(-x, zero) - b - p * (min(x, zero) - b);
                     });
    }
}

template <class T> struct Arguments {
    const T *x, *target, *weight, *pos_weight;  // the last two may be null

    // f(x, target, pos_weight) of the numbers at n, times their weight
    template <class F> vec<compute_t<T>> at(int64_t n, int lanes, const F& f) const {
        vec<compute_t<T>> p = {}, v;
        if (pos_weight) p = load(pos_weight + n, lanes);
        v = f(load(x + n, lanes), load(target + n, lanes), p);
        return weight ? v * load(weight + n, lanes) : v;
    }
};

// The sum of term(n, lanes), a vector of values, over [begin, end): four sums, as each addition waits for the one before it.
template <class C, class Term> double sum_of(int64_t begin, int64_t end, const Term& term) {
    vec<C> sums[4] = {};
    int64_t n = begin;
    for (; n + 4 * VL<C> <= end; n += 4 * VL<C>)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[i] += term(n + i * VL<C>, VL<C>);
    for (; n < end; n += VL<C>) {
        int lanes = std::min<int64_t>(VL<C>, end - n);
        sums[0] += keep(term(n, lanes), lanes);
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The sum of all values; y, where it is not null, gets each of them.
template <class T> double forward(int64_t loss, double parameter, Arguments<T> a, T* y, int64_t N) {
    using C = compute_t<T>;
    double total = 0;
    with_loss<C>(loss, parameter, a.pos_weight, [&](auto value, auto, auto) {
        auto term = [=](int64_t n, int lanes) {
            vec<C> v = a.at(n, lanes, value);
            if (y) store(y + n, v, lanes);
            return v;
        };
        total = ordered_sum(N, [=](int64_t begin, int64_t end) { return sum_of<C>(begin, end, term); });
    });
    return total;
}

// dy has one number per element, or, where `scale` is given, is that everywhere.
template <class T>
void backward(int64_t loss, double parameter, Arguments<T> a, const T* dy, double scale, T* dx, T* dtarget, int64_t N) {
    using C = compute_t<T>;
    with_loss<C>(loss, parameter, a.pos_weight, [&](auto, auto slope_x, auto slope_target) {
        each_stretch(N, [=](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; n += VL<C>) {
                int lanes = std::min<int64_t>(VL<C>, end - n);
                vec<C> d = dy ? load(dy + n, lanes) : set(C(scale));
                if (dx) store(dx + n, d * a.at(n, lanes, slope_x), lanes);
                if (dtarget) store(dtarget + n, d * a.at(n, lanes, slope_target), lanes);
            }
        });
    });
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

struct Checked {  // contiguous arguments, kept alive
    Tensor x, target, weight, pos_weight;
    template <class T> Arguments<T> as() const {
        auto pointer = [](const Tensor& t) { return t.defined() ? static_cast<const T*>(t.data_ptr()) : nullptr; };
        return {pointer(x), pointer(target), pointer(weight), pointer(pos_weight)};
    }
};
Checked check(const char* op, const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& pos_weight, int64_t loss, double parameter, int64_t reduction) {
    if (!x.defined()) fail(op, ": x is undefined, needs a tensor");
    checked_like(op, "x", x, x), checked_like(op, "target", target, x);
    if (weight) checked_like(op, "weight", *weight, x);
    if (pos_weight) checked_like(op, "pos_weight", *pos_weight, x);
    if (loss < 0 || loss >= LOSSES) fail(op, ": loss has code ", loss, ", needs 0 to ", LOSSES - 1);
    if (reduction < 0 || reduction >= REDUCTIONS) fail(op, ": reduction has code ", reduction, ", needs 0 to ", REDUCTIONS - 1);
    if (loss == SMOOTH_L1 && !(parameter > 0)) fail("smooth_l1_loss: beta is ", parameter, ", needs a number that is not negative");
    if (loss == HUBER && !(parameter > 0)) fail("huber_loss: delta is ", parameter, ", needs a positive number");
    auto dense_or_none = [](const std::optional<Tensor>& t) { return t ? dense(*t) : Tensor(); };
    return {dense(x), dense(target), dense_or_none(weight), dense_or_none(pos_weight)};
}

// The sum of a binary cross-entropy is no number: name the first element that is not in [0, 1], if that is why.
template <class T> void refuse_outside(const char* name, const T* x, int64_t N) {
    for (int64_t n = 0; n < N; n++)
        if (double v = load(x + n, 1)[0]; !(v >= 0 && v <= 1))
            fail("binary_cross_entropy: all elements of ", name, " should be between 0 and 1, element ", n, " (in row-major order) is ", v);
}

Tensor losses_forward(Tensor x, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pos_weight, int64_t loss,
                      double parameter, int64_t reduction) {
    Checked c = check(FORWARD, x, target, weight, pos_weight, loss, parameter, reduction);
    Tensor y = reduction == NONE ? empty(x) : empty(x, {});
    int64_t N = x.numel();
    with_type(FORWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        T* to = static_cast<T*>(y.data_ptr());
        Arguments<T> a = c.as<T>();
        double total = forward<T>(loss, parameter, a, reduction == NONE ? to : nullptr, N);
        if (loss == BCE && total != total) refuse_outside("input", a.x, N), refuse_outside("target", a.target, N);
        if (reduction != NONE) store(to, set(C(reduction == MEAN ? total / N : total)), 1);
    });
    return y;
}

std::tuple<Tensor, Tensor> losses_backward(Tensor dy, Tensor x, Tensor target, std::optional<Tensor> weight,
                                           std::optional<Tensor> pos_weight, int64_t loss, double parameter, int64_t reduction,
                                           bool need_dx, bool need_dtarget) {
    Checked c = check(BACKWARD, x, target, weight, pos_weight, loss, parameter, reduction);
    if (reduction == NONE) checked_like(BACKWARD, "dy", dy, x);
    else checked(BACKWARD, "dy", dy, x.scalar_type(), {});
    Tensor dx = need_dx ? empty(x) : Tensor(), dtarget = need_dtarget ? empty(x) : Tensor(), dys = dense(dy);
    int64_t N = x.numel();
    with_type(BACKWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto pointer = [](const Tensor& t) { return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr; };
        const T* slopes = pointer(dys);
        double scale = reduction == NONE ? 0 : double(load(slopes, 1)[0]) / (reduction == MEAN ? N : 1);
        backward<T>(loss, parameter, c.as<T>(), reduction == NONE ? slopes : nullptr, scale, pointer(dx), pointer(dtarget), N);
    });
    return {dx, dtarget};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("losses_forward", TORCH_BOX(&losses_forward));
    m.impl("losses_backward", TORCH_BOX(&losses_backward));
}
