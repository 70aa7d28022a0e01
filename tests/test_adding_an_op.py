"""docs/adding_an_op.md works: its three files, put into a copy of the package and built, pass the generic tests; nothing else is edited.
Its score function, put where the page says, gives both of attention's twins what its formula says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(?:python|cpp)\n(?:#|//) (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Builds the one new C++ file into a library of its own, so that the others need not be compiled again.
CHILD = """
import sys
from pathlib import Path

import dlkernels
import pytest
from torch.utils.cpp_extension import load

assert Path(dlkernels.__file__).is_relative_to(Path.cwd()), dlkernels.__file__
assert "squared_relu" in dlkernels.OPS
if not dlkernels.backend.TRITON_ON_CPU:
    load("squared_relu", ["csrc/cpu/squared_relu.cpp"], extra_include_paths=[sys.argv[1]], build_directory=".", is_python_module=False,
         extra_cflags=["-O1", "-fvisibility=hidden", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000"])
sys.exit(pytest.main([*sys.argv[2:], "-q", "-p", "no:cacheprovider"]))
"""


# One block of the page: lines that begin with + come where they stand between the others, those with - go.
CHANGE = re.compile(r"^```diff\n--- (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# The one C++ file that knows the functions, built again, takes the place of what the library brings.
FADING = """
import torch
from torch.utils.cpp_extension import load

import dlkernels
from dlkernels.functional import attention

if not dlkernels.backend.TRITON_ON_CPU:
    load("fading", ["csrc/cpu/scaled_dot_product_attention.cpp"], build_directory=".", is_python_module=False,
         extra_cflags=["-O1", "-fvisibility=hidden", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000"])
q, k, v = (torch.randn(2, 3, T, 8, dtype=torch.float64).requires_grad_() for T in (5, 9, 9))
share = 1 / (1 + 0.3 * (torch.arange(4, 9)[:, None] - torch.arange(9)).abs())
right = (q @ k.mT * 8**-0.5 * share).softmax(-1) @ v
found = attention(q, k, v, score_function=("fading", 0.3))
found, right = ((y, *torch.autograd.grad(y.sin().sum(), (q, k, v))) for y in (found, right))
torch.testing.assert_close(found, right)
print("as the formula says")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's files in their places."""
    folder = tmp_path_factory.mktemp("adding_an_op")
    shutil.copytree(ROOT / "dlkernels", folder / "dlkernels", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = dict(BLOCK.findall((ROOT / "docs/adding_an_op.md").read_text()))
    assert sorted(blocks) == ["csrc/cpu/squared_relu.cpp", "dlkernels/gpu/squared_relu.py", "dlkernels/ops/squared_relu.py"]
    for name, text in blocks.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def run(folder: Path, *tests: str, **environment: str) -> str:
    command = [sys.executable, "-c", CHILD, str(ROOT / "csrc/cpu"), str(ROOT / "tests/test_ops.py"), f"--rootdir={ROOT}", *tests]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DLKERNELS_", "PYTEST_"))}
    variables = {**inherited, "PYTHONPATH": str(folder), **environment}
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return result.stdout


def test_cpu(copy: Path) -> None:
    output = run(copy, "-k", "squared_relu")
    assert re.search(r"\b[1-9]\d* passed", output) and "failed" not in output


def test_triton(copy: Path) -> None:
    pytest.importorskip("triton")
    output = run(copy, "-k", "squared_relu and values_and_gradients", TRITON_INTERPRET="1", DLKERNELS_BACKEND="triton")
    assert re.search(r"\b[1-9]\d* passed", output) and "failed" not in output


@pytest.mark.parametrize("twin", ["cpu", "triton"])
def test_score_function(twin: str, tmp_path: Path) -> None:
    if twin == "triton":
        pytest.importorskip("triton")
    for folder in ("dlkernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    changes = CHANGE.findall((ROOT / "docs/adding_an_op.md").read_text())
    assert len(changes) == 4
    for name, block in changes:
        lines, path = block.splitlines(keepends=True), tmp_path / name
        before, after = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        assert path.read_text().count(before) == 1, f"{name} has not once: {before}"
        path.write_text(path.read_text().replace(before, after))
    chosen = {"TRITON_INTERPRET": "1", "DLKERNELS_BACKEND": "triton"} if twin == "triton" else {}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DLKERNELS_", "TRITON_"))}
    variables = {**inherited, "PYTHONPATH": str(tmp_path), **chosen}
    result = subprocess.run([sys.executable, "-c", FADING], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert "as the formula says" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]


def test_lint(copy: Path) -> None:
    files = [str(path) for path in copy.glob("dlkernels/*/squared_relu.py")]
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *files]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert len(files) == 2 and result.returncode == 0, result.stdout + result.stderr
