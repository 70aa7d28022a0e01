"""What is peculiar to convolution: geometry, memory formats, groups, activations, layers, one row, and arguments that do not fit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import SMALL, threads
from torch import Tensor

import dlkernels
import dlkernels.functional as F
import dlkernels.nn
from dlkernels.ops.linear import ACTIVATIONS

DTYPES = [torch.float32] if SMALL else [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def geometries(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Random calls that torch takes, half of them with more than one group, a quarter with a filter for every channel.

    A quarter are many small images: several of them are worked on together.
    """
    draw = random.Random(seed)
    while count:
        channels = [(1, 1, 1), (1, 3, 7), (1, 17, 40), (1, 48, 40), (1, 40, 15), (2, 3, 5), (3, 33, 2), (18, 1, 1), (5, 1, 1)]
        groups, inside, outside = draw.choice(channels)
        taps = (draw.choice([1, 2, 3, 5]), draw.choice([1, 3, 4]))
        images, image = draw.choice([1, 2, 3]), (draw.randint(1, 21), draw.randint(1, 37))
        if draw.random() < 0.25:
            images, image = draw.choice([9, 26]), (draw.randint(1, 4), draw.randint(1, 5))
        stride, dilation = [draw.choice([1, 1, 2, 3]) for _ in "hw"], [draw.choice([1, 1, 2]) for _ in "hw"]
        padding = [draw.choice([0, 1, 2, 4]) for _ in "hw"]
        if any(size + 2 * p < d * (t - 1) + 1 for size, p, d, t in zip(image, padding, dilation, taps)):
            continue
        count -= 1
        yield {
            "x": (images, groups * inside, *image), "weight": (groups * outside, inside, *taps),
            "options": (stride, padding, dilation, groups), "layout": draw.choice(LAYOUTS), "of_weight": draw.choice(LAYOUTS),
        }  # fmt: skip


