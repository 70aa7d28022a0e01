// nll_loss: minus the log-probability of every row's label, weighted; its gradient is zero but for one number a row.
//
// Memory is all there is to it: forward one number in N is read, backward a tensor of zeros is written and then those numbers.
// One thread sums: the losses are few beside the numbers that whoever made the log-probabilities had to touch.
#include <cstring>

#include "cross_entropy.h"

namespace {

constexpr const char* FORWARD = "nll_loss_forward";
constexpr const char* BACKWARD = "nll_loss_backward";

struct Arguments {
    Classes size;
    Tensor x, target, weight;
    int64_t ignored;

    Arguments(const char* op, const Tensor& input, const Tensor& target_, const std::optional<Tensor>& weight_, int64_t reduction,
              int64_t ignored)
        : size(input, input.dim() > 1), ignored(ignored) {
        if (input.dim() == 0) fail(op, ": x must have at least 1 dimension");
        checked_like(op, "x", input, input);
        auto shape = row_shape(input);
        checked(op, "target", target_, ScalarType::Long, shape.data(), shape.size());
        if (weight_) checked(op, "weight", *weight_, input.scalar_type(), {size.N});
        if (reduction < 0 || reduction > 2) fail(op, ": reduction has code ", reduction, ", needs 0 to 2");
        x = input, target = dense(target_), weight = weight_ ? dense(*weight_) : Tensor();
        for (int64_t row = 0; row < size.M * size.D; row++)
            if (label(row) != ignored && (label(row) < 0 || label(row) >= size.N))
                fail(op, ": Target ", label(row), " is out of bounds: number ", row, " of target must be 0 to ", size.N - 1, " for the ",
                     size.N, " classes of input, or ignore_index, ", ignored);
    }
    static std::vector<int64_t> row_shape(const Tensor& x) {
        std::vector<int64_t> shape;
        for (int64_t i = 0; i < x.dim(); i++)
            if (i != (x.dim() > 1)) shape.push_back(x.size(i));
        return shape;
    }
    int64_t label(int64_t row) const { return static_cast<const int64_t*>(target.data_ptr())[row]; }
    template <class T> compute_t<T> weight_of(int64_t row) const {
        return weight.defined() ? number(static_cast<const T*>(weight.data_ptr()) + label(row)) : 1;
    }
    // f(row, where its label's number lies) for every row whose label counts
    template <class F> void each(const F& f) const {
        for (int64_t m = 0, row = 0; m < size.M; m++)
            for (int64_t d = 0; d < size.D; d++, row++)
                if (label(row) != ignored) f(row, (m * size.N + label(row)) * size.D + d);
    }
};

std::tuple<Tensor, Tensor> nll_loss_forward(Tensor x, Tensor target, std::optional<Tensor> weight, int64_t reduction, int64_t ignored) {
    Arguments given(FORWARD, x, target, weight, reduction, ignored);
    auto shape = Arguments::row_shape(x);
    Tensor loss = empty(x, shape.data(), reduction ? 0 : shape.size()), xs = dense(x);
    Tensor divisor = empty_of(x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, {1});
    with_type(FORWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        auto from = static_cast<const T*>(xs.data_ptr());
        auto to = static_cast<T*>(loss.data_ptr());
        if (reduction == 0) memset(to, 0, loss.numel() * sizeof(T));
        double total = 0, mass = 0;
        given.each([&](int64_t row, int64_t at) {
            C w = given.weight_of<T>(row), value = -w * number(from + at);
            if (reduction == 0) store(to + row, set(value), 1);
            total += value, mass += w;
        });
        C by = reduction == 1 ? mass : 1;
        *static_cast<C*>(divisor.data_ptr()) = by;
        if (reduction) store(to, set(C(total / by)), 1);
    });
    return {loss, divisor};
}

Tensor nll_loss_backward(Tensor dy, Tensor x, Tensor target, std::optional<Tensor> weight, Tensor divisor, int64_t reduction,
                         int64_t ignored) {
    Arguments given(BACKWARD, x, target, weight, reduction, ignored);
    auto shape = Arguments::row_shape(x);
    checked(BACKWARD, "dy", dy, x.scalar_type(), shape.data(), reduction ? 0 : shape.size());
    checked(BACKWARD, "divisor", divisor, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, {1});
    Tensor dx = empty(x), dys = dense(dy);
    with_type(BACKWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        auto slope = static_cast<const T*>(dys.data_ptr());
        auto to = static_cast<T*>(dx.data_ptr());
        each_stretch(dx.numel(), [=](int64_t begin, int64_t end) { memset(to + begin, 0, (end - begin) * sizeof(T)); });
        const C by = *static_cast<const C*>(divisor.data_ptr());
        given.each([&](int64_t row, int64_t at) {
            C g = reduction ? number(slope) / by : number(slope + row);
            store(to + at, set(-g * given.weight_of<T>(row)), 1);
        });
    });
    return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("nll_loss_forward", TORCH_BOX(&nll_loss_forward));
    m.impl("nll_loss_backward", TORCH_BOX(&nll_loss_backward));
}
