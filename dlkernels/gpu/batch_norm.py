"""batch_norm on the GPU: two phases over the numbers of each channel, with one small kernel per channel between them.

    batch_norm_moments    a share of a channel's tiles -> count, mean, sum of squared deviations       workspace [shares, 4, C]
    batch_norm_statistics joins the shares in order -> mean, var, and the running ones
    batch_norm_normalise  y = act((x - mean) scale + bias), tile by tile
    batch_norm_sums       a share of a channel's tiles -> Σ dz, Σ dz (x - mean)                        workspace [shares, 2, C]
    batch_norm_totals     adds the shares in order -> dbias, dweight and the two sums
    batch_norm_dx         dx = scale (dz - Σ dz / m - (x - mean) rstd² Σ dz (x - mean) / m), tile by tile

* One view of both memory formats, cut into tiles: channels.py.
* A tile is in registers when its mean is taken, so its deviations are too: no large mean cancels. A mean is kept as the sum of two numbers.
* No atomics: the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .channels import View, place, view_of
from .config import ceil_div
from .launch import check_parameters, check_tensor, launch


@triton.jit
def channel(p, c, C, DEFAULT: tl.constexpr, ACC: tl.constexpr):
    """p[c], or DEFAULT where p is None."""
    if p is None:
        return tl.full(c.shape, DEFAULT, ACC)
    return tl.load(p + c, c < C, other=DEFAULT).to(ACC)


@triton.jit
def finite(correction):
    """What the rest of the mean adds to a number: nothing where there are infinities, which it could only turn into NaN."""
    return tl.where(correction - correction == 0, correction, 0.0)


@triton.jit
def parameters(stats, weight, bias, c, C, eps: tl.constexpr):
    """mean, rstd, scale = weight rstd and bias of channels c, in the dtype of stats [3, C]: mean, var, what rounding the mean left out."""
    ACC: tl.constexpr = stats.dtype.element_ty
    mean = tl.load(stats + c, c < C, other=0.0)
    rstd = 1.0 / tl.sqrt(tl.load(stats + C + c, c < C, other=1.0) + eps)
    rest = tl.load(stats + 2 * C + c, c < C, other=0.0)
    scale = channel(weight, c, C, 1.0, ACC) * rstd
    return mean, rstd, scale, channel(bias, c, C, 0.0, ACC) - finite(rest * scale)


@triton.jit
def formed(dy, centred, scale, bias, RELU: tl.constexpr, DTYPE: tl.constexpr):
    """dz: dy, or 0 where relu's y, which is formed again as the forward did, is 0."""
    if RELU:
        return tl.where((centred * scale[None, :] + bias[None, :]).to(DTYPE).to(dy.dtype) <= 0, 0.0, dy)
    return dy


@triton.jit
def join(count, mean, rest, m2, k, mean_k, rest_k, m2_k):
    """The moments of two sets of count and k numbers together (Chan et al. 1979); mean + rest is the mean."""
    total = count + k
    delta = (mean_k - mean) + (rest_k - rest)
    step = rest + delta * (k / total)
    moved = mean + step
    return total, moved, step - (moved - mean), m2 + m2_k + delta * delta * (count * (k / total))


