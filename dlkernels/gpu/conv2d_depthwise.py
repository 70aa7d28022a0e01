"""conv2d where a group has one channel and a few outputs: nothing to multiply as matrices, so every number sums its own taps.

    conv2d_depthwise_forward   y [BM (n,p,q), BO]    over the taps (r, s)
    conv2d_depthwise_dx        dx [BM (n,h,w), BC]   over a channel's outputs and the taps; a tap counts where the stride divides
    conv2d_depthwise_dweight   a share of the positions, for BO outputs: over positions, tap by tap        workspace [shares, O R S]
    column_sums                adds up shares in a fixed order                                             norm.py

* Memory decides. Contiguous images take one channel per program and lanes along the positions; channels_last ones up to 64 channels.
* A number is read under each of its taps, all but once from the cache: neighbours read it at the same time. A share of dweight is small
  enough to stay in the L1 cache from one tap to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .activations import EPILOGUES, LEAKY_RELU
from .config import ceil_div
from .conv2d_windows import Windows, advance, exists, layout, place, positions
from .launch import launch
from .norm import column_sums

TILE, CHANNELS, TILES = 1024, 64, 4  # numbers of a tile, channels of a channels_last one, tiles of a share


@triton.jit
def conv2d_depthwise_forward(
    x, weight, bias, y, z, M, O, H, W, P, Q, OUTPUTS, x_c, x_w, x_gap, y_o, y_q, y_gap, sh, sw, top, left, dh, dw,
    slope: tl.constexpr, EPILOGUE: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """y[m,o] = EPILOGUE(Σ_{r,s} x[n, p sh - top + r dh, q sw - left + s dw, o // OUTPUTS] W[o,r,s] + b[o]) with m = (n, p, q)."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.program_id(1).to(tl.int64) * BO + tl.arange(0, BO)
    inside = (m < M)[:, None] & (o < O)[None, :]
    n, p, q = positions(m, P, Q)
    channel = (o // OUTPUTS * x_c)[None, :]
    acc = tl.zeros((BM, BO), ACC)
    for r in range(R):
        for s in tl.static_range(S):
            h, w = p * sh - top + r * dh, q * sw - left + s * dw
            v = tl.load(x + (place(n, (n * H + h) * W + w, x_w, x_gap)[:, None] + channel), inside & exists(h, w, H, W)[:, None], other=0.0)
            acc += v.to(ACC) * tl.load(weight + (o * (R * S) + r * S + s), o < O, other=0.0).to(ACC)[None, :]
    if bias is not None:
        acc += tl.load(bias + o, o < O, other=0.0).to(ACC)[None, :]
    at = place(n, m, y_q, y_gap)[:, None] + (o * y_o)[None, :]
    if z is not None:
        tl.store(z + at, acc.to(z.dtype.element_ty), inside)
    tl.store(y + at, EPILOGUE(acc, slope).to(y.dtype.element_ty), inside)


@triton.jit
def conv2d_depthwise_dx(
    dz, weight, bias, dx, M, C, H, W, P, Q, OUTPUTS, dz_o, dz_q, dz_gap, dx_c, dx_w, dx_gap, sh: tl.constexpr, sw: tl.constexpr, top,
    left, dh, dw, R: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx[m,c] = Σ dz[n, p, q, o] W[o,r,s] + b[c] over the outputs o of c and the taps, where p sh = h + top - r dh and
    q sw = w + left - s dw. bias may be None."""
    ACC: tl.constexpr = tl.float64 if dz.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    inside = (m < M)[:, None] & (c < C)[None, :]
    n, h, w = positions(m, H, W)
    acc = tl.zeros((BM, BC), ACC)
    for output in range(OUTPUTS):
        o = c * OUTPUTS + output
        for r in range(R):
            for s in tl.static_range(S):
                down, right = h + top - r * dh, w + left - s * dw
                p, q = down // sh, right // sw
                saw = (down >= 0) & (right >= 0) & (p * sh == down) & (q * sw == right) & (p < P) & (q < Q)
                at = place(n, (n * P + p) * Q + q, dz_q, dz_gap)[:, None] + (o * dz_o)[None, :]
                v = tl.load(dz + at, inside & saw[:, None], other=0.0)
                acc += v.to(ACC) * tl.load(weight + (o * (R * S) + r * S + s), c < C, other=0.0).to(ACC)[None, :]
    if bias is not None:
        acc += tl.load(bias + c, c < C, other=0.0).to(ACC)[None, :]
    at = place(n, m, dx_w, dx_gap)[:, None] + (c * dx_c)[None, :]
    tl.store(dx + at, acc.to(dx.dtype.element_ty), inside)


@triton.jit
def conv2d_depthwise_dweight(
    dz, x, partial, M, O, H, W, P, Q, OUTPUTS, dz_o, dz_q, dz_gap, x_c, x_w, x_gap, sh, sw, top, left, dh, dw, SHARE,
    R: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """partial[share,o,r,s] = Σ_m dz[m,o] x[n, p sh - top + r dh, q sw - left + s dw, o // OUTPUTS] over the share-th SHARE of m."""
    ACC: tl.constexpr = partial.dtype.element_ty
    share = tl.program_id(0)
    o = tl.program_id(1).to(tl.int64) * BO + tl.arange(0, BO)
    start, stop = share * SHARE, tl.minimum((share + 1) * SHARE, M)
    output, channel = (o * dz_o)[None, :], (o // OUTPUTS * x_c)[None, :]
    row = (share.to(tl.int64) * O + o) * (R * S)
    for tap in range(R * S):
        down, right = tap // S * dh - top, tap % S * dw - left
        n, p, q = positions(start + tl.arange(0, BM), P, Q)
        sums = tl.zeros((BM, BO), ACC)
        for first in range(start, stop, BM):
            m = first + tl.arange(0, BM)
            inside = (m < stop)[:, None] & (o < O)[None, :]
            h, w = p * sh + down, q * sw + right
            dz_tile = tl.load(dz + (place(n, m, dz_q, dz_gap)[:, None] + output), inside, other=0.0)
            x_tile = tl.load(
                x + (place(n, (n * H + h) * W + w, x_w, x_gap)[:, None] + channel), inside & exists(h, w, H, W)[:, None], other=0.0
            )
            sums += dz_tile.to(ACC) * x_tile.to(ACC)
            n, p, q = advance(n, p, q, BM, P, Q)
        tl.store(partial + (row + tap), tl.sum(sums, axis=0), o < O)


def run_shares(partial: Tensor, total: Tensor) -> None:
    """total = the sum of partial [shares, ...]"""
    BN, size = 32, total.numel()
    launch(column_sums, (ceil_div(size, BN),), partial, None, total, None, len(partial), size, BP=64, BN=BN)


def is_depthwise(k: Windows) -> bool:
    """Whether a tensor core's 16 x 16 numbers at least would be mostly empty."""
    return k.inputs == 1 and k.outputs <= 4


def _tile(x: Tensor, channels: int, positions: int) -> tuple[int, int]:
    """Positions and channels of a tile."""
    width = min(CHANNELS, triton.next_power_of_2(channels)) if layout(x)[0] == 1 else 1
    return min(TILE // width, triton.next_power_of_2(positions)), width


def run_forward(k: Windows, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None, act: int, slope: float) -> None:
    """Fill y (and z)."""
    BM, BO = _tile(y, k.O, k.M)
    launch(
        conv2d_depthwise_forward, (ceil_div(k.M, BM), ceil_div(k.O, BO)), x, weight.contiguous(), bias, y, z, k.M, k.O, k.H, k.W, k.P, k.Q,
        k.outputs, *layout(x), *layout(y), *k.moves, slope=slope if act == LEAKY_RELU else 0.0, EPILOGUE=EPILOGUES[act], R=k.R, S=k.S,
        BM=BM, BO=BO,
    )  # fmt: skip


def run_dx(k: Windows, dz: Tensor, weight: Tensor, bias: Tensor | None, dx: Tensor) -> None:
    """Fill dx, ``bias`` added to it."""
    BM, BC = _tile(dx, k.C, k.pixels)
    sh, sw, *rest = k.moves
    launch(
        conv2d_depthwise_dx, (ceil_div(k.pixels, BM), ceil_div(k.C, BC)), dz, weight.contiguous(), bias, dx, k.pixels, k.C, k.H, k.W, k.P,
        k.Q, k.outputs, *layout(dz), *layout(dx), sh, sw, *rest, R=k.R, S=k.S, BM=BM, BC=BC,
    )  # fmt: skip


def run_dweight(k: Windows, dz: Tensor, x: Tensor, dweight: Tensor) -> None:
    """Fill dweight: one channel lies contiguously in either memory format."""
    BM, BO = _tile(dz, k.O, k.M)
    share = BM * TILES
    partial = dweight.new_empty((ceil_div(k.M, share), *dweight.shape), dtype=statistics_dtype(dweight))
    launch(
        conv2d_depthwise_dweight, (len(partial), ceil_div(k.O, BO)), dz, x, partial, k.M, k.O, k.H, k.W, k.P, k.Q, k.outputs, *layout(dz),
        *layout(x), *k.moves, share, R=k.R, S=k.S, BM=BM, BO=BO, warps=8 if BO == 1 else 4,
    )  # fmt: skip
    run_shares(partial, dweight)


def run_backward(
    k: Windows, dz: Tensor, x: Tensor | None, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, bias: Tensor | None = None
) -> None:
    """Fill dx, ``bias`` added to it, and dweight, whichever is not None; dz and x, which dweight needs, are dense, weight is any."""
    if dx is not None:
        run_dx(k, dz, weight, bias, dx)
    if dweight is not None and x is not None:
        run_dweight(k, dz, x, dweight)
