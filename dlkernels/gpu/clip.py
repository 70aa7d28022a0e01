"""The norm of all gradients, and their scaling, on the GPU: one launch each over the chunks of all tensors (multi_tensor.py).

A program adds up one chunk; a second kernel adds the chunks' parts in order, so the norm is the same at every run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .multi_tensor import BLOCK, CHUNK, Tensors, array_of, block_of, chunk_of, each_group, groups, larger, root


@triton.jit
def norm_parts(pointers, chunks, parts, like, n, TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """parts[c] = Σ |x|^TYPE over a chunk, or the largest |x| where TYPE is 0"""
    ACC: tl.constexpr = parts.dtype.element_ty
    entry, first, size = chunk_of(chunks)
    x = array_of(pointers, 0, n, entry, like)
    acc = tl.zeros((BLOCK,), ACC)
    for start in range(0, CHUNK, BLOCK):
        at, here = block_of(first, start, size, BLOCK)
        v = tl.abs(tl.load(x + at, here, 0.0).to(ACC))
        acc = larger(acc, v) if TYPE == 0 else acc + (v if TYPE == 1 else v * v)
    total = tl.reduce(acc, 0, larger) if TYPE == 0 else tl.sum(acc, 0)
    tl.store(parts + tl.program_id(0), total)


@triton.jit
def norm_join(parts, result, COUNT, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The norm from its parts, in order."""
    acc = tl.zeros((BLOCK,), parts.dtype.element_ty)
    for start in range(0, COUNT, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        v = tl.load(parts + i, i < COUNT, 0.0)
        acc = larger(acc, v) if TYPE == 0 else acc + v
    total = tl.reduce(acc, 0, larger) if TYPE == 0 else tl.sum(acc, 0)
    tl.store(result, root(total) if TYPE == 2 else total)


def total_norm(tensors: Tensors, norm_type: float) -> Tensor:
    """Launcher; lists and errors as the op's contract says."""
    types = {1.0: 1, 2.0: 2, math.inf: 0}
    if norm_type not in types:
        raise RuntimeError(f"norm_type is {norm_type:g}, needs 1, 2 or inf")
    found = groups({"tensors": (tensors, False)})
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    parts = tensors[0].new_empty(sum(group.chunks.shape[0] for group in found), dtype=dtype)
    result = tensors[0].new_empty((), dtype=dtype)
    begin = 0
    for group in found:
        count = group.chunks.shape[0]
        if count:
            these, like = parts[begin : begin + count], group.lists[0][0]
            n = len(group.places)
            launch(norm_parts, (count,), group.pointers, group.chunks, these, like, n, TYPE=types[norm_type], CHUNK=CHUNK, BLOCK=BLOCK)
        begin += count
    launch(norm_join, (1,), parts, result, begin, TYPE=types[norm_type], BLOCK=BLOCK)
    return result


@triton.jit
def scale_update(pointers, chunks, factor, like, n, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """x = x factor"""
    ACC: tl.constexpr = tl.float64 if like.dtype.element_ty == tl.float64 else tl.float32
    entry, first, size = chunk_of(chunks)
    x, by = array_of(pointers, 0, n, entry, like), tl.load(factor).to(ACC)
    for start in range(0, CHUNK, BLOCK):
        at, here = block_of(first, start, size, BLOCK)
        tl.store(x + at, (tl.load(x + at, here, 0.0).to(ACC) * by).to(like.dtype.element_ty), here)


def scale_(tensors: Tensors, factor: Tensor) -> None:
    """Launcher; lists and errors as the op's contract says."""
    if factor.numel() != 1:
        raise RuntimeError(f"factor has shape {tuple(factor.shape)}, needs a single number")
    each_group(
        groups({"tensors": (tensors, False)}),
        lambda group: launch(
            scale_update, (group.chunks.shape[0],), group.pointers, group.chunks, factor, group.lists[0][0], len(group.places), CHUNK=CHUNK,
            BLOCK=BLOCK,
        ),
    )  # fmt: skip


IMPLEMENTATIONS = {"total_norm": total_norm, "scale_": scale_}
EXAMPLES = {
    "total_norm": lambda empty: ([empty(1000, 1000), empty(77)], 2.0),
    "scale_": lambda empty: ([empty(1000, 1000), empty(77)], empty()),
}
