"""Memory of large results, which csrc/cpu/pool.h keeps for the next one."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import isolated

import dlkernels.functional as F
from dlkernels.backend import TRITON_ON_CPU

pytestmark = pytest.mark.skipif(TRITON_ON_CPU, reason="the pool belongs to the C++ kernels")
LARGE = 4 << 20  # numbers; 16 MiB of float32


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def test_memory_that_was_let_go_is_used_again() -> None:
    x = torch.randn(LARGE)
    first = F.relu(x)
    place = first.fill_(float("nan")).data_ptr()
    del first
    second, third = F.relu(x), F.relu(-x)
    assert second.data_ptr() == place != third.data_ptr()
    assert torch.equal(second, x.clamp(min=0)) and torch.equal(third, (-x).clamp(min=0))


def test_sizes_that_differ_a_little_share_memory() -> None:
    first = F.relu(torch.randn(LARGE))
    place = first.data_ptr()
    del first
    assert F.relu(torch.randn(LARGE - 1000)).data_ptr() == place


def test_a_view_keeps_the_memory() -> None:
    x = torch.ones(LARGE)
    row = F.relu(x)[-4:]
    others = [F.relu(-x) for _ in range(3)]
    assert row.tolist() == [1] * 4 and not any(other.any() for other in others)


def test_threads_do_not_get_the_same_memory() -> None:
    def work(number: int) -> bool:
        x = torch.full((LARGE // 4,), float(number + 1))
        return all(bool((F.relu(x) == number + 1).all()) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@isolated
def test_no_more_than_the_limit_is_kept() -> None:
    if not sys.platform.startswith("linux"):
        return
    os.environ["DLKERNELS_POOL_MIB"] = "40"
    x = torch.randn(LARGE)
    F.relu(x[:100])
    before = resident_mib()
    for size in range(LARGE, LARGE // 2, -LARGE // 16):  # eight size classes, so that nothing fits what was kept before
        results = [F.relu(x[:size]) for _ in range(4)]
        assert resident_mib() > before + 4 * size * 4 / 2**20 - 1
        del results
        assert before + 20 < resident_mib() < before + 48


@isolated
def test_a_limit_of_zero_keeps_nothing() -> None:
    if not sys.platform.startswith("linux"):
        return
    os.environ["DLKERNELS_POOL_MIB"] = "0"
    x = torch.randn(LARGE)
    F.relu(x[:100])
    before = resident_mib()
    results = [F.relu(x) for _ in range(4)]
    del results
    assert resident_mib() < before + 8
