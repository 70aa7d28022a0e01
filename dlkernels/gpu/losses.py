"""Losses on the GPU: each program reads SHARE numbers of x and target, in steps of BLOCK, and writes the sum of their losses to a
workspace; one more program adds these in order. Nothing is added atomically, so every run gives the same bits. Without a reduction the
values are stored on the way. The backward writes dx and dtarget element by element. Memory decides, so there is nothing to tune.

A loss is a triple of functions of (x, t, p, c): the value, its derivatives by x and by the target t. p is the weight of positive targets,
c the number beta or delta. A kernel gets them as constants and has them inlined.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .launch import check_tensor, launch

BLOCK = 512  # more would spill the registers of a cross-entropy in float64
SHARE = 16 * BLOCK
NONE, MEAN, SUM = range(3)


@triton.jit
def mse(x, t, p, c: tl.constexpr):
    return (x - t) * (x - t)


@triton.jit
def mse_dx(x, t, p, c: tl.constexpr):
    return 2 * (x - t)


@triton.jit
def mse_dtarget(x, t, p, c: tl.constexpr):
    return 2 * (t - x)


@triton.jit
def l1(x, t, p, c: tl.constexpr):
    return tl.abs(x - t)


@triton.jit
def l1_dx(x, t, p, c: tl.constexpr):
    return tl.where(x > t, 1.0, tl.where(x < t, -1.0, 0.0))


@triton.jit
def l1_dtarget(x, t, p, c: tl.constexpr):
    return l1_dx(t, x, p, c)


@triton.jit
def smooth_l1(x, t, p, c: tl.constexpr):
    d = tl.abs(x - t)
    return tl.where(d < c, 0.5 * d * d / c, d - 0.5 * c)


@triton.jit
def smooth_l1_dx(x, t, p, c: tl.constexpr):
    d = x - t
    return tl.where(d >= c, 1.0, tl.where(d <= -c, -1.0, d / c))


@triton.jit
def smooth_l1_dtarget(x, t, p, c: tl.constexpr):
    return smooth_l1_dx(t, x, p, c)


@triton.jit
def huber(x, t, p, c: tl.constexpr):
    d = tl.abs(x - t)
    return tl.where(d <= c, 0.5 * d * d, c * (d - 0.5 * c))


@triton.jit
def huber_dx(x, t, p, c: tl.constexpr):
    d = x - t
    return tl.where(d >= c, c, tl.where(d <= -c, -c, d))


@triton.jit
def huber_dtarget(x, t, p, c: tl.constexpr):
    return huber_dx(t, x, p, c)


@triton.jit
def log1p(z):
    """log(1 + z) for -1 <= z <= 1: what rounding makes of u = 1 + z is undone by the factor z / (u - 1), whose difference is exact."""
    u = 1.0 + z
    return tl.where(u == 1.0, z, tl.log(u) * (z / (u - 1.0)))


@triton.jit
def bend(x):
    """log(1 + e^-|x|), the part of log sigmoid(x) = min(x, 0) - bend(x) that is not straight."""
    return log1p(tl.exp(-tl.abs(x)))


@triton.jit
def bce(x, t, p, c: tl.constexpr):
    """Arguments outside [0, 1] give NaN."""
    floor = tl.full(x.shape, -100.0, x.dtype)
    v = (t - 1.0) * tl.maximum(log1p(-x), floor) - t * tl.maximum(tl.log(x), floor)
    return tl.where((x >= 0) & (x <= 1) & (t >= 0) & (t <= 1), v, float("nan"))


@triton.jit
def bce_dx(x, t, p, c: tl.constexpr):
    return (x - t) / tl.maximum((1.0 - x) * x, tl.full(x.shape, 1e-12, x.dtype))


@triton.jit
def bce_dtarget(x, t, p, c: tl.constexpr):
    return log1p(-x) - tl.log(x)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def logits(x, t, p, c: tl.constexpr):
    return (1.0 - t) * x + (bend(x) - tl.where(x < 0, x, 0.0))


@triton.jit
def logits_dx(x, t, p, c: tl.constexpr):
    return sigmoid(x) - t


@triton.jit
def logits_dtarget(x, t, p, c: tl.constexpr):
    return -x


@triton.jit
def weighed_logits(x, t, p, c: tl.constexpr):
    return (1.0 - t) * x + ((p - 1.0) * t + 1.0) * (bend(x) - tl.where(x < 0, x, 0.0))


@triton.jit
def weighed_logits_dx(x, t, p, c: tl.constexpr):
    return (p * t + 1.0 - t) * sigmoid(x) - p * t


@triton.jit
def weighed_logits_dtarget(x, t, p, c: tl.constexpr):
    """log sigmoid(-x) - p log sigmoid(x)"""
    b = bend(x)
    return tl.where(x > 0, -x, 0.0) - b - p * (tl.where(x < 0, x, 0.0) - b)


@triton.jit
def losses_forward(x, target, weight, pos_weight, y, sums, outside, N, c: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
                   SHARE: tl.constexpr):  # fmt: skip
    """sums[i] = Σ w[n] VALUE(x[n], target[n]) over the i-th share; y[n], if there is one, its terms; outside[i]: how many are not finite
    because an argument of a cross-entropy is not in [0, 1]."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    start = tl.program_id(0).to(tl.int64) * SHARE
    acc = tl.zeros((BLOCK,), ACC)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for step in range(0, tl.minimum(N - start, SHARE), BLOCK):
        n = start + step + tl.arange(0, BLOCK)
        a, t = tl.load(x + n, n < N, 0.0).to(ACC), tl.load(target + n, n < N, 0.0).to(ACC)
        p = None if pos_weight is None else tl.load(pos_weight + n, n < N, 0.0).to(ACC)
        v = VALUE(a, t, p, c)
        if outside is not None:
            wrong += ((n < N) & (v != v)).to(tl.int32)
        if weight is not None:
            v *= tl.load(weight + n, n < N, 0.0).to(ACC)
        if y is not None:
            tl.store(y + n, v.to(y.dtype.element_ty), n < N)
        acc += tl.where(n < N, v, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(acc, 0))
    if outside is not None:
        tl.store(outside + tl.program_id(0), tl.sum(wrong, 0))


