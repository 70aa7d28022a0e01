"""The activations as layers, over our kernels: torch's own layers with another forward."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["ELU", "GELU", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Softplus", "Tanh"]


class ReLU(torch.nn.ReLU):
    """``torch.nn.ReLU(inplace=False)``: max(x, 0)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """``torch.nn.LeakyReLU(negative_slope=0.01, inplace=False)``: x where it is positive, else negative_slope · x."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """``torch.nn.Sigmoid()``: 1 / (1 + e⁻ˣ)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """``torch.nn.Tanh()``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input)


class GELU(torch.nn.GELU):
    """``torch.nn.GELU(approximate="none")``: x Φ(x), or its approximation by tanh."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """``torch.nn.SiLU(inplace=False)``: x sigmoid(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, self.inplace)


class ELU(torch.nn.ELU):
    """``torch.nn.ELU(alpha=1.0, inplace=False)``: x where it is positive, else alpha (eˣ - 1)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha, self.inplace)


class Softplus(torch.nn.Softplus):
    """``torch.nn.Softplus(beta=1, threshold=20)``: log(1 + e^(beta x)) / beta, and x where beta x > threshold."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softplus(input, self.beta, self.threshold)
