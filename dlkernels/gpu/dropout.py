"""dropout on the GPU: y[n] = x[n] f[n], forward and backward alike, with f computed from the seed and the place.

A program owns 4 COUNTERS consecutive numbers. Its threads hold one counter each, whose four words belong to numbers 16 apart: four loads
and four stores of runs of 16 numbers, which is the least that memory is asked for at once. The seed is read by the kernel, so the host
never waits for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .launch import check_seed, check_tensor, launch
from .philox import as_float64, columns, factor, words

COUNTERS = 256


@triton.jit
def dropout_map(x, y, seed, N, threshold, scale_bits, COUNTERS: tl.constexpr):
    """y[n] = x[n] factor(n); y may be x."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    scale = as_float64(scale_bits).to(ACC)
    q = tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    numbers = words(tl.load(seed), 0, q)
    for lane in tl.static_range(4):
        n = columns(q, lane)
        v = tl.load(x + n, n < N).to(ACC)
        tl.store(y + n, (v * factor(numbers[lane], threshold, scale)).to(y.dtype.element_ty), n < N)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    _check(x, seed)
    y = x.new_empty(x.shape)
    _run(x.contiguous(), y, seed, p)
    return y


def dropout_(x: Tensor, seed: Tensor, p: float) -> None:
    _check(x, seed)
    if not x.is_contiguous():
        raise RuntimeError("x must be contiguous to be changed in place")
    _run(x, x, seed, p)


def _check(x: Tensor, seed: Tensor) -> None:
    check_tensor("x", x, x, tuple(x.shape))
    check_seed(seed, x)


def _run(x: Tensor, y: Tensor, seed: Tensor, p: float) -> None:
    N, thresholds = x.numel(), philox.thresholds(p)
    if N:
        launch(dropout_map, (triton.cdiv(N, 4 * COUNTERS),), x, y, seed, N, *thresholds, COUNTERS=COUNTERS)


def _example(empty):
    x = empty(1024, 1024)
    return x, x.new_empty(1, dtype=torch.int64), 0.3


IMPLEMENTATIONS = {"dropout": dropout, "dropout_": dropout_}
EXAMPLES = dict.fromkeys(IMPLEMENTATIONS, _example)
