r"""varlen_attention: attention within each of several sequences of different lengths, which lie packed one behind the other.

    tokens     0 ────────── 5 ─── 7 ──────────────── 16        cu_seqlens = [0, 5, 7, 16]: where sequences begin, where the last one ends
    sequence        0         1           2                    Queries of sequence i, of L_i tokens, see its S_i keys and no others.

No token is padding, so none is computed: the work is Σ_i 2 H L_i S_i (D + E) flops forward and Σ_i 2 H L_i S_i (3D + 2E) backward, where
sequences padded to the longest cost N H L S of it. For each sequence the formulas of attention.py hold, with its own L and S. A sequence
gets the numbers that it would get alone, whatever lies beside it.

Shapes      q (T, H, D)   k (T', G, D)   v (T', G, E)   y (T, H, E);   T = Σ L_i, T' = Σ S_i
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..contract import is_spread, is_transformed, on_shards, require_tensors, without_kernel
from ..registry import Op, register
from . import scaled_dot_product_attention as sdpa
from .attention import heads_that_fit, no_kernel, score_with, slopes_in_two
from .attention_sizes import PACKED_BENCH, PACKED_SAMPLES, cost_of_packed, make_packed, one_by_one, padded, slopes_of
from .dropout import draw_seed
from .scaled_dot_product_attention_raw import Extras, Score
from .scaled_dot_product_attention_shapes import check_probability

__all__ = ["varlen_attention"]


def check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise RuntimeError where sizes do not fit each other."""
    fits = query.dim() == key.dim() == value.dim() == 3 and query.shape[2] == key.shape[2] and key.shape[:2] == value.shape[:2]
    if fits and query.shape[1] != key.shape[1]:
        fits = enable_gqa and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0
    if not fits:
        raise RuntimeError(
            f"query has shape {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}; needs (T, H, D), (T', G, D) and "
            "(T', G, E), where G is H, or with enable_gqa=True divides it"
        )


def check_starts(query: Tensor, key: Tensor, starts: Tensor, key_starts: Tensor, longest: Any = None, longest_key: Any = None) -> None:
    """Refuse cumulative lengths that do not cut the tokens into sequences, of at most ``longest``.

    Raises:
        TypeError, RuntimeError, ValueError: they are of another type, dtype, shape or device; their numbers are wrong.
    """
    _check("cu_seqlens_q", starts, query, query.shape[0], longest)
    _check("cu_seqlens_k", key_starts, query, key.shape[0], longest_key)
    if starts.shape != key_starts.shape:
        raise RuntimeError(f"cu_seqlens_q has {len(starts)} numbers and cu_seqlens_k {len(key_starts)}, needs as many")


