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


def plan_in_words(mode: Mode, x: Tensor, D: int, B: int, H: int, projected: bool = False) -> str:
    """How a GPU's kernels go through the steps: gpu/recurrent_plan.py."""
    from ..gpu import recurrent_layer

    return recurrent_layer.plan_in_words(x, mode.gates, D, B, H, projected)


def _check(x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor], mode: Mode) -> tuple[int, int, int]:
    """What the kernels check, while a graph is traced; (D, B, H), the shape of c."""
    torch._check(x.dim() == 2 and h0.dim() == 3, lambda: f"x and h0 must have 2 and 3 dimensions, got {x.dim()} and {h0.dim()}")
    directions, batch, width = int(h0.shape[0]), h0.shape[1], h0.shape[2]
    each, rest = divmod(len(weights), directions)
    fits = rest == 0 and each in ((2, 3, 4, 5) if mode.has_cell else (2, 4))
    torch._check(fits, lambda: f"weights must have 2 or 4 members per direction of {directions}, or 3 or 5, got {len(weights)}")
    hidden = c0.shape[-1] if each % 2 and c0 is not None else width
    rows = mode.gates * hidden
    shapes: list[tuple[int, ...]] = [(rows, x.shape[1]), (rows, width), (rows,), (rows,)][: each // 2 * 2]
    shapes += [(width, hidden)] * (each % 2)
    for i, w in enumerate(weights):
        check_traced(x, **{f"weights[{i}]": (w, shapes[i % each])})
    check_traced(x, h0=(h0, h0.shape), c0=(c0, (directions, batch, hidden)))
    return directions, batch, hidden


def _forward_fake(
    x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor], batch_sizes: Tensor | None, mode: int, keep_gates: bool,
    keep_cells: bool,
) -> Optionals:  # fmt: skip
    kind = MODES[mode]
    cells = directions, _, hidden = _check(x, h0, c0, weights, kind)
    tokens, numbers = x.shape[0], statistics_dtype(x)
    return (
        x.new_empty((tokens, directions * h0.shape[2])),
        x.new_empty(h0.shape),
        x.new_empty(cells) if kind.has_cell else None,
        x.new_empty((tokens, directions, kind.kept, hidden), dtype=numbers) if keep_gates and kind.kept else None,
        x.new_empty((tokens, directions, hidden), dtype=numbers) if keep_cells and kind.has_cell else None,
    )


def _backward_fake(
    dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, y: Tensor, gates: Tensor | None, cells: Tensor | None, mode: int, need_dx: bool, need_dweights: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    state = _check(x, h0, c0, weights, MODES[mode])
    check_traced(x, dy=(dy, y.shape), dhn=(dhn, h0.shape), dcn=(dcn, state))
    return (
        x.new_empty(x.shape) if need_dx else None,
        x.new_empty(h0.shape),
        x.new_empty(state) if MODES[mode].has_cell else None,
        [w.new_empty(w.shape) for w in weights] if need_dweights else [],
    )


# One layer in D directions over N tokens. The tokens of one time step lie side by side, the first step's first: batch_sizes [T] says how
# many sequences are still running at each step (never more than before), None that all B = h0.size(1) run to the end, N = T B.
#
#   x [N, I]   h0, c0, hn, cn [D, B, H]   y [N, D H]   weights, per direction: w_ih [G H, I], w_hh [G H, H], b_ih, b_hh [G H] or neither
#
# An lstm may have one more, w_hr [P, H], which makes h P wide: h0, hn [D, B, P], y [N, D P], w_hh [G H, P].
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
