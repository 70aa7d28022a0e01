"""What the report draws: the roofline, time against work, and the curves of a training run. Each returns None where it has no points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dlkernels.report import units
from dlkernels.report.data import EAGER, NAMES, OURS, Panel, Results
from dlkernels.report.records import ModelRun, Timing
from dlkernels.report.svg import Axis, Plot, Point


@dataclass(frozen=True)
class Style:
    """How a provider looks everywhere on the page: CSS class for the colour, mark, and the name people know."""

    css: str
    mark: str
    name: str


def styles(providers: Iterable[str]) -> dict[str, Style]:
    """A style for each provider; colours are of the Okabe-Ito palette, which colour-blind readers can tell apart."""
    known = {OURS: Style("ours", "circle", OURS), EAGER: Style("eager", "square", NAMES[EAGER])}
    spare = iter([("compile", "triangle"), ("peer1", "diamond"), ("peer2", "wedge"), ("peer3", "bar")])
    chosen = {}
    for provider in providers:
        if provider in known:
            chosen[provider] = known[provider]
        else:
            css, mark = next(spare, ("peer3", "bar"))
            chosen[provider] = Style(css, mark, NAMES.get(provider, provider))
    return chosen


def race_chart(panel: Panel, look: Mapping[str, Style], least: int = 2) -> Markup | None:
    """Median time against work for each provider, with its p20 to p80 band and the time the measured limit allows.

    None for fewer than `least` sizes of known work.
    """
    by_flops = all(race.first.flops for race in panel.races)
    races = [race for race in panel.races if (race.first.flops if by_flops else race.first.bytes)]

    xs = [(race.first.flops if by_flops else race.first.bytes) or 1.0 for race in races]
    if len(races) < least:
        return None
    times = [t for race in races for timing in race.timings.values() for t in (timing.p20, timing.p80)]
    limits = [(x, race.limit) for x, race in zip(xs, races, strict=True) if race.limit]
    plot = Plot(
        Axis.over(xs, f"work, {'FLOP' if by_flops else 'bytes moved'} (log)", lambda v: units.tick(v, ""), log=True),
        Axis.over([*times, *(limit for _, limit in limits)], "", lambda v: units.tick(v, "s"), log=True),
        f"{panel.op}, {panel.dtype}, {panel.direction}: median time against work, log-log. The table holds the same numbers.",
        height=300,
    )
    if limits:
        plot.line(limits, "limit")
    providers = [name for name in reversed([*look]) if any(name in race.timings for race in races)]  # ours last, on top
    for name in providers:
        found = [(x, race.timings[name], race.label) for x, race in zip(xs, races, strict=True) if name in race.timings]
        plot.band([(x, t.p20) for x, t, _ in found], [(x, t.p80) for x, t, _ in found], look[name].css)
        plot.line([(x, t.median) for x, t, _ in found], look[name].css)
        for x, t, label in found:
            memory = f", peak memory {units.binary(t.peak_bytes)}" if t.peak_bytes else ""
            tip = f"{label}\n{look[name].name}: {units.seconds(t.median)} ({units.spread(t.p20, t.p80)}){memory}"
            plot.mark((x, t.median), look[name].css, look[name].mark, tip)
    return plot.svg()


@dataclass(frozen=True)
class RoofPoint:
    """One timing on the roofline: FLOP per byte, FLOP/s, and the op and size it belongs to."""

    intensity: float
    speed: float
    timing: Timing
    name: str


def roofline(data: Results, dtype: str, look: Mapping[str, Style]) -> Markup | None:
    """FLOP/s against FLOP per byte for one dtype: measured roofs, and every forward size and step of ours joined to eager's by a stem."""
    panels = [panel for panel in data.panels if panel.dtype == dtype]
    panels = [panel for panel in panels if panel.direction in ("forward", "step")] or panels
    threads = max((panel.threads for panel in panels if panel.threads), default=None)
    peak = best_peak(data, dtype, threads)
    slopes = bandwidth_roofs(data, threads)
    points = [
        RoofPoint(t.flops / t.bytes, t.flops / t.median, t, f"{panel.op} {race.label}")
        for panel in panels
        for race in panel.races
        for name, t in race.timings.items()
        if name in (OURS, EAGER) and t.flops and t.bytes
    ]
    if not points or peak is None:
        return None
    xs = [point.intensity for point in points] + [peak / speed for speed, _ in slopes]
    xs += [min([peak / speed / 10 for speed, _ in slopes] + xs) / 1.2, max(xs) * 2]  # room for the name of the steepest roof
    plot = Plot(
        Axis.over(xs, "FLOP per byte moved (log)", lambda v: f"{v:g}", log=True, pad=0),
        Axis.over([point.speed for point in points] + [peak, peak * 1.5], "", lambda v: units.tick(v, ""), log=True),
        f"Roofline for {dtype}: speed against arithmetic intensity, with the measured peak and bandwidths.",
        height=290,
    )
    draw_roofs(plot, peak, slopes)
    feet = {(point.name, point.intensity): point.speed for point in points if point.timing.provider == EAGER}
    for point in points:
        foot = feet.get((point.name, point.intensity))
        if foot and point.timing.provider == OURS:
            plot.line([(point.intensity, foot), (point.intensity, point.speed)], "stem")
    for point in sorted(points, key=lambda point: point.timing.provider == OURS):
        style, share = look[point.timing.provider], point.timing.limit_fraction
        of_limit = f", {units.percent(share)} of its limit" if share else ""
        tip = f"{point.name}\n{style.name}: {units.si(point.speed, 'FLOP/s')}{of_limit}"
        plot.mark((point.intensity, point.speed), style.css, style.mark, tip)
    return plot.svg()


