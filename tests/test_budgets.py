"""The size of things, as docs/design.md has it: a file fits a sitting, a function a screen, and each difficulty has one address.

`python -m pytest tests/test_budgets.py -s` prints the table.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES, BOOLEAN_FLAGS = 300, 60, 2
PYTHON_FOLDERS, CPP_FOLDERS = ("dlkernels", "python", "benchmarks"), ("csrc",)
ISA_CONDITION = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b.*__(?:AVX|SSE|FMA|AMX|F16C|ARM|aarch64|x86_64)", re.MULTILINE)
CPP_IN_COMMENT = re.compile(
    r"^\s*//\s*(?:[\w.:<>\[\]* ]+ [-+*/]?= .*;|[\w.:<>]+\(.*\);|return .*;|.*\{|\})\s*$"
)  # in Python ruff's ERA finds it
PLACEHOLDER = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")


def files(folders: tuple[str, ...], *suffixes: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts and "_csrc" not in path.parts
    )


PYTHON, CPP = files(PYTHON_FOLDERS, ".py"), files(CPP_FOLDERS, ".h", ".cpp")
TESTS = files(("tests",), ".py")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Every function with its lines, decorators and docstring included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, node.end_lineno - first + 1


def test_files_are_short() -> None:
    sizes = {name(path): lines(path) for path in PYTHON + CPP}
    longest = {name(path): max((size for _, size in functions(path)), default=0) for path in PYTHON}
    print(f"\n{'lines':>6} {'longest function':>17}  file")
    for file, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:6} {longest.get(file, ''):>17}  {file}")
    print(f"{sum(sizes.values()):6} in {len(sizes)} files")
    assert {file: size for file, size in sizes.items() if size > FILE_LINES} == {}


def test_functions_are_short() -> None:
    assert [f"{name(path)}: {f} has {size} lines" for path in PYTHON for f, size in functions(path) if size > FUNCTION_LINES] == []


def test_kernels_have_few_flags() -> None:
    """A boolean constexpr doubles the kernels in one text; what varies further is passed in as a function."""
    crowded = []
    for path in files(("dlkernels/gpu",), ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                tests = [n.test for n in ast.walk(node) if isinstance(n, (ast.If, ast.IfExp))]
                constants = {a.arg for a in node.args.args if a.annotation is not None and "constexpr" in ast.unparse(a.annotation)}
                flags = {test.id for test in tests if isinstance(test, ast.Name)} & constants
                if len(flags) > BOOLEAN_FLAGS:
                    crowded.append(f"{name(path)}: {node.name} has the flags {', '.join(sorted(flags))}")
    assert crowded == []


def test_one_file_knows_instruction_sets() -> None:
    kernels = [path for path in CPP if "cpu" in path.parts]
    assert {name(path) for path in kernels if ISA_CONDITION.search(path.read_text())} <= {"csrc/cpu/simd.h"}


def test_one_file_includes_torch() -> None:
    includes = re.compile(r"#\s*include\s*[<\"](?:torch|ATen|c10)/")
    assert {name(path) for path in CPP if includes.search(path.read_text())} <= {"csrc/cpu/op.h"}


def test_triton_is_imported_in_one_folder() -> None:
    imports = re.compile(r"^\s*(?:import triton\b|from triton\b)", re.MULTILINE)
    elsewhere = [
        name(path) for path in files(("dlkernels", "python"), ".py") if "gpu" not in path.parts and imports.search(path.read_text())
    ]
    assert elsewhere == []


@pytest.mark.parametrize("path", PYTHON + CPP + TESTS, ids=name)
def test_nothing_is_left_lying(path: Path) -> None:
    """No placeholder, and no code behind a comment sign."""
    if path == Path(__file__):
        return
    text = path.read_text()
    assert not PLACEHOLDER.search(text)
    assert path in PYTHON + TESTS or [line for line in text.splitlines() if CPP_IN_COMMENT.match(line)] == []


def test_the_rules_can_fail() -> None:
    """Each pattern finds what it is for, and lets prose be."""
    assert ISA_CONDITION.search("#if defined(__AVX512F__)") and not ISA_CONDITION.search("// where __AVX512F__ is set")
    for code in ("// acc = a * b;", "    // return x;", "// if (x) {", "  // }", "// store(y, acc);", "// const Vec x = load(p);"):
        assert CPP_IN_COMMENT.match(code), code
    for prose in ("// dx = dz W, one product", "// the last (odd) row;", "// x = 2^e (1 + f), s = f / (2 + f)", "// either way;"):
        assert not CPP_IN_COMMENT.match(prose), prose
    assert PLACEHOLDER.search("# TODO later")
    assert dict(functions(Path(__file__)))["name"] == 2


def test_generated_files_are_not_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    generated = re.compile(r"\.(?:so|o|pyc|egg-info)$|^(?:build|dist|report)/|__pycache__")
    assert [file for file in tracked if generated.search(file)] == []
