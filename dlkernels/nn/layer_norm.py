"""Normalising layers: torch.nn.LayerNorm's and RMSNorm's parameters and state_dict over our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` on our kernel. Input and output ``(*, *normalized_shape)``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` on our kernel. Input and output ``(*, *normalized_shape)``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
