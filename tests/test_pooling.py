"""What is peculiar to pooling: every geometry against torch, which maximum is taken, what is kept for backward, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import DTYPES, SMALL, dtype_name, isolated, threads
from test_bad_input import outcome
from torch import Tensor

import dlkernels
import dlkernels.functional as F
import dlkernels.nn as nn

NAMES = ("max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d")
each_function = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def drawn(rng: random.Random, dtype: torch.dtype) -> tuple[Tensor, dict[str, tuple[Any, ...]]]:
    """An input full of equal numbers, in one of the memory formats or transposed, and options for each of the functions."""

    def pair(low: int, high: int) -> Any:
        return (rng.randint(low, high), rng.randint(low, high)) if rng.random() < 0.6 else rng.randint(low, high)

    shape = rng.randint(1, 2), rng.choice([1, 2, 5] if SMALL else [1, 3, 17, 33, 70]), rng.randint(1, 9), rng.choice([1, 7, 16, 33])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randint(0, 99))).mul(2).round().to(dtype)
    form = rng.choice(["contiguous", "channels last", "transposed", "unbatched", "NaN", "-inf"])
    if form == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif form == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif form == "unbatched":
        x = x[0]
    elif form == "NaN":
        x.view(-1)[torch.randint(x.numel(), (3,), generator=torch.Generator().manual_seed(1))] = float("nan")
    elif form == "-inf":
        x.fill_(float("-inf"))
    kernel, stride = pair(1, rng.choice([3, 7, 20])), pair(1, rng.choice([2, 3, 9])) if rng.random() < 0.7 else None
    padding, ceil = pair(0, rng.choice([1, 4])) if rng.random() < 0.6 else 0, rng.random() < 0.4
    size = rng.choice([None, 1, 2, 5, 11]), rng.choice([None, 1, 3, 4, 13])
    return x, {
        "max_pool2d": (kernel, stride, padding, pair(1, 3) if padding == 0 and rng.random() < 0.4 else 1, ceil, True),
        "avg_pool2d": (kernel, stride, padding, ceil, rng.random() < 0.5, rng.choice([None, None, 3, -2])),
        "adaptive_max_pool2d": (size, True),
        "adaptive_avg_pool2d": (size,),
    }


@pytest.mark.isa
@each_dtype
@each_function
def test_any_geometry_is_as_torch(name: str, dtype: torch.dtype) -> None:
    """Values, indices, gradients and strides; those of maxima are exact. What torch refuses is refused."""
    rng, compared = random.Random(NAMES.index(name)), 0
    for _ in range(20 if SMALL else 150):
        x, options = drawn(rng, dtype)
        leaves = [x.detach().clone().requires_grad_() for _ in range(2)]
        both: list[Any] = [outcome(getattr(library, name), (leaf, *options[name])) for library, leaf in zip((F, native), leaves)]
        ours, theirs = both
        what = f"{name}{(tuple(x.shape), x.stride(), *options[name])}"
        assert isinstance(ours, Exception) == isinstance(theirs, Exception), f"{what}: {ours!r}, torch {theirs!r}"
        if isinstance(theirs, Exception):
            assert type(ours) is type(theirs), what
            continue
        tolerance: dict[str, Any] = {"rtol": 0.05, "atol": 0.05} if dtype.itemsize == 2 else {}
        exact: dict[str, Any] = {"rtol": 0, "atol": 0} if "max" in name else tolerance
        if "max" in name:
            assert torch.equal(ours[1], theirs[1]) and ours[1].dtype == torch.int64, what
            ours, theirs = ours[0], theirs[0]
        torch.testing.assert_close(ours, theirs, equal_nan=True, **exact, msg=what)
        assert ours.is_contiguous() == theirs.is_contiguous(), what
        dy = torch.randint(-3, 4, theirs.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        grads = [torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip((ours, theirs), leaves)]
        torch.testing.assert_close(grads[0], grads[1], **(exact if dtype.itemsize > 2 else tolerance), msg=what)
        compared += 1
    assert compared > (5 if SMALL else 40)


@pytest.mark.isa
def test_which_maximum() -> None:
    """The first of equal numbers, -0 and 0 among them, or the last NaN, in vectors over channels, over windows and over columns."""
    plane = torch.zeros(1, 3, 18, 36)
    plane[:, 1] = -torch.zeros(())
    plane[0, 2, 3, 5] = plane[0, 2, 8, 3] = plane[0, 2, 8, 4] = float("nan")
    plane[0, 0, 5, ::7] = 1
    for x in (plane, plane.contiguous(memory_format=torch.channels_last)):
        for options in ((2,), (3, 1, 1), (9,), (18, 1)):
            ours, theirs = (library.max_pool2d(x, *options, return_indices=True) for library in (F, native))
            assert torch.equal(ours[1], theirs[1]), options
            assert torch.equal(ours[0].nan_to_num(7), theirs[0].nan_to_num(7)), options


@pytest.mark.parametrize("name, options, dtype", [("max_pool2d", (16,), torch.uint8), ("max_pool2d", ((1, 257),), torch.int32),
                                                  ("adaptive_max_pool2d", (2,), torch.int32), ("avg_pool2d", (2,), None)])  # fmt: skip
def test_what_is_kept_for_backward(name: str, options: tuple[Any, ...], dtype: torch.dtype | None) -> None:
    """Of maxima a byte or four for each result, of means nothing; never the input."""
    kept: list[Tensor] = []
    x = torch.randn(1, 2, 40, 300, requires_grad=True)

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = getattr(F, name)(x, *options)
    assert [(t.dtype, t.shape) for t in kept if t.numel()] == ([] if dtype is None else [(dtype, y.shape)])


@each_function
def test_gradients_do_not_depend_on_threads(name: str) -> None:
    """Bit by bit, for overlapping windows and both formats."""
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 19, 37, 41).contiguous(memory_format=form).requires_grad_()
        found = []
        for count in (1, 2):
            with threads(count):
                y = getattr(F, name)(x, *((5, 3), (2, 1), (2, 1)) if "adaptive" not in name else ((10, 9),))
                found.append(torch.autograd.grad(y, x, torch.ones_like(y) / 3)[0])
        assert torch.equal(*found)


def test_a_window_between_all_numbers() -> None:
    """With dilation and padding a window may see no number: -inf, and no gradient goes anywhere."""
    x = torch.randn(1, 2, 2, 5, requires_grad=True)
    y = F.max_pool2d(x, 2, 1, 1, 3)
    assert torch.equal(y, native.max_pool2d(x, 2, 1, 1, 3)) and y.isinf().all()
    for create_graph in (False, True):
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=create_graph, retain_graph=True)
        assert torch.equal(dx, torch.zeros_like(x))


@each_function
def test_second_derivatives_of_overlapping_windows(name: str) -> None:
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    options = (3, 2, 1) if "adaptive" not in name else ((3, 4),)
    assert torch.autograd.gradgradcheck(lambda x: getattr(F, name)(x.square(), *options), x)


def test_layers() -> None:
    """torch.nn's layers with another forward: equal results, equal text, and what each option does."""
    x = torch.randn(2, 3, 9, 8)
    cases: list[Callable[[Any], Any]] = [
        lambda m: m.MaxPool2d(3, 2, 1, dilation=1, ceil_mode=True), lambda m: m.MaxPool2d(2), lambda m: m.AvgPool2d(3, 2, 1, True, False),
        lambda m: m.AvgPool2d(2, divisor_override=3), lambda m: m.AdaptiveAvgPool2d((None, 3)), lambda m: m.AdaptiveMaxPool2d(2),
    ]  # fmt: skip
    for make in cases:
        ours, theirs = make(nn), make(torch.nn)
        assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
        torch.testing.assert_close(ours(x), theirs(x))
    for make in (lambda m: m.MaxPool2d(2, return_indices=True), lambda m: m.AdaptiveMaxPool2d(2, return_indices=True)):
        for a, b in zip(make(nn)(x), make(torch.nn)(x)):
            assert torch.equal(a, b)


