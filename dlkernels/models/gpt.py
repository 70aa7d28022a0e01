"""GPT: a stack of causal blocks that says at every place how likely each token is to come next, and so can write. Radford et al. 2019.

    x       = table[token]                        + positions, or rotary positions within each head
    x       = block(x)                            several; each place sees what stands before it
    logits  = norm(x) tableᵀ + b                  the same table: the tokens that follow are those whose vectors x is like

    tokens [B, T]    x [B, T, C]    logits [B, T, V]

While writing, the keys and values of what is there are kept, so that a further token costs one row of every product and not T.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels import data_text
from dlkernels.models.layers import check_sizes, fused, next_token_loss
from dlkernels.models.spec import ModelSpec
from dlkernels.models.transformer import TransformerBlock, check_heads, gpt_init
from dlkernels.nn import KVCache

POSITIONS = ("rope", "learned", "sinusoidal", "none")


class GPT(torch.nn.Module):
    """Tokens int64 [B, T], T up to ``context`` -> logits [B, T, vocab_size] of the token after each.

    Args:
        positions: "rope", "learned", "sinusoidal" or "none".

    Raises:
        ValueError: a size or ``positions`` is not as above; there are more than ``context`` tokens. IndexError: a token is not in the
            vocabulary.
    """

    def __init__(
        self, vocab_size: int, context: int, d_model: int = 384, n_heads: int = 6, n_layers: int = 6, dropout: float = 0.1,
        positions: str = "rope", nn: ModuleType = dlkernels.nn,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(vocab_size=vocab_size, context=context, n_layers=n_layers)
        check_heads(d_model, n_heads)
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}; got {positions!r}")
        self.context = context
        self.embed = nn.Embedding(vocab_size, d_model)
        self.positions = positions_layer(positions, context, d_model)
        rotary = fused(nn, "RotaryPositions", d_model // n_heads) if positions == "rope" else None
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, 4 * d_model, dropout, causal=True, rotary=rotary, nn=nn) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)
        self.head.weight = self.embed.weight
        gpt_init(self, n_layers)

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """With ``caches``, one for every block, ``tokens`` follow those that the caches have seen."""
        return self.head(self.features(tokens, caches))

    def features(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """What the last layer sees, [B, T, C]."""
        start = caches[0].length if caches else 0
        if start + tokens.shape[1] > self.context:
            raise ValueError(f"tokens are {start + tokens.shape[1]} in all, needs at most the context, {self.context}")
        x = self.drop(self.positions(self.embed(tokens), start))
        for i, block in enumerate(self.blocks):
            x = block(x, cache=caches[i] if caches else None)
        return self.norm(x)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """``tokens`` [B, T] or [T] with ``count`` further ones behind them, drawn by their probability. In evaluation mode.

        Args:
            temperature: below 1 the likelier tokens are taken more often, at 0 always the likeliest; see also ``choose``.

        Raises:
            ValueError: there is no token to begin with, or all of them are more than ``context``; an option is out of range.
        """
        rows = tokens if tokens.dim() == 2 else tokens[None]
        T = rows.shape[1]
        if not T or count < 0 or T + count > self.context:
            raise ValueError(f"the prompt has {T} tokens and {count} are to follow; needs at least 1, and at most {self.context} in all")
        was_training = self.training
        self.eval()
        try:
            caches = [KVCache(T + count) for _ in self.blocks]
            text, new = rows.new_empty(len(rows), T + count), rows
            text[:, :T] = rows
            for t in range(T, T + count):
                logits = self.head(self.features(new, caches)[:, -1])
                new = text[:, t : t + 1] = choose(logits, temperature, top_k, top_p, generator)
        finally:
            self.train(was_training)
        return text if tokens.dim() == 2 else text[0]


class _Unchanged(torch.nn.Module):
    """No positions are added: they are in the heads, or nowhere."""

    def forward(self, x: Tensor, start: int) -> Tensor:
        return x


def positions_layer(positions: str, context: int, d_model: int) -> torch.nn.Module:
    """What adds positions of this kind to the embeddings."""
    if positions == "learned":
        return dlkernels.nn.LearnedPositions(context, d_model)
    return dlkernels.nn.SinusoidalPositions(d_model, scale=d_model**0.5) if positions == "sinusoidal" else _Unchanged()


def choose(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """A token for every row of logits [B, V], [B, 1].

    Args:
        temperature: the logits are divided by it; 0 takes the largest.
        top_k: only the k likeliest are drawn from. top_p: only the likeliest that together have at least this probability.

    Raises:
        ValueError: an option is out of range.
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"temperature, top_k and top_p are {temperature}, {top_k} and {top_p}; "
            "needs a number from 0 on, None or an integer from 1 on, None or a probability above 0"
        )
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    p, order = torch.softmax(logits.double() / temperature, 1).sort(1, descending=True)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        p[p.cumsum(1) - p >= top_p * p.sum(1, keepdim=True)] = 0
    return order.gather(1, torch.multinomial(p, 1, generator=generator))


def _random_tokens(B: int, T: int, V: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(V, (B, T), generator=generator), torch.randint(V, (B, T), generator=generator)


SPECS = [
    ModelSpec(
        name="gpt",
        title="97x64, 2 blocks of 4 heads, rotary positions, the next character of Python's language reference, 64 characters, batch 32",
        build=lambda nn: GPT(len(data_text.ALPHABET), 256, 64, 4, 2, dropout=0.0, nn=nn),
        batch=lambda: _random_tokens(32, 64, len(data_text.ALPHABET)),
        data=data_text.characters,
        loss=next_token_loss,
        epochs=8,
        batch_size=32,
        lr=5e-3,
        weight_decay=0.1,
    ),
]
