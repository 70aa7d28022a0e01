"""The backward kernels of scaled_dot_product_attention whose programs own keys or a mask: attention_backward.py says more."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_backward import statistics
from .attention_tiles import LOG2E, blocks, factors, place, scores, through, tile
from .philox import as_float64


@triton.jit
def dkey_steps(
    dk, dv, k, v, q, dy, lse, delta, mask, slope, seed, s, first, low, gap, count, L, S, row, column, starts, strides, dy_strides, window,
    score, dropout, SCORE: tl.constexpr, BEND: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr,
    WINDOW: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(dk / scale, dv) after ``count`` blocks of queries, as `forward_steps` counts blocks of keys; one that is None stays None."""
    ACC: tl.constexpr = lse.dtype.element_ty
    (q_strides, _, _, mask_strides, _) = strides
    for i in range(count):
        j = first + i
        if EDGE:
            j += tl.where(i >= low, gap, 0)
        l = j * BM + tl.arange(0, BM)
        queries = tile(q, l, L, q_strides[2], q_strides[3], D, k.shape[1], EDGE)
        slopes_y = tile(dy, l, L, dy_strides[2], dy_strides[3], E, v.shape[1], EDGE)
        log_sum, d_row = statistics(lse, delta, l, L)
        x = tl.dot(k, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC)
        z, seen = scores(
            x, l[None, :], s[:, None], mask, slope, L, S, mask_strides[2], mask_strides[3], window, score, SCORE, WINDOW,
            EDGE,
        )  # fmt: skip
        w = tl.exp2(z - log_sum[None, :])
        if EDGE or mask is not None:
            w = tl.where(seen, w, 0.0)
        f = 1.0
        if seed is not None:
            f = factors(seed, row, column + j * BM, starts, dropout[0], dropout[1], k.shape[0], BM)
        dv = tl.dot((w * f).to(slopes_y.dtype), slopes_y, dv, input_precision=PRECISION, out_dtype=ACC)
        dw = tl.dot(v, tl.trans(slopes_y), input_precision=PRECISION, out_dtype=ACC)
        dz = through(w * (dw * f - d_row[None, :]), x, l[None, :], s[:, None], window, score, BEND)
        if EDGE or mask is not None:
            dz = tl.where(seen, dz, 0.0)
        dk = tl.dot(dz.to(queries.dtype), queries, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit
def backward_dkey(
    dy, query, key, value, lse, delta, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, dkey, dvalue, strides, dy_strides, dk_strides,
    dv_strides, sizes, window, score, dropout, SCORE: tl.constexpr, BEND: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys, summed over the GROUP heads that read them; either may be None. strides as in the forward."""
    ACC: tl.constexpr = lse.dtype.element_ty
    q_strides, k_strides, v_strides, mask_strides, slope_strides = strides
    H, GROUP, L_ALL, S_ALL, BLOCKS, N, STEP = sizes
    pid = tl.program_id(0)
    b, g = (pid // BLOCKS // (H // GROUP)).to(tl.int64), (pid // BLOCKS % (H // GROUP)).to(tl.int64)
    key_begin, S, begin, L, start = place(cu_seqlens_k, cu_seqlens_q, pid % BLOCKS, N, STEP, S_ALL, L_ALL, BN)
    lower_right, left, right = window
    o = (S - L) * lower_right
    s = start + tl.arange(0, BN)
    k = tile(key + (b * k_strides[0] + g * k_strides[1] + key_begin * k_strides[2]), s, S, k_strides[2], k_strides[3], D, BD, True)
    v = tile(value + (b * v_strides[0] + g * v_strides[1] + key_begin * v_strides[2]), s, S, v_strides[2], v_strides[3], E, BE, True)
    numbers = as_float64(score[0]).to(ACC), as_float64(score[1]).to(ACC), as_float64(score[2]).to(ACC)
    dropped = dropout[0], as_float64(dropout[1]).to(ACC)
    around = o, left, right
    a, middle, end, d = blocks(start, -o, right, left, L, BN, BM)

    dk, dv = tl.zeros((BN, BD), ACC), tl.zeros((BN, BE), ACC)
    for member in range(GROUP):
        h = g * GROUP + member
        q = query + (b * q_strides[0] + h * q_strides[1] + begin * q_strides[2])
        slopes_y = dy + (b * dy_strides[0] + h * dy_strides[1] + begin * dy_strides[2])
        rows = (b * H + h) * L_ALL + begin
        mask_head = mask
        if mask is not None:
            mask_head = mask + (b * mask_strides[0] + h * mask_strides[1])
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + b * slope_strides[0] + h) * LOG2E
        row, column = (b * H + h) * S_ALL + key_begin + start, (begin + 0 * h).to(tl.int64)
        dk, dv = dkey_steps(
            dk, dv, k, v, q, slopes_y, lse + rows, delta + rows, mask_head, slope, seed, s, middle, 0, 0, end - middle, L, S, row, column,
            cu_seqlens_q, strides, dy_strides, around, numbers, dropped, SCORE, BEND, PRECISION, D, E, BM, WINDOW, False,
        )  # fmt: skip
        dk, dv = dkey_steps(
            dk, dv, k, v, q, slopes_y, lse + rows, delta + rows, mask_head, slope, seed, s, a, middle - a, end - middle,
            middle - a + d - end, L, S, row, column, cu_seqlens_q, strides, dy_strides, around, numbers, dropped, SCORE, BEND, PRECISION, D,
            E, BM, WINDOW, True,
        )  # fmt: skip
    at = (key_begin + s).to(tl.int64)[:, None]
    if dkey is not None:
        e = tl.arange(0, BD)
        to = b * dk_strides[0] + g * dk_strides[1] + at * dk_strides[2] + e.to(tl.int64)[None, :] * dk_strides[3]
        dk *= numbers[0]
        tl.store(dkey + to, dk.to(dkey.dtype.element_ty), (s < S)[:, None] & (e < D)[None, :])
    if dvalue is not None:
        e = tl.arange(0, BE)
        to = b * dv_strides[0] + g * dv_strides[1] + at * dv_strides[2] + e.to(tl.int64)[None, :] * dv_strides[3]
        tl.store(dvalue + to, dv.to(dvalue.dtype.element_ty), (s < S)[:, None] & (e < E)[None, :])


@triton.jit
def backward_dmask(
    dy, query, key, value, lse, delta, mask, slopes, seed, dmask, strides, dy_strides, sizes, counts, shared, window, score, dropout,
    SCORE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dmask of one block, contiguous. counts: over how many heads, blocks of queries and of keys it is summed, how many steps that makes
    together with the batches, and how many heads, blocks of queries and of keys dmask has. shared: whether all queries, all keys, share
    a number; None where they don't."""
    ACC: tl.constexpr = lse.dtype.element_ty
    q_strides, k_strides, v_strides, mask_strides, slope_strides = strides
    H, GROUP, L, S = sizes
    heads, query_blocks, key_blocks, steps, grid_heads, grid_queries, grid_keys = counts
    pid = tl.program_id(0)
    own_s, own_l = pid % grid_keys, pid // grid_keys % grid_queries
    own_h, own_b = pid // grid_keys // grid_queries % grid_heads, pid // grid_keys // grid_queries // grid_heads
    numbers = as_float64(score[0]).to(ACC), as_float64(score[1]).to(ACC), as_float64(score[2]).to(ACC)
    lower_right, left, right = window
    acc = tl.zeros((BM, BN), ACC)
    for i in range(steps):
        s = (own_s + i % key_blocks) * BN + tl.arange(0, BN)
        l = (own_l + i // key_blocks % query_blocks) * BM + tl.arange(0, BM)
        h = (own_h + i // key_blocks // query_blocks % heads).to(tl.int64)
        b = (own_b + i // key_blocks // query_blocks // heads).to(tl.int64)
        g = h // GROUP
        q = tile(query + (b * q_strides[0] + h * q_strides[1]), l, L, q_strides[2], q_strides[3], D, BD, True)
        k = tile(key + (b * k_strides[0] + g * k_strides[1]), s, S, k_strides[2], k_strides[3], D, BD, True)
        v = tile(value + (b * v_strides[0] + g * v_strides[1]), s, S, v_strides[2], v_strides[3], E, BE, True)
        slopes_y = tile(dy + (b * dy_strides[0] + h * dy_strides[1]), l, L, dy_strides[2], dy_strides[3], E, BE, True)
        rows = (b * H + h) * L
        log_sum, d_row = statistics(lse + rows, delta + rows, l, L)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + b * slope_strides[0] + h) * LOG2E
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        z, seen = scores(
            x, l[:, None], s[None, :], mask + (b * mask_strides[0] + h * mask_strides[1]), slope, L, S, mask_strides[2], mask_strides[3],
            ((S - L) * lower_right, left, right), numbers, SCORE, WINDOW, True,
        )  # fmt: skip
        dw = tl.dot(slopes_y, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if seed is not None:
            row, column = (b * H + h) * S + tl.min(s, 0), tl.min(l, 0).to(tl.int64)
            dw *= tl.trans(factors(seed, row, column, None, dropout[0], as_float64(dropout[1]).to(ACC), BN, BM))
        acc += tl.where(seen, tl.exp2(z - log_sum[:, None]) * (dw - d_row[:, None]), 0.0)
    l, s = own_l * BM + tl.arange(0, BM)[:, None], own_s * BN + tl.arange(0, BN)[None, :]
    if shared[0] is not None:
        acc, l, L = tl.sum(acc, 0, keep_dims=True), tl.zeros((1, 1), tl.int32), 1
    if shared[1] is not None:
        acc, s, S = tl.sum(acc, 1, keep_dims=True), tl.zeros((1, 1), tl.int32), 1
    to = ((own_b.to(tl.int64) * grid_heads + own_h) * L + l) * S + s
    tl.store(dmask + to, acc.to(dmask.dtype.element_ty), (l < L) & (s < S))
