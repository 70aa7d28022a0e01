r"""max_pool2d: the largest number of every window of a plane; adaptive_max_pool2d of P x Q parts of it.

Forward     y[n,c,p,q]  = max_{r,s} x[n,c,h(p,r),w(q,s)]     over the places of window (p, q) that lie inside, see windows.py
            a[n,c,p,q]  = the (r, s) where that is: the first in the order of rows, or the last NaN
Backward    dx[n,c,h,w] = Σ_{p,q} dy[n,c,p,q]  where a[n,c,p,q] is the place (h, w)

Shapes      x (N, C, H, W) or (C, H, W), contiguous or channels last   y (N, C, P, Q) likewise
            a like y: the number r KW + s, in a byte where windows have at most 256 places, else in 4. It is all that the backward keeps.
Work        one comparison for each place of each window; x read once and y and a written, dy and a read and dx written: memory decides
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function, define
from ..contract import is_spread, needs_grad, on_shards, require_tensors, without_kernel
from ..registry import Cost, Op, register
from . import windows
from .windows import Pair, Windows

__all__ = ["adaptive_max_pool2d", "max_pool2d"]

WINDOWS = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"  # kernel_size 0: adaptive


def _forward_fake(
    x: Tensor, P: int, Q: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, need_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    torch._check(x.dim() == 4, lambda: f"x must have 4 dimensions, got {x.dim()}")
    small, last = Windows((P, Q), kernel).has_bytes(x.shape), windows.is_channels_last(x)
    argmax = windows.empty(x, last, P, Q, torch.uint8 if small else torch.int32) if need_argmax else None
    return windows.empty(x, last, P, Q), argmax


def _backward_fake(
    dy: Tensor, argmax: Tensor, H: int, W: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, channels_last: bool
) -> Tensor:
    torch._check(dy.shape == argmax.shape, lambda: f"dy has shape {tuple(dy.shape)}, argmax {tuple(argmax.shape)}")
    torch._check(dy.device == argmax.device, lambda: f"dy is on {dy.device}, argmax on {argmax.device}")
    return windows.empty(dy, channels_last, H, W)


_forward = define(
    f"max_pool2d_forward(Tensor x, SymInt P, SymInt Q, {WINDOWS}, bool need_argmax) -> (Tensor y, Tensor argmax)", _forward_fake
)
_backward = define(
    f"max_pool2d_backward(Tensor dy, Tensor argmax, SymInt H, SymInt W, {WINDOWS}, bool channels_last) -> Tensor", _backward_fake
)


class _MaxPool2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, at: Windows) -> tuple[Tensor, Tensor]:
        y, argmax = _forward(x, *at.size, *at[1:], True)
        return y, argmax

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Windows], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.windows = inputs
        ctx.plane, ctx.channels_last = x.shape[2:], windows.is_channels_last(x)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _dargmax: None) -> tuple[Tensor | None, None]:
        if dy is None:
            return None, None
        (argmax,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: in operations that can be differentiated
            return _scattered(dy, argmax, ctx.windows, ctx.plane), None
        return _backward(dy, argmax, *ctx.plane, *ctx.windows[1:], ctx.channels_last), None


def _scattered(dy: Tensor, argmax: Tensor, at: Windows, plane: Pair) -> Tensor:
    """The gradient in PyTorch's own operations. It is linear in dy, and of x it needs nothing but where its largest numbers are."""
    (h, w), (H, W) = _places(argmax, at, plane), plane
    inside = (h < H) & (w < W)  # not where all places of a window with dilation lie in the padding
    index = torch.where(inside, h * W + w, 0).flatten(2)
    dx = dy.new_zeros((*dy.shape[:2], H * W)).scatter_add(2, index, torch.where(inside, dy, 0).flatten(2))
    return dx.unflatten(2, (H, W))


def _places(argmax: Tensor, at: Windows, plane: Pair) -> tuple[Tensor, Tensor]:
    """h and w of the places in windows that ``argmax`` names, int64."""
    H, W = plane
    KW, code = at.widest(1, W), argmax.long()
    r = code.div(KW, rounding_mode="floor")
    return at.starts(0, H, argmax)[:, None] + r * at.dilation[0], at.starts(1, W, argmax) + (code - r * KW) * at.dilation[1]


def _compute(x: Tensor, at: Windows, return_indices: bool) -> Any:
    batch = windows.as_batch(x)
    if needs_grad(x):
        y, argmax = apply_function(_MaxPool2d, batch, at)
    else:
        y, argmax = _forward(batch, *at.size, *at[1:], return_indices)
    y = y if x.dim() == 4 else y[0]
    if not return_indices:
        return y
    h, w = _places(argmax, at, (batch.shape[2], batch.shape[3]))
    indices = h * batch.shape[3] + w
    return y, indices if x.dim() == 4 else indices[0]


