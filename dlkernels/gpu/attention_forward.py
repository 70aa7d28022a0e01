"""The forward kernels of scaled_dot_product_attention.

    one program  =  BM queries of one head, all keys that they see, or a share of them

    q [BM, D] ──┐                      ┌── w = exp2(z - top), the running maximum
                ├── z = q kᵀ [BM, BN] ─┤
    k [BN, D] ──┘                      └── acc [BM, E] = acc exp2(old top - top) + w v

* **Registers** hold acc, the tile of scores, and each row's maximum and sum; **shared memory** q, and `num_stages` steps of k and v.
* **Programs of one head follow each other**, so that its k and v come from the L2 cache, the last queries first: under a causal window
  these have the most to do, and what comes last should be short.
* **Few queries, many keys** (decoding): SHARE blocks of keys each go to other programs; `combine` puts their results together, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import INF, LN2, LOG2E, NARROW, any_nan, blocks, careful_dot, factors, place, scores, tile
from .philox import as_float64


@triton.jit
def forward_steps(
    acc, total, top, q, k, v, mask, slope, seed, l, first, low, gap, count, L, S, row, column, starts, strides, window, score, dropout,
    SCORE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    EDGE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(acc, total, top) after ``count`` blocks of keys from ``first`` on; where EDGE, ``gap`` are left out after the first ``low``."""
    ACC: tl.constexpr = acc.dtype
    (_, k_strides, v_strides, mask_strides, _) = strides
    for i in range(count):
        j = first + i
        if EDGE:
            j += tl.where(i >= low, gap, 0)
        s = j * BN + tl.arange(0, BN)
        key = tile(k, s, S, k_strides[2], k_strides[3], D, q.shape[1], EDGE)
        x = tl.dot(q, tl.trans(key), input_precision=PRECISION, out_dtype=ACC)
        z, seen = scores(
            x, l[:, None], s[None, :], mask, slope, L, S, mask_strides[2], mask_strides[3], window, score, SCORE, WINDOW,
            EDGE,
        )  # fmt: skip
        highest = tl.maximum(top, tl.max(z, 1))
        reference = tl.where(highest == -INF, 0.0, highest)  # -inf - -inf would be NaN
        w = tl.exp2(z - reference[:, None])
        shrink = tl.exp2(top - reference)
        total = total * shrink + tl.sum(w, 1)
        acc = acc * shrink[:, None]
        top = highest
        if seed is not None:
            w *= tl.trans(factors(seed, row + j * BN, column, starts, dropout[0], dropout[1], BN, q.shape[0]))
        value = tile(v, s, S, v_strides[2], v_strides[3], E, acc.shape[1], EDGE)
        if CAREFUL:
            acc = careful_dot(w, seen, value, acc, PRECISION)
        else:
            acc = tl.dot(w.to(value.dtype), value, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, total, top


@triton.jit
def scaled_dot_product_attention_forward(
    query, key, value, y, lse, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, strides, y_strides, sizes, window, score, dropout,
    SCORE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """y and lse of BM queries. strides: those of (q, k, v, mask, (slopes,)); y_strides have one more in front, of a share of the keys."""
    ACC: tl.constexpr = tl.float64 if query.dtype.element_ty == tl.float64 else tl.float32
    q_strides, k_strides, v_strides, mask_strides, slope_strides = strides
    H, GROUP, L_ALL, S_ALL, BLOCKS, N, STEP, SHARE, LSE_SHARE = sizes
    pid, share = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = (pid // BLOCKS // H).to(tl.int64), (pid // BLOCKS % H).to(tl.int64)
    begin, L, key_begin, S, start = place(cu_seqlens_q, cu_seqlens_k, BLOCKS - 1 - pid % BLOCKS, N, STEP, L_ALL, S_ALL, BM)
    lower_right, left, right = window
    o = (S - L) * lower_right
    l = start + tl.arange(0, BM)
    q = tile(
        query + (b * q_strides[0] + h * q_strides[1] + begin * q_strides[2]), l, L, q_strides[2], q_strides[3], D, BD, True
    )  # fmt: skip
    g = h // GROUP
    k = key + (b * k_strides[0] + g * k_strides[1] + key_begin * k_strides[2])
    v = value + (b * v_strides[0] + g * v_strides[1] + key_begin * v_strides[2])
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1]
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + b * slope_strides[0] + h) * LOG2E
    row, column = (b * H + h) * S_ALL + key_begin, (begin + start).to(tl.int64)
    numbers = as_float64(score[0]).to(ACC), as_float64(score[1]).to(ACC), as_float64(score[2]).to(ACC)
    dropped = dropout[0], as_float64(dropout[1]).to(ACC)
    around = o, left, right
    a, middle, end, d = blocks(start, o, left, right, S, BM, BN)
    a, d = tl.maximum(a, share.to(tl.int32) * SHARE), tl.minimum(d, (share.to(tl.int32) + 1) * SHARE)
    d = tl.maximum(a, d)
    middle = tl.minimum(tl.maximum(middle, a), d)
    end = tl.minimum(tl.maximum(end, middle), d)

    acc, total, top = tl.zeros((BM, BE), ACC), tl.zeros((BM,), ACC), tl.zeros((BM,), ACC) - INF
    acc, total, top = forward_steps(
        acc, total, top, q, k, v, mask, slope, seed, l, middle, 0, 0, end - middle, L, S, row, column, cu_seqlens_q, strides, around,
        numbers, dropped, SCORE, PRECISION, D, E, BN, WINDOW, False, False,
    )  # fmt: skip
    acc, total, top = forward_steps(
        acc, total, top, q, k, v, mask, slope, seed, l, a, middle - a, end - middle, middle - a + d - end, L, S, row, column, cu_seqlens_q,
        strides, around, numbers, dropped, SCORE, PRECISION, D, E, BN, WINDOW, True, False,
    )  # fmt: skip
    if any_nan(acc) if WINDOW or mask is not None else False:
        acc, total, top = tl.zeros((BM, BE), ACC), tl.zeros((BM,), ACC), tl.zeros((BM,), ACC) - INF
        acc, total, top = forward_steps(
            acc, total, top, q, k, v, mask, slope, seed, l, a * (BN // NARROW), 0, 0, (d - a) * (BN // NARROW), L, S, row, column,
            cu_seqlens_q, strides, around, numbers, dropped, SCORE, PRECISION, D, E, NARROW, WINDOW, True, True,
        )  # fmt: skip

    none = total == 0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    e = tl.arange(0, BE)
    at = share * y_strides[0] + b * y_strides[1] + h * y_strides[2] + (begin + l).to(tl.int64)[:, None] * y_strides[3]
    tl.store(y + (at + e.to(tl.int64)[None, :] * y_strides[4]), acc.to(y.dtype.element_ty), (l < L)[:, None] & (e < E)[None, :])
    out = tl.where(none, -INF, (top + tl.log2(tl.where(none, 1.0, total))) * LN2)
    tl.store(lse + (share * LSE_SHARE + (b * H + h) * L_ALL + begin + l), out, l < L)


@triton.jit
def combine_shares(partial, partial_lse, y, lse, strides, H, L, E, M, SHARES, BM: tl.constexpr, BE: tl.constexpr):
    """y = Σ_i exp(lse_i - lse) y_i of BM rows (b, h, l), of M. partial [SHARES, M, E] and partial_lse [SHARES, M] are contiguous."""
    ACC: tl.constexpr = partial.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    e = tl.arange(0, BE)
    inside = (m < M)[:, None] & (e < E)[None, :]
    top = tl.zeros((BM,), ACC) - INF
    for i in range(SHARES):
        top = tl.maximum(top, tl.load(partial_lse + (tl.full((), i, tl.int64) * M + m), m < M, other=-INF))
    reference = tl.where(top == -INF, 0.0, top)
    acc, total = tl.zeros((BM, BE), ACC), tl.zeros((BM,), ACC)
    for i in range(SHARES):
        from_row = tl.full((), i, tl.int64) * M + m
        w = tl.exp(tl.load(partial_lse + from_row, m < M, other=-INF) - reference)
        total += w
        acc += w[:, None] * tl.load(partial + (from_row[:, None] * E + e[None, :]), inside, other=0.0)
    none = total == 0
    at = m // L // H * strides[0] + m // L % H * strides[1] + m % L * strides[2]
    acc = acc / tl.where(none, 1.0, total)[:, None]
    tl.store(y + (at[:, None] + e.to(tl.int64)[None, :] * strides[3]), acc.to(y.dtype.element_ty), inside)
    tl.store(lse + m, tl.where(none, -INF, top + tl.log(tl.where(none, 1.0, total))), m < M)
