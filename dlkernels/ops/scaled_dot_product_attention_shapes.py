"""From the dimensions that scaled_dot_product_attention takes to the four of the raw ops, and why some do not fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import PLAIN_TENSORS, is_tracing
from .scaled_dot_product_attention_raw import WIDEST, mask_dtypes

__all__: list[str] = []


class Misfit(Exception):
    """Why arguments do not fit each other."""


def is_causal_bias(mask: Any) -> bool:
    """Whether ``mask`` is a ``torch.nn.attention.bias.CausalBias``. That module takes a second to import; who made one has done so."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def heads_of(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[torch.Size, int, int]:
    """(batch dimensions, heads of query, heads of key and value) once everything is broadcast. Raises Misfit."""
    q, k, v = query.shape, key.shape, value.shape
    if min(len(q), len(k), len(v)) < 2:
        raise Misfit(f"query has shape {tuple(q)}, key {tuple(k)}, value {tuple(v)}; needs at least 2 dimensions each")
    if q[-1] != k[-1] or k[-2] != v[-2]:
        raise Misfit(f"query {tuple(q)}, key {tuple(k)} and value {tuple(v)} do not fit (*, L, D), (*, S, D) and (*, S, E)")
    if len(q) == 4 and q[:2] == k[:2] == v[:2]:  # the usual case, at a tenth of the cost
        return torch.Size(q[:1]), q[1], q[1]
    hq, hk, hv = ([1, *some[:-2]][-1] for some in (q, k, v))
    try:
        lead = torch.broadcast_shapes(q[:-3], k[:-3], v[:-3])
        if not enable_gqa:
            heads = torch.broadcast_shapes((hq,), (hk,), (hv,))[0]
            return lead, heads, 1 if hk == hv == 1 else heads
    except RuntimeError:
        raise Misfit(f"batch dimensions of query {tuple(q)}, key {tuple(k)} and value {tuple(v)} do not broadcast") from None
    if min(len(q), len(k), len(v)) < 3 or not hk or not hv or hq % hk or hq % hv:
        raise Misfit(f"query has {hq} heads, needs a multiple of the {hk} of key and the {hv} of value, in dimension -3")
    return lead, hq, hk if hk == hv else hq


def too_wide(query: Tensor, value: Tensor) -> str | None:
    """Why no kernel takes heads of these widths, or None."""
    D, E = query.shape[-1], value.shape[-1]
    return f"heads have {D} and {E} numbers; kernels take at most {WIDEST}" if D > WIDEST or E > WIDEST else None


def in_four(t: Tensor, lead: torch.Size, heads: int) -> Tensor:
    """``t`` (*, T, D) as [B, heads, T, D], without a copy where strides allow."""
    T, D = t.shape[-2:]
    if t.dim() == 4 and t.shape[0] == lead[0] and t.shape[1] == heads:
        return t
    if t.dim() > 2 and t.shape[-3] not in (1, heads):  # key or value with fewer heads than the other
        t = t.repeat_interleave(heads // t.shape[-3], -3)
    return t.expand(*lead, heads, T, D).reshape(lead.numel(), heads, T, D)


def heads_in_four(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, L, D], [B, G, S, D] and [B, G, S, E]."""
    if query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value
    lead, H, G = heads_of(query, key, value, enable_gqa)
    return in_four(query, lead, H), in_four(key, lead, G), in_four(value, lead, G)


def mask_in_four(mask: Tensor, lead: Sequence[int]) -> Tensor:
    """``mask`` as [B or 1, H or 1, L or 1, S or 1], for batch dimensions ``lead``."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dim() == 4:
        return mask
    if mask.shape[:-3].numel() != 1:
        mask = mask.expand(*lead, *mask.shape[-3:])
    return mask.reshape(mask.shape[:-3].numel(), *mask.shape[-3:])


def out_of_four(y: Tensor, lead: torch.Size, dim: int) -> Tensor:
    """[B, H, L, E] as (*, H, L, E) of ``dim`` dimensions."""
    return y if dim == 4 else y.reshape(*lead, *y.shape[max(1, 4 - dim) : 2], *y.shape[2:])


def misfit_of_mask(query: Tensor, mask: Any, is_causal: bool, shape: tuple[int, ...]) -> str | None:
    """Why no kernel takes this mask for scores of ``shape``, or None."""
    if is_causal:
        return "attn_mask is set together with is_causal=True; needs one of them"
    if is_causal_bias(mask):
        if (mask.seq_len_q, mask.seq_len_kv) != shape[-2:]:
            return f"attn_mask is for {mask.seq_len_q} queries and {mask.seq_len_kv} keys, got {shape[-2]} and {shape[-1]}"
        return None
    if type(mask) not in PLAIN_TENSORS and not is_tracing(mask):
        return f"attn_mask is a {type(mask).__name__}; kernels take plain tensors"
    if mask.layout is not torch.strided or mask.device != query.device:
        return f"attn_mask has layout {mask.layout} on {mask.device}, needs strided on {query.device} like query"
    if mask.dtype not in (*mask_dtypes(query), torch.float32):
        return f"attn_mask has dtype {mask.dtype}, needs bool, float32 or {query.dtype} like query"
    fits = 2 <= mask.dim() <= len(shape) and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(shape)))
    return None if fits else f"attn_mask has shape {tuple(mask.shape)}, needs one that broadcasts to {shape}"


def check_probability(p: Any) -> None:
    """Raise TypeError or RuntimeError where ``dropout_p`` is no probability."""
    if not isinstance(p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
