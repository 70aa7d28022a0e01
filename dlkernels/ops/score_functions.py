"""Score functions: what becomes of a score of attention before mask, slopes and softmax.

    z = f(scale q·k, behind, a)       behind: how far the query lies behind the key;  a: one number, the function's parameter

Each has an entry here, its definition, one in csrc/cpu/score_functions.h and one in gpu/score_functions.py, under the same name and
in the same place. docs/adding_an_op.md adds one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__: list[str] = []

SCORE_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "none": lambda z, behind, a: z,
    "softcap": lambda z, behind, a: a * torch.tanh(z / a),
}


def code_of(name: str) -> int:
    """The number under which the kernels know a score function.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function is {name!r}, needs one of {', '.join(SCORE_FUNCTIONS)}")
    return list(SCORE_FUNCTIONS).index(name)
