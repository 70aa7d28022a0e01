r"""batch_norm: y = act((x - mean) rstd weight + bias), mean and rstd of each channel over the batch and all positions, act the identity or
relu (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1).

Training    mean[c] = Σ x[n,c,s] / m       var[c] = Σ (x[n,c,s] - mean[c])² / m       rstd = 1 / √(var + eps),   m = N S
            running_mean ← (1 - momentum) running_mean + momentum mean,   running_var likewise with var m / (m - 1)
Eval        mean and var are the running ones
Backward    dz = dy, or 0 where relu gave 0      x̂ = (x - mean) rstd
            dbias = Σ dz     dweight = Σ dz x̂     training: dx = weight rstd (dz - (dbias + x̂ dweight) / m)     eval: dx = weight rstd dz

Shapes      x (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), contiguous or channels last; y likewise; the others (C,); S positions
Work        training reads x twice and writes y, backward reads dy and x twice and writes dx; eval reads and writes once: memory decides,
            and the order of the work, so that what is read twice is in the cache the second time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backend import PLAIN_TENSORS, apply_function
from ..contract import Optionals, is_spread, needs_grad, on_shards, reference_gradients, require_tensors, unsupported, without_kernel
from ..registry import Cost, Op, register
from . import batch_norm_raw as raw

__all__ = ["batch_norm", "batch_norm_relu"]


Options = tuple[bool, float, float, bool]  # training, momentum, eps, relu


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:  # fmt: skip
    training, momentum, eps, relu = options
    if training:
        return raw.train(x, weight, bias, mean, var, momentum, eps, relu)
    return raw.evaluate(x, weight, bias, mean, var, eps, relu)


class _BatchNorm(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, _, _, ctx.options = inputs
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, stats)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _dstats: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None, None
        x, weight, bias, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return *_reference_backward(dy, x, weight, bias, stats, ctx.options, needs), None, None, None
        training, _, eps, relu = ctx.options
        return *raw.backward(dy, x, weight, bias, stats, training, eps, relu, *needs), None, None, None


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, options: Options, needs: Sequence[bool]
) -> Optionals:
    """Without running statistics in training, so that they are not updated a second time."""
    training, _, eps, relu = options
    dtype = next((t.dtype for t in (weight, bias) if t is not None), stats.dtype)
    mean, var = (None, None) if training else stats[:2].detach().to(dtype).unbind()

    def definition(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _reference(x, mean, var, weight, bias, training, 0.0, eps, relu)

    return reference_gradients(definition, (x, weight, bias), needs, dy)


def _reference(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float,
    eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return torch.relu(y) if relu else y


def _unsupported(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float = 0.1,
    eps: float = 1e-5,
) -> str | None:  # fmt: skip
    """Why torch's own batch_norm runs, or raises, for these arguments; None where a kernel runs. On the path of every call."""
    others = (("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias))
    reason = unsupported(("input", x), optional=others)
    if reason is not None:
        return reason
    shape = x.shape
    if not 2 <= len(shape) <= 5 or x.numel() == 0:
        return f"input has shape {tuple(shape)}; kernels take 2 to 5 dimensions and at least one number"
    C, dtype = shape[1], None
    for name, t in others:
        if t is not None:
            if t.shape != (C,):
                return f"{name} has shape {tuple(t.shape)}, needs ({C},)"
            dtype = dtype or t.dtype
            if t.dtype != dtype or (dtype != x.dtype and (dtype != torch.float32 or x.dtype.itemsize != 2)):
                return f"{name} has dtype {t.dtype}; needs {x.dtype} like input, or float32 beside a half type, the same for all"
    if training:
        if x.numel() == C or eps <= 0:
            return f"training needs more than one number per channel and eps > 0, got input {tuple(shape)} and eps {eps}"
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return "running statistics are updated inside a torch.func transform"
    if (mean is None) != (var is None) or (mean is None and not training):
        return "running_mean and running_var must both be given, or in training both be None"
    if any(t is not None and t.requires_grad for t in (mean, var)):
        return "running statistics have no gradient, but require one"
    return f"momentum must be a number and eps not negative, got {momentum} and {eps}" if momentum is None or eps < 0 else None


def _batch_norm(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float,
    eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """The kernel, which checks every argument itself; why it refuses some, and what torch makes of them, is looked for only then."""
    args = (x, mean, var, weight, bias, training, momentum, eps)
    reason = None if _may_run(x, mean, var, weight, bias, training) else _unsupported(*args)
    if reason is None:
        try:
            return _run(x, weight, bias, mean, var, (training, momentum, eps, relu))
        except RuntimeError:
            reason = _unsupported(*args)
            if reason is None:
                raise
    require_tensors(("input", x), optional=(("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias)))
    if is_spread(x, mean, var, weight, bias):
        return on_shards("batch_norm", *args, relu)
    return without_kernel(reason, _reference, *args, relu, name="batch_norm")


_PLAIN = frozenset((*PLAIN_TENSORS, type(None)))


def _may_run(x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool) -> bool:
    """What the kernel cannot see: subclasses, running statistics that require a gradient, tracing and transforms."""
    optional = type(mean) in _PLAIN and type(var) in _PLAIN and type(weight) in _PLAIN and type(bias) in _PLAIN
    if not (optional and type(x) in PLAIN_TENSORS and x.numel()):
        return False
    if (mean is not None and mean.requires_grad) or (var is not None and var.requires_grad):
        return False
    return not (torch.compiler.is_compiling() or (training and torch._C._are_functorch_transforms_active()))


def _run(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, options: Options) -> Tensor:
    if needs_grad(x, weight, bias):
        y: Tensor = apply_function(_BatchNorm, x, weight, bias, mean, var, options)[0]
    else:
        y = _forward(x, weight, bias, mean, var, options)[0]
    if mean is not None and var is not None and options[0] and not torch.compiler.is_compiling():
        increment_version((mean, var))
    return y


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.batch_norm``: normalise every channel of ``input``.

    Args:
        input: ``(N, C)``, ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``, float32, float64, bfloat16 or float16; contiguous and
            channels-last memory is used as it lies, and the result has the same format.
        running_mean, running_var: ``(C,)``. In training they are updated in place, with the unbiased variance, and may be None.
        weight, bias: ``(C,)`` or None. All of these have the dtype of ``input``, or float32 beside a half type.
        training: normalise with the statistics of ``input`` instead of the running ones.
        momentum: the share of the new statistics in the running ones.

    Raises:
        ValueError: one value per channel in training, eps out of range, or only one of the running statistics.
        RuntimeError: sizes or dtypes do not fit, or no running statistics in eval. TypeError: an argument is not a tensor.
        After an error the running statistics are what they were.
    """
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, False)


def batch_norm_relu(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu(batch_norm(...))`` in one kernel. See ``batch_norm``."""
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, True)


def _definition(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, relu: bool) -> Tensor:
    """The formula at the top of this file. x is moved by one of its numbers first, so that equal numbers have exactly no variance."""
    over = [d for d in range(x.dim()) if d != 1]
    if training and x.numel():
        x = x - x.detach()[tuple(slice(None if d == 1 else 1) for d in range(x.dim()))]
        mean, var = x.mean(over), x.var(over, correction=0)
    scale = (var + 1e-5).rsqrt()
    along = (-1, *(1,) * (x.dim() - 2))
    y = (x - mean.view(along)) * scale.view(along)
    y = y if weight is None else y * weight.view(along)
    y = y if bias is None else y + bias.view(along)
    return torch.relu(y) if relu else y


def _running(x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
    """Fresh running statistics, so that a call of an Op depends on its arguments alone."""
    C, dtype = x.shape[1], next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
    if training:
        return x.new_zeros(C, dtype=dtype), x.new_ones(C, dtype=dtype)
    channel = torch.arange(C, dtype=torch.float32, device=x.device)
    return (channel / 8 - 0.5).to(dtype), (channel / 4 + 0.5).to(dtype)


def _make(
    factory: Callable[..., Tensor], lead: tuple[int, ...], affine: bool = True, channels_last: bool = False, training: bool = True
) -> tuple[Any, ...]:
    x = factory(*lead)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x, factory(lead[1]) if affine else None, factory(lead[1]) if affine else None, training


def _cost(lead: tuple[int, ...], affine: bool = True, channels_last: bool = False, training: bool = True) -> Cost:
    total = torch.Size(lead).numel()
    again = total * training  # statistics are read from the cache at best, so only one reading counts
    return Cost(2 * total + 4 * again, 6 * total + 3 * again, 2 * total, 3 * total)


SIZES = [(4, 3), (5, 1), (0, 3), (7, 17), (5, 6, 9), (2, 3, 16, 5), (3, 67, 2, 2), (67, 65), (3, 5, 33, 31), (2, 3, 2, 2, 3)]
SAMPLES: list[dict[str, Any]] = [
    *({"lead": size} for size in SIZES), {"lead": (6, 5), "affine": False}, {"lead": (2, 5, 3, 4), "channels_last": True}
]  # fmt: skip
BENCH: list[dict[str, Any]] = [
    {"lead": (64, 256)}, {"lead": (32, 64, 56, 56)}, {"lead": (32, 64, 56, 56), "channels_last": True}
]  # fmt: skip


def _register(name: str, function: Callable[..., Tensor], relu: bool, training: bool, **sizes: Any) -> None:
    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool) -> Tensor:
        return function(x, *_running(x, weight, bias, training), weight, bias, training)

    def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool) -> Tensor:
        return _definition(x, *_running(x, weight, bias, training), weight, bias, training, relu)

    def native(x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool) -> Tensor:
        return _reference(x, *_running(x, weight, bias, training), weight, bias, training, 0.1, 1e-5, relu)

    register(
        Op(
            name=name,
            module="batch_norm",
            call=call,
            reference=reference,
            native=native,
            make=_make,
            samples=[{**size, "training": training} for size in SAMPLES],
            cost=_cost,
            raw=("batch_norm_train" if training else "batch_norm_eval", "batch_norm_backward"),
            supports=lambda x, weight, bias, training: _unsupported(x, *_running(x, weight, bias, training), weight, bias, training),
            **sizes,
        )
    )


_tiny = [{"lead": (64, 128)}, {"lead": (64, 32)}]
_register("batch_norm", batch_norm, False, True, bench=BENCH, quick=BENCH[1:2], tiny=_tiny)
_register("batch_norm_relu", batch_norm_relu, True, True, bench=BENCH, quick=BENCH[1:2], tiny=_tiny)
_evaluation = [{"lead": (32, 64, 56, 56), "training": False}]
_register("batch_norm_eval", batch_norm, False, False, bench=_evaluation, quick=_evaluation, tiny=[{"lead": (64, 128), "training": False}])
