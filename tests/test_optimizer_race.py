"""The optimizers in the suite: rows like those of ops, chosen by name, wrong results found, shown by the tables and the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlkernels import optim, report
from dlkernels.bench import optimizers, suite
from dlkernels.bench.optimizers import OPTIMIZERS, STEP, TAIL, Step
from dlkernels.cli import run

FAST = replace(suite.QUICK, min_seconds=0.0, min_samples=3, max_seconds=0.05)
TINY: dict[str, optimizers.Shapes] = {"4 x 15": [(3, 5)] * 4, "2 x 7": [(7,)] * 2}
RACES = [(name, direction) for name, optimizer in OPTIMIZERS.items() for direction in optimizer.directions]
Rows = list[dict[str, Any]]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small sets of parameters, timed hastily."""
    monkeypatch.setattr(suite, "SETS", TINY)
    monkeypatch.setattr(suite, "QUICK_SETS", {"2 x 7": TINY["2 x 7"]})
    monkeypatch.setattr(suite, "MODES", dict.fromkeys(suite.MODES, FAST))


def race(*names: str, mode: suite.Mode = FAST, **options: Any) -> dict[str, Rows]:
    """The sections of the results file."""
    found: dict[str, Rows] = {"bench": [], "failures": [], "skipped": []}
    cases = suite.plan([], mode, optimizers=[OPTIMIZERS[name] for name in names or OPTIMIZERS])
    for section, rows in suite.run(cases, mode, **options):
        found[section] += rows
    return found


def test_rows_are_like_those_of_ops(tiny: None) -> None:
    threads = torch.get_num_threads()
    limits = {
        "flops": [{"dtype": "float32", "threads": threads, "flops_per_s": 1e12}],
        "bandwidth": [{"bytes": 4096, "threads": threads, "bytes_per_s": 1e9, "kind": "copy"}],
    }
    found = race(mode=replace(FAST, name="default"), limits=limits)
    assert not found["failures"] and not found["skipped"]
    rows = found["bench"]
    providers = {name: {"eager", "dlkernels", optimizer.fastest} for name, optimizer in OPTIMIZERS.items()}
    expected = {(name, direction, provider, label) for name, direction in RACES for provider in providers[name] for label in TINY}
    assert {(row["op"], row["direction"], row["provider"], row["label"]) for row in rows} == expected
    for row in rows:
        assert row["ok"] is True and row["dtype"] == "float32" and row["threads"] == threads
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["samples"] >= 3
        numbers = row["size"]["numbers"]
        assert numbers == {"4 x 15": 60, "2 x 7": 14}[row["label"]] and row["flops"] > numbers
        moved = {"sgd": 20}.get(row["op"], 28) + (8 if row["direction"] == TAIL else 0)
        assert row["bytes"] == moved * numbers and row["limit_s"] == pytest.approx(row["bytes"] / 1e9)
        assert row["limit_fraction"] == row["limit_s"] / row["median_s"]
        assert row["vs_eager"] > 0 and (row["provider"] != "eager" or row["vs_eager"] == 1)
    means = suite.geometric_means(rows)
    assert [(mean["op"], mean["direction"], mean["sizes"]) for mean in means] == [(*race, 2) for race in RACES]
    assert all(list(mean["vs_others"]) == [OPTIMIZERS[mean["op"]].fastest] for mean in means)


def test_quick_mode_takes_the_smaller_sets_and_a_spent_budget_names_what_is_missing(tiny: None) -> None:
    assert {row["label"] for row in race("sgd")["bench"]} == {"2 x 7"}
    found = race(mode=replace(FAST, name="default", budget=-1.0))
    assert not found["bench"] and len(found["skipped"]) == len(RACES) * len(TINY)
    assert all("budget" in row["reason"] for row in found["skipped"])


def test_the_real_sets_are_what_they_are_called() -> None:
    sizes = {label: sum(map(torch.Size.numel, map(torch.Size, shapes))) for label, shapes in optimizers.SETS.items()}
    assert sizes == {"12 x 1M": 12 << 20, "GPT 25M": pytest.approx(25.3e6, rel=0.01), "1000 x 1k": 10**6, "10000 x 64": 640_000}
    assert 0 < len(optimizers.QUICK_SETS) < len(optimizers.SETS)


STEPS = {name: getattr(optim, optimizer.cls).step for name, optimizer in OPTIMIZERS.items()}


