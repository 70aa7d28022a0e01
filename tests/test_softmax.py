"""What is peculiar to softmax and log_softmax: dimensions, dtype=, extreme numbers, layers, the kernels on a GPU that is not there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import SMALL, threads
from torch import Tensor

import dlkernels.functional as F
from dlkernels import explain, nn
from dlkernels.backend import TRITON_ON_CPU

PAIRS = [pytest.param(F.softmax, native.softmax, id="softmax"), pytest.param(F.log_softmax, native.log_softmax, id="log_softmax")]
both = pytest.mark.parametrize(("ours", "theirs"), PAIRS)
Function = Callable[..., Tensor]
INF, NAN = float("inf"), float("nan")


def gradient(function: Function, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf, *args, **options)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


@pytest.mark.isa
@both
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 40), (2, 3, 70), (2, 3, 4, 5), (1, 2, 1, 3, 2), (0, 3), (3, 0), (2, 0, 4)], ids=str)
def test_every_dimension(ours: Function, theirs: Function, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    for dim in range(-max(len(shape), 1), max(len(shape), 1)):
        for some in (x, x.transpose(0, -1).contiguous().transpose(0, -1) if shape else x):
            for found, wanted in zip(gradient(ours, some, dim), gradient(theirs, some, dim)):
                torch.testing.assert_close(found, wanted)
                assert found.stride() == wanted.stride()


@both
def test_dtype_converts_first(ours: Function, theirs: Function) -> None:
    for x in (torch.randn(3, 5), torch.randn(3, 5).half(), torch.arange(6).view(2, 3)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            y, wanted = ours(x, 1, dtype=dtype), theirs(x, 1, dtype=dtype)
            assert y.dtype == dtype
            torch.testing.assert_close(y, wanted)
    x = torch.randn(3, 5).half().requires_grad_()
    ours(x, 1, dtype=torch.float32).square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float16


@both
@pytest.mark.parametrize("rank", range(5))
def test_implicit_dimension_warns_as_torch(ours: Function, theirs: Function, rank: int) -> None:
    x = torch.randn([2] * rank)
    with pytest.warns(UserWarning, match="Implicit dimension choice for (log_)?softmax has been deprecated") as warned:
        y = ours(x)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(y, theirs(x))


@pytest.mark.isa
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("behind", [(), (3,)], ids=["rows", "strips"])
def test_extreme_numbers(ours: Function, theirs: Function, dtype: torch.dtype, behind: tuple[int, ...]) -> None:
    """Thousands, infinities and NaN among the classes, also where they hide the rest: values and gradients are torch's."""
    low, big = torch.finfo(dtype).min, 1e4
    rows = [
        [big, -big, 0, big], [-big, -big, -big, -big], [-INF, 0, 1, -INF], [-INF] * 4, [INF, 0, 1, 2], [NAN, 0, 1, 2], [NAN] * 4,
        [-INF, NAN, -INF, 0], [low, low, low, low], [low, 0, 0, low], [big - 1, big, big + 1, 0], [-100, -88, -87, 0],
        [-INF, -INF, -INF, INF],
    ]  # fmt: skip
    x = torch.tensor(rows, dtype=dtype).repeat(1, 9)
    x = x.reshape(*x.shape, *([1] * len(behind))).expand(*x.shape, *behind)
    for found, wanted in zip(gradient(ours, x, 1), gradient(theirs, x, 1)):
        torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.isa
def test_the_exponential_is_as_good_as_its_argument() -> None:
    """Against float64: the error of each y relative to itself is that of rounding x - max, down to where floats end."""
    x = torch.linspace(-80, 0, 4001)
    exact = torch.softmax(x.double(), 0)
    allowed = 2**-23 + x.double().abs() * 2**-24
    assert bool(((F.softmax(x, 0) - exact).abs() <= exact * allowed * 2).all())


@both
def test_threads_do_not_change_a_bit(ours: Function, theirs: Function) -> None:
    for shape, dim in (((37, 1000 if not SMALL else 10), 1), ((5, 33, 130), 1)):
        x = torch.randn(shape)
        with threads(1):
            one = gradient(ours, x, dim)
        with threads(2):
            assert all(torch.equal(a, b) for a, b in zip(one, gradient(ours, x, dim)))


