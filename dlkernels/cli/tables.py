"""Results as tables for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..bench.suite import geometric_means
from .output import duration, percent, ratio, table

Rows = Sequence[Mapping[str, Any]]
FIRST = ("eager", "dlkernels", "compile")  # the order of the columns; peers follow


def checks(rows: Rows) -> list[Table | Text]:
    """One line per op and dtype, by the quantity that uses most of what is allowed; then every failure."""
    if not rows:
        return []
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    lines = []
    for (op, dtype), group in groups.items():
        worst = max(group, key=lambda row: row["ours_error"] / row["allowed"] if row["allowed"] else 0.0)
        bad = sum(not row["ok"] for row in group)
        verdict = Text(f"{bad} wrong", style="bold red") if bad else Text("ok", style="green")
        lines.append((op, dtype, verdict, str(len(group)), worst["quantity"], *_errors(worst)))
    columns = ("op", "dtype", "verdict", "checks", "worst", "ours", "native", "allowed")
    shown: list[Table | Text] = [table("Values and gradients against float64 (largest error / largest value)", columns, lines, left=3)]
    failures = [row for row in rows if not row["ok"]]
    if failures:
        bad_lines = [(row["op"], row["dtype"], row["label"], row["quantity"], *_errors(row)) for row in failures[:40]]
        title = "Wrong" if len(failures) <= 40 else f"Wrong: the first 40 of {len(failures)}"
        shown += [Text(), table(title, ("op", "dtype", "size", "what", "ours", "native", "allowed"), bad_lines, left=4)]
    total = Text(f"\n{len(rows)} checks, {len(failures)} wrong", style="bold red" if failures else "bold green")
    return [*shown, total]


def _errors(row: Mapping[str, Any]) -> tuple[str, str, str]:
    ours, native, allowed = (f"{row[name]:.1e}" for name in ("ours_error", "native_error", "allowed"))
    return ours, native, allowed


def race(data: Mapping[str, Any]) -> list[Table | Text]:
    """A table per op, dtype and direction; then the means, the cost of a call, and what is missing."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in data["bench"]:
        groups.setdefault((row["op"], row["dtype"], row["direction"]), []).append(row)
    shown: list[Table | Text] = []
    for key, rows in groups.items():
        shown += [_race(" ".join(key), rows), Text()]
    means = geometric_means(data["bench"])
    if means:
        lines = [
            (
                row["op"],
                row["dtype"],
                row["direction"],
                str(row["sizes"]),
                ratio(row["slowest"]),
                ratio(row["vs_eager"]),
                ratio(row["vs_compile"]),
                ", ".join(f"{name} {mean:.2f}x" for name, mean in row["vs_others"].items()) or "-",
            )
            for row in means
        ]
        columns = ("op", "dtype", "direction", "sizes", "lowest", "eager", "compile", "others")
        shown.append(table("Our speed relative to the others': geometric means over the sizes above", columns, lines, left=3))
    if data["overhead"]:
        costs = [(row["what"], f"{row['microseconds']:.1f}") for row in data["overhead"]]
        shown += [Text(), table("The cost of a call", ("what", "microseconds"), costs)]
    return [*shown, *_missing(data)]


def _race(title: str, rows: Rows) -> Table:
    providers = sorted({row["provider"] for row in rows}, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    sizes: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["flops"]):
        sizes.setdefault(row["label"], {})[row["provider"]] = row
    lines: list[list[str | Text]] = []
    for label, by_provider in sizes.items():
        ours = by_provider.get("dlkernels", {})
        ours = ours if ours.get("ok") else {}  # a wrong result has no speed
        times: list[str | Text] = [_time(by_provider.get(name)) for name in providers]
        lines.append([label, *times, ratio(ours.get("vs_eager")), percent(ours.get("limit_fraction"))])
    return table(title, ("size", *providers, "vs eager", "of limit"), lines)


def _time(row: Mapping[str, Any] | None) -> str | Text:
    if row is None:
        return "-"
    return duration(row["median_s"]) if row["ok"] else Text("wrong", style="bold red")


def _missing(data: Mapping[str, Any]) -> list[Text]:
    lines = [
        Text(f"{row['provider']} failed at {row['op']} {row['label']} {row['dtype']} {row['direction']}: {row['error']}", style="yellow")
        for row in data["failures"]
    ]
    if data["skipped"]:
        measured = sum(row["provider"] == "all" for row in data["skipped"])
        compiled = len(data["skipped"]) - measured
        parts = [f"cases: {measured}" if measured else "", f"torch.compile: {compiled}" if compiled else ""]
        lines.append(Text(f"Left out for time ({', '.join(filter(None, parts))}). --full measures everything.", style="yellow"))
    return [Text(), *lines] if lines else []
