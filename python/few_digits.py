"""What lesson 9 does again and again: draw a few pictures, train on them, judge, compare seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lesson import BLUE, GREY, ORANGE, plt
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.data import digits
from dlkernels.models.mlp import he_init

Rows = tuple[Tensor, Tensor]  # pictures [M, 64] and labels [M]
T_LIMITS = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided, 5 %, for 2 to 10 seeds


def split(seed: int) -> tuple[Rows, Rows, Rows]:
    """100 training, 100 validation and 1597 test pictures with their labels; every seed draws others."""
    source = digits()
    pictures, labels = torch.cat([source.x_train, source.x_val]), torch.cat([source.y_train, source.y_val])
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    training, validation, test = ((pictures[rows], labels[rows]) for rows in (order[:100], order[100:200], order[200:]))
    return training, validation, test


def network(norm: str | None = None, dropout: float = 0) -> nn.Sequential:
    """64-128-128-128-128-10: Linear, norm, ReLU, dropout four times, then Linear. Norm and dropout only if asked for."""
    layers: list[torch.nn.Module] = []
    for K in (64, 128, 128, 128):
        layers.append(nn.Linear(K, 128))
        if norm:
            layers.append(nn.BatchNorm1d(128) if norm == "batch" else nn.LayerNorm(128))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    he_init(model)
    return model


@dataclass
class Run:
    """What is kept of one training."""

    model: nn.Sequential
    stopper: Any  # the lesson's EarlyStopping
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # length of all the Linear weights together
    last: tuple[float, ...] = ()  # training loss and accuracy, test loss and accuracy, with the last weights
    kept: tuple[float, ...] = ()  # the same with the weights that early stopping kept


def epochs(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    count: int,
    seed: int,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """Train for ``count`` epochs and yield after each. Batches of 20, in an order that depends on nothing but ``seed``.

    ``change`` is what happens to a batch of pictures before the network sees it.
    """
    order = torch.Generator().manual_seed(seed)
    for epoch in range(count):
        model.train()
        for batch in torch.randperm(len(rows[1]), generator=order).split(20):
            x = change(rows[0][batch]) if change else rows[0][batch]
            optimizer.zero_grad()
            F.cross_entropy(model(x), rows[1][batch]).backward()
            optimizer.step()
        yield epoch


def judge(model: torch.nn.Module, rows: Rows) -> tuple[float, float]:
    """Loss and accuracy of the network as it is used: in eval mode, without gradients."""
    model.eval()
    with torch.no_grad():
        logits = model(rows[0])
    return F.cross_entropy(logits, rows[1]).item(), (logits.argmax(1) == rows[1]).double().mean().item()


def loss_after_sgd(norm: str | None, lr: float, count: int, seed: int) -> float:
    """Training loss after ``count`` epochs of plain SGD, at most 10: that is what a diverged network counts."""
    torch.manual_seed(seed)
    model, training = network(norm), split(seed)[0]
    for _ in epochs(model, optim.SGD(model.parameters(), lr=lr), training, count, seed):
        pass
    loss = judge(model, training)[0]
    return min(loss, 10.0) if math.isfinite(loss) else 10.0


def verdict(differences: Tensor) -> int:
    """The sign of the mean difference, or 0 where chance alone would often give as much: a paired t test at the 5 % level."""
    mean, error = differences.mean().item(), differences.std().item() / len(differences) ** 0.5
    return 0 if abs(mean) <= T_LIMITS[min(len(differences), 10) - 2] * error else 1 if mean > 0 else -1


def print_table(scores: dict[str, Tensor]) -> None:
    """Scores [seeds, 4]: training loss and accuracy, test loss and accuracy. The first entry is what the others are compared with."""
    base = next(iter(scores.values()))
    print(f"  {'':20} {'test loss':13}   {'gap':5}   {'minus bare':24} {'test accuracy':13}   {'gap':>5}    minus bare")
    for name, score in scores.items():
        mean, spread, change = score.mean(0), score.std(0), score - base
        loss = f"{mean[2]:.3f} ± {spread[2]:.3f}   {mean[2] - mean[0]:.3f}"
        accuracy = f"{mean[3]:6.1%} ± {spread[3]:4.1%}   {mean[1] - mean[3]:5.1%}"
        if score is base:
            print(f"  {name:20} {loss}{'':28}{accuracy}")
            continue
        better = {-1: "better", 0: "?", 1: "worse"}[verdict(change[:, 2])], {-1: "worse", 0: "?", 1: "better"}[verdict(change[:, 3])]
        loss += f"   {change[:, 2].mean():+.3f} ± {change[:, 2].std():.3f} {better[0]:6}"
        accuracy += f"   {100 * change[:, 3].mean():+5.1f} ± {100 * change[:, 3].std():.1f} {better[1]}"
        print(f"  {name:20} {loss}    {accuracy}")


def draw_table(scores: dict[str, Tensor]) -> plt.Figure:
    """Test accuracy and loss gap: a dot for every seed, mean and standard deviation beside them."""
    figure, plots = plt.subplots(1, 2, figsize=(9, 0.8 + 0.36 * len(scores)), sharey=True)
    table = torch.stack(list(scores.values()))  # [techniques, seeds, 4]
    drawn = {"test accuracy in %": 100 * table[..., 3], "loss: test minus training": table[..., 2] - table[..., 0]}
    for plot, (name, values) in zip(plots, drawn.items()):
        for y, row in enumerate(values):
            plot.plot(row, [y + 0.18] * len(row), ".", color=GREY, ms=4)
            plot.errorbar(row.mean(), y - 0.12, xerr=row.std(), fmt="o", color=ORANGE if y == 0 else BLUE, capsize=3)
        plot.axvline(values[0].mean(), color=ORANGE, lw=0.8, ls="--")
        plot.set(xlabel=name, yticks=range(len(scores)), yticklabels=list(scores))
    plots[0].invert_yaxis()
    figure.suptitle("grey: every seed; bars: mean and standard deviation", fontsize=9, color=GREY)
    return figure
