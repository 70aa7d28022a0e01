"""Positions: what is peculiar to rope beside the generic tests, and the layers that add or turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import SMALL, RawCalls
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
from dlkernels import explain
from dlkernels.ops.rope import angles

T, D = 9, 12


def tables(dtype: torch.dtype = torch.float64, width: int = D) -> tuple[Tensor, Tensor]:
    return angles(torch.arange(T), width, dtype=dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = torch.randn(2, 1, D, dtype=torch.float64).expand(2, T, D)
    scores = F.rope(q, *tables(), interleaved) @ F.rope(k, *tables(), interleaved).T
    for distance in range(1 - T, T):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores.std() > 0.1


def test_one_convention_is_a_permutation_of_the_other() -> None:
    x = torch.randn(2, 3, T, D)
    order = torch.arange(D).view(2, D // 2).T.flatten()
    there = F.rope(x, *tables(torch.float32))[..., order]
    torch.testing.assert_close(there, F.rope(x[..., order], *tables(torch.float32), interleaved=True), rtol=0, atol=1e-7)


def test_the_paper() -> None:
    """Every pair as a complex number, multiplied by e^(i t w): equation 34 of arXiv:2104.09864."""
    x = torch.randn(2, 3, T, D, dtype=torch.float64)
    w = 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones(T, D // 2, dtype=torch.float64), torch.arange(T)[:, None] * w)
    right = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(F.rope(x, *tables(), interleaved=True), right)


def test_hugging_faces_llama() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 2, 3, T, D)
    cos, sin = (t.float() for t in tables())
    wide = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    for x, right in zip((q, k), modeling.apply_rotary_pos_emb(q, k, *wide)):
        torch.testing.assert_close(F.rope(x, cos, sin), right)


def test_a_projections_heads_stay_where_they_are() -> None:
    """[B, T, H, D] seen as [B, H, T, D], as a part of a product: no copy, and the result lies likewise."""
    x = torch.randn(2, T, 3 * 4 * D)[..., 4 * D : 8 * D].unflatten(-1, (4, D)).transpose(1, 2)
    y = F.rope(x, *tables(torch.float32))
    assert y.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(y, F.rope(x.contiguous(), *tables(torch.float32)), rtol=0, atol=0)


def test_positions_of_each_sequence_and_of_all_that_broadcast() -> None:
    x, starts = torch.randn(3, 2, T, D), torch.tensor([0, 4, 11])
    cos, sin = angles(starts[:, None] + torch.arange(T), D)
    y = F.rope(x, cos, sin)
    for b, start in enumerate(starts.tolist()):
        torch.testing.assert_close(y[b], F.rope(x[b], *angles(torch.arange(start, start + T), D)), rtol=0, atol=0)
    torch.testing.assert_close(F.rope(x, cos[:1], sin[:1]), F.rope(x, cos[0], sin[0]), rtol=0, atol=0)
    torch.testing.assert_close(F.rope(x[:, None], cos[:, None], sin[:, None])[:, 0], y, rtol=0, atol=0)


@pytest.mark.skipif(SMALL, reason="the interpreter's bfloat16 is wrong")
def test_half_types_keep_the_angles_in_float32() -> None:
    """At position 4000 a bfloat16 table is off by much more than the result's own rounding."""
    x = torch.randn(1, 2, 4096, 64)
    exact = F.rope(x.bfloat16().double(), *angles(torch.arange(4096), 64, dtype=torch.float64))
    y = F.rope(x.bfloat16(), *angles(torch.arange(4096), 64))
    assert y.dtype == torch.bfloat16 and (y - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_learned_angles_have_a_gradient() -> None:
    """From the definition, and explain says so."""
    x = torch.randn(2, T, D, dtype=torch.float64)
    cos, sin = (t.requires_grad_() for t in tables())
    assert torch.autograd.gradcheck(lambda c, s: F.rope(x, c, s), (cos, sin))
    assert explain("rope", x, None, False, False).implementation != "reference"
    with RawCalls() as recorded:
        F.rope(x, cos, sin)
        assert not recorded.calls
        with torch.no_grad():
            F.rope(x, cos, sin)
    assert len(recorded.calls) == 1


def test_any_number_of_derivatives_run_on_the_kernel() -> None:
    x = torch.randn(2, 2, T, D, requires_grad=True)
    with RawCalls() as recorded:
        y = F.rope(x, *tables(torch.float32))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    assert len(recorded.calls) == 4 and {str(f) for f, _ in recorded.calls} == {"dlkernels.rope.default"}
    torch.testing.assert_close(x.grad, 8 * x)  # a rotation keeps lengths, so dx = 2 x


BAD: dict[str, tuple[Any, ...]] = {
    "tables of two shapes": (torch.ones(2, T, D), torch.ones(T, 3), torch.ones(T, 4)),
    "other length": (torch.ones(2, T, D), torch.ones(T - 1, 3), torch.ones(T - 1, 3)),
    "too many angles": (torch.ones(2, T, D), torch.ones(T, 7), torch.ones(T, 7)),
    "other batch": (torch.ones(2, 3, T, D), torch.ones(3, T, 3), torch.ones(3, T, 3)),
    "one dimension": (torch.ones(T), torch.ones(T, 3), torch.ones(T, 3)),
    "tables of one dimension": (torch.ones(2, T, D), torch.ones(T), torch.ones(T)),
}


@pytest.mark.parametrize("case", BAD)
def test_shapes_that_do_not_fit(case: str) -> None:
    with pytest.raises(RuntimeError, match="rope: "):
        F.rope(*BAD[case])
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        F.rope(*(t.to(torch.int64) for t in BAD[case]))


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="cos must be a Tensor, got list"):
        F.rope(torch.ones(T, D), [1.0], torch.ones(T, 3))


