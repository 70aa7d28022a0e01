"""The layers and stacks of torch.nn.Transformer over our kernels: torch's parameters, initialisation and state_dicts.

    after    x = norm(x + dropout(f(x)))          add_layer_norm, one kernel, with dropout in it
    before   x = x + dropout(f(norm(x)))          the sum and the norm of the next part are one kernel (norm_first)
    feed     f(x) = W2 dropout(act(W1 x + b1)) + b2          W1 and the activation are one kernel

Where a user has put a layer of another type or with hooks in the place of one of ours, that is called instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from .. import functional as F
from .activations import GELU, ReLU
from .attention import MultiheadAttention
from .dropout import Dropout
from .layer_norm import LayerNorm
from .linear import Linear

__all__ = ["Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer"]


def _is_plain(layer: Any, kind: type[torch.nn.Module]) -> bool:
    """Whether calling ``layer`` does what ``kind``'s forward does and nothing else."""
    hooked = any(getattr(layer, f"_{hooks}") for hooks in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"))
    return type(layer) is kind and not hooked


def _add_norm(x: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) of sum = residual + dropout(x)."""
    if _is_plain(dropout, Dropout) and _is_plain(norm, LayerNorm):
        p, shape = dropout.p, norm.normalized_shape
        return F.dropout_add_layer_norm(x, residual, p, shape, norm.weight, norm.bias, norm.eps, dropout.training)
    total = residual + dropout(x)
    return norm(total), total


def _fused_name(activation: Any) -> str | None:
    """The activation in linear_act's words, or None where it has none."""
    if activation in (torch.nn.functional.relu, torch.relu, F.relu) or isinstance(activation, (ReLU, torch.nn.ReLU)):
        return "relu"
    if isinstance(activation, (GELU, torch.nn.GELU)):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return "gelu" if activation in (torch.nn.functional.gelu, F.gelu) else None


class _FeedForward:
    """linear1, activation, dropout, linear2 of a layer."""

    linear1: Any
    linear2: Any
    dropout: Any
    activation: Callable[[Tensor], Tensor]

    def _feed_forward(self, x: Tensor) -> Tensor:
        name = _fused_name(self.activation)
        if name is not None and _is_plain(self.linear1, Linear):
            h = F.linear_act(x, self.linear1.weight, self.linear1.bias, name)
        else:
            h = self.activation(self.linear1(x))
        y: Tensor = self.linear2(self.dropout(h))
        return y


class TransformerEncoderLayer(_FeedForward, torch.nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``, with its arguments, on our kernels."""

    @wraps(torch.nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _adopt(self)

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """src ``(S, N, E)``, or ``(N, S, E)`` where ``batch_first``, or ``(S, E)``; the masks are those of ``MultiheadAttention``."""
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        x = self.norm1(src) if self.norm_first else src
        h = self.self_attn(x, x, x, need_weights=False, **masks)[0]
        if self.norm_first:
            x, total = _add_norm(h, src, self.dropout1, self.norm2)
            return total + self.dropout2(self._feed_forward(x))
        x = _add_norm(h, src, self.dropout1, self.norm1)[0]
        return _add_norm(self._feed_forward(x), x, self.dropout2, self.norm2)[0]


class TransformerDecoderLayer(_FeedForward, torch.nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``, with its arguments, on our kernels."""

    @wraps(torch.nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _adopt(self)

    def forward(
        self, tgt: Tensor, memory: Tensor, tgt_mask: Tensor | None = None, memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None, memory_key_padding_mask: Tensor | None = None, tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """tgt ``(T, N, E)`` and memory ``(S, N, E)``, N first where ``batch_first``; the masks are those of ``MultiheadAttention``."""
        masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        across = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask, "is_causal": memory_is_causal}
        x = self.norm1(tgt) if self.norm_first else tgt
        h = self.self_attn(x, x, x, need_weights=False, **masks)[0]
        x, total = _add_norm(h, tgt, self.dropout1, self.norm2 if self.norm_first else self.norm1)
        h = self.multihead_attn(x, memory, memory, need_weights=False, **across)[0]
        if self.norm_first:
            x, total = _add_norm(h, total, self.dropout2, self.norm3)
            return total + self.dropout3(self._feed_forward(x))
        x = _add_norm(h, x, self.dropout2, self.norm2)[0]
        return _add_norm(self._feed_forward(x), x, self.dropout3, self.norm3)[0]


class TransformerEncoder(torch.nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder(encoder_layer, num_layers, norm=None, enable_nested_tensor=True, mask_check=True)``.

    Padded places hold what they hold in training, in evaluation too, where torch may put zeros there (by nested tensors); what is not
    padded does not depend on them.
    """

    def forward(
        self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        length = _get_seq_len(src, _batch_first(self.layers[0]))
        causal = _detect_is_causal_mask(mask, is_causal, length)
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder(decoder_layer, num_layers, norm=None)``."""


class Transformer(torch.nn.Transformer):
    """``torch.nn.Transformer``, with its arguments, on our kernels. Encoders and decoders that are given stay as they are."""

    @wraps(torch.nn.Transformer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for part, kind in ((self.encoder, torch.nn.TransformerEncoder), (self.decoder, torch.nn.TransformerDecoder)):
            if part not in (*args, *options.values()) and type(part) is kind:
                _adopt(part)


def _batch_first(layer: Any) -> bool:
    return bool(layer.self_attn.batch_first)


_OURS: dict[type, type] = {
    ours.__bases__[-1]: ours
    for ours in (
        Linear, LayerNorm, Dropout, MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder,
        TransformerDecoder,
    )
}  # fmt: skip


def _adopt(module: torch.nn.Module) -> None:
    """Torch's layers within ``module`` become ours, which differ from them in nothing but forward."""
    for layer in module.modules():
        layer.__class__ = _OURS.get(type(layer), type(layer))
