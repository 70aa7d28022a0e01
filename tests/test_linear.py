"""What is peculiar to linear: the edges of the GEMM's blocks, the activations, packed weights that are kept, and the work left undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from support import (
    SMALL,
    Args,
    RawCalls,
    arguments,
    assert_accurate,
    assert_same_bits,
    cotangents,
    each_dtype,
    exact_results,
    integers,
    map_tensors,
    raw_calls,
    results,
    threads,
)
from torch import Tensor

import dlkernels
import dlkernels.functional as F
from dlkernels import OPS
from dlkernels.bench.check import allowed_error, relative_error
from dlkernels.ops import linear as contract

LINEAR = [op for op in OPS.values() if op.module == "linear"]
RELU = OPS["linear_relu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def edges() -> list[tuple[int, int, int]]:
    """(M, K, N) around the edges of register tiles, vectors and cache blocks, each dimension with small others, then all together."""
    M = [*range(1, 17), 27, 28, 29, 31, 32, 33, 47, 48, 49]
    N = [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129]
    K = [1, 2, 3, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513]
    if SMALL:
        return [(15, 3, 17), (16, 32, 32), (17, 33, 33), (33, 65, 31)]
    alone = [(m, 5, 19) for m in M] + [(7, 5, n) for n in N] + [(7, k, 19) for k in K]
    batches = [(M, K, N) for M in (15, 28, 60, 96) for K, N in [(64, 32), (65, 50), (66, 113), (400, 230), (1024, 70), (300, 512)]]
    return alone + batches + list(product([1, 6, 7, 13, 29], [1, 2, 33, 257], [1, 16, 33, 65])) + [(130, 1030, 515)]


@pytest.mark.isa
@each_dtype
def test_block_edges_are_exact(dtype: torch.dtype) -> None:
    """Whole numbers: forward and the three gradients equal the float64 result rounded once, at every edge."""
    for M, K, N in edges():
        args = integers(RELU, {"M": M, "K": K, "N": N}, dtype)
        check_exact(args, dtype)


@pytest.mark.isa
@each_dtype
def test_large_product_on_two_threads_is_exact(dtype: torch.dtype) -> None:
    many = [(130, 1030, 515), (3, 1030, 515), (515, 130, 9), (1, 2050, 700), (515, 300, 260), (128, 520, 300)]
    many += [(70, 8200, 40), (8200, 70, 40), (1040, 8200, 20)]  # packed in parts: of k, of rows, and of both
    sizes = [(40, 60, 50)] if SMALL else many
    with threads(2):
        for M, K, N in sizes:
            check_exact(integers(RELU, {"M": M, "K": K, "N": N}, dtype), dtype)


def check_exact(args: Args, dtype: torch.dtype) -> None:
    dys = cotangents(RELU, args, integer=True)
    exact = {name: value.to(dtype) for name, value in exact_results(RELU, args, dys).items()}
    what = " ".join(str(tuple(arg.shape)) for arg in args)
    assert_same_bits(results(RELU, RELU.call, args, dys), exact, f"linear_relu {what}")


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("size", [(300, 200, 400), (64, 784, 256), (8, 1000, 999)], ids=str)
def test_same_bits_on_any_number_of_threads(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    if SMALL:
        pytest.skip("the interpreter has one thread")
    args = arguments(RELU, dict(zip("MKN", size, strict=True)), dtype)
    dys = cotangents(RELU, args)
    one = results(RELU, RELU.call, args, dys)
    for count in (2, 3):
        with threads(count):
            assert_same_bits(results(RELU, RELU.call, args, dys), one, f"{size} on {count} threads")


PARTS = {"M": 20, "K": 30, "N": 40} if SMALL else {"M": 300, "K": 200, "N": 400}  # large enough to be multiplied from parts where tiles are


@pytest.mark.isa
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1.0, 1e18, 1e34])
def test_float_products_keep_the_range_of_float(scale: float) -> None:
    """Parts of numbers near the ends of float's range would not add up to them; the kernel has to notice."""
    x, weight, bias = arguments(RELU, PARTS, torch.float32)
    assert_accurate(RELU, (x * scale, weight, bias * scale))
    assert_accurate(RELU, (x, weight * scale, bias * scale))


