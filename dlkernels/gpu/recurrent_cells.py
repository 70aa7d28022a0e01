"""What a recurrent cell does with a tile of units, as functions that a kernel receives as an argument: ops/recurrent.py has the formulas.

    forward     h, state, kept = CELL(a, s, state)      a = W_ih x + b_ih and s = W_hh h' + b_hh of every gate; kept is for the backward
    backward    da, ds, dh, dc = CELL(kept, before, after, dh, dc)      ds is the gradient of s; what is left of dh goes past W_hh to h'

``state`` is what a sequence carries in the dtype of sums beside h: c of an LSTM, else h itself. ``before`` and ``after`` are c' and c of an
LSTM, else h' and h. All but the states are tuples with a tile for every gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import sigmoid, tanh


@triton.jit
def lstm(a, s, c):
    i, f = sigmoid(a[0] + s[0], 0.0), sigmoid(a[1] + s[1], 0.0)
    g, o = tanh(a[2] + s[2], 0.0), sigmoid(a[3] + s[3], 0.0)
    c = f * c + i * g
    return o * tanh(c, 0.0), c, (i, f, g, o)


@triton.jit
def lstm_backward(kept, before, after, dh, dc):
    i, f, g, o = kept[0], kept[1], kept[2], kept[3]
    y = tanh(after, 0.0)
    d = dc + dh * o * (1 - y * y)
    da = (d * g * i * (1 - i), d * before * f * (1 - f), d * i * (1 - g * g), dh * y * o * (1 - o))
    return da, da, tl.zeros_like(dh), d * f


@triton.jit
def gru(a, s, h):
    r, z = sigmoid(a[0] + s[0], 0.0), sigmoid(a[1] + s[1], 0.0)
    n = tanh(a[2] + r * s[2], 0.0)
    h = n + z * (h - n)
    return h, h, (r, z, n, s[2])


@triton.jit
def gru_backward(kept, before, after, dh, dc):
    r, z, n, sn = kept[0], kept[1], kept[2], kept[3]
    dz = dh * (before - n) * z * (1 - z)
    dn = dh * (1 - z) * (1 - n * n)
    dr = dn * sn * r * (1 - r)
    return (dr, dz, dn), (dr, dz, dn * r), dh * z, dc


@triton.jit
def rnn_tanh(a, s, h):
    h = tanh(a[0] + s[0], 0.0)
    return h, h, ()


@triton.jit
def rnn_tanh_backward(kept, before, after, dh, dc):
    da = (dh * (1 - after * after),)
    return da, da, tl.zeros_like(dh), dc


@triton.jit
def rnn_relu(a, s, h):
    v = a[0] + s[0]
    h = tl.where(v <= 0, 0.0, v)  # a NaN stays one
    return h, h, ()


@triton.jit
def rnn_relu_backward(kept, before, after, dh, dc):
    da = (tl.where(after <= 0, 0.0, dh),)
    return da, da, tl.zeros_like(dh), dc


class Cell(NamedTuple):
    """A mode of the contract: its functions, the gates in its weights, the tiles that its backward needs kept, whether it carries c."""

    forward: Any
    backward: Any
    gates: int
    kept: int
    has_cell: bool = False
    parts: bool = False  # ds is not da


CELLS = (
    Cell(lstm, lstm_backward, 4, 4, has_cell=True),
    Cell(gru, gru_backward, 3, 4, parts=True),
    Cell(rnn_tanh, rnn_tanh_backward, 1, 0),
    Cell(rnn_relu, rnn_relu_backward, 1, 0),
)
