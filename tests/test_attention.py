"""Attention: what is peculiar to it. Masks of every kind, windows, heads, packed sequences, NaN where nobody looks.

Values and gradients are compared with the definition in float64 by the rule of ``dlkernels.bench.check``, as of every op.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import SMALL, assert_accurate, each_dtype, each_dtype_if_fast, threads
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import dlkernels.functional as F
from dlkernels import OPS
from dlkernels.bench.check import allowed_error, relative_error, scale_of
from dlkernels.ops.scaled_dot_product_attention import attend
from dlkernels.ops.scaled_dot_product_attention_raw import Extras, Score
from dlkernels.ops.scaled_dot_product_attention_reference import definition
from dlkernels.ops.score_functions import code_of

OP = OPS["scaled_dot_product_attention"]
native = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def heads(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(
    L: int, S: int, D: int, E: int | None = None, B: int = 1, H: int = 2, G: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    key, value = heads(B, G or H, S, D, dtype=dtype, seed=1), heads(B, G or H, S, D if E is None else E, dtype=dtype, seed=2)
    return heads(B, H, L, D, dtype=dtype), key, value


def check(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, causal: bool = False, scale: float | None = None, gqa: bool = False) -> None:
    assert_accurate(OP, (q, k, v, mask, 0.0, causal, scale, gqa))


def gradients(function: Any, *args: Any, dy: Tensor | None = None) -> tuple[Tensor, ...]:
    """(y, gradient of every floating-point tensor)"""
    leaves = [t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
    y = function(*leaves)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    return y, *torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy)


@each_dtype
@pytest.mark.parametrize("D", [1, 2, 7, 16, 31, 33, 64, 80, 96, 127, 200, 256])
def test_any_head_size(D: int, dtype: torch.dtype) -> None:
    size = (9, 11) if SMALL else (41, 67)
    check(*qkv(*size, D, E=max(1, 257 - D) if D != 64 else 64, dtype=dtype), causal=D % 2 == 1)


@each_dtype
@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 300), (300, 1), (63, 64), (64, 65), (65, 161), (128, 320), (129, 159), (2, 481)])
def test_lengths_around_the_edges_of_tiles(L: int, S: int, dtype: torch.dtype) -> None:
    if SMALL:
        L, S = min(L, 33), min(S, 65)
    for causal in (False, True):
        check(*qkv(L, S, 16, H=1, dtype=dtype), causal=causal)


MASKS = [
    (1, 1), (70, 1), (1, 90), (70, 90), (1, 70, 90), (3, 70, 90), (2, 1, 70, 90), (1, 3, 1, 90), (2, 3, 70, 90), (2, 1, 1, 90),
    (2, 3, 70, 1),
]  # fmt: skip


@each_dtype_if_fast
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_of_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Boolean and additive, the latter with a gradient of its own shape; any strides; and float32 beside a half type."""
    shape = tuple(min(n, 9) for n in shape) if SMALL else shape
    q, k, v = qkv(*((9, 9) if SMALL else (70, 90)), 8, B=2, H=3, dtype=dtype)
    seen = torch.rand(shape) > 0.3
    check(q, k, v, seen)
    check(q, k, v, heads(*shape, dtype=dtype, seed=5))
    check(q, k, v, seen.mT.contiguous().mT)
    check(q, k, v, torch.where(seen, 0.0, -math.inf).to(dtype))
    check(q, k, v, heads(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=6)[..., ::2])
    if dtype.itemsize == 2:
        mask, dy = heads(*shape, seed=7), heads(*q.shape, dtype=dtype, seed=8)
        ours, theirs = (gradients(f, q, k, v, mask, dy=dy) for f in (F.scaled_dot_product_attention, native))
        exact = gradients(native, q.double(), k.double(), v.double(), mask.double(), dy=dy.double())
        for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
            scale = scale_of((dy,)) if i else 0.0
            assert a.dtype == b.dtype
            assert relative_error(a, c, scale) <= allowed_error(relative_error(b, c, scale), dtype, gradient=i > 0)


@each_dtype
def test_grouped_heads(dtype: torch.dtype) -> None:
    for H, G in ((4, 2), (6, 1), (3, 3)):
        check(*qkv(19, 35, 12, H=H, G=G, dtype=dtype), gqa=True, causal=G == 1)
    q, k, v = qkv(9, 11, 8, H=6, G=2, dtype=dtype)
    check(q, k, v[:, :1], gqa=True)  # as many heads of value as it likes
    check(q, k[:, :1], v[:, :1])  # what broadcasts needs no gqa


