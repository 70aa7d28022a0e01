"""The registered ops behind batch_norm.py: schemas, and what they return while a graph is traced."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..backend import define
from ..contract import Optionals, statistics_dtype

__all__: list[str] = []


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _check(x: Tensor, channels: dict[str, Tensor | None]) -> None:
    """What the kernels check, while a graph is traced."""
    torch._check(2 <= x.dim() <= 5, lambda: f"x must have 2 to 5 dimensions, got {x.dim()}")
    for name, t in channels.items():
        if t is not None:
            torch._check(t.shape == (x.shape[1],), lambda name=name, t=t: f"{name} has shape {tuple(t.shape)}, needs ({x.shape[1]},)")
            fits = t.dtype == x.dtype or (t.dtype == torch.float32 and x.dtype.itemsize == 2)
            torch._check(fits, lambda name=name, t=t: f"{name} has dtype {t.dtype}, needs {x.dtype} like x, or float32 beside a half type")
            torch._check(t.device == x.device, lambda name=name, t=t: f"{name} is on {t.device}, x on {x.device}")


def _forward_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(x, {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var})
    return _empty_like(x), x.new_empty((3, x.shape[1]), dtype=statistics_dtype(x))


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, training: bool, eps: float, relu: bool, need_dx: bool,
    need_dweight: bool, need_dbias: bool,
) -> Optionals:  # fmt: skip
    _check(x, {"weight": weight, "bias": bias})
    torch._check(dy.shape == x.shape, lambda: f"dy has shape {tuple(dy.shape)}, needs {tuple(x.shape)} like x")
    dweight = (x if weight is None else weight).new_empty(x.shape[1]) if need_dweight else None
    dbias = (x if bias is None else bias).new_empty(x.shape[1]) if need_dbias else None
    return _empty_like(x) if need_dx else None, dweight, dbias


# stats [3, C] holds mean, variance, and what rounding the mean left out, in the dtype of the sums: all that the backward needs, whatever
# becomes of the running ones.
train = define(
    "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
    "float eps, bool relu) -> (Tensor y, Tensor stats)",
    lambda x, weight, bias, mean, var, momentum, eps, relu: _forward_fake(x, weight, bias, mean, var),
)
evaluate = define(
    "batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, bool relu) -> (Tensor y, Tensor stats)",
    lambda x, weight, bias, mean, var, eps, relu: _forward_fake(x, weight, bias, mean, var),
)
backward = define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, bool training, float eps, bool relu, "
    "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward_fake,
)
