"""The registered ops behind qkv_projection.py: the schemas, and what they return while traced."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import define
from ..contract import Optionals, check_traced, statistics_dtype

__all__: list[str] = []

NAMES = ("q_weight", "k_weight", "v_weight"), ("q_bias", "k_bias", "v_bias")
Three = tuple[Tensor, Tensor, Tensor]


def empty_result(x: Tensor, B: int, heads: int, T: int, D: int) -> Tensor:
    """An empty [B, heads, T, D] that lies as [B, T, heads, D], and is no view: several of those could not be changed in place."""
    place, sequence = max(heads, 1) * D, max(T, 1) * max(heads, 1) * D
    return x.new_empty_strided((B, heads, T, D), (sequence, D, place, 1))


def _check(x: Tensor, weights: Three, cos: Tensor | None, sin: Tensor | None, D: int) -> tuple[tuple[int, ...], ...]:
    """What the kernels check, while a graph is traced; the shapes of q, k and v."""
    torch._check(x.dim() == 3 and D > 0, lambda: f"x must have 3 dimensions and head_dim be positive, got {x.dim()} and {D}")
    B, T, C = x.shape
    for name, weight in zip(NAMES[0], weights):
        torch._check(weight.dim() == 2 and weight.shape[0] % D == 0, lambda name=name: f"{name} must be (heads * {D}, {C})")
    q, k, v = weights
    check_traced(x, q_weight=(q, (q.shape[0], C)), k_weight=(k, (k.shape[0], C)), v_weight=(v, k.shape))
    torch._check((cos is None) == (sin is None), lambda: "needs both cos and sin, or neither")
    if cos is not None:
        torch._check(cos.dim() == 3 and cos.shape[0] in (1, B) and cos.shape[1] == T, lambda: f"cos {tuple(cos.shape)}, x {tuple(x.shape)}")
        torch._check(2 * cos.shape[2] <= D, lambda: f"cos has {cos.shape[2]} angles, needs at most half of {D}")
        torch._check(cos.dtype == statistics_dtype(x), lambda: f"cos has dtype {cos.dtype}, needs {statistics_dtype(x)}")
        check_traced(cos, sin=(sin, cos.shape))
    return tuple((B, weight.shape[0] // D, T, D) for weight in weights)


def _forward_fake(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, head_dim: int, interleaved: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = _check(x, (q_weight, k_weight, v_weight), cos, sin, head_dim)
    biases = zip(NAMES[1], (q_bias, k_bias, v_bias), shapes)
    check_traced(x, **{name: (bias, (heads * head_dim,)) for name, bias, (_, heads, _, _) in biases})
    return tuple(empty_result(x, *shape) for shape in shapes)


def _backward_fake(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    cos: Tensor | None, sin: Tensor | None, head_dim: int, interleaved: bool, need: list[bool],
) -> Optionals:  # fmt: skip
    weights, dys = (q_weight, k_weight, v_weight), (dq, dk, dv)
    shapes = _check(x, weights, cos, sin, head_dim)
    check_traced(x, **{name: (dy, shape) for name, dy, shape in zip(("dq", "dk", "dv"), dys, shapes)})
    torch._check(len(need) == 7, lambda: f"need has {len(need)} entries, needs 7")
    dweights = [w.new_empty(w.shape) if wanted and dy is not None else None for w, dy, wanted in zip(weights, dys, need[1:4])]
    dbiases = [w.new_empty(w.shape[0]) if wanted and dy is not None else None for w, dy, wanted in zip(weights, dys, need[4:])]
    return x.new_empty(x.shape) if need[0] else None, *dweights, *dbiases


forward = define(
    "qkv_projection_forward(Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "
    "Tensor? cos, Tensor? sin, int head_dim, bool interleaved) -> (Tensor q, Tensor k, Tensor v)",
    _forward_fake,
)
backward = define(
    "qkv_projection_backward(Tensor? dq, Tensor? dk, Tensor? dv, Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, "
    "Tensor? cos, Tensor? sin, int head_dim, bool interleaved, bool[7] need) -> (Tensor dx, Tensor dq_weight, Tensor dk_weight, "
    "Tensor dv_weight, Tensor dq_bias, Tensor dk_bias, Tensor dv_bias)",
    _backward_fake,
)
