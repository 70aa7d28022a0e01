"""Batches of a data set that fits into memory: a slice of two tensors, not a list of samples put together one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .distributed import rank_and_size


class Batches:
    """(x, y) in batches; iterated again, the same ones, in a new order after ``set_epoch``.

    Under ``torchrun`` every process gets its share of each batch, so a run sees the same batches on any number of processes. The shares
    are equal: of an epoch's last batch the rows that do not divide are left out, other ones in every epoch.

    Args:
        x: features, [M, ...].
        y: targets, [M, ...].
        batch_size: rows of a batch, over all processes together.
        shuffle: a new order per epoch, which depends on ``seed`` and the epoch's number alone.

    Raises:
        ValueError: x and y differ in rows, or ``batch_size`` is not a positive multiple of the number of processes.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, *, shuffle: bool = True, seed: int = 0) -> None:
        self.rank, self.size = rank_and_size()
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y {len(y)}; each x needs its y")
        if batch_size < 1 or batch_size % self.size:
            raise ValueError(f"batch_size must be a positive multiple of the number of processes ({self.size}), got {batch_size}")
        self.x, self.y, self.batch_size, self.shuffle, self.seed, self.epoch = x, y, batch_size, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer: the order of epoch number ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch."""
        rows = len(self.x) // self.size * self.size
        return -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.arange(len(self.x))
        if self.shuffle:
            rows = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
        rows = rows[: len(rows) // self.size * self.size].to(self.x.device)
        for batch in rows.split(self.batch_size):
            mine = batch.chunk(self.size)[self.rank]
            yield self.x[mine], self.y[mine]
