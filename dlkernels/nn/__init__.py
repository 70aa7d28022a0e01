"""torch.nn with our kernels in it: same names, signatures and state_dicts; what we have no kernel for is torch's own."""

from typing import Any

import torch.nn as _torch

from .. import functional
from .linear import Linear, LinearReLU

__all__ = ["Linear", "LinearReLU", "functional"]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
