"""Convolutions of every kind for the tests of the Triton launchers, and what they must give."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from launchers import DEVICE, REFERENCE
from torch import Tensor


class Case(NamedTuple):
    """Images, channels, output channels, pixels, filter, stride, padding (top, bottom, left, right), dilation, groups."""

    N: int
    C: int
    O: int
    H: int
    W: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def moves(self) -> tuple[list[int], list[int], list[int], int]:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def sizes(self) -> tuple[int, int]:
        """P, Q"""
        pads = self.padding[0] + self.padding[1], self.padding[2] + self.padding[3]
        each = zip((self.H, self.W), pads, self.dilation, (self.R, self.S), self.stride, strict=True)
        P, Q = ((size + pad - dilation * (taps - 1) - 1) // stride + 1 for size, pad, dilation, taps, stride in each)
        return P, Q


CASES = {
    "one number": Case(1, 1, 1, 1, 1, 1, 1),
    "1x1": Case(2, 17, 19, 3, 5, 1, 1),
    "1x1 stride 2": Case(2, 16, 5, 5, 4, 1, 1, (2, 2)),
    "3x3": Case(2, 16, 33, 5, 6, 3, 3, padding=(1, 1, 1, 1)),
    "3x3 stride 2": Case(2, 33, 20, 7, 6, 3, 3, (2, 2), (1, 1, 1, 1)),
    "3x3 stride 2 dilation 2": Case(1, 20, 16, 8, 9, 3, 3, (2, 2), (2, 1, 0, 3), (2, 2)),
    "first layer": Case(1, 3, 17, 11, 10, 7, 7, (2, 2), (3, 3, 3, 3)),
    "one channel": Case(3, 1, 6, 8, 8, 5, 5, padding=(2, 2, 2, 2)),
    "uneven": Case(1, 20, 3, 9, 4, 5, 1, (3, 1), (0, 2, 1, 3), (2, 1)),
    "pixels nobody sees": Case(1, 16, 4, 8, 8, 2, 1, (3, 4)),
    "groups": Case(2, 34, 6, 5, 5, 3, 3, (1, 2), (1, 0, 1, 1), groups=2),
    "many small groups": Case(1, 6, 15, 4, 6, 1, 3, padding=(0, 0, 1, 1), groups=3),
    "depthwise": Case(2, 3, 3, 5, 6, 3, 3, padding=(1, 1, 1, 1), groups=3),
    "depthwise stride 2": Case(1, 3, 3, 9, 8, 5, 3, (2, 3), (2, 0, 1, 1), (1, 2), groups=3),
    "depthwise, three outputs": Case(1, 2, 6, 4, 5, 3, 3, (1, 2), (1, 1, 1, 1), groups=2),
    "depthwise, six outputs": Case(1, 2, 12, 6, 5, 3, 3, padding=(1, 1, 1, 1), groups=2),
}


def randn(*shape: int, dtype: torch.dtype, integer: bool = False) -> Tensor:
    """Normal, or small integers whose products and sums are exact in every dtype's accumulator."""
    t = torch.randint(-3, 4, shape).double() if integer else torch.randn(shape, dtype=torch.float64)
    return t.to(DEVICE, dtype)


def tensors(case: Case, dtype: torch.dtype, last: bool = False, integer: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, dy; x channels_last where ``last``"""
    shapes = (case.N, case.C, case.H, case.W), (case.O, case.C // case.groups, case.R, case.S), (case.O,), (case.N, case.O, *case.sizes())
    x, weight, bias, dy = (randn(*shape, dtype=dtype, integer=integer) for shape in shapes)
    return x.contiguous(memory_format=torch.channels_last) if last else x, weight, bias, dy


def exact(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, act: int = 0) -> tuple[Tensor, ...]:
    """The same in float64."""
    zero = torch.zeros(weight.shape[0], dtype=x.dtype, device=x.device)
    inputs = [t.detach().double().contiguous().requires_grad_() for t in (x, weight, zero if bias is None else bias)]
    (top, bottom, left, right), (x64, w64, b64) = case.padding, inputs
    y = REFERENCE[act](F.conv2d(F.pad(x64, (left, right, top, bottom)), w64, b64, case.stride, 0, case.dilation, case.groups))
    return y.detach(), *torch.autograd.grad(y, inputs, dy.double())


def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], eps: float) -> None:
    for name, f, w in zip(("y", "dx", "dweight", "dbias"), found, wanted, strict=True):
        assert f.shape == w.shape, name
        if f.numel():
            error = (f.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)
            assert error <= eps, f"{name}: {error}"
