"""torch.nn with our kernels in it: same names, signatures and state_dicts; what we have no kernel for is torch's own.

The public names of every module beside this file (its ``__all__``) are names of this package.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch.nn as _torch

from .. import functional

_modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
_ours = {name: getattr(module, name) for module in _modules for name in module.__all__}
globals().update(_ours)
sys.modules[f"{__name__}.functional"] = functional  # so that `import dlkernels.nn.functional as F` works like torch's
__all__ = sorted([*_ours, "functional"])


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
