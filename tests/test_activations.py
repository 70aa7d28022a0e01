"""What is peculiar to the activations: their options, strides, extreme arguments, what the backward keeps, and bad arguments."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import DTYPES, SMALL, dtype_name
from torch import Tensor

import dlkernels
import dlkernels.functional as F

torchs = torch.nn.functional
INF, NAN = math.inf, math.nan
# name -> options, each call as `function(x, **options)`
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "relu": [{}],
    "leaky_relu": [{}, *({"negative_slope": a} for a in (0, 0.3, 1.0, 1.5, -0.5))],
    "sigmoid": [{}],
    "tanh": [{}],
    "gelu": [{"approximate": "none"}, {"approximate": "tanh"}],
    "silu": [{}],
    "elu": [{}, *({"alpha": a} for a in (0, 0.3, 2.5, -1.0))],
    "softplus": [{}, *({"beta": b, "threshold": t} for b, t in ((2, 20), (0.5, 1), (3.0, 0.0), (1, -1), (-1.5, 20), (1, 40)))],
}
CASES = [pytest.param(name, options, id=f"{name} {options}") for name, some in OPTIONS.items() for options in some]
each_case = pytest.mark.parametrize(("name", "options"), CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def numbers(dtype: torch.dtype, count: int = 131) -> Tensor:
    """Random numbers of every magnitude that matters, with zeros of both signs."""
    x = torch.randn(count, dtype=torch.float64) * torch.tensor([0.01, 1, 4, 30]).repeat_interleave(-(-count // 4))[:count]
    return torch.cat([x, torch.tensor([0.0, -0.0, 1.0, -1.0])]).to(dtype)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.isa
@each_dtype
@each_case
def test_options(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Values and gradients are torch's in float64, rounded, for every option."""
    x, dy = numbers(dtype), numbers(dtype).flip(0)
    ours = gradient(lambda t: getattr(F, name)(t, **options), x, dy)
    exact = gradient(lambda t: getattr(torchs, name)(t, **options), x.double(), dy.double())
    eps = torch.finfo(dtype).eps
    for value, wanted in zip(ours, exact):
        torch.testing.assert_close(value.double(), wanted, rtol=8 * eps, atol=max(eps, 2e-16) * 4 * float(dy.abs().max()))


