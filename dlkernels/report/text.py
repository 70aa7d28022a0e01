"""The results in words: the sentences at the top of the page, and the summary a terminal prints. Both are generated from the data alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import fill

from dlkernels.report import units
from dlkernels.report.data import COMPILE, EAGER, NAMES, OURS, Panel, Results, geomean
from dlkernels.report.records import ModelRun


@dataclass(frozen=True)
class Sentence:
    """One finding; mood is "good", "bad" or "plain" (it states a fact that is neither)."""

    mood: str
    text: str


def headline(data: Results) -> list[Sentence]:
    """Three to five sentences: correctness, speed, the limit, where native wins, what a trained model says."""
    parts = [checks(data), speed(data), limit(data), losses(data), trained(data)]
    return [sentence for sentence in parts if sentence] or [Sentence("plain", "This results file holds no measurement yet.")]


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def checks(data: Results) -> Sentence | None:
    total, passed = len(data.checks), sum(check.ok for check in data.checks)
    if not total:
        return None
    if passed == total:
        return Sentence("good", f"The kernels are right: {passed} of {total} checks of values and gradients against float64 pass.")
    return Sentence("bad", f"The kernels are not all right: {total - passed} of {total} checks against float64 fail.")


def main_panels(data: Results) -> list[Panel]:
    """The panels of the op that stands for the file, in its first dtype: `linear_relu`, else the one with the most sizes."""
    raced = [panel for panel in data.panels if panel.geomean(EAGER)]
    if not raced:
        return []
    named = [panel for panel in raced if panel.op == "linear_relu"]
    chosen = named[0] if named else max(raced, key=lambda panel: len(panel.races))
    return [panel for panel in raced if (panel.op, panel.dtype, panel.threads) == (chosen.op, chosen.dtype, chosen.threads)]


def speed(data: Results) -> Sentence | None:
    panels = main_panels(data)
    if not panels:
        return None
    facts = "; ".join(f"{panel.direction} {beside(panel)}" for panel in panels)
    ahead = all((panel.geomean(EAGER) or 0) >= 1 for panel in panels)
    return Sentence("good" if ahead else "bad", f"{panels[0].op}, {panels[0].dtype}, speed as geometric means: {facts}.")


def beside(panel: Panel) -> str:
    """`1.94× eager (7 sizes), 1.57× torch.compile (3 sizes)`."""
    names = {EAGER: "eager", COMPILE: "torch.compile"}
    found = [(units.times(panel.geomean(key)), name, len(panel.ratios(key))) for key, name in names.items() if panel.ratios(key)]
    return ", ".join(f"{ratio} {name} ({count(sizes, 'size')})" for ratio, name, sizes in found)


def limit(data: Results) -> Sentence | None:
    for panel in main_panels(data) or data.panels:
        found = [(race.ours.limit_fraction, race.label) for race in panel.races if race.ours and race.ours.ok and race.ours.limit_fraction]
        if found:
            best, label = max(found)
            mean = geomean(fraction for fraction, _ in found)
            reach = f"{units.percent(mean)} of this machine's measured limit, at best {units.percent(best)} ({label})"
            return Sentence("plain", f"{panel.op} {panel.direction}, {panel.dtype} runs at {reach}.")
    return None


def losses(data: Results) -> Sentence | None:
    raced = sum(any(race.ratio(name) for name in race.timings if name != OURS) for panel in data.panels for race in panel.races)
    if not raced:
        return None
    if not data.losses:
        return Sentence("good", f"No other provider is faster in any of the {count(raced, 'timed case')}.")
    worst = data.losses[0]
    panel = worst.panel
    return Sentence(
        "bad",
        f"Native wins {len(data.losses)} of {count(raced, 'timed case')}, {sum(loss.clear for loss in data.losses)} of them by more than "
        f"the spread of the samples; the widest is {panel.op} {panel.direction}, {panel.dtype}, "
        f"{worst.label}: ours runs at {units.times(worst.ratio)} the speed of {NAMES.get(worst.winner, worst.winner)}.",
    )


def opponent(runs: Mapping[str, ModelRun]) -> ModelRun | None:
    """The run that ours is compared with: eager, or the first that is not ours."""
    others = [run for name, run in runs.items() if name != OURS]
    return runs.get(EAGER) or (others[0] if others else None)


def trained(data: Results) -> Sentence | None:
    for model, runs in data.models.items():
        ours, other = runs.get(OURS), opponent(runs)
        if ours is None or ours.accuracy is None:
            continue
        said = f"{model} trains to {units.percent(ours.accuracy, 1)} held-out accuracy"
        if other is None:
            return Sentence("plain", f"{said}.")
        if other.accuracy is not None:
            said += f" ({NAMES.get(other.provider, other.provider)}: {units.percent(other.accuracy, 1)})"
        if ours.step and other.step:
            faster = other.step / ours.step
            said += f", and its training step is {units.times(faster)} the speed of {NAMES.get(other.provider, other.provider)}'s."
            return Sentence("good" if faster >= 1 else "bad", said)
        return Sentence("plain", f"{said}.")
    return None


def summary_text(data: Results) -> str:
    """The terminal summary: machine, headline, and one line per op, dtype and direction."""
    lines = []
    if data.machine.get("cpu") or data.machine.get("gpu"):
        machine = [data.machine.get(key) for key in ("cpu", "gpu", "isa")]
        lines += ["  ".join(part for part in machine if part), ""]
    marks = {"good": "+", "bad": "!", "plain": " "}
    lines += [fill(f"{marks[sentence.mood]} {sentence.text}", 100, subsequent_indent="  ") for sentence in headline(data)]
    if data.canary.get("busy"):
        lines.append("! The machine was busy while it was measured; times may be off.")
    if data.panels:
        lines += ["", *panel_table(data)]
    if data.gaps:
        lines += ["", f"{count(len(data.gaps), 'case')} not measured; the results file and the report say why."]
    return "\n".join(lines) + "\n"


def panel_table(data: Results) -> list[str]:
    """Geometric means over the sizes of each panel, as aligned columns."""
    head = ["op", "dtype", "direction", "threads", "sizes", "vs eager", "worst", "vs compile", "of limit"]
    body = []
    for panel in data.panels:
        ratios = panel.ratios(EAGER)
        body.append(
            [
                panel.op,
                panel.dtype,
                panel.direction,
                units.NONE if panel.threads is None else str(panel.threads),
                str(len(panel.races)),
                units.times(panel.geomean(EAGER)),
                units.times(min(ratios, default=None)),
                units.times(panel.geomean(COMPILE)),
                units.percent(geomean(panel.limit_fractions)),
            ]
        )
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    form = "  ".join(f"{{:{'<' if i < 3 else '>'}{width}}}" for i, width in enumerate(widths))  # names left, numbers right
    return [form.format(*row).rstrip() for row in [head, *body]]
