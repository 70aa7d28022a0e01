// dropout: y[n] = x[n] * factor(n), where the factor, 0 or 1 / (1 - p), is computed from the seed and the place n alone (philox.h).
//
// Forward and backward are this one map, so no mask is ever in memory: N numbers are read and N written. A block of 64 numbers costs some
// 130 instructions of the generator, on AVX-512, about the time that memory takes to bring 64 floats and to fetch them.
#include "op.h"
#include "philox.h"
#include "rows.h"

namespace {

constexpr const char* DROPOUT = "dropout";

// y may be x.
void run(const Dropout& dropout, const Tensor& x, const Tensor& y) {
    with_type(DROPOUT, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto from = static_cast<const T*>(x.data_ptr());
        auto to = static_cast<T*>(y.data_ptr());
        each_stretch(x.numel(), [=](int64_t begin, int64_t end) { dropout.apply(0, from, to, begin, end); });
    });
}

Tensor dropout(Tensor x, Tensor seed, double p) {
    checked_like(DROPOUT, "x", x, x);
    Dropout dropout(checked_seed(DROPOUT, seed, p), p);
    Tensor y = empty(x);
    run(dropout, dense(x), y);
    return y;
}

void dropout_(Tensor x, Tensor seed, double p) {
    checked_like(DROPOUT, "x", x, x);
    if (!x.is_contiguous()) fail(DROPOUT, ": x must be contiguous to be changed in place");
    run({checked_seed(DROPOUT, seed, p), p}, x, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("dropout", TORCH_BOX(&dropout));
    m.impl("dropout_", TORCH_BOX(&dropout_));
}
