"""What accelerate leaves alone: subclasses that compute something else, and a forward whose calls depend on more than can be proved."""

from __future__ import annotations

import copy

import pytest
import torch
from support import RawCalls
from torch import Tensor

import dlkernels
import dlkernels.nn
from dlkernels.acceleration import swap

nn = torch.nn


def subclasses() -> dict[str, tuple[nn.Module, str | None]]:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Named(nn.Linear):
        def __init__(self, name: str) -> None:
            super().__init__(4, 4)
            self.name = name

        def extra_repr(self) -> str:
            return self.name

    class Standardised(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight / 2, bias)

    own = nn.Linear(4, 4)
    own.forward = lambda input: input  # type: ignore[method-assign]
    return {
        "scaled": (Scaled(4, 4), "overrides forward of Linear"),
        "standardised": (Standardised(4, 4, 1), "overrides _conv_forward of Conv2d"),
        "own": (own, "its forward is set on the layer itself"),
        "normed": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
        "lazy": (nn.LazyLinear(4), "overrides"),
        "softsign": (nn.Softsign(), "no kernel"),
        "attention": (nn.MultiheadAttention(4, 2), "no kernel"),
        "named": (Named("a name"), None),
    }


def test_what_a_subclass_changes_is_kept() -> None:
    for name, (layer, reason) in subclasses().items():
        if isinstance(layer, nn.MultiheadAttention) and nn.MultiheadAttention in swap.OURS:
            continue
        kind = type(layer)
        report = dlkernels.accelerate(layer)
        if reason is not None:
            assert type(layer) is kind and reason in report.left[0].reason, name
        else:
            assert isinstance(layer, (kind, dlkernels.nn.Linear)) and repr(layer) == "Named(a name)"
            with RawCalls() as recorded:
                layer(torch.randn(2, 4))
            assert len(recorded.calls) == 1
            assert type(copy.deepcopy(layer)) is kind
            report.undo()
            assert type(layer) is kind


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.norm, self.flag, self.extra = nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), True, None


class ByFlag(Straight):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc(x)) if self.flag else torch.tanh(self.fc(x))
        return self.norm(h) if self.training else h


class ByNone(Straight):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.act(self.fc(x))
        return h if y is None else h + y


class ByNumber(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) * torch.rand(1).item()


class ByRandomTensor(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) * torch.rand(4)


class ByMethod(Straight):
    def helper(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)


class Counting(Straight):
    def forward(self, x: Tensor) -> Tensor:
        self.flag = not self.flag
        return self.act(self.fc(x))


class TwoReaders(Straight):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.act(h) + h


class Loop(Straight):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.act(self.fc(x))
        return x


@pytest.mark.parametrize("kind", [ByNone, ByNumber, ByRandomTensor, ByMethod, Counting, TwoReaders, Loop])
def test_what_cannot_be_proved_is_not_fused(kind: type[Straight]) -> None:
    model, x = kind(), torch.randn(3, 4)
    attributes = set(vars(model))
    torch.manual_seed(1)
    y = model(x)
    report = dlkernels.accelerate(model)
    assert report.fused == [] and type(model) is kind and set(vars(model)) == attributes
    assert any("nothing fused" in row.reason for row in report.left) is (kind is not TwoReaders)
    if kind is not Counting:
        torch.manual_seed(1)
        torch.testing.assert_close(model(x), y)


def test_an_attribute_that_forward_asks_for_may_change() -> None:
    model, x = ByFlag(), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    assert len(dlkernels.accelerate(model).fused) == 1
    for flag in (True, False):
        for training in (True, False):
            model.flag = plain.flag = flag
            torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
