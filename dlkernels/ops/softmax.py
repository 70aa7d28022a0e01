"""softmax and log_softmax along one dimension.

Forward     top = max_n x[n]      sum = Σ_n exp(x[n] - top)          over the numbers of the dimension, for every place in the others
            softmax      y[n] = exp(x[n] - top) / sum
            log_softmax  y[n] = x[n] - top - log(sum)
Backward    softmax      dx[n] = y[n] (dy[n] - Σ_n dy[n] y[n])
            log_softmax  dx[n] = dy[n] - exp(y[n]) Σ_n dy[n]

y determines the gradient, so y is what the backward keeps. A row of -inf alone gives NaN, as does one that holds NaN or +inf.

Shapes      x (*, N, *)   y like x
Work        one exponential for each number, about 15 operations, and 2 elements moved forward; 3 moved and 4 operations backward (softmax)
            or one more exponential (log_softmax). Memory decides where x leaves the cache, the exponential where it does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import apply_function, define
from ..contract import autocast_dtype, in_float32, is_spread, needs_grad, on_shards, require_tensors, unsupported, without_kernel
from ..registry import Cost, Op, register

__all__ = ["log_softmax", "softmax"]


def _forward_fake(x: Tensor, dim: int, log: bool) -> Tensor:
    torch._check(0 <= dim < max(x.dim(), 1), lambda: f"dim is {dim}, needs 0 to {max(x.dim(), 1) - 1}")
    return x.new_empty(x.shape)


def _backward_fake(dy: Tensor, y: Tensor, dim: int, log: bool) -> Tensor:
    torch._check(dy.shape == y.shape, lambda: f"dy has shape {tuple(dy.shape)}, needs {tuple(y.shape)}")
    torch._check(dy.dtype == y.dtype, lambda: f"dy has dtype {dy.dtype}, needs {y.dtype} like y")
    return _forward_fake(y, dim, log)


_forward = define("softmax_forward(Tensor x, int dim, bool log) -> Tensor", _forward_fake)
_backward = define("softmax_backward(Tensor dy, Tensor y, int dim, bool log) -> Tensor", _backward_fake)


class _Softmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int, log: bool) -> Tensor:
        return _forward(x, dim, log)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
        _, ctx.dim, ctx.log = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _backward(dy, y, ctx.dim, ctx.log), None, None
        # create_graph=True: the formulas above in operations that can be differentiated; y remembers what it was made of
        if ctx.log:
            return dy - y.exp() * dy.sum(ctx.dim, keepdim=True), None, None
        return y * (dy - (dy * y).sum(ctx.dim, keepdim=True)), None, None


def _unsupported(input: Any, dim: Any = 0, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> str | None:
    """Why PyTorch's own operation runs for these arguments, or None where a kernel does. On the path of every call."""
    reason = unsupported(("input", input))
    if reason is not None:
        return reason
    rank = input.dim() or 1
    if type(dim) is not int or not -rank <= dim < rank:
        return f"dim is {dim!r}, which input with {input.dim()} dimensions does not have"
    return None


def _implicit_dim(name: str, rank: int, stacklevel: int) -> int:
    """The dimension that torch takes where none is named, with its warning."""
    warnings.warn(
        f"Implicit dimension choice for {name} has been deprecated. Change the call to include dim=X as an argument.", stacklevel=stacklevel
    )
    return 0 if rank in (0, 1, 3) else 1


def _compute(native: Callable[..., Tensor], log: bool, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and isinstance(input, Tensor):
        input = input.to(dtype)
    reason = _unsupported(input, dim)
    if reason is not None:
        require_tensors(("input", input))
        if is_spread(input) and type(dim) is int:
            return on_shards("softmax", native.__name__, input, dim)
        return without_kernel(reason, native, input, dim)
    if not input.is_cpu and dtype is None and autocast_dtype(input) is not None:  # on the list of what autocast widens, on a GPU only
        input = in_float32(input)[0]  # type: ignore[assignment]
    if dim < 0:
        dim += input.dim() or 1
    return apply_function(_Softmax, input, dim, log) if needs_grad(input) else _forward(input, dim, log)


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.nn.functional.softmax``: exp(input) scaled to sum to 1 along ``dim``.

    Args:
        input: any shape and strides; float32, float64, bfloat16 or float16, or any dtype that ``dtype`` turns into one of these.
        dim: the dimension that sums to 1; None, which is deprecated, takes 0 for 0, 1 or 3 dimensions and 1 otherwise.
        dtype: the input is converted to it first.

    Returns:
        A contiguous tensor of the input's shape.

    Raises:
        IndexError: there is no such dimension. TypeError: ``input`` is not a tensor. RuntimeError: integers without ``dtype``.
    """
    if dim is None:
        require_tensors(("input", input))
        dim = _implicit_dim("softmax", input.dim(), _stacklevel)
    return _compute(torch.softmax, False, input, dim, dtype)


def log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.nn.functional.log_softmax``: the logarithm of ``softmax``, computed without it, so that nothing underflows. See there."""
    if dim is None:
        require_tensors(("input", input))
        dim = _implicit_dim("log_softmax", input.dim(), _stacklevel)
    return _compute(torch.log_softmax, True, input, dim, dtype)


def _make(
    factory: Callable[..., Tensor], N: int, M: int | None = None, lead: tuple[int, ...] = (), behind: tuple[int, ...] = ()
) -> tuple[Tensor, int]:
    """A tensor whose N classes lie between the dimensions ``lead`` (or M) and ``behind``."""
    return factory(*(lead if M is None else (M,)), N, *behind), -1 - len(behind)


def _cost(log: bool) -> Callable[..., Cost]:
    def cost(N: int, M: int | None = None, lead: tuple[int, ...] = (), behind: tuple[int, ...] = ()) -> Cost:
        total = torch.Size((*(lead if M is None else (M,)), N, *behind)).numel()
        return Cost(15 * total, (17 if log else 4) * total, 2 * total, 3 * total)

    return cost


SAMPLES: list[dict[str, Any]] = [
    {"M": 0, "N": 5},
    {"M": 3, "N": 0},
    {"lead": (), "N": 1},
    {"M": 4, "N": 15},
    {"lead": (2, 3), "N": 17},
    {"lead": (2, 1, 3), "N": 31},
    {"lead": (2,), "N": 7, "behind": (5,)},
    {"lead": (), "N": 3, "behind": (2, 67)},
    {"lead": (2, 2), "N": 9, "behind": (1, 17)},
    {"M": 3, "N": 4133},
]
BENCH: list[dict[str, Any]] = [
    {"M": 1024, "N": 1000},
    {"M": 4096, "N": 4096},
    {"M": 512, "N": 32000},
    {"M": 16384, "N": 128},
    {"lead": (32,), "N": 64, "behind": (56, 56)},
]
TINY = [{"M": 64, "N": 10}, {"M": 16, "N": 64}]


def _register(call: Callable[..., Tensor], native: Callable[..., Tensor], log: bool) -> None:
    register(
        Op(
            name=call.__name__,
            module="softmax",
            call=call,
            reference=native,
            native=native,
            make=_make,
            samples=SAMPLES,
            bench=BENCH,
            quick=[BENCH[0], BENCH[2]],
            tiny=TINY,
            cost=_cost(log),
            raw=("softmax_forward", "softmax_backward"),
            supports=_unsupported,
        )
    )


_register(softmax, torch.softmax, False)
_register(log_softmax, torch.log_softmax, True)
