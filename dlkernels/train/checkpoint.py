"""Checkpoints in a file: written whole or not at all, and read without running anything they hold.

    write    beside the target, out to the disk, then renamed over it: a reader, or the next run, finds the old one or the new one
    read     every record's checksum, then torch.load(weights_only=True): tensors, numbers, strings, lists and dicts, no code

torch writes the checksums but does not look at them; one flipped bit of a weight would be loaded without a word.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and why. Nothing has changed."""


def save(state: dict[str, Any], path: str | Path) -> None:
    """Write ``state`` to ``path`` atomically: what was there before stays until the new file is complete and on the disk.

    Raises:
        CheckpointError: the file cannot be written (no space, no permission, no such folder).
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        unfinished.unlink(missing_ok=True)
        kept = "; the one before is untouched" if path.exists() else ""
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}{kept}") from error
    except BaseException:  # Ctrl-C
        unfinished.unlink(missing_ok=True)
        raise


def load(path: str | Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """What ``save`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, or holds something else than data.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"the checkpoint {path} is damaged: the checksum of its record {damaged} does not fit")
        state = torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"the checkpoint {path} holds something else than tensors and plain data, so it was not loaded") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"the checkpoint {path} is truncated or no checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"the checkpoint {path} holds a {type(state).__name__}, needs a dict")
    return state


def check_fits(model: torch.nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """Raise CheckpointError unless ``state`` has the names and shapes of ``model``; load_state_dict would copy what fits and then raise."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(f"{path} is of another model: it lacks {missing[:3] or 'nothing'} and has {unknown[:3] or 'nothing'} besides")
    for name, value in own.items():
        theirs = state[name]
        if isinstance(value, Tensor) and (not isinstance(theirs, Tensor) or theirs.shape != value.shape):
            found = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
            raise CheckpointError(f"{path} is of another model: {name} is {found}, needs {tuple(value.shape)}")


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
