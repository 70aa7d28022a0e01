"""Recurrent networks: one token at a time, with a state that carries on what was read so far.

    embedding    x_t = table[token_t]                                        a vector for every word, learned; the filling's stays 0
    layer        h_t, c_t = LSTM(x_t, h_{t-1}, c_{t-1})                      or h_t = GRU(x_t, h_{t-1}); see dlkernels/ops/recurrent.py
    classifier   logits = W [h_T of the way forth, h_1 of the way back] + b  the last states of the upper layer's two directions
    language     logits_t = W h_t + b                                        the next character, at every place
    forecast     y = W h_T + b                                               the next number of a series

    tokens [B, T]    x [B, T, E]    h, c [B, H]

A step waits for the one before, so the time of a sequence grows with T whatever the machine; what can be done at once is the product of
all x_t with their weights, and the batch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels.nn
from dlkernels import data_text
from dlkernels.models.layers import check_sizes, next_token_loss
from dlkernels.models.spec import ModelSpec


class LSTMClassifier(torch.nn.Module):
    """Embedding, LSTM in both directions, Linear on the last states. Tokens [B, T], 0 where a text is filled up -> logits [B, n_classes].

    Without ``lengths`` the network reads the filling too, and has to learn to pass over it. With ``lengths`` [B] it stops at each text's
    end, and starts there on its way back: the result does not depend on the filling, and no work is done for it.
    """

    layer: ClassVar[str] = "LSTM"

    def __init__(
        self, vocab_size: int, emb_dim: int, hidden: int, n_classes: int, n_layers: int = 2, dropout: float = 0.3,
        nn: ModuleType = dlkernels.nn,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(vocab_size=vocab_size, emb_dim=emb_dim, hidden=hidden, n_classes=n_classes, n_layers=n_layers)
        self.embed = nn.Embedding(vocab_size, emb_dim, padding_idx=0)
        options = {"batch_first": True, "bidirectional": True, "dropout": dropout if n_layers > 1 else 0.0}  # it acts between layers
        self.add_module(self.layer.lower(), getattr(nn, self.layer)(emb_dim, hidden, n_layers, **options))
        self.fc = nn.Linear(2 * hidden, n_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        read: Any = self.embed(x)
        if lengths is not None:
            read = pack_padded_sequence(read, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, last = getattr(self, self.layer.lower())(read)
        h = last[0] if isinstance(last, tuple) else last  # [layers * 2, B, H]; an LSTM's comes with c
        return self.fc(torch.cat([h[-2], h[-1]], dim=1))


class GRUClassifier(LSTMClassifier):
    """The same with a GRU: three products per unit where an LSTM has four, and no cell state beside h."""

    layer: ClassVar[str] = "GRU"


class CharLM(torch.nn.Module):
    """What the next character is, at every place. Characters [B, T] -> logits [B, T, V], each from what stands up to its place."""

    def __init__(self, vocab_size: int, emb_dim: int, hidden: int, n_layers: int = 1, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, emb_dim=emb_dim, hidden=hidden, n_layers=n_layers)
        self.embed = nn.Embedding(vocab_size, emb_dim)
        self.lstm = nn.LSTM(emb_dim, hidden, n_layers, batch_first=True)
        self.fc = nn.Linear(hidden, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)[0]

    def read(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits [B, T, V] and the state after the last character, with which the next call goes on."""
        h, state = self.lstm(self.embed(x), state)
        return self.fc(h), state

    @torch.no_grad()
    def write(self, x: Tensor, count: int, temperature: float = 1.0) -> Tensor:
        """``count`` further characters [count] after x [T], drawn by probability; the likelier ones more often below temperature 1."""
        logits, state = self.read(x[None])
        found = []
        for _ in range(count):
            p = torch.softmax(logits[:, -1] / temperature, dim=1)
            found.append(torch.multinomial(p, 1))
            logits, state = self.read(found[-1], state)
        return torch.cat(found, dim=1)[0]


class Forecaster(torch.nn.Module):
    """The next numbers of some series, from the last T of each. x [B, T, C] -> y [B, C]."""

    def __init__(self, channels: int, hidden: int, n_layers: int = 1, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        check_sizes(channels=channels, hidden=hidden, n_layers=n_layers)
        self.lstm = nn.LSTM(channels, hidden, n_layers, batch_first=True)
        self.fc = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1] + self.fc(self.lstm(x)[0][:, -1])  # what changes is learned, what stays is given


def _random_tokens(*sizes: int, tokens: int, classes: int = 0) -> tuple[Tensor, Tensor]:
    """(x, y) of which nothing can be learned, always the same; y one of ``classes`` for each row, or else a token for each place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, tokens, sizes, generator=generator)
    return x, torch.randint(classes or tokens, sizes[:1] if classes else sizes, generator=generator)


def _classifier(name: str, kind: type[LSTMClassifier]) -> ModelSpec:
    return ModelSpec(
        name=name,
        title=f"2000x32, two layers {kind.layer} 32 in both directions, 64-3, docstrings of Python, numpy or torch, 40 words, batch 64",
        build=lambda nn: kind(data_text.WORDS, 32, 32, len(data_text.LIBRARIES), nn=nn),
        batch=lambda: _random_tokens(64, 40, tokens=data_text.WORDS, classes=len(data_text.LIBRARIES)),
        data=data_text.docstrings,
        epochs=6,
        lr=1e-2,
        weight_decay=1.0,
    )


SPECS = [
    _classifier("lstm", LSTMClassifier),
    _classifier("gru", GRUClassifier),
    ModelSpec(
        name="char_lm",
        title="97x32, LSTM 96, 96-97, the next character of Python's language reference, 64 characters, batch 32",
        build=lambda nn: CharLM(len(data_text.ALPHABET), 32, 96, nn=nn),
        batch=lambda: _random_tokens(32, 64, tokens=len(data_text.ALPHABET)),
        data=data_text.characters,
        loss=next_token_loss,
        epochs=8,
        batch_size=32,
        lr=1e-2,
        weight_decay=0.01,
    ),
]
