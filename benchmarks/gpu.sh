#!/usr/bin/env bash
# Everything worth knowing about a CUDA machine, in nine minutes and without network: build, GPU tests, tuned configurations, the
# benchmark suite and the models. Each phase has its own limit, a failing one does not stop the next, and a summary comes last.
#
#   OUT=folder     where the results go (default benchmarks/results)
#   PYTHON=python  the interpreter that has torch and triton (default python3)
#   LIMIT=seconds  for everything together (default 510)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-510}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD

machine=$("$PYTHON" -c '
import re, sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device: torch.cuda.is_available() is False")
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || exit 2

MEANS='
import json, sys
from dlkernels.bench.suite import geometric_means

print("\nspeed over eager, geometric mean over the sizes")
for row in geometric_means(json.load(open(sys.argv[1]))["bench"]):
    print("{op:18} {dtype:9} {direction:17} {sizes:2} sizes   lowest {slowest:5.2f}x   mean {vs_eager:5.2f}x".format(**row),
          *("  {} {:.2f}x".format(*other) for other in row["vs_others"].items()))
'

rows=()
failures=0

phase() { # phase NAME SECONDS COMMAND...: run it for at most SECONDS, or what is left of LIMIT; SIGINT first, so it can save its results
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) started=$SECONDS status outcome
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        rows+=("$(printf '%-8s %-12s' "$name" "no time left")")
        ((failures++))
        return
    fi
    printf '\n== %s, at most %s s: %s\n' "$name" "$limit" "$*"
    timeout --signal=INT --kill-after=10 "$limit" "$@"
    status=$?
    case $status in
        0) outcome=ok ;;
        124 | 137) outcome="out of time" ;;
        *) outcome="exit $status" ;;
    esac
    ((status == 0)) || ((failures++))
    rows+=("$(printf '%-8s %-12s %4s s' "$name" "$outcome" $((SECONDS - started)))")
}

run() {
    "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())'
    nvidia-smi --query-gpu=name,driver_version,memory.used,utilization.gpu,clocks.sm --format=csv 2>/dev/null

    phase build 120 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
    phase tests 140 "$PYTHON" -m pytest tests/test_cuda.py tests/test_gpu_linear.py -q --maxfail=20 -p no:cacheprovider \
        --junit-xml="$OUT/$machine-tests.xml"
    phase tune 80 "$PYTHON" -m dlkernels tune --seconds 60
    cp "dlkernels/gpu/tables/$machine.json" "$OUT/$machine-tiles.json"
    phase bench 190 "$PYTHON" -m dlkernels bench --device cuda --json "$OUT/$machine.json"
    phase models 60 "$PYTHON" -m dlkernels train mlp --device cuda --json "$OUT/$machine-models.json"

    printf '\n== %s, %s s\n' "$machine" "$SECONDS"
    printf '%s\n' "${rows[@]}"
    "$PYTHON" -c "$MEANS" "$OUT/$machine.json"
    ((failures == 0))
}

run 2>&1 | tee "$OUT/$machine.log"
exit "${PIPESTATUS[0]}"
