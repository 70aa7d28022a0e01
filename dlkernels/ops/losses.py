r"""losses: how far a prediction x is from its target t, element by element, and the mean or the sum of that.

Forward     v[n] = w[n] value(x[n], t[n])                y = v, mean(v) or sum(v)
Backward    dx[n] = g[n] w[n] ∂value/∂x                  g = dy, dy / N or dy
            dt[n] = g[n] w[n] ∂value/∂t

with d = x - t and L = log(1 + exp(-|x|)):

            value                                        ∂value/∂x                      ∂value/∂t
mse         d²                                           2d                             -2d
l1          |d|                                          sign d                         -sign d
smooth_l1   d² / 2β if |d| < β, else |d| - β/2           d/β cut off at ±1              -∂value/∂x
huber       d² / 2 if |d| <= δ, else δ(|d| - δ/2)        d cut off at ±δ                -∂value/∂x
bce         -t log x - (1 - t) log(1 - x)                (x - t) / x(1 - x)             log(1 - x) - log x
 logits     (1 - t) x + q (L - min(x, 0))                q sigmoid(x) - pt              -x; in general log σ(-x) - p log σ(x)

where p is pos_weight (1 if absent) and q = 1 + (p - 1) t. As in PyTorch, bce's logarithms stop at -100, its divisor x(1 - x) at 1e-12.

Shapes      x, target, weight, pos_weight (*)   y () or (*);   N is the number of elements
Work        2N elements moved forward, 3N backward, 4N where the target wants a gradient too: memory decides, for bce the logarithms
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function, define
from ..contract import (
    REDUCTIONS,
    Optionals,
    autocast_dtype,
    check_traced,
    in_float32,
    is_spread,
    needs_grad,
    on_shards,
    reduction_code,
    reference_gradients,
    require_tensors,
    unsupported,
)
from ..registry import Cost, Op, register

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss"]


class Loss(NamedTuple):
    """``code`` is what the kernels switch on; ``parameter`` names native's number, if any; ``spreads``: sizes may differ."""

    code: int
    native: Callable[..., Tensor]
    parameter: str = ""
    spreads: bool = True


MSE = Loss(0, F.mse_loss)
L1 = Loss(1, F.l1_loss)
SMOOTH_L1 = Loss(2, F.smooth_l1_loss, "beta")
HUBER = Loss(3, F.huber_loss, "delta")
BCE = Loss(4, F.binary_cross_entropy, spreads=False)
BCE_WITH_LOGITS = Loss(5, F.binary_cross_entropy_with_logits, spreads=False)


def _check(x: Tensor, **others: Tensor | None) -> None:
    check_traced(x, **{name: (t, x.shape) for name, t in others.items()})


def _forward_fake(x: Tensor, target: Tensor, weight: Any, pos_weight: Any, loss: int, parameter: float, reduction: int) -> Tensor:
    _check(x, target=target, weight=weight, pos_weight=pos_weight)
    return x.new_empty(() if reduction else x.shape)


def _backward_fake(
    dy: Tensor, x: Tensor, target: Tensor, weight: Any, pos_weight: Any, loss: int, parameter: float, reduction: int, need_dx: bool,
    need_dtarget: bool,
) -> Optionals:  # fmt: skip
    _check(x, target=target, weight=weight, pos_weight=pos_weight)
    return x.new_empty(x.shape) if need_dx else None, x.new_empty(x.shape) if need_dtarget else None


_forward = define(
    "losses_forward(Tensor x, Tensor target, Tensor? weight, Tensor? pos_weight, int loss, float parameter, int reduction) -> Tensor",
    _forward_fake,
)
_backward = define(
    "losses_backward(Tensor dy, Tensor x, Tensor target, Tensor? weight, Tensor? pos_weight, int loss, float parameter, int reduction, "
    "bool need_dx, bool need_dtarget) -> (Tensor dx, Tensor dtarget)",
    _backward_fake,
)


