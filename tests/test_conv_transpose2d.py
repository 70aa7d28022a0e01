"""What is peculiar to the transposed convolution: every geometry against torch, formats, one row, layers, and arguments that do not fit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import DTYPES, SMALL, dtype_name
from torch import Tensor

import dlkernels
import dlkernels.functional as F
import dlkernels.nn

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def geometries(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]]:
    """x, weight and bias of small integers, whose sums are exact, and options that torch takes."""
    draw = random.Random(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape).double().contiguous(memory_format=draw.choice(LAYOUTS) if len(shape) == 4 else LAYOUTS[0])

    while count:
        channels = [(1, 1, 1), (1, 3, 7), (1, 40, 17), (1, 15, 40), (2, 5, 3), (3, 33, 2), (18, 1, 1), (5, 1, 1)]
        groups, inside, outside = draw.choice(channels)
        taps, image = (draw.choice([1, 2, 3, 5]), draw.choice([1, 3, 4])), (draw.randint(1, 11), draw.randint(1, 19))
        stride, dilation = [draw.choice([1, 1, 2, 3]) for _ in "hw"], [draw.choice([1, 1, 2]) for _ in "hw"]
        padding, more = [draw.choice([0, 0, 1, 2]) for _ in "hw"], [draw.choice([0, 0, 1]) for _ in "hw"]
        sizes = [(n - 1) * s - 2 * p + d * (t - 1) + m + 1 for n, s, p, d, t, m in zip(image, stride, padding, dilation, taps, more)]
        if min(sizes) < 1 or any(m >= max(s, d) for m, s, d in zip(more, stride, dilation)):
            continue
        count -= 1
        x, weight = integers(draw.choice([1, 3]), groups * inside, *image), integers(groups * inside, outside, *taps)
        yield x, weight, integers(groups * outside), (stride, padding, more, groups, dilation)


def gradients(function: Any, tensors: tuple[Tensor, ...], options: Any, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, *options)
    return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:1] if SMALL else DTYPES, ids=dtype_name)
def test_any_geometry_gives_the_exact_result(dtype: torch.dtype) -> None:
    """Values and all gradients are the float64 ones, rounded once; they lie as torch's do, dweight as the weight does."""
    for x, weight, bias, options in geometries(12 if SMALL else 50, seed=dtype.itemsize):
        expected = native.conv_transpose2d(x, weight, bias, *options)
        dy = torch.randint(-3, 4, expected.shape)
        exact = gradients(native.conv_transpose2d, (x, weight, bias), options, dy)
        x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
        ours = gradients(F.conv_transpose2d, (x, weight, bias), options, dy)
        what = f"{tuple(x.shape)} {x.stride()}, {tuple(weight.shape)} {weight.stride()}, {options}"
        for name, a, b in zip(("y", "dx", "dweight", "dbias"), ours, exact):
            assert torch.equal(a, b.to(dtype)), f"{name} of {what}"
        assert dlkernels.explain("conv_transpose2d", x, weight, bias, *options).implementation != "reference"
        assert ours[2].stride() == weight.stride(), what
        if weight.is_contiguous():
            assert ours[0].stride() == torch.empty_like(expected, memory_format=torch._prims_common.suggest_memory_format(x)).stride(), what
            assert ours[1].stride() == x.stride(), what


def test_one_row_and_no_batch() -> None:
    x, weight, bias = torch.randn(2, 6, 21), torch.randn(6, 4, 5), torch.randn(8)
    calls: list[tuple[Any, ...]] = [(2, 3, 1, 2), ((2,), (1,), (1,), 2, (2,)), (1, 0, 0, 2, 3)]
    for options in calls:
        for some in (x, x[0]):
            y = native.conv_transpose1d(some, weight, bias, *options)
            torch.testing.assert_close(F.conv_transpose1d(some, weight, bias, *options), y, rtol=1e-4, atol=1e-4)
    image, filters = torch.randn(3, 9, 8), torch.randn(3, 5, 3, 3)
    torch.testing.assert_close(F.conv_transpose2d(image, filters), native.conv_transpose2d(image, filters), rtol=1e-4, atol=1e-5)


def test_it_undoes_the_shape_of_conv2d_and_is_its_adjoint() -> None:
    """<conv2d(x), y> = <x, conv_transpose2d(y)>, with the same weight and options."""
    x, weight = torch.randn(2, 4, 9, 12, dtype=torch.float64), torch.randn(6, 2, 3, 2, dtype=torch.float64)
    y = F.conv2d(x, weight, None, (2, 3), 1, (1, 2), 2)
    back = F.conv_transpose2d(y, weight, None, (2, 3), 1, (0, 2), 2, (1, 2))
    assert back.shape == x.shape
    torch.testing.assert_close((y * y).sum(), (x * back).sum())


