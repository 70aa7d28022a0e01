r"""add_layer_norm and dropout_add_layer_norm: a sum and its layer_norm in one kernel, as between the blocks of a transformer.

Forward     s[m,n]  = f[m,n] x[m,n] + residual[m,n]      f = 1, or dropout's factor: 1 / (1 - p) where philox(seed, m, n) >= ⌊p 2³²⌋, else 0
            y       = layer_norm(s) w + b                both y and s are results
Backward    ds'     = layer_norm's dx for dy, plus ds    ds is what comes back for s
            dresidual = ds'      dx = f ds'              dw, db as layer_norm's

f depends on the seed, the row and the column alone (csrc/cpu/philox.h), so it is formed again in the backward and never kept. layer_norm.py
has the rest of the maths.

Shapes      x, residual (*, N)   seed (1,) int64   w, b (N,) or None   y, s (*, N);   M is the product of *
Work        9MN flops and 4MN elements moved forward, 15MN and 4MN backward (with dropout 5MN): memory decides, for half types with dropout
            the generator
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
    is_spread,
    needs_grad,
    on_shards,
    reference_gradients,
    require_tensors,
    statistics_dtype,
    unsupported,
)
from ..registry import Cost, Op, register
from .dropout import check_seed, draw_seed, dropout, factors, numbers
from .layer_norm import check_rows, layer_norm, make_rows, misfit

__all__ = ["add_layer_norm", "dropout_add_layer_norm"]


def _forward_fake(
    x: Tensor, residual: Tensor, seed: Tensor | None, weight: Tensor | None, bias: Tensor | None, p: float, eps: float
) -> Optionals:
    check_rows(x, weight, bias, residual=(residual, x.shape, x.dtype))
    if seed is not None:
        check_seed(x, seed, p)
    M, sums = x.shape[0], statistics_dtype(x)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((2, M), dtype=sums), x.new_empty(M, dtype=sums)


def _backward_fake(
    dy: Tensor, dsum: Tensor | None, sum: Tensor, seed: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor, p: float,
    need_dx: bool, need_dresidual: bool, need_dweight: bool, need_dbias: bool,
) -> Optionals:  # fmt: skip
    M, sums, parameter = sum.shape[0], statistics_dtype(sum), sum if weight is None else weight
    like = (sum.shape, sum.dtype)
    check_rows(sum, weight, None, dy=(dy, *like), dsum=(dsum, *like), mean=(mean, (2, M), sums), rstd=(rstd, (M,), sums))
    if seed is not None:
        check_seed(sum, seed, p)
    return (
        sum.new_empty(sum.shape) if need_dx and seed is not None else None,
        sum.new_empty(sum.shape) if need_dresidual else None,
        parameter.new_empty(sum.shape[1]) if need_dweight else None,
        parameter.new_empty(sum.shape[1]) if need_dbias else None,
    )


_forward = define(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor? seed, Tensor? weight, Tensor? bias, float p, float eps)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    _forward_fake,
)
_backward = define(
    "add_layer_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor? seed, Tensor? weight, Tensor mean, Tensor rstd, float p, "
    "bool need_dx, bool need_dresidual, bool need_dweight, bool need_dbias)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward_fake,
)


class _AddLayerNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, residual: Tensor, seed: Tensor | None, weight: Tensor | None, bias: Tensor | None, p: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(x, residual, seed, weight, bias, p, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, seed, weight, bias, ctx.p, ctx.eps = inputs
        _, s, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, residual, seed, weight, bias, s, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: None) -> Optionals:
        x, residual, seed, weight, bias, s, mean, rstd = ctx.saved_tensors
        if dy is None:
            if dsum is None:
                return None, None, None, None, None, None, None
            dy = torch.zeros_like(dsum)
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            dys = dy, torch.zeros_like(dy) if dsum is None else dsum
            return reference_gradients(_reference, (x, residual, seed, weight, bias, ctx.p, ctx.eps), needs, dys)
        plain = seed is None
        need_dresidual = needs[1] or (plain and needs[0])
        dx, dresidual, dweight, dbias = _backward(
            dy, dsum, s, seed, weight, mean, rstd, ctx.p, needs[0] and not plain, need_dresidual, needs[3], needs[4]
        )
        return dresidual if plain and needs[0] else dx, dresidual if needs[1] else None, None, dweight, dbias, None, None


def _reference(
    x: Tensor, residual: Tensor, seed: Tensor | None, weight: Tensor | None, bias: Tensor | None, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    if seed is not None:
        m = torch.arange(x.shape[:-1].numel(), device=x.device)[:, None]
        x = x * factors(numbers(x.shape[-1], seed, m), p, x.dtype).view(x.shape)
    s = x + residual
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s


def _unsupported(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, seed: Tensor | None = None, shape: Any = None
) -> str | None:
    """Why the sum and its layer_norm are computed one after the other, or None where a kernel does both."""
    reason = unsupported(("input", x), ("residual", residual), optional=(("weight", weight), ("bias", bias)))
    reason = reason or misfit(x, weight, bias, shape)
    if reason is None and (x.shape != residual.shape or x.dtype != residual.dtype):
        return f"residual is {residual.dtype} {tuple(residual.shape)}, needs to be like input"
    if reason is None and not x.is_cpu and autocast_dtype(x) is not None:
        return "autocast takes the sum in one dtype and layer_norm in another"
    return reason


def _seeded(
    x: Tensor, residual: Tensor, seed: Tensor | None, p: float, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What a kernel does, for arguments that one takes."""
    rows, others = x, residual
    if len(shape) > 1:
        weight, bias = (t if t is None else t.reshape(-1) for t in (weight, bias))
    if len(shape) > 1 or x.dim() != 2:
        M, N = x.shape[: -len(shape)].numel(), x.shape[-len(shape) :].numel()
        rows, others = x.reshape(M, N), residual.reshape(M, N)
    if needs_grad(rows, others, weight, bias):
        y, s, *_ = apply_function(_AddLayerNorm, rows, others, seed, weight, bias, p, eps)
    else:
        y, s, *_ = _forward(rows, others, seed, weight, bias, p, eps)
    return (y, s) if rows is x else (y.view(x.shape), s.view(x.shape))


