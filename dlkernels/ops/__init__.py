"""The contracts. Every module beside this file is imported, and registers what it defines in ``dlkernels.registry.OPS``."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
