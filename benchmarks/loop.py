"""What the training loop costs beside model, loss and optimizer: the trainer's time per update less that of the same steps by hand.

    python benchmarks/loop.py

A model so small that Python is all there is to see, both loops in turns, the weights equal at the end.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

import dlkernels.nn as nn
from dlkernels import functional as F
from dlkernels import optim
from dlkernels.train import Trainer

UPDATES, REPEATS = 1000, 9
Batches = list[tuple[Tensor, Tensor]]


def make() -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    return model, optim.AdamW(model.parameters())


def by_hand(batches: Batches, max_norm: float | None) -> tuple[float, Tensor]:
    """Seconds, and the weight that results."""
    model, optimizer = make()
    start = time.perf_counter()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step(**({} if max_norm is None else {"max_norm": max_norm, "grad_scale": 1.0}))
    return time.perf_counter() - start, next(model.parameters())


def by_trainer(batches: Batches, max_norm: float | None) -> tuple[float, Tensor]:
    """Seconds, and the weight that results."""
    model, optimizer = make()
    trainer = Trainer(model, F.cross_entropy, optimizer, max_norm=max_norm)
    start = time.perf_counter()
    trainer.fit(batches, epochs=1)
    return time.perf_counter() - start, next(model.parameters())


def main() -> None:
    torch.set_num_threads(2)
    batches = [(torch.randn(4, 8), torch.arange(4) % 2) for _ in range(UPDATES)]
    for max_norm in (None, 1.0):
        differences = []
        for repeat in range(REPEATS + 1):
            (hand, expected), (loop, found) = by_hand(batches, max_norm), by_trainer(batches, max_norm)
            assert torch.equal(found, expected), "the trainer does not make the same updates"
            if repeat:  # the first warms up
                differences.append((loop - hand) / UPDATES * 1e6)
        low, high = min(differences), max(differences)
        print(f"max_norm {max_norm}: {statistics.median(differences):.1f} microseconds an update (from {low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
