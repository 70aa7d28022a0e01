"""What the Transformers among the teaching models can learn: a text by heart, to sort, to read dates, an order of words."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import SMALL, threads
from torch import Tensor

import dlkernels.nn
import dlkernels.optim as optim
from dlkernels import data_dates, data_text
from dlkernels.models.bert import BERTClassifier
from dlkernels.models.gpt import GPT
from dlkernels.models.layers import next_token_loss
from dlkernels.models.seq2seq import EncoderDecoder

pytestmark = pytest.mark.skipif(SMALL, reason="what the kernels compute is tested op by op; here it is how they are put together")
V = 11


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with threads(1):
        yield


def fit(model: torch.nn.Module, loss_of: Any, steps: int, lr: float) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def test_a_gpt_learns_by_heart_and_writes_it_down() -> None:
    text = data_text.encode("for the way of a name is bound in the block where it is assigned to.\n")
    model = GPT(len(data_text.ALPHABET), 128, 32, 2, 1, 0.0)
    fit(model, lambda: next_token_loss(dlkernels.nn)(model(text[None, :-1]), text[None, 1:]), 120, 1e-2)
    assert data_text.decode(model.generate(text[:4], len(text) - 4, temperature=0)) == data_text.decode(text)


def test_an_encoder_decoder_learns_to_sort() -> None:
    model = EncoderDecoder(V, 32, 4, 1, furthest=8)
    generator = torch.Generator().manual_seed(0)

    def batch(M: int) -> tuple[Tensor, Tensor]:
        x = 3 + torch.rand(M, V - 3, generator=generator).argsort(1)[:, :5]
        return x, torch.cat([torch.full((M, 1), 1), x.sort(1).values, torch.full((M, 1), 2)], 1)

    def loss() -> Tensor:
        x, y = batch(64)
        return next_token_loss(dlkernels.nn)(model(x, y[:, :-1]), y[:, 1:])

    fit(model, loss, 150, 1e-2)
    x, y = batch(200)
    assert (model.eval().translate(x, 1, 2, 8) == y[:, 1:]).all(1).double().mean() > 0.9


@pytest.mark.slow
def test_an_encoder_decoder_learns_to_read_dates() -> None:
    """Written in four ways, of days that it has not seen. (All ways take a thousand steps.)"""
    model, generator = EncoderDecoder(len(data_dates.ALPHABET), 48, n_layers=1), torch.Generator().manual_seed(0)
    source, target = data_dates.pairs(8000, formats=4)

    def loss() -> Tensor:
        some = torch.randint(len(source), (48,), generator=generator)
        return next_token_loss(dlkernels.nn)(model(source[some], target[some, :-1]), target[some, 1:])

    fit(model, loss, 400, 1e-2)
    x, y = data_dates.pairs(300, 1, held_out=True, formats=4)
    found = model.eval().translate(x, data_dates.START, data_dates.END, 12)
    assert sum(data_dates.decode(a) == data_dates.decode(b) for a, b in zip(found, y)) > 270


def test_bert_learns_which_word_comes_first() -> None:
    """Whether a 5 stands before a 7: no bag of words tells."""
    model = BERTClassifier(V, 8, 2, 32, 4, 1, 0.0)
    generator = torch.Generator().manual_seed(0)

    def batch(M: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(8, V, (M, 6), generator=generator)
        first, second = torch.rand(M, 6, generator=generator).topk(2, 1).indices.sort(1).values.unbind(1)
        y = torch.randint(2, (M,), generator=generator)
        x[torch.arange(M), first], x[torch.arange(M), second] = 7 - 2 * y, 5 + 2 * y
        return x, y

    def loss() -> Tensor:
        x, y = batch(64)
        return torch.nn.functional.cross_entropy(model(x), y)

    fit(model, loss, 150, 1e-2)
    x, y = batch(200)
    assert (model(x).argmax(1) == y).double().mean() > 0.95


def test_dates() -> None:
    sources, targets = data_dates.dates(500)
    held = set(data_dates.dates(500, held_out=True)[1])
    assert len(set(targets)) > 450 and not held & set(targets)
    assert all("1969-01-01" <= day <= "2068-12-31" for day in {*targets, *held})
    source, target = data_dates.pairs(500)
    assert [data_dates.decode(row) for row in source] == sources and [data_dates.decode(row) for row in target] == targets
    assert (target[:, 0] == data_dates.START).all() and (target == data_dates.END).any(1).all()
    day = datetime.date(2004, 3, 9)
    assert {data_dates.written(day, form) for form in data_dates.FORMATS} >= {
        "9 March 2004", "Tuesday, March 9, 2004", "Tue 9 Mar 2004", "03/09/04", "20040309", "the 9. of March '04", "9.3.04",
    }  # fmt: skip
