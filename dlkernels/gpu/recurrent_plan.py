"""How the steps of a recurrent layer are gone through on a GPU, and by tiles of which size: ``plan``, from sizes and facts alone.

The reasoning behind it is not a measurement: a meeting of programs costs two trips to the L2 cache, about a microsecond a step; a launch
costs several, without a CUDA graph; and a step of few sequences is so little arithmetic that either decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import BYTES, bucket, ceil_div
from .launch import Device

ROWS = 16  # the least that tensor cores multiply: sequences are few, and more programs mean less work for each
UNITS = {"half": (32, 16, 64), "tf32": (32, 16, 64), "float": (32, 64), "double": (32,)}  # the first that serves
ALONE = 128  # units that one program can have and be no slower for it,
ALONE_READING = {"half": 32, "tf32": 32, "float": 64, "double": 32}  # and where W_hh is read at every step
KEPT = {"half": 128, "tf32": 64}  # depth of the tiles of W_hh in shared memory: only tensor cores take it from there
READ = {"half": 32, "tf32": 32, "float": 16, "double": 16}  # depth where it is read at every step
STEP = {"half": (64, 32, 8), "tf32": (64, 32, 8), "float": (32, 32, 8), "double": (16, 32, 8)}  # rows, units, warps of a launch per step
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


def plan(kind: str, gates: int, D: int, B: int, H: int, device: Device) -> Plan:
    """The way for a cell of ``gates`` gates with H units, D directions and B sequences; ``kind`` as config.kind_of has it.

    whole        the units of a layer fit one program: no meeting at all
    persistent   several programs share a row, and all run at once: a meeting after each step costs less than a launch
    steps        a launch per step, where a step is work enough to fill the machine; in a CUDA graph they cost little
    """
    kept = 0 if H % 2 else KEPT.get(kind, 0)  # odd rows are read number by number, whose addresses take the registers of a large tile

    def stages(rows: int, units: int, depth: int) -> int:
        """As many as shared memory holds, each with a step of W_hh and of h', or da, of every gate."""
        return max(1, min(4 if kept else 2, (device.shared - SLACK) // (gates * (rows + units) * depth * BYTES[kind])))

    def fits(units: int, depth: int) -> bool:
        numbers = gates * (ceil_div(H, depth) * depth * units + ROWS * max(depth, units))  # W_hh, and h' or da of every gate
        return numbers * BYTES[kind] + SLACK <= device.shared

    def cut(name: str, reason: str, units: int, depth: int, keeps: bool) -> Plan:
        warps = max(units // 8, 2) if kind in KEPT else 8  # a tensor core's tile is 8 units wide
        if keeps:
            return Plan(name, reason, ROWS, units, depth, warps, 1, ceil_div(H, depth))
        return Plan(name, reason, ROWS, units, depth, warps, stages(ROWS, units, depth))

    width = bucket(H)
    depth = width if kept else READ[kind]
    if fits(width, depth) and width <= ALONE if kept else width <= ALONE_READING[kind]:
        return cut("whole", f"one program has all {H} units of {ROWS} sequences", width, depth, kept > 0)
    for keeps in (True, False) if kept else (False,):
        for units in UNITS[kind]:
            programs = D * ceil_div(B, ROWS) * ceil_div(H, units)
            if programs <= device.processors and (not keeps or fits(units, kept)):
                where = "keeps its part of W_hh in shared memory" if keeps else "reads its part of W_hh at every step"
                reason = f"{programs} programs run at once on {device.processors} multiprocessors; each {where}"
                return cut("persistent", reason, units, kept if keeps else READ[kind], keeps)
    rows, units, warps = STEP[kind]
    programs = D * ceil_div(B, ROWS) * ceil_div(H, UNITS[kind][-1])
    reason = f"{programs} programs do not run at once on {device.processors} multiprocessors"
    return Plan("steps", reason, rows, units, READ[kind], warps, stages(rows, units, READ[kind]))
