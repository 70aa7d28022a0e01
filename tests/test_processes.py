"""What outlasts a single call: Python threads, forked processes, memory, and what an import costs."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from support import (
    arguments,
    as_tuple,
    assert_same_bits,
    differentiable,
    each_op,
    example,
    isolated,
    largest,
    map_tensors,
    results,
    run_child,
    threads,
)
from torch import Tensor

from dlkernels import OPS
from dlkernels.registry import Op


def test_many_python_threads_at_once() -> None:
    """Four threads call every op on their own arguments at the same time; each gets its own result, in every bit."""
    with threads(2):
        jobs = [(op, *example(op, dtype)) for op in OPS.values() for dtype in (torch.float32, torch.bfloat16) if dtype in op.dtypes]
        alone = [results(op, op.call, args, dys) for op, args, dys in jobs]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda job: results(job[0], job[0].call, *job[1:]), jobs * 4))
    for i, found in enumerate(together):
        assert_same_bits(found, alone[i % len(jobs)], jobs[i % len(jobs)][0].name)


@isolated
def test_fork_after_use() -> None:
    """A process that has computed with two threads forks, as a data loader does; the child (one thread, as there) computes the same."""
    torch.set_num_threads(2)
    op = next(iter(OPS.values()))
    args = arguments(op, largest(op), torch.float32)
    wanted = op.call(*args)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        close = torch.allclose(op.call(*args), wanted, rtol=1e-4, atol=1e-4)
        os._exit(0 if close else 1)
    deadline = time.monotonic() + 30
    while (waited := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the forked process hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(waited[1]) == 0
    assert torch.equal(op.call(*args), wanted)


@each_op
def test_nothing_outlives_its_use(op: Op) -> None:
    """A graph that is dropped, with or without backward, frees what it saved."""
    args, dys = example(op)
    for run_backward in (True, False):
        leaves = map_tensors(lambda t: t.clone().requires_grad_(), args)
        ys = as_tuple(op.call(*leaves))
        nodes = [y.grad_fn for y in ys if isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)]  # others take no weak reference
        watched = [weakref.ref(thing) for thing in (*ys, *nodes, *(leaves[i] for i in differentiable(leaves)))]
        if run_backward:
            torch.autograd.backward(ys, dys)
        del leaves, ys, nodes
        gc.collect()
        assert not [ref() for ref in watched if ref() is not None]


@isolated
def test_memory_does_not_grow() -> None:
    """Hundreds of forward and backward passes, and refused calls, leave the size of the process where it was."""
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * page

    jobs = [(op, *example(op)) for op in OPS.values()]

    def use(times: int) -> None:
        for _ in range(times):
            for op, args, dys in jobs:
                results(op, op.call, args, dys)
                with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):  # most ops refuse this
                    op.call(args[0], *(arg[..., :-1] if isinstance(arg, Tensor) else arg for arg in args[1:]))

    use(20)
    before = resident()
    use(200)
    grown = resident() - before
    assert grown < 4 << 20, f"{grown / 2**20:.1f} MiB more after 200 rounds"


def test_importing_costs_no_triton() -> None:
    """Triton is imported when a GPU tensor is first seen, not before."""
    child = run_child(["-c", "import sys, dlkernels; sys.exit('triton' in sys.modules)"], DLKERNELS_BACKEND="")
    assert child.returncode == 0, child.stderr
