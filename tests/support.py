"""What the tests share: arguments, memory layouts, results beside the exact ones, and a child process for what may crash."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlkernels import OPS
from dlkernels.backend import TRITON_ON_CPU
from dlkernels.bench.check import allowed_error, relative_error, scale_of
from dlkernels.bench.inputs import argument_names, arguments, dtype_name, is_differentiable, label
from dlkernels.registry import FLOATS, Cost, Op

COMMAND = [sys.executable, "-m", "dlkernels"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

Args = tuple[Any, ...]
Results = dict[str, Tensor]

if TRITON_ON_CPU:
    import interpreter  # noqa: F401

SMALL = TRITON_ON_CPU  # the Triton interpreter runs a program per millisecond: small sizes only
DTYPES = [dtype for dtype in FLOATS if not (SMALL and dtype == torch.bfloat16)]  # and its bfloat16 is wrong

each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_dtype_if_fast = pytest.mark.parametrize("dtype", DTYPES[:1] if SMALL else DTYPES, ids=dtype_name)


def samples(op: Op, most: int = 2500) -> list[Mapping[str, Any]]:
    """``op``'s sizes for tests; in the interpreter only those with at most ``most`` numbers in the arguments."""
    return [size for size in op.samples if not SMALL or elements(op, size) <= most]


def elements(op: Op, size: Mapping[str, Any]) -> int:
    return sum(arg.numel() for arg in op.make(lambda *shape: torch.empty(shape, device="meta"), **size) if isinstance(arg, Tensor))


def middle(op: Op) -> Mapping[str, Any]:
    """One size that is neither tiny nor long to compute: the sample of median size; in the interpreter few steps of what goes by steps."""
    some = samples(op, most=300) if op.module == "recurrent" else op.samples
    ordered = sorted(some, key=lambda size: elements(op, size))
    return ordered[len(ordered) * 2 // 3]


def largest(op: Op) -> Mapping[str, Any]:
    return max(samples(op), key=lambda size: elements(op, size))


def moderate(op: Op, size: Mapping[str, Any], dtype: torch.dtype) -> Args:
    """Arguments of a quarter of the usual size, so that sums of equal numbers stay where no activation is flat."""
    return map_tensors(lambda t: t / 4, arguments(op, size, dtype))


def smallest(op: Op) -> Mapping[str, Any]:
    """The smallest sample that holds more than a few numbers."""
    return min((size for size in op.samples if elements(op, size) >= 4), key=lambda size: elements(op, size))


def integers(op: Op, size: Mapping[str, Any], dtype: torch.dtype) -> Args:
    """Arguments of whole numbers from -3 to 3: products and sums of them are exact in every dtype's accumulator."""
    generator = torch.Generator().manual_seed(0)
    return op.make(lambda *shape: torch.randint(-3, 4, shape, generator=generator).to(dtype), **size)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def differentiable(args: Args) -> list[int]:
    """Positions of the arguments that have a gradient."""
    return [i for i, arg in enumerate(args) if is_differentiable(arg)]


def map_tensors(function: Callable[[Tensor], Any], args: Args) -> Args:
    """``args`` with ``function`` applied to every floating-point tensor."""
    return tuple(function(arg) if is_differentiable(arg) else arg for arg in args)


def cotangents(op: Op, args: Args, integer: bool = False) -> Args:
    """A random dy for every output; whole numbers where ``integer``."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        ys = as_tuple(op.native(*args))
    if integer:
        return tuple(torch.randint(-3, 4, y.shape, generator=generator).to(y.dtype) for y in ys)
    return tuple(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in ys)


def example(op: Op, dtype: torch.dtype = torch.float32) -> tuple[Args, Args]:
    """Arguments of ``op`` at a middle size, and a dy."""
    args = arguments(op, middle(op), dtype)
    return args, cotangents(op, args)


def results(op: Op, function: Callable[..., Any], args: Args, dys: Args) -> Results:
    """``function``'s outputs and gradients by name: "y", "dx", "dweight", ... The leaves keep the strides of ``args``."""
    leaves = map_tensors(lambda t: t.detach().requires_grad_(), args)
    names = argument_names(op, args)
    positions = differentiable(args)
    ys = as_tuple(function(*leaves))
    grads = torch.autograd.grad(ys, [leaves[i] for i in positions], dys)
    found = {"y" if len(ys) == 1 else f"y{i}": y.detach() for i, y in enumerate(ys)}
    return found | {f"d{names[i]}": grad for i, grad in zip(positions, grads)}


def exact_results(op: Op, args: Args, dys: Args) -> Results:
    return results(op, op.reference, map_tensors(Tensor.double, args), map_tensors(Tensor.double, dys))


def assert_accurate(op: Op, args: Args, dys: Args | None = None, ours: Results | None = None) -> None:
    """Every output and gradient of ``op`` is as near to float64 as the rule of ``dlkernels.bench.check`` asks."""
    dys = cotangents(op, args) if dys is None else dys
    ours = results(op, op.call, args, dys) if ours is None else ours
    native, exact = results(op, op.native, args, dys), exact_results(op, args, dys)
    shapes, scale = [tuple(arg.shape) if isinstance(arg, Tensor) else arg for arg in args], scale_of(dys)
    for name, value in ours.items():
        dtype, shape = native[name].dtype, native[name].shape
        assert (value.dtype, value.shape) == (dtype, shape), f"{op.name} {shapes}: {name} is {value.dtype} {tuple(value.shape)}"
        error, native_error = (relative_error(some[name], exact[name], scale if name.startswith("d") else 0.0) for some in (ours, native))
        allowed = allowed_error(native_error, dtype, gradient=name.startswith("d"))
        assert error <= allowed, f"{op.name} {shapes} {dtype}: the error of {name} is {error:.2e}, allowed are {allowed:.2e}"


def assert_same_bits(left: Results, right: Results, what: str) -> None:
    for name, value in left.items():
        other = right[name]
        same = value.shape == other.shape and torch.equal(value.nan_to_num(nan=7e4), other.nan_to_num(nan=7e4))
        assert same, f"{what}: {name} differs by {(value - other).abs().max().item():.2e}" if value.shape == other.shape else what


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {}


def layout(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    LAYOUTS[make.__name__] = make
    return make


@layout
def transposed(t: Tensor) -> Tensor:
    """The same numbers, the dimensions laid out in opposite order."""
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


@layout
def stepped(t: Tensor) -> Tensor:
    """Every second number of every dimension of a larger tensor; NaN lies between."""
    if t.dim() == 0:
        return t
    large = t.new_full([2 * n + 1 for n in t.shape], float("nan"))
    return large[tuple(slice(0, 2 * n, 2) for n in t.shape)].copy_(t)


@layout
def inner(t: Tensor) -> Tensor:
    """A block inside a larger tensor: rows have a pitch and the first number an odd offset; NaN lies around."""
    large = t.new_full([n + 4 for n in t.shape], float("nan"))
    return large[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)


@layout
def expanded_rows(t: Tensor) -> Tensor:
    """The first row again and again, with stride 0; divided by 8, as equal numbers add up to more than random ones."""
    return (t[:1] / 8).expand(t.shape) if t.dim() and t.shape[0] else t


@layout
def expanded_columns(t: Tensor) -> Tensor:
    """The first column again and again."""
    return (t[..., :1] / 8).expand(t.shape) if t.dim() and t.shape[-1] else t


@layout
def expanded_all(t: Tensor) -> Tensor:
    """One number everywhere, the smallest, all strides 0: what ``.sum().backward()`` sends back."""
    return t.flatten()[t.abs().argmin()].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class RawCalls(TorchDispatchMode):
    """Notes every call of a registered ``dlkernels`` op, with its arguments, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Args]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Any = None) -> Any:
        if func.namespace == "dlkernels":
            self.calls.append((func, tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)))
        return func(*args, **(kwargs or {}))


def raw_calls(op: Op, args: Args) -> list[tuple[Any, Args]]:
    """The registered ops, with arguments, that one forward and backward of ``op`` calls."""
    dys = cotangents(op, args)
    with RawCalls() as recorded:
        results(op, op.call, args, dys)
    return recorded.calls


def run_child(command: Sequence[str], timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python <command>`` beside these tests, with faulthandler on so that a crash says where."""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *sys.path])
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *command], env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=here, capture_output=True, text=True, timeout=timeout,
    )


