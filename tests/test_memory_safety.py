"""No kernel reads or writes a byte that is not its own: tested on memory that faults, that is poisoned, or that lies far apart.

What may crash runs in a process of its own. Guard pages stand directly before or behind every argument, so one number too far is a fault;
the C library's heap check notices a byte written behind an output.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    DTYPES,
    LAYOUTS,
    SMALL,
    Args,
    arguments,
    as_tuple,
    assert_accurate,
    assert_same_bits,
    cotangents,
    differentiable,
    dtype_name,
    each_dtype,
    each_op,
    integers,
    isolated,
    label,
    map_tensors,
    middle,
    raw_calls,
    results,
    run_child,
    samples,
    smallest,
    threads,
)
from torch import Tensor

from dlkernels import OPS
from dlkernels.registry import Op

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
HEAP_CHECK = next(iter(sorted(Path("/lib").glob("*/libc_malloc_debug.so*"))), None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def extent(t: Tensor) -> int:
    """How many numbers lie from the first to the last of ``t``, both included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) if t.numel() else 0


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """A copy of ``t`` with its strides, whose last (or first) number touches a page that may not be read or written."""
    count = extent(t)
    if not count:
        return t.detach().clone()
    size = count * t.element_size()
    inside = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inside + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + inside):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (inside - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=count, offset=offset)
    return flat.as_strided(t.shape, t.stride()).copy_(t) if extent(t) == t.numel() else _copy_overlapping(flat, t)


def _copy_overlapping(flat: Tensor, t: Tensor) -> Tensor:
    """Copy what lies between the numbers of ``t`` too; this also serves strides of 0, which ``copy_`` refuses."""
    flat.copy_(t.as_strided((flat.numel(),), (1,)))
    return flat.as_strided(t.shape, t.stride())


def guard(args: Args, at_end: bool) -> Args:
    def fenced(arg: Any) -> Any:
        return [fenced(t) for t in arg] if isinstance(arg, (list, tuple)) else guarded(arg, at_end) if isinstance(arg, Tensor) else arg

    return tuple(fenced(arg) for arg in args)


def outputs(func: Any, args: Args) -> dict[str, Tensor]:
    found = as_tuple(func(*args))
    flat = [t for value in found for t in (value if isinstance(value, list) else [value])]
    return {str(i): value for i, value in enumerate(flat) if value is not None}


def test_the_guard_page_is_there() -> None:
    """Reading one number past a guarded tensor kills a process, at either end."""
    for at_end, step in ((True, "x.numel()"), (False, "-1")):
        read = f"ctypes.c_float.from_address(x.data_ptr() + 4 * {step}).value"
        child = run_child(["-c", f"import ctypes, torch, test_memory_safety as t; x = t.guarded(torch.ones(5), {at_end}); {read}"])
        assert child.returncode == -11, child.stderr


@pytest.mark.isa
@isolated
def test_arguments_between_guard_pages() -> None:
    """Every registered op, dtype, size and a choice of layouts: no fault, the bits of the unguarded call, and inputs left alone."""
    torch.set_num_threads(1)
    layouts: list[Callable[[Tensor], Tensor]] = [lambda t: t, *(LAYOUTS[name] for name in ("transposed", "stepped", "expanded_rows"))]
    for op in OPS.values():
        for dtype in DTYPES[:1] if SMALL else DTYPES:
            for size in samples(op, most=400):
                for layout in layouts[:2] if SMALL else layouts:
                    args = map_tensors(layout, arguments(op, size, dtype))
                    for func, raw in raw_calls(op, args):
                        check_guarded_call(func, raw, f"{op.name} {dtype} {label(size)} {func}")


def check_guarded_call(func: Any, args: Args, what: str) -> None:
    print(what, flush=True)
    wanted = outputs(func, args)
    for at_end in (True, False):
        fenced = guard(args, at_end)
        assert_same_bits(outputs(func, fenced), wanted, what)
        written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        before = {str(i): arg for i, arg in enumerate(args) if isinstance(arg, Tensor) and not written[i]}
        assert_same_bits({i: fenced[int(i)] for i in before}, before, f"{what} changed its arguments")


@isolated
def test_spoiled_arguments_between_guard_pages() -> None:
    """Every argument of every registered op spoiled in turn: an exception, or a result computed from the memory of the arguments alone."""
    for op in OPS.values():
        for func, args in raw_calls(op, arguments(op, middle(op), torch.float32)):
            for i, arg in enumerate(args):
                for wrong in spoil(arg):
                    some = guard((*args[:i], wrong, *args[i + 1 :]), at_end=True)
                    print(f"{op.name} {func} argument {i}: {tuple(wrong.shape) if isinstance(wrong, Tensor) else wrong}", flush=True)
                    try:
                        func(*some)
                    except (RuntimeError, TypeError, ValueError, IndexError) as error:
                        assert str(error).strip(), "an exception without a message"


