"""Winograd's algorithm: where it runs, how exact it is, what a number can do to its neighbours. test_ops.py tests it as every op."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import SMALL, threads
from torch import Tensor

import dlkernels
import dlkernels.functional as F
import dlkernels.nn
from dlkernels.models.cnn import CNN
from dlkernels.models.resnet import ResNet

pytestmark = pytest.mark.skipif(SMALL, reason="about the C++ kernels")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EXACT = [torch.float32, torch.float64]


def call(x: Tensor, weight: Tensor, *options: Any, winograd: bool) -> dict[str, Tensor]:
    """y, dx and dweight for a dy that depends on the shapes alone."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = F.conv2d(x, weight, None, *options, winograd=winograd)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


def differing(x: Tensor, weight: Tensor, *options: Any) -> set[str]:
    """Which results have other bits than without Winograd."""
    ours, direct = call(x, weight, *options, winograd=True), call(x, weight, *options, winograd=False)
    return {name for name in ours if not ours[name].equal(direct[name])}


@pytest.fixture(params=LAYOUTS, ids=["rows", "channels_last"])
def layout(request: pytest.FixtureRequest) -> Iterator[torch.memory_format]:
    torch.manual_seed(0)
    yield request.param


@pytest.mark.isa
@pytest.mark.parametrize("dtype", EXACT)
def test_where_it_runs(layout: torch.memory_format, dtype: torch.dtype) -> None:
    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)

    image, weight = some(2, 32, 9, 7), some(32, 32, 3, 3)
    everything = {"y", "dx", "dweight"}
    assert differing(image, weight, 1, 1) == everything
    assert differing(image, weight, 1, "valid") == everything
    assert differing(image, some(64, 16, 3, 3), 1, (0, 2), 1, 2) >= {"y"}
    assert differing(image, some(1, 32, 3, 3), 1, 1) == {"dweight"}, "one filter fills no vector, the channels do"
    for other in ((image, weight, 2, 1), (image, weight, 1, 1, 2), (image, some(32, 32, 3, 1)), (image, some(32, 32, 5, 5), 1, 2)):
        assert not differing(*other), "another stride, dilation or size"
    assert not differing(some(2, 1, 9, 7), some(1, 1, 3, 3)), "too few channels"


@pytest.mark.isa
@pytest.mark.parametrize("size", [(8, 64, 28), (2, 256, 14)], ids=str)
def test_error(layout: torch.memory_format, size: tuple[int, int, int]) -> None:
    """Against float64, the largest error by the largest number: at most three times that of the direct sums, or 2^-22. Measured: the same
    with fused multiply-adds, 2.3 times without (7.9e-7)."""
    N, C, H = size
    x, weight = torch.randn(N, C, H, H).contiguous(memory_format=layout), torch.randn(C, C, 3, 3).contiguous(memory_format=layout)
    exact = call(x.double(), weight.double(), 1, 1, winograd=False)
    ours, direct = call(x, weight, 1, 1, winograd=True), call(x, weight, 1, 1, winograd=False)
    for name, value in exact.items():
        error, allowed = (float((found[name].double() - value).abs().max() / value.abs().max()) for found in (ours, direct))
        assert error <= max(3 * allowed, 2.0**-22), f"{name}: {error} where the direct sums have {allowed}"


@pytest.mark.isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_stays_where_it_belongs(layout: torch.memory_format, value: float) -> None:
    """Of a sum that is not finite, or overflows on the way, the direct kernel's bits are the result."""
    x, weight = torch.randn(3, 32, 9, 8), torch.randn(32, 32, 3, 3)
    for spoiled in (x, weight):
        before = spoiled.flatten()[100].item()
        spoiled.view(-1)[100] = value
        args = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
        ours, direct = call(*args, 1, 1, winograd=True), call(*args, 1, 1, winograd=False)
        for name in ("y", "dx" if spoiled is weight else "dweight"):
            torch.testing.assert_close(ours[name], direct[name], rtol=0, atol=0, equal_nan=True)
        spoiled.view(-1)[100] = before


def test_a_large_number_costs_only_its_own_squares_digits(layout: torch.memory_format) -> None:
    x, weight = torch.randn(1, 32, 12, 12).contiguous(memory_format=layout), torch.randn(32, 32, 3, 3)
    plain = F.conv2d(x, weight, None, 1, 1, winograd=True)
    x[0, 3, 6, 6] = 1e6
    large = F.conv2d(x, weight, None, 1, 1, winograd=True)
    met = torch.zeros(12, 12, dtype=torch.bool)
    met[4:8, 4:8] = True  # the squares whose 4 x 4 pixels hold it
    assert large[..., ~met].equal(plain[..., ~met]) and not large[..., met].equal(plain[..., met])


@pytest.mark.isa
def test_threads_do_not_change_a_bit(layout: torch.memory_format) -> None:
    for N, C, H in ((3, 64, 30), (9, 48, 6)):
        x, weight = torch.randn(N, C, H, H).contiguous(memory_format=layout), torch.randn(C, C, 3, 3)
        found = []
        for count in (1, 2, 3):
            with threads(count):
                found.append(call(x, weight, 1, 1, winograd=True))
        assert all(other[name].equal(value) for name, value in found[0].items() for other in found[1:])


def test_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 8, 8)
    for kind in (dlkernels.nn.Conv2d, dlkernels.nn.ConvReLU2d):
        plain, layer = kind(32, 32, 3, padding=1), kind(32, 32, 3, padding=1, winograd=True)
        layer.load_state_dict(plain.state_dict())
        assert not layer(x).equal(plain(x)) and "winograd" in repr(layer) and "winograd" not in repr(plain)
        assert copy.deepcopy(layer)(x).equal(layer(x))
        torch.testing.assert_close(layer(x), plain(x))
        plain.winograd = True
        assert layer(x).equal(plain(x))
    theirs = torch.nn.Conv2d(32, 32, 3, padding=1)
    dlkernels.accelerate(theirs)
    before = theirs(x)
    theirs.winograd = True  # type: ignore[assignment]
    assert not theirs(x).equal(before)


@pytest.mark.parametrize("build", [lambda: CNN(1, 2), lambda: ResNet((1, 1, 1, 1), 2)], ids=["cnn", "resnet"])
def test_models_allow_it(build: Any) -> None:
    layers = [m for m in build().modules() if isinstance(m, dlkernels.nn.Conv2d)]
    assert layers and all(layer.winograd for layer in layers)
