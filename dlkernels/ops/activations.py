r"""The activations: y = act(x), element by element, each a pair of a function and its derivative.

              y                                            dx / dy                             kept
relu          max(x, 0)                                    y > 0                               y
leaky_relu    x > 0 ? x : a x                              y > 0 ? 1 : a                       y, or x where a < 0
sigmoid       1 / (1 + e⁻ˣ)                                y (1 - y)                           y
tanh          tanh x                                       1 - y²                              y
elu           x > 0 ? x : a (eˣ - 1)                       y > 0 ? 1 : y + a                   y
gelu          x Φ(x), Φ the normal distribution            Φ(x) + x φ(x)                       x
gelu_tanh     x (1 + tanh u) / 2, u = √(2/π)(x + .044715x³) by the chain rule                  x
silu          x s, s = sigmoid x                           s (1 + x (1 - s))                   x
softplus      log(1 + e^(a x)) / a, or x where a x > b     sigmoid(a x), or 1                  x

What is kept is y wherever y alone decides the derivative: the next layer keeps y anyway, and x can go. In place, an x that is needed
is copied first.

Shapes      x (*)   y (*);   N is the number of elements. Strides are torch's: numbers that lie densely are one long array in any order.
Work        2N elements moved forward, 3N backward; up to some 40 flops for each: memory decides where the numbers come from it, the
            arithmetic where they lie in a cache
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import apply_function, define
from ..contract import autocast_dtype, in_memory_order, is_spread, needs_grad, on_shards, overwrite, reference_gradients, unsupported
from ..registry import Cost, Op, register

__all__ = [
    "elu", "elu_", "gelu", "leaky_relu", "leaky_relu_", "relu", "relu_", "sigmoid", "silu", "softplus", "tanh",
]  # fmt: skip


NUMBERS = (float, int)


class Activation(NamedTuple):
    """``code`` is what the kernels switch on. ``reference`` is the definition, of x, a and b. ``gradient`` is dx of dy, y, a and b in
    differentiable operations where y is what the backward keeps, else None: then it keeps x."""

    code: int
    reference: Callable[[Tensor, float, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float, float], Tensor] | None = None

    @property
    def keeps(self) -> str:
        """What the backward needs: "y", "x", or nothing."""
        return "" if self.code == 0 else "y" if self.gradient else "x"


IDENTITY = Activation(0, lambda x, a, b: x)  # of a linear without an activation
RELU = Activation(1, lambda x, a, b: F.relu(x), lambda dy, y, a, b: dy.masked_fill(y <= 0, 0))
GELU = Activation(2, lambda x, a, b: F.gelu(x))
GELU_TANH = Activation(3, lambda x, a, b: F.gelu(x, approximate="tanh"))
LEAKY_RELU = Activation(4, lambda x, a, b: F.leaky_relu(x, a), lambda dy, y, a, b: torch.where(y > 0, dy, dy * a))
LEAKY_RELU_OF_X = LEAKY_RELU._replace(gradient=None)
SIGMOID = Activation(5, lambda x, a, b: x.sigmoid(), lambda dy, y, a, b: dy * y * (1 - y))
TANH = Activation(6, lambda x, a, b: x.tanh(), lambda dy, y, a, b: dy * (1 - y * y))
SILU = Activation(7, lambda x, a, b: F.silu(x))
ELU = Activation(8, lambda x, a, b: _elu(x, a), lambda dy, y, a, b: torch.where(y > 0, dy, dy * (y + a)))
SOFTPLUS = Activation(9, lambda x, a, b: F.softplus(x, a, b))


def _elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """torch's gradient at NaN is NaN where it runs on vectors and dy where it does not; this one's is NaN."""
    return torch.where(x > 0, x, alpha * torch.expm1(x.masked_fill(x > 0, 0)))


def _forward_fake(x: Tensor, activation: int, a: float, b: float) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(dy: Tensor, saved: Tensor, activation: int, a: float, b: float) -> Tensor:
    torch._check(dy.shape == saved.shape, lambda: f"dy has shape {tuple(dy.shape)}, needs {tuple(saved.shape)} like what was saved")
    torch._check(dy.device == saved.device, lambda: f"dy is on {dy.device}, what was saved on {saved.device}")
    torch._check(dy.dtype == saved.dtype, lambda: f"dy has dtype {dy.dtype}, needs {saved.dtype} like what was saved")
    return saved.new_empty(saved.shape)


_forward = define("activation_forward(Tensor x, int activation, float a, float b) -> Tensor", _forward_fake)
_forward_ = define("activation_forward_(Tensor(a!) x, int activation, float a, float b) -> ()", lambda x, activation, a, b: None)
_backward = define("activation_backward(Tensor dy, Tensor saved, int activation, float a, float b) -> Tensor", _backward_fake)


class _Activation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, act: Activation, a: float, b: float) -> Tensor:
        return _forward(x, act.code, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.act, ctx.a, ctx.b = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output if ctx.act.gradient else x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        (saved,), act, a, b = ctx.saved_tensors, ctx.act, ctx.a, ctx.b
        if not torch.is_grad_enabled():
            return _backward(dy, saved, act.code, a, b), None, None, None
        if act.gradient:  # create_graph=True: differentiable operations, so that second derivatives exist
            return act.gradient(dy, saved, a, b), None, None, None
        return reference_gradients(act.reference, (saved, a, b), (True, False, False), dy)[0], None, None, None


class _InPlace(_Activation):
    """x is overwritten, for activations whose backward needs y alone."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, act: Activation, a: float, b: float) -> Tensor:
        _forward_(x, act.code, a, b)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_dirty(inputs[0])
        _Activation.setup_context(ctx, inputs, output)


