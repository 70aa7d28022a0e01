"""layer_norm and rms_norm on the GPU: the launchers; norm.py has the kernels and says how the work is cut."""

from __future__ import annotations

from torch import Tensor

from .launch import check_tensor
from .norm import check_rows, check_statistics, run_backward, run_forward


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Shapes and errors as the op's contract says."""
    check_rows(x, weight, bias)
    y, _, mean, rstd = run_forward(x, None, None, weight, bias, 0.0, eps, centred)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor | None, ...]:
    """Shapes and errors as the op's contract says."""
    check_rows(x, weight, None)
    check_tensor("dy", dy, x, tuple(x.shape))
    check_statistics(x, mean, rstd)
    dx, _, dweight, dbias = run_backward(dy, None, x, None, weight, mean, rstd, 0.0, need_dx, False, need_dweight, need_dbias)
    return dx, dweight, dbias


IMPLEMENTATIONS = {"layer_norm_forward": forward, "layer_norm_backward": backward}
EXAMPLES = {
    "layer_norm_forward": lambda empty: (empty(4096, 1024), empty(1024), empty(1024), 1e-5, True),
    "layer_norm_backward": lambda empty: (
        empty(4096, 1024), empty(4096, 1024), empty(1024), empty(2, 4096).float(), empty(4096).float(), True, True, True,
    ),
}  # fmt: skip
