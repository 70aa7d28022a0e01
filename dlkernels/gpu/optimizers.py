"""The optimizers on the GPU: adam, sgd, rmsprop on all parameters of one kind in one launch.

A program updates a chunk of one parameter (multi_tensor.py): it reads p, g and the moments, keeps BLOCK numbers of each in registers, and
writes them back. Memory decides. What the host knows comes in `numbers`, float64 on the device, so that float64 parameters lose nothing:

    numbers    0 factor of the gradients, minus if maximize    1 skip this step    2 zero the gradients    3 ... the rule's own

Step counts on the CPU are counted there; those on the device stay there, and nobody waits for it. A CUDA graph cannot hold the step yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .launch import launch
from .multi_tensor import BLOCK, CHUNK, Group, Tensors, array_of, block_of, chunk_of, each_group, groups, larger, root, to_device


@triton.jit
def number(numbers, i, ACC: tl.constexpr):
    return tl.load(numbers + i).to(ACC)


@triton.jit
def flag(numbers, i):
    return tl.load(numbers + i).to(tl.int32)


@triton.jit
def read(p, g, at, here, factor, pull, ACC: tl.constexpr):
    """p, and the gradient that a rule sees: scaled, with the decay that goes through it."""
    value = tl.load(p + at, here, 0.0).to(ACC)
    return value, tl.load(g + at, here, 0.0).to(ACC) * factor + value * pull


@triton.jit
def write(p, g, at, here, value, zero):
    tl.store(p + at, value.to(p.dtype.element_ty), here)
    tl.store(g + at, tl.zeros_like(value).to(g.dtype.element_ty), here & (zero != 0))


@triton.jit
def load_kept(p, here, ACC: tl.constexpr):
    """Numbers that are kept. Those of a pointer to int16 are the bits of bfloat16, the upper half of a float32's."""
    if p.dtype.element_ty == tl.int16:
        return (tl.load(p, here, 0).to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(p, here, 0.0).to(ACC)


@triton.jit
def store_kept(p, here, value, chance):
    """Bits of bfloat16: up or down by ``chance``, of 16 random bits, as the contract says. A NaN stays one."""
    if p.dtype.element_ty == tl.int16:
        bits = (value.to(tl.uint32, bitcast=True) + chance) >> 16
        tl.store(p, tl.where(value == value, bits, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True), here)
    else:
        tl.store(p, value.to(p.dtype.element_ty), here)


@triton.jit
def adam_update(pointers, chunks, numbers, p_like, m_like, n, AMSGRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """numbers: keep, pull (decoupled decay, L2), 1 - β₁, β₂, 1 - β₂, eps; lr / (1 - β₁ᵗ), 1 / √(1 - β₂ᵗ), t and place of every entry"""
    ACC: tl.constexpr = tl.float64 if p_like.dtype.element_ty == tl.float64 else tl.float32
    entry, first, size = chunk_of(chunks)
    p, g = array_of(pointers, 0, n, entry, p_like), array_of(pointers, 1, n, entry, p_like)
    m, v = array_of(pointers, 2, n, entry, m_like), array_of(pointers, 3, n, entry, m_like)
    u = array_of(pointers, 4, n, entry, m_like) if AMSGRAD else v
    factor, keep, pull, part1 = number(numbers, 0, ACC), number(numbers, 3, ACC), number(numbers, 4, ACC), number(numbers, 5, ACC)
    b2, part2, eps = number(numbers, 6, ACC), number(numbers, 7, ACC), number(numbers, 8, ACC)
    rate, root_bias = number(numbers, 9 + entry, ACC), number(numbers, 9 + n + entry, ACC)
    seed, row = tl.load(numbers + 9 + 2 * n + entry).to(tl.int64), tl.load(numbers + 9 + 3 * n + entry).to(tl.int64)
    stays, zero = flag(numbers, 1), flag(numbers, 2)
    for start in range(0, CHUNK, BLOCK):
        at, here = block_of(first, start, size, BLOCK)
        here &= stays == 0
        value, slope = read(p, g, at, here, factor, pull, ACC)
        mean = load_kept(m + at, here, ACC)
        mean += (slope - mean) * part1
        square = load_kept(v + at, here, ACC) * b2 + slope * slope * part2
        r = philox.numbers(seed, row, first + start, BLOCK) if m_like.dtype.element_ty == tl.int16 else tl.zeros_like(at).to(tl.uint32)
        largest = square
        if AMSGRAD:
            largest = larger(load_kept(u + at, here, ACC), square)
            store_kept(u + at, here, largest, r >> 16)
        value = value * keep - rate * mean / (root(largest) * root_bias + eps)
        write(p, g, at, here, value, zero)
        store_kept(m + at, here, mean, r & 0xFFFF)
        store_kept(v + at, here, square, r >> 16)


@triton.jit
def sgd_update(pointers, chunks, numbers, p_like, b_like, n, MOMENTUM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """numbers: lr, weight decay, momentum, 1 - dampening, whether this is the first step, and how much of g and b moves p"""
    ACC: tl.constexpr = tl.float64 if p_like.dtype.element_ty == tl.float64 else tl.float32
    entry, first, size = chunk_of(chunks)
    p, g = array_of(pointers, 0, n, entry, p_like), array_of(pointers, 1, n, entry, p_like)
    b = array_of(pointers, 2, n, entry, b_like) if MOMENTUM else g
    factor, lr, pull, mu = number(numbers, 0, ACC), number(numbers, 3, ACC), number(numbers, 4, ACC), number(numbers, 5, ACC)
    part, of_g, of_b = number(numbers, 6, ACC), number(numbers, 8, ACC), number(numbers, 9, ACC)
    stays, zero, fresh = flag(numbers, 1), flag(numbers, 2), flag(numbers, 7)
    for start in range(0, CHUNK, BLOCK):
        at, here = block_of(first, start, size, BLOCK)
        here &= stays == 0
        value, slope = read(p, g, at, here, factor, pull, ACC)
        if MOMENTUM:
            moved = tl.load(b + at, here, 0.0).to(ACC) * mu + slope * part
            moved = tl.where(fresh != 0, slope, moved)
            tl.store(b + at, moved.to(b_like.dtype.element_ty), here)
            slope = slope * of_g + moved * of_b
        write(p, g, at, here, value - slope * lr, zero)


@triton.jit
def rmsprop_update(pointers, chunks, numbers, p_like, v_like, n, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr, CHUNK: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """numbers: lr, α, 1 - α, eps, weight decay, momentum"""
    ACC: tl.constexpr = tl.float64 if p_like.dtype.element_ty == tl.float64 else tl.float32
    entry, first, size = chunk_of(chunks)
    p, g = array_of(pointers, 0, n, entry, p_like), array_of(pointers, 1, n, entry, p_like)
    v = array_of(pointers, 2, n, entry, v_like)
    a = array_of(pointers, 3, n, entry, v_like) if CENTERED else v
    b = array_of(pointers, 3 + CENTERED, n, entry, v_like) if MOMENTUM else v
    factor, lr, keep, part = number(numbers, 0, ACC), number(numbers, 3, ACC), number(numbers, 4, ACC), number(numbers, 5, ACC)
    eps, pull, mu = number(numbers, 6, ACC), number(numbers, 7, ACC), number(numbers, 8, ACC)
    stays, zero = flag(numbers, 1), flag(numbers, 2)
    for start in range(0, CHUNK, BLOCK):
        at, here = block_of(first, start, size, BLOCK)
        here &= stays == 0
        value, slope = read(p, g, at, here, factor, pull, ACC)
        square = tl.load(v + at, here, 0.0).to(ACC) * keep + slope * slope * part
        spread = square
        if CENTERED:
            mean = tl.load(a + at, here, 0.0).to(ACC)
            mean += (slope - mean) * part
            spread = square - mean * mean
            tl.store(a + at, mean.to(v_like.dtype.element_ty), here)
        step = slope / (root(spread) + eps)
        if MOMENTUM:
            step += tl.load(b + at, here, 0.0).to(ACC) * mu
            tl.store(b + at, step.to(v_like.dtype.element_ty), here)
        write(p, g, at, here, value - step * lr, zero)
        tl.store(v + at, square.to(v_like.dtype.element_ty), here)


def adam_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors, steps: Tensors,
    factor: Tensor | None, found_inf: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, maximize: bool, zero_grads: bool, by_chance: bool,
) -> None:  # fmt: skip
    """Launcher; lists and errors as the op's contract says."""
    if by_chance and any(p.dtype == torch.float64 for p in params):
        raise RuntimeError("params has dtype torch.float64, beside which nothing is kept in bfloat16")
    found = groups({
        "params": (params, False), "grads": (grads, False), "exp_avgs": (exp_avgs, True), "exp_avg_sqs": (exp_avg_sqs, True),
        "max_exp_avg_sqs": (max_exp_avg_sqs, True),
    }, "" if zero_grads else "grads", torch.bfloat16 if by_chance else None)  # fmt: skip
    count = advance(steps, found_inf, len(params))
    if count is None:
        return
    keep, pull = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    device = params[0].device
    places = torch.arange(len(params), dtype=torch.float64, device=count.device)
    rates = torch.stack([lr / (1 - beta1**count), (1 - beta2**count) ** -0.5, count, places]).to(device, non_blocking=True)
    shared = control(factor, found_inf, maximize, zero_grads, (keep, pull, 1 - beta1, beta2, 1 - beta2, eps), device)

    def run(group: Group) -> None:
        lists = group.lists
        own = rates if len(found) == 1 else rates[:, group.places]
        numbers = torch.cat([shared, own.flatten()])
        moment_like = lists[2][0].view(torch.int16) if by_chance else lists[2][0]
        start(adam_update, group, numbers, lists[0][0], moment_like, AMSGRAD=bool(max_exp_avg_sqs))

    each_group(found, run)


def sgd_(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, factor: Tensor | None, found_inf: Tensor | None, lr: float,
    momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, first: bool, zero_grads: bool,
) -> None:  # fmt: skip
    """Launcher; lists and errors as the op's contract says."""
    lists = {"params": (params, False), "grads": (grads, False), "momentum_buffers": (momentum_buffers, True)}
    found = groups(lists, "" if zero_grads else "grads")
    if not params:
        return
    of_g, of_b = (1.0, momentum) if nesterov else (0.0, 1.0)
    rule = (lr, weight_decay, momentum, 1 - dampening, float(first), of_g, of_b)
    numbers = control(factor, found_inf, maximize, zero_grads, rule, params[0].device)
    has = bool(momentum_buffers)
    each_group(found, lambda group: start(sgd_update, group, numbers, group.lists[0][0], group.lists[-1][0], MOMENTUM=has))


def rmsprop_(
    params: Tensors, grads: Tensors, square_avgs: Tensors, grad_avgs: Tensors, momentum_buffers: Tensors, steps: Tensors,
    factor: Tensor | None, found_inf: Tensor | None, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float,
    maximize: bool, zero_grads: bool,
) -> None:  # fmt: skip
    """Launcher; lists and errors as the op's contract says."""
    found = groups({
        "params": (params, False), "grads": (grads, False), "square_avgs": (square_avgs, True), "grad_avgs": (grad_avgs, True),
        "momentum_buffers": (momentum_buffers, True),
    }, "" if zero_grads else "grads")  # fmt: skip
    if advance(steps, found_inf, len(params)) is None:
        return
    numbers = control(factor, found_inf, maximize, zero_grads, (lr, alpha, 1 - alpha, eps, weight_decay, momentum), params[0].device)
    flags = {"CENTERED": bool(grad_avgs), "MOMENTUM": bool(momentum_buffers)}
    each_group(found, lambda group: start(rmsprop_update, group, numbers, group.lists[0][0], group.lists[2][0], **flags))


def start(kernel: object, group: Group, numbers: Tensor, like: Tensor, moment_like: Tensor, **flags: bool) -> None:
    n = len(group.places)
    launch(
        kernel, (group.chunks.shape[0],), group.pointers, group.chunks, numbers, like, moment_like, n, **flags, CHUNK=CHUNK, BLOCK=BLOCK
    )  # fmt: skip


def control(
    factor: Tensor | None, found_inf: Tensor | None, maximize: bool, zero_grads: bool, rule: Sequence[float], device: torch.device
) -> Tensor:
    """`numbers` up to what belongs to single entries."""
    sign = -1.0 if maximize else 1.0
    numbers = to_device((sign, 0.0, float(zero_grads), *rule), torch.float64, device)
    for place, name, given in ((0, "factor", factor), (1, "found_inf", found_inf)):
        if given is not None:
            if given.numel() != 1 or not given.is_floating_point():
                raise RuntimeError(f"{name} has shape {tuple(given.shape)} and dtype {given.dtype}, needs a single number")
            value = given.reshape(()).to(device, torch.float64)
            numbers[place] = value * sign if place == 0 else value
    return numbers


def advance(steps: Tensors, found_inf: Tensor | None, count: int) -> Tensor | None:
    """The step counts, each one more, as float64; None where there is nothing to do. Counts on the device are advanced there."""
    if len(steps) != count:
        raise RuntimeError(f"steps has {len(steps)} tensors, needs {count} like params")
    for i, t in enumerate(steps):
        if t.numel() != 1:
            raise RuntimeError(f"steps[{i}] has shape {tuple(t.shape)}, needs a single number")
    if not steps:
        return None
    if steps[0].is_cpu:
        if found_inf is not None and found_inf.item():
            return None
        torch._foreach_add_(list(steps), 1)
    elif found_inf is not None:
        torch._foreach_add_(list(steps), (found_inf.reshape(()) == 0).to(steps[0].dtype))
    else:
        torch._foreach_add_(list(steps), 1)
    return torch.stack([t.reshape(()) for t in steps]).double()


def _examples(empty):
    params, counts = [empty(1000, 1000), empty(77)], [torch.empty((), device="meta") for _ in range(2)]
    moments = [t.new_empty(t.shape, dtype=torch.float32 if t.dtype.itemsize == 2 else t.dtype) for t in params]
    tail = None, None
    return {
        "adam_": (params, params, moments, moments, moments, counts, *tail, 1e-3, 0.9, 0.999, 1e-8, 0.01, True, False, False, False),
        "sgd_": (params, params, moments, *tail, 1e-3, 0.9, 0.0, 0.0, True, False, False, False),
        "rmsprop_": (params, params, moments, moments, moments, counts, *tail, 1e-3, 0.99, 1e-8, 0.0, 0.9, False, False),
    }


IMPLEMENTATIONS = {"adam_": adam_, "sgd_": sgd_, "rmsprop_": rmsprop_}
EXAMPLES = {name: lambda empty, name=name: _examples(empty)[name] for name in IMPLEMENTATIONS}
