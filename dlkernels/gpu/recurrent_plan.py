"""How the steps of a recurrent layer are gone through on a GPU, and by tiles of which size: ``plan``, from sizes and facts alone.

Nothing here is measured yet. What speaks for each: a meeting of programs costs two trips to the L2 cache, some 1 microsecond a step; a
launch a few, without a CUDA graph some more; and a step of few sequences is so little arithmetic that either decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import BYTES, bucket, ceil_div
from .launch import Device

ROWS = 16  # the least that tensor cores multiply; sequences are few, and more programs mean less work for each
DEPTH = {"half": 64, "tf32": 32, "float": 16, "double": 16}
UNITS = {"half": (32, 16, 64), "tf32": (32, 16, 64), "float": (32, 64), "double": (16, 32)}  # the first that serves
ALONE = {"half": 128, "tf32": 128, "float": 64, "double": 32}  # units that one program can have without being the slower for it
KEEPS = ("half", "tf32")  # tensor cores take W_hh from shared memory; other products would hold all of it in registers
SLACK = 4096  # bytes of shared memory for tiles on their way from one layout to another


@dataclass(frozen=True)
class Plan:
    """``name`` as in recurrent_sweeps.py, and the reason for it; sequences and units of a program, depth of a step of its product, warps,
    pipeline stages; and the ``chunks`` of that depth in which W_hh stays in shared memory, 0 where it is read at every step."""

    name: str
    reason: str
    rows: int
    units: int
    depth: int
    warps: int
    stages: int
    chunks: int = 0


def plan(kind: str, gates: int, D: int, B: int, H: int, device: Device, backward: bool) -> Plan:
    """The way for a cell of ``gates`` gates with H units, D directions and B sequences; ``kind`` as config.kind_of has it.

    whole        the units of a layer fit one program: no meeting at all
    persistent   several programs share a row, and all run at once: a meeting after each step costs less than a launch
    steps        a launch per step, where a step is work enough to fill the machine; in a CUDA graph they cost little
    """
    summed = gates * H if backward else H
    row_blocks = D * ceil_div(B, ROWS)

    def cut(name: str, reason: str, units: int, depth: int, keeps: bool) -> Plan:
        return Plan(name, reason, ROWS, units, depth, max(2, units // 8), 1 if keeps else 2, ceil_div(summed, depth) if keeps else 0)

    def fits(units: int, depth: int) -> bool:
        weights, states = ceil_div(summed, depth) * depth * units * (1 if backward else gates), ROWS * max(depth, units)
        return kind in KEEPS and (weights + states) * BYTES[kind] + SLACK <= device.shared

    width = bucket(H)
    depth = min(DEPTH[kind], width) if backward or kind not in KEEPS else width
    if width <= ALONE[kind] and (fits(width, depth) or kind not in KEEPS):
        return cut("whole", f"one program has all {H} units of {ROWS} sequences", width, depth, kind in KEEPS)
    for keeps in (True, False):
        for units in UNITS[kind]:
            programs, depth = row_blocks * ceil_div(H, units), DEPTH[kind]
            if programs <= device.processors and (not keeps or fits(units, depth)):
                where = "keeps its part of W_hh in shared memory" if keeps else "reads its part of W_hh at every step"
                reason = f"{programs} programs run at once on {device.processors} multiprocessors; each {where}"
                return cut("persistent", reason, units, depth, keeps)
    units = UNITS[kind][0]
    programs = row_blocks * ceil_div(H, units)
    return cut("steps", f"{programs} programs do not run at once on {device.processors} multiprocessors", units, DEPTH[kind], False)
