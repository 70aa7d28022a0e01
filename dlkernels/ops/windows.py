"""Where the windows of a pooling lie: what max_pool2d and avg_pool2d share, from the arguments of torch.nn.functional on.

Along a dimension of n numbers window p sees
    regular     the places p stride - padding + r dilation, r from 0 to kernel - 1, that lie inside: 0 to n - 1
    adaptive    one of P equal parts of the input, from ⌊p n / P⌋ to ⌈(p + 1) n / P⌉ - 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..contract import unsupported
from ..registry import Cost

__all__: list[str] = []

Pair = tuple[int, int]  # for height and width
LIMIT = 1 << 31  # the kernels count places in 32 bits


class Windows(NamedTuple):
    """``size`` windows, (P, Q). A kernel of (0, 0) stands for adaptive ones."""

    size: Pair
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def widest(self, d: int, n: int) -> int:
        """At least the offsets of a window along dimension ``d`` of ``n`` numbers: (r, s) is number r widest + s of a window."""
        P = self.size[d]
        return self.kernel[d] or n // P + (2 if n % P else 0)

    def has_bytes(self, shape: Sequence[int]) -> bool:
        """Whether the number of a place in a window fits into a byte."""
        return self.widest(0, shape[-2]) * self.widest(1, shape[-1]) <= 256

    def starts(self, d: int, n: int, like: Tensor) -> Tensor:
        """Where the windows along dimension ``d`` begin, which may be in the padding."""
        p = torch.arange(self.size[d], device=like.device)
        return p * self.stride[d] - self.padding[d] if self.kernel[d] else p * n // self.size[d]


def count(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows lie along ``n`` numbers. With ``ceil_mode`` the last one may reach out of the padded input, but not begin there."""
    free = n + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return free // stride + 1
    P = -(-free // stride) + 1
    return P - 1 if (P - 1) * stride >= n + padding else P


def is_int(n: Any) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool)


def _pair(value: Any) -> Pair | None:
    """Two numbers, or None where ``value`` names none."""
    if is_int(value):
        return value, value
    if isinstance(value, (tuple, list)) and 1 <= len(value) <= 2 and is_int(value[0]) and is_int(value[-1]):
        return value[0], value[-1]
    return None


def _unsupported(x: Any) -> str | None:
    reason = unsupported(("input", x))
    if reason is None and (not 3 <= x.dim() <= 4 or 0 in x.shape[-3:]):
        return f"input has shape {tuple(x.shape)}; kernels take (C, H, W) and (N, C, H, W), of which only N may be 0"
    return reason


