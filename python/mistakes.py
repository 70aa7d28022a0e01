"""The mistakes of lesson 14: nine ways to a loss that is NaN or infinite, each with its repair, and deep networks that do not learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.data import digits
from dlkernels.train import Batches

X, Y = digits().x_train, digits().y_train


def deep(depth: int, gain: float = 1.0) -> nn.Sequential:
    """64 inputs, ``depth`` hidden layers of 64 with ReLU, 10 outputs; He's weights times ``gain``."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.LinearReLU(64, 64) for _ in range(depth)), nn.Linear(64, 10))
    for p in model.parameters():
        nn.init.zeros_(p) if p.dim() == 1 else nn.init.normal_(p, std=gain * (2 / 64) ** 0.5)
    return model


def stacked(layer: Callable[[], torch.nn.Module], depth: int = 20) -> nn.Sequential:
    """``depth`` times what ``layer`` makes, 64 wide, then 10 outputs; torch's own first weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer() for _ in range(depth)), nn.Linear(64, 10))


class Skip(torch.nn.Module):
    """x + f(x): a way past the layers."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Detach(torch.nn.Module):
    """What ``.detach()``, ``.item()`` or a detour through NumPy do in the middle of a model: no gradient goes back from here."""

    def forward(self, h: Tensor) -> Tensor:
        return h.detach()


class Forgetful(optim.SGD):
    """Adds up the gradients of all steps."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class Standardised(torch.nn.Module):
    """Every pixel minus its mean, divided by its standard deviation, which is 0 where a pixel is white in every picture."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.mean, self.deviation = X.mean(0), X.std(0) + epsilon

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


class Distances(torch.nn.Module):
    """The nearer a prototype, the larger the logit. The prototypes begin as the first picture of each class: at distance 0."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.prototypes, self.epsilon = torch.nn.Parameter(torch.stack([X[Y == c][0] for c in range(10)])), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return -((x[:, None] - self.prototypes).square().sum(2) + self.epsilon).sqrt()


class SoftmaxByHand(torch.nn.Module):
    """exp(z) / sum exp(z). float16 ends at 65504, and exp(11.1) is more."""

    def __init__(self, minus_maximum: bool) -> None:
        super().__init__()
        self.minus_maximum = minus_maximum

    def forward(self, z: Tensor) -> Tensor:
        e = (z - z.amax(1, keepdim=True) if self.minus_maximum else z).exp()
        return e / e.sum(1, keepdim=True)


def squared(z: Tensor, y: Tensor) -> Tensor:
    """Squared error: its gradient grows with the error, where cross-entropy's is at most 1 per logit."""
    return F.mse_loss(z, F.one_hot(y, 10).float())


def log_of_softmax(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in two steps: the probability of an unlikely label is rounded to 0 before the logarithm sees it."""
    return -torch.softmax(z, 1).log().gather(1, y[:, None]).mean()


def log_of(p: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of probabilities, kept away from log(0)."""
    return -(p.float() + 1e-6).log().gather(1, y[:, None]).mean()


@dataclass
class Case:
    """What is trained wrongly, what is wrong where, and the same repaired."""

    name: str
    wrong: dict[str, Any]
    where: str  # as NotFinite has it; "" where rounding decides what overflows first
    module: str
    repair: str
    right: dict[str, Any]


def cases() -> list[Case]:
    """All nine, with fresh models."""
    train = Batches(X, Y, 64)
    in_order, bright, huge = list(Batches(X, Y, 64, shuffle=False)), [(255 * x, y) for x, y in train], [(3e4 * x, y) for x, y in train]
    bad = [(x.clone(), y) for x, y in train]
    bad[5][0][3, 7] = math.nan
    clean = [(x[x.isfinite().all(1)], y[x.isfinite().all(1)]) for x, y in bad]

    def by_hand(minus_maximum: bool) -> dict[str, Any]:
        model = nn.Sequential(deep(2), SoftmaxByHand(minus_maximum))
        return {"model": model, "loss": log_of, "batches": [(16 * x, y) for x, y in train], "lr": 0.01, "precision": "float16"}

    wrong_scale = {"batches": bright, "lr": 0.003}
    near, far = {"batches": in_order, "max_norm": 1.0}, {"batches": huge, "lr": 1e-8}
    return [
        Case("learning rate too high", {"model": deep(2), "loss": squared, "lr": 100.0}, "", "",
             "lr=1 instead of 100", {"model": deep(2), "loss": squared, "lr": 1.0}),
        Case("zero_grad forgotten", {"model": deep(10), "make": Forgetful, "lr": 0.03}, "", "",
             "zero_grad", {"model": deep(10), "lr": 0.03}),
        Case("log(0) in the loss", {"model": deep(2), "loss": log_of_softmax, **wrong_scale}, "loss", "",
             "cross_entropy of raw logits", {"model": deep(2), **wrong_scale}),
        Case("exploding gradients", {"model": deep(8, 1.5)}, "", "", "max_norm=1", {"model": deep(8, 1.5), "max_norm": 1.0}),
        Case("NaN in the data", {"model": deep(2), "batches": bad}, "input", "",
             "leave out its row", {"model": deep(2), "batches": clean}),
        Case("division by 0", {"model": nn.Sequential(Standardised(0), deep(2))}, "output", "0",
             "add 0.001 to what divides", {"model": nn.Sequential(Standardised(1e-3), deep(2))}),
        Case("the root of 0, whose slope is infinite", {"model": Distances(0), **near}, "gradient", "",
             "add 1e-6 under the root", {"model": Distances(1e-6), **near}),
        Case("exp beyond float16", by_hand(False), "output", "1", "subtract the maximum before exp", by_hand(True)),
        Case("a layer beyond float16", {"model": deep(2), "precision": "float16", **far}, "output", "0",
             "bfloat16", {"model": deep(2), "precision": "bfloat16", **far}),
    ]  # fmt: skip
