"""Where a token stands: attention sees a set, so its order has to be put into the numbers.

    sinusoidal   x[t] + table[t]      sin and cos of t base^(-2i / dim): nothing to learn, any length (Vaswani et al. 2017)
    learned      x[t] + W[t]          a vector for every place, up to a largest one (GPT-2, BERT)
    rotary       queries and keys turned by t base^(-2i / dim): the product of two depends on how far they are apart; see rope.py

torch.nn has no such layers. Each takes ``start``, the position of the first token: for the tokens that follow those in a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from ..ops.rope import angles, angles_like

__all__ = ["LearnedPositions", "RotaryPositions", "SinusoidalPositions"]


def _check_length(name: str, start: int, T: int, max_length: int | None = None) -> None:
    if start < 0 or (max_length is not None and start + T > max_length):
        raise IndexError(f"{name}: positions {start} to {start + T - 1} are out of range, there are {max_length}")


class SinusoidalPositions(torch.nn.Module):
    """``scale`` x ``(*, T, dim)`` plus sin (even places) and cos (odd ones) of t base^(-2i / dim). ``dim`` is even.

    The paper multiplies embeddings by √dim, so that a token is not lost beside its place.

    Raises:
        ValueError: ``dim`` is odd. IndexError: ``start`` is negative.
    """

    def __init__(self, dim: int, base: float = 10000.0, scale: float = 1.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and positive, got {dim}")
        self.dim, self.base, self.scale = dim, base, scale

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        _check_length("SinusoidalPositions", start, x.shape[-2])
        cos, sin = angles_like(x, self.dim, self.base, start)
        return x * self.scale + torch.stack([sin, cos], -1).flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, scale={self.scale}"


class LearnedPositions(torch.nn.Module):
    """x ``(*, T, dim)`` plus a vector for each place, ``weight`` ``(max_length, dim)``, which starts normal with deviation 0.02.

    Raises:
        IndexError: a position is not below ``max_length``.
    """

    def __init__(self, max_length: int, dim: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.weight = torch.nn.Parameter(torch.empty(max_length, dim))
        torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        _check_length("LearnedPositions", start, x.shape[-2], self.max_length)
        return x + self.weight[start : start + x.shape[-2]]

    def extra_repr(self) -> str:
        return f"{self.max_length}, {self.weight.shape[1]}"


class RotaryPositions(torch.nn.Module):
    """Queries or keys ``(*, H, T, D)``, of every head the first ``dim`` numbers turned in pairs: ``dlkernels.functional.rope``.

    Args:
        dim: how many numbers of a head are turned, an even number up to D.
        base: the slowest pair turns by about 1 / base for each position.
        interleaved: pairs are neighbours, as in the paper and GPT-J, not halves, as in Llama.

    ``positions`` ``(T,)`` or ``(*, T)``, int64, stand in place of start, start + 1, ... where they are given.

    Raises:
        ValueError: ``dim`` is odd. IndexError: ``start`` is negative.
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and positive, got {dim}")
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def forward(self, x: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
        return self.turn(x, *self.tables(x, start, positions))

    def tables(self, x: Tensor, start: int = 0, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles of T positions: x is ``(*, T, any)``."""
        _check_length("RotaryPositions", start, x.shape[-2])
        if positions is not None:
            return angles(positions, self.dim, self.base, torch.promote_types(x.dtype, torch.float32))
        return angles_like(x, self.dim, self.base, start)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return F.rope(x, cos, sin, self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
