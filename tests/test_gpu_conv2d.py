"""The Triton launchers of conv2d, and, without a GPU, the machine code that they compile to. Where they run: launchers.py.

One file, of more than 300 lines, as the interpreter's process and the compiled kernels are tested on the same cases.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from launchers import DEVICE, DTYPES, INTERPRET, KEEPS_Z, REFERENCE, SLOPE, elsewhere, here, passes_in_the_interpreter, quiet
from torch import Tensor
from torch._prims_common import suggest_memory_format

EPS = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 8e-3, torch.bfloat16: 8e-2}
F = torch.nn.functional

compiles = pytest.mark.skipif(INTERPRET, reason="the interpreter leaves nothing to compile")
pytestmark = quiet


@pytest.mark.slow
@elsewhere
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__)


class Case(NamedTuple):
    """Images, channels, output channels, pixels, filter, stride, padding (top, bottom, left, right), dilation, groups."""

    N: int
    C: int
    O: int
    H: int
    W: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def moves(self) -> tuple[list[int], list[int], list[int], int]:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def sizes(self) -> tuple[int, int]:
        """P, Q"""
        pads = self.padding[0] + self.padding[1], self.padding[2] + self.padding[3]
        each = zip((self.H, self.W), pads, self.dilation, (self.R, self.S), self.stride, strict=True)
        P, Q = ((size + pad - dilation * (taps - 1) - 1) // stride + 1 for size, pad, dilation, taps, stride in each)
        return P, Q


CASES = {
    "one number": Case(1, 1, 1, 1, 1, 1, 1),
    "1x1": Case(2, 17, 19, 3, 5, 1, 1),
    "1x1 stride 2": Case(2, 16, 5, 5, 4, 1, 1, (2, 2)),
    "3x3": Case(2, 16, 33, 5, 6, 3, 3, padding=(1, 1, 1, 1)),
    "3x3 stride 2": Case(2, 33, 20, 7, 6, 3, 3, (2, 2), (1, 1, 1, 1)),
    "3x3 stride 2 dilation 2": Case(1, 20, 16, 8, 9, 3, 3, (2, 2), (2, 1, 0, 3), (2, 2)),
    "first layer": Case(1, 3, 17, 11, 10, 7, 7, (2, 2), (3, 3, 3, 3)),
    "one channel": Case(3, 1, 6, 8, 8, 5, 5, padding=(2, 2, 2, 2)),
    "uneven": Case(1, 20, 3, 9, 4, 5, 1, (3, 1), (0, 2, 1, 3), (2, 1)),
    "pixels nobody sees": Case(1, 16, 4, 8, 8, 2, 1, (3, 4)),
    "groups": Case(2, 34, 6, 5, 5, 3, 3, (1, 2), (1, 0, 1, 1), groups=2),
    "many small groups": Case(1, 6, 15, 4, 6, 1, 3, padding=(0, 0, 1, 1), groups=3),
    "depthwise": Case(2, 3, 3, 5, 6, 3, 3, padding=(1, 1, 1, 1), groups=3),
    "depthwise stride 2": Case(1, 3, 3, 9, 8, 5, 3, (2, 3), (2, 0, 1, 1), (1, 2), groups=3),
    "depthwise, three outputs": Case(1, 2, 6, 4, 5, 3, 3, (1, 2), (1, 1, 1, 1), groups=2),
    "depthwise, six outputs": Case(1, 2, 12, 6, 5, 3, 3, padding=(1, 1, 1, 1), groups=2),
}


def randn(*shape: int, dtype: torch.dtype, integer: bool = False) -> Tensor:
    """Normal, or small integers whose products and sums are exact in every dtype's accumulator."""
    t = torch.randint(-3, 4, shape).double() if integer else torch.randn(shape, dtype=torch.float64)
    return t.to(DEVICE, dtype)


