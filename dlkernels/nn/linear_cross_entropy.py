"""The classifier and its loss in one layer: torch.nn's, over our kernels."""

from __future__ import annotations

import torch

from .. import functional as F

__all__ = ["LinearCrossEntropyLoss"] if hasattr(torch.nn, "LinearCrossEntropyLoss") else []  # torch has it from 2.13 on

if __all__:

    class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
        """``torch.nn.LinearCrossEntropyLoss``: the cross-entropy of a linear layer's logits, which are never held all at once."""

        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            classes, layer = (self.num_classes, *self.out_features), self.linear
            return F.linear_cross_entropy(
                input, layer.weight.view(*classes, layer.in_features), target,
                linear_bias=None if layer.bias is None else layer.bias.view(classes), weight=self.weight,
                reduction=self.reduction, ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing, options=self.options,
            )  # fmt: skip
