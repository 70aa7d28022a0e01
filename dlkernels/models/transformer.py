"""Transformers: every token looks at all others and takes from each as much as its key fits the token's query.

    attention   y = softmax(q kᵀ / √D) v          for each of H heads, with q, k, v = x W_q, m W_k, m W_v and m = x, or another sequence
    block       x = x + dropout(W_o attention(norm(x)))
                x = x + dropout(attention of the encoder's result)           in the decoder of an encoder-decoder alone
                x = x + dropout(W_2 gelu(W_1 norm(x)))

    x [B, T, C]    q, k, v [B, H, T, D], C = H D    scores [B, H, T, S] exist a tile at a time and never as a whole

causal      a token sees itself and what came before: the decoder, for writing (gpt.py)
otherwise   a token sees all that is not filling: the encoder, for understanding (bert.py); seq2seq.py has both

A token costs 24 C² flops for the products and 4 C T for the attention, so up to some 6 C tokens the products decide.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels.models.layers import check_sizes, fused, qkv
from dlkernels.nn import KVCache


def check_heads(d_model: int, n_heads: int) -> None:
    """Raises ``ValueError`` unless the heads share out ``d_model`` evenly."""
    check_sizes(d_model=d_model, n_heads=n_heads)
    if d_model % n_heads:
        raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")


class MultiHeadAttention(torch.nn.Module):
    """Several heads of attention side by side. x [B, T, C] -> [B, T, C].

    Args:
        causal: a token sees none that comes later.
        rotary: ``RotaryPositions`` for queries and keys, or None.
    """

    def __init__(
        self, d_model: int, n_heads: int, causal: bool = False, rotary: torch.nn.Module | None = None, nn: ModuleType = dlkernels.nn
    ) -> None:
        super().__init__()
        check_heads(d_model, n_heads)
        self.n_heads, self.d_k, self.causal, self.rotary, self.nn = n_heads, d_model // n_heads, causal, rotary, [nn]
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Attention of x [B, T, C] to itself, or to ``memory`` [B, S, C].

        Args:
            mask: boolean, True where a token may look, or a number to add; broadcastable to [B, H, T, S].
            cache: of the tokens before x; x is appended to it.
        """
        q, k, v = self.heads(x, memory, 0 if cache is None else cache.length)
        if cache is not None:
            k, v = cache.append(k, v)
        T, S, causal = q.shape[2], k.shape[2], self.causal and mask is None and memory is None
        if causal and T not in (1, S):
            from torch.nn.attention.bias import causal_lower_right  # takes a second, and only a cache needs it

            causal, mask = False, causal_lower_right(T, S)
        y = self.nn[0].functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and T == S)
        return self.W_o(y.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, memory: Tensor | None = None, start: int = 0) -> tuple[Tensor, ...]:
        """q [B, H, T, D], k and v [B, H, S, D]; the first token is at ``start``."""
        if memory is None:
            together = qkv(self.nn[0], x, (self.W_q, self.W_k, self.W_v), self.d_k, self.rotary, start)
            if together is not None:
                return together
        seen = x if memory is None else memory
        projected = ((self.W_q, x), (self.W_k, seen), (self.W_v, seen))
        q, k, v = (W(t).unflatten(-1, (self.n_heads, self.d_k)).transpose(1, 2) for W, t in projected)
        return (q, k, v) if self.rotary is None else (self.rotary(q, start), self.rotary(k, start), v)

    def weights(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """How much each token takes from each, [B, H, T, S]: the matrix that ``forward`` does without. To look at."""
        q, k, _ = self.heads(x, memory)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -math.inf)
        return self.nn[0].functional.softmax(scores, -1)


class TransformerBlock(torch.nn.Module):
    """Attention and a perceptron, each with a norm in front and a sum around it. x [B, T, C] -> [B, T, C].

    Parameters have the curriculum's names. Between the two parts, dropout, sum and norm are one kernel in dlkernels.

    Args:
        crossed: between the two, attention to ``memory``, the result of an encoder.
    """

    def __init__(
        self, d_model: int, n_heads: int, ff_dim: int, dropout: float = 0.1, causal: bool = False,
        rotary: torch.nn.Module | None = None, crossed: bool = False, nn: ModuleType = dlkernels.nn,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(d_model=d_model, ff_dim=ff_dim)
        self.attn = MultiHeadAttention(d_model, n_heads, causal, rotary, nn)
        self.cross = MultiHeadAttention(d_model, n_heads, nn=nn) if crossed else None
        hidden = fused(nn, "LinearGELU", d_model, ff_dim)
        self.ff = nn.Sequential(hidden, nn.Identity(), nn.Linear(ff_dim, d_model))  # where GELU was: the names stay
        self.ln1 = nn.LayerNorm(d_model)
        self.ln2 = fused(nn, "DropoutAddLayerNorm", d_model, dropout)
        self.ln3 = fused(nn, "DropoutAddLayerNorm", d_model, dropout) if crossed else None
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The masks are for ``MultiHeadAttention``: of x and of ``memory``."""
        h = self.attn(self.ln1(x), mask=mask, cache=cache)
        if self.cross is not None and self.ln3 is not None:
            h, x = self.ln3(h, x)
            h = self.cross(h, memory, memory_mask)
        h, x = self.ln2(h, x)
        return x + self.drop(self.ff(h))


def gpt_init(model: torch.nn.Module, blocks: int) -> None:
    """Weights [N, K] normal with deviation 1 / (2 √K), for 768 numbers GPT-2's 0.02 or so, and biases 0. What is added to the stream is
    divided by √(2 blocks), the number of sums, as GPT-2's is."""
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            sums = 2 * blocks if name.endswith(("W_o.weight", "ff.2.weight")) else 1
            torch.nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[-1] * sums))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
