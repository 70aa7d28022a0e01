"""max_pool2d on the GPU, regular or adaptive: a program per BLOCK results, see windows.py for how they lie and which windows see a place.

v replaces the largest number so far where it is larger or NaN, in the order of rows: the first maximum, or the last NaN. The backward reads
dy and argmax of the windows around its place, which its neighbours read too, and writes dx once. Memory decides: nothing is there to tune.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .windows import BLOCK, Axis, axes_of, checked, empty, first_seeing, form_of, grid, offset, offsets, place, start


@triton.jit
def max_pool2d_forward(
    x, y, argmax, N, C, H, P, kh, sh, ph, dh, W, Q, kw, sw, pw, dw, KW, ROWS, COLUMNS, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y[p,q] = max x over window (p, q), which sees at most ROWS x COLUMNS places, and, unless it is None, argmax[p,q] = r KW + s."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    at, inside, p, q, nc = place(N, C, P, Q, CHANNELS_LAST, BLOCK)
    top, left = start(p, H, P, kh, sh, ph), start(q, W, Q, kw, sw, pw)
    r0, r1 = offsets(p, H, P, kh, sh, ph, dh)
    s0, s1 = offsets(q, W, Q, kw, sw, pw, dw)
    value, code = tl.full((BLOCK,), float("-inf"), ACC), (r0 * KW + s0).to(tl.int32)
    for i in range(ROWS):
        r = r0 + i
        for j in range(COLUMNS):
            s = s0 + j
            seen = inside & (r < r1) & (s < s1)
            v = tl.load(x + offset(nc, top + r * dh, left + s * dw, C, H, W, CHANNELS_LAST), seen, float("-inf")).to(ACC)
            better = (v > value) | (v != v)
            value, code = tl.where(better, v, value), tl.where(better, (r * KW + s).to(tl.int32), code)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)
    if argmax is not None:
        tl.store(argmax + at, code.to(argmax.dtype.element_ty), inside)


@triton.jit
def max_pool2d_backward(
    dy, argmax, dx, N, C, H, P, kh, sh, ph, dh, W, Q, kw, sw, pw, dw, KW, ROWS, COLUMNS, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dx[h,w] = the sum of dy[p,q] over the windows whose argmax is (h, w), among the ROWS x COLUMNS that may see it."""
    ACC: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    at, inside, h, w, nc = place(N, C, H, W, CHANNELS_LAST, BLOCK)
    p0, q0 = first_seeing(h, H, P, kh, sh, ph, dh), first_seeing(w, W, Q, kw, sw, pw, dw)
    acc = tl.zeros((BLOCK,), ACC)
    for i in range(ROWS):
        p = p0 + i
        r = h - start(p, H, P, kh, sh, ph)
        in_row = inside & (p < P) & (r >= 0) & (r % dh == 0)
        for j in range(COLUMNS):
            q = q0 + j
            s = w - start(q, W, Q, kw, sw, pw)
            seen = in_row & (q < Q) & (s >= 0) & (s % dw == 0) & (s // dw < KW)
            taken = offset(nc, p, q, C, P, Q, CHANNELS_LAST)
            mine = seen & (tl.load(argmax + taken, seen, 0).to(tl.int32) == r // dh * KW + s // dw)
            acc += tl.load(dy + taken, mine, 0.0).to(ACC)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), inside)


Ints = Sequence[int]


def codes_of(h: Axis, w: Axis) -> torch.dtype:
    """The dtype that holds the number of a place in a window."""
    return torch.uint8 if h.widest * w.widest <= 256 else torch.int32


def forward(
    x: Tensor, P: int, Q: int, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, need_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Launcher of the forward kernel; shapes and errors as the op's contract says."""
    N, C, H, W = checked("x", x).shape
    h, w = axes_of((H, W), (P, Q), kernel, stride, padding, dilation)
    form = form_of(x)
    x, y = x.contiguous(memory_format=form), empty(x, P, Q, form)
    argmax = empty(x, P, Q, form, codes_of(h, w)) if need_argmax else None
    if y.numel():
        sizes = N, C, *h.arguments, *w.arguments, w.widest, h.steps, w.steps
        launch(max_pool2d_forward, grid(y), x, y, argmax, *sizes, CHANNELS_LAST=form == torch.channels_last, BLOCK=BLOCK)
    return y, argmax


def backward(
    dy: Tensor, argmax: Tensor, H: int, W: int, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool
) -> Tensor:
    """Launcher of the backward kernel; shapes and errors as the op's contract says."""
    N, C, P, Q = checked("dy", dy).shape
    h, w = axes_of((H, W), (P, Q), kernel, stride, padding, dilation)
    codes = codes_of(h, w)
    fits = type(argmax) is Tensor and argmax.dtype == codes and argmax.shape == dy.shape
    if not fits or argmax.device != dy.device or argmax.layout is not torch.strided:
        raise RuntimeError(
            f"argmax must be a plain strided tensor of {codes} and shape {tuple(dy.shape)} on {dy.device}, "
            f"got a {type(argmax).__name__} of {argmax.dtype}, {argmax.layout} and shape {tuple(argmax.shape)} on {argmax.device}"
        )
    form = torch.channels_last if channels_last else torch.contiguous_format
    dx = empty(dy, H, W, form)
    if dx.numel():
        sizes = N, C, *h.arguments, *w.arguments, w.widest, h.overlap, w.overlap
        tensors = (t.contiguous(memory_format=form) for t in (dy, argmax))
        launch(max_pool2d_backward, grid(dx), *tensors, dx, *sizes, CHANNELS_LAST=channels_last, BLOCK=BLOCK)
    return dx


IMPLEMENTATIONS = {"max_pool2d_forward": forward, "max_pool2d_backward": backward}
EXAMPLES = {
    "max_pool2d_forward": lambda empty: (empty(8, 64, 112, 112), 56, 56, (3, 3), (2, 2), (1, 1), (1, 1), True),
    "max_pool2d_backward": lambda empty: (
        empty(8, 64, 56, 56), empty(8, 64, 56, 56).to(torch.uint8), 112, 112, (3, 3), (2, 2), (1, 1), (1, 1), False
    ),
}  # fmt: skip
