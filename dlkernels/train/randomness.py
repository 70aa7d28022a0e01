"""Where random numbers come from, so that a run can be repeated and an interrupted one goes on as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def seed_all(*numbers: int) -> None:
    """Torch (every device), NumPy and Python start anew from these numbers together."""
    low, high = (int(word) for word in numpy.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(2))
    torch.manual_seed(high << 32 | low)
    numpy.random.seed(low)
    random.seed(high << 32 | low)


def random_state() -> dict[str, Any]:
    """The state of every generator, in types that ``torch.load(weights_only=True)`` reads."""
    known: Any = numpy.random.get_state()
    kind, keys, *rest = known
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(numpy.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from a ``random_state``."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.cpu().numpy().astype(numpy.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside, outside the numbers go on as if nothing had happened."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of the one generator that a step on this device draws from; half a microsecond on a CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Go on from a ``generator_state``."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
