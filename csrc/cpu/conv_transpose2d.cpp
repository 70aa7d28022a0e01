// conv_transpose2d: y = the input gradient of a convolution, + b, for which x is what a convolution calls z and y what it calls x. So the
// gradients are a convolution of dy, and the filter gradient with x and dy in each other's place: the products are those of conv2d.cpp.
#include "convolution.h"

namespace {

constexpr const char* FORWARD = "conv_transpose2d_forward";
constexpr const char* BACKWARD = "conv_transpose2d_backward";

// Of the convolution whose images are y, of H x W pixels. It may have places behind those of x: nothing is added there.
Geometry checked_call(const char* op, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
                      int64_t groups, int64_t H, int64_t W) {
    ranked(op, "x", x, 4), ranked(op, "weight", weight, 4);
    int64_t C;
    if (__builtin_mul_overflow(weight.size(1), groups, &C)) fail(op, ": groups is ", groups, ", too many for weight ", shape_text(weight));
    if (H < 1 || W < 1) fail(op, ": a result of ", H, " x ", W, " pixels, needs 1 x 1 or more");
    Geometry s = checked_geometry(op, x.size(0), C, H, W, weight, stride, padding, dilation, groups);
    if (std::min(x.size(2), x.size(3)) < 1 || x.size(2) > s.P || x.size(3) > s.Q)
        fail(op, ": x has shape ", shape_text(x), ", needs 1 x 1 to ", s.P, " x ", s.Q, " pixels for a result of ", H, " x ", W);
    s.P = x.size(2), s.Q = x.size(3);
    checked(op, "x", x, x.scalar_type(), {s.N, s.O, s.P, s.Q});
    checked(op, "weight", weight, x.scalar_type(), {s.O, s.C1, s.R, s.S});
    return s;
}

Tensor conv_transpose2d_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding, Ints dilation,
                                int64_t groups, Ints size) {
    if (size.size() != 2) fail(FORWARD, ": size has ", size.size(), " numbers, needs 2");
    Geometry s = checked_call(FORWARD, x, weight, stride, padding, dilation, groups, size[0], size[1]);
    if (bias) checked(FORWARD, "bias", *bias, x.scalar_type(), {s.C});
    Memory memory = format_of(FORWARD, x).memory;
    Tensor y = images(x, memory, s.N, s.C, s.H, s.W);
    convolve_back(FORWARD, s, memory, x, weight, bias, y);
    return y;
}

std::tuple<Tensor, Tensor, Tensor> conv_transpose2d_backward(Tensor dy, Tensor x, Tensor weight, Ints stride, Ints padding, Ints dilation,
                                                             int64_t groups, bool need_dx, bool need_dweight, bool need_dbias) {
    ranked(BACKWARD, "dy", dy, 4);
    Geometry s = checked_call(BACKWARD, x, weight, stride, padding, dilation, groups, dy.size(2), dy.size(3));
    checked(BACKWARD, "dy", dy, x.scalar_type(), {s.N, s.C, s.H, s.W});
    Memory memory = format_of(BACKWARD, x).memory;
    Tensor d = in_memory(dy, memory), dx = need_dx ? images(x, memory, s.N, s.O, s.P, s.Q) : Tensor(), dweight;
    Tensor dbias = need_dbias ? empty(x, {s.C}) : Tensor();
    if (need_dx) convolve(BACKWARD, s, memory, d, weight, {}, {NONE}, dx, Tensor());
    if (need_dweight) dweight = filter_gradient(BACKWARD, s, memory, x, d, weight);
    if (need_dbias) activation_gradient(BACKWARD, memory, {NONE}, d, Tensor(), Tensor(), dbias);
    return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("conv_transpose2d_forward", TORCH_BOX(&conv_transpose2d_forward));
    m.impl("conv_transpose2d_backward", TORCH_BOX(&conv_transpose2d_backward));
}
