r"""layer_norm and rms_norm: every row of numbers brought to mean 0 and variance 1, or to mean square 1, then scaled and shifted by column.

Forward     mean[m] = Σ_n x[m,n] / N     rstd[m] = 1 / √(Σ_n (x[m,n] - mean[m])² / N + eps)
            x̂[m,n]  = (x[m,n] - mean[m]) rstd[m]                     y[m,n] = x̂[m,n] w[n] + b[n]
Backward    g[m,n]  = dy[m,n] w[n]       c1[m] = Σ_n g[m,n] / N      c2[m]  = Σ_n g[m,n] x̂[m,n] / N
            dx[m,n] = rstd[m] (g[m,n] - c1[m] - x̂[m,n] c2[m])
            dw[n]   = Σ_m dy[m,n] x̂[m,n]                             db[n]  = Σ_m dy[m,n]

rms_norm has no b, and mean and c1 are 0. The backward keeps x, mean and rstd, and forms x̂ again. The variance is summed from distances
to the mean, never as a difference of two large sums, and the mean is kept as mean[0] + mean[1]: one number of x's type would be off by
much of a standard deviation where the mean is large.

Shapes      x (*, N)   w, b (N,) or None   y (*, N);   * is any number of dimensions, M their product, N that of `normalized_shape`
Work        8MN flops and 2MN elements moved forward, 14MN and 3MN backward: memory decides
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function, define
from ..contract import (
    Optionals,
    autocast_dtype,
    in_float32,
    is_spread,
    needs_grad,
    on_shards,
    reference_gradients,
    require_tensors,
    statistics_dtype,
    unsupported,
    without_kernel,
)
from ..registry import Cost, Op, register

__all__ = ["layer_norm", "rms_norm"]


def check_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, **others: tuple[Tensor | None, tuple[Any, ...], torch.dtype]) -> None:
    """What the kernels check, while a graph is traced. ``others`` are named tensors with the shape and dtype that they need."""
    torch._check(x.dim() == 2, lambda: f"x must have 2 dimensions, got {x.dim()}")
    mixed = any(t is not None and t.dtype == torch.float32 for t in (weight, bias)) and x.dtype.itemsize == 2
    dtype = torch.float32 if mixed else x.dtype
    for name, (t, shape, wanted) in {"weight": (weight, x.shape[1:], dtype), "bias": (bias, x.shape[1:], dtype), **others}.items():
        if t is not None:
            torch._check(t.dtype == wanted, lambda name=name, t=t, wanted=wanted: f"{name} has dtype {t.dtype}, needs {wanted}")
            torch._check(t.device == x.device, lambda name=name, t=t: f"{name} is on {t.device}, x on {x.device}")
            torch._check(t.shape == shape, lambda name=name, t=t, shape=shape: f"{name} has shape {tuple(t.shape)}, needs {tuple(shape)}")


def _forward_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> Optionals:
    check_rows(x, weight, bias)
    M, sums = x.shape[0], statistics_dtype(x)
    return x.new_empty(x.shape), x.new_empty((2, M), dtype=sums) if centred else None, x.new_empty(M, dtype=sums)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> Optionals:
    M, sums, parameter = x.shape[0], statistics_dtype(x), x if weight is None else weight
    check_rows(x, weight, None, dy=(dy, x.shape, x.dtype), mean=(mean, (2, M), sums), rstd=(rstd, (M,), sums))
    return (
        x.new_empty(x.shape) if need_dx else None,
        parameter.new_empty(x.shape[1]) if need_dweight else None,
        parameter.new_empty(x.shape[1]) if need_dbias else None,
    )


_forward = define(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centred) -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward_fake,
)
_backward = define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? mean, Tensor rstd, bool need_dx, bool need_dweight, bool need_dbias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, ...]:
        y, mean, rstd = _forward(x, weight, bias, eps, centred)
        return (y, rstd, mean) if centred else (y, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.eps, ctx.centred = inputs
        _, rstd, mean = output if ctx.centred else (*output, None)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> Optionals:
        if dy is None:
            return None, None, None, None, None
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return reference_gradients(_reference, (x, weight, bias, ctx.eps, ctx.centred), ctx.needs_input_grad, dy)
        return *_backward(dy, x, weight, mean, rstd, *ctx.needs_input_grad[:3]), None, None


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, centred: bool, shape: Any = None) -> Tensor:
    shape = x.shape[-1:] if shape is None else shape
    return F.layer_norm(x, shape, weight, bias, eps) if centred else F.rms_norm(x, shape, weight, eps)  # type: ignore[arg-type]


def _unsupported(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, normalized_shape: Sequence[int] | None = None
) -> str | None:
    """Why the definition in PyTorch's own operations runs for these arguments, or None where a kernel does. On the path of every call."""
    return unsupported(("input", x), optional=(("weight", weight), ("bias", bias))) or misfit(x, weight, bias, normalized_shape)


def misfit(x: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: Sequence[int] | None) -> str | None:
    """What does not fit in the shapes and dtypes of plain tensors, or None. On the path of every call."""
    shape = x.shape[-1:] if normalized_shape is None else normalized_shape
    tail = x.shape[-len(shape) :] if isinstance(shape, (tuple, list)) and shape else None
    if tail is None or tail != (tuple(shape) if type(shape) is list else shape):
        return f"normalized_shape is {normalized_shape}, needs to be the last dimensions of the input, which has shape {tuple(x.shape)}"
    dtype = x.dtype
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            if t.shape != tail:
                return f"{name} has shape {tuple(t.shape)}, needs {tuple(tail)}"
            if t.dtype != dtype:
                if name == "bias" or t.dtype != torch.float32 or dtype.itemsize != 2:
                    return f"{name} has dtype {t.dtype} beside {dtype}; weight and bias need the input's, or float32 beside a half type"
                dtype = t.dtype
    for n in shape:
        if isinstance(n, float):
            return f"normalized_shape is {normalized_shape}, needs integers"
    return None


