"""linear on the GPU: y = act(x Wᵀ + b), dx = dz W, dW = dzᵀ x, db = Σ dz, where dz = dy · act'.

Three products, one tile (matmul.py). Each is cut over its own result, and sums over the letter that the result has not:

    kernel                   result      a (rows, depth)     b (depth, cols)     epilogue
    linear_forward           y  [M, N]   x   [BM, BK]        Wᵀ [BK, BN]         + b, act, cast; z beside y where the backward needs it
    linear_backward_dx       dx [M, K]   dz  [BM, BN]        W  [BN, BK]         cast
    linear_backward_dweight  dW [N, K]   dzᵀ [BN, BM]        x  [BM, BK]         cast; row sums of dzᵀ are db

* **dz is formed from dy while a product reads it**: no kernel of its own, no pass over memory. Every column-tile forms it again, so for
  wide results, and for gelu and silu, one pass (`activation_backward`) that writes dz and adds up db is cheaper; `separate_pass` decides.
* **Few tiles**: `split` shares of the summed dimension go to different programs, into a workspace that `combine` adds up in order.
* Transposes are strides: Wᵀ and dzᵀ are read in place, and x and W may have any strides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..contract import statistics_dtype
from .activations import COSTLY, DERIVATIVES, EPILOGUES, LEAKY_RELU, identity, identity_backward
from .config import Config, ceil_div, choose, kind_of
from .launch import check_tensor, device_of, launch, precision
from .matmul import combine, dot_tile, offsets, tile_ids, wrapped


@triton.jit
def linear_forward(
    x, weight, bias, y, z, M, N, K, x_m, x_k, w_n, w_k, SHARE, slope: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y[s, m, n] = EPILOGUE(Σ_k x[m,k] W[n,k] + b[n]) for the s-th SHARE of k; y, z contiguous; bias and z may be None."""
    pid_m, pid_n = tile_ids(M, N, BM, BN, GROUP)
    share = tl.program_id(1).to(tl.int64)
    m, n = wrapped(pid_m * BM, M, BM), wrapped(pid_n * BN, N, BN)
    k = share * SHARE + tl.arange(0, BK)
    a = x + offsets(m, k, x_m, x_k)
    b = weight + offsets(k, n, w_k, w_n)
    step = tl.full((), BK, tl.int64)
    acc, _ = dot_tile(
        a, a, b, step * x_k, step * x_k, step * w_k, share * SHARE, tl.minimum((share + 1) * SHARE, K), slope, identity_backward, PRECISION,
        EVEN, False,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + n).to(acc.dtype)[None, :]
    m, n = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    place = share * M * N + offsets(m, n, N, 1)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if z is not None:
        tl.store(z + place, acc.to(z.dtype.element_ty), inside)
    tl.store(y + place, EPILOGUE(acc, slope).to(y.dtype.element_ty), inside)


