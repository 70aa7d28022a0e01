// layer_norm and rms_norm: y = (x - mean) rstd w + b and its gradients, all of it in norm.h and norm_backward.h.
#include "norm_backward.h"
#include "norm_op.h"

namespace {

constexpr const char* FORWARD = "layer_norm_forward";
constexpr const char* BACKWARD = "layer_norm_backward";

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                                                      bool centred) {
    int64_t M = ranked(FORWARD, "x", x, 2).size(0), N = x.size(1);
    checked(FORWARD, "x", x, x.scalar_type(), {M, N});
    checked_parameters(FORWARD, x, {{"weight", weight}, {"bias", bias}});
    Tensor y = empty(x, {M, N}), mean = centred ? empty(statistics_type(x), {2, M}) : Tensor(), rstd = empty(statistics_type(x), {M});
    Tensor xs = dense(x);
    if (weight) weight = readable(*weight, x);
    if (bias) bias = readable(*bias, x);
    with_types(FORWARD, x, weight ? weight : bias, [&](auto type, auto parameter) {
        using T = decltype(type);
        using W = decltype(parameter);
        using C = compute_t<T>;
        Norm<T, W> norm{M, N, data<T>(xs), weight ? data<W>(*weight) : nullptr, bias ? data<W>(*bias) : nullptr,
                        centred ? data<C>(mean) : nullptr, data<C>(rstd)};
        norm.forward(data<T>(y), C(eps), [](int64_t, int64_t, int64_t) {});
    });
    return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> mean,
                                                       Tensor rstd, bool need_dx, bool need_dweight, bool need_dbias) {
    int64_t M = ranked(BACKWARD, "x", x, 2).size(0), N = x.size(1);
    checked(BACKWARD, "x", x, x.scalar_type(), {M, N});
    checked(BACKWARD, "dy", dy, x.scalar_type(), {M, N});
    checked_parameters(BACKWARD, x, {{"weight", weight}});
    if (mean) checked(BACKWARD, "mean", *mean, statistics_type(x), {2, M});
    checked(BACKWARD, "rstd", rstd, statistics_type(x), {M});
    Tensor dx = need_dx ? empty(x, {M, N}) : Tensor(), dweight = need_dweight ? empty(weight ? *weight : x, {N}) : Tensor();
    Tensor dbias = need_dbias ? empty(weight ? *weight : x, {N}) : Tensor();
    Tensor dys = dense(dy), xs = dense(x), ws = weight ? dense(*weight) : x, means = mean ? dense(*mean) : x, rstds = dense(rstd);
    with_types(BACKWARD, x, weight, [&](auto type, auto parameter) {
        using T = decltype(type);
        using W = decltype(parameter);
        using C = compute_t<T>;
        Norm<T, W> rows{M, N, data<T>(xs), weight ? data<W>(ws) : nullptr, nullptr, mean ? data<C>(means) : nullptr, data<C>(rstds)};
        NormBackward<T, W> norm{rows,
                                data<T>(dys), nullptr, need_dx ? data<T>(dx) : nullptr, need_dweight ? data<W>(dweight) : nullptr,
                                need_dbias ? data<W>(dbias) : nullptr};
        norm.run([](int64_t, int64_t, int64_t) {});
    });
    return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
    m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}
