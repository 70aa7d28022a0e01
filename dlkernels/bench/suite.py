"""The benchmark suite: every op of OPS against native PyTorch, torch.compile and its peers, and the optimizers against torch's, beside the
machine's measured limit.

`plan` fixes the order: what matters most comes first, so a run that is out of time has measured the right things. `run` yields rows of
the results file as they are finished.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..registry import Op
from .check import errors
from .inputs import dtype_name, label
from .optimizers import QUICK_SETS, SETS, Optimizer, Step, line_up_step, steps
from .providers import FORWARD, TRAINING, Case, Field, line_up
from .results import Row
from .timing import Interrupted, Timing, interleave

EXACT_FLOPS, EXACT_ELEMENTS = 3e8, 3e6  # up to here float64 costs little and the full rule is applied; beyond, agreement with eager


@dataclass(frozen=True)
class Mode:
    """How much to measure. Seconds; `budget` and `compile_reserve` are for the whole suite, the others for one case."""

    name: str
    budget: float
    compile_reserve: float
    min_seconds: float
    min_samples: int
    max_seconds: float
    longest_case: float  # a case expected to take longer is left out


QUICK = Mode("quick", budget=32, compile_reserve=12, min_seconds=0.1, min_samples=7, max_seconds=0.7, longest_case=4)
DEFAULT = Mode("default", budget=360, compile_reserve=40, min_seconds=0.3, min_samples=15, max_seconds=2.0, longest_case=15)
FULL = Mode("full", budget=float("inf"), compile_reserve=0, min_seconds=0.5, min_samples=21, max_seconds=10.0, longest_case=120)
MODES = {mode.name: mode for mode in (QUICK, DEFAULT, FULL)}


def headline(ops: Sequence[Op]) -> list[Op]:
    """One op per module, the one with the most benchmark sizes: the others share its kernels."""
    by_module: dict[str, Op] = {}
    for op in ops:
        if len(op.bench) > len(by_module.get(op.module, op).bench) or op.module not in by_module:
            by_module[op.module] = op
    return list(by_module.values())


def plan(
    ops: Sequence[Op],
    mode: Mode,
    dtypes: Sequence[torch.dtype] | None = None,
    compiled: bool | None = None,
    optimizers: Sequence[Optimizer] = (),
) -> list[Case | Step]:
    """The cases in the order of their weight.

    Headline ops come before optimizers and those before ops that share kernels, quick sizes before the others, and the first of `dtypes`
    (default: each op's own, float32 and bfloat16 first) before the others. `compiled`: race torch.compile with ops everywhere, nowhere, or
    (None) in full mode everywhere and otherwise at headline sizes, which are then measured once more with it.
    """
    heads = headline(ops)
    everywhere = mode.name == "full" if compiled is None else compiled

    def cases(some: Sequence[Op], sizes: str, which: slice) -> list[Case]:
        return [
            Case(op, size, dtype, direction, everywhere)
            for op in some
            for dtype in _dtypes(op, dtypes)[which]
            for direction in (FORWARD, TRAINING)
            for size in sorted(getattr(op, sizes), key=lambda size: op.cost(**size).forward_flops)
        ]

    few_steps = steps(optimizers, QUICK_SETS, dtypes)
    stages: list[Sequence[Case | Step]]
    first, second, others = slice(1), slice(1, 2), slice(1, None)
    with_compile = [replace(case, compiled=True) for case in cases(heads, "quick", first)] if compiled is None and not everywhere else []
    if mode.name == "quick":
        with_compile = [case for case in with_compile if case.direction == FORWARD and case.size == case.op.quick[0]]
        other_dtypes = [case for case in cases(heads, "quick", others) if case.size == case.op.quick[0]]
        stages = [cases(heads, "quick", first), few_steps, cases(ops, "quick", first), other_dtypes, with_compile]
    else:
        stages = [
            cases(heads, "quick", first),
            few_steps,
            cases(ops, "quick", first),
            cases(ops, "quick", second),
            cases(heads, "bench", first),
            steps(optimizers, SETS, dtypes),
            cases(heads, "bench", second),
            with_compile,
            cases(heads, "bench", others),
            cases(ops, "bench", first),
            cases(ops, "bench", others),
        ]
    return _without_repeats([case for stage in stages for case in stage])


def _dtypes(op: Op, wanted: Sequence[torch.dtype] | None) -> list[torch.dtype]:
    """Those of `wanted` that the op takes; by default its own, those that models are trained in first."""
    if wanted is not None:
        return [dtype for dtype in wanted if dtype in op.dtypes]
    return sorted(op.dtypes, key=lambda dtype: dtype not in (torch.float32, torch.bfloat16))


def _without_repeats(cases: Sequence[Case | Step]) -> list[Case | Step]:
    return list({(*_race(case.id), case.compiled): case for case in cases}.values())


Progress = Callable[[int, int, str], None]


def run(
    cases: Sequence[Case | Step],
    mode: Mode,
    *,
    device: torch.device | str = "cpu",
    limits: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Iterator[tuple[str, list[Row]]]:
    """Measure `cases` in order, as far as `mode`'s budget reaches; yield (section, rows) of the results file, "bench" mostly.

    "failures" rows name a provider that could not run a case, "skipped" rows a case left out for time. On Ctrl-C the rows of the finished
    rounds are yielded before KeyboardInterrupt goes on.
    """
    start = time.perf_counter()
    pace: dict[tuple[str, ...], float] = {}  # seconds per flop of the slowest provider, by op, dtype and direction
    checked: dict[tuple[str, str, str], bool] = {}
    for number, case in enumerate(cases):
        kind, size = _race(case.id)[:3], case.id["label"]
        progress(number, len(cases), " ".join([kind[0], size, *kind[1:]]))
        left = mode.budget - (time.perf_counter() - start)
        expected = pace.get(kind, 0.0) * case.flops * 8 + (mode.compile_reserve / 4 if case.compiled else 0)
        if left < 0 or expected > min(mode.longest_case + (mode.compile_reserve if case.compiled else 0), max(left, 2 * mode.max_seconds)):
            reason = "the time budget was spent" if left < expected or left < 0 else f"one case would take about {expected:.0f} s"
            yield "skipped", [{**case.id, "provider": "compile" if case.compiled else "all", "reason": reason}]
            continue
        with torch.no_grad() if case.direction == FORWARD else nullcontext():
            field = line_up_step(case, device) if isinstance(case, Step) else line_up(case, device)
        if field.failures:
            yield "failures", [{**case.id, "provider": name, "error": error} for name, error in field.failures.items()]
        is_right = isinstance(case, Step) or _check(case, device, checked)  # what a step led to was compared as it was lined up
        try:
            timings, peaks = _measure(case, field, mode, device)
        except Interrupted as interruption:
            yield "bench", _rows(case, field, interruption.timings, {}, is_right, limits)
            raise
        if timings and case.flops:
            pace[kind] = min(pace.get(kind, 1.0), max(timing.median for timing in timings.values()) / case.flops)
        yield "bench", _rows(case, field, timings, peaks, is_right, limits)
    progress(len(cases), len(cases), "")


def _check(case: Case, device: torch.device | str, checked: dict[tuple[str, str, str], bool]) -> bool:
    """Is ours right at this size, by the float64 rule? True where float64 would take too long: agreement with eager decides there."""
    key = (case.op.name, label(case.size), dtype_name(case.dtype))
    if key not in checked:
        cost = case.op.cost(**case.size)
        small = cost.forward_flops <= EXACT_FLOPS and cost.forward_elements <= EXACT_ELEMENTS
        checked[key] = all(row.ok for row in errors(case.op, case.size, case.dtype, device)) if small else True
    return checked[key]


def _measure(case: Case | Step, field: Field, mode: Mode, device: torch.device | str) -> tuple[dict[str, Timing], dict[str, int | None]]:
    """Interleaved timings, and the peak memory in bytes where the device counts it."""
    if not field.calls:
        return {}, {}
    with torch.no_grad() if case.direction == FORWARD else nullcontext():
        timings = interleave(
            field.calls, min_seconds=mode.min_seconds, min_samples=mode.min_samples, max_seconds=mode.max_seconds, device=device
        )
        return timings, {name: _peak_bytes(call, device) for name, call in field.calls.items()}


def _peak_bytes(call: Callable[[], object], device: torch.device | str) -> int | None:
    """What one call allocates at most beyond its arguments; only CUDA's allocator counts it for free."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rows(
    case: Case | Step,
    field: Field,
    timings: Mapping[str, Timing],
    peaks: Mapping[str, int | None],
    is_right: bool,
    limits: Mapping[str, Any] | None,
) -> list[Row]:
    threads = torch.get_num_threads()
    limit = _limit_seconds(case, limits, threads)
    eager = timings["eager"].median if "eager" in timings else None
    return [
        {
            **case.id,
            "provider": name,
            "threads": threads,
            "median_s": timing.median,
            "p20_s": timing.p20,
            "p80_s": timing.p80,
            "samples": len(timing.samples),
            "flops": case.flops,
            "bytes": case.bytes,
            "limit_s": limit,
            "limit_fraction": limit / timing.median if limit else None,
            "vs_eager": eager / timing.median if eager else None,
            "peak_bytes": peaks.get(name),
            "ok": field.agrees[name] and (is_right or name != "dlkernels"),
        }
        for name, timing in timings.items()
    ]