@triton.jit
def batch_norm_moments(x, partial, N, C, S, sn, sc, ss, TILES, SHARE, BN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """partial[share] = count, mean, rest, sum of squared deviations of tiles [share SHARE, (share + 1) SHARE) of each channel."""
    ACC: tl.constexpr = partial.dtype.element_ty
    share = tl.program_id(1)
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    count, rest, m2 = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    mean = tl.load(x + c * sc, c < C, other=0.0).to(ACC)  # any number of the channel, so that a large mean does not swallow a first step
    for tile in range(share * SHARE, tl.minimum((share + 1) * SHARE, TILES)):
        at, inside, _ = place(tile, N, C, S, sn, sc, ss, BN, BS, BC)
        v = tl.load(x + at, inside, other=0.0).to(ACC)
        k = tl.maximum(tl.sum(inside.to(ACC), axis=0), 1.0)
        middle = tl.sum(v, axis=0) / k
        d = tl.where(inside, v - middle[None, :], 0.0)
        left = tl.sum(d, axis=0) / k  # what rounding kept from the mean of the tile
        count, mean, rest, m2 = join(count, mean, rest, m2, k, middle, left, tl.sum(d * d, axis=0) - left * left * k)
    row = partial + share.to(tl.int64) * 4 * C
    tl.store(row + c, count, c < C)
    tl.store(row + C + c, mean, c < C)
    tl.store(row + 2 * C + c, rest, c < C)
    tl.store(row + 3 * C + c, m2, c < C)


@triton.jit
def batch_norm_statistics(
    partial, stats, running_mean, running_var, C, M, SHARES, mean_stride, var_stride, high, low, BLOCK: tl.constexpr
):  # fmt: skip
    """stats [3, C] = mean, var, rest of the shares; running = (1 - momentum) running + momentum new, momentum = high + low, both floats."""
    ACC: tl.constexpr = stats.dtype.element_ty
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    count, mean = tl.load(partial + c, inside, other=1.0), tl.load(partial + C + c, inside, other=0.0)
    rest, m2 = tl.load(partial + 2 * C + c, inside, other=0.0), tl.load(partial + 3 * C + c, inside, other=0.0)
    for share in range(1, SHARES):
        row = partial + tl.full((), share, tl.int64) * 4 * C
        k, mean_k = tl.load(row + c, inside, other=1.0), tl.load(row + C + c, inside, other=0.0)
        rest_k, m2_k = tl.load(row + 2 * C + c, inside, other=0.0), tl.load(row + 3 * C + c, inside, other=0.0)
        count, mean, rest, m2 = join(count, mean, rest, m2, k, mean_k, rest_k, m2_k)
    tl.store(stats + c, mean, inside)
    tl.store(stats + C + c, m2 / M, inside)
    tl.store(stats + 2 * C + c, rest, inside)
    momentum = tl.zeros((BLOCK,), ACC) + high + low
    if running_mean is not None:
        old = tl.load(running_mean + c * mean_stride, inside, other=0.0).to(ACC)
        tl.store(running_mean + c * mean_stride, ((1 - momentum) * old + momentum * mean).to(running_mean.dtype.element_ty), inside)
    if running_var is not None:
        old = tl.load(running_var + c * var_stride, inside, other=0.0).to(ACC)
        tl.store(running_var + c * var_stride, ((1 - momentum) * old + momentum * (m2 / (M - 1))).to(running_var.dtype.element_ty), inside)


@triton.jit
def batch_norm_normalise(
    x, y, stats, weight, bias, N, C, S, sn, sc, ss, eps: tl.constexpr, RELU: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) scale + bias) for one tile."""
    at, inside, c = place(tl.program_id(1), N, C, S, sn, sc, ss, BN, BS, BC)
    mean, _, scale, shift = parameters(stats, weight, bias, c, C, eps)
    z = (tl.load(x + at, inside, other=0.0).to(mean.dtype) - mean[None, :]) * scale[None, :] + shift[None, :]
    if RELU:
        z = tl.where(z <= 0, 0.0, z)
    tl.store(y + at, z.to(y.dtype.element_ty), inside)


@triton.jit
def batch_norm_sums(
    dy, x, stats, weight, bias, partial, N, C, S, sn, sc, ss, TILES, SHARE, eps: tl.constexpr, RELU: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial[share] = Σ dz and Σ dz (x - mean) over tiles [share SHARE, (share + 1) SHARE) of each channel."""
    ACC: tl.constexpr = partial.dtype.element_ty
    share = tl.program_id(1)
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    mean, _rstd, scale, shift = parameters(stats, weight, bias, c, C, eps)
    plain, weighted = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    for tile in range(share * SHARE, tl.minimum((share + 1) * SHARE, TILES)):
        at, inside, _ = place(tile, N, C, S, sn, sc, ss, BN, BS, BC)
        centred = tl.where(inside, tl.load(x + at, inside, other=0.0).to(ACC) - mean[None, :], 0.0)
        dz = formed(tl.load(dy + at, inside, other=0.0).to(ACC), centred, scale, shift, RELU, x.dtype.element_ty)
        plain += tl.sum(dz, axis=0)
        weighted += tl.sum(dz * centred, axis=0)
    row = partial + share.to(tl.int64) * 2 * C
    tl.store(row + c, plain, c < C)
    tl.store(row + C + c, weighted, c < C)


