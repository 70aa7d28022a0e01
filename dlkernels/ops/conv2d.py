r"""conv2d: y = act(x ⋆ W + b), a filter slid over images; bias and activation are applied to each tile before it leaves the cache.

Forward     z[n,o,p,q] = Σ_{c,r,s} x[n, c, p sh + r dh - top, q sw + s dw - left] W[o,c,r,s] + b[o]          y = act(z);  0 outside of x
Backward    dz         = dy · act'(z)
            dx[n,c,h,w]   = Σ_{o,r,s} dz[n,o,p,q] W[o,c,r,s]    over the taps for which p = (h + top - r dh) / sh is whole, q likewise
            dW[o,c,r,s]   = Σ_{n,p,q} dz[n,o,p,q] x[n, c, p sh + r dh - top, q sw + s dw - left]
            db[o]         = Σ_{n,p,q} dz[n,o,p,q]

The border is multiplied like any other zero, except in small images: a NaN or an infinity of W makes NaN where it meets the border, in dx
too. With groups, output channel o sees the C / groups input channels of its group. As linear does, relu, sigmoid and tanh keep y for the
backward, the others z.

Shapes      x (N, C, H, W) or (C, H, W), contiguous or channels last   W (O, C / groups, R, S)   b (O,) or None   y (N, O, P, Q) like x
            P = ⌊(H + top + bottom - dh (R - 1) - 1) / sh⌋ + 1,  Q likewise
Work        2 N O P Q C R S / groups flops forward, twice that backward; x, W and y moved once: the flops decide unless every channel has a
            filter of its own
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
from .activations import Activation
from .conv2d_raw import Geometry, Numbers, geometry_of
from .linear import ACTIVATIONS, keep

__all__ = ["conv1d", "conv2d", "conv2d_act", "conv2d_relu"]


class _Conv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, act: Activation, slope: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        save = act.keeps == "x"
        y, z = raw.forward(x, weight, bias, *geometry, act.code, slope, save)
        return (y, z) if save else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.geometry, ctx.act, ctx.slope = inputs
        keep(ctx, tensors, ctx.act, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _dz: None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None, None
        x, weight, bias, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return reference_gradients(_reference, (x, weight, bias, ctx.geometry, ctx.act, ctx.slope), ctx.needs_input_grad, dy)
        needs = ctx.needs_input_grad[:3]
        return *raw.backward(dy, x, weight, saved, *ctx.geometry, ctx.act.code, ctx.slope, *needs), None, None, None


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, act: Activation, slope: float) -> Tensor:
    stride, (top, bottom, left, right), dilation, groups = geometry[:4]
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return act.reference(F.conv2d(x, weight, bias, stride, (top, left), dilation, groups), slope, 0.0)


def _unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> str | None:
    """Why torch's own conv2d runs, or raises, for these arguments; None where a kernel runs."""
    found = _geometry_or_reason(x, weight, bias, stride, padding, dilation, groups)
    return found if isinstance(found, str) else None


def _geometry_or_reason(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: Any, winograd: bool = False
) -> Geometry | str:
    """How the filter moves, or why no kernel takes these arguments. On the path of every call."""
    reason = unsupported(("input", x), ("weight", weight), optional=(("bias", bias),))
    if reason is not None:
        return reason
    x_shape, weight_shape = x.shape, weight.shape
    if len(x_shape) not in (3, 4) or len(weight_shape) != 4:
        return f"input {tuple(x_shape)}, weight {tuple(weight_shape)} do not fit (N, C, H, W) or (C, H, W), and (O, C / groups, R, S)"
    try:
        geometry = geometry_of(weight_shape, stride, padding, dilation, groups, bool(winograd))
    except ValueError as error:
        return str(error)
    C, O = x_shape[-3], weight_shape[0]
    if C != weight_shape[1] * groups or O % groups or not O or not C:
        return f"input has {C} channels, weight shape {tuple(weight_shape)}; needs (O, {C} / {groups}, R, S), and O a multiple of groups"
    if bias is not None and bias.shape != (O,):
        return f"bias has shape {tuple(bias.shape)}, needs ({O},)"
    if weight_shape[2] < 1 or weight_shape[3] < 1 or min(geometry.size(x_shape, weight_shape)) < 1 or 0 in x_shape[-2:]:
        return f"the filter {tuple(weight_shape[2:])} does not fit into the padded image {tuple(x_shape[-2:])}"
    return geometry


