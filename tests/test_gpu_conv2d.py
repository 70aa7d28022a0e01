"""The Triton launchers of conv2d: values, sizes, strides, what is refused. Where they run: launchers.py. What they compile to is in
test_gpu_conv2d_code.py."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from convolutions import CASES, Case, check, exact, tensors
from launchers import DEVICE, DTYPES, INTERPRET, KEEPS_Z, REFERENCE, SLOPE, elsewhere, here, passes_in_the_interpreter, quiet
from torch import Tensor
from torch._prims_common import suggest_memory_format

EPS = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 8e-3, torch.bfloat16: 8e-2}
pytestmark = quiet


@pytest.mark.slow
@elsewhere
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__)


def ours(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, act: int = 0) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias by the launchers."""
    from dlkernels.gpu import conv2d

    y, z = conv2d.forward(x, weight, bias, *case.moves, False, act, SLOPE, act in KEEPS_Z)
    assert (z is not None) == (act in KEEPS_Z)
    saved = z if act in KEEPS_Z else y if act else None
    found = y, *(t for t in conv2d.backward(dy, x, weight, saved, *case.moves, False, act, SLOPE, True, True, True) if t is not None)
    for t, like in zip(found, (x, x, weight)):
        assert t.stride() == torch.empty_like(t, memory_format=suggest_memory_format(like)).stride()
    return found


@here
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, last: bool) -> None:
    case, start = CASES[name], list(CASES).index(name)
    few = DTYPES[(start + last) % 3 :][:2] if INTERPRET else DTYPES  # the interpreter is slow, and other tests have other dtypes
    for index, dtype in enumerate(few):
        act, has_bias = (start + index) % 3, index % 2 == 0
        x, weight, bias, dy = tensors(case, dtype, last)
        args = (case, x, weight / max(1, weight[0].numel()) ** 0.5, bias if has_bias else None, dy, act)
        check(ours(*args), exact(*args), EPS[dtype])


