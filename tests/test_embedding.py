"""What is peculiar to embedding: its options, indices of two types and any shape, indices out of range, and the order of addition."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import pytest
import torch
from support import DTYPES, SMALL, threads
from torch import Tensor

import dlkernels
import dlkernels.functional as F
import dlkernels.nn as nn

torch_nn = torch.nn.functional


def table(V: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def with_gradient(function: Any, indices: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = weight.detach().requires_grad_()
    y = function(indices, leaf, **options)
    dy = (torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


@pytest.mark.isa
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (13,), (3, 1, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 0, 4, -1, -5])
def test_options(index: torch.dtype, shape: tuple[int, ...], scale_grad_by_freq: bool, padding_idx: int | None) -> None:
    """Whole numbers: values are copies and sums exact, so torch's must be met in every bit but where a sum is divided."""
    indices = torch.tensor([4, 0, 4, 2, 4, 0, 1, 4, 2, 0, 4, 4, 0, 1, 2])[: torch.Size(shape).numel()].reshape(shape).to(index)
    options: dict[str, Any] = {"padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
    for dtype in DTYPES if not SMALL else DTYPES[:1]:
        for D in (1, 19, 150):
            weight = table(5, D, dtype)
            (y, dweight), (native, slope) = (
                with_gradient(function, indices, weight, **options) for function in (F.embedding, torch_nn.embedding)
            )
            assert torch.equal(y, native) and y.stride() == native.stride()
            rounding = 16 * torch.finfo(dtype).eps if scale_grad_by_freq else 0.0  # torch divides before it adds
            torch.testing.assert_close(dweight, slope, atol=rounding, rtol=rounding)


@pytest.mark.isa
@pytest.mark.parametrize("wrong", [5, -1, 2**31 - 1, -(2**31), 2**40, -(2**63)])
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_an_index_out_of_range_is_refused(wrong: int, index: torch.dtype) -> None:
    """With torch's exception, naming the index, its place, and the rows; with grad and without; by the backward alone as well."""
    if index == torch.int32 and abs(wrong) > 2**31:
        return
    weight = table(5, 3)
    for place in (0, 6, 11):
        indices = (torch.arange(12) % 5).to(index)
        indices[place] = wrong
        said = "out of range for the 5 rows" if SMALL else rf"index {wrong} at position {place} .*out of range for the 5 rows"
        with pytest.raises(IndexError):
            torch_nn.embedding(indices, weight)
        for leaf in (weight, weight.clone().requires_grad_()):
            with pytest.raises(IndexError, match=said):
                F.embedding(indices.view(3, 4), leaf)
        with pytest.raises(RuntimeError, match=said):
            torch.ops.dlkernels.embedding_backward(torch.ones(12, 3), indices, 5, -1, False)
    with pytest.raises(IndexError):
        F.embedding(torch.tensor(0), torch.ones(0, 3))
    torch.testing.assert_close(F.embedding(torch.tensor([4]), weight)[0], weight[4])


@pytest.mark.isa
@pytest.mark.parametrize("D", [1, 37, 300])
def test_rows_are_added_in_the_order_of_the_indices(D: int) -> None:
    """In float32, and rounded once at the end: sums of numbers whose order shows, equal in every bit to a loop; whatever the threads."""
    L, V = (900, 40) if not SMALL else (60, 5)
    indices = (torch.arange(L) ** 2) % 41 % V
    for dtype in DTYPES if not SMALL else DTYPES[:1]:
        dy = table(L, D, dtype) * 10 ** (torch.arange(L) % 5)[:, None].to(dtype)
        exact = torch.zeros(V, D, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for l in range(L):
            exact[indices[l]] += dy[l]
        for count in (1, 2):
            with threads(count):
                assert torch.equal(torch.ops.dlkernels.embedding_backward(dy, indices, V, -1, False), exact.to(dtype))


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="the interpreter runs a program per row")
@pytest.mark.parametrize("used", ["the first rows", "the last rows", "one row"])
def test_uneven_use(used: str) -> None:
    """The threads' shares are of unequal length, one may be empty; every row is written once, zeros where it is not used."""
    V, L = 5000, 3000
    indices = {"the first rows": torch.arange(L) % 9, "the last rows": V - 1 - torch.arange(L) % 9, "one row": torch.full((L,), 2500)}[used]
    with threads(2):
        dweight = torch.ops.dlkernels.embedding_backward(torch.ones(L, 3), indices, V, -1, False)
    assert torch.equal(dweight, torch.bincount(indices, minlength=V)[:, None].expand(V, 3).float())


@pytest.mark.isa
def test_weights_with_gaps() -> None:
    """Rows of a wider table, every second row, a transposed one, one row for all: no number from between is read."""
    wide = table(12, 40)
    wide[:, 20:] = float("nan")
    for weight in (wide[:, :20], wide[::2, 3:20], table(20, 12).t(), wide[:1, :7].expand(5, 7), wide[:, :1]):
        indices = torch.arange(9) % weight.shape[0]
        assert torch.equal(F.embedding(indices, weight), weight[indices])


def test_other_indices_take_the_definition() -> None:
    """Floats and small integers as torch: refused."""
    for dtype in (torch.float32, torch.int8, torch.uint8, torch.bool):
        indices = torch.ones(3).to(dtype)
        assert "input has dtype" in dlkernels.explain("embedding", torch.ones(2, 3), indices).reason
        with pytest.raises(RuntimeError):
            torch_nn.embedding(indices, torch.ones(2, 3))
        with pytest.raises(RuntimeError):
            F.embedding(indices, torch.ones(2, 3))
    for weight in (torch.ones(3), torch.ones(2, 3, 4)):
        with pytest.raises(RuntimeError):
            F.embedding(torch.tensor([1]), weight)
    for some in (([1], torch.ones(2, 3)), (torch.tensor([1]), 3.0), (None, torch.ones(2, 3))):
        with pytest.raises(TypeError, match="must be a Tensor, got"):
            F.embedding(*some)


@pytest.mark.parametrize("padding_idx", [5, -6, 100])
def test_padding_out_of_range(padding_idx: int) -> None:
    for function in (torch_nn.embedding, F.embedding):
        with pytest.raises(AssertionError, match="(?i)padding_idx"):
            function(torch.tensor([1]), table(5, 3), padding_idx=padding_idx)


def test_sparse_and_max_norm_are_torchs() -> None:
    weight, indices = table(5, 3), torch.tensor([1, 3, 1])
    for function in (torch_nn.embedding, F.embedding):
        leaf = weight.clone().requires_grad_()
        function(indices, leaf, sparse=True).sum().backward()
        assert leaf.grad is not None and leaf.grad.is_sparse
    renormed = [weight.clone(), weight.clone()]
    assert torch.equal(F.embedding(indices, renormed[0], max_norm=0.5), torch_nn.embedding(indices, renormed[1], max_norm=0.5))
    assert torch.equal(renormed[0], renormed[1]) and not torch.equal(renormed[0], weight)
    assert "sparse" in dlkernels.explain("embedding", indices, weight, None, None, 2.0, False, True).reason
    assert "max_norm" in dlkernels.explain("embedding", indices, weight, None, 0.5).reason
    assert dlkernels.explain("embedding", indices.int(), weight).implementation != "reference"


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"scale_grad_by_freq": True}], ids=str)
def test_second_derivative_with_options(options: dict[str, Any]) -> None:
    """The gradient is linear in dy, and can be differentiated in turn."""
    weight, indices = table(4, 3, torch.float64).requires_grad_(), torch.tensor([1, 3, 1, 0])
    assert torch.autograd.gradgradcheck(lambda w: F.embedding(indices, w, **options), (weight,))