@triton.jit
def linear_backward_dx(
    dy, saved, weight, dx, M, N, K, dy_m, dy_n, w_n, w_k, SHARE, slope: tl.constexpr, DERIVATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dx[s, m, k] = Σ_n dz[m,n] W[n,k] for the s-th SHARE of n; dx and saved contiguous; saved [M, N] is None where dz is dy."""
    pid_m, pid_k = tile_ids(M, K, BM, BK, GROUP)
    share = tl.program_id(1).to(tl.int64)
    m, k = wrapped(pid_m * BM, M, BM), wrapped(pid_k * BK, K, BK)
    n = share * SHARE + tl.arange(0, BN)
    step = tl.full((), BN, tl.int64)
    a = dy + offsets(m, n, dy_m, dy_n)
    kept, step_kept = (a, step * dy_n) if saved is None else (saved + offsets(m, n, N, 1), step)
    acc, _ = dot_tile(
        a, kept, weight + offsets(n, k, w_n, w_k), step * dy_n, step_kept, step * w_n, share * SHARE,
        tl.minimum((share + 1) * SHARE, N), slope, DERIVATIVE, PRECISION, EVEN, False,
    )  # fmt: skip
    m, k = pid_m * BM + tl.arange(0, BM), pid_k * BK + tl.arange(0, BK)
    inside = (m < M)[:, None] & (k < K)[None, :]
    tl.store(dx + share * M * K + offsets(m, k, K, 1), acc.to(dx.dtype.element_ty), inside)


@triton.jit
def linear_backward_dweight(
    dy, saved, x, dweight, dbias, M, N, K, dy_m, dy_n, x_m, x_k, SHARE, slope: tl.constexpr, DERIVATIVE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dW[s, n, k] = Σ_m dz[m,n] x[m,k] and db[s, n] = Σ_m dz[m,n] for the s-th SHARE of m; outputs and saved contiguous; saved is None
    where dz is dy; dbias may be None."""
    pid_n, pid_k = tile_ids(N, K, BN, BK, GROUP)
    share = tl.program_id(1).to(tl.int64)
    n, k = wrapped(pid_n * BN, N, BN), wrapped(pid_k * BK, K, BK)
    m = share * SHARE + tl.arange(0, BM)
    step = tl.full((), BM, tl.int64)
    a = dy + offsets(n, m, dy_n, dy_m)
    kept, step_kept = (a, step * dy_m) if saved is None else (saved + offsets(n, m, 1, N), step * N)
    acc, sums = dot_tile(
        a, kept, x + offsets(m, k, x_m, x_k), step * dy_m, step_kept, step * x_m, share * SHARE,
        tl.minimum((share + 1) * SHARE, M), slope, DERIVATIVE, PRECISION, EVEN, dbias is not None,
    )  # fmt: skip
    n, k = pid_n * BN + tl.arange(0, BN), pid_k * BK + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None, :]
    tl.store(dweight + share * N * K + offsets(n, k, K, 1), acc.to(dweight.dtype.element_ty), inside)
    if dbias is not None:  # every column-tile has the same sums; the first writes them
        tl.store(dbias + share * N + n, sums.to(dbias.dtype.element_ty), (n < N) & (pid_k == 0))


