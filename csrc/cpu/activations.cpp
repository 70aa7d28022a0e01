// The activations, element by element: y = act(x), and dx = dy act'(saved), with the pairs of functions of activation.h.
//
// The array is cut into stretches that stay in the L1 cache; each is one loop over vectors with the function inlined. relu and leaky_relu
// wait for memory (N numbers read and N written, 2N and N backward), the others for their polynomials wherever the numbers lie in a cache.
#include "activation.h"
#include "op.h"
#include "rows.h"

namespace {

constexpr const char* FORWARD = "activation_forward";
constexpr const char* BACKWARD = "activation_backward";

Activation checked_activation(const char* op, int64_t code, double a, double b) {
    if (code <= NONE || code >= CODES) fail(op, ": activation has code ", code, ", needs 1 to ", CODES - 1);
    return {int(code), a, b};
}

// out[n] = f(in[n]...) for n in [begin, end); out may be one of the arrays in. f comes by value: the constants that it holds then stay in
// registers, while those of a reference would have to be read again after every store. Unrolling gains nothing here, fetching ahead loses.
template <class T, class F, class... In> void map(const Destination& to, int64_t begin, int64_t end, F f, T* out, const In*... in) {
    constexpr int V = VL<compute_t<T>>;
    int64_t n = begin;
    if (to.past_caches)  // asked once, not at every store
        for (; n + V <= end; n += V) to.store(out + n, f(load(in + n)...));
    for (; n + V <= end; n += V) store(out + n, f(load(in + n)...));
    if (n < end) store(out + n, f(load(in + n, int(end - n))...), int(end - n));
}

void forward(const Activation& act, const Tensor& x, const Tensor& y) {
    with_type(FORWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto from = static_cast<const T*>(x.data_ptr());
        auto to = static_cast<T*>(y.data_ptr());
        act.with<compute_t<T>>([=, N = x.numel()](auto value, auto) {
            each_stretch(N, [=](int64_t begin, int64_t end) { map({to, N * int64_t(sizeof(T))}, begin, end, value, to, from); });
        });
    });
}

Tensor activation_forward(Tensor x, int64_t activation, double a, double b) {
    checked_like(FORWARD, "x", x, x);
    Activation act = checked_activation(FORWARD, activation, a, b);
    Tensor y = empty(x);
    forward(act, dense(x), y);
    return y;
}

void activation_forward_(Tensor x, int64_t activation, double a, double b) {
    checked_like(FORWARD, "x", x, x);
    if (!x.is_contiguous()) fail(FORWARD, ": x must be contiguous to be changed in place");
    forward(checked_activation(FORWARD, activation, a, b), x, x);
}

Tensor activation_backward(Tensor dy, Tensor saved, int64_t activation, double a, double b) {
    checked_like(BACKWARD, "saved", saved, saved);
    checked_like(BACKWARD, "dy", dy, saved);
    Activation act = checked_activation(BACKWARD, activation, a, b);
    Tensor ds = dense(dy), ss = dense(saved), dx = empty(saved);
    with_type(BACKWARD, saved.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto slope = static_cast<const T*>(ds.data_ptr()), kept = static_cast<const T*>(ss.data_ptr());
        auto to = static_cast<T*>(dx.data_ptr());
        act.with<compute_t<T>>([=, N = dx.numel()](auto, auto gradient) {
            each_stretch(N, [=](int64_t begin, int64_t end) { map({to, N * int64_t(sizeof(T))}, begin, end, gradient, to, slope, kept); });
        });
    });
    return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("activation_forward", TORCH_BOX(&activation_forward));
    m.impl("activation_forward_", TORCH_BOX(&activation_forward_));
    m.impl("activation_backward", TORCH_BOX(&activation_backward));
}
