r"""dropout: every number is set to 0 with probability p, the others are scaled by 1 / (1 - p), so that the mean stays what it was.

Forward     y[n]  = x[n] f[n],   f[n] = 1 / (1 - p) where philox(seed, n) >= ⌊p 2³²⌋, else 0
Backward    dx[n] = dy[n] f[n]

f depends on the seed and the place alone (csrc/cpu/philox.h says how; `numbers` below is the same in integer tensors), so nothing is kept
for the backward but the seed: it is the forward again, on dy, and so is every derivative after it. CPU and GPU make the same f.
Numbers are counted in the order in which they lie in memory.

Shapes      x (*)   seed (1,) int64, on the device of x   y (*);   N is the number of elements
Work        2N elements moved in each direction, and about 10 integer operations for each of the 10 rounds that make 4 numbers: memory
            decides for float32, the generator for half types
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import apply_function, define
from ..contract import Optionals, in_memory_order, is_spread, needs_grad, on_shards, overwrite, require_tensors, unsupported
from ..registry import Cost, Op, register

__all__ = ["dropout"]


def check_seed(x: Tensor, seed: Tensor, p: float) -> None:
    """What the kernels check of a seed and a probability, while a graph is traced."""
    torch._check(seed.dtype == torch.int64 and seed.shape == (1,), lambda: f"seed must be one int64, got {seed.dtype} {tuple(seed.shape)}")
    torch._check(seed.device == x.device, lambda: f"seed is on {seed.device}, x on {x.device}")
    torch._check(0 <= p <= 1, lambda: f"p is {p}, needs a probability between 0 and 1")


def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    check_seed(x, seed, p)
    return x.new_empty(x.shape)


_dropout = define("dropout(Tensor x, Tensor seed, float p) -> Tensor", _fake)
_dropout_ = define("dropout_(Tensor(a!) x, Tensor seed, float p) -> ()", check_seed)


class _Dropout(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, seed: Tensor, p: float) -> Tensor:
        return _dropout(x, seed, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, seed, ctx.p = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Optionals:
        (seed,) = ctx.saved_tensors
        return None if dy is None else _apply(dy, seed, ctx.p), None, None


class _DropoutInPlace(_Dropout):
    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, seed: Tensor, p: float) -> Tensor:
        _dropout_(x, seed, p)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])
        _Dropout.setup_context(ctx, inputs, output)


def _apply(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return apply_function(_Dropout, x, seed, p) if needs_grad(x) else _dropout(x, seed, p)


def numbers(count: int, seed: Tensor, row: Any = 0) -> Tensor:
    """The numbers 0 .. 2^32 - 1 of columns 0 .. count - 1 of a row, int64 on the device of ``seed``: philox.h in integer tensors. For a
    tensor of rows [M, 1] they are [M, count]."""
    n = torch.arange(count, device=seed.device)
    q = n // 64 * 16 + n % 16
    words = torch.stack(philox(q & LOW, q >> 32, row & LOW, row >> 32, seed & LOW, seed >> 32 & LOW))
    return words.gather(0, (n % 64 // 16).expand(1, *words.shape[1:]))[0]


LOW = 0xFFFFFFFF


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on words that lie in int64 tensors. The mask after a shift drops what its sign brought in."""
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & LOW) ^ c1 ^ k0, p1 & LOW, (p0 >> 32 & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def factors(drawn: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """f above of these numbers."""
    return (drawn >= min(int(p * 2**32), LOW)).to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def _reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    x, restore = in_memory_order(x)
    return restore(x * factors(numbers(x.numel(), seed), p, x.dtype).reshape(x.shape))


def _unsupported(input: Tensor, seed: Tensor, p: float = 0.5) -> str | None:
    """Why the definition in PyTorch's own operations runs, or None where a kernel does."""
    return unsupported(("input", input), ("seed", seed), indices=("seed",))


def seeded(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Dropout under a given seed, which decides every number: x ``(*)``, seed one int64 on its device, 0 <= p <= 1.

    Raises:
        TypeError: an argument is not a tensor. RuntimeError: ``seed`` or ``p`` is not as above.
    """
    if _unsupported(x, seed) is not None:
        require_tensors(("x", x), ("seed", seed))
        check_seed(x, seed, p)
        return on_shards("seeded_dropout", x, seed, p) if is_spread(x, seed) else _reference(x, seed, p)
    x, restore = in_memory_order(x)
    return restore(_apply(x, seed, p))


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of ``device``, and on it: torch.manual_seed decides it, and nothing waits for a GPU."""
    return torch.randint(2**63 - 1, (1,), device=device)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.dropout``: zeroes numbers of ``input`` ``(*)`` with probability ``p``, to 2⁻³², and scales the others.

    What is zeroed follows from one seed, drawn from torch's generator at every call; the same seed gives the same on CPU and GPU. As in
    torch, 0 times NaN or infinity is NaN, and ``input`` itself comes back where not ``training``, or ``p`` is 0, or ``input`` empty.

    Args:
        input: float32, float64, bfloat16 or float16, any strides, which the result has too.
        inplace: overwrite ``input`` and return it.

    Raises:
        ValueError: ``p`` is not between 0 and 1. TypeError: ``input`` is not a tensor. RuntimeError: a leaf that requires grad is to be
            overwritten.
    """
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or not p > 0 or unsupported(("input", input)) is not None or not input.numel():  # NaN is for torch to refuse
        require_tensors(("input", input))
        if is_spread(input, traced=True) and training and p > 0:
            return on_shards("dropout", input, p, inplace)
        return torch.nn.functional.dropout(input, p, training, inplace)
    seed = draw_seed(input.device)
    return overwrite(input, _DropoutInPlace, _dropout_, seeded, seed, p) if inplace else seeded(input, seed, p)


def _make(factory: Callable[..., Tensor], N: int, M: int = 1, lead: tuple[int, ...] | None = None, p: float = 0.3) -> tuple[Any, ...]:
    x = factory(*((M,) if lead is None else lead), N)
    return x, torch.full((1,), 0x0123456789ABCDEF, device=x.device), p


def _cost(N: int, M: int = 1, lead: tuple[int, ...] | None = None, p: float = 0.3) -> Cost:
    total = N * (M if lead is None else torch.Size(lead).numel())
    return Cost(total, total, 2 * total, 2 * total)


def _rival(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.nn.functional.dropout(x, p)


SAMPLES: list[dict[str, Any]] = [
    {"N": 0}, {"N": 1, "p": 0.5}, {"N": 17, "lead": (2, 3)}, {"N": 65, "p": 0.75}, {"N": 31, "lead": (2, 1, 5)}, {"N": 129, "p": 1.0},
    {"N": 4099, "M": 5},
]  # fmt: skip
BENCH = [{"M": M, "N": N} for M, N in [(64, 4096), (1024, 1024), (4096, 4096)]]

register(
    Op(
        name="dropout",
        module="dropout",
        call=seeded,
        reference=_reference,
        native=_reference,
        make=_make,
        samples=SAMPLES,
        bench=BENCH,
        quick=BENCH[1:2],
        tiny=[{"M": 64, "N": 128}],
        cost=_cost,
        raw=("dropout",),
        supports=_unsupported,
        rival=_rival,
    )
)
