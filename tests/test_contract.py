"""What PyTorch expects of every op beyond its numbers: autograd's modes, tracing, transforms, threads, processes, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from support import (
    Args,
    arguments,
    as_tuple,
    assert_same_bits,
    cotangents,
    differentiable,
    each_op,
    example,
    label,
    largest,
    map_tensors,
    middle,
    raw_calls,
    results,
    smallest,
    threads,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dlkernels import OPS
from dlkernels.registry import Op


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def assert_equal(left: Any, right: Any) -> None:
    """The same numbers in every bit, for one tensor or several."""
    assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(as_tuple(left), as_tuple(right), strict=True))


def squares(ys: Any) -> Tensor:
    """A number that depends on every number of the outputs."""
    return torch.stack([y.float().square().sum() for y in as_tuple(ys)]).sum()


def subsets(args: Args) -> list[tuple[int, ...]]:
    positions = differentiable(args)
    return [some for count in range(1, len(positions) + 1) for some in combinations(positions, count)]


@each_op
def test_gradient_of_every_subset_of_the_arguments(op: Op) -> None:
    """Only what requires grad gets one, and it is the one it gets when all do, in every bit."""
    args, dys = example(op)
    every = dict(zip(differentiable(args), list(results(op, op.call, args, dys).values())[-len(differentiable(args)):]))
    for some in subsets(args):
        leaves = tuple(arg.detach().requires_grad_(i in some) if i in every else arg for i, arg in enumerate(args))
        torch.autograd.backward(op.call(*leaves), dys)
        for i, grad in every.items():
            assert (leaves[i].grad is not None) == (i in some), f"{op.name}: gradient of argument {i} with {some} requiring grad"
            assert leaves[i].grad is None or torch.equal(leaves[i].grad, grad)


@each_op
def test_nothing_requires_grad_then_neither_does_the_output(op: Op) -> None:
    args, _ = example(op)
    assert not any(y.requires_grad for y in as_tuple(op.call(*args)))


@each_op
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_modes_without_grad(op: Op, mode: Callable[[], Any]) -> None:
    """The values are those with grad; the output requires none, and is an inference tensor exactly where native's is."""
    args, _ = example(op)
    leaves = map_tensors(lambda t: t.detach().requires_grad_(), args)
    with_grad = as_tuple(op.call(*leaves))
    with mode():
        ys, natives = as_tuple(op.call(*leaves)), as_tuple(op.native(*leaves))
    assert_equal(ys, with_grad)
    for y, native in zip(ys, natives):
        assert (y.requires_grad, y.is_inference()) == (False, native.is_inference())


@each_op
def test_backward_twice_through_a_retained_graph(op: Op) -> None:
    args, dys = example(op)
    leaves = map_tensors(lambda t: t.detach().requires_grad_(), args)
    wanted = [leaves[i] for i in differentiable(leaves)]
    y = op.call(*leaves)
    first = torch.autograd.grad(y, wanted, dys, retain_graph=True)
    second = torch.autograd.grad(y, wanted, dys)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, wanted, dys)


@each_op
def test_second_derivatives(op: Op) -> None:
    """With create_graph=True the gradients, for arguments and dy, of a function of the gradients are native's."""
    args, dys = example(op, torch.float64)

    def second(function: Callable[..., Any]) -> list[Tensor]:
        leaves = map_tensors(lambda t: t.detach().requires_grad_(), args)
        wanted, cotangent = [leaves[i] for i in differentiable(leaves)], [dy.clone().requires_grad_() for dy in dys]
        first = torch.autograd.grad(function(*leaves), wanted, cotangent, create_graph=True)
        assert all(grad.requires_grad for grad in first[:2]), "create_graph=True gave a gradient that cannot be differentiated"
        total = torch.stack([(grad**2).sum() for grad in first]).sum()
        return list(torch.autograd.grad(total, [*wanted, *cotangent], allow_unused=True, materialize_grads=True))

    has_none = op.module == "scaled_dot_product_attention"  # torch's own kernel
    for ours, native in zip(second(op.call), second(op.reference if has_none else op.native)):
        torch.testing.assert_close(ours, native)


@each_op
def test_an_argument_changed_in_place_before_backward(op: Op) -> None:
    """Backward uses the numbers that forward saw, or refuses; it never uses the new ones."""
    args, dys = example(op)
    right = results(op, op.call, args, dys)
    for changed in differentiable(args):
        leaves = map_tensors(lambda t: t.clone().requires_grad_(), args)
        y = op.call(*leaves)
        with torch.no_grad():
            leaves[changed].add_(1)
        try:
            grads = torch.autograd.grad(y, [leaves[i] for i in differentiable(leaves)], dys)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert_same_bits(dict(zip(list(right)[len(as_tuple(y)) :], grads)), right, f"{op.name}: argument {changed} changed in place")


@each_op
def test_the_output_changed_in_place_before_backward(op: Op) -> None:
    args, dys = example(op)
    leaves = map_tensors(lambda t: t.clone().requires_grad_(), args)
    y = op.call(*leaves)
    right = results(op, op.call, args, dys)
    with torch.no_grad():
        for output in as_tuple(y):
            output.zero_()
    try:
        grads = torch.autograd.grad(y, [leaves[i] for i in differentiable(leaves)], dys)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_same_bits(dict(zip(list(right)[len(as_tuple(y)) :], grads)), right, f"{op.name}: output changed in place")


