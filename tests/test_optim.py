"""dlkernels.optim against torch.optim: the same parameters after many steps, the same checkpoints, the same refusals."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import SMALL, threads
from torch import Tensor

from dlkernels import optim

SHAPES = [(3, 5), (17,), (), (0, 4), (100, 33), (2, 3, 4)]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 1e-2}),
    ("AdamW", {"lr": 1e-2, "amsgrad": True, "maximize": True, "betas": (0.8, 0.95)}),
    ("Adam", {"weight_decay": 0.1, "eps": 1e-6}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "weight_decay": 0.01}),
    ("RMSprop", {"momentum": 0.9, "alpha": 0.9}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "maximize": True}),
]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value))


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def set_gradients(params: Sequence[Tensor], number: int) -> None:
    """Gradients of step ``number``: those of every second step leave out the second parameter."""
    generator = torch.Generator().manual_seed(number + 10)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = None if number % 2 and i == 1 else grad.to(p.dtype)


def grad_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Of all numbers of one list from those of the other, relative."""
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def steps(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], numbers: Iterator[int] | range) -> None:
    for number in numbers:
        set_gradients(params, number)
        optimizer.step()


@pytest.mark.isa
@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_hundred_steps(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs, exact = parameters(dtype), parameters(dtype), [p.detach().double() for p in parameters(dtype)]
    mine = getattr(optim, name)(ours, **options)
    native, in_double = getattr(torch.optim, name)(theirs, **options), getattr(torch.optim, name)(exact, **options)
    for number in range(5 if SMALL else 200):
        set_gradients(ours, number)
        for a, b, c in zip(ours, theirs, exact, strict=True):
            b.grad, c.grad = (None, None) if a.grad is None else (a.grad.clone(), a.grad.double())
        mine.step(), native.step(), in_double.step()
    if dtype == torch.float64:
        assert distance(ours, exact) < 1e-12
    else:
        assert distance(ours, exact) <= 2 * distance(theirs, exact) + 1e-7


@pytest.mark.isa
@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_their_moments_in_float32(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """One step differs from one in float64 by the rounding of the parameter alone."""
    ours, exact = parameters(dtype), [p.detach().double() for p in parameters(dtype)]
    mine, in_double = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(exact, **options)
    set_gradients(ours, 0)
    for a, b in zip(ours, exact, strict=True):
        b.grad = grad_of(a).double()
    mine.step(), in_double.step()
    assert distance(ours, exact) <= torch.finfo(dtype).eps
    moments = [t for state in mine.state.values() for key, t in state.items() if key != "step"]
    assert all(t.dtype == torch.float32 for t in moments)
    again = getattr(optim, name)(parameters(dtype), **options)
    again.load_state_dict(mine.state_dict())
    assert same_bits([t for state in again.state.values() for key, t in state.items() if key != "step"], moments)


@each_case
def test_checkpoints_go_both_ways(name: str, options: dict[str, Any]) -> None:
    """State and parameters pass from torch to us and back without a change of a bit, and both go on from there as from their own."""
    ours, theirs = parameters(), parameters()
    mine, native = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    steps(mine, ours, range(6))
    steps(native, theirs, range(6))
    for source, destination, params in ((mine, getattr(torch.optim, name), ours), (native, getattr(optim, name), theirs)):
        state = copy.deepcopy(source.state_dict())
        loaded = destination([p.detach().clone().requires_grad_() for p in params], **options)
        loaded.load_state_dict(state)
        found = loaded.state_dict()
        assert found["param_groups"] == state["param_groups"] and found["state"].keys() == state["state"].keys()
        for number, kept in state["state"].items():
            assert kept.keys() == found["state"][number].keys()
            for key, value in kept.items():
                there = found["state"][number][key]
                assert torch.equal(value, there) if isinstance(value, Tensor) else value is there, f"{key} of parameter {number}"
        copies = loaded.param_groups[0]["params"]
        steps(loaded, copies, range(6, 9))
        steps(source, params, range(6, 9))
        assert distance(copies, params) < 1e-5


def test_loaded_and_interrupted_runs_agree_in_every_bit() -> None:
    through, first = parameters(), parameters()
    mine, before = optim.AdamW(through), optim.AdamW(first)
    steps(mine, through, range(10))
    steps(before, first, range(5))
    second = [p.detach().clone().requires_grad_() for p in first]
    after = optim.AdamW(second)
    after.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
    steps(after, second, range(5, 10))
    assert same_bits(through, second)


@pytest.mark.isa
def test_layouts() -> None:
    """Parameters transposed, in columns of something larger, channels last, at odd addresses: as if they were contiguous."""
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ours = [t.requires_grad_() for t in (torch.randn(6, 10).t(), torch.randn(5, 12)[:, ::3], last, torch.randn(14)[1:])]
    theirs = [p.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for p in ours]
    mine, native = optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for number in range(4):
        set_gradients(theirs, 2 * number)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = grad_of(q).clone() if number % 2 else torch.empty_like(p).copy_(grad_of(q))  # laid out like q, or like p
        mine.step(), native.step()
    for p, q in zip(ours, theirs, strict=True):  # one number seen from many places
        p.grad, q.grad = torch.ones(()).expand(p.shape), torch.ones(p.shape)
    mine.step(), native.step()
    assert not ours[1].is_contiguous() and distance(ours, theirs) < 1e-6


def test_many_small_tensors_and_one_large() -> None:
    shapes = [(1,)] * 3000 + [(700, 501)] + [(64,)] * 3000
    ours, theirs = parameters(shapes=shapes), parameters(shapes=shapes)
    mine, native = optim.AdamW(ours), torch.optim.AdamW(theirs, fused=True)
    steps(mine, ours, range(0, 6, 2))
    steps(native, theirs, range(0, 6, 2))
    assert distance(ours, theirs) < 1e-6


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    for count in (1, 2, 3):
        with threads(count):
            params = parameters(shapes=[(300, 301), (7,), (5000,)])
            steps(optim.AdamW(params, max_grad_norm=0.5), params, range(3))
            found.append(params)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("grad_scale", [None, 1024.0])
@pytest.mark.parametrize("max_norm", [None, 0.7, 1e6])
@each_case
def test_scale_clip_and_zero_on_the_way(
    name: str, options: dict[str, Any], zero_grad: bool, grad_scale: float | None, max_norm: float | None
) -> None:
    """One call does what four do."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    mine, native = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for number in range(5):
        set_gradients(ours, number)
        set_gradients(theirs, number)
        for p in ours:
            if p.grad is not None:
                p.grad *= grad_scale or 1
        grads = [p.grad for p in ours if p.grad is not None]
        before = [grad.clone() for grad in grads]
        mine.step(grad_scale=grad_scale, max_norm=max_norm, zero_grad=zero_grad)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm) if max_norm is not None else None
        native.step()
        assert norm is None or torch.allclose(mine.grad_norm, norm, rtol=1e-12)
        assert all(not grad.any() for grad in grads) if zero_grad else same_bits(grads, before)
    assert distance(ours, theirs) < 1e-6  # a factor is float32 where nothing says float64


def test_max_grad_norm_of_the_constructor() -> None:
    ours, theirs = parameters(), parameters()
    mine, native = optim.SGD(ours, lr=1.0, max_grad_norm=0.1), torch.optim.SGD(theirs, lr=1.0)
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    torch.nn.utils.clip_grad_norm_(theirs, 0.1)
    mine.step(), native.step()
    assert distance(ours, theirs) < 1e-6


def test_a_scaled_gradient_that_is_not_finite_changes_nothing() -> None:
    params = parameters()
    mine = optim.AdamW(params)
    steps(mine, params, range(2))
    set_gradients(params, 2)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(mine.state_dict()["state"])
    grad_of(params[0])[0, 0] = math.inf
    mine.step(grad_scale=8.0, max_norm=1.0)
    assert same_bits(params, before) and str(mine.grad_norm) == "tensor(inf)"
    for number, kept in mine.state_dict()["state"].items():
        assert all(torch.equal(kept[key], state[number][key]) for key in kept)


@each_case
def test_grad_scaler(name: str, options: dict[str, Any]) -> None:
    """With a GradScaler, unscaled by it or by the step, and the steps that it skips."""
    ours, theirs = parameters(), parameters()
    mine, native = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for number in range(6):
        for optimizer, params, scaler in ((mine, ours, scalers[0]), (native, theirs, scalers[1])):
            set_gradients(params, number)
            scaler.scale(torch.zeros((), requires_grad=True))
            for p in params:
                if p.grad is not None:
                    p.grad *= scaler.get_scale()
            if number == 3:
                grad_of(params[0])[0, 0] = math.inf
            if number == 4:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() and distance(ours, theirs) < 1e-5


def test_schedulers_closures_hooks_and_groups() -> None:
    ours, theirs = parameters(), parameters()
    seen: list[float] = []
    for optimizers, params in ((optim, ours), (torch.optim, theirs)):
        optimizer = optimizers.AdamW([{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 0.1}], lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.3)
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer.param_groups[1]["lr"]))

        def closure(params: list[torch.nn.Parameter] = params) -> Tensor:
            for p in params:
                p.grad = None
            loss = torch.stack([((p - 1) ** 2).sum() for p in params]).sum()
            loss.backward()
            return loss

        losses = []
        for _ in range(6):
            losses.append(optimizer.step(closure).item())
            scheduler.step()
        assert losses[-1] < losses[0]
    assert seen[:6] == seen[6:] and distance(ours, theirs) < 1e-5


def test_learning_rate_as_a_tensor() -> None:
    ours, theirs = parameters(), parameters()
    steps(optim.AdamW(ours, lr=torch.tensor(0.01)), ours, range(3))
    steps(torch.optim.AdamW(theirs, lr=0.01), theirs, range(3))
    assert distance(ours, theirs) < 1e-5


def test_what_no_kernel_takes_is_torchs() -> None:
    assert optim.NAdam is torch.optim.NAdam and optim.Adagrad is torch.optim.Adagrad and optim.lr_scheduler is torch.optim.lr_scheduler
    ours, theirs = [[torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))] for _ in range(2)]
    for optimizers, params in ((optim, ours), (torch.optim, theirs)):
        optimizer = optimizers.Adam(params)
        params[0].grad = torch.full((3,), 2 - 1j)
        optimizer.step()
    assert same_bits(ours, theirs)
    optimizer = optim.AdamW(ours)
    with pytest.raises(RuntimeError, match="max_norm.*complex64"):
        optimizer.step(max_norm=1.0)
    p, lr = torch.ones(2, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    value = p * 1
    value.retain_grad()
    (value**2).sum().backward(retain_graph=True)
    optim.SGD([value], lr=lr, differentiable=True).step()
    value.sum().backward()
    assert lr.grad is not None and lr.grad.item() == -4
