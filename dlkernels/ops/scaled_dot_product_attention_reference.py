"""scaled_dot_product_attention in PyTorch's own operations: the definition, with all scores in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .dropout import factors, numbers
from .scaled_dot_product_attention_raw import Score
from .score_functions import SCORE_FUNCTIONS

__all__: list[str] = []


def visible(query: Tensor, key: Tensor, mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, score: Score) -> Any:
    """(which keys a query may attend to, how far query l + o lies behind key s), both broadcastable to [B, H, L, S]."""
    l, s = torch.arange(query.shape[2], device=query.device)[:, None], torch.arange(key.shape[2], device=key.device)
    L: Any = query.shape[2]
    S: Any = key.shape[2]
    seen = torch.ones_like(l >= s)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        i, j = torch.searchsorted(cu_seqlens_q[1:], l, right=True), torch.searchsorted(cu_seqlens_k[1:], s, right=True)
        L, S, seen = cu_seqlens_q.diff()[i], cu_seqlens_k.diff()[i], i == j
        l, s = l - cu_seqlens_q[i], s - cu_seqlens_k[j]
    behind = l + (S - L if score.lower_right else 0) - s
    if score.left >= 0:
        seen = seen & (behind <= score.left)
    if score.right >= 0:
        seen = seen & (-behind <= score.right)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask.detach() != -math.inf)
    return seen, behind


def definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seed: Tensor | None, p: float, score: Score,
) -> Tensor:  # fmt: skip
    """The same in PyTorch's own operations, with the matrix of scores in memory."""
    (B, H, L, _), (_, G, S, _) = query.shape, key.shape
    seen, behind = visible(query, key, mask, cu_seqlens_q, cu_seqlens_k, score)
    if H != G:
        key, value = key.repeat_interleave(H // G, 1), value.repeat_interleave(H // G, 1)
    unseen = ~seen.any(-2)[..., None]  # by any query: whatever numbers these hold, 0 times them is 0
    key, value = key.masked_fill(unseen, 0), value.masked_fill(unseen, 0)
    z = score.scale * query @ key.mT
    if score.function:
        z = list(SCORE_FUNCTIONS.values())[score.function](z, behind, score.parameter)
    if mask is not None and mask.dtype != torch.bool:
        z = z + mask.to(z.dtype)
    if slopes is not None:
        z = z - slopes[..., None, None].to(z.dtype) * behind.abs()
    z = z.masked_fill(~seen, -math.inf)
    weight = z
    if S:
        top = z.detach().amax(-1, keepdim=True)
        weight = torch.exp(z - top.masked_fill(top == -math.inf, 0))
        total = weight.sum(-1, keepdim=True)
        weight = weight / total.masked_fill(total == 0, 1)
    if seed is not None:
        rows = torch.arange(B * H * S, device=seed.device)[:, None]
        weight = weight * factors(numbers(L, seed, rows), p, weight.dtype).view(B, H, S, L).mT
    return weight @ value
