"""Where an op's or an optimizer's sources are and what they compile to: what `dlkernels show` prints.

C++ sources are found beside an installed package (dlkernels/_csrc/cpu) and in a checkout (csrc/cpu).
"""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import assembly, backend
from .bench.optimizers import OPTIMIZERS, Optimizer
from .registry import OPS, Op

PACKAGE = Path(__file__).parent
SOURCE_FOLDERS = (PACKAGE / "_csrc" / "cpu", PACKAGE.parent / "csrc" / "cpu")
VIEWS = ("contract", "cpu", "gpu", "asm", "ptx", "sass")
GPU_TARGET = "sm_90"


class NotAvailable(RuntimeError):
    """This view does not exist here; the message says why and what to do."""


@dataclass(frozen=True)
class Page:
    """One listing: `language` is a Pygments lexer's name, `origin` the file or the tool that it comes from."""

    title: str
    language: str
    text: str
    origin: str


def pages(op: Op | Optimizer, view: str) -> list[Page]:
    """The listings of one of VIEWS for `op`. Raises NotAvailable where there is none here, ValueError for an unknown view."""
    if view == "contract":
        return [_source(f"{op.name}: the contract", "python", PACKAGE / "ops" / f"{op.module}.py")]
    if view == "gpu":
        return [_source(f"{op.name}: the Triton twin", "python", PACKAGE / "gpu" / f"{op.module}.py")]
    if view == "cpu":
        return [_source(f"{op.name}: the SIMD twin", "cpp", cpu_source(op.module))]
    if view == "asm":
        return list(_assembly(op))
    if view in ("ptx", "sass"):
        return list(_gpu_code(op, view))
    raise ValueError(f"view must be one of {', '.join(VIEWS)}; got {view!r}")


def cpu_source(module: str) -> Path:
    """The C++ file of a module, from the installed package or from the checkout."""
    return next(
        (folder / f"{module}.cpp" for folder in SOURCE_FOLDERS if (folder / f"{module}.cpp").exists()), SOURCE_FOLDERS[0] / f"{module}.cpp"
    )


def _source(title: str, language: str, path: Path) -> Page:
    if not path.exists():
        raise NotAvailable(f"there is no {path}")
    return Page(title, language, path.read_text(), str(path))


def _gpu_code(op: Op | Optimizer, stage: str) -> Iterator[Page]:
    """What the Triton twin compiles to for GPU_TARGET, with or without a GPU in this machine."""
    from .gpu import aot, examples

    known = [raw for raw in op.raw if raw in examples()]
    if not known:
        raise NotAvailable(f"no kernel of {op.name} is compiled ahead of time; those that are: {', '.join(examples())}")
    for raw in known:
        for kernel in aot.compiled(raw, GPU_TARGET):
            title = (
                f"{kernel.name} for {GPU_TARGET}, bfloat16: {kernel.registers} registers, {kernel.spilled} bytes spilled, "
                f"{kernel.shared} bytes shared"
            )
            yield Page(title, "ptx" if stage == "ptx" else "sass", kernel.text(stage), f"triton.compile, {stage}")


def _assembly(op: Op | Optimizer) -> Iterator[Page]:
    """The op's machine code in the loaded CPU library: its functions, the busiest inner loop, and the function around that loop."""
    library = backend.library_path(backend.isa())
    if library is None:
        raise NotAvailable("the CPU library is not built")
    if shutil.which("objdump") is None:
        raise NotAvailable("objdump is not on the PATH; it comes with binutils (apt install binutils)")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "-M", "intel", str(library)]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except subprocess.SubprocessError as error:
        raise NotAvailable(f"objdump cannot read {library}: {error}") from error
    functions = assembly.functions(listing, cpu_source(op.module), (op.module, *op.raw))
    if isinstance(op, Optimizer):  # the source has the others' as well
        functions = [f for f in functions if op.raw[0] in f.name]
    if not functions:
        raise NotAvailable(f"{library.name} names no function of {op.name}: its symbols were stripped")
    origin = f"objdump --disassemble {library.name}"
    lines = [f"; {f.multiplies:8} {f.instructions:8}  {f.name}" for f in functions if f.multiplies] or ["; none multiplies vectors"]
    yield Page(f"{op.name}: functions", "nasm", "\n".join([";  vector multiplies, instructions, function", *lines]), origin)
    busiest = max(functions, key=lambda f: (f.is_member, f.loop.weight, "float" in f.name) if f.loop else (False, 0.0, False))
    if busiest.loop:
        title = f"Its busiest inner loop: {busiest.loop.multiplies} vector multiplies in {busiest.loop.instructions} instructions"
        yield Page(title, "nasm", f"; {title}\n; in {busiest.name}\n{busiest.loop.code}", origin)
    yield Page(busiest.name, "nasm", f"; {busiest.name}\n{busiest.code}", origin)


def find(name: str) -> Op | Optimizer:
    """The op or optimizer of this name; a module's or a raw op's name finds the first that uses it. Raises KeyError for any other."""
    known: dict[str, Op | Optimizer] = {**OPS, **OPTIMIZERS}
    if name in known:
        return known[name]
    for op in known.values():
        if name == op.module or name in op.raw:
            return op
    raise KeyError(name)