@triton.jit
def batch_norm_totals(partial, stats, totals, dweight, dbias, C, SHARES, eps: tl.constexpr, BLOCK: tl.constexpr):
    """totals [2, C] = Σ dz and Σ dz (x - mean - rest) over all shares; dbias and dweight, where they are not None, from them."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    plain = tl.load(partial + c, inside, other=0.0)
    weighted = tl.load(partial + C + c, inside, other=0.0)
    for share in range(1, SHARES):
        row = partial + tl.full((), share, tl.int64) * 2 * C
        plain += tl.load(row + c, inside, other=0.0)
        weighted += tl.load(row + C + c, inside, other=0.0)
    weighted -= finite(tl.load(stats + 2 * C + c, inside, other=0.0) * plain)
    tl.store(totals + c, plain, inside)
    tl.store(totals + C + c, weighted, inside)
    if dbias is not None:
        tl.store(dbias + c, plain.to(dbias.dtype.element_ty), inside)
    if dweight is not None:
        rstd = 1.0 / tl.sqrt(tl.load(stats + C + c, inside, other=1.0) + eps)
        tl.store(dweight + c, (weighted * rstd).to(dweight.dtype.element_ty), inside)


@triton.jit
def batch_norm_dx(
    dy, x, stats, weight, bias, totals, dx, N, C, S, M, sn, sc, ss, eps: tl.constexpr, RELU: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx for one tile; totals [2, C] is None in eval, where the statistics are constants."""
    at, inside, c = place(tl.program_id(1), N, C, S, sn, sc, ss, BN, BS, BC)
    mean, rstd, scale, shift = parameters(stats, weight, bias, c, C, eps)
    centred = tl.load(x + at, inside, other=0.0).to(mean.dtype) - mean[None, :]
    dz = formed(tl.load(dy + at, inside, other=0.0).to(mean.dtype), centred, scale, shift, RELU, x.dtype.element_ty)
    if totals is not None:
        a = tl.load(totals + c, c < C, other=0.0) / M
        b = tl.load(totals + C + c, c < C, other=0.0) * rstd * rstd / M
        a += 0.0 * scale - finite(b * tl.load(stats + 2 * C + c, c < C, other=0.0))  # no mean of dz scale where the scale is infinite
        dz = dz - a[None, :] - centred * b[None, :]
    tl.store(dx + at, (scale[None, :] * dz).to(dx.dtype.element_ty), inside)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _normalise(x: Tensor, y: Tensor, view: View, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool) -> None:
    grid = (ceil_div(view.C, view.BC), view.tiles)
    launch(batch_norm_normalise, grid, x, y, stats, _dense(weight), _dense(bias), *view.strided, eps=eps, RELU=relu, **view.blocks)


