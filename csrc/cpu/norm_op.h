// What the ops on norm.h share in front of the kernel: the dtypes of parameters and statistics.
#pragma once
#include "op.h"

template <class T> T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

inline bool is_half(const Tensor& t) { return t.element_size() == 2; }

// weight and bias are [N] of one dtype: that of x, or float32 beside a half type.
inline void check_parameters(const char* op, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
    const std::optional<Tensor>& one = weight ? weight : bias;
    bool mixed = one && one->defined() && one->scalar_type() == ScalarType::Float && is_half(x);
    ScalarType dtype = mixed ? ScalarType::Float : x.scalar_type();
    if (weight) checked(op, "weight", *weight, dtype, {x.size(1)});
    if (bias) checked(op, "bias", *bias, dtype, {x.size(1)});
}

// f(T{}, W{}) for the types of x and of its parameters.
template <class F> void with_types(const char* op, const Tensor& x, const std::optional<Tensor>& parameter, const F& f) {
    with_type(op, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        if constexpr (sizeof(T) == 2)
            if (parameter && parameter->scalar_type() == ScalarType::Float) return f(T{}, float{});
        f(T{}, T{});
    });
}
