"""LSTM, GRU and RNN as modules and functions: torch's results for every option, packed sequences, and what going through time needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import SMALL, RawCalls, run_child, threads
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import dlkernels.nn as nn
from dlkernels import functional as F

NETWORKS, CELLS = ("LSTM", "GRU", "RNN"), ("LSTMCell", "GRUCell", "RNNCell")
each_network = pytest.mark.parametrize("name", NETWORKS)
each_kind = pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NETWORKS), ("LSTM", {"proj_size": 3})], ids=str)
needs_threads = pytest.mark.skipif(SMALL, reason="the interpreter has one thread")
each_cell = pytest.mark.parametrize("name", CELLS)


def pair(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Our module and torch's, in float64, with the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **options).double()
    ours = getattr(nn, name)(*args, **options).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, PackedSequence):
        return [found.data, found.batch_sizes]
    return [found] if isinstance(found, Tensor) else [t for one in found for t in flat(one)]


def gradients(found: Any, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    total = sum(((i + 1) * t**2).sum() for i, t in enumerate(flat(found)) if t.is_floating_point())
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, leaves)


def compare(ours: Any, theirs: Any, x: Tensor, make: Any, *hx: Any) -> None:
    """Results, their strides, and the gradients of x, of the states and of all parameters; ``make(x)`` is the input."""
    found, wanted = ours(make(x), *hx), theirs(make(x), *hx)
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    leaves = [x, *flat(hx)]
    for a, b in zip(gradients(found, [*leaves, *ours.parameters()]), gradients(wanted, [*leaves, *theirs.parameters()]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["batch", "one sequence", "packed", "packed, not sorted"])
@each_kind
def test_every_option_is_torchs(name: str, options: dict[str, int], kind: str) -> None:
    several = itertools.product((1, 2), (False, True), (False, True), (False, True), (False, True))
    for layers, bidirectional, batch_first, bias, given in list(several)[:: 5 if SMALL else 1]:
        ours, theirs = pair(name, 4, 5, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, **options)
        shape, batch = ((3, 7, 4) if batch_first else (7, 3, 4), [3]) if kind != "one sequence" else ((7, 4), [])
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        widths = options.get("proj_size", 5), 5
        h = [torch.randn(layers * (1 + bidirectional), *batch, width, dtype=torch.float64, requires_grad=True) for width in widths]

        def make(x: Tensor, batch_first: bool = batch_first) -> Any:
            lengths = torch.tensor([7, 4, 2] if kind == "packed" else [2, 7, 5])
            return pack_padded_sequence(x, lengths, batch_first, kind == "packed") if kind.startswith("packed") else x

        with RawCalls() as recorded:
            compare(ours, theirs, x, make, *([tuple(h) if name == "LSTM" else h[0]] if given else []))
        assert len(recorded.calls) == 2 * layers


@each_cell
def test_every_option_of_a_cell_is_torchs(name: str) -> None:
    for bias, given, single in itertools.product((True, False), repeat=3):
        ours, theirs = pair(name, 4, 5, bias=bias)
        x = torch.randn((4,) if single else (3, 4), dtype=torch.float64, requires_grad=True)
        h = [torch.randn((5,) if single else (3, 5), dtype=torch.float64, requires_grad=True) for _ in range(2)]
        compare(ours, theirs, x, lambda x: x, *([tuple(h) if name == "LSTMCell" else h[0]] if given else []))


def test_relu() -> None:
    compare(*pair("RNN", 4, 5, 2, nonlinearity="relu"), torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True), lambda x: x)
    compare(*pair("RNNCell", 4, 5, nonlinearity="relu"), torch.randn(3, 4, dtype=torch.float64, requires_grad=True), lambda x: x)


@each_network
def test_dropout_is_between_layers_and_only_in_training(name: str) -> None:
    ours, theirs = pair(name, 4, 50, 2, dropout=0.5)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])
    first, second = ours.train()(x), ours(x)
    assert not torch.equal(first[0], second[0])
    hidden = [flat(found[1])[0] for found in (first, second)]
    assert torch.equal(hidden[0][0], hidden[1][0]) and not torch.equal(hidden[0][1], hidden[1][1])
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        getattr(nn, name)(4, 5, dropout=0.5)


@each_kind
def test_gates_computed_again_are_those_that_were_kept(name: str, options: dict[str, int]) -> None:
    ours, _ = pair(name, 4, 33, 2, bidirectional=True, **options)
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    for pack in (False, True):
        value = pack_padded_sequence(x, torch.tensor([6, 5, 2])) if pack else x
        with RawCalls() as kept:
            wanted = gradients(ours(value), [x, *ours.parameters()])
        ours.recompute = True
        value = pack_padded_sequence(x, torch.tensor([6, 5, 2])) if pack else x
        with RawCalls() as fewer:
            found = gradients(ours(value), [x, *ours.parameters()])
        ours.recompute = False
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        gates = [[args[9] for f, args in calls.calls if "recurrent_backward" in str(f)] for calls in (kept, fewer)]
        assert [g is None for g in gates[1]] == [True, True]
        assert name == "RNN" or not any(g is None for g in gates[0])


@needs_threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kind
def test_bits_do_not_depend_on_threads(name: str, options: dict[str, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = getattr(nn, name)(40, 100, 2, bidirectional=True, **options).to(dtype)
    x = torch.randn(12, 37, 40).to(dtype).requires_grad_()
    found = []
    for count in (1, 2, 3):
        with threads(count):
            y = module(pack_padded_sequence(x, torch.tensor([12] * 9 + [11, 7] * 0 + [7] * 20 + [1] * 8)))
            found.append([*flat(y), *gradients(y, [x, *module.parameters()])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


LARGE = {"LSTM": 200, "GRU": 220, "RNN": 370}  # units of which threads share those of one sequence


@needs_threads
@pytest.mark.parametrize("lengths", [[8], [8, 8, 8], [8, 1, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_network
def test_threads_may_share_the_units_of_a_sequence(name: str, dtype: torch.dtype, lengths: list[int]) -> None:
    torch.manual_seed(0)
    module = getattr(nn, name)(9, LARGE[name], bidirectional=True).to(dtype)
    x = torch.randn(8, len(lengths), 9).to(dtype).requires_grad_()
    found = []
    for count in (1, 2, 6, 13):
        with threads(count):
            y = module(pack_padded_sequence(x, torch.tensor(lengths)))
            found.append([*flat(y), *gradients(y, [x, *module.parameters()])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


ALONE = """
import sys, torch
import dlkernels.nn as nn
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
module, x = nn.LSTM(9, 200), torch.randn(8, 1, 9)
y = module(x)[0]
y.sum().backward()
print(*(hash(t.detach().numpy().tobytes()) for t in (y, *(p.grad for p in module.parameters()))))
"""


@needs_threads
def test_threads_that_never_come_are_not_waited_for() -> None:
    """The system gives one thread where four were asked for."""
    hashes = [run_child(["-c", ALONE, count], PYTHONHASHSEED="0", OMP_THREAD_LIMIT="1").stdout for count in "14"]
    assert hashes[0] and hashes[0] == hashes[1]


@each_kind
def test_compiles_without_a_break(name: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    module = getattr(nn, name)(4, 5, 2, bidirectional=True, batch_first=True, **options)
    x = torch.randn(3, 6, 4)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for a, b in zip(flat(compiled(x)), flat(module(x)), strict=True):
        torch.testing.assert_close(a, b)


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("wrong input size", lambda m: m(torch.zeros(5, 3, 7)), RuntimeError, "Expected 4, got 7"),
    ("wrong rank", lambda m: m(torch.zeros(5)), ValueError, "2 or 3 dimensions"),
    ("no tokens", lambda m: m(torch.zeros(0, 3, 4)), RuntimeError, "at least one token"),
    ("another dtype", lambda m: m(torch.zeros(5, 3, 4).double()), ValueError, "does not match weight dtype"),
    ("a batch too many", lambda m: m(torch.zeros(5, 3, 4), states(m, 1, 5, 5)), RuntimeError, r"\(1, 3, 5\).*got \[1, 5, 5\].*batch_first"),
    ("a layer too many", lambda m: m(torch.zeros(5, 3, 4), states(m, 2, 3, 5)), RuntimeError, r"\(1, 3, 5\) of hx\[0\], got \[2, 3, 5\]"),
    ("a state without batch", lambda m: m(torch.zeros(5, 3, 4), states(m, 1, 5)), RuntimeError, "3 dimensions"),
    ("a batch of states for one sequence", lambda m: m(torch.zeros(5, 4), states(m, 1, 1, 5)), RuntimeError, "2 dimensions"),
]  # fmt: skip


def states(module: Any, *shape: int) -> Any:
    return (torch.zeros(shape), torch.zeros(shape)) if module.mode == "LSTM" else torch.zeros(shape)


@pytest.mark.parametrize(("case", "call", "kind", "message"), BAD, ids=[case for case, *_ in BAD])
@each_network
def test_bad_input(name: str, case: str, call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(getattr(nn, name)(4, 5))


@pytest.mark.parametrize("sizes", [[2, 3], [3, 0], [3, -1], [4, 1], [], [3, 3]], ids=str)
def test_forged_batch_sizes(sizes: list[int]) -> None:
    """They come from anywhere: torch reads past the end for some."""
    packed = PackedSequence(torch.zeros(5, 4), torch.tensor(sizes, dtype=torch.int64))
    with pytest.raises((RuntimeError, IndexError)):
        nn.LSTM(4, 5)(packed, (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)))


@pytest.mark.parametrize("batch", [3, 17])
def test_inputs_without_numbers(batch: int) -> None:
    h, w_hh, one = torch.randn(1, batch, 5), torch.randn(20, 5), torch.zeros(4 * batch, 1)
    found = [
        torch.ops.dlkernels.recurrent_forward(x, h, h, [torch.ones(20, x.shape[1]), w_hh], None, 0, False, False)[0]
        for x in (one, one[:, :0])
    ]
    torch.testing.assert_close(found[1], found[0])


def test_empty_sequences_cannot_be_packed() -> None:
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack_padded_sequence(torch.zeros(5, 3, 4), torch.tensor([5, 2, 0]))
    with pytest.raises(RuntimeError, match="sorted"):
        pack_padded_sequence(torch.zeros(5, 3, 4), torch.tensor([2, 5, 1]))


@each_cell
def test_bad_input_of_a_cell(name: str) -> None:
    cell = getattr(nn, name)(4, 5)
    state = (lambda *shape: (torch.zeros(shape), torch.zeros(shape))) if name == "LSTMCell" else lambda *shape: torch.zeros(shape)
    misfits: list[tuple[Sequence[int], Sequence[int]]] = [((3, 7), (3, 5)), ((3, 4), (2, 5)), ((3, 4), (3, 6)), ((5,), (3,))]
    for x, h in misfits:
        with pytest.raises(RuntimeError, match="has shape"):
            cell(torch.zeros(x), state(*h))
    ranks: list[tuple[Sequence[int], Sequence[int]]] = [((3, 4), (5,)), ((4,), (3, 5)), ((2, 3, 4), (3, 5))]
    for x, h in ranks:
        with pytest.raises(ValueError, match="D"):
            cell(torch.zeros(x), state(*h))


def test_where_torchs_cell_crashes() -> None:
    """nn.LSTMCell(5, 3)(x of 5, states of 3 x 3) ends the process in torch 2.13."""
    with pytest.raises(ValueError, match="1D like the input"):
        nn.LSTMCell(5, 3)(torch.zeros(5), (torch.zeros(3, 3), torch.zeros(3, 3)))
    with pytest.raises(RuntimeError, match=r"h has shape \(3, 3\), needs \(1, 3\)"):
        F.lstm_cell(torch.zeros(1, 5), (torch.zeros(3, 3), torch.zeros(3, 3)), torch.zeros(12, 5), torch.zeros(12, 3))
