"""cross_entropy of logits, with class indices or probabilities as target.

Forward     top = max_n x[n]     sum = Σ_n exp(x[n] - top)                    for every row, the classes n of one sample or pixel
            q[n]  = w[n] ((1 - s) p[n] + s / N)                                p: probabilities, or 1 at the label, 0 elsewhere
            loss  = Σ_n q[n] (log(sum) - (x[n] - top))                         w: weights, s: smoothing; q = 0 where the label is ignored
            mean: Σ loss / Σ w[label] over the labels that count (with probabilities: / the number of rows); sum: Σ loss
Backward    dx[n] = g (Q exp(x[n] - top) / sum - q[n])     Q = Σ_n q[n],  g: the gradient of the row's loss
            dp[n] = g w[n] (1 - s) (log(sum) - (x[n] - top))

The forward reads the logits once and keeps top and sum, two numbers a row, of which their sum log Σ exp(x) would lose digits where the
logits are in the thousands. The backward reads the logits again and writes dx once: no softmax is ever in memory.

A label that is neither a class nor ignore_index: on the CPU an IndexError that names it. On a GPU, where looking would mean waiting,
nothing outside the tensors is read and the row's loss and gradient are NaN, so a mean or sum is NaN.

Shapes      input (N), (M, N) or (M, N, d1, ...)   target (), (M) or (M, d1, ...) of int64, or probabilities like input   weight (N)
Work        one exponential for each logit each way, about 15 operations; N elements a row moved forward, 2N backward. Memory decides where
            the logits leave the cache, the exponential where they do not.
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
    autocast_dtype,
    in_float32,
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

__all__ = ["cross_entropy"]


def rows_of(x: Tensor) -> tuple[int, ...]:
    """The shape of the losses: ``x`` without its classes."""
    return tuple(x.shape[:1] + x.shape[2:]) if x.dim() > 1 else ()


def check(x: Tensor, target: Tensor, weight: Tensor | None, dy: Tensor | None = None, reduction: int = 0) -> None:
    """What the kernels check, while a graph is traced."""
    shape, classes = rows_of(x), x.shape[1 if x.dim() > 1 else 0]
    if target.dtype == torch.int64:
        torch._check(target.shape == shape, lambda: f"target has shape {tuple(target.shape)}, needs {shape}")
    else:
        torch._check(target.shape == x.shape, lambda: f"target has shape {tuple(target.shape)}, needs {tuple(x.shape)}")
    if weight is not None:
        torch._check(weight.shape == (classes,), lambda: f"weight has shape {tuple(weight.shape)}, needs {(classes,)}")
    if dy is not None:
        wanted = () if reduction else shape
        torch._check(dy.shape == wanted, lambda: f"dy has shape {tuple(dy.shape)}, needs {wanted}")


def statistics(x: Tensor, count: Any) -> Tensor:
    return x.new_empty((count,), dtype=statistics_dtype(x))


def _forward_fake(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    check(x, target, weight)
    shape = rows_of(x)
    return x.new_empty(() if reduction else shape), statistics(x, 2 * x.new_empty(shape).numel() + 1)


def _backward_fake(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, kept: Tensor, reduction: int, ignore_index: int, label_smoothing: float,
    need_dx: bool, need_dtarget: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    check(x, target, weight, dy, reduction)
    return x.new_empty(x.shape) if need_dx else None, x.new_empty(x.shape) if need_dtarget else None


_forward = define(
    "cross_entropy_forward(Tensor x, Tensor target, Tensor? weight, int reduction, int ignore_index, float label_smoothing) "
    "-> (Tensor loss, Tensor kept)",
    _forward_fake,
)
_backward = define(
    "cross_entropy_backward(Tensor dy, Tensor x, Tensor target, Tensor? weight, Tensor kept, int reduction, int ignore_index, "
    "float label_smoothing, bool need_dx, bool need_dtarget) -> (Tensor dx, Tensor dtarget)",
    _backward_fake,
)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """``setup_context`` of a loss on classes: the arguments, and the second output, which only the backward reads."""
    x, target, weight, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, target, weight, output[1])


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return _forward(x, target, weight, *options)

    setup_context = staticmethod(keep_for_backward)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _dkept: None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, target, weight, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            return reference_gradients(_reference, (x, target, weight, *ctx.options), ctx.needs_input_grad, dy)
        return *_backward(dy, x, target, weight, kept, *ctx.options, *ctx.needs_input_grad[:2]), None, None, None, None




def _reference(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float) -> Tensor:
    return F.cross_entropy(x, target, weight, None, ignore_index, None, REDUCTIONS[reduction], label_smoothing)


def unfit(input: Any, target: Any, weight: Any, ignore_index: int, label_smoothing: float = 0.0) -> str | None:
    """Why PyTorch's own operations run for these arguments, or None where a kernel does. On the path of every call."""
    labels = getattr(target, "dtype", None) == torch.int64
    optional = (("weight", weight),) if weight is not None else ()
    reason = unsupported(("input", input), ("target", target), *optional, indices=("target",) if labels else ())
    if reason is not None:
        return reason
    shape = input.shape
    rank = len(shape)
    if target.shape != ((shape[:1] + shape[2:] if rank > 1 else ()) if labels else shape) or rank == 0:
        return f"target has shape {tuple(target.shape)}, which does not fit input {tuple(shape)}"
    classes = shape[1 if rank > 1 else 0]
    if classes == 0 or not 0 <= label_smoothing <= 1 or (ignore_index >= 0 and not labels):
        return f"there are {classes} classes, label_smoothing is {label_smoothing} and ignore_index {ignore_index}"
    if not labels and target.dtype != input.dtype:
        return f"target has dtype {target.dtype} and input {input.dtype}; kernels take one dtype"
    if weight is not None and (weight.shape != (classes,) or weight.requires_grad or weight.dtype != input.dtype):
        return f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}, or requires grad; kernels take constants of input's dtype"
    return None


