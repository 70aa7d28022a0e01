"""conv2d on the GPU, y = act(x * W + b): which kernels run, and the pass over dy that all of the backward begins with.

    filter 1 x 1, stride 1, no padding, channels side by side    linear.py: x is a matrix [N H W, C] as it lies
    a group has one channel and at most four outputs             conv2d_depthwise.py
    else                                                         conv2d_product.py

    conv2d_backward_dz    dz = dy · act'(saved), and its sums per channel    workspace [shares, O]

* dz is formed once and kept: dx and dweight read every number of it R S times.
* dbias falls out of that pass, in the order of batch_norm's sums: a share of a channel's tiles for each program, then the shares in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..contract import statistics_dtype
from . import conv2d_depthwise, conv2d_product, linear
from .activations import DERIVATIVES, LEAKY_RELU
from .channels import place, view_of
from .config import ceil_div
from .conv2d_windows import Windows, windows_of
from .launch import check_tensor, launch

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def conv2d_backward_dz(
    dy, saved, dz, partial, N, O, S, sn, so, ss, TILES, SHARE, slope: tl.constexpr, DERIVATIVE: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dz = DERIVATIVE(dy, saved) for tiles [share SHARE, (share + 1) SHARE) of each channel o, and partial[share,o] = Σ dz.
    partial, and where dz is dy both dz and saved, may be None."""
    ACC: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    share = tl.program_id(1)
    sums = tl.zeros((BN * BS, BO), ACC)
    for tile in range(share * SHARE, tl.minimum((share + 1) * SHARE, TILES)):
        at, inside, _ = place(tile, N, O, S, sn, so, ss, BN, BS, BO)
        slopes = tl.load(dy + at, inside, other=0.0)
        if saved is not None:
            slopes = DERIVATIVE(slopes.to(ACC), tl.load(saved + at, inside, other=0.0).to(ACC), slope).to(dy.dtype.element_ty)
            tl.store(dz + at, slopes, inside)
        sums += tl.where(inside, slopes.to(ACC), 0.0)
    if partial is not None:
        o = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
        tl.store(partial + share.to(tl.int64) * O + o, tl.sum(sums, axis=0), o < O)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    _winograd: bool, activation: int, slope: float, save: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Launcher of the forward kernels; shapes and errors as the op's contract says. Tensor cores multiply faster than Winograd adds."""
    k, form = windows_of(x, weight, stride, padding, dilation, groups, activation)
    if bias is not None:
        check_tensor("bias", bias, x, (k.O,))
        bias = bias.contiguous()
    if is_matrix(k, form):
        flat = linear.forward(_matrix(x, form), _filter(weight), bias, activation, slope, save)
        return _images(flat[0], k, form), None if flat[1] is None else _images(flat[1], k, form)
    y = empty(x, (k.N, k.O, k.P, k.Q), form)
    z = torch.empty_like(y) if save else None
    if y.numel():
        kernels(k).run_forward(k, x.contiguous(memory_format=form), weight, bias, y, z, activation, slope)
    return y, z


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, _winograd: bool, activation: int, slope: float, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> Gradients:  # fmt: skip
    """Launcher of the backward kernels; shapes and errors as the op's contract says."""
    k, form = windows_of(x, weight, stride, padding, dilation, groups, activation)
    check_tensor("dy", dy, x, (k.N, k.O, k.P, k.Q))
    if activation:
        if saved is None:
            raise RuntimeError(f"saved is None, needs what conv2d_forward kept for activation {activation}")
        check_tensor("saved", saved, x, (k.N, k.O, k.P, k.Q))
    else:
        saved = None
    if is_matrix(k, form):
        kept = None if saved is None else _matrix(saved, form)
        flat = linear.backward(
            _matrix(dy, form), _matrix(x, form), _filter(weight), kept, activation, slope, need_dx, need_dweight, need_dbias
        )
        return None if flat[0] is None else _images(flat[0], k, form), None if flat[1] is None else _as_filter(flat[1], weight), flat[2]
    dx = empty(x, x.shape, form) if need_dx else None
    dweight = empty(x, weight.shape, suggest_memory_format(weight)) if need_dweight else None
    dbias = x.new_empty(k.O) if need_dbias else None
    if k.M * k.O == 0:
        return tuple(None if t is None else t.zero_() for t in (dx, dweight, dbias))  # type: ignore[return-value]
    x, dz = x.contiguous(memory_format=form), dy.contiguous(memory_format=form)
    if dbias is not None or (saved is not None and (need_dx or need_dweight)):
        dz = run_dz(dz, None if saved is None else saved.contiguous(memory_format=form), dbias, activation, slope)
    if k.C and (need_dx or need_dweight):
        kernels(k).run_backward(k, dz, x, weight, dx, dweight)
    return dx, dweight, dbias


