"""One recurrent layer on the GPU: products over all tokens at once around a sweep through the steps.

    forward     a = W_ih x + b_ih                    linear.py, one product for both directions, in the dtype of sums
                y, gates, cells                      the sweep (recurrent_sweeps.py), as recurrent_plan.py chooses; where an LSTM projects
                                                     h, step by step (recurrent_projected.py)
    backward    gates, where they were not kept      again: W_hh h' + b_hh of all tokens, which y tells, and the cells of all at once
                da, ds                               the sweep
                dx = da W_ih   dW_ih = daᵀ x   dW_hh = dsᵀ h'   dW_hr = dhᵀ o tanh(c)   db = Σ da, Σ ds      linear.py

da, the gradient of a, and ds, that of W_hh h' + b_hh, are one but in a GRU. They are in x's dtype, for the tensor cores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .config import ceil_div, choose, kind_of
from .launch import check_tensor, device_of, launch, precision
from .linear import run_activation, run_dweight
from .recurrent_layer import Layer, Tensors, check_kept, check_layer, run_product, run_product_back
from .recurrent_projected import steps_backward, steps_forward, unprojected
from .recurrent_sweeps import recurrent_backward, recurrent_forward
from .recurrent_tiles import nothing, parts_of, store_parts


@triton.jit
def gates_of(a, s, gates, N, H, D, d, CELL: tl.constexpr, GATES: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr):
    """What the cells of direction d keep of a [N, D, GATES, H] and s [N, GATES, H]; gates may be the memory of a."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    u = tl.program_id(1).to(tl.int64) * BU + tl.arange(0, BU)
    ACC: tl.constexpr = gates.dtype.element_ty
    inside = (n < N)[:, None] & (u < H)[None, :]
    tiles = parts_of(a, n * D + d, u, H, inside, GATES, ACC), parts_of(s, n, u, H, inside, GATES, ACC)
    store_parts(gates, n * D + d, u, H, inside, CELL(tiles[0], tiles[1], nothing(BN, BU, 1, ACC)[0])[2])


def forward(
    x: Tensor, h0: Tensor, c0: Tensor | None, weights: Tensors, batch_sizes: Tensor | None, mode: int, keep_gates: bool, keep_cells: bool
) -> tuple[Tensor | None, ...]:
    """Launcher of the forward; shapes and errors as the op's contract says."""
    layer = check_layer(x, h0, c0, weights, batch_sizes, mode)
    cell, wide = layer.cell, statistics_dtype(x)
    y, hn = x.new_empty(layer.N, layer.D * layer.P), layer.h0.clone()
    gates = x.new_empty((layer.N, layer.D, cell.kept, layer.H), dtype=wide) if keep_gates and cell.kept else None
    cells = x.new_empty((layer.N, layer.D, layer.H), dtype=wide) if keep_cells and cell.has_cell else None
    if layer.empty:
        return y, hn, None if layer.c0 is None else layer.c0.clone(), gates, cells
    a, state = layer.input_products(gates), (layer.h0 if layer.c0 is None else layer.c0).to(wide, copy=True)
    if layer.w_hr is not None:
        steps_forward(layer, layer.w_hr, a, state, hn, y, gates, cells)
    else:
        layer.sweep(recurrent_forward, (a, layer.h0, layer.w_hh, layer.b_hh, state, hn, y, gates, cells), False, CELL=cell.forward)
    return y, hn, state.to(x.dtype) if cell.has_cell else None, gates, cells


