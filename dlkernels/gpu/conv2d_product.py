"""conv2d on the GPU: y = act(x * W + b), dx, dW and db as products whose operands are gathered, pixel by pixel, while they are read.

    kernel                    result tile           summed over        a                         b
    conv2d_forward            y  [BM (n,p,q), BO]   taps and channels  x, a window's pixels      W
    conv2d_backward_dx        dx [BM (n,h,w), BC]   taps and outputs   dz, the positions that    W
                                                                       saw a pixel
    conv2d_backward_dweight   dW [BO, BC of a tap]  positions (n,p,q)  dzᵀ                       x, the pixel that a tap saw

    one step of the sum: BC channels under one tap (r, s)

            BM positions ┌────────────┐   x[n, p sh - top + r dh, q sw - left + s dw, c .. c + BC]
                         │ one pixel  │   one address and one mask for each pixel, BC numbers side by side
                         └────────────┘

* **No im2col buffer**: the matrix of windows, R S times as large as x, exists tile by tile in shared memory.
* **Taps inside, blocks of channels outside**: which tap a step has is then a division by constants.
* **Few channels** (the first layer's 3): a step is BC of the R S C numbers of a window, whatever their taps (FLAT).
* **dx gathers, so nothing is added atomically.** With stride sh sw, pixels fall into sh sw phases: those of a phase are seen under the same
  taps, every sh-th, and are a convolution of stride 1 of their own. No step multiplies zeros that a stride left between positions.
* **Few tiles**: `split` shares of the sum go to different programs, and `combine` adds these in order. dW, which sums over all positions,
  always has few.
* Tiles are read and written as [channels, positions] and transposed on the way: where neither is known to lie side by side
  (contiguous memory) Triton gives the last dimension to neighbouring threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import EPILOGUES, LEAKY_RELU, identity
from .config import ceil_div, kind_of
from .conv2d_tiles import FEW, count_of, few_channels, most_of, shared, stepped, tile_of
from .conv2d_windows import Windows, advance, exists, layout, place, positions
from .launch import device_of, launch, precision
from .linear import add_up
from .matmul import tile_ids, wrapped


@triton.jit
def steps(D, R: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, FLAT: tl.constexpr):
    """Steps of BD channels that R S taps with D channels take."""
    if FLAT:
        return tl.cdiv(R * S * D, BD)
    return R * S * tl.cdiv(D, BD)


@triton.jit
def tap(step, D, R: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, FLAT: tl.constexpr):
    """Row r and column s of the step's tap, its channels d and which of these there are: [BD, 1] each, or one number."""
    k = tl.arange(0, BD)[:, None]
    if FLAT:
        k += step * BD
        return k // D // S, k // D % S, k % D, k < R * S * D
    else:  # not left out: Triton wants all returns of a function that it compiles to have one type
        k += step // (R * S) * BD
        return step % (R * S) // S, step % S, k, k < D


