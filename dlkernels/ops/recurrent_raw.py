"""The registered ops behind recurrent.py: schemas, and what they return while a graph is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import define
from ..contract import Optionals, check_traced, statistics_dtype

__all__: list[str] = []


@dataclass(frozen=True)
class Mode:
    """A kind of cell: its code in the kernels, the gates in its weights, and how many numbers per unit the backward needs kept."""

    name: str
    code: int
    gates: int
    kept: int
    has_cell: bool = False


LSTM = Mode("lstm", 0, gates=4, kept=4, has_cell=True)
GRU = Mode("gru", 1, gates=3, kept=4)
RNN_TANH = Mode("rnn_tanh", 2, gates=1, kept=0)
RNN_RELU = Mode("rnn_relu", 3, gates=1, kept=0)
MODES = (LSTM, GRU, RNN_TANH, RNN_RELU)


def _check(x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor], mode: Mode) -> tuple[int, int, int, int]:
    """What the kernels check, while a graph is traced; (N, D, B, H)."""
    torch._check(x.dim() == 2 and h0.dim() == 3, lambda: f"x and h0 must have 2 and 3 dimensions, got {x.dim()} and {h0.dim()}")
    directions, batch, hidden = h0.shape
    fits = len(weights) in (2 * directions, 4 * directions)
    torch._check(fits, lambda: f"weights must have 2 or 4 members per direction of {directions}, got {len(weights)}")
    rows = mode.gates * hidden
    shapes: list[tuple[int, ...]] = [(rows, x.shape[1]), (rows, hidden), (rows,), (rows,)]
    each = len(weights) // directions
    for i, w in enumerate(weights):
        check_traced(x, **{f"weights[{i}]": (w, shapes[i % each])})
    check_traced(x, h0=(h0, h0.shape), c0=(c0, h0.shape))
    return x.shape[0], directions, batch, hidden


def _forward_fake(
    x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor], batch_sizes: Tensor | None, mode: int, keep_gates: bool,
    keep_cells: bool,
) -> Optionals:  # fmt: skip
    kind = MODES[mode]
    tokens, directions, batch, hidden = _check(x, h0, c0, weights, kind)
    state, numbers = (directions, batch, hidden), statistics_dtype(x)
    return (
        x.new_empty((tokens, directions * hidden)),
        x.new_empty(state),
        x.new_empty(state) if kind.has_cell else None,
        x.new_empty((tokens, directions, kind.kept, hidden), dtype=numbers) if keep_gates and kind.kept else None,
        x.new_empty((tokens, directions, hidden), dtype=numbers) if keep_cells and kind.has_cell else None,
    )


def _backward_fake(
    dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, y: Tensor, gates: Tensor | None, cells: Tensor | None, mode: int, need_dx: bool, need_dweights: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    _, directions, batch, hidden = _check(x, h0, c0, weights, MODES[mode])
    state = (directions, batch, hidden)
    check_traced(x, dy=(dy, y.shape), dhn=(dhn, state), dcn=(dcn, state))
    return (
        x.new_empty(x.shape) if need_dx else None,
        x.new_empty(state),
        x.new_empty(state) if MODES[mode].has_cell else None,
        [w.new_empty(w.shape) for w in weights] if need_dweights else [],
    )


# One layer in D directions over N tokens. The tokens of one time step lie side by side, the first step's first: batch_sizes [T] says how
# many sequences are still running at each step (never more than before), None that all B = h0.size(1) run to the end, N = T B.
#
#   x [N, I]   h0, c0, hn, cn [D, B, H]   y [N, D H]   weights, per direction: w_ih [G H, I], w_hh [G H, H], b_ih, b_hh [G H] or neither
#
# Direction 1 runs from each sequence's last token to its first. What the backward needs, in the dtype of sums (float32 beside half types):
#
#   gates [N, D, S, H]   lstm: i, f, g, o after their functions      gru: r, z, n, and W_hn h + b_hn      rnn: none, y says it all
#   cells [N, D, H]      lstm: c after each token
forward = define(
    "recurrent_forward(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, int mode, bool keep_gates, "
    "bool keep_cells) -> (Tensor y, Tensor hn, Tensor cn, Tensor gates, Tensor cells)",
    _forward_fake,
)
# gates is None where the forward was not told to keep it; then it is computed again, from x and y.
backward = define(
    "recurrent_backward(Tensor? dy, Tensor? dhn, Tensor? dcn, Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
    "Tensor y, Tensor? gates, Tensor? cells, int mode, bool need_dx, bool need_dweights) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)",
    _backward_fake,
)
