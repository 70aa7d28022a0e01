"""The Triton launchers of a recurrent layer. Where they run: launchers.py.

The interpreter runs programs one after the other, so there several cannot meet; a persistent launch of one program can.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from launchers import DEVICE, DTYPES, elsewhere, here, passes_in_the_interpreter, quiet
from recurrences import Case, backward, forward
from torch import Tensor

from dlkernels import OPS, explain
from dlkernels.ops.recurrent import definition
from dlkernels.ops.recurrent_raw import GRU, LSTM, MODES, Mode

pytest.importorskip("triton")

EPS = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 4e-3, torch.bfloat16: 4e-2}
pytestmark = quiet


@pytest.mark.slow
@elsewhere
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__)


DENSE, PACKED = Case(5, 3, 7), Case(18, 4, 6, 2, sizes=[18, 17, 17, 3, 1])
CASES = {
    "dense": DENSE,
    "one token": Case(1, 1, 1, T=1),
    "packed": PACKED,
    "both directions, gates again": Case(2, 5, 17, 2, bias=False, recompute=True),
    "packed, gates again": Case(3, 2, 5, 2, sizes=[3, 3, 2], recompute=True),
}


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


@here
def test_explain_tells_the_plan() -> None:
    def told(name: str, **size: Any) -> str:
        return explain(name, *OPS[name].make(lambda *shape: torch.zeros(shape, device=DEVICE), **size)).reason

    assert "whole, as one program has all 40 units of 16 sequences" in told("lstm", B=3, T=2, I=3, H=40)
    assert "steps, as h is projected" in told("lstm", B=3, T=2, I=3, H=40, P=5)
    many = told("gru", B=10000, T=1, I=1, H=512, bidirectional=True)
    assert re.search(r"steps, as 10000 programs do not run at once on \d+ multiprocessors", many)
    assert many.split(": ")[1] == told("gru_cell", B=20000, I=1, H=512).split(": ")[1]