def _normalise(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float | None, centred: bool) -> Tensor:
    reason = _unsupported(x, weight, bias, shape)
    if reason is not None or not isinstance(eps, float):
        if reason is not None or not (isinstance(eps, int) or (eps is None and not centred)):
            reason = reason or f"eps is {eps!r}, needs a number"
            require_tensors(("input", x), optional=(("weight", weight), ("bias", bias)))
            name = "layer_norm" if centred else "rms_norm"
            if is_spread(x, weight, bias):
                return on_shards(name, x, shape, weight, bias, eps) if centred else on_shards(name, x, shape, weight, eps)
            return without_kernel(reason, _reference, x, weight, bias, eps, centred, shape, name=name)
        eps = torch.finfo(statistics_dtype(x)).eps if eps is None else float(eps)
    if not x.is_cpu and autocast_dtype(x) is not None:  # on the float32 list of cuda alone
        x, weight, bias = in_float32(x, weight, bias)  # type: ignore[assignment]
    rows = x
    if len(shape) > 1:
        weight, bias = (t if t is None else t.reshape(-1) for t in (weight, bias))
    if len(shape) > 1 or x.dim() != 2:
        rows = x.reshape(x.shape[: -len(shape)].numel(), x.shape[-len(shape) :].numel())
    if needs_grad(rows, weight, bias):
        y = apply_function(_LayerNorm, rows, weight, bias, eps, centred)[0]
    else:
        y = _forward(rows, weight, bias, eps, centred)[0]
    return y if rows is x else y.view(x.shape)


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``torch.nn.functional.layer_norm``: (input - mean) / √(variance + eps) weight + bias over the last dimensions.

    Args:
        input: ``(*, *normalized_shape)``, float32, float64, bfloat16 or float16; any strides.
        normalized_shape: the dimensions that mean and variance go over.
        weight, bias: ``normalized_shape`` or None, in the input's dtype, or both float32 beside a half type.

    Returns:
        The input's shape and dtype. Statistics are float32 for half types; their rounding does not depend on how large the mean is.

    Raises:
        RuntimeError: shapes or dtypes do not fit. TypeError: an argument is not a tensor, or ``normalized_shape`` no list of integers.
    """
    return _normalise(input, normalized_shape, weight, bias, eps, True)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """``torch.nn.functional.rms_norm``: input / √(mean of squares + eps) weight over the last dimensions. See ``layer_norm``.

    ``eps`` None is torch's choice: the machine epsilon of float32, of float64 for float64.
    """
    return _normalise(input, normalized_shape, weight, None, eps, False)


def make_rows(factory: Callable[..., Tensor], N: int, M: int = 0, lead: tuple[int, ...] | None = None) -> Tensor:
    return factory(*((M,) if lead is None else lead), N)


def _make(factory: Callable[..., Tensor], N: int, M: int = 0, lead: tuple[int, ...] | None = None, affine: bool = True) -> tuple[Any, ...]:
    return make_rows(factory, N, M, lead), factory(N) if affine else None, factory(N) if affine else None


def _cost(N: int, M: int = 0, lead: tuple[int, ...] | None = None, affine: bool = True) -> Cost:
    M = M if lead is None else int(torch.Size(lead).numel())
    return Cost(8 * M * N, 14 * M * N, 2 * M * N + 2 * N * affine, 3 * M * N + 3 * N * affine)


SAMPLES: list[dict[str, Any]] = [
    {"M": 0, "N": 3},
    {"M": 3, "N": 5},
    {"M": 1, "N": 16},
    {"lead": (2, 1, 3), "N": 17, "affine": False},
    {"M": 5, "N": 31},
    {"lead": (3, 4), "N": 65},
    {"M": 19, "N": 113},
]
BENCH = [{"M": M, "N": N} for M, N in [(64, 64), (1024, 768), (8192, 768), (4096, 4096), (512, 16384), (3, 1000003)]]
QUICK = [BENCH[1], BENCH[3]]
TINY = [{"M": 1, "N": 64}, BENCH[0]]


def _register(name: str, call: Callable[..., Tensor], native: Callable[..., Tensor], make: Callable[..., Any]) -> None:
    register(
        Op(
            name=name,
            module="layer_norm",
            call=call,
            reference=native,
            native=native,
            make=make,
            samples=SAMPLES,
            bench=BENCH if name == "layer_norm" else QUICK,
            quick=QUICK if name == "layer_norm" else BENCH[1:2],
            tiny=TINY,
            cost=_cost,
            raw=("layer_norm_forward", "layer_norm_backward"),
            supports=_unsupported,
        )
    )


_register(
    "layer_norm",
    lambda x, weight=None, bias=None: layer_norm(x, x.shape[-1:], weight, bias),
    lambda x, weight=None, bias=None: F.layer_norm(x, x.shape[-1:], weight, bias),
    _make,
)
_register(
    "rms_norm",
    lambda x, weight=None: rms_norm(x, x.shape[-1:], weight, 1e-5),
    lambda x, weight=None: F.rms_norm(x, x.shape[-1:], weight, 1e-5),
    lambda factory, **size: _make(factory, **size)[:2],
)