@triton.jit
def losses_add(sums, y, COUNT, count, BLOCK: tl.constexpr):
    """y = Σ sums[i] / count"""
    acc = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for start in range(0, COUNT, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        acc += tl.load(sums + i, i < COUNT, 0.0)
    tl.store(y, (tl.sum(acc, 0) / count).to(y.dtype.element_ty))


@triton.jit
def losses_backward(dy, x, target, weight, pos_weight, dx, dtarget, N, count, c: tl.constexpr, SLOPE_X: tl.constexpr,
                    SLOPE_TARGET: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dx[n] = g w[n] SLOPE_X(x[n], target[n]), dtarget likewise; g = dy[n] if EACH, else dy / count"""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, t = tl.load(x + n, n < N, 0.0).to(ACC), tl.load(target + n, n < N, 0.0).to(ACC)
    p = None if pos_weight is None else tl.load(pos_weight + n, n < N, 0.0).to(ACC)
    g = tl.load(dy + n, n < N, 0.0).to(ACC) if EACH else tl.load(dy).to(ACC) / count
    if weight is not None:
        g *= tl.load(weight + n, n < N, 0.0).to(ACC)
    if dx is not None:
        tl.store(dx + n, (g * SLOPE_X(a, t, p, c)).to(dx.dtype.element_ty), n < N)
    if dtarget is not None:
        tl.store(dtarget + n, (g * SLOPE_TARGET(a, t, p, c)).to(dtarget.dtype.element_ty), n < N)


# Position = the code of the loss in the op's schema; the last is for logits with a pos_weight.
LOSSES = (
    (mse, mse_dx, mse_dtarget), (l1, l1_dx, l1_dtarget), (smooth_l1, smooth_l1_dx, smooth_l1_dtarget), (huber, huber_dx, huber_dtarget),
    (bce, bce_dx, bce_dtarget), (logits, logits_dx, logits_dtarget),
    (weighed_logits, weighed_logits_dx, weighed_logits_dtarget),
)  # fmt: skip
SMOOTH_L1, HUBER, BCE, LOGITS = 2, 3, 4, 5


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: int, parameter: float, reduction: int
) -> Tensor:
    """Launcher of the forward kernels; shapes and errors as the op's contract says."""
    x, target, weight, pos_weight = _checked(x, target, weight, pos_weight, loss, parameter, reduction)
    N, shares = x.numel(), triton.cdiv(x.numel(), SHARE)
    y = x.new_empty(x.shape if reduction == NONE else ())
    sums = x.new_empty(shares, dtype=statistics_dtype(x))
    outside = x.new_empty(shares, dtype=torch.int32) if loss == BCE else None
    if N:
        launch(
            losses_forward, (shares,), x, target, weight, pos_weight, y if reduction == NONE else None, sums, outside, N, c=parameter,
            VALUE=_functions(loss, pos_weight)[0], BLOCK=BLOCK, SHARE=SHARE,
        )  # fmt: skip
        if outside is not None:  # as PyTorch's own: on a GPU the assertion fails when the kernel has run
            torch._assert_async(outside.sum() == 0, "binary_cross_entropy: all elements of input and target should be between 0 and 1")
    if reduction != NONE:
        launch(losses_add, (1,), sums, y, shares, N if reduction == MEAN else 1, BLOCK=BLOCK)
    return y


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: int, parameter: float, reduction: int,
    need_dx: bool, need_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Launcher of the backward kernel; shapes and errors as the op's contract says."""
    x, target, weight, pos_weight = _checked(x, target, weight, pos_weight, loss, parameter, reduction)
    check_tensor("dy", dy, x, tuple(x.shape) if reduction == NONE else ())
    dx, dtarget = (x.new_empty(x.shape) if need else None for need in (need_dx, need_dtarget))
    N = x.numel()
    if N and (need_dx or need_dtarget):
        _, slope_x, slope_target = _functions(loss, pos_weight)
        launch(
            losses_backward, (triton.cdiv(N, BLOCK),), dy.contiguous(), x, target, weight, pos_weight, dx, dtarget, N,
            N if reduction == MEAN else 1, c=parameter, SLOPE_X=slope_x, SLOPE_TARGET=slope_target, EACH=reduction == NONE, BLOCK=BLOCK,
        )  # fmt: skip
    return dx, dtarget


def _functions(loss: int, pos_weight: Tensor | None) -> tuple[Any, Any, Any]:
    return LOSSES[loss if loss != LOGITS or pos_weight is None else LOGITS + 1]


def _checked(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: int, parameter: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors, contiguous, or an error that names the argument."""
    if not 0 <= loss <= LOGITS:
        raise RuntimeError(f"loss must be a code from 0 to {LOGITS}, got {loss}")
    if not NONE <= reduction <= SUM:
        raise RuntimeError(f"reduction must be a code from {NONE} to {SUM}, got {reduction}")
    if loss in (SMOOTH_L1, HUBER) and not parameter > 0:
        name = "smooth_l1_loss: beta" if loss == SMOOTH_L1 else "huber_loss: delta"
        raise RuntimeError(f"{name} is {parameter}, needs a positive number")
    named = (("x", x), ("target", target), ("weight", weight), ("pos_weight", pos_weight))
    for name, t in named:
        if t is not None:
            check_tensor(name, t, x, tuple(x.shape))
    return tuple(t if t is None else t.contiguous() for _, t in named)  # type: ignore[return-value]


IMPLEMENTATIONS = {"losses_forward": forward, "losses_backward": backward}
EXAMPLES = {
    "losses_forward": lambda empty: (empty(1024, 1024), empty(1024, 1024), None, None, 5, 0.0, 1),
    "losses_backward": lambda empty: (empty(), empty(1024, 1024), empty(1024, 1024), None, None, 5, 0.0, 1, True, True),
}
