// The bridge to PyTorch, and the only file that includes it: the stable ABI of torch 2.11, so one binary serves every torch since.
//
// Kernels get a Matrix: a checked pointer with sizes and strides. `checked` is the one entrance: shape, dtype, device and layout are
// compared there, because torch.ops.dlkernels.* can be called without the Python in front of it.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "pool.h"
#include "simd.h"

using Tensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& t) {
    std::ostringstream text;
    text << "(";
    for (size_t i = 0; i < t.sizes().size(); i++) text << (i ? ", " : "") << t.sizes()[i];
    text << ")";
    return text.str();
}

// Require `t` to be a strided CPU tensor of this dtype and shape; `name` and `op` appear in the message.
inline const Tensor& checked(const char* op, const char* name, const Tensor& t, ScalarType dtype, const int64_t* shape, size_t rank) {
    if (!t.defined()) fail(op, ": ", name, " is undefined, needs a tensor");
    if (!t.is_cpu()) fail(op, ": ", name, " is not on the cpu, where this kernel runs");
    if (t.layout() != torch::headeronly::Layout::Strided) fail(op, ": ", name, " must be a strided tensor");
    if (t.scalar_type() != dtype)
        fail(op, ": ", name, " has dtype ", toString(t.scalar_type()), ", needs ", toString(dtype), " like the other arguments");
    bool fits = t.sizes().size() == rank;
    for (size_t i = 0; fits && i < rank; i++) fits = t.sizes()[i] == shape[i];
    if (!fits) {
        std::ostringstream wanted;
        for (size_t i = 0; i < rank; i++) wanted << (i ? ", " : "") << shape[i];
        fail(op, ": ", name, " has shape ", shape_text(t), ", needs (", wanted.str(), ")");
    }
    return t;
}
inline const Tensor& checked(const char* op, const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
    return checked(op, name, t, dtype, shape.begin(), shape.size());
}
// Of the dtype and shape of `like`.
inline const Tensor& checked_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
    return checked(op, name, t, like.scalar_type(), like.sizes().data(), like.sizes().size());
}

struct NamedOptional {
    const char* name;
    const std::optional<Tensor>& t;
};
// Parameters [x.size(1)], those that are there: all of x's dtype, or all float beside an x of a half type.
inline void checked_parameters(const char* op, const Tensor& x, std::initializer_list<NamedOptional> parameters) {
    ScalarType dtype = x.scalar_type();
    for (const auto& [name, t] : parameters)
        if (t && t->defined() && t->scalar_type() == ScalarType::Float && x.element_size() == 2) dtype = ScalarType::Float;
    for (const auto& [name, t] : parameters)
        if (t) checked(op, name, *t, dtype, {x.size(1)});
}

// The seed of dropout with probability p, both checked.
inline uint64_t checked_seed(const char* op, const Tensor& seed, double p) {
    checked(op, "seed", seed, ScalarType::Long, {1});
    if (!(p >= 0 && p <= 1)) fail(op, ": p is ", p, ", needs a probability between 0 and 1");
    return *static_cast<const uint64_t*>(seed.data_ptr());
}

// The rank of `t`, which the shapes of the other arguments are read from.
inline const Tensor& ranked(const char* op, const char* name, const Tensor& t, int64_t rank) {
    if (!t.defined() || t.dim() != rank) fail(op, ": ", name, " must have ", rank, " dimensions, got ", t.defined() ? t.dim() : 0);
    return t;
}

inline int64_t element_size(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Double:
        case ScalarType::Long: return 8;
        case ScalarType::Float:
        case ScalarType::Int: return 4;
        case ScalarType::BFloat16:
        case ScalarType::Half: return 2;
        case ScalarType::Byte: return 1;
        default: fail("a result cannot have dtype ", toString(dtype));
    }
}

