"""Multi-head attention and the layers and stacks of nn.Transformer: torch's values and gradients for every option, and its state_dicts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import SMALL, RawCalls, threads
from torch import Tensor

import dlkernels.nn as ours
from dlkernels.nn.transformer import _adopt

pytestmark = pytest.mark.skipif(SMALL, reason="what the kernels compute is tested op by op; here it is how they are put together")
theirs = torch.nn
N, L, S, E, H = 3, 5, 7, 12, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: that nested tensors will not be used, that masks of two types are deprecated
        yield


def built(kind: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """(ours, torch's) of one seed, in float64; biases, which start at 0, and the weights of norms are drawn as well."""
    models = []
    for nn in (ours, theirs):
        torch.manual_seed(3)
        models.append(getattr(nn, kind)(*args, dtype=torch.float64, **options))
    mine, native = models
    assert [*mine.state_dict()] == [*native.state_dict()]
    for (name, p), q in zip(mine.named_parameters(), native.parameters()):
        assert torch.equal(p, q), name
        if p.dim() == 1:
            torch.nn.init.normal_(p, 0.5 if "norm" in name else 0.0)
    native.load_state_dict(mine.state_dict())
    return mine, native


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def same(models: tuple[Any, Any], inputs: list[Tensor], picked: Any = None, **options: Any) -> None:
    """Results and gradients of every input and parameter; ``picked`` of the inputs are the arguments."""
    found = []
    for model in models:
        leaves = [t.clone().requires_grad_() for t in inputs]
        model.zero_grad()
        ys = model(*(leaves[i] for i in picked or range(len(leaves))), **options)
        ys = [y for y in (ys if isinstance(ys, tuple) else (ys,)) if y is not None]
        sum((y * randn(*y.shape)).sum() for y in ys).backward()
        found.append([*ys, *(t.grad for t in leaves), *(p.grad for p in model.parameters())])
    assert len(found[0]) == len(found[1])
    for mine, native in zip(*found):
        assert (mine is None) == (native is None)
        if mine is not None:
            torch.testing.assert_close(mine, native, rtol=1e-9, atol=1e-11, equal_nan=True)


CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.arange(S) >= torch.tensor([[7], [4], [6]])
ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {}, "no bias": {"bias": False}, "kdim": {"kdim": 6}, "vdim": {"vdim": 3}, "both": {"kdim": 6, "vdim": 3, "bias": False},
    "bias_kv": {"add_bias_kv": True}, "zero_attn": {"add_zero_attn": True}, "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5},
}  # fmt: skip
MASKS: dict[str, dict[str, Any]] = {
    "none": {}, "padding": {"key_padding_mask": PADDING}, "bool": {"attn_mask": torch.rand(L, S) < 0.3},
    "float": {"attn_mask": torch.randn(L, S, dtype=torch.float64)},
    "per head": {"attn_mask": torch.randn(N * H, L, S, dtype=torch.float64)},
    "bool and padding": {"attn_mask": torch.arange(S).expand(L, S) == 1, "key_padding_mask": PADDING},
    "float and bool": {"attn_mask": torch.randn(L, S, dtype=torch.float64), "key_padding_mask": PADDING},
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", ATTENTION)
def test_attention(option: str, mask: str) -> None:
    """Batch first or second, with weights of every kind or without."""
    options = ATTENTION[option]
    for batch_first in (False, True):
        models = built("MultiheadAttention", E, H, batch_first=batch_first, **options)
        shapes = [(N, L, E), (N, S, options.get("kdim", E)), (N, S, options.get("vdim", E))]
        inputs = [randn(*(shape if batch_first else (shape[1], shape[0], shape[2]))) for shape in shapes]
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            same(models, inputs, **weights, **MASKS[mask])
        if "dim" not in option and option not in ("both", "all"):  # keys are values
            same(models, inputs[:2], (0, 1, 1), need_weights=False, **MASKS[mask])


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_to_itself(batch_first: bool) -> None:
    models = built("MultiheadAttention", E, H, batch_first=batch_first)
    x = randn(N, L, E) if batch_first else randn(L, N, E)
    for options in ({}, {"attn_mask": CAUSAL}, {"attn_mask": CAUSAL, "is_causal": True}, {"key_padding_mask": PADDING[:, :L]}):
        for need in (False, True):
            same(models, [x], (0, 0, 0), need_weights=need, **options)


def test_attention_without_a_batch() -> None:
    models = built("MultiheadAttention", E, H, add_bias_kv=True)
    inputs = [randn(L, E), randn(S, E), randn(S, E)]
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        for mask in ({}, {"key_padding_mask": PADDING[1]}, {"attn_mask": randn(L, S)}, {"attn_mask": randn(H, L, S)}):
            same(models, inputs, **options, **mask)


def test_a_query_that_sees_nothing() -> None:
    """Zeros before the last product without weights, NaN with them, and nothing of it in the other rows: torch's answers."""
    models = built("MultiheadAttention", E, H)
    mask = torch.zeros(L, S, dtype=torch.bool)
    mask[2] = True
    inputs = [randn(L, N, E), randn(S, N, E), randn(S, N, E)]
    same(models, inputs, attn_mask=mask, need_weights=False)
    for model in models:
        y, weights = model(*inputs, attn_mask=mask)
        assert y[2].isnan().all() and weights[:, 2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


def test_dropout_of_weights() -> None:
    """In training the weights that come back are those that were used; in evaluation nothing is dropped."""
    mine, native = built("MultiheadAttention", E, 1, dropout=0.5, bias=False)
    x = randn(200, 1, E)
    y, weights = mine(x, x, x)
    assert 0.45 < (weights == 0).double().mean() < 0.55
    v = x[:, 0] @ mine.in_proj_weight[2 * E :].T
    torch.testing.assert_close(y[:, 0], weights[0] @ v @ mine.out_proj.weight.T)
    means = torch.stack([mine(x, x, x, need_weights=False)[0] for _ in range(200)]).mean(0)
    right = mine.eval()(x, x, x, need_weights=False)[0]
    assert (means - right).norm() < 0.15 * right.norm()
    same((mine, native.eval()), [x], (0, 0, 0))


LAYERS = [
    {"norm_first": norm_first, "activation": activation, "batch_first": batch_first, "bias": bias}
    for norm_first in (False, True)
    for activation, batch_first, bias in (
        ("relu", True, True), ("gelu", False, True), (torch.nn.functional.gelu, True, False), (torch.tanh, False, True),
        (torch.nn.GELU("tanh"), True, True), (torch.nn.ReLU(), True, True),
    )
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", LAYERS, ids=lambda o: f"{o['norm_first']}-{getattr(o['activation'], '__name__', o['activation'])}")
def test_layers(options: dict[str, Any], training: bool) -> None:
    first = options["batch_first"]
    x, memory = (randn(N, T, E) if first else randn(T, N, E) for T in (L, S))
    for kind, inputs in (("TransformerEncoderLayer", [x]), ("TransformerDecoderLayer", [x, memory])):
        models = built(kind, E, H, 20, dropout=0.0, **options)
        for model in models:
            model.train(training)
        name = "src" if len(inputs) == 1 else "tgt"
        masks = {f"{name}_mask": CAUSAL, f"{name}_key_padding_mask": torch.arange(L) >= torch.tensor([[5], [3], [4]])}
        same(models, inputs)
        same(models, inputs, **masks)
        causal = {f"{name}_mask": CAUSAL, "is_causal" if name == "src" else "tgt_is_causal": True}
        same(models, inputs, **causal)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_whole_transformer(norm_first: bool) -> None:
    models = built("Transformer", E, H, 2, 2, 20, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    mask = models[0].generate_square_subsequent_mask(L, dtype=torch.float64)
    options = {"tgt_mask": mask, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    same(models, [randn(N, S, E), randn(N, L, E)], **options)
    same(models, [randn(S, E), randn(L, E)])
    kinds = {type(layer).__module__.split(".")[0] for layer in models[0].modules() if not isinstance(layer, torch.nn.ModuleList)}
    assert kinds - {"torch"} == {"dlkernels"} and not any(type(m) is torch.nn.Linear for m in models[0].modules())


def test_stacks_of_given_layers() -> None:
    for stack, layer, inputs in (
        ("TransformerEncoder", "TransformerEncoderLayer", [randn(L, N, E)]),
        ("TransformerDecoder", "TransformerDecoderLayer", [randn(L, N, E), randn(S, N, E)]),
    ):
        models = []
        for model, nn in zip(built(layer, E, H, 20, dropout=0.0), (ours, theirs)):
            models.append(getattr(nn, stack)(model, 3, nn.LayerNorm(E, dtype=torch.float64)))
        models[1].load_state_dict(models[0].state_dict())
        same((models[0], models[1]), inputs)
        name = {"TransformerEncoder": "mask"}.get(stack, "tgt_mask")
        for mask in (CAUSAL, randn(L, L), theirs.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)):
            same((models[0], models[1]), inputs, **{name: mask})


def test_padding_in_evaluation() -> None:
    """Torch's fast path puts zeros where the padding is; what is not padded is the same."""
    mine, native = built("TransformerEncoderLayer", E, H, 20, batch_first=True)
    stacks = [nn.TransformerEncoder(layer, 2).eval() for nn, layer in ((ours, mine), (theirs, native))]
    stacks[1].load_state_dict(stacks[0].state_dict())
    with torch.no_grad():
        found = [stack(randn(N, S, E), src_key_padding_mask=PADDING) for stack in stacks]
    torch.testing.assert_close(*(y[~PADDING] for y in found))


def test_what_a_user_has_changed_is_called() -> None:
    """Layers of another type, and layers with hooks, in the place of ours."""
    models = built("TransformerEncoderLayer", E, H, 20, dropout=0.0)
    calls: list[str] = []
    for model in models:
        model.norm1 = torch.nn.RMSNorm(E, dtype=torch.float64)
        model.linear1.register_forward_hook(lambda *_: calls.append("hook"))
    same(models, [randn(L, N, E)])
    assert calls == ["hook"] * 2
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(E, H), 1)
    mine = ours.Transformer(E, H, custom_encoder=encoder, num_decoder_layers=1)
    assert type(mine.encoder.layers[0].linear1) is torch.nn.Linear and type(mine.decoder.layers[0].linear1) is ours.Linear
    copied = copy.deepcopy(encoder)
    _adopt(copied)
    assert type(copied.layers[0]) is ours.TransformerEncoderLayer and type(encoder.layers[0]) is torch.nn.TransformerEncoderLayer


def test_fused_kernels_run() -> None:
    model = ours.TransformerEncoderLayer(E, H, 20, activation="gelu")
    with RawCalls() as recorded:
        model(torch.randn(L, N, E))
    names = [str(func).split(".")[1] for func, _ in recorded.calls]
    assert names == [
        "linear_forward", "scaled_dot_product_attention_forward", "linear_forward", "add_layer_norm_forward", "linear_forward", "dropout",
        "linear_forward", "add_layer_norm_forward",
    ]  # fmt: skip


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ranks": ((randn(L, N, E), randn(S, E), randn(S, E)), {}, "3 dimensions each"),
    "width": ((randn(L, N, E), randn(S, N, E + 1), randn(S, N, E)), {}, "do not fit"),
    "lengths": ((randn(L, N, E), randn(S, N, E), randn(S + 1, N, E)), {}, "do not fit"),
    "batch": ((randn(L, N, E), randn(S, 2, E), randn(S, 2, E)), {}, "do not fit"),
    "mask": ((randn(L, N, E),) + (randn(S, N, E),) * 2, {"attn_mask": torch.zeros(L, L)}, r"attn_mask has shape \(5, 5\), needs \(5, 7\)"),
    "mask per head": ((randn(L, N, E),) + (randn(S, N, E),) * 2, {"attn_mask": torch.zeros(N, L, S)}, r"\(12, 5, 7\)"),
    "mask of integers": ((randn(L, N, E),) + (randn(S, N, E),) * 2, {"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "int64"),
    "padding": ((randn(L, N, E),) + (randn(S, N, E),) * 2, {"key_padding_mask": PADDING.T}, r"has shape \(7, 3\), needs \(3, 7\)"),
    "hint alone": ((randn(L, N, E),) * 3, {"is_causal": True}, "Need attn_mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    """Torch raises too; ours says what does not fit."""
    inputs, options, words = BAD[case]
    mine, native = built("MultiheadAttention", E, H)
    with pytest.raises((RuntimeError, AssertionError)):
        native(*inputs, **options)
    with pytest.raises(RuntimeError, match=words):
        mine(*inputs, **options)


def test_bad_sizes() -> None:
    for nn in (ours, theirs):
        with pytest.raises(AssertionError, match="divisible"):
            nn.MultiheadAttention(10, 3)
        with pytest.raises(RuntimeError, match="relu/gelu"):
            nn.TransformerEncoderLayer(E, H, activation="selu")
