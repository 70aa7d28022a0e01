"""The Triton launchers of linear: values, gradients, splits, layouts and refusals. Where they run: launchers.py."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from launchers import DEVICE, DTYPES, INTERPRET, KEEPS_Z, REFERENCE, SLOPE, elsewhere, here, passes_in_the_interpreter, quiet
from torch import Tensor

EPS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SIZES = [(1, 1, 1), (5, 7, 3), (17, 33, 31), (64, 32, 64), (65, 67, 66)]  # M, K, N

pytestmark = quiet


@pytest.mark.slow
@elsewhere
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__)


def randn(*shape: int, dtype: torch.dtype, integer: bool = False) -> Tensor:
    """Normal, or small integers whose products and sums are exact in every dtype's accumulator."""
    t = torch.randint(-3, 4, shape).double() if integer else torch.randn(shape, dtype=torch.float64)
    return t.to(DEVICE, dtype)


def tensors(M: int, K: int, N: int, dtype: torch.dtype, integer: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, dy"""
    return tuple(randn(*shape, dtype=dtype, integer=integer) for shape in ((M, K), (N, K), (N,), (M, N)))  # type: ignore[return-value]


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, act: int) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias by the launchers."""
    from dlkernels.gpu import linear

    y, z = linear.forward(x, weight, bias, act, SLOPE, act in KEEPS_Z)
    assert (z is not None) == (act in KEEPS_Z)
    saved = z if act in KEEPS_Z or act == 0 else y
    return y, *(t for t in linear.backward(dy, x, weight, saved, act, SLOPE, True, True, True) if t is not None)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, act: int) -> tuple[Tensor, ...]:
    """The same in float64."""
    zero = torch.zeros(weight.shape[0], dtype=x.dtype, device=x.device)
    inputs = [t.detach().double().requires_grad_() for t in (x, weight, zero if bias is None else bias)]
    y = REFERENCE[act](inputs[0] @ inputs[1].T + inputs[2])
    return y.detach(), *torch.autograd.grad(y, inputs, dy.double())


def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], eps: float) -> None:
    for name, f, w in zip(("y", "dx", "dweight", "dbias"), found, wanted, strict=True):
        assert f.shape == w.shape and f.is_contiguous(), name
        if f.numel():
            error = (f.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)
            assert error <= eps, f"{name}: {error}"


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", REFERENCE)
def test_values_and_gradients(act: int, dtype: torch.dtype) -> None:
    for (M, K, N), has_bias in zip(SIZES, itertools.cycle((True, False)), strict=False):
        x, weight, bias, dy = tensors(M, K, N, dtype)
        args = (x, weight / K**0.5, bias if has_bias else None, dy, act)
        factor = 4 if dtype in (torch.float16, torch.bfloat16) else 10  # half: two roundings, of saved and dz; else the length of the sums
        check(ours(*args), exact(*args), factor * EPS[dtype])


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", (0, 1))
def test_integers_are_exact(act: int, dtype: torch.dtype) -> None:
    for M, K, N in SIZES:
        x, weight, bias, dy = tensors(M, K, N, dtype, integer=True)
        for f, w in zip(ours(x, weight, bias, dy, act), exact(x, weight, bias, dy, act), strict=True):
            assert torch.equal(f, w.to(dtype))


def configs() -> list[Any]:
    """Tiles larger and smaller than the sizes, even and uneven steps, whole and split sums."""
    from dlkernels.gpu.config import Config

    return [Config(16, 16, 16, 1, 4, 2, 1), Config(32, 64, 16, 3, 4, 2, 2), Config(64, 16, 32, 8, 4, 2, 5)]


@here
@pytest.mark.parametrize("index", range(3))
def test_every_tile_gives_the_same(index: int) -> None:
    from dlkernels.gpu import linear

    c, dtype = configs()[index], torch.float32
    for (M, K, N), act in itertools.product([(65, 33, 67), (33, 80, 16)], (0, 2)):
        x, weight, bias, dy = tensors(M, K, N, dtype, integer=act == 0)
        weight = weight if act == 0 else weight / K**0.5
        y, z, dx, dweight, dbias = (torch.full(s, float("nan"), device=DEVICE) for s in ((M, N), (M, N), (M, K), (N, K), (N,)))
        linear.run_forward(c, x, weight, bias, y, z, act, SLOPE)
        saved = z if act else None
        linear.run_dx(c, dy, saved, weight, dx, act, SLOPE)
        linear.run_dweight(c, dy, saved, x, dweight, dbias, act, SLOPE)
        wanted = exact(x, weight, bias, dy, act)
        check((y, dx, dweight, dbias), wanted, 0.0 if act == 0 else 10 * EPS[dtype])


