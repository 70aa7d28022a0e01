"""`dlkernels check`, `dlkernels bench` and `dlkernels report`."""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch

from ..bench import check as checking
from ..bench import suite
from ..bench.inputs import DTYPE_NAMES
from ..bench.optimizers import SAMPLES, Optimizer, check_steps, steps
from ..bench.results import Results, Row
from ..bench.timing import Timing, canary, is_busy
from ..registry import Op
from . import tables
from .options import device_option, dtype_option, find_dtypes, find_ops, json_option, ops_argument, threads_option
from .output import emit, progress, remark, write_json

FAILED = 1


@click.command(short_help="Values and every gradient against float64.")
@ops_argument
@dtype_option
@device_option
@threads_option
@json_option
def check(ops: tuple[str, ...], dtypes: tuple[str, ...], device: torch.device, threads: int | None, json_target: str | None) -> int:
    """Compare values and every gradient, and what the optimizers' steps lead to, with float64, beside native PyTorch's own error. Exit code
    1 if one is off.

    The rule: |ours - exact| <= 2 |native - exact| + 1e-5 max|exact|; 3 instead of 2 for gradients in half types.
    """
    found = find_ops(ops)
    results = Results()
    try:
        with suite.using_threads(threads):
            run_check(results, *found, find_dtypes(dtypes), device)
    finally:  # Ctrl-C included: what is finished is shown
        _deliver(results, json_target, tables.checks(results.data["check"]))
    return FAILED if any(not row["ok"] for row in results.data["check"]) else 0


@click.command(short_help="Race ops and optimizers against native PyTorch.")
@ops_argument
@click.option("--quick", "mode", flag_value="quick", help="The short list of sizes: under a minute.")
@click.option("--full", "mode", flag_value="full", help="Every size, dtype and opponent, without a time limit.")
@dtype_option
@device_option
@threads_option
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="Race torch.compile everywhere or nowhere. Default: at headline sizes."
)
@json_option
def bench(
    ops: tuple[str, ...],
    mode: str | None,
    dtypes: tuple[str, ...],
    device: torch.device,
    threads: int | None,
    compiled: bool | None,
    json_target: str | None,
) -> int:
    """Race ops and optimizers against native PyTorch, beside this machine's measured limit.

    All opponents are timed in turns, sample by sample, in one process; the table shows medians. Ctrl-C keeps what is finished; with
    --json FILE the file is written after every row.
    """
    found = find_ops(ops)
    results = _open(None if json_target in (None, "-") else Path(json_target))
    try:
        with suite.using_threads(threads):
            run_bench(results, *found, suite.MODES[mode or "default"], find_dtypes(dtypes), device, compiled)
    finally:
        _deliver(results, "-" if json_target == "-" else None, tables.race(results.data))
    return FAILED if any(not row["ok"] for row in results.data["bench"] if row["provider"] == "dlkernels") else 0


@click.command(short_help="Check, measure, train; one HTML page.")
@click.option("--quick", is_flag=True, help="Short lists and few epochs: under three minutes instead of ten.")
@click.option("-o", "--out", "--output", "out", type=click.Path(path_type=Path), default=Path("report"), show_default=True,
              help="The folder, or the .html file in it.")  # fmt: skip
@device_option
@threads_option
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="Race torch.compile everywhere or nowhere. Default: at headline sizes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of the summary.")
def report(quick: bool, out: Path, device: torch.device, threads: int | None, compiled: bool | None, as_json: bool) -> int:
    """Check, measure and train on this machine; write one HTML page, and the results beside it, and print its path."""
    from .. import report as reporting

    page = out if out.suffix == ".html" else out / "index.html"
    results = _open(page.with_name("results.json"))
    try:
        with suite.using_threads(threads):
            run_check(results, *find_ops(()), None, device)
            run_bench(results, *find_ops(()), suite.MODES["quick" if quick else "default"], None, device, compiled)
            run_models(results, device, quick)
    finally:
        reporting.build(results.data, page)
        if as_json:
            write_json(results.data, "-")
        else:
            click.echo(reporting.summary(results.data))
            click.echo(f"\nreport: {page.resolve()}")
    return FAILED if any(not row["ok"] for row in results.data["check"]) else 0


def run_check(
    results: Results,
    ops: Sequence[Op],
    optimizers: Sequence[Optimizer],
    dtypes: Sequence[torch.dtype] | None,
    device: torch.device,
) -> None:
    """Fill the section "check"."""
    wanted = dtypes or list(DTYPE_NAMES.values())
    samples = steps(optimizers, SAMPLES, wanted)
    total = checking.count(ops, wanted) + len(samples)
    with progress("checking") as update:
        update(0, total, "")
        rows: list[Row] = []
        try:
            for number, group in enumerate(chain(checking.run(ops, wanted, device), check_steps(samples, device))):
                update(number + 1, total, f"{group[0].op} {group[0].label} {group[0].dtype}" if group else "")
                rows += [row.as_json() for row in group]
        finally:
            results.add("check", rows)


def run_bench(
    results: Results,
    ops: Sequence[Op],
    optimizers: Sequence[Optimizer],
    mode: suite.Mode,
    dtypes: Sequence[torch.dtype] | None,
    device: torch.device,
    compiled: bool | None,
) -> None:
    """Fill the sections "limits", "bench", "overhead" and "canary"; results are saved after every row."""
    before = canary()
    results.set("machine", {**results.data["machine"], "threads": torch.get_num_threads()})
    limits = None
    if device.type == "cpu":
        from ..bench.limits import measure

        with progress("limits") as update:
            limits = measure([torch.get_num_threads()], mode.name == "quick", update)
        results.set("limits", limits)
    with progress("racing") as update:
        cases = suite.plan(ops, mode, dtypes, compiled, optimizers)
        for section, rows in suite.run(cases, mode, device=device, limits=limits, progress=update):
            results.add(section, rows)
    results.add("overhead", suite.overhead(ops, device))
    _note_canary(results, before, canary())


def _note_canary(results: Results, before: Timing, after: Timing) -> None:
    busy = is_busy(before, after)
    results.set("canary", {"before_s": before.median, "after_s": after.median, "busy": busy})
    if busy:
        remark("a fixed calculation did not always take the same time: something else is running here, so distrust small differences")


def run_models(results: Results, device: torch.device, quick: bool) -> None:
    """Fill the section "models": every teaching model, trained natively and with dlkernels."""
    from ..models import MODELS
    from ..train import compare

    for spec in MODELS.values():
        epochs = max(1, math.ceil(spec.epochs / 5)) if quick else None
        remark(f"training {spec.name} ...")
        comparison = compare(spec, epochs=epochs, device=device, min_seconds=0.5 if quick else 1.0)
        results.add("models", comparison.rows())
        if comparison.native.interrupted:
            raise KeyboardInterrupt


def _open(path: Path | None) -> Results:
    """Results that save themselves to `path`; says at once where that cannot be done, and not after the work."""
    results = Results(path)
    try:
        results.save()
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    return results


def _deliver(results: Results, json_target: str | None, shown: Sequence[Any]) -> None:
    """Show tables, or JSON where it was asked for."""
    if json_target is not None:
        write_json(results.data, json_target)
    if json_target == "-":
        return
    emit(*(shown or ["nothing was measured"]))
    if results.path is not None:
        remark(f"wrote {results.path}")
