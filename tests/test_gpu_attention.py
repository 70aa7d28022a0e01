"""The Triton launchers of attention: tiles, windows, masks and their gradients, shares of keys. Where they run: launchers.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from launchers import DEVICE, DTYPES, elsewhere, here, passes_in_the_interpreter, quiet
from torch import Tensor

from dlkernels.ops.scaled_dot_product_attention_raw import Extras, Score
from dlkernels.ops.scaled_dot_product_attention_reference import definition
from dlkernels.ops.score_functions import code_of

pytestmark = quiet
EPS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.slow
@elsewhere
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs of 32 positions that go over 16 at a time: whole tiles, edges, and both sides of a window, at sizes of an interpreter."""
    from dlkernels.gpu import scaled_dot_product_attention as launchers
    from dlkernels.gpu.attention_plan import width
    from dlkernels.gpu.config import Config

    monkeypatch.setattr(launchers, "choose", lambda k, kind, own, others, head, device: Config(32, 16, width(head), 1, 4, 1, 1))
    yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def qkv(
    L: int, S: int, D: int, E: int, B: int = 1, H: int = 2, G: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(B, H, L, D), (B, G, S, D), (B, G, S, E)]))
    return q, k, v


def ours(q: Tensor, k: Tensor, v: Tensor, extras: Extras, p: float, score: Score, dy: Tensor) -> list[Tensor]:
    """[y, dq, dk, dv] and, of an additive mask, dmask; by the launchers."""
    from dlkernels.gpu import scaled_dot_product_attention as launchers

    options = (*extras, p, *score)
    y, lse = launchers.forward(q, k, v, *options)
    needs = (True, True, True, extras.mask is not None and extras.mask.dtype != torch.bool)
    return [y, *(t for t in launchers.backward(dy, q, k, v, y, lse, *options, *needs) if t is not None)]


def exact(q: Tensor, k: Tensor, v: Tensor, extras: Extras, p: float, score: Score, dy: Tensor) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    if extras.mask is not None and extras.mask.dtype != torch.bool:
        leaves.append(extras.mask.double().requires_grad_())
        extras = extras._replace(mask=leaves[3])
    q, k, v = leaves[:3]
    y = definition(q, k, v, *extras, p, score)
    return [y, *torch.autograd.grad(y, leaves, dy.double())]


NOTHING, PLAIN = Extras(), Score(0.3)


def check(q: Tensor, k: Tensor, v: Tensor, extras: Extras = NOTHING, p: float = 0.0, score: Score = PLAIN) -> None:
    dy = randn(*q.shape[:3], v.shape[3], dtype=q.dtype, seed=3)
    args = q, k, v, extras, p, score, dy
    for name, found, wanted in zip(("y", "dq", "dk", "dv", "dmask"), ours(*args), exact(*args)):
        assert found.shape == wanted.shape
        least = dy.abs().max() if name == "dmask" else 1e-30  # that of a number that all keys share is 0 but for rounding
        error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=float(least))
        assert error <= 4 * EPS[q.dtype], f"{name}: {error}"


SOFTCAP = code_of("softcap")
SCORES = {
    "everything": Score(0.3),
    "negative scale": Score(-0.3),
    "causal": Score(0.3, right=0),
    "causal, lower right": Score(0.3, right=0, lower_right=True),
    "window": Score(0.3, left=20, right=5),
    "narrow window, lower right": Score(0.3, left=3, right=0, lower_right=True),
    "soft cap": Score(1.3, SOFTCAP, 1.5),
}


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_whole_tiles_and_edges(kind: str, dtype: torch.dtype, small_tiles: None) -> None:
    check(*qkv(53, 75, 9, 17, H=2, G=1, dtype=dtype), score=SCORES[kind])


@here
@pytest.mark.parametrize("shape", [(1, 1, 41, 37), (2, 1, 1, 37), (1, 3, 41, 1), (2, 3, 41, 37), (1, 1, 1, 1)], ids=str)
def test_masks_and_their_gradients(shape: tuple[int, ...], small_tiles: None) -> None:
    q, k, v = qkv(41, 37, 5, 8, B=2, H=3, G=3)
    check(q, k, v, Extras(randn(*shape, seed=7)))
    seen = randn(*shape, seed=8) > -0.5
    check(q, k, v, Extras(torch.where(seen, 0.5, -math.inf)), score=Score(0.3, right=4))
    check(q, k, v, Extras(seen.mT.contiguous().mT), score=Score(0.3, left=9))


