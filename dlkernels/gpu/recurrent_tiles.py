"""What the kernels of a recurrent layer share: where the tokens of a step lie, tiles of units, the product with W_hh, and the barrier.

    one program   =   BB sequences  x  BU units, in one direction

W_hh is as large as a cache and read at every step, so a program either holds its slice in shared memory from the first step to the last
(``resident``: tiles loaded before the loop through time, which the compiler keeps there as they never change) or streams it through.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step_at(starts, t, T, B):
    """First token of step t and how many it has: none where t is no step. starts [T + 1], or None where every step has B."""
    inside = (t >= 0) & (t < T)
    if starts is None:
        return t * B, tl.where(inside, B, 0)
    first = tl.load(starts + t, inside, other=0)
    return first, tl.load(starts + t + 1, inside, other=0) - first


@triton.jit
def parts_of(array, rows, u, H, inside, PARTS: tl.constexpr, ACC: tl.constexpr):
    """PARTS tiles [rows, u] of rows that are PARTS H long."""
    found = ()
    for g in tl.static_range(PARTS):
        found = found + (tl.load(array + rows[:, None] * (PARTS * H) + (g * H + u)[None, :], inside, other=0.0).to(ACC),)
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
            found = found + (tl.zeros((1, u.shape[0]), ACC),)
        else:
            found = found + (tl.load(b_hh + start + g * H + u, u < H, other=0.0).to(ACC)[None, :],)
    return found


@triton.jit
def weights(w, k, u, stop, H, w_k, w_u, PARTS: tl.constexpr):
    """A tile [k, u] of every part of W_hh, which lie H H numbers apart; zeros from k = stop on."""
    inside = (k < stop)[:, None] & (u < H)[None, :]
    found = ()
    for g in tl.static_range(PARTS):
        found = found + (tl.load(w + g * H * H + k[:, None] * w_k + u[None, :] * w_u, inside, other=0.0),)
    return found


@triton.jit
def resident(w, u, K, STEP, H, w_k, w_u, PARTS: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr):
    """The tiles of all k < K, STEP of them in each of the CHUNKS."""
    found = ()
    for j in tl.static_range(CHUNKS):
        k = j * STEP + tl.arange(0, BK)
        found = found + weights(w, k, u, tl.minimum(j * STEP + STEP, K), H, w_k, w_u, PARTS)
    return found


@triton.jit
def nothing(BB: tl.constexpr, BU: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """PARTS tiles of zeros."""
    found = ()
    for _ in tl.static_range(PARTS):
        found = found + (tl.zeros((BB, BU), DTYPE),)
    return found


@triton.jit
def add_products(sums, left, tiles, FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """sums[g] + left · tiles[FIRST + g] for every part."""
    found = ()
    for g in tl.static_range(len(sums)):
        acc: tl.constexpr = sums[g].dtype
        found = found + (tl.dot(left, tiles[FIRST + g], sums[g], input_precision=PRECISION, out_dtype=acc),)
    return found


@triton.jit
def product(
    sums, rows, there, held, w, u, K, H, w_k, w_u, PRECISION: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, RESIDENT: tl.constexpr
):
    """sums[g][b, u] + Σ_k rows[b][k] W[g][k, u], where other programs have written the rows: they are read past the L1 cache."""
    if RESIDENT:
        for j in tl.static_range(CHUNKS):
            k = j * BK + tl.arange(0, BK)
            left = tl.load(rows[:, None] + k[None, :], there[:, None] & (k < K)[None, :], other=0.0, cache_modifier=".cg")
            sums = add_products(sums, left, held, j * len(sums), PRECISION)
    else:
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            left = tl.load(rows[:, None] + k[None, :], there[:, None] & (k < K)[None, :], other=0.0, cache_modifier=".cg")
            sums = add_products(sums, left, weights(w, k, u, K, H, w_k, w_u, len(sums)), 0, PRECISION)
    return sums


@triton.jit
def arrive(counter):
    """This program has written its units of the step."""
    tl.debug_barrier()  # one thread adds, and what all have stored must come before
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait(counter, count):
    """Until ``count`` programs have arrived; what they wrote before can be read after."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
