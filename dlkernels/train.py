"""The training loop on real data, the same text for native PyTorch and for dlkernels.

train("mlp")                    one run with dlkernels' layers and optimizers
train("mlp", nn=torch.nn)       the same run in native PyTorch: same data order, same first weights (dropout draws masks of its own)
compare("mlp")                  both, epoch by epoch in turns, and the time of one step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dlkernels.nn
import dlkernels.optim
from dlkernels.bench.timing import Interrupted, Timing, interleave
from dlkernels.models import MODELS, ModelSpec

FIRST_STEPS = 100  # this many single-step losses are kept, for curves that are laid over each other


@dataclass
class History:
    """What one training run did. ``train_loss``, ``val_loss`` and ``val_accuracy`` have one number per finished epoch."""

    model: str
    provider: str  # "eager" or "dlkernels"
    parameters: int
    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)  # of the first FIRST_STEPS steps
    random_layers: bool = False  # dropout: two worlds draw different masks, so their curves agree on average only
    seconds: float = 0.0  # in training and validation
    interrupted: bool = False


def training_step(
    model: torch.nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    x: Tensor,
    y: Tensor,
    clip_grad_norm_: Callable[..., Tensor] = torch.nn.utils.clip_grad_norm_,
) -> float:
    """The six steps; returns the loss before the update."""
    optimizer.zero_grad()  # 1. forget the last batch's gradients
    logits = model(x)  # 2. forward: predict
    loss = loss_fn(logits, y)  # 3. how wrong, as one number
    loss.backward()  # 4. backward: d loss / d parameter, for every parameter
    clip_grad_norm_(model.parameters(), max_norm)  # 5. a wild batch may turn the weights, not throw them
    optimizer.step()  # 6. move every parameter a little downhill
    return loss.item()


@torch.no_grad()
def evaluate(model: torch.nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy of ``model`` as it is used: no dropout, BatchNorm with its running statistics."""
    model.eval()
    logits = model(x)
    return loss_fn(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


class Run:
    """One model on its way through its epochs; ``epoch()`` does the next one.

    The random numbers of an epoch depend on ``seed`` and its number alone, so runs may take turns and still see the same.
    """

    def __init__(
        self, spec: ModelSpec, nn: ModuleType, optim: ModuleType, seed: int, epochs: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.spec, self.seed, self.device = spec, seed, torch.device(device)
        self.data = spec.data().to(self.device, dtype)
        with _random_numbers(seed, self.device):
            self.model = spec.build(nn).to(self.device, dtype)  # drawn in float32 on the CPU, whatever follows
        self.loss = spec.loss(nn)
        self.optimizer = optim.AdamW(self.model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
        self.clip = _clip_of(optim)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=max(epochs, 1))
        provider = "eager" if nn is torch.nn else "dlkernels"
        self.history = History(spec.name, provider, sum(p.numel() for p in self.model.parameters()))
        self.history.random_layers = any(isinstance(layer, torch.nn.Dropout) for layer in self.model.modules())

    def epoch(self) -> None:
        """Train on every row once, in a new order, then judge on the held-out rows."""
        start, history, data = time.perf_counter(), self.history, self.data
        seed = 1000 * self.seed + len(history.train_loss)
        order = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(data.x_train), generator=order).to(self.device)
        losses = []
        self.model.train()
        with _random_numbers(seed, self.device):  # for dropout
            for batch in rows.split(self.spec.batch_size):
                x, y = data.x_train[batch], data.y_train[batch]
                losses.append(training_step(self.model, self.loss, self.optimizer, self.spec.max_norm, x, y, self.clip))
        self.scheduler.step()
        val_loss, val_accuracy = evaluate(self.model, self.loss, data.x_val, data.y_val)
        history.train_loss.append(sum(losses) / len(losses))
        history.val_loss.append(val_loss)
        history.val_accuracy.append(val_accuracy)
        history.first_losses += losses[: FIRST_STEPS - len(history.first_losses)]
        history.seconds += time.perf_counter() - start


def train(
    spec: ModelSpec | str,
    nn: ModuleType = dlkernels.nn,
    optim: ModuleType | None = None,
    seed: int = 0,
    epochs: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    progress: bool = True,
) -> History:
    """Train one of ``MODELS`` and return its history. Ctrl-C returns the epochs that are finished."""
    spec = _find(spec)
    optim = optim or _optim_of(nn)
    epochs = spec.epochs if epochs is None else epochs
    with _threads(threads):
        run = Run(spec, nn, optim, seed, epochs, device, dtype)
        _take_turns([run], epochs, progress)
    return run.history


@dataclass
class Comparison:
    """The same training run in both worlds, and the time of one step in each, measured in turns."""

    native: History
    ours: History
    steps: dict[str, Timing]  # by provider; empty if the comparison was interrupted before the first sample
    batch: int

    def rows(self) -> list[dict[str, Any]]:
        """The ``models`` rows of the results file."""
        rows = []
        for history in (self.native, self.ours):
            row = asdict(history)
            if timing := self.steps.get(history.provider):
                row["step"] = {"median_s": timing.median, "p20_s": timing.p20, "p80_s": timing.p80, "batch": self.batch}
            rows.append(row)
        return rows


def compare(
    spec: ModelSpec | str,
    seed: int = 0,
    epochs: int | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    progress: bool = True,
    min_seconds: float = 1.0,
) -> Comparison:
    """Train ``spec`` natively and with dlkernels, in turns, and time one step of each. Ctrl-C keeps the finished epochs."""
    spec = _find(spec)
    epochs = spec.epochs if epochs is None else epochs
    with _threads(threads):
        native = Run(spec, torch.nn, torch.optim, seed, epochs, device, torch.float32)
        ours = Run(spec, dlkernels.nn, dlkernels.optim, seed, epochs, device, torch.float32)
        _take_turns([native, ours], epochs, progress)
        steps = {}
        try:
            if not native.history.interrupted:
                steps = time_steps(spec, device, min_seconds)
        except Interrupted as stopped:
            steps = stopped.timings
            native.history.interrupted = ours.history.interrupted = True
    return Comparison(native.history, ours.history, steps, len(spec.batch()[0]))


def time_steps(spec: ModelSpec, device: torch.device | str = "cpu", min_seconds: float = 1.0) -> dict[str, Timing]:
    """Seconds of one whole training step, native ("eager") and ours ("dlkernels"), sample by sample in turns.

    On the synthetic batch: needs no data set. Raises ``Interrupted``, which carries the finished samples, on Ctrl-C.
    """
    x, y = (t.to(device) for t in spec.batch())

    def step_of(nn: ModuleType, optim: ModuleType) -> Callable[[], object]:
        with _random_numbers(0, torch.device(device)):
            model = spec.build(nn).to(device)
        optimizer = optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
        loss, clip = spec.loss(nn), _clip_of(optim)
        return lambda: training_step(model, loss, optimizer, spec.max_norm, x, y, clip)

    steps = {"eager": step_of(torch.nn, torch.optim), "dlkernels": step_of(dlkernels.nn, dlkernels.optim)}
    return interleave(steps, min_seconds=min_seconds, min_samples=30, device=device, cold=False)


def _take_turns(runs: list[Run], epochs: int, progress: bool) -> None:
    from tqdm.auto import tqdm

    bar = tqdm(range(epochs), desc=runs[0].spec.name, unit="epoch", disable=None if progress else True)  # None: only on a terminal
    try:
        for number in bar:
            for run in runs if number % 2 == 0 else reversed(runs):  # neither always goes first
                run.epoch()
            bar.set_postfix({run.history.provider: f"{run.history.val_accuracy[-1]:.1%}" for run in runs})
    except KeyboardInterrupt:
        for run in runs:
            run.history.interrupted = True
    finally:
        bar.close()


def _find(spec: ModelSpec | str) -> ModelSpec:
    if isinstance(spec, ModelSpec):
        return spec
    if spec not in MODELS:
        raise ValueError(f"spec must name a teaching model ({', '.join(MODELS)}), got {spec!r}")
    return MODELS[spec]


def _optim_of(nn: ModuleType) -> ModuleType:
    return torch.optim if nn is torch.nn else dlkernels.optim


def _clip_of(optim: ModuleType) -> Callable[..., Tensor]:
    return getattr(optim, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)


@contextmanager
def _random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random numbers start at ``seed`` inside, and go on outside as if nothing had happened."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
