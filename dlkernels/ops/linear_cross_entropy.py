"""linear_cross_entropy: cross-entropy of the logits x Wᵀ + b, which are never held all at once.

Forward     z[m,n] = Σ_k x[m,k] W[n,k] + b[n]        a chunk of rows m at a time, in a fixed workspace
            loss   = cross_entropy(z, target)        as there, see cross_entropy.py
Backward    dz     = dloss/dz                        in the place of z, while the chunk is in the workspace
            dx[m,k] = Σ_n dz[m,n] W[n,k]     dW[n,k] = Σ_m dz[m,n] x[m,k]     db[n] = Σ_m dz[m,n]

For a mean or a sum the gradients are computed in the forward, which has z, and scaled in the backward: z again would be a third more work.
Without reduction they wait for the gradient of every row, and z is computed again. Sums are float, also for half types: dW adds up over
chunks without rounding.

Shapes      input (K) or (M, K)   linear_weight (N, K)   linear_bias (N)   target () or (M) of int64   weight (N)
Work        2MNK flops forward, 4MNK backward: the flops decide. Memory: inputs, gradients and the workspace, no M x N.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function, define
from ..contract import (
    REDUCTIONS,
    Optionals,
    autocast_dtype,
    is_spread,
    needs_grad,
    on_shards,
    raise_index_error,
    reduction_code,
    reference_gradients,
    require_tensors,
    statistics_dtype,
    unsupported,
    without_kernel,
)
from ..registry import Cost, Op, register
from .cross_entropy import weights

__all__ = ["linear_cross_entropy"]


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, dy: Tensor | None, reduction: int,
    ignore_index: int, label_smoothing: float, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> Optionals:  # fmt: skip
    torch._check(x.dim() == 2 and weight.dim() == 2, lambda: f"x and weight must have 2 dimensions, got {x.dim()} and {weight.dim()}")
    torch._check(weight.shape[1] == x.shape[1], lambda: f"weight has shape {tuple(weight.shape)}, needs (N, {x.shape[1]}) to fit x")
    torch._check(target.shape == x.shape[:1], lambda: f"target has shape {tuple(target.shape)}, needs {tuple(x.shape[:1])}")
    dtype = statistics_dtype(x)
    return (
        x.new_empty(() if reduction else x.shape[:1], dtype=dtype),
        x.new_empty(x.shape, dtype=dtype) if need_dx else None,
        x.new_empty(weight.shape, dtype=dtype) if need_dweight else None,
        x.new_empty(weight.shape[:1], dtype=dtype) if need_dbias else None,
    )


def _backward_fake(dy: Tensor | None, x: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Optionals:
    return tuple(None if t is None else x.new_empty(t.shape) for t in (dx, dweight, dbias))


_forward = define(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? dy, int reduction, "
    "int ignore_index, float label_smoothing, bool need_dx, bool need_dweight, bool need_dbias) "
    "-> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
    _forward_fake,
)
_backward = define(
    "linear_cross_entropy_backward(Tensor? dy, Tensor x, Tensor? dx, Tensor? dweight, Tensor? dbias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, options: tuple[Any, ...],
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        needs = needs if options[0] else (False, False, False)
        return tuple(t for t in _forward(x, weight, bias, target, class_weight, None, *options, *needs) if t is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, ctx.needs = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_others: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        tensors, gradients = saved[:5], list(saved[5:])
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return *reference_gradients(_reference, (*tensors, ctx.options), ctx.needs_input_grad[:6], dy), None
        if ctx.options[0]:
            found = [gradients.pop(0) if need else None for need in ctx.needs]
            return *_backward(dy, tensors[0], *found), None, None, None, None
        found = _forward(*tensors, dy, *ctx.options, *ctx.needs_input_grad[:3])[1:]
        return *_backward(None, tensors[0], *found), None, None, None, None


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, options: tuple[int, int, float]
) -> Tensor:
    reduction, ignore_index, smoothing = options
    z = F.linear(x, weight, bias)
    loss = F.cross_entropy(z, target, class_weight, reduction=REDUCTIONS[reduction], ignore_index=ignore_index, label_smoothing=smoothing)
    return loss.to(statistics_dtype(x))


def _native(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, weight: Tensor | None = None,
    reduction: str = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """torch's own from 2.13 on, and its definition before."""
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    z = F.linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    z = z.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(z, target, weight, reduction=reduction, ignore_index=ignored, label_smoothing=label_smoothing)


