"""nll_loss: minus the log-probability of the label of every row, weighted.

Forward     loss = -w[label] x[label],  0 where the label is ignored;  mean: Σ loss / Σ w[label] over the labels that count; sum: Σ loss
Backward    dx[label] = -g w[label],  0 elsewhere;   g: the gradient of the row's loss

Labels out of range are treated as by cross_entropy, see there.

Shapes      input (N), (M, N) or (M, N, d1, ...)   target () , (M) or (M, d1, ...) of int64   weight (N)
Work        one element a row moved forward, N a row written backward: memory decides
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function, define
from ..contract import (
    REDUCTIONS,
    is_spread,
    needs_grad,
    on_shards,
    raise_index_error,
    reduction_code,
    reference_gradients,
    require_tensors,
    without_kernel,
)
from ..registry import Cost, Op, register
from .cross_entropy import SAMPLES, check, keep_for_backward, make, rows_of, statistics, unfit, widened, with_option

__all__ = ["nll_loss"]


def _forward_fake(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    check(x, target, weight)
    return x.new_empty(() if reduction else rows_of(x)), statistics(x, 1)


def _backward_fake(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, divisor: Tensor, reduction: int, ignore_index: int
) -> Tensor:
    check(x, target, weight, dy, reduction)
    return x.new_empty(x.shape)


_forward = define(
    "nll_loss_forward(Tensor x, Tensor target, Tensor? weight, int reduction, int ignore_index) -> (Tensor loss, Tensor divisor)",
    _forward_fake,
)
_backward = define(
    "nll_loss_backward(Tensor dy, Tensor x, Tensor target, Tensor? weight, Tensor divisor, int reduction, int ignore_index) -> Tensor",
    _backward_fake,
)


class _NLLLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        return _forward(x, target, weight, reduction, ignore_index)

    setup_context = staticmethod(keep_for_backward)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _ddivisor: None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        x, target, weight, divisor = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return reference_gradients(_reference, (x, target, weight, *ctx.options), ctx.needs_input_grad, dy)
        return _backward(dy, x, target, weight, divisor, *ctx.options), None, None, None, None


def _reference(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Tensor:
    return F.nll_loss(x, target, weight, reduction=REDUCTIONS[reduction], ignore_index=ignore_index)


def _unsupported(input: Any, target: Any, weight: Any = None, ignore_index: int = -100) -> str | None:
    if getattr(target, "dtype", torch.int64) != torch.int64:
        return f"target has dtype {target.dtype}; kernels take int64"
    return unfit(input, target, weight, ignore_index)


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.nll_loss``: minus the log-probability in ``input`` of every label in ``target``.

    Args:
        input: log-probabilities, ``(N)``, ``(M, N)`` or ``(M, N, d1, ...)`` for N classes; float32, float64, bfloat16 or float16.
        target: labels of int64, ``()``, ``(M)`` or ``(M, d1, ...)``.
        weight: a factor for each class, ``(N)``, or None.
        ignore_index: rows with this label have no loss and no gradient.
        reduction: "none", "mean" (over the weights of the labels that count) or "sum"; size_average and reduce are its deprecated form.

    Returns:
        A number, or with reduction "none" the losses, shaped like ``target``; in the dtype of ``input``.

    Raises:
        IndexError: a label is neither a class nor ``ignore_index`` (on a GPU the result is NaN instead).
        RuntimeError, ValueError: shapes, dtypes or options do not fit. TypeError: an argument is not a tensor.
    """
    code = reduction_code(reduction, size_average, reduce)
    input, weight = widened(input, weight)
    reason = _unsupported(input, target, weight, ignore_index)
    if reason is not None:
        require_tensors(("input", input), ("target", target), optional=(("weight", weight),))
        if is_spread(input, target, weight):
            ours = partial(nll_loss, ignore_index=ignore_index)
            return on_shards("labelled_loss", "nll_loss", ours, input, target, weight, code, ignore_index)
        return without_kernel(reason, F.nll_loss, input, target, weight, reduction=REDUCTIONS[code], ignore_index=ignore_index)
    args = input, target, weight, code, ignore_index
    try:
        return (apply_function(_NLLLoss, *args) if needs_grad(input) else _forward(*args))[0]
    except RuntimeError as error:
        return raise_index_error(error)


def _native(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """torch's own backward refuses an input with dimensions behind the classes that is not contiguous."""
    return F.nll_loss(input.contiguous(), target, **options)


def _cost(N: int, M: int | None = None, behind: tuple[int, ...] = (), option: str = "") -> Cost:
    rows = torch.Size(((1 if M is None else M), *behind)).numel()
    return Cost(rows, rows, rows, rows * N)


OPTIONS = ("", "weight", "ignore", "none")  # of cross_entropy's, those that nll_loss has
BENCH: list[dict[str, Any]] = [{"M": 4096, "N": 1000}, {"M": 8192, "N": 10}, {"M": 8, "N": 21, "behind": (128, 128), "option": "weight"}]

register(
    Op(
        name="nll_loss",
        module="nll_loss",
        call=with_option(nll_loss),
        reference=with_option(_native),
        native=with_option(_native),
        make=make,
        samples=[*(size for size in SAMPLES if size.get("option", "") in OPTIONS), {"M": 2, "N": 5, "behind": (3, 7)}],
        bench=BENCH,
        quick=BENCH[:1],
        tiny=[{"M": 64, "N": 10}],
        cost=_cost,
        raw=("nll_loss_forward", "nll_loss_backward"),
        supports=lambda input, target, option: _unsupported(input, target),
    )
)
