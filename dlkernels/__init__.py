"""dlkernels: the operations of a deep-learning curriculum as fast, readable kernels behind PyTorch autograd Functions."""

from . import backend, ops  # noqa: F401  the contracts define the ops that the libraries below implement
from .backend import explain
from .registry import OPS

backend.load()

from . import functional, nn, optim  # noqa: E402
from .acceleration import accelerate, unaccelerate  # noqa: E402
from .optim import clip_grad_norm_  # noqa: E402

__version__ = "0.1.0"
__all__ = ["OPS", "accelerate", "clip_grad_norm_", "explain", "functional", "nn", "optim", "unaccelerate"]