HUGE = (2**31, 2**40, 2**63 - 1, 2**63, -1, -(2**31), 2.0, "2", None, True, (2, 2, 2), (), (2.0, 2))
BAD: list[tuple[str, tuple[Any, ...]]] = [
    *(("max_pool2d", (n,)) for n in (0, 9, *HUGE)),
    *(("max_pool2d", (2, n)) for n in (0, *HUGE)),
    *(("max_pool2d", (3, 1, n)) for n in (2, *HUGE)),
    *(("max_pool2d", (2, 1, 0, n)) for n in (0, *HUGE)),
    ("max_pool2d", (2, 1, 0, 1, "yes")),
    *(("avg_pool2d", (n,)) for n in (0, 9, *HUGE)),
    *(("avg_pool2d", (2, n)) for n in (0, *HUGE)),
    *(("avg_pool2d", (3, 1, n)) for n in (2, *HUGE)),
    *(("avg_pool2d", (2, 1, 0, False, True, n)) for n in (0, 2**63, "2", 1.5)),
    ("avg_pool2d", (2, 1, 0, None)),
    *((name, (n,)) for name in NAMES[2:] for n in (-1, (0, 2), 0, 2**31, 2**63 - 1, "2", (2,), (2, 2, 2), (2, -1), (2.0, 2))),
]


@isolated
def test_bad_options_are_refused_as_torch_does() -> None:
    x = torch.ones(1, 1, 4, 4)
    for name, options in BAD:
        print(name, options, flush=True)
        ours, theirs = outcome(getattr(F, name), (x, *options)), outcome(getattr(native, name), (x, *options))
        if isinstance(theirs, Exception):
            assert isinstance(ours, type(theirs)), f"{name}{options}: {ours!r}, torch {theirs!r}"
            assert str(ours).strip()
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=f"{name}{options}")


