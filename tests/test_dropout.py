"""What is peculiar to dropout beyond its generator (test_philox.py): seeds, modes, in place, and what the backward keeps. Every seed is
fixed, so no test can fail by chance."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from support import DTYPES, dtype_name
from test_philox import seed
from torch import Tensor

import dlkernels
import dlkernels.functional as F
from dlkernels import OPS


def test_manual_seed_decides() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = F.dropout(x), F.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x), first) and torch.equal(F.dropout(x), second)
    assert not torch.equal(first, second)


def test_gradient_has_the_mask_of_the_forward() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = F.dropout(x, 0.3)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


def test_only_the_seed_is_kept() -> None:
    kept: list[Tensor] = []
    x = torch.ones(10_000, requires_grad=True)

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        F.dropout(x * 1.5).sum()
    assert max(t.numel() for t in kept if t.dtype == torch.int64) == 1
    assert not any(t.numel() == x.numel() for t in kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("inplace", [False, True])
def test_edges_are_torchs(dtype: torch.dtype, inplace: bool) -> None:
    """p of 0 and 1, not training, no numbers: the result is torch's, also in being the input itself; NaN and infinity times 0 are NaN."""
    for x in (torch.randn(33).to(dtype), torch.ones(0, 3, dtype=dtype), torch.tensor([math.nan, math.inf, -1.0]).to(dtype)):
        for p, training in ((0, True), (0.0, True), (1, True), (1.0, True), (0.4, False)):
            ours, theirs = x.clone(), x.clone()
            y, native = F.dropout(ours, p, training, inplace), torch.nn.functional.dropout(theirs, p, training, inplace)
            torch.testing.assert_close(y, native, equal_nan=True, rtol=0, atol=0)
            assert (y is ours, y.data_ptr() == ours.data_ptr()) == (native is theirs, native.data_ptr() == theirs.data_ptr())
            assert torch.equal(ours.isnan(), theirs.isnan()) and ours._version == theirs._version


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 0, 2, 1),
    "stepped": lambda t: t[:, ::2, 1:],
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strides_are_torchs(layout: Any) -> None:
    x = layout(torch.randn(2, 3, 4, 5)).requires_grad_()
    torch.manual_seed(1)
    y = F.dropout(x, 0.3)
    native = torch.nn.functional.dropout(x, 0.3)
    dy = torch.randn(x.shape)
    assert y.stride() == native.stride()
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0] * x.detach(), y.detach() * dy)
    torch.manual_seed(1)
    assert torch.equal(F.dropout(x.detach().clone(memory_format=torch.preserve_format), 0.3), y)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_in_place(layout: Any) -> None:
    """The memory of the input holds what the other form returns, the version counter moves by one, and the gradient is right."""
    leaf = torch.randn(2, 3, 4, 5, requires_grad=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = layout(leaf * 1)
            torch.manual_seed(1)
            wanted, version = F.dropout(x, 0.3), x._version
            torch.manual_seed(1)
            if 0 in x.stride():
                with pytest.raises(RuntimeError):
                    F.dropout(x, 0.3, inplace=True)
                continue
            y = F.dropout(x, 0.3, inplace=True)
            assert y is x and torch.equal(x, wanted) and x._version == version + 1
            if grad:
                torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), leaf, retain_graph=True)[0] for t in (y, wanted)))


def test_in_place_refuses_leaves_and_leaves_them_alone() -> None:
    for leaf, x in ((leaf, leaf[1:] if view else leaf) for leaf, view in ((torch.ones(4, requires_grad=True), v) for v in (0, 1))):
        with pytest.raises(RuntimeError, match="leaf"):
            torch.nn.functional.dropout(x, 0.5, inplace=True)
        with pytest.raises(RuntimeError, match="input is a.* leaf"):
            F.dropout(x, 0.5, inplace=True)
        assert torch.equal(leaf, torch.ones(4)) and leaf._version == 0


