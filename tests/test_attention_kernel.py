"""Attention's dropout, its memory, threads and autograd, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import SMALL, RawCalls, each_dtype_if_fast, run_child, threads
from test_attention import gradients, heads, native, qkv
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import dlkernels
import dlkernels.functional as F
from dlkernels.ops.scaled_dot_product_attention import attend
from dlkernels.ops.scaled_dot_product_attention_raw import Extras, Score


def weights_after_dropout(p: float, L: int = 130, S: int = 70) -> Tensor:
    """What is multiplied with the values: they are the unit vectors."""
    q, k, _ = qkv(L, S, 8, H=3)
    return F.scaled_dot_product_attention(0 * q, k, torch.eye(S).expand(1, 3, S, S), dropout_p=p)


def test_dropout_drops_that_many_and_keeps_the_mean() -> None:
    if SMALL:
        pytest.skip("too many numbers for the interpreter")
    for p in (0.1, 0.5, 0.9):
        w = 70 * weights_after_dropout(p)
        kept = w != 0
        assert abs(kept.float().mean() - (1 - p)) < 0.01
        torch.testing.assert_close(w[kept], torch.full_like(w[kept], 1 / (1 - p)))
        for dim in (1, 2, 3):  # every head, query and key drops about as many
            share = kept.float().mean([d for d in range(4) if d != dim])
            assert (share - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / (kept.numel() / kept.shape[dim]))
    assert not weights_after_dropout(1.0).any()


def test_dropout_is_drawn_from_torchs_generator_and_the_same_in_backward() -> None:
    q, k, v = qkv(9, 7, 8, dtype=torch.float64)

    def run(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.4), q, k, v)

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])

    def fixed(*args: Tensor) -> Tensor:
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(*args, dropout_p=0.4)

    args = [t.requires_grad_() for t in (q[:, :1, :4, :3].clone(), k[:, :1, :5, :3].clone(), v[:, :1, :5, :2].clone())]
    assert torch.autograd.gradcheck(fixed, args)
    assert torch.autograd.gradgradcheck(fixed, args)


def test_a_probability_of_0_drops_nothing() -> None:
    q, k, v = qkv(20, 70, 8)
    seed = torch.tensor([5])
    found = attend(q, k, v, Extras(seed=seed), 0.0, Score(8**-0.5))
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v))


# ---- memory, threads, autograd -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(SMALL, reason="the interpreter has no kernels of its own")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_linear_in_the_length(dtype: str) -> None:
    """16384 queries and keys, 8 heads of 64: less than 50 MB beside arguments and results, both ways. A window keeps it short."""
    source = f"""
import torch, resource, dlkernels.functional as F
from dlkernels.ops.scaled_dot_product_attention import attend
from dlkernels.ops.scaled_dot_product_attention_raw import Extras, Score
torch.set_num_threads(2)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
def run(T):
    x = torch.empty(1, T, 4, 8, 64, dtype=torch.{dtype}).normal_()
    q, k, v, dy = (x[:, :, i].transpose(1, 2) for i in range(4))
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    before = peak()
    grads = torch.autograd.grad(attend(q, k, v, Extras(), 0.0, Score(0.1, left=100, right=100)), (q, k, v), dy)
    return peak() - before - 4 * q.numel() * q.element_size()
