"""varlen_attention: packed sequences, each for itself. What is right is attention of every sequence alone, as test_attention_variants.py
writes it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import SMALL, RawCalls, each_dtype, each_dtype_if_fast, threads
from test_attention import gradients, heads, qkv
from test_attention_variants import OPTIONS, assert_as_written_out, assert_refused, written_out
from torch import Tensor

import dlkernels.functional as F


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


LENGTHS = [(5, 7), (0, 3), (9, 0), (70, 33), (1, 1), (0, 0)] if not SMALL else [(5, 7), (0, 3), (4, 0)]


def packed(dtype: torch.dtype, D: int = 8, E: int = 5, H: int = 4, G: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """(query, key, value), (cu_seqlens_q, cu_seqlens_k)"""
    (L, S), starts = (sum(some) for some in zip(*LENGTHS)), [torch.tensor([0, *some]).cumsum(0) for some in zip(*LENGTHS)]
    return [heads(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((L, H, D), (S, G, D), (S, G, E)))], starts


def alone(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``call`` of (1, H, L, D) ..., once for every sequence."""
    lengths, keys = zip(*LENGTHS, strict=True)
    parts = zip(q.split(lengths), k.split(keys), v.split(keys), strict=True)
    return torch.cat([call(*(t.transpose(0, 1)[None] for t in part))[0].transpose(0, 1) for part in parts])


@each_dtype
@pytest.mark.parametrize("kind", OPTIONS)
def test_packed_options(kind: str, dtype: torch.dtype) -> None:
    options = OPTIONS[kind] | {"enable_gqa": True}
    args, starts = packed(dtype)
    right = lambda *a: alone(lambda *b: written_out(*b, **options), *a)  # noqa: E731
    assert_as_written_out(lambda *a: F.varlen_attention(*a, *starts, **options), right, *args)


@each_dtype_if_fast
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_sequence_gets_the_bits_that_it_gets_alone(kind: str, dtype: torch.dtype) -> None:
    """In either order in memory, from int32 too; and gradients likewise."""
    options = OPTIONS[kind] | {"enable_gqa": True}
    args, starts = packed(dtype)
    wanted = gradients(lambda *a: alone(lambda *b: F.attention(*b, **options), *a), *args)
    by_head = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in args]
    for some, cut in ((args, starts), (by_head, [t.int() for t in starts])):
        found = gradients(lambda *a, cut=cut: F.varlen_attention(*a, *cut, **options), *some)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_padding_is_neither_made_nor_computed() -> None:
    """What reaches the kernel are the tokens, where they lie, and nothing else."""
    (q, k, v), starts = packed(torch.float32)
    with RawCalls() as recorded:
        y = F.varlen_attention(q, k, v, *starts, 70, 33, enable_gqa=True)
    ((_, made),) = recorded.calls
    assert [t.data_ptr() for t in made[:3]] == [t.data_ptr() for t in (q, k, v)]
    assert made[0].shape == (1, 4, q.shape[0], 8) and made[1].shape == (1, 2, k.shape[0], 8)
    assert y.is_contiguous()


@each_dtype_if_fast
def test_numbers_of_other_sequences_do_not_come_through(dtype: torch.dtype) -> None:
    args, starts = packed(dtype)
    for options in ({}, {"causal": True, "softcap": 2.0}):
        call = lambda *a, options=options: F.varlen_attention(*a, *starts, enable_gqa=True, **options)  # noqa: E731
        clean = gradients(call, *args)
        for spoiled in range(3):
            some = [t.clone() for t in args]
            own = starts[min(spoiled, 1)]
            some[spoiled][own[0] : own[1]] = math.nan
            for i, (found, wanted) in enumerate(zip(gradients(call, *some), clean, strict=True)):
                end = int(starts[0 if i < 2 else 1][1])
                assert torch.equal(found[end:], wanted[end:])
                assert i > 0 or found[:end].isnan().any()


def test_no_sequence_and_no_token() -> None:
    for starts in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        args = [heads(0, 2, 4), heads(0, 2, 4), heads(0, 2, 3)]
        y, *grads = gradients(F.varlen_attention, *args, starts, starts)
        assert y.shape == (0, 2, 3) and [g.shape for g in grads] == [a.shape for a in args]
    no_key = heads(0, 2, 4)
    y, dq, dk, _ = gradients(F.varlen_attention, heads(3, 2, 4), no_key, no_key, torch.tensor([0, 3]), torch.tensor([0, 0]))
    assert not y.any() and not dq.any() and dk.shape == (0, 2, 4)


def test_dropout() -> None:
    (q, k, v), starts = packed(torch.float32)

    def run(seed: int, **options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return gradients(lambda *a: F.varlen_attention(*a, *starts, dropout_p=0.4, enable_gqa=True, **options), q, k, v)

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])
    eye = torch.eye(k.shape[0])[:, None].expand(-1, 2, -1)
    weights = F.varlen_attention(0 * q, k, eye, *starts, dropout_p=0.4, enable_gqa=True) if k.shape[0] <= 256 else None
    if weights is not None and not SMALL:
        share = (weights[:5, :, :7] != 0).float().mean()
        assert 0.4 < share < 0.8 and not weights[:5, :, 7:].any()
    assert not F.varlen_attention(q, k, v, *starts, dropout_p=1.0, enable_gqa=True).any()
    x = qkv(9, 9, 8)
    torch.manual_seed(0)
    a = F.attention(*x, dropout_p=0.5, window_size=(3, 0))
    torch.manual_seed(0)
    assert torch.equal(a, F.attention(*x, dropout_p=0.5, window_size=(3, 0))) and not torch.equal(a, F.attention(*x, window_size=(3, 0)))


