"""The keys and values of what a model has written so far: what is said again need not be computed again.

    keys, values = cache.append(k, v)      of all tokens, where they lie

The cache is memory for ``context`` tokens, and only what is new is written: a further token costs one row of every product, and one look at
all keys and values. torch.nn has no such class.
"""

from __future__ import annotations

from torch import Tensor

from .. import functional as F

__all__ = ["KVCache"]


class KVCache:
    """Keys ``(B, G, length, D)`` and values ``(B, G, length, E)`` of the tokens so far, in memory for ``context`` of them.

    Dtype, device and sizes are those of the first tokens.

    Raises:
        ValueError: ``context`` is no positive integer.
    """

    def __init__(self, context: int) -> None:
        if isinstance(context, bool) or not isinstance(context, int) or context < 1:
            raise ValueError(f"context must be a positive integer, got {context!r}")
        self.context, self.length = context, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, views of the cache, with those of the new tokens, ``(B, G, T, D)`` and ``(B, G, T, E)``, at the end.

        Raises:
            ValueError: the new tokens do not fit; the cache stays as it is. RuntimeError: they are not like those before.
        """
        end = self.length + key.shape[2]
        if end > self.context:
            raise ValueError(f"key has {key.shape[2]} tokens, and the cache holds {self.length} of at most {self.context}")
        if self.keys is None or self.values is None:
            self.keys, self.values = (t.new_empty(*t.shape[:2], self.context, t.shape[3]) for t in (key, value))
        F.kv_cache_append_(self.keys, self.values, key, value, self.length)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def __repr__(self) -> str:
        return f"KVCache({self.length} of {self.context})"
