"""`dlkernels train` and `dlkernels tune`."""

import json
from dataclasses import asdict
from typing import Any

import click
import torch

from .options import device_option, json_option, threads_option, unknown
from .output import INTERRUPTED, duration, emit, ratio, remark, table, write_json


@click.command(short_help="Train a teaching model, natively, with dlkernels, or both.")
@click.argument("model")
@click.option("--nn", "world", type=click.Choice(["native", "dlkernels", "both"]), default="both", show_default=True, help="Whose layers.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the model's own recipe.")
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@threads_option
@json_option
def train(model: str, world: str, epochs: int | None, seed: int, device: torch.device, threads: int | None, json_target: str | None) -> int:
    """Train a teaching MODEL on real data, natively, with dlkernels, or both in turns. Ctrl-C keeps the finished epochs."""
    from .. import nn
    from .. import train as training
    from ..models import MODELS

    if model not in MODELS:
        raise unknown("model", model, MODELS)
    if world == "both":
        comparison = training.compare(model, seed=seed, epochs=epochs, device=device, threads=threads)
        rows, interrupted = comparison.rows(), comparison.native.interrupted
    else:
        history = training.train(model, torch.nn if world == "native" else nn, seed=seed, epochs=epochs, device=device, threads=threads)
        rows, interrupted = [asdict(history)], history.interrupted
    if json_target is not None:
        write_json({"models": rows}, json_target)
    if json_target != "-":
        _show(MODELS[model].title, rows)
    return INTERRUPTED if interrupted else 0


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    slowest = next((row["step"]["median_s"] for row in rows if row["provider"] == "eager" and row.get("step")), None)
    lines = [
        (
            row["provider"],
            str(len(row["train_loss"])),
            _last(row["train_loss"], ".4f"),
            _last(row["val_loss"], ".4f"),
            _last(row["val_accuracy"], ".2%"),
            duration(row["seconds"]),
            duration(row["step"]["median_s"]) if row.get("step") else "-",
            ratio(slowest / row["step"]["median_s"] if slowest and row.get("step") else None),
        )
        for row in rows
    ]
    columns = ("layers", "epochs", "train loss", "held-out loss", "accuracy", "time", "one step", "vs eager")
    emit(table(title, columns, lines))


def _last(values: list[float], form: str) -> str:
    return format(values[-1], form) if values else "-"


@click.command(short_help="Measure tile sizes for this GPU.")
@click.option("--seconds", type=click.FloatRange(min=1), default=60.0, show_default=True, help="The time to spend.")
@json_option
def tune(seconds: float, json_target: str | None) -> None:
    """Measure tile sizes for this GPU and write them into the package's table, which every later call reads."""
    if not torch.cuda.is_available():
        raise click.ClickException("tuning measures Triton kernels and needs a CUDA device; torch sees none")
    from ..gpu.tune import main

    written = main(seconds=seconds)
    if json_target is not None:
        write_json(json.loads(written.read_text()), json_target)
    remark(f"wrote {written}")
