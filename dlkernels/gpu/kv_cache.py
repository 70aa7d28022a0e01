"""kv_cache_append_ on the GPU: a program copies ROWS rows of keys, or of values, to their places in the cache.

A row is the numbers of one head of one token. Where a tensor says at which place each row of the batch goes on, the program reads it, so
the host need not wait for it; what would lie outside the cache is left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_tensor, launch

NUMBERS = 2048  # of a program


@triton.jit(do_not_specialize=["position"])
def append_rows(x, cache, positions, position, M, G, T, C, W, x_strides, cache_strides, ROWS: tl.constexpr, BW: tl.constexpr):
    """cache[b, g, p + t] = x[b, g, t] for rows m = (b, g, t) of M."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b, g, t = m // T // G, m // T % G, m % T
    p = position + t
    if positions is not None:
        p = tl.load(positions + b, m < M, other=0) + t
    inside = (m < M) & (p >= t) & (p < C - T + 1 + t)
    w = tl.arange(0, BW)[None, :].to(tl.int64)
    both = inside[:, None] & (w < W)
    at = x + (b * x_strides[0] + g * x_strides[1] + t * x_strides[2])[:, None] + w * x_strides[3]
    to = cache + (b * cache_strides[0] + g * cache_strides[1] + p * cache_strides[2])[:, None] + w * cache_strides[3]
    tl.store(to, tl.load(at, both), both)


def append(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, position: int, positions: Tensor | None) -> None:
    for name, t in (("key_cache", key_cache), ("value_cache", value_cache), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise RuntimeError(f"{name} must have 4 dimensions, got {t.dim()}")
    (B, G, C, D), T, E = key_cache.shape, key.shape[2], value.shape[3]
    check_tensor("key_cache", key_cache, key_cache, (B, G, C, D))
    check_tensor("value_cache", value_cache, key_cache, (B, G, C, E))
    check_tensor("key", key, key_cache, (B, G, T, D))
    check_tensor("value", value, key_cache, (B, G, T, E))
    if positions is not None and (positions.dtype != torch.int64 or positions.shape != (B,) or positions.device != key.device):
        raise RuntimeError(f"positions must be int64 ({B},) on {key.device}, got {positions.dtype} {tuple(positions.shape)}")
    if positions is None and not 0 <= position <= C - T:
        raise RuntimeError(f"position {position} is out of range: key has {T} tokens, and key_cache has {C} places")
    M = B * G * T
    for x, cache in ((key, key_cache), (value, value_cache)):
        W = x.shape[3]
        if not M or not W:
            continue
        columns = triton.next_power_of_2(W)
        rows = max(1, NUMBERS // columns)
        launch(
            append_rows, (triton.cdiv(M, rows),), x, cache, None if positions is None else positions.contiguous(), position, M, G, T, C, W,
            x.stride(), cache.stride(), ROWS=rows, BW=columns,
        )  # fmt: skip


IMPLEMENTATIONS = {"kv_cache_append_": append}
EXAMPLES = {"kv_cache_append_": lambda empty: (*(empty(2, 8, n, 128) for n in (4096, 4096, 1, 1)), 100, None)}
