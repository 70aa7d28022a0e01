"""Rows normalised on the GPU: y = (s - mean) rstd w + b with s = x, or s = f x + residual and f dropout's factor. These are the kernels of
layer_norm, rms_norm, add_layer_norm and dropout_add_layer_norm.

A program holds BM whole rows in registers: memory is read once and written once. Short rows go several to a program. The backward starts
as many programs as the GPU runs at a time; each loops over its share of the rows, with the sums of their columns in registers, and writes
these once, into a workspace [P, N] that `column_sums` adds in order. So dx, dweight and dbias cost one look at dy and x, and the same bits
come out every time. Rows too long for registers are cut into shares, see norm_long.py.

A mean of None says that rows are not centred (rms_norm). Else it is [2, M]: high, and what rounding cut off it. residual and s, seed, dsum,
weight, bias and every gradient may be None; without a seed nothing is dropped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from . import philox
from .launch import check_parameters, check_tensor, device_of, launch
from .philox import as_float64, factor, words

# The longest row that a program holds: forward, backward, and backward with dropout.
IN_REGISTERS = {torch.float32: (16384, 8192, 4096), torch.float64: (8192, 2048, 1024)}
TILE = 2048  # numbers that a program holds at least, in several rows if need be
PER_SM = 2  # programs of the backward on each multiprocessor


@triton.jit
def normalised(s, mean, rstd, m, M):
    """x̂ of a tile s [BM, BN] of rows m; rows from M on are 0 or meaningless."""
    r = tl.load(rstd + m, m < M, other=0.0)[:, None]
    if mean is not None:
        s = (s - tl.load(mean + m, m < M, other=0.0)[:, None]) - tl.load(mean + M + m, m < M, other=0.0)[:, None]
    return s * r


@triton.jit
def columns(p, n, N, otherwise: tl.constexpr, ACC: tl.constexpr):
    """weight or bias as a row [1, BN]; ``otherwise`` where there is none."""
    if p is None:
        return tl.full((1, n.shape[0]), otherwise, ACC)
    return tl.load(p + n, n < N, other=0.0).to(ACC)[None, :]


@triton.jit
def factors(seed, m, threshold, scale, BN: tl.constexpr):
    """Dropout's factors of columns 0 .. BN - 1 of rows ``m``: [BM, BN]. A counter's four words are numbers 16 columns apart."""
    q = tl.zeros((m.shape[0], BN // 4), tl.int64) + tl.arange(0, BN // 4)[None, :]
    w0, w1, w2, w3 = words(tl.load(seed), m[:, None], q)
    lanes = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (m.shape[0], BN // 64, 16, 4))
    return factor(tl.reshape(tl.trans(lanes, (0, 1, 3, 2)), (m.shape[0], BN)), threshold, scale)


@triton.jit
def norm_forward(
    x, residual, seed, weight, bias, s, y, mean, rstd, M, N, threshold, scale_bits, eps: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """y, and s, mean and rstd where they are not None, of rows [BM pid, BM (pid + 1)); BN >= N."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    v = tl.load(x + at, inside, other=0.0).to(ACC)
    if seed is not None:
        v *= factors(seed, m, threshold, as_float64(scale_bits).to(ACC), BN)
    if residual is not None:
        v = (v + tl.load(residual + at, inside, other=0.0).to(ACC)).to(s.dtype.element_ty).to(ACC)
        tl.store(s + at, v.to(s.dtype.element_ty), inside)
    if mean is not None:
        centre = tl.sum(v, 1) / N
        v = tl.where(inside, v - centre[:, None], 0.0)
        off = tl.sum(v, 1) / N  # how far off the rounded mean is
        v = tl.where(inside, v - off[:, None], 0.0)
        high = centre + off
        tl.store(mean + m, high, m < M)
        tl.store(mean + M + m, (centre - high) + off, m < M)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / N + eps)
    tl.store(rstd + m, r, m < M)
    out = v * r[:, None] * columns(weight, n, N, 1.0, ACC) + columns(bias, n, N, 0.0, ACC)
    tl.store(y + at, out.to(y.dtype.element_ty), inside)


