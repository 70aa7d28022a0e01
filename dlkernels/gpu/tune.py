"""Measure tile configurations on this machine's GPU and write them to its table: what `dlkernels tune` runs.

For every shape and dtype, and each product of linear (dx and dweight also with dz formed inside), the model's best few candidates
(config.py) are timed and the fastest kept. Times are medians with the L2 cache cleared before each run. A candidate that fails to compile
or launch is skipped, not fatal; Ctrl-C keeps what is finished.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import triton

from . import config
from .config import Config, candidates, kind_of
from .launch import Device, device_of, precision

SHAPES = [  # (M, K, N)
    (64, 784, 256), (256, 1024, 1024), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096), (4096, 4096, 4096), (8192, 8192, 8192),
    (333, 777, 1001), (8, 4096, 4096),
]  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32)
TRIES = 12

Product = tuple[str, int, int, int, Callable[[Config], None]]


def products(M: int, K: int, N: int, dtype: torch.dtype, device: torch.device | str) -> list[Product]:
    """(name, rows, cols, depth, run) of the products of one linear layer on fresh random data."""
    from . import linear

    x, weight, dy = (torch.randn(shape, dtype=dtype, device=device) for shape in ((M, K), (N, K), (M, N)))
    y, dx, dweight = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
    bias = torch.zeros(N, dtype=dtype, device=device)
    return [
        ("forward", M, N, K, lambda c: linear.run_forward(c, x, weight, bias, y, None, 1)),
        ("dx", M, K, N, lambda c: linear.run_dx(c, dy, None, weight, dx)),
        ("dx formed", M, K, N, lambda c: linear.run_dx(c, dy, y, weight, dx, 1)),
        ("dweight", N, K, M, lambda c: linear.run_dweight(c, dy, None, x, dweight, None)),
        ("dweight formed", N, K, M, lambda c: linear.run_dweight(c, dy, y, x, dweight, bias, 1)),
    ]


def trials(name: str, kind: str, rows: int, cols: int, depth: int, device: Device, count: int = TRIES) -> list[Config]:
    """The ``count`` candidates worth measuring: the model's best first, each also one stage shallower, which leaves room for a second
    program on the multiprocessor; no tile with more than two splits."""
    chosen: list[Config] = []
    for c in candidates(kind, rows, cols, depth, device, config.reads(name)):
        if sum((c.rows, c.cols) == (other.rows, other.cols) for other in chosen) < 4:
            chosen += [c] if c.stages == 2 else [c, replace(c, stages=c.stages - 1)]
    return chosen[:count]


def fastest(configs: Iterable[Config], seconds: Callable[[Config], float]) -> tuple[Config, float] | None:
    """The configuration with the least ``seconds(config)``; one that raises is left out; None where all do."""
    best: tuple[Config, float] | None = None
    for c in configs:
        try:
            taken = seconds(c)
        except (RuntimeError, ValueError, triton.TritonError) as error:
            warnings.warn(f"{c} does not run here: {error}", stacklevel=2)
            continue
        if best is None or taken < best[1]:
            best = c, taken
    return best


def measure(run: Callable[[Config], None], c: Config) -> float:
    """Median milliseconds of ``run(c)`` on the GPU, after a first call that compiles."""
    run(c)
    return float(triton.testing.do_bench(lambda: run(c), warmup=10, rep=40, return_mode="median"))


def main(
    path: str | Path | None = None, shapes: Iterable[tuple[int, int, int]] | None = None, seconds: float = float("inf")
) -> Path:
    """Measure ``shapes``, a sequence of (M, K, N), and write the table to the folder ``path`` (default: this package's).

    After ``seconds`` no further product is begun.

    Entries of an existing table that these shapes do not touch are kept. Returns the file written.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures kernels on a GPU, and torch.cuda.is_available() is False")
    from rich.progress import track

    probe = torch.empty(1, device="cuda")
    device = device_of(probe)
    file = config.table_path(device.name, Path(path) if path is not None else None)
    found = config.read_table(file) if file.is_file() else {}
    jobs = [(shape, dtype) for dtype in DTYPES for shape in (SHAPES if shapes is None else shapes)]
    stop = time.monotonic() + seconds
    try:
        for (M, K, N), dtype in track(jobs, description="tuning"):
            kind = kind_of(dtype, precision(dtype))
            for name, rows, cols, depth, run in products(M, K, N, dtype, probe.device):
                if time.monotonic() > stop:
                    break
                best = fastest(trials(name, kind, rows, cols, depth, device), lambda c, run=run: measure(run, c))  # type: ignore[misc]
                if best is not None:
                    found[config.key(name, kind, rows, cols, depth)] = best[0]
    except KeyboardInterrupt:
        print("stopped: keeping what is measured")
    config.write_table(file, device.name, found, {"torch": torch.__version__, "triton": triton.__version__})
    config.table.cache_clear()
    config.choose.cache_clear()
    return file
