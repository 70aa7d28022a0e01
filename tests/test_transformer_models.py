"""The Transformers among the teaching models: what they compute and how they write. What they learn is in test_transformers_learn.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import SMALL, threads
from torch import Tensor

import dlkernels.nn
from dlkernels.models.bert import BERTClassifier
from dlkernels.models.gpt import GPT, POSITIONS, choose
from dlkernels.models.layers import TWINS, fused
from dlkernels.models.seq2seq import EncoderDecoder, RelativeBias
from dlkernels.models.transformer import MultiHeadAttention, TransformerBlock

pytestmark = pytest.mark.skipif(SMALL, reason="what the kernels compute is tested op by op; here it is how they are put together")
V, CONTEXT = 11, 16
SIZES: dict[str, Any] = {"d_model": 16, "n_heads": 2, "n_layers": 2, "dropout": 0.0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with threads(1):
        yield


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(1))


def in_both_worlds(build: Any) -> list[Any]:
    models = []
    for nn in (dlkernels.nn, torch.nn):
        torch.manual_seed(0)
        models.append(build(nn).double())
        for p in models[-1].parameters():  # biases start at 0
            torch.nn.init.normal_(p, std=0.3)
    return models


MODELS: dict[str, Any] = {
    **{f"gpt {p}": (lambda nn, p=p: GPT(V, CONTEXT, positions=p, nn=nn, **SIZES), (tokens(3, 7),)) for p in POSITIONS},
    "bert": (lambda nn: BERTClassifier(V, CONTEXT, 3, nn=nn, **SIZES), (tokens(3, 7) * (torch.arange(7) < torch.tensor([[7], [3], [5]])),)),
    "seq2seq": (lambda nn: EncoderDecoder(V, nn=nn, furthest=3, **SIZES), (tokens(3, 7) * (torch.arange(7) < 5), tokens(3, 4))),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_text_in_two_worlds(name: str) -> None:
    """Same parameters, values and gradients."""
    build, inputs = MODELS[name]
    ours, native = in_both_worlds(build)
    assert [*ours.state_dict()] == [*native.state_dict()]
    found = []
    for model in (ours, native):
        y = model(*inputs)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        found.append([y, *(p.grad for p in model.parameters())])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


class Curriculum(torch.nn.Module):
    """The block as the curriculum writes it."""

    def __init__(self, d: int, heads: int, ff: int) -> None:
        super().__init__()
        self.attn = torch.nn.ModuleDict({f"W_{name}": torch.nn.Linear(d, d) for name in "qkvo"})
        self.ff = torch.nn.Sequential(torch.nn.Linear(d, ff), torch.nn.GELU(), torch.nn.Linear(ff, d))
        self.ln1, self.ln2, self.heads = torch.nn.LayerNorm(d), torch.nn.LayerNorm(d), heads

    def attend(self, x: Tensor, causal: bool) -> Tensor:
        B, T, C = x.shape
        q, k, v = (self.attn[f"W_{name}"](x).view(B, T, self.heads, -1).transpose(1, 2) for name in "qkv")
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.heads)
        scores = scores.masked_fill(torch.ones(T, T).tril() == 0, -1e9) if causal else scores
        return self.attn["W_o"]((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(B, T, C))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attend(self.ln1(x), causal)
        return x + self.ff(self.ln2(x))


@pytest.mark.parametrize("causal", [False, True])
def test_the_curriculums_block(causal: bool) -> None:
    """Its state_dict, and its numbers."""
    theirs = Curriculum(12, 3, 20)
    ours = TransformerBlock(12, 3, 20, 0.0, causal)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, causal))


def test_the_weights_to_look_at_are_those_that_are_used() -> None:
    rotary = dlkernels.nn.RotaryPositions(4)
    for causal, mask in ((True, None), (False, torch.rand(5, 5) < 0.7), (False, torch.randn(1, 3, 5, 5))):
        attention = MultiHeadAttention(12, 3, causal, rotary)
        x = torch.randn(2, 5, 12)
        weights = attention.weights(x, mask=mask)
        y = (weights @ attention.heads(x)[2]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(x, mask=mask), attention.W_o(y))


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_cache_changes_nothing(positions: str) -> None:
    """Token by token, and several at once, give the logits of the whole text."""
    model = GPT(V, CONTEXT, positions=positions, **SIZES).double()
    x = tokens(2, CONTEXT)
    caches = [dlkernels.nn.KVCache(CONTEXT) for _ in model.blocks]
    with torch.no_grad():
        parts = [model(part, caches) for part in x.split([5, 1, 1, 4, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x))
    with pytest.raises(ValueError, match="17 in all, needs at most the context, 16"):
        model(x[:, :1], caches)
    with pytest.raises(ValueError, match="key has 1 tokens, and the cache holds 16 of at most 16"):
        caches[0].append(*torch.zeros(2, 2, 2, 1, 8, dtype=torch.float64))


def test_only_what_stands_before_counts() -> None:
    model, x = GPT(V, CONTEXT, **SIZES), tokens(1, 9)
    changed = x.clone()
    changed[0, 5] = x[0, 5] % (V - 1) + 1
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


def test_order_counts_with_positions() -> None:
    """Bidirectional attention without positions takes a text for a set; BERT's learned positions do not."""
    block, x = TransformerBlock(16, 2, 32, 0.0), torch.randn(1, 6, 16)
    torch.testing.assert_close(block(x.flip(1)), block(x).flip(1))
    model = BERTClassifier(V, CONTEXT, 3, **SIZES).eval()
    assert not torch.allclose(model(tokens(1, 6).flip(1)), model(tokens(1, 6)))


