"""Checkpoints survive full disks and are refused when truncated, tampered with, or of another model."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import dlkernels.nn as nn
from dlkernels import functional as F
from dlkernels import optim
from dlkernels.train import Batches, CheckpointError, Trainer, checkpoint, make_schedule, sharded


class Evil:
    """Code that would run when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 20 kB: a write fails in the middle of the file, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def trainer_of(folder: Path, width: int = 64, make: Any = optim.AdamW) -> Trainer:
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.LinearReLU(20, width), nn.Linear(width, 2))
    return Trainer(model, F.cross_entropy, make(model.parameters(), lr=0.01), folder=folder, trackers=[])


def batches() -> Batches:
    return Batches(torch.randn(32, 20, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 2, 8)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_round_trip(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": [1, 2.5, "c", None, {"d": (1, 2)}]}
    checkpoint.save(state, tmp_path / "x.pt")
    loaded = checkpoint.load(tmp_path / "x.pt")
    assert torch.equal(loaded["a"], state["a"])  # type: ignore[arg-type]
    assert loaded["b"] == state["b"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, full_disk: None) -> None:
    checkpoint.save({"a": torch.zeros(10)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*x.pt: .*; the one before is untouched"):
        checkpoint.save({"a": torch.ones(100_000)}, tmp_path / "x.pt")
    assert torch.equal(checkpoint.load(tmp_path / "x.pt")["a"], torch.zeros(10))
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_run_whose_disk_fills_can_go_on_from_before(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first = trainer_of(tmp_path)
    first.fit(batches(), epochs=2)
    request.getfixturevalue("full_disk")
    with pytest.raises(CheckpointError, match="cannot write"):
        first.fit(batches(), epochs=3)
    again = trainer_of(tmp_path)
    assert again.keeper is not None
    assert again.keeper.resume()
    assert again.progress.epoch == 2


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory"):
        checkpoint.save({}, tmp_path / "nowhere" / "x.pt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "x.pt")


def test_ctrl_c_while_writing_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({}, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "code", "text", "no dict"])
def test_damaged_checkpoints_change_nothing(how: str, tmp_path: Path) -> None:
    trainer_of(tmp_path).fit(batches(), epochs=1)
    path = tmp_path / "last.pt"
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        weight = checkpoint.load(path)["model"]["0.weight"]
        raw[raw.find(weight.numpy().tobytes()[:64])] ^= 1
        path.write_bytes(raw)
    elif how == "code":
        torch.save({"model": Evil()}, path)
    elif how == "text":
        path.write_text("not a checkpoint\n" * 100)
    else:
        torch.save([1, 2, 3], path)
    again = trainer_of(tmp_path)
    before = weights(again)
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        again.fit(batches(), epochs=2, resume=True)
    assert torch.equal(weights(again), before)
    assert not again.optimizer.state
    assert again.progress.step == 0
    assert not Path("evil").exists()


@pytest.mark.parametrize("other", ["width", "optimizer", "keys"])
def test_of_another_model(other: str, tmp_path: Path) -> None:
    trainer_of(tmp_path).fit(batches(), epochs=1)
    again = trainer_of(tmp_path, width=32) if other == "width" else trainer_of(tmp_path)
    if other == "optimizer":
        again.optimizer = optim.AdamW([{"params": [p]} for p in again.model.parameters()])
    elif other == "keys":
        state = checkpoint.load(tmp_path / "last.pt")
        del state["history"]
        checkpoint.save(state, tmp_path / "last.pt")
    before = weights(again)
    messages = {"width": r"0\.weight is \(64, 20\), needs \(32, 20\)", "optimizer": "of another optimizer: ", "keys": "it lacks history"}
    with pytest.raises(CheckpointError, match=messages[other]):
        again.fit(batches(), epochs=2, resume=True)
    assert torch.equal(weights(again), before)
    assert not again.optimizer.state


def test_of_a_model_with_other_layers(tmp_path: Path) -> None:
    trainer_of(tmp_path).fit(batches(), epochs=1)
    model = torch.nn.Sequential(nn.Linear(20, 2))
    again = Trainer(model, F.cross_entropy, optim.AdamW(model.parameters()), folder=tmp_path, trackers=[])
    with pytest.raises(CheckpointError, match=r"of another model: it lacks nothing and has \['1.bias', '1.weight'\] besides"):
        again.fit(batches(), epochs=2, resume=True)


def scheduled(folder: Path, make: Callable[[torch.optim.Optimizer], Any]) -> Trainer:
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.Linear(20, 2))
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, F.cross_entropy, optimizer, scheduler=make(optimizer), folder=folder, trackers=[])


def named(name: str, epochs: int = 3, accumulate: int = 1) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: make_schedule(name, optimizer, epochs, 4 // accumulate)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (named("cosine"), named("one_cycle"), "there the schedule is CosineAnnealingLR, here OneCycleLR"),
        (named("cosine"), named("constant"), "there the schedule is CosineAnnealingLR, here none"),
        (named("constant"), named("plateau"), "there the schedule is none, here ReduceLROnPlateau"),
        (named("one_cycle"), named("one_cycle", 6), "the total_steps of OneCycleLR is 12, here 24 .which follows from epochs"),
        (named("one_cycle"), named("one_cycle", 3, 2), "the total_steps of OneCycleLR is 12, here 6 .which follows from epochs"),
        (named("plateau"), lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2), "the patience of ReduceLROnPlateau is 5, here 2"),
        (named("cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, 3, eta_min=1e-3), "the eta_min of .* is 0.0, here 0.001"),
    ],
)  # fmt: skip
def test_of_another_schedule(first: Any, second: Any, message: str, tmp_path: Path) -> None:
    scheduled(tmp_path, first).fit(batches(), epochs=1)
    again = scheduled(tmp_path, second)
    before = weights(again)
    with pytest.raises(CheckpointError, match=rf"last\.pt is of another schedule: .*{message}.*; keep it, or begin anew"):
        again.fit(batches(), epochs=6, resume=True)
    assert torch.equal(weights(again), before)
    assert not again.optimizer.state


@pytest.mark.parametrize(("epochs", "reached"), [(6, 3), (6, 2), (4, 1), (2, 1)])
def test_a_cosine_may_become_longer_or_shorter(epochs: int, reached: int, tmp_path: Path) -> None:
    """The rates that are left are those of a run that had this length from the start, twice over."""
    whole = scheduled(tmp_path / "whole", named("cosine", epochs)).fit(batches(), epochs=epochs)["lr"]
    scheduled(tmp_path, named("cosine", 3)).fit(batches(), epochs=reached)
    for until in (min(reached + 1, epochs), epochs):
        again = scheduled(tmp_path, named("cosine", epochs))
        found = again.fit(batches(), epochs=until, resume=True)["lr"]
    assert found[reached:] == pytest.approx(whole[reached:], abs=1e-12)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_that_lack_something(tmp_path: Path) -> None:
    first = trainer_of(tmp_path)
    sharded.save(first.model, first.optimizer, {"progress": {}, "history": {}, "random": []}, tmp_path, "last", 1)
    again = trainer_of(tmp_path, width=32)
    with pytest.raises(CheckpointError, match="last is no checkpoint of this run: it lacks loss_sums, scaler, schedule, scheduler"):
        again.fit(batches(), epochs=1, resume=True)


def test_the_sum_of_losses_is_kept_once(tmp_path: Path) -> None:
    trainer_of(tmp_path).fit(batches(), epochs=1)
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["loss_sums"] == [0.0]
    assert "loss_sum" not in state["progress"]


def test_a_run_may_go_on_in_another_precision(tmp_path: Path) -> None:
    for epochs, precision in enumerate((None, "float16", "bfloat16"), start=1):
        new = trainer_of(tmp_path)
        again = Trainer(new.model, new.loss, new.optimizer, precision=precision, folder=tmp_path, trackers=[])
        assert len(again.fit(batches(), epochs=epochs, resume=True)["lr"]) == epochs
