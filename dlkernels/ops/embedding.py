r"""embedding: rows of a table, picked by index.

Forward     y[l,d] = weight[i[l], d]
Backward    dweight[v,d] = s[v] Σ_{l: i[l] = v} dy[l,d]     in the order of l; zeros where v is no index, and for v = padding_idx
            s[v] = 1, or 1 / (how often v occurs) with scale_grad_by_freq

Shapes      indices (*)   weight (V, D)   y (*, D);   L is the number of indices
Work        2LD elements moved forward, (L + V) D backward: memory decides
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import PLAIN_TENSORS, apply_function, define
from ..contract import is_spread, needs_grad, on_shards, raise_index_error, require_tensors, unsupported
from ..registry import FLOATS, Cost, Op, register

__all__ = ["embedding"]

INDICES = (torch.int64, torch.int32)


def _forward_fake(weight: Tensor, indices: Tensor) -> Tensor:
    torch._check(weight.dim() == 2, lambda: f"weight must have 2 dimensions, got {weight.dim()}")
    torch._check(indices.dtype in INDICES, lambda: f"indices has dtype {indices.dtype}, needs int64 or int32")
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _backward_fake(dy: Tensor, indices: Tensor, V: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    torch._check(dy.shape[:-1] == indices.shape, lambda: f"dy has shape {tuple(dy.shape)}, needs {(*indices.shape, 'D')}")
    return dy.new_empty((V, dy.shape[-1]))


_forward = define("embedding_forward(Tensor weight, Tensor indices) -> Tensor", _forward_fake)
_backward = define(
    "embedding_backward(Tensor dy, Tensor indices, SymInt V, int padding_idx, bool scale_grad_by_freq) -> Tensor", _backward_fake
)


class _Embedding(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
        return _forward(weight, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, indices, ctx.padding_idx, ctx.scale_grad_by_freq = inputs
        ctx.V = weight.shape[0]  # of weight the backward needs no number, so it may change meanwhile
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (indices,) = ctx.saved_tensors
        options = indices, ctx.V, ctx.padding_idx, ctx.scale_grad_by_freq
        return _dweight(dy, *options) if torch.is_grad_enabled() else _backward(dy, *options), None, None, None


def _dweight(dy: Tensor, indices: Tensor, V: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """The gradient in PyTorch's own operations, which can be differentiated in turn (torch.embedding's cannot where L is 0)."""
    i, D = indices.reshape(-1).long(), dy.shape[-1]
    share = (i != padding_idx).to(dy.dtype)
    if scale_grad_by_freq:
        share = share / i.new_zeros(V).index_add(0, i, torch.ones_like(i))[i]
    return dy.new_zeros((V, D)).index_add(0, i, dy.reshape(i.shape[0], D) * share[:, None])


def _unsupported(input: Any, weight: Any, max_norm: float | None = None, sparse: bool = False) -> str | None:
    """Why PyTorch's own operation runs for these arguments, or None where a kernel does. On the path of every call."""
    if max_norm is not None:
        return "max_norm rescales rows of weight in place; PyTorch does that"
    if sparse:
        return "sparse=True asks for a sparse gradient; kernels write a dense one"
    if type(input) is Tensor and type(weight) in PLAIN_TENSORS and input.dtype in INDICES and weight.dtype in FLOATS:
        strided = input.layout is torch.strided and weight.layout is torch.strided and weight.dim() == 2
        if strided and ((input.is_cpu and weight.is_cpu) or (input.device == weight.device and weight.device.type in ("cuda", "meta"))):
            return None  # nearly every call; `unsupported` comes to the same, but takes as long as copying some rows
    reason = unsupported(("weight", weight), ("input", input), indices=("input",))
    if reason is None and weight.dim() != 2:
        return f"weight has shape {tuple(weight.shape)}, needs (V, D)"
    return reason


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.embedding``: the rows of ``weight`` that ``input`` names.

    Args:
        input: ``(*)`` of int64 or int32, each index from 0 to V - 1.
        weight: ``(V, D)``, float32, float64, bfloat16 or float16; any strides.
        padding_idx: an index whose row gets no gradient; negative ones count from the end.
        max_norm, norm_type, sparse: as PyTorch, whose own operations run where ``max_norm`` or ``sparse`` is given.
        scale_grad_by_freq: divide the gradient of a row by the number of its uses.

    Returns:
        ``(*, D)`` in the dtype of ``weight``. Its gradient is the same in every run: rows are added in the order of the indices.

    Raises:
        IndexError: an index is out of range. AssertionError: ``padding_idx`` is. RuntimeError: dtypes or devices do not fit.
        TypeError: an argument is not a tensor.
    """
    reason = _unsupported(input, weight, max_norm, sparse)
    if reason is not None:
        require_tensors(("input", input), ("weight", weight))
        if is_spread(input, weight):
            return on_shards("embedding", input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        padding_idx = -1
    else:
        V = weight.shape[0]
        if not -V <= padding_idx < V and padding_idx != 0:
            raise AssertionError(f"padding_idx is {padding_idx}, but must be within the {V} rows of weight")
        padding_idx = padding_idx + V if padding_idx < 0 else padding_idx
    try:
        if needs_grad(weight):
            return apply_function(_Embedding, weight, input, padding_idx, scale_grad_by_freq)
        return _forward(weight, input)
    except RuntimeError as error:
        return raise_index_error(error)


def _call(weight: Tensor, indices: Tensor) -> Tensor:
    return embedding(indices, weight)


def _native(weight: Tensor, indices: Tensor) -> Tensor:
    return F.embedding(indices, weight)


def _supports(first: Any, second: Any, *options: Any) -> str | None:
    """``_unsupported`` for the arguments of the public function, or for a weight and its indices."""
    if options or getattr(first, "dtype", None) in INDICES:
        max_norm, sparse = options[1] if len(options) > 1 else None, len(options) > 4 and options[4]
        return _unsupported(first, second, max_norm, sparse)
    return _unsupported(second, first)


def _make(factory: Callable[..., Tensor], V: int, D: int, L: int = 1, lead: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Indices that look random and repeat; the first three are 0, 1 and 2, so that they fit the first three rows too."""
    weight = factory(V, D)
    shape = torch.Size((L,) if lead is None else lead)
    count = torch.arange(shape.numel(), device=weight.device)
    mixed = count * -7046029254386353131  # the golden ratio in 64 bits: multiplication and shift spread neighbours widely
    return weight, torch.where(count < 3, count, (mixed ^ mixed >> 29) & 0x7FFFFFFF).remainder(max(V, 1)).reshape(shape)


