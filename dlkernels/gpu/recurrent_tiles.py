"""What the kernels of a recurrent layer share: where the tokens of a step lie, tiles of units, the product with W_hh, and the barrier.

    one program   =   BB sequences  x  BU units, in one direction

W_hh is as large as a cache and read at every step, so a program either holds its slice in shared memory from the first step to the last
(``resident``: tiles loaded before the loop through time, which the compiler keeps there as they never change) or streams it through.
"""

from __future__ import annotations

import triton
import triton.language as tl

APART = tl.constexpr(32)  # int32 between counters: a cache line, so that programs which wait do not disturb others


@triton.jit
def step_at(starts, t, T, B):
    """First token of step t and how many it has: none where t is no step. starts [T + 1], or None where every step has B."""
    inside = (t >= 0) & (t < T)
    if starts is None:
        first = t * B
        size = tl.where(inside, B, 0).to(tl.int64)
    else:
        first = tl.load(starts + t, inside, other=0)
        size = tl.load(starts + t + 1, inside, other=0) - first
    return first, size


@triton.jit
def one(tile):
    """What is added to a tuple of tiles to have one more."""
    return (tile,)


@triton.jit
def parts_of(array, rows, u, H, inside, PARTS: tl.constexpr, ACC: tl.constexpr):
    """PARTS tiles [rows, u] of rows that are PARTS H long."""
    found = ()
    for g in tl.static_range(PARTS):
        found = found + one(tl.load(array + rows[:, None] * (PARTS * H) + (g * H + u)[None, :], inside, other=0.0).to(ACC))
    return found


@triton.jit
def store_parts(array, rows, u, H, inside, parts):
    """The other way round."""
    for g in tl.static_range(len(parts)):
        tl.store(array + rows[:, None] * (len(parts) * H) + (g * H + u)[None, :], parts[g].to(array.dtype.element_ty), inside)


@triton.jit
def biases_of(b_hh, start, u, H, PARTS: tl.constexpr, ACC: tl.constexpr):
    """b_hh of every gate from ``start`` on, [1, u]; zeros where it is None."""
    found = ()
    for g in tl.static_range(PARTS):
        if b_hh is None:
            found = found + one(tl.zeros((1, u.shape[0]), ACC))
        else:
            found = found + one(tl.load(b_hh + start + g * H + u, u < H, other=0.0).to(ACC)[None, :])
    return found


@triton.jit
def weights(w, k, u, H, w_k, w_u, PARTS: tl.constexpr):
    """A tile [k, u] of the part of W_hh that each gate has."""
    inside = (k < H)[:, None] & (u < H)[None, :]
    found = ()
    for _ in tl.static_range(PARTS):
        found = found + one(tl.load(w + k.to(tl.int64)[:, None] * w_k + u[None, :] * w_u, inside, other=0.0))
        w += tl.full((), H, tl.int64) * H
    return found


@triton.jit
def resident(w, u, H, w_k, w_u, PARTS: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr):
    """The tiles of all k, BK of them in each of the CHUNKS."""
    found = ()
    for j in tl.static_range(CHUNKS):
        found = found + weights(w, j * BK + tl.arange(0, BK), u, H, w_k, w_u, PARTS)
    return found


@triton.jit
def nothing(BB: tl.constexpr, BU: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """PARTS tiles of zeros."""
    found = ()
    for _ in tl.static_range(PARTS):
        found = found + one(tl.zeros((BB, BU), DTYPE))
    return found


@triton.jit
def times(left, tiles, sums, PRECISION: tl.constexpr):
    """sums[g] + left · tiles[g] of every gate."""
    found = ()
    for g in tl.static_range(len(sums)):
        found = found + one(tl.dot(left, tiles[g], sums[g], input_precision=PRECISION, out_dtype=sums[g].dtype))
    return found


@triton.jit
def add_products(sums, rows, there, k, tiles, FIRST: tl.constexpr, H, PRECISION: tl.constexpr, OWN: tl.constexpr):
    """sums[g][b, u] + Σ_k rows[b][k] tiles[FIRST + g][k, u] of every gate; OWN: each has k of its own, H further on in the rows.

    Other programs have written the rows, so they are read past the L1 cache.
    """
    inside = there[:, None] & (k < H)[None, :]
    left = tl.load(rows[:, None] + k[None, :], inside, other=0.0, cache_modifier=".cg")
    found = ()
    for g in tl.static_range(len(sums)):
        if OWN and g > 0:
            left = tl.load(rows[:, None] + (g * H + k)[None, :], inside, other=0.0, cache_modifier=".cg")
        found = found + one(tl.dot(left, tiles[FIRST + g], sums[g], input_precision=PRECISION, out_dtype=sums[g].dtype))
    return found


@triton.jit
def products(
    sums, rows, there, held, w, u, H, w_k, w_u, PRECISION: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, RESIDENT: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """``add_products`` over all k. Every gate has a sum of its own, in the backward too: a product waits for the one before in its sum."""
    if RESIDENT:
        for j in tl.static_range(CHUNKS):
            sums = add_products(sums, rows, there, j * BK + tl.arange(0, BK), held, j * len(sums), H, PRECISION, OWN)
    else:
        for start in range(0, H, BK):
            k = start + tl.arange(0, BK)
            sums = add_products(sums, rows, there, k, weights(w, k, u, H, w_k, w_u, len(sums)), 0, H, PRECISION, OWN)
    return sums


@triton.jit
def counter_of(counters):
    """That of the programs which share this one's sequences and direction."""
    return counters + (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * APART


@triton.jit
def arrive(counters):
    """This program has written its units of one more step: 1. None: it is alone, or the launch ends here."""
    tl.debug_barrier()  # one thread counts, and what all have stored must come before
    if counters is not None:
        tl.atomic_add(counter_of(counters), 1, sem="release")
    return 1


@triton.jit
def meet(counters, met):
    """Wait until all programs that share the sequences have arrived ``met`` times; then what they wrote before can be read."""
    if counters is not None:
        while tl.atomic_add(counter_of(counters), 0, sem="acquire") < met * tl.num_programs(0):
            pass