def _check(name: str, starts: Tensor, query: Tensor, total: int, longest: Any) -> None:
    """One of the two. Numbers that lie on a GPU, or are not known yet in a traced graph, are not looked at."""
    if longest is not None and not isinstance(longest, int):
        raise TypeError(f"max_seqlen{name[-2:]} must be an int or None, got {longest!r}")
    if starts.dtype not in (torch.int32, torch.int64) or starts.dim() != 1 or starts.device != query.device:
        raise RuntimeError(
            f"{name} has shape {tuple(starts.shape)} and dtype {starts.dtype}, on {starts.device}; needs (sequences + 1), int32 or int64, "
            f"on {query.device} like query"
        )
    if starts.shape[0] == 0:
        raise RuntimeError(f"{name} is empty, needs 0 and then the end of every sequence")
    if not starts.is_cpu or type(starts) is not Tensor or is_transformed():
        return
    numbers = starts.tolist()
    if numbers[0] != 0 or numbers[-1] != total:
        raise ValueError(f"{name} goes from {numbers[0]} to {numbers[-1]}, needs to go from 0 to the number of tokens, {total}")
    for i, (begin, end) in enumerate(pairwise(numbers)):
        if end < begin:
            raise ValueError(f"{name}[{i + 1}] is {end}, less than the {begin} before it; needs numbers that do not decrease")
        if longest is not None and end - begin > longest:
            raise ValueError(f"max_seqlen{name[-2:]} is {longest}, but {name} has a sequence of {end - begin} tokens")


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, dropout_p: float = 0.0, *, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None, softcap: float = 0.0, score_function: tuple[str, float] | None = None,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``attention`` within each of several packed sequences: ``flash_attn_varlen_func``, ``torch.nn.attention.varlen.varlen_attn``.

    Args:
        query: ``(T, H, D)``, the tokens of all sequences one behind the other. float32, float64, bfloat16 or float16, any strides.
        key, value: ``(T', G, D)`` and ``(T', G, E)``, same dtype and device; G is H, or with ``enable_gqa`` divides it.
        cu_seqlens_q, cu_seqlens_k: ``(N + 1,)``, int32 or int64, on the same device: 0, where the first of N sequences begins, and
            where each ends, the last at T or T'. A sequence may have no query, or no key.
        max_seqlen_q, max_seqlen_k: the longest sequence, as other libraries have to know it. Kernels do without.
        alibi_slopes: ``(H,)``.
        dropout_p, causal, window_size, softcap, score_function, scale: as in ``attention``, of each sequence.

    Returns:
        ``(T, H, E)``, of the query's dtype; under autocast in its dtype. A query that sees no key gets zeros.

    Raises:
        RuntimeError: sizes, dtypes, devices or heads do not fit; ``dropout_p`` is not between 0 and 1.
        ValueError: ``cu_seqlens_q`` or ``cu_seqlens_k`` does not begin with 0, decreases, or does not end with the number of tokens; a
            sequence is longer than its ``max_seqlen``; ``window_size``, ``softcap`` or ``score_function`` is out of its range. On a GPU
            the cumulative lengths are not looked at: where they are wrong, so is the result, but nothing beyond the arguments is read.
        TypeError: an argument is of another type.
    """
    starts = ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)
    require_tensors(("query", query), ("key", key), ("value", value), *starts, optional=(("alibi_slopes", alibi_slopes),))
    query, key, value, _ = sdpa.after_autocast(query, key, value, None)
    check_probability(dropout_p)
    score = score_with(query, causal, window_size, softcap, score_function, scale)
    check_heads(query, key, value, enable_gqa)
    check_starts(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    tensors = query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes
    if is_spread(*tensors):
        return on_shards("varlen_attention", *tensors, float(dropout_p), score, enable_gqa)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    extras = Extras(None, alibi_slopes, cu_seqlens_q.long(), cu_seqlens_k.long(), seed)
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    return seeded(q, k, v, extras, float(dropout_p), score, enable_gqa).transpose(0, 1)


def seeded(query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: float, score: Score, enable_gqa: bool) -> Tensor:
    """Of tensors (H, T, D), with dropout under a given seed; ``extras.slopes`` is still as it was given."""
    _, heads = heads_that_fit(query, key, value, enable_gqa)
    reason, slopes = no_kernel(query, key, value, extras.slopes), extras.slopes
    if slopes is not None:
        extras = extras._replace(slopes=slopes_in_two(slopes, query, (heads,)))
    args = query[None], key[None], value[None], extras, p, score, enable_gqa
    if reason is not None:
        y: Tensor = without_kernel(reason, sdpa.dense, sdpa.defined, *args, name="varlen_attention")
        return y[0]
    return sdpa.dense(sdpa.attend, *args)[0]


def _unsupported(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_: Any) -> str | None:
    """Why no kernel runs for these arguments, or None where one does."""
    reason = no_kernel(query, key, value, None)
    if reason is None:
        try:
            check_starts(query, key, cu_seqlens_q, cu_seqlens_k)
        except (RuntimeError, ValueError) as misfit:
            return str(misfit)
    return reason


def _variant(how: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """``varlen_attention``, or ``how`` it is computed, with all options by position and slopes made on the spot."""

    def call(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, window_size: tuple[int, int],
        alibi: bool, softcap: float, enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        slopes = slopes_of(query.shape[-2], query) if alibi else None
        if how is None:
            options: Any = {"causal": causal, "window_size": window_size, "alibi_slopes": slopes, "softcap": softcap}
            return varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, enable_gqa=enable_gqa, **options)
        check_starts(query, key, cu_seqlens_q, cu_seqlens_k)
        score = score_with(query, causal, window_size, softcap, None, None)
        extras = Extras(None, None if slopes is None else slopes[None], cu_seqlens_q.long(), cu_seqlens_k.long())
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        return sdpa.dense(how, q, k, v, extras, 0.0, score, enable_gqa)[0].transpose(0, 1)

    return call


register(
    Op(
        name="varlen_attention",
        module="scaled_dot_product_attention",
        call=_variant(None),
        reference=_variant(sdpa.defined),
        native=_variant(padded),
        make=make_packed,
        samples=PACKED_SAMPLES,
        bench=PACKED_BENCH,
        quick=PACKED_BENCH[:1],
        cost=cost_of_packed,
        raw=("scaled_dot_product_attention_forward", "scaled_dot_product_attention_backward"),
        supports=_unsupported,
        peers={"one by one": _variant(one_by_one)},
    )
)