@pytest.mark.isa
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
def test_one_extreme_number_stays_in_its_row(value: float) -> None:
    linear = OPS["linear"]
    x, weight, bias = arguments(linear, PARTS, torch.float32)
    x[5, 7] = value
    ours, native = linear.call(x, weight, bias), linear.native(x, weight, bias)
    torch.testing.assert_close(ours[5], native[5], rtol=1e-5, atol=1e33, equal_nan=True)
    rest = torch.arange(len(x)) != 5
    exact = linear.reference(x[rest].double(), weight.double(), bias.double())
    assert relative_error(ours[rest], exact) <= allowed_error(relative_error(native[rest], exact), torch.float32, gradient=False)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("op", LINEAR, ids=lambda op: op.name)
def test_long_sums_are_accurate(op: Any, dtype: torch.dtype) -> None:
    """K beyond every cache block: the rounding of partial sums stays within the rule for each activation and its derivative."""
    size = {"M": 9, "K": 96, "N": 17} if SMALL else {"M": 37, "K": 1030, "N": 70}
    args = arguments(op, size, dtype)
    assert_accurate(op, (args[0] / 32, *args[1:]))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("activation", contract.ACTIVATIONS)
def test_activation_at_special_points(activation: str, dtype: torch.dtype) -> None:
    """Zero, the smallest numbers, saturation: y and dy/dz at z itself (K = N = 1, weight 1) are as near to float64 as native's."""
    op = OPS["linear" if activation == "none" else f"linear_{activation}"]
    tiny = torch.finfo(dtype).tiny
    z = torch.tensor([0.0, -0.0, tiny, -tiny, 1e-3, -1e-3, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, -6.0, 20.0, -20.0], dtype=dtype)[:, None]
    args = (z, torch.ones(1, 1, dtype=dtype), None)
    ones = (torch.ones_like(z),)
    ours = results(op, op.call, args, ones)
    assert_accurate(op, args, ones, {"y": ours["y"], "dx": ours["dx"]})
    if activation == "relu":
        assert not ours["dx"][:2].any(), "the derivative of relu at 0 is 0"


@pytest.mark.parametrize("slope", [0.01, 0.2, 0.0, 1.0, -0.5])
def test_leaky_relu_slopes(slope: float) -> None:
    """Any slope, negative ones too, for which y alone does not tell the sign of z."""
    x, weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(3, 7, dtype=torch.float64)
    ours = F.linear_act(x, weight, activation="leaky_relu", negative_slope=slope)
    native = torch.nn.functional.leaky_relu(torch.nn.functional.linear(x, weight), slope)
    torch.testing.assert_close(ours, native)
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (ours, native))):
        torch.testing.assert_close(mine, theirs)


def test_only_the_gradients_asked_for_are_computed() -> None:
    args = arguments(RELU, {"M": 5, "K": 4, "N": 3}, torch.float32)
    for needs in product([False, True], repeat=3):
        if any(needs):
            leaves = tuple(arg.detach().requires_grad_(need) for arg, need in zip(args, needs))
            with RawCalls() as recorded:
                RELU.call(*leaves).sum().backward()
            backward = [call for func, call in recorded.calls if "backward" in str(func)]
            assert [tuple(call[-3:]) for call in backward] == [needs]


def test_raw_op_refuses_to_drop_a_gradient() -> None:
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="records no gradient"):
        torch.ops.dlkernels.linear_forward(x, weight, None, 0, 0.0, False)
    with torch.no_grad():
        torch.ops.dlkernels.linear_forward(x, weight, None, 0, 0.0, False)
    (func, args), = [call for call in raw_calls(RELU, (x.detach(), weight, None)) if "backward" in str(call[0])]
    with pytest.raises(RuntimeError, match="records no gradient"):
        func(args[0], args[1].requires_grad_(), *args[2:])