GAPS = ("could not create a primitive", "autocast::prioritize")  # where torch's CPU lacks float16, which refuses no mix of dtypes


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_dtypes_are_natives(op: Op, dtype: torch.dtype) -> None:
    """Outputs and gradients have the dtypes that native's have under autocast, for inputs of any one dtype and for a mix."""
    for first in (torch.float32, torch.float64, torch.bfloat16):
        for others in (torch.float32, first):
            args = arguments(op, middle(op), others)
            args = (args[0].to(first), *args[1:])
            found = []
            for function in (op.native, op.call):
                leaves = map_tensors(lambda t: t.detach().requires_grad_(), args)
                try:
                    with torch.autocast("cpu", dtype):
                        ys = as_tuple(function(*leaves))
                        squares(ys).backward()
                    found.append([*(y.dtype for y in ys), *(leaves[i].grad.dtype for i in differentiable(leaves))])
                except RuntimeError as error:
                    found.append([] if any(gap in str(error) for gap in GAPS) else [RuntimeError])
            assert found[1] == (found[0] or found[1]), f"{op.name}: {first} with {others} under autocast to {dtype}"


@each_op
def test_autocast_values(op: Op) -> None:
    """Under autocast the result is that of arguments rounded to the dtype of the result (bfloat16 for products, float32 for what needs
    the accuracy), and autocast(enabled=False) inside it gives float32 again."""
    args, _ = example(op)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = op.call(*args)
        with torch.autocast("cpu", enabled=False):
            full = op.call(*args)
    dtype = as_tuple(y)[0].dtype
    wide = as_tuple(op.call(*map_tensors(lambda t: t.to(dtype), args)))
    narrow = as_tuple(op.call(*map_tensors(lambda t: t.to(torch.bfloat16), args)))
    of_a_product = [torch.equal(a.to(b.dtype), b) for a, b in zip(as_tuple(y), narrow)]  # bfloat16 is multiplied, float32 comes out
    assert all(of_a_product) or all(torch.equal(a, b) for a, b in zip(as_tuple(y), wide))
    assert_equal(full, op.call(*args))


@each_op
def test_opcheck(op: Op) -> None:
    """Schema, fake tensors and tracing of every registered op that a forward and backward reach. They are not differentiable themselves,
    so the arguments come detached."""
    for size in (middle(op), op.samples[0]):
        for func, args in raw_calls(op, arguments(op, size, torch.float32)):
            torch.library.opcheck(func, args)


def test_every_registered_op_is_reached() -> None:
    """What a contract names as its raw ops is what its forward and backward call."""
    for op in OPS.values():
        called = {func._schema.name.removeprefix("dlkernels::") for func, _ in raw_calls(op, example(op)[0])}
        assert called == set(op.raw), op.name


@each_op
def test_compile_fullgraph(op: Op) -> None:
    """One graph without breaks, forward and backward, at two sizes of a dynamic shape; the numbers are those of the eager call."""
    torch._dynamo.reset()
    compiled = torch.compile(op.call, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (middle(op), largest(op)):
        args = arguments(op, size, torch.float32)
        dys = cotangents(op, args)
        assert_same_bits(results(op, compiled, args, dys), results(op, op.call, args, dys), f"{op.name} {label(size)}")
        with torch.no_grad():
            assert_equal(compiled(*args), op.call(*args))


@each_op
def test_export(op: Op) -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return op.call(*args)

    args, _ = example(op)
    exported = torch.export.export(Module(), args)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert any(f"dlkernels.{raw}" in target for raw in op.raw for target in targets), f"no kernel in the exported graph: {targets}"
    assert_equal(exported.module()(*args), op.call(*args))


@each_op
def test_fake_and_meta_tensors(op: Op) -> None:
    """Shape, dtype, device and strides without data are those of the real result, forward and backward."""
    args, dys = example(op)
    real = results(op, op.call, args, dys)

    def moved(move: Callable[[Tensor], Tensor]) -> Any:
        return results(op, op.call, *(tuple(move(t) if isinstance(t, Tensor) else t for t in some) for some in (args, dys)))

    with FakeTensorMode() as mode:
        fake = moved(mode.from_tensor)
    meta = moved(lambda t: t.to("meta"))
    for name, value in real.items():
        for other, device in ((fake[name], "cpu"), (meta[name], "meta")):
            assert (other.shape, other.dtype, other.stride(), other.device.type) == (value.shape, value.dtype, value.stride(), device)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vmap_and_per_sample_gradients(op: Op, dtype: torch.dtype) -> None:
    """torch.func: vmap over the first argument equals a loop, and so do per-sample gradients. In float32 at a small size: it rounds large
    sums differently."""
    args = arguments(op, smallest(op) if dtype == torch.float32 else middle(op), dtype)
    many = torch.stack([args[0], args[0] / 2, args[0] / 4])

    def value(x: Tensor) -> tuple[Any, ...]:
        return as_tuple(op.call(x, *args[1:]))

    def gradient(x: Tensor) -> tuple[Tensor]:
        return (torch.func.grad(lambda *some: squares(op.call(*some)), argnums=differentiable(args)[-1])(x, *args[1:]),)

    for function in (value, gradient):
        one_by_one = tuple(torch.stack(same) for same in zip(*(function(x) for x in many)))
        torch.testing.assert_close(torch.func.vmap(function)(many), one_by_one)


@each_op
def test_reverse_mode_jacobian(op: Op) -> None:
    args = arguments(op, smallest(op), torch.float64)
    torch.testing.assert_close(torch.func.jacrev(op.call)(*args), torch.func.jacrev(op.native)(*args))


@each_op
def test_saved_tensor_hooks_and_checkpointing(op: Op) -> None:
    """Saved-tensor hooks see what is kept, and activation checkpointing gives the same gradients in every bit."""
    args, dys = example(op)
    plain = results(op, op.call, args, dys)

    def checkpointed(*some: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(op.call, *some, use_reentrant=False)

    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(results(op, op.call, args, dys), plain, f"{op.name} with saved tensors moved")
    assert_same_bits(results(op, checkpointed, args, dys), plain, f"{op.name} checkpointed")
