r"""One layer of a recurrent network over whole sequences, in one direction or both: LSTM, GRU, and RNN with tanh or relu.

Forward, for every token n of x, with h' and c' from the token before it in its sequence (h0 and c0 before the first); σ is the sigmoid:

    rnn     h = act(W_ih x + b_ih + W_hh h' + b_hh)
    lstm    i, f, o = σ(...), g = tanh(...) of the four parts of W_ih x + b_ih + W_hh h' + b_hh, in the order i, f, g, o
            c = f c' + i g      h = o tanh(c), or W_hr (o tanh(c)) where there is a projection
    gru     r, z = σ(...) of two parts of the same sum      n = tanh(W_in x + b_in + r (W_hn h' + b_hn))
            h = (1 - z) n + z h'

Backward    the same steps from the last token to the first: with dh = dy[n] + what comes back from the token after it,
            da, the gradient of the sum, is dh times the derivatives of the above, and W_hhᵀ da goes on to h'.
            Over all tokens at once: dx = da W_ih   dW_ih = daᵀ x   dW_hh = daᵀ h'   db = Σ da   dW_hr = dhᵀ (o tanh(c))

Shapes      x (N, I), the tokens of all B sequences, those of one time step side by side; h0, c0, hn, cn (D, B, H) with D = 1 or 2
            directions; y (N, D H). With a projection h is P wide: h0, hn (D, B, P); y (N, D P)
Work        2 N D G H (I + H) flops forward and twice that backward, G = 4, 3 or 1 gates. The product with W_ih is one large product;
            that with W_hh goes step by step with B rows each, and reads W_hh every time: for few sequences that decides.

The functions of whole networks are in recurrent_layers.py, single steps in recurrent_cells.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function
from ..contract import Optionals, needs_grad, reference_gradients
from . import recurrent_raw as raw
from .recurrent_raw import GRU, RNN_RELU, Mode

__all__: list[str] = []


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, h0: Tensor, c0: Tensor | None, batch_sizes: Tensor | None, mode: Mode, keep_gates: bool, *weights: Tensor
    ) -> Optionals:
        return raw.forward(x, h0, c0, weights, batch_sizes, mode.code, keep_gates, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Optionals) -> None:
        x, h0, c0, batch_sizes, ctx.mode, _, *weights = inputs
        y, _, _, gates, cells = output
        ctx.mark_non_differentiable(*(t for t in (gates, cells) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, batch_sizes, y, gates, cells, *weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, *_: None) -> Optionals:
        x, h0, c0, batch_sizes, y, gates, cells, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            states = (y.shape, h0.shape) + ((c0.shape,) if ctx.mode.has_cell else ())
            dys = tuple(x.new_zeros(shape) if d is None else d for d, shape in zip((dy, dhn, dcn), states))
            return reference_gradients(definition, (x, h0, c0, batch_sizes, ctx.mode, None, *weights), needs, dys)
        dx, dh0, dc0, dweights = raw.backward(
            dy, dhn, dcn, x, h0, c0, weights, batch_sizes, y, gates, cells, ctx.mode.code, needs[0], any(needs[6:])
        )
        return dx, dh0, dc0, None, None, None, *(dweights or [None] * len(weights))


def layer(
    x: Tensor, h0: Tensor, c0: Tensor | None, batch_sizes: Tensor | None, mode: Mode, weights: Sequence[Tensor], recompute: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, hn and cn of arguments that fit each other. ``recompute``: compute the gates again in backward instead of keeping them."""
    if torch._C._are_functorch_transforms_active():  # which cannot batch an op that takes a list
        return (*definition(x, h0, c0, batch_sizes, mode, None, *weights), None)[:3]  # type: ignore[return-value]
    if needs_grad(x, h0, c0, *weights):
        return apply_function(_Layer, x, h0, c0, batch_sizes, mode, not recompute, *weights)[:3]
    return raw.forward(x, h0, c0, weights, batch_sizes, mode.code, False, False)[:3]


# ---- the definition --------------------------------------------------------------------------------------------------------------


def step(
    mode: Mode, a: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """h and c after one token of every sequence; ``a`` is W_ih x + b_ih."""
    s = F.linear(h, w_hh, b_hh)
    if c is not None:  # an LSTM
        i, f, g, o = (a + s).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h if w_hr is None else F.linear(h, w_hr), c
    if mode is GRU:
        (ar, az, an), (sr, sz, sn) = a.chunk(3, 1), s.chunk(3, 1)
        z = torch.sigmoid(az + sz)
        return (1 - z) * torch.tanh(an + torch.sigmoid(ar + sr) * sn) + z * h, None
    return torch.relu(a + s) if mode is RNN_RELU else torch.tanh(a + s), None


def definition(
    x: Tensor, h0: Tensor, c0: Tensor | None, batch_sizes: Tensor | None, mode: Mode, _: Any, *weights: Tensor
) -> tuple[Tensor, ...]:
    """y, hn and, for an LSTM, cn in PyTorch's own operations."""
    directions, batch = h0.shape[:2]
    sizes = [batch] * (x.shape[0] // batch) if batch_sizes is None else batch_sizes.tolist()
    each = len(weights) // directions
    found = [
        _one_direction(x, h0[d], None if c0 is None else c0[d], sizes, mode, d == 1, *weights[d * each : (d + 1) * each])
        for d in range(directions)
    ]
    ys, hs, cs = zip(*found)
    return torch.cat(ys, 1), torch.stack(hs), *((torch.stack(cs),) if mode.has_cell else ())


def _one_direction(
    x: Tensor, h0: Tensor, c0: Tensor | None, sizes: list[int], mode: Mode, backwards: bool, w_ih: Tensor, w_hh: Tensor,
    *others: Tensor,
) -> Optionals:  # fmt: skip
    b_ih, b_hh = others[:2] if len(others) > 1 else (None, None)
    w_hr = others[-1] if len(others) % 2 else None
    steps = list(F.linear(x, w_ih, b_ih).split(sizes))
    ys: list[Tensor] = []
    if backwards:  # sequences join, the longest first
        h, c = h0[:0], None if c0 is None else c0[:0]
        for a in reversed(steps):
            joining = slice(len(h), len(a))
            c = None if c is None or c0 is None else torch.cat([c, c0[joining]])
            h, c = step(mode, a, torch.cat([h, h0[joining]]), c, w_hh, b_hh, w_hr)
            ys.insert(0, h)
        return torch.cat(ys), h, c
    h, c = h0, c0
    hs: list[Tensor] = []
    cs: list[Tensor] = []
    for a in steps:  # sequences leave, the shortest first
        n = len(a)
        hs.insert(0, h[n:])
        cs.insert(0, c[n:] if c is not None else h)
        h, c = step(mode, a, h[:n], None if c is None else c[:n], w_hh, b_hh, w_hr)
        ys.append(h)
    return torch.cat(ys), torch.cat([h, *hs]), None if c is None else torch.cat([c, *cs])
