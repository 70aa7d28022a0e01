"""layer_norm and rms_norm on the GPU, alone or behind a sum: y = (s - mean) rstd w + b with s = x, or s = x + residual.

A program holds BM whole rows in registers: memory is read once and written once. Short rows go several to a program. The backward starts
as many programs as the GPU runs at a time; each loops over its share of the rows, with the sums of their columns in registers, and writes
these once, into a workspace [P, N] that `column_sums` adds in order. So dx, dweight and dbias cost one look at dy and x, and the same bits
come out every time. Rows too long for registers are cut into shares, see norm_long.py.

A mean of None says that rows are not centred (rms_norm). Else it is [2, M]: high, and what rounding cut off it. residual, s, dsum, weight,
bias and every gradient may be None.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_tensor, device_of, launch

IN_REGISTERS = {torch.float32: (16384, 8192), torch.float64: (8192, 2048)}  # the longest row a program holds, forward and backward
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
def layer_norm_forward(
    x, residual, weight, bias, s, y, mean, rstd, M, N, eps: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """y, and s, mean and rstd where they are not None, of rows [BM pid, BM (pid + 1)); BN >= N."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    v = tl.load(x + at, inside, other=0.0).to(ACC)
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
def layer_norm_backward(
    dy, dsum, x, weight, mean, rstd, dx, dweight, dbias, M, N, SHARE, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """dx of rows [SHARE pid, SHARE (pid + 1)), and row pid of the workspaces dweight and dbias [P, N]; BN >= N.

    dx = rstd (g - c1 - x̂ c2) + dsum with g = dy w, c1 the mean of g, c2 the mean of g x̂."""
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
        if dx is not None:
            g = d * w
            out = g - normal * (tl.sum(g * normal, 1) / N)[:, None]
            if mean is not None:
                out -= (tl.sum(g, 1) / N)[:, None]
            out *= tl.load(rstd + m, m < M, other=0.0)[:, None]
            if dsum is not None:
                out += tl.load(dsum + at, inside, other=0.0).to(ACC)
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
        total += tl.load(partial + p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :], other=0.0)
    return tl.sum(total, 0)


def tile(x: Tensor, bytes_of_thread: int) -> tuple[int, int, int]:
    """Rows and columns that a program holds, and its warps, so that a thread has at most so many bytes of the tile where that can be."""
    N = x.shape[1]
    BN = max(16, triton.next_power_of_2(N))
    BM = max(1, TILE // BN)
    return BM, BN, min(32, max(4, sums_dtype(x).itemsize * BM * BN // (32 * bytes_of_thread)))


def is_long(x: Tensor, backward: bool) -> bool:
    return x.shape[1] > IN_REGISTERS[sums_dtype(x)][backward]


def sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launcher of ``layer_norm_forward``; shapes and errors as the op's contract says."""
    check_rows(x, weight, bias)
    y, _, mean, rstd = run_forward(x, None, weight, bias, eps, centred)
    return y, mean, rstd


def run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, the sum where there is a residual, mean where rows are centred, rstd."""
    (M, N), sums = x.shape, sums_dtype(x)
    y, s = x.new_empty(M, N), None if residual is None else x.new_empty(M, N)
    mean, rstd = x.new_empty((2, M), dtype=sums) if centred else None, x.new_empty(M, dtype=sums)
    x, residual, weight, bias = contiguous(x, residual, weight, bias)  # type: ignore[assignment]
    if N == 0:
        return y, s, None if mean is None else mean.zero_(), rstd.zero_()
    if M and is_long(x, backward=False):
        from .norm_long import run_forward_long

        run_forward_long(x, residual, weight, bias, s, y, mean, rstd, eps)
    elif M:
        BM, BN, warps = tile(x, 64)
        args = (x, residual, weight, bias, s, y, mean, rstd, M, N)
        launch(layer_norm_forward, (triton.cdiv(M, BM),), *args, eps=eps, BM=BM, BN=BN, warps=warps)
    return y, s, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launcher of ``layer_norm_backward``; shapes and errors as the op's contract says."""
    check_rows(x, weight, None)
    check_tensor("dy", dy, x, tuple(x.shape))
    check_statistics(x, mean, rstd)
    return run_backward(dy, None, x, weight, mean, rstd, need_dx, need_dweight, need_dbias)


def run_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, need_dx: bool,
    need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx + dsum, dweight, dbias, those that are needed."""
    (M, N), parameter = x.shape, x if weight is None else weight
    dx = x.new_empty(M, N) if need_dx else None
    dweight, dbias = (parameter.new_empty(N) if need else None for need in (need_dweight, need_dbias))
    if M * N == 0:
        return dx, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()
    dy, dsum, x, weight, mean, rstd = contiguous(dy, dsum, x, weight, mean, rstd)  # type: ignore[assignment]
    if is_long(x, backward=True):
        from .norm_long import run_backward_long

        run_backward_long(dy, dsum, x, weight, mean, rstd, dx, dweight, dbias)
        return dx, dweight, dbias
    BM, BN, warps = tile(x, 32)
    share = triton.cdiv(triton.cdiv(M, PER_SM * device_of(x).processors), BM) * BM
    P = triton.cdiv(M, share)
    partial = workspaces(P, N, x, dweight, dbias)
    args = (dy, dsum, x, weight, mean, rstd, dx, *partial, M, N, share)
    launch(layer_norm_backward, (P,), *args, BM=BM, BN=BN, warps=warps)
    add_columns(partial, dweight, dbias)
    return dx, dweight, dbias


def workspaces(P: int, N: int, x: Tensor, *results: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else x.new_empty((P, N), dtype=sums_dtype(x)) for t in results]


def add_columns(partial: list[Tensor | None], dweight: Tensor | None, dbias: Tensor | None) -> None:
    first = next((t for t in partial if t is not None), None)
    if first is not None:
        P, N = first.shape
        launch(column_sums, (triton.cdiv(N, 32),), *partial, dweight, dbias, P, N, BP=32, BN=32)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def check_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Require x [M, N], and [N] of each parameter: of x's dtype, or both float32 beside a half type."""
    if x.dim() != 2:
        raise RuntimeError(f"x must have 2 dimensions, got {x.dim()}")
    check_tensor("x", x, x, tuple(x.shape))
    one = bias if weight is None else weight
    mixed = one is not None and one.dtype == torch.float32 and x.dtype.itemsize == 2
    like = torch.empty(0, dtype=torch.float32, device=x.device) if mixed else x
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_tensor(name, t, like, tuple(x.shape[1:]))


def check_statistics(x: Tensor, mean: Tensor | None, rstd: Tensor) -> None:
    """Require mean [2, M] or None, and rstd [M], in the dtype of sums over x."""
    like = torch.empty(0, dtype=sums_dtype(x), device=x.device)
    if mean is not None:
        check_tensor("mean", mean, like, (2, x.shape[0]))
    check_tensor("rstd", rstd, like, (x.shape[0],))


IMPLEMENTATIONS = {"layer_norm_forward": forward, "layer_norm_backward": backward}
EXAMPLES = {
    "layer_norm_forward": lambda empty: (empty(4096, 1024), empty(1024), empty(1024), 1e-5, True),
    "layer_norm_backward": lambda empty: (
        empty(4096, 1024), empty(4096, 1024), empty(1024), empty(2, 4096).float(), empty(4096).float(), True, True, True,
    ),
}  # fmt: skip
