// The products of a convolution as functions of tensors. conv2d.cpp has them; conv_transpose2d.cpp, where x and y change places, calls them too.
//
// Of a Geometry, x (N, C, H, W) are the images, z (N, O, P, Q) the places of the filter: tensors of one memory format, as `images` lays them out.
#pragma once
#include <optional>
#include <vector>

#include "images.h"

using Ints = std::vector<int64_t>;

// What the options of a call make of images of these sizes; or an error that names the argument.
Geometry checked_geometry(const char* op, int64_t N, int64_t C, int64_t H, int64_t W, const Tensor& weight, const Ints& stride,
                          const Ints& padding, const Ints& dilation, int64_t groups);

// Images in that order of memory, of the dtype of `like`.
Tensor images(const Tensor& like, Memory memory, int64_t N, int64_t C, int64_t H, int64_t W);
// t in that order, itself where it is.
Tensor in_memory(const Tensor& t, Memory memory);

// y = act(x * weight + bias), and z, the value before the activation, where it is a tensor.
void convolve(const char* op, Geometry s, Memory memory, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              Activation act, const Tensor& y, const Tensor& z);
// dx[c, j] = sum_k weight[c, k] dz[k, j], + bias[c].
void convolve_back(const char* op, Geometry s, Memory memory, const Tensor& dz, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& dx);
// dweight[o, k] = sum_j dz[o, j] x[k, j], which has the memory format of the weight.
Tensor filter_gradient(const char* op, Geometry s, Memory memory, const Tensor& dz, const Tensor& x, const Tensor& weight);
// One pass over dy (and saved): dz = dy act'(saved) where it is a tensor, and the sum over each channel where that is one.
void activation_gradient(const char* op, Memory memory, Activation act, const Tensor& dy, const Tensor& saved, const Tensor& dz,
                         const Tensor& dbias);
