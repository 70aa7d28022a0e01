"""The recurrent teaching models apart from their training, which test_models.py looks at, and the texts and series they learn from."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import dlkernels.nn
import dlkernels.optim
from dlkernels import data, data_text
from dlkernels.models.lstm import CharLM, Forecaster, GRUClassifier, LSTMClassifier
from dlkernels.models.mlp import parameter_count
from dlkernels.train import train
from dlkernels.train.batches import Batches

classifiers = pytest.mark.parametrize("make", [LSTMClassifier, GRUClassifier])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def padded(lengths: list[int], filling: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    return torch.stack([torch.where(torch.arange(len(row)) < length, row, filling) for row, length in zip(x, lengths)])


@classifiers
def test_with_lengths_the_filling_does_not_matter(make: type[LSTMClassifier]) -> None:
    """A row of a batch is what it is alone, in training as well, and no gradient reaches what it is filled with."""
    torch.manual_seed(0)
    model, lengths = make(50, 6, 5, 3, dropout=0.0).double(), [4, 9, 1, 6]
    with_zeros, with_sevens = (model(padded(lengths, filling), torch.tensor(lengths)) for filling in (0, 7))
    assert torch.equal(with_zeros, with_sevens)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(with_zeros[i], model(padded(lengths)[i : i + 1, :length])[0], rtol=0, atol=1e-14)
    without = model(padded(lengths))
    torch.testing.assert_close(without[1], with_zeros[1], rtol=0, atol=1e-14)  # the longest has no filling
    assert (without[2] - with_zeros[2]).abs().max() > 1e-6
    model(padded(lengths, 49), torch.tensor(lengths)).sum().backward()
    used = set(torch.cat([row[:length] for row, length in zip(padded(lengths), lengths)]).tolist())
    assert set(model.embed.weight.grad.abs().sum(1).nonzero().flatten().tolist()) <= used


@classifiers
def test_the_last_states_are_the_ends_of_both_ways(make: type[LSTMClassifier]) -> None:
    model, x = make(50, 6, 5, 3, n_layers=1).eval(), padded([7, 7])
    y, _ = getattr(model, make.layer.lower())(model.embed(x))
    torch.testing.assert_close(model(x), model.fc(torch.cat([y[:, -1, :5], y[:, 0, 5:]], 1)))
    assert model.embed(torch.zeros(1, dtype=torch.int64)).abs().max() == 0


def test_it_is_the_curriculums_classifier() -> None:
    """Names, shapes and number of parameters: embed, lstm in two layers of two directions, fc."""
    shapes = {name: tuple(p.shape) for name, p in LSTMClassifier(100, 8, 16, 4).named_parameters()}
    assert (shapes["embed.weight"], shapes["fc.weight"]) == ((100, 8), (4, 32))
    assert (shapes["lstm.weight_ih_l0"], shapes["lstm.weight_ih_l1_reverse"]) == ((64, 8), (64, 32))
    assert len(shapes) == 1 + 16 + 2
    recurrent = [parameter_count(model) - 100 * 8 - 4 * 33 for model in (GRUClassifier(100, 8, 16, 4), LSTMClassifier(100, 8, 16, 4))]
    assert recurrent[0] * 4 == recurrent[1] * 3


def test_bad_sizes_are_named() -> None:
    cases = ((LSTMClassifier, (50, 0, 5, 3), "emb_dim"), (CharLM, (50, 4, -1), "hidden"), (Forecaster, (0, 4), "channels"))
    for make, sizes, name in cases:
        with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
            make(*sizes)


def test_a_text_read_in_parts_is_read_as_a_whole() -> None:
    torch.manual_seed(0)
    model, x = CharLM(97, 8, 12, n_layers=2).double(), padded([20, 20])
    first, state = model.read(x[:, :7])
    second, _ = model.read(x[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), model(x), rtol=0, atol=1e-14)
    changed = x.clone()
    changed[:, 12:] = 3
    assert torch.equal(model(x)[:, :12], model(changed)[:, :12])  # it does not look ahead


def test_it_writes_what_it_has_learned() -> None:
    """A model that has learned 4 lines by heart goes on with them at a low temperature."""
    torch.manual_seed(0)
    text = data_text.encode("The quick brown fox jumps.\n" * 4)
    model = CharLM(97, 16, 48)
    optimizer = dlkernels.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:]).backward()
        optimizer.step()
    written = data_text.decode(model.write(data_text.encode("The quick"), 18, temperature=0.1).tolist())
    assert written == " brown fox jumps.\n"


def test_docstrings_are_fixed_and_nothing_is_learned_and_judged() -> None:
    split, words = data_text.docstrings(), data_text.vocabulary()
    assert split.x_train.shape == (2160, 40) and split.x_val.shape[1] == 40
    assert split.y_train.bincount().tolist() == [720] * 3 and split.y_val.bincount().min() >= 100
    assert len(words) == len(set(words)) == data_text.WORDS and words[:2] == ["<pad>", "<unknown>"]
    assert split.x_train.max() == data_text.WORDS - 1 and split.x_val.max() < data_text.WORDS
    for x in (split.x_train, split.x_val):
        assert (x[:, :10] != data_text.PAD).all()
        assert ((x == data_text.PAD).long().diff(dim=1) >= 0).all()  # filled up at the end only
        assert (x == data_text.UNKNOWN).double().mean() < 0.15
    beginnings = {tuple(row[:8].tolist()) for row in split.x_train if data_text.UNKNOWN not in row[:8]}
    assert not any(tuple(row[:8].tolist()) in beginnings for row in split.x_val)
    data_text._docstrings.cache_clear()
    assert torch.equal(data_text.docstrings().x_val, split.x_val)


def test_characters_are_the_next_ones_and_come_from_other_topics() -> None:
    split = data_text.characters()
    assert split.x_train.shape == (1000, 64) and split.x_val.shape == (200, 64)
    assert torch.equal(split.x_train[:, 1:], split.y_train[:, :-1])
    learned = {data_text.decode(row.tolist()) for row in split.x_train}
    assert not any(data_text.decode(row.tolist()) in learned for row in split.x_val)
    assert data_text.decode(data_text.encode("def f(x):\n    return x²").tolist()) == "def f(x):\n    return x\0"
    assert "the" in data_text.decode(split.x_val.flatten().tolist())


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data.eeg.cache_clear()
    with pytest.raises(ImportError, match=r"pip install dlkernels\[course\]"):
        data.eeg()


def forecast_losses(nn: Any, dtype: torch.dtype, epochs: int) -> tuple[Tensor, torch.nn.Module]:
    split = data.eeg().to("cpu", dtype)
    torch.manual_seed(0)
    model = Forecaster(4, 32, nn=nn).to(dtype)
    optimizer = (torch.optim if nn is torch.nn else dlkernels.optim).AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    losses = []
    batches = Batches(split.x_train, split.y_train.to(dtype), 32)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses), model


def test_the_forecast_is_natives_and_better_than_the_last_value() -> None:
    pytest.importorskip("matplotlib")
    ours, native = (forecast_losses(nn, torch.float64, 2)[0] for nn in (dlkernels.nn, torch.nn))
    torch.testing.assert_close(ours, native, rtol=1e-9, atol=1e-9)
    split, model = data.eeg(), forecast_losses(dlkernels.nn, torch.float32, 10)[1]
    assert split.x_val.shape == (180, 20, 4)
    assert torch.equal(split.x_train[1:, -1], split.y_train[:-1])
    with torch.no_grad():
        error = (model(split.x_val) - split.y_val).square().mean()
    assert error < 0.85 * (split.x_val[:, -1] - split.y_val).square().mean()


def test_dropout_between_layers_counts_as_random() -> None:
    assert train("lstm", epochs=0, progress=False).random_layers
    assert not train("char_lm", epochs=0, progress=False).random_layers


def test_token_numbers_stay_whole_numbers() -> None:
    rows = torch.zeros(2, 3), torch.zeros(2).long()
    for x, dtype in ((rows[0], torch.float64), (rows[0].long(), torch.int64)):
        split = data.Split(x, rows[1], x, rows[1]).to("cpu", torch.float64)
        assert (split.x_train.dtype, split.x_val.dtype, split.y_val.dtype) == (dtype, dtype, torch.int64)
