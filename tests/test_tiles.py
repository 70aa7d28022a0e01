"""The AMX micro-kernels on a CPU without AMX: tiles.cpp runs the product on tiles emulated in plain C++."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dlkernels import backend

ROOT = Path(__file__).parent.parent
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif("avx512" not in backend.supported_isas(), reason="a tile's row is one AVX-512 vector")
def test_products_on_emulated_tiles(tmp_path: Path) -> None:
    program = tmp_path / "tiles"
    source = ["-DEMULATE_TILES", f"-I{ROOT}/csrc/cpu", str(ROOT / "tests" / "tiles.cpp")]
    subprocess.run(["g++", "-std=c++20", "-O2", "-Wno-psabi", *AVX512, *source, "-o", str(program), "-pthread"], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout) == (0, "")
