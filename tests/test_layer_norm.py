"""What is peculiar to layer_norm and rms_norm: rows of every length, means far from 0, parameters of another dtype, torch's options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import SMALL, threads
from torch import Tensor

import dlkernels
import dlkernels.functional as F
from dlkernels.bench.check import allowed_error, relative_error


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def with_gradients(function: Callable[..., Any], *tensors: Tensor | None, dys: tuple[Tensor, ...] = ()) -> list[Tensor]:
    """Results and gradients; None among ``tensors`` is passed along."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    ys = function(*leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    grads = torch.autograd.grad(ys, [t for t in leaves if t is not None], dys or [torch.ones_like(y) for y in ys])
    return [*(y.detach() for y in ys), *grads]


def assert_right(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], outputs: int = 1) -> None:
    for i, (value, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert (value.dtype, value.shape) == (other.dtype, other.shape)
        assert relative_error(value, truth) <= allowed_error(relative_error(other, truth), value.dtype, gradient=i >= outputs), i


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(norm: str, M: int, N: int, dtype: torch.dtype = torch.float32, parameter: torch.dtype | None = None) -> list[Tensor]:
    """x, weight, and bias where ``norm`` has one."""
    parameter = parameter or dtype
    return [random(M, N, dtype=dtype), random(N, dtype=parameter, seed=1), random(N, dtype=parameter, seed=2)][: len(NAMES[norm])]


def of(module: Any, norm: str, shape: Any) -> Callable[..., Tensor]:
    """``norm`` of x, weight and bias."""
    return lambda x, *parameters: getattr(module, norm)(x, shape, **dict(zip(NAMES[norm][1:], parameters)), eps=1e-5)


NAMES = {"layer_norm": ("x", "weight", "bias"), "rms_norm": ("x", "weight")}
NORMS = list(NAMES)
each_norm = pytest.mark.parametrize("norm", NORMS)
# rows of one block, of several, and long ones, each in numbers that do and do not fill the threads and the groups of rows
SIZES = [(1, 700), (37, 100), (67, 1300), (3, 4097), (40, 5003), (3, 50021), (20, 20011), (2, 100003)]


@pytest.mark.isa
@each_norm
@pytest.mark.parametrize("M, N", [(2, 20011), (9, 9001)] if SMALL else SIZES)
@pytest.mark.parametrize("dtype", [torch.float32] if SMALL else [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_every_length(norm: str, M: int, N: int, dtype: torch.dtype) -> None:
    tensors = arguments(norm, M, N, dtype)
    dy = random(M, N, dtype=dtype, seed=3)
    ours, theirs = (with_gradients(of(module, norm, (N,)), *tensors, dys=(dy,)) for module in (F, native))
    exact = with_gradients(of(native, norm, (N,)), *(t.double() for t in tensors), dys=(dy.double(),))
    assert_right(ours, theirs, exact)


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="CPU kernels only")
@each_norm
@pytest.mark.parametrize("M, N", SIZES)
def test_the_number_of_threads_changes_no_bit(norm: str, M: int, N: int) -> None:
    tensors = arguments(norm, M, N)
    found = []
    for count in (1, 2, 3, 8):
        with threads(count):
            found.append(with_gradients(of(F, norm, (N,)), *tensors, dys=(random(M, N, seed=3),)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="CPU kernels only")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, w, b = random(9, 300), random(300, seed=1), random(300, seed=2)
    whole = F.layer_norm(x, (300,), w, b)
    assert all(torch.equal(whole[m], F.layer_norm(x[m], (300,), w, b)) for m in range(9))


@pytest.mark.isa
@pytest.mark.parametrize("N", [768, 5000] if SMALL else [768, 5000, 100003])
def test_a_large_mean_does_not_cancel(N: int) -> None:
    """Mean 10000, standard deviation 0.01: torch's float32 is off by some tenths; ours is as exact as for mean 0, gradients included."""
    x, w, dy = 1e4 + 1e-2 * random(3, N), random(N, seed=1), random(3, N, seed=2)
    ours = with_gradients(lambda x, w: F.layer_norm(x, (N,), w), x, w, dys=(dy,))
    exact = with_gradients(lambda x, w: native.layer_norm(x, (N,), w), x.double(), w.double(), dys=(dy.double(),))
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(ours, exact))


@pytest.mark.isa
def test_an_outlier_in_the_first_block_costs_no_accuracy() -> None:
    x = random(2, 9000)
    x[:, :3] = 1e6
    assert relative_error(F.layer_norm(x, (9000,)), native.layer_norm(x.double(), (9000,))) < 2e-6


@each_norm
@pytest.mark.parametrize("lead", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1,), (7, 1)], ids=str)
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
def test_normalized_shapes(norm: str, shape: tuple[int, ...], lead: tuple[int, ...], affine: str) -> None:
    if norm == "rms_norm" and affine not in ("weight", "neither"):
        return
    x = random(*lead, *shape, dtype=torch.float64)
    weight = random(*shape, dtype=torch.float64, seed=1) if affine in ("both", "weight") else None
    bias = random(*shape, dtype=torch.float64, seed=2) if affine in ("both", "bias") else None
    tensors = (x, weight, bias) if norm == "layer_norm" else (x, weight)
    for given in (shape, list(shape), torch.Size(shape)):
        ours, theirs = (with_gradients(of(module, norm, given), *tensors, dys=(x + 1,)) for module in (F, native))
        assert all(torch.allclose(a, b, atol=1e-12) and a.stride() == b.stride() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0, 1])
