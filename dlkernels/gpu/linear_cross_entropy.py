"""linear_cross_entropy on the GPU: chunks of rows go through the product of linear.py, the loss of cross_entropy.py, and two more products.

    logits = x Wᵀ + b        [rows, N] in float32, a workspace that every chunk uses again
    loss, dz                 one kernel each; dz in the inputs' dtype, for the tensor cores
    dx     = dz W            written once, in float32
    dW    += dzᵀ x           each chunk's product goes to a buffer in float32, which `add` adds up: the sum is never rounded to a half type

WORKSPACE bounds the logits of a chunk: large chunks keep the products efficient, and dW is read and written once a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .config import choose, kind_of
from .cross_entropy import REDUCE, blocks, check_labels, label_of, reduce, run_backward, run_forward, sum_of
from .launch import check_tensor, device_of, launch, precision
from .linear import run_activation, run_dweight, run_dx
from .linear import run_forward as linear_forward

WORKSPACE = 256 << 20  # bytes
BLOCK = 1024


@triton.jit
def add(total, part, SIZE, BLOCK: tl.constexpr):
    """total += part"""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + e, tl.load(total + e, e < SIZE) + tl.load(part + e, e < SIZE), e < SIZE)


@triton.jit
def scale(sums, dy, out, SIZE, BLOCK: tl.constexpr):
    """out = dy sums, rounded to out's dtype; dy is one number, or None for 1"""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(sums + e, e < SIZE)
    if dy is not None:
        value *= tl.load(dy)
    tl.store(out + e, value.to(out.dtype.element_ty), e < SIZE)


