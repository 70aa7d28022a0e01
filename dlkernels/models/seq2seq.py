"""An encoder-decoder in the manner of T5 (Raffel et al. 2020): one sequence is read, another one written with the first in view.

    encoder   blocks in which every token of the source sees all of it
    decoder   causal blocks, each with attention to the encoder's result between its two parts
    bias      a number for every head and distance s - t is added to the scores; distances beyond a limit share one. It is learned, one
              table for the encoder and one for the decoder, and nothing else says where a token stands
    logits    norm(x) tableᵀ, of the one table that embeds source and target

    source [B, S], target [B, T], 0 where filled up    x [B, T, C]    logits [B, T, V]
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels.models.layers import check_sizes
from dlkernels.models.transformer import TransformerBlock, gpt_init

FILLING = 0


class RelativeBias(torch.nn.Module):
    """What is added to the score of tokens t and s by their distance s - t: [1, H, T, S]. Beyond ``furthest`` all distances are one."""

    def __init__(self, n_heads: int, furthest: int) -> None:
        super().__init__()
        self.furthest = furthest
        self.weight = torch.nn.Parameter(torch.zeros(2 * furthest + 1, n_heads))

    def forward(self, T: int, S: int, causal: bool = False) -> Tensor:
        t, s = torch.arange(T, device=self.weight.device)[:, None], torch.arange(S, device=self.weight.device)
        bias = self.weight[(s - t).clamp(-self.furthest, self.furthest) + self.furthest].permute(2, 0, 1)[None]
        return bias.masked_fill(s > t, -math.inf) if causal else bias


class EncoderDecoder(torch.nn.Module):
    """Source int64 [B, S] and target [B, T], which begins with a token for the start -> logits [B, T, vocab_size] of what comes next.

    Args:
        furthest: the largest distance with a bias of its own.

    Raises:
        ValueError: a size is not positive. IndexError: a token is not in the vocabulary.
    """

    def __init__(
        self, vocab_size: int, d_model: int = 128, n_heads: int = 4, n_layers: int = 2, dropout: float = 0.0, furthest: int = 32,
        nn: ModuleType = dlkernels.nn,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(vocab_size=vocab_size, n_layers=n_layers, furthest=furthest)
        self.embed = nn.Embedding(vocab_size, d_model)
        self.encoder_bias, self.decoder_bias = RelativeBias(n_heads, furthest), RelativeBias(n_heads, furthest)
        sizes = (d_model, n_heads, 4 * d_model, dropout)
        self.encoder = nn.ModuleList(TransformerBlock(*sizes, nn=nn) for _ in range(n_layers))
        self.decoder = nn.ModuleList(TransformerBlock(*sizes, causal=True, crossed=True, nn=nn) for _ in range(n_layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, vocab_size)
        self.head.weight = self.embed.weight
        gpt_init(self, n_layers)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(self.encode(source), source, target)

    def encode(self, source: Tensor) -> Tensor:
        """What the encoder makes of the source, [B, S, C]."""
        x, S = self.drop(self.embed(source)), source.shape[1]
        mask = self.encoder_bias(S, S).masked_fill(~_seen(source), -math.inf)
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x)

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Logits [B, T, V] of what follows each token of the target, with ``memory`` in view."""
        x, T, seen = self.drop(self.embed(target)), target.shape[1], _seen(source)
        mask = self.decoder_bias(T, T, causal=True)
        for block in self.decoder:
            x = block(x, mask, memory=memory, memory_mask=seen)
        return self.head(self.decoder_norm(x))

    @torch.no_grad()
    def translate(self, source: Tensor, start: int, end: int, most: int) -> Tensor:
        """The likeliest token at each step, [B, up to ``most``], until all rows have reached ``end``; ``end`` again behind it."""
        memory = self.encode(source)
        target = torch.full((len(source), 1), start, device=source.device)
        for _ in range(most):
            new = self.decode(memory, source, target)[:, -1].argmax(1)
            target = torch.cat([target, torch.where((target == end).any(1), end, new)[:, None]], 1)
            if (target == end).any(1).all():
                break
        return target[:, 1:]

    def look(self, source: Tensor, target: Tensor) -> list[Tensor]:
        """Where each decoder block looks in the source, [B, H, T, S] each."""
        memory, maps = self.encode(source), []
        x, mask, seen = self.embed(target), self.decoder_bias(target.shape[1], target.shape[1], causal=True), _seen(source)
        for block in self.decoder:
            h, total = block.ln3(block.attn(block.ln1(x), mask=mask), x)
            maps.append(block.cross.weights(h, memory, seen))
            h, total = block.ln2(block.cross(h, memory, seen), total)
            x = total + block.ff(h)
        return maps


def _seen(tokens: Tensor) -> Tensor:
    """[B, 1, 1, S]: False where there is filling."""
    return (tokens != FILLING)[:, None, None]
