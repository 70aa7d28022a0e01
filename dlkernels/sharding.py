"""Functions on DTensors: which local tensors they run on, and how their results and gradients then lie.

A DTensor is one tensor spread over a mesh of processes: in each dimension of the mesh it is cut along one of its own dimensions (Shard),
held whole by everyone (Replicate), or the sum of what everyone holds (Partial). A ``Layout`` is one way of laying out all arguments of a
function in one dimension of the mesh such that the function, called on what each process holds, gives what each process must hold of the
results. Everything whole is always such a way; ``sharding_rules.py`` lists the others of every function. For each dimension of the mesh
the layout that moves the fewest numbers is taken, so what a call returns is right whatever the placements of its arguments.

Gradients follow from the layout: where work is shared out, an argument that every process holds whole gets from each of them a part of
its gradient, which is Partial. ``_Place``, ``_Take`` and ``_Spread`` are linear maps whose backward consists of themselves, so second
derivatives exist wherever the function on plain tensors has them.

This file imports torch.distributed.tensor; it is itself imported when a DTensor is first seen (``contract.is_spread``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from .ops.dropout import draw_seed

Placements = tuple[Placement, ...]
WHOLE, SUM = Replicate(), Partial()


class Layout(NamedTuple):
    """``inputs``: the placements of the arguments by name, WHOLE for those that are not named. ``outputs``: that of every result."""

    name: str
    inputs: Mapping[str, Placement]
    outputs: Placement


EVERYTHING_WHOLE = Layout("whole", {}, WHOLE)


class Plan:
    """The layout of each dimension of the mesh, and what a function that runs on a part must know of the others."""

    def __init__(self, mesh: DeviceMesh, layouts: Sequence[Layout]) -> None:
        self.mesh, self.layouts = mesh, layouts
        self.split = [layout is not EVERYTHING_WHOLE for layout in layouts]
        self.outputs: Placements = tuple(layout.outputs for layout in layouts)

    def inputs(self, name: str) -> Placements:
        return tuple(layout.inputs.get(name, WHOLE) for layout in self.layouts)

    def gradients(self, name: str) -> Placements:
        return tuple(SUM if split and p == WHOLE else p for split, p in zip(self.split, self.inputs(name)))

    def is_first(self) -> bool:
        """Whether this process is the first of those whose results are summed."""
        return not any(place for place, p in zip(self.mesh.get_coordinate() or (), self.outputs) if p == SUM)

    def total(self, part: Tensor) -> Tensor:
        """The sum of a number of every process that works on another part."""
        spread = DTensor.from_local(part.detach(), self.mesh, [SUM if split else WHOLE for split in self.split], run_check=False)
        return _local(spread.redistribute(placements=[WHOLE] * self.mesh.ndim))

    def seed(self, device: torch.device) -> Tensor:
        """A seed for random numbers: the same in all processes that work on the same part, different for different parts."""
        seed = draw_seed(device)
        for d in range(self.mesh.ndim):
            if not self.split[d]:
                group = self.mesh.get_group(d)
                dist.broadcast(seed, dist.get_global_rank(group, 0), group)
        for d, place in enumerate(self.mesh.get_coordinate() or ()):
            if self.split[d]:
                seed = seed * self.mesh.size(d) + place
        return seed

    def __str__(self) -> str:
        return ", ".join(layout.name for layout in self.layouts)


class _Place(torch.autograd.Function):
    """The same tensor in other placements."""

    @staticmethod
    def forward(ctx: Any, x: DTensor, placements: Placements) -> DTensor:
        ctx.before = _settled(x.placements)
        return x.redistribute(placements=placements)

    @staticmethod
    def backward(ctx: Any, dy: DTensor) -> tuple[Tensor, None]:
        return _placed(dy, ctx.before), None


class _Take(torch.autograd.Function):
    """What this process holds of a tensor; ``gradients`` says how what comes back for it lies."""

    @staticmethod
    def forward(ctx: Any, x: DTensor, gradients: Placements) -> Tensor:
        ctx.like = x.device_mesh, gradients, x.shape, x.stride()
        ctx.set_materialize_grads(False)
        return _local(x).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None]:
        return None if dy is None else _Spread.apply(dy, *ctx.like), None


class _Spread(torch.autograd.Function):
    """The tensor of this shape of which this process holds ``part``."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: DeviceMesh, placements: Placements, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
        ctx.placements = placements
        ctx.set_materialize_grads(False)
        return DTensor.from_local(part.detach(), mesh, placements, run_check=False, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx: Any, dy: DTensor | None) -> tuple[Tensor | None, None, None, None, None]:
        return None if dy is None else _Take.apply(_placed(dy, _settled(ctx.placements)), ctx.placements), None, None, None, None


def _settled(placements: Sequence[Placement]) -> Placements:
    """How the gradient of a tensor that lies so is kept: of a sum, whole."""
    return tuple(WHOLE if p.is_partial() else p for p in placements)