def _unsupported(
    input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, weight: Any = None, label_smoothing: float = 0.0
) -> str | None:
    """Why PyTorch's own operations run for these arguments, or None where a kernel does. On the path of every call."""
    optional = tuple((name, t) for name, t in (("linear_bias", linear_bias), ("weight", weight)) if t is not None)
    reason = unsupported(("input", input), ("linear_weight", linear_weight), ("target", target), *optional, indices=("target",))
    if reason is not None:
        return reason
    x, w = input.shape, linear_weight.shape
    if len(x) not in (1, 2) or len(w) != 2 or w[1] != x[-1] or w[0] == 0 or target.shape != x[:-1]:
        return f"input {tuple(x)}, linear_weight {tuple(w)} and target {tuple(target.shape)} are not (M, K), (N, K) and (M)"
    if not 0 <= label_smoothing <= 1:
        return f"label_smoothing is {label_smoothing}, needs 0 to 1"
    for name, t in optional:
        if t.shape != w[:1] or (name == "weight" and (t.requires_grad or t.dtype != input.dtype)):
            return f"{name} has shape {tuple(t.shape)} and dtype {t.dtype}, or requires grad; kernels take {tuple(w[:1])} of input's dtype"
    if autocast_dtype(input) is None and not all(t.dtype == input.dtype for t in (linear_weight, *(t for _, t in optional))):
        return "input, linear_weight, linear_bias and weight have several dtypes; kernels take one"
    return None


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, weight: Tensor | None = None,
    reduction: str = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0, options: Any = None,
) -> Tensor:  # fmt: skip
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` in chunks of rows, so that the logits are never in memory.

    ``torch.nn.functional.linear_cross_entropy`` of torch 2.13, always chunked; any number of backwards and second derivatives work.

    Args:
        input: ``(K)`` or ``(M, K)``; float32, float64, bfloat16 or float16, any strides.
        linear_weight: ``(N, K)`` for N classes; further dimensions run in PyTorch's own operations.
        target: labels of int64, ``()`` or ``(M)``; probabilities run in PyTorch's own operations.
        linear_bias: ``(N)`` or None.
        weight: a factor for each class, ``(N)``, or None.
        reduction: "none", "mean" (over the weights of the labels that count) or "sum".
        ignore_index: rows with this label have no loss and no gradient; None is -100.
        label_smoothing: the share of the target that is spread evenly over all classes.
        options: torch's choice of chunks; chunks are chosen here.

    Returns:
        A number, or with reduction "none" the losses, in the dtype of ``input`` (float32 under autocast).

    Raises:
        IndexError: a label is neither a class nor ``ignore_index`` (on a GPU the result is NaN instead).
        RuntimeError, ValueError: shapes, dtypes or options do not fit. TypeError: an argument is not a tensor.
    """
    code = reduction_code(reduction)
    reason = _unsupported(input, linear_weight, target, linear_bias, weight, label_smoothing)
    if reason is not None:
        require_tensors(("input", input), ("linear_weight", linear_weight), ("target", target),
                        optional=(("linear_bias", linear_bias), ("weight", weight)))  # fmt: skip
        if is_spread(input, linear_weight, target, linear_bias, weight):
            ignored = -100 if ignore_index is None else ignore_index
            ours = partial(_in_order, ignore_index=ignored, label_smoothing=label_smoothing)
            parameters = linear_weight, linear_bias
            return on_shards("labelled_loss", "linear_cross_entropy", ours, input, target, weight, code, ignored, *parameters)
        return without_kernel(
            reason, _native, input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=REDUCTIONS[code],
            ignore_index=ignore_index, label_smoothing=label_smoothing, name="linear_cross_entropy",
        )  # fmt: skip
    dtype, result = autocast_dtype(input), input.dtype
    if dtype is not None:
        result = statistics_dtype(input)
        input, linear_weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (input, linear_weight))
        linear_bias = linear_bias if linear_bias is None or linear_bias.dtype == torch.float64 else linear_bias.to(dtype)
        weight = None if weight is None else weight.to(input.dtype)
    x, labels = (input, target) if input.dim() == 2 else (input.unsqueeze(0), target.unsqueeze(0))
    tensors = x, linear_weight, linear_bias, labels, weight
    numbers = code, -100 if ignore_index is None else ignore_index, float(label_smoothing)
    try:
        if needs_grad(*tensors):
            needs = tuple(t is not None and t.requires_grad for t in tensors[:3])
            loss = apply_function(_LinearCrossEntropy, *tensors, numbers, needs)[0]
        else:
            loss = _forward(*tensors, None, *numbers, False, False, False)[0]
    except RuntimeError as error:
        return raise_index_error(error)
    if code == 0 and input.dim() == 1:
        loss = loss.squeeze(0)
    return loss if loss.dtype == result else loss.to(result)


def _in_order(x: Tensor, target: Tensor, weight: Tensor | None, head: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """With its arguments in the order of losses of labels."""
    return linear_cross_entropy(x, head, target, linear_bias=bias, weight=weight, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "none": {"reduction": "none"},
    "all": {"weight": True, "ignore_index": 1, "label_smoothing": 0.125, "reduction": "sum"},
}


def _with_option(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, option: str) -> Tensor:
        options = dict(OPTIONS[option])
        if options.pop("weight", False):
            options["weight"] = weights(input, linear_weight.shape[0])
        return function(input, linear_weight, target, linear_bias=linear_bias, **options)

    return call


def _make(factory: Callable[..., Tensor], K: int, N: int, M: int | None = None, bias: bool = False, option: str = "") -> tuple[Any, ...]:
    x, weight = factory(*(() if M is None else (M,)), K), factory(N, K)
    target = torch.arange(1 if M is None else M, device=x.device) % N
    return x, weight, factory(N) if bias else None, target[0] if M is None else target, option


def _cost(K: int, N: int, M: int | None = None, bias: bool = False, option: str = "") -> Cost:
    M = M or 1
    moved = M * K + N * K + N * bias
    return Cost(2 * M * N * K, 4 * M * N * K, moved, 2 * moved)


register(
    Op(
        name="linear_cross_entropy",
        module="linear_cross_entropy",
        call=_with_option(linear_cross_entropy),
        reference=_with_option(_native),
        native=_with_option(_native),
        make=_make,
        samples=[
            {"M": 0, "K": 3, "N": 4, "option": "all"},
            {"M": 1, "K": 1, "N": 1},
            {"K": 7, "N": 17},
            {"M": 5, "K": 7, "N": 15, "bias": True},
            {"M": 16, "K": 9, "N": 31, "bias": True, "option": "all"},
            {"M": 9, "K": 33, "N": 16, "option": "none"},
            {"M": 17, "K": 16, "N": 65},
            {"M": 300, "K": 5, "N": 33, "bias": True},
        ],
        bench=[{"M": 1024, "K": 256, "N": 8192}, {"M": 2048, "K": 512, "N": 32000}],
        quick=[{"M": 1024, "K": 256, "N": 8192}],
        tiny=[{"M": 64, "K": 64, "N": 10}],
        cost=_cost,
        raw=("linear_cross_entropy_forward", "linear_cross_entropy_backward"),
        supports=lambda input, linear_weight, linear_bias, target, option: _unsupported(input, linear_weight, target, linear_bias),
    )
)
