"""attention: windows, ALiBi, soft caps. What every op shares is tested in test_ops.py.

What is right is written out here, in float64, with a matrix of scores and a mask that says which keys are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import SMALL, RawCalls, each_dtype, each_dtype_if_fast, threads
from test_attention import gradients, heads, qkv
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import dlkernels.functional as F
from dlkernels import explain
from dlkernels.bench.check import allowed_error, relative_error, scale_of


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def written_out(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None, softcap: float = 0.0, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of (*, H, L, D), (*, G, S, D) and (*, G, S, E)."""
    L, S, (left, right) = q.shape[-2], k.shape[-2], window_size
    k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) if enable_gqa else t for t in (k, v))
    behind = torch.arange(S - L, S)[:, None] - torch.arange(S)
    hidden = torch.zeros(L, S, dtype=torch.bool)
    if left >= 0:
        hidden |= behind > left
    if right >= 0 or causal:
        hidden |= -behind > (0 if causal else right)
    z = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        z = softcap * (z / softcap).tanh()
    if alibi_slopes is not None:
        z = z - alibi_slopes.to(z.dtype)[..., None, None] * behind.abs()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = hidden | ~attn_mask
    elif attn_mask is not None:
        z = z + attn_mask
    weights = z.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0) if S else z
    return weights @ v


def assert_as_written_out(function: Callable[..., Tensor], right: Callable[..., Tensor], *args: Tensor) -> None:
    """Values and gradients are as near to float64 as the rule of ``dlkernels.bench.check`` asks, beside ``right`` in this dtype."""
    dtype = args[0].dtype
    with torch.no_grad():
        dy = torch.randn(right(*args).shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    ours, theirs = gradients(function, *args, dy=dy), gradients(right, *args, dy=dy)
    exact = gradients(right, *(t.double() for t in args), dy=dy.double())
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        least = scale_of((dy,)) if i else 0.0
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a, c, least) <= allowed_error(relative_error(b, c, least), dtype, gradient=i > 0), f"result {i}"


SLOPES = torch.tensor([0.5, 0.25, 0.0, -0.125])
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_size": (7, 2)},
    "left": {"window_size": (7, -1), "scale": 0.4},
    "right": {"window_size": (-1, 3)},
    "one key": {"window_size": (0, 0)},
    "causal window": {"window_size": (7, 5), "causal": True},
    "wide window": {"window_size": (2**40, 2**62)},
    "slopes": {"alibi_slopes": SLOPES},
    "soft cap": {"softcap": 0.7, "scale": 1.3},
    "all": {"window_size": (40, 0), "alibi_slopes": SLOPES, "softcap": 2.0, "scale": -0.9},
}

@each_dtype
@pytest.mark.parametrize("kind", OPTIONS)
def test_options(kind: str, dtype: torch.dtype) -> None:
    options = OPTIONS[kind] | {"enable_gqa": True}
    for L, S in [(9, 14)] if SMALL else [(70, 190), (33, 33), (90, 41)]:
        args = qkv(L, S, 12, E=9, B=2, H=4, G=2, dtype=dtype)
        assert_as_written_out(lambda *a: F.attention(*a, **options), lambda *a: written_out(*a, **options), *args)


@each_dtype_if_fast
def test_masks_beside_options(dtype: torch.dtype) -> None:
    q, k, v = qkv(9, 14, 5, B=2, H=4, dtype=dtype)
    options: dict[str, Any] = {"window_size": (6, 2), "alibi_slopes": SLOPES, "softcap": 1.5}
    bias = heads(4, 9, 14, dtype=dtype, seed=5)
    assert_as_written_out(lambda *a: F.attention(*a, **options), lambda *a: written_out(*a, **options), q, k, v, bias)
    options["attn_mask"] = torch.rand(2, 1, 9, 14) > 0.3
    assert_as_written_out(lambda *a: F.attention(*a, **options), lambda *a: written_out(*a, **options), q, k, v)


