"""Regressions over OPS and the optimizers for pytest-benchmark: `pytest benchmarks --benchmark-autosave`, later `--benchmark-compare`.

Seconds differ between machines and hours, so each benchmark also records its speed relative to eager, measured in turns in this process,
in `extra_info`. The full picture is `dlkernels bench`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dlkernels import OPS
from dlkernels.bench.optimizers import OPTIMIZERS, QUICK_SETS, Step, line_up_step, steps
from dlkernels.bench.providers import FORWARD, TRAINING, Case, line_up
from dlkernels.bench.timing import interleave

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [Case(op, size, torch.float32, direction) for op in OPS.values() for size in op.quick for direction in (FORWARD, TRAINING)]
STEPS = steps(list(OPTIMIZERS.values()), QUICK_SETS)


@pytest.mark.parametrize("case", [*CASES, *STEPS], ids=lambda case: "{op}-{label}-{direction}".format(**case.id))
def test_speed(case: Case | Step, benchmark: Any) -> None:
    field = line_up_step(case, DEVICE) if isinstance(case, Step) else line_up(case, DEVICE)
    assert field.agrees["dlkernels"], "a wrong result has no speed"
    with torch.no_grad() if case.direction == FORWARD else nullcontext():
        timings = interleave({name: field.calls[name] for name in ("eager", "dlkernels")}, min_samples=7, max_seconds=2.0, device=DEVICE)
        ours = timings["dlkernels"].median
        benchmark.group = "{op} {direction}".format(**case.id)
        benchmark.extra_info.update(vs_eager=timings["eager"].median / ours, gflop_per_s=case.flops / ours / 1e9)
        benchmark.pedantic(_finished(field.calls["dlkernels"]), rounds=max(5, min(50, int(1 / ours))), warmup_rounds=2)


def _finished(call: Any) -> Any:
    """`call` until the device is done."""

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run
