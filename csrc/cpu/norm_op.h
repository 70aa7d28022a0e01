// What the ops on norm.h share in front of the kernel: the types of x and of its parameters.
#pragma once
#include "op.h"

template <class T> T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

// f(T{}, W{}) for the types of x and of its parameters.
template <class F> void with_types(const char* op, const Tensor& x, const std::optional<Tensor>& parameter, const F& f) {
    with_type(op, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        if constexpr (sizeof(T) == 2)
            if (parameter && parameter->scalar_type() == ScalarType::Float) return f(T{}, float{});
        f(T{}, T{});
    });
}
