"""torch.optim with our kernels in it: same names and signatures; what we have no kernel for is torch's own."""

from typing import Any

import torch.optim as _torch

from .adam import Adam, AdamW
from .clip import clip_grad_norm_
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "clip_grad_norm_"]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
