"""What depends on the instruction set or the backend, once more in processes that are forced to each of the others.

Every test marked `isa` runs: under each CPU library of this build that this CPU can run (through DLKERNELS_ISA), and in the Triton
interpreter, which runs the GPU kernels on CPU tensors (small sizes, no bfloat16).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import SMALL, run_child

from dlkernels import backend

HERE = Path(__file__).parent
INSIDE = "DLKERNELS_TESTS_OF_ONE_ISA"  # set in the processes started here, so that they start none themselves

pytestmark = pytest.mark.skipif(SMALL or INSIDE in os.environ, reason="this process is one of those that this file starts")


FILES = [path.name for path in sorted(HERE.glob("test_*.py")) if "mark.isa" in path.read_text()]


def run_marked(names: list[str], **environment: str) -> str:
    """Run the tests marked `isa` of some files in a child process and return its last lines; fail with its output where one fails."""
    files = [str(HERE / name) for name in names]
    command = ["-m", "pytest", "-q", "-x", "-m", "isa", "-p", "no:cacheprovider", "-c", str(HERE.parent / "pyproject.toml"), *files]
    child = run_child(command, timeout=1500, **environment, **{INSIDE: "1"})
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    return child.stdout[-400:]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("isa", [isa for isa in backend.supported_isas() if isa != backend.isa()] if not SMALL else [])
def test_isa(isa: str) -> None:
    assert " passed" in run_marked(FILES, DLKERNELS_ISA=isa)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("generic", [True, False], ids=["every op", "each op"])
def test_triton_interpreter(generic: bool) -> None:
    """In two parts, of equal length."""
    pytest.importorskip("triton")
    names = [name for name in FILES if (name == "test_ops.py") == generic]
    assert " passed" in run_marked(names, TRITON_INTERPRET="1", DLKERNELS_BACKEND="triton")


def test_the_forced_isa_is_the_one_in_use() -> None:
    for isa in backend.supported_isas():
        child = run_child(["-c", "import dlkernels; print(dlkernels.backend.isa())"], DLKERNELS_ISA=isa)
        assert child.stdout.strip() == isa, child.stderr


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", " "])
def test_an_isa_that_does_not_exist_is_an_error(isa: str) -> None:
    """Not a crash: a message with the one asked for and those there are."""
    child = run_child(["-c", "import dlkernels"], DLKERNELS_ISA=isa)
    assert child.returncode == 1
    assert f"DLKERNELS_ISA={isa}" in child.stderr and "supported here: default" in child.stderr