def test_filling_counts_for_nothing() -> None:
    model, x = BERTClassifier(V, CONTEXT, 3, **SIZES).double(), tokens(2, 5)
    torch.testing.assert_close(model(torch.nn.functional.pad(x, (0, 4))), model(x))
    both = EncoderDecoder(V, **SIZES).double()
    torch.testing.assert_close(both(torch.nn.functional.pad(x, (0, 4)), x), both(x, x))


def test_relative_biases() -> None:
    bias = RelativeBias(2, 2)
    torch.nn.init.normal_(bias.weight)
    table = bias(4, 5)
    assert table.shape == (1, 2, 4, 5)
    assert torch.equal(table[0, :, 1, 2], bias.weight[3]) and torch.equal(table[0, :, 3, 0], bias.weight[0])
    assert torch.equal(table[0, :, 0, 4], bias.weight[4])
    assert torch.equal(bias(4, 4, causal=True).isinf(), torch.ones(1, 2, 4, 4).triu(1).bool())


def test_writing() -> None:
    model = GPT(V, CONTEXT, **SIZES)
    torch.nn.init.normal_(model.embed.weight, std=0.3)
    prompt = tokens(2, 4)
    text = model.generate(prompt, 8, temperature=0)
    assert torch.equal(text[:, :4], prompt) and model.training
    for t in range(4, 12):
        assert torch.equal(text[:, t], model.eval()(text[:, :t])[:, -1].argmax(1))
    assert torch.equal(model.generate(prompt[0], 8, temperature=0), text[0])
    assert torch.equal(model.generate(prompt, 0), prompt)
    drawn = [model.generate(prompt, 12, 2.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_how_a_token_is_chosen() -> None:
    """How often each of five is drawn, beside its probability."""
    p = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1])

    def often(**options: Any) -> Tensor:
        drawn = choose(p.log().expand(20000, 5), generator=torch.Generator().manual_seed(0), **options)
        return drawn.flatten().bincount(minlength=5) / 20000

    def near(found: Tensor, wanted: list[float]) -> None:
        torch.testing.assert_close(found, torch.tensor(wanted) / sum(wanted), atol=0.015, rtol=0)

    near(often(), p.tolist())
    near(often(temperature=0.5), p.square().tolist())
    near(often(top_k=2), [0, 0.4, 0.3, 0, 0])
    near(often(top_p=0.7), [0, 0.4, 0.3, 0, 0])
    near(often(top_p=0.71), [0, 0.4, 0.3, 0.15, 0])
    near(often(top_p=0.01), [0, 1, 0, 0, 0])
    near(often(top_k=3, top_p=0.8), [0, 0.4, 0.3, 0, 0])  # of the three: 0.47, 0.35, 0.18
    near(often(temperature=0), [0, 1, 0, 0, 0])


@pytest.mark.parametrize("nn", [dlkernels.nn, torch.nn], ids=["ours", "native"])
def test_bad_input_of_models(nn: Any) -> None:
    gpt, bert = GPT(V, CONTEXT, nn=nn, **SIZES), BERTClassifier(V, CONTEXT, 3, nn=nn, **SIZES)
    both = EncoderDecoder(V, nn=nn, **SIZES)
    for call in (lambda x: gpt(x), lambda x: bert(x), lambda x: both(x, x), lambda x: gpt.generate(x, 2)):
        with pytest.raises(IndexError, match="out of range"):
            call(torch.tensor([[1, V]]))
    with pytest.raises(ValueError, match="17 in all, needs at most the context, 16"):
        gpt(tokens(1, 17))
    with pytest.raises(ValueError, match="the prompt has 17 tokens and 1 are to follow; needs at least 1, and at most 16"):
        gpt.generate(tokens(17), 1)
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        gpt.generate(tokens(0), 1)
    with pytest.raises(ValueError, match="17 a row, needs at most the context, 16"):
        bert(tokens(1, 17))
    for options in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="temperature, top_k and top_p are"):
            gpt.generate(tokens(3), 1, **options)
    with pytest.raises(ValueError, match=r"positions must be one of rope, learned, .*got 'alibi'"):
        GPT(V, CONTEXT, positions="alibi", nn=nn)
    with pytest.raises(ValueError, match="d_model must be a multiple of n_heads, got 16 and 3"):
        GPT(V, CONTEXT, 16, 3, nn=nn)
    with pytest.raises(ValueError, match="n_layers must be a positive integer, got 0"):
        EncoderDecoder(V, n_layers=0, nn=nn)


def test_twins_of_layers_of_transformers() -> None:
    x, residual = torch.randn(2, 3, 4, 6).unbind()
    for name, sizes, inputs in (
        ("LinearGELU", (6, 5), (x,)), ("DropoutAddLayerNorm", (6, 0.0), (x, residual)), ("RotaryPositions", (6,), (x[None],))
    ):
        ours, native = fused(dlkernels.nn, name, *sizes), fused(torch.nn, name, *sizes)
        assert type(native) is TWINS[name] and type(ours) is getattr(dlkernels.nn, name)
        ours.load_state_dict(native.state_dict())
        torch.testing.assert_close(ours(*inputs), native(*inputs))
