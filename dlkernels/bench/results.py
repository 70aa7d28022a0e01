"""The results file: one JSON object that the report is a pure function of. Saved after every row, so an interruption loses nothing."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import machine

Row = dict[str, Any]
SECTIONS = ("check", "bench", "models", "overhead", "failures", "skipped")


class Results:
    """Collects rows and, where it has a path, writes the file after each change.

    Sections beyond the machine: "limits", "check", "bench", "models", "overhead", "canary"; "failures" lists providers that could not
    run a case and why, "skipped" the cases there was no time for.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": 1, "machine": machine.describe(), "limits": {"flops": [], "bandwidth": []}}
        self.data.update({section: [] for section in SECTIONS})
        self.data["canary"] = None

    def add(self, section: str, rows: Iterable[Row]) -> None:
        """Append rows; a row that measures the same thing again replaces the older one."""
        kept = {_key(section, row): row for row in self.data[section]}
        kept.update({_key(section, row): row for row in rows})
        self.data[section] = list(kept.values())
        self.save()

    def set(self, section: str, value: Any) -> None:
        self.data[section] = value
        self.save()

    def save(self) -> None:
        """Write the file in one step, so that a reader never sees half of it."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(dumps(self.data) + "\n")
        os.replace(part, self.path)


def dumps(value: Any) -> str:
    """JSON text; NaN and infinity, which JSON does not know, become null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(section: str, row: Row) -> tuple[Any, ...]:
    names = {
        "check": ("op", "dtype", "label", "quantity"),
        "models": ("model", "provider"),
        "overhead": ("what",),
    }.get(section, ("op", "dtype", "label", "direction", "provider", "threads"))
    return tuple(row.get(name) for name in names)