def conv2d_act(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Numbers = 1, padding: str | Numbers = 0, dilation: Numbers = 1,
    groups: int = 1, activation: str = "relu", negative_slope: float = 0.01, *, winograd: bool = False,
) -> Tensor:  # fmt: skip
    """act(conv2d(input, weight, bias, ...)) in one kernel.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, float32, float64, bfloat16 or float16; contiguous or channels last without a copy.
        weight: ``(O, C / groups, R, S)``, same dtype and device.
        bias: ``(O,)`` or None.
        stride, dilation: a number, or one for height and one for width.
        padding: likewise; or "valid", no padding; or "same", as much as gives a result of the input's size (stride 1; where that is odd,
            one more below and to the right).
        activation: one of "none", "relu", "gelu" (erf), "gelu_tanh", "leaky_relu", "sigmoid", "tanh", "silu".
        negative_slope: slope of leaky_relu for z < 0.
        winograd: allow Winograd's F(2x2, 3x3), forward and backward, on the CPU wherever it is faster: filters 3 x 3 of stride and
            dilation 1 with channels enough to fill vectors, in every dtype that is computed in float32 or float64. The sums differ from
            the direct ones by rounding, which in a square of 2 x 2 places is that of its largest number.

    Returns:
        ``(N, O, P, Q)`` or ``(O, P, Q)`` in the input's dtype; under autocast in its dtype. Channels last where input or weight is.

    Raises:
        ValueError: ``activation`` is unknown. RuntimeError, ValueError: sizes, dtypes or options do not fit. TypeError: an argument is
        not a tensor, or an option not a number.
    """
    act = ACTIVATIONS.get(activation)
    if act is None:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    found = _geometry_or_reason(input, weight, bias, stride, padding, dilation, groups, winograd)
    if isinstance(found, str):
        require_tensors(("input", input), ("weight", weight), optional=(("bias", bias),))
        options = (stride, padding, dilation, groups)
        if is_spread(input, weight, bias):
            return on_shards("conv2d_act", input, weight, bias, *options, activation, negative_slope, winograd)

        def native(*args: Any) -> Tensor:
            return act.reference(F.conv2d(*args), negative_slope, 0.0)

        return without_kernel(found, native, input, weight, bias, *options, name="conv2d")
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = in_autocast(dtype, input, weight, bias)  # type: ignore[assignment]
    x = input if input.dim() == 4 else input.unsqueeze(0)
    if raw.is_channels_last(weight):
        x = x.contiguous(memory_format=torch.channels_last)
    if needs_grad(x, weight, bias):
        y = apply_function(_Conv2d, x, weight, bias, found, act, negative_slope)
        y = y[0] if act.keeps == "x" else y
    else:
        y = raw.forward(x, weight, bias, *found, act.code, negative_slope, False)[0]
    return y if input.dim() == 4 else y.squeeze(0)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Numbers = 1, padding: str | Numbers = 0, dilation: Numbers = 1,
    groups: int = 1, *, winograd: bool = False,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.conv2d``: input ``(N, C, H, W)``, weight ``(O, C / groups, R, S)`` -> ``(N, O, P, Q)``. See ``conv2d_act``."""
    return conv2d_act(input, weight, bias, stride, padding, dilation, groups, "none", winograd=winograd)


def conv2d_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Numbers = 1, padding: str | Numbers = 0, dilation: Numbers = 1,
    groups: int = 1, *, winograd: bool = False,
) -> Tensor:  # fmt: skip
    """``relu(conv2d(...))`` in one kernel. See ``conv2d_act``."""
    return conv2d_act(input, weight, bias, stride, padding, dilation, groups, "relu", winograd=winograd)


def conv1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Numbers = 1, padding: str | Numbers = 0, dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.conv1d``: input ``(N, C, L)`` or ``(C, L)``, weight ``(O, C / groups, S)``, as images of one row."""
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor) or input.dim() not in (2, 3) or weight.dim() != 3:
        require_tensors(("input", input), ("weight", weight), optional=(("bias", bias),))
        reason = f"input {tuple(input.shape)}, weight {tuple(weight.shape)} do not fit (N, C, L) or (C, L), and (O, C / groups, S)"
        return without_kernel(reason, F.conv1d, input, weight, bias, stride, padding, dilation, groups, name="conv1d")
    stride, padding, dilation = raw.in_row((stride, 1), (padding, 0), (dilation, 1))
    return conv2d(input.unsqueeze(-2), weight.unsqueeze(-2), bias, stride, padding, dilation, groups).squeeze(-2)


