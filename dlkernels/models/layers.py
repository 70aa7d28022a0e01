"""What the teaching models share: layers that end in a ReLU, and the first weights that suit one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class LinearReLU(torch.nn.Linear):
    """relu(x W^T + b) in PyTorch's own two calls, with the parameter names of ``dlkernels.nn.LinearReLU``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class ConvReLU2d(torch.nn.Conv2d):
    """relu(conv(x)) in PyTorch's own two calls, with the parameter names of ``dlkernels.nn.ConvReLU2d``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class BatchNormReLU2d(torch.nn.BatchNorm2d):
    """relu(batch_norm(x)) in PyTorch's own two calls, with the parameter names of ``dlkernels.nn.BatchNormReLU2d``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


TWINS = {layer.__name__: layer for layer in (LinearReLU, ConvReLU2d, BatchNormReLU2d)}


def fused(nn: ModuleType, name: str, *sizes: Any, **options: Any) -> torch.nn.Module:
    """The namespace's ``LinearReLU``, ``ConvReLU2d`` or ``BatchNormReLU2d``, one kernel, where it has one; otherwise its twin of two."""
    return getattr(nn, name, TWINS[name])(*sizes, **options)


def he_init(model: torch.nn.Module) -> None:
    """Weights from a normal distribution of variance 2 / K, biases zero: He et al. 2015, arXiv:1502.01852, equation 10.

    A ReLU discards half of the signal's mean square; the 2 puts it back, so the size of the activations survives any depth.
    """
    for weight in model.parameters():
        if weight.dim() >= 2:  # of a Linear [N, K], of a Conv2d [O, C, R, S] with K = C R S; a BatchNorm's, [C], starts at 1
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(bias)


def check_sizes(**sizes: Any) -> None:
    """Raises ``ValueError`` unless every size is a positive integer, or a sequence of them."""
    for name, value in sizes.items():
        numbers = value if isinstance(value, (tuple, list)) else [value]
        if any(not isinstance(number, int) or number < 1 for number in numbers):
            raise ValueError(f"{name} must be {'positive integers' if numbers is value else 'a positive integer'}, got {value}")


def random_batch(x_shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    """(x, y) of which nothing can be learned, always the same: x normally distributed, y a class for each of its rows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x_shape, generator=generator), torch.randint(classes, x_shape[:1], generator=generator)
