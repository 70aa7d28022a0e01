"""embedding on the GPU: a program copies ROWS rows, BLOCK columns of each at a time.

The backward adds without atomics, so that every run gives the same bits: the indices are sorted (stably, by torch, which moves L numbers
and none of dy), and the program of row v of weight adds the rows of dy that lie between the places where v starts and ends. It writes its
row once, zeros where there is nothing to add. A row that very many indices share is added by one program alone; that is the price.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_tensor, launch

ROWS = 4
INDICES = (torch.int64, torch.int32)


@triton.jit
def embedding_forward(weight, indices, y, outside, L, V, D, pitch, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y[l] = weight[indices[l]]; outside[i]: how many indices of the i-th program are not in [0, V); those read nothing."""
    l = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    v = tl.load(indices + l, l < L, 0).to(tl.int64)
    inside = (v >= 0) & (v < V)
    tl.store(outside + tl.program_id(0), tl.sum(((l < L) & ~inside).to(tl.int32), 0))
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = (l < L)[:, None] & (d < D)[None, :]
        rows = tl.load(weight + v[:, None] * pitch + d[None, :] * stride, mask & inside[:, None], 0.0)
        tl.store(y + l[:, None] * D + d[None, :], rows, mask)


@triton.jit
def embedding_backward(dy, order, starts, dweight, D, padding_idx, BY_FREQUENCY: tl.constexpr, BLOCK: tl.constexpr):
    """dweight[v] = Σ dy[order[j]] for j from starts[v] to starts[v + 1], over their number if BY_FREQUENCY"""
    ACC: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    v = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(starts + v), tl.load(starts + v + 1)
    end = tl.where(v == padding_idx, begin, end)
    acc = tl.zeros((BLOCK,), ACC)
    for j in range(begin, end):
        acc += tl.load(dy + tl.load(order + j) * D + d, d < D, 0.0).to(ACC)
    if BY_FREQUENCY:
        acc /= tl.maximum(end - begin, 1).to(ACC)
    tl.store(dweight + v * D + d, acc.to(dweight.dtype.element_ty), d < D)


def forward(weight: Tensor, indices: Tensor) -> Tensor:
    """Launcher of the forward kernel; shapes and errors as the op's contract says."""
    if weight.dim() != 2:
        raise RuntimeError(f"weight must be (V, D), got {tuple(weight.shape)}")
    V, D = weight.shape
    check_tensor("weight", weight, weight, (V, D))
    indices = _checked_indices(indices, weight)
    L, programs = indices.numel(), triton.cdiv(indices.numel(), ROWS)
    y = weight.new_empty((*indices.shape, D))
    outside = torch.empty(programs, dtype=torch.int32, device=weight.device)
    if L:
        launch(embedding_forward, (programs,), weight, indices, y, outside, L, V, D, *weight.stride(), ROWS=ROWS, BLOCK=_block(D))
        torch._assert_async(outside.sum() == 0, f"embedding: an index is out of range for the {V} rows of weight")
    return y


def backward(dy: Tensor, indices: Tensor, V: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """Launcher of the backward kernel; shapes and errors as the op's contract says."""
    if dy.dim() == 0 or V < 0:
        raise RuntimeError(f"dy must be (*, D) and V not negative, got {tuple(dy.shape)} and {V}")
    indices, D = _checked_indices(indices, dy), dy.shape[-1]
    check_tensor("dy", dy, dy, (*indices.shape, D))
    dweight = dy.new_empty((V, D))
    if V and D:
        ordered, order = indices.reshape(-1).long().sort(stable=True)
        if ordered.numel():
            torch._assert_async((ordered[0] >= 0) & (ordered[-1] < V), f"embedding: an index is out of range for the {V} rows of weight")
        starts = torch.searchsorted(ordered, torch.arange(V + 1, device=dy.device))
        BLOCK = _block(D)
        launch(
            embedding_backward, (V, triton.cdiv(D, BLOCK)), dy.contiguous(), order, starts, dweight, D, padding_idx,
            BY_FREQUENCY=scale_grad_by_freq, BLOCK=BLOCK,
        )  # fmt: skip
    return dweight


def _block(D: int) -> int:
    return min(1024, triton.next_power_of_2(max(D, 1)))


def _checked_indices(indices: Tensor, like: Tensor) -> Tensor:
    """The indices, contiguous, or an error; those of int32 or int64 on the device of ``like`` pass."""
    if type(indices) is not Tensor and type(indices).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"indices is a {type(indices).__name__}, which has no memory of its own for a kernel to read; pass its local tensor"
        )
    if indices.layout is not torch.strided or indices.dtype not in INDICES or indices.device != like.device:
        raise RuntimeError(
            f"indices must be strided, of int64 or int32 on {like.device}, got {indices.dtype}, {indices.layout} on {indices.device}"
        )
    return indices.contiguous()


IMPLEMENTATIONS = {"embedding_forward": forward, "embedding_backward": backward}
EXAMPLES = {
    "embedding_forward": lambda empty: (empty(32000, 512), empty(8192).long()),
    "embedding_backward": lambda empty: (empty(8192, 512), empty(8192).long(), 32000, -1, False),
}
