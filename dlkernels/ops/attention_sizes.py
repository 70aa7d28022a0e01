"""attention and varlen_attention: sizes at which they are tested and measured, arguments, costs, and what PyTorch alone makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Cost
from . import scaled_dot_product_attention_sizes as plain
from .scaled_dot_product_attention_raw import Extras, Score
from .scaled_dot_product_attention_reference import definition

__all__: list[str] = []


def slopes_of(heads: int, like: Tensor) -> Tensor:
    """ALiBi's slopes, 2^(-8/H), 2^(-16/H), ... (Press, Smith, Lewis 2022)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.exp2(torch.arange(1, heads + 1, dtype=dtype, device=like.device) * (-8 / max(heads, 1)))


# ---- dense -------------------------------------------------------------------------------------------------------------------


def make(
    factory: Callable[..., Tensor], causal: bool = False, window: tuple[int, int] = (-1, -1), alibi: bool = False, softcap: float = 0.0,
    **size: Any,
) -> tuple[Any, ...]:  # fmt: skip
    q, k, v, mask, _, _, _, gqa = plain.make(factory, **size)
    return q, k, v, mask, causal, window, alibi, softcap, gqa


def cost(causal: bool = False, window: tuple[int, int] = (-1, -1), alibi: bool = False, softcap: float = 0.0, **size: Any) -> Cost:
    q, k, v, *_ = make(lambda *shape: torch.empty(shape, device="meta"), **size)
    return cost_of(q, k, v, q.shape[:-2].numel() * visible(q.shape[-2], k.shape[-2], window[0], 0 if causal else window[1]))


def cost_of(q: Tensor, k: Tensor, v: Tensor, scores: int) -> Cost:
    D, E = q.shape[-1], v.shape[-1]
    moved = q.numel() + k.numel() + v.numel() + q.shape[:-1].numel() * E
    return Cost(2 * scores * (D + E), 2 * scores * (3 * D + 2 * E), moved, 2 * moved)


def visible(L: int, S: int, left: int, right: int) -> int:
    """How many pairs of a query and a key lie in a window."""
    places = range(S - L, S)
    return sum(max(0, (S if right < 0 else min(S, i + right + 1)) - (0 if left < 0 else max(0, i - left))) for i in places)


def in_eager(query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: float, score: Score) -> Tensor:
    """What is written with PyTorch alone: a mask that says all of it, made once, or where there is a soft cap the matrix of scores."""
    if score.function or not key.shape[2]:
        return definition(query, key, value, *extras, p, score)
    L, S = query.shape[2], key.shape[2]
    bias = (_bias if torch.compiler.is_compiling() else _remembered)(
        L, S, score.left, score.right, query.shape[1] if extras.slopes is not None else 0, query.dtype, query.device
    )
    if extras.mask is not None:
        bias = torch.where(bias, extras.mask, -torch.inf) if bias.dtype == torch.bool else bias + extras.mask
    return F.scaled_dot_product_attention(query, key, value, bias, scale=score.scale, enable_gqa=query.shape[1] != key.shape[1])


