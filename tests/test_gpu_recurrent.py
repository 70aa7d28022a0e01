"""The Triton launchers of a recurrent layer, and, without a GPU, the machine code that they compile to. Where they run: launchers.py.

The interpreter runs programs one after the other, so there several cannot meet; a persistent launch of one program can.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from launchers import DEVICE, DTYPES, INTERPRET, elsewhere, here, passes_in_the_interpreter, quiet
from torch import Tensor

from dlkernels import OPS, explain
from dlkernels.ops.recurrent import definition
from dlkernels.ops.recurrent_raw import GRU, LSTM, MODES, Mode

pytest.importorskip("triton")

EPS = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 4e-3, torch.bfloat16: 4e-2}
compiles = pytest.mark.skipif(INTERPRET, reason="the interpreter leaves nothing to compile")
pytestmark = quiet


@pytest.mark.slow
@elsewhere
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__)


class Case(NamedTuple):
    """Sequences, inputs, units, directions, steps; of packed sequences how many run at each; P: to how many numbers h is projected."""

    B: int
    I: int
    H: int
    D: int = 1
    T: int = 3
    sizes: list[int] | None = None
    bias: bool = True
    recompute: bool = False
    P: int = 0

    def tensors(self, mode: Mode, dtype: torch.dtype, device: str = DEVICE) -> dict[str, Any]:
        """The arguments that both launchers share."""
        N, rows, P = sum(self.sizes) if self.sizes else self.T * self.B, mode.gates * self.H, self.P or self.H

        def randn(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta") if device == "meta" else torch.randn(shape).to(device, dtype)

        weights = []
        for _ in range(self.D):
            weights += [randn(rows, self.I) / self.I**0.5, randn(rows, P) / P**0.5, *(randn(rows) for _ in range(2 * self.bias))]
            weights += [randn(P, self.H) / self.H**0.5] * bool(self.P)
        sizes = None if self.sizes is None else torch.tensor(self.sizes)
        c0 = randn(self.D, self.B, self.H) if mode.has_cell else None
        return {"x": randn(N, self.I), "h0": randn(self.D, self.B, P), "c0": c0, "weights": weights, "batch_sizes": sizes}


DENSE, PACKED = Case(5, 3, 7), Case(18, 4, 6, 2, sizes=[18, 17, 17, 3, 1])
CASES = {
    "dense": DENSE,
    "one token": Case(1, 1, 1, T=1),
    "packed": PACKED,
    "both directions, gates again": Case(2, 5, 17, 2, bias=False, recompute=True),
    "packed, gates again": Case(3, 2, 5, 2, sizes=[3, 3, 2], recompute=True),
}


def forward(mode: Mode, args: dict[str, Any], keep_gates: bool = True, keep_cells: bool = True) -> Any:
    from dlkernels.gpu import recurrent

    return recurrent.forward(**args, mode=mode.code, keep_gates=keep_gates, keep_cells=keep_cells)


def backward(mode: Mode, slopes: list[Any], args: dict[str, Any], kept: list[Any], need_dx: bool = True, need_dweights: bool = True) -> Any:
    """``slopes``: dy, dhn, dcn; ``kept``: y, gates, cells."""
    from dlkernels.gpu import recurrent

    given = dict(zip(("dy", "dhn", "dcn", "y", "gates", "cells"), (*slopes, *kept), strict=True))
    return recurrent.backward(**given, **args, mode=mode.code, need_dx=need_dx, need_dweights=need_dweights)


def ours(mode: Mode, args: dict[str, Any], dys: list[Tensor], keep: bool = True) -> list[Tensor]:
    """y, hn, cn, then the gradients of x, h0, c0 and the weights."""
    y, hn, cn, gates, cells = forward(mode, args, keep)
    assert (gates is None) == (not keep or not mode.kept) and (cells is None) == (not mode.has_cell)
    dx, dh0, dc0, dweights = backward(mode, [*dys, None][:3], args, [y, gates, cells])
    return [t for t in (y, hn, cn, dx, dh0, dc0, *dweights) if t is not None]


def exact(mode: Mode, args: dict[str, Any], dys: list[Tensor]) -> list[Tensor]:
    """The same in float64, of the definition."""
    x, h0, c0, weights, sizes = args.values()
    inputs: list[Any] = [None if t is None else t.double().requires_grad_() for t in (x, h0, c0, *weights)]
    ys = definition(inputs[0], inputs[1], inputs[2], sizes, mode, None, *inputs[3:])
    found = torch.autograd.grad(ys, [t for t in inputs if t is not None], [d.double() for d in dys])
    return [*(y.detach() for y in ys), *found]


def check(mode: Mode, case: Case, dtype: torch.dtype) -> None:
    args = case.tensors(mode, dtype)
    shapes = [(len(args["x"]), case.D * (case.P or case.H)), *(args[name].shape for name in ("h0", "c0")[: 1 + mode.has_cell])]
    dys = [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]
    before = [t.clone() for t in (args["x"], args["h0"], *args["weights"])]
    for i, (f, w) in enumerate(zip(ours(mode, args, dys, not case.recompute), exact(mode, args, dys), strict=True)):
        assert f.dtype == dtype and f.shape == w.shape
        error = (f.double() - w).abs().max() / w.abs().max().clamp_min(1e-3)
        assert error <= EPS[dtype], f"{mode.name} {case}: result {i} is off by {error}"
    assert all(torch.equal(a, b) for a, b in zip(before, (args["x"], args["h0"], *args["weights"]), strict=True))


@here
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, mode: Mode) -> None:
    check(mode, CASES[name], torch.float64)


@here
@pytest.mark.parametrize("case", [Case(5, 3, 7, P=3), Case(3, 2, 19, 2, sizes=[3, 3, 2], bias=False, recompute=True, P=18)], ids=str)
def test_projections(case: Case) -> None:
    for dtype in DTYPES:
        check(LSTM, case, dtype)


@here
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_other_dtypes(mode: Mode, dtype: torch.dtype) -> None:
    check(mode, Case(3, 8, 18, 2 if dtype == torch.float32 else 1), dtype)


@here
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name, chunks", [("whole", 1), ("whole", 0), ("persistent", 1), ("persistent", 0), ("steps", 0), ("steps", 1)])
def test_every_way_gives_the_same(name: str, chunks: int, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, units and depth smaller than the sizes where programs need not meet; W_hh kept and read at every step."""
    from dlkernels.gpu import recurrent_layer
    from dlkernels.gpu.recurrent_plan import Plan

    alone = name != "steps"

    def forced(kind: str, gates: int, D: int, B: int, H: int, device: Any) -> Plan:
        depth = 32 if name == "whole" and chunks else 16
        return Plan(name, "", 16, 32 if alone else 16, depth, 4, 1, chunks and -(-H // depth))

    monkeypatch.setattr(recurrent_layer, "plan", forced)
    several = name != "persistent" or DEVICE == "cuda"
    B = 17 if several else 4
    check(mode, Case(B, 3, 21, 1 + several, sizes=[B, 3]), torch.float64)


@here
@pytest.mark.parametrize("mode", (LSTM, GRU), ids=lambda mode: mode.name)
def test_only_what_is_needed(mode: Mode) -> None:
    args = Case(2, 3, 5, T=2).tensors(mode, torch.float64)
    y, _, _, gates, cells = forward(mode, args)
    bare = forward(mode, args, False, False)
    assert torch.equal(bare[0], y) and bare[3] is None and bare[4] is None
    kept, dy, dhn = [y, gates, cells], torch.randn_like(y), torch.randn_like(args["h0"])
    dx, dh0, _, dweights = backward(mode, [dy, None, None], args, kept, False, False)
    assert dx is None and dweights == [] and torch.equal(dh0, backward(mode, [dy, None, None], args, kept)[1])
    zeros = [torch.zeros_like(dy), dhn, torch.zeros_like(dhn) if mode.has_cell else None]
    torch.testing.assert_close(backward(mode, [None, dhn, None], args, kept), backward(mode, zeros, args, kept), rtol=0, atol=0)


@here
def test_strides_and_bits() -> None:
    """Arguments with gaps give the same bits, and so does a second run."""
    args = Case(3, 2, 5, 2, sizes=[3, 3, 2]).tensors(LSTM, torch.float32)
    dys = [torch.randn(shape).to(DEVICE) for shape in ((8, 10), (2, 3, 5), (2, 3, 5))]
    first = ours(LSTM, args, dys)

    def apart(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0]

    spread = {name: apart(t) if name in ("x", "h0", "c0") else t for name, t in args.items()}
    spread["weights"] = [apart(w) for w in args["weights"]]
    for again in (ours(LSTM, args, dys), ours(LSTM, spread, [apart(d) for d in dys])):
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@here
def test_bad_arguments() -> None:
    args = DENSE.tensors(LSTM, torch.float32)
    weights = args["weights"]
    for error, message, changed in (
        (RuntimeError, r"x and h0 must be \(N, I\) and \(1 or 2, B, H\)", {"x": args["x"][0]}),
        (RuntimeError, "1 or 2, B, H", {"h0": torch.cat([args["h0"]] * 3)}),
        (RuntimeError, "x has 14 rows, needs a multiple of the 5", {"x": args["x"][:14]}),
        (RuntimeError, "x has no rows", {"x": args["x"][:0]}),
        (RuntimeError, "c0 is None", {"c0": None}),
        (RuntimeError, "h0 must have dtype", {"h0": args["h0"].double()}),
        (RuntimeError, "weights has 1 tensors", {"weights": weights[:1]}),
        (RuntimeError, r"weights\[2\] must have shape \(7, 7\), got \(28,\)", {"weights": weights[:3]}),
        (RuntimeError, r"c0 must have shape \(1, 5, 7\)", {"c0": args["c0"][:, :3], "weights": weights[:3]}),
        (RuntimeError, r"weights\[1\] must have shape \(28, 7\), got \(28, 3\)", {"weights": weights[:1] * 4}),
        (RuntimeError, r"batch_sizes\[1\] is 6, needs 1 to 5", {"batch_sizes": torch.tensor([5, 6, 4])}),
        (RuntimeError, r"batch_sizes\[0\] is 4, needs the number of sequences in h0, 5", {"batch_sizes": torch.tensor([4])}),
        (RuntimeError, "batch_sizes sum up to 14", {"batch_sizes": torch.tensor([5, 5, 4])}),
        (RuntimeError, "batch_sizes must be int64 of 1", {"batch_sizes": torch.tensor([5.0])}),
        (TypeError, "strided", {"x": args["x"].to_sparse()}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            forward(LSTM, {**args, **changed})
    with pytest.raises(RuntimeError, match="mode is 4"):
        forward(replace(LSTM, code=4), args)
    y, _, _, gates, cells = forward(LSTM, args)
    for message, kept in (
        ("y must have shape", [y[1:], gates, cells]), ("gates must have shape", [y, gates[1:], cells]), ("cells is None", [y, gates, None]),
        ("cells must have dtype", [y, gates, cells.double()]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            backward(LSTM, [y, None, None], args, kept)
    with pytest.raises(RuntimeError, match="dhn must have shape"):
        backward(LSTM, [None, y, None], args, [y, gates, cells])


# ---- without a GPU: what is launched, and the code it compiles to --------------------------------------------------------------------


SWEEPS = ("recurrent_forward", "recurrent_backward")


def sweeps(mode: Mode, case: Case, target: str, dtype: torch.dtype = torch.bfloat16, names: tuple[str, ...] = SWEEPS) -> list[Any]:
    """The launches through time, of the forward and of the backward."""
    from dlkernels.gpu import aot

    args = case.tensors(mode, dtype, "meta")

    def run() -> None:
        y, _, _, gates, cells = forward(mode, args)
        backward(mode, [y, None, None], args, [y, gates, cells])

    return [launch for launch in aot.record(run, target) if launch.kernel.__name__ in names]


@compiles
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


@here
def test_explain_tells_the_plan() -> None:
    def told(name: str, **size: Any) -> str:
        return explain(name, *OPS[name].make(lambda *shape: torch.zeros(shape, device=DEVICE), **size)).reason

    assert "whole, as one program has all 40 units of 16 sequences" in told("lstm", B=3, T=2, I=3, H=40)
    assert "steps, as h is projected" in told("lstm", B=3, T=2, I=3, H=40, P=5)
    many = told("gru", B=10000, T=1, I=1, H=512, bidirectional=True)
    assert re.search(r"steps, as 10000 programs do not run at once on \d+ multiprocessors", many)
    assert many.split(": ")[1] == told("gru_cell", B=20000, I=1, H=512).split(": ")[1]


@compiles
def test_the_plan_in_words() -> None:
    from dlkernels.gpu import aot
    from dlkernels.gpu.launch import recording
    from dlkernels.gpu.recurrent_layer import plan_in_words

    x = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    with recording(aot.TARGETS["sm_90"].device):
        assert plan_in_words(x, 4, 1, 64, 256, False).startswith("persistent, as 32 programs run at once on 132 multiprocessors")
        assert plan_in_words(x, 4, 1, 64, 256, True).startswith("steps, as h is projected")


@compiles
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


@compiles
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


@compiles
def test_other_ways_compile() -> None:
    cases = (GRU, Case(4, 8, 64), torch.bfloat16), (LSTM, Case(64, 8, 96), torch.float32), (GRU, Case(4, 8, 32), torch.float64)
    for mode, case, dtype in cases:
        for launch in sweeps(mode, case, "sm_90", dtype):
            assert_good(launch, "sm_90", dtype != torch.float32)
    launches = sweeps(LSTM, Case(1024, 8, 1024, T=2), "sm_90")
    for launch in (launches[0], launches[-1]):
        assert_good(launch, "sm_90")


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_steps_of_a_projection_compile(target: str) -> None:
    """All four kernels around linear.py's products."""
    names = ("cells_forward", "cells_backward", "with_slope", "outputs_again")
    launches = {launch.kernel.__name__: launch for launch in sweeps(LSTM, Case(64, 8, 256, 2, T=2, P=64), target, names=names)}
    assert set(launches) == set(names)
    for launch in launches.values():
        assert_good(launch, target, tensor_cores=False)
