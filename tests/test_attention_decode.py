"""Attention while writing: few queries beside many keys, and the cache in which these lie."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from support import SMALL, each_dtype, each_dtype_if_fast, threads
from test_attention import OPTIONS, check, heads, native, qkv
from torch import Tensor

import dlkernels
import dlkernels.functional as F
from dlkernels.backend import TRITON_ON_CPU
from dlkernels.bench.check import allowed_error, relative_error
from dlkernels.models.gpt import GPT
from dlkernels.nn import KVCache
from dlkernels.ops.scaled_dot_product_attention import attend
from dlkernels.ops.scaled_dot_product_attention_raw import Extras, Score, forward
from dlkernels.ops.scaled_dot_product_attention_reference import definition

KEYS = 70 if SMALL else 1300  # several parts, the last one ragged


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize(("L", "H", "G"), [(1, 2, 2), (1, 6, 2), (2, 3, 1), (5, 2, 2), (3, 8, 2), (8, 2, 1), (9, 2, 1)])
def test_few_queries(L: int, H: int, G: int, dtype: torch.dtype) -> None:
    """One row, rows that fill a tile or do not, and the first number of queries that goes the other way."""
    for S in sorted({min(S, KEYS) for S in (1, 15, 16, 129, 512, 513, KEYS)}):
        check(*qkv(L, S, 24, E=40, H=H, G=G, dtype=dtype), gqa=True)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("D", [1, 2, 15, 16, 31, 64, 80, 127, 256])
def test_any_head_size(D: int, dtype: torch.dtype) -> None:
    """The forward: the backward is that of any other number of queries."""
    for q, k, v in (qkv(1, 67, D, E=257 - D, dtype=dtype), qkv(2, 67, D, E=max(1, D - 3), H=4, G=2, dtype=dtype)):
        exact = native(q.double(), k.double(), v.double(), enable_gqa=True)
        theirs = relative_error(native(q, k, v, enable_gqa=True), exact)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert relative_error(y, exact) <= allowed_error(theirs, dtype, gradient=False)


@each_dtype_if_fast
@pytest.mark.parametrize("shape", [(1, KEYS), (1, 1), (2, 1, 1, KEYS), (2, 4, 1, 1), (4, 1, KEYS)], ids=str)
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Boolean and additive, of any strides."""
    q, k, v = qkv(1, KEYS, 8, B=2, H=4, G=2, dtype=dtype)
    seen = torch.rand(shape) > 0.3
    for mask in (seen, heads(*shape, dtype=dtype, seed=5), torch.where(seen, 0.0, -math.inf).to(dtype)):
        check(q, k, v, mask, gqa=True)
    check(q, k, v, heads(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=6)[..., ::2], gqa=True)


@each_dtype
@pytest.mark.parametrize("kind", OPTIONS)
def test_score_functions(kind: str, dtype: torch.dtype) -> None:
    """Window, soft cap and slopes, for y and lse: the definition in float64, against what the definition makes of it in this type."""
    score = OPTIONS[kind]
    q, k, v = qkv(2, KEYS, 12, E=9, B=2, H=4, G=2, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = torch.tensor([[0.05, 0.025, 0.0125, 0.0]], dtype=wide) if kind in ("slopes", "all") else None
    y, lse = forward(q, k, v, *Extras(slopes=slopes), 0.0, *score)
    exact_slopes = Extras(slopes=None if slopes is None else slopes.double())
    theirs = definition(q, k, v, *Extras(slopes=slopes), 0.0, score)
    exact = definition(q.double(), k.double(), v.double(), *exact_slopes, 0.0, score)
    assert relative_error(y, exact) <= allowed_error(relative_error(theirs, exact), dtype, gradient=False)
    sums = forward(q.double(), k.double(), v.double(), *exact_slopes, 0.0, *score)[1]
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)


def test_lse() -> None:
    q, k, v = qkv(2, KEYS, 12, H=4, G=2)
    z = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.3
    lse = forward(q, k, v, *Extras(), 0.0, *Score(0.3))[1]
    torch.testing.assert_close(lse.double(), z.logsumexp(-1), rtol=1e-6, atol=1e-6)


