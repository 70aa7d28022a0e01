"""What is peculiar to dropout: the generator against its published numbers, on every instruction set and in Triton; that the numbers are as
independent as they ought to be; seeds, modes, and what the backward keeps. Every seed is fixed, so no test can fail by chance."""

from __future__ import annotations

import math
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DTYPES, SMALL, dtype_name, threads
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

import dlkernels
import dlkernels.functional as F
from dlkernels import OPS
from dlkernels.ops import dropout as contract
from dlkernels.ops.dropout import numbers, philox, seeded

ROOT = Path(__file__).parent.parent
# (counter, key) -> words: philox4x32-10 in kat_vectors of Random123 1.14
KNOWN = {
    ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
}
# (row, column of a block, seed): small, and so large that every word of counter and key counts
PLACES = [(0, 0, 0), (0, 64, 1), (5, 128, -1), (2**32 + 3, 2**36, 2**40 + 7), (2**45, 64 * (2**34 + 5), -(2**63))]
ISA_FLAGS = {"default": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]}


def seed(value: int = 0x0123456789ABCDEF) -> Tensor:
    return torch.tensor([value])


def test_the_definition_gives_the_published_numbers() -> None:
    for (counter, key), words in KNOWN.items():
        assert tuple(int(w) for w in philox(*(torch.tensor(c) for c in (*counter, *key)))) == words


def block(row: int, column: int, value: int) -> list[int]:
    """The definition's 64 numbers from a column on that may be too large to count up to."""
    q, low = torch.arange(column // 4, column // 4 + 16), 2**32 - 1
    s = value % 2**64
    words = philox(q & low, q >> 32, row & low, row >> 32, s & low, s >> 32)
    return torch.cat(words).tolist()


def test_a_block_of_the_definition_is_where_it_belongs() -> None:
    for row in (0, 7, 2**40):
        assert numbers(200, seed(), row)[64:128].tolist() == block(row, 64, 0x0123456789ABCDEF)


@pytest.mark.parametrize("isa", [isa for isa in dlkernels.backend.supported_isas() if isa in ISA_FLAGS])
def test_the_header_on_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """Published numbers, and blocks whose place and seed need all their bits."""
    program = tmp_path / "philox"
    command = [*get_cxx_compiler().split(), "-std=c++20", "-O1", "-Wno-psabi", *ISA_FLAGS[isa], f"-I{ROOT}/csrc/cpu"]
    subprocess.run([*command, str(ROOT / "tests/philox.cpp"), "-o", str(program)], check=True)
    asked = [" ".join(f"{v:x}" for v in (*counter, *key)) for counter, key in KNOWN]
    asked += [" ".join(f"{v % 2**64:x}" for v in place) for place in PLACES]
    lines = subprocess.run([program, *asked], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [[int(word, 16) for word in line.split()] for line in lines]
    assert found == [list(words) for words in KNOWN.values()] + [block(*place) for place in PLACES]


if SMALL:  # in the interpreter
    import triton
    import triton.language as tl

    from dlkernels.gpu import philox as triton_philox

    @triton.jit
    def row_numbers(out: Any, seeds: Any, rows: Any, starts: Any, N: tl.constexpr) -> None:
        i = tl.program_id(0)
        found = triton_philox.numbers(tl.load(seeds + i), tl.load(rows + i), tl.load(starts + i), N)
        tl.store(out + i * N + tl.arange(0, N), found.to(tl.int64))

    def test_the_triton_functions() -> None:
        """`numbers`, and `words` under it, in a kernel of the test's own: rows, blocks and seeds as above."""
        rows, columns, seeds = (torch.tensor(values) for values in zip(*PLACES))
        out = torch.empty(len(PLACES), 128, dtype=torch.int64)
        row_numbers[(len(PLACES),)](out, seeds, rows, columns, N=128)
        assert out.tolist() == [block(m, n, s) + block(m, n + 64, s) for m, n, s in PLACES]


@pytest.mark.isa
def test_bits_are_those_of_the_definition() -> None:
    """In float64 the product has one rounding, so every bit of forward and backward is the definition's; this file runs on every
    instruction set and in the interpreter, so they all agree."""
    for N in (1, 15, 64, 65, 127, 128, 1025) if SMALL else (*range(1, 140), 8191, 8192, 8193, 3 * 8192 + 77):
        x = torch.randn(N, dtype=torch.float64, requires_grad=True)
        for s, p in ((seed(), 0.3), (seed(-1), 0.5), (seed(-(2**63)), 1e-9), (seed(7), 1 - 1e-9), (seed(9), 1.0)):
            y, exact = seeded(x, s, p), contract._reference(x, s, p)
            assert torch.equal(y, exact)
            dy = torch.randn(N, dtype=torch.float64)
            assert torch.equal(*(torch.autograd.grad(value, x, dy)[0] for value in (y, exact)))


@pytest.mark.isa
def test_the_bits_do_not_depend_on_threads() -> None:
    x = torch.randn(1000 if SMALL else 100_003)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(seeded(x, seed(), 0.3))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def deviations(kept: Tensor, p: float) -> float:
    """By how many standard deviations the number of trues differs from the binomial mean, of probability p each."""
    n = kept.numel()
    return abs(int(kept.sum()) - n * p) / math.sqrt(n * p * (1 - p))


@cache
def many_numbers() -> Tensor:
    return numbers(1 << 20, seed())


COUNT = 4096 if SMALL else 1 << 20


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_keep_rate_and_scale(p: float) -> None:
    y = seeded(torch.ones(COUNT, dtype=torch.float64), seed(), p)
    assert deviations(y != 0, 1 - p) < 4
    assert y.unique().tolist() == [0, 1 / (1 - p)]


@pytest.mark.parametrize("distance", [1, 2, 8, 15, 16, 17, 32, 48, 64, 1024, 4096])
def test_neighbours_are_independent(distance: int) -> None:
    """At the distances of lanes, words, blocks and rows: two are kept together as often as the product of their chances says."""
    kept = many_numbers() >= 2**31
    assert deviations(kept[distance:] == kept[:-distance], 0.5) < 4
    assert deviations(kept[distance:] & kept[:-distance], 0.25) < 4


def test_rows_and_seeds_are_independent() -> None:
    """Seeds and rows that differ in one bit, at either end of each word, have nothing in common."""
    first = numbers(1 << 16, seed(0)) >= 2**31
    for s, row in ((1, 0), (2**31, 0), (2**32, 0), (-(2**63), 0), (0, 1), (0, 2**31), (0, 2**32)):
        assert deviations(first == (numbers(1 << 16, seed(s), row) >= 2**31), 0.5) < 4


def test_numbers_are_uniform() -> None:
    """Chi square over the upper and the lower 8 bits: 255 degrees of freedom, so 255 +- 4 times its deviation of 22.6."""
    drawn = many_numbers()
    for bits in (drawn >> 24, drawn & 255):
        expected = drawn.numel() / 256
        assert abs(float(((bits.bincount(minlength=256) - expected) ** 2 / expected).sum()) - 255) < 4 * math.sqrt(2 * 255)


def test_manual_seed_decides() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = F.dropout(x), F.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x), first) and torch.equal(F.dropout(x), second)
    assert not torch.equal(first, second)


