"""torch.nn.functional with our kernels in it: same names, same signatures; what we have no kernel for is torch's own.

The public functions of every contract (its ``__all__``) are names of this module.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as _torch

from .ops import CONTRACTS

_ours = {name: getattr(contract, name) for contract in CONTRACTS for name in contract.__all__}
globals().update(_ours)
__all__ = sorted(_ours)


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
