"""What is peculiar to linear_cross_entropy: its options, what it leaves to torch, and that the logits are never held."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import RawCalls
from test_cross_entropy import REDUCTIONS, compare, cpu_only

import dlkernels.functional as F
from dlkernels import nn
from dlkernels.backend import TRITON_ON_CPU

needs_native = pytest.mark.skipif(not hasattr(native, "linear_cross_entropy"), reason="torch has linear_cross_entropy from 2.13 on")


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("M, K, N", [(None, 3, 5), (6, 7, 17), (600 if not TRITON_ON_CPU else 20, 9, 40)])
def test_linear_cross_entropy_options(M: int | None, K: int, N: int) -> None:
    x, w, b = torch.randn(*([] if M is None else [M]), K).double(), torch.randn(N, K).double(), torch.randn(N).double()
    target = torch.randint(0, N, [] if M is None else [M])
    for reduction, weight, ignored, smoothing in itertools.product(REDUCTIONS, (None, torch.rand(N).double()), (None, 1), (0.0, 0.3)):
        options: dict[str, Any] = {"weight": weight, "reduction": reduction, "ignore_index": ignored, "label_smoothing": smoothing}
        compare(
            lambda x, w, b, t: F.linear_cross_entropy(x, w, t, linear_bias=b, **options),  # noqa: B023
            lambda x, w, b, t: native.linear_cross_entropy(x, w, t, linear_bias=b, **options), [x, w, b], target,  # noqa: B023
        )  # fmt: skip


@needs_native
def test_what_linear_cross_entropy_leaves_to_torch() -> None:
    """Probabilities and classifiers with dimensions run there; what does not fit raises what torch raises."""
    x, w, deep = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 2, 3)
    for args in ((x, w, torch.rand(4, 5)), (x, deep, torch.randint(0, 5, (4, 2)))):
        torch.testing.assert_close(F.linear_cross_entropy(*args), native.linear_cross_entropy(*args))
    labels = torch.zeros(4, dtype=torch.int64)
    wrong: list[tuple[Any, ...]] = [(x, w[:, :2], labels), (x, w[0], labels), (x[None], w, labels), (x, w, None)]
    for args in wrong:
        with pytest.raises((RuntimeError, TypeError), match="linear_weight|target"):
            F.linear_cross_entropy(*args)


@needs_native
def test_linear_cross_entropy_layer() -> None:
    layer, wanted = nn.LinearCrossEntropyLoss(7, 5, bias=True), torch.nn.LinearCrossEntropyLoss(7, 5, bias=True)
    wanted.load_state_dict(layer.state_dict())
    x, target = torch.randn(3, 7), torch.tensor([0, 4, 1])
    torch.testing.assert_close(layer(x, target), wanted(x, target))


@cpu_only
def test_no_tensor_has_a_number_for_every_row_and_class() -> None:
    """Peak memory of forward and backward, from the profiler: gradients and a workspace, a quarter of what PyTorch's own takes."""
    M, K, N = 4096, 32, 8192
    x, w, target = torch.randn(M, K).requires_grad_(), torch.randn(N, K).requires_grad_(), torch.arange(M) % N

    def allocations(call: Callable[[], Any]) -> tuple[int, int]:
        """(peak, largest) of the bytes that torch allocates."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            _alive = call()
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(sizes)), max(sizes)

    peak, largest = allocations(lambda: torch.autograd.grad(F.linear_cross_entropy(x, w, target), (x, w)))
    assert 0 < largest <= 8 << 20 and peak <= 16 << 20, f"{largest >> 20} MiB in one tensor, {peak >> 20} MiB in all"
    theirs, _ = allocations(lambda: torch.autograd.grad(native.cross_entropy(native.linear(x, w), target), (x, w)))
    assert 4 * peak < theirs


def test_gradients_of_one_chunked_call_twice() -> None:
    """The gradients that the forward found survive a backward, and without reduction the logits are computed again."""
    x, w, target = torch.randn(9, 4).requires_grad_(), torch.randn(6, 4).requires_grad_(), torch.arange(9) % 6
    loss = F.linear_cross_entropy(x, w, target)
    first = torch.autograd.grad(2 * loss, (x, w), retain_graph=True)
    first[0].zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0] * 2, first[1])
    with RawCalls() as recorded:
        F.linear_cross_entropy(x, w, target, reduction="none").sum().backward()
    assert [func._schema.name.rpartition("_")[2] for func, _ in recorded.calls] == ["forward", "forward", "backward"]