@each_dtype_if_fast
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_gets_through_a_mask(bad: float, dtype: torch.dtype) -> None:
    """A NaN or an infinity in a key or a value reaches those of the rows that see it, and nobody else."""
    S = 12 if SMALL else KEYS
    q, k, v = qkv(2, S, 8, H=4, G=2, dtype=dtype)
    seen = torch.rand(1, 4, 2, S) > 0.4
    at = S - 2
    seen[..., at] = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    causal = torch.ones(2, S, dtype=torch.bool).tril(S - 2)
    for extras, score, sees in (
        (Extras(seen), Score(0.35), seen[..., at]),
        (Extras(torch.where(seen, 0.1, -math.inf).to(dtype)), Score(0.35), seen[..., at]),
        (Extras(), Score(0.35, right=0, lower_right=True), causal[:, S - 1].expand(1, 4, 2)),
    ):
        place = at if extras.mask is not None else S - 1
        clean = attend(q, k, v, extras, 0.0, score)
        for spoiled in (1, 2):
            args = [q, k.clone(), v.clone()]
            args[spoiled][:, :, place, 2] = bad
            y = attend(args[0], args[1], args[2], extras, 0.0, score)
            assert torch.equal(y[~sees], clean[~sees])
            if spoiled == 2 or bad != bad:
                assert not y[sees].isfinite().all(-1).any()


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="the interpreter has one thread")
@each_dtype
def test_bits_depend_on_the_sizes_alone(dtype: torch.dtype) -> None:
    """Threads, strides, other rows of the batch and other heads change nothing."""
    q, k, v = qkv(1, KEYS, 64, B=3, H=4, G=2, dtype=dtype)
    call = partial(F.scaled_dot_product_attention, enable_gqa=True)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(call(q, k, v))
    lying = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    cached = [torch.empty(3, 2, 2 * KEYS, 64, dtype=dtype)[:, :, 7 : 7 + KEYS].copy_(t) for t in (k, v)]
    found += [call(*lying), call(q, *cached), torch.cat([call(q[b : b + 1], k[b : b + 1], v[b : b + 1]) for b in range(3)])]
    found.append(torch.cat([call(q[:, 2 * g : 2 * g + 2], k[:, g : g + 1], v[:, g : g + 1]) for g in range(2)], 1))
    assert all(torch.equal(found[0], other) for other in found[1:])


@each_dtype_if_fast
def test_a_spoiled_query_spoils_no_gradient_of_keys_that_it_does_not_see(dtype: torch.dtype) -> None:
    for L in (3, 40):
        q, k, v = (t.requires_grad_() for t in qkv(L, 50, 8, H=1, dtype=dtype))
        spoiled = q.detach().clone()
        spoiled[0, 0, 0, 0] = math.nan
        y = F.scaled_dot_product_attention(spoiled, k, v, is_causal=True)
        dk, dv = torch.autograd.grad(y, (k, v), torch.ones_like(y))
        assert y[0, 0, 0].isnan().all() and y[0, 0, 1:].isfinite().all()
        assert dk[0, 0, 1:, 1:].isfinite().all() and dv[0, 0, 1:].isfinite().all() and dv[0, 0, 0].isnan().all()


# ---- the cache ---------------------------------------------------------------------------------------------------------------


def caches(dtype: torch.dtype = torch.float32, C: int = 9, D: int = 5, E: int = 3, transposed: bool = False) -> tuple[Tensor, Tensor]:
    made = tuple(torch.full((2, C, 3, n) if transposed else (2, 3, C, n), 7.0, dtype=dtype) for n in (D, E))
    return tuple(t.transpose(1, 2) for t in made) if transposed else made  # type: ignore[return-value]


def tokens(T: int, dtype: torch.dtype = torch.float32, D: int = 5, E: int = 3) -> tuple[Tensor, Tensor]:
    return heads(2, 3, T, D, dtype=dtype), heads(2, 3, T, E, dtype=dtype, seed=1)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("transposed", [False, True])
