"""fuse_conv_bn: the same outputs from fewer kernels, for every way in which the layers can follow each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import RawCalls
from torch import Tensor

import dlkernels.functional
import dlkernels.nn as nn
from dlkernels.models.cnn import CNN
from dlkernels.models.resnet import ResNet


def settled(model: torch.nn.Module, shape: tuple[int, ...]) -> tuple[torch.nn.Module, Tensor]:
    """The model in evaluation mode, its batch norms with statistics and weights that change something, and an input."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                if value is not None:
                    torch.nn.init.uniform_(value, 0.5, 1.5)
    return model.eval(), torch.randn(shape)


@torch.no_grad()
def assert_same(model: torch.nn.Module, x: Tensor) -> torch.nn.Module:
    """The fused copy, after a comparison of its outputs in float64 and float32."""
    exact = copy.deepcopy(model).double()
    y = exact(x.double())
    torch.testing.assert_close(nn.fuse_conv_bn(exact)(x.double()), y, rtol=0, atol=1e-13 * y.abs().max().item())
    fused, before = nn.fuse_conv_bn(model), copy.deepcopy(model.state_dict())
    assert (fused(x) - y).abs().max() <= 2 * (model(x) - y).abs().max() + 1e-5 * y.abs().max()
    assert not any(layer.training for layer in fused.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the model itself was changed"
    return fused


def kernels(model: torch.nn.Module, x: Tensor) -> int:
    with torch.no_grad(), RawCalls() as recorded:
        model(x)
    return len(recorded.calls)


@pytest.mark.parametrize(
    ("make", "shape", "saved"),
    [
        (lambda: CNN(widths=(8, 12, 16), hidden=20), (2, 3, 24, 20), 3),
        (lambda: ResNet((1, 2, 1, 1), 10, width=8), (2, 3, 40, 33), 14),  # two convolutions in each of 5 blocks, 3 shortcuts and the stem
    ],
)
def test_the_teaching_models(make: Callable[[], torch.nn.Module], shape: tuple[int, ...], saved: int) -> None:
    model, x = settled(make(), shape)
    fused = assert_same(model, x)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in fused.modules())
    assert kernels(model, x) - kernels(fused, x) == saved
    last = fused(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, fused(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("norm", ["", "BatchNorm2d", "BatchNormReLU2d"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_combination_is_one_kernel(theirs: bool, norm: str, relu: bool, bias: bool) -> None:
    world = torch.nn if theirs else nn
    layers = [world.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=bias, padding_mode="reflect")]
    layers += [getattr(nn if norm == "BatchNormReLU2d" else world, norm)(6)] if norm else []
    layers += [world.ReLU()] if relu else []
    fused = assert_same(*settled(torch.nn.Sequential(*layers), (2, 4, 9, 10)))
    (layer,) = (layer for layer in fused.modules() if isinstance(layer, torch.nn.Conv2d))
    assert type(layer) is (nn.ConvReLU2d if relu or norm == "BatchNormReLU2d" else nn.Conv2d)
    one_more = relu and norm == "BatchNormReLU2d"  # relu(relu(x)): nobody writes it, and it stays right
    assert kernels(fused, torch.randn(2, 4, 9, 10)) == 1 + (one_more and not theirs)


class Calls(torch.nn.Module):
    """A convolution and a batch norm that ``forward`` puts together."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


@pytest.mark.parametrize(
    ("forward", "norms"),
    [
        (lambda m, x: dlkernels.functional.relu(m.bn(m.conv(x))), 0),
        (lambda m, x: torch.nn.functional.relu(m.bn(m.conv(x)), inplace=True), 0),
        (lambda m, x: m.bn(m.conv(x)).relu(), 0),
        (lambda m, x: m.relu(m.bn(m.conv(m.relu(x)))), 0),
        (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), 1),  # what lies between them is used elsewhere
        (lambda m, x: m.bn(m.conv(m.conv(x))), 1),  # filters that are used twice
        (lambda m, x: m.bn(m.relu(m.conv(x))), 1),
        (lambda m, x: (lambda y: m.relu(y) + y)(m.bn(m.conv(x))), 0),
    ],
)
def test_what_belongs_together_is_found_by_the_calls(forward: Callable, norms: int) -> None:
    fused = assert_same(*settled(Calls(forward), (2, 3, 7, 8)))
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in fused.modules()) == norms


def test_subclasses_and_hooks_are_left_alone() -> None:
    class Doubled(torch.nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    for conv in (Doubled(3, 4, 3), torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3))):
        model, x = settled(torch.nn.Sequential(conv, nn.BatchNorm2d(4)), (2, 3, 6, 6))
        torch.testing.assert_close(nn.fuse_conv_bn(model)(x), model(x))
    model, x = settled(torch.nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 6, 6))
    model.get_submodule("0").register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(nn.fuse_conv_bn(model)(x), model(x))


def test_it_can_be_saved_compiled_and_fused_again() -> None:
    model, x = settled(CNN(widths=(4, 8), hidden=8), (2, 3, 16, 16))
    fused = nn.fuse_conv_bn(model)
    torch.testing.assert_close(copy.deepcopy(fused)(x), fused(x))
    torch.testing.assert_close(nn.fuse_conv_bn(fused)(x), fused(x))
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), fused(x))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)], "1 has no running statistics"),
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)], "0 has 4 output channels, 1 behind it takes 5"),
    ],
)
def test_what_cannot_be_folded_is_refused(layers: list[torch.nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nn.fuse_conv_bn(torch.nn.Sequential(*layers).eval())


def test_training_mode_is_refused() -> None:
    model = CNN()
    with pytest.raises(ValueError, match=r"CNN is in training mode: call model.eval\(\) first"):
        nn.fuse_conv_bn(model)
    model.eval().get_submodule("features.1").train()
    with pytest.raises(ValueError, match="features.1 is in training mode"):
        nn.fuse_conv_bn(model)


def test_a_path_that_depends_on_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="control flow"):
        nn.fuse_conv_bn(Calls(lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else x).eval())
