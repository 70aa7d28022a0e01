"""How far a run has come, and the checkpoints that let it go on from there."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint, sharded
from .distributed import gather_objects, is_sharded, unwrapped, wait_for_all
from .randomness import random_state, seed_all
from .schedules import difference, go_on

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # finished epochs
    step: int = 0  # updates
    position: int = 0  # batches of the current epoch that are behind us
    updates: int = 0  # of the current epoch
    loss_sum: float = 0.0  # over these
    seconds: float = 0.0  # for these
    best: float = math.inf  # the lowest loss that a finished epoch was judged by
    stale: int = 0  # epochs since then

    def begin_epoch(self) -> None:
        """Back to the current epoch's begin, if an interruption left it half done."""
        self.position, self.updates, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0

    def finish_step(self, batches: int, seconds: float) -> None:
        """One more update, from so many batches, so long after the epoch's begin."""
        self.step, self.position, self.updates, self.seconds = self.step + 1, self.position + batches, self.updates + 1, seconds

    def finish_epoch(self, judged: float, min_delta: float) -> bool:
        """One more epoch, of this loss; returns whether it is the lowest."""
        improved = judged < self.best - min_delta
        self.best, self.stale = (judged, 0) if improved else (self.best, self.stale + 1)
        self.epoch += 1
        self.begin_epoch()
        return improved


class Keeper:
    """Writes a trainer's checkpoints and resumes from them.

    One process, or several with the whole model each: ``last.pt`` and ``best.pt``, whose "model" is an ordinary state_dict. A model in
    shards: the folders ``last`` and ``best``, which any number of processes can read.
    """

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.folder, self.trainer = folder, trainer
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, best: bool = False) -> None:
        """Write ``last``, and ``best`` too where the epoch was. Every process must call it.

        Raises:
            CheckpointError: it cannot be written; the ones before are untouched.
        """
        t = self.trainer
        progress = asdict(t.progress)
        sums = gather_objects(progress.pop("loss_sum"))
        rest: dict[str, Any] = {"random": gather_objects(random_state()), "progress": progress, "loss_sums": sums, "history": t.history}
        rest |= {"schedule": t.schedule, "scheduler": None if t.scheduler is None else t.scheduler.state_dict()}
        rest["scaler"] = t.scaler.state_dict()
        for name in ("last", "best") if best else ("last",):
            if is_sharded(t.model):
                sharded.save(t.model, t.optimizer, rest, self.folder, name, t.progress.step)
                (self.folder / f"{name}.pt").unlink(missing_ok=True)  # of a run that was not in shards: what is left is the newest
            elif t.rank == 0:
                state = {"model": unwrapped(t.model).state_dict(), "optimizer": t.optimizer.state_dict(), **rest}
                checkpoint.save(state, self.folder / f"{name}.pt")
                sharded.remove(self.folder / name)
        wait_for_all()

    def resume(self) -> bool:
        """Go on from ``last``, and return whether there is one. Every process must call it.

        Raises:
            CheckpointError: it is damaged, or of another model or schedule; nothing has changed then.
        """
        t = self.trainer
        file, parts = self.folder / "last.pt", self.folder / "last"
        if parts.exists():
            state = checkpoint.load(parts / "rest.pt")
            self._check(state, parts)
            sharded.load(t.model, t.optimizer, parts)
        elif file.exists() and is_sharded(t.model):
            raise checkpoint.CheckpointError(f"{file} is of a whole model; a model in shards goes on from checkpoints in shards alone")
        elif file.exists():
            state = checkpoint.load(file, t.device)
            self._check(state, file, "model", "optimizer")
            self._load_whole(state, file)
        else:
            return False
        if state["scaler"]:  # else the run so far was not in float16
            t.scaler.load_state_dict(state["scaler"])
        if t.scheduler is not None:
            go_on(t.scheduler, state["scheduler"])
        for name, value in state["progress"].items():
            setattr(t.progress, name, value)
        sums = state["loss_sums"]  # of each process that there was
        t.progress.loss_sum = sums[t.rank] if len(sums) == t.size else sum(sums) / len(sums)
        t.history.clear()
        t.history.update(state["history"])
        if t.progress.position:
            t.resumed_random = self._random_numbers(state["random"])
        return True

    def _check(self, state: dict[str, Any], path: Path, *more: str) -> None:
        """Raise CheckpointError unless ``state`` has all that a run goes on from, and this run's schedule."""
        missing = {"progress", "history", "random", "loss_sums", "schedule", "scheduler", "scaler", *more} - state.keys()
        if missing:
            raise checkpoint.CheckpointError(f"{path} is no checkpoint of this run: it lacks {', '.join(sorted(missing))}")
        if other := difference(state["schedule"], self.trainer.schedule):
            raise checkpoint.CheckpointError(f"{path} is of another schedule: {other}; keep it, or begin anew in another folder")

    def _load_whole(self, state: dict[str, Any], file: Path) -> None:
        model = unwrapped(self.trainer.model)
        checkpoint.check_fits(model, state["model"], file)
        try:
            self.trainer.optimizer.load_state_dict(state["optimizer"])  # raises before it changes anything
        except (ValueError, KeyError) as error:
            raise checkpoint.CheckpointError(f"{file} is of another optimizer: {error}") from error
        model.load_state_dict(state["model"])

    def _random_numbers(self, states: list[Any]) -> Any:
        """This process's; new ones where the number of processes has changed."""
        t = self.trainer
        if len(states) == t.size:
            return states[t.rank]
        seed_all(t.seed, t.progress.epoch, t.progress.position, t.size, t.rank)
        return random_state()