def test_append(transposed: bool, dtype: torch.dtype) -> None:
    """What is new is written, at one place or at one for each row, and nothing else; the version of the caches moves."""
    key, value = tokens(2, dtype)
    some = key.transpose(0, 1).contiguous().transpose(0, 1), value.repeat(1, 1, 1, 2)[..., ::2]
    for position, starts in ((0, (0, 0)), (7, (7, 7)), (torch.tensor([4, 1]), (4, 1)), (torch.tensor([4, 9, 1])[::2], (4, 1))):
        for k, v in ((key, value), (some[0], some[1])):
            found, wanted = caches(dtype, transposed=transposed), caches(dtype)
            versions = [t._version for t in found]
            assert F.kv_cache_append_(*found, k, v, position) is None
            for b, p in enumerate(starts):
                wanted[0][b, :, p : p + 2], wanted[1][b, :, p : p + 2] = k[b], v[b]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert [t._version for t in found] == [n + 1 for n in versions]


def test_appending_nothing() -> None:
    for T, D, E in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        F.kv_cache_append_(*caches(D=D, E=E), *tokens(T, D=D, E=E), 9 - T)
    empty = torch.empty(0, 3, 4, 5)
    F.kv_cache_append_(empty, empty.clone(), empty[:, :, :2], empty[:, :, :2], 1)


def test_append_while_gradients_are_recorded() -> None:
    key, value = (t.requires_grad_() for t in tokens(2))
    found = caches()
    F.kv_cache_append_(*found, key, value, torch.tensor([4, 1]))
    assert torch.equal(found[0][0, :, 4:6], key[0])
    (found[0].sum() + 2 * found[1].sum()).backward()
    torch.testing.assert_close((key.grad, value.grad), (torch.ones_like(key), 2 * torch.ones_like(value)))


def test_append_in_a_graph() -> None:
    """The schema says what is changed, so a graph keeps the order of writing and reading."""
    torch._dynamo.reset()

    def step(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, position: int) -> Tensor:
        before = key_cache.sum()
        F.kv_cache_append_(key_cache, value_cache, key * 2, value, position)
        return key_cache.sum() - before + value_cache.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for position in (0, 3, 5):
        ours, theirs = caches(), caches()
        torch.testing.assert_close(compiled(*ours, *tokens(2), position), step(*theirs, *tokens(2), position))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for positions in (None, torch.tensor([1, 0])):
        torch.library.opcheck(torch.ops.dlkernels.kv_cache_append_.default, (*caches(), *tokens(2), 1, positions))


