"""SGD: torch.optim's class with one kernel for the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.optimizers import sgd_
from .step import KernelStep, local, new_moment


class SGD(KernelStep, torch.optim.SGD):
    """``torch.optim.SGD`` with momentum, dampening and nesterov, all its arguments, state_dict and groups. See ``Adam`` for the rest."""

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], tail: tuple[Any, ...]) -> None:
        if group["momentum"] == 0:
            return self._run(group, params, grads, [], False, tail)
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        fresh = [i for i, buffer in enumerate(buffers) if buffer is None]  # at its first step a parameter's gradient becomes its buffer
        for i in fresh:
            buffers[i] = self.state[params[i]]["momentum_buffer"] = new_moment(params[i])
        if 0 < len(fresh) < len(params):
            rest = sorted(set(range(len(params))) - set(fresh))
            for places, first in ((fresh, True), (rest, False)):
                self._run(group, *_chosen(places, params, grads, buffers), first, tail)
        else:
            self._run(group, params, grads, buffers, bool(fresh), tail)

    def _run(
        self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Any], first: bool, tail: tuple[Any, ...]
    ) -> None:
        factor, found_inf, zero_grad = tail
        sgd_(
            local(params), local(grads), local(buffers), factor, found_inf, float(group["lr"]), float(group["momentum"]),
            float(group["dampening"]), float(group["weight_decay"]), group["nesterov"], group["maximize"], first, zero_grad,
        )  # fmt: skip


def _chosen(places: list[int], *lists: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    params, grads, buffers = ([of[i] for i in places] for of in lists)
    return params, grads, buffers
