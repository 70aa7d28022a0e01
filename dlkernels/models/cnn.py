"""A convolutional network: a small filter slid over the image finds the same pattern wherever it lies.

    block        h = max_pool(relu(batch_norm(x ⋆ W + b)))             twice; each halves height and width
    last block   h = average(relu(batch_norm(x ⋆ W + b))) to 4 x 4     whatever the size of the image was
    classifier   logits = W2 dropout(relu(W1 h + b1)) + b2             as in the perceptron, for 16 numbers of every channel

    x [N, C, H, W]    filters W [O, C, 3, 3]    a result has (in + 2 padding - filter) / stride + 1 places each way: H and W for 3 x 3

A filter has 9 C weights for all places, where a Linear over the image would have C H W for each; so there are few weights and much
arithmetic: 2 N H W O C 9 flops forward and twice that backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels import data
from dlkernels.models.layers import allow_winograd, check_sizes, fused, he_init, random_batch
from dlkernels.models.spec import ModelSpec


class CNN(torch.nn.Module):
    """Convolution, BatchNorm, ReLU, pooling for every width, then two Linear layers. x [N, in_channels, H, W] -> logits [N, num_classes].

    Height and width are what the pooling between the blocks leaves at least 1 of: 4 or more for three widths.
    """

    def __init__(
        self, in_channels: int = 3, num_classes: int = 10, widths: Sequence[int] = (32, 64, 128), hidden: int = 256, dropout: float = 0.5,
        nn: ModuleType = dlkernels.nn,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(in_channels=in_channels, num_classes=num_classes, widths=widths, hidden=hidden)
        blocks: list[torch.nn.Module] = []
        for C, O in pairwise([in_channels, *widths]):
            blocks += [nn.Conv2d(C, O, 3, padding=1), fused(nn, "BatchNormReLU2d", O), nn.MaxPool2d(2)]
        blocks[-1] = nn.AdaptiveAvgPool2d(4)
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(
            nn.Flatten(), fused(nn, "LinearReLU", widths[-1] * 4 * 4, hidden), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
        )
        he_init(self)
        allow_winograd(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


SPECS = [
    ModelSpec(
        name="cnn",
        title="1-32-64-128, three blocks Conv+BatchNorm+ReLU+Pool, then 2048-256-10, digits on MNIST's canvas, batch 64",
        build=lambda nn: CNN(in_channels=1, nn=nn),
        batch=lambda: random_batch((64, 1, 28, 28), 10),
        data=data.digits_images,
        epochs=10,
        lr=1e-3,
        weight_decay=0.1,
    ),
]
