"""Score functions of attention as functions that its kernels receive: z = f(x, behind, a), of x = scale q·k and of how far the query lies
behind the key, and dz/dx. Kernels are compiled with theirs inlined, or with none. All three are of the scores' type.

Names and meaning are those of dlkernels/ops/score_functions.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it

from .activations import tanh


class ScoreFunction(NamedTuple):
    """Two jit functions, None where there is nothing to do; and whether they look at ``behind``."""

    value: Any = None
    derivative: Any = None
    of_places: bool = True


@triton.jit
def softcap(x, behind, a):
    return a * tanh(x * (1.0 / a), 0.0)


@triton.jit
def softcap_derivative(x, behind, a):
    t = tanh(x * (1.0 / a), 0.0)
    return 1.0 - t * t


SCORE_FUNCTIONS = {
    "none": ScoreFunction(of_places=False),
    "softcap": ScoreFunction(softcap, softcap_derivative, of_places=False),
}
