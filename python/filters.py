"""What lesson 10 does again and again: put digits on a canvas, shift them, train, judge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dlkernels.functional as F
import dlkernels.optim as optim
from dlkernels.data import digits

Rows = tuple[Tensor, Tensor]  # pictures [M, 1, 16, 16] and labels [M]


def canvas(x: Tensor) -> Tensor:
    """Digits [M, 64] as [M, 1, 16, 16]: 8 x 8 drawn as 12 x 12, with a margin of 2, so that a shift by 2 cuts nothing off."""
    larger = F.interpolate(x.reshape(-1, 1, 8, 8), size=(12, 12), mode="bilinear", align_corners=False)
    return F.pad(larger, (2, 2, 2, 2))


def pictures(seed: int) -> tuple[Rows, Rows]:
    """1437 digits to learn from and 360 to be judged by; every seed holds out others."""
    data = digits(seed)
    return (canvas(data.x_train), data.y_train), (canvas(data.x_val), data.y_val)


def shift(x: Tensor, down: int, right: int) -> Tensor:
    """Every picture moved. What leaves on one side comes back on the other: on the canvas, up to 2 pixels, white paper."""
    return torch.roll(x, (down, right), (-2, -1))


def scatter(x: Tensor, seed: int) -> Tensor:
    """Every picture moved by its own random amount, up to 2 pixels each way."""
    moves = torch.randint(-2, 3, (len(x), 2), generator=torch.Generator().manual_seed(seed))
    return torch.stack([shift(picture, *move) for picture, move in zip(x, moves.tolist())])


def train(model: torch.nn.Module, rows: Rows, steps: int, seed: int, lr: float = 3e-3, batch: int = 64) -> list[float]:
    """AdamW with a one-cycle schedule, in eval mode afterwards; returns the loss of every step."""
    x, y = rows
    order, losses = torch.Generator().manual_seed(seed), []
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3 * lr, total_steps=steps)
    model.train()
    while len(losses) < steps:
        for some in torch.randperm(len(y), generator=order).split(batch)[: steps - len(losses)]:
            loss = F.cross_entropy(model(x[some]), y[some])
            loss.backward()
            optimizer.step(zero_grad=True)
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses


def accuracy(model: torch.nn.Module, rows: Rows, down: int = 0, right: int = 0) -> float:
    """Share of the pictures, shifted, that the network reads rightly."""
    with torch.no_grad():
        return (model(shift(rows[0], down, right)).argmax(1) == rows[1]).double().mean().item()


def accuracies(model: torch.nn.Module, rows: Rows) -> Tensor:
    """The accuracy [5, 5] for every shift by up to 2 pixels up, down, left and right."""
    return torch.tensor([[accuracy(model, rows, down, right) for right in range(-2, 3)] for down in range(-2, 3)])


def train_all(make: Callable[[], Any], seeds: range, steps: int) -> tuple[Tensor, Any]:
    """Train a network for every seed; returns the mean of their accuracies, shift by shift, and the first one."""
    models, found = [], []
    for seed in seeds:
        learn, judge = pictures(seed)
        torch.manual_seed(seed)
        models.append(make())
        train(models[-1], learn, steps, seed)
        found.append(accuracies(models[-1], judge))
    return torch.stack(found).mean(0), models[0]


def print_shapes(model: Any, x: Tensor) -> None:
    """What comes out of each layer that changes the shape or has parameters."""
    for layer in model:
        before, x = x.shape, layer(x)
        count = sum(p.numel() for p in layer.parameters())
        if count or x.shape != before:
            print(f"  {type(layer).__name__:18} {count:5,} parameters -> {tuple(x.shape[1:])}")


def summary(table: Tensor) -> list[float]:
    """Of a table of accuracies: in the middle, mean of the 8 shifts by 1 pixel, mean of the 8 by 2 along an axis or a diagonal."""
    middle = table[2, 2]
    return [middle.item(), ((table[1:4, 1:4].sum() - middle) / 8).item(), ((table[::2, ::2].sum() - middle) / 8).item()]


def some_digits(rows: Rows, classes: range, each: int = 10**6) -> Rows:
    """Only the pictures of some classes, which are numbered from 0, and at most so many of each."""
    chosen = torch.cat([(rows[1] == digit).nonzero()[:each, 0] for digit in classes])
    return rows[0][chosen], rows[1][chosen] - classes.start


def change_when_moved(result: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """How much a result changes when the pictures move by a pixel, relative to its size, and which share of its numbers stays.

    Means of the four directions; numbers that are 0 before and after are not counted.
    """
    before, changes, stays = result(x), [], []
    for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        after = result(shift(x, down, right))
        changes.append((after - before).norm() / before.norm())
        stays.append((after == before)[(before != 0) | (after != 0)].double().mean())
    return (sum(changes) / 4).item(), (sum(stays) / 4).item()


def cost_of_each(block: torch.nn.Module, rest: torch.nn.Module, rows: Rows) -> list[float]:
    """The accuracy of rest(block(x)) that is lost, on these pictures, when one channel of block(x) is set to 0, for each."""
    with torch.no_grad():
        h = block(rows[0])
        hits = [(rest(h).argmax(1) == rows[1]).double().mean().item()]
        for channel in range(h.shape[1]):
            silenced = h.clone()
            silenced[:, channel] = 0
            hits.append((rest(silenced).argmax(1) == rows[1]).double().mean().item())
    return [hits[0] - without for without in hits[1:]]


def sensitivity(layers: torch.nn.Module, noise: Tensor) -> tuple[int, Tensor]:
    """Which pixels move the number in the middle of the last map: its place, and the sum of all gradients' sizes at every pixel."""
    x = noise.clone().requires_grad_()
    h = layers(x)
    place = h.shape[-1] // 2
    (gradient,) = torch.autograd.grad(h[:, :, place, place].sum(), x)
    return place, gradient.abs().sum((0, 1))


