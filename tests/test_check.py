"""The float64 rule and the arguments it is applied to: is every kind of wrong kernel noticed?"""

from __future__ import annotations

import pytest
import torch
from support import toy
from torch import Tensor

from dlkernels import OPS
from dlkernels.bench import check
from dlkernels.bench.inputs import DTYPE_NAMES, arguments, gradient_names, label
from dlkernels.registry import Op


def failures(op: Op, dtype: torch.dtype = torch.float32) -> set[str]:
    return {row.quantity for row in check.errors(op, {"M": 6, "K": 7, "N": 8}, dtype) if not row.ok}


@pytest.mark.parametrize("dtype", DTYPE_NAMES.values(), ids=DTYPE_NAMES)
def test_the_definition_itself_passes(dtype: torch.dtype) -> None:
    rows = check.errors(toy(), {"M": 6, "K": 7, "N": 8}, dtype)
    assert [row.quantity for row in rows] == ["y", "dx", "dweight"]
    assert all(row.ok for row in rows)


def test_a_dropped_tail_is_noticed() -> None:
    assert failures(toy(lambda x, weight: x[:, :-1] @ weight[:-1])) == {"y", "dx", "dweight"}


def test_half_precision_where_single_is_asked_is_noticed() -> None:
    assert "y" in failures(toy(lambda x, weight: (x.bfloat16() @ weight.bfloat16()).float()))


def test_single_precision_where_double_is_asked_is_noticed() -> None:
    assert failures(toy(lambda x, weight: (x.float() @ weight.float()).double()), torch.float64) >= {"y"}


def test_a_wrong_gradient_is_noticed_though_the_value_is_right() -> None:
    assert failures(toy(lambda x, weight: x @ (1.01 * weight - 0.01 * weight.detach()))) == {"dweight"}


def test_a_missing_gradient_is_noticed() -> None:
    assert failures(toy(lambda x, weight: x @ weight.detach())) == {"dweight"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_where_a_number_belongs_is_noticed(bad: float) -> None:
    def call(x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight
        return y.masked_fill(torch.arange(y.numel()).reshape(y.shape) == 3, bad)

    rows = check.errors(toy(call), {"M": 6, "K": 7, "N": 8}, torch.float32)
    assert not rows[0].ok and rows[0].ours_error == check.WORST


def test_a_wrong_shape_is_noticed() -> None:
    assert check.relative_error(torch.ones(2, 3), torch.ones(3, 2).double()) == check.WORST
    assert check.relative_error(None, torch.ones(3).double()) == check.WORST


def test_relative_error_is_of_the_largest_value_and_lets_equal_infinities_be() -> None:
    inf, nan = float("inf"), float("nan")
    exact = torch.tensor([1.0, -4.0, inf, nan], dtype=torch.float64)
    assert check.relative_error(torch.tensor([1.5, -4.0, inf, nan]), exact) == 0.5 / 4
    assert check.relative_error(torch.tensor([1.0, -4.0, -inf, nan]), exact) == check.WORST
    assert check.relative_error(torch.tensor([1.0, -4.0, nan, nan]), exact) == check.WORST
    assert check.relative_error(torch.empty(0), torch.empty(0).double()) == 0


def test_an_op_that_native_cannot_do_is_allowed_the_rounding_of_its_dtype() -> None:
    def missing(x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError("not implemented for 'Half'")

    rows = check.errors(toy(native=missing), {"M": 6, "K": 7, "N": 8}, torch.float16)
    assert all(row.ok and row.native_error == torch.finfo(torch.float16).eps for row in rows)


def test_agreement_forgives_rounding_and_one_flipped_relu_but_no_wrong_tile() -> None:
    native = torch.randn(1000, 1000)
    flipped, tile = native.clone(), native.clone()
    flipped[3, 4] = 0
    tile[:6, :64] = 0
    assert check.agree(native * (1 + 1e-6), native) and check.agree(flipped, native)
    assert not check.agree(tile, native) and not check.agree(native[:, :-1], native)


def test_arguments_are_the_same_numbers_in_every_dtype() -> None:
    op = OPS["linear"]
    single, half = (arguments(op, op.samples[-1], dtype) for dtype in (torch.float32, torch.float16))
    assert all(torch.equal(a.half(), b) for a, b in zip(single, half))
    assert gradient_names(op, single) == ["dx", "dweight", "dbias"]


def test_labels() -> None:
    assert label({"M": 64, "K": 784, "N": 256}) == "64x784x256"
    assert label({"lead": (2, 3), "K": 17, "bias": False, "causal": True, "mode": "same"}) == "2x3x17 no-bias causal same"
