"""What the optimizers refuse, and that a step which fails has changed nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_optim import grad_of, parameters, same_bits, set_gradients, steps
from torch import Tensor

from dlkernels import optim
from dlkernels.ops import optimizers as raw

NAMES = ["AdamW", "Adam", "SGD", "RMSprop"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "learning rate"), ({"weight_decay": -0.1}, "weight_decay"), ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
     ({"max_grad_norm": math.nan}, "max_grad_norm must be positive, got nan")],
)  # fmt: skip
def test_arguments_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)(parameters(), **options)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("options", [{"lr": math.nan}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8}])
def test_arguments_of_adam(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        getattr(optim, name)(parameters(), **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_given_twice(name: str) -> None:
    p = parameters()
    with pytest.raises(ValueError, match="more than once"):
        getattr(optim, name)([p[0], p[1], p[0]])
    with pytest.raises(ValueError, match="more than one parameter group"):
        getattr(optim, name)([{"params": p[:2]}, {"params": p[1:]}])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_fails_changes_nothing(name: str) -> None:
    """A sparse gradient in the second group: the first group is not updated either, and no state appears."""
    params = parameters()
    optimizer = getattr(optim, name)([{"params": params[:2]}, {"params": params[2:]}])
    steps(optimizer, params, range(1))
    set_gradients(params, 2)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    params[4].grad = grad_of(params[4]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()
    assert same_bits(params, before) and str(optimizer.state_dict()) == str(state)


def test_a_state_that_does_not_fit() -> None:
    params = parameters()
    optimizer = optim.AdamW(params)
    steps(optimizer, params, range(1))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optim.AdamW(params[:3]).load_state_dict(state)
    broken = copy.deepcopy(state)
    broken["state"][4]["exp_avg"] = torch.zeros(7)
    optimizer.load_state_dict(broken)
    before = [p.detach().clone() for p in params]
    set_gradients(params, 2)
    with pytest.raises(RuntimeError, match=r"exp_avgs has shape \(7\), needs \(100, 33\); tensor number 4"):
        optimizer.step()
    assert same_bits(params, before) and optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("option", [{"max_norm": -1.0}, {"grad_scale": 0.0}, {"max_norm": math.nan}])
def test_step_arguments(option: dict[str, Any]) -> None:
    params = parameters()
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="must be positive"):
        optim.AdamW(params).step(**option)


def adam(params: list[Tensor], grads: list[Tensor], moments: list[Tensor], counts: list[Tensor], factor: Tensor | None = None) -> None:
    seconds = [m.clone() for m in moments]
    raw.adam_(params, grads, moments, seconds, [], counts, factor, None, 1e-3, 0.9, 0.99, 1e-8, 0.0, True, False, False, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, None),
        ({"grads": [torch.ones(3)]}, "grads has 1 tensors, needs 2 like params"),
        ({"grads": [torch.ones(3), torch.ones(3)]}, r"grads has shape \(3\), needs \(4\); tensor number 1"),
        ({"grads": [torch.ones(3).double(), torch.ones(4)]}, "grads has dtype Double, needs Float.*tensor number 0"),
        ({"moments": [torch.ones(3).bfloat16(), torch.ones(4)]}, "exp_avgs has dtype BFloat16.*tensor number 0"),
        ({"counts": [torch.zeros(())]}, "steps has 1 tensors, needs 2"),
        ({"counts": [torch.zeros(2), torch.zeros(())]}, "steps has shape .2., needs a single number"),
        ({"factor": torch.ones(2)}, "factor has shape .2., needs a single number"),
        ({"params": [torch.ones(3).int(), torch.ones(4)]}, "dtype Int is not supported"),
    ],
)
def test_the_kernels_check_their_lists(change: dict[str, Any], message: str | None) -> None:
    given: dict[str, Any] = {
        "params": [torch.ones(3), torch.ones(4)], "grads": [torch.ones(3), torch.ones(4)], "moments": [torch.zeros(3), torch.zeros(4)],
        "counts": [torch.zeros(()), torch.zeros(())],
    }  # fmt: skip
    before = copy.deepcopy(given["params"])
    if message is None:
        return adam(**given)
    with pytest.raises(RuntimeError, match=message):
        adam(**{**given, **change})
    assert same_bits(given["params"], before)


def test_total_norm_checks_its_arguments() -> None:
    with pytest.raises(RuntimeError, match="norm_type is 3, needs 1, 2 or inf"):
        raw.total_norm([torch.ones(2)], 3.0)
