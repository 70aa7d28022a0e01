"""The teaching models on real data, the same text for native PyTorch and for dlkernels.

train("mlp")                    one run with dlkernels' layers and optimizers
train("mlp", nn=torch.nn)       the same run in native PyTorch: same data order, same first weights (dropout draws masks of its own)
compare("mlp")                  both, epoch by epoch in turns, and the time of one step
learn_one_batch("mlp")          whether model, loss and labels fit together, in a second
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dlkernels.nn
import dlkernels.optim
from dlkernels.bench.timing import Interrupted, Timing, interleave
from dlkernels.models import MODELS, ModelSpec

from .batches import Batches
from .checks import OneBatch, overfit_one_batch
from .distributed import spread
from .randomness import own_random_numbers
from .schedules import make_schedule
from .trainer import Trainer

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


class FirstLosses:
    """A tracker that keeps the losses of a run's first steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def start(self, config: Mapping[str, Any], step: int) -> None:
        pass

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if "loss" in numbers and len(self.losses) < FIRST_STEPS:
            self.losses.append(numbers["loss"])

    def close(self) -> None:
        pass


class Run:
    """One teaching model on its way through its epochs; ``epoch()`` does the next one.

    The random numbers of an epoch depend on ``seed`` and its number alone, so runs may take turns and still see the same.
    """

    def __init__(
        self, spec: ModelSpec, nn: ModuleType, optim: ModuleType, seed: int, epochs: int, device: torch.device | str, dtype: torch.dtype,
        schedule: str = "cosine", how: str = "none", **options: Any,
    ) -> None:  # fmt: skip
        self.spec = spec
        data = spec.data().to(device, dtype)
        self.batches = Batches(data.x_train, data.y_train, spec.batch_size, seed=seed)
        self.val = Batches(data.x_val, data.y_val, len(data.x_val) // self.batches.size * self.batches.size, shuffle=False)
        model = _built(spec, nn, seed, device).to(dtype=dtype)
        parameters = sum(p.numel() for p in model.parameters())
        model = spread(model, how, precision=options.get("precision"))
        optimizer = optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
        updates = -(-len(self.batches) // max(options.get("accumulate", 1), 1))  # per epoch
        scheduler = make_schedule(schedule, optimizer, epochs, updates)
        options.setdefault("max_norm", spec.max_norm)
        options.setdefault("trackers", ["jsonl"] if options.get("folder") is not None else [])
        self.first_losses = FirstLosses()
        options["trackers"] = [*options["trackers"], self.first_losses]
        self.trainer = Trainer(
            model, spec.loss(nn), optimizer, scheduler=scheduler, metrics={"val_accuracy": accuracy}, log_every=1, seed=seed, **options
        )  # fmt: skip
        random_layers = any(_draws(layer) for layer in model.modules())
        provider = "eager" if nn is torch.nn else "dlkernels"
        self.history = History(spec.name, provider, parameters, random_layers=random_layers)

    def epoch(self) -> None:
        """Train on every row once, in a new order, then judge on the held-out rows."""
        self.trainer.epoch(self.batches, self.val)

    def seen(self) -> History:
        """The run so far."""
        seen, history = self.trainer.history, self.history
        for name in ("train_loss", "val_loss", "val_accuracy"):
            setattr(history, name, seen.get(name, []))
        history.first_losses, history.seconds = self.first_losses.losses, sum(seen.get("seconds", []))
        history.interrupted = self.trainer.stopped == "interrupted"
        return history


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The part of the rows, or of a text's places, whose largest logit is their label's."""
    return (logits.argmax(-1) == y).double().mean()


def _draws(layer: torch.nn.Module) -> bool:
    """Whether it drops numbers at random, as an LSTM of several layers may do between them."""
    return isinstance(layer, torch.nn.Dropout) or (isinstance(layer, torch.nn.RNNBase) and layer.dropout > 0)


def learn_one_batch(
    spec: ModelSpec | str, nn: ModuleType = dlkernels.nn, optim: ModuleType | None = None, *, seed: int = 0,
    device: torch.device | str = "cpu",
) -> OneBatch:  # fmt: skip
    """Whether a new model of ``spec`` learns the first rows of its data by heart: see ``overfit_one_batch``."""
    spec = _find(spec)
    data = spec.data().to(device, torch.float32)
    x, y = data.x_train[: spec.batch_size], data.y_train[: spec.batch_size]
    make = partial((optim or _optim_of(nn)).AdamW, weight_decay=0.0)
    return overfit_one_batch(_built(spec, nn, seed, device), spec.loss(nn), x, y, optimizer=make)


def _optim_of(nn: ModuleType) -> ModuleType:
    return torch.optim if nn is torch.nn else dlkernels.optim


def _built(spec: ModelSpec, nn: ModuleType, seed: int, device: torch.device | str) -> torch.nn.Module:
    with own_random_numbers():
        torch.manual_seed(seed)
        return spec.build(nn).to(device)  # drawn in float32 on the CPU, whatever follows


def train(
    spec: ModelSpec | str, nn: ModuleType = dlkernels.nn, optim: ModuleType | None = None, *, seed: int = 0, epochs: int | None = None,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, threads: int | None = None, progress: bool = True,
    resume: bool = False, **options: Any,
) -> History:  # fmt: skip
    """Train one of ``MODELS`` and return its history. Ctrl-C returns the epochs that are finished.

    Args:
        spec: a teaching model, or its name.
        nn: the namespace of layers. optim: of optimizers; default: the one that goes with ``nn``.
        resume: see ``Trainer.fit``.
        options: ``schedule`` ("constant", "cosine", "plateau", "one_cycle"), ``how`` the model is spread under ``torchrun`` ("none",
            "ddp", "fsdp"), and what ``Trainer`` takes.

    Raises:
        ValueError: there is no such model, or an option is out of range.
    """
    spec = _find(spec)
    epochs = spec.epochs if epochs is None else epochs
    with _threads(threads):
        run = Run(spec, nn, optim or _optim_of(nn), seed, epochs, device, dtype, bar=progress, **options)
        run.trainer.fit(run.batches, run.val, epochs=epochs, resume=resume)
    return run.seen()


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
    spec: ModelSpec | str, *, seed: int = 0, epochs: int | None = None, device: torch.device | str = "cpu", threads: int | None = None,
    progress: bool = True, min_seconds: float = 1.0, **options: Any,
) -> Comparison:  # fmt: skip
    """Train ``spec`` natively and with dlkernels, in turns, and time one step of each. Ctrl-C keeps the finished epochs.

    ``options`` are those of ``train`` that write no files. With ``patience`` each of the two stops for itself.
    """
    spec = _find(spec)
    epochs = spec.epochs if epochs is None else epochs
    with _threads(threads):
        runs = [
            Run(spec, nn, optim, seed, epochs, device, torch.float32, **options)
            for nn, optim in ((torch.nn, torch.optim), (dlkernels.nn, dlkernels.optim))
        ]
        _take_turns(runs, epochs, progress)
        native, ours = (run.seen() for run in runs)
        steps = {}
        try:
            if not native.interrupted:
                alike = {name: options[name] for name in ("precision", "accumulate", "max_norm") if name in options}
                steps = time_steps(spec, device, min_seconds, **alike)
        except Interrupted as stopped:
            steps = stopped.timings
            native.interrupted = ours.interrupted = True
    return Comparison(native, ours, steps, len(spec.batch()[0]) * options.get("accumulate", 1))


def time_steps(spec: ModelSpec, device: torch.device | str = "cpu", min_seconds: float = 1.0, **options: Any) -> dict[str, Timing]:
    """Seconds of one whole training step, native ("eager") and ours ("dlkernels"), sample by sample in turns.

    On the synthetic batch: needs no data set. ``options`` are the ``Trainer``'s.

    Raises ``Interrupted``, which carries the finished samples, on Ctrl-C.
    """
    x, y = (t.to(device) for t in spec.batch())

    def step_of(nn: ModuleType, optim: ModuleType) -> Callable[[], object]:
        model = _built(spec, nn, 0, device)
        optimizer = optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
        trainer = Trainer(model, spec.loss(nn), optimizer, **{"max_norm": spec.max_norm, **options})
        return lambda: trainer.training_step([(x, y)] * trainer.accumulate)

    steps = {"eager": step_of(torch.nn, torch.optim), "dlkernels": step_of(dlkernels.nn, dlkernels.optim)}
    return interleave(steps, min_seconds=min_seconds, min_samples=30, device=device, cold=False)


def _take_turns(runs: list[Run], epochs: int, progress: bool) -> None:
    from tqdm.auto import tqdm

    bar = tqdm(range(epochs), desc=runs[0].spec.name, unit="epoch", disable=None if progress else True)  # None: only on a terminal
    try:
        for number in bar:
            going = [run for run in runs if not run.trainer.out_of_patience()]
            if not going:
                break
            for run in going if number % 2 == 0 else reversed(going):  # neither always goes first
                run.epoch()
            bar.set_postfix({run.history.provider: f"{run.trainer.history['val_accuracy'][-1]:.1%}" for run in runs})
    except KeyboardInterrupt:
        for run in runs:
            run.trainer.stopped = "interrupted"
    finally:
        bar.close()


def _find(spec: ModelSpec | str) -> ModelSpec:
    if isinstance(spec, ModelSpec):
        return spec
    if spec not in MODELS:
        raise ValueError(f"spec must name a teaching model ({', '.join(MODELS)}), got {spec!r}")
    return MODELS[spec]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