@isolated
def test_sizes_whose_products_overflow() -> None:
    """Windows wider than any memory, seen through padding or stride, cost what is inside; torch's own sums of such numbers overflow."""
    top = 2**31 - 1
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert torch.equal(F.max_pool2d(x, 2, top), x[..., 1:2, 1:2])
    assert torch.equal(F.avg_pool2d(x, 3, top, 1), native.avg_pool2d(x, 3, top, 1))
    assert torch.equal(F.max_pool2d(x, (1, top), 1, (0, top // 2)), x[..., 2:].expand(1, 1, 3, 3).contiguous())
    for refused in ((3, 1, 1, top), (2, 1, 0, top), (top, 1, 0, top)):
        with pytest.raises(RuntimeError, match="too small|2\\^31"):
            F.max_pool2d(x, *refused)


@each_function
def test_bad_tensors_are_refused_as_torch_does(name: str) -> None:
    plain = torch.ones(1, 1, 4, 4)
    shapes = (3, 3), (1, 1, 1, 3, 3), (1, 0, 3, 3), (1, 1, 0, 3), (0, 3, 3), (0, 1, 3, 3)
    others = plain.long(), plain.bool(), plain.to_sparse(), plain.to("meta"), None, 1.0, [[1.0]]
    for x in (*(torch.ones(shape) for shape in shapes), *others):
        ours, theirs = outcome(getattr(F, name), (x, 2)), outcome(getattr(native, name), (x, 2))
        if isinstance(theirs, Exception):
            assert isinstance(ours, (type(theirs), TypeError)), f"{ours!r}, torch {theirs!r}"
        else:
            assert not isinstance(ours, Exception) and (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)


GOOD: dict[str, Any] = {"P": 2, "Q": 2, "kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1]}
WRONG: list[dict[str, Any]] = [
    *({"P": n} for n in (0, -1, 2**31)),
    *({"Q": n} for n in (3, 2**63 - 1)),
    *({"kernel": n} for n in ([0, 2], [0, 0], [2], [-1, 2], [2**31, 2], [2**63 - 1, 2])),
    *({"stride": n} for n in ([0, 1], [2, 2**40], [1, 2, 3], [])),
    *({"padding": n} for n in ([2, 0], [-1, 0], [2**62, 0])),
    *({"dilation": n} for n in ([0, 1], [-1, 1], [2**33, 1])),
]


@isolated
def test_raw_ops_check_everything() -> None:
    x, raw = torch.randn(1, 3, 4, 4), torch.ops.dlkernels
    y, argmax = raw.max_pool2d_forward(x, *GOOD.values(), True)
    for wrong in WRONG:
        print(wrong, flush=True)
        P, Q, *windows = (GOOD | wrong).values()
        dy = torch.zeros(1, 1, 1, 1).expand(1, 3, min(max(P, 0), 9), min(max(Q, 0), 9))
        calls: list[tuple[Any, ...]] = [(raw.max_pool2d_forward, x, P, Q, *windows, True)]
        if not {"P", "Q"} & set(wrong):
            calls.append((raw.max_pool2d_backward, dy, dy.to(torch.uint8), 4, 4, *windows, False))
        if "dilation" not in wrong:
            calls.append((raw.avg_pool2d_forward, x, P, Q, *windows[:3], True, 0))
            calls.append((raw.avg_pool2d_backward, dy, 4 if "Q" not in wrong else 0, 4, *windows[:3], True, 0, False))
        for function, *args in calls:
            with pytest.raises((RuntimeError, TypeError)):
                function(*args)
    for H, W in ((0, 4), (-1, 4), (2**31, 4), (4, 2**63 - 1), (1, 1), (2**16, 2**16)):
        with pytest.raises(RuntimeError):
            raw.max_pool2d_backward(y, argmax, H, W, *list(GOOD.values())[2:], False)
    for wrong_x in (x[0], x.long(), x.to("meta")[0], x.to_sparse(), x.to(torch.complex64)):
        with pytest.raises((RuntimeError, TypeError)):
            raw.max_pool2d_forward(wrong_x, *GOOD.values(), True)
    for codes in (argmax[..., :1], argmax.int(), argmax.bool(), argmax[0], argmax.to_sparse(), argmax.to("meta")):
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
            raw.max_pool2d_backward(y, codes, 4, 4, *list(GOOD.values())[2:], False)
    spoiled = raw.max_pool2d_backward(y, torch.full_like(argmax, 255), 4, 4, *list(GOOD.values())[2:], False)
    assert torch.equal(spoiled, torch.zeros_like(x)), "a code that is no place of a window is taken by none"


def test_explain() -> None:
    x = torch.randn(2, 3, 8, 8)
    for name, options in zip(NAMES, ((2,), (2, 2, 1), (3,), (3,))):
        assert dlkernels.explain(name, x, *options).implementation != "reference"
        assert dlkernels.explain(name, x.to(torch.int64), *options).implementation == "reference"
    assert "output_size" in dlkernels.explain("adaptive_avg_pool2d", x, 0).reason
