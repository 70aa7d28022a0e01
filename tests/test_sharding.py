"""Tensors spread over processes (DTensors): every op on them is what it is of the whole, in values and gradients, or says why it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharding_worker
from support import SMALL, each_op, run_child

from dlkernels.registry import Op

PROCESSES = 2
pytestmark = pytest.mark.skipif(SMALL, reason="which kernels run on a part is nothing that the interpreter could change")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came of every case in two processes, which run all of them one after the other: "" or the error."""
    command = [sys.executable, sharding_worker.__file__]
    store = str(tmp_path_factory.mktemp("store") / "store")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(PROCESSES), store],
            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    try:
        ends = [worker.communicate(timeout=200) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * PROCESSES, ends[0][1][-3000:] + ends[1][1][-3000:]
    return json.loads(ends[0][0].splitlines()[-1])


@each_op
@pytest.mark.parametrize("layout", ["rows", "whole"])
def test_op(op: Op, layout: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[f"{op.name} {layout}"], outcomes[f"{op.name} {layout}"]


@pytest.mark.parametrize("case", sharding_worker.CASES)
def test_case(case: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[case], outcomes[case]


def test_importing_costs_no_dtensor() -> None:
    """torch.distributed.tensor is imported by those who use it, and what is here for it only then."""
    found = "any(name.startswith(('torch.distributed.tensor', 'dlkernels.sharding')) for name in sys.modules)"
    child = run_child(["-c", f"import sys, dlkernels; sys.exit({found})"])
    assert child.returncode == 0, child.stderr
