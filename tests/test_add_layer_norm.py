"""What is peculiar to add_layer_norm and dropout_add_layer_norm: two results, one of them the residual stream, and a mask from a seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import SMALL, Args, threads
from test_layer_norm import assert_right, random, with_gradients
from torch import Tensor

import dlkernels
import dlkernels.functional as F
from dlkernels.ops import add_layer_norm as contract


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def arguments(M: int, N: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, residual, weight, bias."""
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(M, N), (M, N), (N,), (N,)])]


def cotangents(M: int, N: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random(M, N, dtype=dtype, seed=8), random(M, N, dtype=dtype, seed=9)


SEED = torch.tensor([0x123456789ABCDEF])


def ours(x: Tensor, residual: Tensor, weight: Any = None, bias: Any = None, seed: Any = None, p: float = 0.4) -> tuple[Tensor, Tensor]:
    if seed is None:
        return F.add_layer_norm(x, residual, x.shape[-1:], weight, bias)
    return contract._seeded(x, residual, seed, p, x.shape[-1:], weight, bias, 1e-5)


def defined(x: Tensor, residual: Tensor, weight: Any = None, bias: Any = None, seed: Any = None, p: float = 0.4) -> tuple[Tensor, Tensor]:
    return contract._reference(x, residual, seed, weight, bias, p, 1e-5)


SIZES = [(2, 20011)] if SMALL else [(37, 100), (67, 1300), (3, 4097), (40, 5003), (3, 50021), (20, 20011)]


@pytest.mark.isa
@pytest.mark.parametrize("M, N", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32] if SMALL else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
def test_rows_of_every_length(M: int, N: int, dtype: torch.dtype, seed: Tensor | None) -> None:
    tensors, dys = arguments(M, N, dtype), cotangents(M, N, dtype)
    found = [with_gradients(partial(f, seed=seed), *tensors, dys=dys) for f in (ours, defined)]
    exact = with_gradients(partial(defined, seed=seed), *(t.double() for t in tensors), dys=tuple(dy.double() for dy in dys))
    assert_right(found[0], found[1], exact, outputs=2)


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="CPU kernels only")
@pytest.mark.parametrize("M, N", SIZES)
def test_the_number_of_threads_changes_no_bit(M: int, N: int) -> None:
    found = []
    for count in (1, 2, 5):
        with threads(count):
            found.append(with_gradients(partial(ours, seed=SEED), *arguments(M, N), dys=cotangents(M, N)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
def test_what_is_dropped(p: float) -> None:
    """In the share p of all places x is dropped, elsewhere scaled; the rows differ, and the gradient of x vanishes in the same places."""
    x = torch.ones(64, 500, requires_grad=True)
    _, s = contract._seeded(x, torch.zeros_like(x), SEED, p, (500,), None, None, 1e-5)
    (dx,) = torch.autograd.grad(s.sum(), x)
    kept = s != 0
    assert abs(kept.double().mean() - (1 - p)) < 0.01
    torch.testing.assert_close(s[kept], torch.full_like(s[kept], 1 / (1 - p) if p < 1 else 1.0))
    assert torch.equal(dx != 0, kept)
    assert p in (0, 1) or not torch.equal(kept[0], kept[1])


def test_the_seed_comes_from_torchs_generator() -> None:
    x, residual, w, b = arguments(5, 70)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(F.dropout_add_layer_norm(x, residual, 0.5, (70,), w, b)[1])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("training, p", [(False, 0.5), (True, 0.0), (True, 0)])
def test_without_dropout(training: bool, p: float) -> None:
    x, residual, w, b = arguments(5, 70)
    found = F.dropout_add_layer_norm(x, residual, p, (70,), w, b, training=training)
    assert all(torch.equal(a, b) for a, b in zip(found, F.add_layer_norm(x, residual, (70,), w, b)))


@pytest.mark.parametrize("used", [(True, False), (False, True)])
@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
def test_one_result_alone(used: tuple[bool, bool], seed: Tensor | None) -> None:
    """Gradients where the other result is not used."""
    tensors, dys = [t.double().requires_grad_() for t in arguments(5, 70)], cotangents(5, 70, torch.float64)
    grads = []
    functions: list[Callable[..., tuple[Tensor, Tensor]]] = [ours, defined]
    for function in functions:
        ys = function(*tensors, seed=seed)
        outputs = [y for y, use in zip(ys, used) if use]
        some = [dy for dy, use in zip(dys, used) if use]
        grads.append(torch.autograd.grad(outputs, tensors, some, materialize_grads=True, allow_unused=True))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1), (2,), (0, 3)])
