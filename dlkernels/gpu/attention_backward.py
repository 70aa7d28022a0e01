"""The backward kernels of scaled_dot_product_attention: scores are made again, a tile at a time, from q, k and lse.

    kernel               a program owns                    and goes over                       sums
    backward_delta       rows of dy and y                                                      δ = Σ_e dy y
    backward_dquery      BM queries                        blocks of BN keys                   dq = scale dz k
    backward_dkey        BN keys, for all heads that       blocks of BM queries                dk = scale dzᵀ q,  dv = (f w)ᵀ dy
                         read them
    backward_dmask       BM x BN numbers of the mask       what the mask was broadcast over    dz

        w = exp2(z - lse)     dz = w (f dy vᵀ - δ)

Each sum is one program's, in a fixed order: no atomics, the same bits on every run. That costs two products more than adding dq up from
the dk kernel would. In `backward_dkey` tiles lie [keys, queries], so that w and dz are operands as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import INF, LOG2E, NARROW, any_nan, blocks, careful_dot, factors, place, scores, through, tile
from .philox import as_float64


@triton.jit
def backward_delta(dy, y, delta, dy_strides, y_strides, H, L, M, E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr):
    """delta[m] = Σ_e dy y of BM rows m = (b, h, l), of M."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    e = tl.arange(0, BE).to(tl.int64)[None, :]
    b, h, l = m // L // H, m // L % H, m % L
    inside = (m < M)[:, None] & (e < E)
    slope = tl.load(dy + (b * dy_strides[0] + h * dy_strides[1] + l * dy_strides[2])[:, None] + e * dy_strides[3], inside, other=0.0)
    out = tl.load(y + (b * y_strides[0] + h * y_strides[1] + l * y_strides[2])[:, None] + e * y_strides[3], inside, other=0.0)
    tl.store(delta + m, tl.sum(slope.to(delta.dtype.element_ty) * out.to(delta.dtype.element_ty), 1), m < M)


@triton.jit
def statistics(lse, delta, l, L):
    """lse in units of log 2 and delta, of queries l. Where no key is visible, or no query is, w = exp2(z - inf) = 0."""
    log_sum = tl.load(lse + l, l < L, other=INF)
    return tl.where(log_sum == -INF, INF, log_sum * LOG2E), tl.load(delta + l, l < L, other=0.0)


@triton.jit
def dquery_steps(
    acc, q, slopes_y, log_sum, delta, k, v, mask, slope, seed, l, first, low, gap, count, L, S, row, column, starts, strides, window, score,
    dropout, SCORE: tl.constexpr, BEND: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dq / scale after ``count`` blocks of keys, as `forward_steps` counts them."""
    ACC: tl.constexpr = acc.dtype
    (_, k_strides, v_strides, mask_strides, _) = strides
    for i in range(count):
        j = first + i
        if EDGE:
            j += tl.where(i >= low, gap, 0)
        s = j * BN + tl.arange(0, BN)
        key = tile(k, s, S, k_strides[2], k_strides[3], D, q.shape[1], EDGE)
        value = tile(v, s, S, v_strides[2], v_strides[3], E, slopes_y.shape[1], EDGE)
        x = tl.dot(q, tl.trans(key), input_precision=PRECISION, out_dtype=ACC)
        z, seen = scores(
            x, l[:, None], s[None, :], mask, slope, L, S, mask_strides[2], mask_strides[3], window, score, SCORE, WINDOW,
            EDGE,
        )  # fmt: skip
        w = tl.exp2(z - log_sum[:, None])
        dw = tl.dot(slopes_y, tl.trans(value), input_precision=PRECISION, out_dtype=ACC)
        if seed is not None:
            dw *= tl.trans(factors(seed, row + j * BN, column, starts, dropout[0], dropout[1], BN, q.shape[0]))
        dz = through(w * (dw - delta[:, None]), x, l[:, None], s[None, :], window, score, BEND)
        if EDGE or mask is not None:
            dz = tl.where(seen, dz, 0.0)
        if CAREFUL:
            acc = careful_dot(dz, seen, key, acc, PRECISION)
        else:
            acc = tl.dot(dz.to(key.dtype), key, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def backward_dquery(
    dy, query, key, value, lse, delta, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, dquery, strides, dy_strides, dq_strides, sizes,
    window, score, dropout, SCORE: tl.constexpr, BEND: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dq of BM queries. strides as in the forward."""
    ACC: tl.constexpr = lse.dtype.element_ty
    q_strides, k_strides, v_strides, mask_strides, slope_strides = strides
    H, GROUP, L_ALL, S_ALL, BLOCKS, N, STEP = sizes
    pid = tl.program_id(0)
    b, h = (pid // BLOCKS // H).to(tl.int64), (pid // BLOCKS % H).to(tl.int64)
    begin, L, key_begin, S, start = place(cu_seqlens_q, cu_seqlens_k, BLOCKS - 1 - pid % BLOCKS, N, STEP, L_ALL, S_ALL, BM)
    lower_right, left, right = window
    o = (S - L) * lower_right
    l = start + tl.arange(0, BM)
    q = tile(query + (b * q_strides[0] + h * q_strides[1] + begin * q_strides[2]), l, L, q_strides[2], q_strides[3], D, BD, True)
    dy += b * dy_strides[0] + h * dy_strides[1] + begin * dy_strides[2]
    slopes_y = tile(dy, l, L, dy_strides[2], dy_strides[3], E, BE, True)
    rows = (b * H + h) * L_ALL + begin
    log_sum, d_row = statistics(lse + rows, delta + rows, l, L)
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

    acc = dquery_steps(
        tl.zeros((BM, BD), ACC), q, slopes_y, log_sum, d_row, k, v, mask, slope, seed, l, middle, 0, 0, end - middle, L, S, row, column,
        cu_seqlens_q, strides, around, numbers, dropped, SCORE, BEND, PRECISION, D, E, BN, WINDOW, False, False,
    )  # fmt: skip
    acc = dquery_steps(
        acc, q, slopes_y, log_sum, d_row, k, v, mask, slope, seed, l, a, middle - a, end - middle, middle - a + d - end, L, S, row, column,
        cu_seqlens_q, strides, around, numbers, dropped, SCORE, BEND, PRECISION, D, E, BN, WINDOW, True, False,
    )  # fmt: skip
    if any_nan(acc) if WINDOW or mask is not None else False:
        acc = dquery_steps(
            tl.zeros((BM, BD), ACC), q, slopes_y, log_sum, d_row, k, v, mask, slope, seed, l, a * (BN // NARROW), 0, 0,
            (d - a) * (BN // NARROW), L, S, row, column, cu_seqlens_q, strides, around, numbers, dropped, SCORE, BEND, PRECISION, D, E,
            NARROW, WINDOW, True, True,
        )  # fmt: skip
    e = tl.arange(0, BD)
    at = b * dq_strides[0] + h * dq_strides[1] + (begin + l).to(tl.int64)[:, None] * dq_strides[2] + e.to(tl.int64)[None, :] * dq_strides[3]
    acc *= numbers[0]
    tl.store(dquery + at, acc.to(dquery.dtype.element_ty), (l < L)[:, None] & (e < D)[None, :])