@pytest.mark.skipif(SMALL, reason="the CPU kernel's own checks")
def test_the_raw_op_checks_for_itself() -> None:
    x, table = torch.ones(2, 3, T, D), torch.ones(1, T, 6)
    raw = torch.ops.dlkernels.rope
    raw(x, table, table, False, False)
    for args in (
        (x[0], table, table), (x, table[0], table), (x, table, table[:, 1:]), (x, table.double(), table), (x, table, table.bfloat16()),
        (x[..., :11], table, table), (x.expand(2, 2, 3, T, D)[0][:0], torch.ones(2, T, 6), table), (x, table[:, :, :5], table),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            raw(*args, False, False)


def test_layers_add_or_turn_as_the_formulas_say() -> None:
    x = torch.randn(2, T, D)
    t, i = torch.arange(3, 3 + T)[:, None], torch.arange(0, D, 2)
    table = torch.empty(T, D)
    table[:, 0::2], table[:, 1::2] = (t / 10000 ** (i / D)).sin(), (t / 10000 ** (i / D)).cos()
    torch.testing.assert_close(nn.SinusoidalPositions(D)(x, 3), x + table)
    learned = nn.LearnedPositions(20, D)
    torch.testing.assert_close(learned(x, 3), x + learned.weight[3 : 3 + T])
    assert list(learned.state_dict()) == ["weight"] and 0.01 < learned.weight.std() < 0.03
    rotary = nn.RotaryPositions(8, interleaved=True)
    y = rotary(x[:, None], 3)
    torch.testing.assert_close(y, F.rope(x[:, None], *angles(torch.arange(3, 3 + T), 8), True))
    torch.testing.assert_close(rotary(x[:, None], positions=torch.arange(3, 3 + T).expand(2, T)), y)
    assert not list(rotary.state_dict()) and math.isclose(y.norm().item(), x.norm().item(), rel_tol=1e-5)


def test_bad_positions() -> None:
    with pytest.raises(IndexError, match="positions 15 to 23 are out of range, there are 20"):
        nn.LearnedPositions(20, D)(torch.ones(T, D), 15)
    for layer in (nn.SinusoidalPositions(D), nn.RotaryPositions(D), nn.LearnedPositions(20, D)):
        with pytest.raises(IndexError, match="positions -1"):
            layer(torch.ones(T, D), -1)
    for kind in (nn.SinusoidalPositions, nn.RotaryPositions):
        with pytest.raises(ValueError, match="dim must be even and positive, got 7"):
            kind(7)
