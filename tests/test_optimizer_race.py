"""benchmarks/optimizers.py: it runs, prints what it measured, and refuses to time a wrong result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import dlkernels

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import optimizers as race


def test_every_race_is_run_and_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(race.SETS, "12 x 1M", [(3, 5)] * 4)
    race.main(["--seconds", "0.001", "--sets", "12 x 1M"])
    lines = capsys.readouterr().out.splitlines()
    for name, (_, variants) in race.OPTIMIZERS.items():
        row = next(line for line in lines if line.startswith(f"{name} ") and " step " in line)
        assert all(f"torch {variant}" in row for variant in variants)
    assert any(line.startswith("AdamW") and " tail " in line and "geometric mean" in line for line in lines)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlkernels.optim.AdamW, "step", lambda self: None)
    with pytest.raises(RuntimeError, match=r"AdamW \(fused\) and ours differ by"):
        race.race("AdamW", [(3, 5)], False, 0.001)
