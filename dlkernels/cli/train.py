"""`dlkernels train` and `dlkernels tune`."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from .. import nn
from .. import train as training
from ..models import MODELS
from ..train.distributed import SPREADS, rank_and_size
from ..train.trainer import PRECISIONS
from .options import device_option, json_option, threads_option, unknown
from .output import INTERRUPTED, duration, emit, ratio, remark, table, write_json

WORLDS = {"native": (torch.nn,), "dlkernels": (nn,), "both": (torch.nn, nn)}
ONE_RUN = {"folder": "--folder", "resume": "--resume", "trackers": "--track", "how": "--spread"}  # what two runs in turns cannot share
TOLD = (ValueError, ImportError, OSError, training.CheckpointError, training.NotFinite)  # errors whose message says it all


@click.command(short_help="Train a teaching model, natively, with dlkernels, or both.")
@click.argument("model")
@click.option("--nn", "world", type=click.Choice(list(WORLDS)), default="both", show_default=True, help="Whose layers.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the model's own recipe.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--schedule", type=click.Choice(training.SCHEDULES), default="cosine", show_default=True, help="Of the learning rate.")
@click.option("--precision", type=click.Choice([str(name or "float32") for name in PRECISIONS]), default="float32", show_default=True,
              help="What is computed in, under autocast.")  # fmt: skip
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches per update.")
@click.option("--max-norm", type=click.FloatRange(min=0, min_open=True), help="Clip gradients to this. Default: the model's own recipe.")
@click.option("--patience", type=click.IntRange(min=1), help="Stop after so many epochs in a row without a lower held-out loss.")
@click.option("--overfit", is_flag=True, help="First learn one batch by heart; train only if that can be done.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="For checkpoints and what trackers write.")
@click.option("--resume", is_flag=True, help="Go on from the folder's last checkpoint, if there is one; more --epochs extend a cosine.")
@click.option("--track", "trackers", type=click.Choice(list(training.TRACKERS)), multiple=True,
              help="Where the numbers go; may be repeated. Default: jsonl if there is a folder.")  # fmt: skip
@click.option("--spread", "how", type=click.Choice(SPREADS[1:]), help="Over the processes that torchrun started.")
@device_option
@threads_option
@json_option
def train(model: str, world: str, seed: int, overfit: bool, device: torch.device, json_target: str | None, **options: Any) -> int:
    """Train a teaching MODEL on real data, natively, with dlkernels, or both in turns. Ctrl-C keeps the finished epochs.

    On two processes: `torchrun --nproc-per-node 2 -m dlkernels train mlp --nn dlkernels --spread ddp`.
    """
    if model not in MODELS:
        raise unknown("model", model, MODELS)
    options["trackers"] = list(dict.fromkeys(options["trackers"]))
    given = {name: value for name, value in options.items() if value not in (None, False, [], "float32")}
    _refuse(world, given)
    if "how" in given:
        device = training.join()
    try:
        if overfit:
            _learn_one_batch(model, world, seed, device)
        rows, interrupted = _run(model, world, seed=seed, device=device, **given)
    except TOLD as error:
        raise click.ClickException(str(error)) from error
    if rank_and_size()[0] == 0:
        if json_target is not None:
            write_json({"models": rows}, json_target)
        if json_target != "-":
            _show(MODELS[model].title, rows)
    if interrupted:
        return INTERRUPTED
    training.leave()
    return 0


def _refuse(world: str, given: Mapping[str, Any]) -> None:
    """Options that do not go together."""
    for name, option in ONE_RUN.items():
        if name in given and world == "both":
            raise click.UsageError(f"{option} is for one run, and --nn both makes two in turns: use --nn native or --nn dlkernels")
        if name in given and name in ("resume", "trackers") and "folder" not in given:
            raise click.UsageError(f"{option} needs --folder")
    if "how" not in given:
        if (processes := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
            raise click.UsageError(f"each of the {processes} processes would train the whole model for itself: add --spread ddp or fsdp")
        return
    if "RANK" not in os.environ:
        raise click.UsageError("--spread needs several processes: start them with `torchrun --nproc-per-node 2 -m dlkernels train ...`")
    if click.get_current_context().get_parameter_source("device") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--spread gives each process its own device: leave out --device")


def _learn_one_batch(model: str, world: str, seed: int, device: torch.device) -> None:
    for layers in WORLDS[world]:
        found = training.learn_one_batch(model, layers, seed=seed, device=device)
        if not found.learned:
            raise click.ClickException(found.text)
        if rank_and_size()[0] == 0:
            remark(found.text)


def _run(model: str, world: str, **options: Any) -> tuple[list[dict[str, Any]], bool]:
    """A row for each history, and whether Ctrl-C came."""
    if world == "both":
        comparison = training.compare(model, **options)
        return comparison.rows(), comparison.native.interrupted
    history = training.train(model, *WORLDS[world], **options)
    return [asdict(history)], history.interrupted


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
