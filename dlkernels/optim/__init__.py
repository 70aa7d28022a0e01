"""torch.optim with our kernels in it: same names and signatures; what we have no kernel for is torch's own."""

from typing import Any

import torch.optim as _torch


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