@here
@pytest.mark.parametrize("rows", [16, 64])
def test_dropout_has_the_numbers_of_the_other_twin(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of 64 queries four numbers come from a counter, in others and in packed sequences one. A mask's gradient knows them too."""
    from dlkernels.gpu import scaled_dot_product_attention as launchers
    from dlkernels.gpu.config import Config

    monkeypatch.setattr(launchers, "choose", lambda k, *_: Config(*((16, rows) if k == "dkey" else (rows, 16)), 16, 1, 4, 1, 1))
    seed = torch.tensor([0x0123456789ABCDEF], device=DEVICE)
    q, k, v = qkv(70, 21, 5, 8, H=2, G=1)
    check(q, k, v, Extras(seed=seed), 0.4)
    check(q, k, v, Extras(randn(1, 1, 70, 21, seed=9), seed=seed), 0.4)
    starts, cu_seqlens_k = (torch.tensor(some, device=DEVICE) for some in ([0, 33, 70], [0, 20, 21]))
    check(q, k, v, Extras(None, None, starts, cu_seqlens_k, seed), 0.4)


@here
def test_packed_sequences_and_slopes(small_tiles: None) -> None:
    lengths = [(0, 3), (33, 16), (1, 0), (40, 41), (0, 0), (2, 5)]
    starts = [torch.tensor([0, *some], device=DEVICE).cumsum(0) for some in zip(*lengths)]
    q, k, v = qkv(76, 65, 9, 5, H=2, G=1)
    slopes = torch.tensor([[0.5, 0.25]], device=DEVICE)
    for score in (Score(0.3), Score(0.3, left=11, right=0, lower_right=True)):
        check(q, k, v, Extras(None, slopes, *starts), score=score)


@here
def test_starts_that_are_none_stay_in_bounds(small_tiles: None) -> None:
    q, k, v = qkv(9, 11, 4, 4)
    for wrong in ([-5, 3, 400], [7, 2, 9], [2**40, -(2**40), 2**62]):
        starts = torch.tensor(wrong, device=DEVICE)
        ours(q, k, v, Extras(None, None, starts, starts), 0.0, Score(0.3), randn(1, 2, 9, 4))
    starts = torch.tensor([0, 3, 5], device=DEVICE)
    for result in ours(q, k, v, Extras(None, None, starts, starts), 0.0, Score(0.3), randn(1, 2, 9, 4)):
        assert not result[:, :, 5:].any() and result[:, :, :5].isfinite().all(), "tokens in no sequence get zeros"


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_out_keys(dtype: torch.dtype, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many shares as there are blocks, and fewer; one that sees nothing; heads that are taken for rows."""
    from dlkernels.gpu import scaled_dot_product_attention as launchers

    for wanted in (2, 5):
        monkeypatch.setattr(launchers, "shares", lambda *_, wanted=wanted: wanted)
        check(*qkv(3, 75, 9, 17, B=2, dtype=dtype), score=Score(0.3, right=40))
        check(*qkv(1, 75, 9, 17, B=2, H=6, dtype=dtype))
        mask = torch.arange(75, device=DEVICE) > 70
        check(*qkv(1, 75, 9, 17, H=4, dtype=dtype), Extras(mask[None, None, None]))


@here
@pytest.mark.parametrize("transposed", [False, True])
def test_heads_that_read_the_same_keys_are_rows_of_one_tile(transposed: bool) -> None:
    from dlkernels.gpu import scaled_dot_product_attention as launchers

    q, k, v = qkv(1, 40, 8, 5, B=2, H=6)
    q = q.transpose(1, 2).contiguous().transpose(1, 2) if transposed else q
    options: Any = Score(0.3, right=0, lower_right=True)
    wanted = launchers.Call(q, k, v, *Extras(), 0.0, *options)
    assert wanted.heads_are_rows(*Extras(), 0.0, *options)
    y, lse = launchers.forward(q, k, v, *Extras(), 0.0, *options)
    z = 0.3 * q.double() @ k.double().repeat_interleave(3, 1).mT
    torch.testing.assert_close(lse.double(), z.logsumexp(-1))
    torch.testing.assert_close(y.double(), z.softmax(-1) @ v.double().repeat_interleave(3, 1), rtol=1e-5, atol=1e-5)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_go_behind_those_in_a_cache(dtype: torch.dtype) -> None:
    """From one place on, or from one for each row; of any strides. A row whose tokens would not fit, as a tensor says, is left out."""
    from dlkernels.gpu.kv_cache import append

    key, value = randn(3, 2, 2, 5, dtype=dtype), randn(3, 2, 2, 80, dtype=dtype, seed=1)
    key = key.transpose(0, 2).contiguous().transpose(0, 2)
    for starts, fits in (([4, 4, 4], [0, 1, 2]), ([7, 0, 3], [0, 1, 2]), ([8, 2, -1], [1]), ([2**63 - 1, -(2**63), 7], [2])):
        a, b = (torch.full((3, 9, 2, n), 7.0, dtype=dtype, device=DEVICE).transpose(1, 2) for n in (5, 80))
        wanted = a.clone(), b.clone()
        for i, (cache, new) in itertools.product(fits, zip(wanted, (key, value), strict=True)):
            cache[i, :, starts[i] : starts[i] + 2] = new[i]
        positions = None if starts == [4, 4, 4] else torch.tensor(starts, device=DEVICE)
        append(a, b, key, value, 4, positions)
        assert torch.equal(a, wanted[0]) and torch.equal(b, wanted[1])
    with pytest.raises(RuntimeError, match="position 8 is out of range: key has 2 tokens, and key_cache has 9 places"):
        append(a, b, key, value, 8, None)


@here
def test_infinities_and_nans_go_where_they_are_seen(small_tiles: None) -> None:
    """A value of inf reaches y as inf, of its sign, beside a mask as without one; what isn't seen doesn't."""
    q, k, v = qkv(3, 40, 4, 4)
    v[0, 0, 20, 1], v[0, 0, 21, 2], v[0, 0, 22, 3], v[0, 1, 2, 0] = math.inf, -math.inf, math.nan, math.nan
    seen = torch.ones(1, 1, 3, 40, dtype=torch.bool, device=DEVICE)
    seen[0, 0, 1, 20:23] = seen[0, 0, :, 2] = False
    y = ours(q, k, v, Extras(seen), 0.0, Score(0.3), torch.ones_like(q))[0]
    assert y[0, 1].isfinite().all() and y[0, 0, 1].isfinite().all() and y[0, 0, :, 0].isfinite().all()
    assert (y[0, 0, [0, 2], 1] == math.inf).all() and (y[0, 0, [0, 2], 2] == -math.inf).all() and y[0, 0, [0, 2], 3].isnan().all()


def test_the_plan_shares_keys_out_where_queries_are_few() -> None:
    pytest.importorskip("triton")
    from dlkernels.gpu.attention_plan import choose, shared_bytes, shares
    from dlkernels.gpu.launch import Device

    h100 = Device("H100", 132, 227 << 10)
    assert shares(8, 4096, 64, h100) == 16  # 8 heads decode beside 4096 keys: 256 keys to each of 128 programs
    assert shares(8, 300, 64, h100) == 1 and shares(128, 4096, 64, h100) == 1 and shares(0, 10, 64, h100) == 1
    assert 1 <= shares(1, 10**7, 64, h100) <= 64
    kinds = ("half", "tf32", "float", "double")
    for kernel, head, kind in itertools.product(("forward", "dquery", "dkey", "dmask"), (0, 1, 64, 80, 256), kinds):
        for device in (h100, Device("A100", 108, 163 << 10)):
            c = choose(kernel, kind, 4096, 17, head, device)
            assert shared_bytes(kernel, kind, c) <= device.shared and c.depth >= max(head, 16) and c.cols <= 32
