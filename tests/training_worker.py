"""What one of several processes of test_distributed.py runs: the loop in every way of spreading a model, and optimizers on DTensors.

With one process the same script gives what the others are compared with. Started with a mode as a second argument it trains until a
process is killed, see ``train_until_killed``.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo import serve
from support import RawCalls
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import dlkernels.nn as nn
from dlkernels import functional as F
from dlkernels import optim
from dlkernels.train import Batches, Trainer, join, leave, spread
from dlkernels.train.distributed import gather_objects, is_sharded

M, K, N = 192, 20, 5
BATCH = 24
# how a model is spread, and options of ``spread`` and of the trainer
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_norm": 0.3},
    "clipped by torch": {"max_norm": 0.3, "optimizer": torch.optim.AdamW},
    "accumulated": {"accumulate": 2, "max_norm": 0.3},
    "activation checkpointing": {"checkpoint_activations": True},
    "bfloat16": {"precision": "bfloat16", "max_norm": 0.3},
}
HOW = ("ddp", "fsdp")
WORLDS = {"native": torch.nn, "dlkernels": nn}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator, dtype=torch.float64)
    return x, (x[:, :N] + 0.3 * x[:, N : 2 * N]).argmax(1)


def build(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.LinearReLU(K, 32), nn.LayerNorm(32)), nn.Sequential(nn.LinearReLU(32, 16), nn.LayerNorm(16))]
    return nn.Sequential(*blocks, nn.Linear(16, N)).to(dtype)


def trainer_of(how: str, way: dict[str, Any], folder: Path | None = None) -> tuple[Trainer, Sequence[Any]]:
    """In float64, so that what differs is not rounding; but for bfloat16, which is mixed with float32."""
    options, low = dict(way), way.get("precision")
    dtype = torch.float32 if low else torch.float64
    again = options.pop("checkpoint_activations", False)
    model = spread(build(dtype), how, checkpoint_activations=again, precision=low if how == "fsdp" else None)
    optimizer = options.pop("optimizer", optim.AdamW)(model.parameters(), lr=0.01)
    trainer = Trainer(model, F.cross_entropy, optimizer, folder=folder, **options)
    x, y = data()
    x = x.to(dtype)
    return trainer, (Batches(x[:-48], y[:-48], BATCH), Batches(x[-48:], y[-48:], BATCH, shuffle=False))


def train(how: str, way: dict[str, Any], mesh: DeviceMesh) -> dict[str, list[float]]:
    trainer, batches = trainer_of(how, way)
    with RawCalls() as recorded:
        history = trainer.fit(*batches, epochs=2)
    assert is_sharded(trainer.model) == (how == "fsdp")
    if "optimizer" not in way:
        steps = [args for f, args in recorded.calls if "adam_" in str(f)]
        assert steps and all(type(t) in (Tensor, torch.nn.Parameter) for args in steps for t in args[0])
    return {name: history[name] for name in ("train_loss", "val_loss")}


def go_on(how: str, epochs: int, mesh: DeviceMesh) -> list[float]:
    """Train up to so many epochs, going on from what a run of another number of processes left in the folder."""
    trainer, batches = trainer_of(how, {"max_norm": 0.3}, Path(sys.argv[1]) / "run")
    return trainer.fit(*batches, epochs=epochs, resume=True)["val_loss"]


class SlowToClose:
    """A tracker whose file is there a while after the last step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def start(self, config: Mapping[str, Any], step: int) -> None:
        self.file.unlink(missing_ok=True)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        time.sleep(0.5)
        self.file.touch()


def what_was_tracked(mesh: DeviceMesh) -> bool:
    """Whether the first process's trackers have written all they had, once ``fit`` returns in this one."""
    file = Path(sys.argv[1]) / "tracked"
    trainer, batches = trainer_of("ddp", {"trackers": [SlowToClose(file)]})
    trainer.fit(*batches, epochs=1)
    there = file.exists()
    return all(gather_objects(there))


def batch_norm_in_bfloat16(world: Any, mesh: DeviceMesh) -> list[float]:
    """Batch norm within a block and as a block: parameters and statistics stay in float32, all else is gathered in bfloat16."""
    torch.manual_seed(1)
    block = nn.Sequential(world.Linear(K, 32), world.BatchNorm1d(32), world.ReLU())
    model = spread(nn.Sequential(block, world.BatchNorm1d(32), world.Linear(32, N)), "fsdp", precision="bfloat16")
    seen: list[torch.dtype] = []
    for layer in (block[1], model[1], model[2]):  # type: ignore[index]
        layer.register_forward_pre_hook(lambda layer, x: seen.append(layer.weight.dtype))
    trainer = Trainer(model, F.cross_entropy, optim.AdamW(model.parameters(), lr=0.01), precision="bfloat16", max_norm=1.0)
    x, y = data()
    losses = trainer.fit(Batches(x.float(), y, BATCH), Batches(x.float(), y, M), epochs=3)["val_loss"]
    assert seen[:3] == [torch.float32, torch.float32, torch.bfloat16]
    assert is_sharded(block[1]) and all(b.dtype == torch.float32 for b in model.buffers() if b.is_floating_point())
    return losses


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": functools.partial(optim.AdamW, amsgrad=True, lr=0.1),
    "Adam": functools.partial(optim.Adam, weight_decay=0.1, lr=0.1),
    "SGD": functools.partial(optim.SGD, momentum=0.9, nesterov=True, lr=0.1),
    "RMSprop": functools.partial(optim.RMSprop, centered=True, momentum=0.5),
}
SHAPES = ((5, 3), (1, 7), (4,), (), (0, 2))  # of these one process or several hold nothing


