"""Which calls in a module's ``forward`` are neighbours that one kernel can do.

Where ``forward`` is straight code (``straight.py``), ``torch.fx`` knows which result goes where. What the module's plain attributes were is
compared at every call; where one has changed, the ``forward`` of before runs. An MLP's ``F.relu(self.fc1(x))``, the blocks of a ResNet,
BERT's ``BertIntermediate``, ``BertSelfOutput`` and ``BertOutput`` pass.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..nn.fusion import _next, _Tracer
from . import fuse, swap
from .fuse import Act, Planned
from .straight import Refused, read

PLAIN = (bool, int, float, str, type(None))
HOPEFUL = (fuse.LINEAR, fuse.CONV, fuse.BATCH_NORM, fuse.LAYER_NORM)
ADD = (operator.add, torch.add, "add")


class _Leaves(_Tracer):
    """The layers inside are called, not entered."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True


def class_for(module: torch.nn.Module, classes: Planned) -> tuple[type, list[str]] | str | None:
    """A class whose ``forward`` runs neighbours fused, and what it fuses; why there is none; None where there was nothing to hope for."""
    kind = type(module)
    if not any(fuse.planned_forward(layer, classes) in HOPEFUL for layer in module.children()):
        return None
    if kind.__module__.startswith(("torch.nn.", "dlkernels.nn.", "dlkernels.acceleration.")) or isinstance(module, GraphModule):
        return None
    try:
        guard, present = _guard(module)
        graph = _traced(module)
    except Refused as reason:
        return f"nothing fused, as {reason}"
    found = _fuse_chains(graph, module, classes) + _fuse_sums(graph, module, classes)
    return (_guarded(kind, type(GraphModule(module, graph)).forward, guard, present), found) if found else None


def _guard(module: torch.nn.Module) -> tuple[dict[str, Any], list[str]]:
    """The plain attributes that ``forward`` reads, with their values, and its layers and tensors, which must not become None."""
    if "forward" in vars(module):
        raise Refused("its forward is set on the module itself")
    attributes, called = read(type(module).forward)
    for path in called:
        if not isinstance(_resolved(module, path), (torch.nn.Module, type(None))):
            raise Refused(f"forward calls self.{path}, which is no layer")
    guard: dict[str, Any] = {}
    present = []
    for name in sorted(attributes):
        stored = (values[name] for values in (module._modules, module._parameters, module._buffers) if name in values)
        value = next(stored, inspect.getattr_static(module, name, guard))
        if isinstance(value, PLAIN):
            guard[name] = value
        elif isinstance(value, (torch.nn.Module, Tensor)):
            present.append(name)
        else:
            raise Refused(f"forward reads self.{name}, which is no layer, no tensor and no plain value")
    return guard, present


def _resolved(module: torch.nn.Module, path: str) -> Any:
    try:
        return operator.attrgetter(path)(module)
    except AttributeError:
        return None


def _traced(module: torch.nn.Module) -> Graph:
    before = set(vars(module))
    try:
        graph = _Leaves().trace(module)
    except Exception as error:  # whatever the code of others raises when it gets stand-ins
        raise Refused(f"torch.fx cannot follow it ({type(error).__name__})") from None
    finally:
        constants = set(vars(module)) - before  # tensors that torch.fx met: computed once, and not from the arguments
        for name in constants:
            delattr(module, name)
    if constants:
        raise Refused("forward makes a tensor that depends on no argument")
    return graph


def _guarded(kind: Any, fused: Callable[..., Any], guard: dict[str, Any], present: list[str]) -> type:
    """``kind`` with ``forward`` fused, while the attributes that it reads are what they were."""
    plain = kind.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        same = all(getattr(self, name, fused) is value for name, value in guard.items())
        if same and all(getattr(self, name, None) is not None for name in present):
            return fused(self, *args, **kwargs)
        return plain(self, *args, **kwargs)

    return swap.derived(kind, (kind,), {"forward": forward})


def _act(node: Node) -> Act | None:
    """The activation that a call of a function or method is."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")).removesuffix("_")
    options = {option: value for option, value in node.kwargs.items() if option != "inplace"}
    if name == "gelu" and len(node.args) == 1 and options in ({}, {"approximate": "none"}, {"approximate": "tanh"}):
        return Act("gelu_tanh" if options.get("approximate") == "tanh" else "gelu")
    return Act(name) if name in ("relu", "sigmoid", "tanh", "silu") and len(node.args) == 1 and not options else None


def _layer(node: Any, module: torch.nn.Module) -> Any:
    """The layer that ``node`` calls with one argument; or None. A batch norm only if it is called once, as its calls have an order."""
    if not isinstance(node, Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    layer = _resolved(module, str(node.target))
    calls = [other for other in node.graph.nodes if other.op == "call_module" and _resolved(module, str(other.target)) is layer]
    return None if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and len(calls) > 1 else layer


def _fuse_chains(graph: Graph, module: torch.nn.Module, classes: Planned) -> list[str]:
    """Put a call of ``fuse.chain`` where the first of some neighbours is called. What lies between them nothing else sees, so that is the
    same as calling each in its place."""
    found: list[str] = []
    done: set[Node] = set()
    for first in list(graph.nodes):
        nodes, layers = [first], [_layer(first, module)]
        if first in done or layers == [None]:
            continue
        while len(nodes) < 3 and (node := _next(nodes[-1])) is not nodes[-1] and (layer := _layer(node, module) or _act(node)) is not None:
            nodes.append(node)
            layers.append(layer)
        length = fuse.run_length(layers, 0, classes)
        if length == 1:
            continue
        nodes, layers = nodes[:length], layers[:length]
        with graph.inserting_before(first):
            parts = [layer if isinstance(layer, Act) else graph.get_attr(str(node.target)) for node, layer in zip(nodes, layers)]
            chained = graph.call_function(fuse.chain, (first.args[0], *parts))
        nodes[-1].replace_all_uses_with(chained)
        for node in reversed(nodes):
            graph.erase_node(node)
        done.update(nodes)
        found.append(fuse.described(layers))
    return found


def _fuse_sums(graph: Graph, module: torch.nn.Module, classes: Planned) -> list[str]:
    """Put a call of ``fuse.add_norm`` where a sum is made whose LayerNorm comes next, and maybe a Dropout right before: with nothing in
    between, nothing can have changed in between."""
    found = []
    for norm in list(graph.nodes):
        total, layer = norm.prev, _layer(norm, module)
        if layer is None or fuse.planned_forward(layer, classes) is not fuse.LAYER_NORM or norm.args != (total,):
            continue
        if total.target not in ADD or total.kwargs or len(total.args) != 2 or not all(isinstance(term, Node) for term in total.args):
            continue
        x, residual = total.args
        dropout: Any = total.prev if total.prev in (x, residual) and x is not residual else None
        drops = _layer(dropout, module)
        if drops is None or fuse.planned_forward(drops, classes) is not fuse.DROPOUT or len(dropout.users) != 1:
            dropout = None
        elif dropout is residual:
            x, residual = residual, x
        with graph.inserting_before(total):
            places = [graph.get_attr(str(node.target)) if node else None for node in (norm, dropout)]
            both = graph.call_function(fuse.add_norm, (places[0], dropout.args[0] if dropout else x, residual, places[1]))
            y, summed = (graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
        norm.replace_all_uses_with(y)
        total.replace_all_uses_with(summed)
        for node in (norm, total, *([dropout] if dropout else [])):
            graph.erase_node(node)
        found.append("Dropout + sum + LayerNorm" if dropout else "sum + LayerNorm")
    return found
