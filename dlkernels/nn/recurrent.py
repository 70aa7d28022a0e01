"""Recurrent layers: the parameters, initialisation and state_dicts of torch.nn's over our kernels.

The networks derive from torch's base class and not from torch.nn.LSTM and its like, which torch.compile refuses to look into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import functional as F

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class _Network(torch.nn.RNNBase):
    """What LSTM, GRU and RNN share: from the arguments of a module to those of a function, and back."""

    recompute = False

    def __init__(self, mode: str, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        self.recompute = recompute

    def forward(self, input: Any, hx: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        x, batch_sizes = (input.data, input.batch_sizes) if packed else (input, None)
        order, back = (input.sorted_indices, input.unsorted_indices) if packed else (None, None)
        if not packed and x.dim() not in (2, 3):
            raise ValueError(f"{self._get_name()}: input must have 2 or 3 dimensions, (T, B, I) or (T, I), got {x.dim()}")
        single = not packed and x.dim() == 2
        if single:
            x = x.unsqueeze(0 if self.batch_first else 1)
        if not packed and 0 in x.shape[:2]:
            raise RuntimeError(f"{self._get_name()}: input has shape {tuple(input.shape)}, needs at least one token and one sequence")
        states = self._states(hx, x, batch_sizes, single, order)
        self._check(x, batch_sizes, states, single)
        function, hx = getattr(F, self.mode.lower()), states if len(states) > 1 else states[0]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first and not packed)
        y, *ends = function(x, hx, self._flat_weights, *options, batch_sizes, self.recompute)
        if back is not None:
            ends = [end.index_select(1, back) for end in ends]
        if packed:
            y = PackedSequence(y, batch_sizes, order, back)
        elif single:
            y, ends = y.squeeze(0 if self.batch_first else 1), [end.squeeze(1) for end in ends]
        return y, (tuple(ends) if len(ends) > 1 else ends[0])

    def _sizes(self, x: Tensor, batch_sizes: Tensor | None) -> list[tuple[int, int, int]]:
        """The shapes of h0 and, in an LSTM, c0."""
        rows, batch, width = self.get_expected_hidden_size(x, batch_sizes)  # of h, which proj_size may narrow
        return [(rows, batch, width), (rows, batch, self.hidden_size)][: 1 + (self.mode == "LSTM")]

    def _states(self, hx: Any, x: Tensor, batch_sizes: Tensor | None, single: bool, order: Tensor | None) -> list[Tensor]:
        """h0, and c0 of an LSTM: zeros, or those given, as a batch in the order of the tokens."""
        if hx is None:
            return [torch.zeros(size, dtype=x.dtype, device=x.device) for size in self._sizes(x, batch_sizes)]
        states = list(hx) if self.mode == "LSTM" else [hx]
        rank = 2 if single else 3
        for name, state in zip(("hx", "cx"), states):
            if state.dim() != rank:
                raise RuntimeError(f"{self._get_name()}: {name} must have {rank} dimensions like the input, got {state.dim()}")
        if single:
            return [state.unsqueeze(1) for state in states]
        return states if order is None else [state.index_select(1, order) for state in states]

    def _check(self, x: Tensor, batch_sizes: Tensor | None, states: list[Tensor], single: bool) -> None:
        self.check_input(x, batch_sizes)
        for i, (state, wanted) in enumerate(zip(states, self._sizes(x, batch_sizes))):
            if state.shape != wanted:
                first = "B, T, I" if self.batch_first else "T, B, I"
                hint = f"; the input {tuple(x.shape)} is read as ({first}): is batch_first right?"
                raise RuntimeError(
                    f"Expected {'cell' if i else 'hidden'} size {wanted} of hx[{i}], got {list(state.shape)}"
                    f"{hint if batch_sizes is None and not single else ''}"
                )


class LSTM(_Network):
    """``torch.nn.LSTM`` on our kernels: ``(T, B, I)`` -> ``(T, B, D H)``, (hn, cn). With ``proj_size`` output and hn are as wide as that.

    ``recompute=True`` keeps no gates for the backward, which computes them again from input and output: less memory for more work.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_Network):
    """``torch.nn.GRU`` on our kernels: ``(T, B, I)`` -> ``(T, B, D H)``, hn. ``recompute`` as in ``LSTM``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("proj_size"):
            raise ValueError("proj_size is an option of LSTM, not of GRU")
        super().__init__("GRU", *args, **kwargs)


class RNN(_Network):
    """``torch.nn.RNN`` on our kernels, with tanh or relu: ``(T, B, I)`` -> ``(T, B, D H)``, hn."""

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", *args: Any, **kwargs: Any
    ) -> None:
        if kwargs.get("proj_size"):
            raise ValueError("proj_size is an option of LSTM, not of RNN")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be tanh or relu, got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *args, **kwargs)


class _Cell:
    """What the cells share: input ``(B, I)`` or ``(I,)``, states zero where none are given."""

    _with_cell = False

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        with_cell, rank = self._with_cell, input.dim()
        if rank not in (1, 2):
            raise ValueError(f"{self._get_name()}: Expected input to be 1D or 2D, got {rank}D instead")
        single = rank == 1
        x = input.unsqueeze(0) if single else input
        states = [x.new_zeros(x.shape[0], self.hidden_size)] * (1 + with_cell) if hx is None else list(hx) if with_cell else [hx]
        if hx is not None:
            for i, state in enumerate(states):
                if state.dim() != rank:
                    which = f"hx[{i}]" if with_cell else "hidden"
                    raise ValueError(f"{self._get_name()}: Expected {which} to be {rank}D like the input, got {state.dim()}D instead")
            states = [state.unsqueeze(0) for state in states] if single else states
        found = self._function(x, states if with_cell else states[0], self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if not single:
            return found
        return tuple(t.squeeze(0) for t in found) if with_cell else found.squeeze(0)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on our kernel: input ``(B, I)`` and (h, c), each ``(B, H)`` -> the new (h, c); or all of them without B."""

    _with_cell = True
    _function = staticmethod(F.lstm_cell)


class GRUCell(_Cell, torch.nn.GRUCell):
    """``torch.nn.GRUCell`` on our kernel: input ``(B, I)`` and h ``(B, H)`` -> the new h."""

    _function = staticmethod(F.gru_cell)


class RNNCell(_Cell, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on our kernel, with tanh or relu: input ``(B, I)`` and h ``(B, H)`` -> the new h."""

    def _function(self, *args: Any) -> Tensor:
        return getattr(F, f"rnn_{self.nonlinearity}_cell")(*args)
