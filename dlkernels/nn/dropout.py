"""Dropout as a layer, over our kernel."""

from __future__ import annotations

import torch

from .. import functional as F

__all__ = ["Dropout"]


class Dropout(torch.nn.Dropout):
    """``torch.nn.Dropout(p=0.5, inplace=False)``: zeroes numbers with probability p in training; else the identity."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)
