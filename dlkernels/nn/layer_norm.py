"""Normalising layers: torch.nn.LayerNorm's and RMSNorm's parameters and state_dict over our kernels; LayerNorm with a sum before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["AddLayerNorm", "DropoutAddLayerNorm", "LayerNorm", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` on our kernel. Input and output ``(*, *normalized_shape)``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` on our kernel. Input and output ``(*, *normalized_shape)``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AddLayerNorm(LayerNorm):
    """The sum of a block and its residual stream, and the sum's ``LayerNorm``, in one kernel; parameters are those of ``LayerNorm``.

    ``layer(x, residual)`` gives ``(LayerNorm(sum), sum)`` with ``sum = x + residual``, all of shape ``(*, *normalized_shape)``.
    """

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.add_layer_norm(x, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class DropoutAddLayerNorm(LayerNorm):
    """``AddLayerNorm`` of ``Dropout(p)(x)`` and the residual, in one kernel; the other arguments are those of ``LayerNorm``."""

    def __init__(self, normalized_shape: Any, p: float = 0.1, **options: Any) -> None:
        super().__init__(normalized_shape, **options)
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        shape = self.normalized_shape
        return F.dropout_add_layer_norm(x, residual, self.p, shape, self.weight, self.bias, self.eps, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
