"""softmax and log_softmax on the GPU: a tile of rows, each held in registers from the one read to the one write.

    BR rows   ┌──────────────┐     D = 1: a row's numbers lie side by side, the rows N apart; few rows where N is large
              │ x[r, n]      │     D > 1: a row's numbers lie D apart, the rows of one (N, D) block side by side; so BR is at least a
              └──────────────┘            memory transaction wide, and no transposed copy is made
                 BN classes

Only the strides differ between the two, so one kernel serves both; Triton sees which of them is 1 and lays the threads out along it. A row
with more than LONGEST numbers does not fit the registers: it is read in blocks, once for the maximum and the sum (a larger maximum
rescales the sum) and once, mostly from the L2 cache, for the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import check_tensor, launch

LONGEST = 16384  # numbers of a row that stay in registers
TILE = 4096  # numbers of a tile where rows are short
BLOCK = 4096  # numbers of a long row that are read at a time
WIDE = 32  # neighbouring rows of a strided tile


class Cut(NamedTuple):
    """How [M, N, D] is cut: rows lie ``row`` numbers apart and a row's classes ``step``; ``blocks`` such sets lie ``block`` apart."""

    rows: int
    row: int
    step: int
    blocks: int
    block: int
    BR: int
    BN: int
    whole: bool

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.rows, self.BR), self.blocks

    @property
    def warps(self) -> int:
        return min(max(self.BR * self.BN // 512, 1), 16)  # 16 numbers a thread: 32 with their 64-bit offsets spill


def cut(M: int, N: int, D: int, longest: int = LONGEST, limit: int = TILE) -> Cut:
    """Rows longer than ``longest`` are read in blocks; a tile has about ``limit`` numbers where that is more than one row."""
    width = triton.next_power_of_2(N)
    if D == 1:
        whole = width <= longest
        BN = width if whole else BLOCK
        return Cut(M, N, 1, 1, 0, max(1, min(limit // BN, triton.next_power_of_2(M))), BN, whole)
    BR = min(WIDE, triton.next_power_of_2(D))
    whole = width * BR <= longest
    return Cut(D, 1, D, M, N * D, BR, width if whole else max(1, limit // BR), whole)


@triton.jit
def places(rows, row, step, block, BR: tl.constexpr, BN: tl.constexpr):
    """The row numbers r within this program's block, n = 0, 1, ... BN, the offsets of x[r, n], all int64, and the masks of r."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    n = tl.arange(0, BN).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * block + r[:, None] * row + n[None, :] * step
    return r, n, at, (r < rows)[:, None]


@triton.jit
def finite(top):
    """0 for -inf: while there is no larger number than -inf, exp(x - top) must be 0 and not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def normaliser(x, N, step, n, at, inside, ACC: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """top[r] = max_n x[r, n] and sum[r] = Σ_n exp(x[r, n] - top[r]), one block of n after another."""
    top = tl.full((BR,), float("-inf"), ACC)
    total = tl.zeros((BR,), ACC)
    for start in range(0, N, BN):
        value = tl.load(x + at, inside & (n < N - start)[None, :], other=float("-inf")).to(ACC)
        larger = tl.maximum(top, tl.max(value, axis=1))
        total = total * tl.exp(top - finite(larger)) + tl.sum(tl.exp(value - finite(larger)[:, None]), axis=1)
        top = larger
        at += tl.full((), BN, tl.int64) * step
    return top, total


@triton.jit
def softmax_forward(x, y, N, rows, row, step, block, LOG: tl.constexpr, WHOLE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """y[r, n] = exp(x[r, n] - top) / sum, or with LOG its logarithm; WHOLE where a row is one block."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    _, n, at, inside = places(rows, row, step, block, BR, BN)
    if WHOLE:
        mask = inside & (n < N)[None, :]
        value = tl.load(x + at, mask, other=float("-inf")).to(ACC)
        value -= tl.max(value, axis=1)[:, None]
        e = tl.exp(value)
        total = tl.sum(e, axis=1)[:, None]
        result = value - tl.log(total) if LOG else e / total
        tl.store(y + at, result.to(y.dtype.element_ty), mask)
    else:
        top, total = normaliser(x, N, step, n, at, inside, ACC, BR, BN)
        for start in range(0, N, BN):
            mask = inside & (n < N - start)[None, :]
            value = tl.load(x + at, mask, other=0.0).to(ACC) - top[:, None]
            result = value - tl.log(total)[:, None] if LOG else tl.exp(value) / total[:, None]
            tl.store(y + at, result.to(y.dtype.element_ty), mask)
            at += tl.full((), BN, tl.int64) * step


@triton.jit
def gradient(dy, y, total, LOG: tl.constexpr):
    return dy - tl.exp(y) * total if LOG else y * (dy - total)


@triton.jit
def softmax_backward(dy, y, dx, N, rows, row, step, block, LOG: tl.constexpr, WHOLE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """dx[r, n] = y (dy - Σ_n dy y), or with LOG dy - exp(y) Σ_n dy."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    _, n, at, inside = places(rows, row, step, block, BR, BN)
    if WHOLE:
        mask = inside & (n < N)[None, :]
        kept, slope = tl.load(y + at, mask, other=0.0).to(ACC), tl.load(dy + at, mask, other=0.0).to(ACC)
        total = tl.sum(slope if LOG else slope * kept, axis=1)[:, None]
        tl.store(dx + at, gradient(slope, kept, total, LOG).to(DTYPE), mask)
    else:
        sums = tl.zeros((BR,), ACC)
        there = at
        for start in range(0, N, BN):
            mask = inside & (n < N - start)[None, :]
            kept, slope = tl.load(y + there, mask, other=0.0).to(ACC), tl.load(dy + there, mask, other=0.0).to(ACC)
            sums += tl.sum(slope if LOG else slope * kept, axis=1)
            there += tl.full((), BN, tl.int64) * step
        for start in range(0, N, BN):
            mask = inside & (n < N - start)[None, :]
            kept, slope = tl.load(y + at, mask, other=0.0).to(ACC), tl.load(dy + at, mask, other=0.0).to(ACC)
            tl.store(dx + at, gradient(slope, kept, sums[:, None], LOG).to(DTYPE), mask)
            at += tl.full((), BN, tl.int64) * step


def classes(shape: tuple[int, ...], dim: int) -> tuple[int, int, int]:
    """M, N, D: how many sets of N classes, D numbers apart, a contiguous tensor holds along ``dim``; IndexError where it has no ``dim``."""
    if not 0 <= dim < max(len(shape), 1):
        raise IndexError(f"dim is {dim}, needs 0 to {max(len(shape), 1) - 1}")
    return math.prod(shape[:dim]), math.prod(shape[dim : dim + 1]), math.prod(shape[dim + 1 :])


def forward(x: Tensor, dim: int, log: bool) -> Tensor:
    """Launcher of ``softmax_forward``."""
    check_tensor("x", x, x, tuple(x.shape))
    M, N, D = classes(tuple(x.shape), dim)
    y = x.new_empty(x.shape)
    if y.numel():
        c = cut(M, N, D)
        launch(
            softmax_forward, c.grid, x.contiguous(), y, N, c.rows, c.row, c.step, c.block, LOG=log, WHOLE=c.whole, BR=c.BR, BN=c.BN,
            warps=c.warps,
        )  # fmt: skip
    return y


def backward(dy: Tensor, y: Tensor, dim: int, log: bool) -> Tensor:
    """Launcher of ``softmax_backward``; a tile holds two numbers where the forward's holds one."""
    check_tensor("y", y, y, tuple(y.shape))
    check_tensor("dy", dy, y, tuple(y.shape))
    M, N, D = classes(tuple(y.shape), dim)
    dx = y.new_empty(y.shape)
    if dx.numel():
        c = cut(M, N, D, LONGEST // 2)
        launch(
            softmax_backward, c.grid, dy.contiguous(), y.contiguous(), dx, N, c.rows, c.row, c.step, c.block, LOG=log, WHOLE=c.whole,
            BR=c.BR, BN=c.BN, warps=c.warps,
        )  # fmt: skip
    return dx


IMPLEMENTATIONS = {"softmax_forward": forward, "softmax_backward": backward}
EXAMPLES = {
    "softmax_forward": lambda empty: (empty(4096, 4096), 1, False),
    "softmax_backward": lambda empty: (empty(4096, 4096), empty(4096, 4096), 1, False),
}
