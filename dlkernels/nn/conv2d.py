"""Convolution layers: torch.nn's parameters, initialisation and state_dict over our kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from .. import functional as F

__all__ = ["Conv1d", "Conv2d", "ConvReLU2d", "ConvTranspose1d", "ConvTranspose2d"]


def convolve(layer: torch.nn.modules.conv._ConvNd, function: Callable[..., Tensor], input: Tensor, *parameters: Tensor | None) -> Tensor:
    """``function`` with the options of ``layer``, and its weight and bias where ``parameters`` has no others.

    A border of another kind than zeros is put around the input first, by torch.
    """
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = torch.nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = "valid"
    weight, bias = parameters or (layer.weight, layer.bias)
    options = {"winograd": True} if getattr(layer, "winograd", False) else {}
    return function(input, weight, bias, layer.stride, padding, layer.dilation, layer.groups, **options)


class Conv1d(torch.nn.Conv1d):
    """``torch.nn.Conv1d`` on our kernel. Input ``(N, C, L)`` or ``(C, L)``."""

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, F.conv1d, input)


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on our kernel. Input ``(N, C, H, W)`` or ``(C, H, W)``, contiguous or channels last.

    ``winograd=True``, an attribute too, allows Winograd's algorithm wherever it is faster: see ``dlkernels.functional.conv2d_act``.
    """

    winograd = False

    def __init__(self, *args: Any, winograd: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.winograd = winograd

    def extra_repr(self) -> str:
        return super().extra_repr() + ", winograd=True" * self.winograd

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, F.conv2d, input)


class ConvReLU2d(Conv2d):
    """``ReLU(Conv2d(x))`` in one kernel; parameters and state_dict are those of ``Conv2d``."""

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, F.conv2d_relu, input)


def _convolve_back(layer: torch.nn.modules.conv._ConvTransposeNd, function: Callable[..., Tensor], input: Tensor, size: Any) -> Tensor:
    """``size`` says which of the sizes of the result that stride leaves open is meant."""
    options = layer.stride, layer.padding, layer.kernel_size
    more = layer._output_padding(input, size, *options, len(layer.kernel_size), layer.dilation)  # type: ignore[arg-type]
    return function(input, layer.weight, layer.bias, layer.stride, layer.padding, more, layer.groups, layer.dilation)


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` on our kernel. Input ``(N, C, L)`` or ``(C, L)``."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return _convolve_back(self, F.conv_transpose1d, input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` on our kernel. Input ``(N, C, H, W)`` or ``(C, H, W)``, contiguous or channels last."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return _convolve_back(self, F.conv_transpose2d, input, output_size)
