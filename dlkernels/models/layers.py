"""What the teaching models share: layers of which dlkernels.nn makes one kernel and PyTorch several, first weights, and a loss."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels.acceleration.fuse import LINEAR, forward_of


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


class LinearGELU(torch.nn.Linear):
    """gelu(x W^T + b) in PyTorch's own two calls, with the parameter names of ``dlkernels.nn.LinearGELU``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(super().forward(x))


class DropoutAddLayerNorm(torch.nn.LayerNorm):
    """(LayerNorm(sum), sum) of sum = residual + dropout(x) in PyTorch's own three calls."""

    def __init__(self, normalized_shape: int, p: float = 0.1) -> None:
        super().__init__(normalized_shape)
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = residual + torch.nn.functional.dropout(x, self.p, self.training)
        return super().forward(total), total


class RotaryPositions(dlkernels.nn.RotaryPositions):
    """Rotary positions in PyTorch's own calls: each head of x [B, H, T, D] beside the same with its halves swapped."""

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


TWINS = {
    layer.__name__: layer
    for layer in (LinearReLU, LinearGELU, ConvReLU2d, BatchNormReLU2d, DropoutAddLayerNorm, RotaryPositions)
}


def fused(nn: ModuleType, name: str, *sizes: Any, **options: Any) -> torch.nn.Module:
    """The namespace's layer of this name, one kernel, where it has one; otherwise its twin in ``TWINS``, several of PyTorch's."""
    return getattr(nn, name, TWINS[name])(*sizes, **options)


def qkv(
    nn: ModuleType, x: Tensor, layers: tuple[torch.nn.Module, ...], head_dim: int, rotary: Any, start: int
) -> tuple[Tensor, ...] | None:
    """Queries, keys and values of x [B, T, C] by the namespace's one kernel for them, from three linear layers and ``rotary``.

    None where the namespace has no such kernel, or a layer is something else now or has a hook: then they are to be called, one by one.
    The kernel reads the layers' parameters and calls none of them.
    """
    project, ours = getattr(nn.functional, "qkv_projection", None), dlkernels.nn.RotaryPositions
    turns = rotary is None or (forward_of(rotary) is ours.forward and type(rotary).turn is ours.turn)
    if project is None or not turns or not all(forward_of(layer) is LINEAR for layer in layers):
        return None
    cos, sin = (None, None) if rotary is None else rotary.tables(x, start)
    parameters = (*(layer.weight for layer in layers), *(layer.bias for layer in layers))
    interleaved = rotary is not None and rotary.interleaved
    found: tuple[Tensor, ...] = project(x, *parameters, head_dim=head_dim, cos=cos, sin=sin, interleaved=interleaved)
    return found


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


def allow_winograd(model: torch.nn.Module) -> None:
    """Convolutions of ours take Winograd's algorithm where it is faster."""
    for module in model.modules():
        if isinstance(module, dlkernels.nn.Conv2d):
            module.winograd = True


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


def next_token_loss(nn: ModuleType) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross-entropy over all places: logits [B, T, V], tokens [B, T], -100 where none is asked for."""
    return lambda logits, y: nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
