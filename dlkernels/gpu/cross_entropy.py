"""cross_entropy on the GPU: a tile of rows per program, as softmax.py cuts it, whose logits are read once forward and once backward.

    forward    a loop over blocks of classes keeps, for each row, the maximum and the sum of exponentials in registers (a larger maximum
               rescales the sum); the label's logit is one more load. Where smoothing or probabilities ask for every class, a second loop,
               mostly from the L2 cache, adds up what they ask for.
    reduce     one program adds the losses and the weights up in a fixed order: atomic sums would not repeat bit for bit
    backward   a loop over blocks of classes: dx = g (Q exp(x - top) / sum - q)

A label that is no class is never used as an address: its row gives NaN. kept = [top of every row, sum of every row, divisor].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .launch import check_tensor, launch
from .softmax import BLOCK, Cut, classes, cut, normaliser, places

REDUCE = 4096  # losses that the reducing program adds at a time


@triton.jit
def spread(p, weight, at, n, mask, N, smoothing: tl.constexpr, PROBS: tl.constexpr, ACC: tl.constexpr):
    """What smoothing and probabilities ask of the classes n: w[n] ((1 - s) p[n] + s / N)."""
    q = tl.full(mask.shape, smoothing, ACC) / N
    if PROBS:
        q += (1.0 - smoothing) * tl.load(p + at, mask, other=0.0).to(ACC)
    if weight is not None:
        q *= tl.load(weight + n, n < N, other=0.0).to(ACC)[None, :]
    return q


@triton.jit
def label_of(target, weight, row, inside, N, ignored, smoothing: tl.constexpr, ACC: tl.constexpr):
    """Of every row: its label, whether it counts, whether it is a class, the weight of that class, and what the target asks of it."""
    label = tl.load(target + row, inside, other=0)
    counts = inside & (label != ignored)
    valid = counts & (label >= 0) & (label < N)
    w = tl.where(valid, 1.0, 0.0).to(ACC)
    if weight is not None:
        w = tl.load(weight + label, valid, other=0.0).to(ACC)
    return label, counts, valid, w, (1.0 - smoothing) * w


@triton.jit
def cross_entropy_forward(
    x, target, weight, losses, masses, kept, N, ROWS, ignored, rows, row, step, block, smoothing: tl.constexpr, PROBS: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """losses[r], masses[r] (the label's weight), kept[r] = top and kept[ROWS + r] = sum."""
    ACC: tl.constexpr = kept.dtype.element_ty
    r, n, at, inside = places(rows, row, step, block, BR, BN)
    top, total = normaliser(x, N, step, n, at, inside, ACC, BR, BN)
    logsum = tl.log(total)
    there = tl.program_id(1).to(tl.int64) * rows + r
    tl.store(kept + there, top, r < rows)
    tl.store(kept + ROWS + there, total, r < rows)
    loss = tl.zeros((BR,), ACC)
    if PROBS or smoothing > 0:
        place = at
        for start in range(0, N, BN):
            mask = inside & (n < N - start)[None, :]
            below = tl.load(x + place, mask, other=0.0).to(ACC) - top[:, None]
            q = spread(target, weight, place, start + n, mask, N, smoothing, PROBS, ACC)
            loss += tl.sum(tl.where(mask, q * (logsum[:, None] - below), 0.0), axis=1)
            place += tl.full((), BN, tl.int64) * step
    mass = tl.full((BR,), 1.0, ACC)
    if not PROBS:
        label, counts, valid, mass, peak = label_of(target, weight, there, r < rows, N, ignored, smoothing, ACC)
        first = tl.program_id(1).to(tl.int64) * block + r * row
        below = tl.load(x + first + label * step, valid, other=0.0).to(ACC) - top
        loss = tl.where(valid, loss + peak * (logsum - below), tl.where(counts, float("nan"), 0.0))
    tl.store(losses + there, loss, r < rows)
    tl.store(masses + there, mass, r < rows)


@triton.jit
def reduce(losses, masses, divisor, loss, ROWS, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """loss = Σ losses, with MEAN divided by Σ masses; what it was divided by goes to divisor."""
    ACC: tl.constexpr = losses.dtype.element_ty
    r = tl.arange(0, BLOCK)
    total, mass = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for start in range(0, ROWS, BLOCK):
        total += tl.load(losses + start + r, r < ROWS - start, other=0.0)
        mass += tl.load(masses + start + r, r < ROWS - start, other=0.0)
    by = tl.sum(mass, axis=0) if MEAN else tl.full((), 1.0, ACC)
    tl.store(divisor, by)
    tl.store(loss, (tl.sum(total, axis=0) / by).to(loss.dtype.element_ty))


@triton.jit
def cross_entropy_backward(
    dy, x, target, weight, weights, kept, dx, dtarget, N, ROWS, dy_row, ignored, rows, row, step, block, smoothing: tl.constexpr,
    PROBS: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx[r, n] = g (Q exp(x - top) / sum - q) and dtarget = g w (1 - s) (log(sum) - (x - top)), whichever is not None.

    g = dy[r dy_row] / divisor. weights: the sum of weight, where smoothing asks for it."""
    ACC: tl.constexpr = kept.dtype.element_ty
    r, n, at, inside = places(rows, row, step, block, BR, BN)
    there = tl.program_id(1).to(tl.int64) * rows + r
    top = tl.load(kept + there, r < rows, other=0.0)[:, None]
    total = tl.load(kept + ROWS + there, r < rows, other=1.0)
    g = tl.load(dy + there * dy_row, r < rows, other=0.0).to(ACC) / tl.load(kept + 2 * ROWS)
    asked = tl.zeros((BR,), ACC)
    label, peak = tl.full((BR,), -1, tl.int64), tl.zeros((BR,), ACC)
    if PROBS:
        place = at
        for start in range(0, N, BN):
            mask = inside & (n < N - start)[None, :]
            asked += tl.sum(tl.where(mask, spread(target, weight, place, start + n, mask, N, smoothing, PROBS, ACC), 0.0), axis=1)
            place += tl.full((), BN, tl.int64) * step
    else:
        label, counts, valid, _, peak = label_of(target, weight, there, r < rows, N, ignored, smoothing, ACC)
        asked = peak + (smoothing * (tl.load(weights) / N if weights is not None else 1.0) if smoothing > 0 else 0.0)
        g = tl.where(counts, tl.where(valid, g, float("nan")), 0.0)
    scale = (g * asked / total)[:, None]
    for start in range(0, N, BN):
        mask = inside & (n < N - start)[None, :]
        below = tl.load(x + at, mask, other=0.0).to(ACC) - top
        if dx is not None:
            value = tl.exp(below) * scale
            if PROBS or smoothing > 0:
                value -= g[:, None] * spread(target, weight, at, start + n, mask, N, smoothing, PROBS, ACC)
            if not PROBS:
                value -= tl.where(label[:, None] == (start + n)[None, :], (g * peak)[:, None], 0.0)
            tl.store(dx + at, value.to(dx.dtype.element_ty), mask)
        if dtarget is not None:
            slope = (g * (1.0 - smoothing))[:, None] * (tl.log(total)[:, None] - below)
            if weight is not None:
                slope *= tl.load(weight + start + n, n < N - start, other=0.0).to(ACC)[None, :]
            tl.store(dtarget + at, slope.to(dtarget.dtype.element_ty), mask)
        at += tl.full((), BN, tl.int64) * step


@triton.jit
def total_weight(weight, out, N, BLOCK: tl.constexpr):
    """out = Σ_n weight[n]"""
    n = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for start in range(0, N, BLOCK):
        total += tl.load(weight + start + n, n < N - start, other=0.0).to(total.dtype)
    tl.store(out, tl.sum(total, axis=0))


def check(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> tuple[int, int, int]:
    """M, N, D of the logits, or an error that names the argument."""
    check_tensor("x", x, x, tuple(x.shape))
    shape = rows_of(x)
    if target.dtype == torch.int64:
        check_labels("target", target, x, shape)
    else:
        check_tensor("target", target, x, tuple(x.shape))
    if x.dim() == 0 or not 0 <= reduction <= 2:
        raise RuntimeError(f"x has {x.dim()} dimensions and reduction is {reduction}; needs at least 1 dimension and a code from 0 to 2")
    M, N, D = classes(tuple(x.shape), int(x.dim() > 1))
    if weight is not None:
        check_tensor("weight", weight, x, (N,))
    if N == 0:
        raise RuntimeError("x has 0 classes, needs at least 1")
    return M, N, D


def rows_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[:1] + x.shape[2:]) if x.dim() > 1 else ()


def check_labels(name: str, t: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """Require of ``t``: int64, the device of ``like``, and ``shape``."""
    if (type(t) is not Tensor and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__) or t.layout is not torch.strided:
        raise TypeError(f"{name} must be a plain strided tensor, got a {type(t).__name__} of layout {t.layout}")
    if t.dtype != torch.int64 or t.device != like.device:
        raise RuntimeError(f"{name} must be int64 on {like.device}, got {t.dtype} on {t.device}")
    if tuple(t.shape) != shape:
        raise RuntimeError(f"{name} must have shape {shape}, got {tuple(t.shape)}")


def blocks(M: int, N: int, D: int) -> Cut:
    """As softmax cuts it, with a long row in blocks: the logits need not stay."""
    return cut(M, N, D, longest=BLOCK)


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Launcher of ``cross_entropy_forward`` and ``reduce``; shapes and errors as the op's contract says."""
    M, N, D = check(x, target, weight, reduction)
    R, c, shape = M * D, blocks(M, N, D), rows_of(x)
    kept = x.new_empty(2 * R + 1, dtype=statistics_dtype(x))
    losses, masses = kept.new_empty(R), kept.new_empty(R)
    if R:
        run_forward(c, x.contiguous(), target.contiguous(), None if weight is None else weight.contiguous(), losses, masses, kept, N,
                    ignore_index, label_smoothing)  # fmt: skip
    loss = x.new_empty(())
    launch(reduce, (1,), losses, masses, kept[2 * R :], loss, R, MEAN=reduction == 1, BLOCK=REDUCE)
    return (loss if reduction else losses.to(x.dtype).view(shape)), kept


def run_forward(
    c: Cut, x: Tensor, target: Tensor, weight: Tensor | None, losses: Tensor, masses: Tensor, kept: Tensor, N: int, ignore_index: int,
    smoothing: float,
) -> None:  # fmt: skip
    """Fill losses, masses and kept but for its divisor; everything contiguous."""
    launch(
        cross_entropy_forward, c.grid, x, target, weight, losses, masses, kept, N, losses.numel(), ignore_index, c.rows, c.row, c.step,
        c.block, smoothing=smoothing, PROBS=target.dtype != torch.int64, BR=c.BR, BN=c.BN, warps=c.warps,
    )  # fmt: skip


def run_backward(
    c: Cut, dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, weights: Tensor | None, kept: Tensor, dx: Tensor | None,
    dtarget: Tensor | None, N: int, ignore_index: int, smoothing: float,
) -> None:  # fmt: skip
    """Fill dx and dtarget, whichever is not None; dy is one number or one for each row; everything contiguous."""
    launch(
        cross_entropy_backward, c.grid, dy, x, target, weight, weights, kept, dx, dtarget, N, (kept.numel() - 1) // 2, int(dy.dim() > 0),
        ignore_index, c.rows, c.row, c.step, c.block, smoothing=smoothing, PROBS=target.dtype != torch.int64, BR=c.BR, BN=c.BN,
        warps=c.warps,
    )  # fmt: skip


def sum_of(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Σ weight, or None where there is none."""
    if weight is None:
        return None
    total = weight.new_empty((), dtype=dtype)
    launch(total_weight, (1,), weight, total, weight.numel(), BLOCK=1024)
    return total


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, kept: Tensor, reduction: int, ignore_index: int, label_smoothing: float,
    need_dx: bool, need_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Launcher of ``cross_entropy_backward``; shapes and errors as the op's contract says."""
    M, N, D = check(x, target, weight, reduction)
    R, c = M * D, blocks(M, N, D)
    check_tensor("dy", dy, x, () if reduction else rows_of(x))
    check_tensor("kept", kept, kept.new_empty(0, dtype=statistics_dtype(x), device=x.device), (2 * R + 1,))
    if need_dtarget and target.dtype == torch.int64:
        raise RuntimeError("labels have no gradient")
    dx, dtarget = x.new_empty(x.shape) if need_dx else None, x.new_empty(x.shape) if need_dtarget else None
    if R == 0 or not (need_dx or need_dtarget):
        return dx, dtarget
    weight = None if weight is None else weight.contiguous()
    dy = dy.contiguous() if reduction else dy.reshape(R)
    run_backward(c, dy, x.contiguous(), target.contiguous(), weight, sum_of(weight, kept.dtype), kept.contiguous(), dx, dtarget, N,
                 ignore_index, label_smoothing)  # fmt: skip
    return dx, dtarget


IMPLEMENTATIONS = {"cross_entropy_forward": forward, "cross_entropy_backward": backward}
EXAMPLES = {
    "cross_entropy_forward": lambda empty: (empty(4096, 32000), empty(4096).long(), None, 1, -100, 0.0),
    "cross_entropy_backward": lambda empty: (
        empty(), empty(4096, 32000), empty(4096).long(), None, empty(8193).float(), 1, -100, 0.0, True, False,
    ),
}  # fmt: skip
