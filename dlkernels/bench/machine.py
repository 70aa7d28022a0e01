"""What a measurement was taken on: the "machine" object of the results file."""

import ctypes
import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """CPU, instruction set, threads, memory (GiB), GPU, versions, time and load of this machine; None where a fact is not to be had."""
    from .. import backend

    logical, physical = cores()
    return {
        "cpu": cpu_name(),
        "isa": "triton, interpreted" if backend.TRITON_ON_CPU else backend.isa(),
        "cores": physical,
        "logical_cores": logical,
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "gpu": gpu_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "compiler": _compiler(),
        "os": f"{platform.system()} {platform.release()}",
        "dlkernels": version("dlkernels"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def cpu_name() -> str:
    """The CPU's product name, from the host module where it is built, else from the operating system."""
    try:
        from .. import _host

        return _host.cpu_name()
    except ImportError:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return next(named, platform.processor() or platform.machine())


def cores() -> tuple[int, int]:
    """Hardware threads this process may run on, and the cores behind them."""
    try:
        from .. import _host

        found = _host.cores()
        return found["logical"], found["physical"]
    except ImportError:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return allowed, allowed


def memory_gib() -> float | None:
    """Physical memory."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def gpu_name() -> str | None:
    """The current CUDA or ROCm device, None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed; does not import it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """What the CPU kernels were compiled with: their library carries its compiler's name, as every ELF file does."""
    from .. import backend

    try:
        path = backend.library_path(backend.isa())
    except (ImportError, RuntimeError):
        return None
    return _comment_section(path.read_bytes()) if path is not None and path.exists() else None


def _comment_section(binary: bytes) -> str | None:
    """ "GCC: (Debian 12.2.0) 12.2.0" from an ELF file's .comment section, which is plain text."""
    for mark in (b"GCC: (", b"clang version "):
        start = binary.find(mark)
        if start >= 0:
            return ctypes.create_string_buffer(binary[start : start + 120]).value.decode("ascii", "replace").strip()
    return None
