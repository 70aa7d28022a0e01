"""What the options of `dlkernels train` do: each changes the run, or is refused with words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import ENVIRONMENT, SMALL

from dlkernels.cli import run
from dlkernels.models import MODELS
from dlkernels.train import Trainer, race

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytestmark = pytest.mark.skipif(SMALL, reason="what the options do is nothing that the interpreter could change")

CURVES = ("train_loss", "val_loss", "val_accuracy")


def trained(capsys: pytest.CaptureFixture[str], *arguments: str, world: str = "dlkernels", code: int = 0) -> list[dict[str, Any]]:
    """The histories of one training run."""
    found = run(["train", "mlp", "--nn", world, "--device", "cpu", "--threads", "1", "--json=-", *arguments])
    out, err = capsys.readouterr()
    assert found == code, err
    return json.loads(out)["models"]


def logged(folder: Path) -> list[dict[str, Any]]:
    """What the steps told metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_resumed_run_goes_on_to_the_same_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                                   tmp_path: Path) -> None:  # fmt: skip
    whole = trained(capsys, "--epochs", "3")[0]
    epoch = Trainer.epoch

    def interrupted(self: Trainer, *batches: Any) -> Any:
        if self.progress.epoch == 1:
            raise KeyboardInterrupt
        return epoch(self, *batches)

    options = ("--epochs", "3", "--folder", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", interrupted)
        assert len(trained(capsys, *options, code=130)[0]["train_loss"]) == 1
    resumed = trained(capsys, *options, "--resume")[0]
    assert {name: resumed[name] for name in CURVES} == {name: whole[name] for name in CURVES}
    steps = len(whole["first_losses"]) // 3
    assert resumed["first_losses"] == whole["first_losses"][steps:], "it began anew"


def test_trackers_are_told_every_step_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    arguments = [word for name in ("jsonl", "tensorboard", "jsonl") for word in ("--track", name)]
    found = trained(capsys, "--epochs", "1", "--folder", str(tmp_path), *arguments)[0]
    assert [line["loss"] for line in logged(tmp_path)] == found["first_losses"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_folder_alone_has_checkpoints_and_json_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trained(capsys, "--epochs", "1", "--folder", str(tmp_path), "--schedule", "constant")
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "best.pt", "metrics.jsonl"}
    assert {line["lr"] for line in logged(tmp_path)} == {MODELS["mlp"].lr}


def test_one_cycle_ends_with_the_run_however_many_batches_an_update_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trained(capsys, "--epochs", "2", "--folder", str(tmp_path), "--schedule", "one_cycle", "--accumulate", "2")
    rates = [line["lr"] for line in logged(tmp_path)]
    assert len(rates) == 24
    assert max(rates) > 0.9 * MODELS["mlp"].lr and rates[-1] < 0.1 * MODELS["mlp"].lr


@pytest.mark.parametrize("option", ["--precision=bfloat16", "--precision=float16", "--accumulate=2", "--max-norm=0.01"])
def test_the_losses_are_others(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain, other = (trained(capsys, "--epochs", "1", *more)[0]["first_losses"] for more in ((), (option,)))
    assert other[0] == pytest.approx(plain[0], rel=0.1)
    assert other[-1] != plain[-1]


def test_both_worlds_have_the_options_and_so_has_the_step_that_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, step = [], Trainer.training_step

    def watched(self: Trainer, batches: Any) -> Any:
        seen.append((len(batches), self.precision, self.max_norm))
        return step(self, batches)

    monkeypatch.setattr(Trainer, "training_step", watched)
    rows = trained(capsys, "--epochs", "1", "--precision=bfloat16", "--accumulate=2", "--max-norm=0.5", world="both")
    assert [row["step"]["batch"] for row in rows] == [128, 128]
    assert set(seen) == {(2, "bfloat16", 0.5), (1, "bfloat16", 0.5)}  # the last update of an epoch has the batch that is left
    assert set(seen[-30:]) == {(2, "bfloat16", 0.5)}


@pytest.mark.parametrize("world", ["dlkernels", "both"])
def test_patience_ends_a_run(world: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "time_steps", lambda *args, **options: {})
    for row in trained(capsys, "--epochs", "40", "--patience", "1", world=world):
        *falling, last = row["val_loss"]
        assert len(falling) < 39
        assert falling == sorted(falling, reverse=True) and last >= falling[-1]


def test_one_batch_is_learned_first(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "time_steps", lambda *args, **options: {})
    command = ["train", "mlp", "--epochs", "1", "--device", "cpu", "--overfit"]
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert err.count("learned one batch by heart") == 2 and "accuracy" in out
    stubborn = replace(MODELS["mlp"], loss=lambda nn: lambda prediction, y: 5 + nn.functional.cross_entropy(prediction, y))
    monkeypatch.setitem(MODELS, "mlp", stubborn)
    assert run(command) == 1
    out, err = capsys.readouterr()
    assert "did NOT learn" in err and not out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--folder", "run"), ["--folder", "--nn native or --nn dlkernels"]),
        (("--resume",), ["--resume", "--nn native or --nn dlkernels"]),
        (("--track", "jsonl"), ["--track", "--nn native or --nn dlkernels"]),
        (("--spread", "ddp"), ["--spread", "--nn native or --nn dlkernels"]),
        (("--nn", "native", "--resume"), ["--resume needs --folder"]),
        (("--nn", "native", "--track", "jsonl"), ["--track needs --folder"]),
        (("--nn", "native", "--spread", "ddp"), ["torchrun"]),
        (("--nn", "native", "--folder", __file__), ["is a file"]),
        (("--precision", "int8"), ["float32", "bfloat16", "float16"]),
        (("--schedule", "linear"), ["constant", "one_cycle"]),
        (("--track", "paper"), ["jsonl", "mlflow"]),
        (("--patience", "0"), ["--patience"]),
        (("--accumulate", "0"), ["--accumulate"]),
        (("--max-norm", "0"), ["--max-norm"]),
    ],
)
def test_a_wrong_option_says_what_is_right(arguments: tuple[str, ...], words: list[str], capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    code = run(["train", "mlp", *arguments])
    out, err = capsys.readouterr()
    assert code == 2 and not out
    for word in words:
        assert word in err


def test_under_torchrun_every_process_has_its_own_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert run(["train", "mlp", "--nn", "native", "--spread", "ddp", "--device", "cpu"]) == 2
    assert "leave out --device" in capsys.readouterr().err


def test_processes_that_share_nothing_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["train", "mlp", "--nn", "native", "--epochs", "1"]) == 2
    assert "each of the 2 processes" in (err := capsys.readouterr().err) and "--spread ddp" in err
    monkeypatch.setenv("WORLD_SIZE", "1")
    trained(capsys, "--epochs", "1")