def test_without_options_it_is_scaled_dot_product_attention() -> None:
    q, k, v = qkv(9, 13, 8, B=2, H=3)
    assert torch.equal(F.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(F.attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, causal_lower_right(9, 13)))
    assert torch.equal(F.attention(q, k, v, window_size=(-1, 0)), F.attention(q, k, v, causal=True))
    k, v = k[:, :, :9], v[:, :, :9]
    assert torch.equal(F.attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_slopes_of_every_shape() -> None:
    for lead in ((), (2,), (2, 3)):
        q, k, v = heads(*lead, 4, 5, 6), heads(*lead, 4, 7, 6, seed=1), heads(*lead, 4, 7, 3, seed=2)
        for slopes in (SLOPES, SLOPES.double(), SLOPES.half(), SLOPES.expand(*lead, 4), torch.rand(*lead, 4)):
            torch.testing.assert_close(F.attention(q, k, v, alibi_slopes=slopes), written_out(q, k, v, alibi_slopes=slopes))


def test_slopes_with_a_gradient_leave_the_kernel() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(4, 5, 3, H=4, dtype=torch.float64))
    slopes = SLOPES.double().requires_grad_()
    call = lambda q, k, v, slopes: F.attention(q, k, v, alibi_slopes=slopes, softcap=1.0)  # noqa: E731
    with RawCalls() as recorded:
        assert torch.autograd.gradcheck(call, (q, k, v, slopes), fast_mode=True)
        assert not recorded.calls
        call(q, k, v, slopes.detach())
        assert recorded.calls


def test_second_derivatives() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(4, 5, 3, dtype=torch.float64))
    options: dict[str, Any] = {"window_size": (2, 1), "alibi_slopes": SLOPES[:2].double(), "softcap": 0.8}
    assert torch.autograd.gradgradcheck(lambda *a: F.attention(*a, **options), (q, k, v), fast_mode=True)


def test_heads_wider_than_kernels_take_run_as_the_definition() -> None:
    q, k, v = qkv(4, 5, 300)
    assert "at most 256" in explain("attention", q, k, v, None, True, (-1, -1), False, 0.0, False).reason
    torch.testing.assert_close(F.attention(q, k, v, causal=True, softcap=2.0), written_out(q, k, v, causal=True, softcap=2.0))


@each_dtype_if_fast
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_window_hides_does_not_come_through(bad: float, dtype: torch.dtype) -> None:
    """Neither forward nor backward, also where the derivative of a score function is NaN."""
    q, k, v = qkv(9, 12, 8, dtype=dtype)
    for options in ({}, {"softcap": 1.5}, {"alibi_slopes": SLOPES[:2]}):
        call = lambda *a, options=options: F.attention(*a, window_size=(2, 0), **options)  # noqa: E731
        sees = torch.arange(9) >= 4  # query l stands at key l + 3 and sees l + 1 .. l + 3
        clean = gradients(call, q, k, v)
        for spoiled in (1, 2):
            args = [q, k.clone(), v.clone()]
            args[spoiled][:, :, :5, 2] = bad
            for found, wanted in zip(gradients(call, *args)[:2], clean[:2], strict=True):
                assert torch.equal(found[:, :, sees], wanted[:, :, sees])


@each_dtype_if_fast
def test_a_key_that_no_query_sees_has_no_gradient(dtype: torch.dtype) -> None:
    """However the number of queries is rounded up: to whole vectors, to pairs."""
    q, k, v = qkv(5, 9, 8, dtype=dtype)
    k[:, :, 3] = math.nan
    seen = (torch.arange(9) != 3).expand(5, 9).contiguous()
    _, dq, dk, dv = gradients(lambda *a: F.scaled_dot_product_attention(*a, seen), q, k, v)
    assert dq.isfinite().all() and not dk[:, :, 3].any() and not dv[:, :, 3].any()


# ---- what is refused ---------------------------------------------------------------------------------------------------------

