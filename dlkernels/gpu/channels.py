"""Where the numbers of a channel lie, for kernels that normalise channels: one view of both memory formats, cut into tiles.

Number (n, s) of channel c lies at n sn + s ss + c sc. Contiguous memory takes one channel per program and lanes along s; channels-last
memory is one long run of rows, and a program takes BC neighbouring channels, lanes along them. Shares of the tiles make up for too few
channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .config import ceil_div
from .launch import check_tensor, device_of

TILE, CHANNELS = 2048, 64


@triton.jit
def place(tile, N, C, S, sn, sc, ss, BN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """Offsets of a tile's numbers for the channels of this program, [BN BS, BC] (int64), which of them exist, and the channels."""
    r = tl.arange(0, BN * BS)
    tiles_s = tl.cdiv(S, BS)
    n = (tile // tiles_s * BN).to(tl.int64) + r // BS
    s = (tile % tiles_s * BS).to(tl.int64) + r % BS
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    inside = ((n < N) & (s < S))[:, None] & (c < C)[None, :]
    return (n * sn + s * ss)[:, None] + (c * sc)[None, :], inside, c


class View(NamedTuple):
    """Number (n, s) of channel c lies at n sn + s ss + c sc; tiles of BN x BS numbers of BC channels."""

    N: int
    C: int
    S: int
    sn: int
    sc: int
    ss: int
    BN: int
    BS: int
    BC: int

    @property
    def strided(self) -> tuple[int, ...]:
        return self[:6]

    @property
    def blocks(self) -> dict[str, Any]:
        return {"BN": self.BN, "BS": self.BS, "BC": self.BC}

    @property
    def tiles(self) -> int:
        return ceil_div(self.N, self.BN) * ceil_div(self.S, self.BS)

    def shares(self, x: Tensor) -> tuple[int, int]:
        """How many programs share a channel, and the tiles of each: four programs per multiprocessor where there is that much work."""
        wanted = ceil_div(4 * device_of(x).processors, ceil_div(self.C, self.BC))
        share = ceil_div(self.tiles, max(1, min(wanted, ceil_div(self.tiles, 4))))
        return ceil_div(self.tiles, share), share


def view_of(x: Tensor) -> tuple[View, torch.memory_format]:
    """The view of x, and the memory format that the kernels need it in."""
    if not 2 <= x.dim() <= 5:
        raise RuntimeError(f"x must have 2 to 5 dimensions, got {x.dim()}")
    check_tensor("x", x, x, tuple(x.shape))
    form = suggest_memory_format(x)
    N, C = x.shape[:2]
    S = x[0, 0].numel() if N and C else 0
    if x.dim() == 2 or form != torch.contiguous_format:
        BC = min(CHANNELS, triton.next_power_of_2(max(C, 1)))
        return View(1, C, N * S, 0, 1, C, 1, min(TILE // BC, triton.next_power_of_2(max(N * S, 1))), BC), form
    BS = min(TILE, triton.next_power_of_2(max(S, 1)))
    return View(N, C, S, C * S, S, 1, min(TILE // BS, triton.next_power_of_2(max(N, 1))), BS, 1), form
