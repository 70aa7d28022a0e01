"""Which tile a product is cut into: a measured table for this GPU where there is one, else the fastest tile of a small model.

Nothing is measured at a user's first call. ``tune`` fills the table; its keys are bucketed to powers of two, never a raw size.

The model: a program works on one multiprocessor and needs, for each element of the summed dimension,

    arithmetic   rows · cols / RATE clocks                        what the tensor cores (or FMA units) sustain
    reading      (rows + cols) · bytes / L2 clocks                what the L2 cache delivers to one multiprocessor
    latency      800 / (steps in flight · depth) clocks           a step cannot take less than memory needs to answer

whichever is largest; programs run in waves of one per multiprocessor. Few tiles leave multiprocessors idle, large tiles read less: that
is the whole trade. Splitting the summed dimension fills the waves at the price of one more kernel that adds the shares up.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import astuple, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from .launch import Device

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Config:
    """A (rows, cols) tile of the result, ``depth`` of the summed dimension per step, ``group`` row-tiles walked together, the launch's
    warps and pipeline stages, and over how many programs the summed dimension is ``split``."""

    rows: int
    cols: int
    depth: int
    group: int
    warps: int
    stages: int
    split: int


# (rows, cols, warps). Half-precision products and tf32 run on warp groups of 64 rows; FMA products (fp32, fp64) are bound by registers.
TILES = {
    "half": [(128, 256, 8), (256, 128, 8), (128, 128, 8), (64, 256, 4), (64, 128, 4), (128, 64, 4), (64, 64, 4), (32, 64, 4), (16, 64, 4),
             (16, 32, 4)],
    "tf32": [(128, 128, 8), (64, 128, 4), (128, 64, 4), (64, 64, 4), (32, 64, 4), (16, 64, 4), (16, 32, 4)],
    "float": [(128, 128, 8), (64, 128, 8), (128, 64, 8), (64, 64, 4), (32, 64, 4), (16, 64, 4), (16, 32, 4)],
    "double": [(64, 64, 8), (32, 64, 4), (32, 32, 4), (16, 32, 4)],
}
RATE = {"half": 2048, "tf32": 1024, "float": 128, "double": 128}  # multiply-adds per clock and multiprocessor: NVIDIA's H100 datasheet
L2 = 32  # bytes per clock and multiprocessor: the order of 5 TB/s shared by 132 of them
BYTES = {"half": 2, "tf32": 4, "float": 4, "double": 8}
SPLITS = (1, 2, 4, 8, 16, 32)
STAGES = 4
EXTRA_LAUNCH = 7000  # clocks: a few microseconds for the kernel that adds up the shares
MEMORY = 1700  # bytes per clock of the whole GPU: 3 TB/s at 1.75 GHz


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The row of the tables above: "half", "tf32", "float" or "double"."""
    if dtype == torch.float64:
        return "double"
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "float"
    return "half"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def bucket(size: int) -> int:
    """The next power of two, at least 16 and at most 16384: sizes in one bucket share a table entry."""
    return min(max(1 << max(size - 1, 0).bit_length(), 16), 16384)


def key(product: str, kind: str, rows: int, cols: int, depth: int) -> str:
    """A table's key, such as "forward half 1024x4096x1024"; rows and cols of the result, depth is what is summed over."""
    return f"{product} {kind} {bucket(rows)}x{bucket(cols)}x{bucket(depth)}"


def reads(product: str) -> int:
    """Tensors that ``product`` reads: a and b, and where a is formed also what it is formed from."""
    return 3 if product.endswith(" formed") else 2


def shared_bytes(c: Config, kind: str, tensors: int) -> int:
    """Shared memory that the pipeline of ``c`` keeps its steps in; ``tensors`` as ``reads`` says."""
    return c.stages * ((tensors - 1) * c.rows + c.cols) * c.depth * BYTES[kind]