@pytest.mark.skipif(SMALL, reason="about the C++ kernels")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["rows", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_stays_with_its_image(layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Small images are worked on side by side: what is spoiled is what the definition, which pads nothing here, says is spoiled."""
    torch.manual_seed(0)
    tensors = [integers(*shape, dtype=dtype, layout=layout) for shape in ((26, 33, 4, 5), (34, 33, 3, 2))]
    dy = integers(26, 34, 2, 4, dtype=dtype)
    for spoiled in (*tensors, dy):
        for value in (torch.nan, torch.inf):
            kept, spoiled[1, 2, 1, 1] = float(spoiled[1, 2, 1, 1]), value
            ours, native_ones = (gradients(f, tensors, (), dy) for f in (F.conv2d, native.conv2d))
            spoiled[1, 2, 1, 1] = kept
            for mine, theirs in zip(ours, native_ones):
                assert mine.isfinite().equal(theirs.isfinite())
                assert mine.nan_to_num(0, 0, 0).equal(theirs.nan_to_num(0, 0, 0))


@pytest.mark.skipif(SMALL, reason="about the C++ kernels")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["rows", "channels_last"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_the_partner_of_a_last_place_spoils_nothing(layout: torch.memory_format, value: float) -> None:
    """In bfloat16 two places side by side are multiplied at once. Of seven, the last has none: what would be met there does not count, as
    in float32. (PyTorch's own bfloat16 makes NaN of it.)"""
    x, weight = (integers(*shape, dtype=torch.bfloat16, layout=layout) for shape in ((2, 48, 5, 7), (4, 48, 3, 3)))
    x[1, 3, 2, 6] = value  # the left column of taps does not meet the last pixel of a row
    dy = integers(2, 4, 5, 7, dtype=torch.bfloat16)
    ours = gradients(F.conv2d, [x, weight], (None, 1, 1), dy)[2]
    exact = gradients(native.conv2d, [x.float(), weight.float()], (None, 1, 1), dy)[2]
    assert ours[:, 3, :, 0].isfinite().all() and not ours[:, 3, :, 2].isfinite().any()
    assert ours.isfinite().equal(exact.isfinite())


@pytest.mark.skipif(SMALL, reason="about the C++ kernels")
def test_a_tap_in_the_padding_multiplies_nothing() -> None:
    """Of 3 x 3 taps only those that reach into the one pixel count, whatever stands in the others."""
    weight = torch.full((2, 3, 3, 3), torch.nan)
    weight[:, :, 1, 1] = 2
    assert F.conv2d(torch.ones(32, 3, 1, 1), weight, None, 1, 1).eq(6).all()


def integers(*shape: int, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    t = torch.randint(-3, 4, shape).to(dtype)
    return t.contiguous(memory_format=layout) if t.dim() == 4 else t


def native_relu(*args: Any) -> Tensor:
    return torch.relu(native.conv2d(*args))


def gradients(function: Any, tensors: list[Tensor], options: Any, dy: Tensor) -> tuple[Tensor, ...]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors, *options)
    return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_geometry_gives_the_exact_result(dtype: torch.dtype) -> None:
    """Small integers, whose sums are exact: values and all gradients are the float64 ones, rounded once, in the format torch gives."""
    torch.manual_seed(0)
    for case in geometries(15 if SMALL else 60, seed=dtype.itemsize):
        x = integers(*case["x"], dtype=dtype, layout=case["layout"])
        weight = integers(*case["weight"], dtype=dtype, layout=case["of_weight"])
        bias, relu = integers(weight.shape[0], dtype=dtype), random.Random(str(case)).random() < 0.3
        expected = native.conv2d(x, weight, bias, *case["options"])
        dy = integers(*expected.shape, dtype=dtype)
        exact = gradients(native_relu if relu else native.conv2d, [t.double() for t in (x, weight, bias)], case["options"], dy)
        ours = gradients(F.conv2d_relu if relu else F.conv2d, [x, weight, bias], case["options"], dy)
        for name, a, b in zip(("y", "dx", "dweight", "dbias"), ours, exact):
            assert torch.equal(a, b.to(dtype)), f"{name} of {case}, {dtype}"
        assert ours[2].stride() == weight.stride(), f"dweight of {case}"
        assert dlkernels.explain("conv2d", x, weight, bias, *case["options"]).implementation != "reference"
        if case["of_weight"] == torch.contiguous_format:
            assert ours[0].stride() == expected.stride() and ours[1].stride() == x.stride(), case


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_padding_puts_the_odd_one_last(layout: torch.memory_format) -> None:
    x, weight = torch.randn(2, 3, 6, 9).contiguous(memory_format=layout), torch.randn(4, 3, 2, 4)
    for dilation in (1, 2, (1, 3)):
        y = F.conv2d(x, weight, None, 1, "same", dilation)
        torch.testing.assert_close(y, native.conv2d(x, weight, None, 1, "same", dilation), rtol=1e-4, atol=1e-5)
        assert y.shape[2:] == x.shape[2:]
    assert F.conv2d(x, weight, None, 2, "valid").shape == native.conv2d(x, weight, None, 2, "valid").shape


def test_more_padding_than_filter_and_taps_that_see_nothing() -> None:
    """Places whose filter lies outside of the image altogether, and pixels that no place reaches."""
    for H, R, stride, padding in [(3, 1, 1, 5), (2, 2, 3, 4), (1, 1, 4, 2), (5, 1, 3, 0), (7, 2, 5, 0)]:
        x, weight = integers(2, 3, H, H + 1, dtype=torch.float32), integers(4, 3, R, R, dtype=torch.float32)
        expected = native.conv2d(x, weight, None, stride, padding)
        both = [gradients(f, [x, weight], (None, stride, padding), torch.ones_like(expected)) for f in (F.conv2d, native.conv2d)]
        assert all(torch.equal(a, b) for a, b in zip(*both))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 8, 9), torch.randn(7, 5, 3, 3), torch.randn(7)
    dy = torch.randn(2, 7, 6, 7)
    ours = gradients(lambda *t: F.conv2d_act(*t, activation=activation, negative_slope=0.2), [x, weight, bias], (), dy)
    definition = gradients(
        lambda *t: ACTIVATIONS[activation].reference(native.conv2d(*t), 0.2, 0.0), [t.double() for t in (x, weight, bias)], (), dy
    )
    for a, b in zip(ours, definition):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(SMALL, reason="about the threads of the CPU kernels")
def test_the_number_of_threads_changes_no_bit() -> None:
    torch.manual_seed(0)
    for shape, of_weight, options in [
        ((5, 3, 40, 41), (8, 3, 3, 3), (1, 1)), ((6, 40, 30, 31), (70, 40, 3, 3), (1, 1)), ((3, 20, 33, 29), (20, 1, 3, 3), (2, 1, 1, 20)),
        ((2, 64, 14, 14), (128, 32, 3, 3), (2, 1, 1, 2)), ((4, 70, 20, 20), (90, 70, 1, 1), ()),
    ]:  # fmt: skip
        for layout in LAYOUTS:
            x, weight = torch.randn(shape).contiguous(memory_format=layout), torch.randn(of_weight)
            dy = torch.randn_like(native.conv2d(x, weight, None, *options))
            found = []
            for count in (1, 2, 3):
                with threads(count):
                    found.append(gradients(F.conv2d, [x, weight], (None, *options), dy))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other)), (shape, layout)