def backward(
    dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Tensors,
    batch_sizes: Tensor | None, y: Tensor, gates: Tensor | None, cells: Tensor | None, mode: int, need_dx: bool, need_dweights: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensors]:  # fmt: skip
    """Launcher of the backward; shapes and errors as the op's contract says."""
    layer = check_layer(x, h0, c0, weights, batch_sizes, mode)
    cell, wide = layer.cell, statistics_dtype(x)
    y, gates, cells = check_kept(layer, y, gates, cells)
    like_c = layer.h0 if layer.c0 is None else layer.c0
    for name, t, like in (("dy", dy, y), ("dhn", dhn, layer.h0), ("dcn", dcn, like_c)):
        if t is not None:
            check_tensor(name, t, x, tuple(like.shape))
    dx = x.new_empty(x.shape) if need_dx else None
    dweights = [w.new_empty(w.shape) for w in weights] if need_dweights else []
    dh, dc = _widened(dhn, layer.h0, wide), _widened(dcn, like_c, wide)
    if layer.empty:
        return dx, dh.to(x.dtype), dc.to(x.dtype) if cell.has_cell else None, dweights
    before = layer.states_before(y) if need_dweights or (cell.kept and gates is None) else None
    if cell.kept and gates is None and before is not None:
        gates = _gates_again(layer, before)
    da = x.new_empty(layer.N, layer.D, layer.rows)
    ds = torch.empty_like(da) if cell.parts else None
    dhs = None if layer.w_hr is None else x.new_empty(layer.D, layer.N, layer.P)
    dy, values = None if dy is None else dy.contiguous(), (y, layer.h0) if cells is None else (cells, like_c.to(wide))
    if dhs is not None and layer.w_hr is not None:
        steps_backward(layer, layer.w_hr, dy, gates, *values, dh, dc, da, dhs)
    else:
        layer.sweep(recurrent_backward, (dy, gates, *values, layer.w_hh, dh, dc, da, ds), True, CELL=cell.backward, KEPT=cell.kept)
    if dx is not None and dx.numel():
        run_product_back(da.view(layer.N, -1), layer.w_ih, dx)
    if before is not None and need_dweights:
        each = len(weights) // layer.D
        for d in range(layer.D):
            mine = dweights[d * each : (d + 1) * each]
            db_ih, db_hh = mine[2:4] if each >= 4 else (None, None)
            _product_gradients(da[:, d], layer.x, mine[0], db_ih)
            _product_gradients((da if ds is None else ds)[:, d], before[d], mine[1], db_hh)
            if dhs is not None:
                _product_gradients(dhs[d], unprojected(layer, gates, cells, d), mine[-1], None)
    return dx, dh.to(x.dtype), dc.to(x.dtype) if cell.has_cell else None, dweights


def _product_gradients(dz: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
    """dW = dzᵀ x and db = Σ dz"""
    (M, K), N = x.shape, dz.shape[1]
    if K == 0:
        run_activation(dz, None, None, dbias, 0, 0.0)
        return
    name = "dweight" if dbias is None else "dweight formed"
    c = choose(name, kind_of(x.dtype, precision(x.dtype)), N, K, M, device_of(x))
    run_dweight(c, dz, None, x, dweight, dbias)


def _gates_again(layer: Layer, before: Tensor) -> Tensor:
    """What the forward would have kept of the gates."""
    cell, (N, D, H), BN, BU = layer.cell, (layer.N, layer.D, layer.H), 8, 128
    a = layer.input_products(None)
    gates = a if cell.kept == cell.gates else a.new_empty(N, D, cell.kept, H)
    s = a.new_empty(N, layer.rows)
    for d in range(D):
        run_product(before[d], *layer.steps_weights(d), s)
        grid = ceil_div(N, BN), ceil_div(H, BU)
        launch(gates_of, grid, a, s, gates, N, H, D, d, CELL=cell.forward, GATES=cell.gates, BN=BN, BU=BU)
    return gates


def _widened(d: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``d`` in ``dtype`` to be updated in place; zeros for None."""
    return torch.zeros_like(like, dtype=dtype) if d is None else d.contiguous().to(dtype, copy=True)


def _example(empty: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensors]:
    """x, h0, c0 and weights of an LSTM: 16 steps of 64 sequences, 128 numbers a token, 256 units."""
    return empty(1024, 128), empty(1, 64, 256), empty(1, 64, 256), [empty(1024, 128), empty(1024, 256), empty(1024), empty(1024)]


IMPLEMENTATIONS = {"recurrent_forward": forward, "recurrent_backward": backward}
EXAMPLES = {
    "recurrent_forward": lambda empty: (*_example(empty), None, 0, True, True),
    "recurrent_backward": lambda empty: (
        empty(1024, 256), None, None, *_example(empty), None, empty(1024, 256), empty(1024, 1, 4, 256).float(),
        empty(1024, 1, 256).float(), 0, True, True,
    ),
}  # fmt: skip
