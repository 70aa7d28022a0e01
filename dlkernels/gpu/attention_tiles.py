r"""What the kernels of scaled_dot_product_attention share: where a program's tile lies, its scores, what hides some of them, and dropout.

             keys s            Tiles of queries x keys are made one at a time. A window leaves some of them empty: they are never touched.
          ┌───┬───┬───┐        Most others lie inside it, and below the last query and key: their scores take no comparison. The few that
    l     │   │ \ │   │        are left, at the edges, do. `blocks` says which is which: [a, d) are touched, [b, c) are whole.
          ├───┼───┼───┤
          │   │   │ \ │        Scores are in units of log 2, so that exp is the one instruction exp2: the factor goes into the scale.
          └───┴───┴───┘        A score of -inf is a key that isn't visible.

* **Packed sequences**: block j of the grid is found in the list of starts by bisection. Sequence i owns the blocks from
  starts[i] / BLOCK + i on, which are enough for it and at most N too many, so the host needs no look at the list.
* **A NaN that nobody sees** is multiplied by a weight of 0 and would come through. Kernels multiply first and look at their sums after:
  only where there is a NaN, and something is hidden, the tile is done again with `careful_dot`, in narrow steps, which cost few registers.
* Positions within a sequence are 32-bit, element offsets 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import factor, words

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NARROW = tl.constexpr(16)


@triton.jit
def place(starts, others, j, N, STEP, T, OTHER, BLOCK: tl.constexpr):
    """(first, length, first and length of the other side, first own position of block j within the sequence); int32."""
    if starts is None:
        return 0, T, 0, OTHER, j * BLOCK
    else:
        i, step = 0 * j, STEP + 0 * j
        while step > 0:
            begin = tl.load(starts + (i + step), i + step < N, other=0)
            i = tl.where((i + step < N) & (begin // BLOCK + (i + step) <= j), i + step, i)
            step = step // 2
        begin = tl.load(starts + i)
        first, length = part(starts + i, T)
        start = tl.minimum(tl.maximum((j - begin // BLOCK - i) * BLOCK, 0), length)
        other, other_length = part(others + i, OTHER)
        return first, length, other, tl.where(start < length, other_length, 0), start.to(tl.int32)


@triton.jit
def part(starts, T):
    """(first, length) of the sequence from starts[0] to starts[1], inside [0, T) whatever these are."""
    first = tl.minimum(tl.maximum(tl.load(starts), 0), T)
    last = tl.minimum(tl.maximum(tl.load(starts + 1), first), T)
    return first.to(tl.int32), (last - first).to(tl.int32)


@triton.jit
def blocks(start, shift, left, right, COUNT, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """(a, b, c, d), where position i of start .. start + OWN - 1 meets i + shift - left .. i + shift + right of COUNT others."""
    a = tl.maximum(start + shift - left, 0) // BLOCK
    d = tl.maximum(tl.cdiv(tl.maximum(tl.minimum(start + OWN + shift + right, COUNT), 0), BLOCK), a)
    b = tl.minimum(tl.cdiv(tl.maximum(start + OWN - 1 + shift - left, 0), BLOCK), d)
    c = tl.maximum(tl.minimum(tl.maximum(tl.minimum(start + shift + right + 1, COUNT), 0) // BLOCK, d), b)
    return a, b, c, d


@triton.jit
def tile(x, t, LENGTH, x_t, x_d, WIDTH: tl.constexpr, BD: tl.constexpr, EDGE: tl.constexpr):
    """[T, BD] numbers of the positions t; zeros from WIDTH on and, where EDGE, from LENGTH on."""
    d = tl.arange(0, BD)
    at = x + (t.to(tl.int64)[:, None] * x_t + d.to(tl.int64)[None, :] * x_d)
    inside = (t < LENGTH)[:, None]
    if BD == WIDTH:
        if EDGE:
            return tl.load(at, inside, other=0.0)
        else:
            return tl.load(at)
    else:
        if EDGE:
            return tl.load(at, inside & (d < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(at, (d < WIDTH)[None, :], other=0.0)


@triton.jit
def scores(
    x, l, s, mask, slope, L, S, mask_l, mask_s, window, score, SCORE: tl.constexpr, WINDOW: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """(scores of products x, which of them are seen); l and s are positions, shaped so that they broadcast to x, whichever way it lies.
    Rows of a score +inf or NaN are NaN where they are seen, so -inf is not enough to tell."""
    o, left, right = window
    scale, scale_log2, parameter = score
    if SCORE is None:
        z = x * scale_log2
    else:
        z = SCORE(x * scale, (l + o - s).to(x.dtype), parameter) * LOG2E
    seen = s < S
    if slope is not None:
        z -= slope * tl.abs(l + o - s).to(z.dtype)
    if mask is not None:
        at, inside = mask + s.to(tl.int64) * mask_s, seen
        if mask_l is not None:
            at, inside = at + l.to(tl.int64) * mask_l, inside & (l < L)
        m = tl.load(at, inside, other=0)
        if mask.dtype.element_ty == tl.uint8:
            seen = m != 0
        else:
            m = m.to(z.dtype)
            seen = m != -INF
            z += m * LOG2E
    if EDGE:
        seen = seen & (l < L) & (s < S)
        if WINDOW:
            behind = l + o - s
            seen = seen & (behind <= left) & (behind >= -right)
    if EDGE or mask is not None:
        z = tl.where(seen, z, -INF)
    return z, seen


@triton.jit
def through(dz, x, l, s, window, score, BEND: tl.constexpr):
    """dz before the score function, of dz behind it."""
    if BEND is None:
        return dz
    else:
        return dz * BEND(x * score[0], (l + window[0] - s).to(x.dtype), score[2])


@triton.jit
def factors(seed, row, column, starts, threshold, scale, KEYS: tl.constexpr, QUERIES: tl.constexpr):
    """Dropout's factors [KEYS, QUERIES] of rows row .. and columns column .. (int64): four from each counter where a tile begins at a
    multiple of 64, which that of a packed sequence doesn't."""
    m = (row + tl.arange(0, KEYS).to(tl.int64))[:, None]
    if starts is None and QUERIES % 64 == 0:
        q = (column // 4 + tl.arange(0, QUERIES // 4).to(tl.int64))[None, :] + tl.zeros_like(m)
        w0, w1, w2, w3 = words(tl.load(seed), m, q)
        lanes = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        number = tl.reshape(tl.trans(tl.reshape(lanes, (KEYS, QUERIES // 64, 16, 4)), (0, 1, 3, 2)), (KEYS, QUERIES))
    else:
        n = (column + tl.arange(0, QUERIES).to(tl.int64))[None, :] + tl.zeros_like(m)
        w0, w1, w2, w3 = words(tl.load(seed), m, n // 64 * 16 + n % 16)
        lane = n % 64 // 16
        number = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return factor(number, threshold, scale)


@triton.jit
def any_nan(x):
    return tl.max((x != x).to(tl.int32)) > 0


@triton.jit
def careful_dot(w, seen, v, acc, PRECISION: tl.constexpr):
    """acc + w v, of which [i, j] is spoiled by a NaN or an infinity in v[s, j] only where i sees s."""
    DTYPE: tl.constexpr = v.dtype
    finite = tl.abs(v.to(acc.dtype)) < INF
    acc = tl.dot(w.to(DTYPE), tl.where(finite, v, 0.0).to(DTYPE), acc, input_precision=PRECISION, out_dtype=acc.dtype)
    high, low = ((~finite) & ~(v < 0)).to(DTYPE), ((~finite) & ~(v > 0)).to(DTYPE)  # a NaN is both, and inf - inf is NaN
    plus, minus = (seen & (w >= 0)).to(DTYPE), (seen & (w <= 0)).to(DTYPE)  # so is a weight of 0, and 0 inf is NaN
    above = tl.dot(minus, low, tl.dot(plus, high, out_dtype=acc.dtype), out_dtype=acc.dtype)
    acc += tl.where(above > 0, INF, 0.0)
    below = tl.dot(minus, high, tl.dot(plus, low, out_dtype=acc.dtype), out_dtype=acc.dtype)
    return acc - tl.where(below > 0, INF, 0.0)
