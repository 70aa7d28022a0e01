"""The training loop against the same steps written out by hand, interruption and resumption, schedules, patience, precision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import dlkernels.nn as nn
from dlkernels import functional as F
from dlkernels import optim
from dlkernels.train import Batches, Trainer, accuracy, make_schedule

M, K, N = 96, 12, 3


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator)
    return x, (x[:, :N] + 0.1 * x[:, N : 2 * N]).argmax(1)


def build(dropout: float = 0.2, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(K, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, N)).to(dtype)


def trainer_of(model: torch.nn.Module, **options: Any) -> Trainer:
    make = options.pop("optimizer", optim.AdamW)
    return Trainer(model, F.cross_entropy, make(model.parameters(), lr=0.01), **options)


def states_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("world", [torch.optim, optim], ids=["torch", "ours"])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_is_the_six_steps(world: Any, max_norm: float | None) -> None:
    x, y = data()
    by_loop, by_hand = build(0.0, torch.float64), build(0.0, torch.float64)
    trainer_of(by_loop, optimizer=world.AdamW, max_norm=max_norm).fit([(x.double(), y)] * 5, epochs=2)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(by_hand(x.double()), y).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), max_norm)
        optimizer.step()
    for name, value in by_loop.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_learns_and_returns_a_history() -> None:
    x, y = data()
    trainer = trainer_of(build(), max_norm=1.0, metrics={"val_accuracy": accuracy})
    history = trainer.fit(Batches(x, y, 16), Batches(x, y, 40, shuffle=False), epochs=30)
    assert set(history) == {"train_loss", "val_loss", "val_accuracy", "lr", "seconds"}
    assert all(len(values) == 30 for values in history.values())
    assert history["val_accuracy"][-1] > 0.95
    assert trainer.progress.step == 30 * 6
    with torch.no_grad():  # the model is left as it was judged; 96 rows in batches of 40, 40 and 16 count by their rows
        assert history["val_loss"][-1] == pytest.approx(F.cross_entropy(trainer.model(x), y).item(), rel=1e-5)


@pytest.mark.parametrize("rows", [96, 90], ids=["even", "a smaller last batch"])
def test_accumulated_gradients_are_those_of_a_large_batch(rows: int) -> None:
    x, y = (t[:rows] for t in data())
    losses, weights = [], []
    for batch_size, accumulate in ((96, 1), (24, 4)):
        model = torch.nn.Sequential(nn.LinearReLU(K, 8), nn.Linear(8, N)).double()
        torch.manual_seed(3)
        for p in model.parameters():
            torch.nn.init.normal_(p)
        trainer = trainer_of(model, accumulate=accumulate, max_norm=0.5)
        history = trainer.fit(Batches(x.double(), y, batch_size, shuffle=False), epochs=3)
        assert trainer.progress.step == 3
        losses.append(history["train_loss"])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-10, atol=1e-12)


class Stop(Exception):
    pass


class Interrupting:
    """Batches that break off once, after so many of them."""

    def __init__(self, batches: Any, after: int) -> None:
        self.batches, self.left = batches, after

    def __iter__(self) -> Any:
        for batch in self.batches:
            if self.left == 0:
                self.left = -1
                raise Stop
            self.left -= 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        getattr(self.batches, "set_epoch", lambda epoch: None)(epoch)


def noisy(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Data augmentation in the loader, which draws from the same generator as dropout."""
    return torch.stack([x + 0.01 * torch.randn_like(x) for x, _ in batch]), torch.stack([y for _, y in batch])


def loader(kind: str) -> Any:
    x, y = data()
    if kind == "batches":
        return Batches(x, y, 16)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, collate_fn=noisy)


@pytest.mark.parametrize("kind", ["batches", "dataloader"])
@pytest.mark.parametrize("after", [4, 6, 11, 16], ids=lambda n: f"after {n}")
@pytest.mark.parametrize("schedule", ["one_cycle", "plateau"])
def test_an_interrupted_run_goes_on_bit_for_bit(kind: str, after: int, schedule: str, tmp_path: Path) -> None:
    def run(folder: Path) -> Trainer:
        model = build()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        scheduler = make_schedule(schedule, optimizer, 3, 6)
        return Trainer(model, F.cross_entropy, optimizer, scheduler=scheduler, max_norm=1.0, folder=folder, save_every=2, log_every=1)

    val = Batches(*data(1), 96, shuffle=False)
    whole = run(tmp_path / "whole")
    expected = whole.fit(loader(kind), val, epochs=3)
    torch.manual_seed(12345)  # whatever happens between
    with pytest.raises(Stop):
        run(tmp_path / "broken").fit(Interrupting(loader(kind), after), val, epochs=3)
    again = run(tmp_path / "broken")
    history = again.fit(loader(kind), val, epochs=3, resume=True)
    assert {name: values for name, values in history.items() if name != "seconds"} == {
        name: values for name, values in expected.items() if name != "seconds"
    }
    assert states_equal(again.model, whole.model)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[1:] for name in ("whole", "broken")]
    steps, steps_again = ([line for line in log if '"epoch"' not in line] for log in logs)
    assert steps == steps_again


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    x, y = data()
    first = trainer_of(build(), folder=tmp_path)
    history = first.fit(Batches(x, y, 32), epochs=2)
    again = trainer_of(build(), folder=tmp_path)
    assert again.fit(Batches(x, y, 32), epochs=2, resume=True) == history
    assert states_equal(again.model, first.model)
    assert len(again.fit(Batches(x, y, 32), epochs=3)["train_loss"]) == 3