def _compute(input: Tensor, act: Activation, a: float = 0.0, b: float = 0.0) -> Tensor:
    x, restore = in_memory_order(input)
    return restore(apply_function(_Activation, x, act, a, b) if needs_grad(x) else _forward(x, act.code, a, b))


def _overwrite(input: Tensor, act: Activation, a: float = 0.0) -> Tensor:
    if not act.gradient and needs_grad(input):  # the backward needs what is about to be overwritten
        return input.copy_(_compute(input.clone(), act, a))
    return overwrite(input, _InPlace, lambda x, act, a, b: _forward_(x, act.code, a, b), _compute, act, a, 0.0)


def _unsupported(input: Tensor, a: Any = 0.0, b: Any = 0.0) -> str | None:
    """Why PyTorch's own operation runs, or None where a kernel does. On the path of every call."""
    if type(a) not in NUMBERS or type(b) not in NUMBERS:
        return f"an option is a {type(a if type(a) not in NUMBERS else b).__name__}; kernels take numbers"
    return unsupported(("input", input))


def _elsewhere(function: Callable[..., Tensor], input: Tensor, *options: Any, **named: Any) -> Tensor:
    """What this module's ``function`` is of what no kernel takes as it is: on the parts of a DTensor, or torch's function of that name."""
    if is_spread(input):
        return on_shards("elementwise", function, input, *options, **named)
    return getattr(F, function.__name__)(input, *options, **named)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.relu``: max(input, 0); a NaN stays one.

    This and the functions below take ``input`` ``(*)`` of float32, float64, bfloat16 or float16 with any strides, and return the same
    shape, dtype and strides. ``inplace`` overwrites ``input`` and returns it. What no kernel takes goes to torch's function of that name,
    which raises what it raises.

    Raises:
        TypeError: ``input`` is not a tensor. RuntimeError: a leaf that requires grad is to be overwritten.
    """
    if _unsupported(input) is not None:
        return _elsewhere(relu, input, inplace=inplace)
    return _overwrite(input, RELU) if inplace else _compute(input, RELU)


def relu_(input: Tensor) -> Tensor:
    """``relu`` in place."""
    return relu(input, True)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.leaky_relu``: input where it is positive, else negative_slope · input. See ``relu``."""
    if _unsupported(input, negative_slope) is not None:
        return _elsewhere(leaky_relu, input, negative_slope, inplace=inplace)
    act = LEAKY_RELU if negative_slope >= 0 else LEAKY_RELU_OF_X
    return _overwrite(input, act, negative_slope) if inplace else _compute(input, act, negative_slope)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """``leaky_relu`` in place."""
    return leaky_relu(input, negative_slope, True)