Q, K, V = qkv(3, 5, 4)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "query a list": (([1.0], K, V), {}, TypeError, ("query", "list")),
    "slopes a list": ((Q, K, V), {"alibi_slopes": [0.5, 0.5]}, TypeError, ("alibi_slopes", "list")),
    "slopes of 3 heads": ((Q, K, V), {"alibi_slopes": torch.ones(3)}, RuntimeError, ("alibi_slopes", "(3,)", "(2,)", "(1, 2)")),
    "slopes of integers": ((Q, K, V), {"alibi_slopes": torch.ones(2).int()}, RuntimeError, ("alibi_slopes", "int32")),
    "slopes elsewhere": ((Q, K, V), {"alibi_slopes": torch.ones(2, device="meta")}, RuntimeError, ("alibi_slopes", "meta")),
    "window below -1": ((Q, K, V), {"window_size": (-2, 0)}, ValueError, ("window_size", "(-2, 0)", "-1")),
    "window of one": ((Q, K, V), {"window_size": (3,)}, ValueError, ("window_size", "(3,)")),
    "window a number": ((Q, K, V), {"window_size": 3}, ValueError, ("window_size", "3")),
    "window of floats": ((Q, K, V), {"window_size": (1.5, 0)}, ValueError, ("window_size", "1.5")),
    "soft cap below 0": ((Q, K, V), {"softcap": -1.0}, ValueError, ("softcap", "-1.0")),
    "soft cap NaN": ((Q, K, V), {"softcap": math.nan}, ValueError, ("softcap", "nan")),
    "soft cap infinite": ((Q, K, V), {"softcap": math.inf}, ValueError, ("softcap", "inf")),
    "soft cap None": ((Q, K, V), {"softcap": None}, ValueError, ("softcap", "None")),
    "no such function": ((Q, K, V), {"score_function": ("cosh", 1.0)}, ValueError, ("score_function", "cosh", "softcap")),
    "a function": ((Q, K, V), {"score_function": abs}, ValueError, ("score_function", "(name, number)")),
    "a function and a soft cap": ((Q, K, V), {"score_function": ("softcap", 1.0), "softcap": 2.0}, ValueError, ("softcap", "one of")),
    "causal text": ((Q, K, V), {"causal": "x"}, TypeError, ("causal", "'x'")),
    "scale text": ((Q, K, V), {"scale": "x"}, TypeError, ("scale", "'x'")),
    "dropout above 1": ((Q, K, V), {"dropout_p": 1.5}, RuntimeError, ("dropout", "1.5")),
    "dropout text": ((Q, K, V), {"dropout_p": "x"}, TypeError, ("dropout_p", "str")),
    "head size": ((Q, K[..., :3], V), {}, RuntimeError, ("key", "(1, 2, 5, 3)")),
    "keys and values": ((Q, K, V[:, :, :4]), {}, RuntimeError, ("value", "(1, 2, 4, 4)")),
    "dtypes": ((Q, K.double(), V), {}, RuntimeError, ("float64", "float32")),
    "integers": ((Q.int(), K.int(), V.int()), {}, RuntimeError, ("int32",)),
    "heads": ((Q, heads(1, 3, 5, 4), heads(1, 3, 5, 4)), {}, RuntimeError, ("(1, 3, 5, 4)",)),
    "heads that do not divide": ((heads(1, 3, 3, 4), K, V), {"enable_gqa": True}, RuntimeError, ("3 heads", "2 of key")),
    "elsewhere": ((Q, K.to("meta"), V), {}, RuntimeError, ("key", "meta")),
    "mask of integers": ((Q, K, V, torch.ones(3, 5).int()), {}, RuntimeError, ("attn_mask", "int32")),
    "mask shape": ((Q, K, V, torch.ones(3, 4)), {}, RuntimeError, ("attn_mask", "(3, 4)")),
    "mask a list": ((Q, K, V, [1.0]), {}, TypeError, ("attn_mask", "list")),
    "a bias of torch": ((Q, K, V, causal_lower_right(3, 5)), {}, TypeError, ("CausalBias", "causal=True")),
}


def assert_refused(function: Any, args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as error:
        function(*args, **options)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{str(error.value)!r} does not say {missing}"


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    assert_refused(F.attention, *REFUSED[case])
