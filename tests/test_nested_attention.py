"""scaled_dot_product_attention of nested tensors: what torch makes of each sequence by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import RawCalls
from test_attention import heads, native
from torch import Tensor

import dlkernels.functional as F
from dlkernels import explain


def nested(lengths: list[int], *shape: int, seed: int = 0, offsets: Tensor | None = None) -> Any:
    """(B, j, H, D) of layout torch.jagged"""
    starts = torch.tensor([0, *lengths]).cumsum(0) if offsets is None else offsets
    values = heads(int(starts[-1]), *shape, dtype=torch.float64, seed=seed)
    return torch.nested.nested_tensor_from_jagged(values, starts).detach().requires_grad_()


def of_heads(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return call(*(t.transpose(1, 2) for t in args), **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [[3, 2, 7], [7, 1, 1]], ids=["self", "cross"])
def test_nested(keys: list[int], causal: bool) -> None:
    """What torch makes of each sequence, and a result that can be added to the query."""
    q = nested([3, 2, 7], 4, 8)
    k = nested(keys, 2, 8, seed=1, offsets=q.offsets() if keys == [3, 2, 7] else None)
    v = nested(keys, 2, 8, seed=2, offsets=k.offsets())
    with RawCalls() as recorded:
        y = of_heads(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=True)
        grads = torch.autograd.grad(y.values().square().sum(), (q, k, v))
    assert len(recorded.calls) == 2
    assert y.layout is torch.jagged and y.shape == q.transpose(1, 2).shape
    assert (y + q.transpose(1, 2)).shape == y.shape and y.transpose(1, 2).is_contiguous()
    parts = [[t.detach().requires_grad_() for t in some] for some in zip(q.unbind(), k.unbind(), v.unbind(), strict=True)]
    for i, (part, found) in enumerate(zip(parts, y.transpose(1, 2).unbind(), strict=True)):
        right = of_heads(native, *(t[None] for t in part), is_causal=causal, enable_gqa=True).transpose(1, 2)[0]
        torch.testing.assert_close(found, right)
        for g, wanted in zip(grads, torch.autograd.grad(right.square().sum(), part), strict=True):
            torch.testing.assert_close(g.unbind()[i], wanted)


def test_nested_in_one_graph() -> None:
    torch._dynamo.reset()
    q = nested([3, 2, 7], 2, 4)
    k, v = (nested([], 2, 4, seed=i, offsets=q.offsets()) for i in (1, 2))
    call = lambda *a: of_heads(F.scaled_dot_product_attention, *a, is_causal=True).transpose(1, 2)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, call):
        y = function(q, k, v)
        found.append([t.values() for t in (y, *torch.autograd.grad(y.values().square().sum(), (q, k, v)))])
    torch.testing.assert_close(*found)


def test_nested_with_dropout_and_autocast() -> None:
    q = nested([3, 2, 7], 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert of_heads(F.scaled_dot_product_attention, q.float(), q.float(), q.float()).dtype == torch.bfloat16
    assert not of_heads(F.scaled_dot_product_attention, q, q, q, dropout_p=1.0).values().any()


def test_nested_tensors_that_kernels_do_not_take_are_torchs() -> None:
    """Its result, or its error with our reason before it; ``explain`` says why."""
    q = nested([3, 2, 7], 2, 4)
    name, h = "scaled_dot_product_attention", q.transpose(1, 2)
    assert explain(name, h, h, h).implementation != "reference"
    assert explain(name, q, q, q).implementation == "reference" and "transposed" in explain(name, q, q, q).reason
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q).values(), native(q, q, q).values())
    dense = heads(3, 2, 7, 4, dtype=torch.float64)
    wide = nested([3, 2, 7], 2, 300).transpose(1, 2)
    assert "at most 256" in explain(name, wide, wide, wide).reason
    for args, word in (((h, dense, dense), "key"), ((dense, h, h), "query"), ((h, h, h, torch.ones(7, 7)), "attn_mask")):
        with pytest.raises((RuntimeError, ValueError), match=word):
            F.scaled_dot_product_attention(*args)
    other = nested([7, 2, 3], 2, 4).transpose(1, 2)
    with pytest.raises((RuntimeError, ValueError), match="same sequences"):
        F.scaled_dot_product_attention(h, h, other)
    strided = torch.nested.nested_tensor([torch.randn(2, n, 4) for n in (3, 5)])
    assert F.scaled_dot_product_attention(strided, strided, strided).is_nested
