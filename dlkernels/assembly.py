"""Reads an objdump listing: which functions belong to a C++ source, and where their busiest loop is."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MULTIPLY_ADD = re.compile(r"\s(?:vfn?m(?:add|sub)\w+|vdp\w+|tdp\w+|fml[as]|fn?m(?:add|sub))\s")  # x86 and Arm
JUMP = re.compile(r"^\s*([0-9a-f]+):\s+(?:j\w+|b\.\w+|b|cbn?z)\s+(?:\w+,\s*)?([0-9a-f]+)\b")
GLUE = ("torch::stable::", "_GLOBAL__", "std::")  # what the compiler adds around a kernel
SHARED_HEADERS = ("op.h", "simd.h", "math.h")  # in every kernel, so they tell nothing apart


@dataclass(frozen=True)
class Code:
    """Instructions, one a line."""

    name: str
    code: str

    @property
    def instructions(self) -> int:
        return self.code.count("\n") + 1

    @cached_property
    def multiply_adds(self) -> int:
        return len(MULTIPLY_ADD.findall(self.code))

    @property
    def density(self) -> float:
        return self.multiply_adds / self.instructions

    @cached_property
    def loop(self) -> "Code | None":
        """The innermost loop with the largest share of multiply-adds (at least 4 of them), or None."""
        lines = self.code.splitlines()
        row = {line.strip().split(":", 1)[0]: number for number, line in enumerate(lines)}
        jumps = [(row[found[2]], row[found[1]]) for line in lines if (found := JUMP.match(line)) and found[2] in row]
        loops = [(start, end) for start, end in jumps if start < end]
        innermost = [(start, end) for start, end in loops if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)]
        bodies = [Code(self.name, "\n".join(lines[start : end + 1])) for start, end in innermost]
        return max((body for body in bodies if body.multiply_adds >= 4), key=lambda body: body.density, default=None)


def functions(listing: str, source: Path, names: tuple[str, ...]) -> list[Code]:
    """The functions in an objdump listing that come from `source`, most multiply-adds first.

    They are known by their names: one of `names` as a word, a name that `source` mentions, in an anonymous namespace, or a member of a
    class that one of its headers defines (the tiles of gemm.h).
    """
    text = source.read_text() if source.exists() else ""
    headers = [source.parent / name for name in re.findall(r'#include "(\w+\.h)"', text) if name not in SHARED_HEADERS]
    classes = [
        name
        for header in headers
        if header.exists()
        for name in re.findall(r"^(?:template <[^>]*> )?(?:struct|class) (\w+)", header.read_text(), re.MULTILINE)
    ]
    own = [rf"(?<![a-zA-Z]){re.escape(word)}(?![a-zA-Z])" for word in names]
    members = [rf"^(?:[\w:]+ )*{name}(?:<[^()]*?>)?::" for name in classes]
    wanted = re.compile("|".join(own + members))
    words = set(re.findall(r"\w+", text))
    found = []
    for block in listing.split("\n\n"):
        head, _, code = block.strip().partition("\n")
        match = re.fullmatch(r"[0-9a-f]+ <(.*)>:", head)
        if not match or match[1].startswith(GLUE) or match[1].endswith("@plt"):
            continue
        if wanted.search(match[1]) or words.intersection(re.findall(r"\(anonymous namespace\)::(\w+)", match[1])):
            found.append(Code(match[1], code))
    return sorted(found, key=lambda function: function.multiply_adds, reverse=True)
