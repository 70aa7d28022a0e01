"""What tests of the Triton launchers share: where they run, and the activations by their codes.

They run on a CUDA device where there is one, else in Triton's interpreter. That has to be chosen before a kernel is imported, so without a
GPU a test runs its own file again, in a process with TRITON_INTERPRET=1. bf16 is left to the GPU: the interpreter computes it wrongly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HERE = INTERPRET or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRET else "cuda"
DTYPES = [torch.float32, torch.float64, torch.float16] + [torch.bfloat16] * (not INTERPRET)
SLOPE = 0.1
REFERENCE: dict[int, Callable[[Tensor], Tensor]] = {
    0: lambda z: z, 1: torch.relu, 2: F.gelu, 3: lambda z: F.gelu(z, approximate="tanh"), 4: lambda z: F.leaky_relu(z, SLOPE),
    5: torch.sigmoid, 6: torch.tanh, 7: F.silu,
}  # fmt: skip
KEEPS_Z = (2, 3, 7)

here = pytest.mark.skipif(not HERE, reason="runs in the interpreter's process")
elsewhere = pytest.mark.skipif(HERE, reason="this is that process, or there is a GPU")
quiet = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:divide by zero", "ignore:invalid value")


def passes_in_the_interpreter(file: str) -> None:
    """Run the tests of ``file`` in a process whose kernels are interpreted; at least one must run."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "DLKERNELS_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
