"""Whether a ``forward`` is straight code: the same calls in the same order whatever the arguments are.

``torch.fx`` follows a ``forward`` with stand-ins for the arguments, and takes for granted whatever Python decides on the way: that an
argument is not None, a random number, the time. So the source is read first, and few things pass: names are assigned to, layers of its own
and functions and methods of tensors called, and conditions ask for the module's own attributes.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch.overrides

from .. import functional as F

STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.If, ast.Pass)
EXPRESSIONS = (
    ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript, ast.Slice,
    ast.Tuple, ast.List, ast.keyword, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
DECIDES = (ast.Is, ast.IsNot, ast.In, ast.NotIn)


class Refused(Exception):
    """Why a ``forward`` is not straight."""


class Read(NamedTuple):
    attributes: frozenset[str]  # x of every self.x
    called: frozenset[str]  # "x.y" of every self.x.y(...)


@cache
def _tensor_functions() -> frozenset[Any]:
    """The functions that hand a stand-in on: torch's, and ours, which the tracer wraps."""
    torchs = (function for functions in torch.overrides.get_overridable_functions().values() for function in functions)
    return frozenset([*torchs, *(getattr(F, name) for name in F.__all__)])


@cache
def read(forward: Callable[..., Any]) -> Read:
    """What a straight ``forward`` reads and calls of its module. ``Refused`` says what is not straight in another."""
    reader = _Reader(forward)
    for statement in reader.tree.body:
        for node in _executed(statement):
            reader.check(node)
    return Read(frozenset(reader.attributes), frozenset(reader.called))


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and what is inside, but for annotations, which compute nothing."""
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field != "annotation":
                yield from _executed(child)


def _path(node: ast.expr) -> tuple[ast.expr, list[str]]:
    """``a`` and ["b", "c"] of ``a.b.c``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return node, names


class _Reader:
    def __init__(self, forward: Callable[..., Any]) -> None:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
        except (OSError, TypeError, SyntaxError):
            raise Refused("forward has no source") from None
        if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or hasattr(forward, "__wrapped__"):
            raise Refused("forward is no plain function")
        arguments = tree.args
        if arguments.vararg or arguments.kwarg or not arguments.args:
            raise Refused("forward takes any number of arguments")
        self.tree, self.scope = tree, forward.__globals__
        self.own = arguments.args[0].arg
        self.local = {argument.arg for argument in (*arguments.args[1:], *arguments.kwonlyargs)}
        self.local |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.attributes: set[str] = set()
        self.called: set[str] = set()

    def refuse(self, what: str, node: ast.AST) -> None:
        raise Refused(f"forward {what}" + (f" in its line {node.lineno}" if hasattr(node, "lineno") else ""))

    def check(self, node: ast.AST) -> None:
        if not isinstance(node, STATEMENTS + EXPRESSIONS):
            self.refuse(f"has a {type(node).__name__}", node)
        elif isinstance(node, (ast.If, ast.IfExp)):
            self.check_condition(node.test, node)
        elif isinstance(node, ast.BoolOp) or (isinstance(node, ast.Compare) and any(isinstance(op, DECIDES) for op in node.ops)):
            self.check_condition(node, node)
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            self.refuse("changes something", node)
        elif isinstance(node, ast.Call):
            self.check_call(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.own:
            self.attributes.add(node.attr)
        elif isinstance(node, ast.Name) and node.id not in self.local and node.id != self.own:
            found = self.scope.get(node.id)
            if not isinstance(found, ModuleType) and found not in _tensor_functions():
                self.refuse(f"reads {node.id}", node)

    def check_condition(self, test: ast.expr, node: ast.AST) -> None:
        """It may ask for the module's own attributes, not for attributes of those."""
        for part in ast.walk(test):
            deep = isinstance(part, ast.Attribute) and not isinstance(part.value, ast.Name)
            if deep or isinstance(part, ast.Call) or (isinstance(part, ast.Name) and part.id != self.own):
                self.refuse("decides by something else than its own attributes", node)

    def check_call(self, node: ast.Call) -> None:
        root, path = _path(node.func)
        if isinstance(root, ast.Name) and root.id == self.own and path:
            self.called.add(".".join(path))
        elif isinstance(root, ast.Name) and root.id not in self.local:
            found = self.scope.get(root.id)
            for name in path:
                found = getattr(found, name, None)
            if found not in _tensor_functions():
                self.refuse(f"calls {ast.unparse(node.func)}", node)
        elif not path or path[-1] in ("item", "tolist", "numpy"):
            self.refuse(f"calls {ast.unparse(node.func)}", node)
