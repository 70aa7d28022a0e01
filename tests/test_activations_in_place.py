"""The activations in place: memory, versions, gradients, leaves and views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_activations import OPTIONS, each_dtype, each_layout, torchs
from torch import Tensor

import dlkernels.functional as F

INPLACE = [  # torch has no gradient of elu in place with a negative alpha
    pytest.param(name, options, id=f"{name} {options}")
    for name in ("relu", "leaky_relu", "silu", "elu")
    for options in OPTIONS[name]
    if options.get("alpha", 1) >= 0
]


@each_dtype
@each_layout
@pytest.mark.parametrize(("name", "options"), INPLACE)
def test_in_place(name: str, options: dict[str, Any], layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """The input's memory holds the result, its version moves by one, and the gradient is that of the other form."""
    leaf = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    function = getattr(F, name)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = layout(leaf * 1)
            wanted, version = function(x.clone(), **options), x._version
            if 0 in x.stride():
                with pytest.raises(RuntimeError):
                    function(x, **options, inplace=True)
                continue
            y = function(x, **options, inplace=True)
            assert y is x and x._version == version + 1
            assert torch.equal(x, wanted)
            if grad:
                dy = torch.randn(x.shape).to(dtype)
                torch.testing.assert_close(*(torch.autograd.grad(t, leaf, dy, retain_graph=True)[0] for t in (y, wanted)))


def test_names_with_an_underscore() -> None:
    for name, args in (("relu_", ()), ("leaky_relu_", (0.3,)), ("elu_", (0.7,))):
        x = torch.randn(33)
        wanted = getattr(torchs, name)(x.clone(), *args)
        assert getattr(F, name)(x, *args) is x
        torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize(("name", "options"), INPLACE)
def test_second_derivatives_in_place(name: str, options: dict[str, Any]) -> None:
    x = torch.tensor([-3.0, -0.2, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: getattr(F, name)(t * 1, **options, inplace=True), x)


def test_in_place_refuses_leaves_and_leaves_them_alone() -> None:
    for view in (False, True):
        leaf = -torch.ones(4)
        leaf.requires_grad_()
        x = leaf[1:] if view else leaf
        for function in (torchs.relu, F.relu, F.silu):
            with pytest.raises(RuntimeError, match="leaf"):
                function(x, inplace=True)
        assert torch.equal(leaf, -torch.ones(4)) and leaf._version == 0
        with torch.no_grad():
            F.relu(x, inplace=True)
        assert x.sum() == 0


def test_in_place_on_part_of_a_tensor() -> None:
    """A view that is overwritten changes its base, and the gradient of the base knows."""
    leaves = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    leaves[1].data.copy_(leaves[0].data)
    for functional, leaf in zip((F, torchs), leaves):
        base = leaf * 2
        functional.silu(base[1], inplace=True)
        base.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_what_was_saved_before_an_overwrite_is_noticed() -> None:
    x = torch.randn(5, requires_grad=True)
    for grad in (True, False):
        square = (y := x * 1).square()
        with torch.set_grad_enabled(grad):
            F.relu(y, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


@pytest.mark.parametrize(("name", "options"), INPLACE)
def test_in_place_compiled_and_mapped(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        return getattr(F, name)(x * 2, **options, inplace=True) * 1

    x = torch.randn(3, 33, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    dy = torch.randn(3, 33)
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x, dy)[0] for f in (compiled, function)))
    torch.testing.assert_close(torch.func.vmap(function)(x.detach()), function(x.detach()))
