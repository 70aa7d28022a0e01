"""nll_loss on the GPU: one program per BLOCK rows, one number of each read; the gradient is written whole, zeros and labels at once.

A label that is no class is never used as an address: its row's loss is NaN, and so are the numbers of its gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .cross_entropy import REDUCE, check, label_of, reduce, rows_of
from .launch import check_tensor, launch
from .softmax import BLOCK, cut, places

ROWS_EACH = 256


@triton.jit
def nll_loss_forward(x, target, weight, losses, masses, N, D, ROWS, ignored, BLOCK: tl.constexpr):
    """losses[r] = -w[label] x[r, label], masses[r] = w[label]; row r lies at r // D, r % D."""
    ACC: tl.constexpr = losses.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label, counts, valid, w, _ = label_of(target, weight, r, r < ROWS, N, ignored, 0.0, ACC)
    value = tl.load(x + (r // D * N + label) * D + r % D, valid, other=0.0).to(ACC)
    tl.store(losses + r, tl.where(valid, -w * value, tl.where(counts, float("nan"), 0.0)), r < ROWS)
    tl.store(masses + r, w, r < ROWS)


@triton.jit
def nll_loss_backward(dy, target, weight, divisor, dx, N, dy_row, ignored, rows, row, step, block, BR: tl.constexpr, BN: tl.constexpr):
    """dx[r, n] = -g w[n] where n is the label, else 0."""
    ACC: tl.constexpr = divisor.dtype.element_ty
    r, n, at, inside = places(rows, row, step, block, BR, BN)
    there = tl.program_id(1).to(tl.int64) * rows + r
    label, counts, valid, w, _ = label_of(target, weight, there, r < rows, N, ignored, 0.0, ACC)
    g = tl.load(dy + there * dy_row, r < rows, other=0.0).to(ACC) / tl.load(divisor)
    elsewhere = tl.where(counts & ~valid, float("nan"), 0.0)[:, None]
    for start in range(0, N, BN):
        value = tl.where((label[:, None] == (start + n)[None, :]) & valid[:, None], (-g * w)[:, None], elsewhere)
        tl.store(dx + at, value.to(dx.dtype.element_ty), inside & (n < N - start)[None, :])
        at += tl.full((), BN, tl.int64) * step


def forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Launcher of ``nll_loss_forward`` and ``reduce``; shapes and errors as the op's contract says."""
    M, N, D = _check(x, target, weight, reduction)
    R = M * D
    divisor, loss = x.new_empty(1, dtype=statistics_dtype(x)), x.new_empty(())
    losses, masses = divisor.new_empty(R), divisor.new_empty(R)
    if R:
        launch(
            nll_loss_forward, (triton.cdiv(R, ROWS_EACH),), x.contiguous(), target.contiguous(),
            None if weight is None else weight.contiguous(), losses, masses, N, D, R, ignore_index, BLOCK=ROWS_EACH,
        )  # fmt: skip
    launch(reduce, (1,), losses, masses, divisor, loss, R, MEAN=reduction == 1, BLOCK=REDUCE)
    return (loss if reduction else losses.to(x.dtype).view(rows_of(x))), divisor


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, divisor: Tensor, reduction: int, ignore_index: int
) -> Tensor:
    """Launcher of ``nll_loss_backward``; shapes and errors as the op's contract says."""
    M, N, D = _check(x, target, weight, reduction)
    check_tensor("dy", dy, x, () if reduction else rows_of(x))
    check_tensor("divisor", divisor, x.new_empty(0, dtype=statistics_dtype(x)), (1,))
    dx = x.new_empty(x.shape)
    if dx.numel():
        c = cut(M, N, D, longest=BLOCK)
        launch(
            nll_loss_backward, c.grid, dy.contiguous(), target.contiguous(), None if weight is None else weight.contiguous(), divisor, dx,
            N, 0 if reduction else 1, ignore_index, c.rows, c.row, c.step, c.block, BR=c.BR, BN=c.BN, warps=c.warps,
        )  # fmt: skip
    return dx


def _check(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> tuple[int, int, int]:
    if target.dtype != torch.int64:
        raise RuntimeError(f"target must be int64, got {target.dtype}")
    return check(x, target, weight, reduction)


IMPLEMENTATIONS = {"nll_loss_forward": forward, "nll_loss_backward": backward}
EXAMPLES = {
    "nll_loss_forward": lambda empty: (empty(4096, 1024), empty(4096).long(), None, 1, -100),
    "nll_loss_backward": lambda empty: (empty(), empty(4096, 1024), empty(4096).long(), None, empty(1).float(), 1, -100),
}
