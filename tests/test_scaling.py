"""The table in docs/scaling.md is what its text says: every number follows from the constants there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text().partition("## 8, 64 and 512 GPUs")[2]
FLAT = " ".join(TEXT.split())


def constant(pattern: str) -> float:
    """The number that the text has at #."""
    number = r"([\d,]+(?:\.\d+)?)"
    found = re.findall(pattern.replace("#", number), FLAT)
    assert len(found) == 1, f"the text has {pattern} {len(found)} times"
    return float(found[0].replace(",", ""))


def three_digits(value: float) -> str:
    places = 2 - math.floor(math.log10(value))
    return f"{round(value, places):,.{max(places, 0)}f}"


def rows() -> Iterator[str]:
    """The table, row by row, without its head."""
    F, memory = constant("F = # TFLOP/s") * 1e12, constant("a copy at # TB/s") * 1e12
    near, far = constant("NVLink # GB/s each way") * 1e9, constant("400 Gb/s = # GB/s") * 1e9
    tokens = constant("For a batch of # tokens per GPU")
    for name, P in (("124 million", 124e6), ("7 billion", 7e9)):
        for n in (8, 64, 512):
            moved = 8 * P * (n - 1) / n
            exchange, work = moved / (near if n == 8 else far), 6 * P * tokens / F
            numbers = (
                (moved / 1e9, "GB"), (exchange * 1e3, "ms"), (exchange * F / (6 * P), ""), (work * 1e3, "ms"),
                (100 * exchange / (work + exchange), "%"),
                (16 * P / 1e9, "GB"), (16 * P / n / 1e9, "GB"), (28 * P / n / memory * 1e3, "ms"),
            )  # fmt: skip
            yield " | ".join([f"| {name}", str(n), *(f"{three_digits(x)} {unit}".strip() for x, unit in numbers)]) + " |"


def test_the_table_follows_from_the_text() -> None:
    found = [line for line in TEXT.splitlines() if re.match(r"\| \d", line)]
    assert found == list(rows())


def test_the_text_around_it() -> None:
    measured = constant("bfloat16 product at # TFLOP/s")
    assert "F = 400 TFLOP/s, half of the measured product" in FLAT and abs(400 / measured - 0.5) < 0.01
    assert constant("they leave # GB for activations") == 80 - 16 * 7e9 / 8 / 1e9
