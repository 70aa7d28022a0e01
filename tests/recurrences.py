"""Recurrent layers of every kind for the tests of the Triton launchers, and the calls of these."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from launchers import DEVICE
from torch import Tensor

from dlkernels.ops.recurrent_raw import Mode


class Case(NamedTuple):
    """Sequences, inputs, units, directions, steps; of packed sequences how many run at each; P: to how many numbers h is projected."""

    B: int
    I: int
    H: int
    D: int = 1
    T: int = 3
    sizes: list[int] | None = None
    bias: bool = True
    recompute: bool = False
    P: int = 0

    def tensors(self, mode: Mode, dtype: torch.dtype, device: str = DEVICE) -> dict[str, Any]:
        """The arguments that both launchers share."""
        N, rows, P = sum(self.sizes) if self.sizes else self.T * self.B, mode.gates * self.H, self.P or self.H

        def randn(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta") if device == "meta" else torch.randn(shape).to(device, dtype)

        weights = []
        for _ in range(self.D):
            weights += [randn(rows, self.I) / self.I**0.5, randn(rows, P) / P**0.5, *(randn(rows) for _ in range(2 * self.bias))]
            weights += [randn(P, self.H) / self.H**0.5] * bool(self.P)
        sizes = None if self.sizes is None else torch.tensor(self.sizes)
        c0 = randn(self.D, self.B, self.H) if mode.has_cell else None
        return {"x": randn(N, self.I), "h0": randn(self.D, self.B, P), "c0": c0, "weights": weights, "batch_sizes": sizes}


def forward(mode: Mode, args: dict[str, Any], keep_gates: bool = True, keep_cells: bool = True) -> Any:
    from dlkernels.gpu import recurrent

    return recurrent.forward(**args, mode=mode.code, keep_gates=keep_gates, keep_cells=keep_cells)


def backward(mode: Mode, slopes: list[Any], args: dict[str, Any], kept: list[Any], need_dx: bool = True, need_dweights: bool = True) -> Any:
    """``slopes``: dy, dhn, dcn; ``kept``: y, gates, cells."""
    from dlkernels.gpu import recurrent

    given = dict(zip(("dy", "dhn", "dcn", "y", "gates", "cells"), (*slopes, *kept), strict=True))
    return recurrent.backward(**given, **args, mode=mode.code, need_dx=need_dx, need_dweights=need_dweights)