def extent(field: Tensor) -> tuple[int, int]:
    """The first row of a field [H, W] that is not all 0, and how many rows there are from there to the last one."""
    rows = (field.sum(1) != 0).nonzero()[:, 0].tolist()
    return rows[0], rows[-1] + 1 - rows[0]


def inner_share(field: Tensor) -> tuple[float, float]:
    """How much of the square that is not 0 is its inner part, a quarter cut off on every side, and its share of the sum."""
    (top, side), (left, _) = extent(field), extent(field.T)
    cut = side // 4
    inner = field[top + cut : top + side - cut, left + cut : left + side - cut]
    return inner.numel() / side**2, (inner.sum() / field.sum()).item()


def ends_by_depth(deep: Callable[[int, bool], torch.nn.Module], depths: tuple[int, ...], seeds: range) -> dict[str, dict[int, list[float]]]:
    """Train deep(depth, residual) for 60 steps on the digits of 8 x 8; prints and returns the mean of the last ten losses."""
    ends: dict[str, dict[int, list[float]]] = {"plain": {}, "residual": {}}
    for depth in depths:
        for name, found in ends.items():
            found[depth] = []
            for seed in seeds:
                torch.manual_seed(seed)
                rows = digits(seed).x_train.reshape(-1, 1, 8, 8), digits(seed).y_train
                losses = train(deep(depth, name == "residual"), rows, 60, seed)
                found[depth].append(sum(losses[-10:]) / 10)
            print(f"  {depth:3} {name:9}", *(f"{loss:.3f}" for loss in found[depth]))
    return ends


def first_gradients(deep: Callable[[int, bool, bool], torch.nn.Module], depths: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """The length of the first weight's gradient in new networks deep(depth, residual, norm); prints and returns it."""
    x, y = digits().x_train[:64].reshape(-1, 1, 8, 8), digits().y_train[:64]
    found: dict[str, dict[int, float]] = {}
    for norm in (False, True):
        for residual in (False, True):
            sizes = found[f"{'residual' if residual else 'plain'}, {'BatchNorm' if norm else 'no norm'}"] = {}
            for depth in depths:
                torch.manual_seed(0)
                F.cross_entropy((model := deep(depth, residual, norm))(x), y).backward()
                sizes[depth] = next(model.parameters()).grad.norm().item()
    for name, sizes in found.items():
        print(f"  {name:19}", *(f"{depth:3}: {size:.0e}" for depth, size in sizes.items()))
    return found


def transfer(cnn: Callable[..., Any], new_head: Callable[..., torch.nn.Module], seed: int, steps: int) -> dict[str, list[float]]:
    """Four ways to learn 5 to 9 from three pictures of each; accuracy on others of them, in the middle and shifted."""
    torch.manual_seed(seed)
    learn, judge = pictures(seed)
    x, y = some_digits(learn, range(5))
    few, new = some_digits(learn, range(5, 10), each=3), some_digits(judge, range(5, 10))
    train(old := cnn(classes=5), (scatter(x.repeat(4, 1, 1, 1), seed), y.repeat(4)), steps, seed)
    train(scratch := cnn(classes=5), few, 60, seed)
    untrained = cnn(classes=5).train()
    with torch.no_grad():
        for _ in range(30):
            untrained(few[0])  # BatchNorm gets to know the pictures, nothing else changes
    tuned = copy.deepcopy(old)
    tuned[-1].reset_parameters()
    train(tuned, few, 60, seed, lr=1e-3)
    ways = {
        "everything, from scratch": scratch,
        "new head on untrained filters": new_head(untrained, few, seed),
        "new head on filters for 0 to 4": new_head(old, few, seed),
        "everything, from these filters": tuned,
    }
    moved = scatter(new[0], seed), new[1]
    return {name: [accuracy(model, new), accuracy(model, moved)] for name, model in ways.items()}
