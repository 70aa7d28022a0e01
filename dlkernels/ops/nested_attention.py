"""scaled_dot_product_attention of nested tensors, (B, H, j, D) with j tokens in each of B sequences, in torch.jagged layout.

What they hold lies packed: values (H, Σ j, D) and offsets, which are the cumulative lengths of varlen_attention, whose kernels run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .scaled_dot_product_attention_raw import Extras, Score

__all__: list[str] = []


def is_nested(*tensors: Any) -> bool:
    """Whether one of these is a nested tensor, of either layout."""
    return any(getattr(t, "is_nested", False) for t in tensors)


def misfit_of_nested(query: Any, key: Any, value: Any, mask: Any) -> str | None:
    """Why no kernel takes these, of which one at least is nested, or None where their values may fit."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or t.layout is not torch.jagged:
            return f"{name} is no nested tensor of layout torch.jagged, and another argument is nested"
        if t.dim() != 4 or t._ragged_idx != 2 or t.lengths() is not None:  # type: ignore[attr-defined]
            return f"{name} is nested, of shape {tuple(t.shape)}; kernels take (B, H, j, D) without gaps, such as (B, j, H, D) transposed"
    if key.shape[2] != value.shape[2] or not query.shape[0] == key.shape[0] == value.shape[0]:
        return f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not have the same sequences"
    return None if mask is None else "attn_mask is set beside nested tensors; kernels take one or the other"


def nested_attention(query: Any, key: Any, value: Any, seed: Tensor | None, p: float, score: Score, enable_gqa: bool) -> Tensor:
    """``attend`` of nested tensors that fit: the result is nested as the query is."""
    from .varlen_attention import seeded

    extras = Extras(cu_seqlens_q=query.offsets().long(), cu_seqlens_k=key.offsets().long(), seed=seed)
    y = seeded(query.values(), key.values(), value.values(), extras, p, score, enable_gqa)
    lengths = {"min_seqlen": query._maybe_min_seqlen, "max_seqlen": query._maybe_max_seqlen}  # where they are known
    return torch.nested.nested_tensor_from_jagged(y, query.offsets(), jagged_dim=2, **lengths)