def test_autocast() -> None:
    args, starts = packed(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.varlen_attention(*args, *starts, enable_gqa=True)
        z = F.attention(*qkv(5, 7, 8), causal=True)
    assert y.dtype == z.dtype == torch.bfloat16
    assert torch.equal(y, F.varlen_attention(*(t.bfloat16() for t in args), *starts, enable_gqa=True))


def test_one_graph_with_the_same_lengths_for_queries_and_keys() -> None:
    """torch.compile takes no tensor twice as an argument of one Function."""
    torch._dynamo.reset()

    def call(x: Tensor, starts: Tensor) -> Tensor:
        return F.varlen_attention(x, x, x, starts, starts, causal=True, softcap=3.0)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths in ([0, 3, 7], [0, 1, 1, 9]):
        x, starts = heads(lengths[-1], 2, 4), torch.tensor(lengths)
        for a, b in zip(gradients(compiled, x, starts), gradients(call, x, starts), strict=True):
            torch.testing.assert_close(a, b)



X, X3, STARTS = heads(7, 2, 4), heads(7, 3, 4), torch.tensor([0, 3, 7])
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "does not begin with 0": ((X, X, X, STARTS + 1, STARTS), {}, ValueError, ("cu_seqlens_q", "from 1", "from 0")),
    "decreases": ((X, X, X, STARTS, torch.tensor([0, 9, 7])), {}, ValueError, ("cu_seqlens_k[2] is 7", "9")),
    "negative": ((X, X, X, STARTS, torch.tensor([0, -2, 7])), {}, ValueError, ("cu_seqlens_k[1] is -2", "0")),
    "ends early": ((X, X, X, torch.tensor([0, 3, 6]), STARTS), {}, ValueError, ("cu_seqlens_q", "to 6", "7")),
    "ends late": ((X, X, X, STARTS, torch.tensor([0, 3, 2**40])), {}, ValueError, ("cu_seqlens_k", str(2**40), "7")),
    "of floats": ((X, X, X, STARTS.float(), STARTS), {}, RuntimeError, ("cu_seqlens_q", "float32", "int32 or int64")),
    "of bool": ((X, X, X, STARTS.bool(), STARTS), {}, RuntimeError, ("cu_seqlens_q", "bool")),
    "2-D": ((X, X, X, STARTS, STARTS[None]), {}, RuntimeError, ("cu_seqlens_k", "(1, 3)")),
    "empty": ((X, X, X, STARTS[:0], STARTS), {}, RuntimeError, ("cu_seqlens_q", "empty")),
    "fewer": ((X, X, X, STARTS[[0, 2]], STARTS), {}, RuntimeError, ("cu_seqlens_q", "2", "3")),
    "no sequence, but tokens": ((X, X, X, STARTS[:1], STARTS[:1]), {}, ValueError, ("cu_seqlens_q", "7")),
    "elsewhere": ((X, X, X, STARTS.to("meta"), STARTS), {}, RuntimeError, ("cu_seqlens_q", "meta", "cpu")),
    "a list": ((X, X, X, [0, 3, 7], STARTS), {}, TypeError, ("cu_seqlens_q", "list")),
    "None": ((X, X, X, STARTS, None), {}, TypeError, ("cu_seqlens_k", "None")),
    "longer than the longest": ((X, X, X, STARTS, STARTS, 4, 3), {}, ValueError, ("max_seqlen_k is 3", "4 tokens")),
    "the longest a text": ((X, X, X, STARTS, STARTS, "x"), {}, TypeError, ("max_seqlen_q", "'x'")),
    "query 4-D": ((X[None], X, X, STARTS, STARTS), {}, RuntimeError, ("query", "(1, 7, 2, 4)")),
    "value 2-D": ((X, X, X[0], STARTS, STARTS), {}, RuntimeError, ("value", "(2, 4)")),
    "fewer heads": ((X, X[:, :1], X[:, :1], STARTS, STARTS), {}, RuntimeError, ("key (7, 1, 4)", "enable_gqa=True")),
    "heads that do not divide": ((X, X3, X3, STARTS, STARTS), {"enable_gqa": True}, RuntimeError, ("key (7, 3, 4)", "divides")),
    "head size": ((X, X[..., :3], X, STARTS, STARTS), {}, RuntimeError, ("key (7, 2, 3)", "(T', G, D)")),
    "keys and values": ((X, X, X[:6], STARTS, STARTS), {}, RuntimeError, ("value (6, 2, 4)", "(T', G, E)")),
    "dtypes": ((X, X.double(), X, STARTS, STARTS), {}, RuntimeError, ("float64", "float32")),
    "slopes of every sequence": ((X, X, X, STARTS, STARTS), {"alibi_slopes": torch.ones(3, 2)}, RuntimeError, ("alibi_slopes", "(3, 2)")),
    "window": ((X, X, X, STARTS, STARTS), {"window_size": (-3, 0)}, ValueError, ("window_size", "-3")),
    "soft cap": ((X, X, X, STARTS, STARTS), {"softcap": -1}, ValueError, ("softcap", "-1")),
    "dropout": ((X, X, X, STARTS, STARTS, None, None, 2.0), {}, RuntimeError, ("dropout", "2.0")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    assert_refused(F.varlen_attention, *REFUSED[case])
