"""Every op of OPS against float64, in every dtype, layout and corner: nothing here knows what an op computes.

The instruction set and the backend are those of this process; test_isas.py runs this file under the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from support import (
    LAYOUTS,
    SMALL,
    Args,
    Results,
    arguments,
    assert_accurate,
    assert_same_bits,
    cotangents,
    differentiable,
    each_dtype,
    each_dtype_if_fast,
    each_op,
    exact_results,
    integers,
    label,
    largest,
    map_tensors,
    middle,
    moderate,
    results,
    samples,
    threads,
)

from dlkernels import OPS
from dlkernels.bench.inputs import is_differentiable
from dlkernels.registry import Op


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Most sizes here are small, and two threads that wait for each other cost more than they save; tests of threads ask for them."""
    with threads(1):
        yield


each_sample = pytest.mark.parametrize(
    ("op", "size"), [pytest.param(op, size, id=f"{op.name}-{label(size)}") for op in OPS.values() for size in samples(op)]
)


@pytest.mark.isa
@each_dtype
@each_sample
def test_values_and_gradients(op: Op, size: Mapping[str, Any], dtype: torch.dtype) -> None:
    assert_accurate(op, arguments(op, size, dtype))


def keeps_integers(op: Op) -> bool:
    """Does the op's definition turn whole numbers into whole numbers, forward and backward? Then no rounding excuses a difference."""
    for size in op.samples:
        args = integers(op, size, torch.float64)
        exact = exact_results(op, args, cotangents(op, args, integer=True))
        if not all(torch.equal(value, value.round()) for value in exact.values()):
            return False
    return True


INTEGER_OPS = [op for op in OPS.values() if keeps_integers(op)]


def test_some_op_keeps_integers() -> None:
    assert INTEGER_OPS


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("op", INTEGER_OPS, ids=lambda op: op.name)
def test_integers_are_exact(op: Op, dtype: torch.dtype) -> None:
    """Forward and gradients equal the float64 result rounded once."""
    for size in samples(op):
        args = integers(op, size, dtype)
        dys = cotangents(op, args, integer=True)
        exact = {name: value.to(dtype) for name, value in exact_results(op, args, dys).items()}
        assert_same_bits(results(op, op.call, args, dys), exact, f"{op.name} {label(size)}")


@pytest.mark.isa
@each_op
def test_gradcheck(op: Op) -> None:
    check_by_differences(op, torch.autograd.gradcheck)


@each_op
def test_gradgradcheck(op: Op) -> None:
    check_by_differences(op, torch.autograd.gradgradcheck)


def check_by_differences(op: Op, check: Callable[..., bool]) -> None:
    """Compare derivatives with finite differences in float64: every entry for small sizes, a random projection for the others."""
    for size in samples(op, most=60):
        args = map_tensors(lambda t: t.requires_grad_(), arguments(op, size, torch.float64))
        numel = sum(args[i].numel() for i in differentiable(args))
        assert check(op.call, args, fast_mode=numel > 60), f"{op.name} {label(size)}"


@pytest.mark.isa
@each_op
@each_dtype_if_fast
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(op: Op, dtype: torch.dtype, layout: Any) -> None:
    """All arguments and dy laid out unusually, then each in turn; in the interpreter only dy beside arguments that are as usual."""
    everything = tuple(range(len(op.make(torch.empty, **op.samples[0]))))
    for size in [middle(op)] if SMALL else [middle(op), largest(op), *[s for s in op.samples if len(s.get("lead", ())) > 2][:1]]:
        args = moderate(op, size, dtype)
        dys = cotangents(op, args)
        some = [*([(i,) for i in differentiable(args)] if not SMALL else []), ()] if size is middle(op) else []
        for changed in [everything, *some]:
            unusual = tuple(layout(arg) if i in changed and is_differentiable(arg) else arg for i, arg in enumerate(args))
            assert_accurate(op, unusual, map_tensors(layout, dys) if len(changed) != 1 else dys)


