"""What our optimizers share: one kernel call updates all parameters of a group, and the gradients' scale and norm are seen to on the way.

    1. closure          where there is one, and the gradients it leaves
    2. norm             of all gradients, one pass over them, only if they are to be clipped
    3. update           for every group: factor · gradient into the moments, the moments into the parameters, zero into the gradient

A DTensor is updated where it lies: each process steps on its own part of parameter, gradient and moments, and the norm of the gradients is
that of all parts.

Everything else, param groups, state_dict, hooks, schedulers, GradScaler, is torch.optim's own, from which each optimizer derives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backend import PLAIN_TENSORS
from ..contract import is_spread
from ..ops.optimizers import total_norm
from ..registry import FLOATS


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, at most 1; the 1e-6 is torch.nn.utils.clip_grad_norm_'s."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class KernelStep(torch.optim.Optimizer):
    """Mixed in before an optimizer of torch.optim, whose own ``step`` serves what no kernel takes: complex numbers, tensor subclasses
    other than DTensor, ``differentiable=True``, other devices than cpu and cuda, and torch.compile. ``foreach`` and ``fused`` choose
    among torch's loops; ours is one kernel whatever they say."""

    __signature__: inspect.Signature
    moments_dtype: torch.dtype | None = None  # None: as new_moment says
    grad_norm: Tensor | None = None  # before clipping, of the last step that clipped
    _step_supports_amp_scaling = True  # a GradScaler then leaves `grad_scale` and `found_inf` here instead of a pass of its own

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], tail: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def __init_subclass__(cls) -> None:
        """What ``help`` and editors show is torch's signature and what our own constructors add to it."""
        super().__init_subclass__()
        torchs = inspect.signature(super().__init__)
        own = [base.__init__ for base in cls.__mro__ if issubclass(base, KernelStep) and "__init__" in vars(base)]
        more = [p for init in reversed(own) for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
        cls.__signature__ = torchs.replace(parameters=[*list(torchs.parameters.values())[1:], *more], return_annotation=torchs.empty)

    def __init__(self, *args: Any, max_grad_norm: float | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        _check_positive(max_grad_norm=max_grad_norm)
        self.max_grad_norm = max_grad_norm

    def __getstate__(self) -> dict[str, Any]:
        """torch's, which keeps of an optimizer's own attributes none: what a copy or a pickle goes on with."""
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "moments_dtype": self.moments_dtype}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's; a parameter twice in one group, which torch warns of, is a ValueError here: its updates would overwrite each other."""
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if isinstance(params, (list, tuple)):
            tensors = [p[1] if isinstance(p, tuple) else p for p in params]
            if len({id(p) for p in tensors}) < len(tensors):
                raise ValueError("params holds a parameter more than once")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, which casts moments to the parameter's dtype; here they become ``moments_dtype``, and without one, float32 moments of
        parameters of a half type stay what they are."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key != "step" and isinstance(value, Tensor):
                    dtype = self.moments_dtype or (torch.float32 if p.dtype.itemsize == 2 and value.dtype == torch.float32 else None)
                    if dtype is not None:
                        self.state[p][key] = value.detach().to(p.device, dtype, copy=True)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, grad_scale: float | Tensor | None = None, max_norm: float | None = None,
        zero_grad: bool = False,
    ) -> Any:  # fmt: skip
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.
            grad_scale: what the loss was multiplied by; gradients are divided by it. A step whose gradients, being scaled, have a norm
                that is not finite changes nothing, if ``max_norm`` is there to tell.
            max_norm: gradients are scaled down together to this 2-norm where theirs is larger; default: the constructor's
                ``max_grad_norm``. ``grad_norm`` then holds the norm before.
            zero_grad: write zeros over the gradients, which saves the pass of ``zero_grad(set_to_none=False)``.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or of another dtype or shape than its parameter; nothing has changed then.
            ValueError: ``max_norm`` or ``grad_scale`` is not positive.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        max_norm = self.max_grad_norm if max_norm is None else max_norm
        _check_positive(max_norm=max_norm, grad_scale=grad_scale)
        parts = [(group, *part) for group in self.param_groups for part in _parts(group["params"])]
        reason = next((why for group, params, grads in parts for why in [_unsupported(group, params[0], grads[0])] if why), None)
        if reason is not None:
            if grad_scale is not None or max_norm is not None or zero_grad or self.moments_dtype is not None:
                raise RuntimeError(f"grad_scale, max_norm, zero_grad and moments_dtype need the kernels, but {reason}")
            return self._native_step(loss)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        factor, found_inf = self._factor([grads for _, _, grads in parts], scale if grad_scale is None else grad_scale, found_inf, max_norm)
        if found_inf is not None and found_inf.is_cpu and found_inf.item():  # elsewhere the kernels look, and nobody waits
            return loss
        for group, params, grads in parts:
            device = params[0].device
            tail = tuple(t if t is None or t.device == device else t.to(device) for t in (factor, found_inf))
            self._update(group, params, grads, (*tail, zero_grad))
            if is_spread(params[0]):
                increment_version(params)  # of which the kernel saw only the local parts
        return loss

    def _native_step(self, loss: Any) -> Any:
        """torch's own update, which knows nothing of a GradScaler unless it is fused: scale and skip for it."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return loss
        if scale is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale.to(p.grad.device))
        super().step()
        return loss

    def _factor(
        self, grads: Sequence[list[Tensor]], scale: float | Tensor | None, found_inf: Tensor | None, max_norm: float | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What gradients are multiplied by, and whether to leave out this step: single numbers, or None. Waits for no device."""
        if not grads or (scale is None and max_norm is None):
            return None, found_inf
        device = grads[0][0].device
        undo = None if scale is None else 1 / torch.as_tensor(scale, dtype=torch.float32, device=device)
        if max_norm is None:
            return undo, found_inf
        parts = [_norm(part).to(device) for part in grads]
        norm = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack([part.double() for part in parts])).to(parts[0].dtype)
        if undo is not None:
            norm = norm * undo
            not_finite = (~norm.isfinite()).float()
            found_inf = not_finite if found_inf is None else torch.maximum(not_finite, found_inf.to(device).float())
        self.grad_norm = norm
        clip = clip_factor(norm, max_norm)
        return clip if undo is None else clip * undo, found_inf