def test_best_is_the_best_epoch_and_loads_into_a_bare_model(tmp_path: Path) -> None:
    x, y = data()
    trainer = trainer_of(build(), folder=tmp_path, optimizer=optim.SGD)
    history = trainer.fit(Batches(x, y, 16), Batches(x, y, 96), epochs=3)
    trainer.optimizer.param_groups[0]["lr"] = 100.0  # from here on it gets worse
    history = trainer.fit(Batches(x, y, 16), Batches(x, y, 96), epochs=5)
    assert history["val_loss"][-1] > 2 * min(history["val_loss"])
    model = build()
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True)["model"])
    model.eval()
    assert F.cross_entropy(model(x), y).item() == pytest.approx(min(history["val_loss"]), rel=1e-6)


def test_patience() -> None:
    x, y = data()
    trainer = trainer_of(build(), patience=3, optimizer=lambda params, lr: optim.SGD(params, lr=1e-12))
    trainer.min_delta = 1.0
    history = trainer.fit(Batches(x, y, 96), epochs=50)
    assert len(history["train_loss"]) == 1 + 3
    assert trainer.stopped == "patience"


@pytest.mark.parametrize("schedule", ["cosine", "plateau", "one_cycle", "constant"])
def test_schedules(schedule: str) -> None:
    x, y = data()
    model = build()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = make_schedule(schedule, optimizer, 10, 6)
    trainer = Trainer(model, lambda z, t: F.cross_entropy(z, t) * 0 + 1, optimizer, scheduler=scheduler)
    lr = trainer.fit(Batches(x, y, 16), epochs=10)["lr"]
    expected = {
        "cosine": [0.1 * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)],
        "plateau": [0.1] * 7 + [0.01] * 3,
        "constant": [0.1] * 10,
    }
    if schedule == "one_cycle":
        assert max(lr) == pytest.approx(0.1, rel=0.05)
        assert lr[-1] < 1e-4
    else:
        assert lr == pytest.approx(expected[schedule])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("world", [torch.optim, optim], ids=["torch", "ours"])
def test_mixed_precision_learns(precision: str, world: Any, tmp_path: Path) -> None:
    x, y = data()
    seen: list[torch.dtype] = []

    def loss(z: Tensor, t: Tensor) -> Tensor:
        seen.append(z.dtype)
        return F.cross_entropy(z, t)

    model = build(0.0)
    optimizer = world.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, loss, optimizer, precision=precision, max_norm=1.0, metrics={"val_accuracy": accuracy}, folder=tmp_path)
    history = trainer.fit(Batches(x, y, 16), Batches(x, y, 96), epochs=30)
    assert set(seen) == {getattr(torch, precision)}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert history["val_accuracy"][-1] > 0.9
    if precision == "float16":
        assert trainer.scaler.get_scale() > 1
        again = Trainer(build(0.0), loss, world.AdamW(model.parameters()), precision=precision, folder=tmp_path)
        assert again.keeper is not None
        assert again.keeper.resume()
        assert again.scaler.state_dict() == trainer.scaler.state_dict()


def test_ctrl_c_returns_the_finished_epochs(tmp_path: Path) -> None:
    x, y = data()
    calls = 0

    def impatient(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return F.cross_entropy(z, t)

    model = build()
    trainer = Trainer(model, impatient, optim.AdamW(model.parameters()), folder=tmp_path)
    assert len(trainer.fit(Batches(x, y, 24), epochs=9)["train_loss"]) == 2
    assert trainer.stopped == "interrupted"
    assert len(trainer.fit(Batches(x, y, 24), epochs=4)["train_loss"]) == 4  # the broken epoch is begun anew
    assert trainer.progress.updates == 0


def test_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = build()
    torch.manual_seed(5)
    trainer_of(model).fit(loader("dataloader"), epochs=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half"}, "precision must be one of None, bfloat16, float16, got 'half'"),
        ({"accumulate": 0}, "accumulate must be a positive integer, got 0"),
        ({"accumulate": 1.5}, "accumulate must be a positive integer, got 1.5"),
        ({"patience": -1}, "patience must be a positive integer, got -1"),
        ({"max_norm": 0.0}, "max_norm must be positive or None, got 0.0"),
        ({"max_norm": math.nan}, "max_norm must be positive or None, got nan"),
        ({"schedule_every": "week"}, "schedule_every must be 'step' or 'epoch', got 'week'"),
        ({"trackers": ["jsonl"]}, "need a folder"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(build(), **options)


def test_bad_batches(tmp_path: Path) -> None:
    x, y = data()
    with pytest.raises(ValueError, match="x has 96 rows and y 95"):
        Batches(x, y[1:], 8)
    with pytest.raises(ValueError, match="batch_size must be a positive multiple of the number of processes .1., got 0"):
        Batches(x, y, 0)
    with pytest.raises(ValueError, match="train has no batches"):
        trainer_of(build()).fit([], epochs=1)
    with pytest.raises(ValueError, match="resume=True needs a folder"):
        trainer_of(build()).fit([(x, y)], epochs=1, resume=True)
    with pytest.raises(ValueError, match="unknown schedule 'linear'; known: constant, cosine, plateau, one_cycle"):
        make_schedule("linear", optim.SGD(build().parameters()), 1, 1)
    with pytest.raises(Stop):
        trainer_of(build(), folder=tmp_path, save_every=1).fit(Interrupting(Batches(x, y, 16), 4), epochs=1)
    with pytest.raises(ValueError, match="the checkpoint is 4 batches into an epoch, but train has only 2"):
        trainer_of(build(), folder=tmp_path).fit(Batches(x, y, 48), epochs=1, resume=True)
