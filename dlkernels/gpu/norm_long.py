"""Rows too long for the registers of one program, normalised: norm.py's work in two looks at memory instead of one.

Each row is cut into shares, enough to give every multiprocessor some, and what is known of a share goes into a workspace [M, S, ...]. The
second kernel begins by combining the shares of its row, in a fixed order; that is a handful of numbers.

    kernel          a program looks at           and writes
    long_moments    a share of a row of x        its mean (as centre + off) and its sum of squared distances
    long_forward    the same                     y; the first share also mean and rstd
    long_sums       a share of a row of dy, x    its sums of g = dy w and of g x̂
    long_backward   BN columns of some rows      dx, and the sums of these columns over these rows
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from . import philox
from .launch import device_of, launch
from .norm import PER_SM, add_columns, columns, normalised, workspaces
from .philox import as_float64, factor, numbers

BN = 2048
WARPS = 8
MOST_SHARES = 64


@triton.jit
def long_moments(
    x, residual, seed, s, moments, N, S, SHARE, threshold, scale_bits, CENTRED: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """moments[m, share] = (centre, off, squares). Blocks are added as distances from the first one's mean (Chan, Golub, LeVeque 1979)."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    centre, off, squares = tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC)
    stop = tl.minimum((share + 1) * SHARE, N)
    for start in range(share * SHARE, stop, BN):
        n = start + tl.arange(0, BN)
        v = tl.load(x + m * N + n, n < stop, other=0.0).to(ACC)
        if seed is not None:
            v *= factor(numbers(tl.load(seed), m, start, BN), threshold, as_float64(scale_bits).to(ACC))
        if residual is not None:
            v = (v + tl.load(residual + m * N + n, n < stop, other=0.0).to(ACC)).to(s.dtype.element_ty).to(ACC)
            tl.store(s + m * N + n, v.to(s.dtype.element_ty), n < stop)
        if CENTRED:
            count = tl.minimum(stop - start, BN).to(ACC)
            before = (start - share * SHARE).to(ACC)
            mean = tl.sum(v, 0) / count
            centre = tl.where(before == 0, mean, centre)
            v = tl.where(n < stop, v - mean, 0.0)
            rest = tl.sum(v, 0) / count  # how far off the rounded mean is
            v = tl.where(n < stop, v - rest, 0.0)
            distance = (mean - centre) + rest - off
            squares += tl.sum(v * v, 0) + distance * distance * (before * count / (before + count))
            off += distance * (count / (before + count))
        else:
            squares += tl.sum(v * v, 0)
    to = moments + (m * S + share) * 3
    tl.store(to, centre)
    tl.store(to + 1, off)
    tl.store(to + 2, squares)


