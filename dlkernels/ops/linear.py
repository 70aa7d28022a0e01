r"""linear: y = act(x Wᵀ + b), one product with the bias and the activation applied to each tile before it leaves the cache.

Forward     z[m,n] = Σ_k x[m,k] W[n,k] + b[n]          y = act(z)
Backward    dz     = dy · act'(z)                       formed while the products below read it
            dx[m,k] = Σ_n dz[m,n] W[n,k]
            dW[n,k] = Σ_m dz[m,n] x[m,k]
            db[n]   = Σ_m dz[m,n]

relu, sigmoid and tanh have a derivative that y alone determines, so y is what the backward keeps; the others need z, which the forward then
writes beside y.

Shapes      x (*, K)   weight (N, K)   bias (N,) or None   y (*, N);   * is any number of batch dimensions, M their product
Work        2MNK flops forward, 4MNK backward; MK + NK + N + MN elements moved forward, twice that backward: the flops decide unless M is
            small, when reading W does
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function, define
from ..contract import (
    Optionals,
    autocast_dtype,
    check_traced,
    in_autocast,
    is_spread,
    needs_grad,
    on_shards,
    reference_gradients,
    require_tensors,
    unsupported,
    without_kernel,
)
from ..registry import Cost, Op, register
from . import activations
from .activations import Activation

__all__ = ["linear", "linear_act", "linear_relu"]


ACTIVATIONS: dict[str, Activation] = {  # by the names of linear_act; what goes into one is z here
    "none": activations.IDENTITY,
    "relu": activations.RELU,
    "gelu": activations.GELU,
    "gelu_tanh": activations.GELU_TANH,
    "leaky_relu": activations.LEAKY_RELU_OF_X,  # of any slope
    "sigmoid": activations.SIGMOID,
    "tanh": activations.TANH,
    "silu": activations.SILU,
}


def _check(x: Tensor, weight: Tensor, **others: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """What the kernels check, while a graph is traced."""
    torch._check(x.dim() == 2 and weight.dim() == 2, lambda: f"x and weight must have 2 dimensions, got {x.dim()} and {weight.dim()}")
    torch._check(weight.shape[1] == x.shape[1], lambda: f"weight has shape {tuple(weight.shape)}, needs (N, {x.shape[1]}) to fit x")
    check_traced(x, weight=(weight, weight.shape), **others)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, slope: float, save: bool) -> Optionals:
    _check(x, weight, bias=(bias, (weight.shape[0],)))
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape) if save else None


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor | None, activation: int, slope: float, need_dx: bool, need_dweight: bool,
    need_dbias: bool,
) -> Optionals:  # fmt: skip
    shape = (x.shape[0], weight.shape[0])
    _check(x, weight, dy=(dy, shape), saved=(saved, shape))
    return (
        x.new_empty(x.shape) if need_dx else None,
        x.new_empty(weight.shape) if need_dweight else None,
        x.new_empty(weight.shape[0]) if need_dbias else None,
    )


_forward = define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, int activation, float slope, bool save) -> (Tensor y, Tensor z)", _forward_fake
)
_backward = define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? saved, int activation, float slope, "
    "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward_fake,
)


def keep(ctx: Any, tensors: list[Tensor | None], act: Activation, output: Any) -> None:
    """Save for the backward of a product with ``act`` behind it: ``tensors``, and of ``output``, y or (y, z), what the derivative needs."""
    saved = output if act.keeps == "y" else None
    if act.keeps == "x":
        saved = output[1]
        ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, saved)


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor | tuple[Tensor, Tensor]:
        save = act.keeps == "x"
        y, z = _forward(x, weight, bias, act.code, slope, save)
        return (y, z) if save else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.act, ctx.slope = inputs
        keep(ctx, tensors, ctx.act, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _dz: None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        x, weight, bias, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return reference_gradients(_reference, (x, weight, bias, ctx.act, ctx.slope), ctx.needs_input_grad, dy)
        return *_backward(dy, x, weight, saved, ctx.act.code, ctx.slope, *ctx.needs_input_grad[:3]), None, None


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    return act.reference(F.linear(x, weight, bias), slope, 0.0)


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the definition in PyTorch's own operations runs for these arguments, or None where a kernel does. On the path of every call."""
    reason = unsupported(("input", x), ("weight", weight), optional=(("bias", bias),))
    if reason is not None:
        return reason
    x_shape, weight_shape = x.shape, weight.shape
    fits = len(x_shape) > 0 and len(weight_shape) == 2 and x_shape[-1] == weight_shape[1]
    if not fits or (bias is not None and bias.shape != (weight_shape[0],)):
        return f"{_shapes(x, weight, bias)} do not fit (*, K), (N, K) and (N,)"
    return None


def _shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    named = (("input", x), ("weight", weight), ("bias", bias))
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in named if t is not None)


