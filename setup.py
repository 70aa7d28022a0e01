"""Build: the CPU kernels once per instruction set, and the torch-free host module. Everything else is in pyproject.toml."""

import platform
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10: one binary for every torch since
]


class build_ext(BuildExtension):
    """The same sources are compiled once per extension, so their objects must not share a folder."""

    def build_extension(self, ext):
        top, self.build_temp = self.build_temp, f"{self.build_temp}/{ext.name}"
        super().build_extension(ext)
        self.build_temp = top


cpu = [
    CppExtension(
        f"dlkernels._cpu_{isa}", sorted(glob("csrc/cpu/*.cpp")), extra_compile_args=FLAGS + flags, py_limited_api=True,
        depends=sorted(glob("csrc/cpu/*.h")),
    )
    for isa, flags in ISA.items()
]

setup(ext_modules=cpu, cmdclass={"build_ext": build_ext}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