def train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    eps: float, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launcher of the training forward; shapes and errors as the op's contract says."""
    view, form = view_of(x)
    check_parameters(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    M = view.N * view.S
    if M < 2 or eps <= 0:
        raise RuntimeError(f"needs more than one number per channel and eps > 0, got x of shape {tuple(x.shape)} and eps {eps}")
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("running_mean and running_var must both be tensors or both be None")
    x = x.contiguous(memory_format=form)
    y, stats = torch.empty_like(x), x.new_empty((3, view.C), dtype=statistics_dtype(x))
    if view.C:
        shares, share = view.shares(x)
        partial = stats.new_empty(shares, 4, view.C)
        launch(batch_norm_moments, (ceil_div(view.C, view.BC), shares), x, partial, *view.strided, view.tiles, share, **view.blocks)
        high = torch.tensor(momentum, dtype=torch.float32).item()
        launch(
            batch_norm_statistics, (ceil_div(view.C, 128),), partial, stats, running_mean, running_var, view.C, M, shares,
            *(1 if t is None else t.stride(0) for t in (running_mean, running_var)), high, momentum - high, BLOCK=128,
        )  # fmt: skip
        _normalise(x, y, view, stats, weight, bias, eps, relu)
    return y, stats


def evaluate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launcher of the eval forward."""
    view, form = view_of(x)
    check_parameters(x, weight=weight, bias=bias, running_mean=mean, running_var=var)
    if x.numel() == 0 or eps < 0:
        raise RuntimeError(f"needs at least one number and eps >= 0, got x of shape {tuple(x.shape)} and eps {eps}")
    x = x.contiguous(memory_format=form)
    y, stats = torch.empty_like(x), torch.stack([mean, var, torch.zeros_like(mean)]).to(statistics_dtype(x))
    _normalise(x, y, view, stats, weight, bias, eps, relu)
    return y, stats


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, training: bool, eps: float, relu: bool, need_dx: bool,
    need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Launcher of the backward kernels."""
    view, form = view_of(x)
    check_parameters(x, weight=weight, bias=bias)
    check_tensor("dy", dy, x, tuple(x.shape))
    check_tensor("stats", stats, stats if stats.dtype == statistics_dtype(x) and stats.device == x.device else x, (3, x.shape[1]))
    dy, x, stats = dy.contiguous(memory_format=form), x.contiguous(memory_format=form), stats.contiguous()
    weight, bias = _dense(weight), _dense(bias)
    dweight = (x if weight is None else weight).new_empty(view.C) if need_dweight else None
    dbias = (x if bias is None else bias).new_empty(view.C) if need_dbias else None
    dx, totals = torch.empty_like(x) if need_dx else None, None
    if view.C and (training or need_dweight or need_dbias):
        shares, share = view.shares(x)
        partial, totals = stats.new_empty(max(shares, 1), 2, view.C), stats.new_empty(2, view.C)
        launch(
            batch_norm_sums, (ceil_div(view.C, view.BC), max(shares, 1)), dy, x, stats, weight, bias, partial, *view.strided, view.tiles,
            share, eps=eps, RELU=relu, **view.blocks,
        )  # fmt: skip
        launch(batch_norm_totals, (ceil_div(view.C, 128),), partial, stats, totals, dweight, dbias, view.C, shares, eps=eps, BLOCK=128)
    if dx is not None and dx.numel():
        launch(
            batch_norm_dx, (ceil_div(view.C, view.BC), view.tiles), dy, x, stats, weight, bias, totals if training else None, dx, view.N,
            view.C, view.S, view.N * view.S, *view.strided[3:], eps=eps, RELU=relu, **view.blocks,
        )  # fmt: skip
    return dx, dweight, dbias


IMPLEMENTATIONS = {"batch_norm_train": train, "batch_norm_eval": evaluate, "batch_norm_backward": backward}
EXAMPLES = {
    "batch_norm_train": lambda empty: (empty(32, 64, 56, 56), empty(64), empty(64), empty(64), empty(64), 0.1, 1e-5, True),
    "batch_norm_eval": lambda empty: (empty(32, 64, 56, 56), empty(64), empty(64), empty(64), empty(64), 1e-5, True),
    "batch_norm_backward": lambda empty: (
        empty(32, 64, 56, 56), empty(32, 64, 56, 56), empty(64), empty(64), empty(3, 64).float(), True, 1e-5, True, True, True, True
    ),
}  # fmt: skip
