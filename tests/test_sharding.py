"""Tensors spread over processes (DTensors): every op on them is what it is of the whole, in values and gradients, or says why it is not."""

from __future__ import annotations

from typing import Any

import pytest
import sharding_worker
from gloo import launch
from support import SMALL, each_op, run_child

from dlkernels.registry import Op

pytestmark = pytest.mark.skipif(SMALL, reason="which kernels run on a part is nothing that the interpreter could change")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every case in two processes: None or the error."""
    return launch(sharding_worker.__file__, 2, tmp_path_factory.mktemp("store"))


@each_op
@pytest.mark.parametrize("layout", ["rows", "whole"])
def test_op(op: Op, layout: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[f"{op.name} {layout}"] is None, outcomes[f"{op.name} {layout}"]["error"]


@pytest.mark.parametrize("case", sharding_worker.CASES)
def test_case(case: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[case] is None, outcomes[case]["error"]


def test_importing_costs_no_dtensor() -> None:
    """torch.distributed.tensor is imported by those who use it, and what is here for it only then."""
    found = "any(name.startswith(('torch.distributed.tensor', 'dlkernels.sharding')) for name in sys.modules)"
    child = run_child(["-c", f"import sys, dlkernels; sys.exit({found})"])
    assert child.returncode == 0, child.stderr