run(256)
print(run(16384) / 1e6)
"""
    child = run_child(["-c", source], DLKERNELS_POOL_MIB="0")
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) < 50


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="the interpreter has one thread")
@each_dtype_if_fast
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    """Few heads and many keys, so that these are shared out too; many heads; causal; dropout; a mask with a gradient."""
    for H, T, causal in ((1, 1100, False), (2, 1100, True), (6, 130, False)):
        q, k, v = qkv(T, T, 16, H=H, dtype=dtype)
        mask = None if causal else heads(1, 1, 1, T, dtype=dtype, seed=8)
        found = []
        for count in (1, 2, 3):
            with threads(count):
                extras, score = Extras(mask, seed=torch.tensor([7])), Score(0.25, right=0 if causal else -1)
                args = [q, k, v] if mask is None else [q, k, v, mask]
                found.append(gradients(lambda q, k, v, m=None, e=extras, s=score: attend(q, k, v, e._replace(mask=m), 0.1, s), *args))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_only_gradients_that_are_needed_are_computed() -> None:
    args = (*qkv(9, 11, 8), heads(9, 11, seed=4))
    for wanted in range(4):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(args)]
        with RawCalls() as recorded:
            F.scaled_dot_product_attention(*leaves).sum().backward()
        (_, made) = recorded.calls[-1]
        assert list(made[-4:]) == [i == wanted for i in range(4)]
        results = recorded.calls[-1][0](*made)
        assert [r is not None for r in results] == [i == wanted for i in range(4)]


def test_explain() -> None:
    q, k, v = qkv(3, 5, 8)
    explain = dlkernels.backend.explain
    name = "scaled_dot_product_attention"
    assert explain(name, q, k, v).implementation != "reference"
    assert explain(name, q, k, v, torch.ones(3, 5, dtype=torch.bool)).implementation != "reference"
    assert "at most 256" in explain(name, *qkv(3, 5, 257)).reason
    assert "attn_mask" in explain(name, q, k, v, torch.ones(3, 5).int()).reason


# ---- what is refused ---------------------------------------------------------------------------------------------------------

Q, K, V = qkv(3, 5, 4)
BOOL = torch.ones(3, 5, dtype=torch.bool)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "1-D": ((Q[0, 0, 0], K, V), {}, ("query", "2 dimensions")),
    "head size": ((Q, K[..., :3], V), {}, ("key", "(1, 2, 5, 3)")),
    "heads": ((Q, heads(1, 3, 5, 4), heads(1, 3, 5, 4)), {}, ("(1, 3, 5, 4)", "broadcast")),
    "batch": ((heads(2, 2, 3, 4), heads(3, 2, 5, 4), heads(3, 2, 5, 4)), {}, ("(3, 2, 5, 4)", "broadcast")),
    "keys and values": ((Q, K, V[:, :, :4]), {}, ("value", "(1, 2, 4, 4)")),
    "dtypes": ((Q, K.double(), V), {}, ("float64", "float32")),
    "integers": ((Q.int(), K.int(), V.int()), {}, ("int32",)),
    "mask dtype": ((Q, K, V, BOOL.int()), {}, ("attn_mask", "int32")),
    "mask of another float": ((Q, K, V, BOOL.double()), {}, ("attn_mask", "float64")),
    "mask shape": ((Q, K, V, BOOL[:, :4]), {}, ("attn_mask", "(3, 4)")),
    "mask 1-D": ((Q, K, V, BOOL[0]), {}, ("attn_mask", "(5,)")),
    "mask of more batches": ((Q, K, V, BOOL.expand(3, 2, 3, 5)), {}, ("attn_mask", "(3, 2, 3, 5)")),
    "mask 5-D": ((Q, K, V, BOOL[None, None, None]), {}, ("attn_mask", "(1, 1, 1, 3, 5)")),
    "mask and causal": ((Q, K, V, BOOL), {"is_causal": True}, ("attn_mask", "is_causal")),
    "bias and causal": ((Q, K, V, causal_lower_right(3, 5)), {"is_causal": True}, ("attn_mask", "is_causal")),
    "bias of another size": ((Q, K, V, causal_lower_right(3, 4)), {}, ("attn_mask", "4 keys")),
    "heads that do not divide": ((heads(1, 3, 3, 4), K, V), {"enable_gqa": True}, ("3 heads", "2 of key")),
    "grouped 2-D": ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, ("heads",)),
    "dropout above 1": ((Q, K, V), {"dropout_p": 1.5}, ("dropout", "1.5")),
    "dropout below 0": ((Q, K, V), {"dropout_p": -0.1}, ("dropout", "-0.1")),
    "dropout NaN": ((Q, K, V), {"dropout_p": math.nan}, ("dropout", "nan")),
    "dropout text": ((Q, K, V), {"dropout_p": "x"}, ("dropout_p", "str")),
    "causal text": ((Q, K, V), {"is_causal": "x"}, ("is_causal", "str")),
    "scale text": ((Q, K, V), {"scale": "x"}, ("scale", "str")),
    "query a list": (([1.0], K, V), {}, ("query", "list")),
    "key None": ((Q, None, V), {}, ("key", "None")),
    "mask a list": ((Q, K, V, [[True]]), {}, ("attn_mask", "list")),
    "meta beside cpu": ((Q, K.to("meta"), V), {}, ("key", "meta")),
    "mask on meta": ((Q, K, V, BOOL.to("meta")), {}, ("attn_mask", "meta")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """Torch's kind of exception, or RuntimeError, and a message that names the argument and what it is. Nothing is changed."""
    args, options, words = REFUSED[case]
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as ours:
        F.scaled_dot_product_attention(*args, **options)
    missing = [word for word in words if word not in str(ours.value)]
    assert not missing, f"{str(ours.value)!r} does not say {missing}"
    if case not in ("keys and values", "mask and causal", "mask on meta"):  # torch reads beyond memory, or refuses on some paths only
        with pytest.raises(Exception) as theirs:
            native(*args, **options)
        assert isinstance(ours.value, (type(theirs.value), RuntimeError))


def test_raw_ops_check_what_the_contract_does_not() -> None:
    raw = torch.ops.dlkernels.scaled_dot_product_attention_forward
    options = (0.0, 1.0, 0, 0.0, -1, -1, False)
    none = (None,) * 5
    starts = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 5])
    assert raw(Q, K, V, None, None, *starts, None, *options)[0].isfinite().all()
    wrong: list[tuple[Any, str]] = [
        ((Q, K, V, None, None, starts[0], None, None), "cu_seqlens_k"),
        ((Q, K, V, None, None, starts[0], torch.tensor([0, 5]), None), "cu_seqlens_k"),
        ((Q, K, V, BOOL[None, None], None, *starts, None), "mask"),
        ((Q, K, V, None, torch.ones(3), None, None, None), "slopes"),
        ((Q, K, V, None, torch.ones(1, 3), None, None, None), "slopes"),
        ((heads(1, 2, 3, 257), heads(1, 2, 5, 257), V, *none), "256"),
        ((Q[0], K, V, *none), "query"),
    ]
    if not SMALL:  # a GPU's launcher doesn't look at numbers that lie there
        wrong += [
            ((Q, K, V, None, None, torch.tensor([0, 2, 4]), starts[1], None), "cu_seqlens_q"),
            ((Q, K, V, None, None, starts[0], torch.tensor([0, 6, 5]), None), "cu_seqlens_k"),
        ]
    for args, word in wrong:
        with pytest.raises(RuntimeError, match=word):
            raw(*args, *options)