def estimate(c: Config, kind: str, rows: int, cols: int, depth: int, processors: int) -> float:
    """Clocks the model gives for the whole product."""
    per_element = max(
        c.rows * c.cols / RATE[kind],
        (c.rows + c.cols) * BYTES[kind] / L2,
        800 / ((c.stages - 1) * c.depth),
    )
    waves = ceil_div(ceil_div(rows, c.rows) * ceil_div(cols, c.cols) * c.split, processors)
    clocks = waves * (ceil_div(ceil_div(depth, c.split), c.depth) * c.depth * per_element + 1000)
    if c.split > 1:
        clocks += EXTRA_LAUNCH + (2 * c.split + 1) * rows * cols * 4 / MEMORY
    return clocks


def candidates(kind: str, rows: int, cols: int, depth: int, device: Device, tensors: int = 2) -> list[Config]:
    """Every tile that fits the device, fastest by the model first."""
    found = []
    smallest = min(32 if kind == "double" else 64, bucket(rows))  # fewer rows than that starve the arithmetic of reuse in registers
    for tile_rows, tile_cols, warps in TILES[kind]:
        if tile_rows < smallest or (tensors == 3 and tile_rows * tile_cols > 128 * 128):
            continue  # forming a takes the registers that the largest accumulators need: they would spill
        if tensors == 3 and tile_rows * tile_cols >= 64 * 128:
            warps = 8  # and more threads, so that each forms fewer elements
        step = 128 // BYTES[kind]  # a row of a step is 128 bytes: one cache line, and what tensor cores address as one block
        if tile_rows * tile_cols <= 2048:
            step *= 2
        step = min(step, max(16, bucket(depth)))
        one = Config(tile_rows, tile_cols, step, 8, warps, 1, 1)
        stages = min(STAGES, (device.shared - 1024) // shared_bytes(one, kind, tensors))
        if stages >= 2:
            found += [Config(tile_rows, tile_cols, step, 8, warps, stages, s) for s in SPLITS if s == 1 or depth >= s * 4 * step]
    return sorted(found, key=lambda c: estimate(c, kind, rows, cols, depth, device.processors))


@lru_cache(maxsize=4096)
def choose(product: str, kind: str, rows: int, cols: int, depth: int, device: Device) -> Config:
    """The tile for a product: "forward" (rows M, cols N, depth K), "dx" (M, K, N) or "dweight" (N, K, M), the last two also as "dx formed"
    and "dweight formed", where dz is formed inside."""
    measured = table(device.name).get(key(product, kind, rows, cols, depth))
    if measured is not None and shared_bytes(measured, kind, reads(product)) + 1024 <= device.shared:
        return measured
    return candidates(kind, rows, cols, depth, device, reads(product))[0]


def table_path(gpu: str, folder: Path | None = None) -> Path:
    """Where the table of the GPU called ``gpu`` lies: in ``folder``, else ``$DLKERNELS_TABLES``, else in this package."""
    folder = folder or Path(os.environ.get("DLKERNELS_TABLES", TABLES))
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@cache
def table(gpu: str) -> dict[str, Config]:
    """The measured configurations of a GPU; empty where nobody measured it."""
    path = table_path(gpu)
    return read_table(path) if path.is_file() else {}


def read_table(path: Path) -> dict[str, Config]:
    """Read a table written by ``write_table``.

    Raises:
        ValueError: the file is not one.
    """
    try:
        return {name: Config(*(int(v) for v in values)) for name, values in json.loads(path.read_text())["configs"].items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a table of tile configurations: {error!r}; delete it or run `dlkernels tune`") from error


def write_table(path: Path, gpu: str, configs: dict[str, Config], versions: dict[str, str]) -> None:
    """Write ``configs`` to ``path``, one entry a line, with the names of the GPU and of the software they were measured with."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(astuple(c))}" for name, c in sorted(configs.items()))
    head = json.dumps({"gpu": gpu, **versions, "fields": "rows cols depth group warps stages split"}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head[:-2] + ',\n "configs": {\n' + lines + "\n }\n}\n")
