"""What to do when a loss is NaN or will not fall: find the first number that is not finite, and learn one batch by heart.

The search costs nothing until it is needed: the trainer looks at the loss and at the norm of the gradient, two numbers per step. When one
of them is not finite the parameters have not been updated yet, so the step can be repeated, random numbers included, with every module
watched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Tensor], Tensor]


class NotFinite(ArithmeticError):
    """Training met a NaN or an infinity.

    Attributes:
        step: the number of the update that was not made, from 0.
        where: the first place, in the order of computation: "input", "parameter", "output", "loss", "gradient".
        module: the module there, by its name in the model; "" where it is the model itself or none.
    """

    def __init__(self, message: str, step: int, where: str, module: str) -> None:
        super().__init__(message)
        self.step, self.where, self.module = step, where, module


@dataclass(frozen=True)
class Finding:
    """The first number that is not finite: which kind of place, in which module, in words, and what usually helps."""

    where: str
    module: str
    text: str
    advice: str


def find_not_finite(
    model: nn.Module, loss: Loss, x: Any, y: Tensor, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> Finding | None:
    """Where in one forward and backward pass over (x, y) a number is first not finite, or None.

    Looks at the input, then at parameters and buffers, then at the outputs of modules and the loss as they are computed, then at gradients
    from the loss backwards. Gradients in ``.grad`` are used up; running statistics of batch norm see the batch.
    """
    for name, value in (("x", x), ("y", y)):
        if not _finite(value):
            return Finding("input", "", f"the batch's {name}: {_describe(value)}", "clean the data, or drop the rows that hold it")
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if not _finite(p):
            module, _, own = name.rpartition(".")
            text = f"{own} of {_label(module, model)}, before the step: {_describe(p)}"
            return Finding("parameter", module, text, "an earlier step made it so: lower the learning rate, or clip with max_norm")
    watch = _Watch(model)
    try:
        model.zero_grad()
        with autocast():
            value = loss(prediction := model(x), y)
        if watch.output is not None:
            return watch.output
        if not _finite(value):
            text = f"the loss itself, from predictions that are finite ({_describe(prediction)})"
            return Finding("loss", "", text, _TOO_LARGE if _largest(prediction) > _HUGE else _LOG_OF_0)
        value.backward()
    finally:
        watch.remove()
    return watch.gradient or _gradient_of_parameter(model)


class _Watch:
    """Hooks on every module: the first output, and on the way back the first gradient, that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.last_finite, self.last_size = model, "", 0.0
        self.output: Finding | None = None
        self.gradient: Finding | None = None
        self.handles = [module.register_forward_hook(self._see(name)) for name, module in model.named_modules()]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.output is None and not _finite(output):
                seen = f"from inputs that are finite ({_describe(inputs)})" if _finite(inputs) else "from inputs that are not finite"
                text = f"the output of {_label(name, self.model)}, {_describe(output)}, {seen}"
                self.output = Finding("output", name, text, "numbers grew beyond the dtype, or 0/0, log(0), sqrt(-x): look at this module")
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: self._see_gradient(name, gradient))

        return hook

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        if _finite(gradient):
            self.last_finite, self.last_size = name, _largest(gradient)
        elif self.gradient is None:
            made, by = _label(name, self.model), _label(self.last_finite, self.model)
            text = f"the gradient of the output of {made}, made by the backward of {by}: {_describe(gradient)}"
            self.gradient = Finding("gradient", self.last_finite, text, _advice_for_gradient(gradient, self.last_size))


_HUGE = 1e10  # which no healthy prediction or gradient comes near
_TOO_LARGE = "predictions grew without bound: lower the learning rate, or clip with max_norm"
_LOG_OF_0 = "no log(0) and no division by 0: give cross_entropy raw logits, keep probabilities away from 0 and 1"
_CLIP = "gradients explode: clip them with max_norm, lower the learning rate, or scale the loss down if it is float16"
_STEEP = "a derivative that is infinite or 0/0, as of sqrt(x), a norm or log(x) at x = 0: keep x away from 0, clipping cannot help"


def _advice_for_gradient(gradient: Tensor, before: float = 0.0) -> str:
    """``before``: the largest magnitude of the last gradient that was finite."""
    explodes = gradient.dtype == torch.float16 or max(before, _largest(gradient)) > _HUGE
    return _CLIP if explodes else _STEEP


@torch.no_grad()
def _largest(value: Any) -> float:
    """The largest magnitude among the finite numbers."""
    numbers = [t[t.isfinite()].abs().max() for t in _tensors(value) if t.is_floating_point() and t.isfinite().any()]
    return max((float(number) for number in numbers), default=0.0)


def _gradient_of_parameter(model: nn.Module) -> Finding | None:
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not _finite(p.grad):
            module, _, own = name.rpartition(".")
            text = f"the gradient of {own} of {_label(module, model)}: {_describe(p.grad)}"
            return Finding("gradient", module, text, _advice_for_gradient(p.grad))
    return None


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value.to_local() if hasattr(value, "to_local") else value
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@torch.no_grad()
def _finite(value: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in _tensors(value) if t.is_floating_point())


@torch.no_grad()
def _describe(value: Any) -> str:
    """ "2 NaN and 1 Inf of 640 numbers, the others between -3 and 8" """
    numbers = torch.cat([t.detach().flatten().double() for t in _tensors(value)] or [torch.zeros(0)])
    nan, inf, finite = int(numbers.isnan().sum()), int(numbers.isinf().sum()), numbers[numbers.isfinite()]
    span = f"between {finite.min():.3g} and {finite.max():.3g}" if len(finite) else "none finite"
    bad = " and ".join(f"{count} {word}" for count, word in ((nan, "NaN"), (inf, "Inf")) if count)
    return f"{bad} of {len(numbers)} numbers, the others {span}" if bad else span


def _label(name: str, model: nn.Module) -> str:
    module = model.get_submodule(name)
    return f"{name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


@dataclass(frozen=True)
class OneBatch:
    """What came of learning one batch by heart: the loss before every step, and whether it came near zero."""

    losses: Sequence[float]
    learned: bool
    text: str


def overfit_one_batch(
    model: nn.Module, loss: Loss, x: Any, y: Tensor, *, steps: int = 100, lr: float = 1e-2, below: float = 0.05,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> OneBatch:  # fmt: skip
    """Train a copy of ``model`` on one batch: a model, loss and labels that are right can learn it by heart.

    Dropout is turned off in the copy, as it would keep the loss up. ``model`` and the random numbers stay as they are.

    Args:
        steps: updates at most; it stops as soon as the batch is learned.
        lr: of AdamW without weight decay, or what ``optimizer(parameters, lr=lr)`` makes of it.
        below: "near zero" is this part of the first loss.

    Returns:
        The losses, ``learned``, and a sentence.
    """
    from ..optim import AdamW

    model = copy.deepcopy(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    make = optimizer or (lambda params, lr: AdamW(params, lr=lr, weight_decay=0.0))
    descent, losses = make(model.parameters(), lr=lr), []
    for _ in range(steps + 1):
        descent.zero_grad()
        value = loss(model(x), y)
        losses.append(value.item())
        if not losses[-1] > below * losses[0]:  # learned, or NaN
            break
        value.backward()
        descent.step()
    learned = losses[-1] <= below * losses[0]
    course = f"loss {losses[0]:.4g} -> {losses[-1]:.4g} in {len(losses) - 1} steps"
    text = f"learned one batch by heart: {course}" if learned else f"did NOT learn one batch: {course}; look at labels, loss, layers and lr"
    return OneBatch(losses, learned, text)
