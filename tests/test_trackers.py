"""What trackers write is read back with their own readers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import dlkernels.nn as nn
from dlkernels import functional as F
from dlkernels import optim
from dlkernels.train import JSONLines, Trainer, make_tracker


def run(folder: Path | None, trackers: Any, epochs: int = 2, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    trainer = Trainer(model, F.cross_entropy, optim.AdamW(model.parameters()), folder=folder, trackers=trackers, log_every=2, **options)
    batches = [(torch.randn(4, 6), torch.arange(4) % 2) for _ in range(4)]
    trainer.fit(batches, batches, epochs=epochs)
    return trainer


def test_json_lines_is_the_default(tmp_path: Path) -> None:
    trainer = run(tmp_path, None, max_norm=1.0)
    head, *lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert head["config"]["optimizer"] == "AdamW"
    assert head["config"]["parameters"] == 14
    assert head["config"]["lr"] == 0.001
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 8, 8]
    assert [line["val_loss"] for line in lines if "val_loss" in line] == trainer.history["val_loss"]
    assert all(line["grad_norm"] > 0 for line in lines if "loss" in line)


def test_json_lines_drops_what_a_killed_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "config": {}}\n{"step": 3, "loss": 1}\n{"step": 5, "loss": 2}\n{"step": 6, "lo')
    tracker = JSONLines(tmp_path)
    tracker.start({}, 4)
    tracker.log(5, {"loss": math.nan})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "config": {}}, {"step": 3, "loss": 1}, {"step": 5, "loss": None}]


def test_a_tracker_of_ones_own() -> None:
    class Mine:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def start(self, config: Mapping[str, Any], step: int) -> None:
            self.calls.append("start")

        def log(self, step: int, numbers: Mapping[str, float]) -> None:
            self.calls.append((step, *numbers))

        def close(self) -> None:
            self.calls.append("close")

    mine = Mine()
    run(None, [mine], epochs=1)
    epoch = (4, "train_loss", "lr", "val_loss", "seconds", "epoch")
    assert mine.calls == ["start", (2, "loss", "lr"), (4, "loss", "lr"), epoch, "close"]


def test_trackers_are_closed_when_training_fails(tmp_path: Path) -> None:
    tracker = JSONLines(tmp_path)
    model = nn.Linear(6, 2)
    trainer = Trainer(model, F.cross_entropy, optim.AdamW(model.parameters()), trackers=[tracker])
    with pytest.raises(RuntimeError):
        trainer.fit([(torch.ones(2, 5), torch.ones(2))], epochs=1)
    assert tracker.file.closed


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = run(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(trainer.history["val_loss"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]


def test_weights_and_biases_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    trainer = run(tmp_path, ["wandb"])
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    raw, written, at = file.read_bytes(), b"", 7  # LevelDB's log: blocks of 32 KiB, in them pieces of records, a header in front of each
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length = int.from_bytes(raw[at + 4 : at + 6], "little")
        written += raw[at + 7 : at + 7 + length]
        at += 7 + length
    assert b"val_loss" in written
    assert all(json.dumps(loss).encode() in written for loss in trainer.history["val_loss"])  # records have numbers as JSON


def test_mlflow_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    trainer = run(tmp_path, ["mlflow"])
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("dlkernels").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer"] == "AdamW"
    history = client.get_metric_history(found.info.run_id, "val_loss")
    assert [metric.value for metric in history] == pytest.approx(trainer.history["val_loss"])


def test_unknown_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with pytest.raises(ValueError, match="unknown tracker 'excel'; known: jsonl, tensorboard, wandb, mlflow"):
        make_tracker("excel", tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="the tracker 'wandb' needs wandb: pip install wandb"):
        make_tracker("wandb", tmp_path)
