"""scaled_dot_product_attention on the GPU: launchers. The matrix of scores exists one tile at a time; memory grows with L + S.

    attention_tiles.py            what the kernels share: windows, masks, scores, packed sequences, dropout
    attention_forward.py          y and lse; and for few queries, whose keys are shared out, the sum of the shares
    attention_backward.py         δ, dq
    attention_backward_keys.py    dk and dv, dmask
    attention_plan.py             tiles

    score_functions.py            what a score goes through, and its derivative: kernels are compiled with theirs
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ..contract import statistics_dtype
from ..ops.scaled_dot_product_attention_raw import WIDEST, empty_like_heads, mask_dtypes
from ..ops.score_functions import SCORE_FUNCTIONS as DEFINITIONS
from . import philox
from .attention_backward import backward_delta, backward_dquery
from .attention_backward_keys import backward_dkey, backward_dmask
from .attention_forward import combine_shares, scaled_dot_product_attention_forward
from .attention_plan import choose, shares, width
from .config import ceil_div, kind_of
from .launch import check_seed, check_tensor, device_of, launch, precision
from .score_functions import SCORE_FUNCTIONS, ScoreFunction

LOG2E = 1.4426950408889634
ROWS = 32  # of delta and combine_shares


def bits(x: float) -> int:
    """A float64 as Triton can pass it: `philox.as_float64` reads it."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def function_of(code: int) -> ScoreFunction:
    """The score function of this number.

    Raises:
        RuntimeError: there is none, or none for a GPU.
    """
    names = list(DEFINITIONS)
    name = names[code] if 0 <= code < len(names) else None
    if name not in SCORE_FUNCTIONS:
        raise RuntimeError(f"score_function is {code} ({name}), needs the place of one of {', '.join(SCORE_FUNCTIONS)}")
    return SCORE_FUNCTIONS[name]


class Call:
    """What the kernels of one call have in common: checked arguments, in the form in which kernels take them."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None, seed: Tensor | None, p: float, scale: float, score_function: int,
        parameter: float, left: int, right: int, lower_right: bool,
    ) -> None:  # fmt: skip
        _check(query, key, value, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed)
        (self.B, self.H, self.L, self.D), (_, self.G, self.S, self.E) = query.shape, value.shape
        self.query, self.key, self.value, self.mask, self.seed = query, key, value, mask, seed
        self.starts = [None if t is None else t.contiguous() for t in (cu_seqlens_q, cu_seqlens_k)]
        self.slopes = None if slopes is None else slopes.contiguous()
        self.group = self.H // self.G if self.G else 1
        everything = self.L + self.S
        self.window = (int(lower_right), *(everything if n < 0 else min(n, everything) for n in (left, right)))
        self.function = function_of(score_function)
        self.score = bits(scale), bits(scale * LOG2E), bits(parameter)
        self.dropout = philox.thresholds(p if seed is not None else 0.0)
        steps = query.stride(), key.stride(), value.stride()
        mask_strides: tuple[int | None, ...] = (0, 0, 0, 0)
        self.mask_bits = mask
        if mask is not None:
            self.mask_bits = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
            mask_strides = tuple(0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))
            if mask.shape[2] == 1:  # a row of it serves all queries
                mask_strides = (*mask_strides[:2], None, mask_strides[3])
        slope_strides = (0 if self.slopes is None or self.slopes.shape[0] == 1 else self.H,)
        self.strides = *steps, mask_strides, slope_strides
        self.mode = precision(query.dtype)
        self.kind, self.device = kind_of(query.dtype, self.mode), device_of(query)
        self.constants: dict[str, Any] = {
            "PRECISION": self.mode, "D": self.D, "E": self.E, "BD": width(self.D), "BE": width(self.E), "WINDOW": left >= 0 or right >= 0,
        }  # fmt: skip

    def config(self, kernel: str, own: int, others: int) -> Any:
        return choose(kernel, self.kind, own, others, max(self.D, self.E), self.device)

    def like(self, x: Tensor, width: int) -> Tensor:
        """A result that lies as ``x`` does. Tokens that are in no sequence keep their zeros."""
        result = empty_like_heads(x, width)
        return result if self.starts[0] is None else result.zero_()

    def heads_are_rows(self, *rest: Any) -> bool:
        """Whether heads that read the same keys may be taken for so many queries, whose keys are then read once: one query each, and
        nothing that makes a difference between heads or positions."""
        *tensors, _p, _scale, _function, _parameter, left, right, lower_right = rest
        alike = not self.function.of_places and all(t is None for t in tensors) and left < 0 and (right < 0 or lower_right)
        return self.L == 1 < self.group and alike

    def cut(self, own: int, block: int) -> tuple[int, tuple[int, int, int]]:
        """Blocks of one head's ``own`` positions, and (blocks, sequences, the first step of bisection among these)."""
        starts = self.starts[0]
        if starts is None:
            return ceil_div(own, block), (ceil_div(own, block), 0, 0)
        N = len(starts) - 1
        return own // block + N, (own // block + N, N, 1 << max(N - 1, 0).bit_length() >> 1)


