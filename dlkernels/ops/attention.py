r"""attention: scaled_dot_product_attention with a sliding window, ALiBi slopes, and a soft cap or another function of the scores.

    x[l,s] = scale Σ_d q[l,d] k[s,d]        o = S - L: the last query stands where the last key stands
    z[l,s] = f(x[l,s]) - slope_h |l + o - s| + mask[l,s]        f(x) = softcap tanh(x / softcap)
             -∞ unless  l + o - left <= s <= l + o + right

What follows, the gradients, shapes and work are those of scaled_dot_product_attention.py, whose kernels run; the gradient of x is that of z
times f'(x). Keys outside the window are not even read, so one of w keys costs w/S of the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contract import is_spread, needs_grad, on_shards, require_tensors, statistics_dtype, unsupported, without_kernel
from ..registry import Op, register
from . import scaled_dot_product_attention as sdpa
from .attention_sizes import BENCH, SAMPLES, cost, in_eager, make, slopes_of
from .dropout import draw_seed
from .scaled_dot_product_attention_raw import Extras, Score
from .scaled_dot_product_attention_shapes import Misfit, check_probability, heads_of, is_causal_bias, misfit_of_mask, too_wide
from .score_functions import code_of

__all__ = ["attention"]


def score_with(query: Tensor, causal: Any, window_size: Any, softcap: Any, score_function: Any, scale: Any) -> Score:
    """The options of a call as the kernels take them.

    Raises:
        TypeError, ValueError: one of them is not what it must be.
    """
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}")
    if not isinstance(scale, (float, int, type(None))):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    limits = window_size if isinstance(window_size, (tuple, list)) else ()
    if len(limits) != 2 or not all(isinstance(n, int) and n >= -1 for n in limits):
        raise ValueError(f"window_size is {window_size!r}, needs (left, right): two integers, -1 where there is no limit")
    if not isinstance(softcap, (float, int)) or not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap!r}, needs a finite number above 0, or 0 for none")
    if score_function is None:
        score_function = ("softcap", softcap) if softcap else ("none", 0.0)
    elif softcap:
        raise ValueError(f"softcap is {softcap} beside score_function {score_function!r}, needs one of them")
    if not isinstance(score_function, (tuple, list)) or len(score_function) != 2 or not isinstance(score_function[1], (float, int)):
        raise ValueError(f"score_function is {score_function!r}, needs (name, number)")
    name, parameter = score_function
    score = sdpa.score_of(query, causal, scale, lower_right=True)
    return score._replace(function=code_of(name), parameter=float(parameter), left=limits[0], right=0 if causal else limits[1])


def slopes_in_two(slopes: Tensor, query: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """``alibi_slopes``, of one of the ``shapes``, as [B or 1, H] in the type of the scores.

    Raises:
        RuntimeError: they do not fit.
    """
    if slopes.shape not in shapes or slopes.device != query.device or not slopes.is_floating_point():
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise RuntimeError(
            f"alibi_slopes has shape {tuple(slopes.shape)} and dtype {slopes.dtype}, on {slopes.device}; needs {wanted}, of a "
            f"floating-point type on {query.device} like query"
        )
    return slopes.to(statistics_dtype(query)).reshape(-1, slopes.shape[-1])


def heads_that_fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[torch.Size, int]:
    """(batch dimensions, heads of query).

    Raises:
        RuntimeError: sizes, heads or dtypes do not fit each other.
    """
    if not (query.dtype == key.dtype == value.dtype):
        raise RuntimeError(f"query has dtype {query.dtype}, key {key.dtype} and value {value.dtype}; needs one dtype")
    try:
        return heads_of(query, key, value, enable_gqa)[:2]
    except Misfit as misfit:
        raise RuntimeError(str(misfit)) from None


def no_kernel(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> str | None:
    """Why the definition in PyTorch's own operations runs for arguments that fit, or None where a kernel does."""
    reason = unsupported(("query", query), ("key", key), ("value", value)) or too_wide(query, value)
    return reason or ("alibi_slopes requires grad; kernels have no gradient for it" if needs_grad(slopes) else None)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, softcap: float = 0.0,
    score_function: tuple[str, float] | None = None, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``scaled_dot_product_attention`` with the further options of ``flash_attn_func``, under their names. As there, the last query stands
    where the last key stands: query l looks from place l + S - L. (``is_causal`` of torch's function counts from the first instead.)

    Args:
        query, key, value, attn_mask, dropout_p, scale, enable_gqa: as in ``scaled_dot_product_attention``.
        causal: no query sees later keys; the same as a window of (left, 0).
        window_size: (left, right), how many keys a query sees before its own place and after it; -1 is no limit.
        alibi_slopes: ``(H,)`` or ``(*, H)``: a head's scores are less by its slope times the distance of query and key.
        softcap: scores become ``softcap tanh(score / softcap)``, before mask and slopes; 0 is none.
        score_function: another function of the scores: its name in ``dlkernels.ops.score_functions``, and its parameter.

    Returns:
        ``(*, H, L, E)``, as from ``scaled_dot_product_attention``. A query that sees no key gets zeros.

    Raises:
        RuntimeError: sizes, dtypes, devices or heads do not fit; ``dropout_p`` is not between 0 and 1.
        ValueError: ``window_size``, ``softcap`` or ``score_function`` is out of its range.
        TypeError: an argument is of another type.
    """
    require_tensors(("query", query), ("key", key), ("value", value), optional=(("attn_mask", attn_mask), ("alibi_slopes", alibi_slopes)))
    if is_causal_bias(attn_mask):
        raise TypeError("attn_mask is a CausalBias, needs a plain tensor; causal=True says the same as a lower-right one")
    query, key, value, attn_mask = sdpa.after_autocast(query, key, value, attn_mask)
    check_probability(dropout_p)
    score = score_with(query, causal, window_size, softcap, score_function, scale)
    if is_spread(query, key, value, attn_mask, alibi_slopes):
        return on_shards("attention", query, key, value, attn_mask, alibi_slopes, float(dropout_p), score, enable_gqa)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    return seeded(query, key, value, attn_mask, alibi_slopes, seed, float(dropout_p), score, enable_gqa)


def seeded(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, slopes: Tensor | None, seed: Tensor | None, p: float, score: Score,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """Attention with dropout under a given seed."""
    lead, heads = heads_that_fit(query, key, value, enable_gqa)
    reason = no_kernel(query, key, value, slopes)
    if mask is not None:
        scores = (*lead, heads, query.shape[-2], key.shape[-2])
        misfit = misfit_of_mask(query, mask, False, scores[-max(query.dim(), key.dim(), value.dim()) :])
        if misfit is not None:
            raise RuntimeError(misfit)
    extras = Extras(mask, None if slopes is None else slopes_in_two(slopes, query, (heads,), (*lead, heads)), seed=seed)
    if reason is not None:
        return without_kernel(reason, sdpa.dense, sdpa.defined, query, key, value, extras, p, score, enable_gqa, name="attention")
    return sdpa.dense(sdpa.attend, query, key, value, extras, p, score, enable_gqa)


def _variant(how: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """``attention``, or ``how`` it is computed, with all options by position and slopes made on the spot."""

    def call(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, causal: bool, window_size: tuple[int, int], alibi: bool, softcap: float,
        enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        slopes = slopes_of(query.shape[-3], query) if alibi else None
        if how is None:
            options: Any = {"causal": causal, "window_size": window_size, "alibi_slopes": slopes, "softcap": softcap}
            return attention(query, key, value, attn_mask, enable_gqa=enable_gqa, **options)
        score = score_with(query, causal, window_size, softcap, None, None)
        extras = Extras(attn_mask, None if slopes is None else slopes[None])
        return sdpa.dense(how, query, key, value, extras, 0.0, score, enable_gqa)

    return call


register(
    Op(
        name="attention",
        module="scaled_dot_product_attention",
        call=_variant(None),
        reference=_variant(sdpa.defined),
        native=_variant(in_eager),
        make=make,
        samples=SAMPLES,
        bench=BENCH,
        quick=BENCH[:1],
        cost=cost,
        raw=("scaled_dot_product_attention_forward", "scaled_dot_product_attention_backward"),
        supports=lambda query, key, value, *_: no_kernel(query, key, value, None),
    )
)
