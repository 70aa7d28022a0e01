"""The registered ops behind conv2d.py and conv_transpose2d.py: schemas, traced results, what a call's options mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..backend import define
from ..contract import Optionals, check_traced

__all__: list[str] = []

Numbers = int | Sequence[int]
LARGEST = 1 << 31  # of a stride, padding or dilation


class Geometry(NamedTuple):
    """How the filter moves: what the raw ops take. ``padding`` is top, bottom, left, right. conv_transpose2d takes no ``winograd``."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    winograd: bool = False

    def images(self, x: torch.Size, weight: torch.Size, more: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the images on which so many places fit, and ``more`` pixels: the result of a transposed convolution."""
        (sh, sw), (top, bottom, left, right), (dh, dw) = self.stride, self.padding, self.dilation
        height, width = (x[-2] - 1) * sh + dh * (weight[2] - 1) + 1, (x[-1] - 1) * sw + dw * (weight[3] - 1) + 1
        return height - top - bottom + more[0], width - left - right + more[1]

    def size(self, x: torch.Size, weight: torch.Size) -> tuple[int, int]:
        """(P, Q), not positive where the filter does not fit."""
        (sh, sw), (top, bottom, left, right), (dh, dw) = self.stride, self.padding, self.dilation
        height, width = x[-2] + top + bottom, x[-1] + left + right
        return (height - dh * (weight[2] - 1) - 1) // sh + 1, (width - dw * (weight[3] - 1) - 1) // sw + 1


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """``value`` for height and width. Raises ValueError."""
    if type(value) is int and least <= value <= LARGEST:  # at every call
        return value, value
    numbers = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    numbers = numbers * 2 if len(numbers) == 1 else numbers
    if len(numbers) != 2 or not (isinstance(numbers[0], int) and isinstance(numbers[1], int)):
        raise ValueError(f"{name} is {value!r}, needs an int or two")
    if not (least <= numbers[0] <= LARGEST and least <= numbers[1] <= LARGEST):
        raise ValueError(f"{name} is {value!r}, needs {least} to 2^31")
    return numbers


def in_row(*options: tuple[Any, int]) -> list[Any]:
    """Options of a convolution in one dimension for images of one row, whose height gets the number that stands behind each."""
    numbers = [value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value for value, _ in options]
    return [(other, n) if isinstance(n, int) else value for n, (value, other) in zip(numbers, options)]


def geometry_of(weight: torch.Size, stride: Any, padding: Any, dilation: Any, groups: Any, winograd: bool = False) -> Geometry:
    """What the arguments mean for a filter of this shape. Raises ValueError."""
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding is 'same', needs stride 1, got {stride}")
        all_h, all_w = (d * (size - 1) for d, size in zip(dilation, weight[2:]))
        sides = all_h // 2, all_h - all_h // 2, all_w // 2, all_w - all_w // 2
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding is {padding!r}, needs 'same', 'valid', or numbers")
        sides = 0, 0, 0, 0
    else:
        above, before = pair("padding", padding, 0)
        sides = above, above, before, before
    if not isinstance(groups, int) or not 1 <= groups <= LARGEST:
        raise ValueError(f"groups is {groups!r}, needs a positive int")
    return Geometry(stride, sides, dilation, groups, winograd)


def is_channels_last(weight: Tensor) -> bool:
    """As PyTorch decides it, which asks Python for 6 microseconds; most filters are told apart by two strides."""
    return bool(weight.stride(3) >= weight.stride(1)) and suggest_memory_format(weight) == torch.channels_last


def empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x))


def _checked_size(x: Tensor, weight: Tensor, geometry: Geometry, **others: tuple[Tensor | None, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of y, while a graph is traced, with what the kernels check."""
    torch._check(x.dim() == 4 and weight.dim() == 4, lambda: f"x and weight must have 4 dimensions, got {x.dim()} and {weight.dim()}")
    groups = geometry.groups
    fits = x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    torch._check(fits, lambda: f"weight has shape {tuple(weight.shape)}, needs (O, {x.shape[1]} / groups, R, S), groups {groups}")
    P, Q = geometry.size(x.shape, weight.shape)
    torch._check(P > 0 and Q > 0, lambda: f"the filter {tuple(weight.shape[2:])} does not fit into the padded image {tuple(x.shape[2:])}")
    shape = (x.shape[0], weight.shape[0], P, Q)
    check_traced(x, weight=(weight, weight.shape), **{name: (t, needed or shape) for name, (t, needed) in others.items()})
    return shape


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, winograd: bool,
    activation: int, slope: float, save: bool,
) -> Optionals:  # fmt: skip
    shape = _checked_size(x, weight, Geometry(stride, padding, dilation, groups), bias=(bias, (weight.shape[0],)))
    return empty(x, shape), empty(x, shape) if save else None


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, winograd: bool,
    activation: int, slope: float, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> Optionals:  # fmt: skip
    _checked_size(x, weight, Geometry(stride, padding, dilation, groups), dy=(dy, ()), saved=(saved, ()))
    return (
        empty(x, x.shape) if need_dx else None,
        empty(weight, weight.shape) if need_dweight else None,
        x.new_empty(weight.shape[0]) if need_dbias else None,
    )


def _transposed_shape(x: Tensor, weight: Tensor, groups: int, size: Sequence[int], **others: tuple[Tensor | None, int]) -> tuple[int, ...]:
    """The shape of a transposed convolution's result, while a graph is traced, with what the kernels check; ``others`` by rank."""
    torch._check(x.dim() == 4 and weight.dim() == 4, lambda: f"x and weight must have 4 dimensions, got {x.dim()} and {weight.dim()}")
    shape = (x.shape[0], weight.shape[1] * groups, *size)
    ranks = {1: shape[1:2], 4: shape}
    check_traced(x, weight=(weight, (x.shape[1], *weight.shape[1:])), **{name: (t, ranks[rank]) for name, (t, rank) in others.items()})
    return shape


def _transposed_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, size: Sequence[int]
) -> Tensor:
    return empty(x, _transposed_shape(x, weight, groups, size, bias=(bias, 1)))


def _transposed_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, need_dx: bool, need_dweight: bool,
    need_dbias: bool,
) -> Optionals:  # fmt: skip
    C = _transposed_shape(x, weight, groups, dy.shape[2:], dy=(dy, 4))[1]
    return (
        empty(x, x.shape) if need_dx else None,
        empty(weight, weight.shape) if need_dweight else None,
        x.new_empty(C) if need_dbias else None,
    )


_moves = "int[] stride, int[] padding, int[] dilation, int groups"
_options = f"{_moves}, bool winograd, int activation, float slope"
forward = define(f"conv2d_forward(Tensor x, Tensor weight, Tensor? bias, {_options}, bool save) -> (Tensor y, Tensor z)", _forward_fake)
backward = define(
    f"conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? saved, {_options}, "
    "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward_fake,
)
transposed = define(f"conv_transpose2d_forward(Tensor x, Tensor weight, Tensor? bias, {_moves}, int[] size) -> Tensor", _transposed_fake)
transposed_backward = define(
    f"conv_transpose2d_backward(Tensor dy, Tensor x, Tensor weight, {_moves}, "
    "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _transposed_backward_fake,
)
