"""What lesson 11 trains on and with: the adding problem, docstrings, characters; an LSTM step by step, as it is defined."""

from __future__ import annotations

import copy
from itertools import islice

import torch
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.data_text import LIBRARIES, characters, docstrings
from dlkernels.train import Batches

HIDDEN, BATCH = 32, 64


def unroll(layer: nn.LSTM, x: Tensor, which: str = "l0") -> dict[str, Tensor]:
    """Gates i, f, o, candidate g, cell c and state h, each [T, H], of one layer and direction over x [T, I]: the definition."""
    W, U, b, d = (getattr(layer, f"{name}_{which}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = torch.zeros(U.shape[1])
    seen: dict[str, list[Tensor]] = {name: [] for name in "ifgoch"}
    for x_t in x:
        i, f, g, o = (W @ x_t + b + U @ h + d).chunk(4)
        i, f, o, g = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o), torch.tanh(g)
        c = f * c + i * g
        h = o * torch.tanh(c)
        for name, value in zip("ifgoch", (i, f, g, o, c, h)):
            seen[name].append(value)
    return {name: torch.stack(values) for name, values in seen.items()}


def layer_of(kind: str, inputs: int = 2) -> torch.nn.Module:
    """``RNN``, ``GRU``, ``LSTM``, or ``LSTM, f open``: one whose forget gates are 0.88 where nothing is known yet."""
    layer = getattr(nn, kind.split(",")[0])(inputs, HIDDEN, batch_first=True)
    if kind.endswith("f open"):
        with torch.no_grad():
            layer.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 2.0  # the order is i, f, g, o
            layer.bias_hh_l0[HIDDEN : 2 * HIDDEN] = 0.0
    return layer


def adding(length: int, generator: torch.Generator, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """Numbers between 0 and 1, of which two are marked, one in each half, x [rows, length, 2]; y [rows, 1] is the sum of these two."""
    numbers, marks, half = torch.rand(rows, length, generator=generator), torch.zeros(rows, length), length // 2
    for low, high in ((0, half), (half, length)):
        marks[torch.arange(rows), torch.randint(low, high, (rows,), generator=generator)] = 1
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)


def learn_to_add(kind: str, length: int, steps: int, seed: int) -> tuple[list[float], torch.nn.Module, torch.nn.Module]:
    """(mean squared error at every step, the layer, the Linear behind it); every step sees new rows."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layer, linear = layer_of(kind), nn.Linear(HIDDEN, 1)
    parameters = [*layer.parameters(), *linear.parameters()]
    optimizer = optim.Adam(parameters, lr=1e-2)
    errors = []
    for _ in range(steps):
        x, y = adding(length, generator)
        loss = F.mse_loss(linear(layer(x)[0][:, -1]), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        errors.append(loss.item())
    return errors, layer, linear


def gradient_by_distance(layer: torch.nn.Module, length: int = 60) -> Tensor:
    """Size of d h_T / d x_t for every t, [length], in the mean of 64 rows of noise; the last number is that of distance 0."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, length, layer.input_size, generator=generator).requires_grad_()
    direction = torch.randn(64, layer.hidden_size, generator=generator)  # a random one in place of a loss
    (layer(x)[0][:, -1] * direction).sum().backward()
    return x.grad.norm(dim=2).mean(0)


def lengths_of(x: Tensor) -> Tensor:
    return (x != 0).sum(1)


def train_classifier(model: torch.nn.Module, epochs: int, seed: int, lengths: bool) -> float:
    """Trains on the docstrings and returns the accuracy on those held out."""
    split = docstrings()
    batches = Batches(split.x_train, split.y_train, BATCH, seed=seed)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for x, y in batches:
            loss = F.cross_entropy(model(x, lengths_of(x)) if lengths else model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    return hits(model, split.x_val, split.y_val, lengths)


@torch.no_grad()
def hits(model: torch.nn.Module, x: Tensor, y: Tensor, lengths: bool) -> float:
    return ((model(x, lengths_of(x)) if lengths else model(x)).argmax(1) == y).double().mean().item()


def hits_of_half(model: torch.nn.Module, way: str, lengths: bool) -> float:
    """Accuracy on the held-out docstrings where the last Linear is given the state of one way only, ``forth`` or ``back``."""
    half = copy.deepcopy(model)
    with torch.no_grad():
        half.fc.weight.view(len(LIBRARIES), 2, -1)[:, 1 if way == "forth" else 0] = 0
    split = docstrings()
    return hits(half, split.x_val, split.y_val, lengths)


def shuffled(x: Tensor) -> Tensor:
    """The same words of every text in another order; what it is filled up with stays at the end."""
    keys = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)).masked_fill(x == 0, 2)
    return x.gather(1, keys.argsort(1))


class Reader(torch.nn.Module):
    """Which character stands at a place? From what is before it, behind it, or both: logits [B, T - 2, V] for places 1 to T - 2."""

    def __init__(self, sees: str, hidden: int, vocabulary: int = 97) -> None:
        super().__init__()
        self.sees = sees
        self.embed = nn.Embedding(vocabulary, 24)
        self.lstm = nn.LSTM(24, hidden, batch_first=True, bidirectional=sees == "both sides")
        self.fc = nn.Linear(hidden * (2 if sees == "both sides" else 1), vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x)
        if self.sees == "what follows":
            return self.fc(self.lstm(e.flip(1))[0].flip(1)[:, 2:])
        h = self.lstm(e)[0]
        if self.sees == "what precedes":
            return self.fc(h[:, :-2])
        before, behind = h.chunk(2, dim=2)
        return self.fc(torch.cat([before[:, :-2], behind[:, 2:]], dim=2))  # neither has read the place itself


def train_reader(sees: str, hidden: int, steps: int) -> tuple[Reader, list[float], float]:
    """(the trained reader, its loss at every step, its accuracy on held-out topics)."""
    torch.manual_seed(0)
    split, model = characters(), Reader(sees, hidden)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches, losses = Batches(split.x_train, split.y_train, 32), []
    while len(losses) < steps:
        batches.set_epoch(len(losses))
        for x, _ in islice(batches, steps - len(losses)):
            loss = F.cross_entropy(model(x).flatten(0, 1), x[:, 1:-1].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    with torch.no_grad():
        right = model(split.x_val).argmax(2) == split.x_val[:, 1:-1]
    return model, losses, right.double().mean().item()
