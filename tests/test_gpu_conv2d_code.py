"""The machine code that conv2d's Triton kernels compile to, without a GPU: registers, tensor cores, copies, offsets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from convolutions import Case
from launchers import INTERPRET, KEEPS_Z, SLOPE
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter leaves nothing to compile")


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
        *aot.record(lambda: conv2d.forward(x, weight, bias, *case.moves, False, act, SLOPE, act in KEEPS_Z), target),
        *aot.record(lambda: conv2d.backward(y, x, weight, y, *case.moves, False, act, SLOPE, True, True, True), target),
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


@pytest.mark.parametrize(
    "target, dtype", [*((t, torch.bfloat16) for t in ("sm_80", "sm_90", "sm_100", "gfx942")), ("sm_90", torch.float32)], ids=str
)
def test_kernels_compile(target: str, dtype: torch.dtype) -> None:
    names = set()
    for launch in itertools.chain(launches(LAYER, target, dtype), launches(DEPTHWISE, target, dtype)):
        assert_good(launch, target, tensor_cores=is_product(launch) and dtype == torch.bfloat16)
        names.add(launch.kernel.__name__)
    products = {"conv2d_forward", "conv2d_backward_dx", "conv2d_backward_dweight", "conv2d_backward_dz", "combine", "column_sums"}
    assert names == products | {"conv2d_depthwise_forward", "conv2d_depthwise_dx", "conv2d_depthwise_dweight"}


@pytest.mark.parametrize("case, last, act", FORMS)
def test_layers_compile(case: Case, last: bool, act: int) -> None:
    for launch in launches(case, "sm_90", last=last, act=act):
        assert_good(launch, "sm_90", tensor_cores=is_product(launch))


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


@pytest.mark.parametrize(
    "case",
    [Case(1, 16, 16, 3, 3, 3, 3), Case(1, 1, 20, 5, 5, 5, 5), Case(4, 2, 2, 3, 3, 3, 3, groups=2), Case(1, 64, 1, 1, 9, 1, 3)],
    ids=str,
)
def test_sizes_of_one_compile(case: Case) -> None:
    """Triton makes constants of them."""
    for launch in launches(case, "sm_90"):
        assert_good(launch, "sm_90", tensor_cores=is_product(launch))


def test_few_tiles_share_out_their_sums() -> None:
    """One small image: as many programs as the machine has multiprocessors, or nearly."""
    grids = {launch.kernel.__name__: launch.grid for launch in launches(DEEP, "sm_90")}
    for name in ("conv2d_forward", "conv2d_backward_dx", "conv2d_backward_dweight"):
        assert torch.Size(grids[name]).numel() >= 64, grids
    assert grids["conv2d_forward"][2] > 1 and grids["conv2d_backward_dx"][2] > 1


def test_tiles_are_copied_while_the_tensor_cores_work() -> None:
    """Warp-group instructions, and asynchronous copies of 16 bytes alone, in all three products."""
    from dlkernels.gpu import aot

    for last in (True, False):
        for launch in filter(is_product, launches(LARGE, "sm_90", last=last)):
            compiled = aot.compile_launch(launch, "sm_90")
            assert any(name.startswith("wgmma") for name in compiled.mma), compiled
            copies = re.findall(r"cp\.async\.(c[ag])\.shared", compiled.text("ptx"))
            assert copies and set(copies) == {"cg"}, compiled


def test_offsets_are_64_bit() -> None:
    """A tensor may have more than 2^31 elements: no address is formed from a 32-bit vector."""
    from dlkernels.gpu import aot

    for case in (LAYER, FIRST, DEPTHWISE):
        for launch in launches(case, "sm_90"):
            ttir = aot.compile_launch(launch, "sm_90").text("ttir")
            vectors = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", ttir)
            assert vectors and set(vectors) == {"i64"}, launch.kernel.__name__
