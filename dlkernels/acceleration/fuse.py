"""Neighbouring layers in one kernel. Whether they may be is asked at every call, from what the layers are then.

    Linear or Conv2d, activation                        the activation applied to each tile of the product
    BatchNorm, ReLU                                     batch_norm_relu
    Conv2d, BatchNorm2d, activation                     the norm folded into the filters, as nn.fuse_conv_bn does, but at every call, since
                                                        the statistics may change; in evaluation mode, without gradients
    Dropout, sum, LayerNorm                             dropout_add_layer_norm

A layer with a hook, or a ``forward`` of its own, is called as ever, since something wants to see what goes in or comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as _torch

from .. import functional as F
from ..nn.activations import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from ..nn.batch_norm import BatchNorm2d, BatchNormReLU2d
from ..nn.conv2d import Conv2d, convolve
from ..nn.dropout import Dropout
from ..nn.layer_norm import LayerNorm
from ..nn.linear import Linear
from . import swap


class Act(NamedTuple):
    """An activation, as linear_act and conv2d_act name it."""

    name: str
    slope: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return _FUNCTIONS[self.name](x, self.slope)


_FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda x, _: F.relu(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda x, _: F.sigmoid(x),
    "tanh": lambda x, _: F.tanh(x),
    "silu": lambda x, _: F.silu(x),
}
# What a layer computes, by its forward; None where it is not one of these after all. An integration adds those of its library.
ACTIVATIONS: dict[Any, Callable[[Any], Act | None]] = {
    ReLU.forward: lambda layer: Act("relu"),
    LeakyReLU.forward: lambda layer: Act("leaky_relu", layer.negative_slope),
    GELU.forward: lambda layer: Act("gelu_tanh" if layer.approximate == "tanh" else "gelu"),
    Sigmoid.forward: lambda layer: Act("sigmoid"),
    Tanh.forward: lambda layer: Act("tanh"),
    SiLU.forward: lambda layer: Act("silu"),
}
LINEAR: Any = Linear.forward
CONV: Any = Conv2d.forward
BATCH_NORM: Any = BatchNorm2d.forward
LAYER_NORM: Any = LayerNorm.forward
DROPOUT: Any = Dropout.forward
NORM_RELU = BatchNormReLU2d._function


def forward_of(layer: Any) -> Any:
    """The ``forward`` that a call of ``layer`` comes down to, by which fusions are chosen; None where something stands in between."""
    if (
        not isinstance(layer, torch.nn.Module) or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
        or layer._backward_pre_hooks or layer._compiled_call_impl is not None or "forward" in layer.__dict__
        or _torch._global_forward_hooks or _torch._global_forward_pre_hooks or _torch._global_backward_hooks
        or _torch._global_backward_pre_hooks
    ):  # fmt: skip
        return None
    return type(layer).forward


def activation(layers: Sequence[Any], i: int) -> Act | None:
    """The activation that ``layers[i]`` is, if there is such a layer and it is one."""
    if i >= len(layers):
        return None
    layer = layers[i]
    if isinstance(layer, Act):
        return layer
    find = ACTIVATIONS.get(forward_of(layer))
    return None if find is None else find(layer)


def chain(x: Any, *layers: Any) -> Any:
    """``layers`` (modules, and ``Act``) one after the other, in as few kernels as they allow."""
    i = 0
    while i < len(layers):
        step = _STEPS.get(forward_of(layers[i]))
        x, used = (layers[i](x), 1) if step is None or not isinstance(x, Tensor) else step(x, layers, i)
        i += used
    return x


def _linear(x: Tensor, layers: Sequence[Any], i: int) -> tuple[Tensor, int]:
    act = activation(layers, i + 1)
    if act is None:
        return layers[i](x), 1
    return F.linear_act(x, layers[i].weight, layers[i].bias, *act), 2


def _conv(x: Tensor, layers: Sequence[Any], i: int) -> tuple[Tensor, int]:
    conv, used, function = layers[i], 1, F.conv2d
    weight, bias = conv.weight, conv.bias
    norm: Any = layers[i + 1] if i + 1 < len(layers) else None
    act = None
    if _folds(x, conv, norm):
        norm._check_input_dim(x)
        weight, bias = _folded(conv, norm)
        act, used = Act("relu") if norm._function is NORM_RELU else None, 2
    if act is None and (act := activation(layers, i + used)) is not None:
        used += 1
    if act is not None:
        function = partial(F.conv2d_act, activation=act.name, negative_slope=act.slope)
    return (convolve(conv, function, x, weight, bias), used) if used > 1 else (conv(x), 1)


def _folds(x: Tensor, conv: Any, norm: Any) -> bool:
    """Whether the norm behind ``conv`` is constant, and its filters are so few that folding it into them costs less than applying it."""
    if forward_of(norm) is not BATCH_NORM or not isinstance(norm, torch.nn.BatchNorm2d) or norm.training or norm.running_mean is None:
        return False
    if norm.num_features != conv.out_channels or x.dim() != 4 or conv.weight.dtype != norm.running_mean.dtype:
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, conv.weight, conv.bias, norm.weight, norm.bias)):
        return False
    stride = conv.stride[0] * conv.stride[1]
    return conv.weight.numel() * stride <= x.shape[0] * conv.out_channels * x.shape[2] * x.shape[3]


def _folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Filters and bias of the convolution with the norm behind it."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = shift * factor if norm.bias is None else torch.addcmul(norm.bias, shift, factor)
    return conv.weight * factor[:, None, None, None], shift


def _batch_norm(x: Tensor, layers: Sequence[Any], i: int) -> tuple[Tensor, int]:
    norm, act = layers[i], activation(layers, i + 1)
    if act is None or act.name != "relu" or norm._function is NORM_RELU:
        return norm(x), 1
    return norm.normalize(x, F.batch_norm_relu), 2


_STEPS = {LINEAR: _linear, CONV: _conv, BATCH_NORM: _batch_norm}


def add_norm(norm: Any, x: Tensor, residual: Tensor, dropout: Any = None) -> tuple[Tensor, Tensor]:
    """(LayerNorm of the sum, the sum) of ``x``, dropped out of by ``dropout``, and ``residual``."""
    fits = isinstance(x, Tensor) and isinstance(residual, Tensor) and x.shape == residual.shape and x.dtype == residual.dtype
    if forward_of(norm) is not LAYER_NORM or not fits:
        total = (x if dropout is None else dropout(x)) + residual
        return norm(total), total
    arguments = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    if dropout is not None and forward_of(dropout) is DROPOUT and not dropout.inplace:
        return F.dropout_add_layer_norm(x, residual, dropout.p, *arguments, dropout.training)
    return F.add_layer_norm(x if dropout is None else dropout(x), residual, *arguments)


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that runs neighbouring layers in one kernel where it can."""

    def forward(self, input: Any) -> Any:
        return chain(input, *self._modules.values())