def run_dz(dy: Tensor, saved: Tensor | None, dbias: Tensor | None, activation: int, slope: float) -> Tensor:
    """dz, and dbias where it is not None; dy and saved are dense, of one memory format."""
    view, _ = view_of(dy)
    shares, share = view.shares(dy)
    dz = dy if saved is None else torch.empty_like(dy)
    partial = None if dbias is None else dbias.new_empty((shares, view.C), dtype=statistics_dtype(dbias))
    launch(
        conv2d_backward_dz, (ceil_div(view.C, view.BC), shares), dy, saved, None if saved is None else dz, partial, *view.strided,
        view.tiles, share, slope=slope if activation == LEAKY_RELU else 0.0, DERIVATIVE=DERIVATIVES[activation], BN=view.BN, BS=view.BS,
        BO=view.BC, warps=8,
    )  # fmt: skip
    if dbias is not None and partial is not None:
        conv2d_depthwise.run_shares(partial, dbias)
    return dz


def kernels(k: Windows) -> ModuleType:
    """The file whose kernels compute this convolution."""
    return conv2d_depthwise if conv2d_depthwise.is_depthwise(k) else conv2d_product


def is_matrix(k: Windows, form: torch.memory_format) -> bool:
    """Whether y is a product of x and W as they lie."""
    plain = (k.R, k.S, k.G, k.sh, k.sw, k.H, k.W) == (1, 1, 1, 1, 1, k.P, k.Q)
    return plain and k.M * k.O * k.C > 0 and (form == torch.channels_last or k.H * k.W == 1)


def _matrix(x: Tensor, form: torch.memory_format) -> Tensor:
    """[N H W, C] of images whose channels lie side by side."""
    return x.contiguous(memory_format=form).permute(0, 2, 3, 1).reshape(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])


def _filter(weight: Tensor) -> Tensor:
    """[O, C] of a filter with one tap."""
    return weight[:, :, 0, 0]


def _as_filter(matrix: Tensor, weight: Tensor) -> Tensor:
    """(O, C, 1, 1) of a matrix [O, C], in the memory format of ``weight``."""
    last = suggest_memory_format(weight) == torch.channels_last
    return matrix[:, None, None, :].permute(0, 3, 1, 2) if last else matrix.view(weight.shape)


def _images(matrix: Tensor, k: Windows, form: torch.memory_format) -> Tensor:
    """(N, C, H, W) of a matrix [N H W, C], in the memory format that it has."""
    if form == torch.contiguous_format:
        return matrix.view(k.N, matrix.shape[1], 1, 1)
    return matrix.view(k.N, k.H, k.W, matrix.shape[1]).permute(0, 3, 1, 2)


def empty(x: Tensor, shape: Sequence[int], form: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


IMPLEMENTATIONS = {"conv2d_forward": forward, "conv2d_backward": backward}
_EXAMPLE = (1, 1), (1, 1, 1, 1), (1, 1), 1, False, 1, 0.0
EXAMPLES = {
    "conv2d_forward": lambda empty: (_images_of(empty), empty(64, 64, 3, 3), empty(64), *_EXAMPLE, False),
    "conv2d_backward": lambda empty: (
        _images_of(empty), _images_of(empty), empty(64, 64, 3, 3), _images_of(empty), *_EXAMPLE, True, True, True
    ),
}  # fmt: skip


def _images_of(empty) -> Tensor:
    return empty(32, 64, 56, 56).contiguous(memory_format=torch.channels_last)