def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Launcher of the forward kernels; arguments, shapes and errors as the op's contract says."""
    call = Call(query, key, value, *rest)
    y, lse = call.like(query, call.E), query.new_empty(query.shape[:3], dtype=statistics_dtype(query))
    if not lse.numel():
        return y, lse
    if not call.S:
        return y.zero_(), lse.fill_(-float("inf"))
    if call.heads_are_rows(*rest):
        rows, to, to_lse = (t.squeeze(2).unflatten(1, (call.G, call.group)) for t in (query, y, lse[..., None]))
        everyone = (*rest[:-3], -1, -1, False)
        run_forward(Call(rows, key, value, *everyone), to, to_lse[..., 0])
    else:
        run_forward(call, y, lse)
    return y, lse


def run_forward(call: Call, y: Tensor, lse: Tensor) -> None:
    c = call.config("forward", call.L, call.S)
    count, sizes = call.cut(call.L, c.rows)
    split = shares(call.B * call.H * count, call.S, c.cols, call.device) if call.starts[0] is None else 1
    share = ceil_div(ceil_div(call.S, c.cols), split)
    split = ceil_div(ceil_div(call.S, c.cols), share)
    out, out_lse = y, lse
    if split > 1:
        out, out_lse = lse.new_empty(split, *y.shape), lse.new_empty(split, *lse.shape)
    y_strides = out.stride() if split > 1 else (0, *y.stride())
    launch(
        scaled_dot_product_attention_forward, (call.B * call.H * count, split), call.query, call.key, call.value, out, out_lse,
        call.mask_bits, call.slopes, *call.starts, call.seed, call.strides, y_strides,
        (call.H, call.group, call.L, call.S, *sizes, share, lse.numel()), call.window, call.score, call.dropout, SCORE=call.function.value,
        BM=c.rows, BN=c.cols, warps=c.warps, stages=c.stages, **call.constants,
    )  # fmt: skip
    if split > 1:
        rows = lse.numel()
        launch(
            combine_shares, (ceil_div(rows, ROWS),), out, out_lse, y, lse, y.stride(), call.H, call.L, call.E, rows, split, BM=ROWS,
            BE=call.constants["BE"],
        )  # fmt: skip


