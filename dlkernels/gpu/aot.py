"""Compile kernels for a GPU that is not there, and read the machine code.

    compiled("linear_forward", "sm_90")  ->  what the launcher would start for its example in bf16, compiled, with what it costs:
    registers, bytes spilled, shared memory, tensor-core instructions, and the text of every stage from TTIR to SASS

Nothing is described twice: the launcher itself runs on tensors without data while ``launch.recording`` notes the kernels it starts, with
the same tiles and the same specialisation (sizes of 1, multiples of 16, absent arguments) as on the device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import examples, implementations
from .launch import Device, Launch, recording


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. ``mma``: the instructions that a tensor-core product may compile to, as a pattern over the assembly."""

    gpu: GPUTarget
    device: Device
    mma: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Device("A100", 108, 163 << 10), r"mma\.sync\S*"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), Device("H100", 132, 227 << 10), r"(?:wgmma\.mma_async|mma\.sync)\S*"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), Device("B200", 148, 227 << 10), r"(?:tcgen05\.mma|mma\.sync)\S*"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Device("MI300X", 304, 64 << 10, 64), r"v_mfma_\w+"),
}
POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
    torch.int64: "*i64", torch.int16: "*i16", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what it costs on its target. ``spilled`` and ``shared`` are bytes; ``mma`` are the distinct instructions."""

    name: str
    target: str
    registers: int
    spilled: int
    shared: int
    mma: tuple[str, ...]
    stages: Mapping[str, Any] = field(repr=False)

    def text(self, stage: str) -> str:
        """The code after ``stage``: "ttir", "ttgir", "llir", "ptx" and "sass" (NVIDIA) or "amdgcn" (AMD).

        Raises:
            ValueError: this target has no such stage.
        """
        if stage == "sass" and "cubin" in self.stages:
            return _tool("nvdisasm", self.stages["cubin"], "-c")
        code = self.stages.get(stage)
        if not isinstance(code, str):
            known = [name for name, value in self.stages.items() if isinstance(value, str)] + ["sass"] * ("cubin" in self.stages)
            raise ValueError(f"{self.target} has no stage {stage!r}; it has {', '.join(known)}")
        return code


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile a recorded ``launch`` for ``target``, a key of ``TARGETS``.

    Raises:
        RuntimeError: the kernels were imported under ``TRITON_INTERPRET=1``, which leaves nothing to compile.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("under TRITON_INTERPRET=1 kernels are Python functions and cannot be compiled; unset it")
    signature, constants, divisible = _specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, divisible)
    where = TARGETS[target]
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "launch_cooperative_grid": launch.cooperative}
    compiled = triton.compile(source, target=where.gpu, options=options)
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spilled = _resources(compiled.asm)
    mma = tuple(sorted(set(re.findall(where.mma, assembly))))
    return Compiled(launch.kernel.__name__, target, registers, spilled, compiled.metadata.shared, mma, compiled.asm)


def record(call: Callable[[], Any], target: str) -> list[Launch]:
    """The kernels that ``call`` (a launcher on meta tensors) would start on ``target``."""
    with recording(TARGETS[target].device) as launches:
        call()
    return launches


def compiled(op: str, target: str = "sm_90", dtype: torch.dtype = torch.bfloat16) -> list[Compiled]:
    """Every kernel that the raw op ``op`` ("linear_forward") starts for its file's example, compiled for ``target``.

    Raises:
        ValueError: ``op`` or ``target`` is unknown.
    """
    if op not in examples():
        raise ValueError(f"no example to compile for {op!r}; known: {', '.join(examples())}")
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    args = examples()[op](lambda *shape: torch.empty(shape, dtype=dtype, device="meta"))
    return [compile_launch(launch, target) for launch in record(lambda: implementations()[op](*args), target)]


def _specialise(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Triton's signature, constants and divisibility of a launch, by the rules of its own launcher: None and 1 become constants, sizes
    that are multiples of 16 and (torch's) pointers are marked so, but for sizes that the kernel wants any; likewise inside tuples, where a
    path leads to each."""
    plain = {(i,) for i, parameter in enumerate(launch.kernel.params) if parameter.do_not_specialize}
    constants: dict[Any, Any] = dict(launch.constants)
    divisible: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(item, (*path, i)) for i, item in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1 and path not in plain):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and path not in plain):
            divisible[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    names = launch.kernel.arg_names
    signature = {name: type_of(value, (i,)) for i, (name, value) in enumerate(zip(names, launch.args, strict=False))}
    signature |= dict.fromkeys(launch.constants, "constexpr")
    return {name: signature[name] for name in names}, constants, divisible


def _resources(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Registers of a thread, and bytes of memory it spills to."""
    if "cubin" in asm:
        usage = _tool("cuobjdump", asm["cubin"], "-res-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
        registers, stack, local = map(int, found.groups())
        return registers, stack + local
    notes = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", asm["amdgcn"]))
    spilled = int(notes["private_segment_fixed_size"]) + 4 * int(notes["vgpr_spill_count"])
    return int(notes["vgpr_count"]), spilled


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool_path(name), *options, file.name], capture_output=True, text=True, check=True).stdout


@cache
def _tool_path(name: str) -> str:
    """NVIDIA's binary tools come with the Triton wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
