"""conv_transpose2d on the GPU: conv2d's kernels, for which the images are y and the places of the filter x. See conv2d_product.py.

    y          conv2d_backward_dx, or conv2d_depthwise_dx, with the bias added to each tile
    dx         conv2d_forward of dy
    dweight    conv2d_backward_dweight with x for dz and dy for x
    dbias      conv2d_backward_dz, of which only the sums are kept
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .conv2d import Gradients, empty, kernels, run_dz
from .conv2d_windows import Windows, windows_of
from .launch import check_tensor

Options = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def windows_between(x: Tensor, weight: Tensor, y: Tensor, options: Options) -> Windows:
    """The sizes of the convolution from images y to places x; or an error that names the argument."""
    check_tensor("x", x, y, (y.shape[0], weight.shape[0], *x.shape[2:]))
    k, _ = windows_of(y, weight, *options, activation=0)
    P, Q = x.shape[2:]
    if not (1 <= P <= k.P and 1 <= Q <= k.Q):
        raise RuntimeError(f"x has shape {tuple(x.shape)}, needs 1 x 1 to {k.P} x {k.Q} pixels for a result of {k.H} x {k.W}")
    return k._replace(P=P, Q=Q)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    size: Sequence[int],
) -> Tensor:  # fmt: skip
    """Launcher of the forward; shapes and errors as the op's contract says."""
    ranked(x, weight)
    if len(size) != 2 or min(size) < 1:
        raise RuntimeError(f"size must be 2 numbers of at least 1, got {list(size)}")
    form = suggest_memory_format(x)
    y = empty(x, (x.shape[0], weight.shape[1] * groups, *size), form)
    k = windows_between(x, weight, y, (stride, padding, dilation, groups))
    if bias is not None:
        check_tensor("bias", bias, x, (k.C,))
        bias = bias.contiguous()
    if k.M * k.C:
        kernels(k).run_backward(k, x.contiguous(memory_format=form), None, weight, y, None, bias)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> Gradients:  # fmt: skip
    """Launcher of the backward; shapes and errors as the op's contract says."""
    ranked(x, weight, dy)
    form = suggest_memory_format(x)
    dy = dy.contiguous(memory_format=form)
    k = windows_between(x, weight, dy, (stride, padding, dilation, groups))
    check_tensor("dy", dy, x, (k.N, k.C, k.H, k.W))
    dx = empty(x, x.shape, form) if need_dx else None
    dweight = empty(x, weight.shape, suggest_memory_format(weight)) if need_dweight else None
    dbias = x.new_empty(k.C) if need_dbias else None
    if k.M * k.C == 0:
        return tuple(None if t is None else t.zero_() for t in (dx, dweight, dbias))  # type: ignore[return-value]
    if dx is not None:
        kernels(k).run_forward(k, dy, weight, None, dx, None, 0, 0.0)
    if dweight is not None:
        kernels(k).run_backward(k, x.contiguous(memory_format=form), dy, weight, None, dweight)
    if dbias is not None:
        run_dz(dy, None, dbias, 0, 0.0)
    return dx, dweight, dbias


def ranked(*tensors: Tensor) -> None:
    if any(t.dim() != 4 for t in tensors):
        raise RuntimeError(f"x, weight and dy must have 4 dimensions, got shapes {', '.join(str(tuple(t.shape)) for t in tensors)}")


IMPLEMENTATIONS = {"conv_transpose2d_forward": forward, "conv_transpose2d_backward": backward}
_EXAMPLE = (2, 2), (1, 1, 1, 1), (1, 1), 1
EXAMPLES = {
    "conv_transpose2d_forward": lambda empty: (_images(empty, 28), empty(64, 64, 4, 4), empty(64), *_EXAMPLE, (56, 56)),
    "conv_transpose2d_backward": lambda empty: (
        _images(empty, 56), _images(empty, 28), empty(64, 64, 4, 4), *_EXAMPLE, True, True, True
    ),
}  # fmt: skip


def _images(empty, pixels: int) -> Tensor:
    return empty(32, 64, pixels, pixels).contiguous(memory_format=torch.channels_last)
