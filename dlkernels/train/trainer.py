"""The training loop, for any model. ``Trainer.training_step`` has the six steps; around them stands what a long run needs.

fit            epochs: train on every batch, judge on held-out ones, schedule, checkpoint, stop early
_train_epoch   batches: an update for each, or one for several whose gradients are added up
training_step  zero_grad, forward, loss, backward, clip, step
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.step import KernelStep
from . import distributed
from .checks import Loss, NotFinite, find_not_finite
from .keeper import Keeper, Progress
from .randomness import generator_state, own_random_numbers, seed_all, set_generator_state, set_random_state
from .recorder import Recorder
from .schedules import as_made
from .trackers import Tracker

PRECISIONS = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PER_STEP = (torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR)
Batch = tuple[Any, Tensor]
History = dict[str, list[float]]  # by name, a number per finished epoch


@dataclass(eq=False)
class Trainer:
    """Trains ``model``; ``fit`` runs it.

    Args:
        model: on its device, in its dtype; spread over processes by ``dlkernels.train.spread`` if there are several.
        loss: ``loss(model(x), y)``, a mean over the rows of y.
        optimizer: torch's or ours; ours clips within its update.
        scheduler: of ``torch.optim.lr_scheduler``; ReduceLROnPlateau sees the loss that epochs are judged by.
        schedule_every: "step" or "epoch"; default: "step" for OneCycleLR and CyclicLR, which are made that way.
        max_norm: gradients are scaled down together to this 2-norm where theirs is larger.
        precision: "bfloat16" or "float16" computes under autocast, in float16 with a loss scale; None: in the parameters' own dtype.
        accumulate: batches per update, weighted by their rows: the gradient is that of one large batch.
        metrics: name -> ``metric(model(x), y)``, a mean over rows, of held-out batches.
        patience: stop after so many epochs in a row without a loss lower than the lowest by more than ``min_delta``.
        folder: for the checkpoints ``last`` and ``best`` and for what trackers write; None: nothing is kept.
        save_every: updates between checkpoints within an epoch; there is one after every epoch anyway.
        trackers: names ("jsonl", "tensorboard", "wandb", "mlflow") or ``Tracker`` objects; default: "jsonl" if there is a folder.
        log_every: updates between two entries in the trackers.
        look_every: updates between looks at loss and norm, which wait for a GPU; what is not finite is noticed then.
        guard: raise ``NotFinite``, which names the first module, rather than go on with NaN.
        seed: of all random numbers; an epoch's depend on it and the epoch's number alone.
        bar: a progress bar, on a terminal.

    Attributes:
        history: by name ("train_loss", "val_loss", "lr", "seconds", metrics), a number per finished epoch.
        progress: how far it is.
        stopped: "", or why ``fit`` ended before its last epoch: "patience" or "interrupted".

    Raises:
        ValueError: an argument out of range.
        ImportError: a tracker that is not installed.
    """

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    scheduler: Any = None
    schedule_every: str | None = None
    max_norm: float | None = None
    precision: str | None = None
    accumulate: int = 1
    metrics: Mapping[str, Callable[[Any, Tensor], Any]] = field(default_factory=dict)
    patience: int | None = None
    min_delta: float = 0.0
    folder: str | Path | None = None
    save_every: int | None = None
    trackers: Sequence[str | Tracker] | None = None
    log_every: int = 50
    look_every: int = 1
    guard: bool = True
    seed: int = 0
    bar: bool = False

    def __post_init__(self) -> None:
        _check_arguments(self)
        self.device = next(self.model.parameters()).device
        self.rank, self.size = distributed.rank_and_size()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        if self.schedule_every is None:
            self.schedule_every = "step" if isinstance(self.scheduler, _PER_STEP) else "epoch"
        self.progress, self.stopped, self.schedule = Progress(), "", as_made(self.scheduler)
        self.history: History = {}
        self.keeper = None if self.folder is None else Keeper(Path(self.folder), self)
        self.recorder = Recorder(self)
        self.resumed_random: dict[str, Any] | None = None  # a checkpoint's from within an epoch: in force once its batches are skipped
        self._random: Any = None  # before the step that is under way

    def training_step(self, batches: Sequence[Batch]) -> Tensor:
        """The six steps, from one batch or from several whose gradients are added up; returns the loss before the update."""
        self.optimizer.zero_grad()  # 1. forget the last update's gradients
        rows, total = sum(len(y) for _, y in batches), torch.zeros((), device=self.device)
        for number, (x, y) in enumerate(batches, start=1):
            with self._exchange_gradients(number == len(batches)):
                with self._autocast():
                    prediction = self.model(x)  # 2. forward
                    loss = self.loss(prediction, y)  # 3. how wrong, as one number
                if len(batches) > 1:
                    loss = loss * (len(y) / rows)
                self.scaler.scale(loss).backward()  # 4. backward: d loss / d parameter, added to every parameter's .grad
            total = loss.detach() if number == 1 else total + loss.detach()
        self._require_finite("loss", total, batches)

        if self.max_norm is not None and isinstance(self.optimizer, KernelStep):
            # 5. and 6. at once: gradients are clipped on their way into the update, which an infinite norm prevents
            scale = {} if self.scaler.is_enabled() else {"grad_scale": 1.0}
            self.scaler.step(self.optimizer, max_norm=self.max_norm, **scale)
            self._require_finite("norm of the gradient", self.optimizer.grad_norm, batches)
        else:
            if self.max_norm is not None:
                self.scaler.unscale_(self.optimizer)
                # 5. a wild batch may turn the weights, not throw them
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
                self._require_finite("norm of the gradient", norm, batches)
            self.scaler.step(self.optimizer)  # 6. move every parameter a little downhill
        self.scaler.update()
        return total

    def fit(self, train: Iterable[Batch], val: Iterable[Batch] | None = None, *, epochs: int, resume: bool = False) -> History:
        """Train until ``epochs`` epochs are finished, and return the history. Ctrl-C returns what is finished.

        Args:
            train: batches (x, y), iterable again for every epoch: ``Batches``, a DataLoader, a list. One with ``set_epoch``, or whose
                sampler has it, is told the epoch.
            val: held-out batches. Without them epochs are judged by the training loss.
            resume: go on from the folder's last checkpoint, if there is one; on a CPU to the same losses as without the interruption.
                The schedule must be the same, but a cosine may be longer or shorter than it was (a run of 3 epochs that goes on to 6):
                from the epoch that was reached, the learning rate is the new curve's.

        Raises:
            NotFinite: see ``guard``. CheckpointError: a checkpoint cannot be written or read.
        """
        if resume:
            if self.keeper is None:
                raise ValueError("resume=True needs a folder")
            self.keeper.resume()
        self.stopped = ""
        with self.recorder.running(train, epochs):
            try:
                while self.progress.epoch < epochs and not self.out_of_patience():
                    self.epoch(train, val)
            except KeyboardInterrupt:
                self.stopped = "interrupted"
                return self.history
        distributed.wait_for_all()  # what the first process writes is whole when any of them returns
        return self.history

    def epoch(self, train: Iterable[Batch], val: Iterable[Batch] | None = None) -> dict[str, float]:
        """Train on every batch once, judge, schedule, checkpoint. Random numbers outside go on as if nothing had happened.

        Returns:
            This epoch's numbers, which are in the history as well.
        """
        p = self.progress
        with own_random_numbers():
            self._train_epoch(train)
            start = time.perf_counter()
            numbers = {"train_loss": self.recorder.mean_loss(), "lr": self.recorder.lr}
            if val is not None:
                numbers |= self.evaluate(val)
        numbers["seconds"] = p.seconds + time.perf_counter() - start
        judged = numbers.get("val_loss", numbers["train_loss"])
        if self.scheduler is not None and self.schedule_every == "epoch":
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*((judged,) if plateau else ()))
        for name, value in numbers.items():
            self.history.setdefault(name, []).append(value)
        improved = p.finish_epoch(judged, self.min_delta)
        if self.keeper is not None:
            self.keeper.save(best=improved)
        self.recorder.epoch(numbers)
        return numbers

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss ("val_loss") and metrics of the model as it is used: no dropout, batch norm with its running statistics."""
        self.model.eval()
        names, sums, rows = ["val_loss", *self.metrics], [0.0] * (1 + len(self.metrics)), 0
        for batch in batches:
            x, y = self._to_device(batch)
            with self._autocast():
                prediction = self.model(x)
                values = [self.loss(prediction, y), *(metric(prediction, y) for metric in self.metrics.values())]
            sums = [total + float(value) * len(y) for total, value in zip(sums, values, strict=True)]
            rows += len(y)
        *sums, count = distributed.sum_over_processes([*sums, float(rows)], self.device)
        return {name: total / max(count, 1) for name, total in zip(names, sums, strict=True)}

    def _train_epoch(self, batches: Iterable[Batch]) -> None:
        """The rest of the current epoch: all of it, but for what a resumed run has behind it."""
        p = self.progress
        self.model.train()
        seed_all(self.seed, p.epoch, self.rank)
        for ordered in (batches, getattr(batches, "sampler", None)):
            getattr(ordered, "set_epoch", lambda epoch: None)(p.epoch)
        stream = iter(batches)
        if self.resumed_random is None:
            p.begin_epoch()
            self.recorder.unseen.clear()
        else:
            skipped = sum(1 for _ in islice(stream, p.position))
            if skipped < p.position:
                raise ValueError(f"the checkpoint is {p.position} batches into an epoch, but train has only {skipped}")
            set_random_state(self.resumed_random)
            self.resumed_random = None
        start = time.perf_counter() - p.seconds
        while group := [self._to_device(batch) for batch in islice(stream, self.accumulate)]:
            self._random = generator_state(self.device)
            loss = self.training_step(group)
            p.finish_step(len(group), time.perf_counter() - start)
            self.recorder.step(loss, len(group))
            if self.scheduler is not None and self.schedule_every == "step":
                self.scheduler.step()
            if self.keeper is not None and self.save_every is not None and p.step % self.save_every == 0:
                self.recorder.see()
                self.keeper.save()

    def out_of_patience(self) -> bool:
        """Whether ``patience`` is at its end, which ``stopped`` then says."""
        if self.patience is not None and self.progress.stale >= self.patience:
            self.stopped = "patience"
        return self.stopped == "patience"

    def _to_device(self, batch: Batch) -> Batch:
        x, y = batch
        return (x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x), y.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _exchange_gradients(self, now: bool) -> AbstractContextManager:
        return nullcontext() if self.size == 1 else distributed.exchange(self.model, now)

    def _require_finite(self, what: str, value: Tensor | None, batches: Sequence[Batch]) -> None:
        """Raise NotFinite with the first place where it began. Under a loss scale an infinite norm is daily bread: the scaler skips."""
        p = self.progress
        if not self.guard or value is None or p.step % self.look_every or (what != "loss" and self.scaler.is_enabled()):
            return
        number = float(distributed.full(value))
        if math.isfinite(number):
            return
        found = None
        if not distributed.is_sharded(self.model):  # a search would wait for shards of processes that do not search
            set_generator_state(self.device, self._random)
            model = distributed.unwrapped(self.model)
            searches = (find_not_finite(model, self.loss, x, y, self._autocast) for x, y in batches)
            found = next((finding for finding in searches if finding is not None), None)
        place = f"First not finite: {found.text}. What helps: {found.advice}." if found else "A search of this batch did not find it again."
        message = f"step {p.step} (epoch {p.epoch}, batch {p.position}): the {what} is {number}. {place} The step was not made."
        raise NotFinite(message, p.step, found.where if found else "", found.module if found else "")


def _check_arguments(t: Trainer) -> None:
    def need(fine: bool, message: str) -> None:
        if not fine:
            raise ValueError(message)

    need(t.precision in PRECISIONS, f"precision must be one of {', '.join(str(name) for name in PRECISIONS)}, got {t.precision!r}")
    need(t.schedule_every in (None, "step", "epoch"), f"schedule_every must be 'step' or 'epoch', got {t.schedule_every!r}")
    need(t.max_norm is None or t.max_norm > 0, f"max_norm must be positive or None, got {t.max_norm}")
    for name in ("accumulate", "patience", "save_every", "log_every", "look_every"):
        count = getattr(t, name)
        optional = name in ("patience", "save_every") and count is None
        need(optional or (isinstance(count, int) and count >= 1), f"{name} must be a positive integer, got {count!r}")
    need(t.folder is not None or not any(isinstance(x, str) for x in t.trackers or ()), "trackers write files: they need a folder")
    need(any(True for _ in t.model.parameters()), "model has no parameters")
    if t.precision == "float16" and distributed.is_sharded(t.model):
        raise ValueError("precision='float16' needs a loss scale, which shards do not share; use 'bfloat16'")