class _Loss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: Loss, parameter: float, reduction: int
    ) -> Tensor:
        return _forward(x, target, weight, pos_weight, loss.code, parameter, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.loss, ctx.parameter, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        options = ctx.loss, ctx.parameter, ctx.reduction
        if torch.is_grad_enabled():
            return reference_gradients(_reference, (*ctx.saved_tensors, *options), ctx.needs_input_grad, dy)
        dx, dtarget = _backward(dy, *ctx.saved_tensors, ctx.loss.code, ctx.parameter, ctx.reduction, *ctx.needs_input_grad[:2])
        return dx, dtarget, None, None, None, None, None


def _reference(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: Loss, parameter: float, reduction: int
) -> Tensor:
    options = {loss.parameter: parameter} if loss.parameter else {}
    weights = {name: t for name, t in (("weight", weight), ("pos_weight", pos_weight)) if t is not None}
    return loss.native(input, target, reduction=REDUCTIONS[reduction], **options, **weights)


def _unsupported(loss: Loss, input: Any, target: Any, weight: Any = None, pos_weight: Any = None) -> str | None:
    """Why PyTorch's own operations run for these arguments, or None where a kernel does. On the path of every call."""
    reason = unsupported(("input", input), ("target", target), optional=(("weight", weight), ("pos_weight", pos_weight)))
    if reason is not None:
        return reason
    if input.dtype != target.dtype:
        return f"target has dtype {target.dtype} and input {input.dtype}; kernels take one dtype"
    for name, t in (("weight", weight), ("pos_weight", pos_weight)):
        if t is not None:
            if loss.spreads:
                return f"{loss.native.__name__} has a {name}; only the kernels of the cross-entropies weigh"
            if t.dtype != input.dtype or t.requires_grad:
                return f"{name} has dtype {t.dtype}, or requires grad; kernels take constants of input's dtype"
    if loss is BCE and input.is_cuda and autocast_dtype(input) is not None:
        return "PyTorch refuses binary_cross_entropy under autocast on a GPU"
    return None


def _loss(
    loss: Loss, input: Tensor, target: Tensor, reduction: int, parameter: float = 0.0, weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What the public functions share: sizes, dtypes, and the choice between kernel and definition."""
    reason = _unsupported(loss, input, target, weight, pos_weight)
    if reason is not None:
        require_tensors(("input", input), ("target", target), optional=(("weight", weight), ("pos_weight", pos_weight)))
        if is_spread(input, target, weight, pos_weight, traced=True):
            return on_shards("loss", partial(_loss, loss, parameter=parameter), input, target, weight, pos_weight, reduction)
        return _reference(input, target, weight, pos_weight, loss, parameter, reduction)
    if input.shape != target.shape:
        input, target = _spread(loss, input, target)
    weight, pos_weight = _as_large(input, "weight", weight), _as_large(input, "pos_weight", pos_weight)
    tensors: Optionals = (input, target, weight, pos_weight)
    if autocast_dtype(input) is not None:
        tensors = in_float32(*tensors)
    order = None
    if not input.is_contiguous():  # in the order in which it lies in memory it needs no copy, and the result lies like it
        order = sorted(range(input.dim()), key=input.stride, reverse=True)
        tensors = tuple(t if t is None else t.permute(order) for t in tensors)
    arguments = (*tensors, loss, parameter, reduction)
    y: Tensor = apply_function(_Loss, *arguments) if needs_grad(*tensors) else _Loss.forward(*arguments)  # type: ignore[arg-type]
    return y if order is None or y.dim() == 0 else y.permute([order.index(i) for i in range(len(order))])


def _spread(loss: Loss, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in their common size, or PyTorch's warning or error."""
    sizes = f"{loss.native.__name__}: target has shape {tuple(target.shape)} and input {tuple(input.shape)}"
    if not loss.spreads:
        raise ValueError(f"{sizes}; they must be the same")
    warnings.warn(f"{sizes}; broadcasting them is likely not what you want", stacklevel=4)
    try:
        return torch.broadcast_tensors(input, target)
    except RuntimeError as error:
        raise RuntimeError(f"{sizes}; {error}") from error


def _as_large(input: Tensor, name: str, weight: Tensor | None) -> Tensor | None:
    """``weight`` in the size of ``input``, to which it must broadcast."""
    if weight is None:
        return None
    try:
        return weight.expand(input.shape)
    except RuntimeError as error:
        raise RuntimeError(f"{name} has shape {tuple(weight.shape)}, needs one that broadcasts to input's {tuple(input.shape)}") from error


def mse_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.mse_loss``: (input - target)², and its mean or sum.

    Args:
        input, target: ``(*)``, float32, float64, bfloat16 or float16; any strides. Sizes that differ are broadcast, with a warning.
        size_average, reduce: deprecated names of ``reduction``.
        reduction: "mean", "sum" or "none".
        weight: of input's size; PyTorch's own operations run.

    Returns:
        A number, or ``(*)`` for "none", in the dtype of the arguments; in float32 under autocast.

    Raises:
        ValueError: ``reduction`` is unknown. RuntimeError: the sizes do not broadcast. TypeError: an argument is not a tensor.
    """
    return _loss(MSE, input, target, reduction_code(reduction, size_average, reduce), 0.0, weight)


def l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.l1_loss``: |input - target|, and its mean or sum. See ``mse_loss``."""
    return _loss(L1, input, target, reduction_code(reduction, size_average, reduce), 0.0, weight)


def smooth_l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean", beta: float = 1.0
) -> Tensor:
    """``torch.nn.functional.smooth_l1_loss``: quadratic up to |input - target| = beta, linear beyond. See ``mse_loss``;
    RuntimeError if ``beta`` is negative."""
    return _loss(SMOOTH_L1 if beta else L1, input, target, reduction_code(reduction, size_average, reduce), beta)


def huber_loss(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.huber_loss``: delta times ``smooth_l1_loss`` with beta = delta. See ``mse_loss``;
    RuntimeError if ``delta`` is not positive."""
    return _loss(HUBER, input, target, reduction_code(reduction), delta, weight)


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.binary_cross_entropy`` of probabilities; logarithms below -100 count as -100. See ``mse_loss``;
    RuntimeError if a number of ``input`` or ``target`` is not in [0, 1], ValueError if their sizes differ."""
    return _loss(BCE, input, target, reduction_code(reduction, size_average, reduce), 0.0, weight)


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", pos_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.binary_cross_entropy_with_logits``: of sigmoid(input), without overflow. See ``mse_loss``.
    ``weight`` and ``pos_weight``, the weight of positive targets, are constants that broadcast to input's size; ValueError if
    the sizes of ``input`` and ``target`` differ."""
    return _loss(BCE_WITH_LOGITS, input, target, reduction_code(reduction, size_average, reduce), 0.0, weight, pos_weight)


def _supports(loss: Loss, function: Callable[..., Any]) -> Callable[..., str | None]:
    """``_unsupported`` for the arguments of the public function."""

    def reason(*args: Any) -> str | None:
        given = inspect.signature(function).bind(*args).arguments
        return _unsupported(loss, given["input"], given["target"], given.get("weight"), given.get("pos_weight"))

    return reason


def _cost(N: int, M: int = 1, lead: tuple[int, ...] | None = None) -> Cost:
    total = N * (M if lead is None else int(torch.Size(lead).numel()))
    return Cost(forward_flops=3 * total, backward_flops=4 * total, forward_elements=2 * total, backward_elements=4 * total)


SAMPLES: list[Mapping[str, Any]] = [  # the mean of no number is NaN, so an empty size has a test of its own
    {"M": 1, "N": 1}, {"M": 1, "N": 15}, {"M": 3, "N": 17}, {"lead": (2, 1, 3), "N": 33}, {"M": 5, "N": 65}, {"M": 67, "N": 257},
]  # fmt: skip
BENCH = [{"M": M, "N": N} for M, N in [(64, 4096), (1024, 1024), (4096, 4096)]]
TINY = [{"M": 1, "N": 1}, {"M": 64, "N": 10}]


def _register(loss: Loss, function: Callable[..., Tensor], probabilities: bool) -> None:
    def make(factory: Callable[..., Tensor], N: int, M: int = 1, lead: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        pair = factory(*((M,) if lead is None else lead), N), factory(*((M,) if lead is None else lead), N)
        return (torch.sigmoid(pair[0]) if probabilities else pair[0], torch.sigmoid(pair[1]) if not loss.spreads else pair[1])

    register(
        Op(
            name=loss.native.__name__, module="losses", call=lambda input, target: function(input, target), reference=loss.native,
            native=loss.native, make=make, samples=SAMPLES, bench=BENCH, quick=BENCH[:2], tiny=TINY, cost=_cost,
            raw=("losses_forward", "losses_backward"), supports=_supports(loss, function),
        )
    )  # fmt: skip


for _of, _function in ((MSE, mse_loss), (L1, l1_loss), (SMOOTH_L1, smooth_l1_loss), (HUBER, huber_loss), (BCE, binary_cross_entropy),
                       (BCE_WITH_LOGITS, binary_cross_entropy_with_logits)):  # fmt: skip
    _register(_of, _function, probabilities=_of is BCE)
