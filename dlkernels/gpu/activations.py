"""Activations as functions that a kernel receives as an argument: act(z) for an epilogue, dz from (dy, saved) for a backward product,
and both for the two kernels at the end, which are the activations by themselves: one program per BLOCK numbers, each read and written once.

A kernel written once with ``EPILOGUE: tl.constexpr`` is compiled once per activation, with the function inlined on the accumulator while
it is still in registers: no branch at run time, no extra pass over memory.

    forward     y  = act(z)              z in fp32 (fp64 for fp64), before the cast to y's dtype
    backward    dz = dy · act'(saved)    saved is y where y alone determines act' (relu, leaky_relu, sigmoid, tanh, elu), else z

``slope`` is leaky_relu's, elu's alpha, softplus's (beta, threshold); it is a compile-time constant because Triton would pass a run-time
float as fp32, which is wrong for fp64.
Comparisons are written so that NaN falls through to the branch that keeps it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import check_tensor, launch

BLOCK = 1024


@triton.jit
def identity(z, slope: tl.constexpr):
    return z


@triton.jit
def relu(z, slope: tl.constexpr):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def gelu(z, slope: tl.constexpr):
    """z Φ(z), Φ the normal distribution function."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_tanh(z, slope: tl.constexpr):
    """z (1 + tanh u) / 2 = z sigmoid(2u), with u = √(2/π) (z + 0.044715 z³)."""
    return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z), slope)


@triton.jit
def leaky_relu(z, slope: tl.constexpr):
    return tl.where(z > 0, z, z * slope)


@triton.jit
def sigmoid(z, slope: tl.constexpr):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def tanh(z, slope: tl.constexpr):
    """(1 - e) / (1 + e) with e = exp(-2|z|); near 0, where 1 - e cancels, the first five terms of the series."""
    SERIES: tl.constexpr = 0.04 if z.dtype == tl.float64 else 0.25
    s = z * z
    series = z * (1.0 + s * (-0.3333333333333333 + s * (0.13333333333333333 + s * (-0.05396825396825397 + s * 0.021869488536155203))))
    e = tl.exp(-2.0 * tl.abs(z))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(z) < SERIES, series, tl.where(z < 0, -magnitude, magnitude))


@triton.jit
def silu(z, slope: tl.constexpr):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def elu(z, slope: tl.constexpr):
    """slope (e^z - 1) for z <= 0, where e^z - 1 = tanh(z/2) (e^z + 1) cancels nowhere."""
    below = tl.where(z > 0, 0.0, z)
    return tl.where(z > 0, z, slope * tanh(0.5 * below, slope) * (tl.exp(below) + 1.0))


@triton.jit
def softplus(z, slope: tl.constexpr):
    """log(1 + e^t) / beta with t = beta z, and z where t > threshold. With u = e^-|t| it is (max(t, 0) + log(1 + u)) / beta, and
    log(1 + u) = u log(w) / (w - 1) for w = 1 + u rounded."""
    t = z * slope[0]
    u = tl.exp(-tl.abs(t))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(t > slope[1], z, (tl.where(t > 0, t, 0.0) + log1p) / slope[0])


@triton.jit
def identity_backward(dy, saved, slope: tl.constexpr):
    return dy


@triton.jit
def relu_backward(dy, y, slope: tl.constexpr):
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def gelu_backward(dy, z, slope: tl.constexpr):
    """dy (Φ(z) + z φ(z)), φ the normal density."""
    return dy * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))


@triton.jit
def gelu_tanh_backward(dy, z, slope: tl.constexpr):
    """With s = sigmoid(2u): dy s (1 + z (1 - s) 2u')."""
    s = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z), slope)
    return dy * s * (1.0 + z * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * z * z)))


@triton.jit
def leaky_relu_backward(dy, y, slope: tl.constexpr):
    return tl.where(y > 0, dy, dy * slope)


@triton.jit
def sigmoid_backward(dy, y, slope: tl.constexpr):
    return dy * y * (1.0 - y)


@triton.jit
def tanh_backward(dy, y, slope: tl.constexpr):
    return dy * (1.0 - y * y)