Planned = Mapping[torch.nn.Module, type]


def planned_forward(layer: Any, classes: Planned) -> Any:
    """``forward_of`` once every layer has its class from ``classes``."""
    found = forward_of(layer)
    return None if found is None else classes.get(layer, type(layer)).forward  # type: ignore[attr-defined]


def run_length(layers: Sequence[Any], i: int, classes: Planned) -> int:
    """How many of ``layers`` from ``i`` on will run as one, once every layer has its class from ``classes``; in some mode."""
    first, length = planned_forward(layers[i], classes), 1
    if first is CONV and i + 1 < len(layers) and planned_forward(layers[i + 1], classes) is BATCH_NORM:
        length = 2
    after = layers[i + length] if i + length < len(layers) else None
    find = ACTIVATIONS.get(planned_forward(after, classes))
    act = after if isinstance(after, Act) else find(after) if find is not None else None
    if act is not None and (first in (LINEAR, CONV) or (first is BATCH_NORM and act.name == "relu")):
        length += 1
    return length


def described(layers: Sequence[Any]) -> str:
    return " + ".join(layer.name if isinstance(layer, Act) else type(layer).__name__ for layer in layers)


def class_for_sequential(module: torch.nn.Module, classes: Planned) -> tuple[type, list[str]] | None:
    """The class for a Sequential in which something can be fused, and what; None for every other module."""
    kind = type(module)
    if not isinstance(module, torch.nn.Sequential) or isinstance(module, Sequential) or "forward" in vars(module):
        return None
    if kind is not torch.nn.Sequential and swap.overridden(kind, torch.nn.Sequential):
        return None
    layers, found, i = list(module), [], 0
    while i < len(layers):
        length = run_length(layers, i, classes)
        if length > 1:
            found.append(described(layers[i : i + length]))
        i += length
    if not found:
        return None
    return (Sequential if kind is torch.nn.Sequential else swap.both((Sequential, kind))), found
