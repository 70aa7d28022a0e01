"""Softmax layers: torch.nn's, over our kernels."""

from __future__ import annotations

import torch

from .. import functional as F

__all__ = ["LogSoftmax", "Softmax"]


class Softmax(torch.nn.Softmax):
    """``torch.nn.Softmax`` along ``dim``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """``torch.nn.LogSoftmax`` along ``dim``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)
