"""The sizes at which scaled_dot_product_attention is tested and measured, its arguments at a size, and what it has to do there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..registry import Cost

__all__: list[str] = []


def make(
    factory: Callable[..., Tensor], D: int, T: int = 0, B: int = 1, H: int = 1, L: int | None = None, S: int | None = None,
    E: int | None = None, G: int | None = None, lead: tuple[int, ...] | None = None, mask: tuple[int, ...] | None = None,
    bool_mask: tuple[int, ...] | None = None, causal: bool = False, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    first, L, S = (B,) if lead is None else lead, T if L is None else L, T if S is None else S
    q, k, v = factory(*first, H, L, D), factory(*first, G or H, S, D), factory(*first, G or H, S, D if E is None else E)
    bias: Any = factory(*mask) if mask is not None else None
    if bool_mask is not None:
        bias = (torch.arange(torch.Size(bool_mask).numel(), device=q.device) * 7 % 5 > 1).view(bool_mask)
    return q, k, v, bias, 0.0, causal, scale, G is not None


def cost(D: int, causal: bool = False, **size: Any) -> Cost:
    q, k, v, *_ = make(lambda *shape: torch.empty(shape, device="meta"), D, causal=causal, **size)
    scores, E = q.shape[:-1].numel() * k.shape[-2], v.shape[-1]
    moved = q.numel() + k.numel() + v.numel() + q.shape[:-1].numel() * E
    return Cost(2 * scores * (D + E) // (1 + causal), 2 * scores * (3 * D + 2 * E) // (1 + causal), moved, 2 * moved)


def make_with_dropout(factory: Callable[..., Tensor], **size: Any) -> tuple[Any, ...]:
    q, k, v, *_ = make(factory, **size)
    return q, k, v, torch.full((1,), 0x0123456789ABCDEF, device=q.device)


SAMPLES: list[dict[str, Any]] = [
    {"T": 3, "D": 4},
    {"T": 1, "D": 1},
    {"B": 0, "T": 3, "D": 4},
    {"L": 0, "S": 5, "D": 4},
    {"L": 3, "S": 0, "D": 4},
    {"L": 3, "S": 5, "D": 0, "E": 2},
    {"L": 5, "S": 9, "D": 3, "E": 7, "H": 2, "causal": True},
    {"L": 9, "S": 5, "D": 8, "B": 2, "H": 2, "causal": True},
    {"L": 7, "S": 17, "D": 8, "H": 4, "G": 2, "scale": 0.3},
    {"L": 6, "S": 13, "D": 17, "E": 5, "H": 2, "bool_mask": (6, 13)},
    {"L": 7, "S": 9, "D": 9, "B": 2, "H": 3, "mask": (2, 1, 7, 9)},
    {"L": 11, "S": 15, "D": 9, "lead": (2, 1, 2), "H": 2, "mask": (11, 15)},
    {"L": 33, "S": 31, "D": 31, "H": 2, "mask": (2, 1, 31)},
    {"L": 70, "S": 67, "D": 40, "H": 2, "causal": True},
    {"L": 150, "S": 301, "D": 33, "E": 65, "H": 2, "G": 1, "bool_mask": (2, 1, 301)},
    {"L": 203, "S": 131, "D": 80, "B": 2, "H": 1},
]
BENCH = [
    {"B": B, "H": H, "T": T, "D": D}
    for B, H, T, D in [
        (4, 8, 128, 64), (2, 8, 512, 64), (1, 8, 2048, 64), (1, 4, 1024, 128), (8, 12, 77, 64), (1, 2, 4096, 32), (2, 8, 333, 80)
    ]
]
DROPOUT_SAMPLES = [{"T": 3, "D": 4}, {"L": 9, "S": 70, "D": 8, "B": 2, "H": 2}, {"L": 67, "S": 5, "D": 5}, {"L": 131, "S": 67, "D": 40}]
DECODE_SAMPLES: list[dict[str, Any]] = [
    {"L": 1, "S": 1, "D": 3},
    {"L": 1, "S": 17, "D": 8, "B": 2, "H": 2},
    {"L": 1, "S": 41, "D": 9, "E": 5, "H": 4, "G": 2, "mask": (4, 1, 41)},
    {"L": 2, "S": 35, "D": 16, "H": 3, "G": 1, "bool_mask": (2, 35)},
    {"L": 3, "S": 130, "D": 8, "causal": True},
    {"L": 1, "S": 515, "D": 33, "E": 65, "H": 2},
    {"L": 2, "S": 1100, "D": 80, "H": 4, "G": 1},
]
DECODE_BENCH: list[dict[str, Any]] = [
    {"B": 1, "H": 8, "L": 1, "S": 4096, "D": 64},
    {"B": 8, "H": 12, "L": 1, "S": 4096, "D": 64},
    {"B": 1, "H": 32, "G": 8, "L": 1, "S": 4096, "D": 128},
]
