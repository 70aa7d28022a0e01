"""Moments in bfloat16, rounded by chance: the bits of the definition, the number itself as expectation, and runs that do not stall."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import DTYPES, SMALL, threads
from test_optim import parameters, same_bits, set_gradients, steps
from torch import Tensor

from dlkernels import optim
from dlkernels.ops import optimizers as raw
from dlkernels.ops.dropout import numbers

LOW = {"moments_dtype": torch.bfloat16}
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def by_definition(x: Tensor, r: Tensor) -> Tensor:
    """float32 to bfloat16, the larger of its neighbours where ``r``, of 16 bits, says so."""
    bits = (x.contiguous().view(torch.int32) + r.to(torch.int32)) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)


def adam(lists: Sequence[Sequence[Tensor]], counts: Sequence[int], by_chance: bool, beta1: float = 0.9, beta2: float = 0.999) -> None:
    """One step over (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)."""
    params, grads, means, squares, largest = (list(tensors) for tensors in lists)
    at = [torch.tensor(float(count)) for count in counts]
    raw.adam_(params, grads, means, squares, largest, at, None, None, 1e-2, beta1, beta2, 1e-8, 0.01, True, False, True, by_chance)


@pytest.mark.isa
@each_device
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])
def test_bits_are_those_of_the_definition(dtype: torch.dtype, amsgrad: bool, device: str) -> None:
    """Beside the same step with moments in float32: the same parameters, and its moments rounded."""
    shapes, counts = [(1500 if SMALL else 100_003,), (77,), (), (0, 3), (63,), (40, 70)], [4, 9, 0, 1, 2**24 - 1, 70000]

    def drawn(scale: float = 1.0) -> list[Tensor]:
        return [torch.randn(shape) * scale for shape in shapes]

    lists = [drawn(), drawn(), drawn(0.1), [t**2 for t in drawn()], [t**2 for t in drawn()] if amsgrad else []]
    kinds = [dtype] * 2 + [torch.bfloat16] * 3
    low = [[t.to(device, kind) for t in tensors] for tensors, kind in zip(lists, kinds, strict=True)]
    for tensors in low:
        if tensors:
            tensors[-1] = tensors[-1].t()  # all alike: places are those in memory
    wide = [[t.float() if i > 1 else t.clone() for t in tensors] for i, tensors in enumerate(low)]
    adam(low, counts, True)
    adam(wide, counts, False)
    for i, (p, count) in enumerate(zip(low[0], counts, strict=True)):
        r = numbers(max(p.numel(), 1), torch.tensor([count + 1]), i)[: p.numel()].to(device)
        assert torch.equal(p, wide[0][i]) and not low[1][i].any()
        for kept, exact, half in zip(low[2:], wide[2:], (r & 0xFFFF, r >> 16, r >> 16), strict=True):
            if kept:
                assert torch.equal(kept[i].t().flatten(), by_definition(exact[i].t().flatten(), half)), f"tensor {i}"


@pytest.mark.isa
@each_device
def test_what_a_bfloat16_holds_stays(device: str) -> None:
    """So do NaNs, whatever their bits."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-126, 2.0**-133, 1e38, math.inf, -math.inf]).bfloat16().float()
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    grad = torch.cat([values, nans]).to(device)
    for count in range(3 if SMALL else 50):
        p, mean, square = torch.zeros_like(grad), torch.zeros_like(grad).bfloat16(), torch.zeros_like(grad).bfloat16()
        adam([[p], [grad.clone()], [mean], [square], []], [count], True, beta1=0.0, beta2=0.0)
        n = len(values)
        assert torch.equal(mean[:n].float(), grad[:n]) and square[n - 2 : n].isinf().all()
        assert mean[n:].isnan().all() and square[n:].isnan().all()


def deviations(draws: Tensor, x: Tensor) -> float:
    """By how many standard deviations the sum over all numbers of (mean - x)², in units of what chance makes it, is off. ``draws`` [n, N]
    are n roundings of each of N numbers ``x`` to a neighbour."""
    below = (x.view(torch.int32) & -65536).view(torch.float32).double()
    gap = torch.where(x > 0, 1, -1) * 2.0 ** (x.abs().log2().floor().double() - 7)
    f = (x.double() - below) / gap  # how far towards the neighbour above, which is how often it should be taken
    z = ((draws.double() - below) / gap - f).sum(0) / (len(draws) * f * (1 - f)).sqrt()
    return abs(float((z**2).sum()) - len(x)) / math.sqrt(2 * len(x))


@pytest.mark.skipif(SMALL, reason="the bits above say it too")
def test_the_expectation_is_the_number_itself() -> None:
    """With β = 0 the moments are g and g², rounded anew at every step: their means over many steps and places."""
    x = torch.randn(200)
    n, p = 64, torch.zeros(64, 200)
    means, squares = [], []
    for count in range(100):
        mean, square = torch.zeros(n, 200, dtype=torch.bfloat16), torch.zeros(n, 200, dtype=torch.bfloat16)
        adam([[p], [x.repeat(n, 1)], [mean], [square], []], [count], True, beta1=0.0, beta2=0.0)
        means.append(mean)
        squares.append(square)
    m, v = torch.cat(means), torch.cat(squares)
    assert deviations(m, x) < 4 and deviations(v, x * x) < 4
    assert deviations(x.bfloat16().expand_as(m), x) > 1000, "rounding to the nearest would be found out"
    up = [(kept.float().abs() > exact.abs()).double() for kept, exact in ((m, x), (v, x * x))]
    shares = [some.mean(0) for some in up]
    both = ((up[0] * up[1]).mean(0) - shares[0] * shares[1]) / (shares[0] * (1 - shares[0]) * shares[1] * (1 - shares[1]) / len(m)).sqrt()
    assert abs(float((both**2).sum()) - 200) < 4 * math.sqrt(400), "the two moments of a number are rounded independently"


