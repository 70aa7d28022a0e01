"""Checkpoints of a model in shards: every process writes its own part, and any other number of processes can read them back.

    folder/last-00000120/   one step's parts (torch.distributed.checkpoint), and rest.pt, the plain data
    folder/last             a link to the newest complete one, replaced in one move once all parts are on the disk

Read only folders that you trust: the index that torch.distributed.checkpoint keeps is a pickle. ``rest.pt`` is read as data only.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .distributed import gather_objects, rank_and_size, wait_for_all


def save(model: nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any], folder: Path, name: str, step: int) -> None:
    """Write the checkpoint ``name`` of this step; the one before stays until this one is complete.

    Raises:
        CheckpointError: some process cannot write, in every process.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    target, first = folder / f"{name}-{step:08d}", rank_and_size()[0] == 0
    if first:
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that died
    wait_for_all()
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(target))
    except Exception as error:  # torch wraps whatever went wrong, wherever
        raise checkpoint.CheckpointError(f"cannot write the checkpoint {target}: {error}; the one before is untouched") from error
    problem = None
    if first:
        try:
            checkpoint.save(rest, target / "rest.pt")
            _point(folder / name, target)
        except (checkpoint.CheckpointError, OSError) as error:
            problem = str(error)
    if problem := gather_objects(problem)[0]:
        raise checkpoint.CheckpointError(problem)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Read parameters and moments into ``model`` and ``optimizer``, however these are spread.

    Raises:
        CheckpointError: parts are missing or damaged, or of another model; the model may then be half loaded.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=str(path))
    except Exception as error:  # torch wraps whatever went wrong, wherever
        raise checkpoint.CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def remove(link: Path) -> None:
    """The checkpoint that a link leads to, and what is left of others of its name."""
    link.unlink(missing_ok=True)
    _remove_targets(link)


def _remove_targets(link: Path, but: Path | None = None) -> None:
    for old in link.parent.glob(f"{link.name}-*"):
        if old != but:
            shutil.rmtree(old, ignore_errors=True)


def _point(link: Path, target: Path) -> None:
    """``link`` leads to ``target`` from now on, and older targets are removed."""
    unfinished = link.with_name(f".{link.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(target.name, target_is_directory=True)
    os.replace(unfinished, link)
    _remove_targets(link, but=target)
