"""Transformers on our kernels: the same logits and gradients, padding that is not attended to, and all that works on a model still does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import RawCalls
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the integration is for Hugging Face Transformers")
from dlkernels.integrations import hf  # noqa: E402

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def bert(**options: Any) -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, max_position_embeddings=20, num_labels=3, **{**NO_DROPOUT, **options})
    )


def gpt2() -> Any:
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **IDS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **IDS, num_key_value_heads=2))


def t5() -> Any:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, dropout_rate=0.0))


each_model = pytest.mark.parametrize("make", [bert, gpt2, llama, t5])


def batch() -> dict[str, Tensor]:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    mask[2, 8:] = 0
    return {"input_ids": torch.randint(3, 50, (3, 9)), "attention_mask": mask}


def results(model: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs where there is text, and gradients."""
    y = model(**rows)[0]
    y = y[rows["attention_mask"] == 1] if y.dim() == 3 else y
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(y, parameters, torch.linspace(-1, 1, y.numel()).view_as(y), allow_unused=True)
    return {"y": y.detach(), **{name: grad for name, grad in zip(names, grads) if grad is not None}}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        apart, scale = (value - right[name]).abs().max().item(), right[name].abs().max().item()
        assert apart <= 2e-5 * max(1.0, scale), f"{name} differs by {apart:.1e}, its largest number is {scale:.1e}"


@each_model
def test_logits_gradients_and_the_way_back(make: Callable[[], Any]) -> None:
    model, rows = make().train(), batch()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    exact, classes, before = results(eager, rows), [type(m) for m in model.modules()], model.config._attn_implementation
    parameters = [id(p) for p in model.parameters()]
    report = hf.apply(model)
    assert [id(p) for p in model.parameters()] == parameters and model.config._attn_implementation == hf.NAME
    assert any("attention" in change.now for change in report.swapped)
    with RawCalls() as recorded:
        found = results(model, rows)
    called = {call[0].__name__.split(".")[0] for call in recorded.calls}
    assert {"scaled_dot_product_attention_forward", "linear_forward", "embedding_forward"} <= called
    assert_same(found, exact)
    hf.unapply(model)
    assert [type(m) for m in model.modules()] == classes and model.config._attn_implementation == before
    with RawCalls() as recorded:
        assert_same(results(model, rows), exact)
    assert recorded.calls == []


def test_neighbours_in_bert_are_fused() -> None:
    model = bert()
    fused = [change.now for change in hf.apply(model).fused]
    assert fused.count("Dropout + sum + LayerNorm") == 4 and fused.count("Linear + GELUActivation") == 2
    assert "Conv1D on dlkernels" in {change.now for change in hf.apply(gpt2()).swapped}
    assert "LlamaRMSNorm on dlkernels" in {change.now for change in hf.apply(llama()).swapped}


@torch.no_grad()
def test_padding_is_not_attended_to() -> None:
    hf.register()
    model = bert().eval()
    rows = batch()
    for implementation in ("eager", hf.NAME):
        model.set_attn_implementation(implementation)
        padded = model(**rows)[0][1]
        alone = model(rows["input_ids"][1:2, :5])[0][0]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(model(rows["input_ids"])[0][1], alone, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("make", [gpt2, llama])
def test_generation_with_a_cache(make: Callable[[], Any]) -> None:
    model, rows = make().eval(), batch()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    rows = {name: value.flip(1) for name, value in rows.items()}  # what is filled up is filled up on the left
    expected = model.generate(**rows, **options)
    hf.apply(model)
    assert torch.equal(model.generate(**rows, **options), expected)


def test_gradient_checkpointing() -> None:
    model, rows = bert().train(), batch()
    hf.apply(model)
    plain = results(model, rows)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    y = model(**rows)[0]
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, {k: v for k, v in plain.items() if k != "y"})


def test_dropout_drops_in_training_alone() -> None:
    model, rows = bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3), batch()
    hf.apply(model)
    assert not torch.equal(model.train()(**rows)[0], model(**rows)[0])
    assert torch.equal(model.eval()(**rows)[0], model(**rows)[0])


def test_lora_before_and_after() -> None:
    peft = pytest.importorskip("peft", reason="LoRA is PEFT's")
    rows = batch()
    config = peft.LoraConfig(target_modules=["query", "value", "dense"], r=2, lora_alpha=4, init_lora_weights=False)
    torch.manual_seed(1)
    start = bert()
    found = []
    for when in ("never", "before", "after"):
        model = copy.deepcopy(start)
        if when == "before":
            hf.apply(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, copy.deepcopy(config))
        if when == "after":
            hf.apply(model)
        found.append(results(model, rows))
    assert len(found[0]) > 10
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_the_trainer_learns(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    model = bert()
    hf.apply(model)
    first = batch()
    data = [{"input_ids": ids, "labels": torch.tensor(i)} for i, ids in enumerate(first["input_ids"])]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=15, learning_rate=1e-2, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, logging_steps=15
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < 0.5 * before
    model.save_pretrained(tmp_path / "saved")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.eval()(first["input_ids"])[0], model.eval()(first["input_ids"])[0], rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    model = bert()
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        hf.apply("bert")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear is no model of Transformers"):
        hf.apply(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not on dlkernels"):
        hf.unapply(model)
    hf.apply(model)
    with pytest.raises(ValueError, match="on dlkernels already"):
        hf.apply(model)
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="no softcap"):
        hf.attention(model, query, query, query, None, softcap=30.0)


def test_importing_dlkernels_does_not_import_transformers() -> None:
    code = "import sys, dlkernels, dlkernels.integrations; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert result.stdout.strip() == "False"
