r"""qkv_projection: the queries, keys and values of attention, queries and keys turned by the angles of their positions, from one product.

Forward     z[m,n] = Σ_c x[m,c] W[n,c] + b[n]          W the rows of W_q, W_k and W_v one below the other
            q, k   = rope(z), v = z                     heads are D consecutive numbers of z; see rope.py
Backward    dz     = rope⁻¹(dq), rope⁻¹(dk), dv         side by side
            dx[m,c] = Σ_n dz[m,n] W[n,c]     dW[n,c] = Σ_m dz[m,n] x[m,c]     db[n] = Σ_m dz[m,n]

Nothing of z is kept: x is read by one product in place of three, and q and k go to memory once, as they are turned in the product's tiles.
Keys and values may have fewer heads than queries (grouped-query attention). The three weights may be parts of one.

Shapes      x (*, T, C)   W_q (H D, C)   W_k, W_v (G D, C)   b as rows of W   cos, sin (T, P) or (*, T, P)
            q (*, H, T, D)   k, v (*, G, T, D), which lie as (*, T, heads, D);   M is the number of rows of x, N = (H + 2 G) D
Work        2MNC + 3M(H + G)D flops forward, 4MNC and as many backward; MC + NC + MN elements moved, twice that backward: the flops decide
            unless M is small, when reading W does
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function
from ..contract import (
    autocast_dtype,
    in_autocast,
    is_spread,
    needs_grad,
    on_shards,
    reference_gradients,
    require_tensors,
    statistics_dtype,
    unsupported,
)
from ..registry import Cost, Op, register
from . import rope as _rope
from .qkv_projection_raw import NAMES, Three
from .qkv_projection_raw import backward as _backward
from .qkv_projection_raw import forward as _forward

__all__ = ["qkv_projection"]


class _QKVProjection(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None,
        v_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, head_dim: int, interleaved: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        qkv: tuple[Tensor, ...] = _forward(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, cos, sin, head_dim, interleaved)
        return qkv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.head_dim, ctx.interleaved = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(dy is None for dy in dys):
            return (None,) * 11
        tensors, options = ctx.saved_tensors, (ctx.head_dim, ctx.interleaved)
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, so that second derivatives exist
            (B, T, _), D = tensors[0].shape, ctx.head_dim
            every = [tensors[0].new_zeros(B, len(w) // D, T, D) if dy is None else dy for w, dy in zip(tensors[1:4], dys)]
            return reference_gradients(_reference, (*tensors, *options), ctx.needs_input_grad, tuple(every))
        need = list(ctx.needs_input_grad[:7])
        return *_backward(*dys, *tensors[:4], *tensors[7:], *options, need), None, None, None, None


def _by_parts(project: Callable[..., Tensor], turn: Callable[..., Tensor]) -> Callable[..., Three]:
    """The definition: three calls of ``project``, a linear, and two of ``turn``, a rope."""

    def qkv(
        x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None,
        v_bias: Tensor | None, cos: Any, sin: Any, head_dim: int, interleaved: bool,
    ) -> Three:  # fmt: skip
        parts = (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)
        q, k, v = (project(x, w, b).unflatten(-1, (w.shape[0] // head_dim, head_dim)).transpose(-3, -2) for w, b in parts)
        return (q, k, v) if cos is None else (turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved), v)

    return qkv


_reference = _by_parts(F.linear, _rope._reference)


def _unsupported(input: Tensor, weights: Any, biases: Any, cos: Tensor | None, sin: Tensor | None) -> str | None:
    """Why the definition in PyTorch's own operations runs, or None where a kernel does. On the path of every call."""
    optional = (*zip(NAMES[1], biases), ("cos", cos), ("sin", sin))
    reason = unsupported(("input", input), *zip(NAMES[0], weights), optional=optional)
    return _rope.learned_angles(cos, sin) if reason is None else reason


