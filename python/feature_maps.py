"""The pictures of lesson 10: a filter that slides, filters and their maps, tables of accuracies, receptive fields, depth."""

from __future__ import annotations

from typing import Any

import torch
from filters import extent
from lesson import BLUE, GREY, ORANGE, FuncAnimation, plt
from torch import Tensor


def bare(plot: Any) -> None:
    """No ticks, a thin frame."""
    plot.set(xticks=[], yticks=[])
    plot.spines[:].set(visible=True, color=GREY)


def number_pixels(plot: Any, values: Tensor, form: str = "{:.1f}", size: int = 8) -> list[Any]:
    """Write its number on every pixel; white where it is dark."""
    texts = []
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            texts.append(plot.text(j, i, form.format(value), ha="center", va="center", fontsize=size))
    return texts


def animate_sliding(picture: Tensor, weight: Tensor, result: Tensor, places: list[int]) -> FuncAnimation:
    """A filter [k, k] over a picture [H, W]: what it covers, times its weights, summed into one number of the result."""
    k, W = len(weight), result.shape[1]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4.2), width_ratios=[8, 5, 6])
    left.imshow(picture, cmap="gray_r", vmin=0, vmax=1.6)  # beyond 1: the numbers on the darkest pixels stay readable
    number_pixels(left, picture)
    window = left.add_patch(plt.Rectangle((0, 0), k, k, fill=False, lw=3, color=ORANGE))
    limit = result.abs().max().item()
    products = middle.imshow(torch.zeros(k, k), cmap="PuOr_r", vmin=-3, vmax=3)
    texts = number_pixels(middle, torch.zeros(k, k), size=10)
    image = right.imshow(torch.full_like(result, torch.nan), cmap="PuOr_r", vmin=-1.3 * limit, vmax=1.3 * limit)
    sums = number_pixels(right, result)
    frame = right.add_patch(plt.Rectangle((0, 0), 1, 1, fill=False, lw=3, color=ORANGE))
    left.set_title(f"picture, {len(picture)} x {len(picture)}", fontsize=10)
    for plot in (left, middle, right):
        bare(plot)

    def draw(place: int) -> None:
        i, j = divmod(place, W)
        seen = picture[i : i + k, j : j + k]
        window.set_xy((j - 0.5, i - 0.5))
        frame.set_xy((j - 0.5, i - 0.5))
        products.set_data(seen * weight)
        for text, pixel, w in zip(texts, seen.flatten().tolist(), weight.flatten().tolist()):
            text.set_text(f"{pixel:.2f}\n× {w:+.0f}")
        image.set_data(result.flatten().masked_fill(torch.arange(result.numel()) > place, torch.nan).reshape(result.shape))
        for number, text in enumerate(sums):
            text.set_visible(number <= place)
        middle.set_title(f"window × filter\nsum {(seen * weight).sum():+.2f}", fontsize=10)
        right.set_title(f"result, row {i}, column {j}: {result[i, j]:+.2f}", fontsize=10)

    return FuncAnimation(figure, draw, frames=places)


def draw_maps(rows: dict[str, Tensor], signed: tuple[str, ...] = (), titles: list[str] | None = None) -> plt.Figure:
    """Rows of small pictures, each row [n, H, W]: each from 0, white, to its own maximum; those in ``signed`` in two colors around 0."""
    columns = max(len(maps) for maps in rows.values())
    figure, plots = plt.subplots(len(rows), columns, figsize=(1.15 * columns + 0.6, 1.25 * len(rows) + 0.3), squeeze=False)
    for line, (name, maps) in zip(plots, rows.items()):
        limit = maps.abs().max().item()
        for plot in line:
            plot.axis("off")
        for plot, values in zip(line, maps):
            plot.axis("on")
            if name in signed:
                plot.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit)
            else:
                plot.imshow(values, cmap="gray_r", vmin=0)
            bare(plot)
        line[0].set_ylabel(name, fontsize=8)
    for plot, text in zip(plots[0], titles or []):
        plot.set_title(text, fontsize=8)
    return figure


def draw_shift_tables(tables: dict[str, Tensor]) -> plt.Figure:
    """One 5 x 5 table of accuracies for every network: where the digit stood, and how often it was read."""
    figure, plots = plt.subplots(1, len(tables), figsize=(3.1 * len(tables), 3.3))
    for plot, (name, table) in zip(plots, tables.items()):
        plot.imshow(table, cmap="Blues", vmin=0, vmax=1.4)
        number_pixels(plot, 100 * table, "{:.0f}", 9)
        plot.set(xticks=range(5), yticks=range(5), xticklabels=range(-2, 3), yticklabels=range(-2, 3), xlabel="pixels to the right")
        plot.set_title(name, fontsize=9)
    plots[0].set_ylabel("pixels down")
    figure.suptitle("accuracy in % on shifted digits; all learned from digits in the middle", fontsize=10)
    return figure


def draw_fields(fields: dict[str, Tensor]) -> plt.Figure:
    """Where one number of each layer looks: root of the gradient's size at every pixel, and a frame around those where it is not 0."""
    figure, plots = plt.subplots(1, len(fields), figsize=(2.2 * len(fields), 2.7))
    for plot, (name, field) in zip(plots, fields.items()):
        (top, height), (left, width) = extent(field), extent(field.T)
        plot.imshow(field.sqrt(), cmap="Blues", vmin=0)
        plot.add_patch(plt.Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=ORANGE, lw=1.5))
        plot.set_title(name, fontsize=9)
        bare(plot)
    return figure


def draw_depth(ends: dict[str, dict[int, list[float]]], gradients: dict[str, dict[int, float]]) -> plt.Figure:
    """Losses at the end by depth, a dot for every seed, and the first layer's gradient before training."""
    figure, (losses, sizes) = plt.subplots(1, 2, figsize=(9, 3.4))
    for (name, found), color in zip(ends.items(), (ORANGE, BLUE)):
        losses.plot(list(found), [sum(loss) / len(loss) for loss in found.values()], "-", color=color, label=name)
        for depth, loss in found.items():
            losses.plot([depth] * len(loss), loss, ".", color=color)
    losses.set(xlabel="layers", ylabel="training loss at the end", ylim=(0, None), title="with BatchNorm")
    for name, found in gradients.items():
        drawn = {depth: size for depth, size in found.items() if size > 0}
        style, color = "-" if "BatchNorm" in name else "--", ORANGE if "plain" in name else BLUE
        sizes.semilogy(list(drawn), list(drawn.values()), style, marker=".", color=color, label=name)
    sizes.set(xlabel="layers", ylabel="size", title="gradient of the first layer, before training")
    losses.legend(fontsize=8)
    sizes.legend(fontsize=7)
    return figure
