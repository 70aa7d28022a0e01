"""How the kernels of scaled_dot_product_attention are cut for a GPU: tiles, and over how many programs the keys of few queries are shared.

Tiles are a table by dtype and head size: what fits into the registers of a multiprocessor, whose accumulators [rows, D] and tiles of scores
[rows, cols] they all are. Short sequences take smaller ones. `config.table` has precedence, where it was measured on this GPU.
"""

from __future__ import annotations

from dataclasses import replace

from .config import BYTES, Config, bucket, key, table
from .launch import Device

# kernel -> kind -> {head size: (rows, cols, warps, stages)}; rows are a program's own positions, cols those that it goes over.
TILES: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "forward": {
        "half": {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
        "tf32": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "float": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 32, 8, 2)},
        "double": {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
    "dquery": {
        "half": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "tf32": {64: (64, 64, 8, 2), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
        "float": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
        "double": {64: (32, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    },
    "dkey": {
        "half": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 16, 8, 2)},
        "tf32": {64: (64, 64, 8, 1), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1)},
        "float": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
        "double": {64: (32, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    },
}
TILES["dmask"] = TILES["dquery"]
RESIDENT = {"forward": 1, "dquery": 2, "dkey": 2, "dmask": 0}  # tensors [rows, D] that stay in shared memory
SHARE = 256  # keys that are worth a program of their own
MOST_SHARES = 64


def width(head: int) -> int:
    """Columns of the tile of a head: tiles are powers of two."""
    return max(16, 1 << max(head - 1, 0).bit_length())


def shared_bytes(kernel: str, kind: str, c: Config) -> int:
    """Shared memory of what stays, of each step's two tensors [cols, D], and of a tile of weights on its way to the tensor cores."""
    return BYTES[kind] * (RESIDENT[kernel] * c.rows * c.depth + 2 * c.stages * c.cols * c.depth + c.rows * c.cols)


def choose(kernel: str, kind: str, own: int, others: int, head: int, device: Device) -> Config:
    """The tile of ``kernel``, a name in ``TILES``, where a program's own positions are of ``own``, and it goes over ``others``; ``head`` is
    the larger of the head sizes. ``depth`` is `width(head)`."""
    measured = table(device.name).get(key(f"attention {kernel}", kind, own, others, head))
    if measured is not None and shared_bytes(kernel, kind, measured) <= device.shared:
        return measured
    depth = width(head)
    most, cols, warps, stages = TILES[kernel][kind][max(64, depth)]
    rows, cols = min(most, bucket(own)), min(cols, bucket(others))
    if rows < most and rows * (cols + depth) <= 4096:
        warps = 4
    if device.lanes == 64:  # AMD keeps what is fetched ahead in registers, and none are left
        stages = 1
    c = Config(rows, cols, depth, 1, warps * 32 // device.lanes, stages, 1)
    for smaller in ({"rows": 64}, {"cols": 32}, {"stages": 1}, {"cols": 16}, {"rows": 32}, {"rows": 16}):
        if shared_bytes(kernel, kind, c) > device.shared:
            c = replace(c, **{name: min(size, getattr(c, name)) for name, size in smaller.items()})
    return c


def shares(programs: int, keys: int, cols: int, device: Device) -> int:
    """Over how many programs the keys of one block of queries are shared, where there are ``programs`` such blocks: 1 where these give
    every second multiprocessor something to do."""
    if 2 * programs > device.processors:
        return 1
    return max(1, min(device.processors * 2 // max(programs, 1), keys // max(SHARE, cols), MOST_SHARES))
