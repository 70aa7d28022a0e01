"""Windows of a filter over images: sizes and their check, and where a kernel finds a window's numbers.

              left        W                        x (N, C, H, W) -> y (N, O, P, Q) with a filter (O, C / G, R, S)
            ┌ ─ ─ ┬───────────────┬ ─ ┐
        top                                        position (p, q) sees, under tap (r, s), the pixel
            ├ ─ ─ ┼───────────────┼ ─ ┤                h = p sh - top  + r dh
              ┌───│───┐           │                    w = q sw - left + s dw
         H    │window │           │   │            outside of [0, H) x [0, W) lies the padding: zeros that no memory holds
              └───│───┘           │

* Both memory formats, contiguous and channels_last, are told to the kernels by three numbers: how far apart neighbouring channels lie,
  how far apart neighbouring pixels, and by how much more than its pixels an image is apart from the next (None where by nothing).
* Positions and pixels are counted through all images, in 32 bits, as divisions of 64 are slow routines; offsets are 64-bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .activations import EPILOGUES
from .launch import check_tensor

COUNT = 2**31 - 2**28  # so many pixels can be counted in 32 bits; the rest is for what lies on the padding, and for the last tile


@triton.jit
def positions(m, P, Q):
    """Image, row and column of the m-th position of [N, P, Q]."""
    return m // Q // P, m // Q % P, m % Q


@triton.jit
def advance(n, p, q, STEP, P, Q):
    """The positions STEP further on: an addition with carries, digit by digit, as a division at every step of a loop would cost more."""
    q += STEP % Q
    carry = q >= Q
    q = tl.where(carry, q - Q, q)
    p += STEP // Q % P + carry.to(tl.int32)
    carry = p >= P
    p = tl.where(carry, p - P, p)
    n += STEP // Q // P + carry.to(tl.int32)
    return n, p, q


@triton.jit
def place(n, pixel, stride, gap):
    """Offsets (int64) of pixels, which are of the images n. Those of the padding are not for use."""
    at = pixel.to(tl.int64) * stride
    if gap is not None:
        at += n.to(tl.int64) * gap
    return at


@triton.jit
def exists(h, w, H, W):
    """Whether a pixel lies on the image and not on the padding."""
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


def layout(t: Tensor) -> tuple[int, int, int | None]:
    """From channel to channel, from pixel to pixel, and what else lies between two images, of a dense tensor (N, C, H, W)."""
    _, C, H, W = t.shape
    return (1, C, None) if t.is_contiguous(memory_format=torch.channels_last) else (H * W, 1, (C - 1) * H * W)


class Windows(NamedTuple):
    """Sizes of a convolution: images, channels, pixels, output channels, filter, positions, groups; stride, padding, dilation."""

    N: int
    C: int
    H: int
    W: int
    O: int
    R: int
    S: int
    P: int
    Q: int
    G: int
    sh: int
    sw: int
    top: int
    left: int
    dh: int
    dw: int

    @property
    def M(self) -> int:
        """Positions of all images: the rows of the product."""
        return self.N * self.P * self.Q

    @property
    def inputs(self) -> int:
        """Channels of a group."""
        return self.C // self.G

    @property
    def outputs(self) -> int:
        """Output channels of a group."""
        return self.O // self.G

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return self.N * self.H * self.W

    @property
    def moves(self) -> tuple[int, ...]:
        return self[-6:]


def windows_of(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, activation: int
) -> tuple[Windows, torch.memory_format]:
    """The sizes, and the memory format of x, which its result has too; or an error that names the argument."""
    if x.dim() != 4 or weight.dim() != 4:
        raise RuntimeError(f"x and weight must be (N, C, H, W) and (O, C / groups, R, S), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if not 0 <= activation < len(EPILOGUES):
        raise ValueError(f"activation must be a code from 0 to {len(EPILOGUES) - 1}, got {activation}")
    for name, values, count, least in (("stride", stride, 2, 1), ("padding", padding, 4, 0), ("dilation", dilation, 2, 1)):
        if len(values) != count or min(values) < least:
            raise RuntimeError(f"{name} must be {count} numbers of at least {least}, got {list(values)}")
    (N, C, H, W), (O, _, R, S) = x.shape, weight.shape
    if groups < 1 or C % groups or O % groups:
        raise RuntimeError(f"groups must divide {C} channels and {O} output channels, got {groups}")
    check_tensor("x", x, x, (N, C, H, W))
    check_tensor("weight", weight, x, (O, C // groups, R, S))
    (sh, sw), (top, bottom, left, right), (dh, dw) = stride, padding, dilation
    P, Q = (H + top + bottom - dh * (R - 1) - 1) // sh + 1, (W + left + right - dw * (S - 1) - 1) // sw + 1
    if min(R, S, P, Q) < 1:
        raise RuntimeError(f"a filter of {R} x {S} taps does not fit x of shape {tuple(x.shape)} with padding {list(padding)}")
    if N * max(P * Q, H * W) > COUNT:
        raise RuntimeError(f"kernels count up to {COUNT} positions, got {N} images of {H} x {W} -> {P} x {Q}; split the batch")
    return Windows(N, C, H, W, O, R, S, P, Q, groups, sh, sw, top, left, dh, dw), suggest_memory_format(x)
