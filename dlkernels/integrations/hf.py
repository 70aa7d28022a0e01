"""Hugging Face Transformers on our kernels.

    from dlkernels.integrations import hf

    report = hf.apply(model)                              # any model, loaded already; hf.unapply(model) takes it back
    hf.register()                                         # or attention alone, when it is loaded
    model = AutoModel.from_pretrained(path, attn_implementation="dlkernels")

``register`` adds an attention function and a mask function: without the second, Transformers makes no mask for a name it does not know, and
padding is attended to. ``apply`` before PEFT wraps the model, or after: LoRA's own layers are Linears as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, activations
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from .. import functional as F
from ..acceleration import Report, accelerate, fuse, swap, unaccelerate
from ..acceleration.fuse import Act
from ..acceleration.report import Change, Left

__all__ = ["NAME", "apply", "attention", "register", "unapply"]

NAME = "dlkernels"

# Of every model that was applied to: its configurations, outer ones first, and what attention each had asked for.
_ATTENTION: WeakKeyDictionary[torch.nn.Module, list[tuple[Any, Any]]] = WeakKeyDictionary()


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What a layer of Transformers calls: query ``(B, H, L, D)``, key and value of H heads or a divisor, -> ``(B, L, H, E)``, no weights.

    Args:
        attention_mask: boolean, True where to attend, or to be added; None: causal where ``is_causal`` (or the module's own) says so and
            there is more than one query.
        position_bias: to be added to the scores, ``(1, H, L, S)``.

    Raises:
        ValueError: the model wants attention weights, a soft cap or sinks, which this function does not have.
    """
    for option in ("output_attentions", "softcap", "s_aux"):
        if kwargs.get(option) is not None and kwargs[option] is not False:
            raise ValueError(f"attention of dlkernels has no {option}: model.set_attn_implementation('eager')")
    L, S = query.shape[2], key.shape[2]
    causal = bool(L > 1 and attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal))
    if causal and S > L:  # a cache of fixed size, of which the first L are filled
        key, value = key[:, :, :L], value[:, :, :L]
        position_bias = None if position_bias is None else position_bias[..., :L]
    if position_bias is not None:
        attention_mask, causal = _biased(position_bias, attention_mask, causal), False
    y = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return y.transpose(1, 2).contiguous(), None


def _biased(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """One mask to be added, of a bias and what is masked out."""
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def register() -> None:
    """Make ``attn_implementation="dlkernels"`` known to Transformers, and the layers of Transformers to ``dlkernels.accelerate``."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    fuse.ACTIVATIONS.update(_ACTIVATIONS)
    swap.OURS.setdefault(Conv1D, swap.derived(Conv1D, (Conv1D,), {"forward": _conv1d}))


def _gelu(layer: Any) -> Act | None:
    act = layer.act
    if isinstance(act, functools.partial) and act.func is torch.nn.functional.gelu:
        return {"none": Act("gelu"), "tanh": Act("gelu_tanh")}.get(act.keywords.get("approximate", "none"))
    return Act("gelu") if act is torch.nn.functional.gelu or act == getattr(layer, "_gelu_python", None) else None


_ACTIVATIONS = {
    activations.GELUActivation.forward: _gelu,
    activations.GELUTanh.forward: _gelu,
    activations.NewGELUActivation.forward: lambda layer: Act("gelu_tanh"),
    activations.SiLUActivation.forward: lambda layer: Act("silu"),
}


def _conv1d(self: Any, x: Tensor) -> Tensor:
    """GPT-2's linear layer, whose weight lies the other way round."""
    return F.linear(x, self.weight.t(), self.bias)


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@functools.cache
def _is_rms_norm(kinds: tuple[Any]) -> bool:
    """Whether a class computes what LlamaRMSNorm or T5LayerNorm do: most models have a class of their own with the same text."""
    kind = kinds[0]
    if kind in swap.OURS or not kind.__name__.endswith(("RMSNorm", "LayerNorm")) or "forward" not in vars(kind):
        return False
    known = [inspect.getsource(base.forward).split() for base in (LlamaRMSNorm, T5LayerNorm)]
    return inspect.getsource(vars(kind)["forward"]).split() in known


def _models(model: torch.nn.Module) -> Iterator[PreTrainedModel]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def apply(model: torch.nn.Module, *, attention: bool = True) -> Report:
    """``dlkernels.accelerate(model)``, and its attention on our kernel (``attention=False``: not).

    Also the layers of Transformers itself: GPT-2's ``Conv1D``, Llama's RMSNorm and its like, Linear + GELU of ``transformers.activations``.
    Parameters, ``state_dict``, gradient checkpointing, PEFT and the Trainer see the model as before.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``. ValueError: no model of Transformers is in it, or it was applied already.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model in _ATTENTION:
        raise ValueError(f"this {type(model).__name__} is on dlkernels already")
    models = list(_models(model))
    if not models:
        raise ValueError(f"{type(model).__name__} is no model of Transformers and has none inside; dlkernels.accelerate takes any module")
    register()
    for kind in {type(module) for module in model.modules()}:
        if _is_rms_norm((kind,)):
            swap.OURS[kind] = swap.derived(kind, (kind,), {"forward": _rms_norm})
    report = accelerate(model)
    configs = list({id(config): config for inner in models for config in _with_inner(inner.config)}.values())
    _ATTENTION[model] = [(config, config._attn_implementation) for config in configs]
    if attention:
        try:
            _exchange_attention(models, report)
        except Exception:
            unapply(model)
            raise
    return report


def _with_inner(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            yield from _with_inner(inner)


def _exchange_attention(models: list[PreTrainedModel], report: Report) -> None:
    for model in models:
        before = model.config._attn_implementation
        if before == NAME:
            continue  # set together with the model around it
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation == NAME:
            report.swapped.append(Change("attention", f"{type(model).__name__}'s {before} attention", "dlkernels attention"))
        else:
            report.left.append(Left("attention", type(model).__name__, "its attention cannot be exchanged"))


def unapply(model: torch.nn.Module) -> None:
    """Take ``apply`` back: every layer its class, and the attention that was asked for before.

    Raises:
        ValueError: it was not applied to this model. RuntimeError: as ``dlkernels.unaccelerate``; nothing has been changed then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model not in _ATTENTION:
        raise ValueError(f"this {type(model).__name__} is not on dlkernels: hf.apply was not called with it")
    unaccelerate(model)
    for config, before in _ATTENTION.pop(model):  # outer ones first, as setting one sets those inside
        config._attn_implementation = before
