r"""scaled_dot_product_attention: for every query a mean of the values, weighted by how well their keys fit, and no matrix of weights.

Forward     z[l,s]  = scale Σ_d q[l,d] k[s,d] + mask[l,s]           -∞ where s is not visible to l
            lse[l]  = log Σ_s exp z[l,s]        p[l,s] = exp(z[l,s] - lse[l])
            y[l,e]  = Σ_s f[l,s] p[l,s] v[s,e]                       f = 1, or dropout's factor
Backward    δ[l]    = Σ_e dy[l,e] y[l,e]        dp[l,s] = f[l,s] Σ_e dy[l,e] v[s,e]
            dz[l,s] = p[l,s] (dp[l,s] - δ[l])                        p is formed again from q, k and lse
            dq[l,d] = scale Σ_s dz[l,s] k[s,d]  dk[s,d] = scale Σ_l dz[l,s] q[l,d]
            dv[s,e] = Σ_l f[l,s] p[l,s] dy[l,e] dmask[l,s] = dz[l,s], summed where the mask was broadcast

Scores are made a tile of queries x keys at a time, and the softmax goes on from tile to tile: a row's largest score and its sum of
exponentials so far, by which what it has summed is corrected when a larger score comes (Milakov, Gimelshein 2018; Dao et al. 2022). A row
that sees no key has weights 0, so y = 0 there, as in torch. What is masked out has no part in anything, whatever number it holds.

f is formed again in the backward from the seed and the place: row (b H + h) S + s, column l (csrc/cpu/philox.h).

Shapes      q (*, H, L, D)   k (*, G, S, D)   v (*, G, S, E)   y (*, H, L, E);   B is the product of *
            head h of q reads head h G / H of k and v
Work        2BHLS (D + E) flops forward and 2BHLS (3D + 2E) backward, half of them if causal; q, k, v, y moved forward, twice that backward:
            the flops decide
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function
from ..contract import (
    Optionals,
    autocast_dtype,
    in_autocast,
    is_spread,
    needs_grad,
    on_shards,
    reference_gradients,
    require_tensors,
    unsupported,
    without_kernel,
)
from ..registry import OPS, Op, register
from .dropout import draw_seed
from .nested_attention import is_nested, misfit_of_nested, nested_attention
from .scaled_dot_product_attention_raw import UNLIMITED, Extras, Score, backward, forward
from .scaled_dot_product_attention_reference import definition
from .scaled_dot_product_attention_shapes import (
    Misfit,
    check_probability,
    heads_in_four,
    heads_of,
    is_causal_bias,
    mask_in_four,
    misfit_of_mask,
    out_of_four,
    too_wide,
)
from .scaled_dot_product_attention_sizes import BENCH, DECODE_BENCH, DECODE_SAMPLES, DROPOUT_SAMPLES, SAMPLES, cost, make, make_with_dropout

__all__ = ["scaled_dot_product_attention"]


def score_of(query: Tensor, is_causal: bool, scale: float | None, lower_right: bool = False) -> Score:
    width = query.shape[-1]
    scale = float(scale) if scale is not None else width**-0.5 if width else 1.0
    return Score(scale, right=0 if is_causal else UNLIMITED, lower_right=lower_right)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None, seed: Tensor | None, p: float, score: Score,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return forward(query, key, value, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, p, *score)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.p, ctx.score = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _dlse: None) -> Optionals:
        if dy is None:
            return (None,) * 10
        *tensors, y, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return reference_gradients(definition, (*tensors, ctx.p, ctx.score), needs, dy)
        query, key, value, *extras = tensors
        return *backward(dy, query, key, value, y, lse, *extras, ctx.p, *ctx.score, *needs[:4]), None, None, None, None, None, None


def attend(query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: float, score: Score) -> Tensor:
    """What a kernel does, for arguments that one takes: query [B, H, L, D], key [B, G, S, D], value [B, G, S, E] -> [B, H, L, E]."""
    if needs_grad(query, key, value, extras.mask):
        y: Tensor = apply_function(_Attention, query, key, value, *extras, p, score)[0]
        return y
    y = forward(query, key, value, *extras, p, *score)[0]
    return y


def defined(query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: float, score: Score) -> Tensor:
    """The definition of what ``attend`` does."""
    return definition(query, key, value, *extras, p, score)


def _unsupported(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> str | None:  # fmt: skip
    """Why PyTorch's own operations run for these arguments, or None where a kernel does. On the path of every call."""
    reason = unsupported(("query", query), ("key", key), ("value", value))
    if (reason is not None and is_nested(query, key, value)) or (reason is None and query.is_nested):
        reason = misfit_of_nested(query, key, value, attn_mask)
        q, k, v = (t if reason else t.values() for t in (query, key, value))
        return reason or _unsupported(q, k, v, None, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        return reason
    if not (query.dtype == key.dtype == value.dtype):
        return f"query has dtype {query.dtype}, key {key.dtype} and value {value.dtype}; needs one dtype"
    if not isinstance(is_causal, bool) or not isinstance(scale, (float, int, type(None))):
        return f"is_causal is {is_causal!r} and scale {scale!r}, needs a bool, and a number or None"
    try:
        lead, H, _ = heads_of(query, key, value, enable_gqa)
    except Misfit as misfit:
        return str(misfit)
    if attn_mask is None:
        return too_wide(query, value)
    scores = (*lead, H, query.shape[-2], key.shape[-2])
    return too_wide(query, value) or misfit_of_mask(query, attn_mask, is_causal, scores[-max(query.dim(), key.dim(), value.dim()) :])


def _refused(reason: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, p: float, *options: Any) -> Tensor:
    """What PyTorch makes of arguments that no kernel takes: its result, or its error with the argument named."""
    require_tensors(("query", query), ("key", key), ("value", value), optional=(("attn_mask", mask),))
    names = dict(zip(("is_causal", "scale", "enable_gqa"), options, strict=True))
    if is_nested(query, key, value):
        return without_kernel(reason, F.scaled_dot_product_attention, query, key, value, mask, p, **names)
    if is_spread(query, key, value, mask):
        return on_shards("scaled_dot_product_attention", query, key, value, mask, float(p), *options)
    lengths = key.shape[-2:-1] == value.shape[-2:-1]  # torch reads beyond the shorter one
    devices = {t.device for t in (query, key, value, mask) if t is not None and not is_causal_bias(t)}
    if not lengths or len(devices) > 1 or (mask is not None and options[0] is True):
        raise RuntimeError(f"scaled_dot_product_attention: {reason}")
    return without_kernel(reason, F.scaled_dot_product_attention, query, key, value, mask, p, **names)


def after_autocast(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """The arguments, converted where autocast is active."""
    dtype = autocast_dtype(query) if isinstance(query, Tensor) else None
    if dtype is not None and all(isinstance(t, Tensor) for t in (key, value)):
        query, key, value = in_autocast(dtype, query, key, value)  # type: ignore[assignment]
        if isinstance(mask, Tensor) and mask.is_floating_point() and not is_causal_bias(mask):
            mask = in_autocast(dtype, mask)[0]
    return query, key, value, mask


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.scaled_dot_product_attention``: softmax(scale query keyᵀ + mask) value, with memory linear in L and S.

    Args:
        query: ``(*, H, L, D)``; or ``(L, D)``. float32, float64, bfloat16 or float16, any strides; D and E are at most 256.
        key, value: ``(*, H, S, D)`` and ``(*, H, S, E)``, same dtype and device; dimensions before L and S broadcast. Or all three are
            nested tensors ``(B, H, j, D)`` of layout ``torch.jagged``, with j tokens in each sequence, and the result is one.
        attn_mask: broadcastable to ``(*, H, L, S)``: boolean, True where l may attend to s; or a number to add, of the dtype of query or
            float32; or a ``torch.nn.attention.bias.CausalBias``, such as ``causal_lower_right(L, S)``. What is False, or -inf, is left
            out: not even a NaN gets through.
        dropout_p: probability with which a weight is dropped; drawn anew at every call, whether training or not, as in torch.
        is_causal: query l attends to keys 0 .. l.
        scale: 1/√D where it is None.
        enable_gqa: key and value may have fewer heads G, which divide H: heads h G / H are read.

    Returns:
        ``(*, H, L, E)`` of the query's dtype and, for 4 dimensions, order in memory; under autocast in its dtype. A query that attends
        to no key gets zeros.

    Raises:
        RuntimeError: sizes, dtypes or heads do not fit; a mask and ``is_causal``; ``dropout_p`` is not between 0 and 1.
        TypeError: an argument is not a tensor, or not a number.
    """
    query, key, value, attn_mask = after_autocast(query, key, value, attn_mask)
    check_probability(dropout_p)
    reason = _unsupported(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        return _refused(reason, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    return seeded(query, key, value, attn_mask, seed, float(dropout_p), is_causal, scale, enable_gqa)


def seeded(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, seed: Tensor | None, p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """Attention with dropout under a given seed, for arguments that a kernel takes."""
    lower_right = is_causal_bias(mask) and mask.variant.name == "LOWER_RIGHT"
    if is_causal_bias(mask):
        is_causal, mask = True, None
    score = score_of(query, is_causal, scale, lower_right)
    if query.is_nested:
        return nested_attention(query, key, value, seed, p, score, enable_gqa)
    return dense(attend, query, key, value, Extras(mask, seed=seed), p, score, enable_gqa)


def dense(
    how: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: float, score: Score, enable_gqa: bool
) -> Tensor:
    """``attend`` or ``defined`` for any number of dimensions; the mask of ``extras`` is still as it was given."""
    lead, dim, mask = heads_of(query, key, value, enable_gqa)[0], max(query.dim(), key.dim(), value.dim()), extras.mask
    if mask is not None:
        mask = mask_in_four(mask if mask.dtype == torch.bool or query.dtype != torch.float64 else mask.double(), lead)
    return out_of_four(how(*heads_in_four(query, key, value, enable_gqa), extras._replace(mask=mask), p, score), lead, dim)


def _definition(query: Tensor, key: Tensor, value: Tensor, mask: Any, p: float, is_causal: bool, scale: Any, enable_gqa: bool) -> Tensor:
    return dense(defined, query, key, value, Extras(mask), p, score_of(query, is_causal, scale), enable_gqa)


def _positional(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool, scale: Any, enable_gqa: bool
    ) -> Tensor:
        return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    return call


P = 0.3


def with_dropout(query: Tensor, key: Tensor, value: Tensor, seed: Tensor) -> Tensor:
    """Of 4 dimensions, with a given seed."""
    if _unsupported(query, key, value) is not None or not isinstance(seed, Tensor) or seed.dtype != torch.int64 or query.dim() != 4:
        if is_spread(query, key, value, seed):
            return on_shards("seeded_attention", query, key, value, seed)
        return _definition_with_dropout(query, key, value, seed)
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = in_autocast(dtype, query, key, value)  # type: ignore[assignment]
    return seeded(query, key, value, None, seed, P, False, None, False)


def _definition_with_dropout(query: Tensor, key: Tensor, value: Tensor, seed: Tensor) -> Tensor:
    return defined(query, key, value, Extras(seed=seed), P, Score(query.shape[-1] ** -0.5))


register(
    Op(
        name="scaled_dot_product_attention",
        module="scaled_dot_product_attention",
        call=_positional(scaled_dot_product_attention),
        reference=_definition,
        native=_positional(F.scaled_dot_product_attention),
        make=make,
        samples=SAMPLES,
        bench=BENCH,
        quick=BENCH[:2],
        tiny=[{"B": 1, "H": 4, "T": 16, "D": 32}],
        cost=cost,
        raw=("scaled_dot_product_attention_forward", "scaled_dot_product_attention_backward"),
        supports=_unsupported,
    )
)
register(
    replace(
        OPS["scaled_dot_product_attention"],
        name="scaled_dot_product_attention_dropout",
        call=with_dropout,
        reference=_definition_with_dropout,
        native=_definition_with_dropout,
        make=make_with_dropout,
        samples=DROPOUT_SAMPLES,
        bench=BENCH[:2],
        quick=BENCH[:1],
        tiny=(),
        supports=lambda query, key, value, seed: _unsupported(query, key, value),
        rival=lambda query, key, value, seed: F.scaled_dot_product_attention(query, key, value, dropout_p=P),
    )
)
register(  # a token that is being written, beside the keys of all before it
    replace(
        OPS["scaled_dot_product_attention"],
        name="scaled_dot_product_attention_decode",
        samples=DECODE_SAMPLES,
        bench=DECODE_BENCH,
        quick=DECODE_BENCH[:1],
        tiny=[{"B": 1, "H": 4, "L": 1, "S": 64, "D": 32}],
    )
)
