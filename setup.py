"""Build: the CPU kernels once per instruction set, and the torch-free host module. Everything else is in pyproject.toml."""

import os
import platform
import shutil
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

try:
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: building dlkernels needs `pip install 'torch>=2.11' pybind11 ninja` first, or pip without --no-build-isolation")

NO_COMPILER = """
dlkernels compiles C++ kernels, and there is no C++ compiler {compiler!r} on the PATH. Install one and try again:
    Debian, Ubuntu   apt install g++
    Fedora           dnf install gcc-c++
    conda            conda install -c conda-forge cxx-compiler
    macOS            xcode-select --install
or name yours in the environment variable CXX."""

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"]
ISA = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
        "avx512_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    }

FLAGS = [
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11: one binary for every torch since
]


class BuildKernels(BuildExtension):
    """Compiles with ninja on every core this process may use."""

    def build_extensions(self) -> None:
        compiler = get_cxx_compiler().split()[0]
        if shutil.which(compiler) is None:
            sys.exit(NO_COMPILER.format(compiler=compiler))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("MAX_JOBS", str(cores))
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """The same sources are compiled once per extension, so each has its own folder; it is kept, so only what changed is rebuilt."""
        self.build_temp = f"build/{sys.implementation.cache_tag}/{ext.name}"
        super().build_extension(ext)


class CopySources(build_py):
    """Puts the C++ sources into the wheel: `dlkernels show` prints them from an installed package too."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree("csrc", f"{self.build_lib}/dlkernels/_csrc")


cpu = [
    CppExtension(
        f"dlkernels._cpu_{isa}",
        sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/cpu/*.h")),
        extra_compile_args=FLAGS + flags,
        py_limited_api=True,
    )
    for isa, flags in ISA.items()
]
host = Extension(
    "dlkernels._host",
    sorted(glob("csrc/host/*.cpp")),
    depends=sorted(glob("csrc/host/*.h")),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=["-O3", "-g0", "-fvisibility=hidden"],
    language="c++",
)

setup(ext_modules=[host, *cpu], cmdclass={"build_ext": BuildKernels, "build_py": CopySources})
