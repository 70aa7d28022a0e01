"""Philox4x32-10 by place, bit for bit the numbers of csrc/cpu/philox.h, as functions for any kernel to call.

The number of row m, column n is word (n % 64) // 16 of philox at counter (q, m), q = n // 64 * 16 + n % 16: sixteen consecutive counters
make 64 consecutive numbers. `words` gives the four words of a vector of counters, which suits a kernel that walks its array in runs of 16;
`numbers` brings them into the order of the columns, for a kernel that holds a row.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl


@triton.jit
def words(seed, m, q):
    """The four words of every counter in the vector ``q`` (int64), of row ``m`` (int64, a number or shaped like q). uint32 each."""
    m = m + tl.zeros_like(q)
    low, high = (q & 0xFFFFFFFF).to(tl.uint32), (q >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, (m & 0xFFFFFFFF).to(tl.uint32), (m >> 32).to(tl.uint32))


@triton.jit
def columns(q, lane: tl.constexpr):
    """The columns n whose numbers are word ``lane`` of the counters ``q``."""
    return q // 16 * 64 + q % 16 + 16 * lane


@triton.jit
def numbers(seed, m, column, N: tl.constexpr):
    """The numbers of row ``m``, columns ``column`` .. column + N - 1, in order; N is a power of two from 64 on, ``column`` (int64) a
    multiple of 64."""
    w0, w1, w2, w3 = words(seed, m, column // 4 + tl.arange(0, N // 4).to(tl.int64))
    lanes = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [N/4, 2, 2]: word 2a + b of a counter lies at [a, b]
    return tl.reshape(tl.trans(tl.reshape(lanes, (N // 64, 16, 4)), (0, 2, 1)), (N,))


@triton.jit
def factor(number, threshold, scale):
    """What dropout multiplies a number of an array by: 0 where ``number`` < ``threshold``, else ``scale``."""
    return tl.where(number >= threshold.to(tl.uint32), scale, 0.0)


@triton.jit
def as_float64(bits):
    """The float64 that an int64 argument holds: Triton passes a float argument as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


def thresholds(p: float) -> tuple[int, int]:
    """``threshold`` of ``factor``, and ``scale`` as the bits of a float64, for dropout with probability p; RuntimeError if it is none."""
    if not 0 <= p <= 1:
        raise RuntimeError(f"p is {p}, needs a probability between 0 and 1")
    scale = 1 / (1 - p) if p < 1 else 0.0
    return min(int(p * 2**32), 2**32 - 1), struct.unpack("<q", struct.pack("<d", scale))[0]