def test_weight_may_change_before_backward() -> None:
    """The backward reads indices only, as torch's: an optimiser may have stepped meanwhile."""
    weight = table(4, 3).requires_grad_()
    y = F.embedding(torch.tensor([1, 1, 2]), weight)
    with torch.no_grad():
        weight.add_(1)
    y.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad[:, 0], torch.tensor([0.0, 2.0, 1.0, 0.0]))


def test_layer() -> None:
    """torch's layer, constructor, padding row and state_dict; from_pretrained makes ours."""
    torch.manual_seed(0)
    ours = nn.Embedding(7, 5, padding_idx=2, scale_grad_by_freq=True)
    native = torch.nn.Embedding(7, 5, padding_idx=2, scale_grad_by_freq=True)
    native.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(native) and not ours.weight[2].any()
    indices = torch.tensor([[1, 2, 1], [6, 0, 1]])
    for layer in (ours, native):
        layer(indices).square().sum().backward()
    assert torch.equal(ours(indices), native(indices))
    torch.testing.assert_close(ours.weight.grad, native.weight.grad)
    pretrained = nn.Embedding.from_pretrained(table(4, 3))
    assert type(pretrained) is nn.Embedding and not pretrained.weight.requires_grad
    assert torch.equal(nn.Embedding(4, 3, max_norm=0.1)(indices.clamp(max=3)).norm(dim=-1) < 0.1001, torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["embedding_forward", "embedding_backward"])
def test_kernels_compile_for_gpus(name: str, dtype: torch.dtype) -> None:
    """Without spills, and with 64-bit offsets."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter leaves nothing to compile")
    from dlkernels import gpu
    from dlkernels.gpu import aot

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    call = gpu.implementations()[name]
    for target in aot.TARGETS if dtype == torch.float32 else ["sm_90"]:
        for index, D in ((torch.int64, 512), (torch.int32, 77)):
            first = meta(1000, D, dtype=dtype) if name == "embedding_forward" else meta(4, 256, D, dtype=dtype)
            others = () if name == "embedding_forward" else (1000, -1, D == 77)
            launches = aot.record(partial(call, first, meta(4, 256, dtype=index), *others), target)
            assert [launch.kernel.__name__ for launch in launches] == [name]
            compiled = aot.compile_launch(launches[0], target)
            assert compiled.spilled == 0 and 0 < compiled.registers <= 255
            vectors = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", compiled.text("ttir"))
            assert vectors and set(vectors) == {"i64"}
