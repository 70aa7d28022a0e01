"""Multi-head attention: torch.nn.MultiheadAttention's parameters, initialisation and state_dict over our kernels.

    q, k, v = x Wq, x Wk, x Wv            one product where they come from one tensor; its parts are used where they lie
    y       = attention(q, k, v) Wo       heads are E / num_heads consecutive numbers of q, k and v
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["MultiheadAttention"]


class Masks(NamedTuple):
    """What a query may not see, as torch.nn.MultiheadAttention takes it: True, or what is added to a score."""

    attention: Tensor | None  # [L, S] or [N, H, L, S]
    padding: Tensor | None  # [N, 1, 1, S]

    def widened(self) -> Masks:
        """With one more key at the end, which everyone sees."""
        return Masks(*(None if m is None else torch.nn.functional.pad(m, (0, 1)) for m in self))

    def merged(self, dtype: torch.dtype) -> Tensor | None:
        """Both in one for ``scaled_dot_product_attention``: True where a key is seen, or a number to add."""
        given = [m for m in self if m is not None]
        if not given:
            return None
        if all(m.dtype == torch.bool for m in given):
            return ~(given[0] | given[1] if len(given) == 2 else given[0])
        added = [m.new_zeros(m.shape, dtype=dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype) for m in given]
        return added[0] + added[1] if len(added) == 2 else added[0]


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention(embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False, kdim=None,
    vdim=None, batch_first=False, device=None, dtype=None)`` on our kernels.

    Without weights (``need_weights=False``) memory is linear in the lengths. With them they are made, and dropped out, as a matrix, by
    torch's own batched products. A query that sees no key gets zeros, without weights, and NaN with them: torch's answers.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As ``torch.nn.MultiheadAttention.forward``.

        Args:
            query, key, value: ``(L, N, E)``, ``(S, N, kdim)`` and ``(S, N, vdim)``; the first two dimensions swapped where
                ``batch_first``; or without N.
            key_padding_mask: ``(N, S)``, or ``(S,)``: True where a key is filling, or a number to add to its scores.
            attn_mask: ``(L, S)`` or ``(N num_heads, L, S)``: True where a query may not see a key, or a number to add.
            is_causal: a hint that ``attn_mask``, which has to be there, is the causal one.

        Returns:
            ``(L, N, E)`` like query, and the weights ``(N, L, S)``, or ``(N, num_heads, L, S)`` unless ``average_attn_weights``, or None
            unless ``need_weights``.

        Raises:
            RuntimeError: shapes do not fit each other; or ``is_causal`` without a mask.
        """
        if query.is_nested:  # for torch to take or to refuse
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )  # fmt: skip
        self._check(query, key, value)
        batched = query.dim() == 3
        if batched and not self.batch_first:
            same = key is query, value is key
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        masks = self._masks(query, key, key_padding_mask, attn_mask, is_causal)
        q, k, v = (self._heads(t) for t in self._project(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, b.view(1, self.num_heads, 1, -1).expand(len(t), -1, -1, -1)], 2)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
            masks = masks.widened()
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(*t.shape[:2], 1, t.shape[3])], 2) for t in (k, v))
            masks = masks.widened()
        p = self.dropout if self.training else 0.0
        mask, weights = masks.merged(q.dtype), None
        if need_weights:
            y, weights = _with_weights(q, k, v, mask, p)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            causal = is_causal and key_padding_mask is None and k.shape[2] == key.shape[-2]
            y = F.scaled_dot_product_attention(q, k, v, None if causal else mask, p, causal)
        y = y.transpose(1, 2)  # [N, L, heads, width]
        if batched and not self.batch_first:
            y = y.transpose(0, 1)
        y = F.linear(y.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return (y, weights) if batched else (y[0], None if weights is None else weights[0])

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads. Those of one tensor are parts of one product, which ``qkv_projection`` would not make
        faster: its weights are one already, and nothing is to be turned."""
        E, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is not None and key is value:
            if query is key:
                return F.linear(query, weight, bias).split(E, -1)
            q = F.linear(query, weight[:E], None if bias is None else bias[:E])
            return q, *F.linear(key, weight[E:], None if bias is None else bias[E:]).split(E, -1)
        weights = weight.chunk(3) if weight is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, t: Tensor) -> Tensor:
        """[N, T, E] or [T, E] as [N, heads, T, width]."""
        return t.unflatten(-1, (self.num_heads, self.head_dim))[(None,) * (3 - t.dim())].transpose(1, 2)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """That the tensors fit each other and the parameters."""
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise RuntimeError(f"MultiheadAttention: {shapes} need 3 dimensions each, or 2 without a batch")
        batch = 0 if self.batch_first else 1
        lengths = 1 - batch if query.dim() == 3 else 0
        fits = key.shape[lengths] == value.shape[lengths] and (
            query.dim() == 2 or query.shape[batch] == key.shape[batch] == value.shape[batch]
        )
        wanted = self.embed_dim, self.kdim, self.vdim
        if not fits or (query.shape[-1], key.shape[-1], value.shape[-1]) != wanted:
            order = "(N, L, E), (N, S, kdim) and (N, S, vdim)" if self.batch_first else "(L, N, E), (S, N, kdim) and (S, N, vdim)"
            raise RuntimeError(f"MultiheadAttention: {shapes} do not fit {order} with E, kdim and vdim {wanted}")

    def _masks(self, query: Tensor, key: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool) -> Masks:
        """The masks in the shapes of ``Masks``; query and key are batch first."""
        N, L, S = len(query) if query.dim() == 3 else 1, query.shape[-2], key.shape[-2]
        if is_causal and mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint: Transformer.generate_square_subsequent_mask makes it")
        for name, m in (("key_padding_mask", padding), ("attn_mask", mask)):
            if m is not None and m.dtype != torch.bool and not m.is_floating_point():
                raise RuntimeError(f"only bool and floating types of {name} are supported, got {m.dtype}")
        if padding is not None:
            wanted = (N, S) if query.dim() == 3 else (S,)
            if tuple(padding.shape) != wanted:
                raise RuntimeError(f"key_padding_mask has shape {tuple(padding.shape)}, needs {wanted}")
            padding = padding.view(N, 1, 1, S)
        if mask is not None:
            if tuple(mask.shape) not in ((L, S), (N * self.num_heads, L, S)):
                raise RuntimeError(f"attn_mask has shape {tuple(mask.shape)}, needs {(L, S)} or {(N * self.num_heads, L, S)}")
            mask = mask if mask.dim() == 2 else mask.view(N, self.num_heads, L, S)
        return Masks(mask, padding)


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """[N, H, L, width] and the weights [N, H, L, S] that made it."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = F.softmax(scores, -1)
    weights = F.dropout(weights, p) if p else weights
    return weights @ v, weights
