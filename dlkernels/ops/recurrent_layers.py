"""Recurrent networks over whole sequences: several layers, one direction or both, dropout between layers. Each layer is recurrent.py's.

    lstm, gru, rnn_tanh, rnn_relu       what dlkernels.nn.LSTM, GRU and RNN call; arguments in the order of torch.lstm and its like

The weights of a layer are, for each direction, w_ih (G H, I), w_hh (G H, H) and, with biases, b_ih and b_hh (G H); I of a later layer is
the D H of the one before it. G is 4, 3 or 1. An LSTM that projects h (arXiv:1402.1128) has one more, w_hr (P, H). Then h is P wide wherever
it appears, here and below: w_hh (G H, P), h0, hn (L D, B, P), output (T, B, D P).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import autocast_dtype, in_autocast, is_spread, on_shards, require_tensors, unsupported, without_kernel
from ..registry import Cost, Op, register
from .dropout import dropout as between_layers
from .recurrent import layer
from .recurrent_raw import GRU, LSTM, MODES, RNN_RELU, RNN_TANH, Mode, plan_in_words

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]

States = tuple[Tensor, ...]  # h0, and c0 of an lstm


def _misfit(
    mode: Mode, x: Tensor, states: States, params: Sequence[Tensor], biases: bool, num_layers: int, bidirectional: bool,
    batch_first: bool, batch_sizes: Tensor | None,
) -> str | None:  # fmt: skip
    """Which argument has a shape that fits no network of this kind. torch's own reads past the end of some."""
    rank = 3 if batch_sizes is None else 2
    if x.dim() != rank:
        return f"input must have {rank} dimensions, got shape {tuple(x.shape)}"
    batch = x.shape[0 if batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
    directions = 1 + bidirectional
    rows = num_layers * directions
    if len(states) != 1 + mode.has_cell:
        return f"hx has {len(states)} tensors, needs {1 + mode.has_cell}"
    if len(params) < 2 or params[1].dim() != 2:
        return f"params has {len(params)} tensors, needs a w_ih and a w_hh of 2 dimensions for each of {rows} layers and directions"
    width = params[1].shape[1]
    hidden = params[0].shape[0] // mode.gates if mode.has_cell else width  # they differ where an LSTM projects h
    each = 2 + 2 * biases + (width != hidden)
    if len(params) != each * rows:
        return f"params has {len(params)} tensors, needs {each} for each of {rows} layers and directions"
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [("hx[0]", states[0], (rows, batch, width))]
    wanted += [("hx[1]", c0, (rows, batch, hidden)) for c0 in states[1:]]
    gates = mode.gates * hidden
    for i, w in enumerate(params):
        inputs = x.shape[-1] if i < each * directions else directions * width
        shapes = [(gates, inputs), (gates, width), *[(gates,)] * (2 * biases), (width, hidden)]
        wanted.append((f"params[{i}]", w, shapes[i % each]))
    for name, t, shape in wanted:
        if t.shape != shape:
            return f"{name} has shape {tuple(t.shape)}, needs {shape} for input {tuple(x.shape)}"
    return None


def _unsupported(mode: Mode, x: Tensor, states: States, params: Sequence[Tensor], *kind: Any) -> str | None:
    """Why PyTorch's own network runs for these arguments, or None where our kernels do. ``kind``: as of ``_misfit``."""
    named = [("input", x), *(("hx", h) for h in states), *((f"params[{i}]", w) for i, w in enumerate(params))]
    reason = unsupported(*named) or _misfit(mode, x, states, params, *kind)
    if reason is not None:
        return reason
    if not x.numel() or not states[0].numel():
        return "there are no tokens, or no sequences"
    dtypes = {t.dtype for _, t in named}
    return f"dtypes {', '.join(sorted(str(dtype) for dtype in dtypes))} differ" if len(dtypes) > 1 else None


def network(
    mode: Mode, x: Tensor, states: States, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool, batch_sizes: Tensor | None, recompute: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """output, hn and, of an LSTM, cn: see ``lstm``."""
    require_tensors(("input", x), *(("hx", h) for h in states), *((f"params[{i}]", w) for i, w in enumerate(params)))
    out, dtype = states[0].dtype, autocast_dtype(x)
    if dtype is not None:  # torch's products become narrow; its GRU adds them to h as it is
        x, *tensors = in_autocast(dtype, x, *states, *params)  # type: ignore[assignment]
        out = torch.promote_types(x.dtype, out) if mode is GRU else x.dtype
        states, params = tuple(tensors[: len(states)]), tensors[len(states) :]  # type: ignore[assignment, arg-type]
    kind = (has_biases, num_layers, bidirectional, batch_first, batch_sizes)
    reason = _unsupported(mode, x, states, params, *kind)
    if reason is not None:
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes)
        if is_spread(x, *states, *params):
            return on_shards("recurrent_network", mode, x, states, params, *options)
        if misfit := _misfit(mode, x, states, params, *kind):
            raise RuntimeError(f"{mode.name}: {misfit}")
        return without_kernel(reason, _native, mode, x, states, params, *options, name=mode.name)
    directions = 1 + bidirectional
    each = len(params) // (num_layers * directions)
    if batch_sizes is None:
        steps, batch = x.shape[1::-1] if batch_first else x.shape[:2]
        x = (x.transpose(0, 1) if batch_first else x).reshape(steps * batch, x.shape[2])
    ends: list[States] = []
    for i in range(num_layers):
        if i and dropout and train:
            x = between_layers(x, dropout, True)
        mine = slice(i * directions, (i + 1) * directions)
        c0 = states[1][mine] if mode.has_cell else None
        x, hn, cn = layer(x, states[0][mine], c0, batch_sizes, mode, params[mine.start * each : mine.stop * each], recompute)
        ends.append((hn, cn) if cn is not None else (hn,))
    if batch_sizes is None:
        x = x.view(steps, batch, x.shape[1])
        x = x.transpose(0, 1) if batch_first else x
    last = (end[0] if num_layers == 1 else torch.cat(end) for end in zip(*ends))
    return tuple(t if t.dtype == out else t.to(out) for t in (x, *last))


def _native(
    mode: Mode, x: Tensor, states: States, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool = False, batch_sizes: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    function = getattr(torch._VF, mode.name)
    hx = states if mode.has_cell else states[0]
    options = (list(params), has_biases, num_layers, dropout, train, bidirectional)
    return function(x, batch_sizes, hx, *options) if batch_sizes is not None else function(x, hx, *options, batch_first)


def lstm(
    input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool = False, batch_sizes: Tensor | None = None, recompute: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A network of LSTM layers (Hochreiter and Schmidhuber 1997, with forget gates) over a batch of sequences.

    Args:
        input: ``(T, B, I)``, or ``(B, T, I)`` with ``batch_first``; with ``batch_sizes`` the tokens ``(N, I)`` of a ``PackedSequence``.
        hx: (h0, c0), each ``(L D, B, H)``: the states of layer 0 in its first direction, in its second, of layer 1, ...
        params: the weights in the order that the top of recurrent_layers.py gives.
        has_biases, num_layers, bidirectional: which weights there are.
        dropout: the probability of a zero between layers, if ``train``.
        batch_sizes: int64 on the CPU, ``(T,)``: how many sequences run at each time step.
        recompute: keep no gates for the backward, which computes them again from input and output: less memory for a third more work.

    Returns:
        output ``(T, B, D H)`` in the layout of the input, hn and cn ``(L D, B, H)``. Under autocast in its dtype, as torch's.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a tensor.
    """
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes, recompute)
    return network(LSTM, input, tuple(hx), params, *options)


def _of_one_state(mode: Mode, summary: str) -> Callable[..., tuple[Tensor, ...]]:
    def function(
        input: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool = False, batch_sizes: Tensor | None = None, recompute: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes, recompute)
        return network(mode, input, (hx,), params, *options)

    function.__name__ = function.__qualname__ = mode.name
    function.__doc__ = f"{summary}: arguments and results as ``lstm``, but for ``hx``, which is h0 alone, and the results, output and hn."
    return function


gru = _of_one_state(GRU, "A network of GRU layers (Cho et al. 2014, arXiv:1406.1078; b_hn within the reset)")
rnn_tanh = _of_one_state(RNN_TANH, "A network of plain recurrent layers (Elman 1990) with tanh")
rnn_relu = _of_one_state(RNN_RELU, "A network of plain recurrent layers with relu")


# ---- for OPS: every tensor an argument of its own -----------------------------------------------------------------------------------


def _network_of(mode: Mode, layers: int, bidirectional: bool, tensors: Sequence[Tensor]) -> tuple[States, Sequence[Tensor], bool]:
    """States, weights, and whether there are biases among them."""
    states, params = tensors[: 1 + mode.has_cell], tensors[1 + mode.has_cell :]
    return tuple(states), params, len(params) >= 4 * layers * (1 + bidirectional)


def _register(mode: Mode, samples: Sequence[dict[str, Any]], bench: Sequence[dict[str, Any]], quick: Sequence[dict[str, Any]]) -> None:
    def call(x: Tensor, layers: int, bidirectional: bool, *states_and_params: Tensor) -> tuple[Tensor, ...]:
        states, params, biases = _network_of(mode, layers, bidirectional, states_and_params)
        return network(mode, x, states, params, biases, layers, 0.0, True, bidirectional, False, None, False)

    def native(x: Tensor, layers: int, bidirectional: bool, *states_and_params: Tensor) -> tuple[Tensor, ...]:
        states, params, biases = _network_of(mode, layers, bidirectional, states_and_params)
        return _native(mode, x, states, params, biases, layers, 0.0, torch.is_grad_enabled(), bidirectional)

    def supports(x: Tensor, layers: int, bidirectional: bool, *states_and_params: Tensor) -> str | None:
        states, params, biases = _network_of(mode, layers, bidirectional, states_and_params)
        return _unsupported(mode, x, states, params, biases, layers, bidirectional, False, None)

    def plan(x: Tensor, layers: int, bidirectional: bool, *states_and_params: Tensor) -> str:
        states, params, _ = _network_of(mode, layers, bidirectional, states_and_params)
        hidden, width = params[0].shape[0] // mode.gates, states[0].shape[2]
        return plan_in_words(mode, x, 1 + bidirectional, states[0].shape[1], hidden, width != hidden)

    def make(
        factory: Callable[..., Tensor], B: int, T: int, I: int, H: int, layers: int = 1, bidirectional: bool = False, bias: bool = True,
        P: int = 0,
    ) -> tuple[Any, ...]:  # fmt: skip
        directions, h = 1 + bidirectional, P or H

        def matrix(rows: int, columns: int) -> Tensor:
            return factory(rows, columns) / max(columns, 1) ** 0.5

        params: list[Tensor] = []
        for i in range(layers):
            for _ in range(directions):
                params += [matrix(mode.gates * H, directions * h if i else I), matrix(mode.gates * H, h)]
                params += [factory(mode.gates * H) for _ in range(2 * bias)]
                params += [matrix(P, H)] * bool(P)
        states = [factory(layers * directions, B, width) for width in (h, H)[: 1 + mode.has_cell]]
        return factory(T, B, I), layers, bidirectional, *states, *params

    def cost(B: int, T: int, I: int, H: int, layers: int = 1, bidirectional: bool = False, bias: bool = True, P: int = 0) -> Cost:
        D, h = 1 + bidirectional, P or H
        widths = [I, *[D * h] * (layers - 1)]
        weights = [D * H * (mode.gates * (width + h) + P) for width in widths]
        flops = sum(2 * B * T * count for count in weights)
        moved = sum(B * T * (width + D * h) for width in widths) + sum(weights)
        return Cost(flops, 2 * flops, moved, 2 * moved)

    register(
        Op(
            name=mode.name, module="recurrent", call=call, reference=native, native=native, make=make, samples=samples, bench=bench,
            quick=quick, tiny=[{"B": 1, "T": 5, "I": 8, "H": 8}], cost=cost, raw=("recurrent_forward", "recurrent_backward"),
            supports=supports, plan=plan,
        )
    )  # fmt: skip


SAMPLES: list[dict[str, Any]] = [
    {"B": 1, "T": 1, "I": 3, "H": 5},
    {"B": 2, "T": 3, "I": 1, "H": 7, "layers": 2, "bidirectional": True},
    {"B": 3, "T": 4, "I": 5, "H": 33, "bias": False},
    {"B": 17, "T": 3, "I": 15, "H": 19, "bidirectional": True},
    {"B": 5, "T": 6, "I": 33, "H": 40},
]
PROJECTED: list[dict[str, Any]] = [
    {"B": 1, "T": 1, "I": 3, "H": 7, "P": 2, "bias": False},
    {"B": 3, "T": 4, "I": 5, "H": 35, "layers": 2, "bidirectional": True, "P": 33},
]
FEW_UNITS: list[dict[str, Any]] = [  # of relu: in half types a sum that rounds to the other side of 0 changes whole gradients, native's too
    {"B": 3, "T": 2, "I": 5, "H": 7, "bias": False},
    {"B": 4, "T": 3, "I": 4, "H": 9, "bidirectional": True},
]
_SIZES = [(64, 64, 128, 256, 1, False), (64, 64, 512, 512, 1, False), (32, 100, 128, 128, 2, True), (8, 500, 64, 128, 1, False),
          (1, 200, 256, 256, 2, False), (128, 32, 300, 300, 2, True)]  # fmt: skip
BENCH = [dict(zip(("B", "T", "I", "H", "layers", "bidirectional"), size)) for size in _SIZES]
QUICK = [BENCH[0], BENCH[3]]

for _mode in MODES:
    _plain = _mode is RNN_RELU  # the same work as with tanh
    _samples = SAMPLES + PROJECTED if _mode is LSTM else FEW_UNITS if _plain else SAMPLES
    _register(_mode, _samples, BENCH[:1] if _plain else BENCH, QUICK[:1] if _mode is not LSTM else QUICK)
