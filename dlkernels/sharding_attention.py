"""How attention and rope may be shared out where their arguments are DTensors; sharding_rules.py has every other function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

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


@rule
def rope(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Cut along any dimension but the last. Angles that are plain tensors are the same in every process."""
    mesh = next(t.device_mesh for t in (input, cos, sin) if isinstance(t, DTensor))
    angles = [t if isinstance(t, DTensor) else DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False) for t in (cos, sin)]
    rank, layouts = input.dim(), []
    for d in range(rank - 1):
        cut = {"input": Shard(d)}
        if d == rank - 2:
            cut["cos"] = cut["sin"] = Shard(cos.dim() - 2)
        elif d < rank - 3 and cos.dim() > 2 and cos.shape[d] > 1:
            cut["cos"] = cut["sin"] = Shard(d)
        layouts.append(Layout(f"rows: Shard({d})", cut, Shard(d)))
    tensors = {"input": input, "cos": angles[0], "sin": angles[1]}
    y: Tensor = run("rope", tensors, layouts, lambda x, cos, sin: F.rope(x, cos, sin, interleaved))
    return y