def draw_roofs(plot: Plot, peak: float, slopes: Sequence[tuple[float, str]]) -> None:
    """The flat roof of arithmetic and one slanted roof per level of memory, each labelled where it is drawn."""
    low, high = plot.x.low, plot.x.high
    plot.line([(max(low, min((peak / speed for speed, _ in slopes), default=low)), peak), (high, peak)], "roof")
    plot.label((high, peak), f"peak {units.si(peak, 'FLOP/s')}")
    for speed, name in slopes:
        start, end = max(low, plot.y.low / speed), peak / speed
        if start >= end:
            continue
        plot.line([(start, start * speed), (end, peak)], "roof")
        plot.label_along((start, start * speed), (end, peak), f"{name}: {units.si(speed, 'B/s')}")


def best_peak(data: Results, dtype: str, threads: int | None) -> float | None:
    """The measured peak of a dtype at this thread count, or at the largest one measured."""
    found = [(count == threads, count, speed) for name, count, speed in data.peaks if name == dtype]
    return max(found)[2] if found else None


def bandwidth_roofs(data: Results, threads: int | None) -> list[tuple[float, str]]:
    """(bytes/s, working set) of the fastest level measured and of the largest working set, which is main memory."""
    counts = {count for _, count, _, _ in data.bandwidths}
    if not counts:
        return []
    count = threads if threads in counts else max(counts)
    found = [(speed, size) for size, n, speed, _ in data.bandwidths if n == count]
    largest = max(size for _, size in found)
    memory = max(pair for pair in found if pair[1] == largest)
    return [(speed, units.binary(size)) for speed, size in dict.fromkeys([max(found), memory])]


def curve(runs: Mapping[str, ModelRun], look: Mapping[str, Style], name: str, title: str, step: str) -> Markup | None:
    """One quantity of a training run against the epoch or step, ours over native."""
    lines: dict[str, list[Point]] = {
        provider: [(float(i), value) for i, value in enumerate(run.curves[name], start=1) if value is not None]
        for provider, run in runs.items()
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    as_percent = name == "val_accuracy"
    plot = Plot(
        Axis.over([x for x, _ in points], step, lambda v: f"{v:g}", pad=0.03),
        Axis.over([y for _, y in points], "", lambda v: f"{100 * v:.3g} %" if as_percent else f"{v:.3g}"),
        f"{title} by {step}",
        width=280,
        height=190,
    )
    for provider in [name for name in reversed([*look]) if lines.get(name)]:
        line, style = lines[provider], look[provider]
        plot.line(line, style.css + ("" if provider == OURS else " under"))
        stride = max(1, len(line) // 8)
        for x, y in line[::stride]:
            shown = units.percent(y, 2) if as_percent else f"{y:.5g}"
            plot.mark((x, y), style.css, style.mark, f"{style.name}, {step} {x:g}: {shown}")
    return plot.svg()
