"""The embedding table: torch.nn.Embedding's parameter, options and state_dict over our kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["Embedding"]


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` on our kernel: indices ``(*)``, output ``(*, embedding_dim)``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