def _misfit(input: Tensor, weights: Any, biases: Any, D: Any, cos: Tensor | None, sin: Tensor | None) -> str | None:
    """What does not fit, or None."""
    shape = input.shape
    if not isinstance(D, int) or D < 1:
        return f"head_dim is {D!r}, needs a positive integer"
    if len(shape) < 2:
        return f"input has shape {tuple(shape)}, needs (*, T, C)"
    for name, weight in zip(NAMES[0], weights):
        if weight.dim() != 2 or weight.shape[1] != shape[-1] or weight.shape[0] % D:
            return f"{name} has shape {tuple(weight.shape)}, needs (a multiple of {D}, {shape[-1]}) for input {tuple(shape)}"
    if weights[1].shape != weights[2].shape:
        return f"v_weight has shape {tuple(weights[2].shape)}, needs that of k_weight, {tuple(weights[1].shape)}"
    for name, bias, weight in zip(NAMES[1], biases, weights):
        if bias is not None and bias.shape != weight.shape[:1]:
            return f"{name} has shape {tuple(bias.shape)}, needs ({weight.shape[0]},)"
    if cos is None or sin is None:
        return None if cos is sin else f"{'cos' if cos is None else 'sin'} is None, needs both cos and sin, or neither"
    if cos.shape != sin.shape:
        return f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}, need one"
    if cos.dim() not in (2, len(shape)) or cos.shape[-2] != shape[-2] or any(n not in (1, m) for n, m in zip(cos.shape[:-2], shape)):
        return f"cos and sin have shape {tuple(cos.shape)}, need (T, P) or (*, T, P) beside input {tuple(shape)}"
    if 2 * cos.shape[-1] > D:
        return f"cos and sin have {cos.shape[-1]} angles, needs at most {D // 2} for heads of {D} numbers"
    return None