def widened(input: Any, *others: Any) -> tuple[Any, ...]:
    """The arguments as autocast gives them to an op on its float32 list; unchanged without autocast, or where one is no tensor."""
    if isinstance(input, Tensor) and autocast_dtype(input) is not None and all(t is None or isinstance(t, Tensor) for t in others):
        return in_float32(input, *others)
    return input, *others


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.cross_entropy``: minus the logarithm of the softmax of ``input``, averaged under ``target``.

    Args:
        input: logits, ``(N)``, ``(M, N)`` or ``(M, N, d1, ...)`` for N classes; float32, float64, bfloat16 or float16, any strides.
        target: labels of int64, ``()``, ``(M)`` or ``(M, d1, ...)``; or probabilities of the shape and dtype of ``input``.
        weight: a factor for each class, ``(N)``, or None.
        ignore_index: rows with this label have no loss and no gradient.
        reduction: "none", "mean" (over the weights of the labels that count) or "sum"; size_average and reduce are its deprecated form.
        label_smoothing: the share, from 0 to 1, of the target that is spread evenly over all classes.

    Returns:
        A number, or with reduction "none" the losses, shaped like labels; in the dtype of ``input``.

    Raises:
        IndexError: a label is neither a class nor ``ignore_index`` (on a GPU the result is NaN instead).
        RuntimeError, ValueError: shapes, dtypes or options do not fit. TypeError: an argument is not a tensor.
    """
    code = reduction_code(reduction, size_average, reduce)
    input, target, weight = widened(input, target, weight)
    reason = unfit(input, target, weight, ignore_index, label_smoothing)
    if reason is not None:
        options: dict[str, Any] = {"reduction": REDUCTIONS[code], "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        require_tensors(("input", input), ("target", target), optional=(("weight", weight),))
        if is_spread(input, target, weight):
            ours = partial(cross_entropy, ignore_index=ignore_index, label_smoothing=label_smoothing)
            return on_shards("labelled_loss", "cross_entropy", ours, input, target, weight, code, ignore_index)
        return without_kernel(reason, F.cross_entropy, input, target, weight, **options)
    args = input, target, weight, code, ignore_index, float(label_smoothing)
    try:
        return (apply_function(_CrossEntropy, *args) if needs_grad(input, target) else _forward(*args))[0]
    except RuntimeError as error:
        return raise_index_error(error)


def weights(x: Tensor, classes: int) -> Tensor:
    """Weights that every dtype represents exactly."""
    return (torch.arange(classes, device=x.device) % 3 + 1).to(x.dtype) / 2


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "probabilities": {},
    "weight": {"weight": True},
    "ignore": {"ignore_index": 1},
    "smoothing": {"label_smoothing": 0.25},
    "none": {"reduction": "none"},
    "all": {"weight": True, "ignore_index": 1, "label_smoothing": 0.125, "reduction": "sum"},
    "all of probabilities": {"weight": True, "label_smoothing": 0.125},
}


def with_option(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(input: Tensor, target: Tensor, option: str) -> Tensor:
        options = dict(OPTIONS[option])
        if options.pop("weight", False):
            options["weight"] = weights(input, input.shape[1 if input.dim() > 1 else 0])
        return function(input, target, **options)

    return call


def make(
    factory: Callable[..., Tensor], N: int, M: int | None = None, behind: tuple[int, ...] = (), option: str = ""
) -> tuple[Tensor, Tensor, str]:
    """Logits (M, N, *behind), or (N) where M is None, and a target."""
    x = factory(*(() if M is None else (M,)), N, *behind)
    shape = rows_of(x)
    if "probabilities" in option:
        return x, factory(*x.shape), option
    places = torch.arange(shape[-1] if shape else 1, device=x.device)
    return x, (places % N).expand(shape).contiguous() if shape else places[0], option


def cost(N: int, M: int | None = None, behind: tuple[int, ...] = (), option: str = "") -> Cost:
    total = N * torch.Size(((1 if M is None else M), *behind)).numel()
    probabilities = total * ("probabilities" in option)
    return Cost(15 * total, 15 * total + 4 * probabilities, total + probabilities, 2 * total + 2 * probabilities)


SAMPLES: list[dict[str, Any]] = [
    {"M": 0, "N": 5, "option": "all"},
    {"M": 1, "N": 1},
    {"N": 17},
    {"M": 7, "N": 15},
    {"M": 5, "N": 16, "option": "weight"},
    {"M": 9, "N": 33, "option": "probabilities"},
    {"M": 6, "N": 31, "option": "smoothing"},
    {"M": 5, "N": 65, "option": "ignore"},
    {"M": 8, "N": 10, "option": "none"},
    {"M": 2, "N": 5, "behind": (3, 7), "option": "all"},
    {"M": 2, "N": 7, "behind": (67,), "option": "all of probabilities"},
    {"M": 3, "N": 4133},
]
BENCH: list[dict[str, Any]] = [
    {"M": 4096, "N": 1000},
    {"M": 1024, "N": 32000},
    {"M": 8192, "N": 10},
    {"M": 512, "N": 128256},
    {"M": 4096, "N": 1000, "option": "probabilities"},
    {"M": 4096, "N": 1000, "option": "all"},
    {"M": 8, "N": 21, "behind": (128, 128)},
]

register(
    Op(
        name="cross_entropy",
        module="cross_entropy",
        call=with_option(cross_entropy),
        reference=with_option(F.cross_entropy),
        native=with_option(F.cross_entropy),
        make=make,
        samples=SAMPLES,
        bench=BENCH,
        quick=BENCH[:2],
        tiny=[{"M": 64, "N": 10}, {"M": 1, "N": 10}],
        cost=cost,
        raw=("cross_entropy_forward", "cross_entropy_backward"),
        supports=lambda input, target, option: unfit(input, target, None, -100),
    )
)
