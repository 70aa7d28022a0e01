"""The opponents: for one op, size, dtype and direction, a call per provider that does the same work on the same arguments.

dlkernels   ours                        eager   what a PyTorch user writes
compile     torch.compile of eager: max-autotune with the weights frozen into the graph (its best for inference) for forward, the
            default mode for forward+backward
others      the op's peers, by name
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..registry import Op
from .check import agree
from .inputs import arguments, dtype_name, is_differentiable, label, requiring_grad
from .timing import Call

FORWARD, TRAINING = "forward", "forward+backward"


@dataclass(frozen=True)
class Case:
    """One line of the plan: an op at a size in a dtype and a direction; `compiled`: race torch.compile as well."""

    op: Op
    size: Mapping[str, Any]
    dtype: torch.dtype
    direction: str
    compiled: bool = False

    @property
    def flops(self) -> int:
        cost = self.op.cost(**self.size)
        return cost.forward_flops + (cost.backward_flops if self.direction == TRAINING else 0)

    @property
    def bytes(self) -> int:
        cost = self.op.cost(**self.size)
        return (cost.forward_elements + (cost.backward_elements if self.direction == TRAINING else 0)) * self.dtype.itemsize

    @property
    def id(self) -> dict[str, Any]:
        """The columns of the results file that name this case."""
        return {
            "op": self.op.name,
            "dtype": dtype_name(self.dtype),
            "size": dict(self.size),
            "label": label(self.size),
            "direction": self.direction,
        }


@dataclass
class Field:
    """Who can start: a call per provider, whether its result equals eager's, and why the others cannot."""

    calls: dict[str, Call] = field(default_factory=dict)
    agrees: dict[str, bool] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def line_up(case: Case, device: torch.device | str) -> Field:
    """Build every provider's call, try it once, and compare its result with eager's."""
    args = arguments(case.op, case.size, case.dtype, device)
    functions: dict[str, Callable[..., Any]] = {"eager": _opponent(case.op), "dlkernels": case.op.call, **case.op.peers}
    if case.direction == TRAINING:
        args = requiring_grad(args)
    result, eager, definition = Field(), None, _definition(case, args)
    for name in [*functions, *(["compile"] if case.compiled else [])]:
        try:
            call = _call(_compiled(case, args) if name == "compile" else functions[name], args, case.direction)
            with _compiling() if name == "compile" else nullcontext():
                outcome = _flat(call())
        except Exception as error:  # an opponent may fail in any way; that is a result too
            result.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        eager = outcome if eager is None else eager
        if name in ("eager", "compile"):  # torch beside torch; what it draws at random agrees with nothing
            expected = outcome if case.op.rival else eager
        else:
            expected = definition or eager
        result.agrees[name] = len(outcome) == len(expected) and all(agree(a, b) for a, b in zip(outcome, expected))
        result.calls[name] = call
    return result


def _definition(case: Case, args: tuple[Any, ...]) -> list[Tensor] | None:
    """What a result is compared with where eager's own will not do: eager draws random numbers, or adds thousands of half-precision numbers
    in half precision (7 % off)."""
    half = case.dtype.itemsize == 2
    if not half and case.op.rival is None:
        return None
    wide = tuple(arg.detach().float().requires_grad_(arg.requires_grad) if half and is_differentiable(arg) else arg for arg in args)
    return [result.to(case.dtype) if half else result for result in _flat(_call(case.op.native, wide, case.direction)())]


def _opponent(op: Op) -> Callable[..., Any]:
    return op.rival or op.native


def _call(function: Callable[..., Any], args: tuple[Any, ...], direction: str) -> Call:
    """`function(*args)` without arguments; for training, followed by the gradients of every differentiable argument."""
    if direction == FORWARD:
        return lambda: function(*args)
    leaves = [arg for arg in args if is_differentiable(arg)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        outputs = [y for y in _flat(function(*args)) if is_differentiable(y)]
        dys = [torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator)) for y in outputs]  # laid out like y, as in training

    def step() -> tuple[Any, ...]:
        ys = [y for y in _flat(function(*args)) if y.requires_grad]
        return (*ys, *torch.autograd.grad(ys, leaves, dys, allow_unused=True))

    return step


class _Frozen(torch.nn.Module):
    """`function` as a module whose parameters are all differentiable arguments but the first: what a layer is to its input."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__()
        self.function = function
        self.others = list(args[1:])
        for i, arg in enumerate(args[1:]):
            if is_differentiable(arg):
                self.register_parameter(f"argument{i}", torch.nn.Parameter(arg))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, f"argument{i}", arg) for i, arg in enumerate(self.others)))


def _compiled(case: Case, args: tuple[Any, ...]) -> Callable[..., Any]:
    torch.compiler.reset()
    if case.direction == TRAINING:
        return torch.compile(_opponent(case.op), dynamic=False)
    module = torch.compile(_Frozen(_opponent(case.op), args).eval(), mode="max-autotune", dynamic=False)
    return lambda x, *_rest: module(x)


@contextmanager
def _compiling() -> Iterator[None]:
    """torch.compile compiles at its first call: freeze weights, in this process (a pool of compilers would outlive a Ctrl-C, and slow what
    is timed meanwhile), and keep its autotuner's chatter off the terminal."""
    import torch._inductor.config

    with warnings.catch_warnings(), torch._inductor.config.patch(freezing=True, compile_threads=1), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _flat(value: Any) -> list[Tensor]:
    return [v for v in value if v is not None] if isinstance(value, (tuple, list)) else [value]