def _placed(x: Any, placements: Placements) -> Any:
    return x if _same(x.placements, placements) else _Place.apply(x, placements)


def _same(left: Sequence[Placement], right: Sequence[Placement]) -> bool:
    return all(type(p) is type(q) and p == q for p, q in zip(left, right))


def _local(x: DTensor) -> Tensor:
    """The local tensor, once it has arrived."""
    with torch.no_grad():
        local = x.to_local()
    return local.wait() if hasattr(local, "wait") else local


def _dense_stride(shape: Sequence[int], like: Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape, with its dimensions in the order in which those of ``like`` lie."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True) if not like.is_contiguous() else range(like.dim())
    stride, step = [0] * like.dim(), 1
    for d in reversed(order):
        stride[d], step = step, step * max(shape[d], 1)
    return tuple(stride)


def _common_mesh(function: str, tensors: Mapping[str, Tensor]) -> DeviceMesh:
    """The mesh of these tensors, which must all be on one.

    Raises:
        RuntimeError: one is a plain tensor, or on another mesh.
    """
    first, mesh = next((name, t.device_mesh) for name, t in tensors.items() if isinstance(t, DTensor))
    for name, t in tensors.items():
        if not isinstance(t, DTensor):
            raise RuntimeError(
                f"{function}: {name} is a plain {type(t).__name__}, {first} a DTensor; "
                f"make {name} one too, with distribute_tensor({name}, mesh, ...)"
            )
        if t.device_mesh != mesh:
            raise RuntimeError(f"{function}: {name} is on {t.device_mesh}, {first} on {mesh}; all DTensors must be on one mesh")
    return mesh


def _moved(t: Tensor, have: Placement, want: Placement) -> int:
    """How many numbers are sent to change a placement: none to cut what everyone holds."""
    return 0 if _same([have], [want]) or (type(have) is Replicate and not want.is_partial()) else t.numel()


def _choose(function: str, mesh: DeviceMesh, tensors: Mapping[str, Any], layouts: Sequence[Layout], in_place: Sequence[str]) -> Plan:
    """For each dimension of the mesh the layout that moves the fewest numbers, the first of several. What is updated in place stays."""
    chosen = []
    for d in range(mesh.ndim):
        have = {name: t.placements[d] for name, t in tensors.items()}
        fitting = [
            layout for layout in layouts
            if all(_same([have[name]], [layout.inputs.get(name, WHOLE)]) for name in in_place if name in have)
        ]  # fmt: skip
        if not fitting:
            lie = ", ".join(f"{name} {have[name]}" for name in in_place if name in have)
            raise NotImplementedError(f"{function}: what is updated in place lies as {lie}, which fits no layout; make it Replicate()")
        chosen.append(min(fitting, key=lambda o: sum(_moved(t, have[n], o.inputs.get(n, WHOLE)) for n, t in tensors.items())))
    return Plan(mesh, chosen)


class Answered(Exception):
    """What ``run`` would do, raised in its place within ``asking``."""


_ASKING: ContextVar[bool] = ContextVar("asking", default=False)


@contextmanager
def asking() -> Iterator[None]:
    """Within it ``run`` raises ``Answered`` with the names of the layouts, instead of computing."""
    token = _ASKING.set(True)
    try:
        yield
    finally:
        _ASKING.reset(token)


def run(
    function: str, tensors: Mapping[str, Tensor | None], layouts: Sequence[Layout], compute: Callable[..., Any],
    part: Callable[..., Any] | None = None, in_place: Sequence[str] = (),
) -> Any:  # fmt: skip
    """``compute(*tensors)`` of DTensors.

    Args:
        function: the name for messages.
        tensors: the arguments by name; None stays None.
        layouts: ways in which they may lie beside everything whole.
        compute: the function on plain tensors. It is called on the whole shapes, without numbers, first: what does not fit raises there.
        part: ``part(plan, *tensors)`` on what each process holds, where that is not simply ``compute``.
        in_place: names of arguments that are updated.
    """
    given: dict[str, Any] = {name: t for name, t in tensors.items() if t is not None}
    mesh = _common_mesh(function, given)
    plan = _choose(function, mesh, given, (EVERYTHING_WHOLE, *layouts), in_place)
    if _ASKING.get():
        raise Answered(str(plan))
    with torch.no_grad():
        shapes = [y.shape for y in _as_tuple(compute(*(None if t is None else without_numbers(t) for t in tensors.values())))]
    held = [None if t is None else _Take.apply(_placed(t, plan.inputs(name)), plan.gradients(name)) for name, t in tensors.items()]
    result = compute(*held) if part is None else part(plan, *held)
    for name in in_place:
        if name in given:
            increment_version(given[name])
    spread = tuple(_Spread.apply(y, mesh, plan.outputs, shape, _dense_stride(shape, y)) for y, shape in zip(_as_tuple(result), shapes))
    return spread if isinstance(result, tuple) else spread[0]


def without_numbers(t: Tensor) -> Tensor:
    """A plain tensor of the same shape, strides and dtype on the device "meta"."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
