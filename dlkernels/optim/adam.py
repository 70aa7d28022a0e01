"""Adam and AdamW: torch.optim's classes with one kernel for the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.optimizers import adam_
from .step import KernelStep, local, new_moment, new_step


class _Adam(KernelStep):
    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], tail: tuple[Any, ...]) -> None:
        amsgrad = group["amsgrad"]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"], state["exp_avg"], state["exp_avg_sq"] = new_step(group, p), new_moment(p), new_moment(p)
                if amsgrad:
                    state["max_exp_avg_sq"] = new_moment(p)
        moments = [local([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")]
        largest = local([state["max_exp_avg_sq"] for state in states]) if amsgrad else []
        factor, found_inf, zero_grad = tail
        beta1, beta2 = group["betas"]
        adam_(
            local(params), local(grads), *moments, largest, [state["step"] for state in states], factor, found_inf, float(group["lr"]),
            float(beta1), float(beta2), group["eps"], float(group["weight_decay"]), group["decoupled_weight_decay"], group["maximize"],
            zero_grad,
        )  # fmt: skip


class Adam(_Adam, torch.optim.Adam):
    """``torch.optim.Adam``, all its arguments, state_dict and groups.

    Args:
        max_grad_norm: scale all gradients down together to this 2-norm at every step where theirs is larger; None: do not.

    See ``step`` for undoing a loss scale, clipping and zeroing gradients within the update. Moments of parameters of a half type are
    float32. Raises ValueError for arguments out of range or a parameter given twice.
    """


class AdamW(_Adam, torch.optim.AdamW):
    """``torch.optim.AdamW``: Adam whose weight decay does not pass through the moments. See ``Adam``."""
