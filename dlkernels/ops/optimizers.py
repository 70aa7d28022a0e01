r"""The updates of all parameters at once, in place: what the optimizers in ``dlkernels.optim`` are made of.

g is the gradient of one parameter p, multiplied by `factor` (a loss scale undone, a norm clipped; 1 where there is none), -g if maximize;
t, the number of steps, counts this one. Every formula is torch.optim's.

adam      g ← g + wd p, or decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101): p ← p (1 - lr wd)
          m ← m + (1 - β₁) (g - m)      v ← β₂ v + (1 - β₂) g²      amsgrad: u ← max(u, v), else u = v
          p ← p - lr / (1 - β₁ᵗ) · m / (√u / √(1 - β₂ᵗ) + eps)      (Kingma and Ba 2015, arXiv:1412.6980)
sgd       g ← g + wd p      b ← g at first, then μ b + (1 - dampening) g      p ← p - lr b, nesterov: p - lr (g + μ b)
rmsprop   g ← g + wd p      v ← α v + (1 - α) g²      centered: a ← a + (1 - α) (g - a), u = v - a², else u = v
          d = g / (√u + eps)      momentum: b ← μ b + d, d = b      p ← p - lr d

Shapes      lists of n tensors, entry i of each shaped like parameter i; `steps` are single numbers; a list that is not used is empty.
            Parameters and gradients have one dtype, the moments that or float32 beside a half type.
By chance   adam's moments are bfloat16 (parameters: any dtype but float64): x, between neighbours a < b of that type, becomes b where
            r >= 2¹⁶ (b - x) / (b - a), r < 2¹⁶, so its expectation is x. r is half of the number that philox (dropout.py) gives for seed t,
            row i (which parameter) and column n (which of its numbers as they lie in memory): the lower for m, the upper for v and u.
            With one r for both, u is the largest v that was written.
Bytes       adam reads p, g, m, v and writes p, m, v: 28 a parameter in float32, at some 15 flops. Memory decides, and for thousands of
            small tensors what a list costs per entry.
Nothing is changed where `found_inf` is not 0. `zero_grads` writes zeros over the gradients on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import define

__all__: list[str] = []

Tensors = Sequence[Tensor]
_TAIL = "Tensor? factor, Tensor? found_inf"

adam_ = define(
    "adam_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, "
    f"Tensor(f!)[] steps, {_TAIL}, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, "
    "bool zero_grads, bool by_chance) -> ()",
    lambda *args: None,
)
sgd_ = define(
    f"sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, {_TAIL}, float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize, bool first, bool zero_grads) -> ()",
    lambda *args: None,
)
rmsprop_ = define(
    "rmsprop_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, Tensor(d!)[] grad_avgs, Tensor(e!)[] momentum_buffers, "
    f"Tensor(f!)[] steps, {_TAIL}, float lr, float alpha, float eps, float weight_decay, float momentum, bool maximize, bool zero_grads)"
    " -> ()",
    lambda *args: None,
)


def _norm_fake(tensors: Tensors, norm_type: float) -> Tensor:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tensors[0].new_empty((), dtype=dtype)


# The norm (of type 1, 2 or inf) of all numbers of a list of at least one tensor: a single number, float64 if one of them is, else float32.
total_norm = define("total_norm(Tensor[] tensors, float norm_type) -> Tensor", _norm_fake)
# Every tensor of a list times `factor`, a single number of float32 or float64.
scale_ = define("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()", lambda tensors, factor: None)
