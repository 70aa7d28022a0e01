"""How each public function may be shared out where its arguments are DTensors: what it passes to ``sharding.run``.

A rule has the name and the arguments of the function on plain tensors, and names the layouts beside everything whole:

    elementwise     every argument cut along one dimension, the same for all
    rows            cut along a dimension that the function does not sum over; parameters whole, their gradients Partial
    columns         the parameters cut by output (linear, embedding), or parameters and channels (batch_norm)
    sum over K      linear with input and weight cut along K: the products are Partial
    mean and sum    of a loss: every process's share of them, Partial; what the mean divides by is counted over all parts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from . import functional as F
from .contract import REDUCTIONS, statistics_dtype
from .ops import add_layer_norm as _add_layer_norm
from .ops import dropout as _dropout
from .ops.linear import ACTIVATIONS
from .sharding import SUM, WHOLE, Layout, Plan, run

RULES: dict[str, Callable[..., Any]] = {}


def rule(function: Callable[..., Any]) -> Callable[..., Any]:
    RULES[function.__name__] = torch.compiler.disable(function, reason=f"{function.__name__} of DTensors runs outside of a graph")
    return function


def _cut(shape: Sequence[int], dims: Sequence[int], *names: str, name: str = "rows") -> list[Layout]:
    """Arguments of one shape, cut along one of ``dims``, and results that lie likewise."""
    return [Layout(f"{name}: Shard({d})", dict.fromkeys(names, Shard(d)), Shard(d)) for d in dims if d < len(shape)]


@rule
def elementwise(function: Callable[..., Tensor], input: Tensor, *options: Any, inplace: bool = False, **named: Any) -> Tensor:
    """``function(input, *options, **named)``; in place its result is copied, as the local numbers may lie elsewhere meanwhile."""
    x = input.clone() if inplace else input
    layouts = _cut(x.shape, range(x.dim()), "input", name="elementwise")
    y: Tensor = run(function.__name__, {"input": x}, layouts, lambda x: function(x, *options, **named))
    return input.copy_(y) if inplace else y


@rule
def softmax(name: str, input: Tensor, dim: int) -> Tensor:
    rank = input.dim()
    layouts = _cut(input.shape, [d for d in range(rank) if d != dim % rank] if -rank <= dim < rank else (), "input")
    return run(name, {"input": input}, layouts, lambda x: getattr(F, name)(x, dim))


@rule
def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    tensors = {"input": x, "weight": weight, "bias": bias}
    return run("layer_norm", tensors, _leading(x, shape, "input"), lambda x, w, b: F.layer_norm(x, shape, w, b, eps))


@rule
def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
    return run("rms_norm", {"input": x, "weight": weight}, _leading(x, shape, "input"), lambda x, w: F.rms_norm(x, shape, w, eps))


def _leading(x: Tensor, shape: Sequence[int], *names: str) -> list[Layout]:
    return _cut(x.shape, range(x.dim() - len(shape)), *names) if isinstance(shape, (tuple, list)) else []


@rule
def add_layer_norm(
    input: Tensor, residual: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """With p > 0 it is dropout_add_layer_norm."""
    tensors = {"input": input, "residual": residual, "weight": weight, "bias": bias}
    layouts = _leading(input, shape, "input", "residual") if input.shape == residual.shape else []

    def compute(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return F.add_layer_norm(x, residual, shape, weight, bias, eps)

    def dropped(plan: Plan, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        seed = plan.seed(x.device)
        if isinstance(eps, float) and _add_layer_norm._unsupported(x, residual, weight, bias, None, shape) is None:
            return _add_layer_norm._seeded(x, residual, seed, p, shape, weight, bias, eps)
        return compute(_dropout.seeded(x, seed, p), residual, weight, bias)

    return run("dropout_add_layer_norm" if p else "add_layer_norm", tensors, layouts, compute, dropped if p else None)


@rule
def seeded_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor) -> Any:
    """Under a given seed the place in the whole tensor decides what is dropped, so it is computed whole."""
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "seed": seed}
    return run("dropout_add_layer_norm", tensors, (), _add_layer_norm._call_seeded)


@rule
def dropout(input: Tensor, p: float, inplace: bool) -> Tensor:
    """Every part draws numbers of its own, and processes that hold the same part draw the same."""

    def part(plan: Plan, x: Tensor) -> Tensor:
        return _dropout.seeded(x, plan.seed(x.device), p)

    x = input.clone() if inplace else input
    y: Tensor = run("dropout", {"input": x}, _cut(x.shape, range(x.dim()), "input", name="elementwise"), torch.clone, part)
    return input.copy_(y) if inplace else y


@rule
def seeded_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Under a given seed the place in the whole tensor decides what is dropped, so it is computed whole."""
    return run("dropout", {"x": x, "seed": seed}, (), lambda x, seed: _dropout.seeded(x, seed, p))


