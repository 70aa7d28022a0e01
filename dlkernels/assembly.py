"""Reads an objdump listing: which functions belong to a C++ source, and where their busiest loop is."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Vector multiplies of x86 and Arm, fused with an add where there is such an instruction.
MULTIPLY = re.compile(r"\s(?:vfn?m(?:add|sub)\d+p\w+|v?mulp[sd]|vdp\w+|tdp\w+|fml[as]|fmul|fn?m(?:add|sub))\s")
JUMP = re.compile(r"^\s*([0-9a-f]+):\s+(?:j\w+|b\.\w+|b|cbn?z)\s+(?:\w+,\s*)?([0-9a-f]+)\b")
GLUE = ("torch::stable::", "_GLOBAL__", "std::")  # what the compiler adds around a kernel
SHARED_HEADERS = ("op.h", "simd.h", "math.h")  # in every kernel, so they tell nothing apart


@dataclass(frozen=True)
class Code:
    """Instructions, one a line."""

    name: str
    code: str
    is_member: bool = False  # of a class in a header that the source includes: the loops all dense ops share

    @property
    def instructions(self) -> int:
        return self.code.count("\n") + 1

    @cached_property
    def multiplies(self) -> int:
        return len(MULTIPLY.findall(self.code))

    @property
    def weight(self) -> float:
        """Many multiplies, and little else."""
        return self.multiplies**2 / self.instructions

    @cached_property
    def loop(self) -> "Code | None":
        """The innermost loop of the largest weight, with at least 4 multiplies, or None."""
        lines = self.code.splitlines()
        row = {line.strip().split(":", 1)[0]: number for number, line in enumerate(lines)}
        jumps = [(row[found[2]], row[found[1]]) for line in lines if (found := JUMP.match(line)) and found[2] in row]
        loops = [(start, end) for start, end in jumps if start < end]
        innermost = [(start, end) for start, end in loops if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)]
        bodies = [Code(self.name, "\n".join(lines[start : end + 1])) for start, end in innermost]
        return max((body for body in bodies if body.multiplies >= 4), key=lambda body: body.weight, default=None)


def functions(listing: str, source: Path, names: tuple[str, ...]) -> list[Code]:
    """The functions in an objdump listing that come from `source`, most multiplies first.

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
    own = re.compile("|".join(rf"(?<![a-zA-Z]){re.escape(word)}(?![a-zA-Z])" for word in names))
    member = re.compile("|".join(rf"^(?:[\w:]+ )*{name}(?:<[^()]*?>)?::" for name in classes) or "(?!)")
    words = set(re.findall(r"\w+", text))
    found = []
    for block in listing.split("\n\n"):
        head, _, code = block.strip().partition("\n")
        match = re.fullmatch(r"[0-9a-f]+ <(.*)>:", head)
        if not match or match[1].startswith(GLUE) or match[1].endswith("@plt"):
            continue
        is_member = bool(member.search(match[1]))
        if is_member or own.search(match[1]) or words.intersection(re.findall(r"\(anonymous namespace\)::(\w+)", match[1])):
            found.append(Code(match[1], code, is_member))
    return sorted(found, key=lambda function: function.multiplies, reverse=True)
