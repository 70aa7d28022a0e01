"""The measuring instruments: do they notice a wrong kernel, keep to their time, and lose nothing on Ctrl-C?"""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import product, toy
from torch import Tensor

from dlkernels import OPS
from dlkernels.bench import suite
from dlkernels.bench.inputs import label
from dlkernels.bench.machine import describe
from dlkernels.bench.optimizers import OPTIMIZERS, SETS, Step
from dlkernels.bench.providers import FORWARD, TRAINING, Case, line_up
from dlkernels.bench.results import Results, dumps
from dlkernels.registry import Op

FAST = replace(suite.QUICK, min_seconds=0.0, min_samples=3, max_seconds=0.2)


# suite


def key_of(case: Case | Step) -> tuple[str, ...]:
    return tuple(case.id[name] for name in ("op", "label", "dtype", "direction"))


def test_a_plan_begins_with_what_matters_and_repeats_nothing() -> None:
    ops, optimizers = list(OPS.values()), list(OPTIMIZERS.values())
    heads = suite.headline(ops)
    assert [op.module for op in heads] == list(dict.fromkeys(op.module for op in ops))
    for mode in suite.MODES.values():
        cases = suite.plan(ops, mode, optimizers=optimizers)
        keys = [(*key_of(case), case.compiled) for case in cases]
        assert len(set(keys)) == len(keys)
        first = cases[0]
        assert isinstance(first, Case) and first.op in heads and first.dtype == torch.float32 and first.size in first.op.quick
    everything = {key_of(case) for case in suite.plan(ops, suite.FULL, optimizers=optimizers)}
    steps = sum(len(optimizer.directions) * len(SETS) for optimizer in optimizers)
    assert len(everything) == steps + sum(2 * len(op.dtypes) * len({label(s) for s in [*op.bench, *op.quick]}) for op in ops)
    assert {key[:4] for key in keys} == everything  # the last mode is the full one


def test_torch_compile_runs_everywhere_in_full_mode_and_elsewhere_as_asked() -> None:
    ops = list(OPS.values())
    assert all(case.compiled for case in suite.plan(ops, suite.FULL))
    assert all(case.compiled for case in suite.plan(ops, suite.QUICK, compiled=True))
    assert not any(case.compiled for case in suite.plan(ops, suite.DEFAULT, compiled=False))
    for mode in (suite.QUICK, suite.DEFAULT):
        compiled = [case for case in suite.plan(ops, mode) if case.compiled]
        assert compiled
        assert all(isinstance(case, Case) and case.op in suite.headline(ops) and case.size in case.op.quick for case in compiled)


def test_dtypes_can_be_chosen() -> None:
    cases = suite.plan(list(OPS.values()), suite.DEFAULT, [torch.bfloat16])
    assert {case.dtype for case in cases} == {torch.bfloat16}


def rows_of(op: Op, mode: suite.Mode = FAST, **options: Any) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"bench": [], "failures": [], "skipped": []}
    for section, rows in suite.run(suite.plan([op], mode, [torch.float32], False), mode, **options):
        found[section] += rows
    return found


def test_rows_say_what_was_measured() -> None:
    limits = {
        "flops": [{"dtype": "float32", "threads": torch.get_num_threads(), "flops_per_s": 1e9}],
        "bandwidth": [{"bytes": 4096, "threads": torch.get_num_threads(), "bytes_per_s": 1e9, "kind": "copy"}],
    }
    rows = rows_of(toy(peers={"twice": lambda x, weight: (product(x, weight), product(x, weight))[0]}), limits=limits)["bench"]
    assert {(row["direction"], row["provider"]) for row in rows} == {
        (direction, name) for direction in (FORWARD, TRAINING) for name in ("eager", "dlkernels", "twice")
    }
    for row in rows:
        assert row["op"] == "toy" and row["dtype"] == "float32" and row["label"] == "8x8x8" and row["size"] == {"M": 8, "K": 8, "N": 8}
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["samples"] >= 3 and row["ok"] is True
        steps = 3 if row["direction"] == TRAINING else 1
        assert row["flops"] == steps * 2 * 8**3 and row["bytes"] == steps * 4 * 3 * 8 * 8
        assert row["limit_s"] == row["flops"] / 1e9 and row["limit_fraction"] == row["limit_s"] / row["median_s"]
        eager = next(r for r in rows if r["provider"] == "eager" and r["direction"] == row["direction"])
        assert row["vs_eager"] == eager["median_s"] / row["median_s"]


def test_a_wrong_result_is_marked_and_not_counted() -> None:
    wrong = rows_of(toy(lambda x, weight: 1.1 * (x @ weight)))["bench"]
    assert {row["provider"] for row in wrong if not row["ok"]} == {"dlkernels"}
    assert suite.geometric_means(wrong) == []
    right = rows_of(toy())["bench"]
    means = suite.geometric_means(right)
    assert [(row["direction"], row["sizes"]) for row in means] == [(FORWARD, 1), (TRAINING, 1)]
    assert means[0]["vs_eager"] == pytest.approx(next(row["vs_eager"] for row in right if row["provider"] == "dlkernels"))


