"""For inference: a convolution, the batch norm behind it and the ReLU behind that become one layer.

    batch_norm(x ⋆ W + b) = (x ⋆ W + b - mean) rstd γ + β = x ⋆ (W rstd γ) + (b - mean) rstd γ + β        γ, β its weight and bias

With running statistics the factor and the shift of every channel are constants, so they are multiplied into the filters once.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import torch
import torch.fx
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .. import functional as F
from .activations import ReLU
from .batch_norm import BatchNorm2d, BatchNormReLU2d
from .conv2d import Conv2d, ConvReLU2d

__all__ = ["fuse_conv_bn"]

# By exact type: what a subclass computes is not known here.
CONVOLUTIONS = (torch.nn.Conv2d, Conv2d)
BATCH_NORMS = (torch.nn.BatchNorm2d, BatchNorm2d, BatchNormReLU2d)
RELUS = (torch.nn.ReLU, ReLU)
RELU_CALLS = (torch.relu, torch.relu_, torch.nn.functional.relu, F.relu, "relu", "relu_")


def fuse_conv_bn(model: torch.nn.Module) -> GraphModule:
    """A copy of ``model`` for inference, in which convolutions have swallowed what follows them.

    Conv2d, Conv2d + BatchNorm2d          become one ``dlkernels.nn.Conv2d``, with a bias
    the same + ReLU, BatchNormReLU2d      become one ``dlkernels.nn.ConvReLU2d``

    where nothing else uses what lies between them. The layers may be torch's or ours, the ReLU a function as well; what belongs together
    is found by following ``forward`` with ``torch.fx``, so any model that ``torch.fx.symbolic_trace`` takes will do. The others stay
    as they are: layers called more than once or with hooks, and subclasses. Layers keep their names, and the results differ from those of
    ``model.eval()`` by rounding.

    Args:
        model: any module, in evaluation mode; it is left as it is.

    Raises:
        ValueError: ``model`` or a part of it is in training mode; a batch norm has no running statistics, or other channels than its
            convolution; or (a ``torch.fx.proxy.TraceError``) the path through ``forward`` depends on the data: fuse its parts one by one.
    """
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model must be in evaluation mode, and {training[0]} is in training mode: call model.eval() first")
    root = copy.deepcopy(model)
    fused = GraphModule(root, _Tracer().trace(root), type(model).__name__)
    calls = Counter(node.target for node in fused.graph.nodes if node.op == "call_module")
    for node in fused.graph.nodes:
        if _is(node, CONVOLUTIONS) and calls[node.target] == 1:
            _fuse_one(fused, node)
    fused.delete_all_unused_submodules()
    fused.recompile()
    return fused.eval()  # the containers are new ones


class _Tracer(torch.fx.Tracer):
    """Follows the calls of modules down to those without children, layers, whoever wrote them; and sees our functions as one call each."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, F))  # type: ignore[arg-type]

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


def _layer(node: Node) -> Any:
    """The layer that ``node`` calls, or None where it does something else."""
    return node.graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" else None  # type: ignore[union-attr]


def _is(node: Node, types: tuple[type, ...]) -> bool:
    """Whether ``node`` calls a layer of just these types without hooks, which may change anything (weight_norm is one)."""
    layer = _layer(node)
    return type(layer) in types and not (layer._forward_hooks or layer._forward_pre_hooks)


def _next(node: Node) -> Node:
    """The one node that uses ``node``'s result; or, where there are several, ``node`` itself, which is never what is looked for."""
    return next(iter(node.users)) if len(node.users) == 1 else node


def _fuse_one(model: GraphModule, node: Node) -> None:
    """The convolution that ``node`` calls takes over its batch norm and its ReLU, as far as they are there."""
    conv, norm, relu = _layer(node), _next(node), False
    if _is(norm, BATCH_NORMS):
        bn = _layer(norm)
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError(f"{norm.target} has no running statistics (track_running_stats=False), so there is nothing constant to fold")
        if conv.out_channels != bn.num_features:
            raise ValueError(f"{node.target} has {conv.out_channels} output channels, {norm.target} behind it takes {bn.num_features}")
        statistics = bn.running_mean, bn.running_var, bn.eps
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, bn.weight, bn.bias)
        relu = isinstance(bn, BatchNormReLU2d)
        _remove(model, norm, node)
    after = _next(node)
    if not relu and (_is(after, RELUS) or (after.op in ("call_function", "call_method") and after.target in RELU_CALLS)):
        relu = True
        _remove(model, after, node)
    conv.__class__ = ConvReLU2d if relu else Conv2d  # they differ from torch's in nothing but forward


def _remove(model: GraphModule, node: Node, instead: Node) -> None:
    node.replace_all_uses_with(instead)
    model.graph.erase_node(node)
