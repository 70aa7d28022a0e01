"""A results file as the Markdown tables of the README: `python benchmarks/table.py benchmarks/results/<machine>.json`.

They show the speed over PyTorch, above 1 ours is faster: of every op and every optimizer, as geometric means over its sizes, and of one op
by size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlkernels.bench.suite import geometric_means

DTYPES = ("float32", "bfloat16", "float16", "float64")
DIRECTIONS = ("forward", "forward+backward")
Column = tuple[str, str]  # dtype, direction


def tables(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}, {machine['date'][:10]}"
    return "\n\n".join(filter(None, [where, every_op(results), every_optimizer(results), one_op(results, "linear_relu")]))


def every_op(results: Mapping[str, Any]) -> str:
    """One line for each op: geometric means over the sizes that were raced, in float32 and bfloat16."""
    columns = [(dtype, direction) for dtype in DTYPES[:2] for direction in DIRECTIONS]
    means = geometric_means(results["bench"])
    found = {(mean["op"], mean["dtype"], mean["direction"]): mean["vs_eager"] for mean in means}
    ops = dict.fromkeys(mean["op"] for mean in means if mean["direction"] in DIRECTIONS)
    return _markdown("op", columns, [(op, [found.get((op, *column)) for column in columns]) for op in ops])


def every_optimizer(results: Mapping[str, Any]) -> str:
    """One line for each optimizer's step and tail, against torch's default and its fastest; nothing where none was raced."""
    means = [mean for mean in geometric_means(results["bench"]) if mean["direction"] not in DIRECTIONS]
    lines = [(f"{mean['op']} {mean['direction']}", [mean["vs_eager"], *mean["vs_others"].values()]) for mean in means]
    return _markdown("optimizer", [("torch's", "default"), ("torch's", "fastest")], lines) if lines else ""


def one_op(results: Mapping[str, Any], op: str) -> str:
    """One line for each size of ``op`` and the geometric mean of each column."""
    rows = [row for row in results["bench"] if row["op"] == op and row["provider"] == "dlkernels" and row["ok"]]
    found = {(row["label"], row["dtype"], row["direction"]): row["vs_eager"] for row in rows}
    columns = [(dtype, way) for way in DIRECTIONS for dtype in DTYPES if any(key[1:] == (dtype, way) for key in found)]
    means = {(mean["dtype"], mean["direction"]): mean["vs_eager"] for mean in geometric_means(results["bench"]) if mean["op"] == op}
    labels = dict.fromkeys(row["label"] for row in rows)
    lines = [(label, [found.get((label, *column)) for column in columns]) for label in labels]
    return _markdown(op, columns, [*lines, ("**geometric mean**", [means.get(column) for column in columns])])


def _markdown(corner: str, columns: Sequence[Column], lines: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    table = [[corner, *(f"{dtype} {direction}" for dtype, direction in columns)]]
    table += [[name, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)] for name, ratios in lines]
    head, *body = ("| " + " | ".join(line) + " |" for line in table)
    return "\n".join([head, "| --- |" + " ---: |" * len(columns), *body])


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