@triton.jit
def window_tile(
    x, weight, n, h, w, j, start, stop, D, H, W, x_d, x_w, x_gap, w_j, w_d, w_r, w_s, dh, dw, PRECISION: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, BD: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """acc[m,j] = Σ_{r,s,d} x[n[m], h[m] + r dh, w[m] + s dw, d] · weight[j,d,r,s] for steps [start, stop) of the R S taps
    and D channels; x is zero outside of [H, W]."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    acc = tl.zeros((h.shape[0], j.shape[0]), ACC)
    window = place(n, (n * H + h) * W + w, x_w, x_gap)[None, :]
    column = (j.to(tl.int64) * w_j)[None, :]
    for step in range(start, stop):
        r, s, d, there = tap(tl.full((), step, tl.int32), D, R, S, BD, FLAT)
        seen = there & exists(h[None, :] + r * dh, w[None, :] + s * dw, H, W)
        pixel = d.to(tl.int64) * x_d + (r * dh * W + s * dw).to(tl.int64) * x_w
        number = d.to(tl.int64) * w_d + r.to(tl.int64) * w_r + s.to(tl.int64) * w_s
        a = tl.load(x + (window + pixel), seen, other=0.0)
        b = tl.load(weight + (column + number), there, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def conv2d_forward(
    x, weight, bias, y, z, M, C, O, H, W, P, Q, x_c, x_w, x_gap, w_o, w_c, w_r, w_s, y_o, y_q, y_gap, sh, sw, top, left, dh, dw,
    SHARE, slope: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """y[share,m,o] = EPILOGUE(Σ_{r,s,c} x[n, p sh - top + r dh, q sw - left + s dw, c] W[o,c,r,s] + b[o]) with m = (n, p, q), for the
    share-th SHARE of the steps and the C and O of one group. z, the value before EPILOGUE, and bias may be None."""
    pid_m, pid_o = tile_ids(M, O, BM, BO, GROUP)
    group, share = tl.program_id(1).to(tl.int64), tl.program_id(2)
    m, o = wrapped(pid_m * BM, M, BM).to(tl.int32), wrapped(pid_o * BO, O, BO)
    n, p, q = positions(m, P, Q)
    acc = window_tile(
        x + group * C * x_c, weight + group * O * w_o, n, p * sh - top, q * sw - left, o, share * SHARE,
        tl.minimum((share + 1) * SHARE, steps(C, R, S, BC, FLAT)), C, H, W, x_c, x_w, x_gap, w_o, w_c, w_r, w_s, dh, dw, PRECISION, R, S,
        BC, FLAT,
    )  # fmt: skip
    o += group * O
    if bias is not None:
        acc += tl.load(bias + o).to(acc.dtype)[None, :]
    at = share.to(tl.int64) * M * O * tl.num_programs(1) + (o * y_o)[:, None] + place(n, m, y_q, y_gap)[None, :]
    inside = (pid_o * BO + tl.arange(0, BO) < O)[:, None] & (pid_m * BM + tl.arange(0, BM) < M)[None, :]
    if z is not None:
        tl.store(z + at, tl.trans(acc).to(z.dtype.element_ty), inside)
    tl.store(y + at, tl.trans(EPILOGUE(acc, slope)).to(y.dtype.element_ty), inside)


@triton.jit
def conv2d_backward_dx(
    dz, weight, bias, dx, M, C, O, H, W, P, Q, I, J, dz_o, dz_q, dz_gap, w_o, w_c, w_r, w_s, dx_c, dx_w, dx_gap, first_h, first_w, sh, sw,
    first_p, first_q, dp, dq, SHARE, PRECISION: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BO: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """dx[share, n, first_h + i sh, first_w + j sw, c] = Σ_{r,s,o} dz[n, first_p + i - r dp, first_q + j - s dq, o] W[o,c,r,s] for the
    share-th SHARE of the steps and the C and O of one group, + b[c]: the I x J pixels of one phase, and the R S taps that see them. bias
    may be None."""
    pid_m, pid_c = tile_ids(M, C, BM, BC, GROUP)
    group, share = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n, i, j = positions(wrapped(pid_m * BM, M, BM).to(tl.int32), I, J)
    c = wrapped(pid_c * BC, C, BC)
    acc = window_tile(
        dz + group * O * dz_o, weight + group * O * w_o, n, i + first_p, j + first_q, c, share * SHARE,
        tl.minimum((share + 1) * SHARE, steps(O, R, S, BO, FLAT)), O, P, Q, dz_o, dz_q, dz_gap, w_c, w_o, w_r, w_s, -dp, -dq, PRECISION, R,
        S, BO, FLAT,
    )  # fmt: skip
    c += group * C
    if bias is not None:
        acc += tl.load(bias + c).to(acc.dtype)[None, :]
    pixel = (n * H + first_h + i * sh) * W + first_w + j * sw
    at = share.to(tl.int64) * M * C * tl.num_programs(1) + (c * dx_c)[:, None] + place(n, pixel, dx_w, dx_gap)[None, :]
    inside = (pid_c * BC + tl.arange(0, BC) < C)[:, None] & (pid_m * BM + tl.arange(0, BM) < M)[None, :]
    tl.store(dx + at, tl.trans(acc).to(dx.dtype.element_ty), inside)


@triton.jit
def conv2d_backward_dweight(
    dz, x, dweight, M, C, O, H, W, P, Q, dz_o, dz_q, dz_gap, x_c, x_w, x_gap, dw_c, dw_tap, sh, sw, top, left, dh, dw, SHARE,
    PRECISION: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
    GROUP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """dW[share,o,c,r,s] = Σ_m dz[m,o] x[n, p sh - top + r dh, q sw - left + s dw, c] over the share-th SHARE of m = (n, p, q), for the C
    and O of one group."""
    pid_o, step = tile_ids(O, steps(C, R, S, BC, FLAT) * BC, BO, BC, GROUP)
    share, group = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o = wrapped(pid_o * BO, O, BO)
    r, s, c, there = tap(step.to(tl.int32), C, R, S, BC, FLAT)
    a = dz + ((group * O + o) * dz_o)[:, None]
    b = x + (group * C + c) * x_c
    down, right = r * dh - top, s * dw - left
    start, stop = (share * SHARE).to(tl.int32), tl.minimum((share + 1) * SHARE, M).to(tl.int32)
    n, p, q = positions(start + tl.arange(0, BM), P, Q)
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BO, BC), ACC)
    for first in range(start, stop, BM):
        m = first + tl.arange(0, BM)
        h, w = (p * sh)[None, :] + down, (q * sw)[None, :] + right
        seen = (m < stop)[None, :] & there & exists(h, w, H, W)
        a_tile = tl.load(a + place(n, m, dz_q, dz_gap)[None, :], (m < stop)[None, :], other=0.0)
        b_tile = tl.load(b + place(n[None, :], (n[None, :] * H + h) * W + w, x_w, x_gap), seen, other=0.0)
        acc = tl.dot(a_tile, tl.trans(b_tile), acc, input_precision=PRECISION, out_dtype=ACC)
        n, p, q = advance(n, p, q, BM, P, Q)
    o_row = pid_o * BO + tl.arange(0, BO)
    row = ((share * tl.num_programs(2) + group) * O + o_row) * (C * R * S)
    at = row[None, :] + (c * dw_c + (r * S + s) * dw_tap)
    tl.store(dweight + at, tl.trans(acc).to(dweight.dtype.element_ty), there & (o_row < O)[None, :])


def run_forward(k: Windows, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None, act: int, slope: float) -> None:
    """Fill y (and z); x dense, any weight."""
    x, weight, mode = side_by_side(x, k.inputs), filters(weight), precision(x.dtype)
    depth, slope = k.R * k.S * k.inputs, slope if act == LEAKY_RELU else 0.0
    c = tile_of(kind_of(x.dtype, mode), k.M, k.outputs, depth, k.outputs, most_of(y, z), layout(y)[0] == 1, device_of(x))
    c, flat = stepped(c, k.inputs)
    out, share, shares = shared(c, count_of(c, k.R * k.S, k.inputs, flat), 1, y)
    whole = shares == 1
    launch(
        conv2d_forward, (ceil_div(k.M, c.rows) * ceil_div(k.outputs, c.cols), k.G, shares), x, weight, bias if whole else None, out,
        z if whole else None, k.M, k.inputs, k.outputs, k.H, k.W, k.P, k.Q, *layout(x), *weight.stride(), *layout(y), *k.moves, share,
        slope=slope, EPILOGUE=EPILOGUES[act] if whole else identity, PRECISION=mode, R=k.R, S=k.S, BM=c.rows, BO=c.cols, BC=c.depth,
        GROUP=c.group, FLAT=flat, warps=c.warps, stages=c.stages,
    )  # fmt: skip
    if not whole:
        add_up(out, bias, y, z, k.O, slope, EPILOGUES[act])


def phases(pixels: int, taps: int, stride: int, before: int, dilation: int) -> Iterator[tuple[int, int | None, int, int, int]]:
    """Of one direction, for every residue of pixels: its first pixel, the first tap that sees it (None: none does) and the step from one
    such tap to the next; the position that sees the pixel under that tap, and how many positions earlier the next tap's is."""
    step = stride // gcd(stride, dilation)
    for pixel in range(min(stride, pixels)):
        seen = [r for r in range(min(step, taps)) if (pixel + before - r * dilation) % stride == 0]
        first = seen[0] if seen else None
        yield pixel, first, step, (pixel + before - (first or 0) * dilation) // stride, step * dilation // stride


def run_dx(k: Windows, dz: Tensor, weight: Tensor, bias: Tensor | None, dx: Tensor) -> None:
    """Fill dx, ``bias`` added to it, phase by phase."""
    weight, mode = filters(weight), precision(dz.dtype)
    splits = layout(dx)[0] == 1 and (k.sh, k.sw) == (1, 1)
    for h, r, step_r, first_p, dp in phases(k.H, k.R, k.sh, k.top, k.dh):
        for w, s, step_s, first_q, dq in phases(k.W, k.S, k.sw, k.left, k.dw):
            if r is None or s is None:
                dx[:, :, h :: k.sh, w :: k.sw] = 0.0 if bias is None else bias[:, None, None]
                continue
            I, J, taps = ceil_div(k.H - h, k.sh), ceil_div(k.W - w, k.sw), weight[:, :, r::step_r, s::step_s]
            M, R, S = k.N * I * J, taps.shape[2], taps.shape[3]
            c = tile_of(kind_of(dz.dtype, mode), M, k.inputs, R * S * k.outputs, k.inputs, most_of(dx), splits, device_of(dz))
            c, flat = stepped(c, k.outputs)
            out, share, shares = shared(c, count_of(c, R * S, k.outputs, flat), 1, dx)
            launch(
                conv2d_backward_dx, (ceil_div(M, c.rows) * ceil_div(k.inputs, c.cols), k.G, shares), dz, taps,
                bias if shares == 1 else None, out, M, k.inputs, k.outputs,
                k.H, k.W, k.P, k.Q, I, J, *layout(dz), *taps.stride(), *layout(dx), h, w, k.sh, k.sw, first_p, first_q, dp, dq, share,
                PRECISION=mode, R=R, S=S, BM=c.rows, BC=c.cols, BO=c.depth, GROUP=c.group, FLAT=flat, warps=c.warps, stages=c.stages,
            )  # fmt: skip
            if shares > 1:
                add_up(out, bias, dx, None, k.C)


def run_dweight(k: Windows, dz: Tensor, x: Tensor, dweight: Tensor) -> None:
    """Fill dweight, of any memory format."""
    x, mode, flat = side_by_side(x, k.inputs), precision(x.dtype), k.inputs < FEW
    columns = k.R * k.S * k.inputs
    c = tile_of(kind_of(x.dtype, mode), k.outputs, columns, k.M, columns if flat else k.inputs, 128 * 256, True, device_of(x))
    c = few_channels(c) if flat else c
    tiles = ceil_div(columns, c.cols) if flat else k.R * k.S * ceil_div(k.inputs, c.cols)
    out, share, shares = shared(c, k.M, c.depth, dweight)
    launch(
        conv2d_backward_dweight, (ceil_div(k.outputs, c.rows) * tiles, shares, k.G), dz, x, out, k.M, k.inputs, k.outputs, k.H, k.W, k.P,
        k.Q, *layout(dz), *layout(x), *layout(dweight)[:2], *k.moves, share, PRECISION=mode, R=k.R, S=k.S, BO=c.rows, BC=c.cols,
        BM=c.depth, GROUP=c.group, FLAT=flat, warps=c.warps, stages=c.stages,
    )  # fmt: skip
    if shares > 1:
        add_up(out, None, dweight, None, k.O)


def run_backward(
    k: Windows, dz: Tensor, x: Tensor | None, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, bias: Tensor | None = None
) -> None:
    """Fill dx, ``bias`` added to it, and dweight, whichever is not None; dz and x, which dweight needs, are dense, weight is any."""
    dz = side_by_side(dz, k.outputs)
    if dx is not None:
        run_dx(k, dz, weight, bias, dx)
    if dweight is not None and x is not None:
        run_dweight(k, dz, x, dweight)


def side_by_side(x: Tensor, channels: int) -> Tensor:
    """x with its channels side by side where the products need that: numbers of two bytes that lie apart cannot be copied to shared
    memory while the tensor cores work. One pass over x, where a window's R S taps read it R S times."""
    return x.contiguous(memory_format=torch.channels_last) if x.dtype.itemsize == 2 and channels >= FEW else x


def filters(weight: Tensor) -> Tensor:
    """weight with the channels of a tap side by side, where there are many."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.shape[1] >= FEW else weight
