"""Several processes that meet over gloo: ``launch`` starts them from a test, ``serve`` is what each of them does."""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}  # in which a worker finds its modules


def launch(script: str, size: int, folder: Path) -> dict[str, Any]:
    """What came of every case of a script that ends in ``serve``, run in ``size`` processes; they and it are given the folder."""
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(folder)], env={**ENVIRONMENT, "WORLD_SIZE": str(size), "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        ends = [worker.communicate(timeout=200) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * size, "\n".join(error[-3000:] for _, error in ends)
    return json.loads(ends[0][0].splitlines()[-1])


def serve(jobs: Mapping[str, Callable[[DeviceMesh], Any]]) -> None:
    """Run every job in all processes, one after the other, and print as JSON what each returned in the first, or {"error": ...}."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rank, size, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
    store = dist.FileStore(str(folder / f"store{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=30))
    mesh = init_device_mesh("cpu", (size,))
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        error = ""
        try:
            found[name] = job(mesh)
        except Exception:
            error = traceback.format_exc()
        told: list[Any] = [None] * size
        dist.all_gather_object(told, error)  # one that failed alone would leave the others waiting
        if error := next((text for text in told if text), ""):
            found[name] = {"error": error}
    if rank == 0:
        print(json.dumps(found))
    dist.barrier()  # a process that leaves while another still talks to it may abort
    sys.stdout.flush()
    os._exit(0)  # what the jobs made may hold the group: one of its threads that takes the interpreter's lock as Python ends would abort it
