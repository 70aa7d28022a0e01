// cross_entropy and its gradients: one pass over the logits forward, which keeps two numbers a row; one pass backward, which reads the
// logits again, recomputes their exponentials and writes the gradient once. The softmax itself is never in memory.
//
// The tiles and what is done to one are in softmax.h and cross_entropy.h. kept = [top of every row, sum of every row, what the losses are
// divided by].
#include "cross_entropy.h"

namespace {

constexpr const char* FORWARD = "cross_entropy_forward";
constexpr const char* BACKWARD = "cross_entropy_backward";

std::tuple<Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target_, std::optional<Tensor> weight, int64_t reduction,
                                                 int64_t ignored, double smoothing) {
    LossArguments given(FORWARD, logits, target_, weight, reduction, ignored);
    int64_t R = given.rows();
    Tensor loss = empty(logits.scalar_type(), given.row_shape.data(), given.losses()), kept = empty(statistics_type(logits), {2 * R + 1});
    with_type(FORWARD, logits.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        const Target<T> target = given.as<T>(smoothing);
        auto x = static_cast<const T*>(given.x.data_ptr());
        auto tops = static_cast<C*>(kept.data_ptr()), sums = tops + R, divisor = sums + R;
        std::vector<C> losses(R);
        each_tile<C>(given.size, [&](auto tile, int64_t at, int64_t row) {
            tile_losses(tile, target, x, at, row, tops, sums, losses.data());
        });
        *divisor = divisor_of(target, reduction, R);
        reduce(reduction, R, losses.data(), *divisor, static_cast<T*>(loss.data_ptr()));
    });
    return {loss, kept};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(Tensor dy, Tensor logits, Tensor target_, std::optional<Tensor> weight, Tensor kept,
                                                  int64_t reduction, int64_t ignored, double smoothing, bool need_dx, bool need_dtarget) {
    LossArguments given(BACKWARD, logits, target_, weight, reduction, ignored);
    int64_t R = given.rows();
    checked(BACKWARD, "dy", dy, logits.scalar_type(), given.row_shape.data(), given.losses());
    checked(BACKWARD, "kept", kept, statistics_type(logits), {2 * R + 1});
    if (need_dtarget && given.labels) fail(BACKWARD, ": labels have no gradient");
    Tensor dx = need_dx ? empty(logits) : Tensor(), dtarget = need_dtarget ? empty(logits) : Tensor(), dys = dense(dy), keep = dense(kept);
    with_type(BACKWARD, logits.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        const Target<T> target = given.as<T>(smoothing);
        auto x = static_cast<const T*>(given.x.data_ptr()), slope = static_cast<const T*>(dys.data_ptr());
        auto to_x = need_dx ? static_cast<T*>(dx.data_ptr()) : nullptr, to_p = need_dtarget ? static_cast<T*>(dtarget.data_ptr()) : nullptr;
        auto tops = static_cast<const C*>(keep.data_ptr()), sums = tops + R;
        const C share = reduction ? number(slope) / sums[R] : 0;  // of every row
        each_tile<C>(given.size, [&](auto tile, int64_t at, int64_t row) {
            constexpr int U = decltype(tile)::U;
            vec<C> g[U];
            for (int u = 0; u < U; u++) g[u] = reduction ? set(share) : tile.get(slope + row, u);
            tile_gradients(tile, target, x, to_x, to_p, at, row, tops, sums, g);
        });
    });
    return {dx, dtarget};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
    m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}