def test_any_number_of_batch_dimensions() -> None:
    for lead in ((), (2,), (2, 3), (2, 1, 3), (2, 1, 3, 2)):
        q, k, v = heads(*lead, 5, 4), heads(*lead, 7, 4, seed=1), heads(*lead, 7, 3, seed=2)
        check(q, k, v)
        check(q, k, v, torch.rand(5, 7) > 0.4)
        if lead:
            check(q, k[:1], v[:1], heads(*lead, 5, 7)[:1])
    for dims in ((4, 3, 3), (2, 3, 4), (3, 5, 2)):  # which broadcast
        q, k, v = (heads(2, 1, 3, n, 4, seed=n)[(0,) * (5 - dim)] for n, dim in zip((5, 7, 7), dims))
        check(q, k, v)


@each_dtype_if_fast
def test_transposed_views_are_read_where_they_lie(dtype: torch.dtype) -> None:
    """[B, T, H, D] seen as [B, H, T, D], as Hugging Face passes it: no copy goes into the kernel, and the result lies likewise."""
    x = heads(2, 13, 3, 4, 8, dtype=dtype)
    q, k, v = (x[..., i, :, :].transpose(1, 2) for i in range(3))
    check(q, k, v)
    y = F.scaled_dot_product_attention(q, k, v)
    assert y.transpose(1, 2).is_contiguous()
    assert y.stride() == native(q, k, v).stride()
    assert torch.equal(y, F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous()))


@each_dtype_if_fast
def test_causal_lower_right(dtype: torch.dtype) -> None:
    for L, S in ((5, 9), (70, 190), (9, 9), (12, 7)):
        L, S = (min(L, 9), min(S, 12)) if SMALL else (L, S)
        q, k, v = qkv(L, S, 8, dtype=dtype)
        seen, upper_left = (torch.ones(L, S, dtype=torch.bool).tril(diagonal) for diagonal in (S - L, 0))
        with pytest.warns(UserWarning) if L > S else threads(1):
            bias = causal_lower_right(L, S)
        for mask, same in ((bias, seen), (causal_upper_left(L, S), upper_left)):
            found = gradients(lambda *a, mask=mask: F.scaled_dot_product_attention(*a, mask), q, k, v)
            wanted = gradients(F.scaled_dot_product_attention, q, k, v, same)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-2 if dtype.itemsize == 2 else 1e-5)


@each_dtype_if_fast
def test_queries_that_see_no_key(dtype: torch.dtype) -> None:
    """Zeros, as torch's, and no gradient; what the others get does not change by a bit."""
    q, k, v = qkv(20, 30, 8, dtype=dtype)
    some, every = torch.rand(20, 30) > 0.5, torch.rand(20, 30) > 0.5
    some[:, 0] = True
    every = some.clone()
    every[[3, 17]] = False
    for masks in ((some, every), tuple(torch.where(m, 0.0, -math.inf).to(dtype) for m in (some, every))):
        dy = heads(*q.shape, dtype=dtype, seed=4)
        y, dq, *_ = gradients(lambda *a, m=masks[1]: F.scaled_dot_product_attention(*a, m), q, k, v, dy=dy)
        other, dother, *_ = gradients(lambda *a, m=masks[0]: F.scaled_dot_product_attention(*a, m), q, k, v, dy=dy)
        assert not y[:, :, [3, 17]].any() and not dq[:, :, [3, 17]].any()
        keep = [i for i in range(20) if i not in (3, 17)]
        assert torch.equal(y[:, :, keep], other[:, :, keep]) and torch.equal(dq[:, :, keep], dother[:, :, keep])
    check(q, k, v, every)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, every), native(q, k, v, every), rtol=2e-2, atol=2e-2)


@each_dtype_if_fast
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["padding", "additive", "pairs", "causal", "window"])
def test_nothing_gets_through_a_mask(kind: str, bad: float, dtype: torch.dtype) -> None:
    """A NaN or an infinity in a key or a value reaches those queries that see it, forward and backward, and nobody else."""
    L, S = (9, 12) if SMALL else (70, 90)
    q, k, v = qkv(L, S, 8, dtype=dtype)
    at, score, mask = S - 3, Score(0.35), None
    if kind == "padding":
        mask = (torch.arange(S) < S - 5)[None, None, None]
    elif kind == "additive":
        mask = torch.where(torch.rand(L, S) > 0.5, 0.1, -math.inf).to(dtype)[None, None]
    elif kind == "pairs":
        mask = (torch.rand(1, 2, L, S) > 0.5) | (torch.arange(S) == 0)
    elif kind == "causal":
        at, score = 4, Score(0.35, right=0)
    else:
        at, score = 6, Score(0.35, left=2, right=3)
    place = torch.arange(L)[:, None] - at
    if mask is not None:
        sees = mask[..., at] if mask.dtype == torch.bool else mask[..., at] > -math.inf
    else:
        sees = ((place >= -score.right) & ((score.left < 0) | (place <= score.left)))[:, 0][None, None]
    sees = sees.expand(1, 2, L)
    call = partial(attend, extras=Extras(mask), p=0.0, score=score)
    clean = gradients(call, q, k, v)
    for spoiled in (1, 2):
        args = [q, k.clone(), v.clone()]
        args[spoiled][:, :, at, 2] = bad
        y, dq, dk, dv = gradients(call, *args)
        assert torch.equal(y[~sees], clean[0][~sees]) and torch.equal(dq[~sees], clean[1][~sees])
        if spoiled == 2 or bad != bad:
            assert not y[sees].isfinite().all(-1).any()
        if not sees.any():
            assert torch.equal(dk[:, :, :at], clean[2][:, :, :at]) and torch.equal(dv, clean[3])


