// cross_entropy and its gradients: one pass over the logits forward, which keeps two numbers a row; one pass backward, which reads the
// logits again, recomputes their exponentials and writes the gradient once. The softmax itself is never in memory.
//
//   classes side by side (D = 1)   a row at a time (cross_entropy.h)
//   classes D numbers apart        a strip of neighbouring rows at a time, every lane a row with a label of its own
//
// kept = [top of every row, sum of every row, what the losses are divided by]
#include "cross_entropy.h"

namespace {

constexpr const char* FORWARD = "cross_entropy_forward";
constexpr const char* BACKWARD = "cross_entropy_backward";
enum Reduction { NO_REDUCTION, MEAN, SUM, REDUCTIONS };

// The loss of every lane of a strip, which begins at x (and p); its normalisers go to top and total.
template <int U, class T, class Lanes>
void loss_of_strip(const Target<T>& target, const T* x, const T* p, int64_t row, int64_t D, Lanes lanes, compute_t<T>* tops,
                   compute_t<T>* sums, compute_t<T>* losses) {
    using C = compute_t<T>;
    vec<C> top[U], total[U] = {}, loss[U] = {};
    strip_top<U>(x, target.N, D, lanes, top);
    each_of_strip<U>(target.N, [&](int64_t n, int u) {
        prefetch_l2(x + n * D + (U + u) * VL<C>);
        total[u] += exp_nonpositive<C>(load(x + n * D + u * VL<C>, lanes) - top[u]);
    });
    for (int u = 0; u < U; u++) store(tops + u * VL<C>, top[u], lanes), store(sums + u * VL<C>, total[u], lanes);
    for (auto& t : total) t = log<C>(t);
    if (target.spreads())
        each_of_strip<U>(target.N, [&](int64_t n, int u) {
            int64_t at = n * D + u * VL<C>;
            vec<C> q = set(target.smoothing / target.N);
            if (p) q += (1 - target.smoothing) * load(p + at, lanes);
            loss[u] += q * target.weight_of(n) * (total[u] - (load(x + at, lanes) - top[u]));
        });
    for (int u = 0; u < U; u++)
        for (int lane = 0; lane < lanes; lane++) {
            int64_t at = u * VL<C> + lane;
            C value = target.keeps(row + at) ? loss[u][lane] : 0;
            if (target.labels && target.keeps(row + at)) {
                int64_t label = target.labels[row + at];
                value += target.peak(label) * (total[u][lane] - (number(x + label * D + at) - top[u][lane]));
            }
            losses[at] = value;
        }
}

// The gradients for a strip's logits and probabilities, whichever is not null. g: of each row, or one for all where g_step is 0.
template <int U, class T, class Lanes>
void gradient_of_strip(const Target<T>& target, const T* x, const T* p, T* dx, T* dp, int64_t row, int64_t D, Lanes lanes,
                       const compute_t<T>* tops, const compute_t<T>* sums, const vec<compute_t<T>> (&g)[U]) {
    using C = compute_t<T>;
    vec<C> top[U], asked[U] = {}, slope[U], scale[U], level[U], at_label[U] = {};
    vec<ints<C>> label[U] = {};
    for (int u = 0; u < U; u++) {
        top[u] = load(tops + u * VL<C>, lanes), slope[u] = g[u];
        level[u] = log<C>(load(sums + u * VL<C>, lanes));
        for (int lane = 0; target.labels && lane < lanes; lane++) {
            int64_t r = row + u * VL<C> + lane;
            if (!target.keeps(r)) slope[u][lane] = 0, label[u][lane] = -1;
            else label[u][lane] = target.labels[r], asked[u][lane] = target.asked(target.labels[r]),
                 at_label[u][lane] = g[u][lane] * target.peak(target.labels[r]);
        }
    }
    auto spread = [&](int64_t n, int u) {
        vec<C> q = set(target.smoothing / target.N);
        if (p) q += (1 - target.smoothing) * load(p + n * D + u * VL<C>, lanes);
        return q * target.weight_of(n);
    };
    if (p && dx) each_of_strip<U>(target.N, [&](int64_t n, int u) { asked[u] += spread(n, u); });
    for (int u = 0; u < U; u++) scale[u] = slope[u] * asked[u] / load(sums + u * VL<C>, lanes);
    each_of_strip<U>(target.N, [&](int64_t n, int u) {
        int64_t at = n * D + u * VL<C>;
        prefetch_l2(x + at + U * VL<C>);
        vec<C> below = load(x + at, lanes) - top[u];
        if (dx) {
            vec<C> v = exp_nonpositive<C>(below) * scale[u];
            if (target.spreads()) v -= slope[u] * spread(n, u);
            if (target.labels) v = label[u] == ints<C>(n) ? v - at_label[u] : v;
            store(dx + at, v, lanes);
        }
        if (dp) store(dp + at, slope[u] * (1 - target.smoothing) * target.weight_of(n) * (level[u] - below), lanes);
    });
}

template <class C> C total_of(const C* p, int64_t count) {
    return ordered_sum(count, [=](int64_t begin, int64_t end) {
        vec<C> terms{};
        each_vector<C>(end - begin, [&](int64_t n, auto lanes) { terms += load(p + begin + n, lanes); });
        return sum(terms);
    });
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

struct Arguments {
    Classes size;
    Tensor x, target, weight;
    bool labels;
    int64_t rows() const { return size.M * size.D; }

    Arguments(const char* op, const Tensor& logits, const Tensor& target_, const std::optional<Tensor>& weight_, int64_t reduction,
              int64_t ignored)
        : size(logits, logits.dim() > 1) {
        if (logits.dim() == 0) fail(op, ": x must have at least 1 dimension");
        checked_like(op, "x", logits, logits);
        if (!target_.defined()) fail(op, ": target is undefined, needs a tensor");
        labels = target_.scalar_type() == ScalarType::Long;
        auto shape = row_shape(logits);
        if (labels) checked(op, "target", target_, ScalarType::Long, shape.data(), shape.size());
        else checked_like(op, "target", target_, logits);
        if (weight_) checked(op, "weight", *weight_, logits.scalar_type(), {size.N});
        if (size.N == 0 || size.N > INT32_MAX) fail(op, ": x has ", size.N, " classes, needs 1 to ", INT32_MAX);
        if (reduction < 0 || reduction >= REDUCTIONS) fail(op, ": reduction has code ", reduction, ", needs 0 to ", REDUCTIONS - 1);
        x = dense(logits), target = dense(target_), weight = weight_ ? dense(*weight_) : Tensor();
        if (labels) check_labels(op, ignored);
    }
    static std::vector<int64_t> row_shape(const Tensor& x) {
        std::vector<int64_t> shape;
        for (int64_t i = 0; i < x.dim(); i++)
            if (i != (x.dim() > 1)) shape.push_back(x.size(i));
        return shape;
    }
    void check_labels(const char* op, int64_t ignored) const {
        auto label = static_cast<const int64_t*>(target.data_ptr());
        auto wrong = [=, N = size.N](int64_t row) { return (uint64_t(label[row]) >= uint64_t(N)) & (label[row] != ignored); };
        bool any = false;
        for (int64_t row = 0; row < rows(); row++) any |= wrong(row);
        for (int64_t row = 0; any && row < rows(); row++)
            if (wrong(row))
                fail(op, ": Target ", label[row], " is out of bounds: number ", row, " of target must be 0 to ", size.N - 1, " for the ",
                     size.N, " classes of input, or ignore_index, ", ignored);
    }
    template <class T> Target<T> as(double smoothing, int64_t ignored) const {
        auto numbers = static_cast<const T*>(target.data_ptr());
        return {labels ? static_cast<const int64_t*>(target.data_ptr()) : nullptr, labels ? nullptr : numbers,
                weight.defined() ? static_cast<const T*>(weight.data_ptr()) : nullptr, smoothing, ignored, size.N};
    }
};

ScalarType statistics_type(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target_, std::optional<Tensor> weight, int64_t reduction,
                                                 int64_t ignored, double smoothing) {
    Arguments given(FORWARD, logits, target_, weight, reduction, ignored);
    auto shape = Arguments::row_shape(logits);
    int64_t R = given.rows();
    Tensor loss = empty(logits, shape.data(), reduction ? 0 : shape.size()), kept = empty_of(statistics_type(logits), {2 * R + 1});
    with_type(FORWARD, logits.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        auto [M, N, D] = given.size;
        const Target<T> target = given.as<T>(smoothing, ignored);
        auto x = static_cast<const T*>(given.x.data_ptr());
        auto tops = static_cast<C*>(kept.data_ptr()), sums = tops + R, divisor = sums + R;
        std::vector<C> losses(R), masses(reduction == MEAN && target.labels ? R : 0);
        if (D == 1)
            each_row(M, N, [&, N = N](int64_t m) {
                Normaliser<C> at;
                losses[m] = loss_of_row(target, x + m * N, target.probs ? target.probs + m * N : nullptr, m, at);
                tops[m] = at.top, sums[m] = at.sum;
            });
        else
            each_strip<C>(M, N, D, [&, N = N, D = D](int64_t m, int64_t d, auto width, auto lanes) {
                int64_t at = m * N * D + d, row = m * D + d;
                loss_of_strip<width()>(target, x + at, target.probs ? target.probs + at : nullptr, row, D, lanes, tops + row, sums + row,
                                       losses.data() + row);
            });
        for (size_t r = 0; r < masses.size(); r++) masses[r] = target.keeps(r) ? target.weight_of(target.labels[r]) : 0;
        *divisor = reduction != MEAN ? C(1) : target.labels ? total_of(masses.data(), R) : C(R);
        auto out = static_cast<T*>(loss.data_ptr());
        if (reduction) store(out, set(total_of(losses.data(), R) / *divisor), 1);
        else each_vector<C>(R, [&](int64_t r, auto lanes) { store(out + r, load(losses.data() + r, lanes), lanes); });
    });
    return {loss, kept};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(Tensor dy, Tensor logits, Tensor target_, std::optional<Tensor> weight, Tensor kept,
                                                  int64_t reduction, int64_t ignored, double smoothing, bool need_dx, bool need_dtarget) {
    Arguments given(BACKWARD, logits, target_, weight, reduction, ignored);
    auto shape = Arguments::row_shape(logits);
    int64_t R = given.rows();
    checked(BACKWARD, "dy", dy, logits.scalar_type(), shape.data(), reduction ? 0 : shape.size());
    checked(BACKWARD, "kept", kept, statistics_type(logits), {2 * R + 1});
    if (need_dtarget && given.labels) fail(BACKWARD, ": labels have no gradient");
    Tensor dx = need_dx ? empty(logits) : Tensor(), dtarget = need_dtarget ? empty(logits) : Tensor(), dys = dense(dy), keep = dense(kept);
    with_type(BACKWARD, logits.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        auto [M, N, D] = given.size;
        const Target<T> target = given.as<T>(smoothing, ignored);
        auto x = static_cast<const T*>(given.x.data_ptr()), slope = static_cast<const T*>(dys.data_ptr());
        auto to_x = need_dx ? static_cast<T*>(dx.data_ptr()) : nullptr, to_p = need_dtarget ? static_cast<T*>(dtarget.data_ptr()) : nullptr;
        auto tops = static_cast<const C*>(keep.data_ptr()), sums = tops + R;
        const C share = reduction ? number(slope) / sums[R] : 0;  // of every row
        if (D == 1)
            return each_row(M, N, [&, N = N](int64_t m) {
                const T *row = x + m * N, *p = target.probs ? target.probs + m * N : nullptr;
                C g = reduction ? share : number(slope + m);
                if (to_x) gradient_of_row(target, row, p, to_x + m * N, m, {tops[m], sums[m]}, g);
                if (to_p) target_gradient_of_row(target, row, to_p + m * N, {tops[m], sums[m]}, g);
            });
        each_strip<C>(M, N, D, [&, N = N, D = D](int64_t m, int64_t d, auto width, auto lanes) {
            constexpr int U = width();
            int64_t at = m * N * D + d, row = m * D + d;
            vec<C> g[U];
            for (int u = 0; u < U; u++) g[u] = reduction ? set(share) : load(slope + row + u * VL<C>, lanes);
            gradient_of_strip<U>(target, x + at, target.probs ? target.probs + at : nullptr, to_x ? to_x + at : nullptr,
                                 to_p ? to_p + at : nullptr, row, D, lanes, tops + row, sums + row, g);
        });
    });
    return {dx, dtarget};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
    m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}
