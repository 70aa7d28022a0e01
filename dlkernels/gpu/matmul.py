"""The one dot tile: every dense product of the package is cut like this.

              depth                          cols
           ┌───┬───┬───┐                 ┌─────────────┐
    rows   │ a │ a │ a │      depth      │ b  b  b  b  │  step 0
           └───┴───┴───┘                 │ b  b  b  b  │  step 1
           step 0  1  2                  │ b  b  b  b  │  step 2
                                         └─────────────┘
    one program  =  one (rows, cols) tile of the result, all (or, split, a share) of the summed dimension

* **Registers** hold the accumulator, in fp32 (fp64 for fp64 operands): each element is written to memory once, by the epilogue.
* **Shared memory** holds `num_stages` steps of a and b: the copies of later steps run while the tensor cores work on this one.
* a is *formed*, not only read: `DERIVATIVE(a, saved)` turns dy into dz = dy · act'(saved) on its way to the tensor cores. Where
  nothing is to be formed the function is the identity, and `saved`, which then points at a again, costs nothing: the compiler drops it.
* Rows and columns past the edge are wrapped to the tile's first ones instead of masked: such a lane computes something that is never
  stored, and the inner loop needs no mask. Only the summed dimension needs one, where it is no multiple of the step (EVEN is false).
* Row and column numbers are int64 before they meet a stride: a tensor may have more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_ids(ROWS, COLS, BROWS: tl.constexpr, BCOLS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column number (int64) of this program's tile.

    Programs that run together should read the same rows and columns, so that the L2 cache serves them: they walk down GROUP row-tiles
    before they move one column-tile to the right.
    """
    pid = tl.program_id(0)
    tiles_r, tiles_c = tl.cdiv(ROWS, BROWS), tl.cdiv(COLS, BCOLS)
    first = pid // (GROUP * tiles_c) * GROUP
    height = tl.minimum(tiles_r - first, GROUP)
    inside = pid % (GROUP * tiles_c)
    return (first + inside % height).to(tl.int64), (inside // height).to(tl.int64)


@triton.jit
def wrapped(start, SIZE, BLOCK: tl.constexpr):
    """start, start + 1, ... (int64, [BLOCK]); past SIZE again from start. The remainder is 32-bit: a 64-bit one is a slow routine."""
    return start + tl.arange(0, BLOCK) % tl.minimum(SIZE - start, BLOCK).to(tl.int32)


@triton.jit
def offsets(i, j, stride_i, stride_j):
    """[I, J] element offsets, int64."""
    return i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j


@triton.jit
def dot_tile(
    a, saved, b, step_a, step_saved, step_b, start, stop, slope: tl.constexpr, DERIVATIVE: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """acc[i,j] = Σ_s DERIVATIVE(a, saved)[i,s] · b[s,j] for s in [start, stop), and sums[i] = Σ_s DERIVATIVE(a, saved)[i,s].

    a, saved: [rows, depth] and b: [depth, cols], pointers to the first step. step_*: elements from one step to the next.
    """
    ROWS: tl.constexpr = a.shape[0]
    DEPTH: tl.constexpr = a.shape[1]
    COLS: tl.constexpr = b.shape[1]
    DTYPE: tl.constexpr = a.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    acc = tl.zeros((ROWS, COLS), ACC)
    sums = tl.zeros((ROWS,), ACC)
    s = tl.arange(0, DEPTH)
    for done in range(start, stop, DEPTH):
        if EVEN:
            a_tile, saved_tile, b_tile = tl.load(a), tl.load(saved), tl.load(b)
        else:
            inside = s < stop - done
            a_tile = tl.load(a, inside[None, :], other=0.0)
            saved_tile = tl.load(saved, inside[None, :], other=0.0)
            b_tile = tl.load(b, inside[:, None], other=0.0)
        # Rounded to the operands' dtype: tensor cores take nothing wider, and it is what an unfused dz would have been.
        a_tile = DERIVATIVE(a_tile.to(ACC), saved_tile.to(ACC), slope).to(DTYPE)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if SUM_ROWS:
            sums += tl.sum(a_tile.to(ACC), axis=1)
        a += step_a
        saved += step_saved
        b += step_b
    return acc, sums


@triton.jit
def combine(partial, bias, y, z, SIZE, N, SPLIT, slope: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK: tl.constexpr):
    """y = EPILOGUE(Σ_s partial[s] + bias): the end of a product whose summed dimension was shared out over several programs.

    The shares are added in their order, never atomically: the result is the same bits on every run. partial: [SPLIT, SIZE]; SIZE = M N.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < SIZE
    value = tl.load(partial + e, inside, other=0.0)
    share = partial
    for _ in range(1, SPLIT):
        share += SIZE
        value += tl.load(share + e, inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + e % N, inside, other=0.0).to(value.dtype)
    if z is not None:
        tl.store(z + e, value.to(z.dtype.element_ty), inside)
    tl.store(y + e, EPILOGUE(value, slope).to(y.dtype.element_ty), inside)