// An uninitialised tensor, from the C interface underneath torch::stable: new_empty there goes through the dispatcher, which takes as long
// as a small product. Large ones live in memory of the pool. Strides are those of numbers that lie densely, in any order.
inline Tensor empty_strided(ScalarType dtype, size_t rank, const int64_t* sizes, const int64_t* strides) {
    constexpr double TOO_LARGE = double(int64_t(1) << 46);  // for the torch that is asked below to refuse
    AtenTensorHandle handle;
    double bytes = double(element_size(dtype));
    for (size_t i = 0; i < rank; i++) bytes *= double(sizes[i]);
    if (bytes >= double(Pool::SMALLEST) && bytes < TOO_LARGE)
        if (void* start = Pool::shared().take(size_t(bytes))) {
            auto give = [](void* memory, void* size) { Pool::shared().give(memory, reinterpret_cast<size_t>(size)); };
            void* size = reinterpret_cast<void*>(size_t(bytes));
            if (!torch_from_blob(start, rank, sizes, strides, 0, int32_t(dtype), aoti_torch_device_type_cpu(), -1, &handle,
                                 aoti_torch_layout_strided(), nullptr, 0, give, size))  // 0: all went well
                return Tensor(handle);
            give(start, size);
        }
    if (aoti_torch_empty_strided(rank, sizes, strides, int32_t(dtype), aoti_torch_device_type_cpu(), 0, &handle)) {
        std::ostringstream text;
        for (size_t i = 0; i < rank; i++) text << (i ? " x " : "") << sizes[i];
        fail("not enough memory for a result of ", rank ? text.str() : "1", " elements of type ", toString(dtype));
    }
    return Tensor(handle);
}

// The same, row-major: of a dtype and shape, of another tensor's dtype, or like it in both.
inline Tensor empty(ScalarType dtype, const int64_t* shape, size_t rank) {
    int64_t strides[64], step = 1;  // no tensor has more dimensions
    for (size_t i = rank; i-- > 0;) strides[i] = step, step *= std::max<int64_t>(shape[i], 1);
    return empty_strided(dtype, rank, shape, strides);
}
inline Tensor empty(ScalarType dtype, std::initializer_list<int64_t> shape) { return empty(dtype, shape.begin(), shape.size()); }
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) { return empty(like.scalar_type(), shape); }
inline Tensor empty(const Tensor& like) { return empty(like.scalar_type(), like.sizes().data(), like.sizes().size()); }

inline Tensor contiguous_copy(const Tensor& t) {
    try {
        return torch::stable::contiguous(t);
    } catch (const std::exception&) {
        fail("not enough memory for a contiguous copy of a tensor of shape ", shape_text(t));
    }
}
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : contiguous_copy(t); }

// The tensor itself where one of its two dimensions is contiguous, else a contiguous copy.
inline Tensor row_or_column_major(const Tensor& t) {
    int64_t rows = t.size(0), columns = t.size(1), rs = t.stride(0), cs = t.stride(1);
    bool row_major = cs == 1 && (rs >= columns || rows <= 1), column_major = rs == 1 && (cs >= rows || columns <= 1);
    return row_major || column_major ? t : contiguous_copy(t);
}

// Where the numbers of a tensor begin, or null where there is none.
template <class T> T* data(const Tensor& t) { return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // of no negative numbers

// body(begin, end) over parts of [0, n) on torch's own threads, or on this one.
template <class Body> void parallel(int64_t n, const Body& body, bool serial = false) {
    if (n <= 1 || serial) return body(0, n);
    torch::stable::parallel_for(0, n, 1, body);
}
inline int64_t threads() { return torch::stable::get_num_threads(); }

// What sums over numbers of x are kept in.
inline ScalarType statistics_type(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Call f with a value of the C++ type that `dtype` names.
template <class F> auto with_type(const char* op, ScalarType dtype, const F& f) {
    switch (dtype) {
        case ScalarType::Float: return f(float{});
        case ScalarType::Double: return f(double{});
        case ScalarType::BFloat16: return f(bf16{});
        case ScalarType::Half: return f(f16{});
        default: fail(op, ": dtype ", toString(dtype), " is not supported; needs Float, Double, BFloat16 or Half");
    }
}