@each_dtype_if_fast
def test_a_bad_query_spoils_its_own_row(dtype: torch.dtype) -> None:
    q, k, v = qkv(70, 20, 8, dtype=dtype)
    q[0, 1, 66, 3] = math.nan
    y = F.scaled_dot_product_attention(q, k, v)
    assert y[0, 1, 66].isnan().all()
    assert y.isnan().sum() == 8


SOFTCAP = code_of("softcap")
OPTIONS = {
    "window": Score(0.3, left=7, right=2),
    "left": Score(0.3, left=40),
    "lower right": Score(0.3, left=5, right=0, lower_right=True),
    "soft cap": Score(1.3, SOFTCAP, 1.5),
    "slopes": Score(0.3),
    "all": Score(-0.9, SOFTCAP, 2.0, left=50, right=20, lower_right=True),
}


@each_dtype
@pytest.mark.parametrize("kind", OPTIONS)
def test_score_functions(kind: str, dtype: torch.dtype) -> None:
    """Window, soft cap and slopes, alone and together: the definition in float64, against what the definition makes of it in this type."""
    score = OPTIONS[kind]
    q, k, v = qkv(*((9, 14) if SMALL else (70, 190)), 12, E=9, B=2, H=4, G=2, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = torch.tensor([[0.5, 0.25, 0.125, 0.0]], dtype=wide) if kind in ("slopes", "all") else None
    mask = heads(1, 4, q.shape[2], k.shape[2], dtype=dtype, seed=9) if kind == "all" else None
    dy = heads(2, 4, q.shape[2], 9, dtype=dtype, seed=3)

    def defined(q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Tensor:
        return definition(q, k, v, extras.mask, extras.slopes, None, None, None, 0.0, score)

    def run(function: Any, some: torch.dtype) -> Any:
        args = [q.to(some), k.to(some), v.to(some), *([mask.to(some)] if mask is not None else [])]
        extras = Extras(slopes=None if slopes is None else slopes.to(torch.float64 if some == torch.float64 else wide))
        return gradients(lambda q, k, v, m=None: function(q, k, v, extras._replace(mask=m)), *args, dy=dy.to(some))

    ours = run(lambda q, k, v, extras: attend(q, k, v, extras, 0.0, score), dtype)
    theirs, exact = (run(defined, some) for some in (dtype, torch.float64))
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert relative_error(a, c) <= allowed_error(relative_error(b, c), dtype, gradient=i > 0), f"{kind}: result {i}"


@each_dtype_if_fast
def test_packed_sequences_are_each_by_itself(dtype: torch.dtype) -> None:
    """Sequences of any lengths one behind the other: each is what it is alone, in every bit, and no gradient crosses a boundary."""
    lengths = [(5, 7), (0, 3), (9, 0), (70, 33), (1, 1)] if not SMALL else [(5, 7), (0, 3), (4, 0)]
    L, S = sum(a for a, _ in lengths), sum(b for _, b in lengths)
    starts = [torch.tensor([0, *some]).cumsum(0) for some in zip(*lengths)]
    q, k, v = qkv(L, S, 8, H=4, G=2, dtype=dtype)
    dy = heads(1, 4, L, 8, dtype=dtype, seed=4)
    for score in (Score(0.4), Score(0.4, right=0), Score(0.4, left=3, right=0, lower_right=True)):
        packed = gradients(partial(attend, extras=Extras(None, None, *starts), p=0.0, score=score), q, k, v, dy=dy)
        l = s = 0
        for a, b in lengths:
            some = (t[:, :, x : x + n] for t, x, n in ((q, l, a), (k, s, b), (v, s, b)))
            alone = gradients(partial(attend, extras=Extras(), p=0.0, score=score), *some, dy=dy[:, :, l : l + a])
            for whole, part, x, n in zip(packed, alone, (l, l, s, s), (a, a, b, b), strict=True):
                assert torch.equal(whole[:, :, x : x + n], part), f"sequence of {a} queries and {b} keys, {score}"
            l, s = l + a, s + b
        exact = definition(q.double(), k.double(), v.double(), None, None, starts[0], starts[1], None, 0.0, score)
        assert relative_error(packed[0], exact) <= allowed_error(torch.finfo(dtype).eps, dtype, gradient=False)
