"""The rows of the results file as typed records.

Reading never fails on a value: what is missing, NaN or of the wrong kind becomes None, or the row is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HUGE = 1e30  # nothing that is measured here comes near it or its inverse; a number beyond is as good as NaN


def number(value: object) -> float | None:
    """A float, or None for anything else (bool, text, NaN, infinity, beyond HUGE)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -HUGE < value < HUGE else None


def positive(value: object) -> float | None:
    """A float that a log axis can show, above 1 / HUGE, or None."""
    x = number(value)
    return x if x is not None and x > 1 / HUGE else None


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below, or None where either is missing, not above zero, or the quotient is."""
    if not above or not below or above <= 0 or below <= 0:
        return None
    return positive(above / below)


def text(value: object) -> str:
    """A value as one line of printable text; None and NaN become the empty string, a size mapping `M=64 K=784`."""
    if isinstance(value, Mapping):
        return " ".join(f"{text(key)}={text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    if isinstance(value, float):
        return "" if number(value) is None else f"{value:.4g}"
    words = "" if value is None else " ".join(str(value).split())
    return "".join(letter for letter in words if letter.isprintable())


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
    ok: bool  # False: the result timed here was wrong, so its speed counts nowhere

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
            ok=row.get("ok") is not False,
        )


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
    interrupted: bool
    random_layers: bool  # dropout: the two worlds draw different masks

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
            interrupted=row.get("interrupted") is True,
            random_layers=row.get("random_layers") is True,
        )

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy after the last epoch, 0 to 1."""
        return next((value for value in reversed(self.curves["val_accuracy"]) if value is not None), None)


@dataclass(frozen=True)
class Gap:
    """A case that is missing from `bench` and why: its provider failed, or there was no time."""

    case: str
    provider: str
    reason: str

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Gap:
        names = [text(row.get(key)) for key in ("op", "direction", "dtype", "label")]
        return cls(" ".join(filter(None, names)), text(row.get("provider")), text(row.get("error")) or text(row.get("reason")))
