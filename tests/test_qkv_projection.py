"""qkv_projection: what is peculiar to it beside the generic tests, and where the models use it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import SMALL, RawCalls, threads
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
from dlkernels.models.gpt import GPT
from dlkernels.models.layers import LinearReLU
from dlkernels.models.transformer import MultiHeadAttention
from dlkernels.ops.rope import angles

B, T, C, H, G, D = 2, 6, 24, 4, 2, 12


def parameters(H: int = H, G: int = G, D: int = D, C: int = C, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows = (H * D, G * D, G * D)
    return [*(torch.randn(N, C, dtype=dtype) / C**0.5 for N in rows), *(torch.randn(N, dtype=dtype) for N in rows)]


def separately(x: Tensor, *others: Any, head_dim: int, cos: Any = None, sin: Any = None, interleaved: bool = False) -> tuple[Tensor, ...]:
    weights, biases = others[:3], others[3:] or (None,) * 3
    q, k, v = (F.linear(x, w, b).unflatten(-1, (-1, head_dim)).transpose(-3, -2) for w, b in zip(weights, biases))
    return (q, k, v) if cos is None else (F.rope(q, cos, sin, interleaved), F.rope(k, cos, sin, interleaved), v)


def gradients(function: Callable[..., Any], args: tuple[Tensor, ...], dys: Any, **options: Any) -> list[Tensor]:
    leaves = [arg.detach().requires_grad_() for arg in args]
    return list(torch.autograd.grad(function(*leaves, **options), leaves, dys))


@pytest.mark.parametrize("rows", [1, 4, 5, 40] if SMALL else [1, 4, 5, 40, 70, 300])
@pytest.mark.parametrize("head_dim, pairs", [(12, 6), (12, 2), (12, 0), (7, 3), (64, 32), (80, 40), (96, 12), (1, 0)])
def test_three_linears_and_rope(rows: int, head_dim: int, pairs: int) -> None:
    """For every way in which pairs and heads may lie in the tiles of a product, few rows or many; and their gradients."""
    with threads(2):
        x, given = torch.randn(1, rows, C, dtype=torch.float64), parameters(3, 1, head_dim, dtype=torch.float64)
        cos, sin = angles(torch.arange(rows), 2 * pairs, dtype=torch.float64)
        for interleaved in (False, True):
            options: dict[str, Any] = {"head_dim": head_dim, "cos": cos, "sin": sin, "interleaved": interleaved}
            ours, wanted = F.qkv_projection(x, *given, **options), separately(x, *given, **options)
            torch.testing.assert_close(ours, wanted)
            assert all(y.transpose(1, 2).is_contiguous() for y in ours)
            dys = [torch.randn_like(y) for y in wanted]
            found, right = (gradients(f, (x, *given), dys, **options) for f in (F.qkv_projection, separately))
            torch.testing.assert_close(found, right)


def test_many_features_cross_the_blocks_of_a_product() -> None:
    """C beyond what is summed at a time; parts of the weights that meet within what is read at a time."""
    C = 40 if SMALL else 900
    for rows in (3, 8) if SMALL else (3, 30, 80, 300):
        x, given = torch.randn(1, rows, C, dtype=torch.float64), parameters(5, 3, 10, C, torch.float64)
        cos, sin = angles(torch.arange(rows), 10, dtype=torch.float64)
        wanted = separately(x, *given, head_dim=10, cos=cos, sin=sin)
        torch.testing.assert_close(F.qkv_projection(x, *given, head_dim=10, cos=cos, sin=sin), wanted)
        dys = [torch.randn_like(y) for y in wanted]
        found, right = (gradients(f, (x, *given), dys, head_dim=10, cos=cos, sin=sin) for f in (F.qkv_projection, separately))
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("rows", [2, 20])
def test_parts_of_one_weight(rows: int) -> None:
    """A packed in_proj_weight: no copy is needed, and its gradient is put together."""
    packed = [t.requires_grad_() for t in (torch.randn(3 * H * D, C, dtype=torch.float64), torch.randn(3 * H * D, dtype=torch.float64))]
    x, (cos, sin) = torch.randn(B, rows, C, dtype=torch.float64), angles(torch.arange(rows), D, dtype=torch.float64)
    options: dict[str, Any] = {"head_dim": D, "cos": cos, "sin": sin}

    def whole(function: Callable[..., Any]) -> Any:
        qkv = function(x, *packed[0].chunk(3), *packed[1].chunk(3), **options)
        return qkv, torch.autograd.grad(sum((y * y.detach()).sum() for y in qkv), packed)

    for found, right in zip(whole(F.qkv_projection), whole(separately)):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("present", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_what_nobody_used_has_no_gradient(present: tuple[int, ...]) -> None:
    leaves = [t.requires_grad_() for t in (torch.randn(B, T, C), *parameters())]
    cos, sin = angles(torch.arange(T), D)
    found: list[Any] = []
    for function in (F.qkv_projection, separately):
        qkv = function(*leaves, head_dim=D, cos=cos, sin=sin)
        total = torch.stack([(qkv[i] ** 2).sum() for i in present]).sum()
        found.append(torch.autograd.grad(total, leaves, allow_unused=True))
    assert [t is None for t in found[0]] == [t is None for t in found[1]]
    for ours, right in zip(*found):
        torch.testing.assert_close(ours, right)


def test_gradients_are_read_where_they_lie() -> None:
    """As (B, heads, T, D), as (B, T, heads, D), expanded, or in steps: the same numbers, the same bits."""
    leaves = [t.requires_grad_() for t in (torch.randn(B, T, C), *parameters())]
    cos, sin = angles(torch.arange(T), D)
    qkv = F.qkv_projection(*leaves, head_dim=D, cos=cos, sin=sin)
    dys = [torch.randn(y.shape) for y in qkv]
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda dy: dy, lambda dy: dy.transpose(1, 2).contiguous().transpose(1, 2), lambda dy: torch.stack([dy, dy], -1)[..., 0],
        lambda dy: torch.stack([dy, dy], 2).flatten(1, 2)[:, ::2],
    ]  # fmt: skip
    found = [torch.autograd.grad(qkv, leaves, [layout(dy) for dy in dys], retain_graph=True) for layout in layouts]
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0]))


def test_learned_angles_have_a_gradient() -> None:
    x, given = torch.randn(B, T, C, dtype=torch.float64), parameters(dtype=torch.float64)
    tables = [t.requires_grad_() for t in angles(torch.arange(T), D, dtype=torch.float64)]

    def total(function: Callable[..., Any]) -> Any:
        qkv = function(x, *given, head_dim=D, cos=tables[0], sin=tables[1])
        return torch.autograd.grad(sum((y * y.detach()).sum() for y in qkv), tables)

    torch.testing.assert_close(total(F.qkv_projection), total(separately))


def test_one_product_forward_and_what_is_needed_backward() -> None:
    x, given = torch.randn(B, T, C), parameters()
    x.requires_grad_()
    given[0].requires_grad_()
    with RawCalls() as recorded:
        F.qkv_projection(x, *given, head_dim=D)[0].sum().backward()
    assert [str(f) for f, _ in recorded.calls] == [f"dlkernels.qkv_projection_{which}.default" for which in ("forward", "backward")]
    assert recorded.calls[1][1][-1] == [True, True, False, False, False, False, False]
    assert x.grad is not None and given[0].grad is not None and given[1].grad is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "head_dim": ({"head_dim": 0}, "head_dim is 0, needs a positive integer"),
    "head_dim of another type": ({"head_dim": 2.0}, "head_dim is 2.0"),
    "head_dim that does not divide": ({"head_dim": 5}, r"q_weight has shape \(48, 24\), needs \(a multiple of 5, 24\)"),
    "input of one dimension": ({"input": torch.ones(C)}, r"input has shape \(24,\), needs \(\*, T, C\)"),
    "other features": ({"k_weight": torch.ones(G * D, C + 1)}, r"k_weight has shape \(24, 25\)"),
    "other heads for values": ({"v_weight": torch.ones(D, C)}, r"v_weight has shape \(12, 24\), needs that of k_weight, \(24, 24\)"),
    "bias": ({"k_bias": torch.ones(3)}, r"k_bias has shape \(3,\), needs \(24,\)"),
    "dtype": ({"v_weight": torch.ones(G * D, C).double()}, "v_weight"),
    "cos alone": ({"cos": torch.ones(T, 3)}, "sin is None, needs both"),
    "two shapes": ({"cos": torch.ones(T, 3), "sin": torch.ones(T, 4)}, "cos and sin have shapes"),
    "other length": ({"cos": torch.ones(T + 1, 3), "sin": torch.ones(T + 1, 3)}, r"cos and sin have shape \(7, 3\), need \(T, P\)"),
    "other batch": ({"cos": torch.ones(3, T, 3), "sin": torch.ones(3, T, 3)}, r"cos and sin have shape \(3, 6, 3\)"),
    "too many angles": ({"cos": torch.ones(T, 7), "sin": torch.ones(T, 7)}, "7 angles, needs at most 6 for heads of 12"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit(case: str) -> None:
    names = "input", "q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias"
    changed, message = BAD[case]
    arguments = dict(zip(names, (torch.ones(B, T, C), *parameters()))) | {"head_dim": D} | changed
    with pytest.raises(RuntimeError, match=message):
        F.qkv_projection(**arguments)


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="k_weight must be a Tensor, got list"):
        F.qkv_projection(torch.ones(T, C), torch.ones(D, C), [1.0], torch.ones(D, C), head_dim=D)
    with pytest.raises(TypeError, match="sin must be a Tensor, got float"):
        F.qkv_projection(torch.ones(T, C), *parameters(), head_dim=D, cos=torch.ones(T, 3), sin=1.0)


SIZES = [(1024, 2048, 32, 8, 64), (1, 2048, 32, 8, 64), (512, 1000, 3, 1, 128), (4096, 384, 6, 6, 48), (40, 4096, 32, 32, 256)]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gpu_kernels_compile(target: str, dtype: torch.dtype) -> None:
    """Nothing spills, half types are multiplied by tensor cores, and no address is formed from a 32-bit vector."""
    pytest.importorskip("triton")
    from dlkernels.gpu import aot
    from dlkernels.gpu import qkv_projection as kernels

    for rows, C, H, G, D in SIZES if dtype == torch.bfloat16 else SIZES[:2]:
        x, q, k, q_bias, k_bias = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in ((1, rows, C), (H * D, C), (G * D, C), (H * D,), (G * D,))
        )
        table = torch.empty(1, rows, D // 2, dtype=torch.promote_types(dtype, torch.float32), device="meta")
        calls = (
            partial(kernels.forward, x, q, k, k, q_bias, k_bias, k_bias, table, table, D, True),
            partial(kernels.forward, x, q, k, k, None, None, None, table, table, D, False),
            partial(kernels.forward, x, q, k, k, None, None, None, None, None, D, False),
        )
        for launch in (launch for call in calls for launch in aot.record(call, target)):
            compiled = aot.compile_launch(launch, target)
            assert compiled.spilled == 0 and compiled.shared <= aot.TARGETS[target].device.shared, compiled
            assert compiled.mma or dtype != torch.bfloat16, compiled
            vectors = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", compiled.text("ttir"))
            assert vectors and set(vectors) == {"i64"}, compiled


def test_attention_projects_at_once_unless_someone_looks() -> None:
    """One kernel for three layers; a hook, or another layer in the place of one, and they are called, with the same result."""
    rotary = nn.RotaryPositions(D)
    attention, x = MultiHeadAttention(C, 2, rotary=rotary), torch.randn(B, T, C)

    def calls() -> tuple[list[str], list[Tensor]]:
        with RawCalls() as recorded, torch.no_grad():
            found = attention.heads(x, start=3)
        return [str(f).removeprefix("dlkernels.").removesuffix(".default") for f, _ in recorded.calls], list(found)

    apart = ["linear_forward"] * 3 + ["rope"] * 2
    together, right = calls()
    assert together == ["qkv_projection_forward"]
    seen: list[Tensor] = []
    for module in (attention.W_k, rotary):
        handle = module.register_forward_hook(lambda module, args, y: seen.append(y))
        names, found = calls()
        assert names == apart and seen
        torch.testing.assert_close(found, right)
        handle.remove()
    assert calls()[0] == together
    attention.W_v = LinearReLU(C, C)
    assert "qkv_projection_forward" not in calls()[0]


def test_memory_and_torchs_own_layers_are_projected_apart() -> None:
    x, memory = torch.randn(B, T, C), torch.randn(B, T + 1, C)
    ours = MultiHeadAttention(C, 2)
    theirs = MultiHeadAttention(C, 2, nn=torch.nn)
    theirs.load_state_dict(ours.state_dict())
    for seen in (None, memory):
        torch.testing.assert_close(ours(x, seen), theirs(x, seen))
    with RawCalls() as recorded:
        ours.heads(x, memory)
    assert len(recorded.calls) == 3


@pytest.mark.skipif(SMALL, reason="long for the interpreter")
def test_gpt_is_the_same_in_both_worlds() -> None:
    """Logits and every gradient, in float64."""
    torch.manual_seed(0)
    ours = GPT(11, 16, 24, 2, 2, dropout=0.0).double()
    theirs = GPT(11, 16, 24, 2, 2, dropout=0.0, nn=torch.nn).double()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(11, (3, 9))
    for model in (ours, theirs):
        model(tokens).square().sum().backward()
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-11, atol=1e-11)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