@triton.jit
def long_forward(
    x, weight, bias, y, mean, rstd, moments, M, N, S, SHARE, eps: tl.constexpr, SHARES: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """y of one share of one row from the moments of all S shares; SHARES >= S is a power of two."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, SHARES)
    of = moments + (m * S + i) * 3
    squares = tl.load(of + 2, i < S, other=0.0)
    if mean is not None:
        count = tl.where(i < S, tl.minimum(SHARE, N - i * SHARE), 0).to(ACC)
        centre = tl.load(moments + m * S * 3)
        distance = (tl.load(of, i < S, other=0.0) - centre) + tl.load(of + 1, i < S, other=0.0)
        distance = tl.where(i < S, distance, 0.0)
        off = tl.sum(count * distance, 0) / N
        squares += count * (distance - off) * (distance - off)
        high = centre + off
        low = (centre - high) + off
        if share == 0:
            tl.store(mean + m, high)
            tl.store(mean + M + m, low)
    r = 1.0 / tl.sqrt(tl.sum(squares, 0) / N + eps)
    if share == 0:
        tl.store(rstd + m, r)
    stop = tl.minimum((share + 1) * SHARE, N)
    for start in range(share * SHARE, stop, BN):
        n = start + tl.arange(0, BN)
        v = tl.load(x + m * N + n, n < stop, other=0.0).to(ACC)[None, :]
        if mean is not None:
            v = (v - high) - low
        out = v * r * columns(weight, n, N, 1.0, ACC) + columns(bias, n, N, 0.0, ACC)
        tl.store(y + (m * N + n)[None, :], out.to(y.dtype.element_ty), (n < stop)[None, :])


@triton.jit
def long_sums(dy, x, weight, mean, rstd, sums, M, N, S, SHARE, BN: tl.constexpr):
    """sums[m, share] = (Σ g, Σ g x̂) over one share of one row."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m, share = tl.program_id(0).to(tl.int64) + tl.arange(0, 1), tl.program_id(1).to(tl.int64)
    total, total_x = tl.zeros((1, BN), ACC), tl.zeros((1, BN), ACC)
    stop = tl.minimum((share + 1) * SHARE, N)
    for start in range(share * SHARE, stop, BN):
        n = start + tl.arange(0, BN)
        at, inside = m[:, None] * N + n[None, :], (n < stop)[None, :]
        g = tl.load(dy + at, inside, other=0.0).to(ACC) * columns(weight, n, N, 1.0, ACC)
        total += g
        total_x += tl.where(inside, g * normalised(tl.load(x + at, inside, other=0.0).to(ACC), mean, rstd, m, M), 0.0)
    to = sums + (m * S + share) * 2
    tl.store(to, tl.sum(total, 1))
    tl.store(to + 1, tl.sum(total_x, 1))


@triton.jit
def long_backward(
    dy, dsum, x, seed, weight, mean, rstd, sums, dx, dresidual, dweight, dbias, M, N, S, ROWS, threshold, scale_bits, SHARES: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of BN columns of rows [ROWS pid, ROWS (pid + 1)), and these columns of row pid of the workspaces [P, N]."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    pid = tl.program_id(1).to(tl.int64)
    inside = (n < N)[None, :]
    w = columns(weight, n, N, 1.0, ACC)
    dw, db = tl.zeros((1, BN), ACC), tl.zeros((1, BN), ACC)
    i = tl.arange(0, SHARES)
    for row in range(pid * ROWS, tl.minimum((pid + 1) * ROWS, M)):
        m = row + tl.arange(0, 1)
        at = m[:, None] * N + n[None, :]
        d = tl.load(dy + at, inside, other=0.0).to(ACC)
        normal = tl.where(inside, normalised(tl.load(x + at, inside, other=0.0).to(ACC), mean, rstd, m, M), 0.0)
        if dx is not None or dresidual is not None:
            of = sums + (row * S + i) * 2
            out = d * w - normal * (tl.sum(tl.load(of + 1, i < S, other=0.0), 0) / N)
            if mean is not None:
                out -= tl.sum(tl.load(of, i < S, other=0.0), 0) / N
            out *= tl.load(rstd + row)
            if dsum is not None:
                out += tl.load(dsum + at, inside, other=0.0).to(ACC)
            if dresidual is not None:
                tl.store(dresidual + at, out.to(dresidual.dtype.element_ty), inside)
            if seed is not None:
                f = factor(numbers(tl.load(seed), row, tl.program_id(0).to(tl.int64) * BN, BN), threshold, as_float64(scale_bits).to(ACC))
                out *= f[None, :]
            if dx is not None:
                tl.store(dx + at, out.to(dx.dtype.element_ty), inside)
        dw += d * normal
        db += d
    if dweight is not None:
        tl.store(dweight + pid * N + n, tl.reshape(dw, (BN,)), n < N)
    if dbias is not None:
        tl.store(dbias + pid * N + n, tl.reshape(db, (BN,)), n < N)


def shares(x: Tensor) -> tuple[int, int, int]:
    """Into how many shares a row is cut, how many numbers a share has, and the next power of two."""
    M, N = x.shape
    wanted = min(MOST_SHARES, max(1, 4 * device_of(x).processors // M))
    share = triton.cdiv(triton.cdiv(N, wanted), BN) * BN
    S = triton.cdiv(N, share)
    return S, share, triton.next_power_of_2(S)


def run_forward_long(
    x: Tensor, residual: Tensor | None, seed: Tensor | None, weight: Tensor | None, bias: Tensor | None, s: Tensor | None, y: Tensor,
    mean: Tensor | None, rstd: Tensor, p: float, eps: float,
) -> None:  # fmt: skip
    """Fill y, rstd, and s and mean where they are not None."""
    (M, N), (S, share, SHARES) = x.shape, shares(x)
    moments = x.new_empty((M, S, 3), dtype=statistics_dtype(x))
    args: tuple[Any, ...] = (x, residual, seed, s, moments, N, S, share, *philox.thresholds(p))
    launch(long_moments, (M, S), *args, CENTRED=mean is not None, BN=BN, warps=WARPS)
    args = (x if s is None else s, weight, bias, y, mean, rstd, moments, M, N, S, share)
    launch(long_forward, (M, S), *args, eps=eps, SHARES=SHARES, BN=BN, warps=WARPS)


def run_backward_long(
    dy: Tensor, dsum: Tensor | None, x: Tensor, seed: Tensor | None, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, p: float,
    dx: Tensor | None, dresidual: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    """Fill dx, dresidual, dweight and dbias, those that are not None."""
    (M, N), (S, share, SHARES) = x.shape, shares(x)
    sums = x.new_empty((M, S, 2), dtype=statistics_dtype(x))
    if dx is not None or dresidual is not None:
        launch(long_sums, (M, S), dy, x, weight, mean, rstd, sums, M, N, S, share, BN=BN, warps=WARPS)
    blocks = triton.cdiv(N, BN)
    rows = triton.cdiv(M, max(1, PER_SM * device_of(x).processors // blocks))
    P = triton.cdiv(M, rows)
    partial = workspaces(P, N, x, dweight, dbias)
    args = (dy, dsum, x, seed, weight, mean, rstd, sums, dx, dresidual, *partial, M, N, S, rows, *philox.thresholds(p))
    launch(long_backward, (blocks, P), *args, SHARES=SHARES, BN=BN, warps=WARPS)
    add_columns(partial, dweight, dbias)