def regular(
    name: str, x: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> Windows | str:  # fmt: skip
    """The windows for these arguments of the function ``name``, or why no kernel takes them. On the path of every call.

    Raises:
        RuntimeError: numbers that make no windows, as torch does.
    """
    reason = _unsupported(x)
    if reason is not None:
        return reason
    kernel, pad, apart = _pair(kernel_size), _pair(padding), _pair(dilation)
    step = kernel if stride is None or stride in ([], ()) else _pair(stride)
    if kernel is None or step is None or pad is None or apart is None or type(ceil_mode) is not bool:
        return (
            f"kernel_size is {kernel_size!r}, stride {stride!r}, padding {padding!r}, dilation {dilation!r} and ceil_mode {ceil_mode!r}; "
            "kernels take one int or two each, and a bool"
        )
    found = []
    for d, n in enumerate(x.shape[-2:]):
        k, s, p, a = kernel[d], step[d], pad[d], apart[d]
        for what, value, least in (("kernel_size", k, 1), ("stride", s, 1), ("dilation", a, 1), ("padding", p, 0)):
            if not least <= value < LIMIT:
                raise (RuntimeError if -(2**63) <= value < 2**63 else ValueError)(
                    f"{name}: {what} is {value}, needs to be at least {least} and less than 2^31"
                )
        if p > k // 2:
            raise RuntimeError(f"{name}: padding is {p}, needs to be at most half of kernel_size, which is {k}")
        P = count(n, k, s, p, a, ceil_mode)
        if P < 1:
            raise RuntimeError(f"{name}: input has shape {tuple(x.shape)}, too small for kernel_size {k}, padding {p} and dilation {a}")
        found.append(P)
    return _checked(x, Windows((found[0], found[1]), kernel, step, pad, apart))


def adaptive(name: str, x: Any, output_size: Any) -> Windows | str:
    """The same for adaptive windows; None in ``output_size`` keeps the input's size."""
    reason = _unsupported(x)
    if reason is not None:
        return reason
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if output_size is None or len(sizes) != 2 or not all(P is None or is_int(P) for P in sizes):
        return f"output_size is {output_size!r}; kernels take one int or two, or None in a pair"
    P, Q = (n if P is None else P for P, n in zip(sizes, x.shape[-2:]))
    if P < 0 or Q < 0 or P >= LIMIT or Q >= LIMIT:
        raise RuntimeError(f"{name}: output_size is {output_size}, needs to be at least 0 and less than 2^31")
    if P == 0 or Q == 0:
        return f"output_size is {output_size}; kernels make results of at least one number"
    return _checked(x, Windows((P, Q), (0, 0)))


def _checked(x: Tensor, windows: Windows) -> Windows | str:
    H, W = x.shape[-2:]
    if H * W >= LIMIT or windows.widest(0, H) * windows.widest(1, W) >= LIMIT:
        return f"input has shape {tuple(x.shape)}; kernels take planes and windows of less than 2^31 numbers"
    return windows


def as_batch(x: Tensor) -> Tensor:
    """(C, H, W) as (1, C, H, W), contiguous as torch's result is."""
    return x if x.dim() == 4 else x.contiguous()[None]


def is_channels_last(x: Tensor) -> bool:
    """Whether the kernels, like torch, take (N, C, H, W) for channels last. On the path of every call with grad."""
    return not x.is_contiguous() and suggest_memory_format(x) == torch.channels_last


def empty(like: Tensor, channels_last: bool, H: int, W: int, dtype: torch.dtype | None = None) -> Tensor:
    """(N, C, H, W) with the first two of ``like``, for results while a graph is traced."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((*like.shape[:2], H, W), dtype=dtype or like.dtype, device=like.device, memory_format=form)


def why(at: Windows | str) -> str | None:
    """Why no kernel runs, or None where one does."""
    return at if isinstance(at, str) else None


# ---- what the entries of OPS share ---------------------------------------------------------------------------------------------------


def make(factory: Callable[..., Tensor], lead: tuple[int, ...], channels_last: bool) -> Tensor:
    x = factory(*lead)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def make_adaptive(factory: Callable[..., Tensor], lead: tuple[int, ...], size: Any, channels_last: bool = False) -> tuple[Any, ...]:
    return make(factory, lead, channels_last), size


def cost(lead: tuple[int, ...], at: Windows | str) -> Cost:
    """An operation for every place of every window; forward x and y are moved, backward dy and dx."""
    assert isinstance(at, Windows)
    planes, (P, Q), (H, W) = torch.Size(lead[:-2]).numel(), at.size, lead[-2:]
    flops, moved = planes * P * Q * at.widest(0, H) * at.widest(1, W), planes * (H * W + P * Q)
    return Cost(flops, flops, moved, moved)


def cost_adaptive(lead: tuple[int, ...], size: Any, channels_last: bool = False) -> Cost:
    return cost(lead, adaptive("", torch.empty(lead, device="meta"), size))


BENCH: list[dict[str, Any]] = [
    {"lead": (8, 64, 112, 112), "k": 3, "s": 2, "p": 1}, {"lead": (8, 64, 112, 112), "k": 3, "s": 2, "p": 1, "channels_last": True},
    {"lead": (32, 64, 56, 56), "k": 2}, {"lead": (32, 64, 56, 56), "k": 2, "channels_last": True}, {"lead": (32, 256, 14, 14), "k": 2},
    {"lead": (32, 256, 14, 14), "k": 2, "channels_last": True},
]  # fmt: skip
ADAPTIVE_SAMPLES: list[dict[str, Any]] = [
    {"lead": (0, 3, 4, 4), "size": 2}, {"lead": (1, 1, 1, 1), "size": 1}, {"lead": (3, 5, 7), "size": (2, 3)},
    {"lead": (2, 3, 7, 7), "size": 1}, {"lead": (2, 3, 9, 11), "size": (4, 3)}, {"lead": (2, 3, 9, 11), "size": 3, "channels_last": True},
    {"lead": (2, 3, 12, 8), "size": (3, 4)}, {"lead": (2, 5, 8, 6), "size": (11, None)},
    {"lead": (1, 67, 5, 6), "size": (2, 4), "channels_last": True},
    {"lead": (2, 1, 41, 43), "size": (2, 2)},
]  # fmt: skip
ADAPTIVE_BENCH: list[dict[str, Any]] = [
    {"lead": (8, 512, 7, 7), "size": 1}, {"lead": (32, 32, 64, 64), "size": 4}, {"lead": (8, 512, 7, 7), "size": 1, "channels_last": True},
    {"lead": (32, 32, 64, 64), "size": 4, "channels_last": True},
]  # fmt: skip
