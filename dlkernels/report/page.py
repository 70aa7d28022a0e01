"""The page: what each section shows, computed here; how it looks is in templates/."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from dlkernels.report import charts, text, units
from dlkernels.report.data import DTYPES, EAGER, OURS, SCHEMA, Panel, Results, geomean, rank, read
from dlkernels.report.records import Check, ModelRun
from dlkernels.report.svg import MARKS

MANY_PANELS = 32  # with more, a plot needs four sizes, so that a file of all ops stays a page a phone opens gladly


def build(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report of a results object to `path`, creating its folder, and return the path.

    The page needs no network. A missing or partial section becomes a note. Raises TypeError where `results` is not a mapping.
    """
    data = read(results)
    html = template().render(content(data))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html, encoding="utf-8")
    return target


@cache
def template() -> Template:
    """The page's template; autoescape is on, so text from a results file stays text."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(units=units, marks=MARKS)
    return environment.get_template("page.html")


def summary(results: Mapping[str, Any]) -> str:
    """The findings as plain text for a terminal: sentences, then the geometric means of each op. Raises TypeError as build() does."""
    return text.summary_text(read(results))


@dataclass(frozen=True)
class Bar:
    """A ratio as a bar from the centre line at 1.0; `left` and `width` in percent of the track, on a logarithmic scale."""

    left: float
    width: float
    winner: str  # "ours" or "native"


@dataclass(frozen=True)
class CheckGroup:
    """Checks that share a line of the table, by the one that uses most of what is allowed."""

    worst: Check
    total: int
    failed: int


@dataclass(frozen=True)
class Drawing:
    title: str
    svg: Markup


def content(data: Results) -> dict[str, Any]:
    """Everything the template asks for."""
    look = charts.styles(data.providers)
    octaves = bar_octaves(data)
    ops: dict[str, list[tuple[Panel, Markup | None]]] = {}
    least = 2 if len(data.panels) <= MANY_PANELS else 4
    for panel in data.panels:
        ops.setdefault(panel.op, []).append((panel, charts.race_chart(panel, look, least)))
    return {
        "data": data,
        "look": look,
        "title": data.machine.get("cpu") or "this machine",
        "headline": text.headline(data),
        "warnings": warnings(data),
        "facts": facts(data),
        "ops": ops,
        "several_threads": len({panel.threads for panel in data.panels}) > 1,
        "octaves": octaves,
        "opponents": [name for name in data.providers if name not in (OURS, EAGER) and any(name == t.provider for t in data.timings)],
        "raced": [name for name in data.providers if any(name == t.provider for t in data.timings)],
        "raced_at": {op: [name for name in data.providers if any((op, name) == (t.op, t.provider) for t in data.timings)] for op in ops},
        "bar": lambda value: ratio_bar(value, octaves),
        "eager": EAGER,
        "ours": OURS,
        "geomean": geomean,
        "rooflines": rooflines(data, look),
        "checks": check_groups(data, by_quantity=False),
        "all_checks": check_groups(data, by_quantity=True),
        "models": {model: model_view(runs, look) for model, runs in data.models.items()},
        "slowest_call": max((us for *_, us in data.overhead), default=0.0),
    }


def warnings(data: Results) -> list[str]:
    """What the reader should know before trusting the numbers."""
    found = []
    if data.schema != SCHEMA:
        found.append(f"The results file says schema {data.schema or 'nothing'}; this page reads schema {SCHEMA}, so parts may be missing.")
    if data.canary.get("busy"):
        found.append("The machine was busy while it was measured (the canary ran slower): times may be off.")
    if data.skipped:
        found.append(f"{text.count(data.skipped, 'timing')} without a usable median left out.")
    wrong = sum(not timing.ok for timing in data.timings)
    if wrong:
        found.append(f"{text.count(wrong, 'timed result')} differed from what the op defines: marked wrong below, and counted in no mean.")
    return found


def facts(data: Results) -> list[str]:
    """The machine on one line."""
    machine = data.machine
    forms = ["{gpu}", "{isa}", "{cores} cores", "{threads} threads", "{memory_gib} GiB", "torch {torch}", "{date}"]
    return [form.format_map(machine) for form in forms if machine.get(form[form.index("{") + 1 : form.index("}")])]


def bar_octaves(data: Results) -> int:
    """How many doublings a ratio bar spans on each side of 1.0: one scale for the whole page, 2 (a factor of 4) to 4 (16)."""
    found = [abs(math.log2(r)) for panel in data.panels for r in panel.ratios(EAGER)]
    return min(4, max(2, math.ceil(max(found, default=0.0))))


def ratio_bar(value: float | None, octaves: int) -> Bar | None:
    if value is None or value <= 0:
        return None
    reach = max(-1.0, min(1.0, math.log2(value) / octaves))
    return Bar(50 + 50 * min(reach, 0.0), 50 * abs(reach), "ours" if value >= 1 else "native")


def rooflines(data: Results, look: Mapping[str, charts.Style]) -> list[Drawing]:
    dtypes = sorted({panel.dtype for panel in data.panels}, key=lambda name: (rank(name, DTYPES), name))
    drawn = [(dtype, charts.roofline(data, dtype, look)) for dtype in dtypes]
    return [Drawing(dtype, svg) for dtype, svg in drawn if svg is not None]


def check_groups(data: Results, by_quantity: bool) -> list[CheckGroup]:
    """One line per op and dtype, and per quantity where asked; those with failures first."""
    groups: dict[tuple[str, ...], list[Check]] = {}
    for check in data.checks:
        groups.setdefault((check.op, check.dtype, check.quantity if by_quantity else ""), []).append(check)
    found = [
        CheckGroup(max(group, key=lambda check: (not check.ok, check.used)), len(group), sum(not check.ok for check in group))
        for group in groups.values()
    ]
    return sorted(found, key=lambda group: group.failed == 0)


def model_view(runs: Mapping[str, ModelRun], look: Mapping[str, charts.Style]) -> dict[str, Any]:
    """Table rows, curves, and how closely the first losses agree."""
    ours, other = runs.get(OURS), text.opponent(runs)
    wanted = [
        ("train_loss", "training loss", "epoch"),
        ("val_loss", "held-out loss", "epoch"),
        ("val_accuracy", "held-out accuracy", "epoch"),
        ("first_losses", "loss of the first steps", "step"),
    ]
    drawn = [(title, charts.curve(runs, look, name, title, step)) for name, title, step in wanted]
    return {
        "runs": sorted(runs.values(), key=lambda run: list(look).index(run.provider)),
        "baseline": other.step if other else None,
        "drawings": [Drawing(title, svg) for title, svg in drawn if svg is not None],
        "interrupted": any(run.interrupted for run in runs.values()),
        "agreement": agreement(ours, other) if ours and other else None,
    }


def agreement(ours: ModelRun, other: ModelRun) -> str | None:
    """How far the losses of the first steps, from one seed and on the same batches, are apart."""
    both = zip(ours.curves["first_losses"], other.curves["first_losses"], strict=False)
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    if not pairs:
        return None
    if ours.random_layers:
        means = [math.fsum(losses) / len(pairs) for losses in zip(*pairs)]
        between = f"are {means[0]:.3f} and {means[1]:.3f} on average"
        return f"Dropout draws other masks in the two worlds: over the first {text.count(len(pairs), 'step')} the losses {between}."
    apart = [abs(a - b) / max(abs(b), 1e-30) for a, b in pairs]
    return f"Over the first {text.count(len(apart), 'step')} the two losses differ by at most {units.error(max(apart))} (relative)."
