"""One step of a recurrent network: torch.lstm_cell and its like. A sequence of one token for recurrent.py, which has the formulas.

Shapes      input (B, I)   h, c (B, H)   w_ih (G H, I)   w_hh (G H, H)   b_ih, b_hh (G H) or None, both
Work        2 B G H (I + H) flops forward and twice that backward; for few rows reading the weights decides
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import autocast_dtype, in_autocast, is_spread, on_shards, require_tensors, unsupported, without_kernel
from ..registry import Cost, Op, register
from .recurrent import layer, step
from .recurrent_raw import GRU, LSTM, MODES, RNN_RELU, RNN_TANH, Mode, plan_in_words

__all__ = ["gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"]

WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")


def _misfit(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> str | None:
    """Which argument has a shape that does not fit input and h. torch's own cells read past the end of some that don't."""
    if x.dim() != 2 or h.dim() != 2:
        return f"input and h must have 2 dimensions, (B, I) and (B, H), got shapes {tuple(x.shape)} and {tuple(h.shape)}"
    (batch, width), hidden = x.shape, h.shape[1]
    rows = mode.gates * hidden
    shapes = [(batch, hidden), (batch, hidden), (rows, width), (rows, hidden), (rows,), (rows,)]
    for name, t, shape in zip(("h", "c", *WEIGHTS), (h, c, *weights), shapes):
        if t is not None and t.shape != shape:
            return f"{name} has shape {tuple(t.shape)}, needs {shape} for input {tuple(x.shape)} and h {tuple(h.shape)}"
    return None


def _unsupported(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> str | None:
    """Why PyTorch's own cell runs for these arguments, or None where our kernels do. ``weights``: w_ih, w_hh, b_ih, b_hh."""
    reason = unsupported(("input", x), ("h", h), optional=(("c", c), *zip(WEIGHTS, weights)))
    if reason is not None:
        return reason
    given = [t for t in (x, h, c, *weights) if t is not None]
    if len(given) not in (4 + mode.has_cell, 6 + mode.has_cell) or (c is None) == mode.has_cell:
        return "a state or a weight is missing"
    dtypes = {t.dtype for t in given}
    if len(dtypes) > 1:
        return f"dtypes {', '.join(sorted(map(str, dtypes)))} differ"
    return _misfit(mode, x, h, c, *weights) or ("there are no numbers" if not x.numel() or not h.numel() else None)


