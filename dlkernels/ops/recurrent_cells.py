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
from .recurrent_raw import GRU, LSTM, MODES, RNN_RELU, RNN_TANH, Mode

__all__ = ["gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"]


def _unsupported(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> str | None:
    """Why PyTorch's own cell runs for these arguments, or None where our kernels do. ``weights``: w_ih, w_hh, b_ih, b_hh."""
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    reason = unsupported(("input", x), ("h", h), optional=(("c", c), *zip(names, weights)))
    if reason is not None:
        return reason
    w_ih, w_hh, *biases = weights
    if w_ih is None or w_hh is None or (c is None) == mode.has_cell or len({b is None for b in biases}) > 1:
        return "a state or a weight is missing"
    if x.dim() != 2 or h.dim() != 2 or w_ih.dim() != 2:
        return "input, h and w_ih do not have 2 dimensions"
    batch, hidden = h.shape
    rows = mode.gates * hidden
    wanted: list[tuple[Any, Any]] = [(x, (batch, w_ih.shape[1])), (c, h.shape), (w_ih, (rows, x.shape[1])), (w_hh, (rows, hidden))]
    wanted += [(b, (rows,)) for b in biases]
    shapes = [tuple(t.shape) for t, shape in wanted if t is not None and t.shape != shape]
    if shapes:
        return f"shape {shapes[0]} does not fit input {tuple(x.shape)} and h {tuple(h.shape)}"
    if not x.numel() or not h.numel():
        return "there are no numbers"
    dtypes = {t.dtype for t, _ in wanted if t is not None}
    return f"dtypes {', '.join(sorted(str(dtype) for dtype in dtypes))} differ" if len(dtypes) > 1 else None


def _cell(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = autocast_dtype(x)
    out = None if h is None else h.dtype
    if dtype is not None:  # torch's products become narrow; but for the plain cells, they are added to the state as it is
        require_tensors(("input", x), ("h", h))
        x, h, c, *weights = in_autocast(dtype, x, h, c, *weights)  # type: ignore[assignment]
        out = x.dtype if mode.gates == 1 else torch.promote_types(x.dtype, out)
    reason = _unsupported(mode, x, h, c, *weights)
    if reason is not None:
        require_tensors(("input", x), ("h", h), optional=(("c", c), *zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights)))
        if is_spread(x, h, c, *weights):
            return on_shards("recurrent_cell", mode, x, h, c, *weights)
        return without_kernel(reason, _native, mode, x, h, c, *weights, name=f"{mode.name}_cell")
    given = [w for w in weights if w is not None]
    _, hn, cn = layer(x, h[None], None if c is None else c[None], None, mode, given)
    return hn[0].to(out), None if cn is None else cn[0].to(out)


def _native(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    _refuse_what_crashes(mode, x, h, c, weights)
    if mode is LSTM:
        return torch.lstm_cell(x, (h, c), *weights)  # type: ignore[arg-type]
    return getattr(torch, f"{mode.name}_cell")(x, h, *weights), None


def _refuse_what_crashes(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor | None]) -> None:
    """torch's cells read past the end of states whose batch is another's."""
    for name, t in (("h", h), ("c", c)):
        if t is not None and x.dim() == 2 and (t.dim() != 2 or t.shape[0] != x.shape[0]):
            raise RuntimeError(f"{name} has shape {tuple(t.shape)}, needs ({x.shape[0]}, H) for input of shape {tuple(x.shape)}")


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
    return _cell(LSTM, input, h, c, w_ih, w_hh, b_ih, b_hh)  # type: ignore[return-value]


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of a GRU, ``torch.gru_cell``: as ``lstm_cell`` with ``hx`` = h; rows of the reset, update and new gates."""
    return _cell(GRU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_tanh_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of a plain recurrent network, ``torch.rnn_tanh_cell``: as ``lstm_cell`` with ``hx`` = h and weights of one gate."""
    return _cell(RNN_TANH, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_relu_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """``rnn_tanh_cell`` with relu."""
    return _cell(RNN_RELU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


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
        weights = [factory(rows, I) / I**0.5, factory(rows, H) / H**0.5]
        return factory(B, I), *states, *weights, *(factory(rows) for _ in range(2 * bias))

    def cost(B: int, I: int, H: int, bias: bool = True) -> Cost:
        flops, moved = 2 * B * mode.gates * H * (I + H), B * (I + 2 * H) + mode.gates * H * (I + H)
        return Cost(flops, 2 * flops, moved, 2 * moved)

    def definition(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any) -> Any:
        return step(mode, torch.nn.functional.linear(x, w_ih, b_ih), h, c, w_hh, b_hh)

    register(
        Op(
            name=f"{mode.name}_cell", module="recurrent", call=arranged(results(_cell)), reference=arranged(results(definition)),
            native=arranged(results(_native)), make=make, samples=SAMPLES, bench=bench, quick=bench[:1], tiny=[{"B": 1, "I": 16, "H": 16}],
            cost=cost, raw=("recurrent_forward", "recurrent_backward"), supports=arranged(_unsupported),
        )
    )  # fmt: skip


SAMPLES: list[dict[str, Any]] = [
    {"B": 1, "I": 3, "H": 5}, {"B": 3, "I": 1, "H": 7, "bias": False}, {"B": 17, "I": 16, "H": 33}, {"B": 5, "I": 65, "H": 40},
]  # fmt: skip
BENCH = [{"B": B, "I": I, "H": H} for B, I, H in [(64, 128, 256), (64, 512, 512), (1, 512, 512), (256, 256, 256)]]

for _mode in MODES:
    _register(_mode, BENCH if _mode is LSTM else BENCH[:2])
