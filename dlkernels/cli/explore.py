"""`dlkernels info` and `dlkernels show`: what is here, and how it is made."""

from dataclasses import asdict
from typing import Any

import click
import torch
from rich.syntax import Syntax
from rich.text import Text

from .. import backend
from .. import show as sources
from ..bench import machine
from ..bench.inputs import arguments, dtype_name
from ..bench.optimizers import OPTIMIZERS, Optimizer
from ..registry import FLOATS, OPS, Op
from .options import find_ops, json_option, ops_argument, unknown
from .output import console, emit, facts, remark, table, write_json


@click.command(short_help="Versions, ISA, GPU; which implementation each op gets.")
@ops_argument
@json_option
def info(ops: tuple[str, ...], json_target: str | None) -> None:
    """Versions, instruction sets, GPU, and which implementation each op and optimizer gets and why."""
    found, optimizers = find_ops(ops)
    here = machine.describe()
    isas = backend.supported_isas()
    choices = [row for op in found for row in _choices(op)] + [row for optimizer in optimizers for row in _kernels(optimizer)]
    if json_target is not None:
        write_json({"machine": here, "supported_isas": isas, "ops": choices}, json_target)
    if json_target == "-":
        return
    emit(
        facts(
            {
                "dlkernels": here["dlkernels"],
                "torch": here["torch"],
                "triton": here["triton"] or "not installed",
                "python": here["python"],
                "cpu": f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads in use",
                "isa in use": f"{here['isa']} (DLKERNELS_ISA forces one of: {', '.join(isas)})",
                "gpu": here["gpu"] or "none; the Triton kernels wait for one",
                "memory": f"{here['memory_gib']} GiB",
                "compiler": here["compiler"],
                "os": here["os"],
            }
        ),
        "",
        table(
            "What a call runs",
            ("op", "device", "dtypes", "implementation", "why"),
            [(row["op"], row["device"], " ".join(row["dtypes"]), row["implementation"], row["reason"]) for row in choices],
            left=5,
        ),
    )


def _choices(op: Op) -> list[dict[str, Any]]:
    """One row per device and implementation: the dtypes that get it, and why."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for device in _devices():
        for dtype in op.dtypes:
            choice = backend.explain(op.name, *arguments(op, op.samples[0], dtype, device))
            rows.setdefault((device, choice.implementation, choice.reason), []).append(dtype_name(dtype))
    return [
        {"op": op.name, "device": device, "dtypes": dtypes, "implementation": implementation, "reason": reason}
        for (device, implementation, reason), dtypes in rows.items()
    ]


def _kernels(optimizer: Optimizer) -> list[dict[str, Any]]:
    """One row per device: every dtype has a kernel there."""
    dtypes = [dtype_name(dtype) for dtype in FLOATS]
    return [{"op": optimizer.name, "device": device, "dtypes": dtypes, **asdict(backend.kernel_on(device))} for device in _devices()]


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@click.command(short_help="The source of an op or optimizer, or what it compiles to.")
@click.argument("op")
@click.option("--contract", "view", flag_value="contract", default=True, help="Maths, shapes, autograd Function, cost (default).")
@click.option("--cpu", "view", flag_value="cpu", help="The C++ SIMD kernel.")
@click.option("--gpu", "view", flag_value="gpu", help="The Triton kernel.")
@click.option("--asm", "view", flag_value="asm", help="The C++ kernel's machine code, from the loaded library.")
@click.option("--ptx", "view", flag_value="ptx", help=f"The Triton kernel compiled for {sources.GPU_TARGET}.")
@click.option("--sass", "view", flag_value="sass", help=f"The Triton kernel's machine code for {sources.GPU_TARGET}.")
@json_option
def show(op: str, view: str, json_target: str | None) -> None:
    """Print the source of OP that a learner wants, or what it compiles to."""
    try:
        found = sources.find(op)
    except KeyError:
        raise unknown("op", op, [*OPS, *OPTIMIZERS]) from None
    try:
        listings = sources.pages(found, view)
    except (sources.NotAvailable, RuntimeError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    if json_target is not None:
        write_json({"op": found.name, "view": view, "pages": [asdict(page) for page in listings]}, json_target)
    if json_target == "-":
        return
    out = console()
    for page in listings:
        if not out.is_terminal:  # through a pipe a source is exactly its text
            click.echo(page.text.rstrip("\n"))
            continue
        out.print(Text(f"{page.title}  ({page.origin})", style="bold"))
        out.print(Syntax(page.text, page.language, theme="ansi_dark", background_color="default", word_wrap=True))
    if not out.is_terminal:
        remark(", ".join(dict.fromkeys(page.origin for page in listings)))
    remark(f"see also --{', --'.join(other for other in sources.VIEWS if other != view)}")