def test_infinities_and_nans_stay_where_they_belong() -> None:
    """An infinite pixel reaches the results and taps that see it, and no others: it is not multiplied by zeros that stand for nothing."""
    for layout in LAYOUTS:
        for C in (1, 3, 40):
            x = torch.ones(1, C, 6, 7).contiguous(memory_format=layout)
            x[0, 0, 0, 0] = float("inf")
            weight, dy = torch.ones(2, C, 3, 3), torch.ones(1, 2, 4, 5)
            ours, theirs = (gradients(f, [x, weight], (), dy) for f in (F.conv2d, native.conv2d))
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a, b, equal_nan=True)


def test_one_row_and_no_batch() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, 21), torch.randn(8, 3, 5), torch.randn(8)
    calls: list[tuple[Any, ...]] = [(), (2, 3, 1, 2), ((2,), "valid", (2,), 2), (1, "same", 3, 2)]
    for options in calls:
        w = weight if len(options) == 4 else torch.randn(8, 6, 5)
        torch.testing.assert_close(F.conv1d(x, w, bias, *options), native.conv1d(x, w, bias, *options), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(F.conv1d(x[0], w, bias, *options), native.conv1d(x[0], w, bias, *options), rtol=1e-4, atol=1e-5)
    image, filters = torch.randn(3, 9, 8), torch.randn(5, 3, 3, 3)
    torch.testing.assert_close(F.conv2d(image, filters), native.conv2d(image, filters), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_layers(mode: str) -> None:
    """Parameters, names and results of torch.nn's layers, with every kind of border."""
    torch.manual_seed(0)
    for kind, shape in (("Conv2d", (2, 4, 9, 11)), ("Conv1d", (2, 4, 13))):
        options = {"padding": 2, "stride": 2, "groups": 2, "padding_mode": mode}
        theirs = getattr(torch.nn, kind)(4, 6, 3, **options)
        ours = getattr(dlkernels.nn, kind)(4, 6, 3, **options)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        assert str(ours) == str(theirs)
    fused = dlkernels.nn.ConvReLU2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fused(x), torch.relu(native.conv2d(x, fused.weight, fused.bias)), rtol=1e-4, atol=1e-5)


def test_autocast_is_torch_s() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = F.conv2d(x, weight), native.conv2d(x, weight)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


IMAGE, FILTER = torch.ones(2, 4, 6, 6), torch.ones(6, 4, 3, 3)
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "filter larger than the padded image": ((IMAGE, torch.ones(6, 4, 9, 3), None, 1, 1), "does not fit"),
    "dilated filter larger than the image": ((IMAGE, FILTER, None, 1, 0, 3), "does not fit"),
    "channels": ((IMAGE, torch.ones(6, 3, 3, 3)), "4 channels"),
    "groups that do not divide": ((IMAGE, FILTER, None, 1, 0, 1, 3), "groups"),
    "groups 0": ((IMAGE, FILTER, None, 1, 0, 1, 0), "groups"),
    "groups -1": ((IMAGE, FILTER, None, 1, 0, 1, -1), "groups"),
    "stride 0": ((IMAGE, FILTER, None, 0), "stride"),
    "stride -1": ((IMAGE, FILTER, None, (1, -1)), "stride"),
    "stride of three": ((IMAGE, FILTER, None, (1, 1, 1)), "stride"),
    "dilation 0": ((IMAGE, FILTER, None, 1, 0, 0), "dilation"),
    "negative padding": ((IMAGE, FILTER, None, 1, -1), "padding"),
    "huge padding": ((IMAGE, FILTER, None, 1, 2**62), "padding"),
    "huge dilation": ((IMAGE, FILTER, None, 1, 0, 2**62), "dilation"),
    "huge stride": ((IMAGE, FILTER, None, 2**63 - 1, 2**62), "stride"),
    "padding of a word": ((IMAGE, FILTER, None, 1, "full"), "padding"),
    "same with a stride": ((IMAGE, FILTER, None, 2, "same"), "same"),
    "rank of the image": ((torch.ones(6, 6), FILTER), "do not fit"),
    "rank of the filter": ((IMAGE, torch.ones(6, 4, 3)), "do not fit"),
    "bias": ((IMAGE, FILTER, torch.ones(5)), "bias"),
    "filter of nothing": ((IMAGE, torch.ones(6, 4, 0, 3)), "does not fit"),
    "dtypes": ((IMAGE, FILTER.double()), "weight"),
    "stride of a float": ((IMAGE, FILTER, None, 1.5), "stride"),
    "not a tensor": (([1.0], FILTER), "input"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    args, word = BAD[case]
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        F.conv2d(*args)
    assert word in str(error.value), str(error.value)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        native.conv2d(*args)


@pytest.mark.skipif(SMALL, reason="about the C++ kernels' own checks")
def test_the_raw_ops_check_for_themselves() -> None:
    """They can be called without the contract in front of them."""
    forward, backward = torch.ops.dlkernels.conv2d_forward, torch.ops.dlkernels.conv2d_backward
    right: dict[str, Any] = {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1, "winograd": False}
    wrong: list[dict[str, Any]] = [
        {"stride": [0, 1]}, {"stride": [1]}, {"stride": [2**62, 1]}, {"padding": [0, 0]}, {"padding": [-1, 0, 0, 0]},
        {"padding": [2**62, 2**62, 0, 0]}, {"dilation": [1, 2**62]}, {"dilation": [9, 9]}, {"groups": 0}, {"groups": 3}, {"groups": 2},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(RuntimeError, match="conv2d_forward: "):
            forward(IMAGE, FILTER, None, *{**right, **changes}.values(), 0, 0.0, False)
    spoiled: list[dict[str, Any]] = [{"dy": torch.ones(2, 6, 4, 5)}, {"saved": torch.ones(1)}, {"activation": 99}, {"saved": None}]
    for change in spoiled:
        given: dict[str, Any] = {"dy": torch.ones(2, 6, 4, 4), "saved": torch.ones(2, 6, 4, 4), "activation": 1} | change
        with pytest.raises(RuntimeError, match="conv2d_backward: "):
            backward(given["dy"], IMAGE, FILTER, given["saved"], *right.values(), given["activation"], 0.0, True, True, True)


def test_a_channels_last_filter_makes_the_result_channels_last() -> None:
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    assert F.conv2d(x, weight).stride() == native.conv2d(x, weight).stride()