@here
@pytest.mark.parametrize("act", REFERENCE)
def test_pass_of_its_own(act: int) -> None:
    """activation_backward, which large problems use, forms the dz and db that the products form inside."""
    from dlkernels.gpu import linear

    for M, N in ((1, 1), (67, 130), (300, 5)):
        saved, dy = randn(M, N, dtype=torch.float64), randn(N, M, dtype=torch.float64).T
        if act in (5, 6):
            saved = REFERENCE[act](saved)
        dz, dbias = torch.full_like(saved, float("nan")), saved.new_full((N,), float("nan"))
        linear.run_activation(dy, saved if act else None, dz, dbias, act, SLOPE)
        z = saved.clone()
        if act in (5, 6):
            z = torch.logit(saved) if act == 5 else torch.atanh(saved)
        z.requires_grad_()
        wanted = torch.autograd.grad(REFERENCE[act](z), z, dy)[0]
        torch.testing.assert_close(dz, wanted)
        torch.testing.assert_close(dbias, wanted.sum(0))


@here
@pytest.mark.parametrize("act", (0, 1, 2))
def test_large_problems_take_the_pass(act: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlkernels.gpu import linear

    monkeypatch.setattr(linear, "separate_pass", lambda *_: True)
    for has_bias in (True, False):
        x, weight, bias, dy = tensors(70, 20, 40, torch.float64)
        args = (x, weight, bias if has_bias else None, dy, act)
        check(ours(*args), exact(*args), 1e-13)


@here
@pytest.mark.parametrize("M, K, N", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (0, 0, 4), (3, 0, 0)])
@pytest.mark.parametrize("act", (0, 1, 5))
def test_empty(M: int, K: int, N: int, act: int) -> None:
    x, weight, bias, dy = tensors(M, K, N, torch.float32)
    for b in (bias, None):
        check(ours(x, weight, b, dy, act), exact(x, weight, b, dy, act), 1e-6)


@here
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_what_is_needed(needs: tuple[bool, bool, bool]) -> None:
    from dlkernels.gpu import linear

    for M, act in ((19, 0), (19, 2), (0, 2)):
        x, weight, bias, dy = tensors(M, 21, 23, torch.float64)
        _, z = linear.forward(x, weight, bias, act, SLOPE, act == 2)
        wanted = exact(x, weight, bias, dy, act)[1:]
        for need, f, w in zip(needs, linear.backward(dy, x, weight, z, act, SLOPE, *needs), wanted, strict=True):
            assert (f is not None) == need
            if f is not None:
                assert f.shape == w.shape
                torch.testing.assert_close(f, w)


@here
def test_any_strides() -> None:
    x, weight, bias, dy = tensors(20, 24, 28, torch.float32)
    wide = randn(40, 60, dtype=torch.float32)
    for a, w, b, g in (
        (x.T.contiguous().T, weight.T.contiguous().T, bias, dy.T.contiguous().T),
        (wide[::2, 5:53:2], weight, torch.stack((bias, bias), 1)[:, 0], dy),
        (x[:1].expand(20, 24), weight[:, :1].expand(28, 24), bias[:1].expand(28), dy[:1, :1].expand(20, 28)),
    ):
        copies = [t.clone() for t in (a, w, b, g)]
        check(ours(a, w, b, g, 1), exact(a, w, b, g, 1), 1e-5)
        assert all(torch.equal(t, copy) for t, copy in zip((a, w, b, g), copies, strict=True))


@here
@pytest.mark.parametrize("act", REFERENCE)
def test_nan_and_inf(act: int) -> None:
    """NaN in, NaN out; +-inf, large and small values through the activation alone."""
    from dlkernels.gpu import linear

    x = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [0.0], [-200.0], [200.0], [1e-4], [-0.1]], device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    y, _ = linear.forward(x, one, None, act, SLOPE, False)
    wanted = 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5)) if act == 2 else REFERENCE[act](x)  # torch's vectorised gelu(inf) is NaN
    torch.testing.assert_close(y, wanted, equal_nan=True, rtol=1e-5, atol=0.0)


