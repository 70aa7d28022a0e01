// vector_math(x, f): one function of math.h on every element, so that tests can measure it.
#include "math.h"
#include "op.h"

template <class T, class F> static void map(const T* x, T* y, int64_t n, const F& f) {
    for (int64_t i = 0; i < n; i += VL<T>) {
        int lanes = n - i < VL<T> ? int(n - i) : VL<T>;
        store(y + i, f(load(x + i, lanes)), lanes);
    }
}

template <class T> static void evaluate(const std::string& f, const T* x, T* y, int64_t n) {
    using V = vec<T>;
    if (f == "exp") return map(x, y, n, [](V v) { return exp<T>(v); });
    if (f == "log") return map(x, y, n, [](V v) { return log<T>(v); });
    if (f == "tanh") return map(x, y, n, [](V v) { return tanh<T>(v); });
    if (f == "sigmoid") return map(x, y, n, [](V v) { return sigmoid<T>(v); });
    if (f == "elu") return map(x, y, n, [](V v) { return elu<T>(v); });
    if (f == "softplus") return map(x, y, n, [](V v) { return softplus<T>(v); });
    if (f == "erf") return map(x, y, n, [](V v) { return erf<T>(v); });
    if (f == "gauss_cdf") return map(x, y, n, [](V v) { return gauss_cdf<T>(v); });
    if (f == "gauss_pdf") return map(x, y, n, [](V v) { return gauss_pdf<T>(v); });
    fail("vector_math: f is '", f, "', needs exp, log, tanh, sigmoid, elu, softplus, erf, gauss_cdf or gauss_pdf");
}

// x: a contiguous float32 or float64 CPU tensor of any shape. f(x), same shape.
static Tensor vector_math(Tensor x, std::string f) {
    if (!x.defined() || !x.is_cpu()) fail("vector_math: x must be a CPU tensor");
    if (!x.is_contiguous()) fail("vector_math: x must be contiguous");
    Tensor y = torch::stable::empty_like(x);
    switch (x.scalar_type()) {
        case ScalarType::Float: evaluate(f, (const float*)x.data_ptr(), (float*)y.data_ptr(), x.numel()); break;
        case ScalarType::Double: evaluate(f, (const double*)x.data_ptr(), (double*)y.data_ptr(), x.numel()); break;
        default: fail("vector_math: x has dtype ", toString(x.scalar_type()), ", needs Float or Double");
    }
    return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dlkernels, m) { m.def("vector_math(Tensor x, str f) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl("vector_math", TORCH_BOX(&vector_math)); }