def test_one_class_is_certain() -> None:
    assert torch.equal(F.softmax(torch.randn(5, 1), 1), torch.ones(5, 1))
    assert torch.equal(F.log_softmax(torch.randn(5, 1), 1), torch.zeros(5, 1))


BAD = {
    "no such dimension": (torch.ones(2, 3), 2),
    "no such negative dimension": (torch.ones(2, 3), -3),
    "dimension of a number": (torch.ones(()), 1),
    "integers": (torch.ones(2, 3, dtype=torch.int64), 1),
    "a list": ([1.0, 2.0], 0),
    "dimension a string": (torch.ones(2, 3), "1"),
    "dimension a float": (torch.ones(2, 3), 1.0),
}


@both
@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_as_torch(ours: Function, theirs: Function, case: str) -> None:
    with pytest.raises(Exception) as wanted:
        theirs(*BAD[case])
    kinds = (TypeError,) if case == "a list" else (type(wanted.value), RuntimeError) if case == "integers" else (type(wanted.value),)
    with pytest.raises(kinds) as found:
        ours(*BAD[case])
    assert any(word in str(found.value) for word in ("dim", "input"))


def test_complex_numbers_run_in_torch() -> None:
    x = torch.randn(3, 5, dtype=torch.complex64)
    assert explain("softmax", x, 1).implementation == "reference"


def test_layers_are_torchs() -> None:
    x = torch.randn(3, 5, 2)
    for name in ("Softmax", "LogSoftmax"):
        layer, wanted = getattr(nn, name)(dim=1), getattr(torch.nn, name)(dim=1)
        torch.testing.assert_close(layer(x), wanted(x))
        assert repr(layer) == repr(wanted) and isinstance(layer, type(wanted))


def test_raw_ops_refuse_nonsense() -> None:
    ops, x = torch.ops.dlkernels, torch.randn(3, 4)
    for dim in (-1, 2, 2**40):
        with pytest.raises((RuntimeError, IndexError), match="dim"):
            ops.softmax_forward(x, dim, False)
    for wrong in (torch.ones(3), torch.ones(3, 5), torch.ones(3, 4).double(), torch.ones(4, 3)):
        with pytest.raises(RuntimeError, match="dy"):
            ops.softmax_backward(wrong, x, 1, False)
    with pytest.raises((RuntimeError, TypeError)):
        ops.softmax_forward(torch.ones(2, 2, dtype=torch.int64), 0, False)


# ---- compiled for GPUs that are not there ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(TRITON_ON_CPU, reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("shape", [(4096, 16384), (16, 100_000), (65536, 128), (32, 64, 56, 56), (8, 4096, 100)], ids=str)
def test_kernels_fit_the_registers_and_address_64_bits(target: str, shape: tuple[int, ...]) -> None:
    import re

    from dlkernels.gpu import aot
    from dlkernels.gpu import softmax as kernels

    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    calls = (lambda: kernels.forward(x, 1, False), lambda: kernels.forward(x, 1, True), lambda: kernels.backward(x, x, 1, True))
    for launch in (launch for call in calls for launch in aot.record(call, target)):
        compiled = aot.compile_launch(launch, target)
        assert compiled.spilled == 0, f"{compiled}: spills"
        offsets = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", compiled.text("ttir"))
        assert offsets and set(offsets) == {"i64"}


@pytest.mark.skipif(TRITON_ON_CPU, reason="the launcher is called on tensors without data")
def test_a_row_that_fits_is_read_once() -> None:
    pytest.importorskip("triton")
    from dlkernels.gpu import aot
    from dlkernels.gpu import softmax as kernels

    def loads(N: int) -> int:
        x = torch.empty(64, N, device="meta")
        (launch,) = aot.record(lambda: kernels.forward(x, 1, False), "sm_90")
        return aot.compile_launch(launch, "sm_90").text("ttir").count("tt.load")

    assert (loads(kernels.LONGEST), loads(kernels.LONGEST + 1)) == (1, 2)
