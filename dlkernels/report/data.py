"""The results file, read and grouped: races of the providers at one size, panels of races, and where ours loses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dlkernels.report.records import Check, Gap, ModelRun, Timing, number, positive, ratio, text

SCHEMA = "1"
OURS, EAGER, COMPILE = "dlkernels", "eager", "compile"
NAMES = {  # that people know a provider by
    EAGER: "eager PyTorch", COMPILE: "torch.compile", "native": "native PyTorch", "fused": "PyTorch fused", "foreach": "PyTorch foreach"
}  # fmt: skip
DTYPES = ("float32", "float64", "bfloat16", "float16")
DIRECTIONS = ("forward", "forward+backward")


def geomean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of the values that are present, or None without any."""
    logs = [math.log(value) for value in values if value is not None and value > 0]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


@dataclass(frozen=True)
class Race:
    """All providers at one size, timed interleaved."""

    label: str
    timings: Mapping[str, Timing]

    @property
    def ours(self) -> Timing | None:
        return self.timings.get(OURS)

    @property
    def first(self) -> Timing:
        return self.ours or next(iter(self.timings.values()))

    @property
    def limit(self) -> float | None:
        return next((t.limit for t in self.timings.values() if t.limit), None)

    @property
    def work(self) -> float:
        return self.first.flops or self.first.bytes or 0.0

    def ratio(self, opponent: str) -> float | None:
        """Opponent's median over ours: above 1.0 we are faster. None where one is missing or computed something wrong."""
        ours, other = self.ours, self.timings.get(opponent)
        if ours is None or not ours.ok or (other and not other.ok):
            return None
        if opponent == EAGER and ours.vs_eager:
            return ours.vs_eager
        return ratio(other.median if other else None, ours.median)


@dataclass(frozen=True)
class Panel:
    """One op, dtype, direction and thread count over its sizes, smallest work first."""

    op: str
    dtype: str
    direction: str
    threads: int | None
    races: list[Race]

    def ratios(self, opponent: str) -> list[float]:
        return [r for race in self.races if (r := race.ratio(opponent)) is not None]

    def geomean(self, opponent: str) -> float | None:
        return geomean(self.ratios(opponent))

    @property
    def limit_fractions(self) -> list[float]:
        return [race.ours.limit_fraction for race in self.races if race.ours and race.ours.ok and race.ours.limit_fraction]


@dataclass(frozen=True)
class Loss:
    """A size at which another provider is faster than ours."""

    panel: Panel
    label: str
    winner: str
    ratio: float
    clear: bool  # the two p20 to p80 intervals do not overlap


@dataclass(frozen=True)
class Results:
    """The whole file; `skipped` counts bench rows without a usable time."""

    schema: str
    machine: Mapping[str, str]
    peaks: list[tuple[str, int, float]]  # dtype, threads, FLOP/s
    bandwidths: list[tuple[float, int, float, str]]  # working set in bytes, threads, bytes/s, kind
    timings: list[Timing]
    skipped: int
    checks: list[Check]
    models: dict[str, dict[str, ModelRun]]  # model, then provider
    overhead: list[tuple[str, str, float]]  # what, provider, microseconds
    gaps: list[Gap]
    canary: Mapping[str, Any]

    @cached_property
    def providers(self) -> list[str]:
        """Everyone who was timed: ours, eager, torch.compile, then the others as they appear."""
        names = dict.fromkeys([t.provider for t in self.timings] + [name for runs in self.models.values() for name in runs])
        return sorted(names, key=lambda name: rank(name, (OURS, EAGER, COMPILE)))

    @cached_property
    def panels(self) -> list[Panel]:
        """The bench rows grouped; ops in the file's order, of equal rows the last counts."""
        groups: dict[tuple[str, str, str, int | None], dict[str, dict[str, Timing]]] = {}
        for t in self.timings:
            groups.setdefault((t.op, t.dtype, t.direction, t.threads), {}).setdefault(t.label, {})[t.provider] = t
        panels = [
            Panel(*key, races=sorted((Race(label, timings) for label, timings in races.items()), key=lambda race: race.work))
            for key, races in groups.items()
        ]
        ops = list(dict.fromkeys(panel.op for panel in panels))
        return sorted(panels, key=lambda p: (ops.index(p.op), p.threads or 0, rank(p.dtype, DTYPES), rank(p.direction, DIRECTIONS)))

    @cached_property
    def losses(self) -> list[Loss]:
        """Every size at which somebody beats us (the fastest of them), widest loss first."""
        found = []
        for panel in self.panels:
            for race in panel.races:
                ratios = {name: r for name in race.timings if name != OURS and (r := race.ratio(name)) is not None}
                winner = min(ratios, key=ratios.__getitem__, default=None)
                if winner is not None and ratios[winner] < 1 and race.ours:
                    clear = race.timings[winner].p80 < race.ours.p20
                    found.append(Loss(panel, race.label, winner, ratios[winner], clear))
        return sorted(found, key=lambda loss: loss.ratio)


def rank(name: str, order: tuple[str, ...]) -> int:
    """Position of a name in a preferred order; unknown names come last, in their own order."""
    return order.index(name) if name in order else len(order)


def rows(container: object, key: str) -> list[Mapping[str, Any]]:
    """The mappings in container[key]; empty where it is missing or of another kind."""
    found = container.get(key) if isinstance(container, Mapping) else None
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list | tuple) else []


def read(results: Mapping[str, Any]) -> Results:
    """Read a results object (see "The results file" in docs/design.md). Raises TypeError where it is not a mapping."""
    if not isinstance(results, Mapping):
        raise TypeError(f"results: got {type(results).__name__}, need the JSON object that `dlkernels bench --json` writes")
    limits, machine, canary = results.get("limits"), results.get("machine"), results.get("canary")
    timings = [Timing.read(row) for row in rows(results, "bench")]
    models: dict[str, dict[str, ModelRun]] = {}
    for run in map(ModelRun.read, rows(results, "models")):
        models.setdefault(run.model, {})[run.provider] = run
    return Results(
        schema=text(results.get("schema")),
        machine={text(k): text(v) for k, v in machine.items()} if isinstance(machine, Mapping) else {},
        peaks=[
            (text(row.get("dtype")).removeprefix("torch."), int(number(row.get("threads")) or 1), speed)
            for row in rows(limits, "flops")
            if (speed := positive(row.get("flops_per_s"))) is not None
        ],
        bandwidths=[
            (size, int(number(row.get("threads")) or 1), speed, text(row.get("kind")))
            for row in rows(limits, "bandwidth")
            if (speed := positive(row.get("bytes_per_s"))) is not None and (size := positive(row.get("bytes"))) is not None
        ],
        timings=[t for t in timings if t is not None],
        skipped=sum(t is None for t in timings),
        checks=[Check.read(row) for row in rows(results, "check")],
        models=models,
        overhead=[
            (text(row.get("what")), text(row.get("provider")), microseconds)
            for row in rows(results, "overhead")
            if (microseconds := positive(row.get("microseconds"))) is not None
        ],
        gaps=[Gap.read(row) for row in [*rows(results, "failures"), *rows(results, "skipped")]],
        canary=canary if isinstance(canary, Mapping) else {},
    )
