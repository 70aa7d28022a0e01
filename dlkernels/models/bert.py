"""A BERT-style classifier: blocks in which every token sees the whole text, and an answer read off at a place put in front of it.

    x       = norm([cls, table[tokens]] + W)      learned positions; cls is a vector of its own, no word
    x       = block(x)                            several, not causal; filling is seen by nobody
    logits  = W_2 tanh(W_1 norm(x[0]) + b_1) + b_2

    tokens [B, T], 0 where a text is filled up    x [B, 1 + T, C]    logits [B, n_classes]
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels.models.layers import check_sizes
from dlkernels.models.transformer import TransformerBlock, gpt_init

FILLING = 0


class BERTClassifier(torch.nn.Module):
    """Tokens int64 [B, T], T up to ``context``, ``FILLING`` at the end of shorter texts -> logits [B, n_classes].

    Raises:
        ValueError: a size is not positive; there are more than ``context`` tokens. IndexError: a token is not in the vocabulary.
    """

    def __init__(
        self, vocab_size: int, context: int, n_classes: int, d_model: int = 128, n_heads: int = 4, n_layers: int = 2,
        dropout: float = 0.1, nn: ModuleType = dlkernels.nn,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(vocab_size=vocab_size, context=context, n_classes=n_classes, n_layers=n_layers)
        self.context = context
        self.embed = nn.Embedding(vocab_size, d_model, padding_idx=FILLING)
        self.cls = torch.nn.Parameter(torch.zeros(1, 1, d_model))
        self.positions = dlkernels.nn.LearnedPositions(context + 1, d_model)
        self.first_norm, self.norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(d_model, n_heads, 4 * d_model, dropout, nn=nn) for _ in range(n_layers))
        self.pooler, self.classifier = nn.Linear(d_model, d_model), nn.Linear(d_model, n_classes)
        self.tanh = nn.Tanh()
        gpt_init(self, n_layers)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.read(tokens)[:, 0]
        return self.classifier(self.drop(self.tanh(self.pooler(self.norm(x)))))

    def read(self, tokens: Tensor) -> Tensor:
        """What the last block makes of every place, [B, 1 + T, C]."""
        if tokens.shape[1] > self.context:
            raise ValueError(f"tokens are {tokens.shape[1]} a row, needs at most the context, {self.context}")
        x = torch.cat([self.cls.expand(len(tokens), -1, -1), self.embed(tokens)], 1)
        x, mask = self.drop(self.first_norm(self.positions(x))), self.seen(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def seen(self, tokens: Tensor) -> Tensor:
        """The mask for attention, [B, 1, 1, 1 + T]: False where there is filling."""
        return torch.nn.functional.pad(tokens != FILLING, (1, 0), value=True)[:, None, None]