@triton.jit
def silu_backward(dy, z, slope: tl.constexpr):
    """With s = sigmoid(z): dy s (1 + z (1 - s))."""
    s = sigmoid(z, slope)
    return dy * s * (1.0 + z * (1.0 - s))


@triton.jit
def elu_backward(dy, y, slope: tl.constexpr):
    return tl.where(y > 0, dy, dy * (y + slope))


@triton.jit
def softplus_backward(dy, z, slope: tl.constexpr):
    t = z * slope[0]
    return tl.where(t > slope[1], dy, dy * sigmoid(t, slope))


# Position = the activation code of the op's schema. The epilogues of linear; elu and softplus follow for the activations by themselves.
EPILOGUES = (identity, relu, gelu, gelu_tanh, leaky_relu, sigmoid, tanh, silu)
DERIVATIVES = (
    identity_backward, relu_backward, gelu_backward, gelu_tanh_backward, leaky_relu_backward, sigmoid_backward, tanh_backward, silu_backward
)
LEAKY_RELU = 4
COSTLY = (2, 3, 7)  # a derivative with an exponential: tens of instructions, and as many registers, for each element
FUNCTIONS = (*EPILOGUES, elu, softplus)
GRADIENTS = (*DERIVATIVES, elu_backward, softplus_backward)
SOFTPLUS = 9


@triton.jit
def activation_map(x, y, N, slope: tl.constexpr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    """y[n] = FUNCTION(x[n]); y may be x."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + n, n < N).to(ACC)
    tl.store(y + n, FUNCTION(z, slope).to(y.dtype.element_ty), n < N)


@triton.jit
def activation_gradient(dy, saved, dx, N, slope: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """dx[n] = GRADIENT(dy[n], saved[n])"""
    ACC: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slope_here, kept = tl.load(dy + n, n < N).to(ACC), tl.load(saved + n, n < N).to(ACC)
    tl.store(dx + n, GRADIENT(slope_here, kept, slope).to(dx.dtype.element_ty), n < N)


def forward(x: Tensor, activation: int, a: float, b: float) -> Tensor:
    check_tensor("x", x, x, tuple(x.shape))
    y = x.new_empty(x.shape)
    _run_map(x.contiguous(), y, activation, a, b)
    return y


def forward_(x: Tensor, activation: int, a: float, b: float) -> None:
    check_tensor("x", x, x, tuple(x.shape))
    if not x.is_contiguous():
        raise RuntimeError("x must be contiguous to be changed in place")
    _run_map(x, x, activation, a, b)


def backward(dy: Tensor, saved: Tensor, activation: int, a: float, b: float) -> Tensor:
    check_tensor("saved", saved, saved, tuple(saved.shape))
    check_tensor("dy", dy, saved, tuple(saved.shape))
    dx, N, slope = saved.new_empty(saved.shape), saved.numel(), _slope(activation, a, b)
    if N:
        launch(
            activation_gradient, (triton.cdiv(N, BLOCK),), dy.contiguous(), saved.contiguous(), dx, N, slope=slope,
            GRADIENT=GRADIENTS[activation], BLOCK=BLOCK,
        )  # fmt: skip
    return dx


def _run_map(x: Tensor, y: Tensor, activation: int, a: float, b: float) -> None:
    N, slope = x.numel(), _slope(activation, a, b)
    if N:
        launch(activation_map, (triton.cdiv(N, BLOCK),), x, y, N, slope=slope, FUNCTION=FUNCTIONS[activation], BLOCK=BLOCK)


def _slope(activation: int, a: float, b: float) -> float | tuple[float, float]:
    """The constant of the function with this code, or an error where there is none."""
    if not 0 < activation < len(FUNCTIONS):
        raise RuntimeError(f"activation must be a code from 1 to {len(FUNCTIONS) - 1}, got {activation}")
    return (a, b) if activation == SOFTPLUS else a


IMPLEMENTATIONS = {"activation_forward": forward, "activation_forward_": forward_, "activation_backward": backward}
EXAMPLES = {
    "activation_forward": lambda empty: (empty(1024, 1024), 2, 0.0, 0.0),
    "activation_forward_": lambda empty: (empty(1024, 1024), 2, 0.0, 0.0),
    "activation_backward": lambda empty: (empty(1024, 1024), empty(1024, 1024), 2, 0.0, 0.0),
}