def final_loss(rounding: str) -> float:
    """Linear regression on features of falling size, in 3000 small steps whose rate falls to 0."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 32, generator=generator) * torch.logspace(0, -1.5, 32)
    y = x @ torch.randn(32, 1, generator=generator)
    p = torch.full((32, 1), 3.0, requires_grad=True)
    optimizer = optim.AdamW([p], weight_decay=0.0, **(LOW if rounding == "by chance" else {}))
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 3000)
        some = torch.randint(512, (64,), generator=generator)
        optimizer.zero_grad()
        ((x[some] @ p - y[some]) ** 2).mean().backward()
        optimizer.step()
        if rounding == "to the nearest":
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][name].copy_(optimizer.state[p][name].bfloat16())
    return ((x @ p - y) ** 2).mean().item()


@pytest.mark.skipif(SMALL, reason="thousands of steps")
def test_a_run_ends_where_float32_does_and_rounding_to_the_nearest_does_not() -> None:
    """v falls by a thousandth of itself at most, less than half a step of bfloat16."""
    exact, chance, nearest = (final_loss(rounding) for rounding in ("none", "by chance", "to the nearest"))
    assert 0.7 < chance / exact < 1.4 and nearest > 10 * exact


def test_threads_and_the_generator_make_no_difference() -> None:
    found = []
    for count in (1, 2, 3):
        torch.manual_seed(count)
        with threads(count):
            params = parameters(shapes=[(300, 301), (7,), (5000,)])
            optimizer = optim.AdamW(params, amsgrad=True, max_grad_norm=0.5, **LOW)
            steps(optimizer, params, range(3))
            found.append([*params, *(t for state in optimizer.state.values() for t in state.values())])
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])
def test_states_go_on_and_go_to_torch(dtype: torch.dtype) -> None:
    through, first = parameters(dtype), parameters(dtype)
    mine, before = optim.AdamW(through, amsgrad=True, **LOW), optim.AdamW(first, amsgrad=True, **LOW)
    steps(mine, through, range(6))
    steps(before, first, range(3))
    assert all(t.dtype == torch.bfloat16 for t in moments(before)) and len(moments(before)) == 3 * len(first)
    second = [p.detach().clone().requires_grad_() for p in first]
    after = optim.AdamW(second, amsgrad=True, **LOW)
    after.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
    assert same_bits(moments(after), moments(before))
    steps(after, second, range(3, 6))
    assert same_bits(through, second) and same_bits(moments(mine), moments(after))

    native = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in first], amsgrad=True)
    native.load_state_dict(before.state_dict())
    assert same_bits(moments(native), [t.to(dtype) for t in moments(before)])
    steps(native, native.param_groups[0]["params"], range(1))
    after.load_state_dict(native.state_dict())
    assert same_bits(moments(after), [t.bfloat16() for t in moments(native)])


def test_a_copy_keeps_the_options() -> None:
    params = parameters()
    optimizer = copy.deepcopy(optim.AdamW(params, max_grad_norm=0.5, **LOW))
    copies = optimizer.param_groups[0]["params"]
    steps(optimizer, copies, range(1))
    assert optimizer.max_grad_norm == 0.5 and optimizer.grad_norm is not None and moments(optimizer)[0].dtype == torch.bfloat16
    assert "moments_dtype" in inspect.signature(optim.Adam).parameters and "moments_dtype" not in inspect.signature(optim.SGD).parameters


@pytest.mark.parametrize("value", [torch.float16, torch.float32, "bfloat16"])
def test_other_dtypes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="moments_dtype must be None or torch.bfloat16, got"):
        optim.AdamW(parameters(), moments_dtype=value)


def test_parameters_and_steps_that_cannot_have_them() -> None:
    with pytest.raises(ValueError, match="needs parameters of float32, bfloat16 or float16, got torch.float64"):
        optim.Adam(parameters(torch.float64), **LOW)
    params = parameters()
    optimizer = optim.Adam(params, **LOW)
    with pytest.raises(ValueError, match=r"got torch\.complex64"):
        optimizer.add_param_group({"params": [torch.ones(2, dtype=torch.complex64, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1
    native = optim.Adam(params, differentiable=True, **LOW)
    set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="moments_dtype need the kernels, but differentiable=True"):
        native.step()
    assert same_bits(params, before) and not native.state


@pytest.mark.isa
def test_the_kernels_check_the_dtype() -> None:
    for dtype, kept, message in (
        (torch.float32, torch.float32, "exp_avgs.* dtype .*loat"),
        (torch.float16, torch.float16, "exp_avgs.* dtype .*(Half|float16)"),
        (torch.float64, torch.bfloat16, "params has dtype .*beside which nothing is kept in"),
    ):
        p, m = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=kept)
        with pytest.raises(RuntimeError, match=message):
            adam([[p], [p.clone()], [m], [m.clone()], []], [0], True)
        assert (p == 1).all()
