"""torch.nn.functional with our kernels in it: same names, same signatures; what we have no kernel for is torch's own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as _torch

from .ops.linear import linear, linear_act, linear_relu

__all__ = ["linear", "linear_act", "linear_relu"]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
