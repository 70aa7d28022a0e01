"""What every launcher shares: the check of its arguments, the facts of the device, and the one call that starts a kernel.

All launches go through ``launch``, so that ``recording`` can note them instead of running them: ``aot`` runs a launcher on tensors
without data and compiles, for a GPU that is not there, exactly what the launcher would have started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRET = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Device:
    """What the choice of a tile depends on: name, number of multiprocessors, bytes of shared memory that one program may use, and how many
    threads are a warp."""

    name: str
    processors: int
    shared: int
    lanes: int = 32


@dataclass(frozen=True)
class Launch:
    """One kernel start: ``kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)``. ``cooperative``: all programs run
    at once, or the start fails, so that they may wait for one another."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    cooperative: bool = False


_recorder: tuple[Device, list[Launch]] | None = None


@contextlib.contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Inside, launchers believe they run on ``device`` and their launches are collected, not started. Not for several threads at once."""
    global _recorder
    launches: list[Launch] = []
    _recorder = (device, launches)
    try:
        yield launches
    finally:
        _recorder = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 1, cooperative: bool = False, **constants: Any
) -> None:
    """Start ``kernel`` on the device of the first tensor among ``args``."""
    if _recorder is not None:
        _recorder[1].append(Launch(kernel, grid, args, constants, warps, stages, cooperative))
    elif INTERPRET:
        kernel[grid](*args, **constants)
    else:
        tensor = next(a for a in args if isinstance(a, Tensor))
        with _on(tensor.device):
            kernel[grid](*args, num_warps=warps, num_stages=stages, launch_cooperative_grid=cooperative, **constants)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device the tensors live on."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def device_of(tensor: Tensor) -> Device:
    """The facts of the GPU that holds ``tensor``."""
    if _recorder is not None:
        return _recorder[0]
    if INTERPRET:
        return Device("interpreter", 1, 1 << 17)
    return _device(tensor.device.index or 0)


@cache
def _device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 0) or p.shared_memory_per_block
    return Device(p.name, p.multi_processor_count, shared, getattr(p, "warp_size", 32))


def check_tensor(name: str, t: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """Require of ``t``: plain and strided, a supported dtype, ``like``'s dtype and device, and ``shape``.

    Raises:
        TypeError: ``t`` is a tensor subclass that holds no memory of its own (a DTensor), or not strided.
        RuntimeError: dtype, device or shape do not fit.
    """
    if type(t) is not Tensor and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"{name} is a {type(t).__name__}, which has no memory of its own for a kernel to read; pass its local tensor")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {t.layout}")
    if t.dtype not in DTYPES:
        raise RuntimeError(f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
    if t.dtype != like.dtype or t.device != like.device:
        raise RuntimeError(f"{name} must have dtype {like.dtype} on {like.device}, got {t.dtype} on {t.device}")
    if tuple(t.shape) != shape:
        raise RuntimeError(f"{name} must have shape {shape}, got {tuple(t.shape)}")


def check_parameters(x: Tensor, **parameters: Tensor | None) -> None:
    """Require of every parameter that is there: [x.shape[1]], all in x's dtype, or all float32 beside an x of a half type."""
    given = {name: t for name, t in parameters.items() if t is not None}
    mixed = x.dtype.itemsize == 2 and any(t.dtype == torch.float32 for t in given.values())
    for name, t in given.items():
        check_tensor(name, t, x.new_empty(0, dtype=torch.float32) if mixed else x, (x.shape[1],))


def check_seed(seed: Tensor, like: Tensor) -> None:
    """Require of ``seed``: one int64 on the device of ``like``; RuntimeError where it is not."""
    if type(seed) is not Tensor or seed.dtype != torch.int64 or tuple(seed.shape) != (1,) or seed.device != like.device:
        raise RuntimeError(f"seed must be one int64 on {like.device}, got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}")


def precision(dtype: torch.dtype) -> str:
    """How a product of fp32 tiles is computed: "tf32" on tensor cores where PyTorch's own setting allows it, else "ieee"."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