def _refused(reason: str, x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """What PyTorch makes of arguments that no kernel takes: its result, or its error with the arguments named."""
    require_tensors(("input", x), ("weight", weight), optional=(("bias", bias),))
    if is_spread(x, weight, bias):
        return on_shards("linear_act", x, weight, bias, next(name for name, known in ACTIVATIONS.items() if known is act), slope)
    for t in (x, weight, bias):
        if t is not None and t.device != x.device:
            raise RuntimeError(f"{reason}; all tensors must be on one device")
    return without_kernel(reason, _reference, x, weight, bias, act, slope, name="linear")


def linear_act(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "relu", negative_slope: float = 0.01
) -> Tensor:
    """act(input Wᵀ + bias) in one kernel.

    Args:
        input: ``(*, K)``, float32, float64, bfloat16 or float16; any strides.
        weight: ``(N, K)``, same dtype and device.
        bias: ``(N,)`` or None.
        activation: one of "none", "relu", "gelu" (erf), "gelu_tanh", "leaky_relu", "sigmoid", "tanh", "silu".
        negative_slope: slope of leaky_relu for z < 0.

    Returns:
        ``(*, N)`` in the input's dtype; under autocast in its dtype, as ``torch.nn.functional.linear``.

    Raises:
        ValueError: ``activation`` is unknown. RuntimeError: sizes or dtypes do not fit. TypeError: an argument is not a tensor.
    """
    act = ACTIVATIONS.get(activation)
    if act is None:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    reason = _unsupported(input, weight, bias)
    if reason is not None:
        return _refused(reason, input, weight, bias, act, negative_slope)
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = in_autocast(dtype, input, weight, bias)  # type: ignore[assignment]
    x = input if input.dim() == 2 else input.reshape(input.shape[:-1].numel(), input.shape[-1])
    if needs_grad(x, weight, bias):
        y = apply_function(_Linear, x, weight, bias, act, negative_slope)
        y = y[0] if act.keeps == "x" else y
    else:
        y = _forward(x, weight, bias, act.code, negative_slope, False)[0]
    return y if input.dim() == 2 else y.view(*input.shape[:-1], weight.shape[0])


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: input ``(*, K)``, weight ``(N, K)``, bias ``(N,)`` or None -> ``(*, N)``. See ``linear_act``."""
    return linear_act(input, weight, bias, "none")


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))`` in one kernel. See ``linear_act``."""
    return linear_act(input, weight, bias, "relu")


def _make(factory: Callable[..., Tensor], K: int, N: int, M: int = 0, lead: tuple[int, ...] | None = None, bias: bool = True) -> tuple:
    return factory(*((M,) if lead is None else lead), K), factory(N, K), factory(N) if bias else None


def _cost(K: int, N: int, M: int = 0, lead: tuple[int, ...] | None = None, bias: bool = True) -> Cost:
    M = M if lead is None else int(torch.Size(lead).numel())
    moved = M * K + N * K + M * N + N * bias
    return Cost(2 * M * N * K, 4 * M * N * K, moved, 2 * moved)


SAMPLES: list[dict[str, Any]] = [
    {"M": 1, "K": 1, "N": 1},
    {"M": 0, "K": 3, "N": 4},
    {"M": 3, "K": 0, "N": 4},
    {"M": 3, "K": 4, "N": 0},
    {"M": 5, "K": 7, "N": 3, "bias": False},
    {"lead": (), "K": 9, "N": 17},
    {"lead": (2, 3), "K": 33, "N": 31},
    {"lead": (2, 1, 5, 3), "K": 16, "N": 65, "bias": False},
    {"M": 13, "K": 31, "N": 29},
    {"M": 15, "K": 64, "N": 33},
    {"M": 30, "K": 66, "N": 50},
    {"M": 65, "K": 129, "N": 67},
]
BENCH = [
    {"M": M, "K": K, "N": N}
    for M, K, N in [
        (64, 784, 256), (256, 1024, 1024), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096), (333, 777, 1001), (8, 4096, 4096)
    ]
]
QUICK = [BENCH[i] for i in (0, 2, 6)]
TINY = [{"M": M, "K": K, "N": N} for M, K, N in [(64, 20, 128), (64, 128, 64), (64, 64, 32), (1, 64, 32)]]


def _register(activation: str) -> None:
    act = ACTIVATIONS[activation]

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_act(x, weight, bias, activation)

    def native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _reference(x, weight, bias, act, 0.01)

    register(
        Op(
            name="linear" if activation == "none" else f"linear_{activation}",
            module="linear",
            call=call,
            reference=native,
            native=native,
            make=_make,
            samples=SAMPLES,
            bench=BENCH if activation == "relu" else QUICK,
            quick=QUICK if activation == "relu" else BENCH[:1],
            tiny=TINY,
            cost=_cost,
            raw=("linear_forward", "linear_backward"),
            supports=_unsupported,
        )
    )


for _activation in ACTIVATIONS:
    _register(_activation)
