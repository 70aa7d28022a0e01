"""qkv_projection on the GPU: a program computes some rows of x times the weights of one head, which it turns before they leave registers.

    one program = a (rows, head) tile of z = x Wᵀ + b, as two accumulators: the first numbers of its pairs and their partners

                        depth                       pairs       pairs
    x     rows   [BM, BK], read once          Wᵀ  [BK, BP]    [BK, BP]     W's rows of the first numbers, and of the second
    z                                             [BM, BP]    [BM, BP]     turned: u = a c - b s, v = b c + a s, stored where they belong

* **Partners meet in one thread**: which rows of W an accumulator multiplies is a list of numbers, so halves and interleaved pairs differ in
  that list alone, and nothing is shuffled. What of a head is not turned fills up both lists, with c = 1 and s = 0; so do all heads of v.
* The heads of q, k and v are numbered one after the other, and a program picks weight and result by its head's number.
* Backward: rope's kernel turns the gradients back into dz [M, N], side by side, and linear's two products read that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from ..ops.qkv_projection_raw import NAMES, empty_result
from . import linear
from .config import BYTES, Config, bucket, ceil_div, kind_of
from .launch import Device, check_tensor, device_of, launch, precision
from .matmul import offsets, wrapped
from .rope import run as run_rope


@triton.jit
def halves(p, P, D):
    """Places in a head of the p-th pair's numbers; the pairs behind the P-th are made of the rest."""
    rest = (D - 2 * P + 1) // 2
    return tl.where(p < P, p, p + P), tl.where(p < P, p + P, p + P + rest)


@triton.jit
def interleaved_pairs(p, P, D):
    """The same for neighbours."""
    return 2 * p, 2 * p + 1