K, V = tokens(2)
FULL = caches()
REFUSED: dict[str, tuple[tuple[Any, ...], type[Exception], tuple[str, ...]]] = {
    "too far": ((*FULL, K, V, 8), IndexError, ("position 8", "out of range", "2 tokens", "9 places")),
    "negative": ((*FULL, K, V, -1), IndexError, ("position -1",)),
    "more tokens than places": ((*FULL, *tokens(10), 0), IndexError, ("10 tokens",)),
    "the second row too far": ((*FULL, K, V, torch.tensor([0, 8])), IndexError, ("position 8",)),
    "far beyond 64 bits": ((*FULL, K, V, torch.tensor([0, 2**63 - 1])), IndexError, ("position 9223372036854775807",)),
    "3 dimensions": ((*FULL, K[0], V, 0), RuntimeError, ("key ", "4 dimensions")),
    "other heads": ((*FULL, K[:, :2], V, 0), RuntimeError, ("key ", "(2, 2, 2, 5)", "(2, 3, 2, 5)")),
    "fewer values": ((*FULL, K, V[:, :, :1], 0), RuntimeError, ("value ", "(2, 3, 1, 3)")),
    "caches of two lengths": ((FULL[0], FULL[1][:, :, :8], K, V, 0), RuntimeError, ("value_cache", "(2, 3, 8, 3)")),
    "dtypes": ((*FULL, K.double(), V, 0), RuntimeError, ("key ", "float64", "float32")),
    "devices": ((*FULL, K, V.to("meta"), 0), RuntimeError, ("value ", "meta")),
    "positions of int32": ((*FULL, K, V, torch.tensor([0, 1], dtype=torch.int32)), RuntimeError, ("position ", "int32")),
    "3 positions": ((*FULL, K, V, torch.tensor([0, 1, 2])), RuntimeError, ("position ", "(3,)", "(2,)")),
    "position a float": ((*FULL, K, V, 1.0), TypeError, ("position", "float")),
    "key a list": ((*FULL, [1.0], V, 0), TypeError, ("key", "list")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_written(case: str) -> None:
    args, kind, words = REFUSED[case]
    if TRITON_ON_CPU and kind is IndexError and isinstance(args[4], Tensor):
        pytest.skip("a GPU's launcher doesn't look at numbers that lie there")
    for recorded in (False, True):
        some = [t.detach().requires_grad_(recorded and t is K) if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
        with pytest.raises(kind) as error:
            F.kv_cache_append_(*some)
        assert all(word in str(error.value) for word in words), str(error.value)
        assert all((t == 7).all() for t in FULL)


def test_the_raw_op_refuses_what_the_contract_does_not_pass() -> None:
    raw = torch.ops.dlkernels.kv_cache_append_
    for args, word in (
        ((*FULL, K, V, 8, None), "position 8"),
        ((FULL[0], FULL[1][..., :2], K, V, 0, None), "value"),
        ((*FULL, K, V.double(), 0, None), "value"),
        ((*FULL, K, V, 0, torch.tensor([0])), "positions"),
        ((K[:, :, :1].expand(2, 3, 9, 5), FULL[1], K, V, 0, None), "key_cache"),
        ((FULL[0].mT.contiguous().mT, FULL[1], K, V, 0, None), "key_cache"),
    ):
        if TRITON_ON_CPU and word == "key_cache":
            continue
        with pytest.raises(RuntimeError, match=word):
            raw(*args)
        assert all((t == 7).all() for t in FULL)


def test_kv_cache() -> None:
    cache = KVCache(5)
    parts = [tokens(n, torch.float64) for n in (2, 1, 2)]
    for k, v in parts:
        keys, values = cache.append(k, v)
    assert torch.equal(keys, torch.cat([k for k, _ in parts], 2)) and torch.equal(values, torch.cat([v for _, v in parts], 2))
    assert keys.data_ptr() == cache.keys.data_ptr() and repr(cache) == "KVCache(5 of 5)"
    with pytest.raises(ValueError, match="key has 1 tokens, and the cache holds 5 of at most 5"):
        cache.append(*tokens(1, torch.float64))
    assert cache.length == 5 and torch.equal(cache.keys, keys)
    other = KVCache(5)
    other.append(*tokens(2))
    for key, value, word in ((*tokens(1, torch.float64), "key"), (K[:1, :, :1], V[:1, :, :1], "key"), (K, V[:, :, :1], "value")):
        with pytest.raises(RuntimeError, match=word):
            other.append(key, value)
        assert other.length == 2
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="context"):
            KVCache(wrong)


@pytest.mark.skipif(SMALL, reason="what the kernels compute is tested op by op")
@pytest.mark.parametrize("nn", [dlkernels.nn, torch.nn], ids=["ours", "native"])
def test_writing_with_the_cache_gives_the_tokens_of_writing_without(nn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 tokens, more than a part of the keys; and nothing is joined with torch.cat, which the native twin of rope needs."""
    model = GPT(11, 600, 16, 2, 2, dropout=0.0, nn=nn).double().eval()
    torch.nn.init.normal_(model.embed.weight, std=0.3)
    prompt = torch.randint(11, (2, 590), generator=torch.Generator().manual_seed(0))
    wanted = prompt
    with torch.no_grad():
        for _ in range(10):
            wanted = torch.cat([wanted, model(wanted)[:, -1:].argmax(-1)], 1)
        if nn is dlkernels.nn:
            monkeypatch.setattr(torch, "cat", None)
        assert torch.equal(model.generate(prompt, 10, temperature=0), wanted)