@rule
def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None, max_norm: float | None, norm_type: float, by_freq: bool, sparse: bool
) -> Tensor:
    if max_norm is not None or sparse:
        option = "sparse=True" if max_norm is None else "max_norm"
        raise NotImplementedError(f"embedding: {option} cannot be had with a DTensor as input or weight; leave it out")
    rank = input.dim()
    layouts = [Layout("columns", {"weight": Shard(1)}, Shard(rank))]
    if not by_freq:  # which counts over all indices
        layouts += _cut(input.shape, range(rank), "input")
    return run("embedding", {"input": input, "weight": weight}, layouts, lambda i, w: F.embedding(i, w, padding_idx, None, 2.0, by_freq))


@rule
def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, slope: float) -> Tensor:
    name, K = "linear" if activation == "none" else f"linear_{activation}", x.dim() - 1
    layouts = _cut(x.shape, range(K), "input")
    layouts.append(Layout("columns: Shard(0) of weight", {"weight": Shard(0), "bias": Shard(0)}, Shard(K)))
    over_K = Layout("sum over K: Shard(1) of weight", {"input": Shard(K), "weight": Shard(1)}, SUM)

    def part(plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and not plan.is_first():  # the sum takes it once; here it gets a gradient of 0
            bias = torch.where(torch.zeros_like(bias, dtype=torch.bool), bias, 0)
        return F.linear_act(x, weight, bias, activation, slope)

    tensors = {"input": x, "weight": weight, "bias": bias}
    if activation == "none":
        return run(name, tensors, [*layouts, over_K], lambda *args: F.linear(*args), part)
    if any(type(p) is Shard and p.dim == 1 for p in getattr(weight, "placements", ())):  # the activation is of the sum
        z, act = linear_act(x, weight, bias, "none", slope), ACTIVATIONS[activation]
        layouts = _cut(z.shape, range(z.dim()), "z", name="elementwise")
        return run(name, {"z": z}, layouts, lambda z: act.reference(z, slope, 0.0))
    return run(name, tensors, layouts, lambda *args: F.linear_act(*args, activation, slope))


@rule
def conv2d_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, activation: str, slope: float,
    winograd: bool,
) -> Tensor:  # fmt: skip
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d_act(x, weight, bias, stride, padding, dilation, groups, activation, slope, winograd=winograd)

    tensors = {"input": x, "weight": weight, "bias": bias}
    return run("conv2d" if activation == "none" else f"conv2d_{activation}", tensors, _images_or_filters(x, 0, groups), compute)


@rule
def conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> Tensor:
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)

    return run("conv_transpose2d", {"input": x, "weight": weight, "bias": bias}, _images_or_filters(x, 1, groups), compute)


def _images_or_filters(x: Tensor, outputs: int, groups: int) -> list[Layout]:
    """Images cut along the batch, or a weight and its result along the output channels: dimension ``outputs`` of the weight."""
    filters = Layout(f"columns: Shard({outputs}) of weight", {"weight": Shard(outputs), "bias": Shard(0)}, Shard(x.dim() - 3))
    return _cut(x.shape, [0] if x.dim() == 4 else [], "input", name="images") + [filters] * (groups == 1)