@triton.jit
def norm_backward(
    dy, dsum, x, seed, weight, mean, rstd, dx, dresidual, dweight, dbias, M, N, SHARE, threshold, scale_bits, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of rows [SHARE pid, SHARE (pid + 1)), and row pid of the workspaces dweight and dbias [P, N]; BN >= N.

    dresidual = rstd (g - c1 - x̂ c2) + dsum with g = dy w, c1 the mean of g, c2 the mean of g x̂; dx = f dresidual."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    w = columns(weight, n, N, 1.0, ACC)
    dw, db = tl.zeros((BM, BN), ACC), tl.zeros((BM, BN), ACC)
    for start in range(pid * SHARE, tl.minimum((pid + 1) * SHARE, M), BM):
        m = start + tl.arange(0, BM)
        at = m[:, None] * N + n[None, :]
        inside = (m < M)[:, None] & (n < N)[None, :]
        d = tl.load(dy + at, inside, other=0.0).to(ACC)
        normal = tl.where(inside, normalised(tl.load(x + at, inside, other=0.0).to(ACC), mean, rstd, m, M), 0.0)
        if dx is not None or dresidual is not None:
            g = d * w
            out = g - normal * (tl.sum(g * normal, 1) / N)[:, None]
            if mean is not None:
                out -= (tl.sum(g, 1) / N)[:, None]
            out *= tl.load(rstd + m, m < M, other=0.0)[:, None]
            if dsum is not None:
                out += tl.load(dsum + at, inside, other=0.0).to(ACC)
            if dresidual is not None:
                tl.store(dresidual + at, out.to(dresidual.dtype.element_ty), inside)
            if seed is not None:
                out *= factors(seed, m, threshold, as_float64(scale_bits).to(ACC), BN)
            if dx is not None:
                tl.store(dx + at, out.to(dx.dtype.element_ty), inside)
        dw += d * normal
        db += d
    if dweight is not None:
        tl.store(dweight + pid * N + n, tl.sum(dw, 0), n < N)
    if dbias is not None:
        tl.store(dbias + pid * N + n, tl.sum(db, 0), n < N)


@triton.jit
def column_sums(partial_weight, partial_bias, dweight, dbias, P, N, BP: tl.constexpr, BN: tl.constexpr):
    """dweight[n] = Σ_p partial_weight[p, n], dbias likewise; either pair may be None. The order is fixed."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    if dweight is not None:
        tl.store(dweight + n, one_sum(partial_weight, n, P, N, BP, BN).to(dweight.dtype.element_ty), n < N)
    if dbias is not None:
        tl.store(dbias + n, one_sum(partial_bias, n, P, N, BP, BN).to(dbias.dtype.element_ty), n < N)


@triton.jit
def one_sum(partial, n, P, N, BP: tl.constexpr, BN: tl.constexpr):
    total = tl.zeros((BP, BN), partial.dtype.element_ty)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        total += tl.load(partial + p[:, None].to(tl.int64) * N + n[None, :], (p < P)[:, None] & (n < N)[None, :], other=0.0)
    return tl.sum(total, 0)


def tile(x: Tensor, bytes_of_thread: int) -> tuple[int, int, int]:
    """Rows and columns that a program holds, and its warps, so that a thread has at most so many bytes of the tile where that can be."""
    N = x.shape[1]
    BN = max(64, triton.next_power_of_2(N))  # dropout's numbers come 64 at a time
    BM = max(1, TILE // BN)
    return BM, BN, min(32, max(4, statistics_dtype(x).itemsize * BM * BN // (32 * bytes_of_thread)))


def is_long(x: Tensor, kind: int) -> bool:
    return x.shape[1] > IN_REGISTERS[statistics_dtype(x)][kind]


def run_forward(
    x: Tensor, residual: Tensor | None, seed: Tensor | None, weight: Tensor | None, bias: Tensor | None, p: float, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, the sum where there is a residual, mean where rows are centred, rstd."""
    (M, N), sums = x.shape, statistics_dtype(x)
    y, s = x.new_empty(M, N), None if residual is None else x.new_empty(M, N)
    mean, rstd = x.new_empty((2, M), dtype=sums) if centred else None, x.new_empty(M, dtype=sums)
    x, residual, weight, bias = contiguous(x, residual, weight, bias)  # type: ignore[assignment]
    if N == 0:
        return y, s, None if mean is None else mean.zero_(), rstd.zero_()
    if M and is_long(x, 0):
        from .norm_long import run_forward_long

        run_forward_long(x, residual, seed, weight, bias, s, y, mean, rstd, p, eps)
    elif M:
        BM, BN, warps = tile(x, 64)
        args = (x, residual, seed, weight, bias, s, y, mean, rstd, M, N, *philox.thresholds(p))
        launch(norm_forward, (triton.cdiv(M, BM),), *args, eps=eps, BM=BM, BN=BN, warps=warps)
    return y, s, mean, rstd


def run_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, seed: Tensor | None, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, p: float,
    need_dx: bool, need_dresidual: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dresidual, dweight, dbias, those that are needed; without a seed dx and dresidual are the same numbers."""
    (M, N), parameter = x.shape, x if weight is None else weight
    dx, dresidual = (x.new_empty(M, N) if need else None for need in (need_dx, need_dresidual))
    dweight, dbias = (parameter.new_empty(N) if need else None for need in (need_dweight, need_dbias))
    results = dx, dresidual, dweight, dbias
    if M * N == 0:
        return tuple(t if t is None else t.zero_() for t in results)
    dy, dsum, x, weight, mean, rstd = contiguous(dy, dsum, x, weight, mean, rstd)  # type: ignore[assignment]
    if is_long(x, 1 if seed is None else 2):
        from .norm_long import run_backward_long

        run_backward_long(dy, dsum, x, seed, weight, mean, rstd, p, *results)
        return results
    BM, BN, warps = tile(x, 32 if seed is None else 16)
    share = triton.cdiv(triton.cdiv(M, PER_SM * device_of(x).processors), BM) * BM
    P = triton.cdiv(M, share)
    partial = workspaces(P, N, x, dweight, dbias)
    args = (dy, dsum, x, seed, weight, mean, rstd, dx, dresidual, *partial, M, N, share, *philox.thresholds(p))
    launch(norm_backward, (P,), *args, BM=BM, BN=BN, warps=warps)
    add_columns(partial, dweight, dbias)
    return results


def workspaces(P: int, N: int, x: Tensor, *results: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else x.new_empty((P, N), dtype=statistics_dtype(x)) for t in results]


def add_columns(partial: list[Tensor | None], dweight: Tensor | None, dbias: Tensor | None) -> None:
    first = next((t for t in partial if t is not None), None)
    if first is not None:
        P, N = first.shape
        launch(column_sums, (triton.cdiv(N, 32),), *partial, dweight, dbias, P, N, BP=32, BN=32)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def check_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, name: str = "x") -> None:
    """Require x [M, N], and [N] of each parameter: of x's dtype, or both float32 beside a half type."""
    if x.dim() != 2:
        raise RuntimeError(f"{name} must have 2 dimensions, got {x.dim()}")
    check_tensor(name, x, x, tuple(x.shape))
    check_parameters(x, weight=weight, bias=bias)


def check_statistics(x: Tensor, mean: Tensor | None, rstd: Tensor) -> None:
    """Require mean [2, M] or None, and rstd [M], in the dtype of sums over x."""
    like = torch.empty(0, dtype=statistics_dtype(x), device=x.device)
    if mean is not None:
        check_tensor("mean", mean, like, (2, x.shape[0]))
    check_tensor("rstd", rstd, like, (x.shape[0],))
