"""What is peculiar to the losses: reductions, weights, broadcasting, points where a definition changes, and torch's errors and warnings."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from support import DTYPES, SMALL, threads
from torch import Tensor

import dlkernels
import dlkernels.functional as F
import dlkernels.nn as nn
from dlkernels.bench.check import allowed_error, relative_error

NAMES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")
DISTANCES, CROSS_ENTROPIES = NAMES[:4], NAMES[4:]
torch_nn = torch.nn.functional
each_loss = pytest.mark.parametrize("name", NAMES)


def pair(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.sigmoid(x) if name == "binary_cross_entropy" else x
    return x.to(dtype), (torch.sigmoid(target) if name in CROSS_ENTROPIES else target).to(dtype)


def with_gradients(function: Callable[..., Tensor], x: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, target)]
    y = function(*leaves, **options)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) if y.dim() else None
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_as_torch(name: str, x: Tensor, target: Tensor, **options: Any) -> None:
    ours = with_gradients(getattr(F, name), x, target, **options)
    native = with_gradients(getattr(torch_nn, name), x, target, **options)
    for a, b in zip(ours, native, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda text: f"{name} {options}: {text}")
    assert ours[0].stride() == native[0].stride()


def assert_as_accurate(name: str, x: Tensor, target: Tensor, **options: Any) -> None:
    """By the rule of ``dlkernels check``, for half types, whose native losses round between their steps."""
    ours, native = (with_gradients(getattr(module, name), x, target, **options) for module in (F, torch_nn))
    wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in options.items()}
    exact = with_gradients(getattr(torch_nn, name), x.double(), target.double(), **wide)
    for i, truth in enumerate(exact):
        assert (ours[i].dtype, ours[i].shape) == (native[i].dtype, native[i].shape)
        allowed = allowed_error(relative_error(native[i], truth), x.dtype, gradient=i > 0)
        assert relative_error(ours[i], truth) <= allowed, f"{name} {options}: {i}"


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "smooth_l1_loss": [{"beta": beta} for beta in (0.0, 0.3, 1.0, 2, float("inf"))],
    "huber_loss": [{"delta": delta} for delta in (0.3, 1.0, 2, float("inf"))],
    "binary_cross_entropy": [{}, {"weight": 1}],
    "binary_cross_entropy_with_logits": [{}, {"weight": 1}, {"pos_weight": 1}, {"weight": 1, "pos_weight": 1}],
}


@pytest.mark.isa
@each_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_options(name: str, reduction: str) -> None:
    """Every option beside every reduction; weights full, per column, per row, and one for all."""
    for dtype in DTYPES if not SMALL else DTYPES[:1]:
        x, target = pair(name, 5, 19, dtype=dtype)
        for options, shape in product(OPTIONS.get(name, [{}]), [(5, 19), (19,), (5, 1), ()]):
            weights = {key: torch.rand(shape).to(dtype) * 3 if "weight" in key else value for key, value in options.items()}
            if weights or shape == ():
                assert_as_accurate(name, x, target, reduction=reduction, **weights)


@pytest.mark.isa
@each_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_numbers(name: str, reduction: str) -> None:
    assert_as_torch(name, torch.empty(0, 3), torch.empty(0, 3), reduction=reduction)


@pytest.mark.isa
@pytest.mark.parametrize("name", DISTANCES)
def test_where_the_definition_changes(name: str) -> None:
    """|d| equal to beta or delta and just beside it, zero of both signs, and numbers that are none."""
    inf, nan = float("inf"), float("nan")
    d = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, -0.0, 1 + 1e-6, 1 - 1e-6, nan, inf, -inf])
    threshold = {"smooth_l1_loss": "beta", "huber_loss": "delta"}.get(name)
    for options in [{threshold: 0.5}, {threshold: 1.0}] if threshold else [{}]:
        assert_as_torch(name, d, torch.zeros_like(d), reduction="none", **options)


@pytest.mark.isa
@pytest.mark.parametrize("pos_weight", [None, torch.tensor(2.0)])
def test_logits_that_overflow_an_exponential(pos_weight: Tensor | None) -> None:
    x = torch.tensor([-1e4, -100.0, -88.0, -17.0, -0.0, 17.0, 88.0, 100.0, 1e4])
    for target in (0.0, 0.3, 1.0):
        options = {} if pos_weight is None else {"pos_weight": pos_weight}
        assert_as_torch("binary_cross_entropy_with_logits", x, torch.full_like(x, target), reduction="none", **options)


@pytest.mark.isa
def test_probabilities_at_the_ends() -> None:
    """A logarithm of 0 counts as -100, and the gradient divides by 1e-12 at least."""
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-30, 1 - 6e-8, 1e-45, 0.5])
    target = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.5, 0.0])
    assert_as_torch("binary_cross_entropy", x, target, reduction="none")


@pytest.mark.isa
@pytest.mark.parametrize("wrong", [1.5, -1e-7, float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_what_is_no_probability_is_refused(wrong: float, reduction: str) -> None:
    """Wherever it stands; the message names it. Afterwards the op works as before."""
    x, target = pair("binary_cross_entropy", 3, 7001 if not SMALL else 11)
    for place in (0, 2 * x.shape[1] + 3, x.numel() - 1):
        for name in ("input", "target"):
            spoiled = {"input": x.clone(), "target": target.clone()}
            spoiled[name].view(-1)[place] = wrong
            with pytest.raises(RuntimeError):
                torch_nn.binary_cross_entropy(spoiled["input"], spoiled["target"], reduction=reduction)
            said = "input and target should" if SMALL else rf"{name} should be between 0 and 1, element {place} .* is {wrong:.4g}"
            with pytest.raises(RuntimeError, match=f"all elements of {said[:-3]}"):
                F.binary_cross_entropy(spoiled["input"], spoiled["target"], reduction=reduction)
    assert_as_torch("binary_cross_entropy", x, target, reduction=reduction)


def test_a_weight_that_is_no_number_is_not_taken_for_a_wrong_probability() -> None:
    x, target = pair("binary_cross_entropy", 4)
    assert_as_torch("binary_cross_entropy", x, target, weight=torch.tensor([1.0, float("nan"), 2.0, 3.0]), reduction="none")
    assert F.binary_cross_entropy(x, target, weight=torch.full((4,), float("inf"))) == float("inf")


@pytest.mark.parametrize("name", DISTANCES)
def test_broadcasting_warns_as_torch_does(name: str) -> None:
    x, target = torch.randn(4, 3), torch.randn(3)
    for some in ((x, target), (target, x), (x[:, :1], target[None])):
        with pytest.warns(UserWarning, match=r"shape.*broadcast") as caught:
            ours = with_gradients(getattr(F, name), *some)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for a, b in zip(ours, with_gradients(getattr(torch_nn, name), *some), strict=True):
                torch.testing.assert_close(a, b)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"target has shape \(4,\) and input \(4, 3\)"):
        getattr(F, name)(x, torch.randn(4))


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_cross_entropies_do_not_broadcast(name: str) -> None:
    for target in (torch.rand(3), torch.rand(1, 3), torch.rand(4, 1)):
        with pytest.raises(ValueError, match=r"target has shape .* and input \(4, 3\)"):
            getattr(F, name)(torch.rand(4, 3), target)
    for weight in (torch.rand(4), torch.rand(2, 4, 3)):
        with pytest.raises(RuntimeError, match=r"weight has shape .*broadcasts to input's \(4, 3\)"):
            getattr(F, name)(torch.rand(4, 3), torch.rand(4, 3), weight=weight)


@each_loss
def test_results_lie_like_their_arguments(name: str) -> None:
    """Transposed and channels-last arguments: torch's values, and torch's strides without a reduction; in either order of the two."""
    x, target = pair(name, 2, 3, 4, 5)
    last = torch.channels_last
    for some in (
        (x.transpose(1, 3), target.transpose(1, 3)), (x.contiguous(memory_format=last), target.contiguous(memory_format=last)),
        (x[:, :2, ::2], target[:, 1:, ::2]), (x[0].permute(2, 0, 1), target[0].permute(2, 0, 1)),
    ):  # fmt: skip
        for reduction in ("none", "mean"):
            assert_as_torch(name, *some, reduction=reduction)


@each_loss
def test_bad_options(name: str) -> None:
    x, target = pair(name, 3)
    for reduction in ("batchmean", None, 1):
        with pytest.raises(ValueError, match="not a valid value for reduction"):
            getattr(F, name)(x, target, reduction=reduction)
    if name != "huber_loss":
        with pytest.warns(UserWarning, match="deprecated"):
            assert getattr(F, name)(x, target, size_average=False).item() == getattr(F, name)(x, target, reduction="sum").item()
        with pytest.warns(UserWarning, match="deprecated"):
            assert getattr(F, name)(x, target, reduce=False).shape == (3,)
    for some in ((1.0, target), (x, 2), (x, None), ([1.0], target)):
        with pytest.raises(TypeError, match="must be a Tensor, got"):
            getattr(F, name)(*some)


@pytest.mark.isa
def test_bad_thresholds() -> None:
    x = torch.ones(3)
    for beta in (-1.0, float("nan"), -1):
        with pytest.raises(RuntimeError, match="beta"):
            F.smooth_l1_loss(x, x, beta=beta)
    for delta in (0.0, -1.0, float("nan"), 0):
        with pytest.raises(RuntimeError, match="delta"):
            F.huber_loss(x, x, delta=delta)
    with pytest.raises((RuntimeError, TypeError)):
        F.huber_loss(x, x, delta="1")


def test_what_takes_the_definition() -> None:
    """Weighted distances, mixed dtypes, weights that want a gradient: torch's result or error, and `explain` says why."""
    x, target = torch.rand(3), torch.rand(3)
    for name, some, why in (
        ("mse_loss", (x, target.double()), "target has dtype"),
        ("mse_loss", (x, target, None, None, "mean", torch.ones(3)), "has a weight"),
        ("huber_loss", (x, target, "mean", 1.0, torch.ones(3)), "has a weight"),
        ("binary_cross_entropy_with_logits", (x, target, torch.ones(3).double()), "weight has dtype"),
    ):
        choice = dlkernels.explain(name, *some)
        assert choice.implementation == "reference" and why in choice.reason
        torch.testing.assert_close(getattr(F, name)(*some), getattr(torch_nn, name)(*some))
    assert dlkernels.explain("mse_loss", x, target).implementation != "reference"
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        F.binary_cross_entropy_with_logits(x.requires_grad_(), target, weight=torch.ones(3, requires_grad=True))
    weight = torch.rand(3, requires_grad=True)
    F.mse_loss(x, target, weight=weight).backward()
    assert weight.grad is not None


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="the interpreter is too slow for long sums")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_are_exact(dtype: torch.dtype) -> None:
    """Whole numbers: a sum of two million must be right in every bit, with one thread or two."""
    x, target = (torch.arange(1 << 21) % 7 - 3).to(dtype), (torch.arange(1 << 21) % 5 - 2).to(dtype)
    exact = F.mse_loss(x.double(), target.double(), reduction="sum")
    assert exact == torch.sum((x.double() - target.double()) ** 2)
    for count in (1, 2):
        with threads(count):
            assert F.mse_loss(x, target, reduction="sum") == exact.to(dtype)


