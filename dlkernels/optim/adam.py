"""Adam and AdamW: torch.optim's classes with one kernel for the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.optimizers import adam_
from .step import KernelStep, local, new_moment, new_step

BESIDE_BFLOAT16 = {torch.float32, torch.bfloat16, torch.float16}  # parameters whose moments may be bfloat16


class _Adam(KernelStep):
    def __init__(self, *args: Any, moments_dtype: torch.dtype | None = None, **options: Any) -> None:
        if moments_dtype not in (None, torch.bfloat16):
            raise ValueError(f"moments_dtype must be None or torch.bfloat16, got {moments_dtype}")
        self.moments_dtype = moments_dtype
        super().__init__(*args, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        dtypes = {p.dtype for p in self.param_groups[-1]["params"]} - BESIDE_BFLOAT16
        if self.moments_dtype is not None and dtypes:
            del self.param_groups[-1]
            raise ValueError(f"moments_dtype=torch.bfloat16 needs parameters of float32, bfloat16 or float16, got {dtypes.pop()}")

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], tail: tuple[Any, ...]) -> None:
        amsgrad = group["amsgrad"]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = new_step(group, p)
                for name in ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * amsgrad):
                    state[name] = new_moment(p, self.moments_dtype)
        moments = [local([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")]
        largest = local([state["max_exp_avg_sq"] for state in states]) if amsgrad else []
        factor, found_inf, zero_grad = tail
        beta1, beta2 = group["betas"]
        adam_(
            local(params), local(grads), *moments, largest, [state["step"] for state in states], factor, found_inf, float(group["lr"]),
            float(beta1), float(beta2), group["eps"], float(group["weight_decay"]), group["decoupled_weight_decay"], group["maximize"],
            zero_grad, self.moments_dtype is not None,
        )  # fmt: skip


class Adam(_Adam, torch.optim.Adam):
    """``torch.optim.Adam``, all its arguments, state_dict and groups.

    Args:
        max_grad_norm: scale all gradients down together to this 2-norm at every step where theirs is larger; None: do not.
        moments_dtype: torch.bfloat16 keeps the moments in two bytes a number, for parameters of float32, bfloat16 and float16. They are
            rounded up or down by chance, so that a change too small for a bfloat16 is not lost but made now and then. Chance is a
            function of the step count and of a number's place among the parameters, not of torch's generator: processes that share
            gradients stay together, a resumed run goes on as it would have, and threads make no difference. None: the parameter's type,
            float32 for a half type.

    See ``step`` for undoing a loss scale, clipping and zeroing gradients within the update. Raises ValueError for arguments out of range
    or a parameter given twice.
    """


class AdamW(_Adam, torch.optim.AdamW):
    """``torch.optim.AdamW``: Adam whose weight decay does not pass through the moments. See ``Adam``."""
