"""The search for the first NaN: every place it can begin is provoked once. And learning one batch by heart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dlkernels.nn as nn
from dlkernels import functional as F
from dlkernels import optim
from dlkernels.train import Batches, NotFinite, Trainer, overfit_one_batch


class Sqrt(torch.nn.Module):
    """Fine at 0, where its derivative is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.detach().min()).sqrt()


class Log(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Times(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def model_of(*middle: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(nn.Linear(8, 16), *middle, nn.Linear(16, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def caught(model: torch.nn.Module, batches: Any, loss: Any = F.cross_entropy, make: Any = optim.AdamW, **options: Any) -> NotFinite:
    options = {"max_norm": 1.0} | options
    trainer = Trainer(model, loss, make(model.parameters(), lr=options.pop("lr", 0.01)), **options)
    before = []

    class Spy:
        def __iter__(self) -> Any:
            for xy in batches:
                before.append([p.detach().clone() for p in model.parameters()])
                yield xy

    with pytest.raises(NotFinite) as error:
        trainer.fit(Spy(), epochs=1)
    if options["look_every" if "look_every" in options else "max_norm"] is not None and trainer.look_every == 1:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[-1], strict=True)), "the step that failed changed a weight"
    assert f"step {error.value.step} " in str(error.value)
    return error.value


@pytest.mark.parametrize("world", [torch.optim, optim], ids=["torch", "ours"])
def test_input(world: Any) -> None:
    x, y = batch()
    bad = x.clone()
    bad[3, 5] = math.nan
    error = caught(model_of(), [(x, y), (x, y), (bad, y)], make=world.AdamW)
    assert (error.step, error.where, error.module) == (2, "input", "")
    assert "the batch's x: 1 NaN of 96 numbers, the others between" in str(error)


def test_output_of_a_module() -> None:
    error = caught(model_of(nn.ReLU(), Log()), [batch()])
    assert (error.step, error.where, error.module) == (0, "output", "2")
    assert "the output of 2 (Log)" in str(error)
    assert "from inputs that are finite" in str(error)


def test_loss() -> None:
    def log_of_softmax(z: Tensor, y: Tensor) -> Tensor:
        return -torch.softmax(1000 * z, 1).log().gather(1, y[:, None]).mean()

    error = caught(model_of(), [batch()], loss=log_of_softmax)
    assert (error.where, error.module) == ("loss", "")
    assert "raw logits" in str(error)
    error = caught(model_of(Times(1e30)), [batch()], loss=lambda z, y: (z * z).mean())
    assert error.where == "loss"
    assert "lower the learning rate" in str(error)
    assert "log(0)" not in str(error)


@pytest.mark.parametrize("world", [torch.optim, optim], ids=["torch", "ours"])
def test_gradient_of_an_output(world: Any) -> None:
    error = caught(model_of(nn.Tanh(), Sqrt()), [batch()], make=world.AdamW)
    assert (error.where, error.module) == ("gradient", "2")
    assert "norm of the gradient is" in str(error)
    assert "the gradient of the output of 1 (Tanh), made by the backward of 2 (Sqrt)" in str(error)
    assert "clipping cannot help" in str(error)


def test_gradients_that_explode() -> None:
    model = model_of(Times(1e25), Times(1e25))
    for p in list(model.parameters())[:2]:
        torch.nn.init.zeros_(p)  # 0 times anything is 0 on the way there, and the factors multiply on the way back
    error = caught(model, [batch()])
    assert (error.where, error.module) == ("gradient", "1")
    assert "clip them with max_norm" in str(error)


def test_gradient_of_a_parameter() -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x.detach() + self.s.sqrt()

    error = caught(model_of(Scale()), [batch()])
    assert (error.where, error.module) == ("gradient", "1")
    assert "the gradient of s of 1 (Scale)" in str(error)


def test_parameter_that_an_unclipped_step_spoiled() -> None:
    x, y = batch()
    error = caught(model_of(), [(x, y)] * 10, lr=1e38, max_norm=None, make=optim.SGD)
    assert error.where in ("parameter", "output")
    assert error.step > 0


def test_is_found_later_when_looked_for_less_often() -> None:
    x, y = batch()
    bad = x.clone()
    bad[0, 0] = math.inf
    error = caught(model_of(), [(x, y), (bad, y), (bad, y), (bad, y), (x, y)], look_every=3)
    assert (error.step, error.where) == (3, "input")


def test_accumulated_batches_are_searched_one_by_one() -> None:
    x, y = batch()
    bad = x.clone()
    bad[0, 0] = math.nan
    assert caught(model_of(), [(x, y), (bad, y)], accumulate=2).where == "input"


def test_the_search_repeats_the_random_numbers_of_the_step() -> None:
    """A NaN that only one dropout mask lets through is found again."""

    class Rare(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (torch.rand(()) > 0.2)

    for seed in range(5):
        error = caught(model_of(Rare()), [batch()] * 100, seed=seed)
        assert (error.where, error.module) == ("output", "1")


def test_without_the_guard_training_goes_on() -> None:
    x, y = batch()
    model = model_of()
    trainer = Trainer(model, F.cross_entropy, optim.AdamW(model.parameters()), guard=False)
    assert math.isnan(trainer.fit([(x * math.nan, y)], epochs=1)["train_loss"][0])


def test_a_loss_scale_that_overflows_is_no_error() -> None:
    """The scaler starts at 65536, skips updates and halves the scale until float16 gradients fit."""
    x, y = batch()
    model = model_of()
    trainer = Trainer(model, lambda z, t: 50 * F.cross_entropy(z, t), optim.AdamW(model.parameters()), precision="float16", max_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    trainer.fit([(100 * x, y)], epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    trainer.fit([(100 * x, y)], epochs=20)
    assert trainer.scaler.get_scale() < 65536
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_one_batch_by_heart() -> None:
    x, y = batch()
    model = torch.nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    result = overfit_one_batch(model, F.cross_entropy, x, y)
    assert result.learned
    assert result.losses[-1] <= 0.05 * result.losses[0]
    assert "learned one batch by heart" in result.text
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("bug", ["wrong labels", "dead", "NaN"])
def test_a_bug_keeps_it_from_learning_one_batch(bug: str) -> None:
    x, y = batch()
    model = model_of(nn.ReLU())
    if bug == "wrong labels":
        x = x[:1].expand(12, 8)  # one input, three answers
    elif bug == "dead":
        with torch.no_grad():
            model[0].weight.zero_()  # type: ignore[index]
            model[0].bias.fill_(-1)  # type: ignore[index]
    else:
        x = x * math.nan
    result = overfit_one_batch(model, F.cross_entropy, x, y, steps=50)
    assert not result.learned
    assert "did NOT learn" in result.text
    assert len(result.losses) == (1 if bug == "NaN" else 51)


def test_batches_in_order_are_the_data() -> None:
    x, y = batch()
    assert torch.equal(torch.cat([a for a, _ in Batches(x, y, 5, shuffle=False)]), x)
    shuffled = Batches(x, y, 5)
    first = torch.cat([a for a, _ in shuffled])
    assert torch.equal(first, torch.cat([a for a, _ in shuffled]))
    shuffled.set_epoch(1)
    assert not torch.equal(first, torch.cat([a for a, _ in shuffled]))
    assert len(shuffled) == 3