@here
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "first layer", "groups", "depthwise"])
def test_integers_are_exact(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    args = case, *tensors(case, dtype, name == "3x3", integer=True), 1
    for f, w in zip(ours(*args), exact(*args), strict=True):
        assert torch.equal(f, w.to(dtype))


def any_case(rng: random.Random) -> Case:
    R, S = (rng.choice((1, 2, 3, 5)) for _ in range(2))
    G, C, O = rng.choice([(1, 3, 5), (1, 16, 7), (1, 18, 20), (1, 1, 3), (2, 2, 1), (2, 16, 3), (3, 1, 1), (2, 1, 3)])
    stride, dilation = (tuple(rng.randint(1, most) for _ in range(2)) for most in (3, 2))
    padding = tuple(rng.randint(0, 3) for _ in range(4))
    H, W = (max(rng.randint(1, 9), d * (taps - 1) + 1 - sum(pads)) for d, taps, pads in zip(dilation, (R, S), (padding[:2], padding[2:])))
    return Case(rng.randint(1, 2), G * C, G * O, H, W, R, S, stride, padding, dilation, G)  # type: ignore[arg-type]


@here
@pytest.mark.parametrize("seed", range(2))
def test_any_sizes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        case, last, act = any_case(rng), rng.random() < 0.5, rng.choice((0, 1, 7))
        args = case, *tensors(case, torch.float64, last), act
        try:
            check(ours(*args), exact(*args), 1e-12)
        except AssertionError as error:
            raise AssertionError(f"{case}, channels_last {last}, activation {act}") from error


@here
@pytest.mark.parametrize("act", REFERENCE)
def test_every_activation(act: int) -> None:
    for name, last in (("many small groups", False), ("1x1", True), ("depthwise", True)):
        args = CASES[name], *tensors(CASES[name], torch.float64, last), act
        check(ours(*args), exact(*args), 1e-12)


@here
@pytest.mark.parametrize("index", range(3))
def test_every_tile_gives_the_same(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles larger and smaller than the sizes, and sums that several programs share."""
    from dlkernels.gpu import conv2d_product
    from dlkernels.gpu.config import Config

    c = [Config(16, 16, 16, 1, 4, 2, 1), Config(32, 64, 16, 3, 4, 2, 2), Config(64, 16, 32, 8, 4, 2, 5)][index]
    monkeypatch.setattr(conv2d_product, "tile_of", lambda *args: c if args[-2] else replace(c, split=1))
    for case, last in (
        (Case(2, 35, 18, 4, 7, 3, 1, (1, 2), (1, 1, 0, 1)), True),
        (Case(2, 35, 18, 4, 7, 1, 2, (1, 2), (1, 1, 0, 1)), False),
        (Case(2, 6, 36, 5, 5, 3, 2, padding=(1, 1, 0, 1), groups=2), True),
    ):
        args = case, *tensors(case, torch.float32, last, integer=True)
        check(ours(*args, 1), exact(*args, 1), 0.0)
    args = case, *tensors(case, torch.float64, last)
    check(ours(*args, 2), exact(*args, 2), 1e-13)


@here
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("taps", (1, 2))
def test_empty(shape: tuple[int, int, int], taps: int) -> None:
    case = Case(*shape, 3, 4, taps, taps)
    for last, act, has_bias in itertools.product((False, True), (0, 5), (False, True)):
        x, weight, bias, dy = tensors(case, torch.float64, last)
        y, dx, dweight, dbias = ours(case, x, weight, bias if has_bias else None, dy, act)
        z = bias if has_bias else torch.zeros_like(bias)
        value = REFERENCE[act](z)[:, None, None].expand(y.shape)  # all there is without channels
        slopes = (dy * (value * (1 - value) if act else 1)).sum((0, 2, 3))
        torch.testing.assert_close(y, value.contiguous())
        torch.testing.assert_close(dbias, slopes)
        assert dx.shape == x.shape and dweight.shape == weight.shape and not dx.any() and not dweight.any()


@here
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("name", ["3x3 stride 2", "1x1", "depthwise"])
def test_only_what_is_needed(name: str, needs: tuple[bool, bool, bool]) -> None:
    from dlkernels.gpu import conv2d

    case = CASES[name]
    for act in (0, 2):
        x, weight, bias, dy = tensors(case, torch.float64, last=name != "3x3 stride 2")
        _, z = conv2d.forward(x, weight, bias, *case.moves, False, act, SLOPE, act == 2)
        wanted = exact(case, x, weight, bias, dy, act)[1:]
        for need, f, w in zip(needs, conv2d.backward(dy, x, weight, z, *case.moves, False, act, SLOPE, *needs), wanted, strict=True):
            assert (f is not None) == need
            if f is not None:
                torch.testing.assert_close(f, w)


@here
@pytest.mark.parametrize("name", ["1x1 stride 2", "1x1", "depthwise stride 2"])
def test_any_strides(name: str) -> None:
    case = CASES[name]
    x, weight, bias, dy = tensors(case, torch.float32)
    apart = (
        torch.stack((x, x), 4)[..., 0],
        weight.to(memory_format=torch.channels_last),
        torch.stack((bias, bias), 1)[:, 0],
        dy.mT.clone().mT,
    )
    turned = x.mT.contiguous().mT, weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), bias, dy.mT.contiguous().mT
    repeated = (t[:1].expand(t.shape) if t.dim() == 1 else t[:1, :, :, :1].expand(t.shape) for t in (x, weight, bias, dy))
    for a, w, b, g in (apart, turned, repeated):
        copies = [t.clone() for t in (a, w, b, g)]
        check(ours(case, a, w, b, g, 1), exact(case, a, w, b, g, 1), 1e-5)
        assert all(torch.equal(t, copy) for t, copy in zip((a, w, b, g), copies, strict=True))


@here
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("name", ["3x3 stride 2", "first layer", "groups", "depthwise stride 2"])
def test_nothing_is_read_outside(name: str, last: bool) -> None:
    """Arguments that lie between NaN give the numbers that they give elsewhere."""

    def guarded(t: Tensor) -> Tensor:
        around = torch.full((t.numel() + 2048,), float("nan"), dtype=t.dtype, device=t.device)
        inner = torch.as_strided(around, t.shape, t.stride(), 1024)
        return inner.copy_(t)

    case = CASES[name]
    x, weight, bias, dy = tensors(case, torch.float32, last)
    dy = dy.contiguous(memory_format=suggest_memory_format(x))
    plain = ours(case, x, weight, bias, dy, 1)
    x, weight, bias, dy = (guarded(t) for t in (x, weight, bias, dy))
    for f, w in zip(ours(case, x, weight, bias, dy, 1), plain, strict=True):
        assert torch.equal(f, w)


@here
def test_same_bits_every_time() -> None:
    for name, last in (("3x3", True), ("first layer", False), ("depthwise", True)):
        args = CASES[name], *tensors(CASES[name], torch.float32, last), 1
        first = ours(*args)
        for _ in range(20 if DEVICE == "cuda" else 1):
            assert all(torch.equal(a, b) for a, b in zip(ours(*args), first, strict=True))


@here
def test_bad_arguments() -> None:
    from dlkernels.gpu import conv2d

    case = CASES["groups"]
    x, weight, bias, dy = tensors(case, torch.float32)

    def run(x: Tensor = x, weight: Tensor = weight, bias: Tensor | None = bias, act: int = 0, **moves: Any) -> None:
        stride, padding, dilation, groups = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 2, **moves}.values()
        conv2d.forward(x, weight, bias, stride, padding, dilation, groups, False, act, 0.0, False)

    for error, message, arguments in (
        (RuntimeError, r"weight must have shape \(6, 17, 3, 3\), got \(6, 16, 3, 3\)", {"weight": weight[:, :16]}),
        (RuntimeError, "bias must have shape", {"bias": bias[:5]}),
        (RuntimeError, "weight must have dtype", {"weight": weight.double()}),
        (RuntimeError, "x must be float32", {"x": x.int(), "weight": weight.int()}),
        (RuntimeError, "C / groups", {"x": x[0]}),
        (ValueError, "activation", {"act": 8}),
        (RuntimeError, "stride must be 2 numbers of at least 1", {"stride": [0, 1]}),
        (RuntimeError, "padding must be 4 numbers of at least 0", {"padding": [0, 0]}),
        (RuntimeError, "dilation must be 2 numbers", {"dilation": [1, 1, 1]}),
        (RuntimeError, "groups must divide 34 channels", {"groups": 4}),
        (RuntimeError, "3 x 3 taps does not fit", {"x": x[:, :, :2]}),
        (TypeError, "strided", {"x": x.to_sparse()}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            run(**arguments)
    with pytest.raises(RuntimeError, match="saved must have shape"):
        conv2d.backward(dy, x, weight, dy[:1], *case.moves, False, 1, 0.0, True, True, True)
    with pytest.raises(RuntimeError, match="saved is None"):
        conv2d.backward(dy, x, weight, None, *case.moves, False, 1, 0.0, True, True, True)
    with pytest.raises(RuntimeError, match="dy must have shape"):
        conv2d.backward(dy[:, :5], x, weight, dy, *case.moves, False, 1, 0.0, True, True, True)


@here
def test_the_phases_of_a_stride() -> None:
    """Every pair of a pixel and a tap that sees it, once, with the position that looks."""
    from dlkernels.gpu.conv2d_product import phases

    for pixels, taps, stride, before, dilation in itertools.product((1, 4, 7), (1, 3, 4), (1, 2, 3, 4), (0, 1, 2), (1, 2, 3)):
        found, covered = set(), []
        for pixel, first, step, position, back in phases(pixels, taps, stride, before, dilation):
            mine = list(range(pixel, pixels, stride))
            covered += mine
            for (i, h), (j, r) in itertools.product(enumerate(mine), enumerate(range(first, taps, step) if first is not None else ())):
                found.add((h, r, position + i - j * back))
        every = itertools.product(range(pixels), range(taps))
        assert found == {(h, r, (h + before - r * dilation) // stride) for h, r in every if (h + before - r * dilation) % stride == 0}
        assert sorted(covered) == list(range(pixels))
