"""What every test shares: a fixed seed, little for the garbage collector to do, and no test marked `gpu` where there is no CUDA device."""

from __future__ import annotations

import gc
import os

import pytest

# Tests run side by side: a thread that waits gives its core to others. It is read when torch is loaded, here and in the processes started.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, so that none of them is left to one worker while the others have nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is there before the first test stays until the end; a garbage collection need not look through it every time."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