def _make(
    factory: Callable[..., Tensor], N: int, C: int, H: int, O: int, R: int, stride: int = 1, padding: Any = None, dilation: int = 1,
    groups: int = 1, W: int | None = None, S: int | None = None, bias: bool = True, channels_last: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """W is H, S is R, and padding keeps the size (at stride 1) where they are not given; the filter lies in memory as the images do."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = factory(N, C, H, H if W is None else W).contiguous(memory_format=layout)
    weight = factory(O, C // groups, R, S or R).contiguous(memory_format=layout)
    return x, weight, factory(O) if bias else None, stride, R // 2 * dilation if padding is None else padding, dilation, groups


def _cost(**size: Any) -> Cost:
    size = {"stride": 1, "padding": None, "dilation": 1, "groups": 1, "W": None, "S": None, "bias": True, **size}
    N, C, H, O, R, groups, stride = (size[name] for name in ("N", "C", "H", "O", "R", "groups", "stride"))
    W, S = H if size["W"] is None else size["W"], size["S"] or R
    padding = R // 2 * size["dilation"] if size["padding"] is None else size["padding"]
    filter_shape = torch.Size((O, C // groups, R, S))
    places = torch.Size(geometry_of(filter_shape, stride, padding, size["dilation"], groups).size(torch.Size((H, W)), filter_shape)).numel()
    flops, moved = 2 * N * places * filter_shape.numel(), N * C * H * W + filter_shape.numel() + N * O * places + O * size["bias"]
    return Cost(flops, 2 * flops, moved, 2 * moved)


Sizes = list[dict[str, Any]]
SAMPLES: Sizes = [
    {"N": 1, "C": 1, "H": 1, "O": 1, "R": 1},
    {"N": 0, "C": 2, "H": 5, "O": 3, "R": 3},
    {"N": 2, "C": 3, "H": 7, "O": 5, "R": 3, "W": 11, "bias": False},
    {"N": 3, "C": 5, "H": 8, "O": 17, "R": 1, "W": 9},
    {"N": 2, "C": 17, "H": 9, "O": 33, "R": 3, "W": 19, "stride": 2},
    {"N": 1, "C": 4, "H": 13, "O": 6, "R": 5, "W": 10, "S": 2, "padding": "valid", "stride": 3, "groups": 2},
    {"N": 2, "C": 3, "H": 6, "O": 4, "R": 2, "W": 21, "S": 4, "padding": "same", "dilation": 2},
    {"N": 2, "C": 19, "H": 10, "O": 19, "R": 3, "W": 35, "groups": 19},
    {"N": 2, "C": 33, "H": 7, "O": 40, "R": 3, "W": 18, "channels_last": True},
    {"N": 2, "C": 18, "H": 9, "O": 18, "R": 3, "W": 7, "stride": 2, "groups": 18, "channels_last": True},
    {"N": 2, "C": 40, "H": 5, "O": 15, "R": 1, "W": 37, "channels_last": True},
    # Many small images: the filter reaches far beyond them, or their places have strides; fewer channels than fill a vector, and more.
    {"N": 26, "C": 2, "H": 2, "O": 3, "R": 5, "W": 1, "bias": False},
    {"N": 26, "C": 2, "H": 5, "O": 6, "R": 3, "W": 3, "S": 2, "padding": (2, 1), "stride": 2, "groups": 2},
    {"N": 31, "C": 34, "H": 4, "O": 17, "R": 3, "stride": 2, "channels_last": True},
    {"N": 32, "C": 4, "H": 3, "O": 33, "R": 3, "W": 4, "dilation": 2, "channels_last": True},
]
_sizes = [
    (8, 3, 224, 32, 3, 1), (8, 32, 112, 64, 3, 1), (8, 64, 56, 128, 3, 1), (32, 64, 14, 64, 3, 1), (8, 256, 14, 256, 3, 1),
    (8, 3, 224, 64, 7, 2), (8, 128, 56, 256, 1, 1), (8, 64, 56, 128, 3, 2), (8, 96, 56, 96, 3, 1), (64, 1, 28, 32, 3, 1),
    (4, 48, 33, 80, 5, 1),
]  # fmt: skip
_more: dict[int, dict[str, Any]] = {8: {"groups": 96}, 10: {"dilation": 2, "groups": 4}}
ROWS: Sizes = [
    dict(zip(("N", "C", "H", "O", "R", "stride"), size)) | _more.get(i, {}) for i, size in enumerate(_sizes)
]  # fmt: skip
BENCH = [size | layout for layout in ({}, {"channels_last": True}) for size in ROWS]
QUICK = [BENCH[i] for i in (2, 0, 13)]
WINOGRAD_SAMPLES: Sizes = [  # forward, dx and dweight take it where O, C and C fill vectors
    {"N": 1, "C": 2, "H": 4, "O": 24, "R": 3, "W": 5, "padding": "valid", "bias": False},
    {"N": 2, "C": 24, "H": 3, "O": 5, "R": 3, "W": 6},
    {"N": 3, "C": 48, "H": 5, "O": 50, "R": 3, "W": 7, "padding": 2, "groups": 2},
    {"N": 2, "C": 32, "H": 1, "O": 40, "R": 3, "W": 9, "padding": 3, "channels_last": True},
    {"N": 5, "C": 300, "H": 8, "O": 33, "R": 3, "W": 7, "padding": "same", "channels_last": True},
]
WINOGRAD_BENCH = [size | layout for layout in ({}, {"channels_last": True}) for size in ROWS[1:5]]
TINY: Sizes = [{"N": 1, "C": 3, "H": 8, "O": 8, "R": 3}, {"N": 4, "C": 16, "H": 4, "O": 16, "R": 1}]


def _register(name: str, activation: str, samples: Sizes, bench: Sizes, quick: Sizes, winograd: bool = False) -> None:
    act = ACTIVATIONS[activation]

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        return conv2d_act(x, weight, bias, stride, padding, dilation, groups, activation, winograd=winograd)

    def native(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        return act.reference(F.conv2d(x, weight, bias, stride, padding, dilation, groups), 0.01, 0.0)

    register(
        Op(
            name=name,
            module="conv2d",
            call=call,
            reference=native,
            native=native,
            make=_make,
            samples=samples,
            bench=bench,
            quick=quick,
            tiny=TINY,
            cost=_cost,
            raw=("conv2d_forward", "conv2d_backward"),
            supports=_unsupported,
        )
    )


_few = [SAMPLES[i] for i in (1, 2, 4)]
_register("conv2d", "none", SAMPLES, BENCH, QUICK)
_register("conv2d_relu", "relu", _few, BENCH, QUICK[:1])
_register("conv2d_gelu", "gelu", _few, QUICK[:1], QUICK[:1])  # the other activations differ in the epilogue alone, which is linear's
_register("conv2d_winograd", "none", WINOGRAD_SAMPLES, WINOGRAD_BENCH, QUICK[:1], winograd=True)