def _cost(V: int, D: int, L: int = 1, lead: tuple[int, ...] | None = None) -> Cost:
    L = L if lead is None else int(torch.Size(lead).numel())
    return Cost(forward_flops=0, backward_flops=L * D, forward_elements=2 * L * D, backward_elements=(L + V) * D)


SAMPLES: list[Mapping[str, Any]] = [
    {"V": 3, "D": 4, "L": 0}, {"V": 3, "D": 1, "L": 1}, {"V": 3, "D": 15, "L": 7}, {"V": 5, "D": 17, "L": 31}, {"V": 31, "D": 33, "L": 5},
    {"V": 7, "D": 65, "lead": (2, 1, 3)}, {"V": 11, "D": 130, "L": 23}, {"V": 301, "D": 37, "L": 797},
]  # fmt: skip
BENCH = [{"V": V, "D": D, "L": L} for V, D, L in [(32000, 512, 8192), (50000, 128, 65536), (1000, 64, 4096)]]

register(
    Op(
        name="embedding", module="embedding", call=_call, reference=_native, native=_native, make=_make, samples=SAMPLES, bench=BENCH,
        quick=[BENCH[0], BENCH[2]], tiny=[{"V": 100, "D": 16, "L": 8}], cost=_cost, raw=("embedding_forward", "embedding_backward"),
        supports=_supports,
    )
)  # fmt: skip
