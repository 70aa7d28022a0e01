r"""conv_transpose2d: every pixel, times a filter, is added to the places that the filter covers: the map that is conv2d's input gradient.

Forward     y[n,c,h,w]  = Σ_{o,r,s} x[n,o,p,q] W[o,c,r,s] + b[c]    over the taps for which p = (h + top - r dh) / sh is whole, q likewise
Backward    dx[n,o,p,q] = Σ_{c,r,s} dy[n, c, p sh + r dh - top, q sw + s dw - left] W[o,c,r,s]    conv2d of dy
            dW[o,c,r,s] = Σ_{n,p,q} x[n,o,p,q] dy[n, c, p sh + r dh - top, q sw + s dw - left]    conv2d's, x and dy swapped
            db[c]       = Σ_{n,h,w} dy[n,c,h,w]

The letters are those of the convolution that it transposes: o counts the channels of x, c those of y. So the kernels are conv2d's, and
only one channel with one filter multiplies the zeros that a stride leaves between the pixels of x. Behind its border x is zeros that are
multiplied: a NaN or an infinity of W makes NaN where the filter reaches over it.

Shapes      x (N, O, P, Q) or (O, P, Q), contiguous or channels last   W (O, C / groups, R, S)   b (C,) or None   y (N, C, H, W) like x
            H = (P - 1) sh - 2 top + dh (R - 1) + output_padding + 1,  W likewise
Work        2 N O P Q C R S / groups flops forward, twice that backward; x, W and y moved once: the flops decide
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function
from ..contract import (
    autocast_dtype,
    in_autocast,
    is_spread,
    needs_grad,
    on_shards,
    reference_gradients,
    require_tensors,
    unsupported,
    without_kernel,
)
from ..registry import Cost, Op, register
from . import conv2d_raw as raw
from .conv2d_raw import Geometry, Numbers

__all__ = ["conv_transpose1d", "conv_transpose2d"]

Pair = tuple[int, int]


class _ConvTranspose2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, more: Pair) -> Tensor:
        return raw.transposed(x, weight, bias, *geometry[:4], geometry.images(x.shape, weight.shape, more))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.geometry, ctx.more = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return reference_gradients(_reference, (x, weight, bias, ctx.geometry, ctx.more), ctx.needs_input_grad, dy)
        return *raw.transposed_backward(dy, x, weight, *ctx.geometry[:4], *ctx.needs_input_grad[:3]), None, None


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, more: Pair) -> Tensor:
    stride, (top, _, left, _), dilation, groups = geometry[:4]
    return F.conv_transpose2d(x, weight, bias, stride, (top, left), more, groups, dilation)


def _unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: Any = 1,
    dilation: Any = 1,
) -> str | None:  # fmt: skip
    """Why torch's own conv_transpose2d runs, or raises, for these arguments; None where a kernel runs."""
    found = _geometry_or_reason(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return found if isinstance(found, str) else None


def _geometry_or_reason(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any
) -> tuple[Geometry, Pair] | str:
    """The convolution that is transposed, and output_padding; or why no kernel takes these arguments. On the path of every call."""
    reason = unsupported(("input", x), ("weight", weight), optional=(("bias", bias),))
    if reason is not None:
        return reason
    x_shape, weight_shape = x.shape, weight.shape
    if len(x_shape) not in (3, 4) or len(weight_shape) != 4:
        return f"input {tuple(x_shape)}, weight {tuple(weight_shape)} do not fit (N, C, H, W) or (C, H, W), and (C, O / groups, R, S)"
    if isinstance(padding, str):
        return f"padding is {padding!r}, needs numbers"
    try:
        geometry = raw.geometry_of(weight_shape, stride, padding, dilation, groups)
        more = raw.pair("output_padding", output_padding, 0)
    except ValueError as error:
        return str(error)
    C = x_shape[-3]
    if C != weight_shape[0] or C % groups or 0 in weight_shape or not C:
        return f"input has {C} channels, weight shape {tuple(weight_shape)}; needs ({C}, O / groups, R, S), and {C} a multiple of groups"
    if bias is not None and bias.shape != (weight_shape[1] * groups,):
        return f"bias has shape {tuple(bias.shape)}, needs ({weight_shape[1] * groups},)"
    if any(n >= max(s, d) for n, s, d in zip(more, geometry.stride, geometry.dilation)):
        return f"output_padding is {more}, needs less than the stride {geometry.stride} or the dilation {geometry.dilation}"
    if 0 in x_shape[-2:] or min(geometry.images(x_shape, weight_shape, more)) < 1:
        return f"nothing is left of an image {tuple(x_shape[-2:])} under a filter {tuple(weight_shape[2:])} with padding {padding!r}"
    return geometry, more


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Numbers = 1, padding: Numbers = 0, output_padding: Numbers = 0,
    groups: int = 1, dilation: Numbers = 1,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.conv_transpose2d``.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, float32, float64, bfloat16 or float16; contiguous or channels last without a copy.
        weight: ``(C, O / groups, R, S)``, same dtype and device.
        bias: ``(O,)`` or None.
        stride, dilation: a number, or one for height and one for width.
        padding: likewise: rows and columns that are left out at each side of the result.
        output_padding: likewise: rows and columns more at the lower and right side; less than stride or dilation.

    Returns:
        ``(N, O, (H - 1) stride - 2 padding + dilation (R - 1) + output_padding + 1, ...)``, or that without N, in the input's dtype; under
        autocast in its dtype. Channels last where input or weight is.

    Raises:
        RuntimeError, ValueError: sizes, dtypes or options do not fit. TypeError: an argument is not a tensor, or an option not a number.
    """
    options = (stride, padding, output_padding, groups, dilation)
    found = _geometry_or_reason(input, weight, bias, *options)
    if isinstance(found, str):
        require_tensors(("input", input), ("weight", weight), optional=(("bias", bias),))
        if is_spread(input, weight, bias):
            return on_shards("conv_transpose2d", input, weight, bias, *options)
        return without_kernel(found, F.conv_transpose2d, input, weight, bias, *options)
    geometry, more = found
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = in_autocast(dtype, input, weight, bias)  # type: ignore[assignment]
    x = input if input.dim() == 4 else input.unsqueeze(0)
    if raw.is_channels_last(weight):
        x = x.contiguous(memory_format=torch.channels_last)
    if needs_grad(x, weight, bias):
        y = apply_function(_ConvTranspose2d, x, weight, bias, geometry, more)
    else:
        y = raw.transposed(x, weight, bias, *geometry[:4], geometry.images(x.shape, weight.shape, more))
    return y if input.dim() == 4 else y.squeeze(0)


def conv_transpose1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Numbers = 1, padding: Numbers = 0, output_padding: Numbers = 0,
    groups: int = 1, dilation: Numbers = 1,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.conv_transpose1d``: input ``(N, C, L)`` or ``(C, L)``, weight ``(C, O / groups, S)``, as images of one row."""
    options = (stride, padding, output_padding, groups, dilation)
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor) or input.dim() not in (2, 3) or weight.dim() != 3:
        require_tensors(("input", input), ("weight", weight), optional=(("bias", bias),))
        reason = f"input {tuple(input.shape)}, weight {tuple(weight.shape)} do not fit (N, C, L) or (C, L), and (C, O / groups, S)"
        return without_kernel(reason, F.conv_transpose1d, input, weight, bias, *options)
    stride, padding, output_padding, dilation = raw.in_row((stride, 1), (padding, 0), (output_padding, 0), (dilation, 1))
    options = (stride, padding, output_padding, groups, dilation)
    return conv_transpose2d(input.unsqueeze(-2), weight.unsqueeze(-2), bias, *options).squeeze(-2)


