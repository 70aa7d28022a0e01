"""Arguments for an op at a given size: drawn once, the same in every dtype up to rounding."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..registry import Op

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def arguments(op: Op, size: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Any, ...]:
    """`op`'s arguments at `size`: normal random numbers rounded to `dtype` on `device`; nothing requires grad yet."""
    generator = torch.Generator().manual_seed(seed)

    def factory(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(device, dtype)

    return tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in op.make(factory, **size))


def is_differentiable(arg: object) -> bool:
    """Every floating-point tensor among an op's arguments is."""
    return isinstance(arg, Tensor) and arg.is_floating_point()


def requiring_grad(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """New leaves with the same values, in `dtype` where it is given, that require grad; other arguments as they are."""
    return tuple(arg.detach().to(dtype or arg.dtype, copy=True).requires_grad_() if is_differentiable(arg) else arg for arg in args)


def argument_names(op: Op, args: tuple[Any, ...]) -> list[str]:
    """The names of `op`'s arguments; those that it takes as `*names` are numbered."""
    names: list[str] = []
    for name, parameter in inspect.signature(op.call).parameters.items():
        several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}{i}" for i in range(len(args) - len(names))] if several else [name]
    return names


def gradient_names(op: Op, args: tuple[Any, ...]) -> list[str]:
    """ "dx", "dweight", ...: a d before the name of every differentiable argument."""
    return [f"d{name}" for name, arg in zip(argument_names(op, args), args) if is_differentiable(arg)]


def label(size: Mapping[str, Any]) -> str:
    """A size in one short word: {"M": 64, "K": 784, "N": 256} -> "64x784x256"; flags and options follow by name."""
    numbers: list[int] = []
    words: list[str] = []
    for name, value in size.items():
        if isinstance(value, bool):
            words.append(name if value else f"no-{name}")
        elif isinstance(value, int):
            numbers.append(value)
        elif isinstance(value, (tuple, list)):
            numbers.extend(value)
        else:
            words.append(str(value))
    return " ".join(["x".join(map(str, numbers)), *words]).strip()