def test_gradient_has_the_mask_of_the_forward() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = F.dropout(x, 0.3)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


def test_only_the_seed_is_kept() -> None:
    kept: list[Tensor] = []
    x = torch.ones(10_000, requires_grad=True)

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        F.dropout(x * 1.5).sum()
    assert max(t.numel() for t in kept if t.dtype == torch.int64) == 1
    assert not any(t.numel() == x.numel() for t in kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("inplace", [False, True])
def test_edges_are_torchs(dtype: torch.dtype, inplace: bool) -> None:
    """p of 0 and 1, not training, no numbers: the result is torch's, also in being the input itself; NaN and infinity times 0 are NaN."""
    for x in (torch.randn(33).to(dtype), torch.ones(0, 3, dtype=dtype), torch.tensor([math.nan, math.inf, -1.0]).to(dtype)):
        for p, training in ((0, True), (0.0, True), (1, True), (1.0, True), (0.4, False)):
            ours, theirs = x.clone(), x.clone()
            y, native = F.dropout(ours, p, training, inplace), torch.nn.functional.dropout(theirs, p, training, inplace)
            torch.testing.assert_close(y, native, equal_nan=True, rtol=0, atol=0)
            assert (y is ours, y.data_ptr() == ours.data_ptr()) == (native is theirs, native.data_ptr() == theirs.data_ptr())
            assert torch.equal(ours.isnan(), theirs.isnan()) and ours._version == theirs._version


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 0, 2, 1),
    "stepped": lambda t: t[:, ::2, 1:],
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strides_are_torchs(layout: Any) -> None:
    x = layout(torch.randn(2, 3, 4, 5)).requires_grad_()
    torch.manual_seed(1)
    y = F.dropout(x, 0.3)
    native = torch.nn.functional.dropout(x, 0.3)
    dy = torch.randn(x.shape)
    assert y.stride() == native.stride()
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0] * x.detach(), y.detach() * dy)
    torch.manual_seed(1)
    assert torch.equal(F.dropout(x.detach().clone(memory_format=torch.preserve_format), 0.3), y)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_in_place(layout: Any) -> None:
    """The memory of the input holds what the other form returns, the version counter moves by one, and the gradient is right."""
    leaf = torch.randn(2, 3, 4, 5, requires_grad=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = layout(leaf * 1)
            torch.manual_seed(1)
            wanted, version = F.dropout(x, 0.3), x._version
            torch.manual_seed(1)
            if 0 in x.stride():
                with pytest.raises(RuntimeError):
                    F.dropout(x, 0.3, inplace=True)
                continue
            y = F.dropout(x, 0.3, inplace=True)
            assert y is x and torch.equal(x, wanted) and x._version == version + 1
            if grad:
                torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), leaf, retain_graph=True)[0] for t in (y, wanted)))


