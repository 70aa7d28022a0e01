"""dlkernels.clip_grad_norm_ against torch's."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from test_optim import distance, grad_of, parameters, set_gradients
from torch import Tensor

import dlkernels


@pytest.mark.isa
@pytest.mark.parametrize("norm_type", [1, 2, math.inf, "inf", 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clip_grad_norm(norm_type: float, dtype: torch.dtype) -> None:
    for max_norm in (0.5, 1e4):
        ours, theirs = parameters(dtype), parameters(torch.float64)
        set_gradients(ours, 1)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None or not p.numel() else p.grad.double().clone()  # torch has no largest of no numbers
        norm = dlkernels.clip_grad_norm_(iter(ours), max_norm, norm_type)
        exact = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
        grads = [(p.grad, q.grad) for p, q in zip(ours, theirs, strict=True) if q.grad is not None]
        rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
        assert abs(norm.item() / exact.item() - 1) < max(rounding, 1e-6 if dtype != torch.float64 else 0) * 4
        assert distance(*zip(*grads, strict=True)) < 4 * rounding


@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_that_are_not_finite(norm_type: float, value: float) -> None:
    params = parameters()
    set_gradients(params, 0)
    grad_of(params[4])[70, 3] = value
    before = [grad_of(p).clone() for p in params]
    with pytest.raises(RuntimeError, match="non-finite"):
        dlkernels.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    assert all(torch.equal(grad_of(p), b) or not b.isfinite().all() for p, b in zip(params, before, strict=True))
    assert str(dlkernels.clip_grad_norm_(params, 1.0, norm_type).item()) == str(value)


def test_clipping_nothing() -> None:
    assert dlkernels.clip_grad_norm_([], 1.0).item() == 0 == dlkernels.clip_grad_norm_(parameters(), 1.0).item()
    with pytest.warns(UserWarning, match="empty generator"):
        dlkernels.clip_grad_norm_((p for p in list[Tensor]()), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lone = torch.ones(3, requires_grad=True)
        lone.grad = torch.full((3,), 2.0)
        assert dlkernels.clip_grad_norm_(lone, 1.0).item() == pytest.approx(math.sqrt(12))
    assert lone.grad.norm().item() == pytest.approx(1, abs=1e-5)
