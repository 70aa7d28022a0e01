"""Linear layers: torch.nn.Linear's parameters, initialisation and state_dict over our kernels."""

from __future__ import annotations

import torch

from .. import functional as F

__all__ = ["Linear", "LinearGELU", "LinearReLU"]


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` (y = x Wᵀ + b) on our kernel. Input ``(*, in_features)``, output ``(*, out_features)``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """``ReLU(Linear(x))`` in one kernel; parameters and state_dict are those of ``Linear``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear_relu(input, self.weight, self.bias)


class LinearGELU(Linear):
    """``GELU(Linear(x))`` in one kernel; parameters and state_dict are those of ``Linear``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear_act(input, self.weight, self.bias, "gelu")
