"""The pictures of lesson 12, and its training loop: attention as it is looked at, head by head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lesson import BLUE, GREY, ORANGE, plt
from torch import Tensor

import dlkernels.functional as F
import dlkernels.optim as optim

COLORS = (BLUE, ORANGE, GREY, "black", "#5a9e6f")


def fit(model: torch.nn.Module, batch: Callable[[], tuple[Tensor, Tensor]], steps: int, lr: float = 3e-3) -> list[float]:
    """``steps`` times the six steps on (x, y) from ``batch``, y with -100 where nothing is asked; the losses."""
    optimizer = optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)  # transformers want a warm-up
    losses = []
    for _ in range(steps):
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def maps(model: Any, tokens: Tensor) -> Tensor:
    """The weights [layers, B, H, T, T] with which a GPT reads ``tokens`` [B, T]."""
    x, found = model.positions(model.embed(tokens), 0), []
    for block in model.blocks:
        found.append(block.attn.weights(block.ln1(x)))
        x = block(x)
    return torch.stack(found)


def draw_scaling(widths: list[int], rows: dict[str, dict[str, list[float]]]) -> plt.Figure:
    """One panel for each quantity, one line for each way to scale, over the width of a head."""
    figure, plots = plt.subplots(1, len(rows), figsize=(3.6 * len(rows), 3.2))
    for plot, (name, lines) in zip(plots, rows.items()):
        for (label, values), color in zip(lines.items(), (ORANGE, BLUE)):
            plot.loglog(widths, values, ".-", color=color, label=label, base=2)
            plot.set_yscale("log", base=10)
        plot.set(xlabel="numbers in a head", title=name)
        plot.title.set_fontsize(9)
    plots[0].legend(fontsize=8)
    return figure


def draw_heads(weights: Tensor, names: list[list[str]], labels: list[str]) -> plt.Figure:
    """weights [layers, H, T, T]: one square for each head, from white to blue; rows ask, columns answer."""
    layers, H = weights.shape[:2]
    figure, plots = plt.subplots(layers, H, figsize=(2.6 * H + 0.4, 2.9 * layers), squeeze=False)
    for layer in range(layers):
        for head, plot in enumerate(plots[layer]):
            plot.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
            plot.set_title(names[layer][head], fontsize=8)
            plot.set_xticks(range(len(labels)), labels, fontsize=6, family="monospace")
            plot.set_yticks(range(len(labels)), labels, fontsize=6, family="monospace")
            plot.tick_params(length=0, pad=2)
            plot.spines[:].set(visible=True, color=GREY)
        plots[layer, 0].set_ylabel(f"block {layer + 1}\nasks")
    return figure


def draw_losses(losses: dict[str, list[float]], ends: dict[str, dict[int, float]]) -> plt.Figure:
    """Training losses smoothed, and the held-out loss at several lengths."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for (name, values), color in zip(losses.items(), COLORS):
        smooth = torch.tensor(values).unfold(0, max(1, min(20, len(values) // 4)), 1).mean(1)
        left.plot(smooth, color=color, label=name)
        right.plot(list(ends[name]), list(ends[name].values()), ".-", color=color, label=name)
    left.set(xlabel="step", ylabel="training loss", title="four ways to say where a character stands")
    right.set(xlabel="characters in view", ylabel="held-out loss", title="read at lengths it was not trained on")
    right.set_xscale("log", base=2)
    right.set_xticks([16, 32, 64, 128, 256], ["16", "32", "64", "128", "256"])
    left.legend(fontsize=8)
    return figure


def draw_encodings(sinusoids: Tensor, scores: dict[str, Tensor]) -> plt.Figure:
    """A table of sinusoids [T, C], and how well equal vectors fit each other by their distance."""
    figure, (table, fit_of) = plt.subplots(1, 2, figsize=(9, 3.2))
    table.imshow(sinusoids, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
    table.set(xlabel="place in the vector", ylabel="position", title="sinusoids: fast ones to the left, slow ones to the right")
    for (name, row), color in zip(scores.items(), COLORS):
        fit_of.plot(row, color=color, label=name)
    fit_of.set(xlabel="distance of two positions", ylabel="product", title="how well the same vector fits at a distance")
    fit_of.legend(fontsize=8)
    return figure


def draw_masks(weights: dict[str, Tensor], labels: list[str]) -> plt.Figure:
    """Attention of whole models, the mean of all heads [T, T], side by side."""
    figure, plots = plt.subplots(1, len(weights), figsize=(4.2 * len(weights), 4))
    for plot, (name, table) in zip(plots, weights.items()):
        plot.imshow(table, cmap="Blues", vmin=0, vmax=0.5)
        plot.set_xticks(range(len(labels)), labels, fontsize=7, family="monospace")
        plot.set_yticks(range(len(labels)), labels, fontsize=7, family="monospace")
        plot.set_title(name, fontsize=9)
        plot.tick_params(length=0)
    return figure
