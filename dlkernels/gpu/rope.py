"""rope on the GPU: a program turns ROWS rows, each the D numbers of one head at one position, read once and written once.

    x, y      [B, H, T, D] of any strides but 1 between the numbers of a row: rows are found from their number
    cos, sin  [1 or B, T, P]: read by every head, which the L2 cache serves

Interleaved pairs are loaded as they lie and sorted in registers, so that both conventions read and write whole lines. The sines are
multiplied by -1 for the inverse, the backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from ..ops.scaled_dot_product_attention_raw import empty_like_heads
from .launch import check_tensor, launch

NUMBERS = 2048  # of a program


@triton.jit
def rope_halves(x, y, c, s, p, P, inside):
    """y[p] = x[p] c - x[p + P] s and y[p + P] = x[p + P] c + x[p] s; x and y point at rows."""
    a = tl.load(x + p, inside).to(c.dtype)
    b = tl.load(x + p + P, inside).to(c.dtype)
    tl.store(y + p, (a * c - b * s).to(y.dtype.element_ty), inside)
    tl.store(y + p + P, (b * c + a * s).to(y.dtype.element_ty), inside)


@triton.jit
def rope_interleaved(x, y, c, s, p, P, inside):
    """The same for the pairs 2p, 2p + 1."""
    ROWS: tl.constexpr = c.shape[0]
    PAIRS: tl.constexpr = c.shape[1]
    n = tl.arange(0, 2 * PAIRS)[None, :].to(tl.int64)
    both = tl.reshape(tl.join(inside, inside), (ROWS, 2 * PAIRS))
    a, b = tl.split(tl.reshape(tl.load(x + n, both).to(c.dtype), (ROWS, PAIRS, 2)))
    turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * PAIRS))
    tl.store(y + n, turned.to(y.dtype.element_ty), both)


@triton.jit
def rope_rows(
    x, cos, sin, y, M, H, T, P, D, x_batch, x_head, x_place, y_batch, y_head, y_place, table_batch, sign,
    TURN: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rows ROWS program .. of x; ``TURN`` is one of the functions above, REST a power of two that holds D - 2P, or 0."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    t, h, b = m % T, m // T % H, m // T // H
    p = tl.arange(0, PAIRS)[None, :].to(tl.int64)
    inside = (m < M) & (p < P)
    c = tl.load(cos + b * table_batch + t * P + p, inside, 0.0)
    s = tl.load(sin + b * table_batch + t * P + p, inside, 0.0) * sign
    x_row = x + b * x_batch + h * x_head + t * x_place
    y_row = y + b * y_batch + h * y_head + t * y_place
    TURN(x_row, y_row, c, s, p, P, inside)
    if REST > 0:
        d = 2 * P + tl.arange(0, REST)[None, :].to(tl.int64)
        tl.store(y_row + d, tl.load(x_row + d, (m < M) & (d < D)), (m < M) & (d < D))


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if x.dim() != 4 or cos.dim() != 3:
        raise RuntimeError(f"x and cos must have 4 and 3 dimensions, got {x.dim()} and {cos.dim()}")
    B, H, T, D = x.shape
    P, batches = cos.shape[2], 1 if cos.shape[0] == 1 else B
    check_tensor("x", x, x, (B, H, T, D))
    like = x.new_empty(0, dtype=statistics_dtype(x))
    check_tensor("cos", cos, like, (batches, T, P))
    check_tensor("sin", sin, like, (batches, T, P))
    if 2 * P > D:
        raise RuntimeError(f"cos has {P} angles, needs at most {D // 2} for heads of {D}")
    x = x if D <= 1 or x.stride(3) == 1 else x.contiguous()
    y = empty_like_heads(x, D)
    run(x, cos, sin, y, interleaved, inverse)
    return y


def run(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, interleaved: bool, inverse: bool) -> None:
    """Fill y, of any strides but 1 between the numbers of a row."""
    (B, H, T, D), P, batches = x.shape, cos.shape[2], cos.shape[0]
    x = x if D <= 1 or x.stride(3) == 1 else x.contiguous()
    M, pairs = B * H * T, triton.next_power_of_2(max(P, 1))
    rest = triton.next_power_of_2(D - 2 * P) if D > 2 * P else 0
    rows = max(1, NUMBERS // max(2 * pairs, rest))
    if M and D:
        launch(
            rope_rows, (triton.cdiv(M, rows),), x, cos.contiguous(), sin.contiguous(), y, M, H, T, P, D, *x.stride()[:3], *y.stride()[:3],
            T * P if batches > 1 else 0, -1 if inverse else 1, TURN=rope_interleaved if interleaved else rope_halves, ROWS=rows,
            PAIRS=pairs, REST=rest,
        )  # fmt: skip


def _example(empty):
    x = empty(2, 4, 512, 64)
    cos = x.new_empty((1, 512, 32), dtype=torch.float32)
    return x, cos, cos, False, False


IMPLEMENTATIONS = {"rope": rope}
EXAMPLES = {"rope": _example}