@rule
def batch_norm(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float,
    eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """In training the statistics are those of the whole batch: cut along the batch it is gathered, as torch's rule does."""
    function, numbers = F.batch_norm_relu if relu else F.batch_norm, ("running_mean", "running_var", "weight", "bias")
    layouts = [Layout("channels", {"input": Shard(1), **dict.fromkeys(numbers, Shard(0))}, Shard(1))]
    if not training:
        layouts += _cut(x.shape, [d for d in range(x.dim()) if d != 1], "input")
    tensors = {"input": x, "running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    in_place = numbers[:2] if training else ()

    def compute(x: Tensor, *others: Tensor | None) -> Tensor:
        return function(x, *others, training, momentum, eps)

    def part(plan: Plan, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if x.numel() or not any(plan.split):
            return compute(x, mean, var, weight, bias)
        for t in (weight, bias):  # torch refuses to have no channel; the parameters get the gradient 0
            x = x if t is None else x * t.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
        return x

    return run("batch_norm", tensors, layouts, compute, part, in_place)


@rule
def pool2d(function: Callable[..., Any], input: Tensor, *options: Any) -> Any:
    """Planes may be shared out, not cut."""
    layouts = _cut(input.shape, range(input.dim() - 2), "input", name="planes")

    def part(plan: Plan, x: Tensor) -> Any:
        channels = x.dim() - 3
        if x.dim() < 3 or x.shape[channels] or not any(plan.split):
            return function(x, *options)
        more = [1 if d == channels else n for d, n in enumerate(x.shape)]  # torch refuses to have no channel
        y = function(torch.cat([x, x.new_zeros(more)], channels), *options)
        return tuple(t.narrow(channels, 0, 0) for t in y) if isinstance(y, tuple) else y.narrow(channels, 0, 0)

    return run(function.__name__, {"input": input}, layouts, lambda x: function(x, *options), part)


@rule
def loss(
    function: partial[Tensor], input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: int
) -> Tensor:
    """``function(input, target, reduction, weight=..., pos_weight=...)`` of each number, and the mean or the sum over all. Its first
    argument is bound: which loss it is."""
    tensors = {"input": input, "target": target, "weight": weight, "pos_weight": pos_weight}
    given = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    shape = _common_shape(given)
    layouts = [
        Layout(f"elementwise: Shard({d})", {name: _aligned(t, shape, d) for name, t in given.items()}, SUM if reduction else Shard(d))
        for d in range(len(shape))
    ]

    def compute(*tensors: Tensor | None, code: int = reduction) -> Tensor:
        return function(*tensors[:2], code, weight=tensors[2], pos_weight=tensors[3])

    def part(plan: Plan, *tensors: Tensor | None) -> Tensor:
        here, all = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None)).numel(), torch.Size(shape).numel()
        if REDUCTIONS[reduction] != "mean" or here == all:
            return compute(*tensors)
        return compute(*tensors) * (here / all) if here else compute(*tensors, code=REDUCTIONS.index("sum"))

    return run(function.args[0].native.__name__, tensors, layouts, compute, part)


def _common_shape(tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """That to which all of them broadcast, or () where they do not: the function on plain tensors will say so."""
    try:
        return tuple(torch.broadcast_shapes(*(t.shape for t in tensors.values())))
    except RuntimeError:
        return ()


def _aligned(t: Tensor, shape: Sequence[int], d: int) -> Any:
    """How a tensor that is broadcast to ``shape`` lies where that is cut along ``d``."""
    own = d - len(shape) + t.dim()
    return WHOLE if own < 0 or t.shape[own] != shape[d] else Shard(own)


@rule
def labelled_loss(
    name: str, function: Callable[..., Tensor], input: Tensor, target: Tensor, class_weight: Tensor | None, reduction: int,
    ignore_index: int, *others: Tensor | None,
) -> Tensor:  # fmt: skip
    """``function(input, target, class_weight, *others, reduction=...)``, a loss of rows with labels or probabilities: cut by rows.

    The mean divides by the weights of the labels that count, in all parts together; that is counted first.
    """
    tensors = {"input": input, "target": target, "weight": class_weight, **{f"parameter {i}": t for i, t in enumerate(others)}}
    word = REDUCTIONS[reduction]
    rows = {"input": Shard(0), "target": Shard(0)}
    layouts = [Layout("rows: Shard(0)", rows, SUM if reduction else Shard(0))] if input.dim() > 1 else []

    def part(plan: Plan, x: Tensor, target: Tensor, class_weight: Tensor | None, *others: Tensor | None) -> Tensor:
        if word == "none" or not any(plan.split):
            return function(x, target, class_weight, *others, reduction=word)
        dtype = statistics_dtype(x)
        divisor: Any = 1
        if word == "mean":
            divisor = plan.total(_counted(target, class_weight, ignore_index, dtype))
        here = "none" if x.dtype.itemsize < 4 else "sum"  # which a half type might not hold before it is divided
        losses = function(x, target, class_weight, *others, reduction=here)
        return (losses.sum(dtype=dtype) / divisor).to(losses.dtype)

    return run(name, tensors, layouts, lambda *args: function(*args, reduction=word), part)


def _counted(target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What the mean of these losses divides by. A label out of range is for the kernel to refuse."""
    if target.is_floating_point():
        return torch.tensor(target[:, :1].numel(), dtype=dtype, device=target.device)
    counts = target != ignore_index
    if class_weight is None:
        return counts.sum(dtype=dtype)
    return (class_weight.detach()[target.clamp(0, len(class_weight) - 1)] * counts).sum(dtype=dtype)
