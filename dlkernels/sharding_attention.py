"""How attention may be shared out where its arguments are DTensors; sharding_rules.py has every other function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from . import functional as F
from .ops import scaled_dot_product_attention as attention
from .sharding import Layout, Plan, run
from .sharding_rules import rule


@rule
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    """Cut along a batch dimension, or along heads that are as many in all of them; a mask that has one for all is whole."""
    tensors, rank, layouts = {"query": query, "key": key, "value": value, "attn_mask": mask}, query.dim(), []
    shape = mask.shape if mask is not None else torch.Size()
    for d in range(rank - 2) if query.shape[:-2] == key.shape[:-2] == value.shape[:-2] else ():
        cut = dict.fromkeys(("query", "key", "value"), Shard(d))
        if len(shape) >= rank - d and shape[d - rank] > 1:
            cut["attn_mask"] = Shard(d - rank + len(shape))
        layouts.append(Layout(f"rows: Shard({d})", cut, Shard(d)))

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=gqa)

    def dropped(plan: Plan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attention.seeded(query, key, value, mask, plan.seed(query.device), p, causal, scale, gqa)

    y: Tensor = run("scaled_dot_product_attention", tensors, layouts, compute, dropped if p else None)
    return y


@rule
def seeded_attention(query: Tensor, key: Tensor, value: Tensor, seed: Tensor) -> Tensor:
    """Under a given seed the place in the whole tensor decides what is dropped, so it is computed whole."""
    tensors = {"query": query, "key": key, "value": value, "seed": seed}
    y: Tensor = run("scaled_dot_product_attention", tensors, (), attention.with_dropout)
    return y
