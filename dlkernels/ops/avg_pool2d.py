r"""avg_pool2d: the mean of every window of a plane; adaptive_avg_pool2d of P x Q parts of it.

Forward     y[n,c,p,q]  = Σ_{r,s} x[n,c,h(p,r),w(q,s)] / m(p,q)     over the places of window (p, q) that lie inside, see windows.py
            m(p,q)      = how many places those are; with count_include_pad, those in the padding too; or divisor_override
Backward    dx[n,c,h,w] = Σ_{p,q} dy[n,c,p,q] / m(p,q)              over the windows that see (h, w)

Shapes      x (N, C, H, W) or (C, H, W), contiguous or channels last   y (N, C, P, Q) likewise
Work        one addition for each place of each window; x read once and y written, dy read and dx written: memory decides
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function, define
from ..contract import Optionals, is_spread, needs_grad, on_shards, reference_gradients, require_tensors, without_kernel
from ..registry import Cost, Op, register
from . import windows
from .windows import Pair, Windows

__all__ = ["adaptive_avg_pool2d", "avg_pool2d"]

# kernel_size 0: adaptive; divisor 0: the number of places
WINDOWS = "int[2] kernel_size, int[2] stride, int[2] padding, bool count_include_pad, int divisor"


def _forward_fake(x: Tensor, P: int, Q: int, kernel: Pair, stride: Pair, padding: Pair, include_pad: bool, divisor: int) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"x must have 4 dimensions, got {x.dim()}")
    return windows.empty(x, windows.is_channels_last(x), P, Q)


def _backward_fake(
    dy: Tensor, H: int, W: int, kernel: Pair, stride: Pair, padding: Pair, include_pad: bool, divisor: int, channels_last: bool
) -> Tensor:
    torch._check(dy.dim() == 4, lambda: f"dy must have 4 dimensions, got {dy.dim()}")
    return windows.empty(dy, channels_last, H, W)


_forward = define(f"avg_pool2d_forward(Tensor x, SymInt P, SymInt Q, {WINDOWS}) -> Tensor", _forward_fake)
_backward = define(f"avg_pool2d_backward(Tensor dy, SymInt H, SymInt W, {WINDOWS}, bool channels_last) -> Tensor", _backward_fake)


class _AvgPool2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, at: Windows, include_pad: bool, divisor: int) -> Tensor:
        return _forward(x, *at.size, *at[1:4], include_pad, divisor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Windows, bool, int], output: Tensor) -> None:
        x, ctx.windows, ctx.include_pad, ctx.divisor = inputs
        ctx.plane, ctx.channels_last = x.shape[2:], windows.is_channels_last(x)
        ctx.save_for_backward(x.new_empty(0))  # the gradient needs no number of x; a graph that keeps nothing could be run again by mistake

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Optionals:
        _ = ctx.saved_tensors  # raises where the graph has been freed
        options = ctx.windows, ctx.include_pad, ctx.divisor
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, which is linear, so any x will do
            x = dy.new_zeros(()).expand(*dy.shape[:2], *ctx.plane)
            return reference_gradients(_definition, (x, *options), (True, False, False, False), dy)
        return _backward(dy, *ctx.plane, *ctx.windows[1:4], *options[1:], ctx.channels_last), None, None, None


def _definition(x: Tensor, at: Windows, include_pad: bool, divisor: int) -> Tensor:
    if not at.kernel[0]:
        return F.adaptive_avg_pool2d(x, at.size)
    ceil_mode = any(at.size[d] != windows.count(x.shape[2 + d], at.kernel[d], at.stride[d], at.padding[d], 1, False) for d in (0, 1))
    return F.avg_pool2d(x, at.kernel, at.stride, at.padding, ceil_mode, include_pad, divisor or None)


def _compute(x: Tensor, at: Windows, include_pad: bool, divisor: int) -> Tensor:
    batch = windows.as_batch(x)
    if needs_grad(x):
        y: Tensor = apply_function(_AvgPool2d, batch, at, include_pad, divisor)
    else:
        y = _forward(batch, *at.size, *at[1:4], include_pad, divisor)
    return y if x.dim() == 4 else y[0]


def _windows(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: Any = False, include_pad: Any = True, divisor: Any = None
) -> Windows | str:
    at = windows.regular("avg_pool2d", x, kernel_size, stride, padding, 1, ceil_mode)
    if isinstance(at, Windows):
        if divisor is not None and not (windows.is_int(divisor) and divisor != 0 and abs(divisor) < windows.LIMIT**2):
            return f"divisor_override is {divisor!r}; kernels take an int other than 0, or None"
        if type(include_pad) is not bool:
            return f"count_include_pad is {include_pad!r}; kernels take a bool"
    return at


def avg_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.avg_pool2d``: the mean of every window.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, float32, float64, bfloat16 or float16; contiguous and channels-last memory is used as it
            lies, and the result has the same format.
        kernel_size, stride, padding: an int, or a pair for height and width; stride None is the kernel_size.
        ceil_mode: let the last window reach out of the input where numbers would be left over.
        count_include_pad: divide by the number of places in the window, those in the padding included.
        divisor_override: divide by this instead.

    Raises:
        RuntimeError: numbers that make no windows, a divisor of 0, a rank other than 3 or 4. TypeError: an argument of another type.
    """
    at = _windows(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if isinstance(at, Windows):
        return _compute(input, at, count_include_pad, divisor_override or 0)
    require_tensors(("input", input))
    args = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    if is_spread(input):
        return on_shards("pool2d", avg_pool2d, input, *args)
    return without_kernel(at, F.avg_pool2d, input, *args, name="avg_pool2d")


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool2d``: the mean of each of P x Q parts of every plane.

    Args:
        input: as in ``avg_pool2d``.
        output_size: P and Q, one int for both, or None for as many as the input has.

    Raises:
        RuntimeError: a size that is negative or too large, a rank other than 3 or 4. TypeError: an argument of another type.
    """
    at = windows.adaptive("adaptive_avg_pool2d", input, output_size)
    if isinstance(at, Windows):
        return _compute(input, at, False, 0)
    require_tensors(("input", input))
    if is_spread(input):
        return on_shards("pool2d", adaptive_avg_pool2d, input, output_size)
    return without_kernel(at, F.adaptive_avg_pool2d, input, output_size, name="adaptive_avg_pool2d")


def _make(
    factory: Callable[..., Tensor], lead: tuple[int, ...], k: Any, s: Any = None, p: Any = 0, ceil: bool = False, pad: bool = True,
    divisor: int | None = None, channels_last: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    return windows.make(factory, lead, channels_last), k, s, p, ceil, pad, divisor


def _cost(
    lead: tuple[int, ...], k: Any, s: Any = None, p: Any = 0, ceil: bool = False, pad: bool = True, divisor: int | None = None,
    channels_last: bool = False,
) -> Cost:  # fmt: skip
    return windows.cost(lead, _windows(torch.empty(lead, device="meta"), k, s, p, ceil))


SAMPLES: list[dict[str, Any]] = [
    {"lead": (0, 3, 4, 4), "k": 2}, {"lead": (1, 1, 1, 1), "k": 1}, {"lead": (3, 5, 7), "k": 2}, {"lead": (2, 2, 7, 7), "k": 7},
    {"lead": (2, 3, 8, 10), "k": 2}, {"lead": (2, 3, 9, 11), "k": 3, "s": 2, "p": 1},
    {"lead": (2, 3, 9, 11), "k": 3, "s": 2, "p": 1, "pad": False, "channels_last": True},
    {"lead": (2, 5, 9, 7), "k": (2, 3), "s": (1, 2), "p": (0, 1), "ceil": True},
    {"lead": (1, 2, 13, 17), "k": (3, 2), "s": (1, 3), "p": (1, 0), "ceil": True, "pad": False},
    {"lead": (3, 19, 70), "k": 3, "s": 1, "p": 1, "divisor": -5}, {"lead": (2, 67, 5, 6), "k": 3, "s": 2, "p": 1, "channels_last": True},
    {"lead": (1, 1, 40, 41), "k": (17, 19), "s": 5, "p": 8},
]  # fmt: skip
register(
    Op(
        name="avg_pool2d", module="avg_pool2d", call=avg_pool2d, reference=F.avg_pool2d, native=F.avg_pool2d, make=_make, samples=SAMPLES,
        bench=windows.BENCH, quick=windows.BENCH[:3], tiny=[{"lead": (16, 8, 8, 8), "k": 2}], cost=_cost,
        raw=("avg_pool2d_forward", "avg_pool2d_backward"), supports=lambda *args: windows.why(_windows(*args)),
    )
)  # fmt: skip
register(
    Op(
        name="adaptive_avg_pool2d", module="avg_pool2d", call=adaptive_avg_pool2d, reference=F.adaptive_avg_pool2d,
        native=F.adaptive_avg_pool2d, make=windows.make_adaptive, samples=windows.ADAPTIVE_SAMPLES, bench=windows.ADAPTIVE_BENCH,
        quick=windows.ADAPTIVE_BENCH[:2], tiny=[{"lead": (16, 8, 4, 4), "size": 1}], cost=windows.cost_adaptive,
        raw=("avg_pool2d_forward", "avg_pool2d_backward"),
        supports=lambda x, size: windows.why(windows.adaptive("adaptive_avg_pool2d", x, size)),
    )
)  # fmt: skip
