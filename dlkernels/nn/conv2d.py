"""Convolution layers: torch.nn's parameters, initialisation and state_dict over our kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional
from torch import Tensor

from .. import functional as F

__all__ = ["Conv1d", "Conv2d", "ConvReLU2d"]


def convolve(layer: torch.nn.modules.conv._ConvNd, function: Callable[..., Tensor], input: Tensor, *parameters: Tensor | None) -> Tensor:
    """``function`` with the options of ``layer``, and its weight and bias where ``parameters`` has no others.

    A border of another kind than zeros is put around the input first, by torch.
    """
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = torch.nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = "valid"
    weight, bias = parameters or (layer.weight, layer.bias)
    return function(input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


class Conv1d(torch.nn.Conv1d):
    """``torch.nn.Conv1d`` on our kernel. Input ``(N, C, L)`` or ``(C, L)``."""

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, F.conv1d, input)


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on our kernel. Input ``(N, C, H, W)`` or ``(C, H, W)``, contiguous or channels last."""

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, F.conv2d, input)


class ConvReLU2d(Conv2d):
    """``ReLU(Conv2d(x))`` in one kernel; parameters and state_dict are those of ``Conv2d``."""

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, F.conv2d_relu, input)
