r"""rope: pairs of numbers of every query and key turned by an angle proportional to their position (Su et al. 2021, arXiv:2104.09864).

Forward     y[t,a] = x[t,a] cos[t,p] - x[t,b] sin[t,p]          a, b the p-th pair: p, p + P, or interleaved 2p, 2p + 1
            y[t,b] = x[t,b] cos[t,p] + x[t,a] sin[t,p]
            y[t,d] = x[t,d]                                      for d >= 2P, which is not rotated
Backward    the same with -sin in place of sin: a rotation is undone by the one through the negative angle

With angles t w_p the product of a query at t and a key at s depends on t - s alone: both are turned, and only the difference counts.
"halves" is what Llama, GPT-NeoX and Hugging Face's ``rotate_half`` do, "interleaved" the paper and GPT-J; a permutation of the rows of the
projections' weights turns one into the other.

Shapes      x (*, H, T, D)   cos, sin (T, P) or (*, T, P)   y (*, H, T, D);   N is the number of elements of x
Work        3N flops, 2N + 2TP elements moved, in each direction: memory decides
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..backend import PLAIN_TENSORS, apply_function, define
from ..contract import (
    Optionals,
    check_traced,
    is_spread,
    is_transformed,
    needs_grad,
    on_shards,
    require_tensors,
    statistics_dtype,
    unsupported,
)
from ..registry import Cost, Op, register
from .scaled_dot_product_attention_raw import empty_like_heads

__all__ = ["rope"]


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    torch._check(x.dim() == 4 and cos.dim() == 3, lambda: f"x and cos must have 4 and 3 dimensions, got {x.dim()} and {cos.dim()}")
    torch._check(cos.shape[0] in (1, x.shape[0]) and cos.shape[1] == x.shape[2], lambda: f"cos {tuple(cos.shape)}, x {tuple(x.shape)}")
    torch._check(2 * cos.shape[2] <= x.shape[3], lambda: f"cos has {cos.shape[2]} angles, needs at most half of {x.shape[3]}")
    torch._check(cos.dtype == statistics_dtype(x), lambda: f"cos has dtype {cos.dtype}, needs {statistics_dtype(x)}")
    check_traced(cos, sin=(sin, cos.shape))
    return empty_like_heads(x, x.shape[3])


_rope = define("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor", _fake)


class _Rope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
        return _rope(x, cos, sin, interleaved, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, ctx.interleaved, ctx.inverse = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Optionals:
        cos, sin = ctx.saved_tensors
        return None if dy is None else _apply(dy, cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


def _apply(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool = False) -> Tensor:
    if needs_grad(x):
        y: Tensor = apply_function(_Rope, x, cos, sin, interleaved, inverse)
    else:
        y = _rope(x, cos, sin, interleaved, inverse)
    return y


def _reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Differentiable in the tables too."""
    P, wide = cos.shape[-1], torch.promote_types(x.dtype, cos.dtype) if x.dtype.itemsize < 4 else x.dtype
    lead = (1,) * (x.dim() - 3) if cos.dim() == 2 else cos.shape[:-2]
    shape = (*lead, *(1,) * (x.dim() > 2), *cos.shape[-2:])
    c, s = cos.to(wide).view(shape), sin.to(wide).view(shape)
    turned, rest = x[..., : 2 * P].to(wide), x[..., 2 * P :]
    a, b = turned.unflatten(-1, (P, 2)).unbind(-1) if interleaved else turned.chunk(2, -1) if P else (turned, turned)
    parts = (a * c - b * s, b * c + a * s)
    y = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([y[..., : 2 * P].to(x.dtype), rest], -1)


