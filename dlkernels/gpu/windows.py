"""Where the windows of a pooling lie, on the GPU: what max_pool2d and avg_pool2d share.

A program makes BLOCK numbers of its result, neighbours in memory, contiguous or channels last. Forward, each walks over the places of its
window; backward, each walks over the windows that may see it and takes what is its own: no atomics, the same bits on every run.
Neighbouring lanes read neighbouring numbers in either format, or numbers ``stride`` apart, from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .launch import check_tensor

BLOCK = 256
LIMIT = 1 << 31


@triton.jit
def place(N, C, H, W, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of this program in an (N, C, H, W) tensor: their offsets, which exist, their h and w, and n C + c (int64)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.cast(N, tl.int64) * C * H * W
    if CHANNELS_LAST:
        pixel = at // C
        return at, inside, pixel // W % H, pixel % W, pixel // W // H * C + at % C
    return at, inside, at // W % H, at % W, at // W // H


@triton.jit
def offset(nc, h, w, C, H, W, CHANNELS_LAST: tl.constexpr):
    """Where number (n, c, h, w) of an (N, C, H, W) tensor lies; nc = n C + c."""
    if CHANNELS_LAST:
        return ((nc // C * H + h) * W + w) * C + nc % C
    return (nc * H + h) * W + w


@triton.jit
def start(p, n, P, kernel, stride, padding):
    """Where window p (int64) of P begins along n numbers; it may be in the padding. A kernel of 0: adaptive windows, here and below."""
    return tl.where(kernel == 0, p * n // P, p * stride - padding)


@triton.jit
def offsets(p, n, P, kernel, stride, padding, dilation):
    """The offsets of window p that lie inside: the first, and the one behind the last. `start + offset dilation` is the place."""
    at = start(p, n, P, kernel, stride, padding)
    count = tl.where(kernel == 0, ((p + 1) * n + P - 1) // P - at, kernel)
    return tl.maximum((dilation - 1 - at) // dilation, 0), tl.minimum(count, (n - at + dilation - 1) // dilation)


@triton.jit
def places(p, n, P, kernel, stride, padding, PADDED: tl.constexpr):
    """How many places of window p count for the mean: those inside, or with PADDED those in the padding too; no dilation."""
    if PADDED:
        return tl.minimum(start(p, n, P, kernel, stride, padding) + kernel, n + padding + p * 0) - start(p, n, P, kernel, stride, padding)
    first, last = offsets(p, n, P, kernel, stride, padding, 1)
    return last - first


@triton.jit
def first_seeing(h, n, P, kernel, stride, padding, dilation):
    """The first window that may see place h (int64)."""
    before = h + padding + dilation - (h * 0 + kernel) * dilation
    return tl.where(kernel == 0, h * P // n, tl.maximum((before + stride - 1) // stride, 0))


class Axis:
    """The windows along one dimension, checked. ``arguments`` are what the kernels take."""

    def __init__(self, name: str, n: int, P: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
        if not (1 <= n < LIMIT and 1 <= P < LIMIT):
            raise RuntimeError(f"{name} of input and output is {n} and {P}, needs at least 1 and less than 2^31 of each")
        if not all(0 <= value < LIMIT for value in (kernel, stride, padding, dilation)):
            raise RuntimeError("kernel_size, stride, padding and dilation need to be less than 2^31 and not negative")
        if kernel == 0 and (stride, padding, dilation) != (1, 0, 1):
            raise RuntimeError("kernel_size 0, for adaptive windows, needs stride 1, padding 0 and dilation 1")
        if stride < 1 or dilation < 1:
            raise RuntimeError(f"stride and dilation need to be at least 1, got {stride} and {dilation}")
        if kernel and 2 * padding > kernel:
            raise RuntimeError(f"padding is {padding}, needs to be at most half of kernel_size {kernel}")
        if kernel and (P - 1) * stride >= n + padding:
            raise RuntimeError(f"the last of {P} windows would begin behind the {name} {n}")
        self.arguments = (n, P, kernel, stride, padding, dilation)
        self.widest = kernel or n // P + (2 if n % P else 0)
        span = (kernel - 1) * dilation + 1
        self.steps = min(self.widest, -(-n // dilation))  # no window sees more places
        self.overlap = min(P, -(-span // stride) if kernel else -(-P // n) + 1)  # no place by more windows


def axes_of(plane: Sequence[int], size: Sequence[int], *geometry: Sequence[int]) -> tuple[Axis, Axis]:
    """The windows for height and width; ``geometry`` is kernel_size, stride, padding and dilation."""
    if any(len(pair) != 2 for pair in geometry) or (geometry[0][0] == 0) != (geometry[0][1] == 0):
        raise RuntimeError("kernel_size, stride, padding and dilation need 2 numbers each; a kernel_size of 0 for both or for none")
    h, w = (Axis(name, plane[d], size[d], *(pair[d] for pair in geometry)) for d, name in enumerate(("height", "width")))
    if plane[0] * plane[1] >= LIMIT or h.widest * w.widest >= LIMIT:
        raise RuntimeError(f"a plane of {tuple(plane)} in windows of {(h.widest, w.widest)}, needs less than 2^31 places in each")
    return h, w


def padded(include_pad: bool, kernel: Sequence[int]) -> bool:
    """Whether places in the padding count: adaptive windows have none."""
    return include_pad and kernel[0] > 0


def checked(name: str, t: Tensor) -> Tensor:
    if t.dim() != 4:
        raise RuntimeError(f"{name} must have 4 dimensions, got {t.dim()}")
    check_tensor(name, t, t, tuple(t.shape))
    return t


def form_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if suggest_memory_format(x) == torch.channels_last else torch.contiguous_format


def empty(like: Tensor, H: int, W: int, form: torch.memory_format, dtype: torch.dtype | None = None) -> Tensor:
    """(N, C, H, W) with the first two of ``like``."""
    return torch.empty((*like.shape[:2], H, W), dtype=dtype or like.dtype, device=like.device, memory_format=form)


def grid(t: Tensor) -> tuple[int]:
    return (triton.cdiv(t.numel(), BLOCK),)