def cell(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The new h and, of an LSTM, c."""
    dtype, out = autocast_dtype(x) if isinstance(x, Tensor) else None, None
    if dtype is not None:  # torch's products become narrow; but for the plain cells, they are added to the state as it is
        require_tensors(("input", x), ("h", h), optional=(("c", c), *zip(WEIGHTS, weights)))
        wide = h.dtype
        x, h, c, *weights = in_autocast(dtype, x, h, c, *weights)  # type: ignore[assignment]
        out = x.dtype if mode.gates == 1 else torch.promote_types(x.dtype, wide)
    reason = _unsupported(mode, x, h, c, *weights)
    if reason is not None:
        return _refused(reason, mode, x, h, c, *weights)
    y, _, cn = layer(x, h.unsqueeze(0), None if c is None else c.unsqueeze(0), None, mode, [w for w in weights if w is not None])
    found = y, None if cn is None else cn.squeeze(0)
    return found if out is None else tuple(t if t is None else t.to(out) for t in found)  # type: ignore[return-value]


def _refused(
    reason: str, mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What PyTorch makes of arguments that no kernel takes: its result, or its error with the arguments named."""
    require_tensors(("input", x), ("h", h), optional=(("c", c), *zip(WEIGHTS, weights)))
    if is_spread(x, h, c, *weights):
        return on_shards("recurrent_cell", mode, x, h, c, *weights)
    if misfit := _misfit(mode, x, h, c, *weights):
        raise RuntimeError(f"{mode.name}_cell: {misfit}")
    return without_kernel(reason, _native, mode, x, h, c, *weights, name=f"{mode.name}_cell")


def _native(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if mode is LSTM:
        return torch.lstm_cell(x, (h, c), *weights)  # type: ignore[arg-type]
    return getattr(torch, f"{mode.name}_cell")(x, h, *weights), None


def lstm_cell(
    input: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM. ``torch.lstm_cell``.

    Args:
        input: ``(B, I)``, float32, float64, bfloat16 or float16.
        hx: (h, c), each ``(B, H)``, in the same dtype, as are the weights.
        w_ih, w_hh: ``(4 H, I)`` and ``(4 H, H)``; rows of the input, forget, cell and output gates in this order.
        b_ih, b_hh: ``(4 H,)``, or both None.

    Returns:
        The new h and c, ``(B, H)``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a tensor.
    """
    h, c = hx
    return cell(LSTM, input, h, c, w_ih, w_hh, b_ih, b_hh)  # type: ignore[return-value]


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of a GRU, ``torch.gru_cell``: as ``lstm_cell`` with ``hx`` = h; rows of the reset, update and new gates."""
    return cell(GRU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_tanh_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of a plain recurrent network, ``torch.rnn_tanh_cell``: as ``lstm_cell`` with ``hx`` = h and weights of one gate."""
    return cell(RNN_TANH, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_relu_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """``rnn_tanh_cell`` with relu."""
    return cell(RNN_RELU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


# ---- for OPS: every tensor an argument of its own -----------------------------------------------------------------------------------


def _register(mode: Mode, bench: Sequence[dict[str, int]]) -> None:
    def arranged(function: Callable[..., Any]) -> Callable[..., Any]:
        if mode.has_cell:
            return lambda x, h, c, w_ih, w_hh, b_ih=None, b_hh=None: function(mode, x, h, c, w_ih, w_hh, b_ih, b_hh)
        return lambda x, h, w_ih, w_hh, b_ih=None, b_hh=None: function(mode, x, h, None, w_ih, w_hh, b_ih, b_hh)

    def results(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*args) if mode.has_cell else function(*args)[0]

    def make(factory: Callable[..., Tensor], B: int, I: int, H: int, bias: bool = True) -> tuple[Tensor, ...]:
        rows = mode.gates * H
        states = [factory(B, H) for _ in range(1 + mode.has_cell)]
        weights = [factory(rows, I), factory(rows, H)]
        if mode is not RNN_RELU:  # gates that are neither open nor shut
            weights = [w / w.shape[1] ** 0.5 for w in weights]
        return factory(B, I), *states, *weights, *(factory(rows) for _ in range(2 * bias))

    def cost(B: int, I: int, H: int, bias: bool = True) -> Cost:
        flops, moved = 2 * B * mode.gates * H * (I + H), B * (I + 2 * H) + mode.gates * H * (I + H)
        return Cost(flops, 2 * flops, moved, 2 * moved)

    def definition(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any) -> Any:
        return step(mode, torch.nn.functional.linear(x, w_ih, b_ih), h, c, w_hh, b_hh)

    register(
        Op(
            name=f"{mode.name}_cell", module="recurrent", call=arranged(results(cell)), reference=arranged(results(definition)),
            native=arranged(results(_native)), make=make, samples=SAMPLES, bench=bench, quick=bench[:1], tiny=[{"B": 1, "I": 16, "H": 16}],
            cost=cost, raw=("recurrent_forward", "recurrent_backward"), supports=arranged(_unsupported),
            plan=lambda x, h, *_: plan_in_words(mode, x, 1, *h.shape),
        )
    )  # fmt: skip


SAMPLES: list[dict[str, Any]] = [
    {"B": 1, "I": 3, "H": 5}, {"B": 3, "I": 1, "H": 7, "bias": False}, {"B": 17, "I": 16, "H": 33}, {"B": 5, "I": 65, "H": 40},
]  # fmt: skip
BENCH = [{"B": B, "I": I, "H": H} for B, I, H in [(64, 128, 256), (64, 512, 512), (1, 512, 512), (256, 256, 256)]]

for _mode in MODES:
    _register(_mode, BENCH if _mode is LSTM else BENCH[:2])