def _misfit(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """What does not fit in the shapes, or None."""
    if x.dim() < 2 or cos.shape != sin.shape or cos.dim() not in (2, x.dim() - 1) or cos.shape[-2] != x.shape[-2]:
        return f"input {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit (*, H, T, D), (*, T, P) and (*, T, P)"
    if cos.dim() > 2 and any(n != 1 and n != wanted for n, wanted in zip(cos.shape[:-2], x.shape[:-3])):
        return f"cos has shape {tuple(cos.shape)}, needs {(*x.shape[:-3], *cos.shape[-2:])} beside input {tuple(x.shape)}"
    if 2 * cos.shape[-1] > x.shape[-1]:
        return f"cos and sin have {cos.shape[-1]} angles, needs at most {x.shape[-1] // 2} for heads of {x.shape[-1]} numbers"
    return None


def _unsupported(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> str | None:
    """Why the definition in PyTorch's own operations runs, or None where a kernel does."""
    reason = unsupported(("input", input), ("cos", cos), ("sin", sin))
    return learned_angles(cos, sin) if reason is None else reason


def learned_angles(*tables: Tensor | None) -> str | None:
    """Why no kernel takes these tables, if one of them is to get a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tables):
        return "cos or sin requires grad; kernels have no gradient of the angles"
    return None


def rope(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary positions: the first 2P numbers of each head, in pairs, turned by the angles of their position.

    Args:
        input: ``(*, H, T, D)``, or ``(T, D)``: queries or keys. float32, float64, bfloat16 or float16, any strides.
        cos, sin: of the angles, ``(T, P)``, or ``(*, T, P)`` where positions differ within the batch; any float dtype, on the input's
            device. P is at most D / 2; what is left of a head stays as it is. They should be float32 beside half types: those do not tell
            the angles of neighbouring positions apart.
        interleaved: pairs are neighbours, 2p and 2p + 1, instead of p and p + P.

    Returns:
        Shape and dtype of ``input``; for 4 dimensions in its memory order.

    Raises:
        RuntimeError: shapes do not fit. TypeError: an argument is not a tensor.
    """
    reason = _unsupported(input, cos, sin)
    if reason is not None:
        require_tensors(("input", input), ("cos", cos), ("sin", sin))
        if is_spread(input, cos, sin):
            return on_shards("rope", input, cos, sin, interleaved)
    misfit = _misfit(input, cos, sin)
    if misfit is not None:
        raise RuntimeError(f"rope: {misfit}")
    if reason is not None:
        return _reference(input, cos, sin, interleaved)
    heads = input.shape[-3] if input.dim() > 2 else 1
    x = input if input.dim() == 4 else input.reshape(input.shape[:-3].numel(), heads, *input.shape[-2:])
    cos, sin = (_table_in_three(t.to(statistics_dtype(x)), input.shape[:-3]) for t in (cos, sin))
    y = _apply(x, cos, sin, interleaved)
    return y if input.dim() == 4 else y.view_as(input)


def _table_in_three(table: Tensor, lead: torch.Size) -> Tensor:
    """[1 or B, T, P] for batch dimensions ``lead``, whose product is B."""
    if table.dim() == 2:
        return table[None]
    if table.dim() > 3:
        table = table.expand(*lead, *table.shape[-2:])
        return table.reshape(lead.numel(), *table.shape[-2:])
    return table


Tables = tuple[Tensor, Tensor]


def angles(positions: Tensor, width: int, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> Tables:
    """cos and sin ``(*, T, width / 2)`` of t w_p, w_p = base^(-2p / width), for positions t ``(*, T)``, formed in float64."""
    speeds = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / max(width, 1))
    turns = positions.double()[..., None] * speeds
    return turns.cos().to(dtype), turns.sin().to(dtype)


@lru_cache(maxsize=256)
def _cached(start: int, step: int, lead: tuple[int, ...], T: int, width: int, base: float, dtype: torch.dtype, device: Any) -> Tables:
    positions = start + torch.arange(T, device=device)
    if lead:
        positions = positions + step * torch.arange(math.prod(lead), device=device).view(*lead, 1)
    return angles(positions, width, base, dtype)


def angles_like(x: Tensor, width: int, base: float = 10000.0, start: int = 0, step: int = 0, lead: tuple[int, ...] = ()) -> Tables:
    """``angles`` of the positions start .. start + T - 1 of x ``(*, T, D)``; those of the i-th sequence of ``lead`` begin i ``step`` later.

    Kept for the next call, except while a graph is traced.
    """
    plain = not is_transformed() and type(x) in PLAIN_TENSORS
    make = _cached if plain else _cached.__wrapped__
    return make(start, step, lead, x.shape[-2], width, base, statistics_dtype(x), x.device)


def _angles_of(x: Tensor, P: int | None, each: bool) -> Tables:
    """``each``: positions of its own for every sequence of the batch."""
    width = 2 * (x.shape[-1] // 2 if P is None else min(P, x.shape[-1] // 2))
    return angles_like(x, width, step=5, lead=tuple(x.shape[:-3]) if each else ())


def _call(x: Tensor, P: int | None, interleaved: bool, each: bool) -> Tensor:
    return rope(x, *_angles_of(x, P, each), interleaved)


def _definition(x: Tensor, P: int | None, interleaved: bool, each: bool) -> Tensor:
    return _reference(x, *_angles_of(x, P, each), interleaved)


def _native(x: Tensor, P: int | None, interleaved: bool, each: bool) -> Tensor:
    """What a PyTorch user writes, with tables as wide as the heads, made once, in the dtype of x."""
    P = x.shape[-1] // 2 if P is None else min(P, x.shape[-1] // 2)
    cos, sin = (t.view(*t.shape[:-2], *(1,) * (t.dim() > 2), *t.shape[-2:]) for t in _angles_of(x, P, each))
    turned, rest = x[..., : 2 * P], x[..., 2 * P :]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
        partner = turned.unflatten(-1, (P, 2)).flip(-1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        partner = turned.unflatten(-1, (2, P)).flip(-2).flatten(-2)
    y = turned * cos.to(x.dtype) + partner * sin.to(x.dtype)
    return torch.cat([y, rest], -1) if rest.shape[-1] else y


def _make(
    factory: Callable[..., Tensor], T: int, D: int, B: int = 1, H: int = 1, lead: tuple[int, ...] | None = None, P: int | None = None,
    interleaved: bool = False, each: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    return factory(*((B, H) if lead is None else lead), T, D), P, interleaved, each


def _cost(T: int, D: int, B: int = 1, H: int = 1, lead: tuple[int, ...] | None = None, P: int | None = None, **_: bool) -> Cost:
    total = T * D * (B * H if lead is None else torch.Size(lead).numel())
    moved = 2 * total + 2 * T * (D // 2 if P is None else P)
    return Cost(3 * total, 3 * total, moved, moved)


SAMPLES: list[dict[str, Any]] = [
    {"lead": (), "T": 3, "D": 4}, {"B": 2, "H": 3, "T": 0, "D": 8}, {"B": 0, "H": 3, "T": 2, "D": 8, "each": True},
    {"T": 3, "D": 5, "P": 0}, {"B": 2, "H": 3, "T": 5, "D": 2}, {"B": 2, "H": 2, "T": 3, "D": 34}, {"lead": (3,), "T": 7, "D": 64},
    {"lead": (2, 1, 3), "T": 5, "D": 36, "P": 17}, {"B": 2, "H": 2, "T": 5, "D": 60, "each": True},
    {"lead": (2, 3, 2), "T": 3, "D": 12, "P": 4, "each": True}, {"B": 2, "H": 5, "T": 33, "D": 96, "each": True},
]  # fmt: skip
SAMPLES += [size | {"interleaved": True} for size in SAMPLES if size["T"] and size["D"] > 4 and size.get("P") != 0]
BENCH: list[dict[str, Any]] = [
    {"B": B, "H": H, "T": T, "D": D, "interleaved": interleaved}
    for interleaved in (False, True)
    for B, H, T, D in [(4, 8, 128, 64), (2, 8, 512, 64), (1, 8, 2048, 128), (8, 32, 1, 128)]
]

register(
    Op(
        name="rope",
        module="rope",
        call=_call,
        reference=_definition,
        native=_native,
        make=_make,
        samples=SAMPLES,
        bench=BENCH,
        quick=BENCH[1:2],
        tiny=[{"B": 1, "H": 4, "T": 16, "D": 32}],
        cost=_cost,
        raw=("rope",),
        supports=lambda x, P, interleaved, each: _unsupported(x, *_angles_of(x, P, each)),
    )
)