def qkv_projection(
    input: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None = None, k_bias: Tensor | None = None,
    v_bias: Tensor | None = None, *, head_dim: int, cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``linear(input, weight, bias)`` for each of three weights, split into heads; those of q and k through ``rope``. In one kernel.

    Args:
        input: ``(*, T, C)``, float32, float64, bfloat16 or float16; any strides.
        q_weight: ``(H * head_dim, C)``. k_weight, v_weight: ``(G * head_dim, C)``, with G heads. They may be parts of one tensor.
        q_bias, k_bias, v_bias: ``(H * head_dim,)`` and ``(G * head_dim,)``, or None.
        cos, sin: of the angles, ``(T, P)``, or ``(*, T, P)`` where positions differ within the batch, as ``rope`` takes them; P is at most
            head_dim / 2, and what is left of a head stays as it is. None: nothing is turned. Any float dtype.
        interleaved: pairs are neighbours, 2p and 2p + 1, instead of p and p + P.

    Returns:
        q ``(*, H, T, head_dim)``, k and v ``(*, G, T, head_dim)``, which lie as ``(*, T, heads, head_dim)``; in the dtype of ``input``,
        under autocast in its dtype.

    Raises:
        RuntimeError: shapes or dtypes do not fit. TypeError: an argument is not a tensor.
    """
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    reason = _unsupported(input, weights, biases, cos, sin)
    if reason is not None:
        optional = (*zip(NAMES[1], biases), ("cos", cos), ("sin", sin))
        require_tensors(("input", input), *zip(NAMES[0], weights), optional=optional)
    misfit = _misfit(input, weights, biases, head_dim, cos, sin)
    if misfit is not None:
        raise RuntimeError(f"qkv_projection: {misfit}")
    if reason is not None:
        arguments = (input, *weights, *biases, cos, sin, head_dim, interleaved)
        found: Three = on_shards("qkv_projection", *arguments) if is_spread(*arguments) else _reference(*arguments)
        return found
    tensors: Any = (input, *weights, *biases)
    dtype = autocast_dtype(input)
    if dtype is not None:
        tensors = in_autocast(dtype, *tensors)
    lead = input.shape[:-2]
    x = tensors[0] if len(lead) == 1 else tensors[0].reshape(lead.numel(), *input.shape[-2:])
    if cos is not None and sin is not None:
        wide = statistics_dtype(x)
        cos, sin = _rope._table_in_three(cos.to(wide), lead), _rope._table_in_three(sin.to(wide), lead)
    call = (x, *tensors[1:], cos, sin, head_dim, interleaved)
    q, k, v = apply_function(_QKVProjection, *call) if needs_grad(*call[:7]) else _forward(*call)
    if len(lead) != 1:
        q, k, v = (t.reshape(*lead, *t.shape[1:]) for t in (q, k, v))
    return q, k, v


def _tables(x: Tensor, D: int, P: int | None, each: bool, turned: bool) -> dict[str, Any]:
    """``each``: positions of its own for every sequence of the batch. Nothing is turned unless ``turned``."""
    if not turned or not isinstance(x, Tensor):
        return {}
    width = 2 * (D // 2 if P is None else min(P, D // 2))
    return dict(zip(("cos", "sin"), _rope.angles_like(x, width, step=5, lead=tuple(x.shape[:-2]) if each else ())))


def _call(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
    D: int, P: int | None, each: bool, turned: bool, interleaved: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    tables = _tables(x, D, P, each, turned)
    return qkv_projection(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, head_dim=D, interleaved=interleaved, **tables)


def _definition(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *parameters, D, P, each, turned, interleaved = args
    tables = _tables(x, D, P, each, turned)
    return _reference(x, *parameters, tables.get("cos"), tables.get("sin"), D, interleaved)


def _native(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """What a PyTorch user writes."""
    *parameters, D, P, each, turned, interleaved = args
    angles = (D // 2 if P is None else P, each) if turned else (None, None)  # in the place of tables
    turn = _by_parts(F.linear, lambda x, P, each, interleaved: _rope._native(x, P, interleaved, each))
    return turn(x, *parameters, *angles, D, interleaved)


def _supports(x: Tensor, *args: Any) -> str | None:
    *parameters, D, P, each, turned, _ = args
    cos, sin = _tables(x, D, P, each, turned).values() if turned else (None, None)
    weights, biases = parameters[:3], parameters[3:]
    return _unsupported(x, weights, biases, cos, sin) or _misfit(x, weights, biases, D, cos, sin)


def _make(
    factory: Callable[..., Tensor], T: int, C: int, H: int, D: int, B: int = 1, G: int | None = None, lead: tuple[int, ...] | None = None,
    bias: bool = False, P: int | None = None, each: bool = False, turned: bool = True, interleaved: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """``G``: heads of keys and values, where they are fewer."""
    rows = (H * D, (G or H) * D, (G or H) * D)
    weights, biases = [factory(N, C) for N in rows], [factory(N) if bias else None for N in rows]
    return factory(*((B,) if lead is None else lead), T, C), *weights, *biases, D, P, each, turned, interleaved


def _cost(
    T: int, C: int, H: int, D: int, B: int = 1, G: int | None = None, lead: tuple[int, ...] | None = None, bias: bool = False,
    turned: bool = True, **_: Any,
) -> Cost:  # fmt: skip
    M, N = T * (B if lead is None else torch.Size(lead).numel()), (H + 2 * (G or H)) * D
    rotation, moved = 3 * M * (H + (G or H)) * D * turned, M * C + N * C + M * N + N * bias
    return Cost(2 * M * N * C + rotation, 4 * M * N * C + rotation, moved, 2 * moved)


SAMPLES: list[dict[str, Any]] = [
    {"T": 1, "C": 1, "H": 1, "D": 1}, {"T": 0, "C": 3, "H": 2, "D": 4, "B": 2, "bias": True}, {"T": 2, "C": 3, "H": 2, "D": 4, "B": 0},
    {"T": 3, "C": 0, "H": 2, "D": 4, "bias": True}, {"T": 3, "C": 2, "H": 2, "D": 2, "lead": (), "bias": True},
    {"T": 3, "C": 4, "H": 3, "D": 5, "B": 2, "G": 1, "bias": True}, {"T": 5, "C": 3, "H": 2, "D": 6, "B": 1, "turned": False},
    {"T": 1, "C": 33, "H": 4, "D": 16, "B": 3, "G": 2, "bias": True}, {"T": 3, "C": 8, "H": 2, "D": 12, "P": 0},
    {"T": 3, "C": 16, "H": 3, "D": 20, "lead": (2, 1, 2), "P": 4, "each": True, "bias": True}, {"T": 5, "C": 31, "H": 3, "D": 34, "G": 1},
    {"T": 9, "C": 7, "H": 3, "D": 24, "B": 3, "bias": True, "each": True}, {"T": 7, "C": 130, "H": 4, "D": 32, "B": 2, "G": 2},
    {"T": 17, "C": 65, "H": 2, "D": 64, "B": 4, "bias": True}, {"T": 70, "C": 5, "H": 1, "D": 11, "P": 3},
]  # fmt: skip
SAMPLES += [size | {"interleaved": True} for size in SAMPLES if size["T"] and size["D"] > 4 and size.get("turned", True)][::2]
GPT, MINILM = {"B": 8, "T": 256, "C": 384, "H": 6, "D": 64, "bias": True}, {"B": 32, "T": 64, "C": 384, "H": 12, "D": 32, "bias": True}
LLAMA = {"B": 1, "T": 1024, "C": 2048, "H": 32, "G": 8, "D": 64}
BENCH: list[dict[str, Any]] = [GPT, MINILM | {"turned": False}, LLAMA, LLAMA | {"T": 1}, GPT | {"T": 1}, GPT | {"interleaved": True}]

register(
    Op(
        name="qkv_projection",
        module="qkv_projection",
        call=_call,
        reference=_definition,
        native=_native,
        make=_make,
        samples=SAMPLES,
        bench=BENCH,
        quick=[GPT, LLAMA | {"T": 1}],
        tiny=[{"B": 1, "T": 1, "C": 64, "H": 4, "D": 16}],
        cost=_cost,
        raw=("qkv_projection_forward", "qkv_projection_backward"),
        supports=_supports,
    )
)
