"""The results file as typed records. Reading never fails on a value: what is missing, NaN or of the wrong kind becomes None or is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

SCHEMA = 1
OURS, EAGER, COMPILE = "dlkernels", "eager", "compile"
DTYPES = ("float32", "float64", "bfloat16", "float16")
DIRECTIONS = ("forward", "forward+backward")


def number(value: object) -> float | None:
    """A finite float, or None for anything else (bool, text, NaN, infinity, an integer beyond float64)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def positive(value: object) -> float | None:
    """A finite float above zero (what a log axis can show), or None."""
    x = number(value)
    return x if x is not None and x > 0 else None


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below, or None where either is missing, not above zero, or the quotient is."""
    if not above or not below or above <= 0 or below <= 0:
        return None
    return positive(above / below)


def geomean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of the values that are present, or None without any."""
    logs = [math.log(value) for value in values if value is not None and value > 0]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def text(value: object) -> str:
    """A value as one line of text; None becomes the empty string and a size mapping `M=64 K=784`."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split())


@dataclass(frozen=True)
class Timing:
    """One row of `bench`: one provider at one size. Times in seconds."""

    op: str
    dtype: str
    direction: str
    label: str
    provider: str
    threads: int | None
    median: float
    p20: float
    p80: float
    flops: float | None
    bytes: float | None
    limit: float | None
    limit_fraction: float | None
    vs_eager: float | None
    peak_bytes: float | None

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Timing | None:
        """The record of a row, or None where it has no usable median."""
        median = positive(row.get("median_s"))
        if median is None:
            return None
        limit, threads = positive(row.get("limit_s")), number(row.get("threads"))
        return cls(
            op=text(row.get("op")) or "unnamed",
            dtype=text(row.get("dtype")).removeprefix("torch."),
            direction=text(row.get("direction")) or "forward",
            label=text(row.get("label")) or text(row.get("size")),
            provider=text(row.get("provider")) or "unnamed",
            threads=None if threads is None else int(threads),
            median=median,
            p20=min(positive(row.get("p20_s")) or median, median),
            p80=max(positive(row.get("p80_s")) or median, median),
            flops=positive(row.get("flops")),
            bytes=positive(row.get("bytes")),
            limit=limit,
            limit_fraction=positive(row.get("limit_fraction")) or ratio(limit, median),
            vs_eager=positive(row.get("vs_eager")),
            peak_bytes=positive(row.get("peak_bytes")),
        )


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
        """Opponent's median over ours: above 1.0 we are faster."""
        ours, other = self.ours, self.timings.get(opponent)
        if ours is None:
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
        return [race.ours.limit_fraction for race in self.races if race.ours and race.ours.limit_fraction]


@dataclass(frozen=True)
class Loss:
    """A size at which another provider is faster than ours."""

    panel: Panel
    label: str
    winner: str
    ratio: float
    clear: bool  # the two p20 to p80 intervals do not overlap


@dataclass(frozen=True)
class Check:
    """One row of `check`: the error of a value or a gradient, relative to max |float64|."""

    op: str
    dtype: str
    size: str
    quantity: str
    ours: float | None
    native: float | None
    allowed: float | None
    ok: bool

    @property
    def used(self) -> float:
        """Our error as a fraction of the allowed one; infinite where it cannot be told."""
        if self.ours is None or self.allowed is None:
            return math.inf
        return 0.0 if self.ours == 0 else self.ours / self.allowed if self.allowed > 0 else math.inf

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Check:
        return cls(
            op=text(row.get("op")) or "unnamed",
            dtype=text(row.get("dtype")).removeprefix("torch."),
            size=text(row.get("label")) or text(row.get("size")),
            quantity=text(row.get("quantity")),
            ours=number(row.get("ours_error")),
            native=number(row.get("native_error")),
            allowed=number(row.get("allowed")),
            ok=row.get("ok") is True,
        )


@dataclass(frozen=True)
class ModelRun:
    """One row of `models`: a model trained with one provider."""

    model: str
    provider: str
    step: float | None
    p20: float | None
    p80: float | None
    batch: int | None
    parameters: int | None
    seconds: float | None
    curves: Mapping[str, list[float | None]]  # train_loss, val_loss, val_accuracy per epoch; first_losses per step

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> ModelRun:
        step = row.get("step")
        step = step if isinstance(step, Mapping) else {}
        batch, parameters = number(step.get("batch")), number(row.get("parameters"))
        names = ("train_loss", "val_loss", "val_accuracy", "first_losses")
        return cls(
            model=text(row.get("model")) or "unnamed",
            provider=text(row.get("provider")) or "unnamed",
            step=positive(step.get("median_s")),
            p20=positive(step.get("p20_s")),
            p80=positive(step.get("p80_s")),
            batch=None if batch is None else int(batch),
            parameters=None if parameters is None else int(parameters),
            seconds=positive(row.get("seconds")),
            curves={name: [number(v) for v in row[name]] if isinstance(row.get(name), list | tuple) else [] for name in names},
        )

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy after the last epoch, 0 to 1."""
        return next((value for value in reversed(self.curves["val_accuracy"]) if value is not None), None)


@dataclass(frozen=True)
class Results:
    """The whole file; `skipped` counts bench rows without a usable time."""

    schema: object
    machine: Mapping[str, str]
    peaks: list[tuple[str, int, float]]  # dtype, threads, FLOP/s
    bandwidths: list[tuple[float, int, float, str]]  # working set in bytes, threads, bytes/s, kind
    timings: list[Timing]
    skipped: int
    checks: list[Check]
    models: dict[str, dict[str, ModelRun]]  # model, then provider
    overhead: list[tuple[str, float]]  # what, microseconds
    canary: Mapping[str, Any] = field(default_factory=dict)

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
        schema=results.get("schema"),
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
            (text(row.get("what")), microseconds)
            for row in rows(results, "overhead")
            if (microseconds := number(row.get("microseconds"))) is not None
        ],
        canary=canary if isinstance(canary, Mapping) else {},
    )