def max_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """``torch.nn.functional.max_pool2d``: the largest number of every window.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, float32, float64, bfloat16 or float16; contiguous and channels-last memory is used as it
            lies, and the result has the same format.
        kernel_size, stride, padding, dilation: an int, or a pair for height and width; stride None is the kernel_size.
        ceil_mode: let the last window reach out of the input where numbers would be left over.
        return_indices: return ``(y, indices)``; int64, h W + w of each maximum: the first one in the order of rows, or the last NaN.

    Raises:
        RuntimeError: numbers that make no windows, a rank other than 3 or 4. TypeError: an argument of another type.
    """
    at = windows.regular("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    if isinstance(at, Windows):
        return _compute(input, at, return_indices)
    require_tensors(("input", input))
    args = kernel_size, stride, padding, dilation, ceil_mode, return_indices
    if is_spread(input):
        return on_shards("pool2d", max_pool2d, input, *args)
    return without_kernel(at, F.max_pool2d, input, *args, name="max_pool2d")


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """``torch.nn.functional.adaptive_max_pool2d``: the largest number of each of P x Q parts of every plane.

    Args:
        input: as in ``max_pool2d``.
        output_size: P and Q, one int for both, or None for as many as the input has.
        return_indices: as in ``max_pool2d``.

    Raises:
        RuntimeError: a size that is negative or too large, a rank other than 3 or 4. TypeError: an argument of another type.
    """
    at = windows.adaptive("adaptive_max_pool2d", input, output_size)
    if isinstance(at, Windows):
        return _compute(input, at, return_indices)
    require_tensors(("input", input))
    if is_spread(input):
        return on_shards("pool2d", adaptive_max_pool2d, input, output_size, return_indices)
    return without_kernel(at, F.adaptive_max_pool2d, input, output_size, return_indices, name="adaptive_max_pool2d")


def _make(
    factory: Callable[..., Tensor], lead: tuple[int, ...], k: Any, s: Any = None, p: Any = 0, d: Any = 1, ceil: bool = False,
    channels_last: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    return windows.make(factory, lead, channels_last), k, s, p, d, ceil


def _cost(lead: tuple[int, ...], k: Any, s: Any = None, p: Any = 0, d: Any = 1, ceil: bool = False, channels_last: bool = False) -> Cost:
    return windows.cost(lead, windows.regular("max_pool2d", torch.empty(lead, device="meta"), k, s, p, d, ceil))


def _supports(input: Any, k: Any, s: Any = None, p: Any = 0, d: Any = 1, ceil: Any = False, *_: Any) -> str | None:
    return windows.why(windows.regular("max_pool2d", input, k, s, p, d, ceil))


SAMPLES: list[dict[str, Any]] = [
    {"lead": (0, 3, 4, 4), "k": 2}, {"lead": (1, 1, 1, 1), "k": 1}, {"lead": (3, 5, 7), "k": 2}, {"lead": (2, 2, 7, 7), "k": 7},
    {"lead": (2, 3, 8, 10), "k": 2}, {"lead": (2, 3, 9, 11), "k": 3, "s": 2, "p": 1},
    {"lead": (2, 3, 9, 11), "k": 3, "s": 2, "p": 1, "channels_last": True}, {"lead": (2, 5, 9, 7), "k": (2, 3), "s": (1, 2), "ceil": True},
    {"lead": (1, 2, 13, 17), "k": (3, 2), "s": (1, 3), "p": (1, 0), "d": (2, 1), "ceil": True},
    {"lead": (3, 19, 70), "k": 3, "s": 1, "p": 1}, {"lead": (2, 67, 5, 6), "k": 3, "s": 2, "p": 1, "channels_last": True},
    {"lead": (1, 1, 40, 41), "k": (17, 19), "s": 5, "p": 8},
]  # fmt: skip
register(
    Op(
        name="max_pool2d", module="max_pool2d", call=max_pool2d, reference=F.max_pool2d, native=F.max_pool2d, make=_make, samples=SAMPLES,
        bench=windows.BENCH, quick=windows.BENCH[:3], tiny=[{"lead": (16, 8, 8, 8), "k": 2}], cost=_cost,
        raw=("max_pool2d_forward", "max_pool2d_backward"), supports=_supports,
    )
)  # fmt: skip
register(
    Op(
        name="adaptive_max_pool2d", module="max_pool2d", call=adaptive_max_pool2d, reference=F.adaptive_max_pool2d,
        native=F.adaptive_max_pool2d, make=windows.make_adaptive, samples=windows.ADAPTIVE_SAMPLES, bench=windows.ADAPTIVE_BENCH,
        quick=windows.ADAPTIVE_BENCH[:2], tiny=[{"lead": (16, 8, 4, 4), "size": 1}], cost=windows.cost_adaptive,
        raw=("max_pool2d_forward", "max_pool2d_backward"),
        supports=lambda x, size, *_: windows.why(windows.adaptive("adaptive_max_pool2d", x, size)),
    )
)  # fmt: skip