def isolated(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test without parameters in a process of its own: what crashes there is a failure here, not the end of the run."""

    def in_child() -> None:
        source = f"import {test.__module__} as tests; tests.{test.__name__}.body()"
        child = run_child(["-c", source])
        assert child.returncode == 0, f"exit status {child.returncode}\n{child.stdout[-2000:]}\n{child.stderr[-6000:]}"

    in_child.__name__, in_child.__doc__, in_child.__module__ = test.__name__, test.__doc__, test.__module__
    in_child.body = test  # type: ignore[attr-defined]
    return in_child


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


def toy(call: Callable[..., Any] = product, **changes: Any) -> Op:
    """y = x weight: an op whose kernel is the test's to choose."""
    op = Op(
        name="toy", module="toy", call=call, reference=product, native=product,
        make=lambda factory, M, K, N: (factory(M, K), factory(K, N)),
        samples=[{"M": 3, "K": 4, "N": 5}, {"M": 0, "K": 2, "N": 2}],
        bench=[{"M": 8, "K": 8, "N": 8}, {"M": 16, "K": 16, "N": 16}], quick=[{"M": 8, "K": 8, "N": 8}],
        cost=lambda M, K, N: Cost(2 * M * K * N, 4 * M * K * N, M * K + K * N + M * N, 2 * (M * K + K * N + M * N)),
        raw=("toy",), supports=lambda *args: None,
    )  # fmt: skip
    return replace(op, **changes)


__all__ = [
    "COMMAND",
    "DTYPES",
    "ENVIRONMENT",
    "LAYOUTS",
    "SMALL",
    "Args",
    "RawCalls",
    "Results",
    "arguments",
    "as_tuple",
    "assert_accurate",
    "assert_same_bits",
    "cotangents",
    "differentiable",
    "dtype_name",
    "each_dtype",
    "each_dtype_if_fast",
    "each_op",
    "exact_results",
    "example",
    "integers",
    "isolated",
    "label",
    "largest",
    "map_tensors",
    "middle",
    "moderate",
    "product",
    "raw_calls",
    "results",
    "run_child",
    "samples",
    "smallest",
    "threads",
    "toy",
]
