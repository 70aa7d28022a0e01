"""What lesson 5 does again and again: walk down a surface, draw it, train the digits with a schedule, count operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from few_digits import verdict
from lesson import GREY, FuncAnimation, plt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels.functional as F
import dlkernels.optim as optim
from dlkernels.data import digits
from dlkernels.models.mlp import PlainMLP

START, MINIMUM = (-1.5, 1.8), (1.0, 1.0)


def banana(x: Tensor, y: Tensor) -> Tensor:
    """Rosenbrock's valley, with 10 where he had 100: steep walls along y = x^2, nearly level along the bottom, 0 at (1, 1)."""
    return (1 - x) ** 2 + 10 * (y - x**2) ** 2


def walk(make: Callable[..., Any], lr: float, steps: int) -> tuple[Tensor, Tensor]:
    """The points [n + 1, 2] an optimizer passes and the losses [n + 1] there; n is ``steps``, or less where the loss explodes."""
    w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = make([w], lr=lr)
    points, losses = [], []
    for _ in range(steps + 1):
        value = banana(*w)
        points.append(w.detach().clone())
        losses.append(value.detach())
        if not value < 1e6:
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return torch.stack(points), torch.stack(losses)


def arrival(losses: Tensor, limit: float) -> str:
    """From which step on the loss is below the limit to the end; "diverged"; or "-" for neither."""
    if not losses[-1] < 1e6:
        return "diverged"
    above = (losses >= limit).nonzero()
    first = int(above[-1]) + 1 if len(above) else 0
    return str(first) if first < len(losses) else "-"


def draw_valley(plot: Any) -> None:
    """Contours of the banana, the start and the minimum."""
    x, y = torch.meshgrid(torch.linspace(-2.1, 1.9, 200), torch.linspace(-1.2, 3.2, 200), indexing="xy")
    levels = [10 ** (e / 2) for e in range(-4, 5)]
    plot.contour(x, y, banana(x, y), levels=levels, colors=GREY, linewidths=0.6, alpha=0.8)
    plot.plot(*START, "o", color="black", ms=5)
    plot.plot(*MINIMUM, "*", color="black", ms=8, zorder=0)


Paths = dict[str, tuple[Tensor, Tensor]]  # by name, what walk() returns


def draw_paths(paths: Paths, colors: dict[str, str]) -> plt.Figure:
    """Every path in a valley of its own, and all losses."""
    figure, plots = plt.subplots(2, 3, figsize=(10, 6.2))
    for plot, (name, (points, losses)) in zip(plots.flat, paths.items()):
        draw_valley(plot)
        plot.plot(*points.T, ".-", color=colors[name], ms=2.5, lw=0.6)
        plot.set_title(name, fontsize=10, color=colors[name])
        plots[1, 2].semilogy(losses, color=colors[name], lw=1.3)
    plots[1, 2].set(ylim=(1e-6, 30), xlabel="step")
    plots[1, 2].set_title("the loss on the way, same colors", fontsize=10)
    figure.suptitle(f"{len(losses) - 1} steps, a dot each, from the black dot towards the star", fontsize=10)
    return figure


def animate_paths(paths: Paths, colors: dict[str, str], frames: list[int]) -> FuncAnimation:
    """All of them in one valley; ``frames`` are the steps shown."""
    figure, plot = plt.subplots(figsize=(6, 4.6))
    draw_valley(plot)
    trails = {name: plot.plot([], [], color=color, lw=1)[0] for name, color in colors.items()}
    heads = {name: plot.plot([], [], "o", color=color, ms=7, mec="white", label=name)[0] for name, color in colors.items()}
    plot.legend(fontsize=8, loc="lower left", framealpha=1)

    def draw(step: int) -> None:
        for name, (points, _) in paths.items():
            trails[name].set_data(*points[: step + 1].T)
            heads[name].set_data(*points[step : step + 1].T)
        plot.set_title(f"step {step}")

    return FuncAnimation(figure, draw, frames=frames)


def shaking(make: Callable[..., Any], lr: float, steps: int) -> float:
    """Mean of w^2 over 20,000 weights that began at 0, with the loss w^2 / 2 and noise of size 1 in every gradient."""
    w = torch.zeros(20_000, requires_grad=True)
    optimizer = make([w], lr=lr)
    for _ in range(steps):
        w.grad = w.detach() + torch.randn(20_000)
        optimizer.step()
    return w.detach().square().mean().item()


