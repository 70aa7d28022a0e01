"""What is peculiar to batch normalisation: running statistics, memory formats, mixed dtypes, large means, the layers."""

from __future__ import annotations

import copy
import os
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import SMALL, threads
from torch import Tensor

import dlkernels
import dlkernels.functional as F
import dlkernels.nn

BATCH, CHANNELS = 4, 6
SHAPES = [(BATCH, CHANNELS), (BATCH, CHANNELS, 9), (BATCH, CHANNELS, 5, 7), (BATCH, CHANNELS, 3, 2, 5)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
KINDS = {dtype: [dtype, torch.float32][: 1 + (dtype.itemsize == 2)] for dtype in dlkernels.registry.FLOATS}  # of the parameters
interpreted_dtypes = [torch.float32] if SMALL else [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def relu_of_native(*args: Any, **options: Any) -> Tensor:
    return torch.relu(native.batch_norm(*args, **options))


PAIRS = {"batch_norm": (F.batch_norm, native.batch_norm), "batch_norm_relu": (F.batch_norm_relu, relu_of_native)}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())


def statistics(dtype: torch.dtype = torch.float32, C: int = CHANNELS) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, C).to(dtype), torch.linspace(0.5, 2, C).to(dtype)


def outcome(function: Any, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except Exception as error:
        return error


@pytest.mark.isa
@each_pair
@pytest.mark.parametrize("dtype", interpreted_dtypes, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_combination_of_options(pair: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Values, gradients, running statistics, strides and dtypes are torch's: training or not, with and without weight, bias and running
    statistics, whose dtype may be float32 beside a half type, in both memory formats."""
    torch.manual_seed(0)
    options = product((True, False), (True, False), (True, False), (True, False), KINDS[dtype], (False, True))
    for training, has_weight, has_bias, has_statistics, kind, last in options:
        if (not training and not has_statistics) or (last and len(shape) < 4):
            continue
        x = torch.randn(shape).to(dtype)
        x = x.contiguous(memory_format=FORMATS[len(shape)]) if last else x
        weight = torch.randn(CHANNELS).to(kind) if has_weight else None
        bias = torch.randn(CHANNELS).to(kind) if has_bias else None
        mean, var = statistics(kind) if has_statistics else (None, None)
        near_zero = native.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-4).abs() < 0.05  # where rounding decides what relu cuts
        dy = torch.randn(shape).masked_fill(near_zero, 0).to(dtype)
        found = []
        for function in pair:
            mean, var = statistics(kind) if has_statistics else (None, None)
            leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
            y = function(leaves[0], mean, var, *leaves[1:], training, 0.3, 1e-4)
            y.backward(dy)
            found.append([y.detach(), *(None if t is None else t.grad for t in leaves), mean, var])
        for name, ours, theirs in zip(("y", "dx", "dweight", "dbias", "running_mean", "running_var"), *found, strict=True):
            assert (ours is None) == (theirs is None), name
            if theirs is not None:
                assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride()), name
                rtol, atol = (3e-2, 1e-1) if dtype.itemsize == 2 else (None, None)
                torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.isa
@pytest.mark.parametrize("layer", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormReLU1d", "BatchNormReLU2d", "BatchNormReLU3d"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_hundred_steps_of_a_layer(layer: str, momentum: float | None) -> None:
    """Running statistics and the count of batches after 100 steps, and eval with them; the state_dict fits torch's layer."""
    ours = getattr(dlkernels.nn, layer)(CHANNELS, momentum=momentum)
    theirs = getattr(torch.nn, layer.replace("ReLU", ""))(CHANNELS, momentum=momentum)
    theirs.load_state_dict(ours.state_dict())
    shape = SHAPES[int(layer[-2])]
    for step in range(10 if SMALL else 100):
        x = torch.randn(shape) * (1 + step % 3) + step
        ours(x), theirs(x)
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert ours.num_batches_tracked == theirs.num_batches_tracked > 0
    wanted = theirs.eval()(x)
    torch.testing.assert_close(ours.eval()(x), wanted.relu() if "ReLU" in layer else wanted, rtol=1e-5, atol=1e-4)
    assert isinstance(ours, getattr(torch.nn, layer.replace("ReLU", "")))
    assert type(copy.deepcopy(ours)) is type(ours) and repr(ours).startswith(layer + "(6, eps=")


def test_layers_without_statistics_or_weights() -> None:
    for options in ({"track_running_stats": False}, {"affine": False}, {"bias": False}, {"affine": False, "track_running_stats": False}):
        ours, theirs = dlkernels.nn.BatchNorm1d(CHANNELS, **options), torch.nn.BatchNorm1d(CHANNELS, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for training in (True, False):
            x = torch.randn(BATCH, CHANNELS)
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        dlkernels.nn.BatchNorm1d(CHANNELS)(torch.randn(1, CHANNELS, 2, 2))


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(4096, 3), (8, 3, 40, 13)], ids=str)
def test_a_large_mean_does_not_cancel(shape: tuple[int, ...]) -> None:
    """Mean 10^4, deviation 10^-2: two digits of every number are left, and all of them count."""
    if SMALL:
        shape = (64, 3)
    for last in (False, True) if len(shape) == 4 else (False,):
        x = (1e4 + 1e-2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).float()
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
        mean, var = torch.zeros(3), torch.zeros(3)
        weight = torch.ones(3, requires_grad=True)
        y = F.batch_norm(x, mean, var, weight, None, True, momentum=1.0)
        exact = x.detach().double().requires_grad_()
        y64 = native.batch_norm(exact, None, None, torch.ones(3, dtype=torch.float64), None, True)
        dims = [d for d in range(x.dim()) if d != 1]
        torch.testing.assert_close(var.double(), exact.detach().var(dims), rtol=1e-5, atol=0)
        torch.testing.assert_close(mean.double(), exact.detach().mean(dims), rtol=1e-7, atol=0)
        torch.testing.assert_close(y.double(), y64, rtol=1e-4, atol=1e-4)
        dy = torch.randn(shape)
        (ours,), (wanted,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(y64, exact, dy.double())
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.isa
def test_equal_numbers_have_no_variance() -> None:
    for shape in ((37, 5), (3, 5, 11, 7)):
        mean, var = torch.zeros(5), torch.ones(5)
        y = F.batch_norm(torch.full(shape, 0.1), mean, var, None, None, True, momentum=1.0)
        assert not y.any() and not var.any() and (mean == torch.tensor(0.1)).all()


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="the interpreter has no threads")
@pytest.mark.parametrize("shape", [(3, 5, 120, 97), (3, 70, 41, 37), (2, 1, 200, 190), (3000, 7), (700, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_do_not_depend_on_the_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Few channels and many, rows and columns, each with several blocks."""
    for last in (False, True) if len(shape) == 4 else (False,):
        x = torch.randn(shape).to(dtype)
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
        weight, bias = (torch.randn(shape[1]).to(dtype).requires_grad_() for _ in range(2))
        dy, found = torch.randn(shape).to(dtype), []
        for count in (1, 2, 3):
            with threads(count):
                mean, var = torch.zeros(shape[1]).to(dtype), torch.ones(shape[1]).to(dtype)
                y = F.batch_norm_relu(x, mean, var, weight, bias, True)
                found.append([y, mean, var, *torch.autograd.grad(y, (x, weight, bias), dy)])
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_running_statistics_of_any_strides_are_updated_in_place() -> None:
    """With a new version, so that autograd and views notice."""
    large = torch.zeros(2 * CHANNELS)
    mean, var = large[::2], torch.ones(CHANNELS)
    wanted_mean, wanted_var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    x = torch.randn(BATCH, CHANNELS)
    before = mean._version, var._version
    F.batch_norm(x, mean, var, training=True)
    native.batch_norm(x, wanted_mean, wanted_var, training=True)
    torch.testing.assert_close(large[::2], wanted_mean)
    torch.testing.assert_close(var, wanted_var)
    assert not large[1::2].any()
    assert mean._version > before[0] and var._version > before[1]


def test_eval_backward_survives_a_training_step() -> None:
    """What backward needs of the running statistics is kept apart from them."""
    x = torch.randn(BATCH, CHANNELS, requires_grad=True)
    mean, var = statistics()
    wanted = torch.autograd.grad(native.batch_norm(x, mean.clone(), var.clone()).square().sum(), x)[0]
    y = F.batch_norm(x, mean, var)
    F.batch_norm(x, mean, var, training=True)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], wanted)


def test_second_derivatives_do_not_update_again() -> None:
    x = torch.randn(BATCH, CHANNELS, requires_grad=True)
    mean, var = statistics()
    y = F.batch_norm(x, mean, var, training=True)
    kept: tuple[Tensor, Tensor] = (mean.clone(), var.clone())
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert all(torch.equal(now, before) for now, before in zip((mean, var), kept, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_layers_update_as_uncompiled_ones_do(training: bool) -> None:
    torch._dynamo.reset()
    eager = dlkernels.nn.BatchNorm2d(CHANNELS).train(training)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(SHAPES[2])
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        eager(a).square().sum().backward()
        step(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    for mine, other in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_export_of_a_training_layer_keeps_the_update() -> None:
    layer = dlkernels.nn.BatchNorm1d(CHANNELS)
    x = torch.randn(BATCH, CHANNELS)
    exported = torch.export.export(layer, (x,)).module()
    with torch.no_grad():
        exported(x), layer(x)
    assert torch.equal(exported.get_buffer("running_mean"), layer.get_buffer("running_mean"))


def test_torch_func_is_torchs() -> None:
    """vmap refuses to update what is not batched; with batched statistics, without any and in eval it works; grad updates."""
    mean, var = statistics()
    xs = torch.randn(3, BATCH, CHANNELS)
    errors = [outcome(torch.vmap(partial(f, running_mean=mean, running_var=var, training=True)), xs) for f in PAIRS["batch_norm"]]
    assert all(isinstance(error, RuntimeError) and "not batched" in str(error) for error in errors)
    for some, training in (((mean, var), False), ((None, None), True)):
        options: dict[str, Any] = {"running_mean": some[0], "running_var": some[1], "training": training}
        ours, theirs = (torch.vmap(partial(f, **options))(xs) for f in PAIRS["batch_norm"])
        torch.testing.assert_close(ours, theirs)
    means = [mean.clone() for _ in range(2)]
    for f, m in zip(PAIRS["batch_norm"], means, strict=True):
        torch.func.grad(lambda *args, f=f: f(*args, training=True).square().sum())(xs[0], m, var.clone())
    torch.testing.assert_close(*means)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter leaves nothing to compile")
class TestTritonCode:
    """Ahead of time, for every target: no spills, 64-bit offsets, and both memory formats."""

    @staticmethod
    def launches(x: Tensor, target: str, relu: bool = True) -> list[Any]:
        from dlkernels.gpu import aot
        from dlkernels.gpu import batch_norm as kernels

        C = x.shape[1]
        channel = torch.empty(C, dtype=x.dtype, device="meta")
        stats = torch.empty(3, C, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device="meta")
        return [
            *aot.record(lambda: kernels.train(x, channel, channel, channel, channel, 0.1, 1e-5, relu), target),
            *aot.record(lambda: kernels.backward(x, x, channel, channel, stats, True, 1e-5, relu, True, True, True), target),
        ]

    @pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
    def test_no_spills_and_64_bit_offsets(self, target: str) -> None:
        import re

        from dlkernels.gpu import aot

        for dtype, last in ((torch.bfloat16, False), (torch.float32, True), (torch.float64, True)):
            x = torch.empty(32, 64, 56, 56, dtype=dtype, device="meta")
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            found = {launch.kernel.__name__: launch for launch in self.launches(x, target)}
            assert len(found) == 6
            for launch in found.values() if target == "sm_90" or not last else [found["batch_norm_moments"], found["batch_norm_dx"]]:
                compiled = aot.compile_launch(launch, target)
                assert compiled.spilled == 0, compiled
                offsets = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", compiled.text("ttir"))
                assert set(offsets) <= {"i64"}, compiled
