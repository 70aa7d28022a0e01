"""The steps of a recurrent layer, forward and backward: one kernel each, which goes through the steps from ``start`` to ``stop``.

              units                     every step needs h' of all units, so where several programs share a sequence (a row of blocks)
           +----+----+----+----+        they meet at a counter of their own after each step: blocks of other sequences, and the other
 sequences |    |    |    |    |        direction, do not wait for them. Programs of one launch may wait for one another only if all
           +----+----+----+----+        run at once: a cooperative launch.
           |    |    |    |    |
           +----+----+----+----+

    how          counters   launches   programs of a row   how they learn h' (da, backward)
    whole        None       1          one                 h' never leaves its registers; da goes through the nearest cache
    persistent   [rows]     1          several             through y (da), which the L2 cache holds
    steps        None       T          several             the same; the end of a launch is the meeting

In registers from step to step: c (or h, unrounded) and h of the program's tile, backward dh and dc; they come from memory at the start
and go back at the end, so that any number of steps makes a launch. Sequences of a step that do not run keep theirs, so nothing else
depends on whether they end (direction 0) or have yet to begin (direction 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .recurrent_tiles import arrive, biases_of, meet, nothing, one, parts_of, products, resident, step_at, store_parts, times

SIZES = ("start", "stop", "T", "B")  # one compiled kernel serves all of them


@triton.jit(do_not_specialize=SIZES)
def recurrent_forward(
    a, h0, w_hh, b_hh, state, hn, y, gates, cells, starts, counters, start, stop, T, B, SHARE, D, CELL: tl.constexpr, GATES: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BB: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """y, and gates and cells where they are not None, of the steps; state [D, B, H] (c of an LSTM, else h) and hn are updated in place.

    a [N, D, GATES, H], W_ih x + b_ih, may be the memory of gates. w_hh [D, GATES H, H]; b_hh [D, GATES H] or None.
    """
    H = SHARE * ALIGN  # so that the compiler knows what divides H, and reads that many numbers at once
    d = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1).to(tl.int64) * BB + tl.arange(0, BB)
    u = tl.program_id(0).to(tl.int64) * BU + tl.arange(0, BU)
    DTYPE: tl.constexpr = y.dtype.element_ty
    ACC: tl.constexpr = state.dtype.element_ty
    inside = (b < B)[:, None] & (u < H)[None, :]
    mine, w = d * B + b, w_hh + d * GATES * H * H
    held = resident(w, u, H, 1, H, GATES, BK, CHUNKS) if RESIDENT else ()
    bias = biases_of(b_hh, d * GATES * H, u, H, GATES, ACC)
    c, h = parts_of(state, mine, u, H, inside, 1, ACC)[0], parts_of(hn, mine, u, H, inside, 1, ACC)[0]
    met = 0
    for p in range(start, stop):
        t = tl.where(d == 0, p, T - 1 - p).to(tl.int64)
        first, size = step_at(starts, t, T, B)
        if tl.program_id(1) * BB < size:
            first_before, size_before = step_at(starts, tl.where(d == 0, t - 1, t + 1), T, B)
            running, rows = inside & (b < size)[:, None], (first + b) * D + d
            a_tiles = parts_of(a, rows, u, H, running, GATES, ACC)
            sums = nothing(BB, BU, GATES, ACC)
            if ALONE:
                sums = times(h.to(DTYPE), held, sums, PRECISION)
            else:
                meet(counters, met)
                before = tl.where(b < size_before, y + ((first_before + b) * D + d) * H, h0 + mine * H)
                sums = products(sums, before, b < size, held, w, u, H, 1, H, PRECISION, BK, CHUNKS, RESIDENT, False)
            s = ()
            for g in tl.static_range(GATES):
                s = s + one(sums[g] + bias[g])
            h_new, c_new, kept = CELL(a_tiles, s, c)
            store_parts(y, rows, u, H, running, (h_new,))
            met += arrive(counters)
            if gates is not None:
                store_parts(gates, rows, u, H, running, kept)
            if cells is not None:
                store_parts(cells, rows, u, H, running, (c_new,))
            h, c = tl.where(running, h_new, h), tl.where(running, c_new, c)
    store_parts(hn, mine, u, H, inside, (h,))
    store_parts(state, mine, u, H, inside, (c,))


@triton.jit(do_not_specialize=SIZES)
def recurrent_backward(
    dy, gates, values, first_values, w_hh, dh, dc, da, ds, starts, counters, start, stop, T, B, SHARE, D, CELL: tl.constexpr,
    GATES: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, BB: tl.constexpr, BU: tl.constexpr,
    BK: tl.constexpr, CHUNKS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """da [N, D, GATES, H], and ds where it is not None, of the steps; dh and dc [D, B, H], from the end to the beginning, are updated
    in place. Step T has no tokens: it adds what step T - 1 sends to h0.

    values [N, D, H] and first_values [D, B, H]: c of an LSTM, else h, after and before the tokens. dy may be None.
    """
    H = SHARE * ALIGN  # so that the compiler knows what divides H, and reads that many numbers at once
    d = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1).to(tl.int64) * BB + tl.arange(0, BB)
    u = tl.program_id(0).to(tl.int64) * BU + tl.arange(0, BU)
    ACC: tl.constexpr = dh.dtype.element_ty
    inside = (b < B)[:, None] & (u < H)[None, :]
    mine, w = d * B + b, w_hh + d * GATES * H * H
    held = resident(w, u, H, H, 1, GATES, BK, CHUNKS) if RESIDENT else ()
    dh_tile, dc_tile = parts_of(dh, mine, u, H, inside, 1, ACC)[0], parts_of(dc, mine, u, H, inside, 1, ACC)[0]
    met = 0
    for p in range(start, stop):
        t = tl.where(d == 0, T - 1 - p, p).to(tl.int64)
        first, size = step_at(starts, t, T, B)
        first_done, size_done = step_at(starts, tl.where(d == 0, t + 1, t - 1), T, B)
        first_before, size_before = step_at(starts, tl.where(d == 0, t - 1, t + 1), T, B)
        running, rows = inside & (b < size)[:, None], (first + b) * D + d
        kept = parts_of(gates, rows, u, H, running, KEPT, ACC)
        after = parts_of(values, rows, u, H, running, 1, ACC)[0]
        from_row = tl.where(b < size_before, values + ((first_before + b) * D + d) * H, first_values + mine * H)
        before = tl.load(from_row[:, None] + u[None, :], running, other=0.0).to(ACC)
        if dy is not None:
            slope = parts_of(dy, rows, u, H, running, 1, ACC)[0]
        else:
            slope = tl.zeros((BB, BU), ACC)
        if tl.program_id(1) * BB < size_done:
            meet(counters, met)
            done = (da if ds is None else ds) + ((first_done + b) * D + d) * GATES * H
            sums = nothing(BB, BU, GATES, ACC)
            sums = products(sums, done, b < size_done, held, w, u, H, H, 1, PRECISION, BK, CHUNKS, RESIDENT, True)
            for g in tl.static_range(GATES):
                dh_tile += sums[g]
        if tl.program_id(1) * BB < size:
            da_tiles, ds_tiles, dh_new, dc_new = CELL(kept, before, after, dh_tile + slope, dc_tile)
            store_parts(da, rows, u, H, running, da_tiles)
            if ds is not None:
                store_parts(ds, rows, u, H, running, ds_tiles)
            met += arrive(counters)
            dh_tile, dc_tile = tl.where(running, dh_new, dh_tile), tl.where(running, dc_new, dc_tile)
    store_parts(dh, mine, u, H, inside, (dh_tile,))
    store_parts(dc, mine, u, H, inside, (dc_tile,))
