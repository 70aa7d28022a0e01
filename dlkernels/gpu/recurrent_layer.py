"""The arguments of one recurrent layer, checked, and what is launched on them in both ways."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .config import ceil_div, choose, kind_of
from .launch import check_tensor, device_of, launch, precision
from .linear import run_dx, run_forward
from .recurrent_cells import CELLS, Cell
from .recurrent_plan import Plan, plan
from .recurrent_tiles import APART, step_at

Tensors = list[Tensor]


@triton.jit
def states_before(y, h0, before, starts, T, N, B, H, D, BB: tl.constexpr, BH: tl.constexpr):
    """before[d, n] = h' of token n: y of the token before it in its sequence, or h0. One program per step, direction and BH units."""
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    u = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    first, size = step_at(starts, t, T, B)
    first_before, size_before = step_at(starts, tl.where(d == 0, t - 1, t + 1), T, B)
    for start in range(0, size, BB):
        b = start + tl.arange(0, BB)
        from_row = tl.where(b < size_before, y + ((first_before + b) * D + d) * H, h0 + (d * B + b) * H)
        inside = (b < size)[:, None] & (u < H)[None, :]
        h = tl.load(from_row[:, None] + u[None, :], inside)
        tl.store(before + (d * N + first + b)[:, None] * H + u[None, :], h, inside)


@dataclass(frozen=True)
class Layer:
    """The arguments that both ways share, checked, dense, and those of both directions in one: w_ih [D G H, I], w_hh [D G H, P], b_ih and
    b_hh [D G H] or None, w_hr [D P, H] of a projection. ``sizes``: how many tokens each step has; ``starts`` [T + 1]: their first ones,
    None where every step has B."""

    cell: Cell
    x: Tensor
    h0: Tensor
    c0: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    starts: Tensor | None
    sizes: list[int]

    @property
    def T(self) -> int:
        return len(self.sizes)

    @property
    def N(self) -> int:
        return self.x.shape[0]

    @property
    def D(self) -> int:
        return self.h0.shape[0]

    @property
    def B(self) -> int:
        return self.h0.shape[1]

    @property
    def H(self) -> int:
        return self.w_hh.shape[0] // (self.D * self.cell.gates)

    @property
    def P(self) -> int:
        """The width of h: H, but for a projection."""
        return self.h0.shape[2]

    @property
    def empty(self) -> bool:
        return self.h0.numel() == 0 or self.H == 0

    @property
    def rows(self) -> int:
        """Rows of a direction's weights."""
        return self.cell.gates * self.H

    def steps_weights(self, d: int) -> tuple[Tensor, Tensor | None]:
        """W_hh and b_hh of direction d."""
        mine = slice(d * self.rows, (d + 1) * self.rows)
        return self.w_hh[mine], None if self.b_hh is None else self.b_hh[mine]

    def input_products(self, gates: Tensor | None) -> Tensor:
        """a [N, D, G, H], in the memory of ``gates`` where it fits."""
        fits = gates is not None and self.cell.kept == self.cell.gates
        a = gates if fits else self.x.new_empty((self.N, self.D, self.cell.gates, self.H), dtype=statistics_dtype(self.x))
        assert a is not None
        run_product(self.x, self.w_ih, self.b_ih, a.view(self.N, self.D * self.rows))
        return a

    def states_before(self, y: Tensor) -> Tensor:
        """h' of every token, [D, N, H]."""
        before, BB, BH = y.new_empty(self.D, self.N, self.P), 16, 128
        grid = self.T, ceil_div(self.P, BH), self.D
        launch(states_before, grid, y, self.h0, before, self.starts, self.T, self.N, self.B, self.P, self.D, BB=BB, BH=BH)
        return before

    def sweep(self, kernel, args: tuple[Tensor | None, ...], backward: bool, **constants) -> None:
        """Launch ``kernel`` as the plan says; it takes T steps forward and T + 1 backward."""
        mode, steps = precision(self.x.dtype), self.T + backward
        p = plan_for(self.x, self.cell.gates, self.D, self.B, self.H)
        grid = ceil_div(self.H, p.units), ceil_div(self.B, p.rows), self.D
        meets = p.name == "persistent"
        counters = self.x.new_zeros(grid[1] * grid[2] * APART.value, dtype=torch.int32) if meets else None
        align = gcd(self.H, 16)
        stride = 1 if p.name == "steps" else steps
        if not backward:
            constants["ALONE"] = p.name == "whole" and p.chunks == 1
        for start in range(0, steps, stride):
            launch(
                kernel, grid, *args, self.starts, counters, start, start + stride, self.T, self.B, self.H // align, self.D,
                GATES=self.cell.gates, PRECISION=mode, ALIGN=align, BB=p.rows, BU=p.units, BK=p.depth, CHUNKS=p.chunks,
                RESIDENT=p.chunks > 0, warps=p.warps, stages=p.stages, cooperative=meets, **constants,
            )  # fmt: skip


def plan_for(x: Tensor, gates: int, D: int, B: int, H: int) -> Plan:
    """The plan for a layer of x's dtype on the GPU that holds x."""
    return plan(kind_of(x.dtype, precision(x.dtype)), gates, D, B, H, device_of(x))


