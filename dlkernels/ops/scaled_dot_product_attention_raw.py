"""The registered ops behind scaled_dot_product_attention.py: what a score is made of, the schemas, and what they return while traced."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import define
from ..contract import Optionals, check_traced, statistics_dtype
from .dropout import check_seed

__all__: list[str] = []

UNLIMITED = -1  # of a window to the left or to the right
WIDEST = 256  # numbers of a head


class Score(NamedTuple):
    """How a score is made of a product: what the raw ops take. Query l may attend to key s where

        l + o - left <= s <= l + o + right,    o = S - L if lower_right else 0

    and a limit below 0 is none. ``function`` is the place in ``score_functions.SCORE_FUNCTIONS`` of what it then goes through, and
    ``parameter`` that function's number.
    """

    scale: float
    function: int = 0
    parameter: float = 0.0
    left: int = UNLIMITED
    right: int = UNLIMITED
    lower_right: bool = False


class Extras(NamedTuple):
    """Tensors that a score or its weight depends on, each None where it doesn't: ``mask`` [B or 1, H or 1, L or 1, S or 1], boolean or
    additive; ``slopes`` [B or 1, H]; where packed sequences begin, and where the last one ends; the seed of dropout, [1]."""

    mask: Tensor | None = None
    slopes: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None


def mask_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What a mask beside ``x`` may be of."""
    return (torch.bool, x.dtype, torch.float32) if x.dtype.itemsize == 2 else (torch.bool, x.dtype)


def empty_like_heads(x: Tensor, width: int) -> Tensor:
    """An empty [B, H, T, width] whose heads and positions lie in memory in the order that those of ``x`` do."""
    B, H, T, _ = x.shape
    if x.stride(1) < x.stride(2):  # a transposed [B, T, H, D], as a projection leaves it
        return x.new_empty((B, T, H, width)).transpose(1, 2)
    return x.new_empty((B, H, T, width))


def _check(query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: float) -> None:
    """What the kernels check, while a graph is traced."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        torch._check(t.dim() == 4, lambda name=name, t=t: f"{name} must have 4 dimensions, got {t.dim()}")
    (B, H, L, D), (_, G, S, _), E = query.shape, key.shape, value.shape[3]
    check_traced(query, key=(key, (B, G, S, D)), value=(value, (B, G, S, E)))
    torch._check(H % G == 0 if G else H == 0, lambda: f"query has {H} heads, needs a multiple of the {G} of key")
    torch._check(max(D, E) <= WIDEST, lambda: f"heads have {D} and {E} numbers, needs at most {WIDEST}")
    mask, slopes, seed = extras.mask, extras.slopes, extras.seed
    if mask is not None:
        torch._check(mask.dtype in mask_dtypes(query), lambda: f"mask has dtype {mask.dtype}, needs one of {mask_dtypes(query)}")
        fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, (B, H, L, S), strict=True))
        torch._check(fits, lambda: f"mask has shape {tuple(mask.shape)}, needs {(B, H, L, S)} or 1 in place of some")
    if slopes is not None:
        torch._check(slopes.dtype == statistics_dtype(query), lambda: f"slopes have dtype {slopes.dtype}, needs {statistics_dtype(query)}")
        torch._check(slopes.shape in ((B, H), (1, H)), lambda: f"slopes have shape {tuple(slopes.shape)}, needs (1 or {B}, {H})")
    if seed is not None:
        check_seed(query, seed, p)


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seed: Tensor | None, p: float, *score: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(query, key, value, Extras(mask, slopes, cu_seqlens_q, cu_seqlens_k, seed), p)
    return empty_like_heads(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=statistics_dtype(query))


def _backward_fake(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, y: Tensor, lse: Tensor, mask: Tensor | None, slopes: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None, p: float, scale: float, score_function: int,
    parameter: float, left: int, right: int, lower_right: bool, need_dquery: bool, need_dkey: bool, need_dvalue: bool, need_dmask: bool,
) -> Optionals:  # fmt: skip
    _check(query, key, value, Extras(mask, slopes, cu_seqlens_q, cu_seqlens_k, seed), p)
    shape = (*query.shape[:3], value.shape[3])
    check_traced(query, dy=(dy, shape), y=(y, shape))
    return (
        empty_like_heads(query, query.shape[3]) if need_dquery else None,
        empty_like_heads(key, key.shape[3]) if need_dkey else None,
        empty_like_heads(value, value.shape[3]) if need_dvalue else None,
        mask.new_empty(mask.shape) if need_dmask and mask is not None else None,
    )


_tensors = "Tensor? mask, Tensor? slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed"
_numbers = "float p, float scale, int score_function, float parameter, int left, int right, bool lower_right"
forward = define(
    f"scaled_dot_product_attention_forward(Tensor query, Tensor key, Tensor value, {_tensors}, {_numbers}) -> (Tensor y, Tensor lse)",
    _forward_fake,
)
backward = define(
    f"scaled_dot_product_attention_backward(Tensor dy, Tensor query, Tensor key, Tensor value, Tensor y, Tensor lse, {_tensors}, "
    f"{_numbers}, bool need_dquery, bool need_dkey, bool need_dvalue, bool need_dmask)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask)",
    _backward_fake,
)