def backward(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, y: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launcher of the backward kernels; arguments, shapes and errors as the op's contract says."""
    *options, need_dquery, need_dkey, need_dvalue, need_dmask = rest
    call = Call(query, key, value, *options)
    mask, shape = call.mask, (call.B, call.H, call.L, call.E)
    check_tensor("dy", dy, query, shape)
    check_tensor("y", y, query, shape)
    check_tensor("lse", lse, query.new_empty(0, dtype=statistics_dtype(query)), shape[:3])
    dquery = call.like(query, call.D) if need_dquery else None
    dkey = call.like(key, call.D) if need_dkey else None
    dvalue = call.like(value, call.E) if need_dvalue else None
    dmask = mask.new_empty(mask.shape) if need_dmask and mask is not None and mask.dtype != torch.bool else None
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    if not lse.numel() or not call.S:
        for t in (dquery, dkey, dvalue, dmask):
            if t is not None:
                t.zero_()
        return dquery, dkey, dvalue, dmask
    launch(
        backward_delta, (ceil_div(lse.numel(), ROWS),), dy, y, delta, dy.stride(), y.stride(), call.H, call.L, lse.numel(), E=call.E,
        BM=ROWS, BE=call.constants["BE"],
    )  # fmt: skip
    if dquery is not None:
        run_dquery(call, dy, lse, delta, dquery)
    if dkey is not None or dvalue is not None:
        run_dkey(call, dy, lse, delta, dkey, dvalue)
    if dmask is not None and dmask.numel():
        run_dmask(call, dy, lse, delta, dmask)
    return dquery, dkey, dvalue, dmask


def run_dquery(call: Call, dy: Tensor, lse: Tensor, delta: Tensor, dquery: Tensor) -> None:
    c = call.config("dquery", call.L, call.S)
    count, sizes = call.cut(call.L, c.rows)
    launch(
        backward_dquery, (call.B * call.H * count,), dy, call.query, call.key, call.value, lse, delta, call.mask_bits, call.slopes,
        *call.starts, call.seed, dquery, call.strides, dy.stride(), dquery.stride(), (call.H, call.group, call.L, call.S, *sizes),
        call.window, call.score, call.dropout, SCORE=call.function.value, BEND=call.function.derivative, BM=c.rows, BN=c.cols,
        warps=c.warps, stages=c.stages, **call.constants,
    )  # fmt: skip


def run_dkey(call: Call, dy: Tensor, lse: Tensor, delta: Tensor, dkey: Tensor | None, dvalue: Tensor | None) -> None:
    c = call.config("dkey", call.S, call.L)
    count, sizes = call.cut(call.S, c.rows)
    strides = [(0, 0, 0, 0) if t is None else t.stride() for t in (dkey, dvalue)]
    launch(
        backward_dkey, (call.B * call.G * count,), dy, call.query, call.key, call.value, lse, delta, call.mask_bits, call.slopes,
        *call.starts, call.seed, dkey, dvalue, call.strides, dy.stride(), *strides, (call.H, call.group, call.L, call.S, *sizes),
        call.window, call.score, call.dropout, SCORE=call.function.value, BEND=call.function.derivative, BM=c.cols, BN=c.rows,
        warps=c.warps, stages=c.stages, **call.constants,
    )  # fmt: skip


def run_dmask(call: Call, dy: Tensor, lse: Tensor, delta: Tensor, dmask: Tensor) -> None:
    c = call.config("dmask", call.L, call.S)
    whole = call.B, call.H, ceil_div(call.L, c.rows), ceil_div(call.S, c.cols)
    own = tuple(1 if m == 1 else n for m, n in zip(dmask.shape, whole, strict=True))
    summed = tuple(n // m for m, n in zip(own, whole, strict=True))
    shared = tuple(1 if n == 1 else None for n in dmask.shape[2:])
    B, H, queries, keys = summed
    launch(
        backward_dmask, (own[0] * own[1] * own[2] * own[3],), dy, call.query, call.key, call.value, lse, delta, call.mask_bits, call.slopes,
        call.seed, dmask, call.strides, dy.stride(), (call.H, call.group, call.L, call.S), (H, queries, keys, B * H * queries * keys,
        *own[1:]), shared, call.window, call.score, call.dropout, SCORE=call.function.value, BM=c.rows, BN=c.cols, warps=c.warps,
        stages=c.stages, **call.constants,
    )  # fmt: skip


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seed: Tensor | None,
) -> None:  # fmt: skip
    """The contract's requirements of the tensors; an error names the one that does not meet them."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise RuntimeError(f"{name} must have 4 dimensions, got {t.dim()}")
    (B, H, L, D), (_, G, S, _), E = query.shape, key.shape, value.shape[3]
    check_tensor("query", query, query, (B, H, L, D))
    check_tensor("key", key, query, (B, G, S, D))
    check_tensor("value", value, query, (B, G, S, E))
    if H % G if G else H:
        raise RuntimeError(f"query has {H} heads, needs a multiple of the {G} of key")
    if max(D, E) > WIDEST:
        raise RuntimeError(f"heads have {D} and {E} numbers, needs at most {WIDEST}")
    if mask is not None:
        if mask.dtype not in mask_dtypes(query) or mask.device != query.device:
            raise RuntimeError(f"mask is {mask.dtype} on {mask.device}, needs one of {mask_dtypes(query)} on {query.device}")
        if mask.dim() != 4 or any(m not in (1, n) for m, n in zip(mask.shape, (B, H, L, S), strict=True)):
            raise RuntimeError(f"mask has shape {tuple(mask.shape)}, needs {(B, H, L, S)} or 1 in place of some")
    if slopes is not None:
        check_tensor("slopes", slopes, query.new_empty(0, dtype=statistics_dtype(query)), (B if slopes.shape[:1] != (1,) else 1, H))
    if seed is not None:
        check_seed(seed, query)
    _check_starts(cu_seqlens_q, cu_seqlens_k, mask, query, S)


def _check_starts(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, mask: Tensor | None, query: Tensor, keys: int) -> None:
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if t is None or t.dtype != torch.int64 or t.dim() != 1 or not len(t) or t.device != query.device:
            raise RuntimeError(f"{name} must be int64 [N + 1] on {query.device}, beside the other one's")
    if len(cu_seqlens_q) != len(cu_seqlens_k) or query.shape[0] != 1 or mask is not None:  # type: ignore[arg-type]
        raise RuntimeError("cu_seqlens_q and cu_seqlens_k must be as long as each other, of a batch of 1, without a mask")
    if len(cu_seqlens_q) == 1 and (query.shape[2] or keys):  # type: ignore[arg-type]
        raise RuntimeError(f"cu_seqlens_q names no sequence, got {query.shape[2]} queries and {keys} keys")


IMPLEMENTATIONS = {"scaled_dot_product_attention_forward": forward, "scaled_dot_product_attention_backward": backward}
_NUMBERS = (0.0, 0.125, 0, 0.0, -1, 0, False)
EXAMPLES = {
    "scaled_dot_product_attention_forward": lambda empty: (*(empty(2, 16, 2048, 64) for _ in range(3)), *[None] * 5, *_NUMBERS),
    "scaled_dot_product_attention_backward": lambda empty: (
        *(empty(2, 16, 2048, 64) for _ in range(5)), empty(2, 16, 2048).float(), *[None] * 5, *_NUMBERS, True, True, True, False,
    ),
}  # fmt: skip
