"""Arguments that several commands share, and what they accept."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch

from ..bench.inputs import DTYPE_NAMES
from ..bench.optimizers import OPTIMIZERS, Optimizer
from ..registry import OPS, Op


def unknown(kind: str, name: str, known: Iterable[str]) -> click.UsageError:
    """The error for a name that does not exist: the nearest one that does, and the list."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return click.UsageError(f"unknown {kind} {name!r}.{hint}\nKnown: {', '.join(known)}")


def find_ops(names: Iterable[str]) -> tuple[list[Op], list[Optimizer]]:
    """The ops and the optimizers of these names, each once; all of them for no name."""
    known = [*OPS, *OPTIMIZERS]
    for name in names:
        if name not in known:
            raise unknown("op", name, known)
    wanted = list(dict.fromkeys(names)) or known
    return [OPS[name] for name in wanted if name in OPS], [OPTIMIZERS[name] for name in wanted if name in OPTIMIZERS]


def find_dtypes(names: Iterable[str]) -> list[torch.dtype] | None:
    """The dtypes of these names; None, which leaves the choice to each op, for no name."""
    return [DTYPE_NAMES[name] for name in dict.fromkeys(names)] or None


class JsonTarget(click.ParamType):
    """A file name, or "-" for standard output."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in OPS or value in OPTIMIZERS:
            self.fail(f"takes a file, and {value!r} is an op: write `{value} --json`, or `--json=-` for standard output", param, ctx)
        if value != "-" and Path(value).is_dir():
            self.fail(f"{value!r} is a folder, it needs a file", param, ctx)
        return str(value)


class Device(click.ParamType):
    """ "cpu", "cuda", "cuda:1": a device that is there."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> torch.device:
        if isinstance(value, torch.device):
            return value
        try:
            device = torch.device(value)
        except RuntimeError:
            self.fail(f"{value!r} is no device; known: cpu, cuda, cuda:1, ...", param, ctx)
        if device.type not in ("cpu", "cuda"):
            self.fail(f"kernels run on cpu and cuda, not on {device.type}", param, ctx)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            self.fail(f"{value} is not there: torch sees {torch.cuda.device_count()} CUDA devices", param, ctx)
        return device


def _threads(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    from ..bench.machine import cores

    available = cores()[0]
    if value is not None and not 1 <= value <= available:
        raise click.BadParameter(f"{value} is not between 1 and {available}, the hardware threads of this machine", ctx, param)
    return value


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

ops_argument: Decorator = click.argument("ops", nargs=-1, metavar="[OP]...")
json_option: Decorator = click.option(
    "--json", "json_target", type=JsonTarget(), is_flag=False, flag_value="-", metavar="[FILE]",
    help="Write JSON to FILE, or without FILE to standard output instead of the tables.",
)  # fmt: skip
dtype_option: Decorator = click.option(
    "--dtype", "dtypes", type=click.Choice(list(DTYPE_NAMES)), multiple=True, help="May be repeated. Default: every dtype the op has."
)
threads_option: Decorator = click.option("--threads", type=int, callback=_threads, help="CPU threads. Default: torch's own choice.")
device_option: Decorator = click.option(
    "--device", type=Device(), default=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    show_default="cuda if there is one, else cpu", help="Where to run.",
)  # fmt: skip