def add_layer_norm(
    input: Tensor, residual: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(layer_norm(sum), sum)`` with ``sum = input + residual``, in one kernel.

    Args:
        input, residual: ``(*, *normalized_shape)`` of one dtype: float32, float64, bfloat16 or float16; any strides.
        normalized_shape, weight, bias, eps: as of ``layer_norm``.

    Raises:
        RuntimeError: shapes or dtypes do not fit. TypeError: an argument is not a tensor.
    """
    if _unsupported(input, residual, weight, bias, None, normalized_shape) is not None or not isinstance(eps, float):
        require_tensors(("input", input), ("residual", residual))
        if is_spread(input, residual, weight, bias):
            return on_shards("add_layer_norm", input, residual, normalized_shape, weight, bias, eps)
        s = input + residual
        return layer_norm(s, normalized_shape, weight, bias, eps), s
    return _seeded(input, residual, None, 0.0, normalized_shape, weight, bias, eps)


def dropout_add_layer_norm(
    input: Tensor, residual: Tensor, p: float, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, training: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(layer_norm(sum), sum)`` with ``sum = dropout(input, p, training) + residual``, in one kernel. See ``add_layer_norm``.

    What is dropped follows from one seed, drawn from torch's generator at every call; nothing else is kept of it for the backward.

    Raises:
        ValueError: ``p`` is not between 0 and 1. Else as ``add_layer_norm``.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0:
        return add_layer_norm(input, residual, normalized_shape, weight, bias, eps)
    if _unsupported(input, residual, weight, bias, None, normalized_shape) is not None or not isinstance(eps, float):
        require_tensors(("input", input), ("residual", residual))
        if is_spread(input, residual, weight, bias, traced=True):
            return on_shards("add_layer_norm", input, residual, normalized_shape, weight, bias, eps, p)
        return add_layer_norm(dropout(input, p), residual, normalized_shape, weight, bias, eps)
    return _seeded(input, residual, draw_seed(input.device), float(p), normalized_shape, weight, bias, eps)


def _make(factory: Callable[..., Tensor], N: int, affine: bool = True, **size: Any) -> tuple[Any, ...]:
    x = make_rows(factory, N, **size)
    return x, factory(*x.shape), factory(N) if affine else None, factory(N) if affine else None


def _make_with_seed(factory: Callable[..., Tensor], **size: Any) -> tuple[Any, ...]:
    args = _make(factory, **size)
    return *args, torch.full((1,), 0x0123456789ABCDEF, device=args[0].device)


def _cost(N: int, M: int = 0, lead: tuple[int, ...] | None = None, affine: bool = True, dropout: bool = False) -> Cost:
    M = M if lead is None else int(torch.Size(lead).numel())
    return Cost(9 * M * N, 15 * M * N, 4 * M * N + 2 * N * affine, (4 + dropout) * M * N + 3 * N * affine)


P = 0.3
SAMPLES: list[dict[str, Any]] = [
    {"M": 0, "N": 3}, {"M": 3, "N": 5}, {"M": 1, "N": 16}, {"lead": (2, 1, 3), "N": 17, "affine": False}, {"lead": (3, 4), "N": 65},
    {"M": 9, "N": 131},
]  # fmt: skip
BENCH = [{"M": M, "N": N} for M, N in [(64, 64), (1024, 768), (8192, 768), (4096, 4096), (512, 16384), (3, 1000003)]]
QUICK = [BENCH[1], BENCH[3]]


def _call(x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if _unsupported(x, residual, weight, bias) is not None and not is_spread(x, residual, weight, bias):
        return _native(x, residual, weight, bias)
    return add_layer_norm(x, residual, x.shape[-1:], weight, bias)


def _native(x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _reference(x, residual, None, weight, bias, 0.0, 1e-5)


def _call_seeded(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if _unsupported(x, residual, weight, bias) is not None or not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        if is_spread(x, residual, weight, bias, seed):
            return on_shards("seeded_add_layer_norm", x, residual, weight, bias, seed)
        return _reference(x, residual, seed, weight, bias, P, 1e-5)
    return _seeded(x, residual, seed, P, x.shape[-1:], weight, bias, 1e-5)


def _native_seeded(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _reference(x, residual, seed, weight, bias, P, 1e-5)


def _rival(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return _native(F.dropout(x, P), residual, weight, bias)


def _register(name: str, call: Callable[..., Any], native: Callable[..., Any], make: Callable[..., Any], **options: Any) -> None:
    register(
        Op(
            name=name,
            module="add_layer_norm",
            call=call,
            reference=native,
            native=native,
            make=make,
            samples=SAMPLES,
            bench=BENCH,
            quick=QUICK,
            tiny=BENCH[:1],
            raw=("add_layer_norm_forward", "add_layer_norm_backward"),
            supports=_unsupported,
            **options,
        )
    )


_register("add_layer_norm", _call, _native, _make, cost=_cost)
_register(
    "dropout_add_layer_norm", _call_seeded, _native_seeded, _make_with_seed, rival=_rival, cost=lambda **size: _cost(dropout=True, **size)
)
