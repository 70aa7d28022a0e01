"""Which CPU library is loaded, which implementation a tensor gets, and why."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._C import _AutoDispatchBelowAutograd as below_autograd

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)  # what kernels take; other subclasses bring semantics of their own
_HERE = Path(__file__).parent
_LIBRARY = torch.library.Library("dlkernels", "DEF")  # holds the schemas; dies with the process
TRITON_ON_CPU = os.environ.get("DLKERNELS_BACKEND") == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def supported_isas() -> list[str]:
    """Instruction sets that this CPU can run and this build holds, slowest first."""
    from . import _host

    return [isa for isa in _host.supported_isas() if library_path(isa) is not None]


def library_path(isa: str) -> Path | None:
    """The shared library built for ``isa``, or None where this build has none."""
    return next(iter(sorted(_HERE.glob(f"_cpu_{isa}.*so"))), None)


@cache
def isa() -> str:
    """The instruction set in use: ``DLKERNELS_ISA`` where it is set, else the best one this CPU supports.

    Raises:
        RuntimeError: the CPU cannot run the one asked for, or the package was built without its C++ part.
    """
    from . import _host

    supported = supported_isas()
    if not supported:
        raise RuntimeError("dlkernels was installed without its C++ kernels; reinstall with a C++ compiler (g++ or clang++) on the PATH")
    wanted = os.environ.get("DLKERNELS_ISA") or _host.preferred_isa()
    if wanted not in supported:
        raise RuntimeError(f"DLKERNELS_ISA={wanted} cannot run on this CPU ({_host.cpu_name()}); supported here: {', '.join(supported)}")
    return wanted


@cache
def load_cpu() -> str:
    """Load the CPU kernels (once) and return their instruction set."""
    from . import _host

    chosen = isa()
    if chosen == "avx512_amx" and not _host.request_amx():
        raise RuntimeError("the operating system refuses the AMX tile registers to this process; set DLKERNELS_ISA=avx512")
    torch.ops.load_library(str(library_path(chosen)))
    return chosen


def load() -> None:
    """Attach the kernels that serve CPU tensors. Triton's are attached already, see ``define``."""
    if not TRITON_ON_CPU:
        load_cpu()


@cache
def _launcher(name: str) -> Callable[..., Any]:
    """The Triton launcher of a raw op; the first one asked for imports Triton."""
    from . import gpu

    found = gpu.implementations().get(name)
    if found is None:
        raise NotImplementedError(f"torch.ops.dlkernels.{name} has no Triton kernel")
    return found


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the raw op ``torch.ops.dlkernels.<name>``, attach its Triton launcher, and return the function that calls it.

    The raw op has no derivative of its own: called where one would be recorded it raises instead of dropping the gradient. The
    returned function enters below that check, so it belongs inside an ``autograd.Function`` or where nothing requires grad.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"dlkernels::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, lambda *args: _launcher(name)(*args), "CPU" if TRITON_ON_CPU else "CUDA")
    op = getattr(torch.ops.dlkernels, name).default

    def refuse_grad(keyset: torch.DispatchKeySet, *args: Any) -> Any:
        if "torch.distributed.tensor" in sys.modules:
            refuse_dtensors(name, args)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"torch.ops.dlkernels.{name} records no gradient, but an argument requires grad; "
                "call the function in dlkernels.functional, or detach the arguments"
            )
        with below_autograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, refuse_grad, "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        with below_autograd():
            return op(*args)

    return call


def refuse_dtensors(name: str, args: tuple[Any, ...]) -> None:
    """Raw ops know nothing of tensors spread over processes; the public functions take them apart, see sharding.py."""
    from .contract import is_spread

    if any(is_spread(*(arg if isinstance(arg, (list, tuple)) else (arg,))) for arg in args):
        raise NotImplementedError(
            f"torch.ops.dlkernels.{name} has no sharding rule, and an argument is a DTensor; "
            "call the function in dlkernels.functional, or pass what to_local() returns"
        )


def apply_function(function: Any, *args: Any) -> Any:
    """``function.apply(*args)`` for an autograd.Function with ``setup_context``, ten times cheaper where nothing is being transformed.

    ``Function.apply`` inspects the signature of ``forward`` at every call to fill in defaults; we pass every argument.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*(_again(args, i) for i in range(len(args))))
    return super(torch.autograd.Function, function).apply(*args)


def _again(args: tuple[Any, ...], i: int) -> Any:
    """``args[i]``, as a view of itself where it has come before: torch.compile takes no tensor twice."""
    repeated = isinstance(args[i], torch.Tensor) and any(args[i] is before for before in args[:i])
    return args[i].view_as(args[i]) if repeated else args[i]


def is_tracing(t: Any) -> bool:
    """FakeTensor and FunctionalTensor stand for a plain tensor while a graph is traced."""
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(t, (FakeTensor, FunctionalTensor))


@dataclass(frozen=True)
class Choice:
    """What runs for given arguments: ``implementation`` is "cpu (<isa>)", "triton", or "reference"; ``reason`` says why."""

    implementation: str
    reason: str


def explain(op: str, *args: Any) -> Choice:
    """Say which implementation ``dlkernels.functional``'s ``op`` uses for ``args``.

    Raises:
        ValueError: ``op`` is not in ``dlkernels.OPS``.
    """
    from .registry import OPS

    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(sorted(OPS))}")
    plain, shards = _on_shards(OPS[op].call, args)
    reason = OPS[op].supports(*plain)
    if reason is not None:
        return Choice("reference", reason + shards)
    device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
    choice, plan = kernel_on(device), OPS[op].plan
    how = f": {plan(*plain)}" if plan is not None and choice.implementation == "triton" and device != "meta" else ""
    return Choice(choice.implementation, choice.reason + how + shards)


def kernel_on(device: str) -> Choice:
    """What runs on a device of this type where a kernel does."""
    if device == "cpu" and not TRITON_ON_CPU:
        return Choice(f"cpu ({isa()})", "C++ SIMD kernel")
    return Choice("triton", "interpreted on the CPU" if device == "cpu" else f"Triton kernel on {device}")


def _on_shards(call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[tuple[Any, ...], str]:
    """Where ``call`` computes DTensors on what each process holds: plain tensors like them, and the layouts that it takes."""
    from .contract import is_spread

    if is_spread(*args):
        from .sharding import Answered, asking, without_numbers

        with asking(), contextlib.suppress(RuntimeError, TypeError, ValueError):
            try:
                call(*args)
            except Answered as answer:
                return tuple(without_numbers(a) if is_spread(a) else a for a in args), f" on what each process holds ({answer})"
    return args, ""
