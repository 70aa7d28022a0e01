"""Where the numbers of a run go: a line of JSON each by default; TensorBoard, Weights & Biases and MLflow where they are installed.

A tracker of your own needs three methods; see ``Tracker``. All of these write to the run's folder and send nothing anywhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """What the trainer asks of a tracker."""

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """The run begins, or goes on after ``step`` updates; numbers of later steps that an interrupted run logged are void."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers by name, after ``step`` updates."""

    def close(self) -> None:
        """The run is over, well or not."""


class JSONLines:
    """``metrics.jsonl``: a line {"step": ..., "loss": ...} per call, complete on the disk when the call returns. NaN is null."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def start(self, config: Mapping[str, Any], step: int) -> None:
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept or [json.dumps({"step": 0, "config": dict(config)})]))
        self.file = self.path.open("a")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that a killed run left unfinished."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Event files in ``tensorboard/``: look at them with ``tensorboard --logdir``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the import fails where tensorboard is missing

        self.writer_class, self.folder = SummaryWriter, folder / "tensorboard"

    def start(self, config: Mapping[str, Any], step: int) -> None:
        self.writer = self.writer_class(str(self.folder), purge_step=step or None)
        self.writer.add_text("config", "\n".join(f"* {name}: {value}" for name, value in config.items()), step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """``wandb/``, offline unless WANDB_MODE says otherwise; ``wandb sync`` uploads it later."""

    def __init__(self, folder: Path) -> None:
        import wandb

        self.wandb, self.folder = wandb, folder

    def start(self, config: Mapping[str, Any], step: int) -> None:
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        settings = self.wandb.Settings(console="off", silent=True)
        self.run = self.wandb.init(project=os.environ.get("WANDB_PROJECT", "dlkernels"), dir=self.folder, mode=mode, settings=settings)
        self.run.config.update(dict(config))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """``mlflow.db`` (SQLite), unless MLFLOW_TRACKING_URI names another store: look at it with ``mlflow ui --backend-store-uri``."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow

        store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        self.client, self.artifacts = mlflow.MlflowClient(tracking_uri=store), (folder / "mlflow_artifacts").absolute()

    def start(self, config: Mapping[str, Any], step: int) -> None:
        found = self.client.get_experiment_by_name("dlkernels")
        experiment = found.experiment_id if found else self.client.create_experiment("dlkernels", self.artifacts.as_uri())
        self.run = self.client.create_run(experiment).info.run_id
        for name, value in config.items():
            self.client.log_param(self.run, name, value)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


TRACKERS: dict[str, tuple[Callable[[Path], Tracker], str]] = {
    "jsonl": (JSONLines, ""),
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


def make_tracker(name: str, folder: Path) -> Tracker:
    """The tracker of this name, which writes into ``folder``.

    Raises:
        ValueError: there is no such tracker.
        ImportError: it is not installed; the message says how to.
    """
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker {name!r}; known: {', '.join(TRACKERS)}")
    make, package = TRACKERS[name]
    try:
        return make(folder)
    except ImportError as error:
        raise ImportError(f"the tracker {name!r} needs {package}: pip install {package}") from error
