"""The contracts. Every module beside this file is imported, and registers what it defines in ``dlkernels.registry.OPS``."""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

CONTRACTS: list[ModuleType] = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