@dataclass
class Training:
    """What is kept of one training on the digits."""

    rates: list[float] = field(default_factory=list)  # learning rate of every step
    val_losses: list[float] = field(default_factory=list)  # after every epoch
    held_out: float = 0.0  # accuracy on the 360 digits that decided nothing, after the last epoch


def train_digits(schedule: Callable[[Any, int], Any] | None, lr: float, seed: int, epochs: int) -> Training:
    """A 64-32-10 network on 1197 digits in batches of 21, by SGD with Nesterov momentum; 240 digits for validation.

    ``schedule(optimizer, steps)`` makes a scheduler. ReduceLROnPlateau hears the validation loss after every epoch, the others
    are asked after every step.
    """
    data, order = digits(seed), torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.y_train), generator=order)
    validation, training = rows[:240], rows[240:]
    torch.manual_seed(seed)
    model = PlainMLP(64, [32], 10)
    optimizer = optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    scheduler = schedule(optimizer, epochs * 57) if schedule else None
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    kept = Training()
    for _ in range(epochs):
        for batch in training[torch.randperm(len(training), generator=order)].split(21):
            kept.rates.append(optimizer.param_groups[0]["lr"])
            F.cross_entropy(model(data.x_train[batch]), data.y_train[batch]).backward()
            optimizer.step(zero_grad=True)
            if scheduler and not plateau:
                scheduler.step()
        with torch.no_grad():
            kept.val_losses.append(F.cross_entropy(model(data.x_train[validation]), data.y_train[validation]).item())
        if plateau:
            scheduler.step(kept.val_losses[-1])
    with torch.no_grad():
        kept.held_out = (model(data.x_val).argmax(1) == data.y_val).double().mean().item()
    return kept


Runs = dict[str, dict[float, list[Training]]]  # by schedule and learning rate, one for every seed


def print_schedules(runs: Runs) -> None:
    """Held-out accuracies, the learning rate that the validation loss chooses, and what it gains over the first schedule's choice."""
    right = {name: {lr: 100 * torch.tensor([run.held_out for run in row[lr]]) for lr in row} for name, row in runs.items()}
    base = None
    print(f"  {'largest lr':19}" + "".join(f"{lr:>13}" for lr in next(iter(runs.values()))) + "   chosen   minus constant")
    for name, row in runs.items():
        final = {lr: sum(run.val_losses[-1] for run in row[lr]) for lr in row}
        chosen = min(final, key=lambda lr, final=final: final[lr])
        text = "".join(f"{f'{score.mean():.1f} ± {score.std():.1f}':>13}" for score in right[name].values()) + f"{chosen:9}"
        if base is None:
            base = right[name][chosen]
        else:
            change = right[name][chosen] - base
            words = {-1: "worse", 0: "may be chance", 1: "better"}[verdict(change)]
            text += f"   {change.mean():+.2f} ± {change.std():.2f} {words}"
        print(f"  {name:19}{text}")


def draw_schedules(runs: Runs, colors: dict[str, str], lr: float) -> plt.Figure:
    """The learning rate of every step, from one seed, and the validation loss, the mean of all seeds, at one largest rate."""
    figure, (rates, losses) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, row in runs.items():
        rates.plot(row[lr][0].rates, color=colors[name], label=name)
        mean = torch.tensor([run.val_losses for run in row[lr]]).mean(0)
        losses.semilogy(range(1, len(mean) + 1), mean, "o-", ms=3, color=colors[name], label=name)
    rates.set(xlabel="step", ylim=(0, lr * 1.1))
    rates.set_title("learning rate (ReduceLROnPlateau: of one seed)", fontsize=10)
    losses.set(xlabel="epoch", yticks=[0.1, 0.2, 0.3, 0.4], yticklabels=["0.1", "0.2", "0.3", "0.4"])
    losses.minorticks_off()
    losses.set_title(f"validation loss, largest learning rate {lr}", fontsize=10)
    losses.legend(fontsize=8)
    return figure


class CountOperations(TorchDispatchMode):
    """Within ``with CountOperations() as count:`` every operation on tensors is noted in ``count.names``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":  # a mark that an optimizer leaves for the profiler, no work
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
