"""What the trainer, the benchmark and the report need to know about a teaching model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dlkernels.data import Split


@dataclass(frozen=True)
class ModelSpec:
    """One teaching model with its data and its recipe.

    ``build`` and ``loss`` take the namespace of layers, ``torch.nn`` or ``dlkernels.nn``, and building draws the same
    random numbers from both: the same seed then gives the same initial parameters, and the two training runs can be compared.
    """

    name: str  # the key in MODELS, and what `dlkernels train NAME` takes
    title: str  # one line for the report: the sizes and what is peculiar
    build: Callable[[ModuleType], torch.nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]  # synthetic (x, y) of the size one training step sees; needs no data set
    data: Callable[[], Split]  # the real data
    loss: Callable[[ModuleType], Callable[[Tensor, Tensor], Tensor]] = lambda nn: nn.functional.cross_entropy
    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    max_norm: float = 1.0  # the gradient is clipped to this length
