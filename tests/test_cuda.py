"""Every op of OPS on a CUDA device through its public function: the numbers, the implementation chosen, what PyTorch does around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support import (
    LAYOUTS,
    Args,
    arguments,
    as_tuple,
    assert_accurate,
    assert_same_bits,
    cotangents,
    differentiable,
    each_op,
    exact_results,
    integers,
    label,
    largest,
    map_tensors,
    middle,
    results,
    samples,
)
from torch import Tensor

import dlkernels
from dlkernels import OPS
from dlkernels.bench.inputs import dtype_name
from dlkernels.bench.optimizers import OPTIMIZERS, SAMPLES, Step, line_up_step, steps
from dlkernels.registry import FLOATS, Op

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)  # bfloat16 too, which the interpreter leaves out
each_size = pytest.mark.parametrize(
    ("op", "size"), [pytest.param(op, size, id=f"{op.name}-{label(size)}") for op in OPS.values() for size in op.samples]
)


def on_gpu(args: Args) -> Args:
    return tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in args)


@each_dtype
@each_size
def test_values_and_gradients(op: Op, size: Mapping[str, Any], dtype: torch.dtype) -> None:
    args = arguments(op, size, dtype)
    assert_accurate(op, on_gpu(args), on_gpu(cotangents(op, args)))


@each_dtype
@each_op
def test_triton_does_the_work(op: Op, dtype: torch.dtype) -> None:
    assert dlkernels.explain(op.name, *on_gpu(arguments(op, middle(op), dtype))).implementation == "triton"


@each_dtype
@each_op
def test_integers_are_exact(op: Op, dtype: torch.dtype) -> None:
    """Where the definition keeps whole numbers whole, forward and gradients equal the float64 result rounded once."""
    for size in op.samples:
        args = integers(op, size, dtype)
        dys = cotangents(op, args, integer=True)
        exact = exact_results(op, args, dys)
        if all(torch.equal(value, value.round()) for value in exact.values()):
            ours = results(op, op.call, on_gpu(args), on_gpu(dys))
            assert_same_bits({name: value.cpu() for name, value in ours.items()}, {n: v.to(dtype) for n, v in exact.items()}, op.name)


@each_op
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(op: Op, layout: Any) -> None:
    args = arguments(op, middle(op), torch.float32)
    dys = on_gpu(cotangents(op, args))
    assert_accurate(op, map_tensors(layout, on_gpu(args)), map_tensors(layout, dys))


@each_op
def test_gradcheck(op: Op) -> None:
    size = samples(op)[-1]
    args = map_tensors(lambda t: t.requires_grad_(), on_gpu(arguments(op, size, torch.float64)))
    assert torch.autograd.gradcheck(op.call, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(op.call, args, fast_mode=True)


@each_dtype
@each_op
def test_twenty_runs_give_the_same_bits(op: Op, dtype: torch.dtype) -> None:
    args = arguments(op, largest(op), dtype)
    dys, args = on_gpu(cotangents(op, args)), on_gpu(args)
    first = results(op, op.call, args, dys)
    for _ in range(19):
        assert_same_bits(results(op, op.call, args, dys), first, op.name)


@each_op
def test_autocast_is_native_s(op: Op) -> None:
    args = on_gpu(arguments(op, middle(op), torch.float32))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert [y.dtype for y in as_tuple(op.call(*args))] == [y.dtype for y in as_tuple(op.native(*args))]


@each_op
def test_two_devices_raise(op: Op) -> None:
    args = arguments(op, middle(op), torch.float32)
    if len(differentiable(args)) > 1:
        first = differentiable(args)[0]
        mixed = tuple(arg.cuda() if i == first else arg for i, arg in enumerate(args))
        with pytest.raises(RuntimeError, match="cuda"):
            op.call(*mixed)


def test_a_training_step_compiles_whole() -> None:
    model = dlkernels.nn.Sequential(dlkernels.nn.LinearReLU(33, 65), dlkernels.nn.Linear(65, 7)).cuda()
    x = torch.randn(17, 33, device="cuda")
    eager = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    for ours, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), list(model.parameters())), eager, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    "step", steps(list(OPTIMIZERS.values()), SAMPLES), ids=lambda step: f"{step.optimizer.name}-{step.direction}-{step.label}"
)
def test_optimizers_can_be_raced(step: Step) -> None:
    field = line_up_step(step, "cuda")
    assert set(field.calls) == {"eager", "dlkernels", step.optimizer.fastest} and all(field.agrees.values()), field.failures