@each_norm
def test_eps(norm: str, eps: float) -> None:
    x = random(4, 9, dtype=torch.float64)
    ours, theirs = (getattr(module, norm)(x, (9,), eps=eps) for module in (F, native))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_without_eps(dtype: torch.dtype) -> None:
    """eps is torch's own choice by dtype; numbers as small as these show which."""
    x = (random(4, 64) * 1e-4).to(dtype)
    torch.testing.assert_close(F.rms_norm(x, (64,)), native.rms_norm(x, (64,)))


@pytest.mark.isa
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("dtype", [torch.float16] if SMALL else [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M, N", [(5, 33)] if SMALL else [(5, 33), (40, 768), (3, 40009)])
@each_norm
def test_float32_parameters_beside_half_types(norm: str, M: int, N: int, dtype: torch.dtype) -> None:
    """By a kernel; the gradients of the parameters are float32 and not rounded on their way."""
    tensors = arguments(norm, M, N, dtype, torch.float32)
    assert dlkernels.explain(norm, *tensors).implementation != "reference"
    dy = random(M, N, dtype=dtype, seed=3)
    ours, theirs = (with_gradients(of(module, norm, (N,)), *tensors, dys=(dy,)) for module in (F, native))
    exact = with_gradients(of(native, norm, (N,)), *(t.double() for t in tensors), dys=(dy.double(),))
    assert_right(ours, theirs, exact)
    assert ours[2].dtype == torch.float32 and relative_error(ours[2], exact[2]) < 1e-6


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


CASES: dict[str, tuple[Any, ...]] = {
    "M = 0": (ones(0, 3), (3,), ones(3)),
    "N = 0": (ones(2, 0), (0,), ones(0)),
    "N = 0, 3-D": (ones(2, 5, 0), (5, 0), ones(5, 0)),
    "all 0": (ones(0, 0), (0,), ones(0)),
    "another size": (ones(2, 3), (4,)),
    "more dimensions than the input": (ones(3), (2, 3)),
    "no dimension": (ones(2, 3), ()),
    "a number": (ones(2, 3), 3),
    "a tensor": (ones(2, 3), torch.tensor([3])),
    "a float": (ones(2, 3), (3.0,)),
    "a string": (ones(2, 3), "3"),
    "0-D input": (ones(), ()),
    "0-D input, one number": (ones(), (1,)),
    "weight longer": (ones(2, 3), (3,), ones(4)),
    "weight 2-D": (ones(2, 3), (3,), ones(1, 3)),
    "input a list": ([1.0], (1,)),
    "weight a list": (ones(2, 3), (3,), [1.0, 1.0, 1.0]),
    "integers": (ones(2, 3, dtype=torch.int64), (3,)),
    "complex": (ones(2, 3, dtype=torch.complex64), (3,)),
    "weight float64": (ones(2, 3), (3,), ones(3, dtype=torch.float64)),
    "weight float32 beside float64": (ones(2, 3, dtype=torch.float64), (3,), ones(3)),
    "weight bfloat16": (ones(2, 3), (3,), ones(3, dtype=torch.bfloat16)),
    "weight meta": (ones(2, 3), (3,), ones(3, device="meta")),
    "negative eps": (ones(2, 3), (3,), None, -2.0),
    "eps a string": (ones(2, 3), (3,), None, "a"),
    "one row expanded": (ones(1, 3).expand(4, 3), (3,), ones(1).expand(3)),
    "NaN": (ones(2, 3) * float("nan"), (3,)),
    "infinity": (ones(2, 3) * float("inf"), (3,)),
    "equal numbers": (ones(2, 3) * 7, (3,), ones(3)),
}
LAYER_NORM_CASES: dict[str, tuple[Any, ...]] = {
    "bias longer": (ones(2, 3), (3,), ones(3), ones(4)),
    "bias alone, float32 beside bfloat16": (ones(2, 3, dtype=torch.bfloat16), (3,), None, ones(3)),
    "bias float32, weight bfloat16": (ones(2, 3, dtype=torch.bfloat16), (3,), ones(3, dtype=torch.bfloat16), ones(3)),
    "bias bfloat16, weight float32": (ones(2, 3, dtype=torch.bfloat16), (3,), ones(3), ones(3, dtype=torch.bfloat16)),
    "bias a number": (ones(2, 3), (3,), None, 1.0),
    "eps None": (ones(2, 3), (3,), None, None, None),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name, case", [("layer_norm", c) for c in (CASES | LAYER_NORM_CASES)] + [("rms_norm", c) for c in CASES])
def test_as_torch(name: str, case: str) -> None:
    """The same result, or the same kind of exception with a message that begins with the op and says which argument."""
    args = (CASES | LAYER_NORM_CASES)[case]
    if name == "layer_norm" and "eps" in case and len(args) == 4:
        args = (*args[:3], None, args[3])
    found = []
    for module in (native, F):
        try:
            found.append(getattr(module, name)(*args))
        except Exception as error:
            found.append(error)
    theirs, ours = found
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)) or isinstance(theirs, type(ours)), f"torch: {theirs!r}, ours: {ours!r}"
        assert any(word in str(ours) for word in ("input", "normalized_shape", "weight", "bias", "eps"))
    else:
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        torch.testing.assert_close(ours, theirs, equal_nan=True, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind, options", [
    ("LayerNorm", {}), ("LayerNorm", {"bias": False}), ("LayerNorm", {"elementwise_affine": False}), ("LayerNorm", {"eps": 0.1}),
    ("RMSNorm", {}), ("RMSNorm", {"elementwise_affine": False}), ("RMSNorm", {"eps": 0.1}),
])  # fmt: skip
@pytest.mark.parametrize("shape", [6, (2, 6)])
def test_layers(kind: str, options: dict[str, Any], shape: Any) -> None:
    """torch's parameters, state_dict, extra_repr and results."""
    ours, theirs = (getattr(module, kind)(shape, **options) for module in (dlkernels.nn, torch.nn))
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    assert ours.extra_repr() == theirs.extra_repr()
    x = random(3, 2, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_raw_ops_refuse_what_does_not_fit() -> None:
    ops = torch.ops.dlkernels
    x, w, mean, rstd = ones(4, 3), ones(3), ones(2, 4), ones(4)
    half = x.bfloat16()
    forward: list[tuple[Any, ...]] = [
        (ones(3), w, w), (x, ones(4), w), (x, w, ones(2)), (x, w.double(), w), (x, w, w.bfloat16()), (half, w, w.bfloat16()),
        (half, w.double(), None), (x.long(), None, None), (x, w[None], w),
    ]  # fmt: skip
    for args in forward:
        with pytest.raises((RuntimeError, TypeError), match="needs|must have"):
            ops.layer_norm_forward(*args, 1e-5, True)
    backward: list[tuple[Any, ...]] = [
        (ones(4, 2), x, w, mean, rstd), (x.double(), x, w, mean, rstd), (x, x, ones(4), mean, rstd), (x, x, w, ones(4), rstd),
        (x, x, w, ones(2, 3), rstd), (x, x, w, mean, ones(3)), (x, x, w, mean.double(), rstd),
        (half, half, w, mean, rstd.bfloat16()), (x[0], x[0], w, mean, rstd),
    ]  # fmt: skip
    for args in backward:
        with pytest.raises((RuntimeError, TypeError), match="needs|must have"):
            ops.layer_norm_backward(*args, True, True, True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("N, dtype", [(64, torch.float32), (1024, torch.bfloat16), (8192, torch.float32), (100003, torch.float32)], ids=str)
def test_gpu_kernels_compile(target: str, N: int, dtype: torch.dtype) -> None:
    """For every kind of row: no register spilled, and offsets of 64 bits."""
    pytest.importorskip("triton")
    from dlkernels.gpu import aot
    from dlkernels.gpu import layer_norm as kernels

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w, statistics = empty(4096, N), empty(N), (empty(2, 4096, dtype=torch.float32), empty(4096, dtype=torch.float32))
    for call in (lambda: kernels.forward(x, w, w, 1e-5, True), lambda: kernels.backward(x, x, w, *statistics, True, True, True)):
        for launch in aot.record(call, target):
            compiled = aot.compile_launch(launch, target)
            assert compiled.spilled == 0, f"{compiled} spills"
            assert "i64" in compiled.text("ttir")
