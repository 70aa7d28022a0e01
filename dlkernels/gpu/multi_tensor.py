"""Many tensors in one launch: a table of their addresses, and a table of the chunks that they are cut into.

    pointers [arrays, n]   address of entry i's array a                chunks [c, 3]   entry, first number, size of the entry
    program c              numbers [first, first + CHUNK) of one entry, BLOCK at a time

The tables stay on the device and are made anew only when an address or a size changes, as gradients do that were set to None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import in_memory_order
from .launch import check_tensor

CHUNK, BLOCK = 8192, 1024  # a chunk is whole blocks
Tensors = Sequence[Tensor]


@triton.jit
def chunk_of(chunks):
    """This program's entry, the chunk's first number, and the entry's size."""
    c = tl.program_id(0).to(tl.int64) * 3
    return tl.load(chunks + c), tl.load(chunks + c + 1), tl.load(chunks + c + 2)


@triton.jit
def array_of(pointers, array, n, entry, like):
    """The address of an entry's array, as a pointer of the type of `like`."""
    return tl.load(pointers + array * n + entry).to(like.dtype)


@triton.jit
def block_of(first, start, size, BLOCK: tl.constexpr):
    """The numbers of a chunk that begin at `start`, and which of them the entry has."""
    at = first + start + tl.arange(0, BLOCK)
    return at, at < size


@triton.jit
def larger(a, b):
    """The larger one; a NaN stays."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def root(x):
    """The square root, rounded as on the CPU: tl.sqrt alone is an approximation in float32."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


class Group(NamedTuple):
    """Entries of one combination of dtypes, ready for a launch. ``places``: which of all entries. ``lists``: their arrays, one list each,
    in memory that a kernel can walk; ``copies``: (original, copy) of arrays that are to be written back."""

    places: list[int]
    lists: list[list[Tensor]]
    copies: list[tuple[Tensor, Tensor]]
    pointers: Tensor
    chunks: Tensor

    def write_back(self) -> None:
        for original, copy in self.copies:
            original.copy_(copy)


def groups(lists: dict[str, tuple[Tensors, bool]], only_read: str = "", kept: torch.dtype | None = None) -> list[Group]:
    """The entries of ``lists`` (name: tensors, whether they are kept; empty lists are absent ones) in groups. What is kept may be float32
    beside a half type, or is of dtype ``kept``. Copies of the list ``only_read`` are not written back.

    Raises:
        RuntimeError, TypeError: a list or a tensor does not fit the first list's.
    """
    used = {name: tensors for name, (tensors, _) in lists.items() if tensors}
    first_name, first = next(iter((name, tensors) for name, (tensors, _) in lists.items()))
    for name, tensors in used.items():
        if len(tensors) != len(first):
            raise RuntimeError(f"{name} has {len(tensors)} tensors, needs {len(first)} like {first_name}")
    by_dtype: dict[Any, list[int]] = {}
    for i, like in enumerate(first):
        for name, tensors in used.items():
            t = tensors[i]
            dtype = like.dtype
            if lists[name][1]:
                dtype = kept or (torch.float32 if dtype.itemsize == 2 and t.dtype == torch.float32 else dtype)
            check_tensor(f"{name}[{i}]", t, like if dtype == like.dtype else like.new_empty(0, dtype=dtype), tuple(like.shape))
        by_dtype.setdefault(tuple(tensors[i].dtype for tensors in used.values()), []).append(i)
    return [_group({name: [of[i] for i in places] for name, of in used.items()}, places, only_read) for places in by_dtype.values()]


def _group(named: dict[str, list[Tensor]], places: list[int], only_read: str) -> Group:
    copies, lists = [], list(named.values())
    for i in range(len(places)):
        arrays = [tensors[i] for tensors in lists]
        same = all(t.stride() == arrays[0].stride() for t in arrays)
        if not (same and in_memory_order(arrays[0])[0].is_contiguous()):
            for name, tensors in named.items():
                original, tensors[i] = tensors[i], tensors[i].contiguous()
                if name != only_read and original is not tensors[i]:
                    copies.append((original, tensors[i]))
    device = lists[0][0].device
    addresses = tuple(t.data_ptr() for tensors in lists for t in tensors)
    return Group(places, lists, copies, *_tables(addresses, tuple(t.numel() for t in lists[0]), device))


@lru_cache(maxsize=16)
def _tables(addresses: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    chunks = [(i, first, size) for i, size in enumerate(sizes) for first in range(0, size, CHUNK)]
    return to_device(addresses, torch.int64, device), to_device(chunks, torch.int64, device)


def to_device(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor there, without waiting for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured: at every replay it would copy what that memory of the host holds by then.
    """
    t = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return t.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("an optimizer's step cannot be captured in a CUDA graph yet; torch.optim with capturable=True can")
    return t.pin_memory().to(device, non_blocking=True)


def each_group(found: Sequence[Group], run: Callable[[Group], None]) -> None:
    """``run`` for every group that holds a number, then write back what it worked on copies of."""
    for group in found:
        if group.chunks.shape[0]:
            run(group)
    for group in found:
        group.write_back()
