// nll_loss: minus the log-probability of every row's label, weighted; its gradient is zero but for one number a row.
//
// Memory is all there is to it: forward one number in N is read, backward a tensor of zeros is written and then those numbers.
// Nearly every row costs a wait for memory, and threads wait side by side.
#include <cstring>

#include "cross_entropy.h"

namespace {

constexpr const char* FORWARD = "nll_loss_forward";
constexpr const char* BACKWARD = "nll_loss_backward";

// f(row, where its label's number lies, weight of the label) for every row whose label counts
template <class T, class F> void each_label(const Classes& size, const Target<T>& target, const F& f) {
    constexpr int64_t FEW_ROWS = 2048;
    parallel(size.M, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin, row = begin * size.D; m < end; m++)
            for (int64_t d = 0; d < size.D; d++, row++)
                if (target.keeps(row)) f(row, (m * size.N + target.labels[row]) * size.D + d, target.weight_of(target.labels[row]));
    }, size.M * size.D <= FEW_ROWS);
}

LossArguments checked_arguments(const char* op, const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight,
                                int64_t reduction, int64_t ignored) {
    if (target.defined() && target.scalar_type() != ScalarType::Long)
        fail(op, ": target has dtype ", toString(target.scalar_type()), ", needs Long");
    return {op, x, target, weight, reduction, ignored};
}

std::tuple<Tensor, Tensor> nll_loss_forward(Tensor x, Tensor target_, std::optional<Tensor> weight, int64_t reduction, int64_t ignored) {
    LossArguments given = checked_arguments(FORWARD, x, target_, weight, reduction, ignored);
    Tensor loss = empty(x.scalar_type(), given.row_shape.data(), given.losses()), divisor = empty(statistics_type(x), {1});
    with_type(FORWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        const Target<T> target = given.as<T>(0);
        auto from = static_cast<const T*>(given.x.data_ptr());
        std::vector<C> losses(given.rows());
        each_label(given.size, target, [&](int64_t row, int64_t at, C w) { losses[row] = -w * number(from + at); });
        const C by = divisor_of(target, reduction, given.rows());
        *static_cast<C*>(divisor.data_ptr()) = by;
        reduce(reduction, given.rows(), losses.data(), by, static_cast<T*>(loss.data_ptr()));
    });
    return {loss, divisor};
}

Tensor nll_loss_backward(Tensor dy, Tensor x, Tensor target_, std::optional<Tensor> weight, Tensor divisor, int64_t reduction,
                         int64_t ignored) {
    LossArguments given = checked_arguments(BACKWARD, x, target_, weight, reduction, ignored);
    checked(BACKWARD, "dy", dy, x.scalar_type(), given.row_shape.data(), given.losses());
    checked(BACKWARD, "divisor", divisor, statistics_type(x), {1});
    Tensor dx = empty(x), dys = dense(dy);
    with_type(BACKWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        auto slope = static_cast<const T*>(dys.data_ptr());
        auto to = static_cast<T*>(dx.data_ptr());
        each_stretch(dx.numel(), [=](int64_t begin, int64_t end) { memset(to + begin, 0, (end - begin) * sizeof(T)); });
        const C share = reduction ? number(slope) / *static_cast<const C*>(divisor.data_ptr()) : 0;
        each_label(given.size, given.as<T>(0), [&](int64_t row, int64_t at, C w) {
            store(to + at, set(-w * (reduction ? share : number(slope + row))), 1);
        });
    });
    return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("nll_loss_forward", TORCH_BOX(&nll_loss_forward));
    m.impl("nll_loss_backward", TORCH_BOX(&nll_loss_backward));
}
