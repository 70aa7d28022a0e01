"""The tables behind the optimizers' launches: made anew when an address changes, one for each set of dtypes, every tensor checked."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support import SMALL

from dlkernels.gpu import aot
from dlkernels.gpu.multi_tensor import CHUNK, groups
from dlkernels.gpu.optimizers import adam_


def test_tables_are_made_anew_only_when_an_address_changes() -> None:
    params, grads = [torch.ones(3, 5), torch.ones(CHUNK + 1)], [torch.ones(3, 5), torch.ones(CHUNK + 1)]
    (first,) = groups({"params": (params, False), "grads": (grads, False)})
    (again,) = groups({"params": (params, False), "grads": (grads, False)})
    assert first.pointers is again.pointers and first.chunks is again.chunks
    assert first.pointers.tolist() == [t.data_ptr() for t in (*params, *grads)]
    assert first.chunks.tolist() == [[0, 0, 15], [1, 0, CHUNK + 1], [1, CHUNK, CHUNK + 1]]
    kept, grads[0] = grads[0], torch.ones(3, 5)
    (moved,) = groups({"params": (params, False), "grads": (grads, False)})
    assert moved.pointers[2] == grads[0].data_ptr() != kept.data_ptr()


def test_one_group_for_each_combination_of_dtypes() -> None:
    params = [torch.ones(2), torch.ones(3).half(), torch.ones(4), torch.ones(5).half()]
    moments = [torch.ones(2), torch.ones(3), torch.ones(4), torch.ones(5).half()]
    found = groups({"params": (params, False), "absent": ([], True), "moments": (moments, True)})
    assert [group.places for group in found] == [[0, 2], [1], [3]]


def test_memory_that_a_kernel_can_walk() -> None:
    transposed, holes = torch.randn(4, 6).t(), torch.randn(4, 6)[:, ::2]
    (group,) = groups({"params": ([transposed, holes], False), "grads": ([torch.randn(4, 6).t(), torch.randn(4, 3)], False)})
    assert group.lists[0][0] is transposed and [original is holes for original, _ in group.copies] == [True]
    group.copies[0][1].fill_(7)
    group.write_back()
    assert (holes == 7).all()


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.ones(2)], "grads has 1 tensors, needs 2 like params"),
        ([torch.ones(2), torch.ones(2)], r"grads\[1\] must have shape \(3,\), got \(2,\)"),
        ([torch.ones(2).double(), torch.ones(3)], r"grads\[0\] must have dtype torch.float32 on cpu, got torch.float64"),
    ],
)
def test_every_tensor_is_checked(grads: list[torch.Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        groups({"params": ([torch.ones(2), torch.ones(3)], False), "grads": (grads, False)})


@pytest.mark.skipif(SMALL, reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_in_bfloat16_compile(dtype: torch.dtype, target: str) -> None:
    params, moments = ([torch.empty(1000, 1000, dtype=kind, device="meta")] for kind in (dtype, torch.bfloat16))
    counts = [torch.empty((), device="meta")]
    rule = 1e-3, 0.9, 0.999, 1e-8, 0.01, True, False, False, True
    (launch,) = aot.record(lambda: adam_(params, params, moments, moments, moments, counts, None, None, *rule), target)
    compiled = aot.compile_launch(launch, target)
    assert compiled.spilled == 0 and 0 < compiled.registers <= 128