def _bias(L: int, S: int, left: int, right: int, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    behind = torch.arange(S - L, S, device=device)[:, None] - torch.arange(S, device=device)
    seen = ((behind <= left) | (left < 0)) & ((-behind <= right) | (right < 0))
    if not heads:
        return seen
    slopes = slopes_of(heads, torch.empty(0, dtype=dtype, device=device))
    return torch.where(seen, -slopes[:, None, None] * behind.abs(), -torch.inf).to(dtype)


_remembered = cache(_bias)

SAMPLES: list[dict[str, Any]] = [
    {"T": 3, "D": 4, "causal": True},
    {"B": 0, "T": 3, "D": 4, "window": (1, 0)},
    {"L": 0, "S": 5, "D": 4, "window": (1, 1)},
    {"L": 3, "S": 0, "D": 4, "causal": True},
    {"L": 5, "S": 9, "D": 3, "E": 7, "H": 2, "causal": True, "alibi": True},
    {"L": 9, "S": 5, "D": 8, "B": 2, "H": 2, "window": (2, -1)},
    {"L": 7, "S": 17, "D": 8, "H": 4, "G": 2, "window": (3, 2), "alibi": True, "softcap": 1.5},
    {"L": 11, "S": 15, "D": 9, "lead": (2, 1, 2), "H": 2, "mask": (11, 15), "window": (7, -1), "alibi": True},
    {"L": 33, "S": 31, "D": 31, "H": 2, "mask": (2, 1, 31), "alibi": True, "softcap": 1.5},
    {"L": 70, "S": 131, "D": 40, "H": 2, "causal": True, "softcap": 2.0},
    {"L": 203, "S": 203, "D": 16, "B": 2, "H": 1, "window": (20, 0)},
    {"L": 150, "S": 301, "D": 33, "E": 65, "H": 2, "G": 1, "causal": True, "alibi": True},
]
BENCH: list[dict[str, Any]] = [
    {"B": 1, "H": 8, "T": 2048, "D": 64, "window": (256, 0)},
    {"B": 1, "H": 8, "T": 2048, "D": 64, "causal": True, "alibi": True},
    {"B": 1, "H": 8, "T": 1024, "D": 64, "causal": True, "softcap": 30.0},
    {"B": 1, "H": 4, "T": 4096, "D": 64, "window": (128, 128)},
]

# ---- packed ------------------------------------------------------------------------------------------------------------------


def make_packed(
    factory: Callable[..., Tensor], H: int, D: int, N: int = 0, T: int = 0, lengths: Sequence[int] | None = None,
    keys: Sequence[int] | None = None, E: int | None = None, G: int | None = None, causal: bool = False,
    window: tuple[int, int] = (-1, -1), alibi: bool = False, softcap: float = 0.0,
) -> tuple[Any, ...]:  # fmt: skip
    """N sequences, of T/N, 2T/N, ... T tokens; or of the ``lengths`` given, and of as many ``keys``."""
    lengths, keys = _lengths(N, T, lengths, keys)
    total, others = sum(lengths), sum(keys)
    q, k, v = factory(total, H, D), factory(others, G or H, D), factory(others, G or H, D if E is None else E)
    starts = (torch.tensor([0, *some], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(q.device) for some in (lengths, keys))
    return q, k, v, *starts, causal, window, alibi, softcap, G is not None


def _lengths(N: int, T: int, lengths: Sequence[int] | None, keys: Sequence[int] | None) -> tuple[Sequence[int], Sequence[int]]:
    lengths = [T * (i + 1) // N for i in range(N)] if lengths is None else lengths
    return lengths, lengths if keys is None else keys


def cost_of_packed(
    N: int = 0, T: int = 0, lengths: Sequence[int] | None = None, keys: Sequence[int] | None = None, causal: bool = False,
    window: tuple[int, int] = (-1, -1), alibi: bool = False, softcap: float = 0.0, **size: Any,
) -> Cost:  # fmt: skip
    q, k, v, *_ = make_packed(lambda *shape: torch.empty(shape, device="meta"), N=N, T=T, lengths=lengths, keys=keys, **size)
    pairs = zip(*_lengths(N, T, lengths, keys), strict=True)
    return cost_of(q, k, v, q.shape[1] * sum(visible(L, S, window[0], 0 if causal else window[1]) for L, S in pairs))


def padded(query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: float, score: Score) -> Tensor:
    """Every sequence padded to the longest, and a mask that hides what is padding: [1, H, T, D], as the kernels take it."""
    q, own = _padded(query, extras.cu_seqlens_q)
    (k, other), (v, _) = (_padded(t, extras.cu_seqlens_k) for t in (key, value))
    L, S = own.sum(1)[:, None, None], other.sum(1)[:, None, None]
    behind = torch.arange(own.shape[1], device=q.device)[:, None] - torch.arange(other.shape[1], device=q.device)
    behind = behind + (S - L if score.lower_right else 0)
    seen = other[:, None] & ((behind <= score.left) | (score.left < 0)) & ((-behind <= score.right) | (score.right < 0))
    if score.function or extras.slopes is not None:
        bias = seen[:, None]
        if extras.slopes is not None:
            bias = torch.where(bias, -extras.slopes[..., None, None] * behind.abs()[:, None], -torch.inf)
        y = definition(q, k, v, *Extras(bias), p, score._replace(left=-1, right=-1))
    else:
        y = F.scaled_dot_product_attention(q, k, v, seen[:, None], scale=score.scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)[own].transpose(0, 1)[None]


def _padded(x: Tensor, starts: Any) -> tuple[Tensor, Tensor]:
    """([N, H, longest, D], which of [N, longest] are tokens)"""
    lengths = starts.diff()
    place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=x.device) < lengths[:, None]
    rows = x[0].transpose(0, 1)
    return rows.new_zeros(*place.shape, *rows.shape[1:]).index_put((place,), rows).transpose(1, 2), place


def one_by_one(query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: float, score: Score) -> Tensor:
    """A call for every sequence."""
    lengths, keys = (starts.diff().tolist() for starts in (extras.cu_seqlens_q, extras.cu_seqlens_k))  # type: ignore[union-attr]
    parts = zip(query.split(lengths, 2), key.split(keys, 2), value.split(keys, 2), strict=True)
    return torch.cat([in_eager(*part, Extras(slopes=extras.slopes), p, score) for part in parts], 2)


PACKED_SAMPLES: list[dict[str, Any]] = [
    {"lengths": (3,), "H": 1, "D": 4},
    {"lengths": (0, 2, 0), "H": 2, "D": 1, "causal": True, "softcap": 0.5},
    {"lengths": (), "H": 2, "D": 3},
    {"lengths": (5, 1, 9), "H": 2, "D": 3, "causal": True},
    {"lengths": (5, 0, 7), "keys": (9, 4, 0), "H": 4, "G": 2, "D": 8, "window": (4, 1)},
    {"lengths": (7, 17), "H": 2, "D": 8, "alibi": True, "softcap": 1.5},
    {"lengths": (33, 1, 70, 64), "keys": (31, 5, 170, 64), "H": 2, "D": 17, "causal": True},
    {"lengths": (131, 40, 203), "H": 2, "D": 16, "window": (20, 3)},
]
PACKED_BENCH: list[dict[str, Any]] = [
    {"N": 8, "T": 512, "H": 8, "D": 64},
    {"N": 8, "T": 512, "H": 8, "D": 64, "causal": True},
    {"N": 64, "T": 64, "H": 8, "D": 64},
    {"N": 4, "T": 2048, "H": 8, "D": 64, "causal": True},
]
