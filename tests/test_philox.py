"""The random numbers of dropout: the generator against its published numbers, on every instruction set and in Triton, and that the numbers
are as independent as they ought to be. Every seed is fixed, so no test can fail by chance."""

from __future__ import annotations

import math
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import SMALL, threads
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

import dlkernels
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
