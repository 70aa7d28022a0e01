r"""kv_cache_append_: keys and values of new tokens written behind those of the tokens before, into memory that is there already.

    key_cache[b,g,p+t,:] = key[b,g,t,:]         value_cache[b,g,p+t,:] = value[b,g,t,:]         p = position, or position[b]

A model that writes computes keys and values of its new token and attends to those of all tokens so far. Joining them in a new tensor
(torch.cat) would copy all of them for every token; here only what is new moves.

Shapes      key_cache (B, G, C, D)   value_cache (B, G, C, E)   key (B, G, T, D)   value (B, G, T, E)   position: a number or (B,)
Work        2BGT (D + E) elements moved
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import define
from ..contract import is_transformed, needs_grad, raise_index_error, require_tensors, unsupported

__all__ = ["kv_cache_append_"]


def _fake(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, position: int, positions: Tensor | None) -> None:
    misfit = _misfit(key_cache, value_cache, key, value, positions)
    torch._check(misfit is None, lambda: str(misfit))


_append = define(
    "kv_cache_append_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, int position, Tensor? positions) -> ()", _fake
)


def _misfit(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, positions: Tensor | None) -> str | None:
    """What does not fit the first argument, or None."""
    for name, t in (("key_cache", key_cache), ("value_cache", value_cache), ("key", key), ("value", value)):
        if t.dim() != 4:
            return f"{name} must have 4 dimensions, got {t.dim()}"
    (B, G, C, D), T, E = key_cache.shape, key.shape[2], value.shape[3]
    wanted = {"value_cache": (value_cache, (B, G, C, E)), "key": (key, (B, G, T, D)), "value": (value, (B, G, T, E))}
    for name, (t, shape) in wanted.items():
        if t.shape != shape or t.dtype != key_cache.dtype or t.device != key_cache.device:
            needed = f"{key_cache.dtype} {shape} on {key_cache.device}"
            return f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}, needs {needed} beside key_cache {(B, G, C, D)}"
    if positions is not None and (positions.dtype != torch.int64 or positions.shape != (B,) or positions.device != key_cache.device):
        return f"position is {positions.dtype} {tuple(positions.shape)} on {positions.device}, needs int64 {(B,)} on {key_cache.device}"
    return None


def _unsupported(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why PyTorch's own operations run, or None where a kernel does."""
    reason = unsupported(("key_cache", key_cache), ("value_cache", value_cache), ("key", key), ("value", value))
    if reason is None and needs_grad(key_cache, value_cache, key, value):
        return "gradients are recorded; the kernel overwrites without any"
    if reason is None and torch._C._are_functorch_transforms_active():
        return "torch.func is at work, which knows nothing of what a kernel overwrites"
    if reason is None and any(t.stride(3) != 1 < t.shape[3] for t in (key_cache, value_cache)):
        return "the numbers of a head do not lie side by side in key_cache or value_cache"
    return reason


def _reference(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, position: int | Tensor) -> None:
    T, C = key.shape[2], key_cache.shape[2]
    starts = position.tolist() if isinstance(position, Tensor) else [position] * len(key_cache)
    for p in starts:
        if not 0 <= p <= C - T:
            raise IndexError(f"position {p} is out of range: key has {T} tokens, and key_cache has {C} places")
    for b, p in enumerate(starts):
        key_cache[b, :, p : p + T] = key[b]
        value_cache[b, :, p : p + T] = value[b]


def kv_cache_append_(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, position: int | Tensor) -> None:
    """Write ``key`` and ``value`` into the caches, in place, from ``position`` on.

    Args:
        key_cache, value_cache: ``(B, G, C, D)`` and ``(B, G, C, E)``: G heads, C places. Any strides with one place in memory for each
            number; of float32, float64, bfloat16 or float16.
        key, value: ``(B, G, T, D)`` and ``(B, G, T, E)`` of T tokens, in the dtype and on the device of the caches.
        position: where the first token goes, the same in every row of the batch; or int64 ``(B,)`` on that device, a place for every row.

    Where gradients are recorded, torch's own operations write, and record.

    Raises:
        IndexError: tokens would go beyond the last place; nothing is written then. On a GPU a tensor of positions is not looked at; what
            does not fit is left out.
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a tensor, or ``position`` no integer.
    """
    require_tensors(("key_cache", key_cache), ("value_cache", value_cache), ("key", key), ("value", value))
    start, starts = (0, position) if isinstance(position, Tensor) else (position, None)
    if isinstance(start, bool) or not isinstance(start, (int, torch.SymInt)):
        raise TypeError(f"position must be an integer or a Tensor, got {type(position).__name__}")
    misfit = _misfit(key_cache, value_cache, key, value, starts)
    if misfit is not None:
        raise RuntimeError(f"kv_cache_append_: {misfit}")
    if _unsupported(key_cache, value_cache, key, value) is not None:
        return _reference(key_cache, value_cache, key, value, position)
    try:
        _append(key_cache, value_cache, key, value, start, starts)
    except RuntimeError as error:
        raise_index_error(error)
    for cache in (key_cache, value_cache):
        if not is_transformed() and not cache.is_inference():
            torch.autograd.graph.increment_version(cache)
    return None
