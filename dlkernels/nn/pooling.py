"""Pooling as layers, over our kernels: torch's own layers with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "MaxPool2d"]


class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` on our kernel. Input ``(N, C, H, W)`` or ``(C, H, W)``, contiguous or channels last."""

    def forward(self, input: Tensor) -> Any:
        options = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool2d(input, *options, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class AvgPool2d(torch.nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` on our kernel. Input ``(N, C, H, W)`` or ``(C, H, W)``, contiguous or channels last."""

    def forward(self, input: Tensor) -> Tensor:
        options = self.kernel_size, self.stride, self.padding, self.ceil_mode
        return F.avg_pool2d(input, *options, self.count_include_pad, self.divisor_override)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d`` on our kernel: ``output_size`` numbers of every plane, whatever its size."""

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` on our kernel: ``output_size`` numbers of every plane, whatever its size."""

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)