def test_geometric_means_are_geometric() -> None:
    def rows(label: str, **seconds: float) -> list[dict[str, Any]]:
        place = {"op": "o", "dtype": "d", "direction": "f", "label": label, "ok": True}
        return [{**place, "provider": name, "median_s": median} for name, median in seconds.items()]

    races = rows("1", eager=1.0, dlkernels=1.0) + rows("2", eager=4.0, dlkernels=1.0, compile=3.0) + rows("3", eager=1.0, dlkernels=2.0)
    (mean,) = suite.geometric_means(races)
    assert mean["vs_eager"] == pytest.approx(2 ** (1 / 3)) and mean["slowest"] == 0.5 and mean["sizes"] == 3
    assert mean["vs_compile"] == pytest.approx(3.0)


def test_a_large_wrong_result_is_noticed_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "EXACT_FLOPS", 0)
    wrong = rows_of(toy(lambda x, weight: 1.1 * (x @ weight)))["bench"]
    assert not any(row["ok"] for row in wrong if row["provider"] == "dlkernels")
    assert all(row["ok"] for row in wrong if row["provider"] == "eager")


def test_an_opponent_that_fails_is_recorded_and_the_race_goes_on() -> None:
    def broken(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this")

    found = rows_of(toy(peers={"broken": broken}))
    assert {(row["provider"], row["error"]) for row in found["failures"]} == {("broken", "RuntimeError: no kernel")}
    assert {row["provider"] for row in found["bench"]} == {"eager", "dlkernels"}


def test_without_eager_there_is_no_ratio() -> None:
    def broken(x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    rows = rows_of(toy(native=broken))["bench"]
    assert rows and all(row["vs_eager"] is None and row["provider"] == "dlkernels" for row in rows)


def test_what_there_is_no_time_for_is_named() -> None:
    found = rows_of(toy(), replace(FAST, budget=-1.0))
    assert not found["bench"] and [row["provider"] for row in found["skipped"]] == ["all", "all"]
    assert all("budget" in row["reason"] for row in found["skipped"])


def test_the_suite_keeps_its_time() -> None:
    def slow(x: Tensor, weight: Tensor) -> Tensor:
        time.sleep(0.01)
        return x @ weight

    op = toy(slow, bench=[{"M": m, "K": 8, "N": 8} for m in range(1, 200)])
    mode = replace(FAST, budget=1.0, name="default")
    found: list[str] = [section for section, rows in suite.run(suite.plan([op], mode, [torch.float32], False), mode)]
    assert {"bench", "skipped"} == set(found), "398 races of at least 30 ms each do not fit into a second"


def test_interruption_yields_the_finished_rounds_then_goes_on() -> None:
    calls = 0

    def call(x: Tensor, weight: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 400:
            raise KeyboardInterrupt
        time.sleep(3e-4)  # longer than the shortest sample: one call each
        return x @ weight

    cases = [Case(toy(call), {"M": 8, "K": 8, "N": 8}, torch.float32, FORWARD)]
    sections = []
    with pytest.raises(KeyboardInterrupt):
        for section, rows in suite.run(cases, replace(FAST, min_samples=10**6, max_seconds=60)):
            sections.append((section, [row["provider"] for row in rows]))
    assert sections == [("bench", ["eager", "dlkernels"])]


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with suite.using_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_overhead_is_measured_for_both() -> None:
    rows = list(suite.overhead([toy()]))
    assert [(row["direction"], row["provider"]) for row in rows] == [
        (direction, name) for direction in (FORWARD, TRAINING) for name in ("eager", "dlkernels")
    ]
    assert all(0 < row["microseconds"] < 1e5 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
def test_torch_compile_takes_part(direction: str, capfd: pytest.CaptureFixture[str]) -> None:
    field = line_up(Case(OPS["linear_relu"], {"M": 16, "K": 64, "N": 32}, torch.float32, direction, compiled=True), "cpu")
    assert set(field.calls) == {"eager", "dlkernels", "compile"} and all(field.agrees.values()), field.failures
    assert "AUTOTUNE" not in capfd.readouterr().err


# results


def test_results_are_saved_after_every_row_and_a_repeated_row_replaces_the_first(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "results.json"
    results = Results(file)
    row = {"op": "toy", "dtype": "float32", "label": "1", "direction": FORWARD, "provider": "eager", "threads": 1, "median_s": 1.0}
    results.add("bench", [row])
    results.add("bench", [{**row, "median_s": 2.0}, {**row, "provider": "dlkernels"}])
    saved = json.loads(file.read_text())
    assert [(r["provider"], r["median_s"]) for r in saved["bench"]] == [("eager", 2.0), ("dlkernels", 1.0)]
    assert saved["schema"] == 1 and set(saved) >= {"machine", "limits", "check", "bench", "models", "overhead", "canary"}
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_json_has_no_nan() -> None:
    assert json.loads(dumps({"a": [math.nan, math.inf, 1.5], "b": (1, None)})) == {"a": [None, None, 1.5], "b": [1, None]}


def test_the_machine_is_described() -> None:
    here = describe()
    assert set(here) >= {"cpu", "isa", "cores", "threads", "memory_gib", "gpu", "torch", "triton", "python", "compiler", "os", "date"}
    assert here["torch"] == torch.__version__ and 0 < here["cores"] <= here["logical_cores"] and here["memory_gib"] > 0