@triton.jit
def qkv_projection_forward(
    x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, cos, sin, q, k, v, M, K, H, G, D, P, places, x_m, x_k, w_n,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows BM program_0 .. of head and block of pairs program_1. q, k, v lie as [M, heads, D], as rows of the product; row m of x
    has row m % places of cos and sin; cos and sin, or the biases, may be None."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv((D + 1) // 2, BP)
    head = tl.program_id(1) // blocks
    weight, bias, out = q_weight, q_bias, q
    if head >= H + G:
        weight, bias, out = v_weight, v_bias, v
    elif head >= H:
        weight, bias, out = k_weight, k_bias, k
    heads = tl.where(head < H, H, G)
    inner = tl.where(head < H, head, tl.where(head < H + G, head - H, head - H - G)).to(tl.int64)
    p = (tl.program_id(1) % blocks * BP + tl.arange(0, BP)).to(tl.int64)
    first, second = COLUMNS(p, P, D)
    a_row, b_row = inner * D + tl.minimum(first, D - 1), inner * D + tl.minimum(second, D - 1)
    start = tl.program_id(0).to(tl.int64) * BM
    depth = tl.arange(0, BK)
    xs = x + offsets(wrapped(start, M, BM), depth, x_m, x_k)
    a_weight, b_weight = weight + offsets(depth, a_row, 1, w_n), weight + offsets(depth, b_row, 1, w_n)
    step = tl.full((), BK, tl.int64)
    a, b = tl.zeros((BM, BP), ACC), tl.zeros((BM, BP), ACC)
    for done in range(0, K, BK):
        if EVEN:
            x_tile, a_tile, b_tile = tl.load(xs), tl.load(a_weight), tl.load(b_weight)
        else:
            inside = depth < K - done
            x_tile = tl.load(xs, inside[None, :], other=0.0)
            a_tile = tl.load(a_weight, inside[:, None], other=0.0)
            b_tile = tl.load(b_weight, inside[:, None], other=0.0)
        a = tl.dot(x_tile, a_tile, a, input_precision=PRECISION, out_dtype=ACC)
        b = tl.dot(x_tile, b_tile, b, input_precision=PRECISION, out_dtype=ACC)
        xs += step * x_k
        a_weight += step
        b_weight += step
    if q_bias is not None:
        a += tl.load(bias + a_row).to(ACC)[None, :]
        b += tl.load(bias + b_row).to(ACC)[None, :]
    m = start + tl.arange(0, BM)
    if cos is not None:
        turned = ((p < P) & (head < H + G))[None, :] & (m < M)[:, None]
        angle = offsets(m % places, p, P, 1)
        c, s = tl.load(cos + angle, turned, other=1.0), tl.load(sin + angle, turned, other=0.0)
        a, b = tl.where(turned, a * c - b * s, a), tl.where(turned, b * c + a * s, b)  # what is not turned may be infinite
    row = out + (m * heads * D + inner * D)[:, None]
    tl.store(row + first[None, :], a.to(out.dtype.element_ty), (m < M)[:, None] & (first < D)[None, :])
    tl.store(row + second[None, :], b.to(out.dtype.element_ty), (m < M)[:, None] & (second < D)[None, :])


def tile(kind: str, M: int, heads: int, D: int, K: int, device: Device) -> Config:
    """The tile of a program; ``cols`` are numbers of a head, twice the pairs. Tiles shrink until every processor has one."""
    rows, pairs = {"half": (128, 64), "tf32": (128, 32), "float": (64, 32), "double": (32, 16)}[kind]
    fewest = 32 if kind == "double" else 16
    rows = max(fewest, min(rows, bucket(M)))
    pairs = min(pairs, max(16, triton.next_power_of_2((D + 1) // 2)))
    while (rows > fewest or pairs > 16) and ceil_div(M, rows) * heads * ceil_div((D + 1) // 2, pairs) < device.processors:
        rows, pairs = (rows, pairs // 2) if pairs > 16 and (2 * pairs >= rows or rows == fewest) else (rows // 2, pairs)
    warps = 8 if (rows == 128 or kind == "double") and device.lanes == 32 else 4
    for depth in (128 // BYTES[kind], 64 // BYTES[kind]):
        stages = min(4, (device.shared - 1024) // ((rows + 2 * pairs) * depth * BYTES[kind]))
        if stages >= 2:
            break
    return Config(rows, 2 * pairs, min(max(16, depth), max(16, bucket(K))), 1, warps, stages, 1)


def forward(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, head_dim: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of ``qkv_projection_forward``; shapes and errors as the op's contract says."""
    weights, biases, D = [q_weight, k_weight, v_weight], [q_bias, k_bias, v_bias], head_dim
    H, G = _check(x, weights, cos, sin, D)
    (B, T, K), M = x.shape, x.shape[0] * x.shape[1]
    for name, bias, weight in zip(NAMES[1], biases, weights):
        if bias is not None:
            check_tensor(name, bias, x, (len(weight),))
    if any(bias is not None for bias in biases):
        biases = [w.new_zeros(len(w)) if bias is None else bias.contiguous() for w, bias in zip(weights, biases)]
    q, k, v = (empty_result(x, B, heads, T, D) for heads in (H, G, G))
    if M * (H + G):
        mode, rows = precision(x.dtype), x.reshape(M, K)
        if any(w.stride() != (K, 1) for w in weights):
            weights = [w.contiguous() for w in weights]
        P, places = (0, 1) if cos is None or sin is None else (cos.shape[2], cos.shape[0] * cos.shape[1])
        cos, sin = (None, None) if cos is None or sin is None or P == 0 else (cos.contiguous(), sin.contiguous())
        c = tile(kind_of(x.dtype, mode), M, H + 2 * G, D, K, device_of(x))
        launch(
            qkv_projection_forward, (ceil_div(M, c.rows), (H + 2 * G) * ceil_div((D + 1) // 2, c.cols // 2)), rows, *weights, *biases, cos,
            sin, q, k, v, M, K, H, G, D, P, places, *rows.stride(), K, COLUMNS=interleaved_pairs if interleaved else halves, PRECISION=mode,
            BM=c.rows, BP=c.cols // 2, BK=c.depth, EVEN=K % c.depth == 0, warps=c.warps, stages=c.stages,
        )  # fmt: skip
    return q, k, v


def backward(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    cos: Tensor | None, sin: Tensor | None, head_dim: int, interleaved: bool, need: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Launcher of rope's kernel and linear's; shapes and errors as the op's contract says."""
    weights, dys, D = (q_weight, k_weight, v_weight), (dq, dk, dv), head_dim
    H, G = _check(x, weights, cos, sin, D)
    (B, T, K), M = x.shape, x.shape[0] * x.shape[1]
    if len(need) != 7:
        raise RuntimeError(f"need has {len(need)} entries, needs 7")
    for name, dy, heads in zip(("dq", "dk", "dv"), dys, (H, G, G)):
        if dy is not None:
            check_tensor(name, dy, x, (B, heads, T, D))
    there = {i: dy for i, dy in enumerate(dys) if dy is not None}
    sizes = [len(weights[i]) for i in there]
    dz, begin = x.new_empty(B, T, sum(sizes)), 0
    nothing = x.new_empty((1, T, 0), dtype=statistics_dtype(x))
    for (i, dy), size in zip(there.items(), sizes):
        part = dz[..., begin : begin + size].unflatten(2, (size // D, D)).transpose(1, 2)
        tables = (nothing, nothing) if cos is None or sin is None or i == 2 else (cos, sin)
        run_rope(dy, *tables, part, interleaved, True)
        begin += size
    weight = torch.cat([weights[i] for i in there]) if there else q_weight[:0]
    wanted = need[0], any(need[1 + i] for i in there), any(need[4 + i] for i in there)
    dx, dweight, dbias = linear.backward(dz.view(M, sum(sizes)), x.reshape(M, K), weight, None, 0, 0.0, *wanted)
    found: list[Tensor | None] = [None if dx is None else dx.view(B, T, K), *[None] * 6]
    for first, whole in ((1, dweight), (4, dbias)):
        for i, part in zip(there, () if whole is None else whole.split(sizes)):
            found[first + i] = part.clone() if need[first + i] else None
    return tuple(found)


def _check(x: Tensor, weights: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None, D: int) -> tuple[int, int]:
    """Heads of the queries and of the keys, or an error that names the argument."""
    if x.dim() != 3 or D < 1:
        raise RuntimeError(f"x must be (B, T, C) and head_dim positive, got {tuple(x.shape)} and {D}")
    B, T, C = x.shape
    check_tensor("x", x, x, (B, T, C))
    for name, weight in zip(NAMES[0], weights):
        rows = weight.shape[0] if weight.dim() and weight.shape[0] % D == 0 else D
        check_tensor(name, weight, x, (len(weights[1]) if name == "v_weight" else rows, C))
    if (cos is None) != (sin is None):
        raise RuntimeError(f"{'cos' if cos is None else 'sin'} is None, needs both cos and sin, or neither")
    if cos is not None and sin is not None:
        P, like = cos.shape[-1] if cos.dim() else 0, x.new_empty(0, dtype=statistics_dtype(x))
        for name, t in (("cos", cos), ("sin", sin)):
            check_tensor(name, t, like, (1 if cos.dim() and cos.shape[0] == 1 else B, T, P))
        if 2 * P > D:
            raise RuntimeError(f"cos has {P} angles, needs at most {D // 2} for heads of {D}")
    return weights[0].shape[0] // D, weights[1].shape[0] // D


def _example(empty):
    x, weight, narrow, bias = empty(4, 512, 1024), empty(1024, 1024), empty(256, 1024), empty(1024)
    cos = x.new_empty((1, 512, 32), dtype=torch.float32)
    return x, weight, narrow, narrow, bias, bias[:256], bias[:256], cos, cos, 64, False


def _backward_example(empty):
    x, weight, narrow, _, _, _, _, cos, sin, D, interleaved = _example(empty)
    dq, dk = empty(4, 512, 16, 64).transpose(1, 2), empty(4, 512, 4, 64).transpose(1, 2)
    return dq, dk, dk, x, weight, narrow, narrow, cos, sin, D, interleaved, [True] * 7


IMPLEMENTATIONS = {"qkv_projection_forward": forward, "qkv_projection_backward": backward}
EXAMPLES = {"qkv_projection_forward": _example, "qkv_projection_backward": _backward_example}