@pytest.mark.parametrize(
    ("direction", "wrong"),
    [
        (STEP, lambda self: None),
        (STEP, lambda self: STEPS["adamw"](self) if not self.state else None),  # right only once
        (STEP, lambda self: STEPS["adamw"](self, grad_scale=1.01)),
        (TAIL, lambda self, **_: STEPS["adamw"](self)),
        (TAIL, lambda self, grad_scale, max_norm, zero_grad: STEPS["adamw"](self, grad_scale=grad_scale, zero_grad=zero_grad)),
        (TAIL, lambda self, grad_scale, max_norm, zero_grad: STEPS["adamw"](self, grad_scale=grad_scale, max_norm=max_norm)),
    ],
    ids=["nothing", "once", "scaled", "no tail", "no clipping", "no zeroing"],
)
def test_a_wrong_result_is_marked_and_not_counted(direction: str, wrong: Any, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.AdamW, "step", wrong)
    case = Step(OPTIMIZERS["adamw"], "4 x 15", TINY["4 x 15"], direction)
    ((_, rows),) = suite.run([case], FAST)
    assert {row["provider"]: row["ok"] for row in rows} == {"eager": True, "dlkernels": False, "fused": True}
    assert suite.geometric_means(rows) == []
    assert not all(row.ok for row in next(optimizers.check_steps([case])))


def test_one_that_fails_is_recorded_and_the_race_goes_on(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(optim.SGD, "step", broken)
    found = race("sgd")
    assert [(row["provider"], row["error"]) for row in found["failures"]] == [("dlkernels", "RuntimeError: no kernel")]
    assert {row["provider"] for row in found["bench"]} == {"eager", "fused"}


@pytest.mark.parametrize(("name", "direction"), RACES)
def test_every_optimizer_passes_its_check(name: str, direction: str) -> None:
    for rows in optimizers.check_steps(optimizers.steps([replace(OPTIMIZERS[name], directions=(direction,))], optimizers.SAMPLES)):
        assert len(rows) >= 2 and rows[0].quantity == f"param ({direction})"
        assert all(row.ok and row.allowed < 1e-4 for row in rows)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run([*arguments, "--device", "cpu"])
    return code, capsys.readouterr().out


def test_the_commands_take_their_names(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "bench", "adamw", "rmsprop", "--quick", "--json")
    assert code == 0 and {row["op"] for row in json.loads(out)["bench"]} == {"adamw", "rmsprop"}
    code, out = said(capsys, "bench", "adamw", "--quick")
    assert code == 0 and re.search(r"adamw float32 tail\nsize +eager +dlkernels +fused +vs eager +of limit\n2 x 7 ", out)
    assert re.search(r"adamw +float32 +step .* fused [\d.]+x$", out, re.MULTILINE)
    code, out = said(capsys, "check", "sgd")
    assert code == 0 and "4 checks, 0 wrong" in out
    assert run(["info", "adam"]) == 0 and re.search(r"^adam .*kernel", capsys.readouterr().out, re.MULTILINE)


def test_the_report_shows_them(tiny: None, tmp_path: Path, example: dict[str, Any]) -> None:
    example["bench"] += race("adamw", "rmsprop")["bench"]
    page = report.build(example, tmp_path / "index.html").read_text()
    for name, fastest, other in (("adamw", "fused", "foreach"), ("rmsprop", "foreach", "fused")):
        section = page[page.index(f'<div id="op-{name}">') :].split("</details>")[0]
        head = section[section.index("<thead>") :].split("</thead>")[0]
        assert f">{fastest}<" in head and f">{other}<" not in head and ">torch.compile<" not in head  # who took part, and no other
        assert "2 x 7" in section and "<span>step" in section
    op = page[page.index('<div id="op-linear">') :].split("</details>")[0]
    assert ">fused<" not in op and ">torch.compile<" in op
    assert re.search(r"^adamw +float32 +tail ", report.summary(example), re.MULTILINE)


@pytest.fixture
def example() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "data" / "results_example.json").read_text())


def test_the_readme_table_has_a_line_for_each(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from table import every_op, every_optimizer

    assert every_optimizer({"bench": []}) == ""
    results = {"bench": race()["bench"]}
    lines = every_optimizer(results).splitlines()
    assert lines[0] == "| optimizer | torch's default | torch's fastest |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name} {direction}" for name, direction in RACES]
    assert "adamw" not in every_op(results)
