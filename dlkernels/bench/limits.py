"""The machine's measured limits, and the time they allow: the roofline (Williams, Waterman, Patterson, CACM 2009).

A kernel that does `flops` operations on `bytes` bytes takes at least as long as either alone:
    seconds = max(flops / peak, bytes / bandwidth)
`peak` is what this CPU reaches on operands in registers, `bandwidth` what it reaches on a working set of that many bytes: from level-1
cache to memory it falls thirtyfold, so it is measured over the whole range and interpolated.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .. import _host

Progress = Callable[[int, int, str], None]  # (measurements done, measurements in all, what is measured next)

DTYPES = ("float32", "float64", "bfloat16", "float16")
FULL_SIZES = tuple(1 << power for power in range(14, 29, 2))  # 16 KiB, 64 KiB, ... 256 MiB
QUICK_SIZES = tuple(1 << power for power in (14, 18, 22, 25, 27))
FULL_SECONDS, QUICK_SECONDS = 9.0, 1.5
FLOPS_WEIGHT = 3  # a peak gets as much time as this many bandwidths: three numbers that every other one is held against
SHORTEST = 0.01  # seconds for one measurement, however little of the time is left

_measured: dict[tuple[tuple[int, ...], bool], dict[str, Any]] = {}


def measure(threads: Sequence[int], quick: bool, progress: Progress | None = None) -> dict[str, Any]:
    """Measure this CPU's limits with each number of threads: under 12 s, `quick` under 3 s, once per process.

    Returns:
        {"flops": [{"dtype", "threads", "flops_per_s"}], "bandwidth": [{"bytes", "threads", "bytes_per_s", "kind"}]}, where `bytes` is the
        working set of all threads together and `bytes_per_s` counts what is read and what is written.

    Raises:
        ValueError: `threads` is empty, or holds a number of threads that is not positive.
    """
    counts = tuple(sorted(set(threads), reverse=True))  # the most threads first: they share the cost of the first touch of the memory
    if not counts or counts[-1] < 1:
        raise ValueError(f"threads must be one or more positive numbers, got {list(threads)}")
    key = (counts, bool(quick))
    if key not in _measured:
        _measured[key] = _measure(counts, quick, progress or (lambda done, total, what: None))
    return _measured[key]


def _measure(counts: Sequence[int], quick: bool, progress: Progress) -> dict[str, Any]:
    distinct = [dtype for dtype in DTYPES if dtype != "float16"]  # computed in float32, so it has float32's limit
    kinds = ("read", "copy") if quick else ("read", "copy", "triad")
    sizes = [size for size in (QUICK_SIZES if quick else FULL_SIZES) if size >= counts[0] * 4096]
    plan = [("flops", n, dtype, 0) for n in counts for dtype in distinct]
    plan += [("bandwidth", n, kind, size) for n in counts for size in reversed(sizes) for kind in kinds]

    deadline = time.monotonic() + (QUICK_SECONDS if quick else FULL_SECONDS)
    flops, bandwidth = [], []
    for done, (limit, n, what, size) in enumerate(plan):
        progress(done, len(plan), f"{what}, {n} threads" if limit == "flops" else f"{what} {size >> 10} KiB, {n} threads")
        shares = [FLOPS_WEIGHT if row[0] == "flops" else 1 for row in plan[done:]]
        seconds = max(SHORTEST, (deadline - time.monotonic()) * shares[0] / sum(shares))
        if limit == "flops":
            flops.append({"dtype": what, "threads": n, "flops_per_s": _host.peak_flops(what, n, seconds)})
        else:
            rate = _host.bandwidth(size, n, seconds, what)
            bandwidth.append({"bytes": size, "threads": n, "bytes_per_s": rate, "kind": what})
    progress(len(plan), len(plan), "done")
    flops += [{**row, "dtype": "float16"} for row in flops if row["dtype"] == "float32"]
    return {
        "flops": sorted(flops, key=lambda row: (row["threads"], DTYPES.index(row["dtype"]))),
        "bandwidth": sorted(bandwidth, key=lambda row: (row["threads"], row["bytes"], kinds.index(row["kind"]))),
    }


def attainable(limits: Mapping[str, Any], dtype: str, threads: int, flops: float, bytes: float) -> float:
    """The least seconds that the measured `limits` allow for `flops` operations in `dtype` on `bytes` bytes, each moved once.

    Raises:
        ValueError: `flops` or `bytes` is negative, or `limits` holds nothing for this `dtype` and number of `threads`.
    """
    if not (flops >= 0 and bytes >= 0):
        raise ValueError(f"flops and bytes must be at least 0, got {flops} and {bytes}")
    return max(flops / _peak(limits, dtype, threads), bytes / _bandwidth(limits, threads, bytes))


def _peak(limits: Mapping[str, Any], dtype: str, threads: int) -> float:
    for row in limits["flops"]:
        if row["dtype"] == dtype and row["threads"] == threads:
            return float(row["flops_per_s"])
    known = ", ".join(f"{row['dtype']} x {row['threads']}" for row in limits["flops"])
    raise ValueError(f"limits hold no flops for dtype {dtype!r} on threads={threads}; measured were: {known or 'none'}")


def _bandwidth(limits: Mapping[str, Any], threads: int, bytes: float) -> float:
    """Byte/s for a working set: the best kind of access at each measured size, log-log interpolated, constant beyond both ends.

    A smaller working set can do whatever a larger one can, so a dip between sizes is noise and is filled in.
    """
    best: dict[int, float] = {}
    for row in limits["bandwidth"]:
        if row["threads"] == threads:
            best[row["bytes"]] = max(best.get(row["bytes"], 0.0), row["bytes_per_s"])
    if not best:
        known = sorted({row["threads"] for row in limits["bandwidth"]})
        raise ValueError(f"limits hold no bandwidth for threads={threads}; measured were: {known or 'none'}")
    sizes = sorted(best)
    for smaller, larger in reversed(list(pairwise(sizes))):
        best[smaller] = max(best[smaller], best[larger])
    right = bisect_left(sizes, bytes)
    if right == 0 or right == len(sizes):
        return best[sizes[min(right, len(sizes) - 1)]]
    low, high = sizes[right - 1], sizes[right]
    weight = math.log(bytes / low) / math.log(high / low)
    return best[low] ** (1 - weight) * best[high] ** weight