def plan_in_words(x: Tensor, gates: int, D: int, B: int, H: int, projected: bool) -> str:
    """How the steps are gone through, and why: what ``explain`` tells of a layer."""
    if projected:
        return "steps, as h is projected: two products and the cells are launches of their own"
    p = plan_for(x, gates, D, B, H)
    return f"{p.name}, as {p.reason}"


def run_product(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = x Wᵀ + b"""
    (M, K), N = x.shape, weight.shape[0]
    run_forward(choose("forward", kind_of(x.dtype, precision(x.dtype)), M, N, K, device_of(x)), x, weight, bias, y, None)


def run_product_back(dy: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx = dy W"""
    (M, N), K = dy.shape, weight.shape[1]
    run_dx(choose("dx", kind_of(dy.dtype, precision(dy.dtype)), M, K, N, device_of(dy)), dy, None, weight, dx)


def check_layer(
    x: Tensor, h0: Tensor, c0: Tensor | None, weights: Tensors, batch_sizes: Tensor | None, mode: int
) -> Layer:
    """The layer of these arguments, or an error that names the one that does not fit."""
    if not 0 <= mode < len(CELLS):
        raise RuntimeError(f"mode is {mode}, needs 0 (lstm) to {len(CELLS) - 1} (rnn with relu)")
    if x.dim() != 2 or h0.dim() != 3 or h0.shape[0] not in (1, 2):
        raise RuntimeError(f"x and h0 must be (N, I) and (1 or 2, B, H), got {tuple(x.shape)} and {tuple(h0.shape)}")
    cell, (N, I), (D, B, P) = CELLS[mode], x.shape, h0.shape
    check_tensor("x", x, x, (N, I))
    check_tensor("h0", h0, x, (D, B, P))
    if cell.has_cell and c0 is None:
        raise RuntimeError("c0 is None, needs the state of the cells of an lstm")
    each, rest = divmod(len(weights), D)
    if rest or each not in ((2, 3, 4, 5) if cell.has_cell else (2, 4)):
        also = ", or 3 or 5 with a projection," if cell.has_cell else ""
        raise RuntimeError(f"weights has {len(weights)} tensors, needs 2 or 4{also} for each of {D} directions")
    biases, projected = each >= 4, each % 2 == 1
    H = c0.shape[-1] if projected and c0 is not None and c0.dim() else P
    if cell.has_cell and c0 is not None:
        check_tensor("c0", c0, x, (D, B, H))
    rows = cell.gates * H
    shapes: list[tuple[int, ...]] = [(rows, I), (rows, P), *[(rows,)] * (2 * biases), *[(P, H)] * projected]
    for i, w in enumerate(weights):
        check_tensor(f"weights[{i}]", w, x, shapes[i % each])
    sizes = _steps(batch_sizes, N, B)
    starts = None if batch_sizes is None else torch.tensor([0, *accumulate(sizes)]).to(x.device)
    joined = [torch.cat(weights[i::each]) if D == 2 else weights[i].contiguous() for i in range(each)]
    b_ih, b_hh = joined[2:4] if biases else (None, None)
    w_hr = joined[-1] if projected else None
    state = c0.contiguous() if cell.has_cell and c0 is not None else None
    return Layer(cell, x.contiguous(), h0.contiguous(), state, joined[0], joined[1], b_ih, b_hh, w_hr, starts, sizes)


def _steps(batch_sizes: Tensor | None, N: int, B: int) -> list[int]:
    """How many of the N tokens each step has."""
    if N == 0:
        raise RuntimeError("x has no rows, needs at least one token")
    if batch_sizes is None:
        if B == 0 or N % B:
            raise RuntimeError(f"x has {N} rows, needs a multiple of the {B} sequences in h0")
        return [B] * (N // B)
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64:
        raise RuntimeError(f"batch_sizes must be int64 of 1 dimension, got {batch_sizes.dtype} of {batch_sizes.dim()}")
    sizes, most = batch_sizes.tolist(), B
    for t, size in enumerate(sizes):
        if not 1 <= size <= most or (t == 0 and size != B):
            wanted = "1 to" if t else "the number of sequences in h0,"
            raise RuntimeError(f"batch_sizes[{t}] is {size}, needs {wanted} {most}")
        most = size
    if sum(sizes) != N:
        raise RuntimeError(f"batch_sizes sum up to {sum(sizes)} tokens, and x has {N} rows")
    return sizes


def check_kept(layer: Layer, y: Tensor, gates: Tensor | None, cells: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the forward returned, dense; None for what this cell has not."""
    wide, size = layer.x.new_empty(0, dtype=statistics_dtype(layer.x)), (layer.N, layer.D)
    check_tensor("y", y, layer.x, (layer.N, layer.D * layer.P))
    if layer.cell.kept and gates is not None:
        check_tensor("gates", gates, wide, (*size, layer.cell.kept, layer.H))
    if layer.cell.has_cell:
        if cells is None:
            raise RuntimeError("cells is None, needs what recurrent_forward kept of an lstm")
        check_tensor("cells", cells, wide, (*size, layer.H))
    kept = gates.contiguous() if layer.cell.kept and gates is not None else None
    return y.contiguous(), kept, cells.contiguous() if layer.cell.has_cell and cells is not None else None
