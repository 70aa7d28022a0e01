"""Clipping gradients by their norm."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..backend import PLAIN_TENSORS
from ..ops.optimizers import scale_, total_norm
from ..registry import FLOATS
from .step import clip_factor


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.utils.clip_grad_norm_``: scale all gradients down together, in place, to norm ``max_norm`` if theirs is larger.

    One pass for the norm, one for the scaling, which is left out where nothing is to be scaled.

    Args:
        parameters: one tensor or several, with their gradients; those without one are passed over.
        norm_type: 1, 2 and inf have kernels; others, and gradients on several devices or of tensor subclasses, go to torch's function.
        error_if_nonfinite: raise where the norm is not finite, and change nothing.
        foreach: accepted for torch's sake.

    Returns:
        The norm before: a single number, float64 if a gradient is, else float32.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm_type, max_norm = float(norm_type), float(max_norm)
    if norm_type not in (1.0, 2.0, float("inf")) or not grads or not _have_kernel(grads):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = total_norm(grads, norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite ({norm.item()}), so it cannot be clipped. "
            "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    factor = clip_factor(norm, max_norm)
    if not factor.is_cpu or factor != 1:  # on a GPU, to look would be to wait for it
        scale_(grads, factor)
    return norm


def _have_kernel(grads: list[Tensor]) -> bool:
    device = grads[0].device
    return device.type in ("cpu", "cuda") and all(
        type(g) in PLAIN_TENSORS and g.dtype in FLOATS and g.layout is torch.strided and g.device == device for g in grads
    )
