"""The optimizers as the suite races them: a step on fixed sets of parameters, and what a training step ends with.

    step   the update alone
    tail   undo a loss scale, clip to norm 1, update, zero the gradients

dlkernels   ours, one call for either       eager   torch's default, what a PyTorch user writes       fused, foreach   torch's fastest

Every provider's first two steps, of which the first finds no moments, are compared with float64 before it is timed. Only float32 is raced:
beside half parameters torch keeps half moments and ours are float32, which is not the same work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import optim
from .check import WORST, CheckRow, allowed_error, relative_error
from .inputs import dtype_name
from .providers import Field
from .timing import Call

STEP, TAIL = "step", "tail"
SCALE = 1024.0  # of the loss, which a tail undoes
RATE = 0.1  # large, so that a wrong update shows beside parameters of about 1

Shapes = Sequence[tuple[int, ...]]
SETS: dict[str, Shapes] = {  # the first says how long a number takes, those of many tensors take longer
    "12 x 1M": [(1 << 20,)] * 12,
    "GPT 25M": [(12564, 512), *[(512, 1536), (512, 512), (512, 2048), (2048, 512)] * 6],
    "1000 x 1k": [(1000,)] * 1000,
    "10000 x 64": [(64,)] * 10000,
}
QUICK_SETS = {label: SETS[label] for label in ("12 x 1M", "1000 x 1k")}
SAMPLES: dict[str, Shapes] = {"small ones": [(3, 5), (17,), (), (100, 33), (2, 3, 4)], "large ones": [(5000,), (130, 77), (20011,)]}


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of dlkernels.optim, raced against the class of the same name in torch.optim.

    Attributes:
        name: what rows call it; cls: the name of its class; options: arguments of both beside the learning rate.
        raw: the registered op that does the work, of the contract and the twins in `module`.
        fastest: the argument that chooses torch's fastest variant.
        flops, moved: of an update, for each number of the parameters: operations, and numbers read plus written.
        directions: STEP, and TAIL where it is raced as well; dtypes: those that are raced and checked.
    """

    name: str
    cls: str
    options: Mapping[str, Any]
    fastest: str
    raw: Sequence[str]
    flops: int
    moved: int
    directions: Sequence[str] = (STEP,)
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    module: str = "optimizers"


OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("adamw", "AdamW", {}, "fused", ("adam_",), flops=15, moved=7, directions=(STEP, TAIL)),  # p, g, m, v in; p, m, v out
        Optimizer("adam", "Adam", {}, "fused", ("adam_",), flops=14, moved=7),
        Optimizer("sgd", "SGD", {"momentum": 0.9}, "fused", ("sgd_",), flops=5, moved=5),  # p, g, b in; p, b out
        Optimizer("rmsprop", "RMSprop", {"momentum": 0.9}, "foreach", ("rmsprop_",), flops=11, moved=7),  # p, g, v, b in; p, v, b out
    )
}


