"""Activations as functions that a kernel receives as an argument: act(z) for an epilogue, dz from (dy, saved) for a backward product.

A kernel written once with ``EPILOGUE: tl.constexpr`` is compiled once per activation, with the function inlined on the accumulator while
it is still in registers: no branch at run time, no extra pass over memory.

    forward     y  = act(z)              z in fp32 (fp64 for fp64), before the cast to y's dtype
    backward    dz = dy · act'(saved)    saved is y where y alone determines act' (relu, leaky_relu, sigmoid, tanh), else z

``slope`` is leaky_relu's; it is a compile-time constant because Triton would pass a run-time float as fp32, which is wrong for fp64.
Comparisons are written so that NaN falls through to the branch that keeps it.
"""

from __future__ import annotations

import triton
import triton.language as tl


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


# Position = the activation code of the op's schema.
EPILOGUES = (identity, relu, gelu, gelu_tanh, leaky_relu, sigmoid, tanh, silu)
DERIVATIVES = (
    identity_backward, relu_backward, gelu_backward, gelu_tanh_backward, leaky_relu_backward, sigmoid_backward, tanh_backward, silu_backward
)
LEAKY_RELU = 4
COSTLY = (2, 3, 7)  # a derivative with an exponential: tens of instructions, and as many registers, for each element
