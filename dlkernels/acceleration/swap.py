"""Which layer gets a class of ours.

A class of ``dlkernels.nn`` that has the name of its base in ``torch.nn`` differs from it in how it computes, in nothing that it stores.
So a layer can change its class and keep all else. What a subclass adds is kept, by a class that inherits from both; what it overrides may
be what ``forward`` is about, so then it is left alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .. import nn

OURS: dict[type, type] = {
    getattr(torch.nn, name): ours
    for name, ours in nn._ours.items()
    if isinstance(ours, type) and (getattr(torch.nn, name, None) in ours.__mro__[1:] or issubclass(ours, torch.nn.RNNBase))
}

# What a subclass may define and still compute what its base does.
HARMLESS = {
    "__init__", "__new__", "__doc__", "__repr__", "__module__", "__annotations__", "__constants__", "__parameters__", "__orig_bases__",
    "__dict__", "__weakref__", "__slots__", "__firstlineno__", "__static_attributes__", "__annotate_func__", "__annotations_cache__",
    "__init_subclass__", "__reduce__", "__reduce_ex__", "__qualname__", "extra_repr", "reset_parameters",
}  # fmt: skip


def reads_weights(module: torch.nn.Module) -> bool:
    """Whether torch's own function reads the weights of the layers inside, which are then never called."""
    return isinstance(module, torch.nn.MultiheadAttention) and type(module) not in OURS


def class_for(module: torch.nn.Module) -> type | str | None:
    """The class that ``module`` is to have; or why it keeps its own; or None, where there is nothing to say.

    Containers, and what is of ours already, are None.
    """
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    found = next((base for base in kind.__mro__ if base in OURS), None)
    if found is None and isinstance(module, tuple(OURS.values())):
        return None
    if found is None:
        return "dlkernels has no kernel for it" if _is_layer(module) else None
    if issubclass(kind, OURS[found]):
        return None
    if "forward" in vars(module):
        return "its forward is set on the layer itself"
    if hasattr(module, "parametrizations"):
        return "it is parametrized"
    if kind is found:
        return OURS[found]
    changed = sorted(overridden(kind, found))
    if changed:
        return f"it overrides {', '.join(changed)} of {found.__name__}"
    return both((OURS[found], kind))


def _is_layer(module: torch.nn.Module) -> bool:
    """A layer that computes something: it has no layers inside, and parameters or a place in torch.nn."""
    if next(module.children(), None) is not None or isinstance(module, (torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten)):
        return type(module) is torch.nn.MultiheadAttention
    containers = torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict
    if isinstance(module, containers) or type(module).__module__.startswith("dlkernels."):
        return False
    return type(module).__module__.startswith("torch.nn.") or next(module.parameters(), None) is not None


def overridden(kind: type, base: type) -> set[str]:
    """What the classes between ``kind`` and ``base`` define anew that ``base`` has."""
    between = kind.__mro__[: kind.__mro__.index(base)]
    return {name for other in between for name in vars(other) if name not in HARMLESS and hasattr(base, name)}


@cache
def both(kinds: tuple[type, type]) -> type:
    """A class that computes as the first does and is the second in everything else."""
    return derived(kinds[1], kinds, {})


def new(kind: type) -> Any:
    """An empty object of ``kind``. (pickle refuses copyreg.__newobj__ for an object of another class.)"""
    return object.__new__(kind)


def derived(kind: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A class that calls itself ``kind``. What is pickled or copied is a ``kind``: a class made here has no name to be found by."""

    def reduce(self: Any, protocol: Any) -> Any:
        return new, (kind,), self.__dict__

    identity = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind)(kind.__name__, bases, {**identity, "__reduce_ex__": reduce, **members})
