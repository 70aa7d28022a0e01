"""avg_pool2d on the GPU, regular or adaptive: a program per BLOCK results, see windows.py for how they lie and which windows see a place.

Places are added in the order of rows, windows in theirs. A number of dx divides what it takes from each window anew: a division costs less
than reading a table of divisors. Memory decides, so there is nothing to tune.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .windows import BLOCK, axes_of, checked, empty, first_seeing, form_of, grid, offset, offsets, padded, place, places, start


@triton.jit
def avg_pool2d_forward(
    x, y, N, C, H, P, kh, sh, ph, dh, W, Q, kw, sw, pw, dw, ROWS, COLUMNS, divisor, PADDED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y[p,q] = Σ x over window (p, q), which sees at most ROWS x COLUMNS places, / m(p, q)."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    at, inside, p, q, nc = place(N, C, P, Q, CHANNELS_LAST, BLOCK)
    top, left = start(p, H, P, kh, sh, ph), start(q, W, Q, kw, sw, pw)
    r0, r1 = offsets(p, H, P, kh, sh, ph, dh)
    s0, s1 = offsets(q, W, Q, kw, sw, pw, dw)
    acc = tl.zeros((BLOCK,), ACC)
    for i in range(ROWS):
        r = r0 + i
        for j in range(COLUMNS):
            s = s0 + j
            seen = inside & (r < r1) & (s < s1)
            acc += tl.load(x + offset(nc, top + r, left + s, C, H, W, CHANNELS_LAST), seen, 0.0).to(ACC)
    count = places(p, H, P, kh, sh, ph, PADDED) * places(q, W, Q, kw, sw, pw, PADDED)
    m = tl.where(divisor != 0, divisor, count).to(ACC)
    tl.store(y + at, (acc / m).to(y.dtype.element_ty), inside)


@triton.jit
def avg_pool2d_backward(
    dy, dx, N, C, H, P, kh, sh, ph, dh, W, Q, kw, sw, pw, dw, ROWS, COLUMNS, divisor, PADDED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx[h,w] = Σ dy[p,q] / m(p,q) over the windows that see (h, w), which are among ROWS x COLUMNS."""
    ACC: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    at, inside, h, w, nc = place(N, C, H, W, CHANNELS_LAST, BLOCK)
    p0, q0 = first_seeing(h, H, P, kh, sh, ph, dh), first_seeing(w, W, Q, kw, sw, pw, dw)
    acc = tl.zeros((BLOCK,), ACC)
    for i in range(ROWS):
        p = p0 + i
        r = h - start(p, H, P, kh, sh, ph)
        in_row = inside & (p < P) & (r >= 0)
        for j in range(COLUMNS):
            q = q0 + j
            s = w - start(q, W, Q, kw, sw, pw)
            seen = in_row & (q < Q) & (s >= 0)
            count = places(p, H, P, kh, sh, ph, PADDED) * places(q, W, Q, kw, sw, pw, PADDED)
            m = tl.where(divisor != 0, divisor, tl.where(seen, count, 1)).to(ACC)
            acc += tl.load(dy + offset(nc, p, q, C, P, Q, CHANNELS_LAST), seen, 0.0).to(ACC) / m
    tl.store(dx + at, acc.to(dx.dtype.element_ty), inside)


Ints = Sequence[int]


def forward(x: Tensor, P: int, Q: int, kernel: Ints, stride: Ints, padding: Ints, include_pad: bool, divisor: int) -> Tensor:
    """Launcher of the forward kernel; shapes and errors as the op's contract says."""
    N, C, H, W = checked("x", x).shape
    h, w = axes_of((H, W), (P, Q), kernel, stride, padding, (1, 1))
    form = form_of(x)
    x, y = x.contiguous(memory_format=form), empty(x, P, Q, form)
    if y.numel():
        sizes = N, C, *h.arguments, *w.arguments, h.steps, w.steps, divisor
        mean = {"PADDED": padded(include_pad, kernel), "CHANNELS_LAST": form == torch.channels_last}
        launch(avg_pool2d_forward, grid(y), x, y, *sizes, **mean, BLOCK=BLOCK)
    return y


def backward(
    dy: Tensor, H: int, W: int, kernel: Ints, stride: Ints, padding: Ints, include_pad: bool, divisor: int, channels_last: bool
) -> Tensor:
    """Launcher of the backward kernel; shapes and errors as the op's contract says."""
    N, C, P, Q = checked("dy", dy).shape
    h, w = axes_of((H, W), (P, Q), kernel, stride, padding, (1, 1))
    form = torch.channels_last if channels_last else torch.contiguous_format
    dy, dx = dy.contiguous(memory_format=form), empty(dy, H, W, form)
    if dx.numel():
        sizes = N, C, *h.arguments, *w.arguments, h.overlap, w.overlap, divisor
        launch(avg_pool2d_backward, grid(dx), dy, dx, *sizes, PADDED=padded(include_pad, kernel), CHANNELS_LAST=channels_last, BLOCK=BLOCK)
    return dx


IMPLEMENTATIONS = {"avg_pool2d_forward": forward, "avg_pool2d_backward": backward}
EXAMPLES = {
    "avg_pool2d_forward": lambda empty: (empty(8, 64, 112, 112), 56, 56, (3, 3), (2, 2), (1, 1), True, 0),
    "avg_pool2d_backward": lambda empty: (empty(8, 64, 56, 56), 112, 112, (3, 3), (2, 2), (1, 1), True, 0, False),
}