@each_op
def test_native_does_the_same(op: Op) -> None:
    """The opponent of the races computes what the definition says, no less."""
    for size in samples(op):
        args = arguments(op, size, torch.float64)
        dys = cotangents(op, args)
        native, exact = results(op, op.native, args, dys), exact_results(op, args, dys)
        for name, value in exact.items():
            assert torch.allclose(native[name], value, rtol=1e-9, atol=1e-9, equal_nan=True), f"{op.name} {label(size)}: {name}"


NONFINITE = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.isa
@each_op
@each_dtype_if_fast
def test_nan_and_inf_propagate(op: Op, dtype: torch.dtype) -> None:
    """A single NaN or infinity at the start, in the middle or at the end of an argument, or of dy, reaches the places that it should.
    In the interpreter one of each."""
    args = moderate(op, middle(op), dtype)
    dys = cotangents(op, args)
    for i in range(len(args) + 1):
        target = dys[0] if i == len(args) else args[i]
        if not is_differentiable(target):
            continue
        last = target.numel() - 1
        for place, value in zip((0, last), NONFINITE) if SMALL else product((0, target.numel() // 2, last), NONFINITE):
            spoiled = target.clone()
            spoiled.view(-1)[place] = value
            some = tuple(spoiled if j == i else arg for j, arg in enumerate(args))
            some_dys = (spoiled, *dys[1:]) if i == len(args) else dys
            assert_same_places(op, some, some_dys, f"{op.name}: {value} at {place} of argument {i}")


def assert_same_places(op: Op, args: Args, dys: Args, what: str) -> None:
    """Where native or the float64 definition have NaN, so have we, and nowhere else; the same for infinities. (Either will do: native's
    vectorised float32 gelu makes NaN of infinity, its scalar one does not.) A gradient may be infinite in one and NaN in the other: how the
    terms of a sum are grouped decides whether two infinities of it meet."""
    try:
        native = results(op, op.native, args, dys)
    except RuntimeError as refused:  # some ops take only numbers from a range
        with pytest.raises(type(refused)):
            results(op, op.call, args, dys)
        return
    ours, exact = results(op, op.call, args, dys), exact_results(op, args, dys)
    for name, value in ours.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            found, allowed = kind(value), (kind(native[name]), kind(exact[name]))
            wrong = (found & ~allowed[0] & ~allowed[1]) | (~found & allowed[0] & allowed[1])
            if name.startswith("d"):
                nans = value.isnan() | native[name].isnan() | exact[name].isnan()
                wrong &= value.isfinite() | (native[name].isfinite() & exact[name].isfinite()) | ~nans
            assert not wrong.any(), f"{what}: {kind.__name__}({name}) is not native's nor float64's at {wrong.nonzero().tolist()[:5]}"


@pytest.mark.isa
@each_op
@each_dtype_if_fast
def test_twenty_runs_give_the_same_bits(op: Op, dtype: torch.dtype) -> None:
    args = arguments(op, largest(op), dtype)
    dys = cotangents(op, args)
    with threads(2):
        first = results(op, op.call, args, dys)
        for _ in range(2 if SMALL else 19):
            assert_same_bits(results(op, op.call, args, dys), first, op.name)


@pytest.mark.isa
@pytest.mark.skipif(SMALL, reason="the interpreter has one thread")
@each_op
@each_dtype
def test_two_threads_are_as_accurate(op: Op, dtype: torch.dtype) -> None:
    with threads(2):
        assert_accurate(op, arguments(op, largest(op), dtype))


@each_op
def test_a_wrong_result_is_noticed(op: Op) -> None:
    """The rule that all of the above rests on does fail: for one wrong number, a missing one, and a NaN, in any quantity."""
    args = arguments(op, middle(op), torch.float32)
    dys = cotangents(op, args)
    right = results(op, op.call, args, dys)
    for name, value in right.items():
        one_off = value.clone(memory_format=torch.contiguous_format)
        one_off.view(-1)[0] += value.abs().max() + 1
        for wrong in (one_off, value[None], value.where(value < value.max(), float("nan"))):
            spoiled: Results = right | {name: wrong}
            with pytest.raises(AssertionError):
                assert_accurate(op, args, dys, spoiled)