def test_in_place_refuses_leaves_and_leaves_them_alone() -> None:
    for leaf, x in ((leaf, leaf[1:] if view else leaf) for leaf, view in ((torch.ones(4, requires_grad=True), v) for v in (0, 1))):
        with pytest.raises(RuntimeError, match="leaf"):
            torch.nn.functional.dropout(x, 0.5, inplace=True)
        with pytest.raises(RuntimeError, match="input is a.* leaf"):
            F.dropout(x, 0.5, inplace=True)
        assert torch.equal(leaf, torch.ones(4)) and leaf._version == 0


def test_what_was_saved_before_an_overwrite_is_noticed() -> None:
    x = torch.randn(5, requires_grad=True)
    for grad in (True, False):
        square = (y := x * 1).square()
        with torch.set_grad_enabled(grad):
            F.dropout(y, 0.5, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace: bool) -> None:
    """Compiled code draws from the same generator: the same mask forward and backward, another one at the next call."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.dropout(x * 2, 0.3, inplace=inplace) * 1, fullgraph=True, backend="aot_eager")
    x = torch.ones(999, requires_grad=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.unique(), torch.tensor([0, 2 / 0.7]))
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], first.detach())


def test_checkpoint_repeats_the_mask() -> None:
    x = torch.ones(999, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: F.dropout(x, 0.3) ** 2, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * y.detach() / 1)


def test_vmap_asks_for_the_randomness() -> None:
    x = torch.ones(4, 500)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda row: F.dropout(row, 0.5))(x)
    same = torch.func.vmap(lambda row: F.dropout(row, 0.5), randomness="same")(x)
    assert torch.equal(same[0], same[3]) and same.unique().tolist() == [0, 2]
    different = torch.func.vmap(lambda row: F.dropout(row, 0.5), randomness="different")(x)
    assert not torch.equal(different[0], different[3]) and different.unique().tolist() == [0, 2]


@pytest.mark.parametrize(
    "args",
    [
        (torch.ones(3), -0.1), (torch.ones(3), 1.1), (torch.ones(3), math.nan), (torch.ones(3), math.inf), (None, 0.5), ([1.0, 2.0], 0.5),
        (torch.ones(3), "half"), (torch.ones(3, dtype=torch.int64), 0.5), (torch.ones(3, dtype=torch.int64), 0.5, False),
        (torch.ones(3, dtype=torch.complex64), 0.5), (torch.eye(3).to_sparse(), 0.5), (torch.ones(3, device="meta"), 0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_unusual_arguments(args: tuple[Any, ...], inplace: bool) -> None:
    """A result like torch's, or an exception of torch's type."""
    outcomes: list[Any] = []
    functions: list[Any] = [F.dropout, torch.nn.functional.dropout]
    for function in functions:
        try:
            y = function(*args, inplace=inplace)
            outcomes.append((y.shape, y.dtype, y.layout, y.device))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_raw_ops_refuse_bad_arguments() -> None:
    x, ops = torch.ones(5), torch.ops.dlkernels
    bad_seeds = [torch.tensor(1), torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32), torch.tensor([1.0]), seed().to("meta")]
    wrong = [(x, s, 0.5) for s in bad_seeds] + [(x, seed(), p) for p in (-0.1, 1.1, math.nan)]
    wrong += [(t, seed(), 0.5) for t in (torch.ones(5, dtype=torch.int64), torch.ones(5, dtype=torch.complex64), torch.eye(3).to_sparse())]
    for args in wrong:
        for raw in (ops.dropout, ops.dropout_):
            with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
                raw(*args)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.dropout_(torch.ones(4, 4).t()[1:], seed(), 0.5)
    assert torch.equal(x, torch.ones(5))


def test_layer() -> None:
    layer = dlkernels.nn.Dropout(0.4, inplace=False)
    assert isinstance(layer, torch.nn.Dropout) and repr(layer) == repr(torch.nn.Dropout(0.4))
    x = torch.ones(1000)
    assert 300 < int((layer(x) == 0).sum()) < 500
    assert layer.eval()(x) is x
    assert F.dropout2d is torch.nn.functional.dropout2d and dlkernels.nn.AlphaDropout is torch.nn.AlphaDropout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter leaves nothing to compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=dtype_name)
def test_compiles_for_gpus(dtype: torch.dtype) -> None:
    aot = pytest.importorskip("dlkernels.gpu.aot")
    for target in aot.TARGETS:
        (kernel,) = aot.compiled("dropout", target, dtype)
        assert kernel.spilled == 0 and kernel.registers < 64
        addresses = [line for line in kernel.text("ttir").splitlines() if "tt.addptr" in line]
        assert addresses and all("xi64>" in line for line in addresses), "an offset of 32 bits"


def test_the_op_is_registered_with_a_rival() -> None:
    """The benchmark races torch's dropout, which draws its own numbers."""
    op = OPS["dropout"]
    x = torch.ones(100)
    assert op.rival is not None and op.rival(x, seed(), 0.5).unique().tolist() == [0, 2]
