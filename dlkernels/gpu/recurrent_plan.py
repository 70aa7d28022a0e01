"""How the steps of a recurrent layer are gone through on a GPU, and by tiles of which size: ``plan``, from sizes and facts alone."""

from __future__ import annotations

from dataclasses import dataclass

from .config import BYTES, ceil_div
from .launch import Device

SLACK = 4096  # bytes of shared memory for what tiles turn into on their way between layouts
ALONE = 128  # units that one program can have: beyond, others would idle while it multiplies
FREE = {"half": 2, "tf32": 2, "float": 0, "double": 0}  # products on tensor cores take W_hh from shared memory; others stream it


@dataclass(frozen=True)
class Plan:
    """``name`` as in recurrent_sweeps.py and why; sequences and units of a program, depth of a step of its product, warps, stages; into
    how many ``chunks`` of that depth W_hh is cut where it stays in shared memory, 0 where it is streamed."""

    name: str
    reason: str
    rows: int
    units: int
    depth: int
    warps: int
    stages: int
    chunks: int = 0


def power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def plan(kind: str, gates: int, D: int, B: int, H: int, device: Device, backward: bool) -> Plan:
    """The way for ``gates`` gates of H units in D directions and B sequences; ``kind`` as config.kind_of gives it.

    whole        W_hh fits one program: no meeting at all
    persistent   all programs run at once: a meeting after each step costs a fraction of a launch
    steps        else, a launch per step: few enough where a step is that much work; a CUDA graph makes them cheap
    """
    size, depth = BYTES[kind], 128 // BYTES[kind] // 2 if kind != "half" else 64
    rows, K = 16, gates * H if backward else H
    width = power_of_two(H)
    if FREE[kind] and width <= ALONE and gates * width * width * size + rows * width * size * gates + SLACK <= device.shared:
        reason = f"W_hh of {H} units fits one program, which has {rows} sequences to itself"
        return Plan("whole", reason, rows, width, width, max(4, width // 16), 1, gates if backward else 1)
    blocks = D * ceil_div(B, rows)
    chunks = ceil_div(K, depth)
    for units in (32, 64):
        programs = blocks * ceil_div(H, units)
        held = (gates * H * units + rows * depth) * size + SLACK + chunks * depth * 0
        if programs <= device.processors and FREE[kind] and held <= device.shared:
            reason = f"{programs} programs run at once on {device.processors} multiprocessors, each with its part of W_hh in shared memory"
            return Plan("persistent", reason, rows, units, depth, units // 8, 1, chunks)
    for units in (32, 64):
        programs = blocks * ceil_div(H, units)
        if programs <= device.processors:
            reason = f"{programs} programs run at once on {device.processors} multiprocessors and read W_hh at every step"
            return Plan("persistent", reason, rows, units, depth, 4, 2)
    reason = f"{programs} programs do not run at once on {device.processors} multiprocessors"
    return Plan("steps", reason, rows, 32, depth, 4, 2)
