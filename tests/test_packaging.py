"""What an importer gets: light imports, honest metadata, the same version everywhere, a clear word where the build cannot work."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dlkernels

ROOT = Path(__file__).parent.parent

# Each of these costs time or is an extra; `import dlkernels` must work, and be quick, without them.
LAZY = ["triton", "sklearn", "skimage", "scipy", "matplotlib", "rich", "click", "jinja2", "tqdm", "pytest", "setuptools", "pybind11"]


def imported_by(statement: str) -> set[str]:
    """Names of the modules in a fresh interpreter after ``statement``."""
    code = f"{statement}; import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(result.stdout.split())


@pytest.fixture(scope="module")
def added() -> set[str]:
    """Modules that ``import dlkernels`` loads and ``import torch`` does not."""
    return imported_by("import dlkernels") - imported_by("import torch")


@pytest.mark.parametrize("name", LAZY)
def test_import_leaves_out(name: str, added: set[str]) -> None:
    assert name not in added


def test_import_is_small(added: set[str]) -> None:
    """Besides its own modules the package may load a few of torch's lazy ones, never a subsystem such as torch._inductor."""
    foreign = {name for name in added if name.split(".")[0] != "dlkernels"}
    assert not {name for name in foreign if name.startswith(("torch._inductor", "torch._dynamo", "sympy", "numpy.f2py"))}
    assert len(foreign) < 40, sorted(foreign)


def test_version_is_one() -> None:
    assert importlib.metadata.version("dlkernels") == dlkernels.__version__


def test_metadata() -> None:
    meta = importlib.metadata.metadata("dlkernels")
    assert meta["Requires-Python"] == ">=3.10"
    assert {"test", "bench", "course"} <= set(meta.get_all("Provides-Extra") or [])
    needs = importlib.metadata.requires("dlkernels") or []
    assert "torch>=2.11" in needs
    (triton,) = (need for need in needs if need.startswith("triton"))
    assert "Linux" in triton and "x86_64" in triton
    extras_only = {"scikit-learn", "scikit-image", "matplotlib", "pytest", "ruff", "mypy"}
    assert not [need for need in needs if "extra ==" not in need and need.startswith(tuple(extras_only))]


def test_command_is_installed() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="dlkernels")
    assert callable(command.load())


def test_unknown_compiler_is_named() -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "'no-such-compiler'" in result.stderr
    assert "apt install g++" in result.stderr and "xcode-select --install" in result.stderr