def tensors(case: Case, dtype: torch.dtype, last: bool = False, integer: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, dy; x channels_last where ``last``"""
    shapes = (case.N, case.C, case.H, case.W), (case.O, case.C // case.groups, case.R, case.S), (case.O,), (case.N, case.O, *case.sizes())
    x, weight, bias, dy = (randn(*shape, dtype=dtype, integer=integer) for shape in shapes)
    return x.contiguous(memory_format=torch.channels_last) if last else x, weight, bias, dy


def ours(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, act: int = 0) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias by the launchers."""
    from dlkernels.gpu import conv2d

    y, z = conv2d.forward(x, weight, bias, *case.moves, act, SLOPE, act in KEEPS_Z)
    assert (z is not None) == (act in KEEPS_Z)
    saved = z if act in KEEPS_Z else y if act else None
    found = y, *(t for t in conv2d.backward(dy, x, weight, saved, *case.moves, act, SLOPE, True, True, True) if t is not None)
    for t in found[:2]:
        assert t.stride() == torch.empty_like(t, memory_format=suggest_memory_format(x)).stride()
    assert found[2].is_contiguous()
    return found


def exact(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, act: int = 0) -> tuple[Tensor, ...]:
    """The same in float64."""
    zero = torch.zeros(weight.shape[0], dtype=x.dtype, device=x.device)
    inputs = [t.detach().double().contiguous().requires_grad_() for t in (x, weight, zero if bias is None else bias)]
    (top, bottom, left, right), (x64, w64, b64) = case.padding, inputs
    y = REFERENCE[act](F.conv2d(F.pad(x64, (left, right, top, bottom)), w64, b64, case.stride, 0, case.dilation, case.groups))
    return y.detach(), *torch.autograd.grad(y, inputs, dy.double())


def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], eps: float) -> None:
    for name, f, w in zip(("y", "dx", "dweight", "dbias"), found, wanted, strict=True):
        assert f.shape == w.shape, name
        if f.numel():
            error = (f.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)
            assert error <= eps, f"{name}: {error}"


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
        _, z = conv2d.forward(x, weight, bias, *case.moves, act, SLOPE, act == 2)
        wanted = exact(case, x, weight, bias, dy, act)[1:]
        for need, f, w in zip(needs, conv2d.backward(dy, x, weight, z, *case.moves, act, SLOPE, *needs), wanted, strict=True):
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
        conv2d.forward(x, weight, bias, stride, padding, dilation, groups, act, 0.0, False)

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
        conv2d.backward(dy, x, weight, dy[:1], *case.moves, 1, 0.0, True, True, True)
    with pytest.raises(RuntimeError, match="saved is None"):
        conv2d.backward(dy, x, weight, None, *case.moves, 1, 0.0, True, True, True)
    with pytest.raises(RuntimeError, match="dy must have shape"):
        conv2d.backward(dy[:, :5], x, weight, dy, *case.moves, 1, 0.0, True, True, True)


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


def meta(*shape: int, dtype: torch.dtype, last: bool = True) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else t


