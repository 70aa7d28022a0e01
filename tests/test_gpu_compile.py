"""Without a GPU: every kernel that the launchers start compiles for four GPUs, fits them, spills nothing, and runs on tensor cores.

Also the parts of the choice of tiles that need no GPU: the model, the buckets, the table's file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter leaves nothing to compile", allow_module_level=True)

from dlkernels.gpu import aot, config, tune
from dlkernels.gpu import linear as kernels
from dlkernels.gpu.config import Config
from dlkernels.gpu.launch import Device, Launch, recording

SIZE = 1024
H100 = aot.TARGETS["sm_90"].device


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(dtype: torch.dtype, act: int = 2, M: int = SIZE, K: int = SIZE, N: int = SIZE) -> Callable[[], Any]:
    return lambda: kernels.forward(meta(M, K, dtype=dtype), meta(N, K, dtype=dtype), meta(N, dtype=dtype), act, 0.01, act in (2, 3, 7))


def backward(dtype: torch.dtype, act: int = 1, M: int = SIZE, K: int = SIZE, N: int = SIZE) -> Callable[[], Any]:
    dy, x, weight = meta(M, N, dtype=dtype), meta(M, K, dtype=dtype), meta(N, K, dtype=dtype)
    return lambda: kernels.backward(dy, x, weight, dy, act, 0.01, True, True, True)


def recorded(call: Callable[[], Any], target: str = "sm_90") -> dict[str, Launch]:
    return {launch.kernel.__name__: launch for launch in aot.record(call, target)}


@pytest.fixture
def tf32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def assert_good(compiled: aot.Compiled, tensor_cores: bool) -> None:
    assert compiled.spilled == 0, f"{compiled}: spills"
    assert compiled.shared <= aot.TARGETS[compiled.target].device.shared
    assert 0 < compiled.registers <= 512
    if tensor_cores:
        assert compiled.mma, f"{compiled}: no tensor-core instruction"


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_compile(target: str, dtype: torch.dtype) -> None:
    launches = {**recorded(forward(dtype), target), **recorded(backward(dtype), target)}
    assert set(launches) >= {"linear_forward", "linear_backward_dx", "linear_backward_dweight"}
    for launch in launches.values():
        is_product = launch.kernel.__name__.startswith("linear")
        assert_good(aot.compile_launch(launch, target), tensor_cores=is_product and dtype == torch.bfloat16)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_tf32_runs_on_tensor_cores(target: str, tf32: None) -> None:
    launch = recorded(forward(torch.float32, 1), target)["linear_forward"]
    assert launch.constants["PRECISION"] == "tf32"
    assert_good(aot.compile_launch(launch, target), tensor_cores=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_compile(dtype: torch.dtype) -> None:
    for launch in recorded(forward(dtype, 1)).values():
        assert_good(aot.compile_launch(launch, "sm_90"), tensor_cores=True)


def test_the_warp_group_instruction_of_each_generation() -> None:
    for target, name in (("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")):
        compiled = aot.compile_launch(recorded(forward(torch.bfloat16), target)["linear_forward"], target)
        assert any(instruction.startswith(name) for instruction in compiled.mma), (target, compiled.mma)


def test_uneven_split_and_large_kernels_compile() -> None:
    """A summed dimension that is no multiple of the step; one shared out over programs; the largest tile; a pass of its own."""
    shapes = (8, 4096, 4096), (64, 65536, 64), (333, 777, 1001)
    calls = [*(forward(torch.bfloat16, 1, *shape) for shape in shapes), backward(torch.bfloat16, 2, 8192, 8192, 8192)]
    launches = [launch for call in calls for launch in aot.record(call, "sm_90")]
    names = {launch.kernel.__name__ for launch in launches}
    assert {"combine", "activation_backward"} <= names
    assert any(launch.constants.get("EVEN") is False for launch in launches)
    for launch in launches:
        assert_good(aot.compile_launch(launch, "sm_90"), tensor_cores=launch.kernel.__name__.startswith("linear"))


@pytest.mark.parametrize("name", ["linear_forward", "linear_backward_dx", "linear_backward_dweight", "activation_backward", "combine"])
def test_offsets_are_64_bit(name: str) -> None:
    """A tensor may have more than 2^31 elements: no address is formed from a 32-bit vector, none from a 32-bit product."""
    calls = [forward(torch.bfloat16, 1, 64, 65536, 64), backward(torch.bfloat16), backward(torch.bfloat16, 1, 2048, 2048, 2048)]
    launch = next(launch for call in calls for launch in aot.record(call, "sm_90") if launch.kernel.__name__ == name)
    ttir = aot.compile_launch(launch, "sm_90").text("ttir")
    vectors = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", ttir)
    assert vectors and set(vectors) == {"i64"}
    assert not re.findall(r"arith\.muli .*: tensor<[\dx]*x?i32>", ttir), "a vector of 32-bit products"
    assert re.findall(r"arith\.muli .*i64>?", ttir)


def test_the_code_of_every_stage_can_be_read() -> None:
    (compiled,) = aot.compiled("linear_forward", "sm_90")
    for stage, word in (("ttir", "tt.dot"), ("ttgir", "ttng.warp_group_dot"), ("ptx", "wgmma"), ("sass", "HGMMA")):
        assert word in compiled.text(stage), stage
    with pytest.raises(ValueError, match="no stage 'amdgcn'; it has"):
        compiled.text("amdgcn")
    with pytest.raises(ValueError, match="unknown target"):
        aot.compiled("linear_forward", "sm_1")
    with pytest.raises(ValueError, match="no example"):
        aot.compiled("nothing")


def test_launchers_are_found() -> None:
    from dlkernels import gpu

    assert {"linear_forward", "linear_backward"} <= set(gpu.implementations())
    assert set(gpu.examples()) == set(gpu.implementations())


def test_absent_arguments_cost_nothing() -> None:
    """Without bias and z the forward has neither their loads nor their stores."""
    with_z = recorded(forward(torch.bfloat16, 2))["linear_forward"]
    bare = recorded(lambda: kernels.forward(meta(SIZE, SIZE), meta(SIZE, SIZE), None, 0, 0.0, False))["linear_forward"]
    count = {n: [aot.compile_launch(launch, "sm_90").text("ttir").count(n) for launch in (with_z, bare)] for n in ("tt.store", "tt.load")}
    assert count == {"tt.store": [2, 1], "tt.load": [3, 2]}


@pytest.mark.parametrize("size, wanted", [(0, 16), (1, 16), (16, 16), (17, 32), (1024, 1024), (1025, 2048), (10**9, 16384)])
def test_bucket(size: int, wanted: int) -> None:
    assert config.bucket(size) == wanted


def test_the_model_fills_the_machine() -> None:
    large = config.candidates("half", 8192, 8192, 8192, H100)[0]
    assert (large.rows * large.cols, large.split) == (128 * 256, 1)
    narrow = config.candidates("half", 8, 4096, 4096, H100)[0]
    assert narrow.rows == 16 and config.ceil_div(4096, narrow.cols) * narrow.split >= H100.processors // 2
    deep = config.candidates("half", 64, 64, 65536, H100)[0]
    assert deep.split > 1


@pytest.mark.parametrize("kind", config.TILES)
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("product", ["forward", "dx formed"])
def test_every_size_has_a_tile_that_fits(kind: str, target: str, product: str) -> None:
    device = aot.TARGETS[target].device
    for rows, cols, depth in [(1, 1, 0), (1, 4096, 1), (17, 33, 65), (4096, 4096, 4096), (10**6, 3, 10**6)]:
        c = config.choose(product, kind, rows, cols, depth, device)
        assert config.shared_bytes(c, kind, config.reads(product)) < device.shared
        assert min(c.rows, c.cols, c.depth) >= 16 and c.stages >= 2


def test_a_table_is_written_read_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"forward half 1024x1024x1024": Config(64, 64, 64, 4, 4, 3, 2), "dx half 16x32x64": Config(16, 16, 16, 1, 4, 2, 1)}
    path = config.table_path("NVIDIA Some GPU", tmp_path)
    assert path == tmp_path / "nvidia-some-gpu.json"
    config.write_table(path, "NVIDIA Some GPU", wanted, {"torch": "2", "triton": "3"})
    assert config.read_table(path) == wanted
    monkeypatch.setenv("DLKERNELS_TABLES", str(tmp_path))
    chosen = config.choose("forward", "half", 1000, 1024, 700, Device("NVIDIA Some GPU", 132, 227 << 10))
    assert chosen == wanted["forward half 1024x1024x1024"]
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a table"):
        config.read_table(path)


def test_shipped_tables_are_valid() -> None:
    for path in config.TABLES.glob("*.json"):
        for name, c in config.read_table(path).items():
            product = r"(forward|dx|dx formed|dweight|dweight formed|attention (forward|dquery|dkey|dmask))"
            assert re.fullmatch(product + r" (half|tf32|float|double) \d+x\d+x\d+", name), (path, name)
            assert c.stages >= 1 and c.split >= 1


def test_tuning_keeps_the_fastest_and_survives_failures() -> None:
    trials = tune.trials("forward", "half", 1024, 1024, 1024, H100)
    assert 1 < len(trials) <= tune.TRIES and len(set(trials)) == len(trials)

    def seconds(c: Config) -> float:
        if c == trials[0]:
            raise RuntimeError("out of resources")
        return abs(trials.index(c) - 2) + 1.0

    with pytest.warns(UserWarning, match="does not run here"):
        assert tune.fastest(trials, seconds) == (trials[2], 1.0)
    assert tune.fastest([], seconds) is None


@pytest.mark.parametrize("M, K, N", [(64, 784, 256), (333, 777, 1001)])
def test_tuning_runs_every_product(M: int, K: int, N: int) -> None:
    with recording(H100) as launches:
        for name, rows, cols, depth, run in tune.products(M, K, N, torch.bfloat16, "meta"):
            run(tune.trials(name, "half", rows, cols, depth, H100)[0])
    assert len(launches) >= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tuning_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match="a GPU"):
        tune.main()


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path: Path) -> None:
    assert len(config.read_table(tune.main(tmp_path, [(256, 256, 256)]))) >= 5