def add_in_place(weight: Tensor) -> None:
    weight.add_(1)


def add_to_data(weight: Tensor) -> None:
    weight.data.add_(1)


def add_to_a_view(weight: Tensor) -> None:
    weight[1:, 2:].add_(1)


def add_through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[...] += 1


@pytest.mark.parametrize("change", [add_in_place, add_to_data, add_to_a_view, add_through_numpy], ids=lambda change: change.__name__)
@pytest.mark.parametrize("M", [1, 64])
def test_a_changed_weight_is_always_seen(change: Callable[[Tensor], None], M: int) -> None:
    """Whatever is kept of a weight between calls in inference mode, every way of changing it in place changes the result."""
    x, weight, bias = (torch.randn(*shape) for shape in ((M, 96), (80, 96), (80,)))
    with torch.inference_mode():
        for _ in range(3):
            F.linear(x, weight, bias)
        change(weight)
        torch.testing.assert_close(F.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    with torch.no_grad():
        change(weight)
    with torch.inference_mode():
        torch.testing.assert_close(F.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_another_weight_at_the_same_address() -> None:
    """A new weight that gets the memory of a dead one is a new weight."""
    x = torch.randn(64, 96)
    with torch.inference_mode():
        for _ in range(50):
            weight = torch.randn(80, 96)
            torch.testing.assert_close(F.linear(x, weight), torch.nn.functional.linear(x, weight))
            del weight


def test_negated_and_lazy_tensors() -> None:
    """Bits that PyTorch sets instead of computing are honoured: the imaginary part of a conjugate, and a zero tensor without memory."""
    x = torch.conj(torch.randn(5, 7, dtype=torch.complex64)).imag
    weight = torch.randn(3, 7)
    assert x.is_neg()
    torch.testing.assert_close(F.linear_relu(x, weight), torch.relu(torch.nn.functional.linear(x, weight)))
    zero = torch._efficientzerotensor((5, 7))
    assert not F.linear(zero, weight).any()


def test_nn_modules_are_torchs() -> None:
    """State dicts interchange, both ways, and the same seed gives the same parameters."""
    torch.manual_seed(1)
    ours = dlkernels.nn.Linear(7, 5)
    torch.manual_seed(1)
    theirs = torch.nn.Linear(7, 5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    theirs.load_state_dict(dlkernels.nn.LinearReLU(7, 5).state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def mutants() -> dict[str, Callable[..., Any]]:
    """Wrong kernels of the kinds that blocking goes wrong with."""
    forward, backward = contract._forward, contract._backward

    def last_k(x: Tensor, weight: Tensor, *rest: Any) -> Any:
        return forward(x[:, :-1], weight[:, :-1], *rest)

    def last_row(x: Tensor, *rest: Any) -> Any:
        y, z = forward(x, *rest)
        return torch.cat([y[:-1], torch.zeros_like(y[-1:])]), z

    def no_bias_in_last_column(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        return forward(x, weight, None if bias is None else torch.cat([bias[:-1], bias[:1] * 0]), *rest)

    def last_row_in_dweight(dy: Tensor, x: Tensor, *rest: Any) -> Any:
        dx, _, dbias = backward(dy, x, *rest)
        return dx, backward(torch.cat([dy[:-1], dy[-1:] * 0]), x, *rest)[1], dbias

    return {
        "_forward last k": last_k,
        "_forward last row": last_row,
        "_forward bias": no_bias_in_last_column,
        "_backward dweight": last_row_in_dweight,
    }


@pytest.mark.parametrize("mutant", mutants())
def test_a_wrong_kernel_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that drops the last k, row, bias or the last row's part of dweight fails the tests above and those of test_ops.py."""
    monkeypatch.setattr(contract, mutant.split()[0], mutants()[mutant])
    args = arguments(RELU, {"M": 29, "K": 33, "N": 17}, torch.float32)
    with pytest.raises(AssertionError):
        assert_accurate(RELU, args)
    with pytest.raises(AssertionError):
        check_exact(map_tensors(lambda t: (t * 3).round(), args), torch.float32)
