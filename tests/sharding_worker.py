"""What one of several processes of test_sharding.py runs: every op and every case, on tensors that lie spread over all of them.

The cases of single functions are in sharding_layouts.py; here are all ops in turn, refusals, and what several functions do together.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from gloo import serve
from sharding_layouts import CASES, WHOLE, case, compare, randn, refused, spread, whole
from support import RawCalls, label
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dlkernels
import dlkernels.functional as F
from dlkernels import OPS
from dlkernels.bench.inputs import argument_names, arguments
from dlkernels.registry import Op

CUT = ("x", "input", "residual", "target", "indices")  # by rows; other arguments are parameters


def generic(op: Op, rows: bool, mesh: DeviceMesh) -> None:
    """All sizes of an op, everything whole or arguments cut by rows."""
    for size in op.samples:
        args = arguments(op, size, torch.float64)
        names = argument_names(op, args)
        cut = [rows and name in CUT and isinstance(arg, Tensor) and arg.dim() > 0 for name, arg in zip(names, args)]
        placements = [Shard(0) if yes else WHOLE for yes in cut]
        plain = "weight" in str(size.get("option")) or "all" in str(size.get("option")) or op.name == "batch_norm_eval"
        try:
            if plain:  # their functions make a plain tensor of their own, which lies beside DTensors then
                refused(functools.partial(op.call, *(spread(mesh, t) for t in args)), op.module, "is a plain Tensor")
            else:
                compare(mesh, op.call, args, placements)
        except Exception as error:
            raise AssertionError(f"{op.name} {label(size)}") from error


@case
def what_cannot_be(mesh: DeviceMesh) -> None:
    """Plain tensors beside DTensors, several meshes, and shapes that fit only in parts."""
    x, weight = randn(4, 4), randn(5, 3)
    refused(lambda: F.linear(spread(mesh, x), weight), "linear", "weight is a plain Tensor")
    refused(lambda: F.linear(x, spread(mesh, weight)), "linear", "input is a plain Tensor")
    refused(lambda: F.layer_norm(spread(mesh, x), (4,), randn(4)), "layer_norm", "weight is a plain Tensor")
    refused(lambda: F.linear(spread(mesh, x, Shard(1)), spread(mesh, weight, Shard(1))), "linear")
    other = init_device_mesh("cpu", (2, 1))
    refused(lambda: F.linear(spread(mesh, x), distribute_tensor(x, other, [WHOLE, WHOLE])), "linear", "one mesh")
    refused(lambda: F.linear(spread(mesh, x), "weight"), "weight", kinds=TypeError)
    refused(lambda: F.softmax(spread(mesh, x), 2), "softmax", kinds=IndexError)


@case
def raw_ops(mesh: DeviceMesh) -> None:
    """The registered ops have no rule of their own, and say so."""
    for name in sorted({name for op in OPS.values() for name in op.raw} | {"adam_", "sgd_", "rmsprop_", "total_norm", "scale_"}):
        raw = getattr(torch.ops.dlkernels, name).default
        args = [example_argument(mesh, a) for a in raw._schema.arguments]
        refused(functools.partial(raw, *args), name, "DTensor", kinds=NotImplementedError)


def example_argument(mesh: DeviceMesh, argument: Any) -> Any:
    kind = str(argument.type)
    if kind in ("List[int]", "List[bool]"):
        return [1] if kind == "List[int]" else [True] * 7
    if kind.startswith("List"):
        return [distribute_tensor(randn(4, 4), mesh, [Shard(0)])]
    return {"Tensor": distribute_tensor(randn(4, 4), mesh, [Shard(0)]), "bool": True, "float": 0.5, "int": 0}.get(kind)


@case
def kernels_run(mesh: DeviceMesh) -> None:
    """Our kernels are what computes, on the local shapes; ``explain`` says so."""
    x, weight = spread(mesh, randn(4, 3), Shard(0)), spread(mesh, randn(5, 3))
    with RawCalls() as recorded:
        F.linear(x, weight).sum().backward()
    assert [(str(f), a[0].shape[0], type(a[0])) for f, a in recorded.calls if not a[0].is_meta] == [
        ("dlkernels.linear_forward.default", 2, Tensor), ("dlkernels.linear_backward.default", 2, Tensor)
    ]  # fmt: skip
    said = dlkernels.explain("linear", x, weight)
    assert said.implementation.startswith(("cpu", "triton")) and "rows: Shard(0)" in said.reason, said
    said = dlkernels.explain("linear", spread(mesh, torch.ones(2, 3, dtype=torch.int64)), spread(mesh, torch.ones(2, 3, dtype=torch.int64)))
    assert said.implementation == "reference" and "int64" in said.reason, said


@case
def second_derivatives(mesh: DeviceMesh) -> None:
    args = randn(5, 4), randn(4, 4), randn(4)
    functions = [
        lambda x, w, b: F.linear_act(x, w, b, "tanh"), lambda x, w, b: F.layer_norm(x, (4,), w[0] * 1, b), lambda x, w, b: F.silu(x * b),
        lambda x, w, b: F.mse_loss(x, x.detach() * 0), lambda x, w, b: F.cross_entropy(x * b, (x * 0).detach().sigmoid()),
    ]  # fmt: skip
    for function in functions:
        for placements in ((WHOLE, WHOLE, WHOLE), (Shard(0), WHOLE, WHOLE), (WHOLE, Shard(0), Shard(0)), (Shard(1), Shard(1), WHOLE)):

            def penalty(*leaves: Tensor, function: Any = function) -> Tensor:
                y = function(*leaves)
                dx = torch.autograd.grad((y * y).sum(), leaves[0], create_graph=True)[0]
                return (dx * dx).sum()

            compare(mesh, penalty, args, placements)


@case
def two_dimensions(mesh: DeviceMesh) -> None:
    """A batch cut in one dimension of a mesh, columns or K in the other."""
    x, weight, bias = randn(5, 6), randn(4, 6), randn(4)
    for sizes in ((2, 1), (1, 2)):
        grid = init_device_mesh("cpu", sizes)
        for placements, out in (
            ([(Shard(0), WHOLE), (WHOLE, Shard(0)), (WHOLE, Shard(0))], (Shard(0), Shard(1))),
            ([(Shard(0), Shard(1)), (WHOLE, Shard(1)), (WHOLE, WHOLE)], (Shard(0), Partial())),
            ([(Shard(0), Shard(0)), (WHOLE, WHOLE), (WHOLE, WHOLE)], (Shard(0), Shard(0))),
        ):
            shards: list[Any] = [distribute_tensor(t, grid, list(p)).requires_grad_() for t, p in zip((x, weight, bias), placements)]
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y: Any = F.linear(*shards)
            right = F.linear(*leaves)
            assert y.placements == out
            (y * y).sum().backward()
            (right * right).sum().backward()
            torch.testing.assert_close(whole(y), right)
            for t, leaf in zip(shards, leaves):
                torch.testing.assert_close(whole(t.grad), leaf.grad)


@case
def compiled(mesh: DeviceMesh) -> None:
    """torch's own rules apply in a graph; where they are wrong, the graph is left."""
    x, target = randn(5, 4), randn(5, 4)
    for function in (F.linear, F.linear_relu, F.mse_loss):
        torch._dynamo.reset()
        fast = torch.compile(function, backend="aot_eager")

        def call(*args: Tensor, fast: Any = fast, function: Any = function) -> Any:
            return (fast if isinstance(args[0], DTensor) else function)(*args)

        compare(mesh, call, (x, target), (Shard(0), Shard(0)))
    torch._dynamo.reset()
    one_graph = torch.compile(F.mse_loss, backend="aot_eager", fullgraph=True)
    refused(lambda: one_graph(spread(mesh, x, Shard(0)), spread(mesh, target, Shard(0))), "mse_loss", "loss of DTensors")


@case
def on_its_way(mesh: DeviceMesh) -> None:
    """A tensor that is still being gathered is waited for, and then a kernel takes it."""
    x = randn(5, 4)
    sums = DTensor.from_local(x, mesh, [Partial()])
    for t in (sums, sums.redistribute(placements=[WHOLE], async_op=True)):
        with RawCalls() as recorded:
            y = F.relu(t)
        assert [type(a[0]) for _, a in recorded.calls if not a[0].is_meta] == [Tensor]
        torch.testing.assert_close(whole(y), F.relu(2 * x))


@case
def tensor_parallel_model(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    nn = dlkernels.nn
    one = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).double()
    two = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).double()
    two.load_state_dict(one.state_dict())
    parallelize_module(two, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x = randn(5, 6)
    one(x).square().sum().backward()
    two(x).square().sum().backward()
    torch.testing.assert_close(two(x), one(x))
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(whole(q.grad), p.grad)


if __name__ == "__main__":
    jobs = dict(CASES)
    for op in OPS.values():
        jobs[f"{op.name} rows"], jobs[f"{op.name} whole"] = (functools.partial(generic, op, rows) for rows in (True, False))
    serve(jobs)
