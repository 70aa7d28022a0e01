"""What contracts share: which tensors the kernels take, what autocast makes of them, and the gradients of a definition."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from .backend import PLAIN_TENSORS, apply_function, is_tracing
from .registry import FLOATS

Optionals = tuple[Tensor | None, ...]  # what was not asked for is None
REDUCTIONS = ("none", "mean", "sum")  # of a loss; the place is torch's code and the kernels'
Named = tuple[str, Any]  # (name of an argument, its value)


def unsupported(*required: Named, optional: tuple[Named, ...] = (), indices: Sequence[str] = ()) -> str | None:
    """Why no kernel takes these tensors, or None where one does. ``optional`` ones may be None. On the path of every call.

    Kernels take plain strided tensors on one device, cpu or cuda, of a float type; those named in ``indices`` of int64. That shapes and
    dtypes fit each other is for the caller to see.
    """
    first, x = required[0]
    on_cpu = getattr(x, "is_cpu", False)
    for name, t in required + optional if optional else required:
        if type(t) not in PLAIN_TENSORS:
            if t is None and (name, t) in optional:
                continue
            if not is_tracing(t):
                return f"{name} is a {type(t).__name__}; kernels take plain tensors"
        if t.dtype not in FLOATS if name not in indices else t.dtype != torch.int64:
            return f"{name} has dtype {t.dtype}; kernels take {'int64' if name in indices else 'float32, float64, bfloat16 and float16'}"
        if t.layout is not torch.strided:
            return f"{name} has layout {t.layout}; kernels take strided tensors"
        if t.is_cpu != on_cpu or not (on_cpu or t.device == x.device):
            return f"{name} is on {t.device} and {first} on {x.device}"
    if not on_cpu and x.device.type not in ("cuda", "meta"):
        return f"{first} is on {x.device.type}; kernels run on cpu and cuda"
    return None


def require_tensors(*required: Named, optional: Sequence[Named] = ()) -> None:
    """Raise TypeError for the first argument that is no tensor; ``optional`` ones may be None."""
    for name, t in (*required, *(named for named in optional if named[1] is not None)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")


def without_kernel(reason: str, native: Callable[..., Any], *args: Any, name: str = "", **options: Any) -> Any:
    """What PyTorch makes of arguments that no kernel takes: its result, or its error with the ``reason`` before it."""
    try:
        return native(*args, **options)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        kinds = (TypeError, ValueError, IndexError, NotImplementedError)
        kind = type(error) if type(error) in kinds else RuntimeError  # others may not be made of a message alone
        raise kind(f"{name or native.__name__}: {reason}; {error}") from error


def is_spread(*tensors: Any, traced: bool = False) -> bool:
    """Whether one of these is a DTensor, and ``on_shards`` takes them. For arguments that no kernel takes as they are.

    Where no one has imported torch.distributed.tensor there is none. In a traced graph torch's own rules apply, unless ``traced``.
    """
    found = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if found is None or torch._C._are_functorch_transforms_active() or (torch.compiler.is_compiling() and not traced):
        return False
    return any(isinstance(t, found) for t in tensors)


def on_shards(rule: str, *args: Any, **options: Any) -> Any:
    """A function of DTensors, computed by the kernels on what each process holds of them. See sharding.py."""
    from . import sharding_attention, sharding_recurrent  # noqa: F401  they add their rules
    from .sharding_rules import RULES

    return RULES[rule](*args, **options)


def raise_index_error(error: RuntimeError) -> Any:
    """torch raises IndexError for an index or a label out of range; C++ can only raise RuntimeError."""
    if ("is out of bounds" in str(error) or "is out of range" in str(error)) and not isinstance(error, IndexError):
        raise IndexError(str(error)) from None
    raise error


def reduction_code(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> int:
    """The code of a reduction; ``size_average`` and ``reduce`` are its deprecated form, and torch warns of them.

    Raises:
        ValueError: there is no such reduction.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return REDUCTIONS.index(reduction) if reduction in REDUCTIONS else _reduction.get_enum(reduction)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast that is active for the device of ``x``, or None."""
    kind = "cpu" if x.is_cpu else x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def in_autocast(dtype: torch.dtype, *tensors: Tensor | None) -> Optionals:
    """What autocast to ``dtype`` does to the arguments of a product: all are converted but float64."""
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def in_float32(*tensors: Tensor | None) -> Optionals:
    """What autocast does to the arguments of an op on its float32 list: half types are widened, float64 stays."""
    return tuple(t.float() if t is not None and t.is_floating_point() and t.dtype.itemsize < 4 else t for t in tensors)


def check_traced(x: Tensor, **others: tuple[Tensor | None, Sequence[int]]) -> None:
    """While a graph is traced, what the kernels check: each of ``others`` has the dtype and device of ``x`` and the shape given with it."""
    for name, (t, shape) in others.items():
        if t is not None:
            torch._check(t.dtype == x.dtype, lambda name=name, t=t: f"{name} has dtype {t.dtype}, needs {x.dtype} like x")
            torch._check(t.device == x.device, lambda name=name, t=t: f"{name} is on {t.device}, x on {x.device}")
            shape = tuple(shape)
            torch._check(t.shape == shape, lambda name=name, t=t, shape=shape: f"{name} has shape {tuple(t.shape)}, needs {shape}")


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What sums over numbers of ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call with these arguments must be recorded for backward."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_transformed() -> bool:
    """Whether this call is traced or runs under torch.func: where arguments cannot be overwritten by a kernel."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def in_memory_order(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``x`` with its dimensions permuted to the order in which they lie in memory, and the function that permutes a result back.

    An elementwise kernel then sees one contiguous array wherever the numbers of ``x`` lie densely, and its result has the strides that
    torch gives it.
    """
    if x.is_contiguous():
        return x, _itself
    strides = torch.empty_like(x, device="meta").stride()  # what torch makes of strides with gaps, or of 0
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    back = sorted(range(x.dim()), key=lambda d: order[d])
    return x.permute(order), lambda y: y.permute(back)


def _itself(y: Tensor) -> Tensor:
    return y


def overwrite(input: Tensor, function: Any, raw: Callable[..., Any], compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """``input``, overwritten by an elementwise op: by ``raw(x, *args)`` in its own memory, within ``function`` (an autograd.Function that
    calls ``raw`` and marks x dirty) where that is recorded; by a copy of ``compute(input, *args)`` where memory or transforms forbid it.

    Raises:
        RuntimeError: ``input`` is a leaf that requires grad, or a view of one; or several of its numbers lie in one place.
    """
    x, _ = in_memory_order(input)
    if is_transformed() or not x.is_contiguous():
        return input.copy_(compute(input, *args))
    if needs_grad(x):
        base = input._base if input._base is not None else input
        if base.is_leaf and base.requires_grad:
            kind = "a leaf" if base is input else "a view of a leaf"
            raise RuntimeError(f"input is {kind} that requires grad; it cannot be changed in place while gradients are recorded")
        apply_function(function, x, *args)
    else:
        raw(x, *args)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
    return input


def reference_gradients(definition: Callable[..., Any], args: Sequence[Any], needs: Sequence[bool], dys: Any) -> Optionals:
    """The gradients of ``definition(*args)`` for the arguments that ``needs`` marks, None for the others.

    They are differentiable functions of every argument and of ``dys`` (shaped like the definition's result), so second derivatives exist.
    """
    needed = [i for i, need in enumerate(needs) if need]

    def of_needed(*wanted: Tensor) -> Any:
        arguments = list(args)
        for i, t in zip(needed, wanted, strict=True):
            arguments[i] = t
        return definition(*arguments)

    vjp: Callable[[Any], tuple[Tensor, ...]] = torch.func.vjp(of_needed, *(args[i] for i in needed))[1]
    found = dict(zip(needed, vjp(dys), strict=True))
    return tuple(found.get(i) for i in range(len(args)))