def step_on_shards(make: Callable[..., Any], mesh: DeviceMesh) -> None:
    """Parameters cut, whole, and on a grid; gradients that lie otherwise; clipping, scaling and zeroing in the step."""
    meshes: list[tuple[DeviceMesh, list[Any]]] = [(mesh, [Shard(0)]), (mesh, [Replicate()])]
    if dist.get_world_size() == 4:
        grid = init_device_mesh("cpu", (2, 2))
        meshes += [(grid, [Replicate(), Shard(0)]), (grid, [Shard(0), Shard(0)])]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES for _ in meshes]
    plain: list[Any] = [t.clone().requires_grad_() for t in start]
    shards: list[Any] = [
        distribute_tensor(t, on, [p if t.dim() else Replicate() for p in lie]).requires_grad_()
        for t, (on, lie) in zip(start, meshes * len(SHAPES))
    ]
    optimizers = make(plain), make(shards)
    for step in range(3):
        for one, other in zip(plain, shards):
            one.grad = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            other.grad = distribute_tensor(one.grad.clone(), other.device_mesh, other.placements)
        if step == 2:  # as it comes of work that is shared out
            shards[0].grad = DTensor.from_local(plain[0].grad / mesh.size(), mesh, [Partial()])
        versions = [p._version for p in shards]
        with RawCalls() as recorded:
            for optimizer in optimizers:
                optimizer.step(**({"max_norm": 0.5, "grad_scale": 3.0, "zero_grad": True} if step else {}))
        assert all(type(t) in (Tensor, torch.nn.Parameter) for _, args in recorded.calls for t in args[0])
        assert all(p._version > version for p, version in zip(shards, versions))
        for one, other in zip(plain, shards):
            torch.testing.assert_close(other.full_tensor(), one, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(other.grad.full_tensor(), one.grad, rtol=1e-12, atol=1e-14)
            assert other.grad.placements == other.placements
            for name, value in optimizers[0].state[one].items():
                kept = optimizers[1].state[other][name]
                assert isinstance(kept, DTensor) == (name != "step")
                torch.testing.assert_close(kept.full_tensor() if name != "step" else kept, value, rtol=1e-12, atol=1e-14)
    norms = [optimizer.grad_norm for optimizer in optimizers]
    torch.testing.assert_close(norms[1], norms[0])


def moments_in_bfloat16(mesh: DeviceMesh) -> list[float]:
    """Each process's part is what an optimizer of that part alone makes of it, and its state is loaded as it was saved; returns what every
    process has of a parameter that lies whole in all of them."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    shards: list[Any] = [distribute_tensor(t, mesh, [Shard(0) if t.dim() > 1 else Replicate()]).requires_grad_() for t in start]
    parts = [p.detach().to_local().clone().requires_grad_() for p in shards]
    alike = [{"params": [part for p, part in zip(shards, parts) if p.placements == lie]} for lie in ((Shard(0),), (Replicate(),))]
    spread_out, alone = (optim.AdamW(params, lr=0.1, moments_dtype=torch.bfloat16) for params in (shards, alike))
    for step in range(6):
        for p, part, t in zip(shards, parts, start):
            p.grad = distribute_tensor(torch.randn(t.shape, generator=generator), mesh, p.placements)
            part.grad = p.grad.to_local().clone()
        spread_out.step(), alone.step()
        if step == 2:
            state, spread_out = spread_out.state_dict(), optim.AdamW(shards, lr=0.1, moments_dtype=torch.bfloat16)
            spread_out.load_state_dict(state)
        for p, part in zip(shards, parts):
            assert torch.equal(p.to_local(), part)
            for name in ("exp_avg", "exp_avg_sq"):
                kept = spread_out.state[p][name]
                assert isinstance(kept, DTensor) and torch.equal(kept.to_local(), alone.state[part][name])
                assert kept.dtype == torch.bfloat16
    whole = spread_out.state[shards[2]]["exp_avg"].to_local().tolist()
    assert gather_objects(whole) == [whole] * dist.get_world_size()
    return whole


def train_until_killed(folder: Path, how: str) -> None:
    """Under torchrun: process 1 is killed in the middle of the second epoch, once; the first writes the history of a run that ends."""
    join()
    torch.set_num_threads(1)
    trainer, (batches, val) = trainer_of(how, {"max_norm": 0.3, "save_every": 4}, folder)
    finished = trainer.recorder.step

    def step(*args: Any) -> None:
        finished(*args)
        killed = folder / "killed"
        if trainer.progress.step == 9 and trainer.rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.recorder.step = step  # type: ignore[method-assign, assignment]
    trainer.fit(batches, val, epochs=3, resume=True)
    if trainer.rank == 0:
        (folder / "history.json").write_text(json.dumps(trainer.history))
    leave()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        train_until_killed(Path(sys.argv[1]), sys.argv[2])
        sys.exit()
    processes = int(os.environ["WORLD_SIZE"])
    ways = [(how, name) for how in (("none",) if processes == 1 else HOW) for name in WAYS]
    jobs: dict[str, Any] = {f"{how} {name}": functools.partial(train, how, WAYS[name]) for how, name in ways}
    jobs["go on"] = functools.partial(go_on, "none" if processes == 1 else "fsdp", {4: 1, 2: 2, 1: 3}[processes])
    if processes == 1:
        trainer, batches = trainer_of("none", {"max_norm": 0.3})
        jobs["at once"] = lambda mesh: trainer.fit(*batches, epochs=3)["val_loss"]
    else:
        jobs |= {name: functools.partial(step_on_shards, make) for name, make in OPTIMIZERS.items()}
        jobs |= {"tracked": what_was_tracked, "moments in bfloat16": moments_in_bfloat16}
        jobs |= {f"batch norm {name}": functools.partial(batch_norm_in_bfloat16, world) for name, world in WORLDS.items()}
    serve(jobs)
