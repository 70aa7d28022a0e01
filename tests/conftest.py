"""What every test shares: a fixed seed, and tests marked `gpu` are skipped where there is no CUDA device."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
