"""The loop on more than one process, which ``torchrun`` starts: who we are, how a model is spread, what is summed over all.

    ddp     every process has the whole model and its share of the batch; gradients are averaged
    fsdp    every process keeps its share of every parameter, gradient and moment; a block's parameters are gathered just before they
            are used and dropped after (FSDP2, ``fully_shard``)

With one process all of this does nothing, so the loop's text is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # of batch and instance norm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

SPREADS = ("none", "ddp", "fsdp")
_spread: WeakSet[nn.Module] = WeakSet()  # what holds the process group


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) for a process alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join(timeout: timedelta = timedelta(minutes=10)) -> torch.device:
    """Meet the other processes that ``torchrun`` started (NCCL between GPUs, gloo between CPUs), and return the device of this one.

    A process started without ``torchrun`` stays alone. ``timeout``: how long a process waits for one that hangs; one that has died is
    noticed at once.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        import_module("torch.distributed.nn.functional")  # by DDP it would come after the group, and its default arguments would hold it
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # on one machine torchrun's restarts share a store: dead addresses are in it
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    return device


def leave() -> None:
    """The end of what ``join`` began, for all processes together. Of a model under ddp the model in it is left, ``model.module``."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # one that leaves while another still talks to it may abort
        for model in _spread:  # the group's threads end with the last who holds it; any that is left when Python ends may abort it
            _let_go(model)
        _spread.clear()
        dist.destroy_process_group()


def _let_go(model: Any) -> None:
    """PyTorch has no call for it."""
    if isinstance(model, DistributedDataParallel):
        del model.reducer, model.logger, model.process_group
        return
    for module in model.modules():
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        for group in getattr(state, "_fsdp_param_groups", ()):
            for info in filter(None, (group.mesh_info, group.post_forward_mesh_info)):
                info.shard_process_group = None
                getattr(info.mesh, "_pg_registry", {}).clear()


def spread(
    model: nn.Module, how: str = "ddp", *, blocks: Iterable[nn.Module] | None = None, precision: str | None = None,
    checkpoint_activations: bool = False,
) -> nn.Module:  # fmt: skip
    """``model`` on all processes. Make the optimizer from what this returns.

    Args:
        how: "none", "ddp" or "fsdp".
        blocks: what is gathered as one under fsdp, and computed again in backward; default: the members of the model's sequences and
            module lists, which are a transformer's blocks and a perceptron's layers.
        precision: "bfloat16" lets fsdp gather parameters in half the bytes; gradients are summed in float32. Layers with running
            statistics stay in float32, as these are.
        checkpoint_activations: keep only the inputs of the blocks, and compute the rest again in backward: less memory for a third more
            arithmetic.

    Raises:
        ValueError: ``how`` is none of these, or there is no process group and it needs one.
    """
    if how not in SPREADS:
        raise ValueError(f"how must be one of {', '.join(SPREADS)}, got {how!r}")
    if how != "none" and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"how={how!r} needs several processes: start them with torchrun, and call dlkernels.train.join() first")
    found = list(blocks) if blocks is not None else _blocks(model)
    if checkpoint_activations:
        for block in found:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if how == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if how == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        same, low = MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        norms = [m for m in model.modules() if isinstance(m, _NormBase)] if precision == "bfloat16" else []
        for block in dict.fromkeys([*norms, *found, model]):
            fully_shard(block, mp_policy=low if precision == "bfloat16" and block not in norms else same)
    if how != "none":
        _spread.add(model)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The members, with parameters, of the outermost sequences and lists of modules."""
    if isinstance(model, (nn.Sequential, nn.ModuleList)):
        return [member for member in model if any(True for _ in member.parameters())]
    return [block for child in model.children() for block in _blocks(child)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a DistributedDataParallel, whose parameter names are those of a process alone."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are DTensors, of which this process holds a part."""
    return any(hasattr(p, "device_mesh") for p in model.parameters())


@contextmanager
def exchange(model: nn.Module, now: bool) -> Iterator[None]:
    """The backward pass inside sums gradients over the processes if ``now``; else they stay where they are, for a later one to sum."""
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        if is_sharded(model):
            model.set_requires_gradient_sync(now)  # type: ignore[operator]
        yield


def sum_over_processes(numbers: list[float], device: torch.device) -> list[float]:
    """Every number summed over all processes, in float64."""
    if rank_and_size()[1] == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, in all of them."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values = [None] * size
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Nobody goes on before everybody is here."""
    if rank_and_size()[1] > 1:
        dist.barrier()


def full(t: Tensor) -> Tensor:
    """A norm or a loss that came as a DTensor, as a plain tensor."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