@triton.jit
def activation_backward(
    dy, saved, dz, dbias, M, N, dy_m, dy_n, SHARE, slope: tl.constexpr, DERIVATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """dz[m,n] = dy · act'(saved) and dbias[s, n] = Σ_m dz[m,n] for the s-th SHARE of m. dz, dbias and, where dz is dy, saved
    may be None. Reads each row once."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    share = tl.program_id(1).to(tl.int64)
    DTYPE: tl.constexpr = dy.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    sums = tl.zeros((BM, BN), ACC)
    for start in range(share * SHARE, tl.minimum((share + 1) * SHARE, M), BM):
        m = start + tl.arange(0, BM)
        inside = (m < M)[:, None] & (n < N)[None, :]
        dy_tile = tl.load(dy + offsets(m, n, dy_m, dy_n), inside, other=0.0).to(ACC)
        if saved is not None:
            dy_tile = DERIVATIVE(dy_tile, tl.load(saved + offsets(m, n, N, 1), inside, other=0.0).to(ACC), slope)
        dz_tile = dy_tile.to(DTYPE)
        if dz is not None:
            tl.store(dz + offsets(m, n, N, 1), dz_tile, inside)
        sums += dz_tile.to(ACC)
    if dbias is not None:
        tl.store(dbias + share * N + n, tl.sum(sums, axis=0).to(dbias.dtype.element_ty), n < N)


def separate_pass(activation: int, M: int, N: int, K: int, need_dweight: bool, need_dbias: bool) -> bool:
    """Whether dz and db get one pass over dy of their own, before the products, instead of being formed inside them.

    The pass moves 3MN elements once. Inside, each of the K / BK column-tiles forms dz anew, on units that must keep pace with the tensor
    cores: the wider the result, the sooner the pass pays; small problems are bound by the number of launches. A derivative with an
    exponential always takes the pass: inside a product its temporaries do not fit beside the accumulator and spill.
    """
    if activation in COSTLY or (need_dbias and (K == 0 or not need_dweight)):
        return True
    return bool(activation or need_dbias) and M * N >= 1 << 18 and K > 1024


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, slope: float, save: bool) -> tuple[Tensor, Tensor | None]:
    """Launcher of ``linear_forward``; shapes and errors as the op's contract says."""
    M, K, N = _check(x, weight, activation)
    if bias is not None:
        check_tensor("bias", bias, x, (N,))
    y, z = x.new_empty(M, N), x.new_empty(M, N) if save else None
    if y.numel() == 0:
        return y, z
    mode = precision(x.dtype)
    c = choose("forward", kind_of(x.dtype, mode), M, N, K, device_of(x))
    run_forward(c, x, weight, None if bias is None else bias.contiguous(), y, z, activation, slope)
    return y, z


def run_forward(
    c: Config, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None, activation: int = 0, slope: float = 0.0
) -> None:
    """Fill y (and z) by tiles of ``c``."""
    (M, K), N = x.shape, weight.shape[0]
    epilogue, slope = EPILOGUES[activation], slope if activation == LEAKY_RELU else 0.0
    out, share = _shares(c, y, K)
    whole = c.split == 1
    launch(
        linear_forward, _grid(c, M, N), x, weight, bias if whole else None, out, z if whole else None, M, N, K, *x.stride(),
        *weight.stride(), share, slope=slope, EPILOGUE=epilogue if whole else identity, PRECISION=precision(x.dtype), BM=c.rows, BN=c.cols,
        BK=c.depth, GROUP=c.group, EVEN=K % c.depth == 0, warps=c.warps, stages=c.stages,
    )  # fmt: skip
    if not whole:
        add_up(out, bias, y, z, N, slope, epilogue)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor | None, activation: int, slope: float, need_dx: bool, need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Launcher of the backward kernels; shapes and errors as the op's contract says."""
    M, K, N = _check(x, weight, activation)
    check_tensor("dy", dy, x, (M, N))
    kept = None
    if activation:
        if saved is None:
            raise RuntimeError(f"saved is None, needs what linear_forward kept for activation {activation}")
        check_tensor("saved", saved, x, (M, N))
        kept = saved.contiguous()
    dx = x.new_empty(M, K) if need_dx else None
    dweight = x.new_empty(N, K) if need_dweight else None
    dbias = x.new_empty(N) if need_dbias else None
    to_sum = dbias if N else None
    if separate_pass(activation, M, N, K, need_dweight, need_dbias):
        products = bool(activation) and any(t is not None and t.numel() for t in (dx, dweight))
        dz = dy.new_empty(M, N) if products else None
        run_activation(dy, kept, dz, to_sum, activation, slope)
        dy, kept, activation, to_sum = (dy, kept, activation, None) if dz is None else (dz, None, 0, None)
    kind, device = kind_of(x.dtype, precision(x.dtype)), device_of(x)
    if dx is not None and dx.numel():
        name = "dx formed" if activation else "dx"
        run_dx(choose(name, kind, M, K, N, device), dy, kept, weight, dx, activation, slope)
    if dweight is not None and dweight.numel():
        name = "dweight" if activation == 0 and to_sum is None else "dweight formed"
        run_dweight(choose(name, kind, N, K, M, device), dy, kept, x, dweight, to_sum, activation, slope)
    return dx, dweight, dbias


def run_dx(c: Config, dy: Tensor, saved: Tensor | None, weight: Tensor, dx: Tensor, activation: int = 0, slope: float = 0.0) -> None:
    """Fill dx by tiles of ``c``."""
    (M, N), K = dy.shape, weight.shape[1]
    out, share = _shares(c, dx, N)
    launch(
        linear_backward_dx, _grid(c, M, K), dy, saved, weight, out, M, N, K, *dy.stride(), *weight.stride(), share,
        slope=slope if activation == LEAKY_RELU else 0.0, DERIVATIVE=DERIVATIVES[activation], PRECISION=precision(dy.dtype), BM=c.rows,
        BN=c.depth, BK=c.cols, GROUP=c.group, EVEN=N % c.depth == 0, warps=c.warps, stages=c.stages,
    )  # fmt: skip
    if c.split > 1:
        add_up(out, None, dx, None, K)


def run_dweight(
    c: Config, dy: Tensor, saved: Tensor | None, x: Tensor, dweight: Tensor, dbias: Tensor | None, activation: int = 0, slope: float = 0.0
) -> None:
    """Fill dweight, and dbias where it is not None, by tiles of ``c``."""
    (M, N), K = dy.shape, x.shape[1]
    out, share = _shares(c, dweight, M)
    sums = None if dbias is None else _shares(c, dbias, M)[0]
    launch(
        linear_backward_dweight, _grid(c, N, K), dy, saved, x, out, sums, M, N, K, *dy.stride(), *x.stride(), share,
        slope=slope if activation == LEAKY_RELU else 0.0, DERIVATIVE=DERIVATIVES[activation], PRECISION=precision(dy.dtype), BM=c.depth,
        BN=c.rows, BK=c.cols, GROUP=c.group, EVEN=M % c.depth == 0, warps=c.warps, stages=c.stages,
    )  # fmt: skip
    if c.split > 1:
        add_up(out, None, dweight, None, K)
        if dbias is not None and sums is not None:
            add_up(sums, None, dbias, None, N)


def run_activation(dy: Tensor, saved: Tensor | None, dz: Tensor | None, dbias: Tensor | None, activation: int, slope: float) -> None:
    """Fill dz and dbias, whichever is not None; at most 64 programs share a column."""
    M, N = dy.shape
    BM, BN = 32, 128
    if N == 0:
        return
    share = BM * max(4, ceil_div(M, 64 * BM))
    shares = max(1, ceil_div(M, share))
    sums = dbias
    if dbias is not None and shares > 1:
        sums = dbias.new_empty((shares, N), dtype=statistics_dtype(dbias))
    launch(
        activation_backward, (ceil_div(N, BN), shares), dy, saved, dz, sums, M, N, *dy.stride(), share,
        slope=slope if activation == LEAKY_RELU else 0.0, DERIVATIVE=DERIVATIVES[activation], BM=BM, BN=BN,
    )  # fmt: skip
    if dbias is not None and sums is not None and shares > 1:
        add_up(sums, None, dbias, None, N)


def _check(x: Tensor, weight: Tensor, activation: int) -> tuple[int, int, int]:
    """M, K, N of the product, or an error that names the argument."""
    if x.dim() != 2 or weight.dim() != 2:
        raise RuntimeError(f"x and weight must be (M, K) and (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if not 0 <= activation < len(EPILOGUES):
        raise ValueError(f"activation must be a code from 0 to {len(EPILOGUES) - 1}, got {activation}")
    (M, K), N = x.shape, weight.shape[0]
    check_tensor("x", x, x, (M, K))
    check_tensor("weight", weight, x, (N, K))
    return M, K, N


def _grid(c: Config, rows: int, cols: int) -> tuple[int, int]:
    return ceil_div(rows, c.rows) * ceil_div(cols, c.cols), c.split


def _shares(c: Config, result: Tensor, depth: int) -> tuple[Tensor, int]:
    """Where the programs write (``result``, or a workspace of ``split`` partial results) and how much of ``depth`` each sums."""
    share = ceil_div(ceil_div(depth, c.split), c.depth) * c.depth
    if c.split == 1:
        return result, share
    return result.new_empty((c.split, *result.shape), dtype=statistics_dtype(result)), share


def add_up(partial: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None, N: int, slope: float = 0.0, epilogue=identity) -> None:
    """y = epilogue(Σ partial + bias), number by number as they lie in memory; ``bias`` is that of every N numbers."""
    BLOCK, size = 1024, y.numel()
    launch(combine, (ceil_div(size, BLOCK),), partial, bias, y, z, size, N, len(partial), slope=slope, EPILOGUE=epilogue, BLOCK=BLOCK)


IMPLEMENTATIONS = {"linear_forward": forward, "linear_backward": backward}
EXAMPLES = {
    "linear_forward": lambda empty: (empty(1024, 1024), empty(1024, 1024), empty(1024), 1, 0.0, False),
    "linear_backward": lambda empty: (*(empty(1024, 1024) for _ in range(4)), 1, 0.0, True, True, True),
}