def _limit_seconds(case: Case | Step, limits: Mapping[str, Any] | None, threads: int) -> float | None:
    if not limits or not limits.get("flops"):
        return None
    from .limits import attainable

    return attainable(limits, dtype_name(case.dtype), threads, case.flops, case.bytes)


def overhead(ops: Sequence[Op], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Row]:
    """The cost of a call in microseconds: each headline op at its tiny sizes and its smallest sample, ours and eager."""
    for op in headline(ops):
        for size in [_smallest(op), *op.tiny]:
            for direction in (FORWARD, TRAINING):
                case = Case(op, size, dtype, direction)
                with torch.no_grad() if direction == FORWARD else nullcontext():
                    timings = interleave(line_up(case, device).calls, min_seconds=0.2, device=device, cold=False)
                for name, timing in timings.items():
                    what = f"{op.name} {label(size)} {direction}, {name}"
                    yield {"what": what, "microseconds": timing.median * 1e6, "op": op.name, "direction": direction, "provider": name}


def _smallest(op: Op) -> Mapping[str, Any]:
    """The smallest sample that computes anything, else the smallest that holds anything."""
    costs = [(op.cost(**size), size) for size in op.samples]
    busy = [(cost.forward_flops, cost.forward_elements, size) for cost, size in costs if cost.forward_flops]
    return min(busy or [(0, cost.forward_elements, size) for cost, size in costs if cost.forward_elements], key=lambda c: c[:2])[-1]


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Let torch, and with it our kernels, use `threads` threads inside the block; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def geometric_means(rows: Sequence[Row]) -> list[Row]:
    """Our speed by op, dtype and direction, as geometric means over the sizes whose result was right.

    "vs_eager" counts all "sizes" where eager ran, and "slowest" is the lowest of them; "vs_compile" counts those where torch.compile ran,
    and is None without any; "vs_others" has a mean for every further provider by name.
    """
    seconds = {(*_race(row), row["provider"]): row["median_s"] for row in rows if row["ok"]}
    names = dict.fromkeys(row["provider"] for row in rows if row["provider"] not in ("dlkernels", "eager", "compile"))
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        if row["provider"] == "dlkernels" and row["ok"]:
            groups.setdefault(_race(row)[:3], []).append(_race(row))

    def ratios(races: Sequence[tuple[str, ...]], opponent: str) -> list[float]:
        pairs = [((*race, opponent), (*race, "dlkernels")) for race in races]
        return [seconds[theirs] / seconds[ours] for theirs, ours in pairs if theirs in seconds]

    means = []
    for (op, dtype, direction), races in groups.items():
        eager, compiled = ratios(races, "eager"), ratios(races, "compile")
        others = {name: statistics.geometric_mean(found) for name in names if (found := ratios(races, name))}
        if eager or compiled:
            mean = {"vs_eager": _geometric_mean(eager), "vs_compile": _geometric_mean(compiled), "slowest": min(eager, default=None)}
            means.append({"op": op, "dtype": dtype, "direction": direction, "sizes": len(eager), **mean, "vs_others": others})
    return means


def _race(row: Row) -> tuple[str, ...]:
    return (row["op"], row["dtype"], row["direction"], row["label"])


def _geometric_mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None