def test_a_resumed_run_may_be_longer_but_not_another(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for epochs in ("1", "3"):
        trained(capsys, "--epochs", epochs, "--folder", str(tmp_path), "--resume")
    rates = list(dict.fromkeys(line["lr"] for line in logged(tmp_path)))
    assert rates == pytest.approx([MODELS["mlp"].lr * part for part in (1, 0.75, 0.25)])  # the last two of the curve over 3
    again = ["--epochs", "3", "--folder", str(tmp_path), "--resume", "--schedule", "one_cycle"]
    assert run(["train", "mlp", "--nn", "native", "--device", "cpu", *again]) == 1
    assert "there the schedule is CosineAnnealingLR, here OneCycleLR" in capsys.readouterr().err


def test_what_the_trainer_refuses_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        assert run(["train", "mlp", "--nn", "native", "--device", "cpu", "--epochs", "1", *arguments]) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("Error: ") and err.count("\n") == 1
        return err

    assert "max_norm" in told("--max-norm", "nan")
    assert "/dev/null/run" in told("--folder", "/dev/null/run")
    (tmp_path / "last.pt").write_text("no checkpoint")
    assert "last.pt" in told("--folder", str(tmp_path), "--resume")
    monkeypatch.setitem(MODELS, "mlp", replace(MODELS["mlp"], loss=lambda nn: lambda prediction, y: prediction.mean() / 0))
    assert "First not finite" in told()


@pytest.mark.parametrize(("how", "kept"), [("ddp", "last.pt"), ("fsdp", "last")])
def test_on_two_processes(how: str, kept: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--nn", "dlkernels", "--spread", how, "--epochs", "1", "--folder", str(tmp_path), "--overfit", "--json=-"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dlkernels", "train", "mlp_plain", *options]
    result = subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    spread = json.loads(result.stdout)["models"][0]  # of one process: two would be no JSON
    assert result.stderr.count("learned one batch") == 1
    assert (tmp_path / kept).exists()
    assert run(["train", "mlp_plain", "--nn", "dlkernels", "--epochs", "1", "--device", "cpu", "--json=-"]) == 0
    alone = json.loads(capsys.readouterr().out)["models"][0]
    assert spread["first_losses"] != alone["first_losses"]  # of the rows of process 0
    assert spread["val_loss"] == pytest.approx(alone["val_loss"], rel=0.05)