@triton.jit
def mean_slopes(target, weight, slopes, N, ROWS, ignored, BLOCK: tl.constexpr):
    """slopes[r] = 1 / Σ weight[label], over the labels that count: what every row's loss weighs in their mean."""
    ACC: tl.constexpr = slopes.dtype.element_ty
    r = tl.arange(0, BLOCK)
    mass = tl.zeros((BLOCK,), ACC)
    for start in range(0, ROWS, BLOCK):
        mass += label_of(target, weight, start + r, r < ROWS - start, N, ignored, 0.0, ACC)[3]
    slope = tl.zeros((BLOCK,), ACC) + 1.0 / tl.sum(mass, axis=0)
    for start in range(0, ROWS, BLOCK):
        tl.store(slopes + start + r, slope, r < ROWS - start)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, dy: Tensor | None, reduction: int,
    ignore_index: int, label_smoothing: float, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Launcher of the loss and, where asked for, its gradients; shapes and errors as the op's contract says."""
    M, K, N = _check(x, weight, bias, target, class_weight, dy, reduction)
    if (need_dx or need_dweight or need_dbias) and reduction == 0 and dy is None:
        raise RuntimeError("dy is None, needs the gradient of every loss")
    wide = statistics_dtype(x)
    dx = x.new_empty(M, K, dtype=wide) if need_dx else None
    dweight = x.new_zeros(N, K, dtype=wide) if need_dweight else None
    dbias = x.new_zeros(N, dtype=wide) if need_dbias else None
    losses, masses, slopes = (x.new_empty(M, dtype=wide) for _ in range(3))
    target, bias = target.contiguous(), None if bias is None else bias.contiguous()
    class_weight = None if class_weight is None else class_weight.to(wide).contiguous()
    if reduction == 0:
        slopes = slopes if dy is None else dy.contiguous()
    elif reduction == 1:
        launch(mean_slopes, (1,), target, class_weight, slopes, N, M, ignore_index, BLOCK=BLOCK)
    else:
        slopes.fill_(1)
    rows = max(1, min(M, WORKSPACE // (N * wide.itemsize)))
    z, total = x.new_empty(rows, N, dtype=wide), sum_of(class_weight, wide)
    for m in range(0, M, rows):
        part = slice(m, min(m + rows, M))
        count = part.stop - m
        kept, c = z.new_ones(2 * count + 1), blocks(count, N, 1)
        run_product(x[part], weight, bias, z[:count])
        run_forward(c, z, target[part], class_weight, losses[part], masses[part], kept, N, ignore_index, label_smoothing)
        if need_dx or need_dweight or need_dbias:
            dz = z[:count] if x.dtype == wide else x.new_empty(count, N)
            run_backward(c, slopes[part], z, target[part], class_weight, total, kept, dz, None, N, ignore_index, label_smoothing)
            run_gradients(dz, x[part], weight, None if dx is None else dx[part], dweight, dbias)
    if reduction == 0:
        return losses, dx, dweight, dbias
    loss, divisor = losses.new_empty(()), losses.new_empty(1)
    launch(reduce, (1,), losses, masses, divisor, loss, M, MEAN=reduction == 1, BLOCK=REDUCE)
    return loss, dx, dweight, dbias


def run_product(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
    """z = x Wᵀ + b"""
    (M, K), N = x.shape, weight.shape[0]
    linear_forward(choose("forward", kind_of(x.dtype, precision(x.dtype)), M, N, K, device_of(x)), x, weight, bias, z, None)


def run_gradients(dz: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> None:
    """dx = dz W, dweight += dzᵀ x, dbias += Σ dz, whichever are not None."""
    (M, K), N, kind, device = x.shape, weight.shape[0], kind_of(x.dtype, precision(x.dtype)), device_of(x)
    if dx is not None and dx.numel():
        run_dx(choose("dx", kind, M, K, N, device), dz, None, weight, dx)
    if dweight is not None and dweight.numel():
        part = torch.empty_like(dweight)
        run_dweight(choose("dweight", kind, N, K, M, device), dz, None, x, part, None)
        launch(add, (triton.cdiv(part.numel(), BLOCK),), dweight, part, part.numel(), BLOCK=BLOCK)
    if dbias is not None:
        part = torch.empty_like(dbias)
        run_activation(dz, None, None, part, 0, 0.0)
        launch(add, (triton.cdiv(part.numel(), BLOCK),), dbias, part, part.numel(), BLOCK=BLOCK)


def backward(
    dy: Tensor | None, x: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launcher of ``scale``: the forward's gradients times dy, in the dtype of ``x``."""
    check_tensor("x", x, x, tuple(x.shape))
    like = x.new_empty(0, dtype=statistics_dtype(x))
    if dy is not None:
        check_tensor("dy", dy, like, ())

    def scaled(name: str, sums: Tensor | None) -> Tensor | None:
        if sums is None:
            return None
        check_tensor(name, sums, like, tuple(sums.shape))
        out = x.new_empty(sums.shape)
        if out.numel():
            launch(scale, (triton.cdiv(out.numel(), BLOCK),), sums.contiguous(), dy, out, out.numel(), BLOCK=BLOCK)
        return out

    return scaled("dx", dx), scaled("dweight", dweight), scaled("dbias", dbias)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, dy: Tensor | None, reduction: int
) -> tuple[int, int, int]:
    """M, K, N of the product, or an error that names the argument."""
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] == 0 or not 0 <= reduction <= 2:
        raise RuntimeError(
            f"x and weight must be (M, K) and (N, K) with N > 0, reduction 0 to 2; got {tuple(x.shape)}, {tuple(weight.shape)}, {reduction}"
        )
    (M, K), N = x.shape, weight.shape[0]
    check_tensor("x", x, x, (M, K))
    check_tensor("weight", weight, x, (N, K))
    for name, t in (("bias", bias), ("class_weight", class_weight)):
        if t is not None:
            check_tensor(name, t, x, (N,))
    check_labels("target", target, x, (M,))
    if dy is not None:
        check_tensor("dy", dy, x.new_empty(0, dtype=statistics_dtype(x)), (M,))
    return M, K, N


IMPLEMENTATIONS = {"linear_cross_entropy_forward": forward, "linear_cross_entropy_backward": backward}
EXAMPLES = {
    "linear_cross_entropy_forward": lambda empty: (
        empty(2048, 1024), empty(32768, 1024), None, empty(2048).long(), None, None, 1, -100, 0.0, True, True, False,
    ),
    "linear_cross_entropy_backward": lambda empty: (empty().float(), empty(2048, 1024), empty(2048, 1024).float(), None, None),
}  # fmt: skip
