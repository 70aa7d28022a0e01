"""The loop on 2 and 4 processes gives what one gives, goes on from what other numbers of them left, and outlives a killed worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import training_worker
from gloo import ENVIRONMENT, launch
from support import SMALL
from training_worker import HOW, OPTIMIZERS, WAYS, WORLDS

pytestmark = pytest.mark.skipif(SMALL, reason="how processes share work is nothing that the interpreter could change")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By number of processes what came of every case; "go on" trains one epoch in four, the second in two, the third in one."""
    folder = tmp_path_factory.mktemp("processes")
    return {size: launch(training_worker.__file__, size, folder) for size in (4, 2, 1)}


def value(outcome: Any) -> Any:
    assert not (isinstance(outcome, dict) and "error" in outcome), outcome["error"]
    return outcome


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", HOW)
def test_losses_are_those_of_one_process(how: str, way: str, size: int, outcomes: dict[int, dict[str, Any]]) -> None:
    found, wanted = value(outcomes[size][f"{how} {way}"]), value(outcomes[1][f"none {way}"])
    tolerance = 0.01 if way == "bfloat16" else 1e-9
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], rel=tolerance)
    if way == "bfloat16":
        exact = value(outcomes[1]["none clipped"])["train_loss"]
        assert found["train_loss"] != pytest.approx(exact, rel=1e-6), "nothing was computed in bfloat16"


def test_checkpoints_can_be_read_by_another_number_of_processes(outcomes: dict[int, dict[str, Any]]) -> None:
    at_once = value(outcomes[1]["at once"])
    assert value(outcomes[1]["go on"]) == pytest.approx(at_once, rel=1e-9)
    assert len(at_once) == 3


@pytest.mark.parametrize("size", [2, 4])
def test_what_the_first_process_tracks_is_written_when_any_returns(size: int, outcomes: dict[int, dict[str, Any]]) -> None:
    assert value(outcomes[size]["tracked"])


@pytest.mark.parametrize("size", [2, 4])
def test_batch_norm_under_fsdp_in_bfloat16(size: int, outcomes: dict[int, dict[str, Any]]) -> None:
    native, ours = (value(outcomes[size][f"batch norm {name}"]) for name in WORLDS)
    assert ours == pytest.approx(native, rel=0.02)
    assert ours == sorted(ours, reverse=True)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_on_local_parts(name: str, size: int, outcomes: dict[int, dict[str, Any]]) -> None:
    value(outcomes[size][name])


@pytest.mark.parametrize("size", [2, 4])
def test_moments_in_bfloat16(size: int, outcomes: dict[int, dict[str, Any]]) -> None:
    assert value(outcomes[size]["moments in bfloat16"]) == value(outcomes[2]["moments in bfloat16"])


def torchrun(folder: Path, how: str, restarts: int) -> subprocess.CompletedProcess[str]:
    options = ["--nproc-per-node=2", f"--max-restarts={restarts}", "--standalone", "--monitor-interval=0.2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, training_worker.__file__, str(folder), how]
    return subprocess.run(command, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_killed_worker_ends_the_job_and_a_restart_goes_on(how: str, tmp_path: Path) -> None:
    first = torchrun(tmp_path, how, restarts=0)  # hangs until the timeout if the other process waited for the dead one
    assert first.returncode != 0
    assert "SIGKILL" in first.stderr, first.stderr[-3000:]
    assert not (tmp_path / "history.json").exists()

    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "killed").touch()  # nobody is killed
    assert torchrun(whole, how, restarts=0).returncode == 0
    (tmp_path / "killed").unlink()  # kill again, right where the first was; torchrun starts all processes anew
    second = torchrun(tmp_path, how, restarts=1)
    assert second.returncode == 0, second.stderr[-3000:]
    found, wanted = (json.loads((folder / "history.json").read_text()) for folder in (tmp_path, whole))
    for name in ("train_loss", "val_loss"):
        assert found[name] == wanted[name]


LEAVING = """
import os, sys, torch
from dlkernels.train import join, leave, spread

def threads():
    return [name for t in os.listdir("/proc/self/task") for name in [open(f"/proc/self/task/{t}/comm").read()] if "gloo" in name]

join()
model = spread(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), sys.argv[1])
model(torch.ones(2, 4)).sum().backward()
assert threads()
leave()
assert not threads()
if sys.argv[1] == "ddp":
    model.module(torch.ones(2, 4)).sum().backward()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have names in /proc")
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_no_thread_of_the_group_outlives_it(how: str) -> None:
    """One that takes the interpreter's lock while that comes to its end would abort the process."""
    env = {**ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    left = subprocess.run([sys.executable, "-c", LEAVING, how], env=env, capture_output=True, text=True, timeout=60)
    assert left.returncode == 0, left.stderr[-3000:]
