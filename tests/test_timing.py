"""Does the stopwatch treat everybody alike, and lose nothing on Ctrl-C?"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from dlkernels.bench.timing import Interrupted, Timing, interleave, is_busy


def test_quantiles_are_of_the_samples() -> None:
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0, 100.0))
    assert (timing.p20, timing.median, timing.p80) == (2.0, 3.5, 5.0)


def test_providers_take_turns_and_follow_everybody_alike() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            time.sleep(3e-4)  # longer than the shortest sample: one call each

        return run

    names = ("a", "b", "c")
    timings = interleave({name: call(name) for name in names}, min_seconds=0, min_samples=24, warmup=0)
    assert [len(timing.samples) for timing in timings.values()] == [24, 24, 24]
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]  # the first three warm up
    assert all(sorted(names_of_round) == sorted(names) for names_of_round in rounds)
    first = Counter(names_of_round[0] for names_of_round in rounds)
    assert max(first.values()) - min(first.values()) <= 4
    followers = Counter((a, b) for names_of_round in rounds for a, b in pairwise(names_of_round))
    assert len(followers) == 6 and max(followers.values()) <= 2 * min(followers.values())


def test_a_short_call_is_repeated_within_its_sample() -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    timing = interleave({"short": count}, min_seconds=0, min_samples=5, warmup=0.001)["short"]
    assert calls > 20 * len(timing.samples)
    assert timing.median > 0


def test_a_sample_is_no_shorter_than_the_work() -> None:
    def spin(seconds: float) -> Callable[[], None]:
        def run() -> None:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return run

    timings = interleave({"one": spin(1e-3), "two": spin(2e-3)}, min_seconds=0, min_samples=15, warmup=0)
    assert min(timings["one"].samples) >= 1e-3 and min(timings["two"].samples) >= 2e-3


def test_the_time_limit_ends_slow_measurements_after_three_rounds() -> None:
    timing = interleave({"slow": lambda: time.sleep(0.02)}, min_seconds=9, min_samples=99, max_seconds=0.01, warmup=0)["slow"]
    assert len(timing.samples) == 3


def test_interruption_keeps_the_finished_rounds() -> None:
    calls = 0

    def interrupted_at_the_sixth() -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        time.sleep(3e-4)

    with pytest.raises(Interrupted) as caught:
        interleave({"steady": lambda: time.sleep(3e-4), "other": interrupted_at_the_sixth}, min_samples=50, warmup=0)
    assert {name: len(timing.samples) for name, timing in caught.value.timings.items()} == {"steady": 4, "other": 4}
    assert gc.isenabled()


def test_interruption_before_the_first_round_leaves_nothing() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        interleave({"never": interrupted})
    assert caught.value.timings == {}


def test_the_garbage_collector_is_off_meanwhile() -> None:
    states = []
    interleave({"look": lambda: states.append(gc.isenabled())}, min_seconds=0, min_samples=3, warmup=0)
    assert not any(states) and gc.isenabled()


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="calls"):
        interleave({})


def test_the_canary_notices_drift_and_scatter() -> None:
    steady, slower, scattered = Timing((1.0,) * 10), Timing((1.5,) * 10), Timing((1.0, 2.0) * 5)
    assert not is_busy(steady, steady)
    assert is_busy(steady, slower) and is_busy(slower, steady) and is_busy(steady, scattered)


# check
