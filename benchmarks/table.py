"""A results file as the Markdown table of the README: `python benchmarks/table.py benchmarks/results/<machine>.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlkernels.bench.suite import geometric_means

DTYPES = ("float32", "bfloat16", "float16", "float64")
DIRECTIONS = ("forward", "forward+backward")


def table(results: Mapping[str, Any], op: str = "linear_relu") -> str:
    """Speed of ``op`` over eager PyTorch by size (M x K x N) and dtype, with the geometric mean of each column; above 1 ours is faster."""
    rows = [row for row in results["bench"] if row["op"] == op and row["provider"] == "dlkernels" and row["ok"]]
    columns = [(dtype, direction) for direction in DIRECTIONS for dtype in DTYPES if any(_is(row, dtype, direction) for row in rows)]
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}, {machine['date'][:10]}",
        "",
        "| " + " | ".join([op, *(f"{dtype} {direction}" for dtype, direction in columns)]) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        ratios = [next((row["vs_eager"] for row in rows if row["label"] == label and _is(row, *column)), None) for column in columns]
        lines.append(f"| {label} | " + " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in ratios) + " |")
    means = {(mean["dtype"], mean["direction"]): mean["vs_eager"] for mean in geometric_means(results["bench"]) if mean["op"] == op}
    return "\n".join([*lines, "| **geometric mean** | " + " | ".join(f"**{means[column]:.2f}**" for column in columns) + " |"])


def _is(row: Mapping[str, Any], dtype: str, direction: str) -> bool:
    return bool(row["dtype"] == dtype and row["direction"] == direction)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
