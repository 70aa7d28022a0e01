"""What ``accelerate`` did, and how it is taken back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

# Of every accelerated layer: the class it had, and the one it got.
_CHANGED: WeakKeyDictionary[torch.nn.Module, tuple[type, type]] = WeakKeyDictionary()


class Change(NamedTuple):
    name: str  # of the layer in its model; "" is the model itself
    was: str
    now: str


class Left(NamedTuple):
    name: str
    kind: str
    reason: str


def class_name(kind: type) -> str:
    return f"dlkernels.nn.{kind.__name__}" if kind.__module__.startswith("dlkernels.nn.") else f"{kind.__name__} on dlkernels"


def change(name: str, module: torch.nn.Module, now: type, what: str = "") -> Change:
    return Change(name, type(module).__name__, what or class_name(now))


@dataclass
class Report:
    """What was swapped, what runs fused, what was left and why. ``print(report)`` shows a table."""

    swapped: list[Change] = field(default_factory=list)
    fused: list[Change] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    _modules: list[torch.nn.Module] = field(default_factory=list, repr=False)

    def carry_out(self, classes: Mapping[torch.nn.Module, type]) -> None:
        """Give each module its class; all of them, or none."""
        was = {module: type(module) for module in classes}
        try:
            for module, now in classes.items():
                module.__class__ = now
        except Exception:
            for module, before in was.items():
                module.__class__ = before
            raise
        for module, now in classes.items():
            _CHANGED[module] = was[module], now
        self._modules = list(classes)

    def undo(self) -> None:
        """Every layer gets the class back that it had. A second time does nothing.

        Raises ``RuntimeError`` where something else has changed a layer's class since; nothing has been changed then.
        """
        restore(self._modules)

    def __str__(self) -> str:
        rows = [("swapped", f"{was} -> {now}", name) for name, was, now in self.swapped]
        rows += [("fused", f"{now}, in {was}", name) for name, was, now in self.fused]
        rows += [("left", f"{kind}: {reason}", name) for name, kind, reason in self.left]
        return _table(rows) if rows else "nothing to accelerate"


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    """One line for all layers to which the same happened."""
    groups: dict[tuple[str, str], list[str]] = {}
    for done, what, name in rows:
        groups.setdefault((done, what), []).append(name or "(the model itself)")
    width = max(len(what) for _, what in groups)
    lines = []
    for (done, what), names in groups.items():
        shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
        lines.append(f"{done:8}{len(names):4} x {what:{width}}  {shown}")
    return "\n".join(lines)


def restore(modules: Iterable[torch.nn.Module]) -> bool:
    """Take back what was changed in ``modules``; whether anything was."""
    changed = {module: _CHANGED[module] for module in modules if module in _CHANGED}
    for module, (_, now) in changed.items():
        if type(module) is not now:
            found = f"{type(module).__module__}.{type(module).__name__}"
            raise RuntimeError(f"a {now.__name__} has become a {found} since it was accelerated; take that back first, then accelerate")
    for module, (was, _) in changed.items():
        module.__class__ = was
        del _CHANGED[module]
    return bool(changed)
