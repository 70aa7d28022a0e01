"""SGD: torch.optim's class with one kernel for the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.optimizers import sgd_
from .step import KernelStep, new_moment


class SGD(KernelStep, torch.optim.SGD):
    """``torch.optim.SGD`` with momentum, dampening and nesterov, all its arguments, state_dict and groups. See ``Adam`` for the rest."""

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], tail: tuple[Any, ...]) -> None:
        if group["momentum"] == 0:
            return self._run(group, params, grads, [], False, tail)
        for first in (False, True):  # at its first step a parameter has no buffer, and the gradient becomes it
            these = [(p, g) for p, g in zip(params, grads, strict=True) if (self.state[p].get("momentum_buffer") is None) == first]
            if first:
                for p, _ in these:
                    self.state[p]["momentum_buffer"] = new_moment(p)
            if these:
                of_these, grads_of_these = map(list, zip(*these, strict=True))
                self._run(group, of_these, grads_of_these, [self.state[p]["momentum_buffer"] for p in of_these], first, tail)

    def _run(
        self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], first: bool, tail: tuple[Any, ...]
    ) -> None:
        factor, found_inf, zero_grad = tail
        sgd_(
            params, grads, buffers, factor, found_inf, float(group["lr"]), float(group["momentum"]), float(group["dampening"]),
            float(group["weight_decay"]), group["nesterov"], group["maximize"], first, zero_grad,
        )  # fmt: skip
