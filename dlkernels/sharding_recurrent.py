"""How recurrent networks may be shared out where their arguments are DTensors: by sequences, with the weights whole in every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import Shard

from .ops import recurrent_cells, recurrent_layers
from .ops.recurrent_raw import Mode
from .sharding import Layout, run
from .sharding_rules import rule


@rule
def recurrent_cell(mode: Mode, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    tensors = {"input": x, "h": h, "c": c, **dict(zip(recurrent_cells.WEIGHTS, weights))}

    def compute(x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(t for t in recurrent_cells.cell(mode, x, h, c, *weights) if t is not None)

    return (*run(f"{mode.name}_cell", tensors, [_by_sequences(0, "input", "h", "c")], compute), None)[:2]


@rule
def recurrent_network(
    mode: Mode, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool, batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if dropout and train:
        raise NotImplementedError(f"{mode.name}: dropout between layers cannot be had with DTensors; set it to 0")
    first = {f"hx[{i}]": h for i, h in enumerate(states)}
    tensors = {"input": x.transpose(0, 1) if batch_first else x, **first, **{f"params[{i}]": w for i, w in enumerate(params)}}
    layouts = [_by_sequences(1, "input", *first)] if batch_sizes is None else []  # packed ones do not lie in equal parts

    def compute(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        options: tuple[Any, ...] = (has_biases, num_layers, 0.0, train, bidirectional, False, batch_sizes, False)
        return recurrent_layers.network(mode, x, others[: len(states)], others[len(states) :], *options)

    y, *ends = run(mode.name, tensors, layouts, compute)
    return (y.transpose(0, 1) if batch_first else y, *ends)


def _by_sequences(d: int, *names: str) -> Layout:
    return Layout(f"sequences: Shard({d})", dict.fromkeys(names, Shard(d)), Shard(d))
