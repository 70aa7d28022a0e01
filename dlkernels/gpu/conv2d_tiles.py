"""Which tile a product of conv2d is cut into: the fastest by config.py's model among those that suit a gathered operand."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import triton
from torch import Tensor

from ..contract import statistics_dtype
from .config import Config, candidates, ceil_div
from .conv2d_windows import layout
from .launch import Device

FEW = 16  # channels that do not fill a step


@lru_cache(maxsize=4096)
def tile_of(kind: str, rows: int, cols: int, depth: int, width: int, most: int, splits: bool, device: Device) -> Config:
    """The tile, of ``most`` numbers at the most, for a product of ``rows`` and ``cols`` that sums over ``depth``; it is no wider than the
    ``width`` columns that lie together. Addresses take registers beside the accumulator, so large tiles get many threads."""
    width = max(16, triton.next_power_of_2(width))
    found = [c for c in candidates(kind, rows, cols, depth, device) if c.rows * c.cols <= most and (splits or c.split == 1)]
    best = next((c for c in found if c.cols <= max(width, 64)), found[0])
    return replace(best, cols=min(best.cols, width), warps=8 if best.rows * best.cols >= 64 * 128 else best.warps)


def most_of(y: Tensor, z: Tensor | None = None) -> int:
    """Numbers of a tile whose addresses fit the registers when it is written: few where each has its own."""
    if layout(y)[0] != 1:
        return 128 * 64
    return 128 * 256 if z is None else 128 * 128


def few_channels(c: Config) -> Config:
    """``c`` where every number has an address of its own: small steps and many threads keep these in registers."""
    return replace(c, depth=min(c.depth, 32), warps=8)


def stepped(c: Config, channels: int) -> tuple[Config, bool]:
    """``c`` with as many of the ``channels`` to a step as suit them, and whether a step has many taps (FLAT). A step costs as much as
    some 16 channels more."""
    if channels < FEW:
        return few_channels(c), True
    sizes = [size for size in (128, 64, 32, 16) if size <= c.depth]
    return replace(c, depth=min(sizes, key=lambda size: ceil_div(channels, size) * (size + 16))), False


def count_of(c: Config, taps: int, channels: int, flat: bool) -> int:
    """Steps of the sum over all taps and channels."""
    return ceil_div(taps * channels, c.depth) if flat else taps * ceil_div(channels, c.depth)


def shared(c: Config, count: int, unit: int, result: Tensor) -> tuple[Tensor, int, int]:
    """Where programs write (``result``, or a workspace with a partial result for each share), how much of ``count`` each sums, in whole
    units, and how many shares there are."""
    share = ceil_div(ceil_div(count, c.split), unit) * unit
    shares = max(1, ceil_div(count, max(1, share)))
    out = result if shares == 1 else result.new_empty((shares, result.numel()), dtype=statistics_dtype(result))
    return out, share, shares
