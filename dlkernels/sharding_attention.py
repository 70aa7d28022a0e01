"""How attention, rope and qkv_projection may be shared out where their arguments are DTensors; sharding_rules.py has the others."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import functional as F
from .ops import attention as _attention
from .ops import scaled_dot_product_attention as _sdpa
from .ops import varlen_attention as _varlen
from .ops.scaled_dot_product_attention_raw import Extras, Score
from .sharding import Layout, Plan, run
from .sharding_rules import rule


def _along(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, slopes: Tensor | None = None) -> list[Layout]:
    """Cut along a batch dimension, or along heads that are as many in all of them; a mask that has one for all is whole."""
    rank, layouts = query.dim(), []
    shape = mask.shape if mask is not None else torch.Size()
    for d in range(rank - 2) if query.shape[:-2] == key.shape[:-2] == value.shape[:-2] else ():
        cut = dict.fromkeys(("query", "key", "value"), Shard(d))
        if len(shape) >= rank - d and shape[d - rank] > 1:
            cut["attn_mask"] = Shard(d - rank + len(shape))
        if slopes is not None and slopes.dim() > 1:
            cut["alibi_slopes"] = Shard(d)
        elif slopes is not None and d == rank - 3:
            cut["alibi_slopes"] = Shard(0)
        layouts.append(Layout(f"rows: Shard({d})", cut, Shard(d)))
    return layouts


def _whole(others: tuple[Tensor | None, ...], *tensors: Tensor | None) -> list[Tensor | None]:
    """``tensors``, of which plain ones are the same in every process, on the mesh of ``others``."""
    mesh = next(t.device_mesh for t in (*others, *tensors) if isinstance(t, DTensor))
    everywhere = [Replicate()] * mesh.ndim
    return [t if t is None or isinstance(t, DTensor) else DTensor.from_local(t, mesh, everywhere, run_check=False) for t in tensors]


@rule
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    tensors = {"query": query, "key": key, "value": value, "attn_mask": mask}

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=gqa)

    def dropped(plan: Plan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return _sdpa.seeded(query, key, value, mask, plan.seed(query.device), p, causal, scale, gqa)

    y: Tensor = run("scaled_dot_product_attention", tensors, _along(query, key, value, mask), compute, dropped if p else None)
    return y


@rule
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, p: float, score: Score, gqa: bool
) -> Tensor:
    (slopes,) = _whole((query, key, value, mask), slopes)
    tensors = {"query": query, "key": key, "value": value, "attn_mask": mask, "alibi_slopes": slopes}

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None) -> Tensor:
        return _attention.seeded(query, key, value, mask, slopes, None, 0.0, score, gqa)

    def dropped(plan: Plan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None) -> Tensor:
        return _attention.seeded(query, key, value, mask, slopes, plan.seed(query.device), p, score, gqa)

    y: Tensor = run("attention", tensors, _along(query, key, value, mask, slopes), compute, dropped if p else None)
    return y


@rule
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, slopes: Tensor | None, p: float, score: Score, gqa: bool
) -> Tensor:
    """Cut along heads that are as many in all of them."""
    starts, key_starts, slopes = _whole((query, key, value), starts, key_starts, slopes)  # type: ignore[assignment]
    tensors = {"query": query, "key": key, "value": value, "cu_seqlens_q": starts, "cu_seqlens_k": key_starts, "alibi_slopes": slopes}
    cut = dict.fromkeys(("query", "key", "value"), Shard(1)) | ({} if slopes is None else {"alibi_slopes": Shard(0)})
    layouts = [Layout("heads: Shard(1)", cut, Shard(1))] if query.shape[1] == key.shape[1] == value.shape[1] else []

    def seeded(seed: Tensor | None, *tensors: Any) -> Tensor:
        q, k, v, starts, key_starts, slopes = tensors
        extras = Extras(None, slopes, starts.long(), key_starts.long(), seed)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        return _varlen.seeded(q, k, v, extras, p if seed is not None else 0.0, score, gqa).transpose(0, 1)

    def dropped(plan: Plan, *tensors: Any) -> Tensor:
        return seeded(plan.seed(tensors[0].device), *tensors)

    y: Tensor = run("varlen_attention", tensors, layouts, functools.partial(seeded, None), dropped if p else None)
    return y


@rule
def seeded_attention(query: Tensor, key: Tensor, value: Tensor, seed: Tensor) -> Tensor:
    """Under a given seed the place in the whole tensor decides what is dropped, so it is computed whole."""
    tensors = {"query": query, "key": key, "value": value, "seed": seed}
    y: Tensor = run("scaled_dot_product_attention", tensors, (), _sdpa.with_dropout)
    return y


@rule
def rope(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Cut along any dimension but the last. Angles that are plain tensors are the same in every process."""
    angles = _whole((input,), cos, sin)
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


@rule
def qkv_projection(
    input: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None,
    v_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, head_dim: int, interleaved: bool,
) -> Any:  # fmt: skip
    """Cut along any dimension but the last, or the weights by heads, where these are shared out evenly."""
    parameters = {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight, "q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias}
    angles = _whole((input,), cos, sin)
    rank, layouts = input.dim(), []
    for d in range(rank - 1):
        cut = {"input": Shard(d)}
        if cos is not None and (d == rank - 2 or (cos.dim() > 2 and cos.shape[d] > 1)):
            cut["cos"] = cut["sin"] = Shard(d if d < rank - 2 else cos.dim() - 2)
        layouts.append(Layout(f"rows: Shard({d})", cut, Shard(rank - 1 if d == rank - 2 else d)))
    processes = next(t.device_mesh for t in (input, *parameters.values(), *angles) if isinstance(t, DTensor)).size()
    if all(weight.shape[0] % (processes * head_dim) == 0 for weight in (q_weight, k_weight, v_weight)):
        layouts.append(Layout("heads: Shard(0) of weights", dict.fromkeys(parameters, Shard(0)), Shard(rank - 2)))
    tensors = {"input": input, **parameters, "cos": angles[0], "sin": angles[1]}

    def compute(*tensors: Any) -> Any:
        *others, cos, sin = tensors
        return F.qkv_projection(*others, head_dim=head_dim, cos=cos, sin=sin, interleaved=interleaved)

    return run("qkv_projection", tensors, layouts, compute)