@here
def test_relu_has_no_slope_at_zero() -> None:
    from dlkernels.gpu import linear

    dy, y = torch.full((1, 3), float("inf"), device=DEVICE), torch.tensor([[0.0, -0.0, 2.0]], device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    dx = linear.backward(dy[:, :2].T, one.expand(2, 1), one, y[:, :2].T, 1, 0.0, True, False, False)[0]
    assert dx is not None and torch.equal(dx, torch.zeros(2, 1, device=DEVICE))


@here
def test_same_bits_every_time() -> None:
    from dlkernels.gpu import linear
    from dlkernels.gpu.config import Config

    c = Config(16, 16, 16, 8, 4, 2, 4)
    x, weight, bias, dy = tensors(50, 70, 30, torch.float32)
    first: tuple[Tensor, ...] = ()
    for _ in range(20 if DEVICE == "cuda" else 3):
        y, dweight, dbias = x.new_empty(50, 30), x.new_empty(30, 70), x.new_empty(30)
        linear.run_forward(c, x, weight, bias, y, None, 2)
        linear.run_dweight(c, dy, y, x, dweight, dbias, 1)
        first = first or (y, dweight, dbias)
        assert all(torch.equal(a, b) for a, b in zip((y, dweight, dbias), first, strict=True))


@here
def test_bad_arguments() -> None:
    from dlkernels.gpu import linear

    x, weight, bias, dy = tensors(4, 5, 6, torch.float32)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(6, 5\), got \(6, 4\)"):
        linear.forward(x, weight[:, :4], bias, 0, 0.0, False)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        linear.forward(x, weight, bias[:5], 0, 0.0, False)
    with pytest.raises(RuntimeError, match="weight must have dtype"):
        linear.forward(x, weight.double(), bias, 0, 0.0, False)
    with pytest.raises(RuntimeError, match="x must be float32"):
        linear.forward(x.int(), weight.int(), None, 0, 0.0, False)
    with pytest.raises(RuntimeError, match=r"\(M, K\)"):
        linear.forward(x[0], weight, bias, 0, 0.0, False)
    with pytest.raises(ValueError, match="activation"):
        linear.forward(x, weight, bias, 8, 0.0, False)
    with pytest.raises(RuntimeError, match="saved must have shape"):
        linear.backward(dy, x, weight, dy[:3], 1, 0.0, True, True, True)
    with pytest.raises(RuntimeError, match="dy must have shape"):
        linear.backward(dy[:, :5], x, weight, dy, 1, 0.0, True, True, True)
    with pytest.raises(TypeError, match="strided"):
        linear.forward(x.to_sparse(), weight, bias, 0, 0.0, False)


@here
def test_wrapper_tensors_are_refused() -> None:
    """A DTensor is such a wrapper: no memory of its own."""
    from dlkernels.gpu import linear

    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            raise AssertionError("nothing is dispatched")

    x, weight, bias, _ = tensors(4, 5, 6, torch.float32)
    wrapped = Tensor._make_wrapper_subclass(Wrapper, weight.shape, dtype=weight.dtype, device=weight.device)
    with pytest.raises(TypeError, match="weight is a Wrapper"):
        linear.forward(x, wrapped, bias, 0, 0.0, False)


@here
def test_through_the_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered ops reach the launchers, and the autograd Function above them gives their gradients."""
    if INTERPRET and os.environ.get("DLKERNELS_BACKEND") != "triton":
        pytest.skip("needs DLKERNELS_BACKEND=triton")
    import dlkernels.functional as F
    from dlkernels.gpu import linear

    x, weight, bias, dy = (t.requires_grad_() for t in tensors(9, 10, 11, torch.float64))
    y = F.linear_act(x, weight, bias, "gelu")
    grads = torch.autograd.grad(y, (x, weight, bias), dy.detach())
    check((y.detach(), *grads), exact(x, weight, bias, dy, 2), 1e-13)
    launched: list[Any] = []
    monkeypatch.setattr(linear, "launch", lambda kernel, *_, **__: launched.append(kernel))
    F.linear(x.detach(), weight.detach())
    assert launched == [linear.linear_forward]