@pytest.mark.skipif(SMALL, reason="the interpreter is too slow for long sums")
@each_loss
def test_bits_do_not_depend_on_the_threads(name: str) -> None:
    x, target = pair(name, 100003)
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(with_gradients(getattr(F, name), x, target))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each_loss
def test_autocast_widens(name: str) -> None:
    """On torch's list of what autocast does in float32, weights included."""
    x, target = pair(name, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert getattr(F, name)(x, target).dtype == torch.float32
        options = {"weight": torch.rand(7).bfloat16()} if name in CROSS_ENTROPIES else {}
        ours, native = getattr(F, name)(x, target, **options), getattr(torch_nn, name)(x, target, **options)
    torch.testing.assert_close(ours, native)


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("MSELoss", {"reduction": "sum"}), ("L1Loss", {}), ("SmoothL1Loss", {"beta": 0.4}), ("HuberLoss", {"delta": 0.4, "reduction": "none"}),
    ("BCELoss", {"weight": torch.tensor([1.0, 2.0, 3.0])}), ("BCEWithLogitsLoss", {"pos_weight": torch.tensor([1.0, 2.0, 3.0])}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", LAYERS, ids=[name for name, _ in LAYERS])
def test_layers(name: str, options: dict[str, Any]) -> None:
    ours, native = getattr(nn, name)(**options), getattr(torch.nn, name)(**options)
    assert isinstance(ours, type(native)) and repr(ours) == repr(native) and ours.state_dict().keys() == native.state_dict().keys()
    x, target = pair("binary_cross_entropy", 5, 3)
    torch.testing.assert_close(ours(x, target.sigmoid()), native(x, target.sigmoid()))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("name", ["losses_forward", "losses_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", range(6))
def test_kernels_compile_for_gpus(name: str, dtype: torch.dtype, loss: int) -> None:
    """Without spills, and with 64-bit offsets; with weights, and without a reduction."""
    pytest.importorskip("triton")
    from dlkernels.gpu import aot, implementations

    def large() -> Tensor:
        return torch.empty(1024, 1024, dtype=dtype, device="meta")

    def launches(target: str, reduction: int, weights: tuple[Tensor | None, ...]) -> list[Any]:
        dy = large() if reduction == 0 else torch.empty((), dtype=dtype, device="meta")
        options = (large(), large(), *weights, loss, 1.0, reduction)
        return aot.record(lambda: call(*options) if name == "losses_forward" else call(dy, *options, True, True), target)

    call = implementations()[name]
    for target in aot.TARGETS if dtype == torch.float32 and loss > 3 else ["sm_90"]:
        for launch in launches(target, 1, (None, None)) + launches(target, 0, (large(), large() if loss == 5 else None)):
            compiled = aot.compile_launch(launch, target)
            assert compiled.spilled == 0 and 0 < compiled.registers <= 255
            vectors = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", compiled.text("ttir"))
            assert set(vectors) <= {"i64"} and (vectors or launch.kernel.__name__ == "losses_add")