def sigmoid(input: Tensor) -> Tensor:
    """``torch.nn.functional.sigmoid``: 1 / (1 + e⁻ˣ). See ``relu``."""
    return _compute(input, SIGMOID) if _unsupported(input) is None else _elsewhere(sigmoid, input)


def tanh(input: Tensor) -> Tensor:
    """``torch.nn.functional.tanh``. See ``relu``."""
    return _compute(input, TANH) if _unsupported(input) is None else _elsewhere(tanh, input)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``: input Φ(input), or with ``approximate="tanh"`` its approximation
    (https://arxiv.org/abs/1606.08415). See ``relu``.

    Raises:
        RuntimeError: ``approximate`` is neither "none" nor "tanh".
    """
    act = {"none": GELU, "tanh": GELU_TANH}.get(approximate)
    if act is None or _unsupported(input) is not None:
        return _elsewhere(gelu, input, approximate=approximate)
    return _compute(input, act)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.silu``: input · sigmoid(input). See ``relu``."""
    if _unsupported(input) is not None:
        return _elsewhere(silu, input, inplace=inplace)
    return _overwrite(input, SILU) if inplace else _compute(input, SILU)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.elu``: input where it is positive, else alpha (eˣ - 1). See ``relu``.

    A negative ``alpha`` goes to torch: y does not tell the two sides apart then.
    """
    if _unsupported(input, alpha) is not None or not alpha >= 0:
        return _elsewhere(elu, input, alpha, inplace=inplace)
    return _overwrite(input, ELU, alpha) if inplace else _compute(input, ELU, alpha)


def elu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """``elu`` in place."""
    return elu(input, alpha, True)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """``torch.nn.functional.softplus``: log(1 + e^(beta · input)) / beta, and input where beta · input > threshold. See ``relu``.

    Under autocast on CUDA half types are widened to float32, as in torch.
    """
    if _unsupported(input, beta, threshold) is not None:
        return _elsewhere(softplus, input, beta, threshold)
    if input.dtype.itemsize == 2 and not input.is_cpu and autocast_dtype(input) is not None:
        input = input.float()
    return _compute(input, SOFTPLUS, beta, threshold)


def _make(factory: Callable[..., Tensor], N: int, M: int = 1, lead: tuple[int, ...] | None = None) -> tuple[Tensor]:
    return (factory(*((M,) if lead is None else lead), N),)


FLOPS = {"relu": 1, "leaky_relu": 2, "sigmoid": 16, "tanh": 18, "elu": 14, "gelu": 34, "gelu_tanh": 24, "silu": 18, "softplus": 28}
SAMPLES: list[dict[str, Any]] = [
    {"N": 0}, {"N": 1}, {"N": 15}, {"N": 17, "lead": (2, 3)}, {"N": 65, "lead": (2, 1, 3)}, {"N": 33}, {"N": 3041, "M": 7}
]  # fmt: skip
BENCH = [{"M": M, "N": N} for M, N in [(64, 4096), (1024, 1024), (4096, 4096)]]


def _register(name: str, function: Callable[..., Tensor], torchs: Callable[..., Tensor], **options: Any) -> None:
    def call(x: Tensor) -> Tensor:
        return function(x, **options)

    def native(x: Tensor) -> Tensor:
        return torchs(x, **options)

    def cost(N: int, M: int = 1, lead: tuple[int, ...] | None = None) -> Cost:
        total = N * (M if lead is None else torch.Size(lead).numel())
        return Cost(FLOPS[name] * total, (FLOPS[name] + 4) * total, 2 * total, 3 * total)

    register(
        Op(
            name=name,
            module="activations",
            call=call,
            reference=_elu if name == "elu" else native,
            native=native,
            make=_make,
            samples=SAMPLES,
            bench=BENCH,
            quick=BENCH[1:2],
            tiny=[{"M": 64, "N": 128}],
            cost=cost,
            raw=("activation_forward", "activation_backward"),
            supports=_unsupported,
        )
    )


for _function in (relu, leaky_relu, sigmoid, tanh, gelu, silu, elu, softplus):
    _register(_function.__name__, _function, getattr(F, _function.__name__))
_register("gelu_tanh", gelu, F.gelu, approximate="tanh")
