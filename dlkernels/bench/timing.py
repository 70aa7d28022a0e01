"""Interleaved timing: every provider is sampled once per round, in one process, in an order that turns from round to round.

A busy neighbour, a warming processor or a drifting clock then hits all providers alike, and the ratio of their medians stays true when
the seconds do not. Times are seconds per call.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SHORTEST_SAMPLE = 200e-6  # a sample repeats its call until it lasts this long, thousands of timer ticks
L2_FLUSH_BYTES = 256 << 20  # more than any GPU's level-2 cache
LARGEST_KEPT = (32 << 20) - (1 << 16)  # bytes of the largest block that glibc's malloc keeps when it is freed, once it has seen one

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """The samples of one provider, in seconds per call, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p20(self) -> float:
        return self._quantile(0.2)

    @property
    def p80(self) -> float:
        return self._quantile(0.8)

    def _quantile(self, q: float) -> float:
        ordered = sorted(self.samples)
        return ordered[round(q * (len(ordered) - 1))]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a measurement; `timings` holds the finished rounds and is empty when no round was finished."""

    def __init__(self, timings: dict[str, Timing]) -> None:
        super().__init__("interrupted")
        self.timings = timings


class HostClock:
    """Wall-clock time of calls that have finished when they return."""

    def sample(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """Time between two events on the GPU's stream.

    cold: overwrite the level-2 cache before every sample, as a real program's other kernels would. The overwrite also keeps the GPU busy
    while the host enqueues the call, so that what is measured is the kernel and not Python. A cold sample is one call.
    """

    def __init__(self, device: torch.device, cold: bool) -> None:
        self.device = device
        self.scratch = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device) if cold else None

    def sample(self, call: Call, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.scratch is not None:
            repeats = 1
            self.scratch.zero_()
        start.record(torch.cuda.current_stream(self.device))
        for _ in range(repeats):
            call()
        end.record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3 / repeats


def interleave(
    calls: Mapping[str, Call],
    *,
    min_seconds: float = 0.3,
    min_samples: int = 15,
    max_seconds: float = 20.0,
    warmup: float = 0.02,
    device: torch.device | str = "cpu",
    cold: bool = True,
) -> dict[str, Timing]:
    """Time every call of `calls` against the others and return the samples of each.

    Rounds go on until all providers together have used `min_seconds` and each has `min_samples` samples, but no longer than `max_seconds`
    once there are three rounds. `warmup`: seconds of untimed calls per provider before the first round. A call shorter than
    SHORTEST_SAMPLE is repeated within its sample. What a call returns is dropped at once, for every provider alike. The garbage collector
    is off meanwhile.
    `cold`: on CUDA, flush the level-2 cache before every sample.
    Raises ValueError if there is nothing to time; Interrupted (a KeyboardInterrupt that carries the finished rounds) on Ctrl-C.
    """
    if not calls:
        raise ValueError("interleave: `calls` is empty, it needs at least one named call")
    device = torch.device(device)
    clock: HostClock | CudaClock = CudaClock(device, cold) if device.type == "cuda" else HostClock()
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    try:
        torch.empty(LARGEST_KEPT, dtype=torch.uint8)  # let malloc see one, as in any program that has run for a while
        with no_garbage_collection():
            repeats = {name: _warm_up(clock, call, warmup) for name, call in calls.items()}
            start = time.perf_counter()
            for number in _rounds(start, min_seconds, min_samples, max_seconds):
                for name in _order(names, number):
                    samples[name].append(clock.sample(calls[name], repeats[name]))
    except KeyboardInterrupt:
        finished = min(len(taken) for taken in samples.values())
        raise Interrupted({name: Timing(tuple(taken[:finished])) for name, taken in samples.items() if finished}) from None
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def _rounds(start: float, min_seconds: float, min_samples: int, max_seconds: float) -> Iterator[int]:
    """Round numbers, until there are enough."""
    number = 0
    while True:
        elapsed = time.perf_counter() - start
        enough = number >= min_samples and elapsed >= min_seconds
        if enough or (number >= 3 and elapsed >= max_seconds):
            return
        yield number
        number += 1


def _order(names: list[str], number: int) -> list[str]:
    """Turn the order by one place per round and reverse it every other time, so that nobody always runs behind the same neighbour."""
    turn = (number // 2) % len(names)
    turned = names[turn:] + names[:turn]
    return turned[::-1] if number % 2 else turned


def _warm_up(clock: HostClock | CudaClock, call: Call, seconds: float) -> int:
    """Run `call` for `seconds`, at least once; return how often one sample has to repeat it."""
    start = time.perf_counter()
    fastest = clock.sample(call, 1)
    while time.perf_counter() - start < seconds:
        fastest = min(fastest, clock.sample(call, 1))
    return max(1, round(SHORTEST_SAMPLE / max(fastest, 1e-9)))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, then keep the collector off inside the block."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def canary() -> Timing:
    """A fixed product (384 x 384 x 384, float32, native) on the current number of threads: its time should not depend on when it is run."""
    a = torch.ones(384, 384)
    return interleave({"canary": lambda: a @ a}, min_seconds=0.1, min_samples=30)["canary"]


def is_busy(before: Timing, after: Timing, tolerance: float = 1.25) -> bool:
    """True if the canary slowed down or sped up between two runs, or scattered within one, by more than `tolerance`."""
    drift = max(before.median, after.median) / min(before.median, after.median)
    scatter = max(before.p80 / before.p20, after.p80 / after.p20)
    return max(drift, scatter) > tolerance
