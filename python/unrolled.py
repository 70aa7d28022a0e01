"""The pictures of lesson 11: gradients by distance, learning curves, gates over a text, a network unrolled word by word."""

from __future__ import annotations

import torch
from lesson import BLUE, GREY, ORANGE, FuncAnimation, plt
from torch import Tensor

COLORS = {"RNN": ORANGE, "GRU": "#4d9a6a", "LSTM": BLUE, "LSTM, f open": "#1b3f6e"}


def draw_gradients(sides: dict[str, dict[str, Tensor]]) -> plt.Figure:
    """One plot for each entry: size of the gradient by distance, relative to that of distance 0."""
    figure, plots = plt.subplots(1, len(sides), figsize=(3.9 * len(sides), 3.5))
    for plot, (name, lines) in zip(plots, sides.items()):
        for label, sizes in lines.items():
            plot.semilogy((sizes / sizes[-1]).flip(0), color=COLORS.get(label), label=label)
        plot.set(title=name, xlabel="steps back")
        plot.legend(fontsize=7)
    for plot in plots[:2]:
        plot.set_ylim(1e-13, 10)
    plots[0].set_ylabel("gradient, relative to the last step's")
    return figure


def draw_adding(curves: dict[str, list[list[float]]], guess: float) -> plt.Figure:
    """Mean of 20 steps of the error while learning to add, a line for every seed."""
    figure, plot = plt.subplots(figsize=(6, 3.6))
    for name, runs in curves.items():
        for number, errors in enumerate(runs):
            smooth = torch.tensor(errors).unfold(0, min(20, len(errors)), 1).mean(1)
            plot.semilogy(range(len(errors) - len(smooth), len(errors)), smooth, color=COLORS[name], label="_" * number + name)
    plot.axhline(guess, color=GREY, ls="--", lw=1, label="always says 1: 1/6")
    plot.set(xlabel="step", ylabel="mean squared error", title="Add the two marked numbers of 50")
    plot.legend(fontsize=8)
    return figure


def draw_gates(gates: dict[str, Tensor], words: list[str], units: list[int]) -> plt.Figure:
    """Input gate, forget gate and cell of some units, a column for every word."""
    figure, plots = plt.subplots(3, 1, figsize=(9, 6.6), sharex=True)
    for plot, (name, letter) in zip(plots, (("input gate i", "i"), ("forget gate f", "f"), ("cell c", "c"))):
        values = gates[letter][:, units].T
        limit = values.abs().max().item()
        colors = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit} if letter == "c" else {"cmap": "Blues", "vmin": 0, "vmax": 1}
        image = plot.imshow(values, aspect="auto", **colors)
        plot.set(title=name, yticks=range(len(units)), yticklabels=units, ylabel="unit")
        plot.tick_params(axis="y", labelsize=6)
        figure.colorbar(image, ax=plot, pad=0.01)
    plots[-1].set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=8)
    return figure


def animate_unrolling(
    gates: dict[str, Tensor], words: list[str], units: list[int], chances: Tensor, names: tuple[str, ...]
) -> FuncAnimation:
    """Word by word: the gates of the step, the cell so far, and what the whole network would answer if the text ended here."""
    T = len(words)
    figure, plots = plt.subplot_mosaic([["text", "text", "text"], ["gates", "cell", "answer"]], figsize=(11, 4.6), height_ratios=[1, 4],
                                       width_ratios=[2, 5, 3])  # fmt: skip
    plots["text"].axis("off")
    line = [plots["text"].text(0.01 + 0.122 * place, 0.4, "", fontsize=11, transform=plots["text"].transAxes) for place in range(8)]
    columns = torch.stack([gates[letter][:, units] for letter in "ifo"], 2)  # [T, units, 3]
    now = plots["gates"].imshow(columns[0], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    plots["gates"].set(yticks=range(len(units)), yticklabels=units, ylabel="unit")
    plots["gates"].set_xticks(range(3), ["i\nwrite", "f\nkeep", "o\nshow"])
    cells = gates["c"][:, units].T
    limit = cells.abs().max().item()
    history = plots["cell"].imshow(torch.full_like(cells, torch.nan), cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto",
                                   extent=(0.5, T + 0.5, len(units) - 0.5, -0.5))  # fmt: skip
    plots["cell"].set(xticks=range(1, T + 1, 3), yticks=[], xlabel="word", title="c = f c + i g")
    plots["gates"].set_title("gates at this word")
    curves = [plots["answer"].plot([], [], color=color, label=name)[0] for name, color in zip(names, (GREY, ORANGE, BLUE))]
    plots["answer"].set(xlim=(1, T), xticks=range(1, T + 1, 3), ylim=(-0.03, 1.03), xlabel="word", title="if the text ended here")
    plots["answer"].legend(fontsize=8, loc="center right", framealpha=0.6)

    def draw(t: int) -> None:
        first = max(0, min(t - 5, T - 8))
        for place, text in enumerate(line):
            number = first + place
            text.set_text(words[number][:14] if number < T else "")
            text.set(color=ORANGE if number == t else "black" if number < t else "#c8cacd", weight="bold" if number == t else "normal")
        now.set_data(columns[t])
        history.set_data(cells.masked_fill(torch.arange(T) > t, torch.nan))
        for curve, chance in zip(curves, chances.T):
            curve.set_data(range(1, t + 2), chance[: t + 1])

    return FuncAnimation(figure, draw, frames=T)


def draw_readers(losses: dict[str, list[float]], accuracies: dict[str, float]) -> plt.Figure:
    """Which character is missing: learning curves, and accuracy on the held-out topics."""
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(8.5, 3.3), width_ratios=[3, 2])
    for (name, values), color in zip(losses.items(), (GREY, ORANGE, BLUE)):
        smooth = torch.tensor(values).unfold(0, min(10, len(values)), 1).mean(1)
        curves.plot(smooth, color=color, lw=4 if color == GREY else 1.5, label=name)  # the first two nearly coincide
        bars.bar(name.replace(" ", "\n"), 100 * accuracies[name], color=color)
        bars.text(name.replace(" ", "\n"), 100 * accuracies[name], f"{accuracies[name]:.1%}", ha="center", va="bottom", fontsize=9)
    curves.set(xlabel="step", ylabel="training loss", title="Which character stands here?", ylim=(0, None))
    bars.set(ylabel="right on held-out topics, %")
    curves.legend(fontsize=8)
    return figure
