"""The registered ops called past the Python in front of them: wrong arguments, sizes beyond 32 bits, tensors of several processes."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from support import Args, each_op, isolated, raw_calls, run_child
from test_bad_input import check_as_torch, outcome
from torch import Tensor

import dlkernels.functional as F
from dlkernels import OPS
from dlkernels.backend import TRITON_ON_CPU
from dlkernels.registry import Op


def test_raw_ops_refuse_spoiled_arguments() -> None:
    """torch.ops.dlkernels.* can be called without the Python in front of it; a child process reports every call that did not raise."""
    child = run_child(["-c", "import test_raw_ops as t; t.spoil_raw_ops()"])
    assert child.returncode == 0, f"exit status {child.returncode}\n{child.stdout[-2000:]}\n{child.stderr[-4000:]}"
    assert child.stdout.count("refused") > 100


def spoil_raw_ops() -> None:
    torch.set_num_threads(1)
    for name in ("linear", "linear_relu", "linear_gelu"):
        for func, args in raw_calls(OPS[name], (torch.randn(5, 7), torch.randn(3, 7), torch.randn(3))):
            for i, wrong in wrong_arguments(func._schema.name, args):
                shown = f"{func} argument {i}: {wrong.dtype if isinstance(wrong, Tensor) else wrong} {getattr(wrong, 'shape', '')}"
                print(shown, flush=True)
                try:
                    func(*args[:i], wrong, *args[i + 1 :])
                except (RuntimeError, TypeError) as error:
                    print("refused:", str(error).splitlines()[0])
                else:
                    raise SystemExit(f"not refused: {shown}")


def wrong_arguments(name: str, args: Args) -> list[tuple[int, Any]]:
    """Every tensor of ``args`` with a wrong rank, size, dtype, layout or device, and activation codes that do not exist."""
    found: list[tuple[int, Any]] = []
    activation = next(i for i, arg in enumerate(args) if isinstance(arg, int))

    def unread(i: int) -> bool:
        """Without an activation the backward needs nothing that the forward saved."""
        return i == 3 and args[activation] == 0

    for i, arg in enumerate(args[:activation]):
        if arg is None:
            continue
        free = {("linear_forward", 0, 0), ("linear_forward", 2, 0)}  # sizes that no other argument fixes: the rows of x
        for d in range(arg.dim()) if arg.numel() and not unread(i) else ():
            if (name.removeprefix("dlkernels::"), i, d) not in free or arg.dim() == 1:
                found += [(i, arg.narrow(d, 0, arg.shape[d] - 1)), (i, torch.cat([arg, arg], d))]
        if arg.numel() and not unread(i):
            found += [(i, arg.flatten()[None, None]), (i, torch.ones(())), (i, torch.ones(0)), (i, arg.expand(2, *arg.shape))]
            found += [(i, arg.to(dtype)) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.complex64)]
            found += [(i, arg.to("meta")), (i, arg.to_sparse())]
        if not unread(i) and (i != 2 or "backward" in name):
            found.append((i, None))
    return found + [(activation, code) for code in (99, 8, -1, 2**31, 2**63 - 1)]


@isolated
def test_more_than_two_to_the_31_numbers() -> None:
    """Sizes beyond 32 bits, made of expanded tensors that need no memory. Where the sum itself is that long a kernel may ask for memory
    that this process is not allowed, and must then say so."""
    huge = 2**31 + 8
    torch.set_num_threads(2)
    assert F.linear(torch.ones(1, 1).expand(huge, 1), torch.ones(0, 1)).shape == (huge, 0)
    assert F.linear(torch.ones(0, 1), torch.ones(1, 1).expand(huge, 1)).shape == (0, huge)
    assert F.linear(torch.ones(0, 1).expand(0, huge), torch.ones(0, 1).expand(0, huge)).shape == (0, 0)
    assert F.linear(torch.ones(1).expand(2, 3, huge)[:, :0], torch.ones(1, 1).expand(4, huge)).shape == (2, 0, 4)
    assert F.linear(torch.ones(1, 1).expand(4, huge), torch.ones(0, 1).expand(0, huge)).shape == (4, 0)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), used + (3 << 30)))
    for x, weight in (
        (torch.ones(1, 1, dtype=torch.float64).expand(1, huge), torch.ones(1, 1, dtype=torch.float64).expand(1, huge)),
        (torch.ones(1, 1).expand(huge, 1), torch.ones(1, 1)),
        (torch.ones(1, 1), torch.ones(1, 1).expand(huge, 1)),
    ):
        y = outcome(F.linear, (x, weight))
        if isinstance(y, Tensor):
            assert y.shape == (x.shape[0], weight.shape[0]) and y.flatten()[-1] == x.shape[1]
        else:
            assert isinstance(y, MemoryError) or (isinstance(y, RuntimeError) and ("memory" in str(y) or "alloc" in str(y))), y


@isolated
def test_dtensor() -> None:
    """A tensor spread over processes: the public functions work as torch's do, the raw op refuses, also when only one argument is one."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    spread = [distribute_tensor(t, mesh, [placement]) for t, placement in ((x, Shard(0)), (weight, Replicate()))]
    for function in (F.linear, F.linear_relu):
        leaves = [t.detach().requires_grad_() for t in spread]
        y = function(*leaves)
        assert isinstance(y, DTensor)
        y.sum().backward()
        torch.testing.assert_close(y.full_tensor(), function(x, weight))
        assert all(isinstance(leaf.grad, DTensor) for leaf in leaves)
    for args in (spread, (x, spread[1]), (spread[0], weight)):
        try:
            torch.ops.dlkernels.linear_forward(*args, None, 0, 0.0, False)
        except RuntimeError as error:
            assert "dtensor" in str(error).lower() or "sharding" in str(error).lower() or "distribut" in str(error).lower(), error
        else:
            raise AssertionError("the raw op took a DTensor")
    check_as_torch(x, spread[1])
    dist.destroy_process_group()


@each_op
def test_every_raw_op_is_wired_to_a_triton_launcher(op: Op) -> None:
    pytest.importorskip("triton")
    from dlkernels import gpu

    for raw in op.raw:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{raw}", "CPU" if TRITON_ON_CPU else "CUDA")
        assert callable(gpu.implementations()[raw])
