"""Real text for the teaching models, out of the packages that are installed, so that nothing is downloaded.

docstrings   the first words of docstrings of Python's standard library, of numpy and of torch: which of the three is it from?
characters   Python's language reference as the module ``pydoc_data.topics`` has it: which character comes next?

What is held out comes from other files, or other topics, than what is learned from, and a text that occurs twice is taken once. The
texts are those of the versions installed, so results differ a little from one installation to the next.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dlkernels.data import Split

LIBRARIES = ("python", "numpy", "torch")
_PARTS = {  # where to look in each, tests apart
    "python": """argparse asyncio concurrent ctypes decimal email http idlelib importlib inspect json logging mailbox multiprocessing
              pathlib tarfile threading tkinter turtle unittest urllib xml zipfile""",
    "numpy": ".",
    "torch": "autograd cuda distributions functional fx nn optim utils _tensor",
}
PAD, UNKNOWN, WORDS = 0, 1, 2000  # the vocabulary: filling, any rare word, and the most frequent words of the training texts
ALPHABET = "\0\n" + "".join(map(chr, range(32, 127)))  # of the language model; \0 stands for any other character


def _files(library: str) -> Iterator[tuple[str, Path]]:
    """(name within the library, path) of its Python files, in a fixed order."""
    if library == "python":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            raise ImportError(f"docstrings are read from the sources of {library}, which is missing: pip install {library}")
        root = Path(spec.origin).parent
    for part in _PARTS[library].split():
        for path in sorted((root / part).rglob("*.py")) or [root / f"{part}.py"]:
            name = path.relative_to(root).as_posix()
            if path.exists() and not re.search(r"(^|/)(_?test|idle_test|testing)", name):
                yield name, path


def _spread(rows: list[list[str]], count: int) -> list[list[str]]:
    """``count`` of the rows, as far apart as can be."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def _texts(length: int, rows: int) -> tuple[list[list[list[str]]], list[list[list[str]]]]:
    """Of every library up to ``rows`` texts to learn from and a quarter as many to be judged by; a fifth of the files is held out."""
    learn, judge, seen = [], [], set()
    for library in LIBRARIES:
        found: tuple[list[list[str]], list[list[str]]] = ([], [])
        for name, path in _files(library):
            held_out = zlib.crc32(name.encode()) % 5 == 0
            for text in re.findall(r':\s*\n\s*[rRuU]?"""(.*?)"""', path.read_text(errors="ignore"), re.DOTALL):
                words = re.findall("[a-z]+", text.lower())[:length]
                if len(words) >= 10 and tuple(words[:8]) not in seen:
                    seen.add(tuple(words[:8]))
                    found[held_out].append(words)
        learn.append(_spread(found[0], rows))
        judge.append(_spread(found[1], rows // 4))
    return learn, judge


@lru_cache(maxsize=2)
def _docstrings(length: int, rows: int) -> tuple[Split, list[str]]:
    learn, judge = _texts(length, rows)
    count = Counter(word for texts in learn for words in texts for word in words)
    vocabulary = ["<pad>", "<unknown>", *sorted(count, key=lambda word: (-count[word], word))[: WORDS - 2]]
    number = {word: i for i, word in enumerate(vocabulary)}

    def tokens(libraries: list[list[list[str]]]) -> tuple[Tensor, Tensor]:
        numbers = [[number.get(word, UNKNOWN) for word in words] for texts in libraries for words in texts]
        labels = [label for label, texts in enumerate(libraries) for _ in texts]
        return torch.tensor([row + [PAD] * (length - len(row)) for row in numbers]), torch.tensor(labels)

    return Split(*tokens(learn), *tokens(judge)), vocabulary


def docstrings(length: int = 40, rows: int = 720) -> Split:
    """Which library is it from? Word numbers int64 [M, length], padded with 0 at the end, and 0, 1, 2 as in ``LIBRARIES``.

    Args:
        length: words of a text; what follows is cut off.
        rows: of each library to learn from, at most; a quarter as many are held out.

    Raises ``ImportError`` when a library is missing.
    """
    return _docstrings(length, rows)[0]


def vocabulary(length: int = 40, rows: int = 720) -> list[str]:
    """The word of every number in ``docstrings``."""
    return _docstrings(length, rows)[1]


def encode(text: str) -> Tensor:
    """The characters' numbers in ``ALPHABET``, int64 [T]."""
    return torch.tensor([max(ALPHABET.find(c), 0) for c in text], dtype=torch.int64)


def decode(numbers: Iterable[int]) -> str:
    """The text of characters' numbers."""
    return "".join(ALPHABET[int(i)] for i in numbers)


@lru_cache(maxsize=2)
def characters(length: int = 64, rows: int = 1000) -> Split:
    """Which character comes next? Numbers in ``ALPHABET``, x [M, length] and y [M, length], of which y is x one place further.

    Every fifth topic is held out, and of it what is said elsewhere as well is left out. At most ``rows`` rows to learn from, and a
    fifth as many to be judged by.
    """
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    names = sorted(topics)
    for held_out in (False, True):
        for name in (name for i, name in enumerate(names) if (i % 5 == 0) == held_out):
            for paragraph in topics[name].split("\n\n"):
                if paragraph not in seen:
                    seen.add(paragraph)
                    parts[held_out].append(paragraph)

    def cut(paragraphs: list[str], count: int) -> tuple[Tensor, Tensor]:
        text = encode("\n\n".join(paragraphs))
        starts = range(0, len(text) - length, length)
        chosen = [starts[i * len(starts) // count] for i in range(count)] if len(starts) > count else starts
        table = torch.stack([text[start : start + length + 1] for start in chosen])
        return table[:, :-1].contiguous(), table[:, 1:].contiguous()

    return Split(*cut(parts[False], rows), *cut(parts[True], rows // 5))
