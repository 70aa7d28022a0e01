"""Learning-rate schedules by name, torch's own."""

from __future__ import annotations

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