def _make(
    factory: Callable[..., Tensor], N: int, C: int, H: int, O: int, R: int, stride: int = 1, padding: int = 0, output_padding: int = 0,
    groups: int = 1, dilation: int = 1, W: int | None = None, S: int | None = None, bias: bool = True, channels_last: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """W is H and S is R where they are not given; the filter lies in memory as the images do."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = factory(N, C, H, H if W is None else W).contiguous(memory_format=layout)
    weight = factory(C, O // groups, R, S or R).contiguous(memory_format=layout)
    return x, weight, factory(O) if bias else None, stride, padding, output_padding, groups, dilation


def _cost(**size: Any) -> Cost:
    x, weight, bias, stride, padding, more, groups, dilation = _make(lambda *shape: torch.empty(shape, device="meta"), **size)
    geometry = raw.geometry_of(weight.shape, stride, padding, dilation, groups)
    results = torch.Size((*x.shape[:1], size["O"], *geometry.images(x.shape, weight.shape, (more, more)))).numel()
    flops, moved = 2 * (x.numel() // x.shape[1]) * weight.numel(), x.numel() + weight.numel() + results + (bias is not None) * size["O"]
    return Cost(flops, 2 * flops, moved, 2 * moved)


_bench: list[dict[str, Any]] = [
    {"N": 8, "C": 256, "H": 14, "O": 128, "R": 4, "stride": 2, "padding": 1},
    {"N": 8, "C": 128, "H": 28, "O": 64, "R": 2, "stride": 2},
    {"N": 8, "C": 64, "H": 56, "O": 64, "R": 3, "padding": 1},
    {"N": 32, "C": 64, "H": 16, "O": 3, "R": 4, "stride": 2, "padding": 1},
]

register(
    Op(
        name="conv_transpose2d",
        module="conv_transpose2d",
        call=conv_transpose2d,
        reference=F.conv_transpose2d,
        native=F.conv_transpose2d,
        make=_make,
        samples=[
            {"N": 1, "C": 1, "H": 1, "O": 1, "R": 1},
            {"N": 0, "C": 2, "H": 5, "O": 3, "R": 3},
            {"N": 1, "C": 2, "H": 3, "O": 2, "R": 2},
            {"N": 2, "C": 5, "H": 7, "O": 3, "R": 3, "W": 11, "bias": False},
            {"N": 2, "C": 33, "H": 5, "O": 17, "R": 4, "W": 10, "stride": 2, "padding": 1},
            {"N": 2, "C": 34, "H": 5, "O": 19, "R": 2, "W": 9, "stride": 2},
            {"N": 2, "C": 6, "H": 5, "O": 4, "R": 3, "W": 4, "S": 2, "stride": 3, "output_padding": 2, "groups": 2},
            {"N": 1, "C": 3, "H": 6, "O": 4, "R": 2, "W": 9, "dilation": 3, "output_padding": 1, "padding": 2},
            {"N": 2, "C": 19, "H": 6, "O": 19, "R": 3, "W": 25, "groups": 19, "stride": 2, "padding": 1, "output_padding": 1},
            {"N": 2, "C": 20, "H": 6, "O": 34, "R": 3, "W": 7, "stride": 2, "padding": 1, "output_padding": 1, "channels_last": True},
            {"N": 2, "C": 18, "H": 9, "O": 18, "R": 3, "W": 7, "groups": 18, "channels_last": True},
        ],
        bench=[size | layout for layout in ({}, {"channels_last": True}) for size in _bench],
        quick=_bench[:1],
        tiny=[{"N": 1, "C": 8, "H": 4, "O": 8, "R": 2, "stride": 2}],
        cost=_cost,
        raw=("conv_transpose2d_forward", "conv_transpose2d_backward"),
        supports=_unsupported,
    )
)
