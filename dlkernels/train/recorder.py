"""What a run tells: the progress bar, the mean loss, and the trackers' numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import full, sum_over_processes
from .trackers import make_tracker

if TYPE_CHECKING:
    from .trainer import Trainer


class Recorder:
    """Sees every step of a trainer, and looks at its loss only when a number is asked for, as that waits for a GPU."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        names = trainer.trackers if trainer.trackers is not None else () if trainer.folder is None else ("jsonl",)
        made = [make_tracker(t, Path(str(trainer.folder))) if isinstance(t, str) else t for t in names]
        self.trackers = made if trainer.rank == 0 else []
        self.unseen: list[Tensor] = []  # losses
        self.loss, self.lr = math.nan, 0.0  # of the last update that was looked at
        self.bar: Any = None

    @contextmanager
    def running(self, batches: Iterable[Any], epochs: int) -> Iterator[None]:
        """Trackers and progress bar, from the run's first step to its last."""
        t = self.trainer
        for tracker in self.trackers:
            tracker.start(self._config(epochs), t.progress.step)
        if t.bar and t.rank == 0:
            from tqdm.auto import tqdm

            length = len(batches) if isinstance(batches, Sized) else None
            total = None if length is None else epochs * length
            done = 0 if length is None else t.progress.epoch * length + t.progress.position
            self.bar = tqdm(total=total, initial=done, unit="batch", disable=None)  # None: only on a terminal
        try:
            yield
        finally:
            if self.bar is not None:
                self.bar.close()
                self.bar = None
            for tracker in self.trackers:
                tracker.close()

    def step(self, loss: Tensor, batches: int) -> None:
        """One more update."""
        t = self.trainer
        self.unseen.append(loss)
        self.lr = float(t.optimizer.param_groups[0]["lr"])
        if self.bar is not None:
            self.bar.update(batches)
        if t.progress.step % t.log_every == 0:
            self.see()
            numbers = {"loss": self.loss, "lr": self.lr}
            norm = getattr(t.optimizer, "grad_norm", None)
            self._track(numbers if norm is None else numbers | {"grad_norm": float(full(norm))})

    def see(self) -> None:
        """Add the losses since the last look to the epoch's sum."""
        for loss in torch.stack(self.unseen).tolist() if self.unseen else ():  # one by one: the sum rounds alike wherever a run began
            self.trainer.progress.loss_sum += loss
            self.loss = loss
        self.unseen.clear()

    def mean_loss(self) -> float:
        """The mean over the epoch's updates in all processes."""
        self.see()
        p = self.trainer.progress
        total, updates = sum_over_processes([p.loss_sum, float(p.updates)], self.trainer.device)
        if not updates:
            raise ValueError("train has no batches")
        return total / updates

    def epoch(self, numbers: Mapping[str, float]) -> None:
        """An epoch's numbers."""
        self._track(numbers | {"epoch": self.trainer.progress.epoch})  # type: ignore[operator]
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items() if name != "seconds"})

    def _track(self, numbers: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(self.trainer.progress.step, numbers)

    def _config(self, epochs: int) -> dict[str, Any]:
        t = self.trainer
        config: dict[str, Any] = {"model": type(t.model).__name__, "optimizer": type(t.optimizer).__name__, "epochs": epochs}
        config |= {name: getattr(t, name) for name in ("max_norm", "precision", "accumulate", "patience", "seed", "size")}
        options = {name: value for name, value in t.optimizer.param_groups[0].items() if isinstance(value, (int, float, str))}
        return config | options | {"parameters": sum(p.numel() for p in t.model.parameters())}
