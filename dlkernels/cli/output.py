"""How the commands talk: tables on standard output, progress and remarks on standard error, JSON where it is asked for."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from ..bench.results import dumps

INTERRUPTED = 130  # the exit code after Ctrl-C: 128 + SIGINT, as shells have it
PIPE_WIDTH = 160  # a file has no edge to wrap at


def console() -> Console:
    """Standard output; without colour and with room for every column where it is not a terminal."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPE_WIDTH)


def emit(*parts: RenderableType) -> None:
    """Print to standard output; through a pipe without the blanks that pad a table's lines."""
    out = console()
    if out.is_terminal:
        out.print(*parts, sep="\n")
        return
    with out.capture() as captured:
        out.print(*parts, sep="\n")
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def remark(text: str) -> None:
    """A line for the person, not for the pipe."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(text, style="dim"))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], left: int = 1) -> Table:
    """A table whose first `left` columns are words and whose others are numbers."""
    result = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0)
    )
    for number, name in enumerate(columns):
        result.add_column(name, justify="left" if number < left else "right", no_wrap=number >= left, overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def write_json(value: Any, target: str) -> None:
    """Write to the file `target`, or to standard output for "-"."""
    if target == "-":
        click.echo(dumps(value))
        return
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(dumps(value) + "\n")
    except OSError as error:
        raise click.ClickException(f"cannot write {target}: {error.strerror}") from error
    remark(f"wrote {target}")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error, where that is a terminal, else one line; yields update(done, total, what)."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    shown = Console(file=sys.stderr)
    if not shown.is_terminal:
        remark(f"{title} ...")
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task(title, total=None, what="")

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, what=what)

        yield update


def duration(seconds: float | None) -> str:
    """12.3 us, 4.56 ms, 1.20 s: three digits."""
    if seconds is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{three_digits(seconds / unit)} {name}"
    return f"{seconds * 1e9:.0f} ns"


def three_digits(value: float) -> str:
    """4.56, 45.6, 456."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def ratio(value: float | None) -> Text:
    """How many times as fast as the opponent; green where we win, red where we lose."""
    if value is None:
        return Text("-")
    return Text(f"{value:.2f}x", style="green" if value >= 1 else "red")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def facts(pairs: Mapping[str, object]) -> Table:
    """Name and value, line by line; what is None or empty is left out."""
    result = Table.grid(padding=(0, 2, 0, 0))
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in pairs.items():
        if value not in (None, ""):
            result.add_row(name, str(value))
    return result