def test_layers() -> None:
    """Parameters, names and results of torch.nn's layers, and the size that is asked for."""
    for kind, shape in (("ConvTranspose2d", (2, 4, 5, 7)), ("ConvTranspose1d", (2, 4, 9))):
        theirs = getattr(torch.nn, kind)(4, 6, 3, stride=3, padding=1, output_padding=1, groups=2)
        ours = getattr(dlkernels.nn, kind)(4, 6, 3, stride=3, padding=1, output_padding=1, groups=2)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        size = [n * 3 for n in shape[2:]]
        torch.testing.assert_close(ours(x, size), theirs(x, size), rtol=1e-4, atol=1e-5)
        assert str(ours) == str(theirs)
        with pytest.raises(ValueError, match="output size"):
            ours(x, [100] * len(size))


IMAGE, FILTER = torch.ones(2, 4, 6, 6), torch.ones(4, 6, 3, 3)
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "channels": ((IMAGE, torch.ones(3, 6, 3, 3)), "4 channels"),
    "groups that do not divide": ((IMAGE, FILTER, None, 1, 0, 0, 3), "groups"),
    "groups 0": ((IMAGE, FILTER, None, 1, 0, 0, 0), "groups"),
    "stride 0": ((IMAGE, FILTER, None, 0), "stride"),
    "stride of three": ((IMAGE, FILTER, None, (1, 1, 1)), "stride"),
    "stride of a float": ((IMAGE, FILTER, None, 1.5), "stride"),
    "huge stride": ((IMAGE, FILTER, None, 2**62), "stride"),
    "dilation 0": ((IMAGE, FILTER, None, 1, 0, 0, 1, 0), "dilation"),
    "negative padding": ((IMAGE, FILTER, None, 1, -1), "padding"),
    "padding that leaves nothing": ((IMAGE, FILTER, None, 1, 5), "nothing is left"),
    "padding of a word": ((IMAGE, FILTER, None, 1, "same"), "padding"),
    "output_padding as large as the stride": ((IMAGE, FILTER, None, 2, 0, 2), "output_padding"),
    "negative output_padding": ((IMAGE, FILTER, None, 2, 0, -1), "output_padding"),
    "rank of the image": ((torch.ones(6, 6), FILTER), "do not fit"),
    "rank of the filter": ((IMAGE, torch.ones(4, 6, 3)), "do not fit"),
    "bias": ((IMAGE, FILTER, torch.ones(4)), "bias"),
    "no pixels": ((torch.ones(2, 4, 0, 6), FILTER), "nothing is left"),
    "dtypes": ((IMAGE, FILTER.double()), "weight"),
    "not a tensor": (([1.0], FILTER), "input"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    args, word = BAD[case]
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        F.conv_transpose2d(*args)
    assert word in str(error.value), str(error.value)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        native.conv_transpose2d(*args)


@pytest.mark.parametrize("option, value", [("stride", 2**28), ("stride", 2**31), ("dilation", 2**29), ("dilation", 2**31)])
def test_a_result_too_large_for_memory_is_refused(option: str, value: int) -> None:
    with pytest.raises(RuntimeError, match=r"memory|2\^31"):
        F.conv_transpose2d(IMAGE, FILTER, **{option: value})


def test_the_raw_ops_check_for_themselves() -> None:
    """They can be called without the contract in front of them."""
    forward, backward = torch.ops.dlkernels.conv_transpose2d_forward, torch.ops.dlkernels.conv_transpose2d_backward
    right: dict[str, Any] = {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}
    sized = right | {"size": [8, 8]}
    assert forward(IMAGE, FILTER, None, *sized.values()).shape == (2, 6, 8, 8)
    wrong: list[dict[str, Any]] = [
        {"stride": [0, 1]}, {"stride": [1]}, {"padding": [0, 0]}, {"padding": [-1, 0, 0, 0]}, {"dilation": [1, 2**62]}, {"groups": 0},
        {"groups": -(2**63)}, {"groups": 3}, {"size": [8]}, {"size": [0, 8]}, {"size": [-8, 8]}, {"size": [8, 7]}, {"size": [2**40, 8]},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(RuntimeError):
            forward(IMAGE, FILTER, None, *(sized | changes).values())
    for dy, x, weight in (
        (torch.ones(2, 6, 7, 8), IMAGE, FILTER), (torch.ones(1, 6, 8, 8), IMAGE, FILTER), (torch.ones(2, 6, 8, 8), IMAGE[:, :3], FILTER),
        (torch.ones(2, 6, 8, 8), IMAGE, FILTER.double()), (torch.ones(2, 6, 8, 8), IMAGE, FILTER[0]), (torch.ones(2, 6, 8), IMAGE, FILTER),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            backward(dy, x, weight, *right.values(), True, True, True)
