"""add_layer_norm and dropout_add_layer_norm on the GPU: the launchers; norm.py has the kernels and says how the work is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import check_seed, check_tensor
from .norm import check_rows, check_statistics, run_backward, run_forward


def forward(
    x: Tensor, residual: Tensor, seed: Tensor | None, weight: Tensor | None, bias: Tensor | None, p: float, eps: float
) -> tuple[Tensor | None, ...]:
    """Shapes and errors as the op's contract says."""
    check_rows(x, weight, bias)
    check_tensor("residual", residual, x, tuple(x.shape))
    if seed is not None:
        check_seed(seed, x)
    return run_forward(x, residual, seed, weight, bias, p, eps, True)


def backward(
    dy: Tensor, dsum: Tensor | None, sum: Tensor, seed: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor, p: float,
    need_dx: bool, need_dresidual: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Shapes and errors as the op's contract says."""
    check_rows(sum, weight, None, name="sum")
    for name, t in (("dy", dy), ("dsum", dsum)):
        if t is not None:
            check_tensor(name, t, sum, tuple(sum.shape))
    check_statistics(sum, mean, rstd)
    if seed is not None:
        check_seed(seed, sum)
    need_dx = need_dx and seed is not None  # without dropout it is dresidual
    return run_backward(dy, dsum, sum, seed, weight, mean, rstd, p, need_dx, need_dresidual, need_dweight, need_dbias)


def _rows(empty):
    x = empty(4096, 1024)
    return x, x.new_empty(1, dtype=torch.int64), empty(1024), empty(2, 4096).float(), empty(4096).float()


def _forward_example(empty):
    x, seed, w, _, _ = _rows(empty)
    return x, x, seed, w, w, 0.1, 1e-5


def _backward_example(empty):
    x, seed, w, mean, rstd = _rows(empty)
    return x, x, x, seed, w, mean, rstd, 0.1, True, True, True, True


IMPLEMENTATIONS = {"add_layer_norm_forward": forward, "add_layer_norm_backward": backward}
EXAMPLES = {"add_layer_norm_forward": _forward_example, "add_layer_norm_backward": _backward_example}
