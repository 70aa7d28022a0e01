"""Learning-rate schedules by name, torch's own."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch.optim import lr_scheduler

SCHEDULES = ("constant", "cosine", "plateau", "one_cycle")


def make_schedule(name: str, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int) -> Any:
    """A scheduler for ``Trainer``, or None for "constant". The optimizer's lr is where "cosine" and "plateau" start and "one_cycle" peaks.

    cosine      lr · (1 + cos(π epoch / epochs)) / 2
    plateau     a tenth of it at the sixth epoch in a row without a lower loss
    one_cycle   up from lr/25 for three tenths of all steps, then down to nearly nothing: Smith and Topin 2017, arXiv:1708.07120

    Raises:
        ValueError: there is no such schedule.
    """
    if name == "constant":
        return None
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(epochs, 1))
    if name == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=5)
    if name == "one_cycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=max(epochs * steps_per_epoch, 1))
    raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")


def as_made(scheduler: Any) -> dict[str, Any]:
    """What a new scheduler is: the name of its class and its numbers, which a checkpoint keeps to recognise it by."""
    return {"scheduler": "none"} if scheduler is None else {"scheduler": type(scheduler).__name__, **copy.deepcopy(scheduler.state_dict())}


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """In words the first thing in which two schedules differ, but for the length of a cosine, which ``go_on`` adapts."""
    if theirs["scheduler"] != ours["scheduler"]:
        return f"there the schedule is {theirs['scheduler']}, here {ours['scheduler']}"
    for name in sorted(theirs.keys() & ours.keys(), key=lambda name: (name.startswith("_"), name)):
        if theirs[name] != ours[name] and (ours["scheduler"], name) != ("CosineAnnealingLR", "T_max"):
            why = " (which follows from epochs, batches and accumulate)" if name == "total_steps" else ""
            return f"there the {name} of {ours['scheduler']} is {theirs[name]}, here {ours[name]}{why}"
    return None


def go_on(scheduler: Any, state: dict[str, Any]) -> None:
    """Load a checkpoint's state. A cosine that was made longer or shorter moves to where its own curve is by then."""
    length: Any = getattr(scheduler, "T_max", None)
    scheduler.load_state_dict(state)
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR) and scheduler.T_max != length:
        scheduler.T_max = length
        low, part = scheduler.eta_min, (1 + math.cos(math.pi * scheduler.last_epoch / length)) / 2
        scheduler._last_lr = [low + (base - low) * part for base in scheduler.base_lrs]
        for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = lr
