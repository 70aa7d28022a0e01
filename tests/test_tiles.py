"""The AMX micro-kernels on any CPU: tiles.cpp runs the product on tiles emulated in plain C++."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_cxx_compiler

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_products_on_emulated_tiles(tmp_path: Path) -> None:
    program, source = tmp_path / "tiles", ROOT / "tests" / "tiles.cpp"
    flags = ["-std=c++20", "-O2", "-Wno-psabi", "-DEMULATE_TILES", f"-I{ROOT}/csrc/cpu", "-pthread"]
    subprocess.run([*get_cxx_compiler().split(), *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout) == (0, "")
