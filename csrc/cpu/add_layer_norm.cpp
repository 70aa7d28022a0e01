// add_layer_norm and dropout_add_layer_norm: sum = factor x + residual (factor 1 without dropout), y = layer_norm(sum), and the gradients.
//
// The sum of a block of a row is formed, rounded and stored just before layer_norm looks at it (norm.h), and the gradient of the dropout
// is taken from a row of the gradient of the sum just after that is there (norm_backward.h): both find it in the cache. The factors depend
// on the seed, the row and the column alone (philox.h), so nothing is kept of them.
#include "norm_backward.h"
#include "norm_op.h"
#include "philox.h"

namespace {

constexpr const char* FORWARD = "add_layer_norm_forward";
constexpr const char* BACKWARD = "add_layer_norm_backward";

std::optional<Dropout> checked_dropout(const char* op, const std::optional<Tensor>& seed, double p) {
    if (!seed) return {};
    return Dropout(checked_seed(op, *seed, p), p);
}

// s = x + residual in columns [begin, end) of row m.
template <class T> void add(const T* x, const T* residual, T* s, int64_t begin, int64_t end) {
    each_vector<compute_t<T>, 1>(begin, end, [&](int, int64_t n, int lanes) INLINE {
        store(s + n, load(x + n, lanes) + load(residual + n, lanes), lanes);
    });
}

// s = factor x + residual; begin is a multiple of PHILOX_BLOCK.
template <class T>
void drop_and_add(const Dropout& dropout, int64_t m, const T* x, const T* residual, T* s, int64_t begin, int64_t end) {
    using C = compute_t<T>;
    alignas(64) C factor[PHILOX_BLOCK];
    for (int64_t block = begin; block < end; block += PHILOX_BLOCK) {
        dropout.factors(m, block, factor);
        each_vector<C, 1>(block, std::min(end, block + PHILOX_BLOCK), [&](int, int64_t n, int lanes) INLINE {
            store(s + n, load(x + n, lanes) * load(factor + n - block) + load(residual + n, lanes), lanes);
        });
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(Tensor x, Tensor residual, std::optional<Tensor> seed,
                                                                  std::optional<Tensor> weight, std::optional<Tensor> bias, double p,
                                                                  double eps) {
    int64_t M = ranked(FORWARD, "x", x, 2).size(0), N = x.size(1);
    checked(FORWARD, "x", x, x.scalar_type(), {M, N});
    checked(FORWARD, "residual", residual, x.scalar_type(), {M, N});
    checked_parameters(FORWARD, x, {{"weight", weight}, {"bias", bias}});
    const std::optional<Dropout> dropout = checked_dropout(FORWARD, seed, p);
    Tensor y = empty(x, {M, N}), s = empty(x, {M, N}), mean = empty(statistics_type(x), {2, M}), rstd = empty(statistics_type(x), {M});
    Tensor xs = dense(x), residuals = dense(residual);
    if (weight) weight = readable(*weight, x);
    if (bias) bias = readable(*bias, x);
    with_types(FORWARD, x, weight ? weight : bias, [&](auto type, auto parameter) {
        using T = decltype(type);
        using W = decltype(parameter);
        using C = compute_t<T>;
        const T *from = data<T>(xs), *and_from = data<T>(residuals);
        T* to = data<T>(s);
        Norm<T, W> norm{M, N, to, weight ? data<W>(*weight) : nullptr, bias ? data<W>(*bias) : nullptr, data<C>(mean), data<C>(rstd)};
        norm.forward(data<T>(y), C(eps), [&](int64_t m, int64_t begin, int64_t end) {
            if (dropout) drop_and_add(*dropout, m, from + m * N, and_from + m * N, to + m * N, begin, end);
            else add(from + m * N, and_from + m * N, to + m * N, begin, end);
        });
    });
    return {y, s, mean, rstd};
}

// dx only where there is a seed: without, it is dresidual.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor dy, std::optional<Tensor> dsum, Tensor s,
                                                                   std::optional<Tensor> seed, std::optional<Tensor> weight, Tensor mean,
                                                                   Tensor rstd, double p, bool need_dx, bool need_dresidual,
                                                                   bool need_dweight, bool need_dbias) {
    int64_t M = ranked(BACKWARD, "sum", s, 2).size(0), N = s.size(1);
    checked(BACKWARD, "sum", s, s.scalar_type(), {M, N});
    checked(BACKWARD, "dy", dy, s.scalar_type(), {M, N});
    if (dsum) checked(BACKWARD, "dsum", *dsum, s.scalar_type(), {M, N});
    checked_parameters(BACKWARD, s, {{"weight", weight}});
    checked(BACKWARD, "mean", mean, statistics_type(s), {2, M});
    checked(BACKWARD, "rstd", rstd, statistics_type(s), {M});
    const std::optional<Dropout> dropout = checked_dropout(BACKWARD, seed, p);
    Tensor dx = need_dx && dropout ? empty(s, {M, N}) : Tensor(), dresidual = need_dresidual ? empty(s, {M, N}) : Tensor();
    Tensor dweight = need_dweight ? empty(weight ? *weight : s, {N}) : Tensor();
    Tensor dbias = need_dbias ? empty(weight ? *weight : s, {N}) : Tensor();
    Tensor dys = dense(dy), dsums = dsum ? dense(*dsum) : s, ss = dense(s), ws = weight ? dense(*weight) : s;
    Tensor means = dense(mean), rstds = dense(rstd);
    with_types(BACKWARD, s, weight, [&](auto type, auto parameter) {
        using T = decltype(type);
        using W = decltype(parameter);
        using C = compute_t<T>;
        T *of_x = need_dx && dropout ? data<T>(dx) : nullptr, *of_sum = need_dresidual ? data<T>(dresidual) : of_x;
        NormBackward<T, W> norm{{M, N, data<T>(ss), weight ? data<W>(ws) : nullptr, nullptr, data<C>(means), data<C>(rstds)},
                                data<T>(dys), dsum ? data<T>(dsums) : nullptr, of_sum, need_dweight ? data<W>(dweight) : nullptr,
                                need_dbias ? data<W>(dbias) : nullptr};
        norm.run([&](int64_t m, int64_t begin, int64_t end) {
            if (of_x) dropout->apply(m, of_sum + m * N, of_x + m * N, begin, end);
        });
    });
    return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward));
    m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}