def spoil(arg: Any) -> list[Any]:
    """Wrong values to put in the place of ``arg``: a tensor of another shape or dtype, an extreme number."""
    if isinstance(arg, bool):
        return [not arg]
    if isinstance(arg, int):
        return [-1, 8, 99, 2**31, 2**63 - 1, -(2**63)]
    if isinstance(arg, float):
        return [float("nan"), float("inf"), -1e300]
    if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
        each = [[*arg[:i], wrong, *arg[i + 1 :]] for i in range(len(arg)) for wrong in spoil(arg[i])]
        return [[], list(arg[:-1]), [*arg, arg[0]], *each]
    if not isinstance(arg, Tensor):
        return [torch.ones(()), torch.ones(3)]
    shorter = [arg.narrow(d, 0, n - 1).clone() for d, n in enumerate(arg.shape) if n]
    longer = [torch.cat([arg, arg.narrow(d, 0, 1)], d) for d, n in enumerate(arg.shape) if n]
    ranks = [arg.flatten(), arg[None], arg[..., None], torch.ones(()), torch.ones(0), torch.ones(0, 0), torch.ones(1, 1)]
    types = [arg.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)]
    return [*shorter, *longer, *ranks, *types]


@pytest.mark.isa
@pytest.mark.skipif(HEAP_CHECK is None, reason="this C library has no heap check to load (libc_malloc_debug)")
def test_no_write_behind_an_output() -> None:
    """Forward and backward of everything under the C library's heap check, which aborts when a byte behind an allocation has changed."""
    child = run_child(
        ["-c", "import test_memory_safety as t; t.run_everything()"],
        LD_PRELOAD=str(HEAP_CHECK), MALLOC_CHECK_="3", MALLOC_PERTURB_="129",
    )
    assert child.returncode == 0, child.stderr[-4000:]


@pytest.mark.skipif(HEAP_CHECK is None, reason="this C library has no heap check to load (libc_malloc_debug)")
def test_the_heap_check_is_there() -> None:
    spoiled = "import ctypes, torch; x = torch.empty(5); ctypes.c_char.from_address(x.data_ptr() + 20).value = b'x'; del x"
    child = run_child(["-c", spoiled], LD_PRELOAD=str(HEAP_CHECK), MALLOC_CHECK_="3")
    assert child.returncode == -6, "the heap check does not notice a byte written behind a tensor"


def run_everything() -> None:
    for op in OPS.values():
        for dtype in DTYPES[:1] if SMALL else DTYPES:
            for size in samples(op, most=400):
                args = arguments(op, size, dtype)
                results(op, op.call, args, cotangents(op, args))


@pytest.mark.isa
@each_op
@each_dtype
def test_outputs_do_not_depend_on_what_memory_held(op: Op, dtype: torch.dtype) -> None:
    """torch fills new memory with NaN on request; nothing of it may remain."""
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
        for size in samples(op, most=400):
            args = integers(op, size, dtype)
            found = results(op, op.call, args, cotangents(op, args))
            assert all(value.isfinite().all() for value in found.values()), f"{op.name} {label(size)}"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.isa
@each_op
@each_dtype
def test_arguments_are_left_alone(op: Op, dtype: torch.dtype) -> None:
    """Bits and version counters of arguments and dy are what they were after forward and backward."""
    for layout in ([LAYOUTS["transposed"]] if SMALL else LAYOUTS.values()):
        args = map_tensors(layout, arguments(op, middle(op), dtype))
        dys = map_tensors(layout, cotangents(op, args))
        tensors = [t for t in (*args, *dys) if isinstance(t, Tensor)]
        before = [(t.clone(), t._version) for t in tensors]
        results(op, op.call, args, dys)
        assert all(torch.equal(t, copy) and t._version == version for t, (copy, version) in zip(tensors, before))


def far_apart(t: Tensor, dim: int) -> Tensor:
    """A copy of ``t`` with more than 2^31 numbers from one index of ``dim`` to the next, in memory that exists only where it is touched."""
    stride = 2**31 + 3
    strides = [stride if d == dim else stride_ for d, stride_ in enumerate(t.contiguous().stride())]
    count = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides))
    reserve_nothing = 0x4000
    memory = mmap.mmap(-1, count * t.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    return torch.frombuffer(memory, dtype=t.dtype, count=count).as_strided(t.shape, strides).copy_(t)


@pytest.mark.isa
@each_op
@pytest.mark.parametrize("dtype", DTYPES[:1] if SMALL else [torch.float32, torch.bfloat16], ids=dtype_name)
def test_offsets_beyond_32_bits(op: Op, dtype: torch.dtype) -> None:
    """One argument, or dy, at a time is spread over 16 GiB of address space, along its first or its last dimension."""
    args = tuple(
        arg[tuple(slice(0, 3) for _ in arg.shape)] if isinstance(arg, Tensor) else arg for arg in arguments(op, middle(op), dtype)
    )
    if op.supports(*args) is not None:  # its shapes depend on one another
        args = arguments(op, smallest(op), dtype)
    dys = cotangents(op, args)
    for i in [*differentiable(args), len(args)]:
        target = dys[0] if i == len(args) else args[i]
        for dim in {0, target.dim() - 1}:
            far = far_apart(target, dim)
            some = tuple(far if j == i else arg for j, arg in enumerate(args))
            assert_accurate(op, some, (far, *dys[1:]) if i == len(args) else dys)
