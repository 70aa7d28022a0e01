"""Batch normalisation layers: torch.nn's parameters, buffers, checks and state_dict over our kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormReLU1d", "BatchNormReLU2d", "BatchNormReLU3d"]


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    _function: Callable[..., Tensor] = staticmethod(F.batch_norm)

    def forward(self, input: Tensor) -> Tensor:
        return self.normalize(input, self._function)

    def normalize(self, input: Tensor, function: Callable[..., Tensor]) -> Tensor:
        """As torch's: statistics of the batch in training and where none are tracked, which ``momentum`` adds to the running ones;
        momentum None gives every batch the same share."""
        self._check_input_dim(input)
        mean, var, momentum, tracked = self.running_mean, self.running_var, self.momentum, self.num_batches_tracked
        training = self.training
        if not training:
            training = mean is None and var is None
        elif not self.track_running_stats:
            mean = var = None
        elif tracked is not None:
            tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(tracked)
        return function(input, mean, var, self.weight, self.bias, training, 0.0 if momentum is None else momentum, self.eps)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on our kernel. Input ``(N, C)`` or ``(N, C, L)``."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` on our kernel. Input ``(N, C, H, W)``, contiguous or channels last."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` on our kernel. Input ``(N, C, D, H, W)``, contiguous or channels last."""


class BatchNormReLU1d(BatchNorm1d):
    """``ReLU(BatchNorm1d(x))`` in one kernel; parameters and state_dict are those of ``BatchNorm1d``."""

    _function = staticmethod(F.batch_norm_relu)


class BatchNormReLU2d(BatchNorm2d):
    """``ReLU(BatchNorm2d(x))`` in one kernel; parameters and state_dict are those of ``BatchNorm2d``."""

    _function = staticmethod(F.batch_norm_relu)


class BatchNormReLU3d(BatchNorm3d):
    """``ReLU(BatchNorm3d(x))`` in one kernel; parameters and state_dict are those of ``BatchNorm3d``."""

    _function = staticmethod(F.batch_norm_relu)
