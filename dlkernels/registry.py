"""OPS: the table of operations. Tests, benchmarks, the report, `dlkernels info` and `dlkernels show` iterate over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cost:
    """What an op must do at least: floating-point operations, and elements read plus written."""

    forward_flops: int
    backward_flops: int
    forward_elements: int
    backward_elements: int


@dataclass(frozen=True)
class Op:
    """One operation: its public function, its definition, and the sizes at which it is tested and measured.

    Attributes:
        name: the key in ``OPS``; also the id in tests and benchmarks.
        module: file stem shared by ``dlkernels/ops``, ``dlkernels/gpu`` and ``csrc/cpu``.
        call: ours; public, differentiable, any device.
        reference: the definition in plain PyTorch; takes ``call``'s arguments, any dtype, differentiable any number of times.
        native: what a PyTorch user writes for it, the opponent in benchmarks; takes ``call``'s arguments.
        make: ``make(factory, **sample)`` builds the arguments; ``factory(*shape)`` builds one tensor. Every floating-point tensor among
            the arguments is differentiable.
        samples: sizes for tests. bench: the fixed sizes for benchmarks. quick: the short list.
        tiny: sizes at which the cost of a call decides.
        cost: ``cost(**sample) -> Cost``.
        raw: names of the registered ops ``torch.ops.dlkernels.<raw>`` that do the work.
        supports: the reason why the reference runs for these arguments, or None where a kernel does.
        dtypes: what both twins compute. peers: further opponents by name.
        rival: what the benchmark races as eager where it draws random numbers of its own, so that ``native`` has to be a deterministic
            twin of ``reference``.
        plan: how the Triton kernels go about these arguments, in words, where sizes and the GPU decide that: ``explain`` tells it.
    """

    name: str
    module: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    native: Callable[..., Any]
    make: Callable[..., tuple[Any, ...]]
    samples: Sequence[Mapping[str, Any]]
    bench: Sequence[Mapping[str, Any]]
    quick: Sequence[Mapping[str, Any]]
    cost: Callable[..., Cost]
    raw: Sequence[str]
    supports: Callable[..., str | None]
    tiny: Sequence[Mapping[str, Any]] = ()
    dtypes: Sequence[torch.dtype] = FLOATS
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    rival: Callable[..., Any] | None = None
    plan: Callable[..., str] | None = None


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add ``op`` to ``OPS``; a second op of the same name is an error."""
    if op.name in OPS:
        raise ValueError(f"an op named {op.name!r} is registered already (by ops/{OPS[op.name].module}.py)")
    OPS[op.name] = op
    return op
