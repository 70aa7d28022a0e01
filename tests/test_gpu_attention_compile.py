"""Attention's kernels, compiled for GPUs that aren't there: they fit, spill nothing, multiply on tensor cores, and load what is needed."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter leaves nothing to compile", allow_module_level=True)

from dlkernels.gpu import aot
from dlkernels.gpu import scaled_dot_product_attention as kernels
from dlkernels.gpu.launch import Launch
from dlkernels.ops.score_functions import code_of

FORWARD, DQUERY, DKEY = "scaled_dot_product_attention_forward", "backward_dquery", "backward_dkey"


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(target: str, D: int, mask: Tensor | None = None, right: int = -1, length: int = 2048, **options: Any) -> dict[str, Launch]:
    """The launches of a forward and a backward, by name."""
    q, lse = meta(2, 16, length, D), meta(2, 16, length, dtype=torch.float32)
    rest = mask, options.get("slopes"), None, None, options.get("seed"), 0.1, 0.125, *options.get("function", (0, 0.0)), -1, right, False
    launches = aot.record(lambda: kernels.forward(q, q, q, *rest), target)
    launches += aot.record(lambda: kernels.backward(q, q, q, q, q, lse, *rest, True, True, True, options.get("dmask", False)), target)
    return {launch.kernel.__name__: launch for launch in launches}


def compiled(launch: Launch, target: str = "sm_90") -> aot.Compiled:
    """``launch`` for ``target``; it spills nothing, fits, and multiplies on tensor cores."""
    found = aot.compile_launch(launch, target)
    assert found.spilled == 0, f"{found}: spills"
    assert found.shared <= aot.TARGETS[target].device.shared
    assert 0 < found.registers <= 512 and found.mma
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile(target: str) -> None:
    """Causal, the head size of most models; and what a generation has its own instruction for."""
    launches = recorded(target, 64, right=0)
    assert set(launches) == {FORWARD, DQUERY, DKEY, "backward_delta"}
    found = [compiled(launches[name], target) for name in (FORWARD, DQUERY, DKEY)]
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[target]
    assert all(any(mma.startswith(instruction) for mma in kernel.mma) for kernel in found)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_decoding_compiles(target: str) -> None:
    """One query beside 4096 keys: these are shared out, heads that share them are the rows of a tile; and the cache that they lie in."""
    for H, G in ((8, 8), (16, 2)):
        q, k = meta(1, H, 1, 64), meta(1, G, 4096, 64)
        call = partial(kernels.forward, q, k, k, *[None] * 5, 0.0, 0.125, 0, 0.0, -1, 0, True)
        launches = aot.record(call, target)
        assert [launch.kernel.__name__ for launch in launches] == [FORWARD, "combine_shares"]
        assert launches[0].grid[0] == G and launches[0].grid[1] > 8
        compiled(launches[0], target)
        assert aot.compile_launch(launches[1], target).spilled == 0
    append = aot.compiled("kv_cache_append_", target)[0]
    assert append.spilled == 0 and append.registers <= 64


@pytest.mark.slow
def test_large_heads_compile() -> None:
    for D, name in ((128, DKEY), (256, DQUERY)):
        compiled(recorded("sm_90", D)[name])


@pytest.mark.slow
def test_everything_at_once_compiles() -> None:
    """An additive mask with its gradient, slopes, soft cap and dropout, on short sequences."""
    mask, slopes, seed = meta(2, 1, 32, 32), meta(1, 16, dtype=torch.float32), meta(1, dtype=torch.int64)
    launches = recorded("sm_90", 32, mask, length=32, slopes=slopes, function=(code_of("softcap"), 20.0), seed=seed, dmask=True)
    for name in (FORWARD, DQUERY, DKEY, "backward_dmask"):
        compiled(launches[name])


@pytest.mark.slow
def test_loads_are_those_that_are_needed() -> None:
    """Of q, k, v (whole tiles and edges): no mask, no load of one; offsets are 64-bit."""
    plain = compiled(recorded("sm_90", 64)[FORWARD]).text("ttir")
    assert plain.count("tt.load") == 5
    vectors = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", plain)
    assert vectors and set(vectors) == {"i64"}
    assert not re.findall(r"arith\.muli .*: tensor<[\dx]*x?i32>", plain), "a vector of 32-bit products"