def launches(case: Case, target: str, dtype: torch.dtype = torch.bfloat16, last: bool = True, act: int = 1) -> Iterator[Any]:
    """What the launchers would start for a case, each kernel with the same constants once."""
    from dlkernels.gpu import aot, conv2d

    x, y = meta(case.N, case.C, case.H, case.W, dtype=dtype, last=last), meta(case.N, case.O, *case.sizes(), dtype=dtype, last=last)
    weight, bias = meta(case.O, case.C // case.groups, case.R, case.S, dtype=dtype, last=False), meta(case.O, dtype=dtype)
    seen = set()
    for launch in (
        *aot.record(lambda: conv2d.forward(x, weight, bias, *case.moves, act, SLOPE, act in KEEPS_Z), target),
        *aot.record(lambda: conv2d.backward(y, x, weight, y, *case.moves, act, SLOPE, True, True, True), target),
    ):
        key = launch.kernel.__name__, str(launch.constants)
        if key not in seen:
            seen.add(key)
            yield launch


LAYER = Case(32, 64, 64, 56, 56, 3, 3, padding=(1, 1, 1, 1))
LARGE = Case(32, 256, 256, 28, 28, 3, 3, padding=(1, 1, 1, 1))
DOWN = Case(32, 128, 256, 28, 28, 3, 3, (2, 2), (1, 1, 1, 1))
FIRST = Case(32, 3, 64, 224, 224, 7, 7, (2, 2), (3, 3, 3, 3))
DEEP = Case(1, 512, 512, 7, 7, 3, 3, padding=(1, 1, 1, 1))
GROUPS = Case(32, 128, 128, 28, 28, 3, 3, padding=(1, 1, 1, 1), groups=32)
DEPTHWISE = Case(32, 144, 144, 28, 28, 3, 3, padding=(1, 1, 1, 1), groups=144)
FORMS = [*((case, True, 2) for case in (LAYER, LARGE, DOWN, DEEP, FIRST, GROUPS, DEPTHWISE)), (LAYER, False, 2), (FIRST, False, 1)]


def assert_good(launch: Any, target: str, tensor_cores: bool) -> None:
    from dlkernels.gpu import aot

    compiled = aot.compile_launch(launch, target)
    few = 16 if launch.args[0].dtype == torch.float32 else 0  # what the assembler may give up for one more program on a multiprocessor
    assert compiled.spilled <= few, f"{compiled}: spills"
    assert compiled.shared <= aot.TARGETS[target].device.shared
    assert 0 < compiled.registers <= 512
    if tensor_cores:
        assert compiled.mma, f"{compiled}: no tensor-core instruction"


def is_product(launch: Any) -> bool:
    return launch.kernel.__name__ in ("conv2d_forward", "conv2d_backward_dx", "conv2d_backward_dweight")


@compiles
@pytest.mark.parametrize(
    "target, dtype", [*((t, torch.bfloat16) for t in ("sm_80", "sm_90", "sm_100", "gfx942")), ("sm_90", torch.float32)], ids=str
)
def test_kernels_compile(target: str, dtype: torch.dtype) -> None:
    names = set()
    for launch in itertools.chain(launches(LAYER, target, dtype), launches(DEPTHWISE, target, dtype)):
        assert_good(launch, target, tensor_cores=is_product(launch) and dtype == torch.bfloat16)
        names.add(launch.kernel.__name__)
    products = {"conv2d_forward", "conv2d_backward_dx", "conv2d_backward_dweight", "conv2d_backward_dz", "combine", "add_shares"}
    assert names == products | {"conv2d_depthwise_forward", "conv2d_depthwise_dx", "conv2d_depthwise_dweight"}


@compiles
@pytest.mark.parametrize("case, last, act", FORMS)
def test_layers_compile(case: Case, last: bool, act: int) -> None:
    for launch in launches(case, "sm_90", last=last, act=act):
        assert_good(launch, "sm_90", tensor_cores=is_product(launch))


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_other_dtypes_run_on_tensor_cores(dtype: torch.dtype) -> None:
    """float32 where PyTorch's own setting allows tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for launch in launches(LAYER, "sm_90", dtype):
            assert_good(launch, "sm_90", tensor_cores=is_product(launch))
    finally:
        torch.set_float32_matmul_precision(before)


@compiles
@pytest.mark.parametrize(
    "case",
    [Case(1, 16, 16, 3, 3, 3, 3), Case(1, 1, 20, 5, 5, 5, 5), Case(4, 2, 2, 3, 3, 3, 3, groups=2), Case(1, 64, 1, 1, 9, 1, 3)],
    ids=str,
)
def test_sizes_of_one_compile(case: Case) -> None:
    """Triton makes constants of them."""
    for launch in launches(case, "sm_90"):
        assert_good(launch, "sm_90", tensor_cores=is_product(launch))


@compiles
def test_few_tiles_share_out_their_sums() -> None:
    """One small image: as many programs as the machine has multiprocessors, or nearly."""
    grids = {launch.kernel.__name__: launch.grid for launch in launches(DEEP, "sm_90")}
    for name in ("conv2d_forward", "conv2d_backward_dx", "conv2d_backward_dweight"):
        assert torch.Size(grids[name]).numel() >= 64, grids
    assert grids["conv2d_forward"][2] > 1 and grids["conv2d_backward_dx"][2] > 1


@compiles
def test_tiles_are_copied_while_the_tensor_cores_work() -> None:
    """Warp-group instructions, and asynchronous copies of 16 bytes alone, in all three products."""
    from dlkernels.gpu import aot

    for last in (True, False):
        for launch in filter(is_product, launches(LARGE, "sm_90", last=last)):
            compiled = aot.compile_launch(launch, "sm_90")
            assert any(name.startswith("wgmma") for name in compiled.mma), compiled
            copies = re.findall(r"cp\.async\.(c[ag])\.shared", compiled.text("ptx"))
            assert copies and set(copies) == {"cg"}, compiled


@compiles
def test_offsets_are_64_bit() -> None:
    """A tensor may have more than 2^31 elements: no address is formed from a 32-bit vector."""
    from dlkernels.gpu import aot

    for case in (LAYER, FIRST, DEPTHWISE):
        for launch in launches(case, "sm_90"):
            ttir = aot.compile_launch(launch, "sm_90").text("ttir")
            vectors = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", ttir)
            assert vectors and set(vectors) == {"i64"}, launch.kernel.__name__