@dataclass(frozen=True)
class Step:
    """One line of the plan, beside providers.Case: an optimizer on a set of parameters. torch.compile takes no part."""

    optimizer: Optimizer
    label: str
    shapes: Shapes = field(repr=False)
    direction: str
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def numbers(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def flops(self) -> int:
        return self.numbers * (self.optimizer.flops + (3 if self.direction == TAIL else 0))

    @property
    def bytes(self) -> int:
        """A tail reads the gradients once more, for their norm, and writes zeros over them."""
        return self.numbers * (self.optimizer.moved + (2 if self.direction == TAIL else 0)) * self.dtype.itemsize

    @property
    def size(self) -> dict[str, int]:
        return {"tensors": len(self.shapes), "numbers": self.numbers}

    @property
    def id(self) -> dict[str, Any]:
        """The columns of the results file that name this line."""
        name, dtype = self.optimizer.name, dtype_name(self.dtype)
        return {"op": name, "dtype": dtype, "size": self.size, "label": self.label, "direction": self.direction}


def steps(optimizers: Sequence[Optimizer], sets: Mapping[str, Shapes], dtypes: Sequence[torch.dtype] | None = None) -> list[Step]:
    """Every optimizer on each of `sets`, in those of its dtypes that are in `dtypes` (default: all)."""
    return [
        Step(optimizer, label, shapes, direction, dtype)
        for optimizer in optimizers
        for dtype in optimizer.dtypes
        if dtypes is None or dtype in dtypes
        for direction in optimizer.directions
        for label, shapes in sets.items()
    ]


def line_up_step(step: Step, device: torch.device | str) -> Field:
    """Every provider's call, and whether two of them led where torch's own code leads in float64."""
    entered = Field()
    _, exact = _start(step, "eager", torch.float64, device)
    native = dict.fromkeys(exact, torch.finfo(step.dtype).eps)  # what counts where eager cannot do it
    for provider in ("eager", "dlkernels", step.optimizer.fastest):
        try:
            call, values = _start(step, provider, step.dtype, device)
        except Exception as error:  # an opponent may fail in any way; that is a result too
            entered.failures[provider] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        errors = _errors(values, exact)
        native = errors if provider == "eager" else native
        entered.calls[provider] = call
        entered.agrees[provider] = all(error <= allowed_error(native[name], step.dtype, False) < WORST for name, error in errors.items())
    return entered


def check_steps(some: Sequence[Step], device: torch.device | str = "cpu") -> Iterator[list[CheckRow]]:
    """Ours against float64, beside torch's default: for each step a row for the parameters, and one for each of their moments."""
    for step in some:
        starts = (("eager", torch.float64), ("eager", step.dtype), ("dlkernels", step.dtype))
        exact, native, ours = (_start(step, provider, dtype, device)[1] for provider, dtype in starts)
        native_errors, rows = _errors(native, exact), []
        for name, error in _errors(ours, exact).items():
            allowed = allowed_error(native_errors[name], step.dtype, gradient=False)
            what = step.optimizer.name, dtype_name(step.dtype), step.size, step.label, f"{name} ({step.direction})"
            rows.append(CheckRow(*what, error, native_errors[name], allowed, error <= allowed < WORST))
        yield rows


def _errors(values: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(values.get(name), truth) for name, truth in exact.items()}


def _start(step: Step, provider: str, dtype: torch.dtype, device: torch.device | str) -> tuple[Call, dict[str, Tensor]]:
    """A provider's call, made twice, and what it left: the parameters and each of their moments, all tensors in one row.

    The row leaves out numbers of a large set: it takes every third, fifth, ..., so that each lane of a vector comes up.
    """
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in step.shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device, dtype) * (SCALE if step.direction == TAIL else 1.0)
    call, state = _call(step, provider, params)
    call()
    call()
    every = step.numbers >> 20 | 1

    def row(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().flatten()[::every] for t in tensors])

    moments = [name for name in state[params[0]] if name != "step"]
    return call, {"param": row(params), **{name: row([state[p][name] for p in params]) for name in moments}}


def _call(step: Step, provider: str, params: list[Tensor]) -> tuple[Call, Mapping[Tensor, dict[str, Tensor]]]:
    """The provider's step or tail on `params`, and the state of its optimizer."""
    home, variant = (optim, {}) if provider == "dlkernels" else (torch.optim, {} if provider == "eager" else {provider: True})
    optimizer = getattr(home, step.optimizer.cls)(params, lr=RATE, **step.optimizer.options, **variant)
    if step.direction == STEP:
        return optimizer.step, optimizer.state
    tail = {"dlkernels": our_tail, "eager": eager_tail, "fused": fused_tail}[provider]
    return tail(optimizer, params), optimizer.state


def our_tail(optimizer: Any, params: list[Tensor]) -> Call:
    scale = torch.tensor(SCALE, device=params[0].device)
    return lambda: optimizer.step(grad_scale=scale, max_norm=1.0, zero_grad=True)


def eager_tail(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Call:
    """The lines of torch's own examples for mixed precision."""
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=SCALE)
    scaler.scale(torch.ones((), device=params[0].device))  # as it would the loss

    def tail() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)

    return tail


def fused_tail(optimizer: Any, params: list[Tensor]) -> Call:
    """torch's best way: the fused step divides by the scale, so gradients are clipped to a norm that is scaled too."""
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(number, device=params[0].device) for number in (SCALE, 0.0))

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(params, SCALE, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return tail
