"""A residual network: every block adds a correction to its input, so that a deep network is at worst a shallow one. arXiv:1512.03385.

    block    y = relu(x' + batch_norm(relu(batch_norm(x ⋆ W1)) ⋆ W2))
    x'       x itself, or batch_norm(x ⋆ W) with a 1 x 1 filter and the block's stride where the sizes differ

The sum hands dy on to x unchanged, whatever the filters are: gradients reach the first layer of any depth. Convolutions have no bias,
since batch_norm would subtract it again.

Parameters have the names that torchvision gives them, so its checkpoints load: ``ResNet()`` is its resnet18.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels import data
from dlkernels.models.layers import allow_winograd, check_sizes, fused, he_init, random_batch
from dlkernels.models.spec import ModelSpec


class BasicBlock(torch.nn.Module):
    """Two 3 x 3 convolutions and what they are added to. x [N, C, H, W] -> [N, O, H / stride, W / stride], rounded up."""

    def __init__(self, C: int, O: int, stride: int = 1, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, O, 3, stride, padding=1, bias=False)
        self.bn1 = fused(nn, "BatchNormReLU2d", O)
        self.conv2 = nn.Conv2d(O, O, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(O)
        same = stride == 1 and C == O
        self.downsample = None if same else nn.Sequential(nn.Conv2d(C, O, 1, stride, bias=False), nn.BatchNorm2d(O))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + shortcut)


class ResNet(torch.nn.Module):
    """A stem, four stages of blocks, an average over the image, one Linear. x [N, in_channels, H, W] -> logits [N, num_classes].

    Args:
        blocks: how many each stage has; the last three stages halve height and width. (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.
        width: channels of the stem and the first stage; every further stage has twice as many.
    """

    def __init__(
        self, blocks: Sequence[int] = (2, 2, 2, 2), num_classes: int = 1000, in_channels: int = 3, width: int = 64,
        nn: ModuleType = dlkernels.nn,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(blocks=blocks, num_classes=num_classes, in_channels=in_channels, width=width)
        if len(blocks) != 4:
            raise ValueError(f"blocks must have a number for each of the four stages, got {list(blocks)}")
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = fused(nn, "BatchNormReLU2d", width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(blocks[0], width, width, 1, nn)
        self.layer2 = _stage(blocks[1], width, 2 * width, 2, nn)
        self.layer3 = _stage(blocks[2], 2 * width, 4 * width, 2, nn)
        self.layer4 = _stage(blocks[3], 4 * width, 8 * width, 2, nn)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        he_init(self)
        allow_winograd(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(depth: int, C: int, O: int, stride: int, nn: ModuleType) -> torch.nn.Module:
    return nn.Sequential(BasicBlock(C, O, stride, nn), *(BasicBlock(O, O, nn=nn) for _ in range(depth - 1)))


SPECS = [
    ModelSpec(
        name="resnet",
        title="four stages of one residual block, 16 to 128 channels, face or not, 25x25, batch 10",
        build=lambda nn: ResNet((1, 1, 1, 1), num_classes=2, in_channels=1, width=16, nn=nn),
        batch=lambda: random_batch((10, 1, 25, 25), 2),
        data=data.faces,
        epochs=10,
        batch_size=10,
        lr=2e-3,
        weight_decay=0.1,
    ),
]
