"""The `dlkernels` command as a newcomer meets it: a narrow terminal, a pipe, a wrong word, Ctrl-C in the middle."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import COMMAND, ENVIRONMENT
from torch import Tensor

import dlkernels
from dlkernels import OPS, assembly, show
from dlkernels.backend import TRITON_ON_CPU
from dlkernels.bench import limits, suite
from dlkernels.bench.optimizers import OPTIMIZERS
from dlkernels.cli import run
from dlkernels.models import MODELS

FAST = replace(suite.QUICK, min_seconds=0.0, min_samples=3, max_seconds=0.1)


@pytest.fixture
def one_op(monkeypatch: pytest.MonkeyPatch) -> str:
    """No optimizer, and only linear_relu, at one small size, timed hastily, as the machine is."""
    size = {"M": 8, "K": 16, "N": 8}
    small = replace(OPS["linear_relu"], samples=[{"M": 3, "K": 5, "N": 7}], bench=[size], quick=[size], tiny=[])
    monkeypatch.setattr(suite, "MODES", dict.fromkeys(suite.MODES, FAST))
    for seconds in ("FULL_SECONDS", "QUICK_SECONDS"):
        monkeypatch.setattr(limits, seconds, 0.3)
    monkeypatch.setattr(limits, "_measured", {})
    _only(monkeypatch, small)
    return small.name


@pytest.fixture
def wrong_op(one_op: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same op with a kernel that is 1 % off."""

    def off(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return 1.01 * dlkernels.functional.linear_relu(x, weight, bias)

    _only(monkeypatch, replace(OPS[one_op], call=off))
    return one_op


def _only(monkeypatch: pytest.MonkeyPatch, op: Any) -> None:
    for name in list(OPS):
        monkeypatch.delitem(OPS, name)
    monkeypatch.setitem(OPS, op.name, op)
    for name in list(OPTIMIZERS):
        monkeypatch.delitem(OPTIMIZERS, name)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line run in this process."""
    code = run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def started(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **options)


# what is here


def test_info_names_every_op_and_what_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0 and {row["op"] for row in found["ops"]} == {*OPS, *OPTIMIZERS}
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["isa"]
    for row in found["ops"]:
        assert row["reason"] and row["implementation"]
        if row["op"] in OPTIMIZERS:
            continue
        example = OPS[row["op"]].make(lambda *shape: torch.zeros(shape), **OPS[row["op"]].samples[0])
        if row["device"] == "cpu" and "float32" in row["dtypes"]:
            assert row["implementation"] == dlkernels.explain(row["op"], *example).implementation


def test_info_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "info")
    assert code == 0 and all(name in out for name in OPS) and torch.__version__ in out
    assert "\x1b" not in out and all(line == line.rstrip() for line in out.splitlines())


@pytest.mark.parametrize("view", ["contract", "cpu", "gpu"])
def test_show_through_a_pipe_is_the_source_itself(view: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "show", "linear_relu", f"--{view}")
    page = show.pages(OPS["linear_relu"], view)[0]
    assert code == 0 and out.rstrip() == Path(page.origin).read_text().rstrip() and page.origin in err


def test_every_op_has_a_contract_and_two_twins() -> None:
    shown: list[Any] = [*OPS.values(), *OPTIMIZERS.values()]
    for op in shown:
        for view in ("contract", "cpu", "gpu"):
            assert show.pages(op, view)[0].text


@pytest.mark.parametrize(("name", "file"), [("linear_backward", "ops/linear.py"), ("adamw", "ops/optimizers.py")])
def test_show_finds_raw_ops_and_optimizers_and_is_the_contract_by_default(
    name: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = said(capsys, "show", name, "--json")
    found = json.loads(out)
    assert code == 0 and found["view"] == "contract" and found["pages"][0]["origin"].endswith(file)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(TRITON_ON_CPU, reason="no CPU library is loaded")
@pytest.mark.parametrize("name", ["linear", "adamw"])
def test_show_asm_finds_the_loop_that_multiplies(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "show", name, "--asm", "--json")
    pages = json.loads(out)["pages"]
    title, loop, function = pages[1]["title"], pages[1]["text"], pages[2]["text"]
    assert code == 0 and pages[0]["text"].count("\n") >= 2 and loop.splitlines()[-1] in function
    assert name != "adamw" or "rmsprop_" not in out
    assert re.search(r"busiest inner loop: \d+ vector multiplies", title) and len(assembly.MULTIPLY.findall(loop)) >= 4


@pytest.mark.parametrize(("view", "mark"), [("ptx", ".visible .entry"), ("sass", ".text.linear_forward")])
@pytest.mark.skipif(TRITON_ON_CPU, reason="interpreted kernels are not compiled")
def test_show_compiles_the_triton_twin(view: str, mark: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "show", "linear", f"--{view}")
    assert code == 0 and mark in out, err


# check


def test_check_passes_and_says_so(one_op: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "check", "--device", "cpu")
    assert code == 0 and one_op in out and "16 checks, 0 wrong" in out


def test_check_fails_with_a_wrong_kernel(wrong_op: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "check", wrong_op, "--dtype", "float32", "--device", "cpu")
    assert code == 1 and "4 checks, 4 wrong" in out and "dweight" in out
    code, out, _ = said(capsys, "check", wrong_op, "--dtype", "float32", "--device", "cpu", "--json")
    assert code == 1 and [row["ok"] for row in json.loads(out)["check"]] == [False] * 4


# bench


def test_bench_shows_ours_beside_eager(one_op: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ("bench", one_op, "--quick", "--no-compile", "--dtype", "float32", "--device", "cpu", "--threads", "1", "--json", str(file))
    code, out, err = said(capsys, *arguments)
    assert code == 0, err
    for words in ("8x16x8", "eager", "dlkernels", "vs eager", "of limit", "geometric mean", "microseconds"):
        assert words in out
    data = json.loads(file.read_text())
    assert {row["provider"] for row in data["bench"]} == {"eager", "dlkernels"}
    assert {row["threads"] for row in data["bench"]} == {1} and data["machine"]["threads"] == 1
    assert data["canary"]["before_s"] > 0 and data["limits"]["flops"] and data["overhead"]
    assert all(0 < row["limit_fraction"] for row in data["bench"])


def test_bench_json_on_standard_output_is_json_only(one_op: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "bench", one_op, "--no-compile", "--dtype", "float64", "--device", "cpu", "--json")
    assert code == 0 and {row["dtype"] for row in json.loads(out)["bench"]} == {"float64"}


def test_bench_does_not_count_a_wrong_result(wrong_op: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "bench", wrong_op, "--no-compile", "--dtype", "float32", "--device", "cpu")
    assert code == 1 and "wrong" in out and "geometric mean" not in out


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    hasty = "from dlkernels.bench import limits; limits.FULL_SECONDS = 0.3; from dlkernels.cli import main; main()"
    options = ["--full", "--no-compile", "--dtype", "float32", "--device", "cpu", "--json", str(file)]
    command = [sys.executable, "-c", hasty, "bench", "linear_relu", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (file.exists() and json.loads(file.read_text())["bench"]):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert json.loads(file.read_text())["bench"] and "64x784x256" in out


# report


def test_report_writes_a_page_and_its_numbers(one_op: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    name = "mlp_even_odd"
    for other in list(MODELS):
        monkeypatch.delitem(MODELS, other) if other != name else None
    monkeypatch.setitem(MODELS, name, replace(MODELS[name], epochs=1))
    code, out, err = said(capsys, "report", "--quick", "--no-compile", "--device", "cpu", "--out", str(tmp_path / "site"))
    assert code == 0, err
    page = tmp_path / "site" / "index.html"
    assert str(page) in out and one_op in page.read_text()
    data = json.loads((tmp_path / "site" / "results.json").read_text())
    assert all(data[section] for section in ("machine", "limits", "check", "bench", "models", "overhead", "canary"))


# train and tune


def test_train_compares_both(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "train", "mlp", "--epochs", "1", "--device", "cpu", "--json")
    rows = json.loads(out)["models"]
    assert code == 0 and [row["provider"] for row in rows] == ["eager", "dlkernels"]
    assert all(len(row["train_loss"]) == 1 and row["step"]["median_s"] > 0 for row in rows)


@pytest.mark.parametrize(("world", "provider"), [("native", "eager"), ("dlkernels", "dlkernels")])
def test_train_with_one(world: str, provider: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "train", "mlp", "--epochs", "1", "--nn", world, "--device", "cpu")
    assert code == 0 and provider in out and "accuracy" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "tune")
    assert code == 1 and "CUDA" in err


# wrong words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "liner"), ["unknown op 'liner'", "Did you mean 'linear'?", "linear_relu"]),
        (("bench", "conv9d"), ["unknown op 'conv9d'", "linear_relu", "rmsprop"]),
        (("check", "adamx"), ["unknown op 'adamx'", "Did you mean 'adam'?"]),
        (("show", "nothing"), ["unknown op 'nothing'", "linear_relu"]),
        (("show",), ["Missing argument"]),
        (("train", "transformer9"), ["unknown model", *MODELS]),
        (("bench", "--dtype", "int8"), ["int8", "float32", "bfloat16"]),
        (("bench", "--threads", "0"), ["0", "hardware threads"]),
        (("bench", "--threads", "100000"), ["100000", "hardware threads"]),
        (("bench", "--threads", "many"), ["many"]),
        (("bench", "--device", "tpu"), ["tpu"]),
        (("bench", "--device", "cuda:99"), ["cuda:99", "CUDA devices"]),
        (("bench", "--json", "linear"), ["is an op"]),
        (("bench", "--json", "adamw"), ["is an op"]),
        (("bench", "--json", "/"), ["is a folder"]),
        (("train", "mlp", "--epochs", "0"), ["epochs"]),
        (("nonsense",), ["No such command"]),
        (("bench", "--nonsense"), ["No such option"]),
    ],
)
def test_a_wrong_command_line_says_what_is_right(arguments: tuple[str, ...], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *arguments)
    assert code == 2 and not out
    for word in words:
        assert word in err


@pytest.mark.parametrize("command", [("bench", "linear", "--quick", "--json"), ("report", "--quick", "--out")])
def test_a_file_that_cannot_be_written_is_an_error_before_the_work(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *command, "/dev/null/results.html")
    assert code == 1 and not out and "cannot write" in err
