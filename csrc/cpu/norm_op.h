// What the ops on norm.h share in front of the kernel: the types of x and of its parameters.
#pragma once
#include "norm.h"

// f(T{}, W{}) for the types of x and of its parameters.
template <class F> void with_types(const char* op, const Tensor& x, const std::optional<Tensor>& parameter, const F& f) {
    with_type(op, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        if constexpr (sizeof(T) == 2)
            if (parameter && parameter->scalar_type() == ScalarType::Float) return f(T{}, float{});
        f(T{}, T{});
    });
}

// A parameter as the rows of x read it: contiguous, and float beside a half type where it is read so often that widening it once is cheaper.
inline Tensor readable(const Tensor& parameter, const Tensor& x) {
    constexpr int64_t MANY_ROWS = 32;
    Tensor from = dense(parameter);
    if (from.element_size() != 2 || x.size(0) < MANY_ROWS || x.numel() <= SERIAL_NUMBERS) return from;
    Tensor to = empty(ScalarType::Float, {from.numel()});
    with_type("layer_norm", from.scalar_type(), [&](auto type) {
        if constexpr (sizeof(type) == 2)
            each_vector<float, 1>(0, from.numel(), [&](int, int64_t n, int lanes) INLINE {
                store(data<float>(to) + n, load(data<decltype(type)>(from) + n, lanes), lanes);
            });
    });
    return to;
}