@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
def test_some_gradients_alone(wanted: tuple[int, ...], seed: Tensor | None) -> None:
    tensors, dys = [t.double() for t in arguments(5, 70)], cotangents(5, 70, torch.float64)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    grads = []
    functions: list[Callable[..., tuple[Tensor, Tensor]]] = [ours, defined]
    for function in functions:
        ys = function(*leaves, seed=seed)
        some = [(y, dy) for y, dy in zip(ys, dys) if y.requires_grad]
        grads.append(torch.autograd.grad([y for y, _ in some], [leaves[i] for i in wanted], [dy for _, dy in some]))
    torch.testing.assert_close(*grads)


def test_shapes_of_several_dimensions_and_broadcast() -> None:
    """What a kernel does not take is computed one step after the other."""
    x, residual, w = (random(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate([(2, 5, 3, 4), (2, 5, 3, 4), (3, 4)]))
    for r in (residual, residual[:1], residual.float()):
        s = x + r
        torch.testing.assert_close(F.add_layer_norm(x, r, (3, 4), w), (native.layer_norm(s, (3, 4), w), s))
    assert dlkernels.explain("add_layer_norm", x, residual).implementation != "reference"
    assert "residual" in dlkernels.explain("add_layer_norm", x, residual[:1]).reason


def test_bad_arguments() -> None:
    x = torch.ones(2, 3)
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            F.dropout_add_layer_norm(x, x, p, (3,))
        with pytest.raises(ValueError, match="between 0 and 1"):
            dlkernels.nn.DropoutAddLayerNorm(3, p=p)
    for residual in (None, [1.0]):
        with pytest.raises(TypeError, match="residual"):
            F.add_layer_norm(x, residual, (3,))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        F.add_layer_norm(x, x, (4,))
    with pytest.raises(RuntimeError):
        F.add_layer_norm(x, torch.ones(2, 4), (3,))


def test_raw_ops_refuse_what_does_not_fit() -> None:
    ops = torch.ops.dlkernels
    x, w, mean, rstd = torch.ones(4, 3), torch.ones(3), torch.ones(2, 4), torch.ones(4)
    forward: Args = (x, x, SEED, w, w, 0.1, 1e-5)
    backward: Args = (x, x, x, SEED, w, mean, rstd, 0.1, True, True, True, True)
    wrong_forward: list[list[Any]] = [
        [w, x.double()], [x[:, :2], x.double()], [SEED.int(), SEED.repeat(2)], [rstd], [rstd], [-0.1, 2.0],
    ]  # fmt: skip
    wrong_backward: list[list[Any]] = [
        [w, x.double()], [x[:, :2]], [w, x.double()], [SEED.int(), SEED.repeat(2)], [rstd], [rstd, mean.double()], [mean, rstd.double()],
        [-0.1, 2.0],
    ]  # fmt: skip
    wrong = [(ops.add_layer_norm_forward, forward, i, values) for i, values in enumerate(wrong_forward)]
    wrong += [(ops.add_layer_norm_backward, backward, i, values) for i, values in enumerate(wrong_backward)]
    for op, fits, i, values in wrong:
        for value in values:
            with pytest.raises((RuntimeError, TypeError), match="need|must"):
                op(*fits[:i], value, *fits[i + 1 :])


def test_layers() -> None:
    """LayerNorm's parameters; dropout in training alone."""
    x, residual, w, b = arguments(5, 70)
    for layer in (dlkernels.nn.AddLayerNorm(70), dlkernels.nn.DropoutAddLayerNorm(70, p=0.5)):
        layer.load_state_dict({"weight": w, "bias": b})
        y, s = layer.eval()(x, residual)
        torch.testing.assert_close(s, x + residual)
        torch.testing.assert_close(y, native.layer_norm(s, (70,), w, b))
        changed = not torch.equal(layer.train()(x, residual)[1], s)
        assert changed == isinstance(layer, dlkernels.nn.DropoutAddLayerNorm)
    assert "p=0.5" in repr(layer) and "eps" in repr(layer)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("N, dtype", [(64, torch.float32), (1024, torch.bfloat16), (8192, torch.float32), (100003, torch.float32)], ids=str)
def test_gpu_kernels_compile(target: str, N: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from dlkernels.gpu import add_layer_norm as kernels
    from dlkernels.gpu import aot

    x, w, seed = (torch.empty(s, dtype=d, device="meta") for s, d in (((4096, N), dtype), ((N,), dtype), ((1,), torch.int64)))
    mean, rstd = (torch.empty(s, device="meta") for s in ((2, 4096), (4096,)))
    calls = [lambda: kernels.forward(x, x, seed, w, w, 0.1, 1e-5),
             lambda: kernels.backward(x, x, x, seed, w, mean, rstd, 0.1, True, True, True, True)]  # fmt: skip
    for call in calls:
        for launch in aot.record(call, target):
            compiled = aot.compile_launch(launch, target)
            assert compiled.spilled == 0, f"{compiled} spills"
