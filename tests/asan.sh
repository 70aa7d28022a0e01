#!/usr/bin/env bash
# The C++ kernels of one instruction set under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree: builds them, then runs
# the tests of bad arguments, of memory, of convolution and pooling and the generic ones on them, or those asked for:
#
#   tests/asan.sh                             builds for ten minutes on two cores, and tests for as long
#   tests/asan.sh tests/test_pooling.py -k float64     arguments of pytest
#
#   ISA=avx2         the instruction set (default: the best one of this CPU)
#   PYTHON=python3   the interpreter that has torch and pytest
#   FOLDER=folder    keeps the copy, so that the next run compiles only what has changed (else a temporary one)
#   MAX_JOBS=n       compilers at a time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=$(command -v "${PYTHON:-python3}")
ISA=${ISA:-$("$PYTHON" -c 'import dlkernels; print(dlkernels.backend.isa())')}
if [ -z "${FOLDER:-}" ]; then
    FOLDER=$(mktemp -d)
    trap 'rm -rf "$FOLDER"' EXIT
fi
mkdir -p "$FOLDER"
cp -a --update csrc dlkernels tests setup.py pyproject.toml README.md LICENSE "$FOLDER"
cd "$FOLDER"
rm -f dlkernels/_cpu_*.so

# setup.py's own sources and flags, with less optimisation and more checks. Left out are those of every pointer, which take the compiler
# longest: AddressSanitizer looks at what they point to.
"$PYTHON" - "$ISA" <<'BUILD'
import runpy
import sys

import setuptools

CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize=null,alignment,object-size", "-fno-sanitize-recover=undefined"]
setup = setuptools.setup


def build_one(ext_modules, **rest):
    (ext,) = (ext for ext in ext_modules if ext.name == f"dlkernels._cpu_{sys.argv[1]}")
    ext.extra_compile_args += [*CHECKS, "-O1", "-g1", "-w", "-fno-omit-frame-pointer"]
    ext.extra_link_args += CHECKS
    setup(ext_modules=[ext], script_args=["--quiet", "build_ext", "--inplace"], **rest)


setuptools.setup = build_one
runpy.run_path("setup.py")
BUILD

compiler=${CXX:-c++}
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 DLKERNELS_ISA=$ISA DLKERNELS_POOL_MIB=0 PYTHONPATH=$PWD

# Reads one number too many from the C library's memory: if that goes well, nothing below means anything.
if "$PYTHON" - >seen 2>&1 <<'CHECK'
import ctypes, torch, dlkernels.functional as F
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
F.relu(torch.frombuffer((ctypes.c_float * 22).from_address(malloc(84)), dtype=torch.float32))
CHECK
then
    echo "the sanitizer sees nothing" && exit 2
fi
grep -q heap-buffer-overflow seen || { cat seen && exit 2; }

# An error ends the process, and its text must not wait in pytest's buffer. What Python and torch never free is no leak of ours, and what does not fit into memory is torch's to refuse.
# Pages that fault and the C library's heap check are left out: they find the same, and want the place of the sanitizer.
[ $# -gt 0 ] || set -- tests/test_{bad_input,memory_safety,raw_ops,conv2d,conv_transpose2d,pooling,fusion,ops}.py
without=(the_guard_page_is_there arguments_between_guard_pages spoiled_arguments_between_guard_pages the_heap_check_is_there
    no_write_behind_an_output)
"$PYTHON" -m pytest -q --capture=sys -p no:cacheprovider --timeout 3000 "${without[@]/#/--deselect=tests/test_memory_safety.py::test_}" "$@"
