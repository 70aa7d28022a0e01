"""Correctness: values and every gradient against float64, beside the error that native PyTorch makes on the same input.

    |ours - exact| <= FACTOR |native - exact| + FLOOR max|exact|

exact is the op's definition evaluated in float64 on the rounded input; |.| is the largest absolute difference. FACTOR is 2, and 3 for the
gradients of half types. The rule has no tolerance to choose per op: an op may lose as much accuracy as its native twin, twice over.
(The idea is flash-attention's, hopper/test_flash_attn.py.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..registry import Op
from .inputs import arguments, dtype_name, gradient_names, is_differentiable, label, requiring_grad

FLOOR = {torch.float64: 1e-12}  # every other dtype: 1e-5
ROUNDING = 1e-12  # sums in float64 of terms of size 1 that cancel exactly leave less than this
WORST = 1e9  # stands for NaN or infinity where a number belongs, so that a row stays valid JSON


@dataclass(frozen=True)
class CheckRow:
    """One quantity of one op at one size. Errors are max |value - exact| / max |exact|, `allowed` is the largest that passes."""

    op: str
    dtype: str
    size: dict[str, Any]
    label: str
    quantity: str
    ours_error: float
    native_error: float
    allowed: float
    ok: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def errors(op: Op, size: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> list[CheckRow]:
    """Check `op` at `size`: one row per output ("y", or "y0", "y1", ...) and one per gradient ("dx", "dweight", ...).

    An op whose native twin does not exist in `dtype` on this device is allowed the dtype's own rounding error instead of native's.
    """
    args = arguments(op, size, dtype, device, seed)
    cotangents = _cotangents(op, args, seed + 1)
    exact = _evaluate(op.reference, requiring_grad(args, torch.float64), [c.double() for c in cotangents])
    ours = _evaluate(op.call, requiring_grad(args), cotangents)
    try:
        native = _evaluate(op.native, requiring_grad(args), cotangents)
    except (RuntimeError, NotImplementedError):
        native = None
    outputs = len(cotangents)
    names = (["y"] if outputs == 1 else [f"y{i}" for i in range(outputs)]) + gradient_names(op, args)
    rows = []
    for i, (quantity, value, truth) in enumerate(zip(names, ours, exact)):
        if truth is None:  # the op's value does not depend on this argument
            continue
        scale = scale_of(cotangents) if i >= outputs else 0.0
        native_error = torch.finfo(dtype).eps if native is None else relative_error(native[i], truth, scale)
        allowed = allowed_error(native_error, dtype, gradient=i >= outputs)
        error = relative_error(value, truth, scale)
        rows.append(
            CheckRow(op.name, dtype_name(dtype), dict(size), label(size), quantity, error, native_error, allowed, error <= allowed < WORST)
        )
    return rows


def allowed_error(native_error: float, dtype: torch.dtype, gradient: bool) -> float:
    """The largest relative error that passes the rule above. Native counts as off by one rounding at least: on few numbers it can be exact
    by luck."""
    factor = 3 if gradient and dtype.itemsize == 2 else 2
    return min(factor * max(native_error, torch.finfo(dtype).eps / 2) + FLOOR.get(dtype, 1e-5), WORST)


def scale_of(cotangents: Sequence[Tensor]) -> float:
    """The largest number that backward starts with."""
    return max((dy.detach().abs().nan_to_num(0, 0).max().item() for dy in cotangents if dy.numel()), default=0.0)


def relative_error(value: Tensor | None, exact: Tensor, scale: float = 0.0) -> float:
    """max |value - exact| / max |exact|, in float64 over the finite part of `exact`.

    A gradient that is zero but for float64's own rounding of terms as large as `scale` is nothing to divide by: then `scale` is.
    Where `exact` is NaN or infinite, `value` must be the same; anything else counts as WORST, as do a wrong shape and a missing value.
    """
    if value is None or value.shape != exact.shape:
        return WORST
    if not exact.numel():
        return 0.0
    value, exact = value.detach().double(), exact.detach()
    finite = exact.isfinite()
    if not torch.equal(value.isfinite(), finite) or not torch.equal(value[~finite].nan_to_num(), exact[~finite].nan_to_num()):
        return WORST
    error = (value - exact)[finite].abs()
    if not error.numel() or not (worst := error.max().item()):
        return 0.0
    largest = exact[finite].abs().max().item()
    return min(worst / max(scale if largest < ROUNDING * scale else largest, torch.finfo(torch.float64).tiny), WORST)


def agree(value: Tensor, native: Tensor) -> bool:
    """A cheaper test for sizes where float64 would take seconds: does `value` equal native's up to rounding, in the root mean square?

    Not the maximum: among millions of relu inputs a few round to different sides of zero, and each moves one gradient visibly.
    """
    if value.shape != native.shape:
        return False
    tolerance = {torch.float64: 1e-9, torch.float32: 3e-3}.get(native.dtype, 5e-2)
    difference = torch.linalg.vector_norm(value.detach() - native, dtype=torch.float64)
    return bool(difference <= tolerance * torch.linalg.vector_norm(native, dtype=torch.float64))


def run(
    ops: Sequence[Op], dtypes: Sequence[torch.dtype], device: torch.device | str = "cpu", sizes: str = "samples"
) -> Iterator[list[CheckRow]]:
    """Check every op at every one of its `sizes` ("samples" or "quick") in those of its dtypes that are in `dtypes`."""
    for op in ops:
        for dtype in op.dtypes:
            if dtype in dtypes:
                for size in getattr(op, sizes):
                    yield errors(op, size, dtype, device)


def count(ops: Sequence[Op], dtypes: Sequence[torch.dtype], sizes: str = "samples") -> int:
    """How many lists `run` will yield."""
    return sum(len(getattr(op, sizes)) for op in ops for dtype in op.dtypes if dtype in dtypes)


def _cotangents(op: Op, args: tuple[Any, ...], seed: int) -> list[Tensor]:
    """Random dy for every floating-point output, in the output's dtype: what backward is started with."""
    with torch.no_grad():
        outputs = [y for y in _as_list(op.call(*args)) if is_differentiable(y)]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in outputs]


def _evaluate(function: Callable[..., Any], args: tuple[Any, ...], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """Outputs, then the gradient of every differentiable argument; None where there is none."""
    outputs = [y for y in _as_list(function(*args)) if is_differentiable(y)]
    leaves = [arg for arg in args if is_differentiable(arg)]
    differentiable = [(y, dy) for y, dy in zip(outputs, cotangents) if y.requires_grad]
    ys, dys = zip(*differentiable) if differentiable else ((), ())
    gradients = torch.autograd.grad(ys, leaves, dys, allow_unused=True) if ys else [None] * len(leaves)
    return [*outputs, *gradients]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]
