"""RMSprop: torch.optim's class with one kernel for the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.optimizers import rmsprop_
from .step import KernelStep, local, new_moment, new_step


class RMSprop(KernelStep, torch.optim.RMSprop):
    """``torch.optim.RMSprop``, centered or not, with momentum, all its arguments, state_dict and groups. See ``Adam`` for the rest."""

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], tail: tuple[Any, ...]) -> None:
        used = {"square_avg": True, "grad_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = new_step(group, p)
                state.update({name: new_moment(p) for name, use in used.items() if use})
        kept = [local([state[name] for state in states]) if use else [] for name, use in used.items()]
        factor, found_inf, zero_grad = tail
        rmsprop_(
            local(params), local(grads), *kept, [state["step"] for state in states], factor, found_inf, float(group["lr"]), group["alpha"],
            group["eps"], float(group["weight_decay"]), float(group["momentum"]), group["maximize"], zero_grad,
        )  # fmt: skip
