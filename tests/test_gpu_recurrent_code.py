"""What the Triton launchers of a recurrent layer start, and the machine code that it compiles to, without a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from launchers import INTERPRET
from recurrences import Case, backward, forward

from dlkernels.ops.recurrent_raw import GRU, LSTM, Mode

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter leaves nothing to compile")

SWEEPS = ("recurrent_forward", "recurrent_backward")


def sweeps(mode: Mode, case: Case, target: str, dtype: torch.dtype = torch.bfloat16, names: tuple[str, ...] = SWEEPS) -> list[Any]:
    """The launches through time, of the forward and of the backward."""
    from dlkernels.gpu import aot

    args = case.tensors(mode, dtype, "meta")

    def run() -> None:
        y, _, _, gates, cells = forward(mode, args)
        backward(mode, [y, None, None], args, [y, gates, cells])

    return [launch for launch in aot.record(run, target) if launch.kernel.__name__ in names]


@pytest.mark.parametrize(
    "target, kind, D, B, H, wanted",
    [
        ("sm_90", "half", 1, 8, 128, ("whole", 128, True)), ("sm_90", "float", 2, 300, 64, ("whole", 64, False)),
        ("sm_90", "half", 1, 64, 256, ("persistent", 32, True)), ("sm_90", "half", 1, 64, 512, ("persistent", 32, True)),
        ("sm_90", "half", 1, 16, 768, ("persistent", 32, True)), ("sm_80", "half", 1, 16, 768, ("persistent", 16, True)),
        ("sm_90", "half", 2, 128, 300, ("persistent", 64, True)), ("sm_90", "float", 1, 64, 512, ("persistent", 32, False)),
        ("gfx942", "half", 1, 64, 256, ("persistent", 16, True)), ("sm_90", "half", 1, 64, 2048, ("persistent", 64, False)),
        ("sm_90", "half", 1, 1024, 1024, ("steps", 32, False)), ("sm_80", "double", 2, 64, 512, ("steps", 32, False)),
        ("sm_80", "tf32", 1, 1024, 1024, ("steps", 32, False)), ("gfx942", "half", 2, 2048, 512, ("steps", 32, False)),
    ],
)  # fmt: skip
def test_the_plan(target: str, kind: str, D: int, B: int, H: int, wanted: tuple[str, int, bool]) -> None:
    from dlkernels.gpu import aot, config
    from dlkernels.gpu.recurrent_plan import plan

    device = aot.TARGETS[target].device
    p = plan(kind, 4, D, B, H, device)
    assert (p.name, p.units, p.chunks > 0) == wanted, p
    programs = D * config.ceil_div(B, p.rows) * config.ceil_div(H, p.units)
    step = (p.units + p.rows) * p.depth
    numbers = 4 * (p.chunks * p.units * p.depth if p.chunks else p.stages * step)
    assert numbers * config.BYTES[kind] <= device.shared
    assert p.name != "persistent" or (programs <= device.processors and str(programs) in p.reason)


def test_the_plan_in_words() -> None:
    from dlkernels.gpu import aot
    from dlkernels.gpu.launch import recording
    from dlkernels.gpu.recurrent_layer import plan_in_words

    x = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    with recording(aot.TARGETS["sm_90"].device):
        assert plan_in_words(x, 4, 1, 64, 256, False).startswith("persistent, as 32 programs run at once on 132 multiprocessors")
        assert plan_in_words(x, 4, 1, 64, 256, True).startswith("steps, as h is projected")


def test_what_is_launched() -> None:
    """One launch for all steps of both directions where programs can meet, all at once; one a step where they cannot."""
    launches = sweeps(LSTM, Case(64, 8, 256, 2, T=9), "sm_90")
    assert [(launch.cooperative, launch.grid) for launch in launches] == [(True, (8, 4, 2))] * 2
    assert not any(launch.cooperative for launch in sweeps(LSTM, Case(64, 8, 64, T=9), "sm_90"))
    launches = sweeps(GRU, Case(1024, 8, 1024, T=9), "sm_90")
    assert [launch.kernel.__name__ for launch in launches] == ["recurrent_forward"] * 9 + ["recurrent_backward"] * 10
    assert not any(launch.cooperative for launch in launches)


def assert_good(launch: Any, target: str, tensor_cores: bool = True) -> Any:
    from dlkernels.gpu import aot

    found = aot.compile_launch(launch, target)
    assert found.spilled == 0 and 0 < found.registers <= 512, found
    assert found.shared <= aot.TARGETS[target].device.shared, found
    assert bool(found.mma) == tensor_cores, found
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_part_of_the_weights_stays_in_shared_memory(target: str) -> None:
    """Also: programs meet by a count that is released after all threads have stored, and acquired before any loads."""
    for launch in sweeps(LSTM, Case(64, 8, 256), target):
        found, units = assert_good(launch, target), launch.constants["BU"]
        if target == "gfx942":
            continue
        assert found.shared >= 4 * 256 * units * 2
        sass = found.text("sass")
        loop = sass[sass.index("STRONG.GPU") :]  # the first of the loop: the acquiring load
        assert re.search(r"LDG\.E\S*\.STRONG\.GPU", loop) and "CCTL.IVALL" in loop
        assert re.search(r"BAR\.SYNC[^$]*?MEMBAR[^$]*?(?:RED|ATOM)\S*\.ADD", loop)


def test_other_ways_compile() -> None:
    cases = (GRU, Case(4, 8, 64), torch.bfloat16), (LSTM, Case(64, 8, 96), torch.float32), (GRU, Case(4, 8, 32), torch.float64)
    for mode, case, dtype in cases:
        for launch in sweeps(mode, case, "sm_90", dtype):
            assert_good(launch, "sm_90", dtype != torch.float32)
    launches = sweeps(LSTM, Case(1024, 8, 1024, T=2), "sm_90")
    for launch in (launches[0], launches[-1]):
        assert_good(launch, "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_steps_of_a_projection_compile(target: str) -> None:
    """All four kernels around linear.py's products."""
    names = ("cells_forward", "cells_backward", "with_slope", "outputs_again")
    launches = {launch.kernel.__name__: launch for launch in sweeps(LSTM, Case(64, 8, 256, 2, T=2, P=64), target, names=names)}
    assert set(launches) == set(names)
    for launch in launches.values():
        assert_good(launch, target, tensor_cores=False)
