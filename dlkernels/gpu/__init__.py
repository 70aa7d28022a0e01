"""The Triton twins: one file per op, found by looking. Importing this package imports Triton only when a kernel is asked for.

A kernel file takes part by naming its launchers, ``IMPLEMENTATIONS = {"<raw op>": launcher}``, and, for each, arguments of a typical size,
``EXAMPLES = {"<raw op>": lambda empty: (empty(M, K), ...)}``, which `aot` compiles. Nothing else lists it.

    activations.py   the epilogues and their derivatives, as jit functions
    matmul.py        the one dot tile that every matrix product is cut into
    linear.py ...    kernels and launchers of one op
    conv2d_windows.py where the windows of a filter lie: conv2d.py, whose kernels are in conv2d_product.py and conv2d_depthwise.py
    recurrent.py     products around the sweeps through time of recurrent_sweeps.py, which recurrent_plan.py cuts
    multi_tensor.py  many tensors in one launch: optimizers.py, clip.py
    launch.py        checked entry, device facts, the one call that starts a kernel
    config.py        which tile sizes: a measured table, else a model of the machine
    tune.py          measures and writes the table
    aot.py           compiles what the launchers launch, without a GPU, and reads the machine code
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def implementations() -> dict[str, Callable[..., Any]]:
    """Raw op name -> Triton launcher, gathered from every module of this package."""
    return _gather("IMPLEMENTATIONS")


@cache
def examples() -> dict[str, Callable[..., tuple[Any, ...]]]:
    """Raw op name -> function that makes the arguments of a typical call, given ``empty(*shape)``."""
    return _gather("EXAMPLES")


def _gather(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in pkgutil.iter_modules(__path__):
        found.update(getattr(importlib.import_module(f"{__name__}.{entry.name}"), name, {}))
    return found