def test_what_was_saved_before_an_overwrite_is_noticed() -> None:
    x = torch.randn(5, requires_grad=True)
    for grad in (True, False):
        square = (y := x * 1).square()
        with torch.set_grad_enabled(grad):
            F.dropout(y, 0.5, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace: bool) -> None:
    """Compiled code draws from the same generator: the same mask forward and backward, another one at the next call."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.dropout(x * 2, 0.3, inplace=inplace) * 1, fullgraph=True, backend="aot_eager")
    x = torch.ones(999, requires_grad=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.unique(), torch.tensor([0, 2 / 0.7]))
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], first.detach())


def test_checkpoint_repeats_the_mask() -> None:
    x = torch.ones(999, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: F.dropout(x, 0.3) ** 2, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * y.detach() / 1)


def test_vmap_asks_for_the_randomness() -> None:
    x = torch.ones(4, 500)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda row: F.dropout(row, 0.5))(x)
    same = torch.func.vmap(lambda row: F.dropout(row, 0.5), randomness="same")(x)
    assert torch.equal(same[0], same[3]) and same.unique().tolist() == [0, 2]
    different = torch.func.vmap(lambda row: F.dropout(row, 0.5), randomness="different")(x)
    assert not torch.equal(different[0], different[3]) and different.unique().tolist() == [0, 2]


@pytest.mark.parametrize(
    "args",
    [
        (torch.ones(3), -0.1), (torch.ones(3), 1.1), (torch.ones(3), math.nan), (torch.ones(3), math.inf), (None, 0.5), ([1.0, 2.0], 0.5),
        (torch.ones(3), "half"), (torch.ones(3, dtype=torch.int64), 0.5), (torch.ones(3, dtype=torch.int64), 0.5, False),
        (torch.ones(3, dtype=torch.complex64), 0.5), (torch.eye(3).to_sparse(), 0.5), (torch.ones(3, device="meta"), 0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_unusual_arguments(args: tuple[Any, ...], inplace: bool) -> None:
    """A result like torch's, or an exception of torch's type."""
    outcomes: list[Any] = []
    functions: list[Any] = [F.dropout, torch.nn.functional.dropout]
    for function in functions:
        try:
            y = function(*args, inplace=inplace)
            outcomes.append((y.shape, y.dtype, y.layout, y.device))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_raw_ops_refuse_bad_arguments() -> None:
    x, ops = torch.ones(5), torch.ops.dlkernels
    bad_seeds = [torch.tensor(1), torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32), torch.tensor([1.0]), seed().to("meta")]
    wrong = [(x, s, 0.5) for s in bad_seeds] + [(x, seed(), p) for p in (-0.1, 1.1, math.nan)]
    wrong += [(t, seed(), 0.5) for t in (torch.ones(5, dtype=torch.int64), torch.ones(5, dtype=torch.complex64), torch.eye(3).to_sparse())]
    for args in wrong:
        for raw in (ops.dropout, ops.dropout_):
            with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
                raw(*args)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.dropout_(torch.ones(4, 4).t()[1:], seed(), 0.5)
    assert torch.equal(x, torch.ones(5))


def test_layer() -> None:
    layer = dlkernels.nn.Dropout(0.4, inplace=False)
    assert isinstance(layer, torch.nn.Dropout) and repr(layer) == repr(torch.nn.Dropout(0.4))
    x = torch.ones(1000)
    assert 300 < int((layer(x) == 0).sum()) < 500
    assert layer.eval()(x) is x
    assert F.dropout2d is torch.nn.functional.dropout2d and dlkernels.nn.AlphaDropout is torch.nn.AlphaDropout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=dtype_name)
def test_compiles_for_gpus(dtype: torch.dtype) -> None:
    aot = pytest.importorskip("dlkernels.gpu.aot")
    for target in aot.TARGETS:
        (kernel,) = aot.compiled("dropout", target, dtype)
        assert kernel.spilled == 0 and kernel.registers < 64
        addresses = [line for line in kernel.text("ttir").splitlines() if "tt.addptr" in line]
        assert addresses and all("xi64>" in line for line in addresses), "an offset of 32 bits"


def test_the_op_is_registered_with_a_rival() -> None:
    """The benchmark races torch's dropout, which draws its own numbers."""
    op = OPS["dropout"]
    x = torch.ones(100)
    assert op.rival is not None and op.rival(x, seed(), 0.5).unique().tolist() == [0, 2]
