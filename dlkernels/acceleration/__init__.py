"""``dlkernels.accelerate(model)``: any PyTorch model on our kernels, in place, with a report and a way back.

    swap.py    which layer gets a class of ours, and why another does not
    fuse.py    neighbouring layers in one kernel, decided at every call
    trace.py   which calls in a module's ``forward`` are such neighbours, and what has to hold for that
    report.py  what was done; undo

A layer is not replaced: its class is. Parameters, buffers, hooks, attributes and every reference to the layer stay what they are, and
the way back is the old class.
"""

from __future__ import annotations

import torch

from . import fuse, swap, trace
from .report import Left, Report, change, restore

__all__ = ["Report", "accelerate", "unaccelerate"]


def accelerate(model: torch.nn.Module) -> Report:
    """Put ``model`` on our kernels, in place.

    * Layers of ``torch.nn`` that ``dlkernels.nn`` has get its class, subclasses too if they change nothing that ``forward`` needs.
    * Linear + activation, BatchNorm + ReLU, Conv2d + activation and, in evaluation mode without gradients, Conv2d + BatchNorm2d + ReLU
      run as one kernel in every ``nn.Sequential`` and in every module whose ``forward`` calls them one after the other; so do a sum and the
      LayerNorm of it, with a Dropout before. Whether they may is asked at every call: a hook on one of the layers, another layer in its
      place, or another mode, and they run apart.
    * Everything else is left as it is; the report says why.

    Results and gradients are those of before, but for rounding (and dropout draws other numbers from the same seed). Layers, parameters,
    hooks and ``state_dict`` stay the same objects. A ``deepcopy`` or a pickle keeps the layers on our kernels but not what runs fused
    outside of ``nn.Sequential``, and cannot be undone.

    Returns:
        What was swapped, fused and left: ``print(report)``. ``report.undo()`` takes it back, as does ``dlkernels.unaccelerate(model)``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``. Whatever is raised, nothing has been changed.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    classes: dict[torch.nn.Module, type] = {}
    for name, module in model.named_modules():
        found = swap.class_for(module)
        if isinstance(found, type):
            classes[module] = found
            report.swapped.append(change(name, module, found))
        elif found is not None:
            report.left.append(Left(name, type(module).__name__, found))
    for name, module in model.named_modules():
        if next(module.children(), None) is None or swap.reads_weights(module):
            continue
        fusion = fuse.class_for_sequential(module, classes) or trace.class_for(module, classes)
        if isinstance(fusion, str):
            report.left.append(Left(name, type(module).__name__, fusion))
        elif fusion is not None:
            classes[module] = fusion[0]
            report.fused.extend(change(name, module, fusion[0], what) for what in fusion[1])
    report.carry_out(classes)
    return report


def unaccelerate(model: torch.nn.Module) -> None:
    """Give every layer of ``model`` the class that it had before ``accelerate``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``. ValueError: nothing in it was accelerated. RuntimeError: the class of a layer was
            changed since by something else, which has to be taken back first; nothing has been changed then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not restore(model.modules()):
        raise ValueError(f"nothing in this {type(model).__name__} was accelerated (a deepcopy of an accelerated model cannot be undone)")