@pytest.mark.isa
@each_case
def test_gradcheck(name: str, options: dict[str, Any]) -> None:
    x = torch.tensor([-3.0, -1.1, -0.2, 0.1, 0.4, 2.2, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: getattr(F, name)(t, **options), x)
    assert torch.autograd.gradgradcheck(lambda t: getattr(F, name)(t, **options), x)


@pytest.mark.isa
@each_dtype
@each_case
def test_extreme_arguments(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """The largest numbers, infinities and NaN: torch's values, or those of its float64; alone, and in the middle of a vector."""
    large = [10.0, 20.0, 80.0, 90.0, 700.0, 750.0, 6e4]
    special = torch.tensor([INF, -INF, NAN, *large, *(-v for v in large), 5e-324, -5e-324], dtype=torch.float64).to(dtype)
    for x in (special, special.repeat_interleave(16), special.repeat(16)):
        y, exact = getattr(F, name)(x, **options), getattr(torchs, name)(x.double(), **options).to(dtype)
        native = getattr(torchs, name)(x, **options)
        same = torch.stack([torch.isclose(y, other, rtol=1e-2, atol=1e-30, equal_nan=True) for other in (exact, native)]).any(0)
        tiny = (exact.abs() < 4 * torch.finfo(dtype).tiny) & (y.abs() < 4 * torch.finfo(dtype).tiny)
        gelu_tail = (name == "gelu") & (exact.abs() < 1e-5) & (y.abs() < 1e-5)
        assert (same | tiny | gelu_tail).all(), (x[~same], y[~same], exact[~same])


@pytest.mark.isa
def test_small_arguments_keep_their_digits() -> None:
    """Near 0 elu has no cancellation, and far out softplus and sigmoid end in numbers that are as accurate as any."""
    x = -torch.logspace(-7, -1, 50)
    torch.testing.assert_close(F.elu(x).double(), torch.expm1(x.double()), rtol=1e-6, atol=0)
    tail = torch.linspace(-80, -10, 50)
    torch.testing.assert_close(F.softplus(tail).double(), torch.exp(tail.double()).log1p(), rtol=2e-6, atol=0)
    torch.testing.assert_close(F.sigmoid(tail).double(), tail.double().sigmoid(), rtol=1e-5, atol=0)


@pytest.mark.isa
def test_the_polynomials_of_gelu() -> None:
    """In float32 the error of Phi(x) and of gelu's derivative is the one that math.h names, also where one polynomial ends."""
    x = torch.linspace(-8, 8, 4001 if SMALL else 400_001)
    (y, dx), (exact, slope) = (gradient(f, t, torch.ones_like(t)) for f, t in ((F.gelu, x), (torchs.gelu, x.double())))
    assert ((y - exact).abs() <= 6e-7 * x.abs().clamp(min=1)).all() and (dx - slope).abs().max() <= 6e-7
    assert not F.gelu(torch.tensor([-20.0, -1e30])).any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 0, 2, 1),
    "stepped": lambda t: t[:, ::2, 1:],
    "stepped and permuted": lambda t: t.permute(2, 0, 3, 1)[::2, :, 1:],
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "expanded and permuted": lambda t: t[:, :1].expand(t.shape).permute(3, 1, 0, 2),
    "scalar": lambda t: t[0, 0, 0, 0],
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@each_layout
def test_strides_are_torchs(layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(torch.randn(2, 3, 4, 5))
    for dy in (torch.randn(x.shape), layout(torch.randn(2, 3, 4, 5)), torch.ones(()).expand(x.shape)):
        (y, dx), (native, wanted) = (gradient(function, x, dy) for function in (F.silu, torchs.silu))
        assert y.stride() == native.stride()
        torch.testing.assert_close(y, native)
        torch.testing.assert_close(dx, wanted)


def test_dense_arguments_are_not_copied() -> None:
    """channels_last is one long array to the kernel: the only memory asked for is that of the result."""
    x = torch.randn(4, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profile:
        F.relu(x)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 1.5 * x.nbytes


@pytest.mark.parametrize("name, kept", [("relu", "y"), ("leaky_relu", "y"), ("sigmoid", "y"), ("tanh", "y"), ("elu", "y"), ("gelu", "x"),
                                        ("silu", "x"), ("softplus", "x")])  # fmt: skip
def test_what_is_kept(name: str, kept: str) -> None:
    saved: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = getattr(F, name)(x)
    assert [t.data_ptr() for t in saved] == [{"x": x, "y": y}[kept].data_ptr()]


UNUSUAL: list[tuple[Any, ...]] = [
    (torch.tensor([-1, 2]),), (torch.tensor([True]),), (torch.ones(2, dtype=torch.complex64),), (torch.eye(3).to_sparse(),), (None,),
    ([1.0],), (1.0,), (torch.ones(3, device="meta"),), (torch.ones(2, 0, 3),), (torch.tensor(-1.5),), (),
]  # fmt: skip


@pytest.mark.parametrize("args", UNUSUAL, ids=lambda args: str([getattr(a, "dtype", a) for a in args]))
@pytest.mark.parametrize("name", [*OPTIONS, "relu_", "leaky_relu_", "elu_"])
def test_unusual_arguments(name: str, args: tuple[Any, ...]) -> None:
    """A result like torch's, or an exception of torch's type."""
    outcomes: list[Any] = []
    for functional in (F, torchs):
        try:
            y = getattr(functional, name)(*(a.clone() if isinstance(a, Tensor) else a for a in args))
            outcomes.append((y.shape, y.dtype, y.layout, y.device))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_bad_options_raise_as_in_torch() -> None:
    x = torch.ones(3)
    calls: list[Callable[[Any], Any]] = [
        lambda f: f.gelu(x, approximate="cubic"),
        lambda f: f.gelu(x, "tanh"),
        lambda f: f.gelu(x, approximate=None),
        lambda f: f.leaky_relu(x, "steep"),
        lambda f: f.leaky_relu(x, None),
        lambda f: f.elu(x, "a"),
        lambda f: f.elu(x, None),
        lambda f: f.softplus(x, "b"),
        lambda f: f.softplus(x, 1, None),
        lambda f: f.relu(x, True, 3),
    ]
    for call in calls:
        kinds = []
        for functional in (F, torchs):
            with pytest.raises(Exception) as caught:
                call(functional)
            kinds.append(caught.type)
        assert kinds[0] is kinds[1]


def test_raw_ops_refuse_bad_arguments() -> None:
    x, ops = torch.ones(5), torch.ops.dlkernels
    wrong = [(x, code, 0.0, 0.0) for code in (0, -1, 10, 99, 2**31, 2**63 - 1)]
    wrong += [(t, 1, 0.0, 0.0) for t in (torch.ones(5, dtype=torch.int64), torch.ones(5, dtype=torch.complex64), torch.eye(3).to_sparse())]
    for args in wrong:
        for call in (ops.activation_forward, ops.activation_forward_, lambda x, *rest: ops.activation_backward(x, x, *rest)):
            with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
                call(*args)
    for dy in (torch.ones(4), torch.ones(5, 1), torch.ones(5).double(), torch.ones(5, device="meta"), torch.ones(())):
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
            ops.activation_backward(dy, x, 1, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.activation_forward_(torch.ones(4, 4).t()[1:], 1, 0.0, 0.0)


@pytest.mark.parametrize(
    "name, args",
    [("ReLU", ()), ("ReLU", (True,)), ("LeakyReLU", (0.2,)), ("LeakyReLU", (0.2, True)), ("Sigmoid", ()), ("Tanh", ()), ("GELU", ()),
     ("GELU", ("tanh",)), ("SiLU", ()), ("SiLU", (True,)), ("ELU", (0.5,)), ("ELU", (0.5, True)), ("Softplus", (2.0, 1.0))],
)  # fmt: skip
def test_layers(name: str, args: tuple[Any, ...]) -> None:
    ours, theirs = getattr(dlkernels.nn, name)(*args), getattr(torch.nn, name)(*args)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs) and not list(ours.parameters())
    x = torch.randn(3, 33)
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))
    changed = x.clone()
    assert (ours(changed) is changed) == any(arg is True for arg in args)


def test_softplus_is_widened_by_autocast_on_cuda_alone() -> None:
    x = torch.ones(3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.softplus(x).dtype == torchs.softplus(x).dtype == torch.bfloat16


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("code", range(1, 10))
def test_compiles_for_gpus(code: int) -> None:
    """No spills, offsets of 64 bits; every dtype for one target, every target for one dtype."""
    aot = pytest.importorskip("dlkernels.gpu.aot")
    from dlkernels.gpu import activations as kernels

    for target, dtype in [(t, torch.bfloat16) for t in aot.TARGETS] + [("sm_90", d) for d in (torch.float32, torch.float64, torch.float16)]:
        x = torch.empty(1024, 1024, dtype=dtype, device="meta")
        launches = aot.record(partial(kernels.forward, x, code, 1.0, 20.0), target)
        launches += aot.record(partial(kernels.backward, x, x, code, 1.0, 20.0), target)
        assert len(launches) == 2
        for kernel in (aot.compile_launch(launch, target) for launch in launches):
            assert kernel.spilled == 0 and kernel.registers <= 128, kernel
            addresses = [line for line in kernel.text("ttir").splitlines() if "tt.addptr" in line]
            assert addresses and all("xi64>" in line for line in addresses), "an offset of 32 bits"