def _check_positive(**numbers: float | Tensor | None) -> None:
    for name, number in numbers.items():
        if number is not None and not isinstance(number, Tensor) and not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")


def _parts(params: Iterable[Any]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """The parameters that have gradients, and these, in lists of one kind: what holds of the first then holds of all."""
    parts: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for p in params:
        grad = p.grad
        if grad is not None:
            spread = None
            if type(p) not in PLAIN_TENSORS and is_spread(p):
                spread = p.device_mesh, p.placements
                if is_spread(grad) and grad.placements != p.placements:  # the sum of what all have, or a part where everyone needs all
                    grad = p.grad = grad.redistribute(placements=p.placements)
            kind = p.is_cpu or p.device, p.dtype, grad.dtype, grad.layout, type(p), type(grad), spread
            part = parts.get(kind)
            if part is None:
                part = parts[kind] = [], []
            part[0].append(p)
            part[1].append(grad)
    return parts.values()


def _unsupported(group: Mapping[str, Any], p: Any, grad: Tensor) -> str | None:
    """Why torch's own step runs, or None where a kernel does.

    Raises:
        RuntimeError: a gradient that no optimizer takes.
    """
    if group.get("differentiable"):
        return "differentiable=True differentiates through the update"
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    if is_spread(p) and is_spread(grad):
        if any(placement.is_partial() for placement in p.placements):
            return f"a parameter lies as {p.placements}; kernels take what is cut or whole"
    elif type(p) not in PLAIN_TENSORS or type(grad) not in PLAIN_TENSORS:
        return f"a parameter is a {type(p).__name__} and its gradient a {type(grad).__name__}; kernels take plain tensors"
    if p.dtype not in FLOATS:
        return f"a parameter has dtype {p.dtype}; kernels take float32, float64, bfloat16 and float16"
    if grad.layout is not torch.strided:
        raise RuntimeError(f"sparse gradients are not supported, got one of layout {grad.layout}; torch.optim.SparseAdam takes them")
    if grad.dtype != p.dtype:
        raise RuntimeError(f"a gradient has dtype {grad.dtype} beside a parameter of {p.dtype}, needs the parameter's")
    if not p.is_cpu and p.device.type != "cuda":
        return f"a parameter is on {p.device}; kernels run on cpu and cuda"
    return None


def local(tensors: list[Any]) -> list[Tensor]:
    """What this process holds of each, if they are DTensors. All are of one kind."""
    return [t.to_local() for t in tensors] if tensors and is_spread(tensors[0]) else tensors


def _norm(grads: list[Any]) -> Tensor:
    """The 2-norm of all of them together, of their parts in all processes if they are DTensors, which lie alike."""
    norm = total_norm(local(grads), 2.0)
    if not is_spread(grads[0]):
        return norm
    square = norm.double().square()
    for d, placement in enumerate(grads[0].placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(square, group=grads[0].device_mesh.get_group(d))
    return square.sqrt().to(norm.dtype)


def new_step(group: Mapping[str, Any], p: Tensor) -> Tensor:
    """A count of 0 where torch keeps it: beside the parameter if it is ``capturable`` or ``fused``, else on the CPU."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not group.get("fused") else torch.float32
    return torch.zeros((), dtype=dtype, device=p.device if group.get("capturable") or group.get("fused") else "cpu")


def new_moment(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros laid out like a parameter; float32 for a half type, in which a small change of a moment would be lost, if not told else."""
    dtype = dtype or (torch.float32 if p.dtype.itemsize == 2 else p.dtype)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
