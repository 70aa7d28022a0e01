"""The teaching models: ``MODELS["mlp"].build(dlkernels.nn)`` and ``MODELS["mlp"].build(torch.nn)`` are one text.

A model file is a sibling of this one that ends with ``SPECS``, a list of :class:`ModelSpec`; it is found by being here.
"""

from __future__ import annotations

import importlib
import pkgutil

from dlkernels.models.spec import ModelSpec

MODELS: dict[str, ModelSpec] = {}
for _file in pkgutil.iter_modules(__path__):
    for _spec in getattr(importlib.import_module(f"{__name__}.{_file.name}"), "SPECS", ()):
        if _spec.name in MODELS:
            raise ValueError(f"two teaching models are named {_spec.name!r}; the second is in dlkernels/models/{_file.name}.py")
        MODELS[_spec.name] = _spec

__all__ = ["MODELS", "ModelSpec"]
