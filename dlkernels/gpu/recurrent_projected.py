"""The steps of an LSTM that projects h, forward and backward: a few launches for each step and direction.

    forward     s = W_hh h' + b_hh      the cells: c, and m = o tanh(c)     h = W_hr m
    backward    dh += dy[t]             dm = W_hrᵀ dh                       the cells: da, dc      dh = W_hhᵀ da

Every step is two products, each of which needs all of the other, so programs that stay from step to step would meet twice as often as
without a projection; the products are linear.py's. h and c, backward dh and dc, lie in [D, B, ..] from step to step: sequences that do not
run keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from .activations import tanh
from .config import ceil_div
from .launch import launch
from .recurrent_cells import lstm, lstm_backward
from .recurrent_layer import Layer, run_product, run_product_back
from .recurrent_tiles import parts_of, store_parts

BB, BU = 8, 128  # sequences or tokens, and units, of a program


@triton.jit
def place(n, U, BB: tl.constexpr, BU: tl.constexpr):
    """This program's rows and columns of n rows of U numbers, and which of them exist."""
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    u = tl.program_id(1).to(tl.int64) * BU + tl.arange(0, BU)
    return b, u, (b < n)[:, None] & (u < U)[None, :]


@triton.jit
def cells_forward(a, s, c, m, gates, cells, first, n, H, D, d, BB: tl.constexpr, BU: tl.constexpr):
    """c [B, H] of n sequences after their tokens from ``first`` on, in place; m [B, H]; gates and cells where they are not None."""
    b, u, inside = place(n, H, BB, BU)
    rows = (first + b) * D + d
    ACC: tl.constexpr = c.dtype.element_ty
    m_tile, c_tile, kept = lstm(
        parts_of(a, rows, u, H, inside, 4, ACC), parts_of(s, b, u, H, inside, 4, ACC), parts_of(c, b, u, H, inside, 1, ACC)[0]
    )
    store_parts(m, b, u, H, inside, (m_tile,))
    store_parts(c, b, u, H, inside, (c_tile,))
    if gates is not None:
        store_parts(gates, rows, u, H, inside, kept)
    if cells is not None:
        store_parts(cells, rows, u, H, inside, (c_tile,))


@triton.jit
def cells_backward(gates, cells, c0, dm, dc, da, first, n, first_before, n_before, H, D, d, BB: tl.constexpr, BU: tl.constexpr):
    """da [N, D, 4, H] of n tokens from ``first`` on, and dc [B, H] in place. Tokens before them: n_before, from ``first_before`` on."""
    b, u, inside = place(n, H, BB, BU)
    rows = (first + b) * D + d
    ACC: tl.constexpr = dc.dtype.element_ty
    from_row = tl.where(b < n_before, cells + ((first_before + b) * D + d) * H, c0 + b * H)
    before = tl.load(from_row[:, None] + u[None, :], inside, other=0.0)
    after, dc_tile = parts_of(cells, rows, u, H, inside, 1, ACC)[0], parts_of(dc, b, u, H, inside, 1, ACC)[0]
    dm_tile = parts_of(dm, b, u, H, inside, 1, ACC)[0]
    da_tiles, _, _, dc_tile = lstm_backward(parts_of(gates, rows, u, H, inside, 4, ACC), before, after, dm_tile, dc_tile)
    store_parts(da, rows, u, H, inside, da_tiles)
    store_parts(dc, b, u, H, inside, (dc_tile,))


@triton.jit
def with_slope(dh, dy, sums, first, n, P, D, d, BB: tl.constexpr, BU: tl.constexpr):
    """sums [N, P] of n tokens from ``first`` on: dh [B, P] + dy [N, D, P], which may be None."""
    b, u, inside = place(n, P, BB, BU)
    tile = parts_of(dh, b, u, P, inside, 1, dh.dtype.element_ty)[0]
    if dy is not None:
        tile += parts_of(dy, (first + b) * D + d, u, P, inside, 1, dh.dtype.element_ty)[0]
    store_parts(sums, first + b, u, P, inside, (tile,))


@triton.jit
def outputs_again(gates, cells, m, N, H, D, d, BB: tl.constexpr, BU: tl.constexpr):
    """m [N, H] = o tanh(c) of all tokens in direction d."""
    n, u, inside = place(N, H, BB, BU)
    rows = n * D + d
    ACC: tl.constexpr = cells.dtype.element_ty
    o, c = parts_of(gates, rows * 4 + 3, u, H, inside, 1, ACC)[0], parts_of(cells, rows, u, H, inside, 1, ACC)[0]
    store_parts(m, n, u, H, inside, (o * tanh(c, 0.0),))


def _launch(kernel, rows: int, columns: int, *args) -> None:
    launch(kernel, (ceil_div(rows, BB), ceil_div(columns, BU)), *args, BB=BB, BU=BU)


def _steps(layer: Layer, d: int) -> Iterator[tuple[int, int, int, int]]:
    """First token and number of tokens of each step in the order of direction d, and of the one before it: 0 tokens before the first."""
    steps, before = list(zip(accumulate([0, *layer.sizes]), layer.sizes)), (0, 0)
    for step in reversed(steps) if d else steps:
        yield *step, *before
        before = step


def steps_forward(
    layer: Layer, w_hr: Tensor, a: Tensor, c: Tensor, hn: Tensor, y: Tensor, gates: Tensor | None, cells: Tensor | None
) -> None:
    """Fill y [N, D P] and, where they are not None, gates and cells; hn and c [D, B, ..] from h0 and c0 to the last ones in place."""
    s, m = a.new_empty(layer.B, layer.rows), hn.new_empty(layer.B, layer.H)
    ys = y.view(layer.N, layer.D, layer.P)
    for d, w in enumerate(w_hr.chunk(layer.D)):
        for first, n, _, _ in _steps(layer, d):
            run_product(hn[d, :n], *layer.steps_weights(d), s[:n])
            _launch(cells_forward, n, layer.H, a, s, c[d], m, gates, cells, first, n, layer.H, layer.D, d)
            run_product(m[:n], w, None, hn[d, :n])
            ys[first : first + n, d] = hn[d, :n]


def steps_backward(
    layer: Layer, w_hr: Tensor, dy: Tensor | None, gates: Tensor | None, cells: Tensor, c0: Tensor, dh: Tensor, dc: Tensor, da: Tensor,
    dhs: Tensor,
) -> None:  # fmt: skip
    """Fill da and dhs [D, N, P], what h of every token gets; dh and dc [D, B, ..] from the last ones to those of h0 and c0 in place."""
    dm = dc.new_empty(layer.B, layer.H)
    for d, w in enumerate(w_hr.chunk(layer.D)):
        for first, n, first_before, n_before in reversed(list(_steps(layer, d))):
            _launch(with_slope, n, layer.P, dh[d], dy, dhs[d], first, n, layer.P, layer.D, d)
            run_product_back(dhs[d, first : first + n], w, dm[:n])
            sizes = first, n, first_before, n_before, layer.H, layer.D, d
            _launch(cells_backward, n, layer.H, gates, cells, c0[d], dm, dc[d], da, *sizes)
            run_product_back(da[first : first + n, d], layer.steps_weights(d)[0], dh[d, :n])


def unprojected(layer: Layer, gates: Tensor | None, cells: Tensor | None, d: int) -> Tensor:
    """o tanh(c) of all tokens in direction d, [N, H]: what the gradient of W_hr is made of."""
    m = layer.x.new_empty(layer.N, layer.H)
    _launch(outputs_again, layer.N, layer.H, gates, cells, m, layer.N, layer.H, layer.D, d)
    return m
